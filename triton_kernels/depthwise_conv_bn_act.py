"""Depthwise convolution + BatchNorm + activation, forward and backward, one scheme for NHWC and NCHW.

A program owns a tile of lanes: `BLOCK_C` channels by `BLOCK_T` positions of one spatial axis, the *tile axis* T. The
other spatial axis, the *slide axis* S, is unrolled into `TILE_S` accumulator tiles that live in registers, and the
program walks along it. Each input value is loaded and converted once per kernel row and feeds up to k accumulators.

    layout  T (lanes)  S (registers, then a loop)  side by side in memory
    NHWC    H          W                           channels: 16-byte loads and stores
    NCHW    W          H                           T: neighbouring lanes take neighbouring elements

A small kernel packs the parameters into fp32 rows of padded channels, which the large kernels load as vectors and
without masks: kh*kw taps, then scale, shift, centre and invstd, where

    z = conv(x) + bias      y = act(conv(x) * scale + shift)      normalised(z) = (conv(x) - centre) * invstd

Trips of the large tensors through memory (halos hit the caches; conv(x) is recomputed, never stored):

    eval forward    read x, write y
    train forward   read x for the statistics; read x, write y
    backward        read x, dy, write dz; read dz, write dx; read x, dz for the weight; train: before that x, dy for sums

Every sum over pixels goes through partials of one program each and a second stage in a fixed order: no atomics.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .activation import activation, activation_grad
from .batch_statistics import finalize_statistics, merge_welford, sum_partials
from .layout import is_channels_last, new_output

# Rows of the packed parameters that follow the taps.
SCALE: tl.constexpr = tl.constexpr(0)
SHIFT: tl.constexpr = tl.constexpr(1)
CENTRE: tl.constexpr = tl.constexpr(2)
INVSTD: tl.constexpr = tl.constexpr(3)
AFFINE_ROWS = 4


# ---- pieces that the kernels share -----------------------------------------------------------------------


@triton.jit
def _along_t(vector, T_AXIS: tl.constexpr):
    """A vector over positions of T, ready to broadcast over channels."""
    return tl.expand_dims(vector, 1 - T_AXIS)


@triton.jit
def _along_c(vector, T_AXIS: tl.constexpr):
    """A vector over channels, ready to broadcast over T."""
    return tl.expand_dims(vector, T_AXIS)


@triton.jit
def _zeros(BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, T_AXIS: tl.constexpr):
    if T_AXIS == 0:
        return tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    else:
        return tl.zeros((BLOCK_C, BLOCK_T), tl.float32)


@triton.jit
def _packed_row(packed_ptr, row, packed_stride, offs_c, T_AXIS: tl.constexpr):
    return _along_c(tl.load(packed_ptr + row * packed_stride + offs_c), T_AXIS)


@triton.jit
def _tile_of_program(c_tiles, t_tiles, s_splits):
    """(channel tile, tile along T, split of S, image group, index among the programs of one channel tile)."""
    pid = tl.program_id(0)
    c_tile = pid % c_tiles
    partial = pid // c_tiles
    t_tile = partial % t_tiles
    rest = partial // t_tiles
    return c_tile, t_tile, rest % s_splits, rest // s_splits, partial


@triton.jit
def _load_column(ptr, offsets, mask, s, size_s, stride_s):
    """Column s of a tile as fp32; zero where the mask is off or s lies outside of the image."""
    inside = mask & (s >= 0) & (s < size_s)
    return tl.load(ptr + s.to(tl.int64) * stride_s + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _convolve(
    x_ptr,
    packed_ptr,
    packed_stride,
    offs_c,
    mask_c,
    t_begin,
    s_begin,
    size_t,
    size_s,
    stride_c,
    stride_t,
    stride_s,
    KERNEL_T: tl.constexpr,
    KERNEL_S: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_S: tl.constexpr,
    DILATION_T: tl.constexpr,
    DILATION_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_S: tl.constexpr,
    T_AXIS: tl.constexpr,
):
    """conv(x), without bias, of TILE_S columns: a tuple of fp32 tiles.

    x_ptr points at the image and the first channel; t_begin and s_begin are the input positions of the first
    output's first tap (negative inside the padding).
    """
    lanes = tl.arange(0, BLOCK_T) * STRIDE_T
    x_ptr += t_begin.to(tl.int64) * stride_t
    accumulators = (_zeros(BLOCK_T, BLOCK_C, T_AXIS),) * TILE_S
    for kernel_t in tl.static_range(KERNEL_T):
        taps = ()
        for kernel_s in tl.static_range(KERNEL_S):
            taps = taps + (_packed_row(packed_ptr, kernel_t * KERNEL_S + kernel_s, packed_stride, offs_c, T_AXIS),)
        rows = lanes + kernel_t * DILATION_T
        t = t_begin + rows
        mask = _along_t((t >= 0) & (t < size_t), T_AXIS) & _along_c(mask_c, T_AXIS)
        offsets = _along_t(rows * stride_t, T_AXIS) + _along_c(tl.arange(0, BLOCK_C) * stride_c, T_AXIS)
        for column in tl.static_range((TILE_S - 1) * STRIDE_S + (KERNEL_S - 1) * DILATION_S + 1):
            value = _load_column(x_ptr, offsets, mask, s_begin + column, size_s, stride_s)
            for kernel_s in tl.static_range(KERNEL_S):
                ahead: tl.constexpr = column - kernel_s * DILATION_S
                if (ahead >= 0) and (ahead % STRIDE_S == 0) and (ahead // STRIDE_S < TILE_S):
                    accumulators = _add_product(accumulators, ahead // STRIDE_S, value, taps[kernel_s])
    return accumulators


@triton.jit
def _add_product(accumulators, INDEX: tl.constexpr, a, b):
    """The tuple with a * b added to the accumulator at INDEX."""
    return accumulators[:INDEX] + (accumulators[INDEX] + a * b,) + accumulators[INDEX + 1 :]


# ---- parameters ------------------------------------------------------------------------------------------


# One program packs BLOCK_C channels: it reads each parameter once and writes (KERNEL_T * KERNEL_S + 4) fp32 rows.
# SPREAD says what `spread_ptr` holds: "var", "invstd", or "none" where there is no BatchNorm.
@triton.jit
def _pack_kernel(
    weight_ptr,
    bias_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    mean_ptr,
    spread_ptr,
    packed_ptr,
    channels,
    packed_stride,
    stride_wc,
    stride_wt,
    stride_ws,
    eps,
    KERNEL_T: tl.constexpr,
    KERNEL_S: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < channels
    for kernel_t in tl.static_range(KERNEL_T):
        for kernel_s in tl.static_range(KERNEL_S):
            tap_ptr = weight_ptr + offs_c.to(tl.int64) * stride_wc + kernel_t * stride_wt + kernel_s * stride_ws
            tap = tl.load(tap_ptr, mask=mask, other=0.0).to(tl.float32)
            tl.store(packed_ptr + (kernel_t * KERNEL_S + kernel_s) * packed_stride + offs_c, tap)

    zero = tl.zeros((BLOCK_C,), tl.float32)
    centre = zero
    invstd = zero + 1.0
    if SPREAD != "none":
        centre = tl.load(mean_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
        invstd = tl.load(spread_ptr + offs_c, mask=mask, other=1.0).to(tl.float32)
    if SPREAD == "var":
        invstd = 1.0 / tl.sqrt_rn(invstd + eps)
    if bias_ptr is not None:
        centre -= tl.load(bias_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    scale = invstd
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    shift = -centre * scale
    if bn_bias_ptr is not None:
        shift += tl.load(bn_bias_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)

    affine_ptr = packed_ptr + KERNEL_T * KERNEL_S * packed_stride + offs_c
    tl.store(affine_ptr + SCALE * packed_stride, scale)
    tl.store(affine_ptr + SHIFT * packed_stride, shift)
    tl.store(affine_ptr + CENTRE * packed_stride, centre)
    tl.store(affine_ptr + INVSTD * packed_stride, invstd)


# ---- forward ---------------------------------------------------------------------------------------------


# A program computes BLOCK_T x span outputs of BLOCK_C channels of one image. It reads its input tile with halo and
# writes its outputs once; TILE_S fp32 accumulators and one kernel row of taps live in registers. With squeeze_ptr it
# also writes the sum of its outputs times squeeze_factor, [image, program within the image, channel].
@triton.jit
def _forward_kernel(
    x_ptr,
    packed_ptr,
    y_ptr,
    squeeze_ptr,
    squeeze_factor,
    c_tiles,
    t_tiles,
    s_splits,
    span,
    channel_vectors,
    packed_stride,
    in_t,
    in_s,
    out_t,
    out_s,
    pad_t,
    pad_s,
    stride_xn,
    stride_xc,
    stride_xt,
    stride_xs,
    stride_yn,
    stride_yc,
    stride_yt,
    stride_ys,
    KERNEL_T: tl.constexpr,
    KERNEL_S: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_S: tl.constexpr,
    DILATION_T: tl.constexpr,
    DILATION_S: tl.constexpr,
    ACT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_S: tl.constexpr,
    T_AXIS: tl.constexpr,
):
    c_tile, t_tile, s_split, n, partial = _tile_of_program(c_tiles, t_tiles, s_splits)
    channels = channel_vectors * VECTOR
    offs_c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    t_first = t_tile * BLOCK_T
    n64, c64 = n.to(tl.int64), (c_tile * BLOCK_C).to(tl.int64)
    x_ptr += n64 * (stride_xn * VECTOR) + c64 * stride_xc
    y_ptr += n64 * (stride_yn * VECTOR) + c64 * stride_yc + t_first.to(tl.int64) * (stride_yt * VECTOR)

    affine_ptr = packed_ptr + KERNEL_T * KERNEL_S * packed_stride
    scale = _packed_row(affine_ptr, SCALE, packed_stride, offs_c, T_AXIS)
    shift = _packed_row(affine_ptr, SHIFT, packed_stride, offs_c, T_AXIS)
    lanes = tl.arange(0, BLOCK_T)
    mask_y = _along_t(t_first + lanes < out_t, T_AXIS) & _along_c(mask_c, T_AXIS)
    offsets_y = _along_t(lanes * (stride_yt * VECTOR), T_AXIS)
    offsets_y += _along_c(tl.arange(0, BLOCK_C) * stride_yc, T_AXIS)
    total = _zeros(BLOCK_T, BLOCK_C, T_AXIS)

    s_end = tl.minimum((s_split + 1) * span, out_s)
    for s in range(s_split * span, s_end, TILE_S):
        accumulators = _convolve(
            x_ptr,
            packed_ptr,
            packed_stride,
            offs_c,
            mask_c,
            t_first * STRIDE_T - pad_t,
            s * STRIDE_S - pad_s,
            in_t,
            in_s,
            stride_xc,
            stride_xt * VECTOR,
            stride_xs * VECTOR,
            KERNEL_T,
            KERNEL_S,
            STRIDE_T,
            STRIDE_S,
            DILATION_T,
            DILATION_S,
            BLOCK_T,
            BLOCK_C,
            TILE_S,
            T_AXIS,
        )
        for column in tl.static_range(TILE_S):
            y = activation(accumulators[column] * scale + shift, ACT)
            mask = mask_y & (s + column < s_end)
            y_column_ptr = y_ptr + (s + column).to(tl.int64) * (stride_ys * VECTOR)
            tl.store(y_column_ptr + offsets_y, y.to(y_ptr.dtype.element_ty), mask=mask)
            if squeeze_ptr is not None:
                total += tl.where(mask, y, 0.0)

    if squeeze_ptr is not None:
        sums = tl.sum(total, T_AXIS) * squeeze_factor
        squeeze_ptr += partial.to(tl.int64) * channels + offs_c
        tl.store(squeeze_ptr, sums.to(squeeze_ptr.dtype.element_ty), mask=mask_c)


# A program takes BLOCK_T x span pixels of BLOCK_C channels of several images and writes one (count, mean, M2) per
# channel. Each lane keeps its own Welford triple, fed with the exact mean and M2 of TILE_S values at a time, so that
# a large mean beside a small deviation costs no digits.
@triton.jit
def _statistics_kernel(
    x_ptr,
    packed_ptr,
    bias_ptr,
    partials_ptr,
    batch,
    images,
    c_tiles,
    t_tiles,
    s_splits,
    span,
    channel_vectors,
    packed_stride,
    in_t,
    in_s,
    out_t,
    out_s,
    pad_t,
    pad_s,
    stride_xn,
    stride_xc,
    stride_xt,
    stride_xs,
    KERNEL_T: tl.constexpr,
    KERNEL_S: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_S: tl.constexpr,
    DILATION_T: tl.constexpr,
    DILATION_S: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_S: tl.constexpr,
    T_AXIS: tl.constexpr,
):
    c_tile, t_tile, s_split, group, partial = _tile_of_program(c_tiles, t_tiles, s_splits)
    channels = channel_vectors * VECTOR
    offs_c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    t_first = t_tile * BLOCK_T
    x_ptr += (c_tile * BLOCK_C).to(tl.int64) * stride_xc
    mask_t = _along_t(t_first + tl.arange(0, BLOCK_T) < out_t, T_AXIS)

    zero = _zeros(BLOCK_T, BLOCK_C, T_AXIS)
    bias = zero
    if bias_ptr is not None:
        bias += _along_c(tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32), T_AXIS)
    count, mean, m2 = zero, zero, zero
    s_end = tl.minimum((s_split + 1) * span, out_s)
    for n in range(group * images, tl.minimum((group + 1) * images, batch)):
        for s in range(s_split * span, s_end, TILE_S):
            accumulators = _convolve(
                x_ptr + n.to(tl.int64) * (stride_xn * VECTOR),
                packed_ptr,
                packed_stride,
                offs_c,
                mask_c,
                t_first * STRIDE_T - pad_t,
                s * STRIDE_S - pad_s,
                in_t,
                in_s,
                stride_xc,
                stride_xt * VECTOR,
                stride_xs * VECTOR,
                KERNEL_T,
                KERNEL_S,
                STRIDE_T,
                STRIDE_S,
                DILATION_T,
                DILATION_S,
                BLOCK_T,
                BLOCK_C,
                TILE_S,
                T_AXIS,
            )
            columns = tl.minimum(s_end - s, TILE_S).to(tl.float32)
            tile_mean = zero
            for column in tl.static_range(TILE_S):
                tile_mean += tl.where(s + column < s_end, accumulators[column], 0.0)
            tile_mean = tile_mean / columns
            tile_m2 = zero
            for column in tl.static_range(TILE_S):
                deviation = tl.where(s + column < s_end, accumulators[column] - tile_mean, 0.0)
                tile_m2 += deviation * deviation
            tile_count = tl.where(mask_t, columns, 0.0) + zero
            count, mean, m2 = merge_welford(count, mean, m2, tile_count, tile_mean, tile_m2)
    mean += bias

    # Over the lanes of T: first the mean, then the deviations from it.
    lane_count = tl.sum(count, T_AXIS)
    lane_mean = tl.sum(count * mean, T_AXIS) / tl.maximum(lane_count, 1.0)
    apart = mean - _along_c(lane_mean, T_AXIS)
    lane_m2 = tl.sum(tl.where(count > 0.0, m2 + count * apart * apart, 0.0), T_AXIS)
    partials_ptr += partial.to(tl.int64) * 3 * channels + offs_c
    tl.store(partials_ptr, lane_count, mask=mask_c)
    tl.store(partials_ptr + channels, lane_mean, mask=mask_c)
    tl.store(partials_ptr + 2 * channels, lane_m2, mask=mask_c)


# ---- backward --------------------------------------------------------------------------------------------


# A program walks over BLOCK_T x span outputs of BLOCK_C channels of several images, recomputes conv(x), and from it
# g = (dy + dsqueeze / HW) * act'(...). With partials_ptr it writes the sums of g and of g * normalised, [program, 2,
# channel]. With dz_ptr it writes dz = scale * (g - mean(g) - normalised * mean(g * normalised)); the means come from
# sums_ptr in training and are left out where running statistics normalised. Reads x and dy once, writes dz once.
@triton.jit
def _conv_grad_kernel(
    x_ptr,
    packed_ptr,
    dy_ptr,
    dsqueeze_ptr,
    partials_ptr,
    sums_ptr,
    dz_ptr,
    squeeze_factor,
    inverse_count,
    batch,
    images,
    c_tiles,
    t_tiles,
    s_splits,
    span,
    channel_vectors,
    packed_stride,
    in_t,
    in_s,
    out_t,
    out_s,
    pad_t,
    pad_s,
    stride_xn,
    stride_xc,
    stride_xt,
    stride_xs,
    stride_dyn,
    stride_dyc,
    stride_dyt,
    stride_dys,
    stride_dzn,
    stride_dzc,
    stride_dzt,
    stride_dzs,
    KERNEL_T: tl.constexpr,
    KERNEL_S: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_S: tl.constexpr,
    DILATION_T: tl.constexpr,
    DILATION_S: tl.constexpr,
    ACT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_S: tl.constexpr,
    T_AXIS: tl.constexpr,
):
    c_tile, t_tile, s_split, group, partial = _tile_of_program(c_tiles, t_tiles, s_splits)
    channels = channel_vectors * VECTOR
    offs_c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    t_first = t_tile * BLOCK_T
    c64, t64 = (c_tile * BLOCK_C).to(tl.int64), t_first.to(tl.int64)
    x_ptr += c64 * stride_xc
    dy_ptr += c64 * stride_dyc + t64 * (stride_dyt * VECTOR)

    affine_ptr = packed_ptr + KERNEL_T * KERNEL_S * packed_stride
    scale = _packed_row(affine_ptr, SCALE, packed_stride, offs_c, T_AXIS)
    shift = _packed_row(affine_ptr, SHIFT, packed_stride, offs_c, T_AXIS)
    centre = _packed_row(affine_ptr, CENTRE, packed_stride, offs_c, T_AXIS)
    invstd = _packed_row(affine_ptr, INVSTD, packed_stride, offs_c, T_AXIS)
    if sums_ptr is not None:
        mean_g = _packed_row(sums_ptr, 0, packed_stride, offs_c, T_AXIS) * inverse_count
        mean_gn = _packed_row(sums_ptr, 1, packed_stride, offs_c, T_AXIS) * inverse_count

    lanes = tl.arange(0, BLOCK_T)
    mask_tc = _along_t(t_first + lanes < out_t, T_AXIS) & _along_c(mask_c, T_AXIS)
    offsets_dy = _along_t(lanes * (stride_dyt * VECTOR), T_AXIS)
    offsets_dy += _along_c(tl.arange(0, BLOCK_C) * stride_dyc, T_AXIS)
    if dz_ptr is not None:
        dz_ptr += c64 * stride_dzc + t64 * (stride_dzt * VECTOR)
        offsets_dz = _along_t(lanes * (stride_dzt * VECTOR), T_AXIS)
        offsets_dz += _along_c(tl.arange(0, BLOCK_C) * stride_dzc, T_AXIS)
    sum_g = _zeros(BLOCK_T, BLOCK_C, T_AXIS)
    sum_gn = _zeros(BLOCK_T, BLOCK_C, T_AXIS)

    s_end = tl.minimum((s_split + 1) * span, out_s)
    for n in range(group * images, tl.minimum((group + 1) * images, batch)):
        n64 = n.to(tl.int64)
        if dsqueeze_ptr is not None:
            dsqueeze = tl.load(dsqueeze_ptr + n64 * channels + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            dsqueeze = _along_c(dsqueeze * squeeze_factor, T_AXIS)
        for s in range(s_split * span, s_end, TILE_S):
            accumulators = _convolve(
                x_ptr + n64 * (stride_xn * VECTOR),
                packed_ptr,
                packed_stride,
                offs_c,
                mask_c,
                t_first * STRIDE_T - pad_t,
                s * STRIDE_S - pad_s,
                in_t,
                in_s,
                stride_xc,
                stride_xt * VECTOR,
                stride_xs * VECTOR,
                KERNEL_T,
                KERNEL_S,
                STRIDE_T,
                STRIDE_S,
                DILATION_T,
                DILATION_S,
                BLOCK_T,
                BLOCK_C,
                TILE_S,
                T_AXIS,
            )
            for column in tl.static_range(TILE_S):
                mask = mask_tc & (s + column < s_end)
                s64 = (s + column).to(tl.int64)
                column_ptr = dy_ptr + n64 * (stride_dyn * VECTOR) + s64 * (stride_dys * VECTOR)
                g = tl.load(column_ptr + offsets_dy, mask=mask, other=0.0).to(tl.float32)
                if dsqueeze_ptr is not None:
                    g += tl.where(mask, dsqueeze, 0.0)
                g *= activation_grad(accumulators[column] * scale + shift, ACT)
                normalised = (accumulators[column] - centre) * invstd
                if partials_ptr is not None:
                    sum_g += g
                    sum_gn += g * normalised
                if dz_ptr is not None:
                    if sums_ptr is not None:
                        g = g - mean_g - normalised * mean_gn
                    column_ptr = dz_ptr + n64 * (stride_dzn * VECTOR) + s64 * (stride_dzs * VECTOR)
                    tl.store(column_ptr + offsets_dz, (g * scale).to(dz_ptr.dtype.element_ty), mask=mask)

    if partials_ptr is not None:
        partials_ptr += partial.to(tl.int64) * 2 * packed_stride + offs_c
        tl.store(partials_ptr, tl.sum(sum_g, T_AXIS))
        tl.store(partials_ptr + packed_stride, tl.sum(sum_gn, T_AXIS))


# A program computes dx for BLOCK_C channels of one image, lanes being every STRIDE_T-th position of T, so that all
# lanes meet the same taps: one pass per residue class of T, and columns of S whose residues are known at compile
# time. No tap is multiplied with a hole of the stride. Reads dz with halo, writes dx once.
@triton.jit
def _input_grad_kernel(
    dz_ptr,
    packed_ptr,
    dx_ptr,
    c_tiles,
    t_tiles,
    s_splits,
    span,
    channel_vectors,
    packed_stride,
    in_t,
    in_s,
    out_t,
    out_s,
    stride_dzn,
    stride_dzc,
    stride_dzt,
    stride_dzs,
    stride_dxn,
    stride_dxc,
    stride_dxt,
    stride_dxs,
    PAD_T: tl.constexpr,
    PAD_S: tl.constexpr,
    KERNEL_T: tl.constexpr,
    KERNEL_S: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_S: tl.constexpr,
    DILATION_T: tl.constexpr,
    DILATION_S: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_S: tl.constexpr,
    T_AXIS: tl.constexpr,
):
    c_tile, t_tile, s_split, n, _ = _tile_of_program(c_tiles, t_tiles, s_splits)
    offs_c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = _along_c(offs_c < channel_vectors * VECTOR, T_AXIS)
    n64, c64 = n.to(tl.int64), (c_tile * BLOCK_C).to(tl.int64)
    dz_ptr += n64 * (stride_dzn * VECTOR) + c64 * stride_dzc
    dx_ptr += n64 * (stride_dxn * VECTOR) + c64 * stride_dxc
    stride_dzt *= VECTOR
    stride_dxt *= VECTOR
    lanes = tl.arange(0, BLOCK_T)
    t_first = t_tile * BLOCK_T
    # Columns of dz, relative to s / STRIDE_S, that reach the columns [s, s + TILE_S) of dx.
    FIRST: tl.constexpr = (PAD_S - (KERNEL_S - 1) * DILATION_S) // STRIDE_S
    LAST: tl.constexpr = (TILE_S - 1 + PAD_S) // STRIDE_S

    s_end = tl.minimum((s_split + 1) * span, in_s)
    for s in range(s_split * span, s_end, TILE_S):
        for residue in tl.static_range(STRIDE_T):
            accumulators = (_zeros(BLOCK_T, BLOCK_C, T_AXIS),) * TILE_S
            for kernel_t in tl.static_range(KERNEL_T):
                if (residue + PAD_T - kernel_t * DILATION_T) % STRIDE_T == 0:
                    taps = ()
                    for kernel_s in tl.static_range(KERNEL_S):
                        tap = kernel_t * KERNEL_S + kernel_s
                        taps = taps + (_packed_row(packed_ptr, tap, packed_stride, offs_c, T_AXIS),)
                    t_origin = t_first + (residue + PAD_T - kernel_t * DILATION_T) // STRIDE_T
                    t = t_origin + lanes
                    mask = _along_t((t >= 0) & (t < out_t), T_AXIS) & mask_c
                    offsets = _along_t(lanes * stride_dzt, T_AXIS)
                    offsets += _along_c(tl.arange(0, BLOCK_C) * stride_dzc, T_AXIS)
                    rows_ptr = dz_ptr + t_origin.to(tl.int64) * stride_dzt
                    for column in tl.static_range(FIRST, LAST + 1):
                        value = _load_column(
                            rows_ptr, offsets, mask, s // STRIDE_S + column, out_s, stride_dzs * VECTOR
                        )
                        for kernel_s in tl.static_range(KERNEL_S):
                            target: tl.constexpr = column * STRIDE_S - PAD_S + kernel_s * DILATION_S
                            if (target >= 0) and (target < TILE_S):
                                accumulators = _add_product(accumulators, target, value, taps[kernel_s])
            t = (t_first + lanes) * STRIDE_T + residue
            mask = _along_t(t < in_t, T_AXIS) & mask_c
            offsets = _along_t(lanes * (stride_dxt * STRIDE_T), T_AXIS)
            offsets += _along_c(tl.arange(0, BLOCK_C) * stride_dxc, T_AXIS)
            rows_ptr = dx_ptr + (t_first * STRIDE_T + residue).to(tl.int64) * stride_dxt
            for column in tl.static_range(TILE_S):
                column_ptr = rows_ptr + (s + column).to(tl.int64) * (stride_dxs * VECTOR)
                dx = accumulators[column].to(dx_ptr.dtype.element_ty)
                tl.store(column_ptr + offsets, dx, mask=mask & (s + column < s_end))


# A program sums dz * x over BLOCK_T x span outputs of BLOCK_C channels of several images, for ROWS kernel rows at
# once: ROWS * KERNEL_S fp32 accumulators and TILE_S columns of dz live in registers. It writes [program, tap,
# channel]; programs of other kernel rows read the same data at about the same time, from the L2 cache.
@triton.jit
def _weight_grad_kernel(
    x_ptr,
    dz_ptr,
    partials_ptr,
    batch,
    images,
    c_tiles,
    t_tiles,
    s_splits,
    span,
    row_groups,
    channel_vectors,
    packed_stride,
    in_t,
    in_s,
    out_t,
    out_s,
    pad_t,
    pad_s,
    stride_xn,
    stride_xc,
    stride_xt,
    stride_xs,
    stride_dzn,
    stride_dzc,
    stride_dzt,
    stride_dzs,
    KERNEL_T: tl.constexpr,
    KERNEL_S: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_S: tl.constexpr,
    DILATION_T: tl.constexpr,
    DILATION_S: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_S: tl.constexpr,
    T_AXIS: tl.constexpr,
):
    # The row group is the fastest index, so that programs which share data start together.
    row_group = tl.program_id(0) % row_groups
    program = tl.program_id(0) // row_groups
    c_tile = program % c_tiles
    partial = program // c_tiles
    t_tile = partial % t_tiles
    s_split = (partial // t_tiles) % s_splits
    group = partial // t_tiles // s_splits

    offs_c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = _along_c(offs_c < channel_vectors * VECTOR, T_AXIS)
    lanes = tl.arange(0, BLOCK_T)
    t_first = t_tile * BLOCK_T
    t_input = t_first * STRIDE_T - pad_t
    c64 = (c_tile * BLOCK_C).to(tl.int64)
    stride_xt *= VECTOR
    stride_dzt *= VECTOR
    x_ptr += c64 * stride_xc + t_input.to(tl.int64) * stride_xt
    dz_ptr += c64 * stride_dzc + t_first.to(tl.int64) * stride_dzt
    mask_dz = _along_t(t_first + lanes < out_t, T_AXIS) & mask_c
    offsets_dz = _along_t(lanes * stride_dzt, T_AXIS) + _along_c(tl.arange(0, BLOCK_C) * stride_dzc, T_AXIS)

    accumulators = (_zeros(BLOCK_T, BLOCK_C, T_AXIS),) * (ROWS * KERNEL_S)
    s_end = tl.minimum((s_split + 1) * span, out_s)
    for n in range(group * images, tl.minimum((group + 1) * images, batch)):
        n64 = n.to(tl.int64)
        for s in range(s_split * span, s_end, TILE_S):
            gradients = ()
            for column in tl.static_range(TILE_S):
                gradients = gradients + (
                    _load_column(
                        dz_ptr + n64 * (stride_dzn * VECTOR),
                        offsets_dz,
                        mask_dz,
                        s + column,
                        s_end,
                        stride_dzs * VECTOR,
                    ),
                )
            for row in tl.static_range(ROWS):
                rows = lanes * STRIDE_T + (row_group * ROWS + row) * DILATION_T
                t = t_input + rows
                mask = _along_t((t >= 0) & (t < in_t), T_AXIS) & mask_c
                offsets = _along_t(rows * stride_xt, T_AXIS) + _along_c(tl.arange(0, BLOCK_C) * stride_xc, T_AXIS)
                for column in tl.static_range((TILE_S - 1) * STRIDE_S + (KERNEL_S - 1) * DILATION_S + 1):
                    value = _load_column(
                        x_ptr + n64 * (stride_xn * VECTOR),
                        offsets,
                        mask,
                        s * STRIDE_S - pad_s + column,
                        in_s,
                        stride_xs * VECTOR,
                    )
                    for kernel_s in tl.static_range(KERNEL_S):
                        ahead: tl.constexpr = column - kernel_s * DILATION_S
                        if (ahead >= 0) and (ahead % STRIDE_S == 0) and (ahead // STRIDE_S < TILE_S):
                            accumulators = _add_product(
                                accumulators, row * KERNEL_S + kernel_s, value, gradients[ahead // STRIDE_S]
                            )

    partials_ptr += partial.to(tl.int64) * (KERNEL_T * KERNEL_S) * packed_stride + offs_c
    for row in tl.static_range(ROWS):
        kernel_t = row_group * ROWS + row
        for kernel_s in tl.static_range(KERNEL_S):
            total = tl.sum(accumulators[row * KERNEL_S + kernel_s], T_AXIS)
            # The last group may reach past the kernel's last row.
            tap_ptr = partials_ptr + (kernel_t * KERNEL_S + kernel_s) * packed_stride
            tl.store(tap_ptr, total, mask=(offs_c >= 0) & (kernel_t < KERNEL_T))


# ---- launch configuration --------------------------------------------------------------------------------

# Programs that fill the largest GPU (132 to 148 multiprocessors) a few times over.
ENOUGH_PROGRAMS = 1056


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel cuts its work.

    Attributes:
        block_t, block_c: lanes of a tile along T and channels; powers of two.
        tile_s: accumulator columns in registers.
        num_warps: warps per program.
        span: positions of S that a program walks over, a multiple of tile_s.
        images: images that a program sums over (kernels that reduce).
        rows: kernel rows per program (weight gradient only).
    """

    block_t: int
    block_c: int
    tile_s: int
    num_warps: int
    span: int
    images: int = 1
    rows: int = 1


