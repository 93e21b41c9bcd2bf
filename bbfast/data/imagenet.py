"""The names of ImageNet-1k's classes."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1)
def imagenet_labels() -> tuple[str, ...]:
    """The 1000 class names in the order of the logits, as torchvision publishes them with its weights."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def class_label(index: int, num_classes: int) -> str:
    """A name for output `index` of a model: ImageNet's if the model has 1000 outputs, else the number."""
    return imagenet_labels()[index] if num_classes == 1000 else f"class {index}"
