"""residual + layer_scale * fc2(act(fc1(layer_norm(x)))) in inference, for rows [M, C] of few channels.

Between its two layers a perceptron is four times as wide as before and after them. Done apart, it writes and reads that
width through memory; here tiles of it live in registers, from the first product to the second. Trips of the large
tensors through memory:

    forward     read x, (residual,) write y; the weights stay in the L2 cache, where each program reads them whole

So this pays for as few channels as the first stages of models have: see `mlp_sizes.py`.
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
from .layout import dense
from .mlp_sizes import MOST_CHANNELS
from .pointwise import FINISHED_COLUMNS, LEAST_PROGRAMS, finish_parts, unit_rows
from .pointwise_sizes import UNIT
from .replay import launch_kernel, remembers

# The kernel's integers.
SIZES = ("rows", "channel_units", "hidden_units", "stride_x", "stride_r")


# ---- kernel ----------------------------------------------------------------------------------------------


@triton.jit
def _load(x_ptrs, channel, row_ok, channels):
    return tl.load(x_ptrs + channel[None, :], mask=row_ok & (channel < channels)[None, :], other=0.0)


@triton.jit
def _squares(x, mean, channel, channels):
    """[BLOCK_M] sums of squared distances from the mean."""
    distance = tl.where((channel < channels)[None, :], x - mean[:, None], 0.0)
    return tl.sum(distance * distance, 1)


@triton.jit
def _normalised(x, mean, rstd, weight_ptr, bias_ptr, channel, channels):
    x = (x - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    else:  # else the weight makes zeros of channels that are not there, which must not grow to infinity
        x = tl.where((channel < channels)[None, :], x, 0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _fc1_columns(weight_ptr, channel, unit, channels, hidden):
    """[channels, BLOCK_H] of fc1's weight, which is [hidden, C]."""
    mask = (channel < channels)[:, None] & (unit < hidden)[None, :]
    return tl.load(weight_ptr + (unit * channels)[None, :] + channel[:, None], mask=mask, other=0.0)


@triton.jit
def _fc2_columns(weight_ptr, channel, unit, channels, hidden):
    """[BLOCK_H, channels] of fc2's weight, which is [C, hidden]."""
    mask = (unit < hidden)[:, None] & (channel < channels)[None, :]
    return tl.load(weight_ptr + (channel * hidden)[None, :] + unit[:, None], mask=mask, other=0.0)