def choose_tile(
    channels_last: bool, channels: int, size_t: int, extent: int, lanes: int = 1024, stride: int = 1
) -> tuple[int, int]:
    """(block_t, block_c) with `lanes` lanes: 4 warps of threads with 8 channels each.

    Takes the pair that wastes least: lanes past the last channel or position, and halo rows (`extent` is the rows
    that one output needs). For NHWC 16 channels are the least, a whole 32-byte sector of half precision.
    """
    if channels_last:
        pairs = [(lanes // block_c, block_c) for block_c in (128, 64, 32, 16)]
    else:
        pairs = [(block_t, lanes // block_t) for block_t in (128, 64, 32, 16)]

    def cost(pair):
        block_t, block_c = pair
        t_tiles, c_tiles = triton.cdiv(size_t, block_t), triton.cdiv(channels, block_c)
        halo = 1 + (t_tiles - 1) * max(extent - stride, 0) / (size_t * stride)
        return t_tiles * block_t / size_t * (c_tiles * block_c / channels) * halo

    return min(pairs, key=cost)


def choose_config(
    kernel: str,
    *,
    channels_last: bool,
    batch: int,
    channels: int,
    size_t: int,
    size_s: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
) -> LaunchConfig:
    """The launch configuration of one kernel for one shape.

    Args:
        kernel: forward, statistics, conv_grad, input_grad or weight_grad.
        size_t, size_s: positions along T and S of what the kernel walks over (outputs; for input_grad inputs per
            residue class along T, and inputs along S).
        kernel_size, stride: (T, S).
    """
    kernel_t, kernel_s = kernel_size
    tile_s = 7
    if kernel == "input_grad" and stride[1] > 1:
        tile_s = 4 * stride[1]
    rows = 1
    if kernel == "weight_grad":
        # ROWS * KERNEL_S accumulators and TILE_S columns of dz share the registers.
        rows = min(kernel_t, max(1, 9 // kernel_s))
        tile_s = 4
    block_t, block_c = choose_tile(channels_last, channels, size_t, kernel_t, stride=stride[0])
    tiles = triton.cdiv(size_t, block_t) * triton.cdiv(channels, block_c) * triton.cdiv(kernel_t, rows)

    span = triton.cdiv(size_s, tile_s) * tile_s
    while span > 2 * tile_s and tiles * triton.cdiv(size_s, span) * batch < ENOUGH_PROGRAMS:
        span = triton.cdiv(triton.cdiv(span, 2), tile_s) * tile_s
    images = 1
    if kernel in ("statistics", "conv_grad", "weight_grad"):
        images = max(1, tiles * triton.cdiv(size_s, span) * batch // ENOUGH_PROGRAMS)
    return LaunchConfig(block_t, block_c, tile_s, 4, span, images, rows)


# ---- launchers -------------------------------------------------------------------------------------------


class _Problem:
    """Sizes and strides of one call, named by the kernels' axes T and S instead of H and W."""

    def __init__(self, x, weight, stride, padding, dilation):
        self.channels_last = is_channels_last(x)
        # Index of T and of S among (H, W).
        self.t, self.s = (0, 1) if self.channels_last else (1, 0)
        self.x, self.weight = x, weight
        self.batch, self.channels = x.shape[:2]
        self.kernel = weight.shape[2:]
        self.stride, self.dilation = stride, dilation
        self.pad_begin = (padding[0], padding[2])
        pad_end = (padding[1], padding[3])
        self.out = tuple(
            (x.shape[2 + i] + self.pad_begin[i] + pad_end[i] - (self.kernel[i] - 1) * dilation[i] - 1) // stride[i] + 1
            for i in (0, 1)
        )
        self.count = self.batch * self.out[0] * self.out[1]
        self.packed_stride = triton.cdiv(self.channels, 128) * 128

    def ts(self, pair):
        """(height, width) as (T, S)."""
        return pair[self.t], pair[self.s]

    def vector(self, *tensors) -> int:
        """Elements of a 16-byte vector along channels, or 1 where one of the tensors is not laid out for them.

        Strides reach the kernels divided by it: the product inside tells the compiler what divides them.
        """
        vector = 16 // self.x.element_size()
        for tensor in tensors:
            strides = [tensor.stride(dim) for dim in (0, 2, 3) if tensor.shape[dim] > 1]
            if tensor.stride(1) != 1 or self.channels % vector or any(stride % vector for stride in strides):
                return 1
        return vector

    def strides(self, tensor, vector):
        """(n, c, t, s) strides, all but the channels' in units of `vector`."""
        t, s = self.ts((tensor.stride(2), tensor.stride(3)))
        return tensor.stride(0) // vector, tensor.stride(1), t // vector, s // vector

    def sizes(self):
        """in_t, in_s, out_t, out_s."""
        return *self.ts(self.x.shape[2:]), *self.ts(self.out)

    def constants(self, config, vector):
        """The constexpr arguments that all large kernels take."""
        return {
            "KERNEL_T": self.kernel[self.t],
            "KERNEL_S": self.kernel[self.s],
            "STRIDE_T": self.stride[self.t],
            "STRIDE_S": self.stride[self.s],
            "DILATION_T": self.dilation[self.t],
            "DILATION_S": self.dilation[self.s],
            "VECTOR": vector,
            "BLOCK_T": config.block_t,
            "BLOCK_C": config.block_c,
            "TILE_S": config.tile_s,
            "T_AXIS": 0 if self.channels_last else 1,
            "num_warps": config.num_warps,
        }

    def config(self, kernel):
        size_t, size_s = self.ts(self.out)
        if kernel == "input_grad":
            size_t, size_s = self.ts(self.x.shape[2:])
            size_t = triton.cdiv(size_t, self.stride[self.t])
        return choose_config(
            kernel,
            channels_last=self.channels_last,
            batch=self.batch,
            channels=self.channels,
            size_t=size_t,
            size_s=size_s,
            kernel_size=self.ts(self.kernel),
            stride=self.ts(self.stride),
        ), size_t, size_s


def _on_device(x):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _pack(problem, bias, bn_weight, bn_bias, mean, spread, eps, spread_kind):
    """[kh * kw + 4, packed_stride] fp32 rows: taps in (T, S) order, scale, shift, centre, invstd."""
    weight, (kernel_t, kernel_s) = problem.weight, problem.ts(problem.kernel)
    packed = weight.new_empty((kernel_t * kernel_s + AFFINE_ROWS, problem.packed_stride), dtype=torch.float32)
    _pack_kernel[(problem.packed_stride // 128,)](
        weight,
        bias,
        bn_weight,
        bn_bias,
        mean,
        spread,
        packed,
        problem.channels,
        problem.packed_stride,
        weight.stride(0),
        *problem.ts((weight.stride(2), weight.stride(3))),
        eps,
        KERNEL_T=kernel_t,
        KERNEL_S=kernel_s,
        SPREAD=spread_kind,
        BLOCK_C=128,
        num_warps=4,
    )
    return packed


def _statistics(problem, packed, bias, running_mean, running_var, momentum, eps):
    """(mean, invstd) of z = conv(x) + bias over the batch; moves the running statistics."""
    x = problem.x
    config, size_t, size_s = problem.config("statistics")
    c_tiles = triton.cdiv(problem.channels, config.block_c)
    t_tiles, s_splits = triton.cdiv(size_t, config.block_t), triton.cdiv(size_s, config.span)
    programs = t_tiles * s_splits * triton.cdiv(problem.batch, config.images)
    partials = x.new_empty((programs, 3, problem.channels), dtype=torch.float32)
    vector = problem.vector(x)
    _statistics_kernel[(programs * c_tiles,)](
        x,
        packed,
        bias,
        partials,
        problem.batch,
        config.images,
        c_tiles,
        t_tiles,
        s_splits,
        config.span,
        problem.channels // vector,
        problem.packed_stride,
        *problem.sizes(),
        *problem.ts(problem.pad_begin),
        *problem.strides(x, vector),
        **problem.constants(config, vector),
    )
    return finalize_statistics(partials, running_mean, running_var, momentum, eps)


def forward(
    x,
    weight,
    bias,
    bn_weight,
    bn_bias,
    running_mean,
    running_var,
    stride,
    padding,
    dilation,
    training,
    momentum,
    eps,
    act,
    squeeze,
):
    """y, squeeze means [N, C] or None, and in training the batch's mean and invstd [C] (else None, None).

    x [N, C, H, W] with at least one element; weight [C, 1, kh, kw]; padding (top, bottom, left, right).
    """
    problem = _Problem(x, weight, stride, padding, dilation)
    with _on_device(x):
        mean = invstd = None
        if training:
            taps = _pack(problem, None, None, None, None, None, eps, "none")
            mean, invstd = _statistics(problem, taps, bias, running_mean, running_var, momentum, eps)
            packed = _pack(problem, bias, bn_weight, bn_bias, mean, invstd, eps, "invstd")
        else:
            kind = "none" if running_mean is None else "var"
            packed = _pack(problem, bias, bn_weight, bn_bias, running_mean, running_var, eps, kind)

        config, size_t, size_s = problem.config("forward")
        c_tiles = triton.cdiv(problem.channels, config.block_c)
        t_tiles, s_splits = triton.cdiv(size_t, config.block_t), triton.cdiv(size_s, config.span)
        y = new_output(x, (problem.batch, problem.channels, *problem.out))
        squeezed = partials = None
        factor = 1.0 / (problem.out[0] * problem.out[1])
        if squeeze:
            squeezed = partials = x.new_empty((problem.batch, problem.channels))
            if t_tiles * s_splits > 1:
                shape = (problem.batch, t_tiles * s_splits, problem.channels)
                partials = x.new_empty(shape, dtype=torch.float32)
        vector = problem.vector(x, y)
        _forward_kernel[(c_tiles * t_tiles * s_splits * problem.batch,)](
            x,
            packed,
            y,
            partials,
            factor,
            c_tiles,
            t_tiles,
            s_splits,
            config.span,
            problem.channels // vector,
            problem.packed_stride,
            *problem.sizes(),
            *problem.ts(problem.pad_begin),
            *problem.strides(x, vector),
            *problem.strides(y, vector),
            ACT=act,
            **problem.constants(config, vector),
        )
        if partials is not squeezed:
            squeezed.copy_(partials.sum(1))
    return y, squeezed, mean, invstd


def backward(
    grad_y,
    grad_squeeze,
    x,
    weight,
    bias,
    bn_weight,
    bn_bias,
    mean,
    invstd,
    running_mean,
    running_var,
    stride,
    padding,
    dilation,
    training,
    eps,
    act,
    needs_input_grad,
    needs_weight_grad,
):
    """Gradients of x, weight, bias, bn_weight and bn_bias; None where there is no such input or it is not wanted.

    mean and invstd are the batch's (training); otherwise the running statistics normalised.
    """
    problem = _Problem(x, weight, stride, padding, dilation)
    with _on_device(x):
        if training:
            packed = _pack(problem, bias, bn_weight, bn_bias, mean, invstd, eps, "invstd")
        else:
            kind = "none" if running_mean is None else "var"
            packed = _pack(problem, bias, bn_weight, bn_bias, running_mean, running_var, eps, kind)

        dz = new_output(x, grad_y.shape)
        if training:
            sums = _conv_grad(problem, packed, grad_y, grad_squeeze, act, None, None)
            _conv_grad(problem, packed, grad_y, grad_squeeze, act, sums, dz)
        else:
            sums = _conv_grad(problem, packed, grad_y, grad_squeeze, act, None, dz)
        grad_x = _input_grad(problem, packed, dz) if needs_input_grad else None
        grad_weight = _weight_grad(problem, dz) if needs_weight_grad else None

        sum_g, sum_gn = sums[:, : problem.channels]
        grad_bias = None
        if bias is not None:
            # The batch's mean takes the bias out again, so in training nothing depends on it.
            scale = packed[len(packed) - AFFINE_ROWS + SCALE.value, : problem.channels]
            grad_bias = torch.zeros_like(bias) if training else (scale * sum_g).to(bias.dtype)
    return (
        grad_x,
        grad_weight,
        grad_bias,
        None if bn_weight is None else sum_gn.to(bn_weight.dtype),
        None if bn_bias is None else sum_g.to(bn_bias.dtype),
    )


def _conv_grad(problem, packed, grad_y, grad_squeeze, act, sums, dz):
    """Writes dz where given; returns the sums [2, packed_stride] of g and g * normalised unless they are given."""
    x = problem.x
    config, size_t, size_s = problem.config("conv_grad")
    c_tiles = triton.cdiv(problem.channels, config.block_c)
    t_tiles, s_splits = triton.cdiv(size_t, config.block_t), triton.cdiv(size_s, config.span)
    programs = t_tiles * s_splits * triton.cdiv(problem.batch, config.images)
    partials = None
    if sums is None:
        partials = x.new_empty((programs, 2 * problem.packed_stride), dtype=torch.float32)
    vector = problem.vector(x, grad_y) if dz is None else problem.vector(x, grad_y, dz)
    _conv_grad_kernel[(programs * c_tiles,)](
        x,
        packed,
        grad_y,
        None if grad_squeeze is None else grad_squeeze.contiguous(),
        partials,
        sums,
        dz,
        1.0 / (problem.out[0] * problem.out[1]),
        1.0 / problem.count,
        problem.batch,
        config.images,
        c_tiles,
        t_tiles,
        s_splits,
        config.span,
        problem.channels // vector,
        problem.packed_stride,
        *problem.sizes(),
        *problem.ts(problem.pad_begin),
        *problem.strides(x, vector),
        *problem.strides(grad_y, vector),
        *((0, 0, 0, 0) if dz is None else problem.strides(dz, vector)),
        ACT=act,
        **problem.constants(config, vector),
    )
    return sums if partials is None else sum_partials(partials).view(2, problem.packed_stride)


def _input_grad(problem, packed, dz):
    dx = new_output(problem.x, problem.x.shape)
    config, size_t, size_s = problem.config("input_grad")
    c_tiles = triton.cdiv(problem.channels, config.block_c)
    t_tiles, s_splits = triton.cdiv(size_t, config.block_t), triton.cdiv(size_s, config.span)
    vector = problem.vector(dz, dx)
    pad_t, pad_s = problem.ts(problem.pad_begin)
    _input_grad_kernel[(c_tiles * t_tiles * s_splits * problem.batch,)](
        dz,
        packed,
        dx,
        c_tiles,
        t_tiles,
        s_splits,
        config.span,
        problem.channels // vector,
        problem.packed_stride,
        *problem.sizes(),
        *problem.strides(dz, vector),
        *problem.strides(dx, vector),
        PAD_T=pad_t,
        PAD_S=pad_s,
        **problem.constants(config, vector),
    )
    return dx


def _weight_grad(problem, dz):
    x, (kernel_t, kernel_s) = problem.x, problem.ts(problem.kernel)
    config, size_t, size_s = problem.config("weight_grad")
    c_tiles = triton.cdiv(problem.channels, config.block_c)
    t_tiles, s_splits = triton.cdiv(size_t, config.block_t), triton.cdiv(size_s, config.span)
    programs = t_tiles * s_splits * triton.cdiv(problem.batch, config.images)
    row_groups = triton.cdiv(kernel_t, config.rows)
    partials = x.new_empty((programs, kernel_t * kernel_s * problem.packed_stride), dtype=torch.float32)
    vector = problem.vector(x, dz)
    _weight_grad_kernel[(row_groups * programs * c_tiles,)](
        x,
        dz,
        partials,
        problem.batch,
        config.images,
        c_tiles,
        t_tiles,
        s_splits,
        config.span,
        row_groups,
        problem.channels // vector,
        problem.packed_stride,
        *problem.sizes(),
        *problem.ts(problem.pad_begin),
        *problem.strides(x, vector),
        *problem.strides(dz, vector),
        ROWS=config.rows,
        **problem.constants(config, vector),
    )
    taps = sum_partials(partials).view(kernel_t, kernel_s, problem.packed_stride)[:, :, : problem.channels]
    taps = taps.permute(2, 0, 1) if problem.channels_last else taps.permute(2, 1, 0)
    return problem.weight.new_empty(problem.weight.shape).copy_(taps.unsqueeze(1))
