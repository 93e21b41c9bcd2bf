"""MobileNetV3: inverted residuals with squeeze-and-excite and hard-swish, and a head that pools first.

`Searching for MobileNetV3`, https://arxiv.org/abs/1905.02244. Names, weights and state_dict keys are timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.models._efficientnet_blocks import SqueezeExcite
from bbfast.models._efficientnet_builder import BN_EPS_TF, BlockArgs, decode_arch_def, init_weights
from bbfast.models._efficientnet_trunk import FEATURE_CFG, EfficientNetTrunk, pretrained_cfg
from bbfast.models._factory import register_variants
from bbfast.models._layers import create_conv2d, resolve_act, round_channels
from bbfast.models._pool import GlobalPool2d
from bbfast.models._pretrained import HALF_MEAN_STD, UNIT_MEAN_STD
from bbfast.models._registry import register_model_deprecations
from bbfast.reference.activation import activation


class MobileNetV3(EfficientNetTrunk):
    """MobileNetV3 (see `EfficientNetTrunk` for the arguments that are not named here).

    Its head pools, widens by a 1x1 convolution without BatchNorm, and classifies; a hook on conv_head does
    not run.

    Args:
        num_features: channels of conv_head; they are `head_hidden_size`, while the attribute `num_features`
            is those of the last feature map.
        head_bias: whether conv_head has a bias.
        global_pool: see `GlobalPool2d`; `""` leaves the map unpooled.
    """

    def __init__(
        self,
        block_args: Sequence[Sequence[BlockArgs]],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_size: int = 16,
        fix_stem: bool = False,
        num_features: int = 1280,
        head_bias: bool = True,
        pad_type: str = "",
        act_layer: str = "hard_swish",
        bn_eps: float = 1e-5,
        bn_momentum: float | None = 0.1,
        se_layer: Callable[..., SqueezeExcite] = SqueezeExcite,
        se_from_exp: bool = True,
        round_chs_fn: Callable[[float], int] = round_channels,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        device=None,
        dtype=None,
    ):
        super().__init__(
            block_args,
            num_classes=num_classes,
            in_chans=in_chans,
            stem_size=stem_size,
            fix_stem=fix_stem,
            output_stride=32,
            pad_type=pad_type,
            act_layer=act_layer,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            se_layer=se_layer,
            se_from_exp=se_from_exp,
            round_chs_fn=round_chs_fn,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        self.head_hidden_size = num_features
        self.global_pool = GlobalPool2d(global_pool)
        pooled = self.num_features * self.global_pool.feat_mult()
        self.conv_head = create_conv2d(pooled, num_features, 1, bias=head_bias, device=device, dtype=dtype)
        self.head_act = resolve_act(act_layer)
        self.classifier = self._make_classifier(num_classes)
        init_weights(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, and the pooling unless global_pool is None.

        conv_head stays as it is, so the new pooling must hand out as many channels as the old one.
        """
        pool = self.global_pool if global_pool is None else GlobalPool2d(global_pool)
        pooled = self.num_features * pool.feat_mult()
        if isinstance(self.conv_head, nn.Identity):
            self.head_hidden_size = pooled
        elif pooled != self.conv_head.in_channels:
            raise ValueError(
                f"global_pool={global_pool!r} gives {pooled} channels but conv_head takes {self.conv_head.in_channels}"
            )
        classifier = self._make_classifier(num_classes)
        self.num_classes = num_classes
        self.global_pool = pool.train(self.training)
        self.classifier = classifier.train(self.training)

    def _keep_maps(self, count: int, *, keep_norm: bool, keep_head: bool) -> None:
        super()._keep_maps(count, keep_norm=keep_norm, keep_head=keep_head)
        self.num_features = self.feature_info[count - 1]["num_chs"]
        if not keep_head:
            self.conv_head, self.head_act = nn.Identity(), "identity"

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooling, conv_head, dropout and classifier; pre_logits leaves it out: `[N, head_hidden_size]`."""
        x = self.global_pool(x)
        if isinstance(self.conv_head, nn.Identity):
            x = x.flatten(1) if self.global_pool.pool_type else x
        elif self.global_pool.pool_type:  # a 1x1 convolution of a 1x1 map is a matrix product
            x = F.linear(x.flatten(1), self.conv_head.weight.flatten(1), self.conv_head.bias)
        else:
            x = self.conv_head(x)
        x = activation(x, self.head_act)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)


# ---- architectures ---------------------------------------------------------------------------------------

_LARGE = [
    ["ds_r1_k3_s1_e1_c16_nre"],
    ["ir_r1_k3_s2_e4_c24_nre", "ir_r1_k3_s1_e3_c24_nre"],
    ["ir_r3_k5_s2_e3_c40_se0.25_nre"],
    ["ir_r1_k3_s2_e6_c80", "ir_r1_k3_s1_e2.5_c80", "ir_r2_k3_s1_e2.3_c80"],
    ["ir_r2_k3_s1_e6_c112_se0.25"],
    ["ir_r3_k5_s2_e6_c160_se0.25"],
    ["cn_r1_k1_s1_c960"],
]
_LARGE_RW = [["ds_r1_k3_s1_e1_c16_nre_noskip"], *_LARGE[1:]]
_LARGE_MINIMAL = [
    ["ds_r1_k3_s1_e1_c16"],
    ["ir_r1_k3_s2_e4_c24", "ir_r1_k3_s1_e3_c24"],
    ["ir_r3_k3_s2_e3_c40"],
    ["ir_r1_k3_s2_e6_c80", "ir_r1_k3_s1_e2.5_c80", "ir_r2_k3_s1_e2.3_c80"],
    ["ir_r2_k3_s1_e6_c112"],
    ["ir_r3_k3_s2_e6_c160"],
    ["cn_r1_k1_s1_c960"],
]
_SMALL = [
    ["ds_r1_k3_s2_e1_c16_se0.25_nre"],
    ["ir_r1_k3_s2_e4.5_c24_nre", "ir_r1_k3_s1_e3.67_c24_nre"],
    ["ir_r1_k5_s2_e4_c40_se0.25", "ir_r2_k5_s1_e6_c40_se0.25"],
    ["ir_r2_k5_s1_e3_c48_se0.25"],
    ["ir_r3_k5_s2_e6_c96_se0.25"],
    ["cn_r1_k1_s1_c576"],
]
_SMALL_MINIMAL = [
    ["ds_r1_k3_s2_e1_c16"],
    ["ir_r1_k3_s2_e4.5_c24", "ir_r1_k3_s1_e3.67_c24"],
    ["ir_r1_k3_s2_e4_c40", "ir_r2_k3_s1_e6_c40"],
    ["ir_r2_k3_s1_e3_c48"],
    ["ir_r3_k3_s2_e6_c96"],
    ["cn_r1_k1_s1_c576"],
]


def _mobilenet_v3(
    arch_def: Sequence[Sequence[str]],
    channel_multiplier: float = 1.0,
    depth_multiplier: float = 1.0,
    **model_arguments,
) -> MobileNetV3:
    """The paper's networks: squeeze-and-excite rounds to multiples of 8 and always uses ReLU."""
    return MobileNetV3(
        decode_arch_def(arch_def, depth_multiplier),
        round_chs_fn=partial(round_channels, multiplier=channel_multiplier),
        se_layer=partial(SqueezeExcite, gate="hard_sigmoid", force_act="relu", rd_round_fn=round_channels),
        fix_stem=channel_multiplier < 0.75,
        **model_arguments,
    )