# Tile: BLOCK_M rows with all their channels, one per program, through which BLOCK_H units of the hidden layer pass at
# a time. Channels are cut into LEFT and RIGHT, powers of 2, so that 96 of them are not padded to 128. Reads x and
# residual once, both weights once per program (from the L2 cache); writes y once. Registers: the fp32 sums of y and of
# the units; x and weights go through shared memory. One compilation serves all numbers of rows and units.
@triton.jit(do_not_specialize=SIZES)
def _mlp_kernel(
    x_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    layer_scale_ptr,
    residual_ptr,
    y_ptr,
    rows,
    channel_units,
    hidden_units,
    stride_x,
    stride_r,
    eps,
    ACT: tl.constexpr,
    NORM: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    LEFT_PARTS: tl.constexpr,
    RIGHT_PARTS: tl.constexpr,
):
    # Sizes and strides come in units, so that the compiler knows by how much they can be divided.
    channels, hidden = channel_units * UNIT, hidden_units * UNIT
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_ok = (row < rows - first_row)[:, None]
    x_ptrs = x_ptr + ((first_row + row) * stride_x * UNIT)[:, None]
    left = tl.arange(0, LEFT)
    x_left = _load(x_ptrs, left, row_ok, channels)
    y_left = tl.zeros((BLOCK_M, LEFT), tl.float32)
    if RIGHT > 0:
        right = LEFT + tl.arange(0, RIGHT)
        x_right = _load(x_ptrs, right, row_ok, channels)
        y_right = tl.zeros((BLOCK_M, RIGHT), tl.float32)

    if NORM:
        x_left = x_left.to(tl.float32)
        total = tl.sum(x_left, 1)
        if RIGHT > 0:
            x_right = x_right.to(tl.float32)
            total += tl.sum(x_right, 1)
        mean = total / channels
        total = _squares(x_left, mean, left, channels)
        if RIGHT > 0:
            total += _squares(x_right, mean, right, channels)
        rstd = tl.rsqrt(total / channels + eps)
        x_left = _normalised(x_left, mean, rstd, norm_weight_ptr, norm_bias_ptr, left, channels)
        if RIGHT > 0:
            x_right = _normalised(x_right, mean, rstd, norm_weight_ptr, norm_bias_ptr, right, channels)

    DTYPE: tl.constexpr = fc1_weight_ptr.dtype.element_ty
    x_left = x_left.to(DTYPE)
    if RIGHT > 0:
        x_right = x_right.to(DTYPE)
    for first_unit in range(0, hidden, BLOCK_H):
        unit = first_unit + tl.arange(0, BLOCK_H)
        sums = tl.dot(x_left, _fc1_columns(fc1_weight_ptr, left, unit, channels, hidden))
        if RIGHT > 0:
            sums = tl.dot(x_right, _fc1_columns(fc1_weight_ptr, right, unit, channels, hidden), sums)
        if fc1_bias_ptr is not None:
            sums += tl.load(fc1_bias_ptr + unit, mask=unit < hidden, other=0.0).to(tl.float32)[None, :]
        units = activation_for(sums, ACT, DTYPE).to(DTYPE)
        if not WHOLE_BLOCKS:  # infinity times the zeros of units that are not there is NaN
            units = tl.where((unit < hidden)[None, :], units, 0.0)
        y_left = tl.dot(units, _fc2_columns(fc2_weight_ptr, left, unit, channels, hidden), y_left)
        if RIGHT > 0:
            y_right = tl.dot(units, _fc2_columns(fc2_weight_ptr, right, unit, channels, hidden), y_right)

    outputs = (y_ptr, residual_ptr, first_row, rows, channels, stride_r)
    vectors = (fc2_bias_ptr, None, None, None, None, layer_scale_ptr)
    finish_parts(y_left, 0, outputs, (), vectors, eps, "identity", True, UNIT, LEFT_PARTS)
    if RIGHT > 0:
        finish_parts(y_right, LEFT, outputs, (), vectors, eps, "identity", True, UNIT, RIGHT_PARTS)


# ---- launches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """`block_m` rows, through which `block_h` units of the hidden layer pass at a time, in `num_stages` buffers."""

    block_m: int
    block_h: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """What a launch configuration depends on besides the GPU."""

    kernel: str
    dtype: str
    rows: int
    channels: int
    hidden: int
    act: str
    norm: bool
    residual: bool


def tile(key: Key, programs_wanted: int, capability: tuple[int, int]) -> Tile:
    """128 rows by 8 warps, of whom two programs fit a multiprocessor, which multiply and activate in turns; above 96
    channels by 4 with all registers. 64 rows where multiprocessors would be without work.

    Args:
        programs_wanted: on the whole GPU.
        capability: tensor cores that read registers (all but those of 9.0 and 10.0) leave none for 128 rows.
    """
    if capability[0] not in (9, 10) or cdiv(key.rows, 128) < programs_wanted:
        return Tile(64, 32, num_warps=4, num_stages=2)
    return Tile(128, 32, num_warps=8 if key.channels <= 96 else 4, num_stages=2)


