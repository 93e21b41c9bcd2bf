"""Second stages of two-stage reductions: batch statistics, and plain sums, from per-program partials.

Every kernel that reduces over a batch leaves one fp32 row per program; the kernels here add the rows up in a
fixed order. No atomics: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import tuned
from .integers import cdiv, is_power_of_2
from .replay import launch_kernel


@triton.jit
def merge_welford(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """(count, mean, M2) of two sets together, elementwise (Chan et al.); either or both may be empty."""
    count = count_a + count_b
    share_b = tl.where(count > 0.0, count_b / tl.maximum(count, 1.0), 0.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share_b, m2_a + m2_b + delta * delta * count_a * share_b


@triton.jit
def _distances(tile_ptr, num_channels, anchor, ok, ROWS: tl.constexpr):
    """The partial means relative to `anchor`, with what rounding took from them where that was kept."""
    distances = tl.load(tile_ptr + num_channels, mask=ok, other=0.0) - anchor[None, :]
    if ROWS == 4:
        distances += tl.load(tile_ptr + 3 * num_channels, mask=ok, other=0.0)
    return distances


# One program per BLOCK_C channels. Reads partials [P, 3, C] twice in tiles [BLOCK_P, BLOCK_C] (12 bytes per
# partial and channel; the second time from the cache), writes mean, invstd and the running statistics.
# Registers: three partial tiles and two of sums, reduced over their rows after each sweep: a reduction is a barrier
# of all warps, which in each round would take longer than the loads. Chan's formula for P sets at once, in two sweeps:
# the mean from distances to the first set's mean (small numbers, so a large common offset costs no bits), then
# M2 = sum M2_i + sum n_i (mean_i - mean)^2.
@triton.jit
def _finalize_statistics_kernel(
    partials_ptr,
    mean_ptr,
    invstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_partials,
    num_channels,
    momentum,
    eps,
    HAS_RUNNING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < num_channels
    row = tl.arange(0, BLOCK_P)

    anchor = tl.load(partials_ptr + num_channels + channel, mask=channel_ok, other=0.0)
    count_tile = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    distance_tile = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        ok = (start + row < num_partials)[:, None] & channel_ok[None, :]
        tile_ptr = partials_ptr + (start + row).to(tl.int64)[:, None] * (ROWS * num_channels) + channel[None, :]
        counts = tl.load(tile_ptr, mask=ok, other=0.0)
        distances = _distances(tile_ptr, num_channels, anchor, ok, ROWS)
        count_tile += counts
        distance_tile += tl.where(counts > 0.0, distances * counts, 0.0)
    count = tl.sum(count_tile, axis=0)
    safe_count = tl.maximum(count, 1.0)
    distance = tl.sum(distance_tile, axis=0) / safe_count
    mean = anchor + distance

    m2_tile = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        ok = (start + row < num_partials)[:, None] & channel_ok[None, :]
        tile_ptr = partials_ptr + (start + row).to(tl.int64)[:, None] * (ROWS * num_channels) + channel[None, :]
        counts = tl.load(tile_ptr, mask=ok, other=0.0)
        m2s = tl.load(tile_ptr + 2 * num_channels, mask=ok, other=0.0)
        away = _distances(tile_ptr, num_channels, anchor, ok, ROWS) - distance[None, :]
        m2_tile += tl.where(counts > 0.0, m2s + away * away * counts, 0.0)
    m2 = tl.sum(m2_tile, axis=0)

    tl.store(mean_ptr + channel, mean, mask=channel_ok)
    tl.store(invstd_ptr + channel, tl.div_rn(1.0, tl.sqrt_rn(m2 / safe_count + eps)), mask=channel_ok)
    if HAS_RUNNING:
        unbiased = m2 / tl.maximum(count - 1.0, 1.0)
        old_mean = tl.load(running_mean_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32)
        old_var = tl.load(running_var_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32)
        new_mean = (1.0 - momentum) * old_mean + momentum * mean
        new_var = (1.0 - momentum) * old_var + momentum * unbiased
        tl.store(running_mean_ptr + channel, new_mean.to(running_mean_ptr.dtype.element_ty), mask=channel_ok)
        tl.store(running_var_ptr + channel, new_var.to(running_var_ptr.dtype.element_ty), mask=channel_ok)


@triton.jit
def _sum_columns(partials_ptr, num_partials, num_columns, column, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums [BLOCK_K] of those columns of partials [P, K], each value read once; one tile [BLOCK_P, BLOCK_K] of them."""
    row = tl.arange(0, BLOCK_P)
    tile = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        ok = (start + row < num_partials)[:, None] & (column < num_columns)[None, :]
        offset = (start + row).to(tl.int64)[:, None] * num_columns + column[None, :]
        tile += tl.load(partials_ptr + offset, mask=ok, other=0.0)
    return tl.sum(tile, axis=0)


