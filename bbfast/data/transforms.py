"""Resize, crop and normalise at inference, equal to timm's evaluation transform to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from bbfast.data.config import IMAGENET_MEAN, IMAGENET_STD

INTERPOLATIONS = {
    name: InterpolationMode(name) for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
}
CROP_MODES = ("center", "squash", "border")


def create_transform(
    input_size: int | Sequence[int] = 224,
    is_training: bool = False,
    *,
    interpolation: str = "bilinear",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
) -> transforms.Compose:
    """A transform from a PIL image to the float32 tensor `[C, H, W]` that a model takes.

    The image is resized to `R = floor(S / crop_pct)` and the middle `S` of it is kept:

    - `center`: the shorter edge becomes R (the aspect ratio is kept, the ends of the longer edge are lost);
    - `squash`: both edges become R, whatever the aspect ratio;
    - `border`: the longer edge becomes R and the rest is filled with the mean colour.

    Args:
        input_size: S in pixels: an int, (height, width) or (channels, height, width).
        is_training: only False is provided.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos.
        mean, std: per channel, on a scale where white is 1.
        crop_pct: share of the resized image that is kept along each edge; None means 0.875.
        crop_mode: center (also None), squash or border.

    Raises:
        ValueError: an argument outside of what is allowed.
    """
    if is_training:
        raise ValueError("is_training=True is not provided; use torchvision.transforms to augment")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is not known; allowed: {', '.join(INTERPOLATIONS)}")
    crop_mode = crop_mode or "center"
    if crop_mode not in CROP_MODES:
        raise ValueError(f"crop_mode={crop_mode!r} is not known; allowed: {', '.join(CROP_MODES)}")
    crop_pct = crop_pct or 0.875
    if not 0 < crop_pct < math.inf:
        raise ValueError(f"crop_pct={crop_pct} is not allowed; it must be positive")
    size = _height_width(input_size)
    mode = INTERPOLATIONS[interpolation]
    resized = tuple(math.floor(length / crop_pct) for length in size)

    if crop_mode == "squash":
        steps = [transforms.Resize(resized, mode), transforms.CenterCrop(size)]
    elif crop_mode == "border":
        fill = [round(255 * value) for value in mean]
        steps = [ResizeKeepRatio(resized, mode, by_longest_edge=True), CenterCropOrPad(size, fill)]
    elif resized[0] == resized[1]:
        steps = [transforms.Resize(resized[0], mode), transforms.CenterCrop(size)]
    else:
        steps = [ResizeKeepRatio(resized, mode, by_longest_edge=False), transforms.CenterCrop(size)]
    return transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(torch.tensor(mean), torch.tensor(std))]
    )


def _height_width(input_size) -> tuple[int, int]:
    sizes = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(sizes) not in (2, 3) or not all(isinstance(length, int) and length > 0 for length in sizes):
        raise ValueError(
            f"input_size must be an int, (height, width) or (channels, height, width) in pixels, got {input_size!r}"
        )
    return sizes[-2:]


class ResizeKeepRatio:
    """Scales an image so that it just covers a target size or, by its longest edge, just fits into it."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode, by_longest_edge: bool):
        self.size = size
        self.interpolation = interpolation
        self.by_longest_edge = by_longest_edge

    def __call__(self, image: Image.Image) -> Image.Image:
        ratios = (image.height / self.size[0], image.width / self.size[1])
        ratio = max(ratios) if self.by_longest_edge else min(ratios)
        # A very long and thin image keeps at least one pixel of its short edge.
        size = [max(1, round(length / ratio)) for length in (image.height, image.width)]
        return F.resize(image, size, self.interpolation)

    def __repr__(self) -> str:
        edge = "longest" if self.by_longest_edge else "shortest"
        return f"{type(self).__name__}(size={self.size}, interpolation={self.interpolation.value}, edge={edge})"


class CenterCropOrPad:
    """Cuts out the middle, after filling up with a colour what is smaller than the target size."""

    def __init__(self, size: tuple[int, int], fill: list[int]):
        self.size = size
        self.fill = fill

    def __call__(self, image: Image.Image) -> Image.Image:
        missing_height, missing_width = (
            max(self.size[0] - image.height, 0),
            max(self.size[1] - image.width, 0),
        )
        if missing_height or missing_width:
            left, top = missing_width // 2, missing_height // 2
            image = F.pad(image, [left, top, missing_width - left, missing_height - top], fill=self.fill)
        top, left = round((image.height - self.size[0]) / 2), round((image.width - self.size[1]) / 2)
        return F.crop(image, top, left, *self.size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, fill={self.fill})"
