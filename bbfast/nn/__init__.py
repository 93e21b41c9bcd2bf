"""Layers: parameters and train/eval behaviour around the ops."""

from bbfast.nn.add_layer_norm import AddLayerNorm, apply_add_layer_norm
from bbfast.nn.batch_norm_act import BatchNormAct2d, SyncBatchNormAct2d, convert_sync_batchnorm
from bbfast.nn.channel_norm import LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
from bbfast.nn.conv_bn_act import ConvBNAct, apply_conv_bn_act, to_inference_layout
from bbfast.nn.convnext_block import ConvNeXtBlock
from bbfast.nn.depthwise_conv_bn_act import DepthwiseConvBNAct, apply_depthwise_conv_bn_act
from bbfast.nn.drop_path_add import DropPath, DropPathAdd
from bbfast.nn.folded_batch_norm import BATCH_NORMS, FoldedBatchNorm2d
from bbfast.nn.global_response_norm import GlobalResponseNorm
from bbfast.nn.linear_act import LinearAct, apply_linear, apply_linear_act, linear
from bbfast.nn.mlp import Mlp, apply_mlp
from bbfast.nn.squeeze_excite import apply_gate, apply_squeeze_excite, squeeze_excite_gate
from bbfast.nn.swin_block import SwinBlock
from bbfast.nn.window_attention import ShiftedWindowAttention, WindowAttention

__all__ = [
    "BATCH_NORMS",
    "AddLayerNorm",
    "BatchNormAct2d",
    "ConvBNAct",
    "ConvNeXtBlock",
    "DepthwiseConvBNAct",
    "DropPath",
    "DropPathAdd",
    "FoldedBatchNorm2d",
    "GlobalResponseNorm",
    "LayerNorm",
    "LayerNorm2d",
    "LinearAct",
    "Mlp",
    "RmsNorm",
    "RmsNorm2d",
    "ShiftedWindowAttention",
    "SimpleNorm",
    "SimpleNorm2d",
    "SwinBlock",
    "SyncBatchNormAct2d",
    "WindowAttention",
    "apply_add_layer_norm",
    "apply_conv_bn_act",
    "apply_depthwise_conv_bn_act",
    "apply_gate",
    "apply_linear",
    "apply_linear_act",
    "apply_mlp",
    "apply_squeeze_excite",
    "convert_sync_batchnorm",
    "linear",
    "squeeze_excite_gate",
    "to_inference_layout",
]
