"""Pruned ResNets: what is left of each convolution's channels.

`Knapsack Pruning with Inner Distillation`, https://arxiv.org/abs/2002.08258.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from bbfast.models._layers import create_conv2d
from bbfast.models._resnet_blocks import Bottleneck

if TYPE_CHECKING:
    from bbfast.models.resnet import ResNet

# By the whole model's name, for each stage: its channels, and those of each block's first and second convolution.
PRUNED_CHANNELS = {
    "ecaresnet50d": (
        (19, ((47, 18), (52, 22), (64, 35))),
        (171, ((85, 37), (107, 80), (120, 85), (125, 87))),
        (818, ((198, 126), (255, 232), (256, 233), (253, 235), (256, 225), (256, 239))),
        (2022, ((492, 237), (512, 500), (512, 490))),
    ),
    "ecaresnet101d": (
        (26, ((45, 25), (53, 20), (60, 27))),
        (142, ((81, 24), (93, 49), (102, 54), (122, 78))),
        (
            278,
            (
                (101, 25),
                (239, 160),
                (234, 156),
                (250, 176),
                (253, 191),
                (251, 175),
                (230, 128),
                (244, 154),
                (244, 159),
                (238, 97),
                (244, 149),
                (253, 181),
                (245, 119),
                (255, 216),
                (256, 201),
                (253, 149),
                (254, 141),
                (256, 190),
                (256, 217),
                (255, 156),
                (256, 155),
                (256, 232),
                (256, 214),
            ),
        ),
        (2042, ((499, 289), (512, 512), (512, 502))),
    ),
}

StageChannels = tuple[int, Sequence[tuple[int, int]]]


def narrow(model: ResNet, channels: Sequence[StageChannels]) -> None:
    """Replaces the convolutions, BatchNorms and classifier of a ResNet of Bottlenecks by narrower, fresh ones.

    Args:
        model: with BatchNorm, and without groups. What depends on channels otherwise, as the width of ECA's
            convolutions, stays as it is.
        channels: see `PRUNED_CHANNELS`.

    Raises:
        ValueError: the model has other stages, blocks, groups or norms.
    """
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    depths = [len(blocks) for _, blocks in channels]
    if [len(stage) for stage in stages] != depths:
        raise ValueError(f"layers={tuple(map(len, stages))} is not allowed; what was pruned has {tuple(depths)}")
    if not all(isinstance(block, Bottleneck) and block.conv2.groups == 1 for stage in stages for block in stage):
        raise ValueError("block and cardinality of a pruned model must be Bottleneck and 1")
    if not isinstance(model.bn1, nn.BatchNorm2d):
        raise ValueError(f"norm_layer must be a BatchNorm2d in a pruned model, got {type(model.bn1).__name__}")
    inplanes = model.bn1.num_features
    for stage, info, (outplanes, blocks) in zip(stages, model.feature_info[1:], channels):
        for block, middle in zip(stage, blocks):
            _narrow_block(block, inplanes, *middle, outplanes)
            inplanes = outplanes
        info["num_chs"] = outplanes
    model.num_features = inplanes
    model.reset_classifier(model.num_classes)
    model.init_weights()


def _narrow_block(block: Bottleneck, inplanes: int, first: int, second: int, outplanes: int) -> None:
    block.conv1, block.bn1 = _conv(block.conv1, inplanes, first), _norm(block.bn1, first)
    block.conv2, block.bn2 = _conv(block.conv2, first, second), _norm(block.bn2, second)
    block.conv3, block.bn3 = _conv(block.conv3, second, outplanes), _norm(block.bn3, outplanes)
    if block.downsample is not None:
        block.downsample[-2] = _conv(block.downsample[-2], inplanes, outplanes)
        block.downsample[-1] = _norm(block.downsample[-1], outplanes)


def _conv(like: nn.Conv2d, in_channels: int, out_channels: int) -> nn.Conv2d:
    return create_conv2d(
        in_channels,
        out_channels,
        like.kernel_size[0],
        stride=like.stride[0],
        dilation=like.dilation[0],
        device=like.weight.device,
        dtype=like.weight.dtype,
    )


def _norm(like: nn.BatchNorm2d, channels: int) -> nn.BatchNorm2d:
    factory = {"device": like.weight.device, "dtype": like.weight.dtype}
    return nn.BatchNorm2d(channels, like.eps, like.momentum, **factory)
