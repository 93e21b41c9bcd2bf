"""BatchNorm + residual + activation, forward and backward, for NHWC and NCHW.

z = (x - mean) * invstd * weight + bias + residual, y = act(z). Every kernel walks tiles of one channel block
(see channel_tile.py) with the block's parameters in registers. Trips of the large tensors through memory:

    eval forward    read x, write y
    train forward   read x for the statistics; read x, write y
    eval backward   read x, dy, write dx and leave the sums of dweight and dbias, all in one pass
    train backward  read x, dy for the sums; read x, dy, write dx

The residual, if any, is read wherever x meets an activation. Its gradient g = dy * act'(z) is written as soon as it is
known, and in training takes the place of dy and residual in the second pass: 7 trips with it instead of 8. Nothing but
x (and the residual) is kept for backward: the normalised value is computed again. Sums over a batch go through one row
of partials per program and a second stage in a fixed order: no atomics.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .activation import activation, activation_grad
from .batch_statistics import MAX_REGISTERS, finalize_statistics, sum_partials_into
from .channel_tile import (
    Launch,
    geometry,
    load_per_channel,
    load_tile,
    new_output,
    num_channels,
    num_positions,
    over_tile,
    store_per_channel,
    store_tile,
    sum_per_channel,
    tile_place,
    tunable,
    zero_tile,
)
from .layout import dense
from .replay import launch_kernel, remembers

# Programs per multiprocessor. Those that leave partials are fewer, so that the second stage stays short.
ELEMENTWISE_PROGRAMS = 32
REDUCING_PROGRAMS = 12
MOST_PARTIALS = 1024
MOST_PROGRAMS = 65535  # on the second axis of a grid

# 16 elements a thread where one tensor meets a few parameters, 8 where backward holds several tiles at once.
FORWARD_WARPS = 4
BACKWARD_WARPS = 8

TUNABLE = tunable("batch_norm_act")
FORWARD = Launch(TUNABLE, "forward", FORWARD_WARPS, ELEMENTWISE_PROGRAMS)
PARTIAL_STATISTICS = Launch(TUNABLE, "statistics", FORWARD_WARPS, REDUCING_PROGRAMS)
BACKWARD_SUMS = Launch(TUNABLE, "backward_sums", BACKWARD_WARPS, REDUCING_PROGRAMS)
BACKWARD_INPUT = Launch(TUNABLE, "backward_input", BACKWARD_WARPS, ELEMENTWISE_PROGRAMS)
BACKWARD_INPUT_AND_SUMS = Launch(TUNABLE, "backward_input_and_sums", BACKWARD_WARPS, REDUCING_PROGRAMS)


# ---- pieces that the kernels share -----------------------------------------------------------------------


@triton.jit
def _load_parameters(
    mean_ptr, spread_ptr, weight_ptr, bias_ptr, eps, sizes, STATISTICS: tl.constexpr, WALK: tl.constexpr
):
    """mean, invstd, weight and bias of this program's channels, in the shape that broadcasts over a tile.

    `spread` is invstd for the statistics of a "batch" and a variance for "running" ones; "none" has neither.
    """
    mean = load_per_channel(mean_ptr, 0.0, sizes, WALK)
    invstd = load_per_channel(spread_ptr, 1.0, sizes, WALK)
    if STATISTICS == "running":
        invstd = tl.div_rn(1.0, tl.sqrt_rn(invstd + eps))
    weight = load_per_channel(weight_ptr, 1.0, sizes, WALK)
    bias = load_per_channel(bias_ptr, 0.0, sizes, WALK)
    return over_tile(mean, WALK), over_tile(invstd, WALK), over_tile(weight, WALK), over_tile(bias, WALK)


@triton.jit
def _normalised_and_grad(
    x_ptr, grad_ptr, residual_ptr, place, sizes, strides, parameters, ACT: tl.constexpr, WALK: tl.constexpr
):
    """One tile of the normalised x, and of g = dy * act'(z)."""
    mean, invstd, weight, bias = parameters
    x = load_tile(x_ptr, place, sizes, strides[0], WALK)
    g = load_tile(grad_ptr, place, sizes, strides[1], WALK)
    normalised = (x - mean) * invstd
    if ACT != "identity":
        z = normalised * weight + bias
        if residual_ptr is not None:
            z += load_tile(residual_ptr, place, sizes, strides[2], WALK)
        g *= activation_grad(z, ACT, x_ptr.dtype.element_ty)
    return normalised, g


# ---- kernels ---------------------------------------------------------------------------------------------


