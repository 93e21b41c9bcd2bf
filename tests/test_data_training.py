"""Preprocessing in training: the order of the steps, and samples of what they draw, beside timm's."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from random_photos import TransformedPhotos, random_photo
from torch.utils.data import DataLoader

from bbfast.data import create_transform

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "color_jitter": None}
WHOLE = {"is_training": True, "scale": (1, 1), "ratio": (1, 1), "hflip": 0}  # the photo as it is
EVERYTHING = {
    "vflip": 0.3,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "grayscale_prob": 0.2,
    "gaussian_blur_prob": 0.3,
    "interpolation": "random",
    "re_prob": 0.5,
    "re_mode": "pixel",
}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def map_of_places(size: int = 256) -> Image.Image:
    """Each pixel's red says its column, its green its row."""
    rows, columns = np.mgrid[:size, :size]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def assert_same_distribution(name: str, ours, theirs) -> None:
    """Two samples' distribution functions lie closer than chance alone would part one pair in a million."""
    both = np.sort(np.concatenate([ours, theirs]))
    shares = [np.searchsorted(np.sort(sample), both, side="right") / len(sample) for sample in (ours, theirs)]
    distance, limit = np.abs(shares[0] - shares[1]).max(), 2.7 * math.sqrt(1 / len(ours) + 1 / len(theirs))
    print(f"{name}: distance {distance:.3f}, limit {limit:.3f}")
    assert distance < limit


def assert_rate(name: str, hits: int, draws: int, probability: float) -> None:
    """Within five standard deviations."""
    print(f"{name}: {hits} of {draws}, expected {probability * draws:.0f}")
    assert abs(hits - draws * probability) <= 5 * math.sqrt(draws * probability * (1 - probability))


# ---- the steps -------------------------------------------------------------------------------------------

OPTIONS = {
    "hflip": [0.0, 0.5],
    "vflip": [0.0, 0.2],
    "color_jitter": [0.4, None, (0.1, 0.2, 0.3), (0.1, 0.2, 0.3, 0.05)],
    "color_jitter_prob": [None, 0.5],
    "grayscale_prob": [0.0, 0.2],
    "gaussian_blur_prob": [0.0, 0.2],
    "auto_augment": [None, "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original"],
    "interpolation": ["bilinear", "bicubic", "lanczos"],
    "re_prob": [0.0, 0.3],
    "normalize": [True, False],
}
OUR_NAMES = {
    "RandomResizedCropAndInterpolation": "RandomResizedCrop",
    "MaybeToTensor": "ToTensor",
    "MaybePILToTensor": "PILToTensor",
    "AugMixAugment": "AugMix",
}


def names(transform) -> list[str]:
    return [OUR_NAMES.get(type(step).__name__, type(step).__name__) for step in transform.transforms]


def test_steps_are_timms_in_timms_order(timm):
    for _ in range(100):
        arguments = {name: random.choice(choices) for name, choices in OPTIONS.items()}
        if not arguments["normalize"]:
            arguments["re_prob"] = 0.0
        if arguments["auto_augment"] and arguments["interpolation"] == "lanczos":
            arguments["interpolation"] = "nearest"
        theirs = timm.data.create_transform(48, is_training=True, separate=True, **arguments)
        ours = create_transform(48, is_training=True, separate=True, **arguments)
        assert [names(part) for part in ours] == [names(part) for part in theirs], arguments
        whole = create_transform(48, is_training=True, **arguments)
        assert names(whole) == [name for part in ours for name in names(part)]


def test_no_jitter_with_auto_augment_and_none_of_strength_zero():
    assert "ColorJitter" in names(create_transform(48, is_training=True))
    for arguments in (
        {"auto_augment": "original"},
        {"color_jitter": 0},
        {"color_jitter": None},
        {"color_jitter_prob": 0},
    ):
        assert "ColorJitter" not in names(create_transform(48, is_training=True, **arguments))
    assert "AutoAugment" not in names(create_transform(48, is_training=True, auto_augment=""))


@pytest.mark.parametrize("auto_augment", ["rand-m9-mstd0.5-inc1", "original", "ta_wide"])
def test_auto_augment_fills_with_the_mean_and_interpolates_alike(auto_augment):
    arguments = {"is_training": True, "hflip": 0, "auto_augment": auto_augment}
    step = create_transform(48, mean=(0.1, 0.5, 1.0), interpolation="bicubic", **arguments).transforms[1]
    assert (step.fill, step.interpolation.value) == ([26, 128, 255], "bicubic")
    step = create_transform(48, mean=0.3, std=0.5, interpolation="random", **arguments).transforms[1]
    assert [(choice.fill, choice.interpolation.value) for choice in step.transforms] == [
        (76, "bilinear"),
        (76, "bicubic"),
    ]


