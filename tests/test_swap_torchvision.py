"""torchvision's models, swapped: the blocks that are found, the numbers that stay."""

from __future__ import annotations

from functools import partial

import pytest
import swap_parity
import torch
import torchvision
from torch import nn
from torchvision.models import efficientnet, mobilenetv3, regnet, swin_transformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import bbfast


def _get(name: str, **kwargs) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=7, **kwargs)


def _swin(**kwargs) -> nn.Module:
    settings = {"depths": [2, 2], "num_heads": [2, 4], "window_size": [7, 7], "stochastic_depth_prob": 0.5}
    return swin_transformer.SwinTransformer([4, 4], 16, num_classes=7, **(settings | kwargs))


def _convnext() -> nn.Module:
    settings = [CNBlockConfig(12, 20, 2), CNBlockConfig(20, None, 2)]
    return ConvNeXt(settings, stochastic_depth_prob=0.5, num_classes=7)


def _mobilenet_v3(**kwargs) -> nn.Module:
    """The first stages of mobilenet_v3_large, which has everything that the small one has, and dilation."""
    config = partial(mobilenetv3.InvertedResidualConfig, width_mult=0.5)
    settings = [
        config(16, 3, 16, 16, False, "RE", 1, 1),
        config(16, 5, 64, 24, True, "RE", 2, 1),
        config(24, 5, 72, 24, True, "HS", 1, 2),
    ]
    return mobilenetv3.MobileNetV3(settings, last_channel=24, num_classes=7, **kwargs)


def _efficientnet_v2() -> nn.Module:
    settings = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 12, 12, 2),
        efficientnet.FusedMBConvConfig(4, 3, 2, 12, 16, 2),
        efficientnet.MBConvConfig(4, 3, 2, 16, 24, 2),
    ]
    return efficientnet.EfficientNet(settings, dropout=0.2, stochastic_depth_prob=0.5, num_classes=7, last_channel=40)


def _regnet(se_ratio: float | None) -> nn.Module:
    return regnet.RegNet(
        regnet.BlockParams([1, 2], [16, 24], [8, 12], [1.0, 1.0], [2, 2], se_ratio), num_classes=7, stem_width=8
    )


def _resnet(block: type[nn.Module], layers: list[int], **kwargs) -> nn.Module:
    """The stem and the first two stages, and the head behind them."""
    model = ResNet(block, [*layers, 1, 1], **kwargs)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 7)
    return model


def _efficientnet() -> nn.Module:
    settings = [
        efficientnet.MBConvConfig(1, 3, 1, 16, 12, 1),
        efficientnet.MBConvConfig(6, 5, 2, 12, 16, 2),
        efficientnet.MBConvConfig(6, 3, 2, 16, 24, 2),
    ]
    return efficientnet.EfficientNet(settings, dropout=0.2, stochastic_depth_prob=0.5, num_classes=7)


def _googlenet() -> nn.Module:
    model = _get("googlenet", aux_logits=False, init_weights=False)
    return nn.Sequential(*(getattr(model, name) for name in ("conv1", "maxpool1", "conv2", "conv3", "inception3a")))