# Tile: block_c channels x block_p positions, `tiles_per_program` of them. Reads x once (and the program's first
# tile again, from the cache); writes count, mean, M2 and what rounding took from the mean, per channel and program,
# 16 bytes. Registers: a tile of x and two fp32 accumulators of its size. Values are taken relative to the mean of the
# program's first tile: M2 holds at least that tile's share of the squared distance to this shift, so S2 - S1^2 / n
# loses at most a factor of `tiles_per_program` in precision, however large the offset that all values have in common.
@triton.jit
def _batch_norm_statistics_kernel(
    x_ptr,
    partials_ptr,
    tiles,
    tiles_per_program,
    sample_tiles,
    channels,
    positions,
    width,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    WALK: tl.constexpr,
):
    sizes = (sample_tiles, channels, positions, width)
    x_strides = (stride_xn, stride_xc, stride_xh, stride_xw)
    first_tile = tl.program_id(1) * tiles_per_program
    length = num_positions(sizes, WALK)

    place = tile_place(first_tile, sizes, WALK)
    x = load_tile(x_ptr, place, sizes, x_strides, WALK)
    in_first = tl.minimum(length - place[1], WALK.block_p).to(tl.float32)
    shift = sum_per_channel(x, WALK) / in_first

    count = 0.0
    sums = zero_tile(WALK)
    squares = zero_tile(WALK)
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        place = tile_place(tile, sizes, WALK)
        x = load_tile(x_ptr, place, sizes, x_strides, WALK)
        distance = tl.where(place[2], x - over_tile(shift, WALK), 0.0)
        sums += distance
        squares += distance * distance
        count += tl.minimum(length - place[1], WALK.block_p).to(tl.float32)

    total = sum_per_channel(sums, WALK)
    m2 = tl.maximum(sum_per_channel(squares, WALK) - total * (total / count), 0.0)
    mean = shift + total / count
    row = tl.program_id(1) * 4
    store_per_channel(partials_ptr, row, tl.zeros_like(total) + count, sizes, WALK)
    store_per_channel(partials_ptr, row + 1, mean, sizes, WALK)
    store_per_channel(partials_ptr, row + 2, m2, sizes, WALK)
    store_per_channel(partials_ptr, row + 3, (shift - mean) + total / count, sizes, WALK)


# Tile: block_c channels x block_p positions, `tiles_per_program` of them. Reads x (and the residual) once, writes
# y once. Registers: the block's parameters (mean, scale, bias) and one tile of each tensor.
@triton.jit
def _batch_norm_act_forward_kernel(
    x_ptr,
    y_ptr,
    residual_ptr,
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    tiles,
    tiles_per_program,
    sample_tiles,
    channels,
    positions,
    width,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    STATISTICS: tl.constexpr,
    ACT: tl.constexpr,
    WALK: tl.constexpr,
):
    sizes = (sample_tiles, channels, positions, width)
    x_strides = (stride_xn, stride_xc, stride_xh, stride_xw)
    y_strides = (stride_yn, stride_yc, stride_yh, stride_yw)
    residual_strides = (stride_rn, stride_rc, stride_rh, stride_rw)
    mean, invstd, weight, bias = _load_parameters(
        mean_ptr, spread_ptr, weight_ptr, bias_ptr, eps, sizes, STATISTICS, WALK
    )
    scale = invstd * weight
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        place = tile_place(tile, sizes, WALK)
        z = (load_tile(x_ptr, place, sizes, x_strides, WALK) - mean) * scale + bias
        if residual_ptr is not None:
            z += load_tile(residual_ptr, place, sizes, residual_strides, WALK)
        store_tile(y_ptr, activation(z, ACT, y_ptr.dtype.element_ty), place, sizes, y_strides, WALK)


# Tile: block_c channels x block_p positions, `tiles_per_program` of them. Reads x and dy (and the residual) once;
# writes the sums of g * normalised and of g, g = dy * act'(z), 8 bytes per channel and program (and g itself, the
# residual's gradient, once).
# Registers: the block's parameters, one tile of each tensor, two fp32 accumulators of the tile's size.
@triton.jit
def _batch_norm_act_backward_sums_kernel(
    x_ptr,
    grad_ptr,
    residual_ptr,
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    partials_ptr,
    grad_residual_ptr,
    eps,
    tiles,
    tiles_per_program,
    sample_tiles,
    channels,
    positions,
    width,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_drn,
    stride_drc,
    stride_drh,
    stride_drw,
    STATISTICS: tl.constexpr,
    ACT: tl.constexpr,
    WALK: tl.constexpr,
):
    sizes = (sample_tiles, channels, positions, width)
    x_strides = (stride_xn, stride_xc, stride_xh, stride_xw)
    grad_strides = (stride_gn, stride_gc, stride_gh, stride_gw)
    residual_strides = (stride_rn, stride_rc, stride_rh, stride_rw)
    grad_residual_strides = (stride_drn, stride_drc, stride_drh, stride_drw)
    strides = (x_strides, grad_strides, residual_strides)
    parameters = _load_parameters(mean_ptr, spread_ptr, weight_ptr, bias_ptr, eps, sizes, STATISTICS, WALK)
    sum_g = zero_tile(WALK)
    sum_gx = zero_tile(WALK)
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        place = tile_place(tile, sizes, WALK)
        normalised, g = _normalised_and_grad(
            x_ptr, grad_ptr, residual_ptr, place, sizes, strides, parameters, ACT, WALK
        )
        if grad_residual_ptr is not None:
            store_tile(grad_residual_ptr, g, place, sizes, grad_residual_strides, WALK)
        sum_g += g
        sum_gx += g * normalised
    row = tl.program_id(1) * 2
    store_per_channel(partials_ptr, row, sum_per_channel(sum_gx, WALK), sizes, WALK)
    store_per_channel(partials_ptr, row + 1, sum_per_channel(sum_g, WALK), sizes, WALK)


