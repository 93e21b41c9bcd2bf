"""The ResNets that have names: depths, the letters behind them, and what the names' first halves mean."""

from __future__ import annotations

from functools import partial

from bbfast.models._resnet_blocks import BasicBlock, Bottleneck
from bbfast.models._resnet_layers import squeeze_excite
from bbfast.models._resnet_pruned import PRUNED_CHANNELS

_10 = {"block": BasicBlock, "layers": (1, 1, 1, 1)}
_14 = {"block": Bottleneck, "layers": (1, 1, 1, 1)}
_18 = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
_26 = {"block": Bottleneck, "layers": (2, 2, 2, 2)}
_34 = {"block": BasicBlock, "layers": (3, 4, 6, 3)}
_50 = {"block": Bottleneck, "layers": (3, 4, 6, 3)}
_101 = {"block": Bottleneck, "layers": (3, 4, 23, 3)}
_152 = {"block": Bottleneck, "layers": (3, 8, 36, 3)}
_200 = {"block": Bottleneck, "layers": (3, 24, 36, 3)}
_269 = {"block": Bottleneck, "layers": (3, 30, 48, 8)}

# The letters behind a depth.
_C = {"stem_type": "deep", "stem_width": 32}
_D = {**_C, "avg_down": True}
_S = {"stem_type": "deep", "stem_width": 64}
_T = {"stem_type": "deep_tiered", "stem_width": 32, "avg_down": True}

_32X4D, _64X4D = {"cardinality": 32, "base_width": 4}, {"cardinality": 64, "base_width": 4}
_32X8D, _32X16D, _32X32D = ({"cardinality": 32, "base_width": width} for width in (8, 16, 32))
_WIDE = {"base_width": 128}
_SE, _ECA = {"block_args": {"attn_layer": "se"}}, {"block_args": {"attn_layer": "eca"}}
_AA, _BLUR = {"aa_layer": "avg"}, {"aa_layer": "blur"}
_RS = {
    **_D,
    "replace_stem_pool": True,
    "block_args": {"attn_layer": partial(squeeze_excite, rd_ratio=0.25)},
}

VARIANTS = {
    "resnet10t": _10 | _T,
    "resnet14t": _14 | _T,
    "resnet18": _18,
    "resnet18d": _18 | _D,
    "resnet26": _26,
    "resnet26d": _26 | _D,
    "resnet26t": _26 | _T,
    "resnet34": _34,
    "resnet34d": _34 | _D,
    "resnet50": _50,
    "resnet50_gn": _50 | {"norm_layer": "groupnorm"},
    "resnet50c": _50 | _C,
    "resnet50d": _50 | _D,
    "resnet50s": _50 | _S,
    "resnet50t": _50 | _T,
    "resnet101": _101,
    "resnet101c": _101 | _C,
    "resnet101d": _101 | _D,
    "resnet101s": _101 | _S,
    "resnet152": _152,
    "resnet152c": _152 | _C,
    "resnet152d": _152 | _D,
    "resnet152s": _152 | _S,
    "resnet200": _200,
    "resnet200d": _200 | _D,
    "wide_resnet50_2": _50 | _WIDE,
    "wide_resnet101_2": _101 | _WIDE,
    "resnext50_32x4d": _50 | _32X4D,
    "resnext50d_32x4d": _50 | _32X4D | _D,
    "resnext101_32x4d": _101 | _32X4D,
    "resnext101_32x8d": _101 | _32X8D,
    "resnext101_32x16d": _101 | _32X16D,
    "resnext101_32x32d": _101 | _32X32D,
    "resnext101_64x4d": _101 | _64X4D,
    "seresnet18": _18 | _SE,
    "seresnet34": _34 | _SE,
    "seresnet50": _50 | _SE,
    "seresnet50t": _50 | _SE | _T,
    "seresnet101": _101 | _SE,
    "seresnet152": _152 | _SE,
    "seresnet152d": _152 | _SE | _D,
    "seresnet200d": _200 | _SE | _D,
    "seresnet269d": _269 | _SE | _D,
    "seresnext26d_32x4d": _26 | _32X4D | _SE | _D,
    "seresnext26t_32x4d": _26 | _32X4D | _SE | _T,
    "seresnext50_32x4d": _50 | _32X4D | _SE,
    "seresnext101_32x4d": _101 | _32X4D | _SE,
    "seresnext101_32x8d": _101 | _32X8D | _SE,
    "seresnext101_64x4d": _101 | _64X4D | _SE,
    "seresnext101d_32x8d": _101 | _32X8D | _SE | _D,
    "senet154": _152 | _64X4D | _SE | _S | {"down_kernel_size": 3, "block_reduce_first": 2},
    "ecaresnet26t": _26 | _ECA | _T,
    "ecaresnet50d": _50 | _ECA | _D,
    "ecaresnet50t": _50 | _ECA | _T,
    "ecaresnet101d": _101 | _ECA | _D,
    "ecaresnet200d": _200 | _ECA | _D,
    "ecaresnet269d": _269 | _ECA | _D,
    "ecaresnetlight": _50 | _ECA | {"layers": (1, 1, 11, 3), "avg_down": True},
    "ecaresnext26t_32x4d": _26 | _32X4D | _ECA | _T,
    "ecaresnext50t_32x4d": _50 | _32X4D | _ECA | _T,
    "resnetaa34d": _34 | _AA | _D,
    "resnetaa50": _50 | _AA,
    "resnetaa50d": _50 | _AA | _D,
    "resnetaa101d": _101 | _AA | _D,
    "seresnetaa50d": _50 | _AA | _SE | _D,
    "seresnextaa101d_32x8d": _101 | _AA | _32X8D | _SE | _D,
    "seresnextaa201d_32x8d": _200 | _AA | _32X8D | _SE | _D | {"layers": (3, 24, 36, 4), "stem_width": 64},
    "resnetblur18": _18 | _BLUR,
    "resnetblur50": _50 | _BLUR,
    "resnetblur50d": _50 | _BLUR | _D,
    "resnetblur101d": _101 | _BLUR | _D,
    "resnetrs50": _50 | _RS,
    "resnetrs101": _101 | _RS,
    "resnetrs152": _152 | _RS,
    "resnetrs200": _200 | _RS,
    "resnetrs270": _200 | _RS | {"layers": (4, 29, 53, 4)},
    "resnetrs350": _200 | _RS | {"layers": (4, 36, 72, 4)},
    "resnetrs420": _200 | _RS | {"layers": (4, 44, 87, 4)},
    "test_resnet": _D
    | {"block": (BasicBlock, BasicBlock, Bottleneck, BasicBlock), "layers": (1, 1, 1, 1), "stem_width": 16}
    | {"channels": (32, 48, 48, 96)},
}
PRUNED_VARIANTS = {
    f"{name}_pruned": {**VARIANTS[name], "pruned_channels": channels} for name, channels in PRUNED_CHANNELS.items()
}
