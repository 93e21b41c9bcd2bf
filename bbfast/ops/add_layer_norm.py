"""`add_layer_norm`: residual addition of a branch under stochastic depth, and LayerNorm of the sum, in one op.

Reads top-down: checks, backends, torch.library, autograd, public function.
"""

from __future__ import annotations

import math

import torch

from bbfast import dispatch, env
from bbfast.ops import _common
from bbfast.ops._drop_path import check_branch, check_drop, check_vector, sample_multiplier, scaled_dtype
from bbfast.ops._repeated import remembers_inference
from bbfast.reference.add_layer_norm import add_layer_norm as reference
from bbfast.reference.add_layer_norm import as_statistics, layer_norm_backward

OP = "add_layer_norm"
MOST_CHANNELS = 2048


# ---- checks ----------------------------------------------------------------------------------------------


def _check(residual, branch, weight, bias, layer_scale, mask, eps):
    _common.check_tensor("residual", residual)
    if residual.dim() < 2:
        raise ValueError(f"residual must be [N, ..., C], samples first, got shape {tuple(residual.shape)}")
    if residual.shape[-1] == 0:
        raise ValueError(f"residual must have at least one channel, got shape {tuple(residual.shape)}")
    if branch is not None:
        check_branch(residual, branch)
    for name, value in (("layer_scale", layer_scale), ("mask", mask)):
        if value is not None and branch is None:
            raise ValueError(f"{name} needs a branch to act on, got branch=None")
    for name, value in (("weight", weight), ("bias", bias), ("layer_scale", layer_scale)):
        check_vector(name, value, residual.shape[-1], "channel", residual)
    check_vector("mask", mask, residual.shape[0], "sample", residual)
    check_eps("eps", eps)


