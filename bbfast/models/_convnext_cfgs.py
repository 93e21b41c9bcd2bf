"""What is known of ConvNeXt's pretrained weights, and the names that models had before tags."""

from __future__ import annotations

from bbfast.models._pretrained import HALF_MEAN_STD, PretrainedCfg


def _cfg(size: int = 224, *, test_size: int | None = None, weights: bool = True, **facts) -> PretrainedCfg:
    """Square inputs, a last map of size / 32, timm's hub repositories; without a margin but at 224 pixels."""
    return PretrainedCfg(
        hf_hub_id="timm/" if weights else None,
        input_size=(3, size, size),
        test_input_size=None if test_size is None else (3, test_size, test_size),
        first_conv="stem.0",
        classifier="head.fc",
        **{"pool_size": (size // 32, size // 32), "crop_pct": 0.875 if size == 224 else 1.0, **facts},
    )


# ---- facts that several weights share ----------------------------------------------------------------------

_12K, _22K = {"num_classes": 11821}, {"num_classes": 21841}
_AT_288 = {"test_size": 288, "test_crop_pct": 1.0}
_AT_288_WITH_MARGIN = {"test_size": 288, "test_crop_pct": 0.95}
_SQUASH = {"crop_mode": "squash"}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

# ---- tags that several models have; the first of a model's is its default ----------------------------------

_IN12K = {
    "in12k_ft_in1k": _cfg(crop_pct=0.95, **_AT_288),
    "in12k_ft_in1k_384": _cfg(384, **_SQUASH),
    "in12k": _cfg(crop_pct=0.95, **_12K),
}
_FACEBOOK = {
    "fb_in22k_ft_in1k": _cfg(**_AT_288),
    "fb_in1k": _cfg(**_AT_288),
    "fb_in22k_ft_in1k_384": _cfg(384, **_SQUASH),
    "fb_in22k": _cfg(**_22K),
}
_DINOV3 = {"dinov3_lvd1689m": _cfg(crop_pct=1.0, num_classes=0)}
_EUPE = {"eupe_lvd1689m": _cfg(256, num_classes=0)}
_FCMAE_IN22K = {
    "fcmae_ft_in22k_in1k": _cfg(**_AT_288),
    "fcmae_ft_in22k_in1k_384": _cfg(384, **_SQUASH),
}
_FCMAE = {
    "fcmae_ft_in1k": _cfg(**_AT_288),
    "fcmae": _cfg(num_classes=0),
}
_FCMAE_SMALL = {**_FCMAE, "fcmae_ft_in1k": _cfg(**_AT_288_WITH_MARGIN)}
_TEST = {"r160_in1k": _cfg(160, crop_pct=0.95, **HALF_MEAN_STD)}

# ---- the tags of each model --------------------------------------------------------------------------------

_TAGS = {
    "convnext_zepto_rms": {"ra4_e3600_r224_in1k": _cfg(**HALF_MEAN_STD)},
    "convnext_zepto_rms_ols": {"ra4_e3600_r224_in1k": _cfg(crop_pct=0.9, **HALF_MEAN_STD)},
    "convnext_atto": {"d2_in1k": _cfg(**_AT_288_WITH_MARGIN)},
    "convnext_atto_ols": {"a2_in1k": _cfg(**_AT_288_WITH_MARGIN)},
    "convnext_atto_rms": {"untrained": _cfg(weights=False, test_size=256, test_crop_pct=0.95)},
    "convnext_femto": {"d1_in1k": _cfg(**_AT_288_WITH_MARGIN)},
    "convnext_femto_ols": {"d1_in1k": _cfg(**_AT_288_WITH_MARGIN)},
    "convnext_pico": {"d1_in1k": _cfg(**_AT_288_WITH_MARGIN)},
    "convnext_pico_ols": {"d1_in1k": _cfg(crop_pct=0.95, **_AT_288)},
    "convnext_nano": {
        "in12k_ft_in1k": _cfg(crop_pct=0.95, **_AT_288),
        "d1h_in1k": _cfg(crop_pct=0.95, **_AT_288),
        "r384_in12k_ft_in1k": _cfg(384),
        "in12k": _cfg(crop_pct=0.95, **_12K),
        "r384_in12k": _cfg(384, **_12K),
        "r384_ad_in12k": _cfg(384, **_12K),
    },
    "convnext_nano_ols": {"d1h_in1k": _cfg(crop_pct=0.95, **_AT_288)},
    "convnext_tiny_hnf": {"a2h_in1k": _cfg(crop_pct=0.95, **_AT_288)},
    "convnext_tiny": {**_IN12K, **_FACEBOOK, **_DINOV3, **_EUPE},
    "convnext_small": {**_IN12K, **_FACEBOOK, **_DINOV3, **_EUPE},
    "convnext_base": {
        **_FACEBOOK,
        "clip_laion2b_augreg_ft_in12k_in1k": _cfg(256, **_CLIP),
        "clip_laion2b_augreg_ft_in12k_in1k_384": _cfg(384, **_SQUASH, **_CLIP),
        "clip_laion2b_augreg_ft_in1k": _cfg(256, **_CLIP),
        "clip_laiona_augreg_ft_in1k_384": _cfg(384, **_CLIP),
        "clip_laion2b_augreg_ft_in12k": _cfg(256, **_12K, **_CLIP),
        "clip_laion2b": _cfg(256, num_classes=640, **_CLIP),
        "clip_laion2b_augreg": _cfg(256, num_classes=640, **_CLIP),
        "clip_laiona": _cfg(256, num_classes=640, **_CLIP),
        "clip_laiona_320": _cfg(320, num_classes=640, **_CLIP),
        "clip_laiona_augreg_320": _cfg(320, num_classes=640, **_CLIP),
        **_DINOV3,
        **_EUPE,
    },
    "convnext_large": {**_FACEBOOK, **_DINOV3},
    "convnext_large_mlp": {
        "clip_laion2b_soup_ft_in12k_in1k_320": _cfg(320, **_CLIP),
        "clip_laion2b_soup_ft_in12k_in1k_384": _cfg(384, **_SQUASH, **_CLIP),
        "clip_laion2b_augreg_ft_in1k": _cfg(256, **_CLIP),
        "clip_laion2b_augreg_ft_in1k_384": _cfg(384, **_SQUASH, **_CLIP),
        "clip_laion2b_soup_ft_in12k_320": _cfg(320, **_12K, **_CLIP),
        "clip_laion2b_augreg_ft_in12k_384": _cfg(384, **_SQUASH, **_12K, **_CLIP),
        "clip_laion2b_soup_ft_in12k_384": _cfg(384, **_SQUASH, **_12K, **_CLIP),
        "clip_laion2b_augreg": _cfg(256, num_classes=768, **_CLIP),
        "clip_laion2b_ft_320": _cfg(320, num_classes=768, **_CLIP),
        "clip_laion2b_ft_soup_320": _cfg(320, num_classes=768, **_CLIP),
    },
    "convnext_xlarge": {tag: cfg for tag, cfg in _FACEBOOK.items() if tag != "fb_in1k"},
    "convnext_xxlarge": {
        "clip_laion2b_soup_ft_in1k": _cfg(256, **_CLIP),
        "clip_laion2b_soup_ft_in12k": _cfg(256, **_12K, **_CLIP),
        "clip_laion2b_soup": _cfg(256, num_classes=1024, **_CLIP),
        "clip_laion2b_rewind": _cfg(256, num_classes=1024, **_CLIP),
    },
    "convnextv2_atto": _FCMAE_SMALL,
    "convnextv2_femto": _FCMAE_SMALL,
    "convnextv2_pico": _FCMAE_SMALL,
    "convnextv2_nano": {**_FCMAE_IN22K, **_FCMAE},
    "convnextv2_tiny": {**_FCMAE_IN22K, **_FCMAE},
    "convnextv2_small": {"untrained": _cfg(weights=False)},
    "convnextv2_base": {**_FCMAE_IN22K, **_FCMAE},
    "convnextv2_large": {**_FCMAE_IN22K, **_FCMAE},
    "convnextv2_huge": {
        "fcmae_ft_in22k_in1k_384": _cfg(384, **_SQUASH),
        "fcmae_ft_in22k_in1k_512": _cfg(512, pool_size=(15, 15), **_SQUASH),  # 16 x 16; timm says 15
        **_FCMAE,
    },
    "test_convnext": _TEST,
    "test_convnext2": _TEST,
    "test_convnext3": _TEST,
}

PRETRAINED_CFGS = {f"{name}.{tag}": cfg for name, tags in _TAGS.items() for tag, cfg in tags.items()}

# ---- names of old ------------------------------------------------------------------------------------------

DEPRECATED_NAMES = {
    f"convnext_{size}{old}": f"convnext_{size}.{tag}"
    for old, tag in (
        ("_in22ft1k", "fb_in22k_ft_in1k"),
        ("_384_in22ft1k", "fb_in22k_ft_in1k_384"),
        ("_in22k", "fb_in22k"),
    )
    for size in ("tiny", "small", "base", "large", "xlarge")
}
