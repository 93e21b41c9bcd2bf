"""Swin of transformers: releases with `attention.self.query`, and those with `attention.q_proj`."""

from __future__ import annotations

import sys

import torch
from transformers.models.swin import modeling_swin
from transformers.models.swin.modeling_swin import SwinAttention, SwinLayer

from bbfast.swap._fast import Fast, register
from bbfast.swap._fingerprint import knows_wrappers_of, of_other_releases
from bbfast.swap._lending import lender
from bbfast.swap.transformers_layers import drop_path_lender
from bbfast.swap.transformers_windows import (
    Attention,
    ShiftedWindowLayer,
    add_and_normalise,
    argument_names,
    attend,
    fits,
    functions_of,
    lent_projections,
    needs_windows,
    normalised_map,
    projection_objections,
    windowed_lenders,
)

if "transformers.modeling_layers" in sys.modules:
    # It wraps the forward of each subclass for checkpointing, a fast one's and, inside of that, the foreign one's.
    knows_wrappers_of("transformers.modeling_layers.GradientCheckpointingLayer.__init_subclass__")

NEWER = hasattr(modeling_swin, "SwinRelativePositionBias")
of_other_releases(
    f"{modeling_swin.__name__}.SwinLayer.cyclic_shift",
    f"{modeling_swin.__name__}.SwinRelativePositionBias.forward",
    f"{modeling_swin.__name__}.SwinSelfAttention.forward",
    f"{modeling_swin.__name__}.SwinSelfAttention.transpose_for_scores",
    f"{modeling_swin.__name__}.SwinSelfOutput.forward",
)
drop_path_lender(modeling_swin, "SwinDropPath")
lender(SwinAttention)


def _read(attention: SwinAttention) -> Attention:
    bias = attention.relative_position_bias
    return Attention(
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        table=bias.relative_position_bias_table,
        num_heads=attention.num_attention_heads,
        head_dim=attention.head_dim,
        window_size=tuple(bias.window_size),
    )


def _projections(attention: SwinAttention) -> dict[str, torch.nn.Module]:
    return {f"attention.{name}": getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


class _SwinLayer(Fast):
    """Kind of block: attention gathers shifted windows where they lie; the sum after it and the norm are one op.

    Where attention is not torch's own, somebody wants it so: "eager" is how the attention's weights are had.
    """

    relies_on = (
        *functions_of(SwinLayer),
        f"{modeling_swin.__name__}.SwinLayer.cyclic_shift",
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
    )

    drops = ("drop_path",)

    @classmethod
    def lent(cls, block):
        attention = block.attention
        return [
            ("attention", attention),
            ("attention.relative_position_bias", attention.relative_position_bias),
            *lent_projections(_projections(attention)),
            ("layernorm_after", block.layernorm_after),
            ("dropout", block.dropout),
            *super().lent(block),
        ]

    @classmethod
    def objections(cls, block):
        reasons = projection_objections(_projections(block.attention))
        name = block.attention.config._attn_implementation
        if name != "sdpa":
            reasons.append(f"its config asks for {name!r} attention; 'sdpa' is what the op can replace")
        return reasons

    def fused_forward(
        self,
        hidden_states: torch.Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs,
    ):
        inner = self.attention
        attention = _read(inner)
        arguments = (hidden_states, input_dimensions, always_partition)
        if kwargs.get("output_attentions"):
            return super(Fast, self).forward(*arguments, **kwargs)
        if inner.training and inner.attention_dropout:
            return super(Fast, self).forward(*arguments, **kwargs)
        if needs_windows(attention, [self.dropout]):
            return super(Fast, self).forward(*arguments, **kwargs)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        if not fits(self, attention):
            return super(Fast, self).forward(*arguments, **kwargs)
        branch = normalised_map(self, hidden_states, input_dimensions)
        branch = attend(attention, branch, self.window_size, self.shift_size)
        hidden_states, normalised = add_and_normalise(self, hidden_states, branch)
        return self.mlp(normalised) + hidden_states, None


if NEWER:
    lender(modeling_swin.SwinRelativePositionBias)

    @register
    class FastSwinLayer(_SwinLayer, SwinLayer):
        """Attention gathers shifted windows where they lie; the sum after it and the norm are one op."""

else:
    windowed_lenders(modeling_swin.SwinSelfAttention, modeling_swin.SwinSelfOutput)

    @register
    class FastSwinLayer(ShiftedWindowLayer, SwinLayer):
        """Attention gathers shifted windows where they lie; the sum after it and the norm are one op."""

        relies_on = functions_of(SwinLayer)
        takes = argument_names(SwinLayer)
