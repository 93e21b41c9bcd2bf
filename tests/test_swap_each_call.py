"""Whatever somebody changes about any module inside a swapped block counts in the next call, and so does undoing it."""

from __future__ import annotations

import copy
import types
from functools import partial

import pytest
import swap_parity
import torch
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models.convnext import ConvNeXtBlock
from timm.models.regnet import Bottleneck
from timm.models.resnet import BasicBlock, downsample_conv
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import efficientnet, resnet, swin_transformer
from torchvision.models.convnext import CNBlock

import bbfast
from bbfast import ops
from bbfast.swap import _fast

pytestmark = pytest.mark.usefixtures("reference_backend", "one_thread")


def timm_mobile() -> nn.Module:
    return InvertedResidual(8, 8, exp_ratio=2, se_layer=SqueezeExcite)


def timm_resnet() -> nn.Module:
    return BasicBlock(8, 16, stride=2, downsample=downsample_conv(8, 16, 1, stride=2))


def timm_regnet() -> nn.Module:
    return Bottleneck(8, 16, stride=2, group_size=8)


def torchvision_mobile() -> nn.Module:
    config = efficientnet.MBConvConfig(4, 3, 1, 8, 8, 1)
    return efficientnet.MBConv(config, 0.2, nn.BatchNorm2d)


def torchvision_resnet() -> nn.Module:
    return resnet.BasicBlock(8, 8)


def timm_convnext() -> nn.Module:
    return ConvNeXtBlock(8, ls_init_value=1.0)


def timm_swin() -> nn.Module:
    return SwinTransformerBlock(10, (8, 12), num_heads=2, window_size=4, shift_size=2)


def torchvision_convnext() -> nn.Module:
    return CNBlock(8, 1.0, 0.0)


def torchvision_swin() -> nn.Module:
    return swin_transformer.SwinTransformerBlock(10, 2, [4, 4], [2, 2])


BLOCKS = (timm_mobile, timm_resnet, timm_regnet, torchvision_mobile, torchvision_resnet, partial(BatchNormAct2d, 8))
NAMES = ("mobile", "resnet", "regnet", "tv mobile", "tv resnet", "norm")
blocks = pytest.mark.parametrize("make", BLOCKS, ids=NAMES)
# Their perceptrons are ops, or run themselves where somebody wants something of them.
PERCEPTRONS = (timm_convnext, timm_swin, torchvision_convnext, torchvision_swin)
blocks_of_all_kinds = pytest.mark.parametrize(
    "make", [*BLOCKS, *PERCEPTRONS], ids=[*NAMES, *(make.__name__ for make in PERCEPTRONS)]
)


def swapped(make) -> nn.Module:
    block = swap_parity.randomise(make()).eval()
    bbfast.swap(block)
    assert _fast.is_fast(type(block))
    run(block)
    return block


