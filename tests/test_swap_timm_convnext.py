"""timm's ConvNeXt, swapped: the numbers stay, and so does the memory format."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import swap_parity
import torch
from torch import nn

import bbfast
from bbfast import dispatch

timm = pytest.importorskip("timm")
from parity import assert_equal_to_nine_digits, training_step  # noqa: E402
from timm.layers import LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d  # noqa: E402
from timm.layers.norm import GroupNorm1, LayerNorm2dFp32  # noqa: E402
from timm.models.convnext import ConvNeXtBlock, Downsample  # noqa: E402

# Few channels and blocks: every path of a ConvNeXt in a fraction of its time.
SHALLOW = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5}

pytestmark = pytest.mark.usefixtures("reference_backend")


def build(name: str = "convnext_tiny", **arguments) -> nn.Module:
    return timm.create_model(name, **{"drop_path_rate": 0.3, "drop_rate": 0.2, **SHALLOW, **arguments})


def make_block(in_chs: int = 6, **arguments) -> ConvNeXtBlock:
    return swap_parity.randomise(ConvNeXtBlock(in_chs, **{"kernel_size": 5, **arguments})).double().eval()


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A swapped copy, and the model itself."""
    swapped = copy.deepcopy(model)
    assert bbfast.swap(swapped, strict=True).swapped
    return swapped, model


def assert_same_step(swapped: nn.Module, plain: nn.Module, x: torch.Tensor, *, train: bool = True) -> None:
    """Output and gradients of one seeded pass in double precision, to nine digits."""
    with torch.no_grad():
        grad_out = torch.randn_like(plain(x.double()))
    ours, theirs = (training_step(model, x, grad_out, train=train) for model in (swapped, plain))
    assert_equal_to_nine_digits(ours, theirs)


# ---- models ------------------------------------------------------------------------------------------------