def _registers(config: Tile, channels: int, capability: tuple[int, int]) -> int:
    """Per thread: so many that two programs fit a multiprocessor, and three small ones where they do not spill."""
    spills = capability[0] == 12 and _cut(channels)[1] > 0
    if config.block_m <= 64 and config.num_warps <= 4 and not spills:
        return 168
    if config.block_m * sum(_cut(channels)) > 64 * 32 * config.num_warps:
        return 255  # the sums of y alone take more than half of what two programs of 8 warps would have
    return min(255, 1024 // config.num_warps)


def _neighbours(key: Key, config: Tile) -> Iterator[Tile]:
    """More or fewer rows, units, warps and stages."""
    yield from tuned.halved_and_doubled(config, "block_m", "block_h", "num_warps")
    yield from (replace(config, num_stages=config.num_stages + step) for step in (-1, 1))
    yield replace(config, block_m=config.block_m // 2, num_warps=config.num_warps // 2)
    yield replace(config, block_m=2 * config.block_m, num_warps=2 * config.num_warps)


def _objection(key: Key, config: Tile) -> str | None:
    for name in ("block_m", "block_h"):
        value = getattr(config, name)
        if value not in (16, 32, 64, 128, 256):
            return f"{name}={value}; allowed are 16, 32, 64, 128 and 256"
    left, right = _cut(key.channels)
    if config.block_m * (left + right) > 32 * config.num_warps * 128:
        return f"{config.block_m} x {left + right} sums for {config.num_warps} warps; a thread holds up to 128"
    if config.block_m < 8 * config.num_warps:
        return f"{config.block_m} rows leave some of {config.num_warps} warps without any"
    if config.num_stages > 6:
        return f"num_stages={config.num_stages}; it must be up to 6"
    return None


TUNABLE = tuned.Tunable("mlp", Key, Tile, _neighbours, _objection)


def _cut(channels: int) -> tuple[int, int]:
    """Powers of 2 that hold the channels together, the second one smaller, or 0 where one does as well."""
    whole = max(16, next_power_of_2(channels))
    left, right = whole // 2, max(16, next_power_of_2(max(1, channels - whole // 2)))
    return (left, right) if right < left else (whole, 0)


@remembers
def forward(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_eps: float | None,
    act: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y `[..., C]`, contiguous, for x `[..., C]` with at least one element and up to MOST_CHANNELS channels.

    Args:
        x: any dtype with a norm, else that of the weights; copied where its rows do not follow each other at one
            distance.
        fc1_weight, fc2_weight: `[hidden, C]` and `[C, hidden]`, fp16 or bf16; C and hidden are multiples of UNIT.
        norm_eps: None for no norm.
        residual: `[..., C]`, any dtype; copied as x is.
        dtype: of y.
    """
    hidden, channels = fc1_weight.shape
    assert channels <= MOST_CHANNELS
    y = x.new_empty(x.shape, dtype=dtype)
    rows = x.numel() // channels
    x, stride_x = unit_rows(x)
    residual, stride_r = (None, 0) if residual is None else unit_rows(residual)
    weights_dtype = str(fc1_weight.dtype).removeprefix("torch.")
    key = Key("forward", weights_dtype, rows, channels, hidden, act, norm_eps is not None, residual is not None)
    config = TUNABLE.config(x, key, lambda: _tile_for(x.device, key))
    left, right = _cut(channels)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        launch_kernel(
            _mlp_kernel,
            (cdiv(rows, config.block_m),),
            x,
            fc1_weight.contiguous(),
            dense(fc1_bias),
            fc2_weight.contiguous(),
            *(dense(vector) for vector in (fc2_bias, norm_weight, norm_bias, layer_scale)),
            residual,
            y,
            rows,
            channels // UNIT,
            hidden // UNIT,
            stride_x // UNIT,
            stride_r // UNIT,
            norm_eps or 0.0,
            ACT=act,
            NORM=norm_eps is not None,
            UNIT=UNIT,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_h,
            WHOLE_BLOCKS=hidden % config.block_h == 0,
            LEFT=left,
            RIGHT=right,
            LEFT_PARTS=max(1, left // FINISHED_COLUMNS),
            RIGHT_PARTS=max(1, right // FINISHED_COLUMNS),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=_registers(config, channels, compute_capability(x.device)),
        )
    return y


def _tile_for(device: torch.device, key: Key) -> Tile:
    return tile(key, LEAST_PROGRAMS * multiprocessors(device), compute_capability(device))
