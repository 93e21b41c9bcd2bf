"""Augmentation policies by name: timm's strings, as far as torchvision's operations can express them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode

_POLICIES = {
    "original": AutoAugmentPolicy.IMAGENET,  # the paper's policy; timm's name
    "imagenet": AutoAugmentPolicy.IMAGENET,  # the same; this and the next two are torchvision's names
    "cifar10": AutoAugmentPolicy.CIFAR10,
    "svhn": AutoAugmentPolicy.SVHN,
}
_RAND_SECTIONS = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int}
_AUGMIX_SECTIONS = {"m": int, "w": int, "d": int, "a": float, "b": int}
_OFFERED = f"rand-..., augmix-..., ta_wide, {', '.join(_POLICIES)}"

_INTERPOLATIONS = {mode.value: mode for mode in map(InterpolationMode, ("nearest", "bilinear", "bicubic"))}

MAX_LEVEL = 10  # of a magnitude: the full range of each operation
BINS_PER_LEVEL = 10  # torchvision chooses magnitudes from a list: this one has steps of 0.1
UNIFORM_ABOVE = 100  # an mstd above it means: any magnitude from 0 to m


def create_auto_augment(config: str, interpolation: str, fill: int | list[int]) -> Callable[[Image.Image], Image.Image]:
    """The augmentation of 8-bit L or RGB images that a string names.

    - `rand-m9-n2-p0.5-mstd0.5-mmax10-inc1`: n operations of torchvision's RandAugment (2), each applied with
      probability p (0.5) and a magnitude m (10) on a scale where 10 is the full range. mstd draws each magnitude from a
      normal distribution about m, cut off at 0 and mmax (10); above 100, evenly from 0..m. `inc1` must be there: with
      torchvision every operation does more at a higher magnitude, which timm calls inc1 and does not by default.
    - `augmix-m3-w3-d2-a1`: torchvision's AugMix with severity m (3), mixture_width w (3), chain_depth d (1 to 3 at
      random) and alpha a (1). It interpolates bilinearly, or by the nearest pixel if told so.
    - `original` or `imagenet`, `cifar10`, `svhn`: torchvision's AutoAugment with that policy.
    - `ta_wide`: torchvision's TrivialAugmentWide.

    The strings are timm's, but the operations torchvision's: RandAugment chooses from a list with Identity and without
    Invert and SolarizeAdd, keeps at least 4 bits when it posterises, and translates by up to 150/331 of the image.
    AutoAugment has the paper's operations and probabilities, with torchvision's scales of the magnitudes.

    Args:
        config: as above.
        interpolation: of rotations, shears and translations: nearest, bilinear or bicubic.
        fill: the colour of what comes in from outside, 0..255: one number, or one per channel.

    Raises:
        ValueError: a name, section or value that cannot be expressed.
    """
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"interpolation={interpolation!r} is not possible with auto_augment={config!r}; allowed: "
            f"{', '.join(_INTERPOLATIONS)}, random"
        )
    mode = _INTERPOLATIONS[interpolation]
    name, *sections = config.split("-")
    if name == "rand":
        return _rand_augment(config, _values(config, sections, _RAND_SECTIONS), mode, fill)
    if name == "augmix":
        return _augmix(config, _values(config, sections, _AUGMIX_SECTIONS), mode, fill)
    if name not in _POLICIES and name != "ta_wide":
        raise ValueError(f"auto_augment={config!r} is not provided; allowed: {_OFFERED}")
    _values(config, sections, {})
    if name == "ta_wide":
        return transforms.TrivialAugmentWide(interpolation=mode, fill=fill)
    return transforms.AutoAugment(_POLICIES[name], mode, fill)


def _values(config: str, sections: list[str], kinds: dict[str, type]) -> dict[str, int | float]:
    values = {}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)([0-9.]+)", section)
        key = match[1] if match else None
        if key not in kinds or key in values:
            problem = "stands there twice" if key in values else "cannot be expressed with torchvision's"
            allowed = f"{', '.join(kinds)}, each with a number" if kinds else "none"
            raise ValueError(f"auto_augment={config!r}: the section {section!r} {problem}; allowed: {allowed}")
        try:
            values[key] = kinds[key](match[2])
        except ValueError:
            kind = "an integer" if kinds[key] is int else "a number"
            raise ValueError(f"auto_augment={config!r}: {key} must be {kind}, got {match[2]!r}") from None
    return values


def _within(config: str, name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
        raise ValueError(f"auto_augment={config!r}: {name} must be {limits}, got {value}")


# ---- RandAugment -----------------------------------------------------------------------------------------


def _rand_augment(config: str, values: dict, mode: InterpolationMode, fill: int | list[int]) -> RandAugment:
    if values.get("inc") != 1:
        raise ValueError(
            f"auto_augment={config!r} needs the section inc1: torchvision's operations do more at higher magnitudes"
        )
    level, highest = values.get("m", MAX_LEVEL), values.get("mmax", MAX_LEVEL)
    _within(config, "mmax", highest, 1, MAX_LEVEL)
    _within(config, "m", level, 0, highest)
    _within(config, "n", values.get("n", 2), 1)
    _within(config, "p", values.get("p", 0.5), 0, 1)
    return RandAugment(values.get("n", 2), values.get("p", 0.5), level, values.get("mstd", 0.0), highest, mode, fill)


class RandAugment:
    """Operations of torchvision's RandAugment, each with a probability and a magnitude of its own, as timm draws them.

    Args:
        num_ops: operations for each image; one may be drawn twice.
        probability: of applying each of them.
        level, level_std: mean and standard deviation of the magnitude, where MAX_LEVEL is an operation's full range;
            with a level_std above UNIFORM_ABOVE it lies anywhere in 0..level.
        highest_level: magnitudes above are cut down to it.
        interpolation, fill: as torchvision's.
    """

    def __init__(
        self,
        num_ops: int,
        probability: float,
        level: float,
        level_std: float,
        highest_level: float,
        interpolation: InterpolationMode,
        fill: int | list[int],
    ):
        self.num_ops = num_ops
        self.probability = probability
        self.level = level
        self.level_std = level_std
        self.highest_level = highest_level
        self.interpolation = interpolation
        self.fill = fill

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.num_ops):
            if torch.rand(()).item() < self.probability:
                image = self.operation(self.draw_level())(image)
        return image

    def draw_level(self) -> float:
        if self.level_std > UNIFORM_ABOVE:
            return self.level * torch.rand(()).item()
        level = self.level + self.level_std * torch.randn(()).item()
        return min(max(level, 0.0), self.highest_level)

    def operation(self, level: float) -> transforms.RandAugment:
        """torchvision's transform that applies one operation, chosen at random, with a magnitude of `level`."""
        bins = MAX_LEVEL * BINS_PER_LEVEL + 1  # from no effect to the full range
        return transforms.RandAugment(1, round(level * BINS_PER_LEVEL), bins, self.interpolation, self.fill)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_ops={self.num_ops}, probability={self.probability}, level={self.level}, "
            f"level_std={self.level_std}, highest_level={self.highest_level}, "
            f"interpolation={self.interpolation.value}, fill={self.fill})"
        )


# ---- AugMix ----------------------------------------------------------------------------------------------


def _augmix(config: str, values: dict, mode: InterpolationMode, fill: int | list[int]) -> transforms.AugMix:
    _within(config, "b", values.get("b", 0), 0, 0)
    _within(config, "m", values.get("m", 3), 1, MAX_LEVEL)
    _within(config, "w", values.get("w", 3), 1)
    _within(config, "d", values.get("d", 1), 1)
    alpha = values.get("a", 1.0)
    if alpha == 0:
        raise ValueError(f"auto_augment={config!r}: a must be above 0, got {alpha}")
    if mode is InterpolationMode.BICUBIC:  # torchvision's works on tensors, which it does not rotate bicubically
        mode = InterpolationMode.BILINEAR
    return transforms.AugMix(
        values.get("m", 3), values.get("w", 3), values.get("d", -1), alpha, interpolation=mode, fill=fill
    )
