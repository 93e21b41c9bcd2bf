"""The Swin layer of transformers, of which several of its models have a copy, on the op for shifted windows.

Foreign layers pad a map, roll it, cut it into windows, attend in each, and do all of that backwards; the op gathers
windows where they lie. Layers whose attention keeps q, k and v in `attention.self` are `ShiftedWindowLayer`s here; the
newer one of Swin itself stands in transformers_swin.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from bbfast import ops
from bbfast.nn import linear
from bbfast.swap._blocks import draw_mask
from bbfast.swap._fast import Fast
from bbfast.swap._lending import has_hooks, lender


@dataclass(frozen=True)
class Attention:
    """A foreign attention's parts in the words of the op."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    table: torch.Tensor
    num_heads: int
    head_dim: int
    window_size: tuple[int, int]

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value, self.output


# ---- linear layers ---------------------------------------------------------------------------------------------------


def lent_projections(projections: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Those of the linear layers around the attention that must be as plain as lent ones.

    Linear layers with something to them (LoRA, quantised, parametrized) are called on the map; others only seem to be
    called: q, k and v lend their weights, and a hook would not see the windows that it sees in the foreign layer.
    """
    return [(name, layer) for name, layer in projections.items() if not _may_be_called(layer)]


def _may_be_called(layer: nn.Module) -> bool:
    """Whether `layer` does the same to a token of a map as to one of a window, without being a plain linear layer."""
    if type(layer) is nn.Linear or has_hooks(layer) or "forward" in layer.__dict__:
        return False
    origin = type(layer).__module__
    return isinstance(layer, nn.Linear) or ".lora" in origin or origin.startswith("peft.")


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, torch.Tensor)


def projection_objections(projections: dict[str, nn.Module]) -> list[str]:
    """Why linear layers that could lend cannot stand where they stand."""
    strangers = {name: type(layer) for name, layer in projections.items() if not _acts_on_tokens(layer)}
    return [
        f"{name} is a layer of class {cls.__name__}; only linear ones are known there"
        for name, cls in strangers.items()
    ]


def _acts_on_tokens(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or _may_be_called(layer)


def needs_windows(attention: Attention, dropouts: Iterable[nn.Module]) -> bool:
    """Whether one of the layers would draw which values it drops, in another order for a map than for windows."""
    layers = [*dropouts, *attention.projections]
    found = (module for layer in layers for module in layer.modules() if isinstance(module, _DropoutNd))
    return any(dropout.training and dropout.p for dropout in found)


# ---- attention -------------------------------------------------------------------------------------------------------


def attend(attention: Attention, x: torch.Tensor, window_size: int, shift_size: int) -> torch.Tensor:
    """`[B, H, W, C]` of normalised tokens to what the foreign attention makes of them, before any dropout."""
    height, width = x.shape[1:3]
    layers = attention.projections[:3]
    if all(_is_plain(layer) for layer in layers) and len({layer.bias is None for layer in layers}) == 1:
        qkv, qkv_bias = _packed(layers, x)
    else:  # Padding goes through the layers, too: nobody else knows what they make of zeros.
        x = F.pad(x, (0, 0, 0, -width % window_size, 0, -height % window_size))
        qkv, qkv_bias = torch.cat([layer(x) for layer in layers], dim=-1), None
    y = ops.window_attention(
        qkv,
        attention.table,
        num_heads=attention.num_heads,
        window_size=window_size,
        shift_size=shift_size,
        scale=attention.head_dim**-0.5,
        qkv_bias=qkv_bias,
        pad_order="pad_then_shift",
    )
    return attention.output(y[:, :height, :width])


def _packed(layers: tuple[nn.Linear, ...], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q, k and v of each token side by side, and their bias.

    Either the weights are put together, which copies 3 C x C values and makes one product of three, or the results,
    which copies 3 C values of each token. Weights are cheaper but for very few tokens (one image in the last stage).
    A compiled graph takes the weights, lest it be bound to sizes of one kind.
    """
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)
    if torch.compiler.is_compiling() or x.shape[:3].numel() >= x.shape[3]:
        return linear(x, torch.cat([layer.weight for layer in layers]), bias), bias
    return torch.cat([linear(x, layer.weight, layer.bias) for layer in layers], dim=-1), bias


def fits(layer: nn.Module, attention: Attention) -> bool:
    """Whether the layer's window, which shrinks for good with a smaller map, is still the one that the bias is for."""
    window_size = layer.window_size
    return isinstance(window_size, int) and (window_size, window_size) == attention.window_size