def test_parts_in_turn_are_the_whole():
    photo = random_photo(90, 70)
    first, second, third = create_transform((40, 48), is_training=True, separate=True, **EVERYTHING)
    whole = create_transform((40, 48), is_training=True, **EVERYTHING)
    for seed in range(10):
        torch.manual_seed(seed)
        expected = whole(photo)
        torch.manual_seed(seed)
        assert torch.equal(third(second(first(photo))), expected)


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-mstd0.5-inc1", "augmix-m5", "original", "svhn", "ta_wide"])
@pytest.mark.parametrize("photo_size", [(90, 70), (400, 20), (1, 60), (1, 1)])
def test_any_photo_becomes_a_finite_tensor(auto_augment, photo_size):
    arguments = EVERYTHING | {"auto_augment": auto_augment}
    transform = create_transform((32, 40), is_training=True, **arguments)
    pixels = create_transform(40, is_training=True, normalize=False, **(arguments | {"re_prob": 0}))
    for _ in range(3):
        y = transform(random_photo(*photo_size))
        assert y.shape == (3, 32, 40) and y.dtype == torch.float32 and y.isfinite().all()
        y = pixels(random_photo(*photo_size))
        assert y.shape == (3, 40, 40) and y.dtype == torch.uint8


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-mstd0.5-inc1", "augmix", "original", "ta_wide"])
@pytest.mark.parametrize("mode, mean", [("L", (0.4,)), ("L", 0.4), ("RGB", 0.4)])
def test_grey_photos_and_one_mean(auto_augment, mode, mean):
    arguments = EVERYTHING | {"auto_augment": auto_augment, "mean": mean, "std": 0.2}
    transform = create_transform(24, is_training=True, **arguments)
    for _ in range(10):
        assert transform(random_photo(30, 40, mode)).shape == (1 if mode == "L" else 3, 24, 24)


def test_photos_with_alpha():
    transform = create_transform((4, 24, 24), is_training=True, mean=0.5, std=0.5, re_prob=0.5, color_jitter=(0.4,) * 4)
    assert transform(random_photo(30, 40, "RGBA")).shape == (4, 24, 24)


# ---- what is drawn ---------------------------------------------------------------------------------------


def crops_of(transform, count: int) -> dict[str, np.ndarray]:
    """Where random crops of a square photo lie, and whether they were flipped."""
    photo = map_of_places()
    corners = [255 * transform(photo)[:2, [0, -1], [0, -1]].double().numpy() for _ in range(count)]
    (left, right), (top, bottom) = np.array(corners).transpose(1, 2, 0)
    width, height = abs(right - left), abs(bottom - top)
    return {
        "left": np.minimum(left, right),
        "top": np.minimum(top, bottom),
        "width": width,
        "height": height,
        "area": width * height,
        "ratio": width / height,
        "hflip": left > right,
        "vflip": top > bottom,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"vflip": 0.3, "hflip": 0.0},
        {"scale": (0.3, 0.5), "ratio": (0.5, 1.0), "hflip": 0.9},
        {"ratio": (2.0, 4.0), "scale": (0.2, 1.0)},  # many of these do not fit: both take the widest middle instead
    ],
)
def test_crops_and_flips_are_distributed_as_timms(timm, arguments):
    count = 500
    fixed = PLAIN | {"interpolation": "nearest", "is_training": True} | arguments
    ours, theirs = (crops_of(create(24, **fixed), count) for create in (create_transform, timm.data.create_transform))
    for flip, default in (("hflip", 0.5), ("vflip", 0.0)):
        assert_rate(flip, ours.pop(flip).sum(), count, arguments.get(flip, default))
        theirs.pop(flip)
    for name in ours:
        assert_same_distribution(name, ours[name], theirs[name])


def test_random_interpolation_is_bilinear_or_bicubic():
    photo, whole = random_photo(70, 70), PLAIN | WHOLE
    transform = create_transform(30, interpolation="random", **whole)
    bilinear, bicubic = (create_transform(30, interpolation=name, **whole)(photo) for name in ("bilinear", "bicubic"))
    assert not torch.equal(bilinear, bicubic)
    drawn = [transform(photo) for _ in range(200)]
    chosen = [torch.equal(y, bicubic) for y in drawn]
    assert all(is_bicubic or torch.equal(y, bilinear) for is_bicubic, y in zip(chosen, drawn))
    assert_rate("bicubic", sum(chosen), len(chosen), 0.5)


