"""`mlp`: LayerNorm, a perceptron of two layers, layer scale and residual in one call.

Inference on a GPU is one kernel where channels are few, so that the hidden layer never reaches memory. Everywhere else
`add_layer_norm` and `linear_act` run one after the other. Reads top-down: checks, backends, torch.library, public
function.
"""

from __future__ import annotations

import torch

from bbfast import dispatch, env
from bbfast.ops import _common, _pointwise
from bbfast.ops._drop_path import scaled_dtype
from bbfast.ops._repeated import remembers_inference
from bbfast.ops.add_layer_norm import add_layer_norm, check_eps
from bbfast.ops.linear_act import linear_act
from bbfast.reference.mlp import mlp as reference
from bbfast.triton_kernels.mlp_sizes import MOST_CHANNELS
from bbfast.triton_kernels.pointwise_sizes import UNIT

OP = "mlp"
_COMPOSED = dispatch.Choice("torch", ("not a perceptron that the GPU's kernel takes: its layers one after the other",))


# ---- checks ----------------------------------------------------------------------------------------------


def _check(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, layer_scale, residual, norm_eps, act):
    _common.check_tensor("x", x)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must be [N, ..., C] with at least one channel, got shape {tuple(x.shape)}")
    channels = x.shape[-1]
    _check_weight("fc1_weight", fc1_weight, x, "[hidden, C]")
    hidden = fc1_weight.shape[0]
    if not hidden or fc1_weight.shape[1] != channels:
        raise ValueError(f"fc1_weight must be [hidden, C] with C={channels} as in x, got {tuple(fc1_weight.shape)}")
    _check_weight("fc2_weight", fc2_weight, x, "[C, hidden]")
    if tuple(fc2_weight.shape) != (channels, hidden):
        raise ValueError(
            f"fc2_weight must be [C, hidden], {(channels, hidden)} with this fc1_weight, got {tuple(fc2_weight.shape)}"
        )
    _common.check_channel_vectors({"fc1_bias": fc1_bias}, hidden, x)
    vectors = {"fc2_bias": fc2_bias, "norm_weight": norm_weight, "norm_bias": norm_bias, "layer_scale": layer_scale}
    _common.check_channel_vectors(vectors, channels, x)
    dtypes = {"fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    # Autocast leaves what the norm reads alone.
    if norm_eps is None or _common.autocast_dtype(x.device.type) is None:
        dtypes["x"] = x
    for name, tensor in dtypes.items():
        if tensor is not None and tensor.dtype != fc1_weight.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but fc1_weight has {fc1_weight.dtype}; convert one of them"
            )
    if norm_eps is not None:
        check_eps("norm_eps", norm_eps)
    elif norm_weight is not None or norm_bias is not None:
        raise ValueError("norm_weight and norm_bias need a norm, got norm_eps=None, which means none")
    if residual is not None:
        _common.check_tensor("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        _common.check_same_device("residual", residual, x)
    _common.check_act(act)


def _check_weight(name, weight, x, layout):
    _common.check_tensor(name, weight, rank=2, layout=layout)
    _common.check_same_device(name, weight, x)


# ---- backends --------------------------------------------------------------------------------------------


def is_one_kernel(x, fc1_weight, *others: torch.Tensor | None) -> bool:
    """Whether `mlp` of these is one kernel, for layers that prepare for it; torch.compile traces this.

    Args:
        x, fc1_weight: as `mlp` takes them, not yet cast for autocast.
        others: all other tensors.
    """
    if dispatch.wants_plain_torch() or _common.needs_grad(x, fc1_weight, *others):
        return False
    if not (x.is_cuda or (x.is_cpu and env.TRITON_INTERPRET)):
        return False
    dtype = _common.autocast_dtype(x.device.type) or fc1_weight.dtype
    return not _unsuitable_reasons(x, dtype, fc1_weight.shape, *others)


def _unsuitable_reasons(x, dtype, fc1_shape, *others) -> list[str]:
    reasons = []
    hidden, channels = fc1_shape
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"layers have dtype {dtype}; the kernel's tensor cores take float16 and bfloat16")
    if x.is_cpu and dtype == torch.bfloat16:
        reasons.append("Triton's interpreter cannot multiply matrices of bfloat16")
    if channels % UNIT or hidden % UNIT:
        reasons.append(f"{channels} channels and {hidden} hidden units; the kernel takes multiples of {UNIT}")
    if channels > MOST_CHANNELS:
        reasons.append(f"{channels} channels; above {MOST_CHANNELS} two kernels are faster")
    if any(tensor is not None and tensor.dtype not in _common.KERNEL_DTYPES for tensor in (x, *others)):
        reasons.append("a tensor is none of float32, float16 and bfloat16, which the kernel takes")
    return reasons


