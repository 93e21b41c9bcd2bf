"""act((x * gate) @ weight.T * scale + shift) with a residual, for rows [M, K] and a weight [N, K], in inference.

1x1 convolutions and linear layers with all that follows them: bias, BatchNorm by running statistics, activation, layer
scale, residual; and, before them, the gate of squeeze-and-excite. Each would be a kernel of its own, or share one, that
reads and writes the whole map. Here they happen on tiles in registers. Trips of the large tensors through memory:

    forward     read x, (residual,) write y; the weight stays in the L2 cache, as does x between tiles of its rows

A product that is limited by the L2 cache or the tensor cores is done better by cuBLAS, with thread block clusters: see
pointwise_sizes.py.
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
from .activation import activation_for
from .channel_tile import compute_capability, multiprocessors
from .integers import cdiv, next_power_of_2
from .layout import dense, spaced_rows
from .pointwise_sizes import UNIT
from .replay import launch_kernel

# Programs per multiprocessor below which tiles are cut smaller.
LEAST_PROGRAMS = 2
# With so many per thread three programs of four warps fit a multiprocessor; of eight warps two shall, with 128.
MOST_REGISTERS = 168
# Columns that are finished at a time. More take the registers that the next program would have.
FINISHED_COLUMNS = 32
# The most that a measured configuration may ask for: accumulators per thread.
MOST_ACCUMULATORS = 128

# The kernel's integers.
SIZES = (
    *("rows", "sample_rows", "width", "k_units", "n_units"),
    *("stride_xn", "stride_xh", "stride_xw", "stride_r"),
)


# ---- kernels ---------------------------------------------------------------------------------------------


@triton.jit
def _per_column(ptr, column, column_ok, default):
    """[1, columns] fp32 values of an [N] vector, `default` where there is no vector."""
    if ptr is not None:
        values = tl.load(ptr + column, mask=column_ok, other=0.0).to(tl.float32)
    else:
        values = tl.full(column.shape, default, tl.float32)
    return values[None, :]


@triton.jit
def _residual_tile(outputs, first_column, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """[BLOCK_M, COLUMNS] of the residual, in its own dtype."""
    _y_ptr, residual_ptr, first_row, rows, columns, stride_r = outputs
    row = tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, COLUMNS)
    mask = (row < rows - first_row)[:, None] & (column < columns)[None, :]
    pointers = residual_ptr + ((first_row + row) * stride_r * UNIT)[:, None] + column[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _finish(
    sums, first_column, outputs, ahead, vectors, eps, ACT: tl.constexpr, ACT_FIRST: tl.constexpr, UNIT: tl.constexpr
):
    """All that follows the product, for the columns of `sums` [BLOCK_M, columns], and the store."""
    y_ptr, residual_ptr, first_row, rows, columns, _stride_r = outputs
    bias_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, layer_scale_ptr = vectors
    row = tl.arange(0, sums.shape[0])
    column = first_column + tl.arange(0, sums.shape[1])
    column_ok = column < columns
    mask = (row < rows - first_row)[:, None] & column_ok[None, :]

    shift = _per_column(bias_ptr, column, column_ok, 0.0)
    if mean_ptr is not None:
        variance = _per_column(var_ptr, column, column_ok, 1.0)
        scale = _per_column(bn_weight_ptr, column, column_ok, 1.0) * tl.rsqrt(variance + eps)
        shift = (shift - _per_column(mean_ptr, column, column_ok, 0.0)) * scale
        shift += _per_column(bn_bias_ptr, column, column_ok, 0.0)
        y = sums * scale + shift
    else:
        y = sums + shift
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    if ACT_FIRST:
        y = activation_for(y, ACT, DTYPE)
    if layer_scale_ptr is not None:
        y *= _per_column(layer_scale_ptr, column, column_ok, 1.0)
    if residual_ptr is not None:
        if len(ahead) > 0:
            y += ahead[0].to(tl.float32)
        else:
            y += _residual_tile(outputs, first_column, sums.shape[0], sums.shape[1], UNIT).to(tl.float32)
    if not ACT_FIRST:
        y = activation_for(y, ACT, DTYPE)
    y_ptrs = y_ptr + ((first_row + row) * columns)[:, None] + column[None, :]
    tl.store(y_ptrs, y.to(DTYPE), mask=mask)


@triton.jit
def finish_parts(
    sums,
    first_column,
    outputs,
    ahead,
    vectors,
    eps,
    ACT: tl.constexpr,
    ACT_FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`_finish` on PARTS groups of columns, one after the other; `ahead` holds the groups' residuals, or nothing."""
    if PARTS == 1:
        _finish(sums, first_column, outputs, ahead, vectors, eps, ACT, ACT_FIRST, UNIT)
    else:
        HALF: tl.constexpr = sums.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(sums, (sums.shape[0], 2, HALF)), (0, 2, 1)))
        for_left, for_right = ahead[: PARTS // 2], ahead[PARTS // 2 :]
        finish_parts(left, first_column, outputs, for_left, vectors, eps, ACT, ACT_FIRST, UNIT, PARTS // 2)
        finish_parts(right, first_column + HALF, outputs, for_right, vectors, eps, ACT, ACT_FIRST, UNIT, PARTS // 2)


# Tile: BLOCK_M rows x BLOCK_N columns, one per program; tiles of the same rows are neighbours, so that all but the
# first find x in the L2 cache. Reads BLOCK_M + BLOCK_N rows of K elements, and residual once; writes y once. Registers:
# the fp32 sums; x and weight go through shared memory, a gated x through registers. One compilation serves all sizes:
# what must be known of them UNIT says.
@triton.jit(do_not_specialize=SIZES)
def _pointwise_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    residual_ptr,
    gate_ptr,
    bias_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    mean_ptr,
    var_ptr,
    layer_scale_ptr,
    rows,
    sample_rows,
    width,
    k_units,
    n_units,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_r,
    eps,
    ACT: tl.constexpr,
    ACT_FIRST: tl.constexpr,
    STRIDED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    # Sizes and strides come in units, so that the compiler knows by how much they can be divided.
    summed, columns = k_units * UNIT, n_units * UNIT
    n_tiles = tl.cdiv(columns, BLOCK_N)
    first_row = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_M
    first_column = tl.program_id(0) % n_tiles * BLOCK_N
    row = tl.arange(0, BLOCK_M)
    row_ok = row < rows - first_row
    column = first_column + tl.arange(0, BLOCK_N)
    column_ok = column < columns
    k = tl.arange(0, BLOCK_K)

    if STRIDED:
        pixel = (first_row + row).to(tl.int32)
        sample, pixel = pixel // sample_rows, pixel % sample_rows
        place = sample.to(tl.int64) * stride_xn + (pixel // width).to(tl.int64) * stride_xh
        place = (place + (pixel % width).to(tl.int64) * stride_xw) * UNIT
    else:
        place = (first_row + row) * stride_xw * UNIT
    x_ptrs = x_ptr + place[:, None] + k[None, :]
    weight_ptrs = weight_ptr + (column * summed)[None, :] + k[:, None]
    if gate_ptr is not None:
        sample = (first_row + row).to(tl.int32) // sample_rows
        gate_ptrs = gate_ptr + (sample.to(tl.int64) * summed)[:, None] + k[None, :]

    outputs = (y_ptr, residual_ptr, first_row, rows, columns, stride_r)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ahead = ()
    if AHEAD:
        COLUMNS: tl.constexpr = BLOCK_N // PARTS
        for part in tl.static_range(PARTS):
            ahead = ahead + (_residual_tile(outputs, first_column + part * COLUMNS, BLOCK_M, COLUMNS, UNIT),)
    for first_k in range(0, summed, BLOCK_K):
        k_ok = k < summed - first_k
        x = tl.load(x_ptrs, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptrs, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            x = (x.to(tl.float32) * gate.to(tl.float32)).to(x.dtype)
            gate_ptrs += BLOCK_K
        sums = tl.dot(x, weight, sums)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    vectors = (bias_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, layer_scale_ptr)
    finish_parts(sums, first_column, outputs, ahead, vectors, eps, ACT, ACT_FIRST, UNIT, PARTS)


# ---- launches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """`block_m` rows by `block_n` columns of y, summed over `block_k` elements at a time, in `num_stages` buffers."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def parts(self) -> int:
        return max(1, self.block_n // FINISHED_COLUMNS)

    @property
    def reads_ahead(self) -> bool:
        """Whether registers can hold the residual while x is multiplied: it then arrives when the sums are done."""
        sums = self.block_m * self.block_n // (32 * self.num_warps)
        return sums <= (64 if self.num_warps <= 4 else 32)

    @property
    def max_registers(self) -> int:
        """Per thread. More than 64 sums leave room for one program of 8 warps, and ptxas refuses them in 128."""
        if self.block_m * self.block_n > 64 * 32 * self.num_warps:
            return 255
        return min(MOST_REGISTERS, 1024 // self.num_warps)


class Key(NamedTuple):
    """What a launch configuration depends on besides the GPU."""

    kernel: str
    dtype: str
    rows: int
    summed: int
    columns: int
    act: str
    gated: bool
    residual: bool


def reads_registers(capability: tuple[int, int]) -> bool:
    """Whether tensor cores take their operands from registers, which those of 9.0 and 10.0 leave to others."""
    return capability[0] not in (9, 10)


def tile(key: Key, programs_wanted: int, capability: tuple[int, int]) -> Tile:
    """128 x 128 outputs by 8 warps; 64 columns and less where there are no more or these fill up better, 32 for up to
    96; 64 rows, then 64 columns, where multiprocessors would be without work.

    Each tile of columns multiplies x by the gate anew, so a gated product keeps its columns together.

    Args:
        programs_wanted: on the whole GPU.
        capability: tensor cores that read registers (all but those of 9.0 and 10.0) leave none for 128 x 128 sums; and
            shared memory is smaller there.
    """
    from_registers = reads_registers(capability)
    block_n = 128
    fills_better = cdiv(key.columns, 64) * 64 < 0.8 * cdiv(key.columns, 128) * 128
    if key.columns <= 64 or (fills_better and not key.gated):
        block_n = min(64, max(16, next_power_of_2(key.columns)))
    elif key.columns <= 96 and not key.gated:
        block_n = 32
    block_m = 64 if from_registers and block_n == 128 else 128
    if cdiv(key.rows, block_m) * cdiv(key.columns, block_n) < programs_wanted:
        block_m = 64
    if cdiv(key.rows, block_m) * cdiv(key.columns, block_n) < programs_wanted and not key.gated:
        block_n = min(block_n, 64)
    widest_k = 32 if from_registers else 64
    block_k = min(widest_k, max(16, next_power_of_2(key.summed)))
    if key.summed % 64 in range(1, 33) and key.summed < 256:
        block_k = min(block_k, 32)
    num_stages = min(3, cdiv(key.summed, block_k))
    if key.summed <= 128 and block_n <= 64:  # more buffers than two loads took up to a third longer on an H200
        block_k, num_stages = min(widest_k, max(16, next_power_of_2(key.summed))), 1
    # Of a gated tile the threads also hold x.
    large_gated = key.gated and (block_m > 64 or (from_registers and block_n == 128))
    num_warps = 8 if block_m * block_n > 8192 or large_gated else 4
    return Tile(block_m, block_n, block_k, num_warps, num_stages)


def _neighbours(key: Key, config: Tile) -> Iterator[Tile]:
    """More or fewer rows, columns, summed elements, warps and stages."""
    yield from tuned.halved_and_doubled(config, "block_m", "block_n", "block_k", "num_warps")
    yield from (replace(config, num_stages=config.num_stages + step) for step in (-1, 1))
    yield replace(config, block_m=2 * config.block_m, num_warps=2 * config.num_warps)
    yield replace(config, block_n=2 * config.block_n, num_warps=2 * config.num_warps)


def _objection(key: Key, config: Tile) -> str | None:
    for name in ("block_m", "block_n", "block_k"):
        value = getattr(config, name)
        if value not in (16, 32, 64, 128, 256):
            return f"{name}={value}; allowed are 16, 32, 64, 128 and 256"
    if config.block_m * config.block_n > 32 * config.num_warps * MOST_ACCUMULATORS:
        return f"{config.block_m} x {config.block_n} sums for {config.num_warps} warps; a thread holds up to 128"
    if config.block_m * config.block_n < 64 * config.num_warps:
        return f"{config.block_m} x {config.block_n} sums leave threads of {config.num_warps} warps without work"
    if config.num_stages > 6:
        return f"num_stages={config.num_stages}; it must be up to 6"
    return None


TUNABLE = tuned.Tunable("pointwise", Key, Tile, _neighbours, _objection)


class Rows(NamedTuple):
    """Where the rows of x lie: (sample, line, pixel), in elements; `even` where one distance says it all."""

    count: int
    sample_rows: int
    width: int
    strides: tuple[int, int, int]

    @property
    def even(self) -> bool:
        sample, line, pixel = self.strides
        lines = self.sample_rows // self.width
        one_sample = self.count == self.sample_rows
        return (lines == 1 or line == self.width * pixel) and (one_sample or sample == self.sample_rows * pixel)


def unit_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x, or a copy of it, whose rows lie a fixed multiple of UNIT apart, and that distance."""
    x, stride = spaced_rows(x)
    return (x, stride) if stride % UNIT == 0 else (x.contiguous(), x.shape[-1])


def launch(
    x: torch.Tensor,
    rows: Rows,
    weight: torch.Tensor,
    y: torch.Tensor,
    *,
    act: str,
    act_first: bool,
    bias: torch.Tensor | None = None,
    batch_norm: tuple[torch.Tensor | None, ...] = (None, None, None, None),
    eps: float = 0.0,
    gate: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_stride: int = 0,
) -> None:
    """Writes y [M, N], dense, in any layout of M.

    With p = batch_norm((x * gate) @ weight.T + bias): y = act(p) * layer_scale + residual where `act_first`, else
    y = act(p * layer_scale + residual).

    Args:
        x: fp16 or bf16; the K elements of a row lie side by side, all distances are multiples of UNIT.
        weight: `[N, K]` (more dimensions of 1 do not matter), dtype of x, dense. K and N are multiples of UNIT.
        bias, layer_scale: `[N]`.
        batch_norm: weight, bias, running mean and variance `[N]`; without the mean there is no normalisation.
        gate: `[samples, K]`, dense, a factor of each sample's elements of x; rounded to x's dtype after it.
        residual: rows of N elements side by side, `residual_stride` elements apart; any dtype, as y.
    """
    summed, columns = weight.shape[1], weight.shape[0]
    dtype = str(x.dtype).removeprefix("torch.")
    key = Key("forward", dtype, rows.count, summed, columns, act, gate is not None, residual is not None)
    config = TUNABLE.config(x, key, lambda: _tile_for(x.device, key))
    sample, line, pixel = (stride // UNIT for stride in rows.strides)
    grid = (cdiv(rows.count, config.block_m) * cdiv(columns, config.block_n),)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        launch_kernel(
            _pointwise_kernel,
            grid,
            x,
            weight,
            y,
            residual,
            gate,
            *(dense(vector) for vector in (bias, *batch_norm, layer_scale)),
            rows.count,
            rows.sample_rows,
            rows.width,
            summed // UNIT,
            columns // UNIT,
            sample,
            line,
            pixel,
            residual_stride // UNIT,
            eps,
            ACT=act,
            ACT_FIRST=act_first,
            STRIDED=not rows.even,
            UNIT=UNIT,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PARTS=config.parts,
            AHEAD=residual is not None and config.reads_ahead and not reads_registers(compute_capability(x.device)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )


def _tile_for(device: torch.device, key: Key) -> Tile:
    return tile(key, LEAST_PROGRAMS * multiprocessors(device), compute_capability(device))