# Tile: block_c channels x block_p positions, `tiles_per_program` of them. Reads x and dy (and the residual) once,
# writes dx (and the residual's gradient g) once. Registers: the block's parameters and sums, one tile of each
# tensor; in eval also the accumulators of the sums, which then need no pass of their own.
@triton.jit
def _batch_norm_act_backward_input_kernel(
    x_ptr,
    grad_ptr,
    residual_ptr,
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    partials_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    eps,
    count,
    tiles,
    tiles_per_program,
    sample_tiles,
    channels,
    positions,
    width,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_dxn,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    stride_drn,
    stride_drc,
    stride_drh,
    stride_drw,
    STATISTICS: tl.constexpr,
    ACT: tl.constexpr,
    WALK: tl.constexpr,
):
    sizes = (sample_tiles, channels, positions, width)
    x_strides = (stride_xn, stride_xc, stride_xh, stride_xw)
    grad_strides = (stride_gn, stride_gc, stride_gh, stride_gw)
    residual_strides = (stride_rn, stride_rc, stride_rh, stride_rw)
    grad_x_strides = (stride_dxn, stride_dxc, stride_dxh, stride_dxw)
    grad_residual_strides = (stride_drn, stride_drc, stride_drh, stride_drw)
    strides = (x_strides, grad_strides, residual_strides)
    parameters = _load_parameters(mean_ptr, spread_ptr, weight_ptr, bias_ptr, eps, sizes, STATISTICS, WALK)
    scale = parameters[1] * parameters[2]
    if STATISTICS == "batch":
        mean_gx = over_tile(load_per_channel(sums_ptr, 0.0, sizes, WALK) / count, WALK)
        mean_g = over_tile(load_per_channel(sums_ptr + num_channels(sizes, WALK), 0.0, sizes, WALK) / count, WALK)
    if partials_ptr is not None:
        sum_g = zero_tile(WALK)
        sum_gx = zero_tile(WALK)

    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        place = tile_place(tile, sizes, WALK)
        normalised, g = _normalised_and_grad(
            x_ptr, grad_ptr, residual_ptr, place, sizes, strides, parameters, ACT, WALK
        )
        if STATISTICS == "batch":
            grad_x = (g - mean_g - normalised * mean_gx) * scale
        else:
            grad_x = g * scale
        store_tile(grad_x_ptr, grad_x, place, sizes, grad_x_strides, WALK)
        if grad_residual_ptr is not None:
            store_tile(grad_residual_ptr, g, place, sizes, grad_residual_strides, WALK)
        if partials_ptr is not None:
            sum_g += g
            sum_gx += g * normalised

    if partials_ptr is not None:
        row = tl.program_id(1) * 2
        store_per_channel(partials_ptr, row, sum_per_channel(sum_gx, WALK), sizes, WALK)
        store_per_channel(partials_ptr, row + 1, sum_per_channel(sum_g, WALK), sizes, WALK)


# ---- launchers -------------------------------------------------------------------------------------------