@pytest.mark.parametrize("color_jitter", [(0.4, 0, 0), (0, 0.5, 0), (0, 0, 0.6), (0, 0, 0, 0.3), 0.4])
def test_jitter_is_distributed_as_timms(timm, color_jitter):
    pixels = np.full((8, 8, 3), (90, 120, 100), np.uint8)
    pixels[:, :4] = (200, 40, 60)
    arguments = PLAIN | WHOLE | {"color_jitter": color_jitter}
    samples = []
    for create in (create_transform, timm.data.create_transform):
        transform = create(8, interpolation="nearest", **arguments)
        samples.append(torch.stack([transform(Image.fromarray(pixels))[:, 0, 0] for _ in range(300)]).numpy())
    assert np.ptp(samples[0]) > 0.2
    for channel in range(3):
        assert_same_distribution(f"channel {channel}", *(sample[:, channel] for sample in samples))


@pytest.mark.parametrize(
    "arguments",
    [{"color_jitter": 0.4, "color_jitter_prob": 0.3}, {"grayscale_prob": 0.6}, {"gaussian_blur_prob": 0.4}],
    ids=["jitter", "grey", "blur"],
)
def test_some_photos_are_changed_as_by_timm(timm, arguments):
    """How many, and by how much."""
    rng = np.random.default_rng(random.randrange(2**31))
    photo = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    same = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255
    changes = []
    for create in (create_transform, timm.data.create_transform):
        transform = create(24, **(PLAIN | WHOLE | arguments))
        changes.append([(transform(photo) - same).abs().mean().item() for _ in range(300)])
    assert np.ptp(changes[0]) > 0.05
    assert_same_distribution("change", *map(np.array, changes))
    if "grayscale_prob" in arguments:
        assert_rate("grey", sum(change > 0 for change in changes[0]), 300, 0.6)


def erased_boxes(transform, count: int) -> np.ndarray:
    """(height, width, top, left) of each rectangle that was erased from a white photo."""
    photo, boxes = Image.new("RGB", (60, 40), (255, 255, 255)), []
    for _ in range(count):
        rows, columns = (transform(photo)[0] != 1).nonzero(as_tuple=True)
        if len(rows):
            top, left = rows.min().item(), columns.min().item()
            boxes.append((rows.max().item() + 1 - top, columns.max().item() + 1 - left, top, left))
            assert len(rows) == boxes[-1][0] * boxes[-1][1]
    return np.array(boxes)


def test_erasing_is_distributed_as_timms(timm):
    arguments = PLAIN | {"is_training": True}
    assert_rate("erased", len(erased_boxes(create_transform((40, 60), re_prob=0.4, **arguments), 300)), 300, 0.4)
    creates = (create_transform, timm.data.create_transform)
    ours, theirs = (erased_boxes(create((40, 60), re_prob=1.0, **arguments), 700) for create in creates)
    for name, column in (("height", 0), ("width", 1), ("top", 2), ("left", 3)):
        assert_same_distribution(name, ours[:, column], theirs[:, column])
    assert_same_distribution("area", *(boxes[:, 0] * boxes[:, 1] for boxes in (ours, theirs)))
    assert_same_distribution("ratio", *(boxes[:, 0] / boxes[:, 1] for boxes in (ours, theirs)))


@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_what_is_erased_becomes_the_mean_or_noise(mode):
    arguments = {"is_training": True, "color_jitter": None, "re_prob": 1.0, "re_mode": mode}
    transform, white = create_transform(64, **arguments), Image.new("RGB", (64, 64), (255, 255, 255))
    untouched = create_transform(64, is_training=True, color_jitter=None)(white)
    erased = torch.cat([y[y != untouched] for y in (transform(white) for _ in range(20))])
    assert len(erased) > 20 * 3 * 64
    if mode == "const":
        assert (erased == 0).all()
    else:
        assert abs(erased.mean()) < 0.1 and abs(erased.std() - 1) < 0.1
        assert len(erased.unique()) > 0.99 * len(erased)


