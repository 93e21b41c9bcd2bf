"""Launchers of depthwise_conv_bn_act: which tiles, which kernels in which order.

Trips of the large tensors through memory (halos hit the caches; conv(x) is recomputed, never stored):

    eval forward    read x, write y
    train forward   read x for the statistics; read x, write y
    backward        read x, dy, write dz; read dz, write dx; read x, dz for the weight; in training before that x, dy

The kernels themselves are in depthwise_conv_kernels.py.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from . import tuned
from .batch_statistics import MAX_REGISTERS, finalize_statistics, sum_partials_into, sum_taps_into
from .channel_tile import compute_capability
from .depthwise_conv_kernels import (
    AFFINE_ROWS,
    SCALE,
    _conv_grad_kernel,
    _forward_kernel,
    _input_grad_kernel,
    _pack_kernel,
    _statistics_kernel,
    _sum_squeeze_kernel,
    _weight_grad_kernel,
)
from .integers import cdiv, is_power_of_2
from .layout import dense, is_channels_last, new_output
from .replay import launch_kernel, remembers

# ---- launch configuration --------------------------------------------------------------------------------

# Two waves of three programs on each of 132 multiprocessors; below that a program's span of S is halved.
ENOUGH_PROGRAMS = 768

# Channels that the packed parameters are padded to a multiple of, so that tiles up to this size load them unmasked.
PACKED_CHANNELS = 128

# Kernels whose programs may sum over several images; in the others each image has its own.
REDUCING_KERNELS = ("statistics", "conv_grad", "weight_grad")


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
        max_registers: the compiler's limit per thread.
    """

    block_t: int
    block_c: int
    tile_s: int
    num_warps: int
    span: int
    images: int = 1
    rows: int = 1
    max_registers: int = MAX_REGISTERS


