"""Preprocessing at inference against timm to the bit; what the transform refuses; its arguments' errors."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from random_photos import random_photo

from bbfast.data import create_transform
from bbfast.data.transforms import ImageTransform

INTERPOLATIONS = ["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"]
CROPS = [None, 0.5, 0.875, 0.95, 1.0, 1.2]
PHOTO_SIZES = [(101, 77), (53, 160), (20, 31), (64, 64), (9, 90), (1, 1)]


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def assert_equal_to_timm(timm, input_size, photo, **arguments):
    print(input_size, photo, arguments)
    ours = create_transform(input_size, **arguments)(photo)
    theirs = timm.data.create_transform(input_size, **arguments)(photo)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    return ours


@pytest.mark.parametrize("crop_mode", [None, "center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 64, 64), (3, 65, 47), (32, 96), 33])
@pytest.mark.parametrize("photo_size", PHOTO_SIZES)
def test_equals_timm_to_the_bit(timm, crop_mode, size, photo_size):
    y = assert_equal_to_timm(
        timm,
        size,
        random_photo(*photo_size),
        interpolation=random.choice(INTERPOLATIONS),
        crop_pct=random.choice(CROPS),
        crop_mode=crop_mode,
        mean=tuple(random.random() for _ in range(3)),
        std=tuple(0.1 + random.random() for _ in range(3)),
    )
    assert y.dtype == torch.float32
    assert y.shape == (3, *((size, size) if isinstance(size, int) else size[-2:]))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_every_interpolation_of_random_sizes(timm, interpolation, crop_mode):
    for _ in range(8):
        size = (random.randint(8, 70), random.randint(8, 70))
        photo = random_photo(random.randint(20, 120), random.randint(20, 120))
        crop_pct = random.uniform(0.3, 1.1)
        assert_equal_to_timm(timm, size, photo, interpolation=interpolation, crop_mode=crop_mode, crop_pct=crop_pct)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pixels_as_they_are(timm, crop_mode):
    y = assert_equal_to_timm(timm, (40, 56), random_photo(90, 60), normalize=False, crop_mode=crop_mode)
    assert y.dtype == torch.uint8


@pytest.mark.parametrize("input_size", [48, (48, 48), (3, 40, 56)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_no_augmentation_in_training(timm, input_size, normalize, interpolation):
    """timm treats an int unlike a tuple: it keeps the photo's proportions."""
    arguments = {"is_training": True, "no_aug": True, "normalize": normalize, "interpolation": interpolation}
    arguments |= {"hflip": 1.0, "crop_pct": 0.5, "re_prob": 1.0, "auto_augment": "original"}  # which do not count
    assert_equal_to_timm(timm, input_size, random_photo(90, 60), **arguments)


def test_no_augmentation_means_nothing_at_inference(timm):
    assert_equal_to_timm(timm, 40, random_photo(90, 60), no_aug=True, crop_pct=0.9)


@pytest.mark.parametrize("mode, mean", [("L", 0.4), ("LA", (0.4, 0.1)), ("RGBA", (0.4, 0.3, 0.2, 0.1))])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_other_numbers_of_channels(timm, mode, mean, crop_mode):
    means = (mean,) if mode == "L" else mean
    photo = random_photo(70, 50, mode)
    arguments = {"crop_mode": crop_mode, "interpolation": "bicubic"}
    ours = create_transform((len(means), 30, 30), mean=mean, std=0.5, **arguments)(photo)
    theirs = timm.data.create_transform(30, mean=means, std=(0.5,) * len(means), **arguments)(photo)
    assert torch.equal(ours, theirs)
    assert ours.shape == (len(means), 30, 30)


def test_one_mean_is_for_any_number_of_channels():
    transform = create_transform(16, mean=0.5, std=[0.25], crop_mode="border")
    for mode, channels in (("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)):
        y = transform(Image.new(mode, (16, 8), (255,) * channels if channels > 1 else 255))
        assert y.shape == (channels, 16, 16)
        white, filled = y[:, 8, 8], y[:, 0, 0]
        assert torch.equal(white, torch.full((channels,), 2.0))
        assert (filled.abs() <= 0.5 / 255 / 0.25 + 1e-6).all()  # 0.5 is 127.5, which no pixel can be


def test_a_very_thin_photo_keeps_a_pixel():
    for crop_mode in ("center", "border", "squash"):
        assert create_transform((16, 24), crop_mode=crop_mode)(random_photo(500, 1)).isfinite().all()


def test_pickles_and_says_what_it_does():
    for crop_mode in ("center", "squash", "border"):
        transform = create_transform((3, 20, 30), crop_mode=crop_mode, interpolation="bicubic")
        photo = random_photo(50, 40)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(photo), transform(photo))
        assert "Normalize" in repr(transform) and "bicubic" in repr(transform)
        assert [type(step).__name__ for step in transform.transforms][-2:] == ["ToTensor", "Normalize"]


# ---- what the transform refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), "photo.jpg", None],
    ids=["array", "tensor", "str", "None"],
)
@pytest.mark.parametrize("is_training", [False, True])
def test_only_pil_images(image, is_training):
    with pytest.raises(TypeError, match=f"the transform takes a PIL image, got {type(image).__name__}; arrays become"):
        create_transform(8, is_training)(image)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "CMYK", "1", "I", "F", "I;16", "HSV", "YCbCr"])
