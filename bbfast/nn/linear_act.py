"""Linear layer + activation + layer scale + residual as a layer, and for modules that a model keeps apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import has_torch_function_unary

from bbfast import ops
from bbfast.reference.activation import activation

_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.Identity: "identity"}


class LinearAct(nn.Linear):
    """`residual + layer_scale * act(linear(x))` as one op, with nn.Linear's parameters, keys and initial values.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        act: identity, relu, relu6, hardswish, silu or gelu (erf).
        device, dtype: of the parameters.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, act: str = "gelu", device=None, dtype=None
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.act = act

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, layer_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tensors and result are those of `bbfast.ops.linear_act`."""
        return ops.linear_act(x, self.weight, self.bias, act=self.act, residual=residual, layer_scale=layer_scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear: as an op on the CPU, where that has a quicker product, and on a GPU cuBLAS's, as torch has it."""
    return ops.linear_act(x, weight, bias, act="identity") if _is_on_cpu(x) else F.linear(x, weight, bias)


def apply_linear(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` as `linear` has it, as far as the layer only lends its parameters; see `apply_linear_act`."""
    return apply_linear_act(layer, x) if _is_on_cpu(x) else layer(x)


def _is_on_cpu(x: torch.Tensor) -> bool:
    """False for what only stands for a tensor, such as torch.fx traces with."""
    return not has_torch_function_unary(x) and x.is_cpu


def apply_linear_act(
    linear: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    act: nn.Module | str = "identity",
    residual: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + layer_scale * act(linear(x))` as one op, as far as the modules only lend their parameters.

    Args:
        linear: an nn.Linear, or a 1x1 nn.Conv2d, which only lends its parameters here. Anything else (adapters,
            quantised layers), and an nn.Linear with hooks or a weight that stands for others, is called.
        x: `[..., K]`.
        act: by the ops' name, or a module, which is called unless it is a plain one that the ops know.
        residual, layer_scale: see `bbfast.ops.linear_act`.
    """
    name = activation_name(act)
    if name is None:
        y = act(apply_linear_act(linear, x))
    elif (weight := lent_weight(linear)) is not None:
        return ops.linear_act(x, weight, linear.bias, act=name, residual=residual, layer_scale=layer_scale)
    else:
        y = activation(linear(x), name)
    y = y if layer_scale is None else y * layer_scale
    return y if residual is None else residual + y


def lent_weight(linear: Callable) -> torch.Tensor | None:
    """`[N, K]` of a layer that only lends its parameters; None for what must be called."""
    # Asked of the module, not of the weight: torch.fx does not know a weight's dimensions.
    if isinstance(linear, nn.Conv2d):
        return linear.weight.flatten(1)
    return linear.weight if type(linear) is nn.Linear and is_bare(linear) and _is_plain(linear.weight) else None


def activation_name(act: nn.Module | str) -> str | None:
    """The ops' name of an activation, or of a module that does nothing but one they know, else None."""
    if isinstance(act, str):
        return act
    if not is_bare(act):
        return None
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else None
    return _ACTIVATIONS.get(type(act))


def is_bare(module: nn.Module) -> bool:
    """Whether calling it runs its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or "forward" in module.__dict__ or has_global_hooks():
        return False
    # Dynamo makes no guard of `"forward" in module.__dict__`, and would miss one that comes after compiling.
    return not torch.compiler.is_compiling() or inspect.ismethod(module.forward)


def has_global_hooks() -> bool:
    """Whether something is hung on the calls of all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def only_runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling it runs the forward of `cls`, not a subclass's, and nothing else."""
    return isinstance(module, cls) and type(module).forward is cls.forward and is_bare(module)


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether it holds its values itself, unlike a quantised or a sharded one of a class of its own."""
    return not hasattr(type(weight), "__tensor_flatten__")
