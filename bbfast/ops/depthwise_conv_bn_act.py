"""`depthwise_conv_bn_act`: depthwise convolution, BatchNorm and activation (and squeeze means) in one op.

Reads top-down: checks, backends, torch.library, autograd, public function.
"""

from __future__ import annotations

import torch

from bbfast import dispatch
from bbfast.ops import _common, _cpp, _onednn
from bbfast.ops._memory_format import in_format_of
from bbfast.ops._repeated import remembers_inference
from bbfast.reference.depthwise_conv_bn_act import depthwise_conv_bn_act as reference
from bbfast.reference.depthwise_conv_bn_act import depthwise_conv_bn_act_backward as reference_backward

OP = "depthwise_conv_bn_act"

# The kernel unrolls its taps along one axis, so very large kernels would compile for minutes.
MAX_TRITON_KERNEL_SIZE = 13


# ---- checks ----------------------------------------------------------------------------------------------


def _check(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, act, squeeze):
    _common.check_tensor("x", x, rank=4, layout="[N, C, H, W]")
    _common.check_tensor("weight", weight, rank=4, layout="[C, 1, kh, kw]")
    _common.check_same_device("weight", weight, x)
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(f"x has no channels: shape {tuple(x.shape)}")
    if weight.shape[1] != 1 or weight.shape[0] % channels or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [C * multiplier, 1, kh, kw] with C={channels} as in x, got {tuple(weight.shape)}"
        )
    if 0 in weight.shape[2:]:
        raise ValueError(f"weight has an empty kernel: shape {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype} but x has {x.dtype}; convert one of them")
    _common.check_channel_vectors({"bias": bias}, weight.shape[0], x)
    statistics = (bn_weight, bn_bias, running_mean, running_var)
    _common.check_batch_norm(weight.shape[0], x, *statistics, training, momentum, eps, ("bn_weight", "bn_bias"))
    _common.check_act(act)
    if not isinstance(squeeze, bool):
        raise TypeError(f"squeeze must be a bool, got {type(squeeze).__name__}")


# ---- backends --------------------------------------------------------------------------------------------


def _triton_unsupported_reasons(x, weight, *_args) -> list[str]:
    reasons = dispatch.triton_unavailable_reasons(x)
    if x.dtype not in _common.KERNEL_DTYPES:
        reasons.append(f"x has dtype {x.dtype}; kernels take float32, float16 and bfloat16")
    if weight.shape[0] != x.shape[1]:
        reasons.append(f"channel multiplier {weight.shape[0] // x.shape[1]}; kernels take 1")
    if max(weight.shape[2:]) > MAX_TRITON_KERNEL_SIZE:
        reasons.append(f"kernel size {tuple(weight.shape[2:])}; kernels take up to {MAX_TRITON_KERNEL_SIZE}")
    return reasons


def _cpp_unsupported_reasons(x, weight, *args) -> list[str]:
    training = args[8]
    reasons = _cpp.unsupported_reasons(x)
    if training:
        reasons.append("training=True; the extension's kernel takes running statistics only")
    if weight.shape[0] != x.shape[1]:
        reasons.append(f"channel multiplier {weight.shape[0] // x.shape[1]}; the extension's kernel takes 1")
    return reasons


def _onednn_unsupported_reasons(x, *args) -> list[str]:
    training = args[9]
    reasons = _onednn.unsupported_reasons(x)
    if training:
        reasons.append("training=True; oneDNN's fused convolution takes running statistics only")
    return reasons


def _forward_triton(*args):
    from bbfast.triton_kernels import depthwise_conv_bn_act as kernels

    return kernels.forward(*args)


def _backward_triton(*args):
    from bbfast.triton_kernels import depthwise_conv_bn_act as kernels

    return kernels.backward(*args)


def _forward_cpp(x, *args):
    *tensors, _training, _momentum, eps, act, squeeze = args
    y, squeezed = _cpp.depthwise_conv_bn_act(x, *tensors, eps, act, squeeze)
    return _common.as_output(x, y), squeezed, None, None


def _forward_onednn(x, *args):
    *tensors, stride, padding, dilation, _training, _momentum, eps, act, squeeze = args
    y = _onednn.conv_bn_act(x, *tensors, None, stride, padding, dilation, x.shape[1], eps, act)
    return _common.as_output(x, y), y.mean((2, 3)) if squeeze else None, None, None


def _forward_reference(x, *args):
    y, squeezed, mean, invstd = reference(x, *args)
    dtype = _common.statistics_dtype(x)
    return _common.as_output(x, y), squeezed, mean.to(dtype), invstd.to(dtype)


def _backward_reference(grad_y, grad_squeeze, x, weight, bias, bn_weight, bn_bias, mean, invstd, *rest):
    *config, _needs_input_grad, _needs_weight_grad = rest
    return reference_backward(grad_y, grad_squeeze, x, weight, bias, bn_weight, bn_bias, *config)