def test_only_modes_of_its_channels(mode):
    """A palette's numbers or a hue are no colours, and 16 bits would not be scaled."""
    with pytest.raises(ValueError, match=f"takes an image of mode RGB, got {mode}; convert it with image.convert"):
        create_transform(8)(Image.new(mode, (9, 9)))
    with pytest.raises(ValueError, match=f"takes an image of mode RGB, got {mode}"):
        create_transform(8, is_training=True, separate=True)[0](Image.new(mode, (9, 9)))


@pytest.mark.parametrize("size", [(0, 9), (9, 0)])
def test_no_empty_photo(size):
    with pytest.raises(ValueError, match=f"the image is empty: {size[0]} x {size[1]} pixels"):
        create_transform(8)(Image.new("RGB", size))


def test_steps_may_be_exchanged():
    """As training scripts do for small images: `transform.transforms[0] = RandomCrop(32, padding=4)`."""
    from torchvision.transforms import Compose, RandomCrop

    transform = create_transform(32, is_training=True, hflip=0, color_jitter=None, mean=0.0, std=1.0)
    transform.transforms[0] = RandomCrop(32, padding=4)
    assert isinstance(transform, ImageTransform) and isinstance(transform, Compose)
    photo = random_photo(32, 32)
    pixels = torch.nn.functional.pad(torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255, (4,) * 4)
    windows = pixels.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(81, 3, 32, 32)
    assert (windows == transform(photo)).flatten(1).all(1).any()


# ---- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"interpolation": "cubic"}, ValueError, "interpolation='cubic' is not known; allowed: nearest, bilinear"),
        ({"interpolation": "random"}, ValueError, "interpolation='random' .* random in training only"),
        ({"crop_mode": "middle"}, ValueError, "crop_mode='middle' is not known; allowed: center, squash, border"),
        ({"crop_mode": ""}, ValueError, "crop_mode='' is not known"),
        ({"crop_pct": -0.5}, ValueError, "crop_pct=-0.5 is not allowed"),
        ({"crop_pct": 0}, ValueError, "crop_pct=0 is not allowed"),
        ({"crop_pct": math.nan}, ValueError, "crop_pct=nan is not allowed"),
        ({"crop_pct": math.inf}, ValueError, "crop_pct=inf is not allowed"),
        ({"crop_pct": "0.9"}, TypeError, "crop_pct must be a float, got str"),
        (
            {"input_size": (8, 99), "crop_pct": 9.0},
            ValueError,
            r"too large for input_size=\(8, 99\): it leaves \(0, 11\)",
        ),
        ({"input_size": (3, 224, 224, 1)}, ValueError, r"input_size must be an int, .* got \(3, 224, 224, 1\)"),
        ({"input_size": 0}, ValueError, "input_size must be an int, .* got 0"),
        ({"input_size": 224.0}, ValueError, "input_size must be an int, .* got 224.0"),
        ({"input_size": True}, ValueError, "input_size must be an int, .* got True"),
        ({"input_size": (3, -1, 4)}, ValueError, "input_size must be an int"),
        (
            {"input_size": (1, 8, 8)},
            ValueError,
            "same number of channels, 1 to 4; got mean for 3, std for 3, input_size for 1",
        ),
        ({"mean": (0.5, 0.5)}, ValueError, "same number of channels, 1 to 4; got mean for 2, std for 3"),
        ({"mean": 0.5, "std": 0.5, "input_size": (6, 8, 8)}, ValueError, "channels, 1 to 4; got input_size for 6"),
        ({"mean": "dark"}, TypeError, "mean must be a number or one per channel, got 'dark'"),
        ({"mean": "555"}, TypeError, "mean must be a number or one per channel, got '555'"),
        ({"mean": None}, TypeError, "mean must be a number or one per channel, got None"),
        ({"mean": ()}, ValueError, r"mean must hold finite numbers, got \(\)"),
        ({"std": (0.5, math.nan, 0.5)}, ValueError, "std must hold finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std=0.0 is not allowed"),
        ({"is_training": 1}, TypeError, "is_training must be a bool, got int"),
        ({"no_aug": None}, TypeError, "no_aug must be a bool, got NoneType"),
        ({"normalize": "yes"}, TypeError, "normalize must be a bool, got str"),
        ({"separate": 1}, TypeError, "separate must be a bool, got int"),
        ({"separate": True}, ValueError, "separate=True is only possible with is_training=True and no_aug=False"),
        ({"separate": True, "is_training": True, "no_aug": True}, ValueError, "separate=True is only possible with"),
        ({"crop_percent": 0.9}, TypeError, "unexpected keyword argument 'crop_percent'"),
        ({"use_prefetcher": True}, TypeError, "unexpected keyword argument 'use_prefetcher'"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        create_transform(**arguments)
