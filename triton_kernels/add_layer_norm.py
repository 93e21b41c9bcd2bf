"""total = residual + branch * layer_scale * multiplier and LayerNorm of total, forward and backward, for [rows, C].

A tile holds whole rows in registers, up to 2048 channels, so that every value passes through memory once. A dropped
sample (multiplier 0) does not read its branch. Trips of the large tensors, with p the share of dropped samples:

    forward                       read residual, (1 - p) branch, write total, normalised
    backward                      read total, dtotal, dnormalised, write dresidual, dbranch
    ... without drop or scale     the same without dbranch, which is dresidual then
    ... with layer scale          the same, and read (1 - p) branch for the scale's gradient

The forward keeps mean and 1 / deviation, 8 bytes per row: 1% of its bytes at 96 channels in half precision and less
beyond, for which the backward needs two sums per row instead of four. The gradients of weight, bias and layer scale
go through one row of partials per program and a second stage in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import tuned
from .batch_statistics import sum_partials_into
from .channel_tile import multiprocessors
from .integers import cdiv, is_power_of_2, next_power_of_2
from .layout import dense, spaced_rows
from .replay import launch_kernel, remembers

MOST_CHANNELS = 2048

# Programs per multiprocessor. Those that leave partials are no more than reside at once, and have rows enough that
# their partials (16 bytes per channel, written and read) stay below a tenth of what they move in half precision.
ELEMENTWISE_PROGRAMS = 32
REDUCING_PROGRAMS = 8
LEAST_ROWS_OF_PARTIALS = 16

# Row numbers that reach this far take 64 bits.
WIDE_FROM = 2**31 - 1

# What a measured configuration may ask for at most: 32 KiB of fp32, and more programs than any GPU holds at once.
MOST_ELEMENTS = 8192
MOST_PROGRAMS_WANTED = 256


# ---- pieces of kernels -----------------------------------------------------------------------------------


@triton.jit
def _tile_rows(tile, rows, BLOCK_R: tl.constexpr, WIDE: tl.constexpr):
    """The row numbers [BLOCK_R] of a tile, and which of them exist."""
    row = tile * tl.full((), BLOCK_R, tl.int64 if WIDE else tl.int32) + tl.arange(0, BLOCK_R)
    return row, row < rows


@triton.jit
def _pointers(ptr, row, stride, UNIT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to whole rows `stride * UNIT` elements apart: what divides UNIT divides their distance, says Triton."""
    return ptr + (row.to(tl.int64) * stride * UNIT)[:, None] + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def _per_channel(ptr, default, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[1, BLOCK_C] fp32 values of a [C] vector, `default` where there is no vector."""
    channel = tl.arange(0, BLOCK_C)
    if ptr is not None:
        values = tl.load(ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    else:
        values = tl.full((BLOCK_C,), default, tl.float32)
    return values[None, :]


@triton.jit
def _row_multipliers(multiplier_ptr, row, row_ok, sample_rows, mask):
    """[BLOCK_R, 1] multipliers of the rows' samples, and `mask` without dropped samples."""
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + row // sample_rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        mask = mask & (multiplier != 0.0)
    else:
        multiplier = 1.0
    return multiplier, mask


@triton.jit
def _store_partials(ptr, sums, C: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.arange(0, BLOCK_C)
    tl.store(ptr + channel, tl.sum(sums, axis=0), mask=channel < C)


# ---- kernels ---------------------------------------------------------------------------------------------


# Tile: BLOCK_R whole rows, `tiles_per_program` tiles per program. Reads residual once, branch once where it is kept;
# writes total and normalised once, and 8 bytes per row where a backward will follow. Registers: weight, bias and
# layer scale [BLOCK_C], and one fp32 tile. The mean is taken twice, the second time of the distances to the first:
# a large common offset costs no bits.
@triton.jit
def _add_layer_norm_forward_kernel(
    residual_ptr,
    branch_ptr,
    total_ptr,
    norm_ptr,
    multiplier_ptr,
    layer_scale_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    sample_rows,
    tiles,
    tiles_per_program,
    stride_r,
    stride_b,
    eps,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    channel_ok = (tl.arange(0, BLOCK_C) < C)[None, :]
    scale = _per_channel(layer_scale_ptr, 1.0, C, BLOCK_C)
    weight = _per_channel(weight_ptr, 1.0, C, BLOCK_C)
    bias = _per_channel(bias_ptr, 0.0, C, BLOCK_C)
    first_tile = tl.program_id(0) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        row, row_ok = _tile_rows(tile, rows, BLOCK_R, WIDE)
        mask = row_ok[:, None] & channel_ok
        x = tl.load(_pointers(residual_ptr, row, stride_r, UNIT, BLOCK_C), mask=mask, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            multiplier, kept = _row_multipliers(multiplier_ptr, row, row_ok, sample_rows, mask)
            branch = tl.load(_pointers(branch_ptr, row, stride_b, UNIT, BLOCK_C), mask=kept, other=0.0).to(tl.float32)
            x += tl.where(kept, branch * scale * multiplier, 0.0)
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(_pointers(total_ptr, row, C, 1, BLOCK_C), total, mask=mask)
            x = total.to(tl.float32)

        mean = tl.sum(x, axis=1) / C
        distance = tl.where(mask, x - mean[:, None], 0.0)
        shift = tl.sum(distance, axis=1) / C
        variance = tl.maximum(tl.sum(distance * distance, axis=1) / C - shift * shift, 0.0)
        rstd = 1.0 / tl.sqrt_rn(variance + eps)
        y = (distance - shift[:, None]) * rstd[:, None] * weight + bias
        tl.store(_pointers(norm_ptr, row, C, 1, BLOCK_C), y.to(norm_ptr.dtype.element_ty), mask=mask)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean + shift, mask=row_ok)
            tl.store(rstd_ptr + row, rstd, mask=row_ok)


# Tile: BLOCK_R whole rows, `tiles_per_program` tiles per program. Reads total, dtotal, dnormalised and 8 bytes per
# row once, and branch where it is kept and the layer scale wants a gradient; writes dresidual and dbranch once, and
# 4 bytes per program, channel and vector with a gradient. Registers: weight and layer scale [BLOCK_C], three fp32
# tiles of values and one of sums per vector with a gradient.
@triton.jit
def _add_layer_norm_backward_kernel(
    grad_total_ptr,
    grad_norm_ptr,
    total_ptr,
    branch_ptr,
    multiplier_ptr,
    layer_scale_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_residual_ptr,
    grad_branch_ptr,
    affine_partials_ptr,
    scale_partials_ptr,
    rows,
    sample_rows,
    tiles,
    tiles_per_program,
    stride_gt,
    stride_gn,
    stride_t,
    stride_b,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    channel_ok = (tl.arange(0, BLOCK_C) < C)[None, :]
    scale = _per_channel(layer_scale_ptr, 1.0, C, BLOCK_C)
    weight = _per_channel(weight_ptr, 1.0, C, BLOCK_C)
    if affine_partials_ptr is not None:
        weight_sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        bias_sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if scale_partials_ptr is not None:
        scale_sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first_tile = tl.program_id(0) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        row, row_ok = _tile_rows(tile, rows, BLOCK_R, WIDE)
        mask = row_ok[:, None] & channel_ok
        grad = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if grad_norm_ptr is not None:
            x = tl.load(_pointers(total_ptr, row, stride_t, UNIT, BLOCK_C), mask=mask, other=0.0).to(tl.float32)
            g = tl.load(_pointers(grad_norm_ptr, row, stride_gn, UNIT, BLOCK_C), mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row, mask=row_ok, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=row_ok, other=0.0)[:, None]
            x = tl.where(mask, (x - mean) * rstd, 0.0)
            if affine_partials_ptr is not None:
                weight_sums += g * x
                bias_sums += g
            g = g * weight
            along_one = tl.sum(g, axis=1)[:, None] / C
            along_x = tl.sum(g * x, axis=1)[:, None] / C
            grad = (g - along_one - x * along_x) * rstd
        if grad_total_ptr is not None:
            grad_total = tl.load(_pointers(grad_total_ptr, row, stride_gt, UNIT, BLOCK_C), mask=mask, other=0.0)
            grad += grad_total.to(tl.float32)
        grad_residual = grad.to(grad_residual_ptr.dtype.element_ty)
        tl.store(_pointers(grad_residual_ptr, row, C, 1, BLOCK_C), grad_residual, mask=mask)
        if grad_branch_ptr is not None:
            multiplier, kept = _row_multipliers(multiplier_ptr, row, row_ok, sample_rows, mask)
            grad = tl.where(kept, grad * multiplier, 0.0)
            grad_branch = tl.where(kept, grad * scale, 0.0).to(grad_branch_ptr.dtype.element_ty)
            tl.store(_pointers(grad_branch_ptr, row, C, 1, BLOCK_C), grad_branch, mask=mask)
            if scale_partials_ptr is not None:
                branch = tl.load(_pointers(branch_ptr, row, stride_b, UNIT, BLOCK_C), mask=kept, other=0.0)
                scale_sums += grad * branch.to(tl.float32)
    program = tl.program_id(0).to(tl.int64)
    if affine_partials_ptr is not None:
        _store_partials(affine_partials_ptr + program * (2 * C), weight_sums, C, BLOCK_C)
        _store_partials(affine_partials_ptr + program * (2 * C) + C, bias_sums, C, BLOCK_C)
    if scale_partials_ptr is not None:
        _store_partials(scale_partials_ptr + program * C, scale_sums, C, BLOCK_C)


# ---- launches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowTile:
    """A tile of `block_r` rows of `block_c` (a power of two) channels each, and who walks such tiles.

    Attributes:
        programs: programs per multiprocessor that are asked for.
    """

    block_r: int
    block_c: int
    num_warps: int
    programs: int


def row_tile(channels: int, unit: int, reducing: bool, scaled: bool) -> RowTile:
    """512 elements by a warp, in programs of one row where it is as long; fewer where registers hold more than values.

    Short programs read the next row while another one sums: on an H200 rows of 384 channels took 13 to 17% less than in
    programs of 4 warps, rows of 768 channels 6%. Those stay where elements are loaded one by one, or where sums
    (`reducing`) or a layer scale (`scaled`) live beside the values: half as many elements there, a quarter where many
    short rows are summed.
    """
    block_c = next_power_of_2(channels)
    if unit >= 4 and not (reducing or scaled):
        num_warps = min(4, max(1, block_c // 512))
        return RowTile(max(1, 512 // block_c), block_c, num_warps, ELEMENTWISE_PROGRAMS * 4 // num_warps)
    elements = 1024
    if reducing and block_c <= 32:
        elements = 512
    num_warps = 8 if reducing and block_c > 1024 else 4
    programs = REDUCING_PROGRAMS if reducing else ELEMENTWISE_PROGRAMS
    return RowTile(max(1, elements // block_c), block_c, num_warps, programs)


class Key(NamedTuple):
    """What a launch configuration depends on besides the GPU; as in row_tile."""

    kernel: str
    element_bytes: int
    rows: int
    channels: int
    unit: int
    reducing: bool
    scaled: bool


def _neighbours(key: Key, config: RowTile) -> Iterator[RowTile]:
    """More or fewer rows, warps and programs; and smaller programs with as many elements per thread."""
    yield from tuned.halved_and_doubled(config, "block_r", "num_warps", "programs")
    for factor in (2, 4):
        if config.block_r >= factor and config.num_warps >= factor:
            yield replace(
                config,
                block_r=config.block_r // factor,
                num_warps=config.num_warps // factor,
                programs=config.programs * factor,
            )


def _objection(key: Key, config: RowTile) -> str | None:
    if config.block_c != next_power_of_2(key.channels):
        return f"block_c={config.block_c}; for {key.channels} channels it is {next_power_of_2(key.channels)}"
    if not is_power_of_2(config.block_r):
        return f"block_r={config.block_r}; it must be a power of two"
    if config.block_r * config.block_c > MOST_ELEMENTS:
        return f"block_r={config.block_r} times block_c={config.block_c}; a tile has up to {MOST_ELEMENTS} elements"
    if config.programs > MOST_PROGRAMS_WANTED:
        return f"programs={config.programs}; it must be up to {MOST_PROGRAMS_WANTED}"
    return None


TUNABLE = tuned.Tunable("add_layer_norm", Key, RowTile, _neighbours, _objection)


@remembers
def forward(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm_dtype: torch.dtype,
    keep_statistics: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sum and LayerNorm of the sum for `[B, ..., C]` tensors with at least one element.

    Args:
        residual, branch: fp32, fp16 or bf16 each; rows of dense channels a fixed distance apart are read where they
            are, tensors in other strides are copied first. branch None: LayerNorm of residual alone.
        multiplier: `[B]`, or None for 1; a sample whose multiplier is 0 does not read its branch.
        layer_scale, weight, bias: `[C]` each, or None for 1, 1 and 0.
        keep_statistics: whether to return mean and rstd.

    Returns:
        The sum (None without a branch) in the widest dtype of its three values, contiguous; the normalised values in
        norm_dtype, contiguous; mean and 1 / sqrt(variance + eps) of the rows, fp32 `[B, ...]` (None unless kept).
    """
    total = None
    if branch is not None:
        dtype = torch.promote_types(residual.dtype, branch.dtype)
        dtype = dtype if layer_scale is None else torch.promote_types(dtype, layer_scale.dtype)
        total = residual.new_empty(residual.shape, dtype=dtype)
    norm = residual.new_empty(residual.shape, dtype=norm_dtype)
    mean = rstd = None
    if keep_statistics:
        mean, rstd = (residual.new_empty(residual.shape[:-1], dtype=torch.float32) for _ in range(2))
    walk = _Walk("forward", residual, (residual, branch), reducing=False, scaled=layer_scale is not None)
    with torch.cuda.device(norm.device) if norm.is_cuda else nullcontext():
        launch_kernel(
            _add_layer_norm_forward_kernel,
            (walk.programs,),
            *walk.tensors,
            total,
            norm,
            *(dense(vector) for vector in (multiplier, layer_scale, weight, bias)),
            mean,
            rstd,
            *walk.size_arguments(),
            *walk.stride_arguments(),
            eps,
            **walk.constants(),
        )
    return total, norm, mean, rstd


@remembers
def backward(
    total: torch.Tensor,
    grad_total: torch.Tensor | None,
    grad_norm: torch.Tensor | None,
    branch: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    affine_grads: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of residual, branch, layer_scale, weight and bias, from those of the two outputs.

    Args:
        total: the sum (residual without a branch); in any strides, as the gradients and branch are.
        grad_total, grad_norm: gradients of the outputs, None for one that was not used.
        branch: only for layer_scale's gradient; else None.
        bias: only for its dtype.
        mean, rstd: what the forward kept.
        branch_dtype: dtype of branch's gradient; None where it is residual's gradient or not wanted.
        affine_grads: whether the gradients of weight and bias are wanted.

    Returns:
        The gradients, None for what does not exist or is not wanted; contiguous.
    """
    new_empty, shape, channels = total.new_empty, total.shape, total.shape[-1]
    grad_residual = new_empty(shape, dtype=residual_dtype)
    grad_branch = None if branch_dtype is None else new_empty(shape, dtype=branch_dtype)
    scaled = grad_branch is not None and layer_scale is not None
    grad_scale = layer_scale.new_empty(channels) if scaled else None
    grad_weight = weight.new_empty(channels) if affine_grads and weight is not None else None
    grad_bias = bias.new_empty(channels) if affine_grads and bias is not None else None
    tensors = (grad_total, grad_norm, total, branch if scaled else None)
    affine_partials = scale_partials = None
    walk = _Walk("backward", total, tensors, reducing=affine_grads or scaled, scaled=scaled)
    with torch.cuda.device(total.device) if total.is_cuda else nullcontext():
        if affine_grads:
            affine_partials = new_empty((walk.programs, 2 * channels), dtype=torch.float32)
        if scaled:
            scale_partials = new_empty((walk.programs, channels), dtype=torch.float32)
        launch_kernel(
            _add_layer_norm_backward_kernel,
            (walk.programs,),
            *walk.tensors,
            *(dense(vector) for vector in (multiplier, layer_scale, weight, mean, rstd)),
            grad_residual,
            grad_branch,
            affine_partials,
            scale_partials,
            *walk.size_arguments(),
            *walk.stride_arguments(),
            **walk.constants(),
        )
        if scaled:
            sum_partials_into(scale_partials, grad_scale)
        if affine_grads:
            sum_partials_into(affine_partials, grad_weight, grad_bias)
    return grad_residual, grad_branch, grad_scale, grad_weight, grad_bias


class _Walk:
    """How `tensors` (each `[B, ..., C]` like `like`, or None) are walked: rows in tiles, tiles in programs.

    Attributes:
        tensors: the tensors, copied where their rows did not lie a fixed distance apart.
        programs: how many programs share the tiles; fewer where each leaves partials (`reducing`).
    """

    def __init__(self, kernel: str, like: torch.Tensor, tensors: tuple, *, reducing: bool, scaled: bool):
        self.channels = like.shape[-1]
        self.rows = like.numel() // self.channels
        self.sample_rows = self.rows // like.shape[0]
        spaced = [(None, 0) if tensor is None else spaced_rows(tensor) for tensor in tensors]
        self.tensors = [tensor for tensor, _ in spaced]
        self.strides = [stride for _, stride in spaced]
        self.unit = next(u for u in (8, 4, 2, 1) if all(size % u == 0 for size in (self.channels, *self.strides)))
        key = Key(kernel, like.element_size(), self.rows, self.channels, self.unit, reducing, scaled)
        self.tile = TUNABLE.config(like, key, lambda: row_tile(self.channels, self.unit, reducing, scaled))
        self.tiles = cdiv(self.rows, self.tile.block_r)
        programs = self.tile.programs * multiprocessors(like.device)
        if reducing:
            programs = min(programs, cdiv(self.rows, LEAST_ROWS_OF_PARTIALS))
        programs = min(programs, self.tiles)
        self.tiles_per_program = cdiv(self.tiles, programs)
        self.programs = cdiv(self.tiles, self.tiles_per_program)

    def size_arguments(self) -> tuple[int, ...]:
        return self.rows, self.sample_rows, self.tiles, self.tiles_per_program

    def stride_arguments(self) -> list[int]:
        """The row stride of each tensor in units of `unit`, so that 24 channels still load in vectors."""
        return [stride // self.unit for stride in self.strides]

    def constants(self) -> dict:
        return {
            "C": self.channels,
            "UNIT": self.unit,
            "BLOCK_R": self.tile.block_r,
            "BLOCK_C": self.tile.block_c,
            "WIDE": self.rows + self.tile.block_r >= WIDE_FROM,
            "num_warps": self.tile.num_warps,
        }