def _mobilenet_v3_rw(**model_arguments) -> MobileNetV3:
    """timm's own: squeeze-and-excite rounds to the nearest integer and uses the block's activation."""
    return MobileNetV3(
        decode_arch_def(_LARGE_RW), se_layer=partial(SqueezeExcite, gate="hard_sigmoid"), **model_arguments
    )


# ---- pretrained weights ----------------------------------------------------------------------------------

PRETRAINED_CFGS = {
    "mobilenetv3_large_075.untrained": pretrained_cfg(weights=False, interpolation="bilinear"),
    "mobilenetv3_large_100.ra_in1k": pretrained_cfg(),
    "mobilenetv3_large_100.ra4_e3600_r224_in1k": pretrained_cfg(
        crop_pct=0.95, test_size=256, test_crop_pct=1.0, **HALF_MEAN_STD
    ),
    "mobilenetv3_large_100.miil_in21k_ft_in1k": pretrained_cfg(interpolation="bilinear", **UNIT_MEAN_STD),
    "mobilenetv3_large_100.miil_in21k": pretrained_cfg(interpolation="bilinear", num_classes=11221, **UNIT_MEAN_STD),
    "mobilenetv3_large_150d.ra4_e3600_r256_in1k": pretrained_cfg(
        size=256, crop_pct=0.95, test_size=320, test_crop_pct=1.0, interpolation="bilinear", **HALF_MEAN_STD
    ),
    "mobilenetv3_rw.rmsp_in1k": pretrained_cfg(),
    "mobilenetv3_small_050.lamb_in1k": pretrained_cfg(),
    "mobilenetv3_small_075.lamb_in1k": pretrained_cfg(),
    "mobilenetv3_small_100.lamb_in1k": pretrained_cfg(),
    "tf_mobilenetv3_large_075.in1k": pretrained_cfg(interpolation="bilinear", **HALF_MEAN_STD),
    "tf_mobilenetv3_large_100.in1k": pretrained_cfg(interpolation="bilinear", **HALF_MEAN_STD),
    "tf_mobilenetv3_large_minimal_100.in1k": pretrained_cfg(interpolation="bilinear", **HALF_MEAN_STD),
    "tf_mobilenetv3_small_075.in1k": pretrained_cfg(interpolation="bilinear", **HALF_MEAN_STD),
    "tf_mobilenetv3_small_100.in1k": pretrained_cfg(interpolation="bilinear", **HALF_MEAN_STD),
    "tf_mobilenetv3_small_minimal_100.in1k": pretrained_cfg(interpolation="bilinear", **HALF_MEAN_STD),
}