# name, how it is built, size of the images, blocks that are swapped by the name of their class (None: all there are)
MODELS = [
    ("swin_t", _swin, (60, 88), {"SwinTransformerBlock": None, "ShiftedWindowAttention": None}),
    ("convnext_tiny", _convnext, (33, 40), {"CNBlock": None}),
    (
        "mobilenet_v2",
        partial(_get, "mobilenet_v2", width_mult=0.25),
        (32, 48),
        {"InvertedResidual": 17, "Conv2dNormActivation": 2},
    ),
    (
        "mobilenet_v3_small",
        partial(_get, "mobilenet_v3_small", width_mult=0.5),
        (32, 48),
        {"InvertedResidual": 11, "Conv2dNormActivation": 2},
    ),
    ("mobilenet_v3_large", _mobilenet_v3, (32, 40), {"InvertedResidual": 3, "Conv2dNormActivation": 2}),
    (
        "efficientnet_b0",
        _efficientnet,
        (32, 32),
        {"MBConv": 5, "Conv2dNormActivation": 2},
    ),
    ("efficientnet_v2_s", _efficientnet_v2, (32, 40), {"MBConv": 2, "FusedMBConv": 4, "Conv2dNormActivation": 2}),
    (
        "regnet_y_400mf",
        partial(_regnet, 0.25),
        (32, 40),
        {"ResBottleneckBlock": 3, "SimpleStemIN": 1, "Conv2dNormActivation": 2},
    ),
    (
        "regnet_x_400mf",
        partial(_regnet, None),
        (32, 40),
        {"ResBottleneckBlock": 3, "SimpleStemIN": 1, "Conv2dNormActivation": 2},
    ),
    ("resnet18", partial(_resnet, BasicBlock, [2, 2]), (33, 40), {"ResNet": 1, "BasicBlock": 4, "Sequential": 1}),
    (
        "resnet50",
        partial(_resnet, Bottleneck, [1, 2]),
        (33, 40),
        {"ResNet": 1, "Bottleneck": 3, "Sequential": 2},
    ),
    (
        "resnext50_32x4d",
        partial(_resnet, Bottleneck, [1, 1], groups=32, width_per_group=4),
        (33, 40),
        {"ResNet": 1, "Bottleneck": 2, "Sequential": 2},
    ),
    (
        "wide_resnet50_2",
        partial(_resnet, Bottleneck, [1, 1], width_per_group=128, replace_stride_with_dilation=[True, False, False]),
        (33, 40),
        {"ResNet": 1, "Bottleneck": 2, "Sequential": 2},
    ),
    ("mnasnet0_5", partial(_get, "mnasnet0_5", dropout=0.0), (32, 48), {"_InvertedResidual": 16, "Sequential": 1}),
    (
        "densenet121",
        lambda: torchvision.models.DenseNet(8, (2, 2), 16, drop_rate=0.2, num_classes=7),
        (40, 32),
        {"_DenseLayer": 4, "_Transition": 1, "Sequential": 1},
    ),
    ("shufflenet_v2_x0_5", partial(_get, "shufflenet_v2_x0_5"), (32, 48), {"Sequential": 21}),
    (
        "googlenet",
        _googlenet,
        (40, 32),
        {"BasicConv2d": None},
    ),
    ("vgg11_bn", lambda: nn.Sequential(*_get("vgg11_bn").features[:7]), (16, 24), {"Sequential": 1}),
]


@pytest.mark.parametrize("name, build, size, blocks", MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_model(name, build, size, blocks):
    swap_parity.assert_swap_keeps_numbers(build, size, blocks)


def test_inception():
    """Its batch must be larger, or the map, for batch statistics; and it hands out two tensors in training."""
    model = _get("inception_v3", aux_logits=False, init_weights=False)
    layers = nn.Sequential(model.Conv2d_1a_3x3, model.Conv2d_2a_3x3, model.Conv2d_2b_3x3)
    swap_parity.assert_swap_keeps_numbers(lambda: layers, (20, 24), {"BasicConv2d": 3})


WHOLE = """
    swin_t convnext_tiny mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s
    regnet_y_400mf regnet_x_400mf resnet18 resnet50 resnext50_32x4d wide_resnet50_2 mnasnet1_0 densenet121
    shufflenet_v2_x1_0 maxvit_t vgg11_bn
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE.split())
def test_whole_model(name):
    """As torchvision makes it, in double precision: evaluation, and back again."""
    model = swap_parity.randomise(_get(name)).double().eval()
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        report = bbfast.swap(model)
        assert report.swapped and not report.skipped and not report.notes, report
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
        bbfast.restore(model)
        assert torch.equal(model(x), expected)


def test_swin_v2_is_reported_as_skipped():
    model = swin_transformer.SwinTransformer(
        [4, 4],
        16,
        [1, 1],
        [2, 4],
        [8, 8],
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )
    report = bbfast.swap(model)
    assert report.totals == {"skipped": 4} and all(row.reason.startswith("Swin V2 ") for row in report.rows)