def _triton_unsupported_reasons(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, layer_scale, residual, norm_eps, act
) -> list[str]:
    others = (norm_weight, norm_bias, layer_scale, residual)
    reasons = dispatch.triton_unavailable_reasons(x)
    reasons += _unsuitable_reasons(x, fc1_weight.dtype, fc1_weight.shape, *others)
    return reasons + _pointwise.row_reasons(x.numel() // x.shape[-1])


def _run_triton(x, fc1_weight, *args):
    from bbfast.triton_kernels import mlp as kernels

    *_, layer_scale, residual, _norm_eps, _act = args
    return kernels.forward(x, fc1_weight, *args, _dtype(fc1_weight, layer_scale, residual))


_FORWARD_KERNELS = (dispatch.Backend("triton", _triton_unsupported_reasons, _run_triton),)


# ---- torch.library ---------------------------------------------------------------------------------------


def _dtype(fc1_weight, layer_scale, residual) -> torch.dtype:
    dtype = scaled_dtype(fc1_weight, layer_scale)
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)


def _impl(*args):
    run = reference if args[0].numel() == 0 else dispatch.select(OP, _FORWARD_KERNELS, reference, *args)
    return run(*args).contiguous()


def _fake(x, fc1_weight, *args):
    *_, layer_scale, residual, _norm_eps, _act = args
    return x.new_empty(x.shape, dtype=_dtype(fc1_weight, layer_scale, residual))


_op = _common.define(
    f"{OP}(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor? layer_scale, Tensor? residual, float? norm_eps, str act) -> Tensor",
    _impl,
    _fake,
)


def _compose(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, layer_scale, residual, norm_eps, act
) -> torch.Tensor:
    """The same of other ops, on any device, with gradients."""
    if norm_eps is not None:
        _, x = add_layer_norm(x, None, norm_weight, norm_bias, eps=norm_eps)
    hidden = linear_act(x, fc1_weight, fc1_bias, act=act)
    return linear_act(hidden, fc2_weight, fc2_bias, act="identity", layer_scale=layer_scale, residual=residual)


# ---- public function -------------------------------------------------------------------------------------


@_common.overridable
@remembers_inference
def mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    act: str = "gelu",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float | None = None,
    layer_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + layer_scale * fc2(act(fc1(layer_norm(x))))`, in inference on a GPU one kernel where C is small.

    That is so where the weights are float16 or bfloat16, C and hidden are multiples of 8, and C is up to 128.
    Otherwise, and with gradients, `add_layer_norm` and `linear_act` run one after the other.

    Args:
        x: `[N, ..., C]`, float32, float16, bfloat16 or float64, in any strides; where rows of C side-by-side elements
            do not lie a fixed distance apart, the GPU's kernel copies it first.
        fc1_weight: `[hidden, C]`, dtype of x.
        fc2_weight: `[C, hidden]`, dtype of x.
        fc1_bias, fc2_bias: `[hidden]` and `[C]`, dtype of x, or None.
        act: identity, relu, relu6, hardswish, silu or gelu (erf).
        norm_weight, norm_bias: `[C]`, any of the dtypes, or None for 1 and 0.
        norm_eps: added to the variance; None for no norm.
        layer_scale: `[C]`, any of the dtypes, or None for 1.
        residual: `[N, ..., C]`, any of the dtypes, or None; often x itself.

    Returns:
        y `[N, ..., C]` in the dtype that torch's promotion gives the expression.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, an unknown act, a norm's weight without norm_eps, devices that differ;
            named in the message.

    Numerics:
        The GPU's kernel computes mean and (biased) variance in float32, sums in float32, and rounds the normalised x,
        the hidden layer and y once each; torch rounds after each operator. Its gelu is right to 6e-4 of itself for
        values above -5. Under autocast weights and biases are cast as for torch's linear, x only without a norm, which
        is float32 there. Deterministic.
    """
    given = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, layer_scale, residual)
    layers = _common.to_autocast_dtype(*given[:5])
    args = (*(layers if norm_eps is None else (x, *layers[1:])), *given[5:], norm_eps, act)
    _check(*args)
    if dispatch.wants_plain_torch():
        return reference(*args)
    if is_one_kernel(x, fc1_weight, norm_weight, norm_bias, layer_scale, residual, fc1_bias, fc2_weight, fc2_bias):
        return _op(*args[:-2], None if norm_eps is None else float(norm_eps), act)
    if not _common.needs_grad(*given) and not torch.compiler.is_compiling():
        dispatch.record(OP, _COMPOSED)
    return _compose(*args)
