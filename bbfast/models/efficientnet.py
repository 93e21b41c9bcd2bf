"""EfficientNet and MobileNetV2: inverted residuals, then a 1x1 convolution before pooling.

`EfficientNet: Rethinking Model Scaling`, https://arxiv.org/abs/1905.11946, and `MobileNetV2: Inverted
Residuals and Linear Bottlenecks`, https://arxiv.org/abs/1801.04381. Names, weights and state_dict keys are
timm's.
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
from bbfast.models._layers import conv_bn_act, create_conv2d, resolve_act, round_channels
from bbfast.models._pool import GlobalPool2d
from bbfast.models._pretrained import HALF_MEAN_STD
from bbfast.models._registry import register_model_deprecations
from bbfast.nn import BatchNormAct2d
from bbfast.nn._arguments import check_int


class EfficientNet(EfficientNetTrunk):
    """EfficientNet and MobileNetV2 (see `EfficientNetTrunk` for the arguments that are not named here).

    Args:
        num_features: channels of conv_head, which are those of `forward_features`.
        global_pool: see `GlobalPool2d`; `""`, which leaves the map unpooled, goes with num_classes=0.
    """

    def __init__(
        self,
        block_args: Sequence[Sequence[BlockArgs]],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_size: int = 32,
        fix_stem: bool = False,
        num_features: int = 1280,
        output_stride: int = 32,
        pad_type: str = "",
        act_layer: str = "relu",
        bn_eps: float = 1e-5,
        bn_momentum: float | None = 0.1,
        se_layer: Callable[..., SqueezeExcite] = SqueezeExcite,
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
            output_stride=output_stride,
            pad_type=pad_type,
            act_layer=act_layer,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            se_layer=se_layer,
            se_from_exp=False,
            round_chs_fn=round_chs_fn,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        factory = {"device": device, "dtype": dtype}
        self.conv_head = create_conv2d(self.num_features, num_features, 1, **factory)
        self.bn2 = BatchNormAct2d(num_features, eps=bn_eps, momentum=bn_momentum, act=resolve_act(act_layer), **factory)
        self.num_features = num_features
        self.global_pool = GlobalPool2d(global_pool, flatten=True)
        self.global_pool.check_classifier(num_classes)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()
        self.classifier = self._make_classifier(num_classes)
        init_weights(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, and the pooling unless global_pool is None."""
        pool = self.global_pool if global_pool is None else GlobalPool2d(global_pool, flatten=True)
        check_int("num_classes", num_classes, minimum=0)
        pool.check_classifier(num_classes)
        self.num_classes = num_classes
        self.global_pool = pool.train(self.training)
        self.head_hidden_size = self.num_features * pool.feat_mult()
        self.classifier = self._make_classifier(num_classes).train(self.training)

    def _keep_maps(self, count: int, *, keep_norm: bool, keep_head: bool) -> None:
        super()._keep_maps(count, keep_norm=keep_norm, keep_head=keep_head)
        if not (keep_norm and keep_head):  # conv_head has a norm and is no part of a map
            self.conv_head = self.bn2 = nn.Identity()
            self.num_features = self.feature_info[count - 1]["num_chs"]
            self.reset_classifier(0, "")

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.conv_head, nn.Identity):
            return x
        return conv_bn_act(self.conv_head, self.bn2, x)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates; coarse: by stage."""
        groups = super().group_matcher(coarse)
        return {**groups, "blocks": [(groups["blocks"], None), (r"conv_head|bn2", (99999,))]}

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooling, dropout and classifier; pre_logits leaves it out: `[N, head_hidden_size]`."""
        x = self.global_pool(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)


# ---- architectures ---------------------------------------------------------------------------------------

_MOBILENET_V2 = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]
_EFFICIENTNET = [
    ["ds_r1_k3_s1_e1_c16_se0.25"],
    ["ir_r2_k3_s2_e6_c24_se0.25"],
    ["ir_r2_k5_s2_e6_c40_se0.25"],
    ["ir_r3_k3_s2_e6_c80_se0.25"],
    ["ir_r3_k5_s1_e6_c112_se0.25"],
    ["ir_r4_k5_s2_e6_c192_se0.25"],
    ["ir_r1_k3_s1_e6_c320_se0.25"],
]
_EFFICIENTNET_LITE = [[block.removesuffix("_se0.25") for block in stage] for stage in _EFFICIENTNET]


