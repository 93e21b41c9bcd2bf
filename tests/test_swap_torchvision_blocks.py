"""torchvision's blocks one by one: every piece of a fused forward, what runs itself, what is skipped and why."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import numerics
import parity
import pytest
import swap_parity
import torch
from torch import nn
from torchvision.models import densenet, efficientnet, mobilenetv2, mobilenetv3, regnet, resnet, swin_transformer
from torchvision.models.convnext import CNBlock
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d, SqueezeExcitation

import bbfast
from bbfast.swap import _fast


def swap_one(block: nn.Module) -> nn.Module:
    """A swapped copy, after making sure that the block itself was swapped."""
    block = copy.deepcopy(block)
    report = bbfast.swap(block)
    assert report.rows[0].path == "" and report.rows[0].status == "swapped", report
    return block


def assert_step_agrees(block: nn.Module, shape: tuple[int, ...], *, train: bool = True) -> nn.Module:
    """Output, gradients and statistics of a seeded step in double precision; the fused forward ran. Gives that block.

    The foreign forward must not run meanwhile, since it would agree with itself.
    """
    block = swap_parity.randomise(block).double()
    x = torch.randn(shape)
    with torch.no_grad():
        grad_out = torch.randn_like(copy.deepcopy(block).eval()(x.double()))
    expected = parity.training_step(copy.deepcopy(block), x, grad_out, train=train)
    fast = swap_one(block)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(type(block), "forward", _must_not_run)
        found = parity.training_step(fast, x, grad_out, train=train)
    parity.assert_equal_to_nine_digits(found, expected)
    return fast


def _must_not_run(self, *args, **kwargs):
    raise AssertionError(f"the foreign forward of {type(self).__name__} ran")


def skipped(block: nn.Module) -> str:
    """Why the block itself is skipped."""
    (row,) = [row for row in bbfast.plan(block).skipped if row.path == ""]
    return row.reason


# ---- attention ---------------------------------------------------------------------------------------------

Attention = swin_transformer.ShiftedWindowAttention


@pytest.mark.parametrize(
    "size, window, shift",
    [
        ((14, 14), [7, 7], [0, 0]),
        ((14, 14), [7, 7], [3, 3]),
        ((9, 15), [4, 4], [2, 2]),  # padded along both axes
        ((3, 15), [4, 4], [2, 2]),  # padded to one window, which does not shift
        ((4, 8), [4, 4], [2, 2]),  # one window without padding
        ((15, 2), [4, 4], [2, 2]),
        ((4, 3), [4, 4], [2, 2]),  # one window in all
        ((7, 10), [2, 5], [1, 2]),
        ((8, 10), [4, 5], [0, 2]),  # a shift along one axis
    ],
)
def test_attention(size, window, shift):
    block = Attention(12, window, shift, num_heads=3)
    assert_step_agrees(block, (2, *size, 12))


def test_attention_without_biases():
    assert_step_agrees(Attention(12, [4, 4], [2, 2], 3, qkv_bias=False, proj_bias=False), (2, 6, 7, 12))


@pytest.mark.parametrize("dropout", ["attention_dropout", "dropout"])
def test_attention_with_dropout_is_torchvisions_own_in_training(dropout):
    block = Attention(12, [4, 4], [2, 2], 3, **{dropout: 0.5})
    assert_step_agrees(block, (2, 6, 7, 12), train=False)
    fast, x, grad_out = swap_one(block), torch.randn(2, 6, 7, 12), torch.randn(2, 6, 7, 12)
    parity.assert_equal_to_nine_digits(
        parity.training_step(fast, x, grad_out), parity.training_step(block.double(), x, grad_out)
    )


def test_attention_reads_the_weights_of_what_it_never_calls():
    """As in torchvision: what hooks, or wraps, `qkv` has no say."""
    block = Attention(12, [4, 4], [2, 2], 3)
    block.qkv.register_forward_hook(lambda *args: 1 / 0)
    nn.utils.parametrizations.weight_norm(block.proj)
    assert_step_agrees(block, (2, 6, 7, 12))


def test_attention_with_another_index_is_skipped():
    block = Attention(12, [4, 4], [2, 2], 3)
    block.relative_position_index.add_(1)
    assert skipped(block) == "relative_position_index is not that of its window"


def test_attention_with_a_shift_as_large_as_its_window_is_skipped():
    reason = "shift_size=[4, 0] is not smaller than window_size=[4, 4] along each axis"
    assert skipped(Attention(12, [4, 4], [4, 0], 3)) == reason


# ---- Swin's block ------------------------------------------------------------------------------------------


def _swin_block(**kwargs) -> nn.Module:
    return swin_transformer.SwinTransformerBlock(12, 3, [4, 4], [2, 2], stochastic_depth_prob=0.5, **kwargs)


def test_swin_block():
    assert_step_agrees(_swin_block(), (5, 6, 7, 12))


def test_swin_block_calls_a_norm_of_another_kind():
    block = _swin_block(norm_layer=nn.RMSNorm)
    assert_step_agrees(block, (5, 6, 7, 12))


def test_swin_block_of_videos():
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    block = swin_transformer.SwinTransformerBlock(
        12, 3, [2, 4, 4], [1, 2, 2], stochastic_depth_prob=0.5, attn_layer=ShiftedWindowAttention3d
    )
    assert_step_agrees(block, (5, 3, 6, 7, 12))


def test_swin_block_keeps_an_empty_batch():
    block = _swin_block().eval()
    x = torch.randn(0, 8, 8, 12)
    assert swap_one(block)(x).shape == block(x).shape


def test_swin_v2_is_skipped():
    block = swin_transformer.SwinTransformerBlockV2(12, 3, [4, 4], [2, 2])
    reasons = {row.old.rpartition(".")[2]: row.reason for row in bbfast.plan(block).skipped}
    assert reasons == {
        "SwinTransformerBlockV2": "Swin V2 normalises a branch behind its last layer, which no fused op does",
        "ShiftedWindowAttentionV2": "Swin V2 attends by cosines, with a bias that a perceptron computes, which "
        "window_attention does not",
    }


# ---- stochastic depth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_stochastic_depth(mode, p):
    block = CNBlock(6, layer_scale=1.0, stochastic_depth_prob=0.0)
    block.stochastic_depth = StochasticDepth(p, mode)
    for _ in range(4):  # a batch is dropped, or not
        assert_step_agrees(block, (3, 6, 5, 4))


def test_stochastic_depth_that_raises_is_skipped():
    block = CNBlock(6, layer_scale=1.0, stochastic_depth_prob=0.0)
    block.stochastic_depth = StochasticDepth(1.5, "row")
    assert skipped(block) == "stochastic_depth has mode='row' and p=1.5, with which it raises"


# ---- ConvNeXt ----------------------------------------------------------------------------------------------


def test_convnext_block_calls_every_layer_behind_the_convolution():
    block = CNBlock(6, layer_scale=1.0, stochastic_depth_prob=0.0)
    called = []
    for layer in block.block[1:]:
        layer.register_forward_hook(lambda layer, *args: called.append(type(layer).__name__))
    assert_step_agrees(block, (2, 6, 5, 4), train=False)
    assert called[-6:] == ["Permute", "LayerNorm", "Linear", "GELU", "Linear", "Permute"]


def test_convnext_block_is_skipped_for_what_it_bypasses():
    block = CNBlock(6, layer_scale=1.0, stochastic_depth_prob=0.0)
    block.block[0].register_forward_hook(lambda *args: None)
    assert skipped(block) == "block.0 has forward hooks, which the fused op would not run"
    block = CNBlock(6, layer_scale=1.0, stochastic_depth_prob=0.0)
    block.block[0] = nn.Identity()
    assert skipped(block) == "its branch does not start with a convolution"
    block = CNBlock(6, layer_scale=1.0, stochastic_depth_prob=0.0)
    block.layer_scale = nn.Parameter(torch.ones(1, 1, 1))
    assert skipped(block) == "layer_scale has shape (1, 1, 1), which is not one value per channel"


# ---- blocks around a sequence ------------------------------------------------------------------------------


def _v3(use_se: bool = True, activation: str = "HS", stride: int = 1) -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig(8, 3, 24, 8, use_se, activation, stride, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


def _mbconv(expand_ratio: float = 4, stride: int = 1, out_channels: int = 8) -> nn.Module:
    config = efficientnet.MBConvConfig(expand_ratio, 3, stride, 8, out_channels, 1)
    return efficientnet.MBConv(config, 0.5, nn.BatchNorm2d)


def _fused_mbconv(expand_ratio: float, stride: int = 1) -> nn.Module:
    return efficientnet.FusedMBConv(
        efficientnet.FusedMBConvConfig(expand_ratio, 3, stride, 8, 8, 1), 0.5, nn.BatchNorm2d
    )


def _regnet_block(group_width: int = 4, stride: int = 1, se_ratio: float | None = 0.5, act=nn.ReLU) -> nn.Module:
    return regnet.ResBottleneckBlock(8, 8, stride, nn.BatchNorm2d, act, group_width, 2.0, se_ratio)


def _regnet_block_activated_before_the_sum() -> nn.Module:
    block = _regnet_block()
    block.f.c.append(nn.SiLU())
    return block


BLOCKS = {
    "MobileNetV2": lambda: mobilenetv2.InvertedResidual(8, 8, 1, 3),
    "MobileNetV2, not expanded": lambda: mobilenetv2.InvertedResidual(8, 8, 1, 1),
    "MobileNetV2, stride": lambda: mobilenetv2.InvertedResidual(8, 8, 2, 3),
    "MobileNetV3": _v3,
    "MobileNetV3 without squeeze-and-excite": partial(_v3, use_se=False, activation="RE"),
    "MobileNetV3, stride": partial(_v3, stride=2),
    "MBConv": _mbconv,
    "MBConv, not expanded": partial(_mbconv, expand_ratio=1),
    "MBConv, no sum": partial(_mbconv, stride=2, out_channels=12),
    "FusedMBConv": partial(_fused_mbconv, 4),
    "FusedMBConv, not expanded": partial(_fused_mbconv, 1),
    "FusedMBConv, no sum": partial(_fused_mbconv, 4, stride=2),
    "RegNet": _regnet_block,
    "RegNet, depthwise": partial(_regnet_block, group_width=1),
    "RegNet, projected": partial(_regnet_block, stride=2),
    "RegNet, SiLU": partial(_regnet_block, act=nn.SiLU),
    "RegNet, activated before the sum": _regnet_block_activated_before_the_sum,
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("train", [True, False])
def test_block(name, train):
    block = BLOCKS[name]()
    assert_step_agrees(block, (3, 8, 7, 6), train=train)


def test_layers_that_no_op_knows_run_themselves():
    called = []
    block = _v3()
    block.block[1][2], block.block[2].activation = nn.Softplus(), nn.ELU()  # behind the depthwise convolution, in s-e
    block.block[1][2].register_forward_hook(lambda *args: called.append("activation"))
    block.block[2].register_forward_hook(lambda *args: called.append("squeeze-and-excite"))
    assert_step_agrees(block, (3, 8, 7, 6))
    assert called[-2:] == ["activation", "squeeze-and-excite"]

    block = _regnet_block()
    block.activation = nn.ELU()
    block.f.se.register_forward_hook(lambda *args: called.append("behind a dense convolution"))
    assert_step_agrees(block, (3, 8, 7, 6))
    assert called[-1] == "behind a dense convolution"


def test_squeeze_and_excite_of_another_make_runs_itself():
    block = _v3()
    block.block[2].fc1 = nn.Conv2d(24, 8, 1, groups=2)
    assert_step_agrees(block, (3, 8, 7, 6))


def test_blocks_without_batch_norm_are_not_reported():
    block = mobilenetv2.InvertedResidual(8, 8, 1, 3, norm_layer=partial(nn.GroupNorm, 4))
    assert bbfast.plan(block).rows == ()


HOOKED = {
    "conv": (lambda: mobilenetv2.InvertedResidual(8, 8, 1, 3), ["conv", "conv.0", "conv.1.0", "conv.3"]),
    "squeeze-and-excite": (_v3, ["block", "block.2", "block.2.fc1", "block.2.scale_activation"]),
    "stochastic depth": (_mbconv, ["stochastic_depth", "block.3.1"]),
    "RegNet": (_regnet_block, ["f", "f.b", "f.c.1", "activation"]),
}


@pytest.mark.parametrize("build, name", [(build, name) for build, names in HOOKED.values() for name in names])
def test_hooks_on_what_is_bypassed(build, name):
    """Before a swap they are a reason to skip the block; after it, the foreign forward runs."""
    block = build()
    reason = f"{name} has forward hooks, which the fused op would not run"
    handle = block.get_submodule(name).register_forward_hook(lambda *args: None)
    assert skipped(block) == reason
    handle.remove()
    bbfast.swap(block)
    called = []
    block.get_submodule(name).register_forward_hook(lambda *args: called.append(name))
    block.eval()(torch.randn(2, 8, 7, 6))
    assert called


def test_a_block_that_is_skipped_still_has_fast_pieces():
    block = _v3()
    block.block.register_forward_hook(lambda *args: None)
    assert Counter(row.old.rpartition(".")[2] for row in bbfast.plan(block).swapped) == {"Conv2dNormActivation": 3}


def test_pieces_that_were_swapped_before_their_block():
    block = _v3()
    bbfast.swap(block, filter_fn=lambda module, path: isinstance(module, Conv2dNormActivation))
    assert isinstance(block.block[0], _fast.Fast) and not isinstance(block, _fast.Fast)
    fast = assert_step_agrees(block, (3, 8, 7, 6))
    assert isinstance(fast, _fast.Fast)
    bbfast.restore(fast)
    assert not any(isinstance(module, _fast.Fast) for module in fast.modules())


# ---- ResNet, DenseNet --------------------------------------------------------------------------------------


def _downsample(channels: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


RESIDUAL = {
    "BasicBlock": lambda: resnet.BasicBlock(8, 8),
    "BasicBlock, downsampled": lambda: resnet.BasicBlock(8, 12, 2, _downsample(12, 2)),
    "Bottleneck": lambda: resnet.Bottleneck(8, 2),
    "Bottleneck, downsampled": lambda: resnet.Bottleneck(8, 4, 2, _downsample(16, 2), groups=2, base_width=64),
    "frozen": lambda: resnet.Bottleneck(8, 2, norm_layer=FrozenBatchNorm2d),
    "ResNeSt-like activation": lambda: _with_relu(resnet.BasicBlock(8, 8), nn.SiLU()),
    "unknown activation": lambda: _with_relu(resnet.BasicBlock(8, 8), nn.ELU()),
}


def _with_relu(block: nn.Module, relu: nn.Module) -> nn.Module:
    block.relu = relu
    return block


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize("train", [True, False])
def test_residual_block(name, train):
    block = RESIDUAL[name]()
    assert_step_agrees(block, (3, 8, 7, 6), train=train)


def test_residual_block_with_a_module_in_the_wrong_place():
    block = resnet.BasicBlock(8, 8)
    block.conv1, block.bn2 = nn.Identity(), nn.ReLU()
    assert skipped(block) == "conv1 holds Identity, not a convolution; bn2 holds ReLU, not a norm"


def test_residual_block_with_another_norm():
    block = resnet.BasicBlock(8, 8, norm_layer=partial(nn.GroupNorm, 4))
    assert skipped(block).startswith("bn1 is a torch.nn.modules.normalization.GroupNorm, which no fused op knows")


def test_resnet_whose_forward_impl_somebody_replaced():
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    bbfast.swap(model)
    model._forward_impl = lambda x: x + 1
    assert torch.equal(model(torch.zeros(1)), torch.ones(1))


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_dense_layer(memory_efficient):
    layer = densenet._DenseLayer(8, 4, 2, drop_rate=0.5, memory_efficient=memory_efficient)
    block = nn.Sequential(layer)
    swap_parity.randomise(block).double()
    fast = copy.deepcopy(block)
    assert bbfast.swap(fast).totals == {"swapped": 1}
    x, grad_out = torch.randn(3, 8, 7, 6), torch.randn(3, 4, 7, 6)
    parity.assert_equal_to_nine_digits(
        parity.training_step(fast, x, grad_out), parity.training_step(block, x, grad_out)
    )


def test_dense_layer_that_no_op_knows():
    layer = densenet._DenseLayer(8, 4, 2, 0.0)
    layer.relu1, layer.norm1 = nn.ELU(), nn.Identity()
    assert skipped(layer) == "relu1 is a torch.nn.modules.activation.ELU, which no fused op knows"
    layer.relu1 = nn.ReLU()
    assert skipped(layer) == "norm1 is an Identity, so that there is nothing to fuse with relu1"
    layer.relu1 = nn.GELU(approximate="tanh")
    assert skipped(layer).startswith("relu1 is a GELU, which no op knows")


# ---- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MobileNetV3", "MBConv", "FusedMBConv", "RegNet", "frozen", "BasicBlock"])
def test_autocast(name):
    """The same dtype as without a swap (frozen norms give float32), and values by the rule."""
    _assert_autocast_agrees((BLOCKS | RESIDUAL)[name](), torch.randn(3, 8, 7, 6))


def test_autocast_of_channels_last():
    _assert_autocast_agrees(CNBlock(6, layer_scale=1.0, stochastic_depth_prob=0.5), torch.randn(3, 6, 5, 4))
    _assert_autocast_agrees(_swin_block(), torch.randn(3, 6, 7, 12))


def _assert_autocast_agrees(block: nn.Module, x: torch.Tensor) -> None:
    block = swap_parity.randomise(block).eval()
    with torch.no_grad():
        exact = copy.deepcopy(block).double()(x.double())
        fast = swap_one(block)
        with torch.autocast("cpu", torch.bfloat16):
            x = x.bfloat16()  # what the layer before gives
            expected = block(x)
            with swap_parity.backend("torch"):
                found = fast(x)
    bound = torch.empty_like(expected, dtype=torch.bfloat16)  # the products round to bfloat16, whatever comes back
    assert found.dtype == expected.dtype
    numerics.assert_within_rule("output", found.to(bound), exact, expected.to(bound))


# ---- subclasses --------------------------------------------------------------------------------------------


def test_quantizable_blocks_are_skipped_as_subclasses():
    from torchvision.models import quantization

    for name in ("mobilenet_v2", "resnet18"):
        model = quantization.__dict__[name](num_classes=3).eval()
        reasons = {row.old.rpartition(".")[2]: row.reason for row in bbfast.plan(model).skipped}
        quantizable = {type(module).__name__ for module in model.modules() if "Quantizable" in type(module).__name__}
        expected = {"mobilenet_v2": {"QuantizableInvertedResidual"}, "resnet18": quantizable}[name]
        assert set(reasons) == expected
        for old, reason in reasons.items():
            base = old.removeprefix("Quantizable")
            assert reason == f"a subclass of {base}; only exactly that class is known to run fused"


def test_squeeze_and_excite_alone_is_left_alone():
    assert bbfast.plan(SqueezeExcitation(8, 4)).rows == ()