_FORWARD_KERNELS = (
    dispatch.Backend("triton", _triton_unsupported_reasons, _forward_triton),
    dispatch.Backend("cpp", _cpp_unsupported_reasons, _forward_cpp),
    dispatch.Backend("onednn", _onednn_unsupported_reasons, _forward_onednn),
)
_BACKWARD_KERNELS = (
    dispatch.Backend("triton", lambda dy, ds, x, w, *_: _triton_unsupported_reasons(x, w), _backward_triton),
)


# ---- torch.library ---------------------------------------------------------------------------------------


def _run_forward(x, *args):
    return dispatch.select(OP, _FORWARD_KERNELS, _forward_reference, x, *args)(x, *args)


def _eval_impl(x, *args):
    if x.numel() == 0:
        return tuple(output.zero_() for output in _eval_fake(x, *args))
    *inputs, eps, act, squeeze = args
    y, squeezed, _, _ = _run_forward(x, *inputs, False, 0.0, eps, act, squeeze)
    return y, x.new_empty(0) if squeezed is None else squeezed


def _train_impl(x, *args):
    if x.numel() == 0:  # no batch: the running statistics stay as they are
        return tuple(output.zero_() for output in _train_fake(x, *args))
    *inputs, momentum, eps, act, squeeze = args
    y, squeezed, mean, invstd = _run_forward(x, *inputs, True, momentum, eps, act, squeeze)
    return y, x.new_empty(0) if squeezed is None else squeezed, mean, invstd


def _backward_impl(*args):
    x = args[2]
    needs_input_grad, needs_weight_grad = args[-2:]
    if x.numel() == 0:
        return tuple(output.zero_() for output in _backward_fake(*args))
    run = dispatch.select(f"{OP}_backward", _BACKWARD_KERNELS, _backward_reference, *args)
    grad_x, *others = run(*args)
    if not needs_weight_grad:
        others[0] = None
    grad_x = _common.as_output(x, grad_x) if needs_input_grad else x.new_empty(0)
    return grad_x, *[x.new_empty(0) if grad is None else grad.contiguous() for grad in others]


def _forward_fake(x, weight, stride, padding, dilation, squeeze):
    size = _common.conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = _common.new_output(x, (x.shape[0], weight.shape[0], *size))
    return y, x.new_empty((x.shape[0], weight.shape[0]) if squeeze else 0)


def _eval_fake(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, *config):
    stride, padding, dilation, _eps, _act, squeeze = config
    return _forward_fake(x, weight, stride, padding, dilation, squeeze)


def _train_fake(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, *config):
    stride, padding, dilation, _momentum, _eps, _act, squeeze = config
    statistics = [x.new_empty(weight.shape[0], dtype=_common.statistics_dtype(x)) for _ in range(2)]
    return *_forward_fake(x, weight, stride, padding, dilation, squeeze), *statistics


def _backward_fake(grad_y, grad_squeeze, x, weight, bias, bn_weight, bn_bias, *rest):
    needs_input_grad, needs_weight_grad = rest[-2:]
    others = (weight if needs_weight_grad else None, bias, bn_weight, bn_bias)
    grad_x = _common.new_output(x, x.shape) if needs_input_grad else x.new_empty(0)
    return grad_x, *[x.new_empty(0) if t is None else t.new_empty(t.shape) for t in others]


_PARAMETERS = "Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias"
_GEOMETRY = "int[2] stride, SymInt[4] padding, int[2] dilation"

