"""Tiles of `channels x positions` over [N, C, H, W] tensors in any memory format.

A tile belongs to one sample. Channels run along its columns in NHWC and along its rows in NCHW, so the columns
are always what lies side by side in memory. Nothing is copied: each tensor brings its own strides.

Triton vectorises a load only where it can prove alignment, and all it knows of an integer argument is whether
16 divides it. Sizes and strides are therefore passed in units of `vec`, the largest of 1, 2, 4, 8 that divides
the inner size and all outer strides, and multiplied back in the kernel: 24 channels or 196 pixels still load in
vectors. Tiles start at 64-bit offsets; within a tile offsets take 32 bits where they can (half the registers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import layout, tuned
from .integers import cdiv, is_power_of_2


class Walk(NamedTuple):
    """The compile-time half of a geometry, handed to kernels as one constant.

    Attributes:
        channels_last: whether channels run along the columns of a tile.
        collapsed: whether one stride leads from position to position.
        wide: whether offsets within a tile, or positions, need 64 bits.
        vec: unit of the inner size and the outer strides, in elements.
        block_c, block_p: channels and positions of a tile.
    """

    channels_last: bool
    collapsed: bool
    wide: bool
    vec: int
    block_c: int
    block_p: int


# ---- pieces of kernels -----------------------------------------------------------------------------------
# `sizes` is (sample_tiles, channels, positions, width) and `strides` (n, c, h, w), as Geometry hands them out.


@triton.jit
def block_channels(WALK: tl.constexpr):
    """The channels [block_c] of this program: axis 0 of the grid runs over channel blocks."""
    return tl.program_id(0).to(tl.int64) * WALK.block_c + tl.arange(0, WALK.block_c)


@triton.jit
def num_channels(sizes, WALK: tl.constexpr):
    if WALK.channels_last:
        return sizes[1] * WALK.vec
    else:
        return sizes[1]


@triton.jit
def num_positions(sizes, WALK: tl.constexpr):
    if WALK.channels_last:
        return sizes[2]
    else:
        return sizes[2] * WALK.vec


@triton.jit
def tile_place(tile, sizes, WALK: tl.constexpr):
    """Where tile number `tile` of this program's channel block lies: sample, first position, and its mask."""
    sample = (tile // sizes[0]).to(tl.int64)
    if WALK.wide:
        first = (tile % sizes[0]).to(tl.int64) * WALK.block_p
    else:
        first = (tile % sizes[0]) * WALK.block_p
    position_ok = first + tl.arange(0, WALK.block_p) < num_positions(sizes, WALK)
    channel_ok = block_channels(WALK) < num_channels(sizes, WALK)
    if WALK.channels_last:
        mask = position_ok[:, None] & channel_ok[None, :]
    else:
        mask = channel_ok[:, None] & position_ok[None, :]
    return sample, first, mask


@triton.jit
def tile_pointers(ptr, place, sizes, strides, WALK: tl.constexpr):
    """Pointers to a tile of one tensor."""
    sample, first, _ = place
    lane_c = tl.arange(0, WALK.block_c)
    lane_p = tl.arange(0, WALK.block_p)
    if WALK.wide:
        lane_c = lane_c.to(tl.int64)
        lane_p = lane_p.to(tl.int64)
    UNIT_C: tl.constexpr = 1 if WALK.channels_last else WALK.vec
    UNIT_P: tl.constexpr = WALK.vec if WALK.channels_last else 1

    start = tl.program_id(0).to(tl.int64) * WALK.block_c * strides[1] * UNIT_C + sample * strides[0] * WALK.vec
    across = lane_c * strides[1] * UNIT_C
    if WALK.collapsed:
        start += first.to(tl.int64) * strides[3] * UNIT_P
        along = lane_p * strides[3] * UNIT_P
    else:
        width = sizes[3] if WALK.channels_last else sizes[3] * WALK.vec
        position = first + lane_p
        along = (position // width) * strides[2] * WALK.vec + (position % width) * strides[3] * UNIT_P
    if WALK.channels_last:
        return ptr + start + (along[:, None] + across[None, :])
    else:
        return ptr + start + (across[:, None] + along[None, :])


@triton.jit
def load_tile(ptr, place, sizes, strides, WALK: tl.constexpr):
    """The values of a tile as fp32, 0 outside the tensor."""
    pointers = tile_pointers(ptr, place, sizes, strides, WALK)
    return tl.load(pointers, mask=place[2], other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, value, place, sizes, strides, WALK: tl.constexpr):
    pointers = tile_pointers(ptr, place, sizes, strides, WALK)
    tl.store(pointers, value.to(ptr.dtype.element_ty), mask=place[2])


@triton.jit
def zero_tile(WALK: tl.constexpr):
    """An fp32 accumulator in the shape of a tile."""
    if WALK.channels_last:
        return tl.full((WALK.block_p, WALK.block_c), 0.0, tl.float32)
    else:
        return tl.full((WALK.block_c, WALK.block_p), 0.0, tl.float32)


@triton.jit
def load_per_channel(ptr, default, sizes, WALK: tl.constexpr):
    """[block_c] fp32 values of a [C] vector, `default` where there is no vector."""
    channel = block_channels(WALK)
    if ptr is not None:
        values = tl.load(ptr + channel, mask=channel < num_channels(sizes, WALK), other=0.0).to(tl.float32)
    else:
        values = tl.full((WALK.block_c,), default, tl.float32)
    return values


@triton.jit
def store_per_channel(ptr, row, values, sizes, WALK: tl.constexpr):
    """Writes [block_c] values into row `row` of [rows, C] partials."""
    channel = block_channels(WALK)
    channels = num_channels(sizes, WALK)
    tl.store(ptr + row.to(tl.int64) * channels + channel, values, mask=channel < channels)


@triton.jit
def over_tile(per_channel, WALK: tl.constexpr):
    """[block_c] values in the shape that broadcasts over a tile."""
    if WALK.channels_last:
        return per_channel[None, :]
    else:
        return per_channel[:, None]


@triton.jit
def sum_per_channel(tile, WALK: tl.constexpr):
    """Sums a tile over its positions into [block_c]."""
    if WALK.channels_last:
        return tl.sum(tile, axis=0)
    else:
        return tl.sum(tile, axis=1)


# ---- launches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileConfig:
    """A tile of `block_c` channels by `block_p` positions, and how many warps and programs walk such tiles.

    Attributes:
        programs: programs per multiprocessor that are asked for.
    """

    block_c: int
    block_p: int
    num_warps: int
    programs: int


class TileKey(NamedTuple):
    """What a launch configuration depends on besides the GPU; sizes as in Geometry."""

    kernel: str
    element_bytes: int
    samples: int
    channels: int
    positions: int
    channels_last: bool
    vec: int


def tile_size(channels: int, positions: int, channels_last: bool, vec: int) -> tuple[int, int]:
    """(block_c, block_p) whose columns cover the inner size with least waste: up to 64 channels or 1024 pixels.

    Elements that must be loaded one by one, each by its own pointer, need many registers: they get half a tile.
    """
    elements = 2048 if vec >= 4 else 1024
    if channels_last:
        block_c = next((c for c in (8, 16, 32) if c >= channels), 64)
        return block_c, elements // block_c
    if channels == 1:
        return 1, elements
    block_p = next((p for p in (16, 64, 256) if p >= positions), 1024)
    return elements // block_p, block_p


def _neighbours(key: TileKey, config: TileConfig) -> Iterator[TileConfig]:
    """Tiles of half and twice the size or of another shape; more or fewer warps and programs."""
    yield from tuned.halved_and_doubled(config, "block_c", "block_p", "num_warps", "programs")
    for c, p in ((config.block_c // 2, config.block_p * 2), (config.block_c * 2, config.block_p // 2)):
        yield replace(config, block_c=c, block_p=p)
    for factor in (2, 4):  # the same elements per thread in smaller programs, of which there are more
        yield replace(
            config,
            block_p=config.block_p // factor,
            num_warps=max(1, config.num_warps // factor),
            programs=config.programs * factor,
        )


def _objection(key: TileKey, config: TileConfig) -> str | None:
    for name in ("block_c", "block_p"):
        if not is_power_of_2(getattr(config, name)):
            return f"{name}={getattr(config, name)}; it must be a power of two"
    if config.block_c * config.block_p > MOST_ELEMENTS:
        return f"block_c={config.block_c} times block_p={config.block_p}; a tile has up to {MOST_ELEMENTS} elements"
    if config.programs > MOST_PROGRAMS_WANTED:
        return f"programs={config.programs}; it must be up to {MOST_PROGRAMS_WANTED}"
    return None


def tunable(name: str) -> tuned.Tunable:
    """The launch configurations of a file of kernels that walk tiles."""
    return tuned.Tunable(name, TileKey, TileConfig, _neighbours, _objection)


class Launch(NamedTuple):
    """A kernel that walks tiles, and what the heuristic gives it.

    Attributes:
        name: the kernel's, within its file.
        num_warps: warps per program.
        programs: programs per multiprocessor that are asked for.
    """

    tunable: tuned.Tunable
    name: str
    num_warps: int
    programs: int


SIZE_ARGUMENTS = ("sample_tiles", "channels", "positions", "width")

# Offsets within a tile that reach this far take 64 bits.
WIDE_FROM = 2**31 - 1

# What a measured configuration may ask for at most: 32 KiB of fp32, and more programs than any GPU holds at once.
MOST_ELEMENTS = 8192
MOST_PROGRAMS_WANTED = 256


@dataclass(frozen=True)
class Geometry:
    """How a set of equally shaped [N, C, H, W] tensors is walked.

    Attributes:
        samples, channels, positions, width: sizes, after rows (and, where allowed, samples) are merged.
        strides: (n, c, h, w) of each tensor, in elements.
        channels_last: whether channels are the inner size.
        collapsed: whether every tensor steps from position to position with one stride.
        vec: what divides the inner size and all outer strides (1, 2, 4 or 8).
        tile: how it is cut.
    """

    samples: int
    channels: int
    positions: int
    width: int
    strides: tuple[tuple[int, int, int, int], ...]
    channels_last: bool
    collapsed: bool
    vec: int
    tile: TileConfig

    @property
    def sample_tiles(self) -> int:
        return cdiv(self.positions, self.tile.block_p)

    @property
    def channel_blocks(self) -> int:
        return cdiv(self.channels, self.tile.block_c)

    @property
    def walk(self) -> Walk:
        tile = self.tile
        reach = [self.positions + tile.block_p]
        for _, c, h, w in self.strides:
            along = tile.block_p * w if self.collapsed else self.positions // self.width * h + self.width * w
            reach.append(tile.block_c * c + along)
        wide = max(reach) >= WIDE_FROM
        return Walk(self.channels_last, self.collapsed, wide, self.vec, tile.block_c, tile.block_p)

    def size_arguments(self) -> tuple[int, int, int, int]:
        """SIZE_ARGUMENTS as the kernels take them."""
        if self.channels_last:
            return self.sample_tiles, self.channels // self.vec, self.positions, self.width
        return self.sample_tiles, self.channels, self.positions // self.vec, self.width // self.vec

    def stride_arguments(self) -> tuple[int, ...]:
        """The strides of all tensors, one after the other, as the kernels take them."""
        v = self.vec
        if self.channels_last:
            units = [(n // v, c, h // v, w // v) for n, c, h, w in self.strides]
        else:
            units = [(n // v, c // v, h // v, w) for n, c, h, w in self.strides]
        return tuple(stride for strides in units for stride in strides)

    def reordered(self, *order: int) -> Geometry:
        """The same walk with its tensors in another order."""
        return replace(self, strides=tuple(self.strides[index] for index in order))

    def split(self, device: torch.device, most: int) -> Split:
        """Cuts each channel block's tiles into runs, enough of them to keep the device busy, and `most` at most."""
        tiles = self.samples * self.sample_tiles
        wanted = cdiv(self.tile.programs * multiprocessors(device), self.channel_blocks)
        tiles_per_program = cdiv(tiles, max(1, min(wanted, most, tiles)))
        return Split(tiles, tiles_per_program, cdiv(tiles, tiles_per_program))


@dataclass(frozen=True)
class Split:
    """`tiles` of one channel block, in `programs` runs of `tiles_per_program`."""

    tiles: int
    tiles_per_program: int
    programs: int


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; Hopper's for tensors elsewhere (interpreted, or compiled and not run)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def new_output(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised dense tensor of x's shape and memory format."""
    return layout.new_output(x, x.shape, dtype)


def flat_samples(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors as [N, 1, 1, C * H * W], where all their samples are dense in the same order; else as they are.

    For work that does not tell channels apart.
    """
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if all(t.is_contiguous(memory_format=memory_format) for t in tensors):
            size = tensors[0].shape[1:].numel()
            return [t.as_strided((t.shape[0], 1, 1, size), (size, size, size, 1)) for t in tensors]
    return list(tensors)


def _channels_are_inner(x: torch.Tensor) -> bool:
    """As `layout.is_channels_last`, and where there is no second pixel to lie beside the first."""
    return layout.is_channels_last(x) or (x.shape[1] > 1 and x.stride(1) == 1 and x.shape[3] == 1)


def geometry(tensors: Sequence[torch.Tensor], launch: Launch, *, merge_samples: bool) -> Geometry:
    """How to walk `tensors`, all [N, C, H, W] of one shape; the first one decides which way tiles lie.

    Args:
        launch: the kernel that will.
        merge_samples: whether positions of several samples may share a tile (in NHWC they then do).
    """
    samples, channels, height, width = tensors[0].shape
    channels_last = _channels_are_inner(tensors[0])
    strides = [_strides(t) for t in tensors]

    collapsed = height == 1 or width == 1 or all(h == width * w for _, _, h, w in strides)
    positions = height * width
    if collapsed:
        strides = [(n, c, 0, w if width > 1 else h) for n, c, h, w in strides]
        width = positions
        if merge_samples and channels_last:
            if positions == 1:
                strides = [(0, c, 0, n) for n, c, _, _ in strides]
                samples, positions = 1, samples
            elif samples == 1 or all(n == positions * w for n, _, _, w in strides):
                samples, positions = 1, samples * positions
                strides = [(0, c, 0, w) for _, c, _, w in strides]
            width = positions
    inner = channels if channels_last else width
    outer = [step for n, c, h, w in strides for step in ((n, h, w) if channels_last else (n, c, h))]
    vec = next(v for v in (8, 4, 2, 1) if all(size % v == 0 for size in (inner, *outer)))
    key = TileKey(launch.name, tensors[0].element_size(), samples, channels, positions, channels_last, vec)

    def heuristic() -> TileConfig:
        return TileConfig(*tile_size(channels, positions, channels_last, vec), launch.num_warps, launch.programs)

    tile = launch.tunable.config(tensors[0], key, heuristic)
    return Geometry(samples, channels, positions, width, tuple(strides), channels_last, collapsed, vec, tile)


def _strides(x: torch.Tensor) -> tuple[int, int, int, int]:
    """x's strides, with 0 for axes of size 1, whose stride means nothing."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride()))
