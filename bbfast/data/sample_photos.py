"""Real photographs that come inside the wheels of scikit-image and scikit-learn."""

from __future__ import annotations

from PIL import Image

NAMES = ("chelsea", "coffee", "rocket", "china", "flower")


def sample_photos() -> dict[str, Image.Image]:
    """The photographs by name, RGB.

    Raises:
        ModuleNotFoundError: scikit-image or scikit-learn is not installed.
    """
    import skimage.data
    from sklearn.datasets import load_sample_image

    photos = {name: getattr(skimage.data, name)() for name in ("chelsea", "coffee", "rocket")}
    photos |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return {name: Image.fromarray(pixels) for name, pixels in photos.items()}