# ---- variants --------------------------------------------------------------------------------------------

_TF = {"pad_type": "same", "bn_eps": BN_EPS_TF}

_VARIANTS = {
    "mobilenetv3_large_075": {"arch_def": _LARGE, "channel_multiplier": 0.75},
    "mobilenetv3_large_100": {"arch_def": _LARGE},
    "mobilenetv3_large_150d": {"arch_def": _LARGE, "channel_multiplier": 1.5, "depth_multiplier": 1.2},
    "mobilenetv3_small_050": {"arch_def": _SMALL, "num_features": 1024, "channel_multiplier": 0.5},
    "mobilenetv3_small_075": {"arch_def": _SMALL, "num_features": 1024, "channel_multiplier": 0.75},
    "mobilenetv3_small_100": {"arch_def": _SMALL, "num_features": 1024},
    "tf_mobilenetv3_large_075": {"arch_def": _LARGE, "channel_multiplier": 0.75, **_TF},
    "tf_mobilenetv3_large_100": {"arch_def": _LARGE, **_TF},
    "tf_mobilenetv3_large_minimal_100": {"arch_def": _LARGE_MINIMAL, "act_layer": "relu", **_TF},
    "tf_mobilenetv3_small_075": {"arch_def": _SMALL, "num_features": 1024, "channel_multiplier": 0.75, **_TF},
    "tf_mobilenetv3_small_100": {"arch_def": _SMALL, "num_features": 1024, **_TF},
    "tf_mobilenetv3_small_minimal_100": {
        "arch_def": _SMALL_MINIMAL,
        "num_features": 1024,
        "act_layer": "relu",
        **_TF,
    },
}

register_variants(_mobilenet_v3, PRETRAINED_CFGS, _VARIANTS, FEATURE_CFG)
register_variants(
    _mobilenet_v3_rw, PRETRAINED_CFGS, {"mobilenetv3_rw": {"head_bias": False, "bn_eps": BN_EPS_TF}}, FEATURE_CFG
)

# ---- old names -------------------------------------------------------------------------------------------

register_model_deprecations(
    __name__,
    {
        "mobilenetv3_large_100_miil": "mobilenetv3_large_100.miil_in21k_ft_in1k",
        "mobilenetv3_large_100_miil_in21k": "mobilenetv3_large_100.miil_in21k",
    },
)
