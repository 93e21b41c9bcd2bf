"""Parameters, multiply-adds and activations of a configuration, counted from its stages: nothing is built."""

from __future__ import annotations

from dataclasses import dataclass

from bbfast.design_space._configs import Config, Stage
from bbfast.nn._arguments import check_int, check_ints

STEM_WIDTH = 32


@dataclass(frozen=True)
class Complexity:
    """What one image costs.

    Attributes:
        parameters: learned numbers: weights of convolutions, BatchNorm's weights and biases, the classifier.
        flops: multiply-adds of convolutions and of the classifier, as the literature on RegNet counts them: one per
            product. BatchNorm, activations, pooling, sums and biases are left out.
        activations: elements that convolutions put out, those of squeeze-and-excitation and of shortcuts included.
    """

    parameters: int
    flops: int
    activations: int


def complexity(
    config: Config, image_size: int | tuple[int, int] = 224, num_classes: int = 1000, in_chans: int = 3
) -> Complexity:
    """What the network that `build` makes of `config` costs, without making it.

    Args:
        config: the configuration.
        image_size: height and width in pixels, or one number for both.
        num_classes: classes; 0 is a network without a classifier.
        in_chans: channels of the image.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    height, width = _height_and_width(image_size)
    check_int("num_classes", num_classes, 0)
    check_int("in_chans", in_chans, 1)

    count = _Count()
    height, width = _halved(height), _halved(width)
    count.conv(in_chans, STEM_WIDTH, height * width, kernel=3)
    channels = STEM_WIDTH
    for stage in config.stages:
        pixels_in, height, width = height * width, _halved(height), _halved(width)
        count.block(channels, stage, pixels_in, height * width, config.se_ratio)
        count.conv(channels, stage.width, height * width)  # the first block's shortcut; the others' have no weights
        channels = stage.width
        count.block(channels, stage, height * width, height * width, config.se_ratio, times=stage.depth - 1)
    if num_classes:
        count.parameters += channels * num_classes + num_classes
        count.flops += channels * num_classes
    return Complexity(count.parameters, count.flops, count.activations)


def _height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(image_size, (tuple, list)):
        if len(image_size) != 2:
            raise ValueError(f"image_size={image_size} is not allowed; it must be one int or two")
        height, width = check_ints("image_size", image_size, 1)
        return height, width
    return check_int("image_size", image_size, 1), image_size


def _halved(size: int) -> int:
    """After a stride of 2: 3x3 with a padding of 1, and 1x1 without one, come to the same."""
    return (size + 1) // 2


class _Count:
    """Running sums; a convolution comes with its BatchNorm."""

    def __init__(self):
        self.parameters = self.flops = self.activations = 0

    def conv(self, inputs: int, outputs: int, pixels: int, kernel: int = 1, groups: int = 1, times: int = 1) -> None:
        weights = kernel * kernel * inputs * outputs // groups
        self.parameters += times * (weights + 2 * outputs)
        self.flops += times * weights * pixels
        self.activations += times * outputs * pixels

    def squeeze_excite(self, channels: int, squeezed: int, times: int) -> None:
        """Two 1x1 convolutions of one pixel, with biases."""
        self.parameters += times * (2 * channels * squeezed + channels + squeezed)
        self.flops += times * 2 * channels * squeezed
        self.activations += times * (channels + squeezed)

    def block(self, inputs: int, stage: Stage, pixels_in: int, pixels: int, se_ratio: float, times: int = 1) -> None:
        """`times` equal blocks: 1x1, 3x3 with stride and groups, squeeze-and-excitation, 1x1."""
        inner = stage.width // stage.bottleneck
        self.conv(inputs, inner, pixels_in, times=times)
        self.conv(inner, inner, pixels, kernel=3, groups=inner // stage.group_width, times=times)
        if se_ratio:
            self.squeeze_excite(inner, max(1, round(inputs * se_ratio)), times)
        self.conv(inner, stage.width, pixels, times=times)