def check_eps(name: str, eps: float) -> None:
    """Raises unless `eps` can be added to a variance."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:  # NaN fails too
        raise ValueError(f"{name}={eps} is not allowed; it must be finite and not negative")


# ---- backends --------------------------------------------------------------------------------------------


def _triton_unsupported_reasons(x, **tensors) -> list[str]:
    reasons = dispatch.triton_unavailable_reasons(x)
    if x.shape[-1] > MOST_CHANNELS:
        reasons.append(f"{x.shape[-1]} channels; kernels hold a row in registers and take at most {MOST_CHANNELS}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _common.KERNEL_DTYPES:
            reasons.append(f"{name} has dtype {tensor.dtype}; kernels take float32, float16 and bfloat16")
    return reasons


def _forward_unsupported_reasons(residual, branch, multiplier, layer_scale, weight, bias, *_) -> list[str]:
    vectors = {"layer_scale": layer_scale, "weight": weight, "bias": bias}
    return _triton_unsupported_reasons(residual, residual=residual, branch=branch, **vectors)


def _backward_unsupported_reasons(total, grad_total, grad_norm, branch, multiplier, layer_scale, weight, bias, *_):
    vectors = {"layer_scale": layer_scale, "weight": weight, "bias": bias}
    grads = {"grad_total": grad_total, "grad_norm": grad_norm}
    return _triton_unsupported_reasons(total, total=total, branch=branch, **grads, **vectors)


def _forward_triton(*args):
    from bbfast.triton_kernels import add_layer_norm as kernels

    return kernels.forward(*args)


def _backward_triton(*args):
    from bbfast.triton_kernels import add_layer_norm as kernels

    return kernels.backward(*args)


def _forward_reference(residual, branch, *args):
    *args, keep_statistics = args
    total, norm, mean, rstd = reference(residual, branch, *args)
    total = None if branch is None else total.contiguous()
    return total, norm.contiguous(), *((mean, rstd) if keep_statistics else (None, None))


def _backward_reference(
    total,
    grad_total,
    grad_norm,
    branch,
    multiplier,
    layer_scale,
    weight,
    bias,
    mean,
    rstd,
    residual_dtype,
    branch_dtype,
    affine_grads,
):
    _, grad, branch = as_statistics(total, grad_total, branch)
    grad_branch = grad_scale = grad_weight = grad_bias = None
    if grad_norm is not None:
        from_norm, grad_weight, grad_bias = layer_norm_backward(
            grad_norm, total, weight, bias, mean, rstd, affine_grads
        )
        grad = from_norm if grad is None else from_norm + grad
    grad_residual = _as_new(grad, residual_dtype, grad_total)
    if branch_dtype is not None:
        if multiplier is not None:
            multiplier = multiplier.view(-1, *(1,) * (grad.dim() - 1))
            grad = torch.where(multiplier != 0, grad * multiplier, 0)
        if layer_scale is not None:
            kept = branch if multiplier is None else torch.where(multiplier != 0, branch, 0)
            grad_scale = (grad * kept).flatten(0, -2).sum(0).to(layer_scale.dtype)
            grad = grad * layer_scale
        grad_branch = _as_new(grad, branch_dtype, grad_total, grad_residual)
    grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
    grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
    return grad_residual, grad_branch, grad_scale, grad_weight, grad_bias


def _as_new(x, dtype, *others):
    """`x` in `dtype`, contiguous and none of the other tensors."""
    x = x.to(dtype).contiguous()
    return x.clone() if any(x is other for other in others) else x


_FORWARD_KERNELS = (dispatch.Backend("triton", _forward_unsupported_reasons, _forward_triton),)
_BACKWARD_KERNELS = (dispatch.Backend("triton", _backward_unsupported_reasons, _backward_triton),)


def takes_layer_norm(x: torch.Tensor, channels: int) -> bool:
    """Whether a kernel takes LayerNorm over the `channels` of x `[N, ..., C]` alone, as far as x can tell."""
    return (
        isinstance(x, torch.Tensor)  # torch.fx traces symbols
        and (x.is_cuda or (x.is_cpu and env.TRITON_INTERPRET))
        and x.dim() >= 2
        and x.shape[-1] == channels <= MOST_CHANNELS
        and x.dtype in _common.KERNEL_DTYPES
    )


# ---- torch.library: what does not exist or is not wanted is an empty tensor ---------------------------------


def _forward_impl(*args):
    residual = args[0]
    if residual.numel() == 0:
        return _forward_fake(*args)
    outputs = dispatch.select(OP, _FORWARD_KERNELS, _forward_reference, *args)(*args)
    return tuple(residual.new_empty(0) if output is None else output for output in outputs)


def _backward_impl(*args):
    total = args[0]
    if total.numel() == 0:
        return tuple(output.zero_() for output in _backward_fake(*args))
    outputs = dispatch.select(f"{OP}_backward", _BACKWARD_KERNELS, _backward_reference, *args)(*args)
    return tuple(total.new_empty(0) if output is None else output for output in outputs)


def _forward_fake(residual, branch, multiplier, layer_scale, weight, bias, eps, norm_dtype, keep_statistics):
    dtype = _total_dtype(residual, branch, layer_scale)
    total = residual.new_empty(0 if branch is None else residual.shape, dtype=dtype)
    norm = residual.new_empty(residual.shape, dtype=norm_dtype)
    if not keep_statistics:
        return total, norm, residual.new_empty(0), residual.new_empty(0)
    mean, rstd = (residual.new_empty(residual.shape[:-1], dtype=_common.statistics_dtype(total)) for _ in range(2))
    return total, norm, mean, rstd


def _backward_fake(
    total,
    grad_total,
    grad_norm,
    branch,
    multiplier,
    layer_scale,
    weight,
    bias,
    mean,
    rstd,
    residual_dtype,
    branch_dtype,
    affine_grads,
):
    grad_branch = None if branch_dtype is None else total.new_empty(total.shape, dtype=branch_dtype)
    vectors = (None if branch_dtype is None else layer_scale, *((weight, bias) if affine_grads else (None, None)))
    vectors = [total.new_empty(0) if v is None else v.new_empty(v.shape) for v in vectors]
    return (
        total.new_empty(total.shape, dtype=residual_dtype),
        total.new_empty(0) if grad_branch is None else grad_branch,
        *vectors,
    )


def _total_dtype(residual, branch, layer_scale) -> torch.dtype:
    if branch is None:
        return residual.dtype
    return torch.promote_types(residual.dtype, scaled_dtype(branch, layer_scale))


_forward_op = _common.define(
    f"{OP}(Tensor residual, Tensor? branch, Tensor? multiplier, Tensor? layer_scale, Tensor? weight, Tensor? bias,"
    " float eps, ScalarType norm_dtype, bool keep_statistics) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward_op = _common.define(
    f"{OP}_backward(Tensor total, Tensor? grad_total, Tensor? grad_norm, Tensor? branch, Tensor? multiplier,"
    " Tensor? layer_scale, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, ScalarType residual_dtype,"
    " ScalarType? branch_dtype, bool affine_grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, branch, multiplier, layer_scale, weight, bias, eps, norm_dtype):
        args = (residual, branch, multiplier, layer_scale, weight, bias, eps, norm_dtype)
        total, norm, mean, rstd = _forward_op(*args, True)
        if branch is None:
            total = residual  # autograd hands it on as a view, so that both gradients meet in one backward
        # The branch matters to the layer scale's gradient alone.
        kept_branch = None if layer_scale is None else branch
        ctx.save_for_backward(total, kept_branch, multiplier, layer_scale, weight, bias, mean, rstd)
        ctx.dtypes = residual.dtype, None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return total, norm

    @staticmethod
    @_common.once_differentiable(OP)
    def backward(ctx, grad_total, grad_norm):
        if grad_total is None and grad_norm is None:
            return (None,) * 8
        total, *tensors = ctx.saved_tensors
        multiplier, layer_scale = tensors[1:3]
        residual_dtype, branch_dtype = ctx.dtypes
        wanted = ctx.needs_input_grad
        # Nothing dropped, scaled or cast: both terms of the sum have the same gradient.
        same = multiplier is None and layer_scale is None and branch_dtype == residual_dtype
        own_dtype = branch_dtype if (wanted[1] or wanted[3]) and not same else None
        affine_grads = grad_norm is not None and (wanted[4] or wanted[5])
        grads = _backward_op(total, grad_total, grad_norm, *tensors, residual_dtype, own_dtype, affine_grads)
        grad_residual, grad_branch, *vectors = grads
        grad_branch = grad_residual if same else grad_branch
        scale, *affine = vectors
        return (
            grad_residual if wanted[0] else None,
            grad_branch if wanted[1] else None,
            None,
            scale if wanted[3] else None,
            affine[0] if affine_grads and wanted[4] else None,
            affine[1] if affine_grads and wanted[5] else None,
            None,
            None,
        )


# ---- public function ---------------------------------------------------------------------------------------


@_common.overridable
@remembers_inference
def add_layer_norm(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    layer_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x = residual + drop_path(branch * layer_scale)` and `layer_norm(x)`, both in one pass over memory.

    Args:
        residual: `[N, ..., C]`, samples first and channels last (`[N, H, W, C]`, `[N, L, C]`, `[N, C]`), float32,
            float16, bfloat16 (or float64, on the reference). Any strides; where the rows of C side-by-side channels
            do not lie a fixed distance apart, it is copied first.
        branch: of residual's shape and any of the dtypes; None for LayerNorm of residual alone.
        weight, bias: `[C]`, or None for 1 and 0.
        drop_prob: chance of each sample's branch to be dropped.
        training: whether anything is dropped at all.
        scale_by_keep: divide what is kept by `1 - drop_prob`.
        layer_scale: `[C]`, or None for 1.
        mask: `[N]` multipliers to use instead of drawing any (drop_prob, training and scale_by_keep then do not
            matter); 0 drops a sample. Not differentiated.
        eps: added to the variance.

    Returns:
        The sum, and its LayerNorm over the last dimension; both contiguous and of residual's shape. The sum has the
        dtype that torch's promotion gives the expression, and the normalised values have the sum's, whatever the
        dtype of weight and bias. Under autocast on CUDA half-precision sums give float32 normalised values, as
        torch's layer_norm does there; on the CPU torch leaves layer_norm alone, and so does this. Without a branch
        the sum is residual itself, never a copy: the same tensor, or, where gradients are recorded, a view of it,
        so that its gradient and the one through the norm meet in one pass.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, drop_prob outside [0, 1], layer_scale or mask without a branch, devices
            that differ; named in the message.

    Numerics:
        The mask is drawn and scaled as in `drop_path_add`: equal seeds give what timm's DropPath gives, under
        activation checkpointing too; a dropped sample is its residual exactly and gives its branch no gradient.
        Products and sum are float32 and rounded once, to the sum that is returned. The norm is that of the rounded
        sum, as in `x = x + drop_path(branch); y = norm(x)`; its mean and (biased) variance are float32, the
        variance taken around the mean. Gradients are deterministic and once differentiable; the gradients of both
        outputs are added in float32 and rounded once. More than 2048 channels run on the reference.
        Inference compiled for a CPU is left to Inductor.
    """
    _check(residual, branch, weight, bias, layer_scale, mask, eps)
    check_drop(drop_prob, training, scale_by_keep)
    multiplier = None
    if branch is not None:
        multiplier = sample_multiplier(branch, layer_scale, drop_prob, training, scale_by_keep, mask)
    norm_dtype = _norm_dtype(residual.device.type, _total_dtype(residual, branch, layer_scale))
    args = (residual, branch, multiplier, layer_scale, weight, bias, float(eps), norm_dtype)
    # Compiled on a GPU the op stays: Inductor would split the norm into two kernels.
    if dispatch.wants_plain_torch() or _common.left_to_torch(OP, residual):
        total, norm, _, _ = reference(*args)
        return (residual if branch is None else total.contiguous()), norm.contiguous()
    if _common.needs_grad(residual, branch, layer_scale, weight, bias):
        return _AddLayerNorm.apply(*args)
    total, norm, _, _ = _forward_op(*args, False)
    return (residual if branch is None else total), norm


def _norm_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """What torch's layer_norm makes of `dtype`: autocast on CUDA computes and returns it in float32."""
    if device_type == "cuda" and torch.is_autocast_enabled("cuda") and dtype != torch.float64:
        return torch.float32
    return dtype