# One program per BLOCK_K columns of partials [P, K]. Writes their sums to `sums` and to whichever of `first` and
# `second` they belong to: the second's begin at column `pitch`, and each takes `num_channels`.
@triton.jit
def _sum_partials_kernel(
    partials_ptr,
    sums_ptr,
    first_ptr,
    second_ptr,
    num_partials,
    num_columns,
    pitch,
    num_channels,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = _sum_columns(partials_ptr, num_partials, num_columns, column, BLOCK_P, BLOCK_K)
    if sums_ptr is not None:
        tl.store(sums_ptr + column, sums, mask=column < num_columns)
    if first_ptr is not None:
        tl.store(first_ptr + column, sums.to(first_ptr.dtype.element_ty), mask=column < num_channels)
    if second_ptr is not None:
        channel = column - pitch
        in_second = (channel >= 0) & (channel < num_channels)
        tl.store(second_ptr + channel, sums.to(second_ptr.dtype.element_ty), mask=in_second)


# One program per BLOCK_K columns of partials [P, T, S, padded channels]. Writes their sums to a depthwise weight
# [C, 1, kh, kw], whose taps lie `stride_t` and `stride_s` apart.
@triton.jit
def _sum_taps_kernel(
    partials_ptr,
    grad_ptr,
    num_partials,
    num_columns,
    padded_channels,
    num_channels,
    taps,
    taps_s,
    stride_t,
    stride_s,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = _sum_columns(partials_ptr, num_partials, num_columns, column, BLOCK_P, BLOCK_K)
    channel, tap = column % padded_channels, column // padded_channels
    place = channel * taps + tap // taps_s * stride_t + tap % taps_s * stride_s
    mask = (column < num_columns) & (channel < num_channels)
    tl.store(grad_ptr + place, sums.to(grad_ptr.dtype.element_ty), mask=mask)


MAX_REGISTERS = 255  # of a thread


@dataclass(frozen=True)
class ReduceConfig:
    """Tile of a second-stage reduction: `block_p` partials by `block_k` columns."""

    block_p: int
    block_k: int
    num_warps: int


# 8 columns are one 32-byte sector: few columns are read by few programs, so each takes many rows at once.
SECTOR = 8
MOST_ROWS = 1024
ELEMENTS_PER_THREAD = 16
MANY_COLUMNS = ReduceConfig(block_p=64, block_k=64, num_warps=4)

# What a measured configuration may ask for at most.
MOST_ELEMENTS = 8192


def reduce_config(num_partials: int, num_columns: int) -> ReduceConfig:
    """Wide tiles where there are columns enough to fill a GPU with programs, else tall ones, of all rows at best."""
    if num_columns >= 16384 or num_partials <= 64:
        return MANY_COLUMNS
    block_p = min(triton.next_power_of_2(num_partials), MOST_ROWS)
    return ReduceConfig(block_p, SECTOR, num_warps=max(4, block_p * SECTOR // (32 * ELEMENTS_PER_THREAD)))


def _max_registers(num_warps: int) -> int:
    """The hardware's own limit, named, since ptxas left alone prefers fewer on sm_100 and spills 8 to 16 bytes."""
    return min(MAX_REGISTERS, 65536 // (32 * num_warps))


class Key(NamedTuple):
    """What a launch configuration depends on besides the GPU: the kernel, and the size of the partials."""

    kernel: str
    num_partials: int
    num_columns: int


def _neighbours(key: Key, config: ReduceConfig) -> Iterator[ReduceConfig]:
    """The other shape of tile, and tiles and warps half and twice as many."""
    yield from (ReduceConfig(256, SECTOR, 8), MANY_COLUMNS)
    yield from tuned.halved_and_doubled(config, "block_p", "block_k", "num_warps")


def _objection(key: Key, config: ReduceConfig) -> str | None:
    for name in ("block_p", "block_k"):
        if not is_power_of_2(getattr(config, name)):
            return f"{name}={getattr(config, name)}; it must be a power of two"
    if config.block_p * config.block_k > MOST_ELEMENTS:
        return f"block_p={config.block_p} times block_k={config.block_k}; a tile has up to {MOST_ELEMENTS} elements"
    return None


TUNABLE = tuned.Tunable("batch_statistics", Key, ReduceConfig, _neighbours, _objection)


def finalize_statistics(
    partials: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(biased variance + eps) per channel from per-program statistics.

    Args:
        partials: fp32 `[P, 3, C]` or `[P, 4, C]`, contiguous, P >= 1: count, mean and M2 (sum of squared distances
            to that mean) of each program's share, and optionally what rounding to fp32 took from the mean (it counts
            where the mean is much larger than the deviation); a count of 0 marks an empty share, whose other values
            are ignored.
        running_mean, running_var: `[C]` of any float dtype, or None; moved towards mean and unbiased variance
            by `momentum`, in place.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        mean and invstd, fp32 `[C]`.
    """
    num_partials, rows, channels = partials.shape
    key = Key("finalize_statistics", num_partials, channels)
    config = TUNABLE.config(partials, key, lambda: reduce_config(num_partials, channels))
    mean, invstd = partials.new_empty(channels), partials.new_empty(channels)
    running = [None if t is None else _contiguous(t) for t in (running_mean, running_var)]
    with torch.cuda.device(partials.device) if partials.is_cuda else nullcontext():
        launch_kernel(
            _finalize_statistics_kernel,
            (cdiv(channels, config.block_k),),
            partials,
            mean,
            invstd,
            *running,
            num_partials,
            channels,
            momentum,
            eps,
            HAS_RUNNING=running_mean is not None,
            ROWS=rows,
            BLOCK_P=config.block_p,
            BLOCK_C=config.block_k,
            num_warps=config.num_warps,
            maxnreg=_max_registers(config.num_warps),
        )
    for original, updated in zip((running_mean, running_var), running):
        if updated is not original:
            original.copy_(updated)
    return mean, invstd


def _contiguous(vector: torch.Tensor) -> torch.Tensor:
    return vector if vector.is_contiguous() else vector.contiguous()


def sum_partials(partials: torch.Tensor) -> torch.Tensor:
    """Sums fp32 `[P, K]` over P into fp32 `[K]`, in the same order each time."""
    sums = partials.new_empty(partials.shape[1])
    _launch_sums(partials, sums, None, None)
    return sums


def sum_partials_into(
    partials: torch.Tensor,
    first: torch.Tensor | None,
    second: torch.Tensor | None = None,
    *,
    keep_sums: bool = False,
) -> torch.Tensor | None:
    """Sums fp32 `[P, 2 * K]` over P in one launch, the first K columns into `first`, the others into `second`.

    Args:
        partials: `[P, K]` where there is no second.
        first, second: `[C]` contiguous with C up to K, of any float dtype; what comes after C columns is left out. None
            for what nobody wants.
        keep_sums: whether the sums of all columns are returned too, fp32.
    """
    sums = partials.new_empty(partials.shape[1]) if keep_sums else None
    if any(out is not None for out in (sums, first, second)):
        _launch_sums(partials, sums, first, second)
    return sums


def sum_taps_into(partials: torch.Tensor, grad_weight: torch.Tensor, channels_last: bool) -> None:
    """Sums fp32 `[P, T, S, C or more]` over P into a depthwise weight `[C, 1, kh, kw]`, contiguous, of any float dtype.

    T and S are kh and kw, or kw and kh without `channels_last`.
    """
    _, taps_t, taps_s, padded_channels = partials.shape
    partials = partials.flatten(1)
    config = _sum_config(partials)
    with torch.cuda.device(partials.device) if partials.is_cuda else nullcontext():
        launch_kernel(
            _sum_taps_kernel,
            (cdiv(partials.shape[1], config.block_k),),
            partials,
            grad_weight,
            *partials.shape,
            padded_channels,
            grad_weight.shape[0],
            taps_t * taps_s,
            taps_s,
            *((taps_s, 1) if channels_last else (1, taps_t)),
            BLOCK_P=config.block_p,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
        )


def _launch_sums(partials, sums, first, second) -> None:
    columns = partials.shape[1]
    config = _sum_config(partials)
    channels = next((vector.shape[0] for vector in (first, second) if vector is not None), 0)
    with torch.cuda.device(partials.device) if partials.is_cuda else nullcontext():
        launch_kernel(
            _sum_partials_kernel,
            (cdiv(columns, config.block_k),),
            partials,
            sums,
            first,
            second,
            *partials.shape,
            columns // 2,
            channels,
            BLOCK_P=config.block_p,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
        )


def _sum_config(partials: torch.Tensor) -> ReduceConfig:
    num_partials, columns = partials.shape
    key = Key("sum_partials", num_partials, columns)
    return TUNABLE.config(partials, key, lambda: reduce_config(num_partials, columns))
