"""Sums of blocks under autocast: where a float32 map comes in, what goes out has the dtype that the plain block gives.

Blocks that add in place keep the branch's half precision, others the shortcut's single.
"""

from __future__ import annotations

import copy

import pytest
import swap_parity
import torch
from timm.models import _efficientnet_blocks as mobile
from timm.models import convnext as timm_convnext
from timm.models import regnet as timm_regnet
from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.models import convnext, efficientnet, mnasnet, mobilenetv2, mobilenetv3, regnet, resnet

import bbfast

C = 8
GROUPS = {"groups_width": 4}


def of_transformers(module: str, layer: str, config: str | None = None, *args, **settings):
    """Makes a layer of transformers, if that is installed."""

    def build() -> nn.Module:
        pytest.importorskip("transformers")
        found = pytest.importorskip(f"transformers.models.{module}")
        if config is None:
            return getattr(found, layer)(*args)
        import transformers

        return getattr(found, layer)(getattr(transformers, config)(**settings), *args)

    return build


def mobilenet_v3() -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig(C, 3, 16, C, True, "HS", 1, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


BLOCKS = {
    "timm InvertedResidual": lambda: mobile.InvertedResidual(C, C, exp_ratio=2, drop_path_rate=0.2),
    "timm DepthwiseSeparableConv": lambda: mobile.DepthwiseSeparableConv(C, C),
    "timm EdgeResidual": lambda: mobile.EdgeResidual(C, C),
    "timm ConvBnAct": lambda: mobile.ConvBnAct(C, C, 3, skip=True),
    "timm UniversalInvertedResidual": lambda: mobile.UniversalInvertedResidual(C, C, layer_scale_init_value=None),
    "timm UniversalInvertedResidual, scaled": lambda: mobile.UniversalInvertedResidual(C, C),
    "timm BasicBlock": lambda: timm_resnet.BasicBlock(C, C),
    "timm Bottleneck": lambda: timm_resnet.Bottleneck(C, C // 4),
    "timm RegNet": lambda: timm_regnet.Bottleneck(C, C, group_size=4),
    "timm RegNet, norm first": lambda: timm_regnet.PreBottleneck(C, C, group_size=4),
    "timm ConvNeXt": lambda: timm_convnext.ConvNeXtBlock(C, C),
    "torchvision MobileNetV2": lambda: mobilenetv2.InvertedResidual(C, C, 1, 2),
    "torchvision MobileNetV3": mobilenet_v3,
    "torchvision MBConv": lambda: efficientnet.MBConv(efficientnet.MBConvConfig(2, 3, 1, C, C, 1), 0.2, nn.BatchNorm2d),
    "torchvision FusedMBConv": lambda: efficientnet.FusedMBConv(
        efficientnet.FusedMBConvConfig(2, 3, 1, C, C, 1), 0.2, nn.BatchNorm2d
    ),
    "torchvision MNASNet": lambda: mnasnet._InvertedResidual(C, C, 3, 1, 2),
    "torchvision RegNet": lambda: regnet.ResBottleneckBlock(C, C, 1, nn.BatchNorm2d, nn.ReLU, 4, 1.0, 0.25),
    "torchvision BasicBlock": lambda: resnet.BasicBlock(C, C),
    "torchvision Bottleneck": lambda: resnet.Bottleneck(C, C // 4),
    "torchvision ConvNeXt": lambda: convnext.CNBlock(C, 1.0, 0.0),
    "transformers ResNet, basic": of_transformers("resnet.modeling_resnet", "ResNetBasicLayer", None, C, C),
    "transformers ResNet": of_transformers("resnet.modeling_resnet", "ResNetBottleNeckLayer", None, C, C),
    "transformers RegNet X": of_transformers(
        "regnet.modeling_regnet", "RegNetXLayer", "RegNetConfig", C, C, groups_width=4
    ),
    "transformers RegNet Y": of_transformers(
        "regnet.modeling_regnet", "RegNetYLayer", "RegNetConfig", C, C, groups_width=4
    ),
    "transformers MobileNetV2": of_transformers(
        "mobilenet_v2.modeling_mobilenet_v2", "MobileNetV2InvertedResidual", "MobileNetV2Config", C, C, 1
    ),
    "transformers ConvNeXt": of_transformers("convnext.modeling_convnext", "ConvNextLayer", "ConvNextConfig", C),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_sum_has_the_dtype_of_the_plain_block(name, dtype, training):
    plain = swap_parity.randomise(BLOCKS[name]()).train(training)
    swapped = copy.deepcopy(plain)
    assert bbfast.swap(swapped).swapped
    x = torch.randn(4, C, 6, 7, dtype=dtype)
    results = []
    with swap_parity.backend("torch"), torch.autocast("cpu", torch.bfloat16):
        for block in (plain, swapped):
            torch.manual_seed(3)
            results.append(block(x))
    theirs, ours = results
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())
