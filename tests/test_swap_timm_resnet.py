"""timm's ResNets and RegNets, swapped: the blocks that are found, the numbers that stay."""

from __future__ import annotations

import copy
from functools import partial

import numerics
import parity
import pytest
import swap_parity
import timm
import torch
from timm.layers import BatchNormAct2d, SEModule
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.regnet import PreBottleneck, RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import bbfast
from bbfast.swap import _fast

SIZE = (40, 56)  # halved to odd maps on the way

# ---- models ------------------------------------------------------------------------------------------------

SHALLOW = {"layers": (2, 1, 2, 1), "channels": (16, 32, 48, 64), "drop_path_rate": 0.3, "drop_rate": 0.2}
BASIC = {"ResNet": 1, "BasicBlock": 6}
BOTTLENECK = {"ResNet": 1, "Bottleneck": 6}
# For each name: the blocks that are swapped, by the name of their class, when made with SHALLOW. Sequentials are
# shortcuts that change the map, and deep stems.
RESNETS = {
    "resnet18": {**BASIC, "Sequential": 4},
    "resnet18d": {**BASIC, "Sequential": 5},
    "resnet10t": {**BASIC, "Sequential": 5},
    "resnetblur18": {**BASIC, "Sequential": 4},
    "seresnet18": {**BASIC, "Sequential": 4},
    "resnet50": {**BOTTLENECK, "Sequential": 3},
    "resnet50d": {**BOTTLENECK, "Sequential": 4},
    "resnet50s": {**BOTTLENECK, "Sequential": 5},
    "wide_resnet50_2": {**BOTTLENECK, "Sequential": 3},
    "resnext50_32x4d": {**BOTTLENECK, "Sequential": 3},
    "resnext50d_32x4d": {**BOTTLENECK, "Sequential": 4},
    "seresnet50": {**BOTTLENECK, "Sequential": 3},
    "seresnext50_32x4d": {**BOTTLENECK, "Sequential": 3},
    "seresnextaa101d_32x8d": {**BOTTLENECK, "Sequential": 4},
    "ecaresnet50t": {**BOTTLENECK, "Sequential": 4},
    "resnetblur50": {**BOTTLENECK, "Sequential": 3},
    "resnetrs50": {**BOTTLENECK, "Sequential": 5},  # a convolution instead of the maximum
}
# Means of 2x2 pixels leave out the odd rows that shortcuts do not.
EVEN = {"seresnextaa101d_32x8d": (64, 64)}


