"""residual + branch * layer_scale * multiplier, forward and backward, for NHWC and NCHW.

A tile lies inside one sample (see channel_tile.py), so its multiplier is one scalar; where that is 0 the sample was
dropped and its branch is not read. Trips of the large tensors through memory, with p the share of dropped samples:

    forward                       read residual, (1 - p) branch, write y
    backward                      read (1 - p) dy, write dbranch; the residual's gradient is dy itself
    backward with layer scale     the same, and read (1 - p) branch for the scale's gradient

The layer scale's gradient goes through one row of partials per program and a second stage in a fixed order.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .batch_statistics import MAX_REGISTERS, sum_partials_into
from .channel_tile import (
    Launch,
    flat_samples,
    geometry,
    load_per_channel,
    load_tile,
    new_output,
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
WARPS = 4

TUNABLE = tunable("drop_path_add")
FORWARD = Launch(TUNABLE, "forward", WARPS, ELEMENTWISE_PROGRAMS)
BACKWARD = Launch(TUNABLE, "backward", WARPS, ELEMENTWISE_PROGRAMS)
BACKWARD_AND_SUMS = Launch(TUNABLE, "backward_and_sums", WARPS, REDUCING_PROGRAMS)


@triton.jit
def _kept_place(place, multiplier_ptr):
    """The sample's multiplier, and the tile's place with an empty mask where the sample was dropped."""
    sample, first, mask = place
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr + sample).to(tl.float32)
        mask = tl.where(multiplier != 0.0, mask, False)
    else:
        multiplier = 1.0
    return multiplier, (sample, first, mask)


# Tile: block_c channels x block_p positions of one sample, `tiles_per_program` of them. Reads residual once, branch
# once where it is kept; writes y once. Registers: the layer scale [block_c] and one tile of each tensor.
@triton.jit
def _drop_path_add_forward_kernel(
    residual_ptr,
    branch_ptr,
    y_ptr,
    multiplier_ptr,
    layer_scale_ptr,
    tiles,
    tiles_per_program,
    sample_tiles,
    channels,
    positions,
    width,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_bn,
    stride_bc,
    stride_bh,
    stride_bw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    WALK: tl.constexpr,
):
    sizes = (sample_tiles, channels, positions, width)
    residual_strides = (stride_rn, stride_rc, stride_rh, stride_rw)
    branch_strides = (stride_bn, stride_bc, stride_bh, stride_bw)
    y_strides = (stride_yn, stride_yc, stride_yh, stride_yw)
    scale = over_tile(load_per_channel(layer_scale_ptr, 1.0, sizes, WALK), WALK)
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        place = tile_place(tile, sizes, WALK)
        multiplier, kept = _kept_place(place, multiplier_ptr)
        y = load_tile(residual_ptr, place, sizes, residual_strides, WALK)
        branch = load_tile(branch_ptr, kept, sizes, branch_strides, WALK)
        y += tl.where(kept[2], branch * scale * multiplier, 0.0)
        store_tile(y_ptr, y, place, sizes, y_strides, WALK)


# Tile: block_c channels x block_p positions of one sample, `tiles_per_program` of them. Reads dy (and, for the layer
# scale's gradient, branch) once where the sample is kept; writes dbranch once, and 4 bytes per channel and program.
# Registers: the layer scale [block_c], one tile of each tensor, one fp32 accumulator of the tile's size.
@triton.jit
def _drop_path_add_backward_kernel(
    grad_ptr,
    branch_ptr,
    multiplier_ptr,
    layer_scale_ptr,
    grad_branch_ptr,
    partials_ptr,
    tiles,
    tiles_per_program,
    sample_tiles,
    channels,
    positions,
    width,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_bn,
    stride_bc,
    stride_bh,
    stride_bw,
    stride_dbn,
    stride_dbc,
    stride_dbh,
    stride_dbw,
    WALK: tl.constexpr,
):
    sizes = (sample_tiles, channels, positions, width)
    grad_strides = (stride_gn, stride_gc, stride_gh, stride_gw)
    branch_strides = (stride_bn, stride_bc, stride_bh, stride_bw)
    grad_branch_strides = (stride_dbn, stride_dbc, stride_dbh, stride_dbw)
    scale = over_tile(load_per_channel(layer_scale_ptr, 1.0, sizes, WALK), WALK)
    if partials_ptr is not None:
        sums = zero_tile(WALK)
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        place = tile_place(tile, sizes, WALK)
        multiplier, kept = _kept_place(place, multiplier_ptr)
        g = load_tile(grad_ptr, kept, sizes, grad_strides, WALK) * multiplier
        grad_branch = tl.where(kept[2], g * scale, 0.0)
        store_tile(grad_branch_ptr, grad_branch, place, sizes, grad_branch_strides, WALK)
        if partials_ptr is not None:
            sums += g * load_tile(branch_ptr, kept, sizes, branch_strides, WALK)
    if partials_ptr is not None:
        store_per_channel(partials_ptr, tl.program_id(1), sum_per_channel(sums, WALK), sizes, WALK)


@remembers
def forward(
    residual: torch.Tensor,
    branch: torch.Tensor,
    multiplier: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
) -> torch.Tensor:
    """residual + branch * layer_scale * multiplier for `[B, C, H, W]` tensors with at least one element.

    Args:
        residual, branch: fp32, fp16 or bf16 each, in any strides.
        multiplier: `[B]`, or None for 1; a sample whose multiplier is 0 does not read its branch.
        layer_scale: `[C]`, or None for 1.

    Returns:
        The sum in residual's memory format and the widest dtype of the three values.
    """
    dtype = torch.promote_types(residual.dtype, branch.dtype)
    if layer_scale is not None:
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    y = new_output(residual, dtype)
    tensors = [residual, branch, y]
    if layer_scale is None:
        tensors = flat_samples(tensors)
    walked = geometry(tensors, FORWARD, merge_samples=multiplier is None)
    with torch.cuda.device(y.device) if y.is_cuda else nullcontext():
        split = walked.split(y.device, MOST_PROGRAMS)
        launch_kernel(
            _drop_path_add_forward_kernel,
            (walked.channel_blocks, split.programs),
            residual,
            branch,
            y,
            dense(multiplier),
            dense(layer_scale),
            split.tiles,
            split.tiles_per_program,
            *walked.size_arguments(),
            *walked.stride_arguments(),
            WALK=walked.walk,
            num_warps=walked.tile.num_warps,
        )
    return y


@remembers
def backward(
    grad_y: torch.Tensor,
    branch: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    branch_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of branch and of layer_scale (None without one). The residual's is grad_y.

    Takes grad_y in any strides. Without layer_scale the branch itself is not needed and may be None; its gradient
    then has grad_y's memory format.
    """
    grad_branch = new_output(grad_y if branch is None else branch, branch_dtype)
    grad_scale = None if layer_scale is None else layer_scale.new_empty(layer_scale.shape)
    tensors = [grad_branch, grad_y, grad_branch if layer_scale is None else branch]
    if layer_scale is None:
        tensors = flat_samples(tensors)
    walked = geometry(tensors, BACKWARD if layer_scale is None else BACKWARD_AND_SUMS, merge_samples=multiplier is None)
    # The kernel takes dy, branch, dbranch; the geometry follows the first, which must be dense.
    walked = walked.reordered(1, 2, 0)
    with torch.cuda.device(grad_y.device) if grad_y.is_cuda else nullcontext():
        partials = None
        split = walked.split(grad_y.device, MOST_PROGRAMS if layer_scale is None else MOST_PARTIALS)
        if layer_scale is not None:
            partials = grad_y.new_empty((split.programs, walked.channels), dtype=torch.float32)
        launch_kernel(
            _drop_path_add_backward_kernel,
            (walked.channel_blocks, split.programs),
            grad_y,
            None if layer_scale is None else branch,
            dense(multiplier),
            dense(layer_scale),
            grad_branch,
            partials,
            split.tiles,
            split.tiles_per_program,
            *walked.size_arguments(),
            *walked.stride_arguments(),
            WALK=walked.walk,
            num_warps=walked.tile.num_warps,
            maxnreg=MAX_REGISTERS,
        )
        if layer_scale is not None:
            sum_partials_into(partials, grad_scale)
    return grad_branch, grad_scale
