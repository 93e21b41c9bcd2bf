"""What fast classes are made of: fused ops on the modules that a foreign block holds.

Adapters say what their library's modules mean by entering readers into the tables below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from bbfast import ops
from bbfast.nn import apply_conv_bn_act, apply_depthwise_conv_bn_act, apply_gate, apply_mlp, squeeze_excite_gate
from bbfast.nn.mlp import mlp_is_one_kernel
from bbfast.swap._lending import can_lend, have_own_call

Padding = str | tuple[int, int, int, int] | None  # in the words of the ops; None for the convolution's own

# ---- readers, by the exact class of a module ---------------------------------------------------------------

# The padding that the op shall use: None for the convolution's own.
CONVS: dict[type[nn.Module], Callable[[nn.Module], str | None]] = {}
# (BatchNorm or None, the activation that runs at its end: a module, the ops' name, or None).
NORMS: dict[type[nn.Module], Callable[[nn.Module], tuple[nn.Module | None, nn.Module | str | None]]] = {}
# The ops' name of an activation, None where they know none for this one.
ACTIVATIONS: dict[type[nn.Module], Callable[[nn.Module], str | None]] = {}
# Draws what each sample of a branch is multiplied by, `[N]`: takes the module, the branch and the dtype of the mask.
DROP_PATHS: dict[type[nn.Module], Callable[[nn.Module, torch.Tensor, torch.dtype], torch.Tensor]] = {}
# (conv_reduce, activation between, conv_expand, gate by the name in `bbfast.nn.apply_squeeze_excite`), names None where
# none is known; None for a module that does something else besides.
SQUEEZE_EXCITES: dict[
    type[nn.Module], Callable[[nn.Module], tuple[nn.Module, str | None, nn.Module, str | None] | None]
] = {}


def inner(module: nn.Module, name: str) -> nn.Module | None:
    """`getattr(module, name, None)`, ten times as quick where that is an inner module: most of these are."""
    found = module._modules.get(name)
    return getattr(module, name, None) if found is None else found


# (first layer, activation, second layer, what stands around them and does nothing outside of training).
PERCEPTRONS: dict[
    type[nn.Module], Callable[[nn.Module], tuple[nn.Module, nn.Module, nn.Module, list[nn.Module]] | None]
] = {}


def activation_name(act: nn.Module | str | None) -> str | None:
    """The ops' name of `act`, which may be that name; "identity" for None, None for one that they do not know."""
    if act is None:
        return "identity"
    if isinstance(act, str):
        return act
    read = ACTIVATIONS.get(type(act))
    return None if read is None else read(act)