_eval_op = _common.define(
    f"{OP}({_PARAMETERS}, Tensor? running_mean, Tensor? running_var, {_GEOMETRY}, float eps, str act, bool squeeze)"
    " -> (Tensor, Tensor)",
    _eval_impl,
    _eval_fake,
)
_train_op = _common.define(
    f"{OP}_train({_PARAMETERS}, Tensor(a!)? running_mean, Tensor(b!)? running_var, {_GEOMETRY}, float momentum,"
    " float eps, str act, bool squeeze) -> (Tensor, Tensor, Tensor, Tensor)",
    _train_impl,
    _train_fake,
)
_backward_op = _common.define(
    f"{OP}_backward(Tensor grad_y, Tensor? grad_squeeze, {_PARAMETERS}, Tensor? mean, Tensor? invstd,"
    f" Tensor? running_mean, Tensor? running_var, {_GEOMETRY}, bool training, float eps, str act,"
    " bool needs_input_grad, bool needs_weight_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _DepthwiseConvBNAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, bn_weight, bn_bias, running_mean, running_var, training, momentum, *config):
        stride, padding, dilation, eps, act, squeeze = config
        parameters = (x, weight, bias, bn_weight, bn_bias)
        if training:
            y, squeezed, mean, invstd = _train_op(
                *parameters, running_mean, running_var, stride, padding, dilation, momentum, eps, act, squeeze
            )
            ctx.save_for_backward(*parameters, mean, invstd, None, None)
        else:
            y, squeezed = _eval_op(*parameters, running_mean, running_var, stride, padding, dilation, eps, act, squeeze)
            ctx.save_for_backward(*parameters, None, None, running_mean, running_var)
        ctx.config = (stride, padding, dilation, training, eps, act)
        ctx.squeeze = squeeze
        ctx.only_convolves = act == "identity" and not (training or squeeze) and running_mean is None
        ctx.set_materialize_grads(False)
        return y, squeezed

    @staticmethod
    @_common.once_differentiable(OP)
    def backward(ctx, grad_y, grad_squeeze):
        x, weight, bias, bn_weight, bn_bias, *statistics = ctx.saved_tensors
        if not ctx.squeeze:
            grad_squeeze = None
        if grad_y is None:
            size = _common.conv_output_size(x.shape[2:], weight.shape[2:], *ctx.config[:3])
            grad_y = x.new_zeros((x.shape[0], weight.shape[0], *size))
        # A bare convolution's bias gets its gradient in the open: what wrote grad_y can sum it too when compiled.
        sums_bias = ctx.only_convolves and bias is not None and ctx.needs_input_grad[2]
        grads = _backward_op(
            grad_y,
            grad_squeeze,
            x,
            weight,
            None if ctx.only_convolves else bias,
            bn_weight,
            bn_bias,
            *statistics,
            *ctx.config,
            *ctx.needs_input_grad[:2],
        )
        if sums_bias:
            grads = (*grads[:2], grad_y.sum((0, 2, 3), dtype=bias.dtype), *grads[3:])
        wanted = zip(grads, (x, weight, bias, bn_weight, bn_bias), ctx.needs_input_grad)
        return *[g if t is not None and needed else None for g, t, needed in wanted], *(None,) * 10


# ---- public function -------------------------------------------------------------------------------------


@_common.overridable
@remembers_inference
def depthwise_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    squeeze: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution, BatchNorm and activation without a trip through memory between them.

    Args:
        x: input `[N, C, H, W]`, float32, float16, bfloat16 (or float64, on the reference), contiguous (NCHW),
            channels_last (NHWC), or any slice of these; it is never copied to another layout.
        weight: `[C, 1, kh, kw]`, dtype of x. `[C * multiplier, 1, kh, kw]` runs on the reference.
        bn_weight, bn_bias: BatchNorm's scale and shift `[C]`, or None for 1 and 0.
        running_mean, running_var: `[C]`, or both None. Updated in place when `training`. None without `training`
            (and without bn_weight and bn_bias) leaves BatchNorm out: convolution, bias and activation remain.
        bias: the convolution's bias `[C]`.
        stride, dilation: an int or (height, width), in pixels.
        padding: an int, (height, width), (top, bottom, left, right), `"valid"`, or `"same"` (TensorFlow's rule,
            the odd pixel at the bottom or right).
        training: normalise with the batch's statistics; otherwise with the running ones (gradients flow in both).
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        act: identity, relu, relu6, hardswish, silu or gelu (erf).
        squeeze: also return the mean of the output over H and W, for squeeze-and-excite.

    Returns:
        y `[N, C, H', W']` in x's dtype and memory format; with `squeeze` also `[N, C]` means in x's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, an unknown act, devices that differ; named in the message.

    Numerics:
        Sums, statistics and the activation are float32; the convolution's result is not rounded to x's dtype
        before BatchNorm. Under autocast x, weight and bias are cast as for torch's conv2d. Gradients of all
        inputs are deterministic (no atomics) and once differentiable.
    """
    settings = (stride, padding, dilation, training, momentum, eps, act, squeeze)
    outputs = _cpp.try_depthwise_conv_bn_act(
        OP, x, weight, bn_weight, bn_bias, running_mean, running_var, bias, *settings
    )
    if outputs is not None:
        return outputs if squeeze else outputs[0]

    x, weight, bias = _common.to_autocast_dtype(x, weight, bias)
    _check(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, act, squeeze)
    stride = _common.pair("stride", stride, 1)
    dilation = _common.pair("dilation", dilation, 1)
    padding = _common.resolve_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation)
    height, width = _common.conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if training:
        _common.check_batch_statistics(x.shape[0] * height * width, (x.shape[0], weight.shape[0], height, width))

    tensors = (x, weight, bias, bn_weight, bn_bias)
    statistics = (running_mean, running_var)
    geometry = (stride, padding, dilation)
    # With running statistics the CPU has a kernel of the forward pass.
    if dispatch.wants_plain_torch() or (training and _common.left_to_torch(OP, x)):
        y, squeezed, _, _ = reference(*tensors, *statistics, *geometry, training, momentum, eps, act, squeeze)
        y = in_format_of(x, y)
        return (y, squeezed) if squeeze else y
    if _common.needs_grad(*tensors):
        y, squeezed = _DepthwiseConvBNAct.apply(
            *tensors, *statistics, training, float(momentum), *geometry, float(eps), act, squeeze
        )
    elif training:
        y, squeezed, _, _ = _train_op(*tensors, *statistics, *geometry, float(momentum), float(eps), act, squeeze)
    else:
        y, squeezed = _eval_op(*tensors, *statistics, *geometry, float(eps), act, squeeze)
    return (y, squeezed) if squeeze else y
