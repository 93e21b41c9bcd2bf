"""From a PIL image to the tensor a model takes: at inference as timm to the bit, in training with augmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from bbfast.data import training
from bbfast.data.config import IMAGENET_MEAN, IMAGENET_STD
from bbfast.data.geometry import CenterCropOrPad, ResizeKeepRatio
from bbfast.nn._arguments import check_bool, check_positive

INTERPOLATIONS = {
    name: InterpolationMode(name) for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
}
RANDOM_INTERPOLATIONS = ("bilinear", "bicubic")
CROP_MODES = ("center", "squash", "border")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by the number of channels, PIL's modes that are taken


def create_transform(
    input_size: int | Sequence[int] = 224,
    is_training: bool = False,
    *,
    no_aug: bool = False,
    scale: tuple[float, float] | None = None,
    ratio: tuple[float, float] | None = None,
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | Sequence[float] | None = 0.4,
    color_jitter_prob: float | None = None,
    grayscale_prob: float = 0.0,
    gaussian_blur_prob: float = 0.0,
    auto_augment: str | None = None,
    interpolation: str = "bilinear",
    mean: float | Sequence[float] = IMAGENET_MEAN,
    std: float | Sequence[float] = IMAGENET_STD,
    re_prob: float = 0.0,
    re_mode: str = "const",
    re_count: int = 1,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    normalize: bool = True,
    separate: bool = False,
) -> ImageTransform | tuple[ImageTransform, transforms.Compose, transforms.Compose]:
    """A transform from a PIL image to the tensor `[C, H, W]` that a model takes.

    At inference the image is resized to `R = floor(S / crop_pct)` and the middle `S` of it is kept, equal to timm's
    evaluation transform to the bit:

    - `center`: the shorter edge becomes R (the aspect ratio is kept, the ends of the longer edge are lost);
    - `squash`: both edges become R, whatever the aspect ratio;
    - `border`: the longer edge becomes R and the rest is filled with the mean colour.

    In training torchvision's transforms follow each other: RandomResizedCrop, flips | auto augment, colour jitter,
    RandomGrayscale, GaussianBlur | ToTensor, Normalize, RandomErasing. All draw from torch's generator, so that
    `torch.manual_seed` repeats them (timm's draw from `random` and `numpy.random`); in a DataLoader each worker has its
    own seed, which follows from the main process's or from `generator=`.

    Args:
        input_size: S in pixels: an int, (height, width) or (channels, height, width).
        is_training: augment. The arguments up to auto_augment, re_* and separate act in training only, crop_* at
            inference only.
        no_aug: in training only resize (an int: the shorter edge; else both edges), crop the middle and normalise.
        scale: range of the crop's share of the image's area; None means (0.08, 1).
        ratio: range of the crop's width / height; None means (3/4, 4/3).
        hflip, vflip: probability of a flip left to right, upside down.
        color_jitter: strength of brightness, contrast and saturation, one number for all or three; a fourth is hue's,
            at most 0.5. None or 0: none. There is none either where auto_augment is given.
        color_jitter_prob: share of the images that it is applied to; None means all.
        grayscale_prob, gaussian_blur_prob: share of the images that lose their colours, that are blurred.
        auto_augment: see `bbfast.data.auto_augment.create_auto_augment`, e.g. "rand-m9-mstd0.5-inc1".
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos; in training also random: bilinear or bicubic
            for each image. With auto_augment nearest, bilinear, bicubic or random.
        mean, std: one number, or one per channel, on a scale where white is 1.
        re_prob: share of the images of which a rectangle is erased.
        re_mode: const (the mean colour) or pixel (noise).
        re_count: rectangles; only 1 is provided.
        crop_pct: share of the resized image that is kept along each edge; None means 0.875.
        crop_mode: center (also None), squash or border.
        normalize: False gives the pixels as uint8.
        separate: return training's three parts, as divided by | above.

    Returns:
        A transform of PIL images of mode RGB; L, LA or RGBA where mean, std or input_size speak of 1, 2 or 4 channels.
        Its result is float32, or uint8 with normalize=False. It can be pickled. With separate, three transforms to be
        called one after the other.

    Raises:
        ValueError: an argument outside of what is allowed. The transform raises it for an image of a wrong mode.
        TypeError: an argument of a wrong type. The transform raises it for what is not a PIL image.
    """
    for name, flag in (
        ("is_training", is_training),
        ("no_aug", no_aug),
        ("normalize", normalize),
        ("separate", separate),
    ):
        check_bool(name, flag)
    size = _height_width(input_size)
    mean, std = _numbers("mean", mean), tuple(check_positive("std", value) for value in _numbers("std", std))
    image_modes = _image_modes(input_size, mean, std)
    augments = is_training and not no_aug
    modes = _interpolation_modes(interpolation, is_training)
    if separate and not augments:
        raise ValueError("separate=True is only possible with is_training=True and no_aug=False")

    if not augments:
        if is_training:
            steps = _resize_and_crop(input_size if isinstance(input_size, int) else size, modes[0])
        else:
            steps = _evaluation_crop(size, crop_pct, crop_mode, INTERPOLATIONS[modes[0]], mean)
        return ImageTransform([*steps, *_to_tensor(mean, std, normalize)], image_modes)

    crops = training.random_crop(size, scale, ratio, modes) + training.flips(hflip, vflip)
    if auto_augment or grayscale_prob:
        image_modes = _without_alpha(image_modes)
    if auto_augment:
        colours = training.auto_augment(auto_augment, modes, mean)
    else:
        colours = training.color_jitter(color_jitter, color_jitter_prob)
    colours += training.gray_and_blur(grayscale_prob, gaussian_blur_prob, size)
    tensors = _to_tensor(mean, std, normalize) + training.erasing(re_prob, re_mode, re_count, normalize)
    if separate:
        return ImageTransform(crops, image_modes), transforms.Compose(colours), transforms.Compose(tensors)
    return ImageTransform(crops + colours + tensors, image_modes)


class ImageTransform(transforms.Compose):
    """torchvision's Compose, which first makes sure that it got an image of the kind it was made for.

    Args:
        steps: called one after the other; the list may be changed later through the attribute `transforms`.
        modes: PIL's modes that are taken.
    """

    def __init__(self, steps: list, modes: tuple[str, ...]):
        super().__init__(steps)
        self.modes = modes

    def __call__(self, image: Image.Image):
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"the transform takes a PIL image, got {type(image).__name__}; arrays become one through "
                "PIL.Image.fromarray, tensors through torchvision.transforms.functional.to_pil_image"
            )
        if image.mode not in self.modes:
            raise ValueError(
                f"the transform takes an image of mode {' or '.join(self.modes)}, got {image.mode}; convert it with "
                "image.convert, or read RGB with bbfast.data.load_photo"
            )
        if 0 in image.size:
            raise ValueError(f"the image is empty: {image.width} x {image.height} pixels")
        return super().__call__(image)


# ---- arguments -------------------------------------------------------------------------------------------


def _height_width(input_size: int | Sequence[int]) -> tuple[int, int]:
    is_int = isinstance(input_size, int) and not isinstance(input_size, bool)
    sizes = (input_size, input_size) if is_int else input_size
    if (
        not isinstance(sizes, (tuple, list))
        or len(sizes) not in (2, 3)
        or not all(isinstance(length, int) and length > 0 for length in sizes)
    ):
        raise ValueError(
            f"input_size must be an int, (height, width) or (channels, height, width) in pixels, got {input_size!r}"
        )
    return tuple(sizes[-2:])


def _numbers(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    try:
        if isinstance(values, str):  # whose digits could pass for numbers
            raise TypeError
        numbers = tuple(float(value) for value in ((values,) if isinstance(values, (int, float)) else values))
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or one per channel, got {values!r}") from None
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must hold finite numbers, got {values!r}")
    return numbers


def _image_modes(input_size, mean: tuple, std: tuple) -> tuple[str, ...]:
    """The modes of images with as many channels as the arguments speak of; all where they hold for any number."""
    said = {name: len(values) for name, values in (("mean", mean), ("std", std)) if len(values) > 1}
    if not isinstance(input_size, int) and len(input_size) == 3:
        said["input_size"] = input_size[0]
    numbers = set(said.values()) or set(MODES)
    if said and (len(numbers) > 1 or not numbers <= set(MODES)):
        given = ", ".join(f"{name} for {number}" for name, number in said.items())
        raise ValueError(f"mean, std and input_size must be for the same number of channels, 1 to 4; got {given}")
    return tuple(MODES[number] for number in sorted(numbers))


def _without_alpha(modes: tuple[str, ...]) -> tuple[str, ...]:
    left = tuple(mode for mode in modes if not mode.endswith("A"))
    if not left:
        raise ValueError(f"auto_augment and grayscale_prob are for images of mode L or RGB, not {modes[0]}")
    return left


def _interpolation_modes(interpolation: str, is_training: bool) -> tuple[str, ...]:
    if interpolation == "random" and is_training:
        return RANDOM_INTERPOLATIONS
    if interpolation not in INTERPOLATIONS:
        allowed = ", ".join(INTERPOLATIONS) + (", random" if is_training else "; random in training only")
        raise ValueError(f"interpolation={interpolation!r} is not known; allowed: {allowed}")
    return (interpolation,)


# ---- inference -------------------------------------------------------------------------------------------


def _evaluation_crop(
    size: tuple[int, int],
    crop_pct: float | None,
    crop_mode: str | None,
    interpolation: InterpolationMode,
    mean: tuple[float, ...],
) -> list:
    crop_mode = "center" if crop_mode is None else crop_mode
    if crop_mode not in CROP_MODES:
        raise ValueError(f"crop_mode={crop_mode!r} is not known; allowed: {', '.join(CROP_MODES)}")
    crop_pct = check_positive("crop_pct", 0.875 if crop_pct is None else crop_pct)
    resized = tuple(math.floor(length / crop_pct) for length in size)
    if 0 in resized:
        raise ValueError(f"crop_pct={crop_pct} is too large for input_size={size}: it leaves {resized} pixels")

    if crop_mode == "squash":
        return [transforms.Resize(resized, interpolation), transforms.CenterCrop(size)]
    if crop_mode == "border":
        fill = [round(255 * value) for value in mean]
        return [
            ResizeKeepRatio(resized, interpolation, by_longest_edge=True),
            CenterCropOrPad(size, fill if len(fill) > 1 else fill[0]),
        ]
    if resized[0] == resized[1]:
        return [transforms.Resize(resized[0], interpolation), transforms.CenterCrop(size)]
    return [ResizeKeepRatio(resized, interpolation, by_longest_edge=False), transforms.CenterCrop(size)]


def _to_tensor(mean: tuple[float, ...], std: tuple[float, ...], normalize: bool) -> list:
    if not normalize:
        return [transforms.PILToTensor()]
    return [transforms.ToTensor(), transforms.Normalize(torch.tensor(mean), torch.tensor(std))]


def _resize_and_crop(size: int | tuple[int, int], interpolation: str) -> list:
    return [transforms.Resize(size, INTERPOLATIONS[interpolation]), transforms.CenterCrop(size)]
