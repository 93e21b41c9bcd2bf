"""Where bbfast's own blocks have a BatchNorm behind a convolution, for `fold_bn_`; they are fused as they are."""

from __future__ import annotations

from torch import nn

from bbfast.models import _efficientnet_blocks, _features, _layers, _regnet_blocks, _resnet_blocks
from bbfast.models.efficientnet import EfficientNet
from bbfast.models.mobilenetv3 import MobileNetV3
from bbfast.models.resnet import ResNet
from bbfast.nn import BatchNormAct2d, ConvBNAct, DepthwiseConvBNAct, SyncBatchNormAct2d
from bbfast.swap._blocks import CONVS, NORMS
from bbfast.swap._fold import foldable
from bbfast.swap._lending import lender

lender(_layers.Conv2dSame)
CONVS[_layers.Conv2dSame] = lambda conv: "same"

# Their activation is a name, which a FoldedBatchNorm2d keeps.
for cls in (BatchNormAct2d, SyncBatchNormAct2d):
    lender(cls)
    NORMS[cls] = lambda norm: (norm, norm.act)


def _pairs(*pairs: tuple[str, str]):
    return lambda block: pairs


def _stem(block: nn.Module) -> list[tuple[str, str]]:
    """Of a model, or of a feature extractor made of one; a stem of three convolutions is a Sequential."""
    children = dict(block.named_children())
    pairs = [pair for pair in (("conv_stem", "bn1"), ("conv_head", "bn2")) if children.keys() >= set(pair)]
    if isinstance(children.get("conv1"), nn.Sequential):
        return [*pairs, ("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")]
    return [*pairs, ("conv1", "bn1")] if children.keys() >= {"conv1", "bn1"} else pairs


def _last_two(block: nn.Sequential) -> list[tuple[str, str]]:
    return [(str(len(block) - 2), str(len(block) - 1))]


def _of_pre_bottleneck(block: _regnet_blocks.PreBottleneck) -> list[tuple[str, str]]:
    pairs = [("conv1", "norm2")]
    return [*pairs, ("conv2", "norm3")] if isinstance(block.se, nn.Identity) else pairs


for cls in (ConvBNAct, DepthwiseConvBNAct, _regnet_blocks.ConvNormAct):
    foldable(cls, _pairs(("conv", "bn")))
for cls in (EfficientNet, MobileNetV3, ResNet, _features.FeatureListNet, _features.FeatureDictNet):
    foldable(cls, _stem)
foldable(_efficientnet_blocks.ConvBnAct, _pairs(("conv", "bn1")))
foldable(_efficientnet_blocks.DepthwiseSeparableConv, _pairs(("conv_dw", "bn1"), ("conv_pw", "bn2")))
foldable(_efficientnet_blocks.InvertedResidual, _pairs(("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")))
foldable(_resnet_blocks.BasicBlock, _pairs(("conv1", "bn1"), ("conv2", "bn2")))
foldable(_resnet_blocks.Bottleneck, _pairs(("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")))
foldable(_resnet_blocks.Downsample, _last_two)
foldable(_resnet_blocks.StemPool, lambda block: [("0", "1")] if len(block) == 3 else [])
foldable(_regnet_blocks.PreBottleneck, _of_pre_bottleneck)
