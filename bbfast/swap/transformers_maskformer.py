"""MaskFormer's copy of the Swin layer, in transformers."""

from transformers.models.maskformer import modeling_maskformer_swin
from transformers.models.maskformer.modeling_maskformer_swin import (
    MaskFormerSwinAttention,
    MaskFormerSwinLayer,
    MaskFormerSwinSelfAttention,
    MaskFormerSwinSelfOutput,
)

from bbfast.swap._fast import register
from bbfast.swap.transformers_layers import drop_path_lender
from bbfast.swap.transformers_windows import ShiftedWindowLayer, argument_names, functions_of, windowed_lenders

drop_path_lender(modeling_maskformer_swin, "MaskFormerDropPath", "MaskFormerSwinDropPath")
windowed_lenders(MaskFormerSwinAttention, MaskFormerSwinSelfAttention, MaskFormerSwinSelfOutput)


@register
class FastMaskFormerSwinLayer(ShiftedWindowLayer, MaskFormerSwinLayer):
    """Attention gathers shifted windows where they lie; the sum after it and the norm are one op."""

    relies_on = functions_of(MaskFormerSwinLayer)
    takes = argument_names(MaskFormerSwinLayer)
