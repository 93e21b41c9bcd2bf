"""Reading a photo the way a person sees it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What Pillow's decoders raise on damaged files, beside OSError.
_DECODE_ERRORS = (
    OSError,
    NotImplementedError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


def load_photo(path: str | os.PathLike) -> Image.Image:
    """Reads an image file as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is dropped, 16-bit grey values are scaled to 8 bits, an animation gives its first frame.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        A PIL image of mode RGB, decoded completely.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is no regular file, or its content is not an image, or is damaged or cut short, or holds
            floating point values, of which nothing says what white is.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such photo: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with Image.open(path) as image:
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read") from None
    except PermissionError:
        raise ValueError(f"{path} may not be read: permission denied") from None
    except _DECODE_ERRORS as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it holds floating point values, which have no known scale")
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255 instead of scaling
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    return image.convert("RGB")
