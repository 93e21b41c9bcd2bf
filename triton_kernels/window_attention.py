"""Launchers of windowed attention, forward and backward; see window_attention_kernels.py for what the kernels do.

Trips of the large tensors through memory:

    forward     read qkv [B, H, W, 3C], write y [B, H, W, C]
    backward    read qkv and dy, write dqkv; where a window takes several tiles, read qkv and dy three times

Neither probabilities nor their row sums are kept between the two. In windows of one tile, 4 bytes per token and head
written and read would save a few instructions on scores that backward has in registers anyway; in larger windows they
would save about a tenth of backward's instructions, but only together with y, which nothing else here keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from . import tuned
from .batch_statistics import MAX_REGISTERS, sum_partials
from .channel_tile import compute_capability
from .integers import cdiv, is_power_of_2, next_power_of_2
from .replay import launch_kernel, remembers
from .window_attention_kernels import (
    _expand_bias_kernel,
    _table_grad_kernel,
    _window_attention_backward_kernel,
    _window_attention_bias_grad_kernel,
    _window_attention_forward_kernel,
    _window_attention_key_grad_kernel,
    _window_attention_query_grad_kernel,
)

# Programs per multiprocessor that forward asks for before it gives a program several windows, and the most windows
# that share one load of the bias.
FORWARD_PROGRAMS = 32
MOST_WINDOWS = 8
# For windows of one tile on Hopper: with three buffers a program loads its next window in time. On an H200 this took 21
# to 31% less than two buffers, 168 registers and as many programs as there are windows.
HOPPER_PROGRAMS, HOPPER_STAGES = 8, 3
# The most registers with which three, and four, programs of four warps fit a multiprocessor.
THREE_PROGRAMS_REGISTERS = 168
FOUR_PROGRAMS_REGISTERS = 128
# Programs per multiprocessor in backward, where each leaves a partial sum of the bias gradient.
BACKWARD_PROGRAMS = 8
# What a measured configuration may ask for at most.
MOST_PROGRAMS_WANTED = 256


@dataclass(frozen=True)
class Tile:
    """How a window is cut: `query_tiles` tiles of `block_q` queries, `key_tiles` of `block_k` keys.

    Attributes:
        block_d: channels of a head, padded to a power of two.
        max_registers: the compiler's limit per thread.
        programs: programs per multiprocessor that are asked for before one takes several windows.
    """

    block_q: int
    block_k: int
    query_tiles: int
    key_tiles: int
    block_d: int
    num_warps: int
    num_stages: int
    max_registers: int = MAX_REGISTERS
    programs: int = 1

    @property
    def rows(self) -> int:
        return self.block_q * self.query_tiles

    @property
    def columns(self) -> int:
        return self.block_k * self.key_tiles

    def constants(self) -> dict:
        return {
            "BLOCK_D": self.block_d,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "QUERY_TILES": self.query_tiles,
            "KEY_TILES": self.key_tiles,
        }


def _tiles(tokens: int, block_q: int, block_k: int, block_d: int, num_warps: int, num_stages: int = 2) -> Tile:
    query_tiles, key_tiles = cdiv(tokens, block_q), cdiv(tokens, block_k)
    return Tile(block_q, block_k, query_tiles, key_tiles, block_d, num_warps, num_stages)


def _row_bytes(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(head_dim as tiles hold it, bytes of such a row)."""
    block_d = _padded_head_dim(head_dim)
    return block_d, block_d * dtype.itemsize


