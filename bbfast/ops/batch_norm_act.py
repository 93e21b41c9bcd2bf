"""`batch_norm_act`: BatchNorm, residual addition and activation in one op.

Reads top-down: checks, backends, torch.library, autograd, public function.
"""

from __future__ import annotations

import torch

from bbfast import dispatch
from bbfast.ops import _common
from bbfast.ops._memory_format import dense_like, in_format_of, new_dense
from bbfast.ops._repeated import remembers_inference
from bbfast.reference.batch_norm_act import batch_norm_act as reference
from bbfast.reference.batch_norm_act import batch_norm_act_backward as reference_backward

OP = "batch_norm_act"

# Activations that Inductor may fuse with BatchNorm on a GPU, where there is the kernel, too. The others read their
# argument twice: where the result goes to several readers, Inductor writes what is before and after the activation.
FUSED_BY_COMPILER = ("identity", "relu", "relu6")


# ---- checks ----------------------------------------------------------------------------------------------


def _check(x, weight, bias, residual, running_mean, running_var, training, momentum, eps, act):
    _common.check_tensor("x", x)
    if x.dim() not in (2, 3, 4):
        raise ValueError(f"x must have 2 to 4 dimensions [N, C], [N, C, L] or [N, C, H, W], got {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"x has no channels: shape {tuple(x.shape)}")
    statistics = (weight, bias, running_mean, running_var)
    _common.check_batch_norm(x.shape[1], x, *statistics, training, momentum, eps, ("weight", "bias"))
    if residual is not None:
        _common.check_tensor("residual", residual)
        _common.check_same_device("residual", residual, x)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    _common.check_act(act)


# ---- backends --------------------------------------------------------------------------------------------


def _triton_unsupported_reasons(x, residual) -> list[str]:
    reasons = dispatch.triton_unavailable_reasons(x)
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and tensor.dtype not in _common.KERNEL_DTYPES:
            reasons.append(f"{name} has dtype {tensor.dtype}; kernels take float32, float16 and bfloat16")
    return reasons


def _forward_triton(*args):
    from bbfast.triton_kernels import batch_norm_act as kernels

    return kernels.forward(*args)


def _backward_triton(*args):
    from bbfast.triton_kernels import batch_norm_act as kernels

    return kernels.backward(*args)


def _forward_reference(x, weight, bias, residual, *rest):
    y, mean, invstd = reference(x, weight, bias, residual, *rest)
    dtype = _common.statistics_dtype(x)
    return dense_like(x, y, shared_with=(x,)), mean.to(dtype), invstd.to(dtype)


def _backward_reference(grad_y, x, weight, bias, residual, mean, invstd, *rest):
    grads = reference_backward(grad_y, x, weight, bias, residual, *rest)
    grad_x = dense_like(x, grads[0], shared_with=(grad_y,))
    grad_residual = None if residual is None else dense_like(residual, grads[3], shared_with=(grad_y, grad_x))
    return grad_x, grads[1], grads[2], grad_residual


_FORWARD_KERNELS = (
    dispatch.Backend(
        "triton",
        lambda x, weight, bias, residual, *_: _triton_unsupported_reasons(x, residual),
        _forward_triton,
    ),
)
_BACKWARD_KERNELS = (
    dispatch.Backend(
        "triton",
        lambda grad_y, x, weight, bias, residual, *_: _triton_unsupported_reasons(x, residual),
        _backward_triton,
    ),
)


# ---- torch.library ---------------------------------------------------------------------------------------


def _output_dtype(x, residual) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _run_forward(x, *args):
    return dispatch.select(OP, _FORWARD_KERNELS, _forward_reference, x, *args)(x, *args)


def _eval_impl(x, weight, bias, residual, running_mean, running_var, eps, act):
    if x.numel() == 0:
        return _eval_fake(x, weight, bias, residual, running_mean, running_var, eps, act)
    return _run_forward(x, weight, bias, residual, running_mean, running_var, False, 0.0, eps, act)[0]


def _train_impl(x, weight, bias, residual, running_mean, running_var, momentum, eps, act):
    if x.numel() == 0:  # no batch: the running statistics stay as they are
        outputs = _train_fake(x, weight, bias, residual, running_mean, running_var, momentum, eps, act)
        return tuple(output.zero_() for output in outputs)
    return _run_forward(x, weight, bias, residual, running_mean, running_var, True, momentum, eps, act)


def _backward_impl(grad_y, x, weight, bias, residual, *rest):
    if rest[-1] == "identity":  # its gradient is grad_y itself, which an op must not hand out again
        residual = None
    args = (grad_y, x, weight, bias, residual, *rest)
    if x.numel() == 0:
        return tuple(output.zero_() for output in _backward_fake(*args))
    grads = dispatch.select(f"{OP}_backward", _BACKWARD_KERNELS, _backward_reference, *args)(*args)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _eval_fake(x, weight, bias, residual, running_mean, running_var, eps, act):
    return new_dense(x, _output_dtype(x, residual))


def _train_fake(x, weight, bias, residual, running_mean, running_var, momentum, eps, act):
    statistics = [x.new_empty(x.shape[1], dtype=_common.statistics_dtype(x)) for _ in range(2)]
    return new_dense(x, _output_dtype(x, residual)), *statistics


def _backward_fake(grad_y, x, weight, bias, residual, *rest):
    vectors = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias)]
    absent = residual is None or rest[-1] == "identity"
    grad_residual = x.new_empty(0) if absent else new_dense(residual, residual.dtype)
    return new_dense(x, x.dtype), *vectors, grad_residual


