"""From a photo on disk to the tensor a model takes, and from its logits back to words."""

from importlib import import_module
from typing import TYPE_CHECKING

from bbfast.data.config import resolve_data_config, resolve_model_data_config
from bbfast.data.imagenet import class_label, imagenet_labels
from bbfast.data.photo import load_photo

if TYPE_CHECKING:
    from bbfast.data.mixup import Mixup
    from bbfast.data.transforms import create_transform

__all__ = [
    "Mixup",
    "class_label",
    "create_transform",
    "imagenet_labels",
    "load_photo",
    "resolve_data_config",
    "resolve_model_data_config",
]

# torchvision takes as long to import as torch: only who transforms waits.
_NEEDS_TORCHVISION = {"create_transform": "bbfast.data.transforms", "Mixup": "bbfast.data.mixup"}


def __getattr__(name: str):
    if name in _NEEDS_TORCHVISION:
        return getattr(import_module(_NEEDS_TORCHVISION[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
