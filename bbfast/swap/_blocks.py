"""What fast classes are made of: fused ops on the modules that a foreign block holds.

Adapters say what their library's modules mean by entering readers into the tables below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bbfast import ops
from bbfast.nn import apply_conv_bn_act, apply_depthwise_conv_bn_act, apply_squeeze_excite

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
# none is known.
SQUEEZE_EXCITES: dict[type[nn.Module], Callable[[nn.Module], tuple[nn.Module, str | None, nn.Module, str | None]]] = {}


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


def _read_squeeze_excite(squeeze_excite: nn.Module | None):
    read = SQUEEZE_EXCITES.get(type(squeeze_excite))
    parts = None if read is None else read(squeeze_excite)
    return None if parts is None or None in parts[1::2] else parts


# ---- convolutions ------------------------------------------------------------------------------------------


def conv_norm_act(
    x: torch.Tensor,
    conv: nn.Module,
    norm: nn.Module | None = None,
    act: nn.Module | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(norm(conv(x)) + residual)`; norm may hold the activation itself, an unknown activation runs afterwards."""
    bn, name, tail = _read(norm, act)
    if residual is None and _is_depthwise(conv):
        y = apply_depthwise_conv_bn_act(conv, bn, x, act=name, padding=CONVS[type(conv)](conv))
    else:
        y = apply_conv_bn_act(conv, bn, x, act=name, padding=CONVS[type(conv)](conv), residual=residual)
    return y if tail is None else tail(y)


def conv_norm_act_squeeze_excite(
    x: torch.Tensor, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, squeeze_excite: nn.Module | None
) -> torch.Tensor:
    """`squeeze_excite(act(norm(conv(x))))`; a depthwise convolution hands out the means that it needs."""
    bn, name, tail = _read(norm, act)
    parts = _read_squeeze_excite(squeeze_excite)
    if parts is None or tail is not None or not _is_depthwise(conv):
        y = conv_norm_act(x, conv, norm, act)
        return y if squeeze_excite is None else squeeze_excite(y)
    reduce, inner_act, expand, gate = parts
    y, means = apply_depthwise_conv_bn_act(conv, bn, x, act=name, padding=CONVS[type(conv)](conv), squeeze=True)
    return apply_squeeze_excite(y, means, reduce, expand, act=inner_act, gate=gate, inplace=True)


def _read(norm: nn.Module | None, act: nn.Module | None) -> tuple[nn.Module | None, str, nn.Module | None]:
    """(BatchNorm, the activation that the op does, the module that has to run after it or None)."""
    bn, own_act = (None, None) if norm is None else NORMS[type(norm)](norm)
    act = act if own_act is None else own_act
    name = activation_name(act)
    return (bn, "identity", act) if name is None else (bn, name, None)


def _is_depthwise(conv: nn.Module) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


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
    x: torch.Tensor, conv: nn.Module, norm: nn.Module, shortcut: torch.Tensor, drop_path: nn.Module | None
) -> torch.Tensor:
    """`shortcut + drop_path(norm(conv(x)))`, which without anything to drop is one op."""
    _, own_act = NORMS[type(norm)](norm)
    if draws(drop_path) or activation_name(own_act) != "identity":
        return add_branch(shortcut, conv_norm_act(x, conv, norm), drop_path)
    return conv_norm_act(x, conv, norm, residual=shortcut)


def draws(drop_path: nn.Module | None) -> bool:
    """Whether `drop_path` would draw a mask now."""
    return drop_path is not None and drop_path.training and type(drop_path) is not nn.Identity