def _padded_head_dim(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def forward_tile(tokens: int, head_dim: int, dtype: torch.dtype, vectors: bool = True) -> Tile:
    """One tile up to 64 tokens; beyond, 64 queries against key tiles of 32, or of 64 where those fill up no more.

    head_dim is padded to a power of two. Rows too long for registers go in tiles of 32 by 32: fp32 heads of more
    than 32 channels, and all such where vectors cannot load them (`vectors` False) and each element takes an address.
    """
    block_d, row_bytes = _row_bytes(head_dim, dtype)
    short = row_bytes <= 64
    if tokens <= 32:
        return _small_tile(tokens, block_d, row_bytes, dtype, num_warps=(1 if short else 2) * (1 if vectors else 4))
    if dtype == torch.float32:
        block = 64 if tokens <= 64 and row_bytes <= 128 else 32
        return _tiles(tokens, block, block, block_d, num_warps=8, num_stages=1)
    if not (short or vectors):
        return _tiles(tokens, 32, 32, block_d, num_warps=8, num_stages=1)
    if tokens > 64 and row_bytes > 128:
        return _tiles(tokens, 64, 32, block_d, num_warps=8, num_stages=1)
    block_k = 64 if tokens <= 64 or tokens % 64 == 0 else 32
    return _tiles(tokens, 64, block_k, block_d, 4 if vectors else 8, num_stages=2 if row_bytes <= 128 else 1)


def _forward_residence(tile: Tile, masked: bool, capability: tuple[int, int]) -> Tile:
    """The tile with its registers and programs, for as many programs at a time as fit without spilling.

    A named limit keeps ptxas from spilling at 32 registers where there is room for all. Padding and shifts, whose masks
    take registers (`masked`), leave four programs on Hopper with a spill.
    """
    fits = tile.block_q == 64 and tile.block_d <= 32 and tile.num_warps == 4 and capability[0] != 10
    large = tile.block_k == 64 and tile.key_tiles > 1
    registers = THREE_PROGRAMS_REGISTERS if fits and not large else MAX_REGISTERS
    if fits and tile.key_tiles == 1 and capability[0] == 9:
        registers = registers if masked else FOUR_PROGRAMS_REGISTERS
        return replace(tile, max_registers=registers, programs=HOPPER_PROGRAMS, num_stages=HOPPER_STAGES)
    return replace(tile, max_registers=registers, programs=FORWARD_PROGRAMS)


def backward_tile(
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    vectors: bool = True,
    padded: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> Tile:
    """One tile up to 64 tokens where rows are short enough for its registers; else tiles of 32 by 32.

    Small tiles are less padding (144 tokens are 4.5 of them but 2.25 of 64) and two warps share one. They are 16 by 16
    where every element of a long row takes an address (`vectors` False). Sums over the padding of a map (`padded`) take
    registers too, and so do products whose operands are not read from shared memory (all but sm_90 and sm_100).
    """
    block_d, row_bytes = _row_bytes(head_dim, dtype)
    short = row_bytes <= 64
    if tokens <= 32:
        return _small_tile(tokens, block_d, row_bytes, dtype, num_warps=(2 if short else 4) if vectors else 8)
    if tokens <= 64 and row_bytes <= 128 and vectors:
        if dtype == torch.float32:
            block = 32 if padded else 64
            return _tiles(tokens, block, block, block_d, num_warps=8, num_stages=1)
        if capability[0] == 9:
            return _tiles(tokens, 64, 64, block_d, num_warps=4 if short else 8)
        if capability[0] == 10:
            return _tiles(tokens, 64, 64, block_d, num_warps=8 if padded or not short else 4, num_stages=1)
        if short and not padded:
            return _tiles(tokens, 64, 64, block_d, num_warps=4, num_stages=1)
    if not vectors and block_d > (32 if dtype == torch.float32 else 64):
        return _tiles(tokens, 16, 16, block_d, num_warps=8, num_stages=1)
    if dtype == torch.float32 or row_bytes > 128:
        return _tiles(tokens, 32, 32, block_d, num_warps=8, num_stages=1)
    num_warps, num_stages = (2 if short else 4, 2) if vectors else (4 if short else 8, 1)
    return _tiles(tokens, 32, 32, block_d, num_warps, num_stages)


def _small_tile(tokens: int, block_d: int, row_bytes: int, dtype: torch.dtype, num_warps: int) -> Tile:
    """A window of up to 32 tokens in one tile; `num_warps` in half precision."""
    block = 16 if tokens <= 16 else 32
    if dtype == torch.float32:
        return _tiles(tokens, block, block, block_d, num_warps=4 if block == 16 else 8, num_stages=1)
    return _tiles(tokens, block, block, block_d, num_warps=num_warps)


class Key(NamedTuple):
    """What a launch configuration depends on besides the GPU; as in forward_tile and backward_tile."""

    kernel: str
    element_bytes: int
    windows: int
    heads: int
    tokens: int
    head_dim: int
    vectors: bool
    padded: bool


def _neighbours(key: Key, config: Tile) -> Iterator[Tile]:
    """Tiles of half and twice the size, and other warps, stages, registers and programs."""

    def tiles(block_q: int, block_k: int) -> Tile:
        counts = {"query_tiles": cdiv(key.tokens, block_q), "key_tiles": cdiv(key.tokens, block_k)}
        return replace(config, block_q=block_q, block_k=block_k, **counts)

    yield tiles(max(16, config.block_q // 2), max(16, config.block_k // 2))
    yield tiles(config.block_q * 2, config.block_k * 2)
    if key.kernel == "forward":
        yield tiles(max(16, config.block_q // 2), config.block_k)
        yield tiles(config.block_q * 2, config.block_k)
        yield tiles(config.block_q, max(16, config.block_k // 2))
        yield tiles(config.block_q, config.block_k * 2)
    yield from tuned.halved_and_doubled(config, "num_warps", "programs")
    for num_stages in (1, 2, 3):
        yield replace(config, num_stages=num_stages)
    for max_registers in (128, THREE_PROGRAMS_REGISTERS, MAX_REGISTERS):
        yield replace(config, max_registers=max_registers)


def _objection(key: Key, config: Tile) -> str | None:
    most = max(16, next_power_of_2(key.tokens))
    for block, count in (("block_q", "query_tiles"), ("block_k", "key_tiles")):
        size, tiles = getattr(config, block), getattr(config, count)
        if not is_power_of_2(size) or not 16 <= size <= min(most, 128):
            return f"{block}={size}; it must be a power of two from 16 to {min(most, 128)}"
        if tiles != cdiv(key.tokens, size):
            return f"{count}={tiles}; for {key.tokens} tokens and {block}={size} it is {cdiv(key.tokens, size)}"
    if config.block_q != config.block_k and (key.kernel == "backward" or config.key_tiles == 1):
        return (
            f"block_q={config.block_q} and block_k={config.block_k}; they must be the same in backward, and where one "
            "tile holds all keys"
        )
    if config.block_d != _padded_head_dim(key.head_dim):
        return f"block_d={config.block_d}; for heads of {key.head_dim} channels it is {_padded_head_dim(key.head_dim)}"
    if config.num_stages > 4:
        return f"num_stages={config.num_stages}; it must be up to 4"
    if config.max_registers > MAX_REGISTERS:
        return f"max_registers={config.max_registers}; it must be up to {MAX_REGISTERS}"
    if config.programs > MOST_PROGRAMS_WANTED:
        return f"programs={config.programs}; it must be up to {MOST_PROGRAMS_WANTED}"
    return None


TUNABLE = tuned.Tunable("window_attention", Key, Tile, _neighbours, _objection)


@dataclass(frozen=True)
class _Map:
    """The windows of a call, as the kernels take them."""

    windows: int
    heads: int
    geometry: tuple[int, ...]
    constants: dict
    padded: bool

    @property
    def head_dim(self) -> int:
        return self.constants["HEAD_DIM"]

    def key(self, kernel: str, qkv: torch.Tensor, tokens: int, vectors: bool, padded: bool) -> Key:
        return Key(kernel, qkv.element_size(), self.windows, self.heads, tokens, self.head_dim, vectors, padded)


def _map(qkv, num_heads, window_size, shift_size, pad_order) -> _Map:
    batch, height, width, channels = qkv.shape
    down, across = cdiv(height, window_size[0]), cdiv(width, window_size[1])
    pad_first = pad_order == "pad_then_shift"
    # Where the map is smaller than the shift, rolling goes round more than once.
    roll = shift_size if pad_first else (shift_size[0] % height, shift_size[1] % width)
    constants = {
        "WINDOW_H": window_size[0],
        "WINDOW_W": window_size[1],
        "SHIFT_H": shift_size[0],
        "SHIFT_W": shift_size[1],
        "PAD_FIRST": pad_first,
        "HEAD_DIM": channels // (3 * num_heads),
    }
    padded = down * window_size[0] != height or across * window_size[1] != width
    return _Map(batch * down * across, num_heads, (height, width, down, across, *map(int, roll)), constants, padded)


def _expand_bias(table: torch.Tensor, window_size: tuple[int, int], tile: Tile) -> torch.Tensor:
    """The bias of every query and key, fp32 [heads, rows, columns] with -inf in columns beyond the window."""
    heads = table.shape[1]
    bias = table.new_empty((heads, tile.rows, tile.columns), dtype=torch.float32)
    block = 16
    launch_kernel(
        _expand_bias_kernel,
        (tile.rows // block, heads),
        table,
        bias,
        table.stride(),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        WINDOW_H=window_size[0],
        WINDOW_W=window_size[1],
        BLOCK_Q=block,
        BLOCK_K=tile.block_k,
        num_warps=4,
    )
    return bias


def _windows_per_program(device: torch.device, windows: int, programs_per_window: int, programs_wanted: int, most: int):
    """Windows that a program walks over, so that there are about `programs_wanted` programs per multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(most, windows * programs_per_window // (processors * programs_wanted)))


def _on_device(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@remembers
def forward(
    qkv: torch.Tensor,
    table: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    scale: float,
    pad_order: str,
    mask_value: float,
) -> torch.Tensor:
    """Attention inside the windows of `[B, H, W, 3C]` qkv with at least one element, in any strides.

    Args:
        qkv: fp32, fp16 or bf16; channels (3, num_heads, head_dim), head_dim up to 128.
        table: `[(2 wh - 1)(2 ww - 1), num_heads]`, fp32, fp16 or bf16.
        qkv_bias: `[3C]`, the qkv of padding; None for zeros.
        window_size: (height, width), up to 256 tokens.
        shift_size: (height, width), smaller than the window.
        pad_order: "shift_then_pad" or "pad_then_shift".

    Returns:
        y `[B, H, W, C]`, contiguous, in qkv's dtype; besides it only the bias matrices are allocated.
    """
    walked = _map(qkv, num_heads, window_size, shift_size, pad_order)
    tokens, vectors = window_size[0] * window_size[1], _loads_vectors(qkv)

    def heuristic() -> Tile:
        tile = forward_tile(tokens, walked.head_dim, qkv.dtype, vectors)
        masked = walked.padded or any(shift_size)
        return _forward_residence(tile, masked, compute_capability(qkv.device))

    tile = TUNABLE.config(qkv, walked.key("forward", qkv, tokens, vectors, walked.padded), heuristic)
    y = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    with _on_device(qkv):
        bias = _expand_bias(table, window_size, tile)
        programs = num_heads * tile.query_tiles
        walk = _windows_per_program(qkv.device, walked.windows, programs, tile.programs, MOST_WINDOWS)
        launch_kernel(
            _window_attention_forward_kernel,
            (cdiv(walked.windows, walk) * programs,),
            qkv,
            bias,
            _fill(qkv, qkv_bias, walked),
            y,
            walked.windows,
            walk,
            num_heads,
            walked.geometry,
            qkv.stride(),
            y.stride()[:3],
            scale,
            mask_value,
            **walked.constants,
            **tile.constants(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )
    return y


def _loads_vectors(*tensors: torch.Tensor) -> bool:
    """Whether rows of a head load 16 bytes at a time: by the compiler's rule, strides that are multiples of 16."""
    return all(t.stride(3) == 1 and all(stride % 16 == 0 for stride in t.stride()[:3]) for t in tensors)


def _fill(qkv: torch.Tensor, qkv_bias: torch.Tensor | None, walked: _Map) -> torch.Tensor | None:
    """What padding holds, in qkv's dtype; None where there is none or it holds zeros."""
    return qkv_bias.to(qkv.dtype).contiguous() if qkv_bias is not None and walked.padded else None


@remembers
def backward(
    grad_y: torch.Tensor,
    qkv: torch.Tensor,
    table: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    scale: float,
    pad_order: str,
    mask_value: float,
    needs_table_grad: bool,
    needs_bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of qkv, of the table and of qkv_bias, the last two None where they are not needed.

    Takes grad_y `[B, H, W, C]` in any strides and forward's arguments. qkv's gradient is contiguous; the table's comes
    in its dtype and qkv_bias's, which is that of the padding alone, in fp32.
    """
    walked = _map(qkv, num_heads, window_size, shift_size, pad_order)
    tokens, vectors = window_size[0] * window_size[1], _loads_vectors(qkv, grad_y)
    padded = walked.padded and needs_bias_grad

    def heuristic() -> Tile:
        tile = backward_tile(tokens, walked.head_dim, qkv.dtype, vectors, padded, compute_capability(qkv.device))
        return replace(tile, programs=BACKWARD_PROGRAMS)

    tile = TUNABLE.config(qkv, walked.key("backward", qkv, tokens, vectors, padded), heuristic)
    grad_qkv = qkv.new_empty(qkv.shape)
    with _on_device(qkv):
        bias = _expand_bias(table, window_size, tile)
        tensors = (grad_y, qkv, bias, _fill(qkv, qkv_bias, walked))
        strides = (walked.geometry, grad_y.stride(), qkv.stride())
        grad_strides = grad_qkv.stride()[:3]
        options = {**walked.constants, **tile.constants(), "num_warps": tile.num_warps, "num_stages": tile.num_stages}
        options["maxnreg"] = tile.max_registers

        def walk(tiles: int) -> tuple[int, int, int]:
            """(programs, parts that the windows are cut into, windows of a part) where a window has `tiles` tiles."""
            programs = num_heads * tiles
            each = _windows_per_program(qkv.device, walked.windows, programs, tile.programs, walked.windows)
            parts = cdiv(walked.windows, each)
            return programs * parts, parts, each

        def padding_sums(parts: int) -> torch.Tensor | None:
            if not (needs_bias_grad and walked.padded):
                return None
            return qkv.new_empty((parts * tile.key_tiles, 2 * num_heads * walked.head_dim), dtype=torch.float32)

        def bias_sums(parts: int) -> torch.Tensor | None:
            if not needs_table_grad:
                return None
            return qkv.new_empty((parts, num_heads, tile.rows, tile.columns), dtype=torch.float32)

        if tile.key_tiles == 1:
            programs, parts, each = walk(1)
            bias_partials, padding_partials = bias_sums(parts), padding_sums(parts)
            sizes = (walked.windows, each, num_heads, *strides, grad_strides, scale, mask_value)
            launch_kernel(
                _window_attention_backward_kernel,
                (programs,),
                *tensors,
                grad_qkv,
                bias_partials,
                padding_partials,
                *sizes,
                **options,
            )
        else:
            # Per query the logarithm of its scores' sum and the sum of probabilities times their gradients.
            row_sums = qkv.new_empty((walked.windows, num_heads, 2, tile.rows), dtype=torch.float32)
            programs, parts, each = walk(tile.query_tiles)
            sizes = (walked.windows, each, num_heads, *strides, grad_strides, scale, mask_value)
            launch_kernel(
                _window_attention_query_grad_kernel, (programs,), *tensors, grad_qkv, row_sums, *sizes, **options
            )
            programs, parts, each = walk(tile.key_tiles)
            padding_partials = padding_sums(parts)
            sizes = (walked.windows, each, num_heads, *strides, grad_strides, scale, mask_value)
            launch_kernel(
                _window_attention_key_grad_kernel,
                (programs,),
                *tensors,
                grad_qkv,
                padding_partials,
                row_sums,
                *sizes,
                **options,
            )
            programs, parts, each = walk(tile.query_tiles * tile.key_tiles)
            bias_partials = bias_sums(parts)
            if needs_table_grad:
                sizes = (walked.windows, each, num_heads, *strides, scale, mask_value)
                launch_kernel(
                    _window_attention_bias_grad_kernel,
                    (programs,),
                    *tensors,
                    bias_partials,
                    row_sums,
                    *sizes,
                    **options,
                )
        grad_table = _table_grad(bias_partials, table, window_size) if needs_table_grad else None
        grad_bias = _qkv_bias_grad(padding_partials, qkv_bias) if needs_bias_grad else None
    return grad_qkv, grad_table, grad_bias


def _table_grad(partials: torch.Tensor, table: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """The second stage: partials [parts, heads, rows, columns] summed, and the sums by relative position."""
    parts, heads, rows, columns = partials.shape
    grad_bias = sum_partials(partials.flatten(1)) if parts > 1 else partials
    grad_table = table.new_empty(table.shape)
    block_r = 16
    launch_kernel(
        _table_grad_kernel,
        (cdiv(table.shape[0], block_r), heads),
        grad_bias,
        grad_table,
        heads,
        ROWS=rows,
        COLUMNS=columns,
        WINDOW_H=window_size[0],
        WINDOW_W=window_size[1],
        BLOCK_R=block_r,
        BLOCK=next_power_of_2(window_size[0] * window_size[1]),
        num_warps=4,
    )
    return grad_table


def _qkv_bias_grad(partials: torch.Tensor | None, qkv_bias: torch.Tensor) -> torch.Tensor:
    """fp32 [3C]: zero for q, as nobody asks what padding attends to."""
    grad = qkv_bias.new_zeros(qkv_bias.shape, dtype=torch.float32)
    if partials is not None:
        grad[qkv_bias.shape[0] // 3 :] = sum_partials(partials)
    return grad
