"""Trains a MobileNetV3 on scikit-learn's 1,797 handwritten digits, with augmentation and Mixup.

python examples/train_digits.py [--model mobilenetv3_small_050] [--epochs 6] [--pretrained]

Needs scikit-learn, which brings the digits along. One epoch takes some seconds on a CPU. With --pretrained the model
starts from ImageNet's weights, whose first convolution is adapted to one channel.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import bbfast


class Digits(Dataset):
    def __init__(self, images: np.ndarray, targets: np.ndarray, transform):
        self.images = [Image.fromarray(np.uint8(image * (255 / 16))) for image in images]  # 8 x 8 pixels, mode L
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.targets[index])


def make_loaders(model: torch.nn.Module, classes: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Batches for training, augmented, and for evaluation, both as the model wants them but 32 pixels wide."""
    config = bbfast.data.resolve_model_data_config(model, {"img_size": 32, "crop_pct": 1.0})
    # A mirrored 2 is no 2; brightness and contrast say nothing here.
    augment = bbfast.data.create_transform(
        **config, is_training=True, scale=(0.7, 1.0), ratio=(0.8, 1.25), hflip=0.0, color_jitter=None, re_prob=0.1
    )
    keep = bbfast.data.create_transform(**config)
    digits = load_digits(n_class=classes)
    parts = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train_images, test_images, train_targets, test_targets = parts
    train = DataLoader(Digits(train_images, train_targets, augment), batch_size, shuffle=True, drop_last=True)
    return train, DataLoader(Digits(test_images, test_targets, keep), 256)


def train_epoch(model, loader, mixup, optimizer) -> float:
    """The mean loss over one pass through the data."""
    model.train()
    losses = []
    for images, targets in loader:
        images, soft_targets = mixup(images, targets)
        loss = cross_entropy(model(images), soft_targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def accuracy(model, loader) -> float:
    model.eval()
    return sum((model(images).argmax(1) == targets).sum().item() for images, targets in loader) / len(loader.dataset)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenetv3_small_050")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--classes", type=int, default=10, help="only the digits below this one")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--pretrained", action="store_true", help="start from ImageNet's weights")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the augmentation")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    model = bbfast.create_model(options.model, options.pretrained, in_chans=1, num_classes=options.classes)
    train, test = make_loaders(model, options.classes, options.batch_size)
    mixup = bbfast.data.Mixup(0.1, cutmix_alpha=0.5, prob=0.5, label_smoothing=0.05, num_classes=options.classes)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    for epoch in range(1, options.epochs + 1):
        loss = train_epoch(model, train, mixup, optimizer)
        print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy(model, test):.1%}", flush=True)
    return accuracy(model, test)


if __name__ == "__main__":
    main()
