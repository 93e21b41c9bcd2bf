"""The data config of a model: timm's, and the model's own channels and size where its weights had others."""

import random

import pytest
import torch

import bbfast
from bbfast.data import resolve_data_config, resolve_model_data_config

timm = pytest.importorskip("timm")

NAMES = ["mobilenetv3_large_100", "tf_mobilenetv3_small_100", "tf_efficientnet_b4", "efficientnet_b0", "convnext_tiny"]
SWIN = "swin_tiny_patch4_window7_224"


class Model:
    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize("use_test_size", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_equals_timm(name, use_test_size):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    theirs = timm.data.resolve_data_config(pretrained_cfg=cfg, use_test_size=use_test_size)
    assert resolve_model_data_config(Model(pretrained_cfg=cfg), use_test_size=use_test_size) == theirs
    assert resolve_model_data_config(object(), pretrained_cfg=cfg, use_test_size=use_test_size) == theirs
    assert resolve_data_config(pretrained_cfg=cfg, use_test_size=use_test_size) == theirs


FIELDS = {
    "input_size": [None, (3, 48, 64), [3, 96, 96], (1, 28, 28)],
    "img_size": [None, 192],
    "interpolation": [None, "", "bilinear"],
    "mean": [None, (0.5,), [0.25], (0.0,)],
    "std": [None, (0.5,), [0.25]],
    "crop_pct": [None, 1.0, 0.9],
    "crop_mode": [None, "", "squash"],
}


def test_args_equal_timm():
    """Random mixtures of fields; means of another length than the channels are left out, since timm keeps them."""
    cfg = timm.get_pretrained_cfg("efficientnet_b2").to_dict()
    for _ in range(200):
        args = {name: random.choice(choices) for name, choices in FIELDS.items() if random.random() < 0.6}
        args.setdefault("mean", (0.5,))
        args.setdefault("std", (0.25,))
        use_test_size = random.random() < 0.5
        trained = random.choice([cfg, {}])
        if (args.get("input_size") or (3,))[0] == 1:
            args |= {"mean": args["mean"] or (0.5,), "std": args["std"] or (0.5,)}
        theirs = timm.data.resolve_data_config(args, trained, use_test_size=use_test_size)
        assert resolve_data_config(args, trained, use_test_size=use_test_size) == theirs, (args, trained)


def test_defaults_are_imagenets():
    theirs = timm.data.resolve_data_config(args={"interpolation": "bicubic"})
    assert resolve_model_data_config(object()) == theirs
    assert resolve_model_data_config(object(), {"crop_mode": None, "mean": None}) == theirs
    assert resolve_data_config({"interpolation": "bicubic"}) == theirs
    assert resolve_data_config({"mean": None}) == theirs  # a command line that said nothing


# ---- the model itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [bbfast, timm])
def test_follows_channels_and_size_of_the_model(library):
    model = library.create_model(SWIN, in_chans=1, img_size=256, device="meta")
    ours = resolve_model_data_config(model)
    assert ours["input_size"] == (1, 256, 256)
    assert ours["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert ours["std"] == pytest.approx([(0.229 + 0.224 + 0.225) / 3])
    if library is timm:  # which has a newer function that follows the model, and one that does not
        assert ours == timm.data.resolve_input_data_config(model)
        assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_means_of_other_channels_equal_timm_and_its_newer_function(channels):
    model = timm.create_model("tf_mobilenetv3_small_100", in_chans=channels, device="meta")
    assert resolve_model_data_config(model) == timm.data.resolve_input_data_config(model)
    ours = resolve_model_data_config(model, {"mean": 0.25, "std": tuple(range(1, channels + 1))})
    assert ours["mean"] == (0.25,) * channels
    assert ours["std"] == tuple(range(1, channels + 1))


def test_feature_extractors_and_wrappers_of_several_gpus():
    backbone = bbfast.create_model(SWIN, features_only=True, img_size=(192, 256), in_chans=2, device="meta")
    config = resolve_model_data_config(backbone)
    assert config["input_size"] == (2, 192, 256)
    assert config["crop_pct"] == 0.9
    small = bbfast.create_model("tf_mobilenetv3_small_100", device="meta")
    config = resolve_model_data_config(torch.nn.DataParallel(small))
    assert config == resolve_model_data_config(small)
    assert config["mean"] == (0.5, 0.5, 0.5)  # not the defaults


def test_use_test_size_yields_to_a_model_of_one_size():
    cfg = {"input_size": (3, 224, 224), "test_input_size": (3, 288, 288), "test_crop_pct": 1.0}
    for strict, expected in ((True, (3, 256, 256)), (False, (3, 288, 288))):
        patch_embed = Model(img_size=(256, 256), strict_img_size=strict)
        model = Model(pretrained_cfg=cfg, patch_embed=patch_embed)
        assert resolve_model_data_config(model)["input_size"] == (3, 256, 256)
        config = resolve_model_data_config(model, use_test_size=True)
        assert (config["input_size"], config["crop_pct"]) == (expected, 1.0)
    unsized = Model(pretrained_cfg=cfg, patch_embed=Model(img_size=None, strict_img_size=False))
    assert resolve_model_data_config(unsized)["input_size"] == (3, 224, 224)


def test_args_come_before_the_model():
    model = bbfast.create_model(SWIN, in_chans=1, img_size=256, device="meta")
    assert resolve_model_data_config(model, {"img_size": 224})["input_size"] == (1, 224, 224)
    assert resolve_model_data_config(model, {"img_size": (224, 192)})["input_size"] == (1, 224, 192)
    assert resolve_model_data_config(model, {"in_chans": 3})["input_size"] == (3, 256, 256)
    assert resolve_model_data_config(model, {"chans": 4})["input_size"] == (4, 256, 256)
    assert resolve_model_data_config(model, {"chans": 4, "in_chans": 2})["input_size"] == (2, 256, 256)
    every = {"input_size": (3, 20, 30), "img_size": 224, "in_chans": 2}
    assert resolve_model_data_config(model, every)["input_size"] == (3, 20, 30)


def test_a_config_may_be_given_instead_of_the_models():
    model = bbfast.create_model("tf_mobilenetv3_small_100", in_chans=1, device="meta")
    cfg = bbfast.models.get_pretrained_cfg("tf_efficientnet_b4")
    config = resolve_model_data_config(model, pretrained_cfg=cfg)
    assert config["input_size"] == (1, 380, 380)
    assert config["crop_pct"] == 0.922
    assert resolve_model_data_config(Model(pretrained_cfg=cfg))["input_size"] == (3, 380, 380)


@pytest.mark.parametrize(
    "args, error, message",
    [
        ({"crop_percent": 1.0}, ValueError, "args holds unknown fields: crop_percent; allowed: input_size, img_size"),
        ({"mean": (0.5, 0.5)}, ValueError, r"mean must hold 1 or 3 values, got 2: \(0.5, 0.5\)"),
        ({"std": (0.5, 0.5), "in_chans": 1}, ValueError, "std must hold 1 or 1 values, got 2"),
        ({"input_size": (224, 224)}, ValueError, r"input_size must be \(channels, height, width\), got \(224, 224\)"),
        ({"input_size": 224}, TypeError, "input_size must be a tuple of ints, got int"),
        ({"input_size": (3, 0, 4)}, ValueError, "input_size=0 is not allowed; it must be at least 1"),
        ({"img_size": 224.0}, TypeError, "img_size must be an int, got float"),
        ({"img_size": (1, 2, 3)}, ValueError, r"img_size must be an int or \(height, width\), got \(1, 2, 3\)"),
        ({"in_chans": 0}, ValueError, "in_chans=0 is not allowed"),
        ({"chans": "3"}, TypeError, "chans must be an int, got str"),
        ({"crop_pct": 0}, ValueError, "crop_pct=0 is not allowed"),
        ([("crop_pct", 1.0)], TypeError, r"args must be a dict \(of an argparse.Namespace: vars\(args\)\), got list"),
    ],
)
def test_rejects_args(args, error, message):
    with pytest.raises(error, match=message):
        resolve_model_data_config(object(), args)


def test_rejects_other_arguments():
    with pytest.raises(
        TypeError, match=r"model must be a model, as from bbfast.create_model\('resnet50'\), got its name"
    ):
        resolve_model_data_config("resnet50")
    with pytest.raises(TypeError, match="pretrained_cfg must be a dict or a PretrainedCfg, got str"):
        resolve_model_data_config(object(), pretrained_cfg="efficientnet_b0")
    with pytest.raises(TypeError, match="use_test_size must be a bool, got int"):
        resolve_model_data_config(object(), use_test_size=288)
    for nothing in ({}, {"args": {}}, {"pretrained_cfg": {}}):
        with pytest.raises(ValueError, match="a model, args or a pretrained_cfg is needed"):
            resolve_data_config(**nothing)
    with pytest.raises(ValueError, match="is needed"):
        resolve_model_data_config(None)
