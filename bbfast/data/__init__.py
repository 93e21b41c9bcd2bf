"""From a photo on disk to the tensor a model takes, and from its logits back to words."""

from bbfast.data.config import resolve_model_data_config
from bbfast.data.imagenet import class_label, imagenet_labels
from bbfast.data.photo import load_photo
from bbfast.data.transforms import create_transform

__all__ = ["class_label", "create_transform", "imagenet_labels", "load_photo", "resolve_model_data_config"]
