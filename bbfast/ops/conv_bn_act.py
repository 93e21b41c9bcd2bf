"""`conv_bn_act`: convolution, BatchNorm, residual and activation in one call.

Inference on the CPU is one kernel, and so are pointwise convolutions of channels_last maps on a GPU. Everywhere else
the convolution is torch's own (cuDNN is hard to beat on dense ones) and the rest is `batch_norm_act`. Reads top-down:
checks, backends, torch.library, public function.
"""

from __future__ import annotations

import torch

from bbfast import dispatch, env
from bbfast.ops import _common, _cpp, _onednn, _pointwise
from bbfast.ops._memory_format import in_format_of
from bbfast.ops._repeated import remembers_inference
from bbfast.ops.batch_norm_act import batch_norm_act
from bbfast.reference.activation import activation
from bbfast.reference.conv_bn_act import conv_bn_act as reference
from bbfast.reference.conv_bn_act import multiply, padded_conv

OP = "conv_bn_act"


# ---- checks ----------------------------------------------------------------------------------------------


def _check(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, groups, training, momentum, eps, act):
    _common.check_tensor("x", x, rank=4, layout="[N, C, H, W]")
    _common.check_tensor("weight", weight, rank=4, layout="[O, C / groups, kh, kw]")
    _common.check_same_device("weight", weight, x)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1:
        raise ValueError(f"groups={groups} is not allowed; it must be at least 1")
    channels, out_channels = x.shape[1], weight.shape[0]
    if 0 in weight.shape:
        raise ValueError(f"weight has an empty dimension: shape {tuple(weight.shape)}")
    if weight.shape[1] * groups != channels or out_channels % groups:
        raise ValueError(
            f"weight must have shape [O, C / groups, kh, kw] with C={channels} as in x and O a multiple of "
            f"groups={groups}, got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype} but x has {x.dtype}; convert one of them")
    _common.check_channel_vectors({"bias": bias}, out_channels, x)
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias has dtype {bias.dtype} but x has {x.dtype}; convert one of them")
    statistics = (bn_weight, bn_bias, running_mean, running_var)
    _common.check_batch_norm(out_channels, x, *statistics, training, momentum, eps, ("bn_weight", "bn_bias"))
    _common.check_act(act)


def _check_gate(gate, x):
    if gate is None:
        return
    _common.check_tensor("gate", gate, rank=2, layout="[N, C]")
    if tuple(gate.shape) != tuple(x.shape[:2]):
        raise ValueError(f"gate must have shape {tuple(x.shape[:2])}, [N, C] of x, got {tuple(gate.shape)}")
    _common.check_same_device("gate", gate, x)
    if gate.dtype != x.dtype:
        raise TypeError(f"gate has dtype {gate.dtype} but x has {x.dtype}; convert one of them")


def _check_residual(residual, x, shape):
    if residual is None:
        return
    _common.check_tensor("residual", residual, rank=4, layout="[N, O, H', W']")
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    _common.check_same_device("residual", residual, x)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual has dtype {residual.dtype} but x has {x.dtype}; convert one of them")


# ---- backends --------------------------------------------------------------------------------------------


def _inference_reasons(training, needs_grad) -> list[str]:
    if training:
        return ["training=True; the fused convolution is for inference"]
    if needs_grad:
        return ["gradients are needed; the fused convolution is for inference (use torch.no_grad())"]
    return []


def is_for_kernel(x, weight, groups, padding, gated: bool) -> bool:
    """Whether a convolution in inference is one for the GPU's kernel; torch.compile traces this."""
    if not (x.is_cuda or (x.is_cpu and env.TRITON_INTERPRET)):
        return False
    return not _layout_reasons(x, weight, groups, padding, gated)


def _layout_reasons(x, weight, groups, padding, gated) -> list[str]:
    reasons = _pointwise.unsupported_reasons(x, weight, gated)
    if weight.shape[2:] != (1, 1) or groups != 1 or any(padding):
        reasons.append("the convolution is not pointwise (1x1, no padding, groups 1)")
    if not _common.is_channels_last(x):
        reasons.append("x is not channels_last")
    elif any(x.stride(axis) % _pointwise.UNIT for axis in (0, 2, 3)):
        reasons.append(f"the distances of x's pixels are not multiples of {_pointwise.UNIT} elements")
    return reasons


