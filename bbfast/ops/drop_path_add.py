"""`drop_path_add`: residual addition of a branch with layer scale and stochastic depth, in one op.

Reads top-down: checks, backends, torch.library, autograd, public function.
"""

from __future__ import annotations

import torch

from bbfast import dispatch
from bbfast.ops import _common
from bbfast.ops._drop_path import check_branch, check_drop, check_vector, sample_multiplier, scaled_dtype
from bbfast.ops._memory_format import dense_like, in_format_of, new_dense
from bbfast.ops._repeated import remembers_inference
from bbfast.reference.drop_path_add import drop_path_add as reference

OP = "drop_path_add"


# ---- checks ----------------------------------------------------------------------------------------------


def _check(residual, branch, layer_scale, channel_dim, mask):
    _common.check_tensor("residual", residual)
    if residual.dim() not in (2, 3, 4):
        raise ValueError(f"residual must have 2 to 4 dimensions, samples first, got shape {tuple(residual.shape)}")
    check_branch(residual, branch)
    if channel_dim not in (1, -1, residual.dim() - 1) or isinstance(channel_dim, bool):
        raise ValueError(f"channel_dim={channel_dim!r} is not allowed; use 1 for [N, C, ...] or -1 for [N, ..., C]")
    check_vector("layer_scale", layer_scale, residual.shape[channel_dim], "channel", residual)
    check_vector("mask", mask, residual.shape[0], "sample", residual)


# ---- backends --------------------------------------------------------------------------------------------


def _triton_unsupported_reasons(x, **tensors) -> list[str]:
    reasons = dispatch.triton_unavailable_reasons(x)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _common.KERNEL_DTYPES:
            reasons.append(f"{name} has dtype {tensor.dtype}; kernels take float32, float16 and bfloat16")
    return reasons


def _forward_unsupported_reasons(residual, branch, multiplier, layer_scale) -> list[str]:
    return _triton_unsupported_reasons(residual, residual=residual, branch=branch, layer_scale=layer_scale)


def _backward_unsupported_reasons(grad_y, branch, multiplier, layer_scale, branch_dtype) -> list[str]:
    return _triton_unsupported_reasons(grad_y, grad_y=grad_y, branch=branch, layer_scale=layer_scale)


def _forward_triton(*args):
    from bbfast.triton_kernels import drop_path_add as kernels

    return kernels.forward(*args)


def _backward_triton(*args):
    from bbfast.triton_kernels import drop_path_add as kernels

    return kernels.backward(*args)


def _forward_reference(residual, branch, multiplier, layer_scale):
    if multiplier is None or not residual.is_cpu:
        return dense_like(residual, reference(residual, branch, multiplier, layer_scale))
    scaled = branch if layer_scale is None else branch * layer_scale.view(-1, 1, 1)
    y = torch.addcmul(residual, scaled, multiplier.view(-1, 1, 1, 1))
    dropped = _dropped(multiplier)
    return dense_like(residual, y.index_copy_(0, dropped, residual[dropped].to(y.dtype)))


def _backward_reference(grad_y, branch, multiplier, layer_scale, branch_dtype):
    """The gradients written out, so that branch is not needed where there is no layer scale."""
    grad = grad_y
    if multiplier is not None:
        grad = _zero_dropped(grad * multiplier.view(-1, 1, 1, 1), multiplier)
    if layer_scale is None:
        grad_branch = grad.to(branch_dtype)
        return dense_like(grad_y, grad_branch, shared_with=(grad_y,)), None
    products = grad * branch if multiplier is None else _zero_dropped(grad * branch, multiplier)
    grad_scale = products.sum((0, 2, 3)).to(layer_scale.dtype)
    grad_branch = (grad * layer_scale.view(-1, 1, 1)).to(branch_dtype)
    return dense_like(branch, grad_branch), grad_scale


