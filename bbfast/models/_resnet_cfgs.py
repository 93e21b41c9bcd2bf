"""The weights of ResNets as data, and timm's older names for some of them."""

from __future__ import annotations

from collections.abc import Collection

from bbfast.models._pretrained import HALF_MEAN_STD, PretrainedCfg

# How photos were made into inputs; what is not said is as in _PLAIN: 224 pixels, bilinear, 0.875 of the photo.
_PLAIN: dict = {}
_BICUBIC = {"interpolation": "bicubic"}
_TIMM = {**_BICUBIC, "test_size": 288, "test_crop_pct": 0.95}
# `ResNet strikes back`, https://arxiv.org/abs/2110.00476
_RSB = {**_BICUBIC, "crop_pct": 0.95, "test_size": 288, "test_crop_pct": 1.0}
_RSB_160 = {**_BICUBIC, "size": 160, "crop_pct": 0.95, "test_size": 224, "test_crop_pct": 0.95}
_TORCHVISION_2 = {"size": 176, "test_size": 224, "test_crop_pct": 0.965}
_UNTRAINED = {"weights": False}

# By architecture and tag, the default tag first.
WEIGHTS: dict[str, dict[str, dict]] = {
    "ecaresnet26t": {"ra2_in1k": _TIMM | {"size": 256, "test_size": 320}},
    "ecaresnet50d": {"miil_in1k": _TIMM},
    "ecaresnet50d_pruned": {"miil_in1k": _TIMM},
    "ecaresnet50t": {
        "ra2_in1k": _TIMM | {"size": 256, "test_size": 320},
        "a1_in1k": _RSB,
        "a2_in1k": _RSB,
        "a3_in1k": _RSB_160,
    },
    "ecaresnet101d": {"miil_in1k": _TIMM},
    "ecaresnet101d_pruned": {"miil_in1k": _TIMM},
    "ecaresnet200d": {"untrained": _RSB | {"size": 256, "test_crop_pct": 0.95} | _UNTRAINED},
    "ecaresnet269d": {"ra2_in1k": _RSB | {"size": 320, "test_size": 352}},
    "ecaresnetlight": {"miil_in1k": _TIMM},
    "ecaresnext26t_32x4d": {"untrained": _BICUBIC | _UNTRAINED},
    "ecaresnext50t_32x4d": {"untrained": _BICUBIC | _UNTRAINED},
    "resnet10t": {"c3_in1k": _TIMM | {"size": 176, "test_size": 224}},
    "resnet14t": {"c3_in1k": _TIMM | {"size": 176, "test_size": 224}},
    "resnet18": {
        "a1_in1k": _RSB,
        "a2_in1k": _RSB,
        "a3_in1k": _RSB_160,
        "tv_in1k": _PLAIN,
        "fb_ssl_yfcc100m_ft_in1k": _PLAIN,
        "fb_swsl_ig1b_ft_in1k": _PLAIN,
        "gluon_in1k": _BICUBIC,
    },
    "resnet18d": {"ra2_in1k": _TIMM, "ra4_e3600_r224_in1k": _RSB | {"crop_pct": 0.9} | HALF_MEAN_STD},
    "resnet26": {"bt_in1k": _TIMM},
    "resnet26d": {"bt_in1k": _TIMM},
    "resnet26t": {"ra2_in1k": _RSB | {"size": 256, "crop_pct": 0.94, "test_size": 320}},
    "resnet34": {
        "a1_in1k": _RSB,
        "a2_in1k": _RSB,
        "a3_in1k": _RSB_160,
        "bt_in1k": _TIMM,
        "ra4_e3600_r224_in1k": _RSB | {"crop_pct": 0.9} | HALF_MEAN_STD,
        "tv_in1k": _PLAIN,
        "gluon_in1k": _BICUBIC,
    },
    "resnet34d": {"ra2_in1k": _TIMM},
    "resnet50": {
        "a1_in1k": _RSB,
        "a1h_in1k": _RSB | {"size": 176, "crop_pct": 0.9, "test_size": 224},
        "a2_in1k": _RSB,
        "a3_in1k": _RSB_160,
        "b1k_in1k": _RSB,
        "b2k_in1k": _RSB,
        "c1_in1k": _RSB,
        "c2_in1k": _RSB,
        "d_in1k": _RSB,
        "ram_in1k": _TIMM,
        "am_in1k": _BICUBIC,
        "ra_in1k": _TIMM,
        "bt_in1k": _TIMM,
        "tv_in1k": _PLAIN,
        "tv2_in1k": _TORCHVISION_2,
        "bamboo": _BICUBIC | {"crop_pct": 1.0, "num_classes": 0},
        "fb_ssl_yfcc100m_ft_in1k": _PLAIN,
        "fb_swsl_ig1b_ft_in1k": _PLAIN,
        "gluon_in1k": _BICUBIC,
    },
    "resnet50_gn": {"a1h_in1k": _TIMM | {"crop_pct": 0.94}},
    "resnet50c": {"gluon_in1k": _BICUBIC},
    "resnet50d": {
        "ra2_in1k": _TIMM,
        "ra4_e3600_r224_in1k": _RSB | HALF_MEAN_STD,
        "a1_in1k": _RSB,
        "a2_in1k": _RSB,
        "a3_in1k": _RSB_160,
        "gluon_in1k": _BICUBIC,
    },
    "resnet50s": {"gluon_in1k": _BICUBIC},
    "resnet50t": {"untrained": _TIMM | _UNTRAINED},
    "resnet101": {
        "a1h_in1k": _RSB,
        "a1_in1k": _RSB,
        "a2_in1k": _RSB,
        "a3_in1k": _RSB_160,
        "tv_in1k": _PLAIN,
        "tv2_in1k": _TORCHVISION_2,
        "gluon_in1k": _BICUBIC,
    },
    "resnet101c": {"gluon_in1k": _BICUBIC},
    "resnet101d": {"ra2_in1k": _RSB | {"size": 256, "test_size": 320}, "gluon_in1k": _BICUBIC},
    "resnet101s": {"gluon_in1k": _BICUBIC},
    "resnet152": {
        "a1h_in1k": _RSB,
        "a1_in1k": _RSB,
        "a2_in1k": _RSB,
        "a3_in1k": _RSB_160,
        "tv_in1k": _PLAIN,
        "tv2_in1k": _TORCHVISION_2,
        "gluon_in1k": _BICUBIC,
    },
    "resnet152c": {"gluon_in1k": _BICUBIC},
    "resnet152d": {"ra2_in1k": _RSB | {"size": 256, "test_size": 320}, "gluon_in1k": _BICUBIC},
    "resnet152s": {"gluon_in1k": _BICUBIC},
    "resnet200": {"untrained": _TIMM | _UNTRAINED},
    "resnet200d": {"ra2_in1k": _RSB | {"size": 256, "test_size": 320}},
    "resnetaa34d": {"untrained": _TIMM | _UNTRAINED},
    "resnetaa50": {"a1h_in1k": _RSB},
    "resnetaa50d": {
        "sw_in12k_ft_in1k": _RSB,
        "sw_in12k": _RSB | {"num_classes": 11821},
        "d_in12k": _RSB | {"num_classes": 11821},
    },
    "resnetaa101d": {"sw_in12k_ft_in1k": _RSB, "sw_in12k": _RSB | {"num_classes": 11821}},
    "resnetblur18": {"untrained": _TIMM | _UNTRAINED},
    "resnetblur50": {"bt_in1k": _TIMM},
    "resnetblur50d": {"untrained": _TIMM | _UNTRAINED},
    "resnetblur101d": {"untrained": _TIMM | _UNTRAINED},
    "resnetrs50": {"tf_in1k": _BICUBIC | {"size": 160, "crop_pct": 0.91, "test_size": 224}},
    "resnetrs101": {"tf_in1k": _BICUBIC | {"size": 192, "crop_pct": 0.94, "test_size": 288}},
    "resnetrs152": {"tf_in1k": _BICUBIC | {"size": 256, "crop_pct": 1.0, "test_size": 320}},
    "resnetrs200": {"tf_in1k": _BICUBIC | {"size": 256, "crop_pct": 1.0, "test_size": 320}},
    "resnetrs270": {"tf_in1k": _BICUBIC | {"size": 256, "crop_pct": 1.0, "test_size": 352}},
    "resnetrs350": {"tf_in1k": _BICUBIC | {"size": 288, "crop_pct": 1.0, "test_size": 384}},
    "resnetrs420": {"tf_in1k": _BICUBIC | {"size": 320, "crop_pct": 1.0, "test_size": 416}},
    "resnext50_32x4d": {
        "a1h_in1k": _RSB,
        "a1_in1k": _RSB,
        "a2_in1k": _RSB,
        "a3_in1k": _RSB_160,
        "ra_in1k": _TIMM,
        "tv_in1k": _PLAIN,
        "tv2_in1k": _TORCHVISION_2,
        "fb_ssl_yfcc100m_ft_in1k": _PLAIN,
        "fb_swsl_ig1b_ft_in1k": _PLAIN,
        "gluon_in1k": _BICUBIC,
    },
    "resnext50d_32x4d": {"bt_in1k": _TIMM},
    "resnext101_32x4d": {
        "fb_ssl_yfcc100m_ft_in1k": _PLAIN,
        "untrained": _TIMM | _UNTRAINED,
        "fb_swsl_ig1b_ft_in1k": _PLAIN,
        "gluon_in1k": _BICUBIC,
    },
    "resnext101_32x8d": {
        "tv_in1k": _PLAIN,
        "tv2_in1k": _TORCHVISION_2,
        "fb_wsl_ig1b_ft_in1k": _PLAIN,
        "fb_ssl_yfcc100m_ft_in1k": _PLAIN,
        "fb_swsl_ig1b_ft_in1k": _PLAIN,
    },
    "resnext101_32x16d": {
        "fb_wsl_ig1b_ft_in1k": _PLAIN,
        "fb_ssl_yfcc100m_ft_in1k": _PLAIN,
        "fb_swsl_ig1b_ft_in1k": _PLAIN,
    },
    "resnext101_32x32d": {"fb_wsl_ig1b_ft_in1k": _PLAIN},
    "resnext101_64x4d": {"c1_in1k": _RSB, "tv_in1k": _PLAIN, "gluon_in1k": _BICUBIC},
    "senet154": {"gluon_in1k": _BICUBIC},
    "seresnet18": {"untrained": _TIMM | _UNTRAINED},
    "seresnet34": {"untrained": _TIMM | _UNTRAINED},
    "seresnet50": {"a1_in1k": _RSB, "a2_in1k": _RSB, "a3_in1k": _RSB_160, "ra2_in1k": _TIMM},
    "seresnet50t": {"untrained": _TIMM | _UNTRAINED},
    "seresnet101": {"untrained": _TIMM | _UNTRAINED},
    "seresnet152": {"untrained": _TIMM | _UNTRAINED},
    "seresnet152d": {"ra2_in1k": _RSB | {"size": 256, "test_size": 320}},
    "seresnet200d": {"untrained": _TIMM | {"size": 256} | _UNTRAINED},
    "seresnet269d": {"untrained": _TIMM | {"size": 256} | _UNTRAINED},
    "seresnetaa50d": {"untrained": _TIMM | _UNTRAINED},
    "seresnext26d_32x4d": {"bt_in1k": _TIMM},
    "seresnext26t_32x4d": {"bt_in1k": _TIMM},
    "seresnext50_32x4d": {"racm_in1k": _TIMM, "gluon_in1k": _BICUBIC},
    "seresnext101_32x4d": {"gluon_in1k": _BICUBIC, "untrained": _TIMM | _UNTRAINED},
    "seresnext101_32x8d": {"ah_in1k": _RSB},
    "seresnext101_64x4d": {"gluon_in1k": _BICUBIC},
    "seresnext101d_32x8d": {"ah_in1k": _RSB},
    "seresnextaa101d_32x8d": {
        "sw_in12k_ft_in1k_288": _RSB | {"size": 288, "test_size": 320},
        "sw_in12k_ft_in1k": _TIMM | {"test_crop_pct": 1.0},
        "sw_in12k": _RSB | {"num_classes": 11821},
        "ah_in1k": _RSB,
    },
    "seresnextaa201d_32x8d": {
        "sw_in12k_ft_in1k_384": _BICUBIC | {"size": 384, "crop_pct": 1.0},
        "sw_in12k": _RSB | {"size": 320, "test_size": 384, "num_classes": 11821},
    },
    "test_resnet": {"r160_in1k": {"size": 160, "crop_pct": 0.95} | HALF_MEAN_STD},
    "wide_resnet50_2": {"racm_in1k": _TIMM, "tv_in1k": _PLAIN, "tv2_in1k": _TORCHVISION_2},
    "wide_resnet101_2": {"tv_in1k": _PLAIN, "tv2_in1k": _TORCHVISION_2},
}


