"""timm's mobile models, swapped: the blocks that are found, the numbers that stay."""

from __future__ import annotations

import copy

import parity
import pytest
import swap_parity
import timm
import torch
from timm.layers import ConvNormAct
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from torch import nn

import bbfast

SIZE = (40, 56)  # halved to odd maps on the way

# For each name: the blocks that are swapped, by the name of their class; None for all there are.
V2 = {"EfficientNet": 1, "DepthwiseSeparableConv": None, "InvertedResidual": None}
V3 = {"MobileNetV3": 1, "DepthwiseSeparableConv": None, "InvertedResidual": None, "ConvBnAct": None}
EDGE = {"EfficientNet": 1, "EdgeResidual": None, "InvertedResidual": None}
MODELS = {
    "mobilenetv1_100": {"EfficientNet": 1, "DepthwiseSeparableConv": None},
    "mobilenetv2_050": V2,
    "mobilenetv2_110d": V2,
    "mobilenetv3_small_050": V3,
    "mobilenetv3_large_100": V3,
    "tf_mobilenetv3_small_minimal_100": V3,
    "mnasnet_small": V2,
    "efficientnet_b0": V2,
    "efficientnet_lite0": V2,
    "tf_efficientnet_b0": V2,
    "tf_efficientnet_lite0": V2,
    "efficientnet_es": EDGE,
    "efficientnet_em": EDGE,
    "tf_efficientnetv2_b0": {**EDGE, "ConvBnAct": None},
    "mobilenetv4_conv_small_050": {
        "MobileNetV3": 1,
        "BatchNormAct2d": 1,
        "ConvBnAct": None,
        "UniversalInvertedResidual": 12,
        "ConvNormAct": 39 - 12,  # the last one of each block runs with the shortcut
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    swap_parity.assert_swap_keeps_numbers(
        lambda: timm.create_model(name, num_classes=7, drop_path_rate=0.3, drop_rate=0.2), SIZE, MODELS[name]
    )


def test_mobilenetv4_hybrid_reports_its_attention():
    """MobileAttention stays, and is reported; the numbers of the model with layer scale stay, too."""
    model = swap_parity.randomise(timm.create_model("mobilenetv4_hybrid_medium", num_classes=7)).double().eval()
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        report = bbfast.swap(model)
        torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-12)
    assert {(row.old.rpartition(".")[2], row.reason) for row in report.skipped} == {
        ("MobileAttention", "no op does its attention of maps; layers inside it that fuse are swapped on their own")
    }
    assert len(report.skipped) == 8
    assert sum(row.old.endswith("UniversalInvertedResidual") for row in report.swapped) == 22


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0"])
def test_methods_other_than_forward(name):
    model = swap_parity.randomise(timm.create_model(name, num_classes=7)).double().eval()
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)

    def results():
        features, intermediates = model.forward_intermediates(x)
        return [features, *intermediates, model.forward_features(x), model.forward_head(model.forward_features(x))]

    with torch.no_grad():
        before = results()
        bbfast.swap(model)
        for ours, theirs in zip(results(), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0"])
def test_checkpointing_and_features_of_ones_own(name):
    model = swap_parity.randomise(timm.create_model(name, num_classes=7)).double().eval()
    model.set_grad_checkpointing()
    swapped = copy.deepcopy(model)
    bbfast.swap(swapped)
    x, grad_out = torch.randn(3, 3, *SIZE), torch.randn(3, 7)
    parity.assert_equal_to_nine_digits(
        parity.training_step(swapped, x, grad_out), parity.training_step(model, x, grad_out)
    )

    with torch.no_grad():
        zeros = torch.zeros(2, model.num_features, 1, 1).double()
        swapped.forward_features = lambda x: zeros
        torch.testing.assert_close(swapped(x.double()), model.forward_head(zeros))
        swapped.forward_features = model.forward_features
    bbfast.restore(swapped)
    assert [row.reason for row in bbfast.plan(swapped).skipped] == [
        "it has a forward_features of its own (somebody replaced it on the instance)"
    ]


# ---- blocks that few models have ---------------------------------------------------------------------------


def on_images(block: nn.Module, channels: int) -> nn.Module:
    """The block behind a convolution that makes so many channels of images."""
    return nn.Sequential(nn.Conv2d(3, channels, 1), block)


DROPPED = {"drop_path_rate": 0.4}
BLOCKS = {
    "space to depth": lambda: InvertedResidual(8, 12, exp_ratio=2, s2d=1, se_layer=SqueezeExcite),
    "average behind depthwise": lambda: InvertedResidual(8, 12, stride=2, aa_layer="avg", se_layer=SqueezeExcite),
    "blur behind expansion": lambda: EdgeResidual(8, 12, stride=2, aa_layer="blur", exp_ratio=2),
    "edge with squeeze-and-excite": lambda: EdgeResidual(8, 8, exp_ratio=2, se_layer=SqueezeExcite, **DROPPED),
    "unknown activation": lambda: InvertedResidual(8, 8, act_layer=nn.LeakyReLU, se_layer=SqueezeExcite, **DROPPED),
    "convolution that skips": lambda: ConvBnAct(8, 8, 3, skip=True, act_layer=nn.SiLU, **DROPPED),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(case):
    block = BLOCKS[case]
    swap_parity.assert_swap_keeps_numbers(lambda: on_images(block(), 8), (10, 14), {type(block()).__name__: 1})


@pytest.mark.parametrize(
    "arguments, layers",
    [
        ({"dw_kernel_size_start": 3, "dw_kernel_size_end": 5, **DROPPED}, 4),
        ({"dw_kernel_size_mid": 0, "layer_scale_init_value": None, **DROPPED}, 1),
        ({"layer_scale_init_value": None, "se_layer": SqueezeExcite}, 2),
        ({"stride": 2, "aa_layer": "avg", "dw_kernel_size_start": 3}, 3),
        ({"stride": 2, "dw_kernel_size_mid": 0, "dw_kernel_size_end": 3}, 2),
    ],
)
def test_universal_inverted_residual(arguments, layers):
    """`layers` of its convolutions run themselves."""
    swap_parity.assert_swap_keeps_numbers(
        lambda: on_images(UniversalInvertedResidual(8, 8, exp_ratio=2, **arguments), 8),
        (10, 14),
        {"UniversalInvertedResidual": 1, "ConvNormAct": layers},
    )


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("image_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_layout_of_the_output(weight_format, image_format, backend):
    """It is channels_last if either the images or the weight is, as timm's own."""
    layer = ConvNormAct(3, 8, 3, stride=2).eval().to(memory_format=weight_format)
    x = torch.randn(2, 3, 10, 14).contiguous(memory_format=image_format)
    with torch.no_grad(), swap_parity.backend(backend):
        before = layer(x)
        bbfast.swap(layer)
        after = layer(x)
    assert after.stride() == before.stride()
    torch.testing.assert_close(after, before)


# ---- what keeps a block as it is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", [InvertedResidual(8, 8), EdgeResidual(8, 8), ConvBnAct(8, 8, 3, skip=True)], ids=lambda b: type(b).__name__
)
def test_hooked_identity_still_runs(block):
    """The place of a pooling can be hooked even where there is none."""
    block.aa.register_forward_hook(lambda *_: None)
    (row,) = [row for row in bbfast.plan(block).rows if row.path == ""]
    assert row.reason == "aa has forward hooks, which the fused op would not run"


def test_universal_inverted_residual_with_a_strange_end():
    """A layer that somebody put in the place of the last convolution runs itself."""
    block = UniversalInvertedResidual(8, 8, exp_ratio=2).eval()
    block.pw_proj = nn.Sequential(nn.Conv2d(16, 8, 1), nn.Tanh())
    x = torch.randn(2, 8, 7, 9)
    before = block(x)
    bbfast.swap(block)
    torch.testing.assert_close(block(x), before)