def _mobilenet_v2(
    channel_multiplier: float = 1.0,
    depth_multiplier: float = 1.0,
    fix_stem_head: bool = False,
    **model_arguments,
) -> EfficientNet:
    """With fix_stem_head the stem, the first and last stage's depth and the head do not grow."""
    round_chs_fn = partial(round_channels, multiplier=channel_multiplier)
    defaults = {
        "num_features": 1280 if fix_stem_head else max(1280, round_chs_fn(1280)),
        "act_layer": "relu6",
    }
    return EfficientNet(
        decode_arch_def(_MOBILENET_V2, depth_multiplier, fix_first_last=fix_stem_head),
        fix_stem=fix_stem_head,
        round_chs_fn=round_chs_fn,
        **{**defaults, **model_arguments},
    )


def _efficientnet(channel_multiplier: float = 1.0, depth_multiplier: float = 1.0, **model_arguments) -> EfficientNet:
    """Width, depth and (by the input) resolution grow together."""
    round_chs_fn = partial(round_channels, multiplier=channel_multiplier)
    defaults = {"num_features": round_chs_fn(1280), "act_layer": "swish"}
    return EfficientNet(
        decode_arch_def(_EFFICIENTNET, depth_multiplier),
        round_chs_fn=round_chs_fn,
        **{**defaults, **model_arguments},
    )


def _efficientnet_lite(
    channel_multiplier: float = 1.0, depth_multiplier: float = 1.0, **model_arguments
) -> EfficientNet:
    """No squeeze-and-excite, ReLU6; stem, head and the depth of the first and last stage do not grow."""
    return EfficientNet(
        decode_arch_def(_EFFICIENTNET_LITE, depth_multiplier, fix_first_last=True),
        fix_stem=True,
        round_chs_fn=partial(round_channels, multiplier=channel_multiplier),
        **{"act_layer": "relu6", **model_arguments},
    )


# ---- pretrained weights ----------------------------------------------------------------------------------