def run(block: nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return block(torch.randn(2, 8, 12, 10))


def run_plainly(block: nn.Module) -> torch.Tensor:
    """What the foreign forward makes of a copy."""
    plain = copy.deepcopy(block)
    bbfast.restore(plain)
    return run(plain)


def called(block: nn.Module) -> list[str]:
    """Paths of the modules that the foreign block calls."""
    found, plain = [], swap_parity.randomise(block).eval()
    handles = [
        module.register_forward_hook(lambda *_, path=path: found.append(path))
        for path, module in plain.named_modules()
        if path
    ]
    run(plain)
    for handle in handles:
        handle.remove()
    return sorted(set(found))


@blocks_of_all_kinds
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_hooks_on_any_inner_module(make, kind):
    block, paths = swapped(make), called(make())
    assert paths
    for path in paths:
        seen = []
        handle = getattr(block.get_submodule(path), f"register_{kind}")(lambda *_, seen=seen: seen.append(1))
        run(block)
        assert seen, path
        handle.remove()
        seen.clear()
        run(block)
        assert not seen, path


@blocks_of_all_kinds
def test_a_forward_on_any_inner_module(make):
    block = swapped(make)
    for path in called(make()):
        seen, module = [], block.get_submodule(path)

        def forward(self, *args, seen=seen, **named):
            seen.append(1)
            return type(self).forward(self, *args, **named)

        module.forward = types.MethodType(forward, module)
        run(block)
        assert seen, path
        del module.forward


class Doubled(nn.Module):
    """A parametrization that counts how often it is computed."""

    calls = 0

    def forward(self, weight):
        self.calls += 1
        return 2 * weight


@pytest.mark.parametrize("make", [*BLOCKS[:-1], *PERCEPTRONS], ids=lambda make: make.__name__)
def test_a_parametrization_of_any_weight(make):
    block = swapped(make)
    paths = [path for path in called(make()) if "weight" in block.get_submodule(path)._parameters]
    assert paths
    before = run(block)
    for path in paths:
        module, doubled = block.get_submodule(path), Doubled()
        parametrize.register_parametrization(module, "weight", doubled)
        calls = doubled.calls
        changed = run(block)
        assert doubled.calls > calls, path
        torch.testing.assert_close(changed, run_plainly(block))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        torch.testing.assert_close(run(block), before)


@blocks
def test_tensors_and_settings_are_those_of_the_call(make):
    """Values in place, new tensors, tensors in other places, and the mode of one BatchNorm."""
    block = swapped(make)
    (norm, *_) = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]

    def in_place():
        norm.running_mean.add_(1)

    def new_tensors():
        norm.weight = nn.Parameter(2 * norm.weight.detach())
        norm.running_var = 2 * norm.running_var

    def elsewhere():
        weight = norm.weight.detach()
        del norm.weight
        norm.weight = 3 * weight

    def mode():
        norm.train()

    for change in (in_place, new_tensors, elsewhere, mode):
        before = run(block)
        change()
        expected, found = run_plainly(block), run(block)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, before), change.__name__


@pytest.mark.parametrize("make", PERCEPTRONS, ids=lambda make: make.__name__)
def test_a_layer_in_the_place_of_another(make):
    """As adapters and quantisation put them there: they are called."""
    block = swapped(make)
    layers = [path for path, module in block.named_modules() if type(module) is nn.Linear and module.out_features > 30]
    assert layers
    for path in layers:
        layer, seen = block.get_submodule(path), []
        wrapped = nn.Sequential(layer)
        wrapped.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        block.set_submodule(path, wrapped)
        torch.testing.assert_close(run(block), run_plainly(block))
        assert len(seen) == 2, path


@pytest.mark.parametrize("make", PERCEPTRONS, ids=lambda make: make.__name__)
def test_the_perceptron_is_two_ops(make, monkeypatch):
    calls, linear_act = [], ops.linear_act
    monkeypatch.setattr(ops, "linear_act", lambda *args, **named: calls.append(named) or linear_act(*args, **named))
    swapped(make)
    *_, first, second = calls  # after those of the attention
    assert first["act"] == "gelu" and first["residual"] is None and second["residual"] is not None
    assert sum(named["act"] == "gelu" for named in calls) == 1


def test_a_hook_in_the_innermost_module_compiles_anew():
    """An activation inside a norm, which the block finds only by asking the norm."""
    block, seen = swapped(timm_mobile), []
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager")
    run(compiled)
    block.bn1.act.register_forward_hook(lambda *_: seen.append(1))
    run(compiled)
    assert seen


@pytest.mark.parametrize("as_method", [False, True], ids=["function", "method"])
def test_a_forward_of_an_inner_module_compiles_anew(as_method):
    block = swapped(timm_mobile)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    before = run(compiled)
    method = types.MethodType(lambda self, x: torch.full_like(x, 0.5), block.bn1)
    block.bn1.forward = method if as_method else lambda x: torch.full_like(x, 0.5)
    found = run(compiled)
    torch.testing.assert_close(found, run_plainly(block))
    assert not torch.allclose(found, before)
