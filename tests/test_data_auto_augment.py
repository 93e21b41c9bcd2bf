"""timm's strings of auto augment, as torchvision's operations carry them out."""

import math

import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, autoaugment

from bbfast.data.auto_augment import RandAugment, create_auto_augment

# What each operation's magnitude is at m10, for a photo of 331 x 662 pixels, and whether a coin gives its sign.
SIZE = (331, 662)
FULL_RANGE = {
    "Identity": 0,
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150,
    "TranslateY": 300,
    "Rotate": 30,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
    "Posterize": 4,  # bits that remain of 8
    "Solarize": 0,  # the threshold, from 255 down
    "AutoContrast": 0,
    "Equalize": 0,
}
UNSIGNED = {"Posterize", "Solarize", "Identity", "AutoContrast", "Equalize"}


def create(config: str, interpolation: str = "bicubic", fill=(124, 116, 104)):
    return create_auto_augment(config, interpolation, list(fill))


@pytest.fixture
def applied(monkeypatch):
    """(operation, magnitude) of all that is applied; nothing is really."""
    calls = []

    def record(image, name, magnitude, interpolation, fill):
        assert (interpolation, fill) == (InterpolationMode.BICUBIC, [124, 116, 104])
        calls.append((name, magnitude))
        return image

    monkeypatch.setattr(autoaugment, "_apply_op", record)
    return calls


def expected_magnitude(name: str, level: float) -> float:
    if name == "Posterize":
        return 8 - round(level * 0.4)
    if name == "Solarize":
        return 255 * (1 - level / 10)
    return FULL_RANGE[name] * level / 10


@pytest.mark.parametrize("level", [0, 3, 9, 10])
def test_magnitude_is_a_share_of_the_full_range(applied, level):
    augment, photo = create(f"rand-m{level}-n200-p1-inc1"), Image.new("RGB", SIZE)
    augment(photo)
    assert len(applied) == 200
    assert {name for name, _ in applied} <= set(FULL_RANGE) and len({name for name, _ in applied}) > 8
    for name, magnitude in applied:
        assert (magnitude if name in UNSIGNED else abs(magnitude)) == pytest.approx(
            expected_magnitude(name, level), abs=1e-3
        )
    signed = [magnitude for name, magnitude in applied if name not in UNSIGNED]
    assert level == 0 or (min(signed) < 0 < max(signed))


@pytest.mark.parametrize("level", [1, 5, 9])
def test_magnitudes_are_timms_with_inc1(level):
    """Of the operations that both have; torchvision posterises less and rounds Solarize's threshold otherwise."""
    theirs = pytest.importorskip("timm.data.auto_augment").LEVEL_TO_ARG
    hparams = {"translate_pct": 0.45}
    for name in ("ShearX", "ShearY", "Rotate"):
        assert abs(theirs[name](level, hparams)[0]) == pytest.approx(expected_magnitude(name, level))
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert abs(theirs[f"{name}Increasing"](level, hparams)[0] - 1) == pytest.approx(expected_magnitude(name, level))
    threshold = theirs["SolarizeIncreasing"](level, hparams)[0]
    assert threshold == pytest.approx(expected_magnitude("Solarize", level), abs=1.5)
    for name, edge in (("TranslateXRel", SIZE[0]), ("TranslateYRel", SIZE[1])):
        pixels = abs(theirs[name](level, hparams)[0]) * edge
        assert pixels == pytest.approx(expected_magnitude(name.removesuffix("Rel"), level), rel=0.01)


@pytest.mark.parametrize("config, count, probability", [("rand-inc1", 2, 0.5), ("rand-n3-p0.2-inc1", 3, 0.2)])
def test_each_operation_is_applied_with_its_probability(applied, config, count, probability):
    augment, photo, numbers = create(config), Image.new("RGB", SIZE), []
    for _ in range(800):
        augment(photo)
        numbers.append(len(applied))
        applied.clear()
    assert max(numbers) == count and min(numbers) == 0
    draws = 800 * count
    assert abs(sum(numbers) - draws * probability) < 5 * math.sqrt(draws * probability * (1 - probability))


def test_magnitude_noise():
    levels = torch.tensor([create("rand-m5-mstd0.5-inc1").draw_level() for _ in range(4000)])
    assert abs(levels.mean() - 5) < 5 * 0.5 / math.sqrt(4000)
    assert abs(levels.std() - 0.5) < 0.03
    levels = torch.tensor([create("rand-m9-mstd2-inc1").draw_level() for _ in range(2000)])
    assert levels.max() == 10
    assert 0.25 < (levels == 10).double().mean() < 0.37  # cut off half a deviation above m
    assert max(create("rand-m6-mstd3-mmax7-inc1").draw_level() for _ in range(200)) == 7
    assert min(create("rand-m1-mstd3-inc1").draw_level() for _ in range(200)) == 0
    levels = torch.tensor([create("rand-m8-mstd101-inc1").draw_level() for _ in range(4000)])  # evenly in 0..8
    assert levels.min() >= 0 and levels.max() <= 8
    assert torch.allclose(levels.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([2.0, 4.0, 6.0]), atol=0.4)


def test_noise_reaches_the_operations(applied):
    create("rand-m5-mstd0.5-n400-p1-inc1")(Image.new("RGB", SIZE))
    levels = torch.tensor([abs(magnitude) / 0.09 for name, magnitude in applied if name in ("Color", "Contrast")])
    assert len(levels) > 10 and len(levels.unique()) > 5
    assert abs(levels.mean() - 5) < 5 * 0.5 / math.sqrt(len(levels)) + 0.05  # magnitudes come in steps of 0.1


