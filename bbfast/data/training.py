"""The steps of preprocessing in training: random crops, flips, colours, erasing."""

from __future__ import annotations

import math

from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomChoice

from bbfast.data.auto_augment import create_auto_augment
from bbfast.nn._arguments import check_probability

# torchvision's values for what timm calls const (the mean colour) and pixel (noise in each pixel).
ERASING_VALUES = {"const": 0, "pixel": "random"}
ERASING_SCALE, ERASING_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's; torchvision's are rounded
BLUR_KERNEL_SIZE = 23


def _any_of(choices: list):
    """The only choice, or one at random for each image."""
    return choices[0] if len(choices) == 1 else RandomChoice(choices)


def random_crop(size: tuple[int, int], scale, ratio, modes: tuple[str, ...]) -> list:
    scale = _range("scale", scale, (0.08, 1.0), 0, 1)
    ratio = _range("ratio", ratio, (3 / 4, 4 / 3), math.nextafter(0, 1), math.inf)
    return [_any_of([transforms.RandomResizedCrop(size, scale, ratio, InterpolationMode(mode)) for mode in modes])]


def flips(hflip: float, vflip: float) -> list:
    flips = []
    if check_probability("hflip", hflip) > 0:
        flips.append(transforms.RandomHorizontalFlip(hflip))
    if check_probability("vflip", vflip) > 0:
        flips.append(transforms.RandomVerticalFlip(vflip))
    return flips


def auto_augment(config: str, modes: tuple[str, ...], mean: tuple[float, ...]) -> list:
    if not isinstance(config, str):
        raise TypeError(f"auto_augment must be a str, got {type(config).__name__}")
    fill = [min(255, max(0, round(255 * value))) for value in mean]
    return [_any_of([create_auto_augment(config, mode, fill if len(fill) > 1 else fill[0]) for mode in modes])]


def color_jitter(color_jitter, probability: float | None) -> list:
    if probability is not None:
        check_probability("color_jitter_prob", probability)
    strengths = color_jitter if isinstance(color_jitter, (tuple, list)) else (color_jitter or 0,) * 3
    if len(strengths) not in (3, 4):
        raise ValueError(f"color_jitter must be one number, or 3 or 4 of them, got {color_jitter!r}")
    for strength, highest in zip(strengths, (math.inf, math.inf, math.inf, 0.5)):
        if not isinstance(strength, (int, float)):
            raise TypeError(f"color_jitter must be a number or 3 or 4 of them, got {color_jitter!r}")
        if not 0 <= strength <= highest or strength == math.inf:
            raise ValueError(
                f"color_jitter={color_jitter!r} is not allowed; strengths are at least 0, hue's at most 0.5"
            )
    if not any(strengths) or probability == 0:
        return []
    jitter = transforms.ColorJitter(*strengths)
    return [jitter if probability is None else transforms.RandomApply([jitter], probability)]


def gray_and_blur(grayscale_prob: float, gaussian_blur_prob: float, size: tuple[int, int]) -> list:
    steps = []
    if check_probability("grayscale_prob", grayscale_prob) > 0:
        steps.append(transforms.RandomGrayscale(grayscale_prob))
    if check_probability("gaussian_blur_prob", gaussian_blur_prob) > 0:
        smallest = BLUR_KERNEL_SIZE // 2 + 1  # edges are mirrored
        if min(size) < smallest:
            raise ValueError(f"gaussian_blur_prob needs an input_size of at least {smallest} pixels, got {size}")
        steps.append(transforms.RandomApply([transforms.GaussianBlur(BLUR_KERNEL_SIZE)], gaussian_blur_prob))
    return steps


def erasing(probability: float, mode: str, count: int, normalize: bool) -> list:
    if mode not in ERASING_VALUES:
        raise ValueError(f"re_mode={mode!r} is not provided; allowed: {', '.join(ERASING_VALUES)}")
    if count != 1:
        raise ValueError(f"re_count={count!r} is not provided; torchvision erases 1 rectangle")
    if check_probability("re_prob", probability) == 0:
        return []
    if not normalize:
        raise ValueError(
            "re_prob must be 0 with normalize=False: what is erased becomes the mean colour, or noise about it"
        )
    return [transforms.RandomErasing(probability, ERASING_SCALE, ERASING_RATIO, ERASING_VALUES[mode])]


def _range(name: str, values, default: tuple[float, float], lowest: float, highest: float) -> tuple[float, float]:
    if values is None:
        return default
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, (int, float)) for value in values):
        raise TypeError(f"{name} must be (lowest, highest), got {values!r}")
    if len(values) != 2 or not lowest <= values[0] <= values[1] <= highest or not 0 < values[1] < math.inf:
        limits = f"within {lowest}..{highest}" if highest < math.inf else "above 0"
        raise ValueError(f"{name}={values!r} is not allowed; it must be (lowest, highest) {limits}")
    return tuple(values)
