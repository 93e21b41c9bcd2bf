"""Small models of timm's blocks, one of each kind that a swap is about, cheap enough to compile and to export."""

from __future__ import annotations

from functools import partial

import swap_parity
import timm
import torch
from timm.layers import ConvNormAct
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models.convnext import ConvNeXt
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import bbfast

CLASSES = 5


class Head(nn.Module):
    """Mean over the map, and a linear layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))


def mobile(drop_path_rate: float = 0.0) -> nn.Module:
    """A convolution, timm's two mobile blocks, and torch's own layers in a row."""
    return nn.Sequential(
        ConvNormAct(3, 8, 3, stride=2, act_layer=nn.Hardswish),
        DepthwiseSeparableConv(8, 8, act_layer=nn.SiLU, drop_path_rate=drop_path_rate),
        InvertedResidual(
            8, 8, act_layer=nn.SiLU, se_layer=partial(SqueezeExcite, rd_ratio=0.25), drop_path_rate=drop_path_rate
        ),
        nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6()),
        Head(16),
    )


def swin(drop_path_rate: float = 0.0) -> nn.Module:
    """Windows that the maps of 16 and 8 pixels a side do not fill, with and without a shift."""
    return SwinTransformer(
        img_size=64,
        window_size=5,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=CLASSES,
        drop_path_rate=drop_path_rate,
    )


def convnext(drop_path_rate: float = 0.0) -> nn.Module:
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), num_classes=CLASSES, drop_path_rate=drop_path_rate)


def resnet(drop_path_rate: float = 0.0) -> nn.Module:
    return ResNet(Bottleneck, (1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=CLASSES, drop_path_rate=drop_path_rate)


SMALL = {"mobile": mobile, "swin": swin, "convnext": convnext, "resnet": resnet}
WHOLE = ("mobilenetv3_large_100", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50")


def small(name: str, *, swapped: bool = True, **arguments) -> nn.Module:
    """The model, with random values everywhere, in evaluation."""
    model = swap_parity.randomise(SMALL[name](**arguments)).eval()
    if swapped:
        bbfast.swap(model)
    return model


def whole(name: str, *, swapped: bool = True) -> nn.Module:
    arguments = {"img_size": 64} if name.startswith("swin") else {}
    model = swap_parity.randomise(timm.create_model(name, num_classes=CLASSES, **arguments)).eval()
    if swapped:
        bbfast.swap(model)
    return model


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64)
