"""Donut's copy of the Swin layer, in transformers."""

from transformers.models.donut import modeling_donut_swin
from transformers.models.donut.modeling_donut_swin import (
    DonutSwinAttention,
    DonutSwinLayer,
    DonutSwinSelfAttention,
    DonutSwinSelfOutput,
)

from bbfast.swap._fast import register
from bbfast.swap.transformers_layers import drop_path_lender
from bbfast.swap.transformers_windows import ShiftedWindowLayer, argument_names, functions_of, windowed_lenders

drop_path_lender(modeling_donut_swin, "DonutDropPath", "DonutSwinDropPath")
windowed_lenders(DonutSwinAttention, DonutSwinSelfAttention, DonutSwinSelfOutput)


@register
class FastDonutSwinLayer(ShiftedWindowLayer, DonutSwinLayer):
    """Attention gathers shifted windows where they lie; the sum after it and the norm are one op."""

    relies_on = functions_of(DonutSwinLayer)
    takes = argument_names(DonutSwinLayer)