# ---- seeds, pickles, workers -----------------------------------------------------------------------------


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-mstd0.5-inc1", "augmix-m5", "original", "ta_wide"])
def test_torchs_seed_repeats_everything(auto_augment):
    photo = random_photo(90, 70)
    transform = create_transform(32, is_training=True, **(EVERYTHING | {"auto_augment": auto_augment}))
    drawn = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        random.seed(len(drawn))  # which must not count
        np.random.seed(len(drawn))
        drawn.append(torch.stack([transform(photo) for _ in range(8)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_repeat_by_their_seed(start):
    """A spawned process knows nothing of this one: the transform travels to it, and draws from the worker's seed."""
    photos = [random_photo(60, 50) for _ in range(8)]
    transform = create_transform(32, is_training=True, **EVERYTHING)
    loader = DataLoader(
        TransformedPhotos(photos, transform),
        batch_size=2,
        num_workers=2,
        multiprocessing_context=start,
        generator=torch.Generator().manual_seed(5),
    )
    base_seed = torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(5)).item()
    drawn = [sample for batch in loader for sample in zip(*batch)]
    assert sorted(index.item() for index, *_ in drawn) == list(range(8))
    assert {number.item() for _, _, number, _ in drawn} == {0, 1}
    for worker in (0, 1):
        torch.manual_seed(base_seed + worker)
        for index, seed, _, y in (sample for sample in drawn if sample[2] == worker):
            assert seed == base_seed + worker
            assert torch.equal(y, transform(photos[index]))


def test_pickles_and_says_what_it_does():
    transform = create_transform(32, is_training=True, **EVERYTHING)
    photo, copy = random_photo(90, 70), pickle.loads(pickle.dumps(transform))
    torch.manual_seed(1)
    expected = transform(photo)
    torch.manual_seed(1)
    assert torch.equal(copy(photo), expected)
    for name in ("RandomResizedCrop", "RandomHorizontalFlip", "level=9, level_std=0.5", "bicubic", "RandomErasing"):
        assert name in repr(transform)


# ---- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"interpolation": "cubic"}, ValueError, "interpolation='cubic' is not known; allowed: nearest, .*, random$"),
        ({"scale": (0.5, 0.2)}, ValueError, r"scale=\(0.5, 0.2\) is not allowed; .* within 0..1"),
        ({"scale": (0.5, 1.2)}, ValueError, "scale=.* is not allowed"),
        ({"scale": (-0.1, 1.0)}, ValueError, "scale=.* is not allowed"),
        ({"scale": (0, 0)}, ValueError, "scale=.* is not allowed"),
        ({"scale": (0.1, math.nan)}, ValueError, "scale=.* is not allowed"),
        ({"scale": (0.1, 0.2, 0.3)}, ValueError, "scale=.* is not allowed"),
        ({"scale": 0.5}, TypeError, r"scale must be \(lowest, highest\), got 0.5"),
        ({"ratio": ("1", 2)}, TypeError, r"ratio must be \(lowest, highest\), got"),
        ({"ratio": (0, 1)}, ValueError, r"ratio=\(0, 1\) is not allowed; .* above 0"),
        ({"ratio": (1, math.inf)}, ValueError, "ratio=.* is not allowed"),
        ({"hflip": 1.5}, ValueError, "hflip=1.5 is not allowed"),
        ({"hflip": None}, TypeError, "hflip must be a float"),
        ({"vflip": -0.5}, ValueError, "vflip=-0.5 is not allowed"),
        (
            {"color_jitter": (0.1, 0.2)},
            ValueError,
            r"color_jitter must be one number, or 3 or 4 of them, got \(0.1, 0.2\)",
        ),
        ({"color_jitter": -0.4}, ValueError, "color_jitter=-0.4 is not allowed"),
        ({"color_jitter": (0, 0, 0, 0.6)}, ValueError, "color_jitter=.* hue's at most 0.5"),
        ({"color_jitter": math.inf}, ValueError, "color_jitter=inf is not allowed"),
        ({"color_jitter": "0.4"}, TypeError, "color_jitter must be a number"),
        ({"color_jitter_prob": 2}, ValueError, "color_jitter_prob=2 is not allowed"),
        ({"grayscale_prob": 2}, ValueError, "grayscale_prob=2 is not allowed"),
        ({"gaussian_blur_prob": 2}, ValueError, "gaussian_blur_prob=2 is not allowed"),
        (
            {"gaussian_blur_prob": 0.1, "input_size": (11, 40)},
            ValueError,
            "gaussian_blur_prob needs an input_size of at least 12",
        ),
        ({"re_prob": 2}, ValueError, "re_prob=2 is not allowed"),
        ({"re_mode": "rand"}, ValueError, "re_mode='rand' is not provided; allowed: const, pixel"),
        ({"re_count": 2}, ValueError, "re_count=2 is not provided"),
        ({"re_prob": 0.1, "normalize": False}, ValueError, "re_prob must be 0 with normalize=False"),
        ({"auto_augment": 9}, TypeError, "auto_augment must be a str, got int"),
        (
            {"auto_augment": "original", "mean": 0.5, "std": 0.5, "input_size": (4, 8, 8)},
            ValueError,
            "auto_augment and grayscale_prob are for images of mode L or RGB, not RGBA",
        ),
        (
            {"grayscale_prob": 0.1, "mean": (0.5,) * 2, "std": 0.5},
            ValueError,
            "are for images of mode L or RGB, not LA",
        ),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        create_transform(**({"is_training": True} | arguments))
