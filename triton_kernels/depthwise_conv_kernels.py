"""The kernels of depthwise_conv_bn_act: one scheme for NHWC and NCHW, forward and backward.

A program owns a tile of lanes: `BLOCK_C` channels by `BLOCK_T` positions of one spatial axis, the *tile axis* T. The
other spatial axis, the *slide axis* S, is unrolled into `TILE_S` accumulator tiles that live in registers, and the
program walks along it. Each input value is loaded and converted once per kernel row and feeds up to k accumulators.

    layout  T (lanes)  S (registers, then a loop)  side by side in memory
    NHWC    H          W                           channels: 16-byte loads and stores
    NCHW    W          H                           T: neighbouring lanes take neighbouring elements

A small kernel packs the parameters into fp32 rows of padded channels, which the large kernels load as vectors and
without masks: kh*kw taps, then scale, shift, centre and invstd, where

    z = conv(x) + bias      y = act(conv(x) * scale + shift)      normalised(z) = (conv(x) - centre) * invstd

Every sum over pixels goes through partials of one program each and a second stage in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .activation import activation, activation_grad
from .batch_statistics import merge_welford

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
def _packed_row(packed_ptr, row, packed_stride, offs_c, BLOCK_T: tl.constexpr, T_AXIS: tl.constexpr):
    """One packed row, ready to combine with a tile."""
    if T_AXIS == 0:
        # The whole tile's addresses, so that the loads take the tile's own layout (16 bytes per thread).
        ptrs = (packed_ptr + row * packed_stride + offs_c)[None, :]
        return tl.load(tl.broadcast_to(ptrs, (BLOCK_T, offs_c.shape[0])))
    else:
        return tl.load(packed_ptr + row * packed_stride + offs_c)[:, None]


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
def _wide(position):
    """A position in 64 bits, before it is multiplied with a stride (a loop index may be a plain int)."""
    return tl.full((), 0, tl.int64) + position


@triton.jit
def _load_column(ptrs, mask, s, size_s):
    """A tile as fp32; zero where the mask is off or its column s lies outside of the image."""
    inside = mask & (s >= 0) & (s < size_s)
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)


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
    x_ptr += _wide(t_begin) * stride_t + _wide(s_begin) * stride_s
    accumulators = (_zeros(BLOCK_T, BLOCK_C, T_AXIS),) * TILE_S
    # A loop and not unrolled: an unrolled one would fill the instruction cache and hoist loads until registers spill.
    for kernel_t in range(KERNEL_T):
        taps = ()
        for kernel_s in tl.static_range(KERNEL_S):
            tap = kernel_t * KERNEL_S + kernel_s
            taps = taps + (_packed_row(packed_ptr, tap, packed_stride, offs_c, BLOCK_T, T_AXIS),)
        rows = lanes + kernel_t * DILATION_T
        t = t_begin + rows
        mask = _along_t((t >= 0) & (t < size_t), T_AXIS) & _along_c(mask_c, T_AXIS)
        ptrs = x_ptr + _along_t(rows * stride_t, T_AXIS) + _along_c(tl.arange(0, BLOCK_C) * stride_c, T_AXIS)
        for column in tl.static_range((TILE_S - 1) * STRIDE_S + (KERNEL_S - 1) * DILATION_S + 1):
            value = _load_column(ptrs + column * stride_s, mask, s_begin + column, size_s)
            for kernel_s in tl.static_range(KERNEL_S):
                accumulators = _accumulate(
                    accumulators, column - kernel_s * DILATION_S, STRIDE_S, value, taps[kernel_s]
                )
    return accumulators


@triton.jit
def _add(accumulators, INDEX: tl.constexpr, value):
    """The tuple with `value` added to the accumulator at INDEX."""
    return accumulators[:INDEX] + (accumulators[INDEX] + value,) + accumulators[INDEX + 1 :]


@triton.jit
def _accumulate(accumulators, POSITION: tl.constexpr, STRIDE: tl.constexpr, a, b):
    """Adds a * b to the accumulator of output POSITION / STRIDE, if there is such an output in the tuple."""
    if POSITION >= 0 and POSITION % STRIDE == 0 and len(accumulators) > POSITION // STRIDE:
        accumulators = _add(accumulators, POSITION // STRIDE, a * b)
    return accumulators


@triton.jit
def _accumulate_tap(accumulators, INDEX: tl.constexpr, value, gradients, POSITION: tl.constexpr, STRIDE: tl.constexpr):
    """Adds value * (gradient of output POSITION / STRIDE), if there is such an output, to accumulator INDEX."""
    if POSITION >= 0 and POSITION % STRIDE == 0 and len(gradients) > POSITION // STRIDE:
        accumulators = _add(accumulators, INDEX, value * gradients[POSITION // STRIDE])
    return accumulators


# ---- parameters ------------------------------------------------------------------------------------------


# A program packs one kernel row of BLOCK_C channels, taps that lie far apart in memory, and the four affine rows, as
# all programs of these channels do. SPREAD says what `spread_ptr` holds: "var", "invstd", or "none", no BatchNorm.
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
    kernel_t = tl.program_id(1)
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
    n64, c64 = _wide(n), _wide(c_tile * BLOCK_C)
    x_ptr += n64 * (stride_xn * VECTOR) + c64 * stride_xc
    y_ptr += n64 * (stride_yn * VECTOR) + c64 * stride_yc + _wide(t_first) * (stride_yt * VECTOR)

    affine_ptr = packed_ptr + KERNEL_T * KERNEL_S * packed_stride
    scale = _packed_row(affine_ptr, SCALE, packed_stride, offs_c, BLOCK_T, T_AXIS)
    shift = _packed_row(affine_ptr, SHIFT, packed_stride, offs_c, BLOCK_T, T_AXIS)
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
        ptrs = y_ptr + _wide(s) * (stride_ys * VECTOR) + offsets_y
        for column in tl.static_range(TILE_S):
            y = activation(accumulators[column] * scale + shift, ACT, y_ptr.dtype.element_ty)
            mask = mask_y & (s + column < s_end)
            tl.store(ptrs + column * (stride_ys * VECTOR), y.to(y_ptr.dtype.element_ty), mask=mask)
            if squeeze_ptr is not None:
                total += tl.where(mask, y, 0.0)

    if squeeze_ptr is not None:
        sums = tl.sum(total, T_AXIS) * squeeze_factor
        squeeze_ptr += _wide(partial) * channels + offs_c
        tl.store(squeeze_ptr, sums.to(squeeze_ptr.dtype.element_ty), mask=mask_c)


# One program per image and BLOCK_C channels: adds up `parts` fp32 sums, in order, and writes their sum once.
@triton.jit
def _sum_squeeze_kernel(partials_ptr, squeeze_ptr, parts, channels, BLOCK_C: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < channels
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(parts):
        sums += tl.load(partials_ptr + (image * parts + part) * channels + offs_c, mask=mask, other=0.0)
    tl.store(squeeze_ptr + image * channels + offs_c, sums.to(squeeze_ptr.dtype.element_ty), mask=mask)


# A program takes BLOCK_T x span pixels of BLOCK_C channels of several images and writes one (count, mean, M2, what
# rounding took from the mean) per channel. Each lane keeps its own Welford triple, fed with the mean and M2 of TILE_S
# values at a time, relative to the lane's first value (anchor), so that a large mean beside a small deviation costs
# no digits.
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
    x_ptr += _wide(c_tile * BLOCK_C) * stride_xc
    mask_t = _along_t(t_first + tl.arange(0, BLOCK_T) < out_t, T_AXIS)

    zero = _zeros(BLOCK_T, BLOCK_C, T_AXIS)
    anchor, count, mean, m2 = zero, zero, zero, zero
    s_end = tl.minimum((s_split + 1) * span, out_s)
    for n in range(group * images, tl.minimum((group + 1) * images, batch)):
        for s in range(s_split * span, s_end, TILE_S):
            accumulators = _convolve(
                x_ptr + _wide(n) * (stride_xn * VECTOR),
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
            anchor = tl.where(count > 0.0, anchor, accumulators[0])
            columns = tl.minimum(s_end - s, TILE_S).to(tl.float32)
            tile_mean = zero
            for column in tl.static_range(TILE_S):
                tile_mean += tl.where(s + column < s_end, accumulators[column] - anchor, 0.0)
            tile_mean = tile_mean / columns
            tile_m2 = zero
            for column in tl.static_range(TILE_S):
                deviation = tl.where(s + column < s_end, accumulators[column] - anchor - tile_mean, 0.0)
                tile_m2 += deviation * deviation
            tile_count = tl.where(mask_t, columns, 0.0) + zero
            count, mean, m2 = merge_welford(count, mean, m2, tile_count, tile_mean, tile_m2)

    # Over the lanes of T, relative to one anchor per channel: first the mean, then the deviations from it.
    lane_count = tl.sum(count, T_AXIS)
    common = tl.where(lane_count > 0.0, tl.max(tl.where(count > 0.0, anchor, float("-inf")), T_AXIS), 0.0)
    mean = tl.where(count > 0.0, anchor - _along_c(common, T_AXIS) + mean, 0.0)
    lane_mean = tl.sum(count * mean, T_AXIS) / tl.maximum(lane_count, 1.0)
    apart = mean - _along_c(lane_mean, T_AXIS)
    lane_m2 = tl.sum(tl.where(count > 0.0, m2 + count * apart * apart, 0.0), T_AXIS)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    total = common + lane_mean
    mean_with_bias = total + bias
    rounded_off = (common - total) + lane_mean + ((total - mean_with_bias) + bias)
    partials_ptr += _wide(partial) * 4 * channels + offs_c
    tl.store(partials_ptr, lane_count, mask=mask_c)
    tl.store(partials_ptr + channels, mean_with_bias, mask=mask_c)
    tl.store(partials_ptr + 2 * channels, lane_m2, mask=mask_c)
    tl.store(partials_ptr + 3 * channels, rounded_off, mask=mask_c)


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
    partial_stride,
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
    c64, t64 = _wide(c_tile * BLOCK_C), _wide(t_first)
    x_ptr += c64 * stride_xc
    dy_ptr += c64 * stride_dyc + t64 * (stride_dyt * VECTOR)

    affine_ptr = packed_ptr + KERNEL_T * KERNEL_S * packed_stride
    scale = _packed_row(affine_ptr, SCALE, packed_stride, offs_c, BLOCK_T, T_AXIS)
    shift = _packed_row(affine_ptr, SHIFT, packed_stride, offs_c, BLOCK_T, T_AXIS)
    centre = _packed_row(affine_ptr, CENTRE, packed_stride, offs_c, BLOCK_T, T_AXIS)
    invstd = _packed_row(affine_ptr, INVSTD, packed_stride, offs_c, BLOCK_T, T_AXIS)
    if sums_ptr is not None:
        mean_g = _packed_row(sums_ptr, 0, partial_stride, offs_c, BLOCK_T, T_AXIS) * inverse_count
        mean_gn = _packed_row(sums_ptr, 1, partial_stride, offs_c, BLOCK_T, T_AXIS) * inverse_count

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
        n64 = _wide(n)
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
            dy_ptrs = dy_ptr + (n64 * (stride_dyn * VECTOR) + _wide(s) * (stride_dys * VECTOR)) + offsets_dy
            if dz_ptr is not None:
                dz_ptrs = dz_ptr + (n64 * (stride_dzn * VECTOR) + _wide(s) * (stride_dzs * VECTOR)) + offsets_dz
            for column in tl.static_range(TILE_S):
                mask = mask_tc & (s + column < s_end)
                g = tl.load(dy_ptrs + column * (stride_dys * VECTOR), mask=mask, other=0.0).to(tl.float32)
                if dsqueeze_ptr is not None:
                    g += tl.where(mask, dsqueeze, 0.0)
                g *= activation_grad(accumulators[column] * scale + shift, ACT, dy_ptr.dtype.element_ty)
                normalised = (accumulators[column] - centre) * invstd
                if partials_ptr is not None:
                    sum_g += g
                    sum_gn += g * normalised
                if dz_ptr is not None:
                    if sums_ptr is not None:
                        g = g - mean_g - normalised * mean_gn
                    dz = (g * scale).to(dz_ptr.dtype.element_ty)
                    tl.store(dz_ptrs + column * (stride_dzs * VECTOR), dz, mask=mask)

    if partials_ptr is not None:
        partials_ptr += _wide(partial) * 2 * partial_stride + offs_c
        tl.store(partials_ptr, tl.sum(sum_g, T_AXIS))
        tl.store(partials_ptr + partial_stride, tl.sum(sum_gn, T_AXIS))


# A program computes dx for BLOCK_C channels of one image, lanes being every STRIDE_T-th position of T, so that all
# lanes meet the same taps: one pass per residue class of T, whose taps are FIRST_TAPS[residue] and every TAP_STEP-th
# after it, and columns of S whose residues are known at compile time. No tap is multiplied with a hole of the stride.
# Reads dz with halo, writes dx once.
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
    FIRST_TAPS: tl.constexpr,
    TAP_STEP: tl.constexpr,
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
    n64, c64 = _wide(n), _wide(c_tile * BLOCK_C)
    dz_ptr += n64 * (stride_dzn * VECTOR) + c64 * stride_dzc
    dx_ptr += n64 * (stride_dxn * VECTOR) + c64 * stride_dxc
    stride_dzt *= VECTOR
    stride_dzs *= VECTOR
    stride_dxt *= VECTOR
    stride_dxs *= VECTOR
    lanes = tl.arange(0, BLOCK_T)
    t_first = t_tile * BLOCK_T
    # Columns of dz, relative to s / STRIDE_S, that reach the columns [s, s + TILE_S) of dx.
    FIRST: tl.constexpr = (PAD_S - (KERNEL_S - 1) * DILATION_S) // STRIDE_S
    LAST: tl.constexpr = (TILE_S - 1 + PAD_S) // STRIDE_S

    s_end = tl.minimum((s_split + 1) * span, in_s)
    for s in range(s_split * span, s_end, TILE_S):
        for residue in tl.static_range(STRIDE_T):
            accumulators = (_zeros(BLOCK_T, BLOCK_C, T_AXIS),) * TILE_S
            for kernel_t in range(FIRST_TAPS[residue], KERNEL_T, TAP_STEP):
                taps = ()
                for kernel_s in tl.static_range(KERNEL_S):
                    tap = kernel_t * KERNEL_S + kernel_s
                    taps = taps + (_packed_row(packed_ptr, tap, packed_stride, offs_c, BLOCK_T, T_AXIS),)
                t_origin = t_first + (residue + PAD_T - kernel_t * DILATION_T) // STRIDE_T  # without remainder
                t = t_origin + lanes
                mask = _along_t((t >= 0) & (t < out_t), T_AXIS) & mask_c
                ptrs = dz_ptr + (_wide(t_origin) * stride_dzt + _wide(s // STRIDE_S + FIRST) * stride_dzs)
                ptrs += _along_t(lanes * stride_dzt, T_AXIS)
                ptrs += _along_c(tl.arange(0, BLOCK_C) * stride_dzc, T_AXIS)
                for column in tl.static_range(FIRST, LAST + 1):
                    value = _load_column(ptrs + (column - FIRST) * stride_dzs, mask, s // STRIDE_S + column, out_s)
                    for kernel_s in tl.static_range(KERNEL_S):
                        accumulators = _accumulate(
                            accumulators,
                            column * STRIDE_S - PAD_S + kernel_s * DILATION_S,
                            1,
                            value,
                            taps[kernel_s],
                        )
            t = (t_first + lanes) * STRIDE_T + residue
            mask = _along_t(t < in_t, T_AXIS) & mask_c
            ptrs = dx_ptr + (_wide(t_first * STRIDE_T + residue) * stride_dxt + _wide(s) * stride_dxs)
            ptrs += _along_t(lanes * (stride_dxt * STRIDE_T), T_AXIS)
            ptrs += _along_c(tl.arange(0, BLOCK_C) * stride_dxc, T_AXIS)
            for column in tl.static_range(TILE_S):
                dx = accumulators[column].to(dx_ptr.dtype.element_ty)
                tl.store(ptrs + column * stride_dxs, dx, mask=mask & (s + column < s_end))


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
    partial_stride,
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
    c64 = _wide(c_tile * BLOCK_C)
    stride_xt *= VECTOR
    stride_xs *= VECTOR
    stride_dzt *= VECTOR
    stride_dzs *= VECTOR
    x_ptr += c64 * stride_xc + _wide(t_input) * stride_xt
    dz_ptr += c64 * stride_dzc + _wide(t_first) * stride_dzt
    mask_dz = _along_t(t_first + lanes < out_t, T_AXIS) & mask_c
    offsets_dz = _along_t(lanes * stride_dzt, T_AXIS) + _along_c(tl.arange(0, BLOCK_C) * stride_dzc, T_AXIS)
    offsets_c = _along_c(tl.arange(0, BLOCK_C) * stride_xc, T_AXIS)

    accumulators = (_zeros(BLOCK_T, BLOCK_C, T_AXIS),) * (ROWS * KERNEL_S)
    s_end = tl.minimum((s_split + 1) * span, out_s)
    for n in range(group * images, tl.minimum((group + 1) * images, batch)):
        n64 = _wide(n)
        for s in range(s_split * span, s_end, TILE_S):
            ptrs = dz_ptr + (n64 * (stride_dzn * VECTOR) + _wide(s) * stride_dzs) + offsets_dz
            gradients = ()
            for column in tl.static_range(TILE_S):
                gradients = gradients + (_load_column(ptrs + column * stride_dzs, mask_dz, s + column, s_end),)
            s_input = s * STRIDE_S - pad_s
            image_ptr = x_ptr + (n64 * (stride_xn * VECTOR) + _wide(s_input) * stride_xs)
            for row in tl.static_range(ROWS):
                rows = lanes * STRIDE_T + (row_group * ROWS + row) * DILATION_T
                t = t_input + rows
                mask = _along_t((t >= 0) & (t < in_t), T_AXIS) & mask_c
                ptrs = image_ptr + _along_t(rows * stride_xt, T_AXIS) + offsets_c
                for column in tl.static_range((TILE_S - 1) * STRIDE_S + (KERNEL_S - 1) * DILATION_S + 1):
                    value = _load_column(ptrs + column * stride_xs, mask, s_input + column, in_s)
                    for kernel_s in tl.static_range(KERNEL_S):
                        accumulators = _accumulate_tap(
                            accumulators,
                            row * KERNEL_S + kernel_s,
                            value,
                            gradients,
                            column - kernel_s * DILATION_S,
                            STRIDE_S,
                        )

    partials_ptr += _wide(partial) * (KERNEL_T * KERNEL_S) * partial_stride + offs_c
    for row in tl.static_range(ROWS):
        kernel_t = row_group * ROWS + row
        for kernel_s in tl.static_range(KERNEL_S):
            total = tl.sum(accumulators[row * KERNEL_S + kernel_s], T_AXIS)
            # The last group may reach past the kernel's last row.
            tap_ptr = partials_ptr + (kernel_t * KERNEL_S + kernel_s) * partial_stride
            tl.store(tap_ptr, total, mask=(offs_c >= 0) & (kernel_t < KERNEL_T))