def tile_shapes(channels_last: bool, vector: int, kernel_s: int, warps: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """All (block_t, block_c, num_warps) of as many lanes per thread as `choose_tile` says."""
    lanes_per_thread = max(vector, 4) if channels_last else 2 if kernel_s <= 9 else 1
    shapes = []
    for num_warps in warps:
        lanes = num_warps * 32 * lanes_per_thread
        for across in (128, 64, 32, 16):
            block_t, block_c = (lanes // across, across) if channels_last else (across, lanes // across)
            if across <= lanes:
                shapes.append((block_t, block_c, num_warps))
    return shapes


def choose_tile(
    channels_last: bool, vector: int, channels: int, size_t: int, kernel_size: tuple[int, int], stride_t: int
) -> tuple[int, int, int]:
    """(block_t, block_c, num_warps) of a tile.

    NHWC: a 16-byte vector of neighbouring channels per thread, at least 16 channels per tile, a whole 32-byte sector of
    half precision; 4 channels where vectors do not fit, since each needs an address then. NCHW: 2 elements per thread,
    since each needs an address and a mask of its own, or 1 beside many taps. Among the tiles of 2 and 4 warps the one
    that wastes least: lanes past the last channel or position, and halo rows; larger ones where they waste the same.
    """
    kernel_t, kernel_s = kernel_size

    def cost(candidate):
        block_t, block_c, _ = candidate
        t_tiles, c_tiles = cdiv(size_t, block_t), cdiv(channels, block_c)
        halo = 1 + (t_tiles - 1) * max(kernel_t - stride_t, 0) / (size_t * stride_t)
        return t_tiles * block_t / size_t * (c_tiles * block_c / channels) * halo

    return min(tile_shapes(channels_last, vector, kernel_s, (4, 2)), key=cost)


def choose_halved_tile(channels: int) -> tuple[int, int, int]:
    """(block_t, block_c, num_warps) of forward in NHWC and half precision: 4 channels per thread, half a vector.

    Half the accumulators leave registers for twice the warps, and 32 or 64 channels are read side by side where rows of
    W * C elements lie apart: on an H200 that took a tenth to a third less than whole vectors in tiles that waste least.
    """
    fills_64 = cdiv(channels, 64) * 64 <= 1.1 * channels
    block_c = 64 if fills_64 else 32 if channels > 16 else 16
    return 2 * 32 * 4 // block_c, block_c, 2


def choose_config(
    kernel: str,
    *,
    channels_last: bool,
    vector: int,
    batch: int,
    channels: int,
    size_t: int,
    size_s: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    capability: tuple[int, int],
) -> LaunchConfig:
    """The launch configuration of one kernel for one shape.

    Args:
        kernel: forward, statistics, conv_grad, input_grad or weight_grad.
        vector: channels in a 16-byte vector of x, 1 where it is not laid out for them.
        size_t, size_s: positions along T and S of what the kernel walks over (outputs; for input_grad inputs per
            residue class along T, and inputs along S).
        kernel_size, stride: (T, S).
        capability: the GPU's compute capability.
    """
    kernel_t, kernel_s = kernel_size
    # Per thread and column or tap up to 8 registers: TILE_S accumulators, kernel_s taps, and what the epilogue needs,
    # which is most for conv_grad. NCHW has fewer lanes, but an address and a mask for each; all but sm_90 and sm_100
    # need a few more.
    strided = stride[1] > 1
    many_addresses = strided and kernel_s > 3 and not channels_last
    narrow = (
        kernel_s > 7
        or (kernel == "conv_grad" and (strided or kernel_s > 3))
        or (kernel == "statistics" and (many_addresses or (strided and capability[0] not in (9, 10))))
        or (kernel == "forward" and many_addresses and capability >= (10, 0))
    )
    tile_s = 4 if narrow else 7
    rows = 1
    if kernel == "input_grad" and stride[1] > 1:
        tile_s = 4 * stride[1]  # only every stride-th column meets a given tap
    elif kernel == "weight_grad":
        tile_s = 4
        rows = min(kernel_t, max(1, 9 // kernel_s))
    block_t, block_c, num_warps = choose_tile(channels_last, vector, channels, size_t, kernel_size, stride[0])
    halved = kernel == "forward" and channels_last and vector == 8 and max(kernel_size) <= 7 and capability[0] == 9
    if halved:
        block_t, block_c, num_warps = choose_halved_tile(channels)
    tiles = cdiv(size_t, block_t) * cdiv(channels, block_c)
    if kernel == "weight_grad":
        tiles *= cdiv(kernel_t, rows)

    span = cdiv(size_s, tile_s) * tile_s
    while span > 2 * tile_s and tiles * cdiv(size_s, span) * batch < ENOUGH_PROGRAMS:
        span = cdiv(cdiv(span, 2), tile_s) * tile_s
    images = 1
    if kernel in REDUCING_KERNELS:
        images = max(1, tiles * cdiv(size_s, span) * batch // ENOUGH_PROGRAMS)
    # 168 registers make room for 12 warps per multiprocessor, and 3x3 forwards of stride 1 fit in them from Hopper on.
    # The others name the hardware's own limit, since ptxas left alone may prefer 128 and a spill.
    fits = kernel == "forward" and max(kernel_size) <= 3 and max(stride) == 1 and capability >= (9, 0)
    max_registers = 168 if fits or halved else MAX_REGISTERS
    return LaunchConfig(block_t, block_c, tile_s, num_warps, span, images, rows, max_registers)


class Key(NamedTuple):
    """What a launch configuration depends on besides the GPU; as in choose_config."""

    kernel: str
    element_bytes: int
    channels_last: bool
    vector: int
    batch: int
    channels: int
    size_t: int
    size_s: int
    kernel_t: int
    kernel_s: int
    stride_t: int
    stride_s: int


def _neighbours(key: Key, config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Other tiles of as many lanes per thread, other columns, and more or fewer programs."""
    for block_t, block_c, num_warps in tile_shapes(key.channels_last, key.vector, key.kernel_s, (8, 4, 2)):
        if block_t < 2 * key.size_t and block_c < 2 * max(16, key.channels):
            yield replace(config, block_t=block_t, block_c=block_c, num_warps=num_warps)
    unit = key.stride_s if key.kernel == "input_grad" else 1
    for tile_s in (2, 4, 7, 8):
        span = cdiv(config.span, tile_s * unit) * tile_s * unit
        yield replace(config, tile_s=tile_s * unit, span=span)
    for span in (config.span // 2, config.span * 2):
        yield replace(config, span=max(1, span // config.tile_s) * config.tile_s)
    yield from tuned.halved_and_doubled(config, "images", "rows")
    for max_registers in (128, 168, MAX_REGISTERS):
        yield replace(config, max_registers=max_registers)


def _objection(key: Key, config: LaunchConfig) -> str | None:
    reducing = key.kernel in REDUCING_KERNELS
    if not is_power_of_2(config.block_t):
        return f"block_t={config.block_t}; it must be a power of two"
    if not is_power_of_2(config.block_c) or config.block_c > PACKED_CHANNELS:
        return f"block_c={config.block_c}; it must be a power of two up to {PACKED_CHANNELS}"
    if config.block_t * config.block_c > 8192:
        return f"block_t={config.block_t} times block_c={config.block_c}; a tile has up to 8192 lanes"
    if config.tile_s > 16 or (key.kernel == "input_grad" and config.tile_s % key.stride_s):
        return f"tile_s={config.tile_s}; it must be up to 16, and for input_grad a multiple of the stride"
    most_span = cdiv(key.size_s, config.tile_s) * config.tile_s
    if config.span % config.tile_s or config.span > most_span:
        return f"span={config.span}; it must be a multiple of tile_s={config.tile_s} up to {most_span}"
    if config.images > (key.batch if reducing else 1):
        return f"images={config.images}; it must be up to the batch in kernels that reduce, 1 in others"
    if config.rows > (key.kernel_t if key.kernel == "weight_grad" else 1):
        return f"rows={config.rows}; it must be up to the kernel's rows in weight_grad, 1 in others"
    if config.max_registers > MAX_REGISTERS:
        return f"max_registers={config.max_registers}; it must be up to {MAX_REGISTERS}"
    return None


TUNABLE = tuned.Tunable("depthwise_conv_bn_act", Key, LaunchConfig, _neighbours, _objection)


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
        self.packed_stride = cdiv(self.channels, PACKED_CHANNELS) * PACKED_CHANNELS

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

    def in_format_of_x(self, grad_y):
        """grad_y, or a copy of it where it lies otherwise than x's kernels walk."""
        lane_stride = grad_y.stride(1 if self.channels_last else 3)
        if grad_y.dtype == self.x.dtype and lane_stride == 1 and self.vector(self.x, grad_y) == self.vector(self.x):
            return grad_y
        return new_output(self.x, grad_y.shape).copy_(grad_y)

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
            "maxnreg": config.max_registers,
        }

    def heuristic(self, key: Key) -> LaunchConfig:
        return choose_config(
            key.kernel,
            channels_last=key.channels_last,
            vector=key.vector,
            batch=key.batch,
            channels=key.channels,
            size_t=key.size_t,
            size_s=key.size_s,
            kernel_size=(key.kernel_t, key.kernel_s),
            stride=(key.stride_t, key.stride_s),
            capability=compute_capability(self.x.device),
        )

    def cut(self, kernel: str) -> "_Cut":
        """How one kernel's work is divided among programs."""
        size_t, size_s = self.ts(self.out)
        if kernel == "input_grad":
            size_t, size_s = self.ts(self.x.shape[2:])
            size_t = cdiv(size_t, self.stride[self.t])
        key = Key(
            kernel,
            self.x.element_size(),
            self.channels_last,
            self.vector(self.x),
            self.batch,
            self.channels,
            size_t,
            size_s,
            *self.ts(self.kernel),
            *self.ts(self.stride),
        )
        config = TUNABLE.config(self.x, key, lambda: self.heuristic(key))
        return _Cut(
            config,
            c_tiles=cdiv(self.channels, config.block_c),
            t_tiles=cdiv(size_t, config.block_t),
            s_splits=cdiv(size_s, config.span),
            groups=cdiv(self.batch, config.images) if kernel in REDUCING_KERNELS else self.batch,
        )


@dataclass(frozen=True)
class _Cut:
    """A launch configuration and how many tiles it makes along each axis (groups: of images)."""

    config: LaunchConfig
    c_tiles: int
    t_tiles: int
    s_splits: int
    groups: int

    @property
    def programs(self) -> int:
        """Programs of one channel tile, each with partials of its own in kernels that reduce."""
        return self.t_tiles * self.s_splits * self.groups

    @property
    def padded_channels(self) -> int:
        return self.c_tiles * self.config.block_c

    def tiles(self) -> tuple[int, int, int, int]:
        """The arguments c_tiles, t_tiles, s_splits and span of a kernel."""
        return self.c_tiles, self.t_tiles, self.s_splits, self.config.span


def _on_device(x):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _pack(problem, bias, bn_weight, bn_bias, mean, spread, eps, spread_kind):
    """[kh * kw + 4, packed_stride] fp32 rows: taps in (T, S) order, scale, shift, centre, invstd."""
    weight, (kernel_t, kernel_s) = problem.weight, problem.ts(problem.kernel)
    packed = weight.new_empty((kernel_t * kernel_s + AFFINE_ROWS, problem.packed_stride), dtype=torch.float32)
    launch_kernel(
        _pack_kernel,
        (problem.packed_stride // PACKED_CHANNELS, kernel_t),
        weight,
        *(dense(vector) for vector in (bias, bn_weight, bn_bias, mean, spread)),
        packed,
        problem.channels,
        problem.packed_stride,
        weight.stride(0),
        *problem.ts((weight.stride(2), weight.stride(3))),
        eps,
        KERNEL_T=kernel_t,
        KERNEL_S=kernel_s,
        SPREAD=spread_kind,
        BLOCK_C=PACKED_CHANNELS,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )
    return packed


def _statistics(problem, packed, bias, running_mean, running_var, momentum, eps):
    """(mean, invstd) of z = conv(x) + bias over the batch; moves the running statistics."""
    x = problem.x
    cut = problem.cut("statistics")
    partials = x.new_empty((cut.programs, 4, problem.channels), dtype=torch.float32)
    vector = problem.vector(x)
    launch_kernel(
        _statistics_kernel,
        (cut.programs * cut.c_tiles,),
        x,
        packed,
        dense(bias),
        partials,
        problem.batch,
        cut.config.images,
        *cut.tiles(),
        problem.channels // vector,
        problem.packed_stride,
        *problem.sizes(),
        *problem.ts(problem.pad_begin),
        *problem.strides(x, vector),
        **problem.constants(cut.config, vector),
    )
    return finalize_statistics(partials, running_mean, running_var, momentum, eps)


def _sum_squeeze(partials, squeezed):
    """Sums `[N, parts, C]` over the parts into `[N, C]`."""
    batch, parts, channels = partials.shape
    grid = (batch, cdiv(channels, PACKED_CHANNELS))
    launch_kernel(_sum_squeeze_kernel, grid, partials, squeezed, parts, channels, BLOCK_C=PACKED_CHANNELS, num_warps=1)


@remembers
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

        cut = problem.cut("forward")
        y = new_output(x, (problem.batch, problem.channels, *problem.out))
        squeezed = partials = None
        factor = 1.0 / (problem.out[0] * problem.out[1])
        if squeeze:
            squeezed = partials = x.new_empty((problem.batch, problem.channels))
            per_image = cut.t_tiles * cut.s_splits
            if per_image > 1:
                shape = (problem.batch, per_image, problem.channels)
                partials = x.new_empty(shape, dtype=torch.float32)
        vector = problem.vector(x, y)
        launch_kernel(
            _forward_kernel,
            (cut.programs * cut.c_tiles,),
            x,
            packed,
            y,
            partials,
            factor,
            *cut.tiles(),
            problem.channels // vector,
            problem.packed_stride,
            *problem.sizes(),
            *problem.ts(problem.pad_begin),
            *problem.strides(x, vector),
            *problem.strides(y, vector),
            ACT=act,
            **problem.constants(cut.config, vector),
        )
        if partials is not squeezed:
            _sum_squeeze(partials, squeezed)
    return y, squeezed, mean, invstd


@remembers
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

        normalises = training or running_mean is not None
        grad_bias, grad_bn_weight, grad_bn_bias = _empty_like_each(bias, bn_weight, bn_bias)
        if act == "identity" and not normalises and bias is None and grad_squeeze is None:
            dz = problem.in_format_of_x(grad_y)
        else:
            dz = new_output(x, grad_y.shape)
            grads = (grad_bn_bias, grad_bn_weight) if normalises else (grad_bias, None)
            if training:
                partials = _conv_grad(problem, packed, grad_y, grad_squeeze, act, None, None)
                sums = sum_partials_into(partials, *grads, keep_sums=True)
                _conv_grad(problem, packed, grad_y, grad_squeeze, act, sums, dz)
            else:
                partials = _conv_grad(problem, packed, grad_y, grad_squeeze, act, None, dz)
                sums = sum_partials_into(partials, *grads, keep_sums=normalises and bias is not None)
        grad_x = _input_grad(problem, packed, dz) if needs_input_grad else None
        grad_weight = _weight_grad(problem, dz) if needs_weight_grad else None

        if bias is not None and training:  # the batch's mean takes it out again, so nothing depends on it
            grad_bias.zero_()
        elif bias is not None and normalises:
            scale = packed[len(packed) - AFFINE_ROWS + SCALE.value, : problem.channels]
            torch.mul(scale, sums[: problem.channels], out=grad_bias)
    return grad_x, grad_weight, grad_bias, grad_bn_weight, grad_bn_bias


def _empty_like_each(*vectors):
    return [None if vector is None else vector.new_empty(vector.shape) for vector in vectors]


def _conv_grad(problem, packed, grad_y, grad_squeeze, act, sums, dz):
    """Writes dz where given; returns partial sums [P, 2 * padded channels] of g and g * normalised without `sums`."""
    x = problem.x
    cut = problem.cut("conv_grad")
    partials = None
    if sums is None:
        partials = x.new_empty((cut.programs, 2 * cut.padded_channels), dtype=torch.float32)
    vector = problem.vector(x, grad_y) if dz is None else problem.vector(x, grad_y, dz)
    launch_kernel(
        _conv_grad_kernel,
        (cut.programs * cut.c_tiles,),
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
        cut.config.images,
        *cut.tiles(),
        problem.channels // vector,
        problem.packed_stride,
        cut.padded_channels,
        *problem.sizes(),
        *problem.ts(problem.pad_begin),
        *problem.strides(x, vector),
        *problem.strides(grad_y, vector),
        *((0, 0, 0, 0) if dz is None else problem.strides(dz, vector)),
        ACT=act,
        **problem.constants(cut.config, vector),
    )
    return partials


def _taps_by_residue(kernel: int, stride: int, dilation: int, padding: int) -> tuple[tuple[int, ...], int]:
    """Per residue of an input position modulo the stride: the first tap that reaches it (`kernel` for none), and the
    distance between such taps.
    """
    step = stride // math.gcd(stride, dilation)
    first = []
    for residue in range(stride):
        hits = [tap for tap in range(min(step, kernel)) if (residue + padding - tap * dilation) % stride == 0]
        first.append(hits[0] if hits else kernel)
    return tuple(first), step


def _input_grad(problem, packed, dz):
    dx = new_output(problem.x, problem.x.shape)
    cut = problem.cut("input_grad")
    vector = problem.vector(dz, dx)
    pad_t, pad_s = problem.ts(problem.pad_begin)
    first_taps, tap_step = _taps_by_residue(
        problem.kernel[problem.t], problem.stride[problem.t], problem.dilation[problem.t], pad_t
    )
    launch_kernel(
        _input_grad_kernel,
        (cut.programs * cut.c_tiles,),
        dz,
        packed,
        dx,
        *cut.tiles(),
        problem.channels // vector,
        problem.packed_stride,
        *problem.sizes(),
        *problem.strides(dz, vector),
        *problem.strides(dx, vector),
        PAD_T=pad_t,
        PAD_S=pad_s,
        FIRST_TAPS=first_taps,
        TAP_STEP=tap_step,
        **problem.constants(cut.config, vector),
    )
    return dx


def _weight_grad(problem, dz):
    x, (kernel_t, kernel_s) = problem.x, problem.ts(problem.kernel)
    cut = problem.cut("weight_grad")
    row_groups = cdiv(kernel_t, cut.config.rows)
    partials = x.new_empty((cut.programs, kernel_t, kernel_s, cut.padded_channels), dtype=torch.float32)
    vector = problem.vector(x, dz)
    launch_kernel(
        _weight_grad_kernel,
        (row_groups * cut.programs * cut.c_tiles,),
        x,
        dz,
        partials,
        problem.batch,
        cut.config.images,
        *cut.tiles(),
        row_groups,
        problem.channels // vector,
        cut.padded_channels,
        *problem.sizes(),
        *problem.ts(problem.pad_begin),
        *problem.strides(x, vector),
        *problem.strides(dz, vector),
        ROWS=cut.config.rows,
        **problem.constants(cut.config, vector),
    )
    grad_weight = problem.weight.new_empty(problem.weight.shape)
    sum_taps_into(partials, grad_weight, problem.channels_last)
    return grad_weight