MODELS = {
    "convnext_zepto_rms": {},
    "convnext_zepto_rms_ols": {},
    "convnext_atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)},
    "convnext_atto_ols": {},
    "convnext_atto_rms": {},
    "convnext_femto": {},
    "convnext_femto_ols": {},
    "convnext_pico": {},
    "convnext_pico_ols": {},
    "convnext_nano": {},
    "convnext_nano_ols": {},
    "convnext_tiny": {"dims": (96, 192, 384, 768)},
    "convnext_tiny_hnf": {},
    "convnext_small": {"ls_init_value": None},
    "convnext_base": {"kernel_sizes": (3, 5, 7, 9), "conv_bias": False},
    "convnext_large_mlp": {"output_stride": 8},
    "convnext_xxlarge": {"norm_layer": "simplenorm"},
    "convnextv2_atto": {},
    "convnextv2_femto": {},
    "convnextv2_pico": {},
    "convnextv2_nano": {"output_stride": 16},
    "convnextv2_tiny": {"norm_layer": "rmsnorm"},
    "test_convnext": {},
    "test_convnext2": {},
    "test_convnext3": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    arguments = {**SHALLOW, **MODELS[name]}
    blocks = {"ConvNeXtBlock": sum(arguments["depths"])}
    swap_parity.assert_swap_keeps_numbers(lambda: build(name, **arguments), (68, 92), blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_nano_ols", "convnext_tiny", "convnext_tiny_hnf", "convnextv2_tiny"])
def test_whole_model(name):
    swap_parity.assert_swap_keeps_numbers(
        lambda: timm.create_model(name, drop_path_rate=0.3, num_classes=5), (96, 128), {"ConvNeXtBlock": None}
    )


def test_features():
    swap_parity.assert_swap_keeps_numbers(
        lambda: build(features_only=True, out_indices=(0, 1, 3)),
        (68, 92),
        {"ConvNeXtBlock": 5},
        pick=lambda features: torch.cat([maps.flatten(1) for maps in features], dim=1),
    )


def test_gradient_checkpointing():
    swapped, plain = twins(swap_parity.randomise(build()).double())
    swapped.set_grad_checkpointing()
    x = torch.randn(3, 3, 68, 92)
    assert_same_step(swapped, plain, x)  # as without
    plain.set_grad_checkpointing()
    assert_same_step(swapped, plain, x)


# ---- blocks ------------------------------------------------------------------------------------------------

BLOCKS = {
    "v1": {},
    "v2": {"use_grn": True, "ls_init_value": None},
    "convolutional perceptron": {"conv_mlp": True},
    "convolutional v2": {"conv_mlp": True, "use_grn": True, "ls_init_value": None},
    "stride": {"stride": 2},
    "stride, more channels": {"stride": 2, "out_chs": 12, "conv_mlp": True},
    "more channels": {"out_chs": 12},
    "dilation": {"dilation": 2},
    "two dilations": {"dilation": (2, 1)},
    "no bias": {"conv_bias": False},
    "activation": {"act_layer": "relu", "mlp_ratio": 2.0},
}


@pytest.mark.parametrize("arguments", BLOCKS.values(), ids=BLOCKS)
def test_block(arguments):
    swapped, plain = twins(make_block(drop_path=0.4, **arguments))
    has_shortcut = any(key in arguments for key in ("stride", "out_chs")) or arguments.get("dilation") == (2, 1)
    assert (type(plain.shortcut) is Downsample) == has_shortcut
    x = torch.randn(5, 6, 9, 14)
    assert_same_step(swapped, plain, x)
    assert_same_step(swapped, plain, x, train=False)


NORMS = {
    False: [LayerNorm, RmsNorm, SimpleNorm],
    True: [LayerNorm2d, LayerNorm2dFp32, RmsNorm2d, SimpleNorm2d, nn.BatchNorm2d, GroupNorm1, partial(nn.GroupNorm, 3)],
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("conv_mlp, norm_layer", [(kind, norm) for kind, norms in NORMS.items() for norm in norms])
def test_memory_format_is_what_it_was(conv_mlp, norm_layer, stride, channels_last):
    swapped, plain = twins(make_block(conv_mlp=conv_mlp, norm_layer=norm_layer, stride=stride))
    format = torch.channels_last if channels_last else torch.contiguous_format
    for size in ((9, 14), (8, 1), (1, 1)):
        x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=format)
        with torch.no_grad():
            ours, theirs = swapped(x), plain(x)
        torch.testing.assert_close(ours, theirs)
        for asked in (torch.channels_last, torch.contiguous_format):
            assert ours.is_contiguous(memory_format=asked) == theirs.is_contiguous(memory_format=asked)


def test_ops_that_run():
    swapped, _ = twins(make_block(drop_path=0.4).float())
    dispatch.forget_choices()
    swapped.train()(torch.randn(2, 6, 9, 14)).sum().backward()
    ops = {"depthwise_conv_bn_act", "drop_path_add"}
    assert ops | {"drop_path_add_backward"} <= dispatch.last_choices().keys()


def test_batch_norm_in_a_model():
    """A norm other than timm's own takes the convolutional perceptron; the stem's is fused as any run of layers."""
    blocks = {"ConvNeXtBlock": 5, "Sequential": 1}
    swap_parity.assert_swap_keeps_numbers(lambda: build(norm_layer="batchnorm2d", conv_mlp=True), (68, 92), blocks)


@pytest.mark.parametrize("arguments", [{}, {"conv_mlp": True}], ids=str)
def test_autocast(arguments):
    swapped, plain = twins(make_block(**arguments).float())
    x = torch.randn(2, 6, 9, 14)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = swapped(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_compiled_block():
    swapped, plain = twins(make_block(drop_path=0.3))
    compiled = torch.compile(swapped, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 6, 9, 14), (3, 6, 12, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("name", ["norm", "mlp", "mlp.fc1", "shortcut", "conv_dw"])
def test_hook_added_after_the_swap(name):
    swapped, plain = twins(make_block())
    shapes = {}
    for key, model in (("ours", swapped), ("theirs", plain)):
        seen = shapes[key] = []
        model.get_submodule(name).register_forward_hook(lambda m, i, o, seen=seen: seen.append(i[0].shape) or 2 * o)
    assert_same_step(swapped, plain, torch.randn(2, 6, 9, 14))
    assert set(shapes["ours"]) == set(shapes["theirs"]) != set()


# ---- what is not swapped -----------------------------------------------------------------------------------


def pad_with_reflections(block):
    block.conv_dw.padding_mode = "reflect"


def hook_the_convolution(block):
    block.conv_dw.register_forward_hook(lambda *args: None)


OBJECTIONS = {
    "padding": (pad_with_reflections, "conv_dw has padding_mode='reflect'; ops pad with zeros only"),
    "hook": (hook_the_convolution, "conv_dw has forward hooks, which the fused op would not run"),
}


@pytest.mark.parametrize("spoil, reason", OBJECTIONS.values(), ids=OBJECTIONS)
def test_block_that_is_skipped(spoil, reason):
    block = make_block()
    spoil(block)
    assert [row.reason for row in bbfast.plan(block).rows] == [reason]