def _triton_unsupported_reasons(x, weight, *args) -> list[str]:
    *_, padding, _dilation, groups, _eps, _act, gate, training, needs_grad = args
    if unavailable := dispatch.triton_unavailable_reasons(x):
        return unavailable
    reasons = _inference_reasons(training, needs_grad)
    reasons += _layout_reasons(x, weight, groups, padding, gate is not None)
    return reasons + _pointwise.row_reasons(x.shape[0] * x.shape[2] * x.shape[3])


def _cpp_unsupported_reasons(x, weight, *args) -> list[str]:
    *_, stride, padding, dilation, groups, _eps, _act, gate, training, needs_grad = args
    reasons = _cpp.unsupported_reasons(x) + _inference_reasons(training, needs_grad) + _gate_reasons(gate)
    if not reasons and _cpp.takes_few_pixels(x, weight, stride, padding, dilation, groups):
        return []
    if groups != 1:
        return reasons + _cpp.grouped_unsupported_reasons(weight, dilation, groups)
    if weight.shape[2:] == (3, 3):
        return reasons + _cpp.winograd_unsupported_reasons(x, weight, stride, padding, dilation, groups)
    if weight.shape[2:] != (1, 1) or any(padding):
        reasons.append("the convolution is not pointwise (1x1, no padding, groups 1)")
    return reasons


def _onednn_unsupported_reasons(x, *args) -> list[str]:
    *_, gate, training, needs_grad = args
    return _onednn.unsupported_reasons(x) + _inference_reasons(training, needs_grad) + _gate_reasons(gate)


def _gate_reasons(gate) -> list[str]:
    return [] if gate is None else ["a gate is given"]


def _run_triton(x, *args):
    from bbfast.triton_kernels import conv_bn_act as kernels

    *tensors, stride, _padding, _dilation, _groups, eps, act, gate, _training, _needs_grad = args
    return kernels.forward(x, *tensors, gate, stride, eps, act)


def _run_cpp(x, *args):
    *tensors, stride, padding, dilation, groups, eps, act, _gate, _training, _needs_grad = args
    if _cpp.takes_few_pixels(x, tensors[0], stride, padding, dilation, groups):
        return _cpp.im2col_conv_bn_act(x, *tensors, stride, padding, dilation, eps, act)
    if groups != 1:
        return _cpp.grouped_conv_bn_act(x, *tensors, stride, padding, groups, eps, act)
    if tensors[0].shape[2:] == (3, 3):
        return _cpp.winograd_conv_bn_act(x, *tensors, padding, eps, act)
    return _cpp.pointwise_conv_bn_act(x, *tensors, stride, eps, act)


def _run_onednn(x, *args):
    *config, _gate, _training, _needs_grad = args
    return _onednn.conv_bn_act(x, *config)


def _run_reference(x, *args):
    *config, eps, act, gate, _training, _needs_grad = args
    return reference(x, *config, False, 0.0, eps, act, gate)


_FORWARD_KERNELS = (
    dispatch.Backend("triton", _triton_unsupported_reasons, _run_triton),
    dispatch.Backend("cpp", _cpp_unsupported_reasons, _run_cpp),
    dispatch.Backend("onednn", _onednn_unsupported_reasons, _run_onednn),
)


# ---- torch.library ---------------------------------------------------------------------------------------


def _impl(x, *args):
    args = (*args, False, False)  # no training, no gradients
    run = _run_reference if x.numel() == 0 else dispatch.select(OP, _FORWARD_KERNELS, _run_reference, x, *args)
    return _common.as_output(x, run(x, *args))


def _fake(x, weight, *args):
    stride, padding, dilation, _groups, _eps, _act, _gate = args[6:]
    size = _common.conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _common.new_output(x, (x.shape[0], weight.shape[0], *size))


_op = _common.define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean,"
    " Tensor? running_var, Tensor? residual, int[2] stride, SymInt[4] padding, int[2] dilation, int groups,"
    " float eps, str act, Tensor? gate) -> Tensor",
    _impl,
    _fake,
)


def _compose(
    x, weight, bias, bn_weight, bn_bias, mean, var, residual, geometry, training, momentum, eps, act
) -> torch.Tensor:
    """torch's convolution, then the rest in one op: differentiable, any device."""
    z = padded_conv(x, weight, bias, *geometry)
    if mean is None and not training:
        return activation(z if residual is None else z + residual, act)
    return batch_norm_act(
        z,
        bn_weight,
        bn_bias,
        mean,
        var,
        residual=residual,
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
    )


# ---- public function -------------------------------------------------------------------------------------