def test_rand_augment_of_a_real_photo():
    """An operation at full strength, through everything: white turned by 30 degrees, the corners filled."""
    augment, white = create("rand-m10-n1-p1-inc1", fill=(10, 20, 30)), Image.new("RGB", (64, 64), (255, 255, 255))
    corners = {augment(white).getpixel((0, 0)) for _ in range(150)}
    assert (10, 20, 30) in corners and (255, 255, 255) in corners
    assert isinstance(augment, RandAugment) and "num_ops=1, probability=1.0, level=10" in repr(augment)


def test_augmix():
    augment = create("augmix-m5-w4-d2-a0.5-b0", "nearest")
    assert isinstance(augment, transforms.AugMix)
    assert (augment.severity, augment.mixture_width, augment.chain_depth, augment.alpha) == (5, 4, 2, 0.5)
    assert augment.interpolation is InterpolationMode.NEAREST
    augment = create("augmix")
    assert (augment.severity, augment.mixture_width, augment.chain_depth, augment.alpha) == (3, 3, -1, 1.0)
    assert augment.interpolation is InterpolationMode.BILINEAR  # of tensors there is no bicubic rotation
    assert augment.fill == [124, 116, 104] and augment.all_ops


def test_policies():
    for name, policy in (
        ("original", AutoAugmentPolicy.IMAGENET),
        ("imagenet", AutoAugmentPolicy.IMAGENET),
        ("cifar10", AutoAugmentPolicy.CIFAR10),
        ("svhn", AutoAugmentPolicy.SVHN),
    ):
        augment = create(name)
        assert isinstance(augment, transforms.AutoAugment) and augment.policy is policy
        assert (augment.interpolation, augment.fill) == (InterpolationMode.BICUBIC, [124, 116, 104])
    augment = create("ta_wide", "bilinear")
    assert isinstance(augment, transforms.TrivialAugmentWide)
    assert (augment.interpolation, augment.fill) == (InterpolationMode.BILINEAR, [124, 116, 104])


def test_original_is_the_policy_of_timms_original():
    """Operations and probabilities agree; magnitudes have other scales."""
    timm = pytest.importorskip("timm.data.auto_augment")
    theirs = [
        [(op.name.removesuffix("Original"), op.prob) for op in pair] for pair in timm.auto_augment_policy("original")
    ]
    ours = [[(name, probability) for name, probability, _ in pair] for pair in create("original").policies]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize(
    "config, message",
    [
        ("v0", "auto_augment='v0' is not provided; allowed: rand-..., augmix-..., ta_wide, original, imagenet"),
        ("v0r", "'v0r' is not provided"),
        ("originalr", "'originalr' is not provided"),
        ("3a", "'3a' is not provided"),
        ("random-m9", "'random-m9' is not provided"),
        ("original-mstd0.5", "the section 'mstd0.5' cannot be expressed with torchvision's; allowed: none"),
        ("ta_wide-m9", "the section 'm9' cannot be expressed with torchvision's; allowed: none"),
        ("rand", "needs the section inc1: torchvision's operations do more at higher magnitudes"),
        ("rand-m9-mstd0.5", "needs the section inc1"),
        ("rand-m9-inc0", "needs the section inc1"),
        (
            "rand-m9-inc1-tweights",
            "the section 'tweights' cannot be expressed with torchvision's; allowed: m, n, p, mstd",
        ),
        ("rand-m9-inc1-t3a", "the section 't3a' cannot be expressed"),
        ("rand-m9-inc1-w0", "the section 'w0' cannot be expressed"),
        ("rand-m9-inc1-mstdinf", "the section 'mstdinf' cannot be expressed"),
        ("rand-m9-m8-inc1", "the section 'm8' stands there twice"),
        ("rand-m9--inc1", "the section '' cannot be expressed"),
        ("rand-m9.5-inc1", "m must be an integer, got '9.5'"),
        ("rand-p0.5.1-inc1", "p must be a number, got '0.5.1'"),
        ("rand-m11-inc1", "m must be in 0..10, got 11"),
        ("rand-m9-mmax8-inc1", "m must be in 0..8, got 9"),
        ("rand-m9-mmax20-inc1", "mmax must be in 1..10, got 20"),
        ("rand-n0-inc1", "n must be at least 1, got 0"),
        ("rand-p1.5-inc1", "p must be in 0..1, got 1.5"),
        ("augmix-b1", "b must be in 0..0, got 1"),
        ("augmix-m0", "m must be in 1..10, got 0"),
        ("augmix-m11", "m must be in 1..10, got 11"),
        ("augmix-w0", "w must be at least 1, got 0"),
        ("augmix-d0", "d must be at least 1, got 0"),
        ("augmix-a0", "a must be above 0, got 0.0"),
        ("augmix-mstd1", "the section 'mstd1' cannot be expressed with torchvision's; allowed: m, w, d, a, b"),
    ],
)
def test_rejects(config, message):
    with pytest.raises(ValueError, match=f"auto_augment='{config}'"):
        create(config)
    with pytest.raises(ValueError, match=message):
        create(config)


@pytest.mark.parametrize("interpolation", ["lanczos", "box", "hamming", "random", "cubic"])
def test_rejects_interpolations_without_rotation(interpolation):
    message = (
        f"interpolation='{interpolation}' is not possible with auto_augment='original'; allowed: nearest, bilinear"
    )
    with pytest.raises(ValueError, match=message):
        create("original", interpolation)