@pytest.mark.parametrize("name", RESNETS)
def test_resnet(name):
    swap_parity.assert_swap_keeps_numbers(
        lambda: timm.create_model(name, num_classes=7, **SHALLOW), EVEN.get(name, SIZE), RESNETS[name]
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_drops_the_same_blocks(name):
    swap_parity.assert_swap_keeps_numbers(
        lambda: timm.create_model(name, num_classes=7, drop_block_rate=0.3, **SHALLOW), (80, 80), RESNETS[name]
    )


@pytest.mark.parametrize(
    "name, blocks",
    [
        ("regnetx_002", {"Bottleneck": 13, "ConvNormAct": 1 + 13 + 4}),  # stem, first of each block, shortcuts
        ("regnety_002", {"Bottleneck": 13, "ConvNormAct": 1 + 13 + 4}),
        ("regnetx_004_tv", {"Bottleneck": 22, "ConvNormAct": 1 + 22 + 4}),
        ("regnetz_005", {"Bottleneck": 21, "ConvNormAct": 1 + 21 + 1}),
    ],
)
def test_regnet(name, blocks):
    swap_parity.assert_swap_keeps_numbers(
        lambda: timm.create_model(name, num_classes=7, drop_path_rate=0.3, drop_rate=0.2), SIZE, blocks
    )


@pytest.mark.parametrize("se_ratio", [0, 0.25])
@pytest.mark.parametrize("downsample", ["conv1x1", "avg"])
def test_regnet_of_blocks_that_begin_with_their_norms(downsample, se_ratio):
    cfg = RegNetCfg(depth=7, w0=16, wa=16, wm=2.0, group_size=8, se_ratio=se_ratio, downsample=downsample, preact=True)
    norms = 2 if se_ratio else 1  # that run themselves: before the first convolution, and behind squeeze-and-excite
    swap_parity.assert_swap_keeps_numbers(
        lambda: RegNet(cfg, num_classes=7, drop_path_rate=0.3), SIZE, {"PreBottleneck": 7, "BatchNormAct2d": 7 * norms}
    )


# ---- blocks that few models have ---------------------------------------------------------------------------


def on_images(block: nn.Module, channels: int) -> nn.Module:
    """The block behind a convolution that makes so many channels of images."""
    return nn.Sequential(nn.Conv2d(3, channels, 1), block)


DROPPED = {"drop_path_rate": 0.4}
BLOCKS = {
    "unknown activations": lambda: Bottleneck(16, 4, act_layer=nn.LeakyReLU),
    "norms that activate": lambda: Bottleneck(16, 4, norm_layer=partial(BatchNormAct2d, act_layer=nn.SiLU)),
    "squeeze-and-excite with a norm": lambda: Bottleneck(
        16, 4, attn_layer=partial(SEModule, norm_layer=nn.BatchNorm2d)
    ),
    "squeeze-and-excite with a maximum": lambda: Bottleneck(16, 4, attn_layer=partial(SEModule, add_maxpool=True)),
    "squeeze-and-excite with an unknown gate": lambda: BasicBlock(
        16, 16, attn_layer=partial(SEModule, gate_layer="tanh")
    ),
    "RegNet without shortcut": lambda: RegNetBottleneck(16, 24, downsample=None, group_size=8, **DROPPED),
    "RegNet with linear output": lambda: RegNetBottleneck(16, 16, linear_out=True, group_size=8, **DROPPED),
    "RegNet with unknown activation": lambda: RegNetBottleneck(16, 16, act_layer=nn.LeakyReLU, group_size=8),
    "norms first without shortcut": lambda: PreBottleneck(16, 24, downsample=None, group_size=8, **DROPPED),
    "norms first with unknown activation": lambda: PreBottleneck(16, 16, act_layer=nn.LeakyReLU, group_size=8),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(case):
    model = swap_parity.randomise(on_images(BLOCKS[case](), 16)).double()
    x, grad_out = torch.randn(3, 3, 9, 10), torch.randn_like(model(torch.randn(3, 3, 9, 10).double()))
    swapped = copy.deepcopy(model)
    bbfast.swap(swapped)
    assert _fast.is_fast(type(swapped[1]))
    for train in (True, False):
        parity.assert_equal_to_nine_digits(
            parity.training_step(swapped, x, grad_out, train=train),
            parity.training_step(model, x, grad_out, train=train),
        )
        model.zero_grad()
        swapped.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(swapped(x.double()), model(x.double()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("own", [nn.SiLU, nn.LeakyReLU])
@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU])
def test_norms_that_activate_in_front_of_an_activation(own, act):
    """Both run, the norm's own before the shortcut is added; timm has no gradients of most of these."""
    norm = partial(BatchNormAct2d, act_layer=own)
    model = swap_parity.randomise(on_images(BasicBlock(16, 16, norm_layer=norm, act_layer=act), 16)).double().eval()
    x = torch.randn(2, 3, 9, 10).double()
    with torch.no_grad():
        before = model(x)
        bbfast.swap(model)
        assert _fast.is_fast(type(model[1]))
        torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-12)


# ---- ResNet's other ways in --------------------------------------------------------------------------------


def small_resnet(name: str = "resnet18", **arguments) -> nn.Module:
    return swap_parity.randomise(timm.create_model(name, num_classes=7, **SHALLOW, **arguments)).eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_resnet_methods_other_than_forward(name):
    model = small_resnet(name).double()
    x = torch.randn(2, 3, *SIZE).double()

    def results():
        features, intermediates = model.forward_intermediates(x)
        return [features, *intermediates, model.forward_features(x), model.forward_head(model.forward_features(x))]

    with torch.no_grad():
        before = results()
        bbfast.swap(model)
        for ours, theirs in zip(results(), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, blocks", [("resnet18", 6), ("resnet50", 6)])
def test_features_only(name, blocks):
    """The children of a model without its forward: blocks are fused, the stem is not."""
    model = swap_parity.randomise(timm.create_model(name, features_only=True, **SHALLOW)).double().eval()
    x = torch.randn(2, 3, *SIZE).double()
    with torch.no_grad():
        before = model(x)
        report = bbfast.swap(model)
        after = model(x)
    assert sum(row.old.endswith(("BasicBlock", "Bottleneck")) for row in report.swapped) == blocks
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_resnet_with_checkpointing():
    model = small_resnet("resnet50").double()
    model.set_grad_checkpointing()
    swapped = copy.deepcopy(model)
    bbfast.swap(swapped)
    x, grad_out = torch.randn(3, 3, *SIZE), torch.randn(3, 7)
    parity.assert_equal_to_nine_digits(
        parity.training_step(swapped, x, grad_out), parity.training_step(model, x, grad_out)
    )


@pytest.mark.parametrize("name", ["resnet18", "seresnet50"])
@pytest.mark.parametrize("train", [True, False])
def test_blocks_under_autocast(name, train):
    """timm adds the shortcut in place, in the dtype of the branch."""
    model = small_resnet(name).layer1.train(train)
    x = torch.randn(2, 64, 9, 11)

    def run(module, x):
        torch.manual_seed(3)
        with torch.no_grad():
            return module(x)

    exact = run(copy.deepcopy(model).double(), x.double())
    with swap_parity.backend("torch"), torch.autocast("cpu", torch.bfloat16):
        theirs = run(copy.deepcopy(model), x)
        bbfast.swap(model)
        ours = run(model, x)
    assert ours.dtype == torch.bfloat16
    numerics.assert_within_rule("output", ours, exact, theirs)


def test_somebodys_forward_features_runs():
    model = small_resnet()
    model.forward_features = lambda x: x.new_ones(2, 64, 1, 1)
    (row,) = [row for row in bbfast.plan(model).rows if row.path == ""]
    assert row.reason == "it has a forward_features of its own (somebody replaced it on the instance)"
    x = torch.randn(2, 3, *SIZE)
    expected = model(x)
    del model.forward_features
    bbfast.swap(model)
    model.forward_features = lambda x: x.new_ones(2, 64, 1, 1)
    assert torch.equal(model(x), expected)


# ---- what keeps a block as it is ---------------------------------------------------------------------------


def test_group_norm_is_reported():
    report = bbfast.plan(timm.create_model("resnet50_gn", num_classes=7, layers=(1, 1, 1, 1)))
    assert not report.swapped
    assert len(report.skipped) == 5
    for row in report.skipped:
        assert "bn1 is a timm.layers.norm.GroupNorm, which no fused op knows" in row.reason


@pytest.mark.parametrize(
    "block, inner",
    [
        (Bottleneck(16, 4, drop_block=nn.Identity), "drop_block"),
        (Bottleneck(16, 4), "act3"),
        (BasicBlock(16, 16, attn_layer="se"), "se"),
        (RegNetBottleneck(16, 16, group_size=8), "conv3"),
        (RegNetBottleneck(16, 16, group_size=8), "conv3.bn"),
        (RegNetBottleneck(16, 16, group_size=8), "se.fc1"),
        (PreBottleneck(16, 16, group_size=8, se_ratio=0), "norm3"),
        (PreBottleneck(16, 16, group_size=8, se_ratio=0), "se"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_hooks_keep_a_block_as_it_is(block, inner):
    block.get_submodule(inner).register_forward_hook(lambda *_: None)
    assert bbfast.plan(block).rows[0].reason == f"{inner} has forward hooks, which the fused op would not run"


@pytest.mark.parametrize(
    "block, inner",
    [
        (Bottleneck(16, 4), "aa"),
        (RegNetBottleneck(16, 16, group_size=8), "conv1"),
        (RegNetBottleneck(16, 16, group_size=8), "downsample"),
        (PreBottleneck(16, 16, group_size=8), "norm3"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_hooks_on_what_runs_itself_fire(block, inner):
    calls = []
    block.get_submodule(inner).register_forward_hook(lambda *_: calls.append(inner))
    bbfast.swap(block)
    assert _fast.is_fast(type(block))
    block(torch.randn(2, 16, 5, 5))
    assert calls == [inner]


def test_norm_without_activation_is_no_block():
    assert not bbfast.plan(BatchNormAct2d(8, apply_act=False)).rows
    assert len(bbfast.plan(BatchNormAct2d(8)).swapped) == 1