def lent_activation(name: str, act: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """What a fast class has to say that it lends: an activation that the ops know, and no other, which runs itself."""
    return [] if act is None or activation_name(act) is None else [(name, act)]


def lent_squeeze_excite(name: str, squeeze_excite: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """The same for squeeze-and-excite; where its activation or gate is not known, it runs itself."""
    return [] if _read_squeeze_excite(squeeze_excite) is None else [(name, squeeze_excite)]


def lent_identity(name: str, layer: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """The same for a layer that is called unless it does nothing."""
    return [(name, layer)] if type(layer) is nn.Identity else []


def _read_squeeze_excite(squeeze_excite: nn.Module | None):
    read = SQUEEZE_EXCITES.get(type(squeeze_excite))
    parts = None if read is None else read(squeeze_excite)
    if parts is None:
        return None
    reduce, act, expand, gate = parts
    return None if act is None or gate is None or not (_is_linear(reduce) and _is_linear(expand)) else parts


def _is_linear(conv: nn.Module) -> bool:
    """Whether it is a convolution that does to each pixel what a linear layer does."""
    if type(conv) is not nn.Conv2d or conv.kernel_size != (1, 1) or conv.stride != (1, 1):
        return False
    return conv.padding == (0, 0) and conv.groups == 1


# ---- convolutions ------------------------------------------------------------------------------------------


class Gated(NamedTuple):
    """Maps `[N, C, H, W]` that whoever takes them multiplies by `gate` [N, C]; they may be overwritten then."""

    maps: torch.Tensor
    gate: torch.Tensor

    def product(self) -> torch.Tensor:
        return apply_gate(self.maps, self.gate, inplace=True)


def product(x: torch.Tensor | Gated) -> torch.Tensor:
    return x.product() if isinstance(x, Gated) else x


def conv_norm_act(
    x: torch.Tensor | Gated,
    conv: nn.Module,
    norm: nn.Module | None = None,
    act: nn.Module | None = None,
    *,
    residual: torch.Tensor | None = None,
    in_place: bool = False,
    padding: Padding = None,
) -> torch.Tensor:
    """`act(norm(conv(x)) + residual)`; norm may hold an activation itself, unknown activations run afterwards.

    Args:
        in_place: whether the foreign block adds to the branch in place, so that under autocast the sum has the branch's
            dtype, where it would else have the wider one of the two.
        padding: takes the place of the convolution's own.
    """
    if type(conv) not in CONVS or not (norm is None or type(norm) in NORMS):  # somebody put others in their places
        return _one_after_the_other(product(x), conv, norm, act, residual)
    bn, own_act = (None, None) if norm is None else NORMS[type(norm)](norm)
    # A norm's own activation comes before the sum, and the op would narrow a wider residual.
    if residual is not None and (not _is_identity(own_act) or not (in_place or _has_autocast_dtype(residual))):
        y = conv_norm_act(x, conv, norm, padding=padding)
        y = y.add(residual).to(y.dtype) if in_place else y + residual
        return y if act is None else act(y)
    name, tails = _split(own_act, act)
    x, gate = x if isinstance(x, Gated) else (x, None)
    x = _in_layout_of_output(x, conv)
    padding = CONVS[type(conv)](conv) if padding is None else padding
    if residual is None and gate is None and is_depthwise(conv):
        y = apply_depthwise_conv_bn_act(conv, bn, x, act=name, padding=padding)
    else:
        y = apply_conv_bn_act(conv, bn, x, act=name, padding=padding, residual=residual, gate=gate)
    for tail in tails:
        y = tail(y)
    return y


def conv_norm_act_squeeze_excite(
    x: torch.Tensor | Gated,
    conv: nn.Module,
    norm: nn.Module | None,
    act: nn.Module | None,
    squeeze_excite: nn.Module | None,
    *,
    padding: Padding = None,
) -> torch.Tensor | Gated:
    """`squeeze_excite(act(norm(conv(x))))`; a depthwise convolution hands out the means that it needs.

    What comes back is for `conv_norm_act`, which may take the gate along; for anybody else there is `product`.
    """
    parts = _read_squeeze_excite(squeeze_excite)
    if parts is None:
        y = conv_norm_act(x, conv, norm, act, padding=padding)
        return y if squeeze_excite is None else squeeze_excite(y)
    y, means = _with_means(product(x), conv, norm, act, padding)
    reduce, inner_act, expand, gate = parts
    return Gated(y, squeeze_excite_gate(means, reduce, expand, act=inner_act, gate=gate))


def _with_means(x: torch.Tensor, conv: nn.Module, norm, act, padding: Padding) -> tuple[torch.Tensor, torch.Tensor]:
    """`act(norm(conv(x)))` and its means over H and W, which a depthwise op has at hand."""
    if type(conv) in CONVS and is_depthwise(conv) and (norm is None or type(norm) in NORMS):
        bn, own_act = (None, None) if norm is None else NORMS[type(norm)](norm)
        name, tails = _split(own_act, act)
        if not tails:
            padding = CONVS[type(conv)](conv) if padding is None else padding
            return apply_depthwise_conv_bn_act(conv, bn, x, act=name, padding=padding, squeeze=True)
    y = conv_norm_act(x, conv, norm, act, padding=padding)
    return y, y.mean((2, 3))


def _one_after_the_other(x: torch.Tensor, conv: nn.Module, norm, act, residual: torch.Tensor | None) -> torch.Tensor:
    y = conv(x)
    y = y if norm is None else norm(y)
    y = y if residual is None else y + residual
    return y if act is None else act(y)


def _is_identity(act: nn.Module | str | None) -> bool:
    return act is None or activation_name(act) == "identity"


def _split(first: nn.Module | str | None, second: nn.Module | None) -> tuple[str, list[nn.Module]]:
    """(what the op does of these activations, the modules that have to run after it)."""
    if _is_identity(first):
        first, second = second, None
    name = activation_name(first)
    tails = [] if _is_identity(second) else [second]
    return ("identity", [first, *tails]) if name is None else (name, tails)


def _in_layout_of_output(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    """torch's convolutions return channels_last if either x or the weight is; ours go by x."""
    weight, channels_last = conv._parameters.get("weight"), torch.channels_last
    weight = conv.weight if weight is None else weight  # it takes ten times as long
    if weight.is_contiguous() or not weight.is_contiguous(memory_format=channels_last):
        return x
    return x.contiguous(memory_format=channels_last) if x.is_contiguous() else x


def _has_autocast_dtype(x: torch.Tensor) -> bool:
    """Whether autocast is off, or leaves x as it is."""
    device = x.device.type
    return not torch.is_autocast_enabled(device) or x.dtype == torch.get_autocast_dtype(device)


def is_depthwise(conv: nn.Module) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


# ---- perceptrons -------------------------------------------------------------------------------------------


def add_perceptron(
    shortcut: torch.Tensor,
    x: torch.Tensor,
    mlp: nn.Module,
    drop_path: nn.Module | None,
    layer_scale: torch.Tensor | None = None,
    norm: nn.Module | None = None,
) -> torch.Tensor:
    """`shortcut + drop_path(mlp(norm(x)) * layer_scale)` on `[N, ..., C]`.

    A perceptron that is known, and that nobody hung anything on, is two ops, of which the second takes the sum along,
    or one that takes everything.
    """
    parts = None if draws(drop_path) else _parts(mlp)
    if parts is None:
        branch = mlp(x if norm is None else norm(x))
        shape = shortcut.shape
        pixels = (tensor.flatten(1, -2) for tensor in (shortcut, branch))  # a video has more axes than the op takes
        return add_branch(*pixels, drop_path, layer_scale, channel_dim=-1).reshape(shape)
    return two_layers(x, *parts, shortcut, layer_scale, norm)


def two_layers(
    x: torch.Tensor,
    first: nn.Module,
    act: nn.Module,
    second: nn.Module,
    shortcut: torch.Tensor,
    layer_scale: torch.Tensor | None = None,
    norm: nn.Module | None = None,
) -> torch.Tensor:
    """`shortcut + second(act(first(norm(x)))) * layer_scale`; what somebody changed or hung something on is called."""
    if norm is not None and not can_lend([norm]):
        norm, x = None, norm(x)
    name = None if have_own_call([act]) else activation_name(act)
    act = act if name is None else name
    return apply_mlp(norm, first, act, second, x, residual=shortcut, layer_scale=layer_scale)


def perceptron_is_one_kernel(x: torch.Tensor, norm: nn.Module, mlp: nn.Module, *drop_paths: nn.Module | None) -> bool:
    """Whether `x + mlp(norm(x))` is one kernel now, which the sum that makes x should then leave to normalise."""
    parts = None if any(draws(drop_path) for drop_path in drop_paths) else _parts(mlp)
    if parts is None or not can_lend([norm]):
        return False
    first, act, second = parts
    return mlp_is_one_kernel(norm, first, activation_name(act), second, x, residual=x)


def _parts(mlp: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """First layer, activation and second layer of a perceptron that may run as ops; None for another."""
    read = PERCEPTRONS.get(type(mlp))
    parts = None if read is None else read(mlp)
    return parts[:3] if parts is not None and _can_run_as_ops(mlp, *parts) else None


def _can_run_as_ops(mlp: nn.Module, first: nn.Module, act: nn.Module, second: nn.Module, idle: list) -> bool:
    if type(first) is not nn.Linear or type(second) is not nn.Linear or activation_name(act) is None:
        return False
    if any(type(layer) is not nn.Identity and (layer.training and layer.p) for layer in idle):
        return False
    return can_lend([mlp, first, act, second, *idle])


# ---- branches that are added -------------------------------------------------------------------------------


def draw_mask(drop_path: nn.Module | None, branch: torch.Tensor, layer_scale=None) -> torch.Tensor | None:
    """What each sample of `branch * layer_scale` is multiplied by in this call, `[N]`; None for 1."""
    if not draws(drop_path):
        return None
    dtype = branch.dtype if layer_scale is None else torch.promote_types(branch.dtype, layer_scale.dtype)
    return DROP_PATHS[type(drop_path)](drop_path, branch, dtype)


def add_branch(
    shortcut: torch.Tensor,
    branch: torch.Tensor,
    drop_path: nn.Module | None,
    layer_scale: torch.Tensor | None = None,
    channel_dim: int = 1,
) -> torch.Tensor:
    """`shortcut + drop_path(branch * layer_scale)` as one op."""
    mask = draw_mask(drop_path, branch, layer_scale)
    return ops.drop_path_add(shortcut, branch, layer_scale=layer_scale, channel_dim=channel_dim, mask=mask)


def conv_norm_add(
    x: torch.Tensor | Gated, conv: nn.Module, norm: nn.Module, shortcut: torch.Tensor, drop_path: nn.Module | None
) -> torch.Tensor:
    """`shortcut + drop_path(norm(conv(x)))`, which without anything to drop is one op."""
    own_act = NORMS[type(norm)](norm)[1] if type(norm) in NORMS else norm
    if draws(drop_path) or activation_name(own_act) != "identity":
        return add_branch(shortcut, conv_norm_act(x, conv, norm), drop_path)
    return conv_norm_act(x, conv, norm, residual=shortcut)


def draws(drop_path: nn.Module | None) -> bool:
    """Whether `drop_path` would draw a mask now."""
    return drop_path is not None and drop_path.training and type(drop_path) is not nn.Identity