PRETRAINED_CFGS = {
    "efficientnet_b0.ra_in1k": pretrained_cfg(),
    "efficientnet_b0.ra4_e3600_r224_in1k": pretrained_cfg(
        crop_pct=0.9, test_size=256, test_crop_pct=1.0, **HALF_MEAN_STD
    ),
    "efficientnet_b1.ra4_e3600_r240_in1k": pretrained_cfg(
        size=240, crop_pct=0.9, test_size=288, test_crop_pct=1.0, **HALF_MEAN_STD
    ),
    "efficientnet_b1.ft_in1k": pretrained_cfg(test_size=256, test_crop_pct=1.0),
    "efficientnet_b2.ra_in1k": pretrained_cfg(size=256, test_size=288, test_crop_pct=1.0),
    "efficientnet_b3.ra2_in1k": pretrained_cfg(size=288, test_size=320, test_crop_pct=1.0),
    "efficientnet_b4.ra2_in1k": pretrained_cfg(size=320, test_size=384, test_crop_pct=1.0),
    "efficientnet_b5.sw_in12k_ft_in1k": pretrained_cfg(size=448, crop_pct=1.0, crop_mode="squash"),
    "efficientnet_b5.sw_in12k": pretrained_cfg(size=416, crop_pct=0.95, num_classes=11821),
    "efficientnet_b6.untrained": pretrained_cfg(weights=False, size=528, crop_pct=0.942),
    "efficientnet_b7.untrained": pretrained_cfg(weights=False, size=600, crop_pct=0.949),
    "efficientnet_b8.untrained": pretrained_cfg(weights=False, size=672, crop_pct=0.954),
    "efficientnet_l2.untrained": pretrained_cfg(weights=False, size=800, crop_pct=0.961),
    "efficientnet_lite0.ra_in1k": pretrained_cfg(),
    "efficientnet_lite1.untrained": pretrained_cfg(weights=False, size=240, crop_pct=0.882),
    "efficientnet_lite2.untrained": pretrained_cfg(weights=False, size=260, crop_pct=0.89),
    "efficientnet_lite3.untrained": pretrained_cfg(weights=False, size=300, crop_pct=0.904),
    "efficientnet_lite4.untrained": pretrained_cfg(weights=False, size=380, crop_pct=0.922),
    "mobilenetv2_035.untrained": pretrained_cfg(weights=False),
    "mobilenetv2_050.lamb_in1k": pretrained_cfg(),
    "mobilenetv2_075.untrained": pretrained_cfg(weights=False),
    "mobilenetv2_100.ra_in1k": pretrained_cfg(),
    "mobilenetv2_110d.ra_in1k": pretrained_cfg(),
    "mobilenetv2_120d.ra_in1k": pretrained_cfg(),
    "mobilenetv2_140.ra_in1k": pretrained_cfg(),
    "tf_efficientnet_b0.ns_jft_in1k": pretrained_cfg(),
    "tf_efficientnet_b0.ap_in1k": pretrained_cfg(**HALF_MEAN_STD),
    "tf_efficientnet_b0.aa_in1k": pretrained_cfg(),
    "tf_efficientnet_b0.in1k": pretrained_cfg(),
    "tf_efficientnet_b1.ns_jft_in1k": pretrained_cfg(size=240, crop_pct=0.882),
    "tf_efficientnet_b1.ap_in1k": pretrained_cfg(size=240, crop_pct=0.882, **HALF_MEAN_STD),
    "tf_efficientnet_b1.aa_in1k": pretrained_cfg(size=240, crop_pct=0.882),
    "tf_efficientnet_b1.in1k": pretrained_cfg(size=240, crop_pct=0.882),
    "tf_efficientnet_b2.ns_jft_in1k": pretrained_cfg(size=260, crop_pct=0.89),
    "tf_efficientnet_b2.ap_in1k": pretrained_cfg(size=260, crop_pct=0.89, **HALF_MEAN_STD),
    "tf_efficientnet_b2.aa_in1k": pretrained_cfg(size=260, crop_pct=0.89),
    "tf_efficientnet_b2.in1k": pretrained_cfg(size=260, crop_pct=0.89),
    "tf_efficientnet_b3.ns_jft_in1k": pretrained_cfg(size=300, crop_pct=0.904),
    "tf_efficientnet_b3.ap_in1k": pretrained_cfg(size=300, crop_pct=0.904, **HALF_MEAN_STD),
    "tf_efficientnet_b3.aa_in1k": pretrained_cfg(size=300, crop_pct=0.904),
    "tf_efficientnet_b3.in1k": pretrained_cfg(size=300, crop_pct=0.904),
    "tf_efficientnet_b4.ns_jft_in1k": pretrained_cfg(size=380, crop_pct=0.922),
    "tf_efficientnet_b4.ap_in1k": pretrained_cfg(size=380, crop_pct=0.922, **HALF_MEAN_STD),
    "tf_efficientnet_b4.aa_in1k": pretrained_cfg(size=380, crop_pct=0.922),
    "tf_efficientnet_b4.in1k": pretrained_cfg(size=380, crop_pct=0.922),
    "tf_efficientnet_b5.ns_jft_in1k": pretrained_cfg(size=456, crop_pct=0.934),
    "tf_efficientnet_b5.ap_in1k": pretrained_cfg(size=456, crop_pct=0.934, **HALF_MEAN_STD),
    "tf_efficientnet_b5.ra_in1k": pretrained_cfg(size=456, crop_pct=0.934),
    "tf_efficientnet_b5.aa_in1k": pretrained_cfg(size=456, crop_pct=0.934),
    "tf_efficientnet_b5.in1k": pretrained_cfg(size=456, crop_pct=0.934),
    "tf_efficientnet_b6.ns_jft_in1k": pretrained_cfg(size=528, crop_pct=0.942),
    "tf_efficientnet_b6.ap_in1k": pretrained_cfg(size=528, crop_pct=0.942, **HALF_MEAN_STD),
    "tf_efficientnet_b6.aa_in1k": pretrained_cfg(size=528, crop_pct=0.942),
    "tf_efficientnet_b7.ns_jft_in1k": pretrained_cfg(size=600, crop_pct=0.949),
    "tf_efficientnet_b7.ap_in1k": pretrained_cfg(size=600, crop_pct=0.949, **HALF_MEAN_STD),
    "tf_efficientnet_b7.ra_in1k": pretrained_cfg(size=600, crop_pct=0.949),
    "tf_efficientnet_b7.aa_in1k": pretrained_cfg(size=600, crop_pct=0.949),
    "tf_efficientnet_b8.ap_in1k": pretrained_cfg(size=672, crop_pct=0.954, **HALF_MEAN_STD),
    "tf_efficientnet_b8.ra_in1k": pretrained_cfg(size=672, crop_pct=0.954),
    "tf_efficientnet_l2.ns_jft_in1k_475": pretrained_cfg(size=475, crop_pct=0.936),
    "tf_efficientnet_l2.ns_jft_in1k": pretrained_cfg(size=800, crop_pct=0.96),
    "tf_efficientnet_lite0.in1k": pretrained_cfg(**HALF_MEAN_STD),
    "tf_efficientnet_lite1.in1k": pretrained_cfg(size=240, crop_pct=0.882, **HALF_MEAN_STD),
    "tf_efficientnet_lite2.in1k": pretrained_cfg(size=260, crop_pct=0.89, **HALF_MEAN_STD),
    "tf_efficientnet_lite3.in1k": pretrained_cfg(size=300, crop_pct=0.904, interpolation="bilinear", **HALF_MEAN_STD),
    "tf_efficientnet_lite4.in1k": pretrained_cfg(size=380, crop_pct=0.92, interpolation="bilinear", **HALF_MEAN_STD),
}