_eval_op = _common.define(
    f"{OP}(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, Tensor? running_var,"
    " float eps, str act) -> Tensor",
    _eval_impl,
    _eval_fake,
)
_train_op = _common.define(
    f"{OP}_train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float momentum, float eps, str act) -> (Tensor, Tensor, Tensor)",
    _train_impl,
    _train_fake,
)
_backward_op = _common.define(
    f"{OP}_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean,"
    " Tensor? invstd, Tensor? running_mean, Tensor? running_var, bool training, float eps, str act)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, running_mean, running_var, training, momentum, eps, act):
        if training:
            y, mean, invstd = _train_op(x, weight, bias, residual, running_mean, running_var, momentum, eps, act)
            statistics = (mean, invstd, None, None)
        else:
            y = _eval_op(x, weight, bias, residual, running_mean, running_var, eps, act)
            statistics = (None, None, running_mean, running_var)
        # Without an activation the residual's gradient is that of y, and nothing else depends on the residual.
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(x, weight, bias, None if act == "identity" else residual, *statistics)
        ctx.config = (training, eps, act)
        return y

    @staticmethod
    @_common.once_differentiable(OP)
    def backward(ctx, grad_y):
        x, weight, bias, residual, *statistics = ctx.saved_tensors
        grads = list(_backward_op(grad_y, x, weight, bias, residual, *statistics, *ctx.config))
        if residual is None and ctx.residual_dtype is not None:
            grads[3] = grad_y.to(ctx.residual_dtype)
        grads = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)]
        return *grads, *(None,) * 6


# ---- public function -------------------------------------------------------------------------------------


@_common.overridable
@remembers_inference
def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    residual: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> torch.Tensor:
    """`act(batch_norm(x) + residual)` in one pass over memory (two when the statistics are the batch's).

    Args:
        x: `[N, C, H, W]`, `[N, C, L]` or `[N, C]`, float32, float16, bfloat16 (or float64, on the reference),
            contiguous, channels_last, or any slice of these; it is never copied to another layout.
        weight, bias: BatchNorm's scale and shift `[C]`, or None for 1 and 0; float32 beside a half-precision x
            is welcome.
        running_mean, running_var: `[C]`, or both None. Updated in place when `training`. None without `training`
            (and without weight and bias) leaves BatchNorm out: addition and activation remain.
        residual: x's shape, any float dtype and strides, added before the activation.
        training: normalise with the batch's statistics; otherwise with the running ones (gradients flow in both).
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        act: identity, relu, relu6, hardswish, silu or gelu (erf).

    Returns:
        y of x's shape and memory format, in the wider dtype of x and residual. An empty batch gives an empty y and
        leaves the running statistics alone.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, an unknown act, devices that differ; named in the message.

    Numerics:
        Everything between loading x and storing y is float32: nothing is rounded to x's dtype before the addition and
        the activation. The variance is summed around the data's own mean, so a large mean beside a small deviation
        costs no digits. The biased variance normalises, the unbiased one enters running_var. Autocast changes nothing,
        as for torch's batch_norm. Backward keeps x (and the residual) and computes the normalised value again;
        gradients of x, weight, bias and residual are deterministic and once differentiable. In training with a residual
        x's gradient follows from the residual's as it is stored, rounded as by torch's operators; the sums for weight
        and bias are of unrounded values. Compiled inference is left to Inductor, which fuses torch's batch_norm,
        addition and activation with what is next; on a GPU only with identity, relu and relu6.
    """
    _check(x, weight, bias, residual, running_mean, running_var, training, momentum, eps, act)
    if training:
        _common.check_batch_statistics(x.numel() // x.shape[1], x.shape)
    shape = x.shape
    x, residual = _as_maps(x), None if residual is None else _as_maps(residual)
    tensors = (x, weight, bias, residual)
    left_to_compiler = not training and act in FUSED_BY_COMPILER and _common.compiler_fuses(*tensors)
    if dispatch.wants_plain_torch() or left_to_compiler or _common.left_to_torch(OP, x):
        y, _, _ = reference(*tensors, running_mean, running_var, training, momentum, eps, act)
        y = in_format_of(x, x.clone() if y is x else y)
    elif _common.needs_grad(*tensors):
        y = _BatchNormAct.apply(*tensors, running_mean, running_var, training, float(momentum), float(eps), act)
    elif training:
        y, _, _ = _train_op(*tensors, running_mean, running_var, float(momentum), float(eps), act)
    else:
        y = _eval_op(*tensors, running_mean, running_var, float(eps), act)
    return y if len(shape) == 4 else y.view(shape)


def _as_maps(x: torch.Tensor) -> torch.Tensor:
    """[N, C] or [N, C, L] as [N, C, H, W], a view."""
    if x.dim() == 2:
        return x[:, :, None, None]
    return x.unsqueeze(2) if x.dim() == 3 else x