def add_and_normalise(layer: nn.Module, shortcut: torch.Tensor, branch: torch.Tensor):
    """`x = shortcut + drop_path(branch)` and `layernorm_after(x)`, `[B, H * W, C]` each, as one op."""
    branch = branch.view(shortcut.shape)
    norm, mask = layer.layernorm_after, draw_mask(layer.drop_path, branch)
    return ops.add_layer_norm(shortcut, branch, norm.weight, norm.bias, mask=mask, eps=norm.eps)


def normalised_map(layer: nn.Module, hidden_states: torch.Tensor, input_dimensions: tuple[int, int]) -> torch.Tensor:
    """`layernorm_before(hidden_states)` as `[B, H, W, C]`."""
    batch, _, channels = hidden_states.shape
    return layer.layernorm_before(hidden_states).view(batch, *input_dimensions, channels)


# ---- the older kind of layer -------------------------------------------------------------------------------


def windowed_lenders(*classes: type[nn.Module]) -> None:
    """Says that these classes of attention, self-attention and what follows it can lend."""
    for cls in classes:
        lender(cls, relies_on=(f"{cls.__module__}.{cls.__qualname__}.transpose_for_scores",))


def functions_of(layer: type[nn.Module]) -> tuple[str, ...]:
    """What the forward of such a layer calls, wherever a release has it."""
    module = layer.__module__
    methods = ("set_shift_and_window_size", "get_attn_mask", "maybe_pad")
    functions = (f"{module}.window_partition", f"{module}.window_reverse")
    return (*(f"{module}.{layer.__name__}.{name}" for name in methods), *functions)


def argument_names(layer: type[nn.Module]) -> tuple[str, ...]:
    """Of the layer's forward; releases differ in how many there are."""
    return tuple(inspect.signature(layer.forward).parameters)[1:]


def _read(attention: nn.Module) -> Attention:
    inner = attention.self
    return Attention(
        query=inner.query,
        key=inner.key,
        value=inner.value,
        output=attention.output.dense,
        table=inner.relative_position_bias_table,
        num_heads=inner.num_attention_heads,
        head_dim=inner.attention_head_size,
        window_size=tuple(inner.window_size),
    )


def _projections(attention: nn.Module) -> dict[str, nn.Module]:
    inner = {f"attention.self.{name}": getattr(attention.self, name) for name in ("query", "key", "value")}
    return {**inner, "attention.output.dense": attention.output.dense}


class ShiftedWindowLayer(Fast):
    """Kind of block: attention gathers shifted windows where they lie; the sum after it and the norm are one op.

    Weights of the attention that somebody asks for, masked heads, and features that would be dropped in windows need
    the foreign forward.

    Attributes:
        takes: names of the foreign forward's arguments.
    """

    takes: tuple[str, ...] = ()
    drops = ("drop_path",)

    @classmethod
    def lent(cls, block):
        attention, inner, output = block.attention, block.attention.self, block.attention.output
        return [
            ("attention", attention),
            ("attention.self", inner),
            ("attention.self.dropout", inner.dropout),
            ("attention.output", output),
            ("attention.output.dropout", output.dropout),
            *lent_projections(_projections(attention)),
            ("layernorm_after", block.layernorm_after),
            *super().lent(block),
        ]

    @classmethod
    def objections(cls, block):
        return projection_objections(_projections(block.attention))

    def fused_forward(self, *args, **kwargs):
        given = {**dict(zip(self.takes, args)), **kwargs}
        attention = _read(self.attention)
        dropouts = (self.attention.self.dropout, self.attention.output.dropout)
        if given.get("output_attentions") or given.get("head_mask") is not None:
            return super(Fast, self).forward(*args, **kwargs)
        if needs_windows(attention, dropouts):
            return super(Fast, self).forward(*args, **kwargs)
        hidden_states, input_dimensions = given["hidden_states"], given["input_dimensions"]
        if not given.get("always_partition") and hasattr(self, "set_shift_and_window_size"):
            self.set_shift_and_window_size(input_dimensions)
        if not fits(self, attention):
            return super(Fast, self).forward(*args, **kwargs)
        branch = normalised_map(self, hidden_states, input_dimensions)
        branch = attend(attention, branch, self.window_size, self.shift_size)
        hidden_states, normalised = add_and_normalise(self, hidden_states, branch)
        return (hidden_states + self.output(self.intermediate(normalised)),)