# ---- variants --------------------------------------------------------------------------------------------

_TF = {"pad_type": "same", "bn_eps": BN_EPS_TF}

_MOBILENET_V2_VARIANTS = {
    "mobilenetv2_035": {"channel_multiplier": 0.35},
    "mobilenetv2_050": {"channel_multiplier": 0.5},
    "mobilenetv2_075": {"channel_multiplier": 0.75},
    "mobilenetv2_100": {},
    "mobilenetv2_110d": {"channel_multiplier": 1.1, "depth_multiplier": 1.2, "fix_stem_head": True},
    "mobilenetv2_120d": {"channel_multiplier": 1.2, "depth_multiplier": 1.4, "fix_stem_head": True},
    "mobilenetv2_140": {"channel_multiplier": 1.4},
}

# The papers' (width, depth) multipliers.
_SCALES = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
    "b8": (2.2, 3.6),
    "l2": (4.3, 5.3),
}
_LITE_SCALES = {
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}


def _scaled(scales: dict[str, tuple[float, float]]) -> dict[str, dict]:
    """Each size twice: as timm trained it, and as it was ported from TensorFlow."""
    variants = {}
    for size, (width, depth) in scales.items():
        arguments = {"channel_multiplier": width, "depth_multiplier": depth}
        variants[f"efficientnet_{size}"] = arguments
        variants[f"tf_efficientnet_{size}"] = {**arguments, **_TF}
    return variants


register_variants(_mobilenet_v2, PRETRAINED_CFGS, _MOBILENET_V2_VARIANTS, FEATURE_CFG)
register_variants(_efficientnet, PRETRAINED_CFGS, _scaled(_SCALES), FEATURE_CFG)
register_variants(_efficientnet_lite, PRETRAINED_CFGS, _scaled(_LITE_SCALES), FEATURE_CFG)

# ---- old names -------------------------------------------------------------------------------------------

_AP = {f"tf_efficientnet_b{size}_ap": f"tf_efficientnet_b{size}.ap_in1k" for size in range(9)}
_NS = {f"tf_efficientnet_b{size}_ns": f"tf_efficientnet_b{size}.ns_jft_in1k" for size in range(8)}

register_model_deprecations(
    __name__,
    {
        **_AP,
        **_NS,
        "tf_efficientnet_l2_ns_475": "tf_efficientnet_l2.ns_jft_in1k_475",
        "tf_efficientnet_l2_ns": "tf_efficientnet_l2.ns_jft_in1k",
        "efficientnet_b2a": "efficientnet_b2",
        "efficientnet_b3a": "efficientnet_b3",
    },
)