@_common.overridable
@remembers_inference
def conv_bn_act(
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
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(batch_norm(conv2d(x * gate)) + residual)`, in inference mostly one trip through memory.

    That is so on the CPU, and on a GPU where x is channels_last, float16 or bfloat16, the convolution pointwise, C and
    O are multiples of 8 and the product is limited by memory (C up to 512, or O up to 256, or a gate). Otherwise torch
    convolves, and `batch_norm_act` does the rest.

    Args:
        x: input `[N, C, H, W]`, float32, float16, bfloat16 or float64; contiguous (NCHW), channels_last
            (NHWC, much faster on the CPU) or any slice of these.
        weight: `[O, C / groups, kh, kw]`, dtype of x.
        bn_weight, bn_bias: BatchNorm's scale and shift `[O]`, or None for 1 and 0.
        running_mean, running_var: `[O]`, or both None. Updated in place when `training`. None without
            `training` (and without bn_weight and bn_bias) leaves BatchNorm out: convolution, bias and
            activation remain.
        bias: the convolution's bias `[O]`, dtype of x.
        stride, dilation: an int or (height, width), in pixels.
        padding: an int, (height, width), (top, bottom, left, right), `"valid"`, or `"same"` (TensorFlow's
            rule: the odd pixel at the bottom or right).
        groups: as in `torch.nn.functional.conv2d`.
        training: normalise with the batch's statistics, else with the running ones; gradients flow in both.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        act: identity, relu, relu6, hardswish, silu or gelu (erf).
        residual: `[N, O, H', W']`, dtype of x, added before the activation.
        gate: `[N, C]`, dtype of x: a factor of each sample's channels, as squeeze-and-excite makes it.

    Returns:
        y `[N, O, H', W']` in x's dtype; in x's memory format where inference is one kernel, else as torch's conv2d
        has it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, an unknown act, devices that differ; named in the message.

    Numerics:
        The CPU kernels fold BatchNorm into weight and bias, or into what follows the sum, in float32 in each call, so
        edits of any parameter count at once. The GPU's kernel sums in float32 and rounds once, to y; x times gate is
        rounded to x's dtype first, and its gelu is right to 6e-4 of itself for values above -5. NaN passes through
        every activation. Under autocast x, weight, bias, residual and gate are cast as for torch's conv2d.
        The extension convolves dense 3x3 kernels at stride 1 by Winograd's F(2x2, 3x3), with 16 multiplications where
        36 are usual; measured, its rounding errors are 0.13 to 0.8 of those of torch's conv2d. Its transform
        adds values of a 4x4 patch, which would carry NaN, infinity or an overflow to all of a tile: a sample with
        a sum that is not finite is convolved again by torch, so these reach the outputs whose window holds them and
        no others.
    """
    settings = (stride, padding, dilation, groups, training, momentum, eps, act)
    statistics = (bn_weight, bn_bias, running_mean, running_var)
    if gate is None:
        y = _cpp.try_pointwise_conv_bn_act(OP, x, weight, *statistics, bias, residual, *settings)
        if y is not None:
            return y

    x, weight, bias, residual, gate = _common.to_autocast_dtype(x, weight, bias, residual, gate)
    _check(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, groups, training, momentum, eps, act)
    stride = _common.pair("stride", stride, 1)
    dilation = _common.pair("dilation", dilation, 1)
    padding = _common.resolve_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation)
    size = _common.conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], *size)
    _check_residual(residual, x, shape)
    _check_gate(gate, x)
    if training:
        _common.check_batch_statistics(shape[0] * shape[2] * shape[3], shape)

    tensors = (x, weight, bias, *statistics, residual)
    geometry = (stride, padding, dilation, groups)
    needs_grad = _common.needs_grad(x, weight, bias, bn_weight, bn_bias, residual, gate)
    is_inference = not training and not needs_grad
    if dispatch.wants_plain_torch():
        y = reference(*tensors, *geometry, training, momentum, eps, act, gate)
        return in_format_of(x, y) if is_inference and x.is_cpu else y
    if is_inference and is_for_kernel(x, weight, groups, padding, gate is not None):
        return _op(*tensors, *geometry, float(eps), act, gate)
    tensors = (multiply(x, gate), *tensors[1:])
    if is_inference and x.is_cpu:
        return _op(*tensors, *geometry, float(eps), act, None)
    if x.is_cpu and not torch.compiler.is_compiling():  # for `last_choices` and BBFAST_STRICT
        config = (*geometry, float(eps), act, None, training, needs_grad)
        dispatch.select(OP, _FORWARD_KERNELS, _compose, *tensors, *config)
    return _compose(*tensors, geometry, training, momentum, eps, act)
