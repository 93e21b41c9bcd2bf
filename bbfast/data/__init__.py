"""From a photo on disk to the tensor a model takes, and from its logits back to words."""

from typing import TYPE_CHECKING

from bbfast.data.config import resolve_model_data_config
from bbfast.data.imagenet import class_label, imagenet_labels
from bbfast.data.photo import load_photo

if TYPE_CHECKING:
    from bbfast.data.transforms import create_transform

__all__ = ["class_label", "create_transform", "imagenet_labels", "load_photo", "resolve_model_data_config"]


def __getattr__(name: str):
    if name == "create_transform":  # torchvision takes as long to import as torch: only who transforms waits
        from bbfast.data.transforms import create_transform

        return create_transform
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