def _zero_dropped(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """`x`, a new tensor, with zeros for dropped samples, whatever stood there."""
    if x.is_cpu:
        return x.index_fill_(0, _dropped(multiplier), 0)
    return torch.where(multiplier.view(-1, 1, 1, 1) != 0, x, 0)


def _dropped(multiplier: torch.Tensor) -> torch.Tensor:
    """Indices of the dropped samples, quicker on a CPU than a choice for each element; a GPU would have to wait."""
    return (multiplier == 0).nonzero().flatten()


_FORWARD_KERNELS = (dispatch.Backend("triton", _forward_unsupported_reasons, _forward_triton),)
_BACKWARD_KERNELS = (dispatch.Backend("triton", _backward_unsupported_reasons, _backward_triton),)


# ---- torch.library: all tensors [N, C, H, W] in any strides -------------------------------------------------


def _forward_impl(residual, branch, multiplier, layer_scale):
    args = (residual, branch, multiplier, layer_scale)
    if residual.numel() == 0:
        return _forward_fake(*args)
    return dispatch.select(OP, _FORWARD_KERNELS, _forward_reference, *args)(*args)


def _backward_impl(grad_y, branch, multiplier, layer_scale, branch_dtype):
    args = (grad_y, branch, multiplier, layer_scale, branch_dtype)
    if grad_y.numel() == 0:
        return tuple(output.zero_() for output in _backward_fake(*args))
    run = dispatch.select(f"{OP}_backward", _BACKWARD_KERNELS, _backward_reference, *args)
    grad_branch, grad_scale = run(*args)
    return grad_branch, grad_y.new_empty(0) if grad_scale is None else grad_scale


def _forward_fake(residual, branch, multiplier, layer_scale):
    dtype = torch.promote_types(residual.dtype, scaled_dtype(branch, layer_scale))
    return new_dense(residual, dtype)


def _backward_fake(grad_y, branch, multiplier, layer_scale, branch_dtype):
    grad_branch = new_dense(grad_y if layer_scale is None else branch, branch_dtype)
    return grad_branch, grad_y.new_empty(0) if layer_scale is None else layer_scale.new_empty(layer_scale.shape)


_forward_op = _common.define(
    f"{OP}(Tensor residual, Tensor branch, Tensor? multiplier, Tensor? layer_scale) -> Tensor",
    _forward_impl,
    _forward_fake,
)
_backward_op = _common.define(
    f"{OP}_backward(Tensor grad_y, Tensor? branch, Tensor? multiplier, Tensor? layer_scale,"
    " ScalarType branch_dtype) -> (Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _DropPathAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, branch, multiplier, layer_scale):
        # The branch matters to the layer scale's gradient alone.
        ctx.save_for_backward(None if layer_scale is None else branch, multiplier, layer_scale)
        ctx.dtypes = residual.dtype, branch.dtype
        return _forward_op(residual, branch, multiplier, layer_scale)

    @staticmethod
    @_common.once_differentiable(OP)
    def backward(ctx, grad_y):
        branch, multiplier, layer_scale = ctx.saved_tensors
        residual_dtype, branch_dtype = ctx.dtypes
        grad_branch = grad_scale = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            grad_branch, grad_scale = _backward_op(grad_y, branch, multiplier, layer_scale, branch_dtype)
        return grad_y.to(residual_dtype), grad_branch, None, None if layer_scale is None else grad_scale


# ---- public function ---------------------------------------------------------------------------------------


@_common.overridable
@remembers_inference
def drop_path_add(
    residual: torch.Tensor,
    branch: torch.Tensor,
    *,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    layer_scale: torch.Tensor | None = None,
    channel_dim: int = 1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + drop_path(branch * layer_scale)` in one pass; what is dropped is not even read.

    Args:
        residual, branch: `[N, C, H, W]`, `[N, C, L]` (channel_dim 1), `[N, H, W, C]`, `[N, L, C]` (channel_dim -1) or
            `[N, C]`, one shape, float32, float16, bfloat16 (or float64, on the reference) each, in any strides.
        drop_prob: chance of each sample's branch to be dropped.
        training: whether anything is dropped at all.
        scale_by_keep: divide what is kept by `1 - drop_prob`.
        layer_scale: `[C]`, or None for 1.
        channel_dim: where the channels are; matters to layer_scale only.
        mask: `[N]` multipliers to use instead of drawing any (drop_prob, training and scale_by_keep then do not
            matter); 0 drops a sample. Not differentiated.

    Returns:
        The sum, in residual's shape and memory format and the dtype that torch's promotion gives the expression.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, drop_prob outside [0, 1], devices that differ; named in the message.

    Numerics:
        The mask is drawn and scaled in the dtype of `branch * layer_scale`, as timm's drop_path draws it: equal seeds
        give equal results, under activation checkpointing too. Products and sum are float32 and rounded once. A
        dropped sample is its residual exactly, also where the branch holds NaN or infinity (0 * NaN in timm), and
        gives branch and layer_scale no gradient. Gradients are deterministic and once differentiable. Without
        anything to drop or scale this is `residual + branch`. In compiled inference it is written out in torch,
        and Inductor fuses it with what is next.
    """
    _check(residual, branch, layer_scale, channel_dim, mask)
    check_drop(drop_prob, training, scale_by_keep)
    multiplier = sample_multiplier(branch, layer_scale, drop_prob, training, scale_by_keep, mask)
    if multiplier is None and layer_scale is None:
        return residual + branch

    channels_inner = channel_dim != 1
    tensors = (_as_maps(residual, channels_inner), _as_maps(branch, channels_inner), multiplier, layer_scale)
    left_to_compiler = _common.compiler_fuses(residual, branch, layer_scale)
    if dispatch.wants_plain_torch() or left_to_compiler or _common.left_to_torch(OP, residual):
        y = in_format_of(tensors[0], reference(*tensors))
    elif _common.needs_grad(residual, branch, layer_scale):
        y = _DropPathAdd.apply(*tensors)
    else:
        y = _forward_op(*tensors)
    return _from_maps(y, residual.dim(), channels_inner)


def _as_maps(x: torch.Tensor, channels_inner: bool) -> torch.Tensor:
    """A view of x as [N, C, H, W]."""
    if x.dim() == 2:
        return x[:, :, None, None]
    if channels_inner:
        x = x.movedim(-1, 1)
    return x.unsqueeze(2) if x.dim() == 3 else x


def _from_maps(y: torch.Tensor, rank: int, channels_inner: bool) -> torch.Tensor:
    """A view of [N, C, H, W] y in the shape that `_as_maps` took."""
    if rank == 2:
        return y[:, :, 0, 0]
    y = y.squeeze(2) if rank == 3 else y
    return y.movedim(1, -1) if channels_inner else y
