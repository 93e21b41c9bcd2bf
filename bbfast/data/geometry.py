"""Steps of preprocessing that torchvision does not have, for PIL images."""

from __future__ import annotations

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F


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

    def __init__(self, size: tuple[int, int], fill: int | list[int]):
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
