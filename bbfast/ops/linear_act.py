"""`linear_act`: linear layer, activation, layer scale and residual in one call.

Inference on a GPU is one kernel where the product is limited by memory. Everywhere else torch's own operators run one
after the other, on the CPU with oneDNN's product where that beats MKL's. Reads top-down: checks, backends,
torch.library, public function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bbfast import dispatch, env
from bbfast.ops import _common, _onednn, _pointwise
from bbfast.ops._drop_path import scaled_dtype
from bbfast.ops._repeated import remembers_inference
from bbfast.ops.drop_path_add import drop_path_add
from bbfast.reference.activation import IN_PLACE_ACTIVATIONS, activation
from bbfast.reference.linear_act import linear_act as reference

OP = "linear_act"
_COMPOSED = dispatch.Choice("torch", ("not a product that the GPU's kernel takes: torch's operators in the open",))


# ---- checks ----------------------------------------------------------------------------------------------


def _check(x, weight, bias, layer_scale, residual, act):
    _common.check_tensor("x", x)
    _common.check_tensor("weight", weight, rank=2, layout="[N, K]")
    _common.check_same_device("weight", weight, x)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., K] with K={weight.shape[1]} as in weight, got shape {tuple(x.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight has an empty dimension: shape {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype} but x has {x.dtype}; convert one of them")
    _common.check_channel_vectors({"bias": bias, "layer_scale": layer_scale}, weight.shape[0], x)
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias has dtype {bias.dtype} but x has {x.dtype}; convert one of them")
    if residual is not None:
        _common.check_tensor("residual", residual)
        shape = (*x.shape[:-1], weight.shape[0])
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")
        _common.check_same_device("residual", residual, x)
    _common.check_act(act)


# ---- backends --------------------------------------------------------------------------------------------


def _is_for_kernel(x, weight, layer_scale, residual) -> bool:
    """Whether inference on a GPU goes to the kernel; torch.compile traces this."""
    if not (x.is_cuda or (x.is_cpu and env.TRITON_INTERPRET)):
        return False
    return not _dtype_reasons(x, weight, layer_scale, residual)


def _dtype_reasons(x, weight, layer_scale, residual) -> list[str]:
    reasons = _pointwise.unsupported_reasons(x, weight)
    for name, tensor in (("layer_scale", layer_scale), ("residual", residual)):
        if tensor is not None and tensor.dtype not in _common.KERNEL_DTYPES:
            reasons.append(f"{name} has dtype {tensor.dtype}; the kernel takes float32, float16 and bfloat16")
    return reasons


def _triton_unsupported_reasons(x, weight, bias, layer_scale, residual, act) -> list[str]:
    reasons = dispatch.triton_unavailable_reasons(x) + _dtype_reasons(x, weight, layer_scale, residual)
    return reasons + _pointwise.row_reasons(x.numel() // x.shape[-1])


def _run_triton(x, weight, bias, layer_scale, residual, act):
    from bbfast.triton_kernels import linear_act as kernels

    return kernels.forward(x, weight, bias, layer_scale, residual, act, _dtype(x, layer_scale, residual))


def _onednn_unsupported_reasons(x, weight, *_) -> list[str]:
    return _onednn.linear_unsupported_reasons(x, weight)


def _run_onednn(*args):
    return _compose_inference(*args, linear=_onednn.linear)


_FORWARD_KERNELS = (
    dispatch.Backend("triton", _triton_unsupported_reasons, _run_triton),
    dispatch.Backend("onednn", _onednn_unsupported_reasons, _run_onednn),
)


# ---- torch.library ---------------------------------------------------------------------------------------


def _dtype(x, layer_scale, residual) -> torch.dtype:
    dtype = scaled_dtype(x, layer_scale)
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)


def _impl(*args):
    run = reference if args[0].numel() == 0 else dispatch.select(OP, _FORWARD_KERNELS, reference, *args)
    return run(*args).contiguous()


def _fake(x, weight, bias, layer_scale, residual, act):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=_dtype(x, layer_scale, residual))


_op = _common.define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor? residual, str act) -> Tensor",
    _impl,
    _fake,
)


def _compose(x, weight, bias, layer_scale, residual, act) -> torch.Tensor:
    """The same of differentiable ops, on any device."""
    y = activation(F.linear(x, weight, bias), act)
    if layer_scale is None or residual is None or y.dim() not in (2, 3, 4):
        y = y if layer_scale is None else y * layer_scale
        return y if residual is None else residual + y
    return drop_path_add(residual, y, layer_scale=layer_scale, channel_dim=-1)


def _compose_inference(x, weight, bias, layer_scale, residual, act, linear=F.linear) -> torch.Tensor:
    """The same without gradients, in as few new tensors as there can be."""
    y = IN_PLACE_ACTIVATIONS[act](linear(x, weight, bias))
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (y, layer_scale, residual) if t is not None)
    out = y if plain and y.dtype == _dtype(x, layer_scale, residual) else None
    if residual is None:
        return y if layer_scale is None else torch.mul(y, layer_scale, out=out)
    if layer_scale is None:
        return torch.add(residual, y, out=out)
    return torch.addcmul(residual, y, layer_scale, out=out)


# ---- public function -------------------------------------------------------------------------------------


@_common.overridable
@remembers_inference
def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str = "gelu",
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + layer_scale * act(x @ weight.T + bias)`, in inference on a GPU mostly one trip through memory.

    That is so where x is float16 or bfloat16, K and N are multiples of 8 and the product is limited by memory (K up to
    512, or N up to 256). Otherwise, and with gradients, torch's operators run one after the other, the activation in
    place where nobody wants a gradient; torch.compile sees them. On a CPU with AVX-512 the product of float32 is
    oneDNN's from 32 rows and 128 summed channels on.

    Args:
        x: `[..., K]`, float32, float16, bfloat16 or float64, in any strides; where rows of K side-by-side elements do
            not lie a fixed distance apart, the GPU's kernel copies it first.
        weight: `[N, K]`, dtype of x.
        bias: `[N]`, dtype of x, or None.
        act: identity, relu, relu6, hardswish, silu or gelu (erf).
        layer_scale: `[N]`, any of the dtypes, or None for 1.
        residual: `[..., N]`, any of the dtypes, or None.

    Returns:
        y `[..., N]` in the dtype that torch's promotion gives the expression.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, an unknown act, devices that differ; named in the message.

    Numerics:
        The GPU's kernel sums in float32 and rounds once, to y, where torch rounds after each operator; its gelu is
        right to 6e-4 of itself for values above -5. Under autocast x, weight and bias are cast as for torch's linear.
        Deterministic.
    """
    x, weight, bias = _common.to_autocast_dtype(x, weight, bias)
    _check(x, weight, bias, layer_scale, residual, act)
    args = (x, weight, bias, layer_scale, residual, act)
    if dispatch.wants_plain_torch():
        return reference(*args)
    if _common.needs_grad(x, weight, bias, layer_scale, residual):
        return _compose(*args)
    if _is_for_kernel(x, weight, layer_scale, residual):
        return _op(*args)
    if torch.compiler.is_compiling():
        return _compose(*args)
    if x.is_cpu and env.backend() in ("auto", "onednn") and not _onednn.linear_unsupported_reasons(x, weight):
        return _op(*args)
    dispatch.record(OP, _COMPOSED)
    return _compose_inference(*args)