@remembers
def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """act(batch_norm(x) + residual) for `[N, C, H, W]` x with at least one element.

    The residual has x's shape. The result has x's memory format and the wider dtype of x and residual. Without
    `training` and running statistics nothing is normalised.

    Returns:
        y, and with `training` the batch's mean and invstd, fp32 `[C]`.
    """
    mean = invstd = None
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if training:
            partials = _partial_statistics(x)
            mean, invstd = finalize_statistics(partials, running_mean, running_var, momentum, eps)
        kind, statistics = _statistics(training, mean, invstd, running_mean, running_var)
        y = new_output(x, x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
        walked = geometry([x, y, x if residual is None else residual], FORWARD, merge_samples=True)
        split = walked.split(x.device, MOST_PROGRAMS)
        launch_kernel(
            _batch_norm_act_forward_kernel,
            (walked.channel_blocks, split.programs),
            x,
            y,
            residual,
            *statistics,
            dense(weight),
            dense(bias),
            eps,
            split.tiles,
            split.tiles_per_program,
            *walked.size_arguments(),
            *walked.stride_arguments(),
            STATISTICS=kind,
            ACT=act,
            WALK=walked.walk,
            num_warps=walked.tile.num_warps,
        )
    return y, mean, invstd


def _partial_statistics(x: torch.Tensor) -> torch.Tensor:
    """Per-program count, mean, M2 and rounding of the mean, fp32 `[programs, 4, C]`."""
    walked = geometry([x], PARTIAL_STATISTICS, merge_samples=True)
    split = walked.split(x.device, MOST_PARTIALS)
    partials = x.new_empty((split.programs, 4, x.shape[1]), dtype=torch.float32)
    launch_kernel(
        _batch_norm_statistics_kernel,
        (walked.channel_blocks, split.programs),
        x,
        partials,
        split.tiles,
        split.tiles_per_program,
        *walked.size_arguments(),
        *walked.stride_arguments(),
        WALK=walked.walk,
        num_warps=walked.tile.num_warps,
        maxnreg=MAX_REGISTERS,
    )
    return partials


@remembers
def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor | None,
    invstd: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    act: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, weight, bias and residual.

    Takes grad_y of y's shape in any strides, and with `training` the mean and invstd that `forward` returned. The
    residual's gradient is None for act="identity", where it is grad_y itself.
    """
    residual = None if act == "identity" else residual
    kind, statistics = _statistics(training, mean, invstd, running_mean, running_var)
    parameters = (*statistics, dense(weight), dense(bias))
    channels = x.shape[1]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        sums = None
        grads = [None if vector is None else vector.new_empty(channels) for vector in (weight, bias)]
        grad_residual = None if residual is None else new_output(residual, residual.dtype)
        written = grad_residual
        if training:
            # A narrower residual's gradient would lose what dx needs.
            is_early = residual is not None and residual.dtype == grad_y.dtype
            early = grad_residual if is_early else None
            partials = _backward_sums(x, grad_y, residual, parameters, early, kind, eps, act)
            sums = sum_partials_into(partials, *grads, keep_sums=True)
            if is_early:
                grad_y, residual, written, act = grad_residual, None, None, "identity"

        grad_x = new_output(x, x.dtype)
        sums_too = not (training or (weight is None and bias is None))
        walked = geometry(
            [x, grad_y, x if residual is None else residual, grad_x, grad_x if written is None else written],
            BACKWARD_INPUT_AND_SUMS if sums_too else BACKWARD_INPUT,
            merge_samples=True,
        )
        split = walked.split(x.device, MOST_PARTIALS if sums_too else MOST_PROGRAMS)
        partials = x.new_empty((split.programs, 2 * channels), dtype=torch.float32) if sums_too else None
        launch_kernel(
            _batch_norm_act_backward_input_kernel,
            (walked.channel_blocks, split.programs),
            x,
            grad_y,
            residual,
            *parameters,
            sums,
            partials,
            grad_x,
            written,
            eps,
            float(x.numel() // channels),
            split.tiles,
            split.tiles_per_program,
            *walked.size_arguments(),
            *walked.stride_arguments(),
            STATISTICS=kind,
            ACT=act,
            WALK=walked.walk,
            num_warps=walked.tile.num_warps,
        )
        if partials is not None:
            sum_partials_into(partials, *grads)
    return grad_x, *grads, grad_residual


def _backward_sums(x, grad_y, residual, parameters, grad_residual, kind, eps, act) -> torch.Tensor:
    """Partial sums over the batch of g * normalised and of g, fp32 `[P, 2 * C]`; writes g to a given grad_residual."""
    channels = x.shape[1]
    others = [x if tensor is None else tensor for tensor in (residual, grad_residual)]
    walked = geometry([x, grad_y, *others], BACKWARD_SUMS, merge_samples=True)
    split = walked.split(x.device, MOST_PARTIALS)
    partials = x.new_empty((split.programs, 2 * channels), dtype=torch.float32)
    launch_kernel(
        _batch_norm_act_backward_sums_kernel,
        (walked.channel_blocks, split.programs),
        x,
        grad_y,
        residual,
        *parameters,
        partials,
        grad_residual,
        eps,
        split.tiles,
        split.tiles_per_program,
        *walked.size_arguments(),
        *walked.stride_arguments(),
        STATISTICS=kind,
        ACT=act,
        WALK=walked.walk,
        num_warps=walked.tile.num_warps,
    )
    return partials


def _statistics(training, mean, invstd, running_mean, running_var):
    """What the kernels call the statistics, and the two vectors that hold them."""
    if training:
        return "batch", (mean, invstd)
    return "none" if running_mean is None else "running", (dense(running_mean), dense(running_var))