def pretrained_cfgs(deep_stems: Collection[str]) -> dict[str, PretrainedCfg]:
    """WEIGHTS by `architecture.tag`; those in deep_stems have their first convolution inside of `conv1`."""
    return {
        f"{name}.{tag}": _cfg("conv1.0" if name in deep_stems else "conv1", **facts)
        for name, tags in WEIGHTS.items()
        for tag, facts in tags.items()
    }


def _cfg(
    first_conv: str,
    *,
    size: int = 224,
    test_size: int | None = None,
    interpolation: str = "bilinear",
    weights: bool = True,
    **facts,
) -> PretrainedCfg:
    return PretrainedCfg(
        hf_hub_id="timm/" if weights else None,
        input_size=(3, size, size),
        test_input_size=None if test_size is None else (3, test_size, test_size),
        pool_size=(-(-size // 32),) * 2,
        interpolation=interpolation,
        first_conv=first_conv,
        classifier="fc",
        **facts,
    )


# ---- deprecated names ------------------------------------------------------------------------------------

_OF_TORCHVISION = ("resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")
_OF_FACEBOOK = ("resnet18", "resnet50", "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_32x16d")
_OF_GLUON = (
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_64x4d",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
    "seresnext101_64x4d",
    "senet154",
)
_GLUON_RESNETS = [(depth, kind) for kind in "bcds" for depth in (18, 34, 50, 101, 152) if kind == "b" or depth >= 50]

# timm's older names, and what they stand for today.
DEPRECATED_NAMES = {
    **{f"tv_{name}": f"{name}.tv_in1k" for name in _OF_TORCHVISION},
    # One for all four: so does timm.
    **{f"ig_resnext101_32x{width}d": "resnext101_32x8d.fb_wsl_ig1b_ft_in1k" for width in (8, 16, 32, 48)},
    **{f"ssl_{name}": f"{name}.fb_ssl_yfcc100m_ft_in1k" for name in _OF_FACEBOOK},
    **{f"swsl_{name}": f"{name}.fb_swsl_ig1b_ft_in1k" for name in _OF_FACEBOOK},
    **{f"gluon_resnet{d}_v1{k}": f"resnet{d}{k if k != 'b' else ''}.gluon_in1k" for d, k in _GLUON_RESNETS},
    **{f"gluon_{name}": f"{name}.gluon_in1k" for name in _OF_GLUON},
    "seresnext26tn_32x4d": "seresnext26t_32x4d",
}
