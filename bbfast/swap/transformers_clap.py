"""CLAP's copy of the Swin layer, in transformers."""

from transformers.models.clap import modeling_clap
from transformers.models.clap.modeling_clap import (
    ClapAudioAttention,
    ClapAudioLayer,
    ClapAudioSelfAttention,
    ClapAudioSelfOutput,
)

from bbfast.swap._fast import register
from bbfast.swap.transformers_layers import drop_path_lender
from bbfast.swap.transformers_windows import ShiftedWindowLayer, argument_names, functions_of, windowed_lenders

drop_path_lender(modeling_clap, "ClapDropPath")
windowed_lenders(ClapAudioAttention, ClapAudioSelfAttention, ClapAudioSelfOutput)


@register
class FastClapAudioLayer(ShiftedWindowLayer, ClapAudioLayer):
    """Attention gathers shifted windows where they lie; the sum after it and the norm are one op."""

    relies_on = functions_of(ClapAudioLayer)
    takes = argument_names(ClapAudioLayer)
