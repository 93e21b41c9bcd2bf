"""Convolutions and linear layers on the CPU through oneDNN.

A convolution takes BatchNorm along, folded into weight and bias, and where it may the activation.

BatchNorm is folded in each call (about 20 microseconds per layer, 3% of a MobileNetV3) and never cached:
edits through `parameter.data`, as averaging and checkpoint code makes them, leave the tensor's version
counter alone, so no key can tell that a cached fold is stale.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from bbfast.ops._batch_norm import scale_and_shift
from bbfast.reference.activation import IN_PLACE_ACTIVATIONS
from bbfast.triton_kernels.layout import dense

# oneDNN's names for activations. Its relu and clip turn NaN into 0, and its gelu on AVX-512 infinity into NaN, where
# torch's keep them, so these three run after the convolution, in place.
_FUSED_ACTIVATIONS = {
    "identity": ("none", [], ""),
    "hardswish": ("hardswish", [], ""),
    "silu": ("swish", [], ""),
}

# Linear layers smaller than that gain nothing over torch's own, which is MKL's product.
LEAST_ROWS = 32
LEAST_SUMMED = 128


def unsupported_reasons(x: torch.Tensor) -> list[str]:
    """Why oneDNN's fused convolution cannot run on `x` (empty: it can)."""
    if reason := _why_unavailable(x, "_convolution_pointwise"):
        return [reason]
    if x.dtype == torch.float32:
        return []
    if x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    if x.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return []
    return [f"x has dtype {x.dtype}, which oneDNN's convolution does not take on this CPU"]


def linear_unsupported_reasons(x: torch.Tensor, weight: torch.Tensor) -> list[str]:
    """Why a linear layer of `x` `[..., K]` and `weight` `[N, K]` should not go to oneDNN (empty: it should)."""
    if reason := _why_unavailable(x, "_linear_pointwise"):
        return [reason]
    reasons = []
    if x.dtype != torch.float32:
        reasons.append(f"x has dtype {x.dtype}; torch itself runs linear layers of others than float32 on oneDNN")
    if not weight.is_contiguous():
        reasons.append("weight is not contiguous")
    if x.shape[-1] < LEAST_SUMMED or x.numel() < LEAST_ROWS * x.shape[-1]:
        reasons.append(f"fewer than {LEAST_ROWS} rows or {LEAST_SUMMED} channels, where oneDNN gains nothing over MKL")
    if not _has_avx512():
        reasons.append("the CPU has no AVX-512, and without it oneDNN and MKL were not compared")
    return reasons


def _why_unavailable(x: torch.Tensor, op: str) -> str | None:
    """Why this torch's `mkldnn::op` cannot take x at all; None if it can."""
    if x.device.type != "cpu":
        return f"x is on {x.device}; oneDNN runs on the CPU"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if not torch._C._get_mkldnn_enabled():
        return "oneDNN is switched off (torch.backends.mkldnn.enabled is False)"
    if not hasattr(torch.ops.mkldnn, op):
        return f"this torch has no mkldnn::{op}"
    return None


@functools.cache
def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias`, contiguous, no gradients. The bias is added where the sums are, not in a pass before."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, dense(bias), "none", [], "")


def conv_bn_act(
    x,
    weight,
    bias,
    bn_weight,
    bn_bias,
    running_mean,
    running_var,
    residual,
    stride,
    padding,
    dilation,
    groups,
    eps,
    act,
) -> torch.Tensor:
    """`act(batch_norm(conv2d(x)) + residual)` with running statistics (None: no normalisation), no gradients.

    Shapes as in `bbfast.reference.conv_bn_act`. The output's memory format is oneDNN's choice.
    """
    weight, bias = fold_batch_norm(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x = F.pad(x, (left, right, top, bottom))
        top = left = 0
    if x.shape[2:] == weight.shape[2:] == (1, 1) and groups == 1 and top == left == 0:
        # One pixel per sample (squeeze-and-excite, heads): a matrix product needs no reordered weight and is
        # 3 to 9 times faster.
        y = F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
        return IN_PLACE_ACTIVATIONS[act](y if residual is None else y.add_(residual))
    geometry = ((top, left), stride, dilation, groups)
    if residual is not None:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, bias, *geometry, "add", 1.0, None, [], None
        )
        return IN_PLACE_ACTIVATIONS[act](y)
    fused = _FUSED_ACTIVATIONS.get(act)
    y = torch.ops.mkldnn._convolution_pointwise.default(
        x, weight, bias, *geometry, *(fused or _FUSED_ACTIVATIONS["identity"])
    )
    return y if fused else IN_PLACE_ACTIVATIONS[act](y)


def fold_batch_norm(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps):
    """(weight, bias) of the convolution that includes BatchNorm, in weight's dtype, worked out in float32.

    Without running statistics they come back as they are.
    """
    if running_mean is None:
        return weight, None if bias is None else dense(bias).to(weight.dtype)  # oneDNN takes strides for none
    scale, shift = scale_and_shift(bias, bn_weight, bn_bias, running_mean, running_var, eps)
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
