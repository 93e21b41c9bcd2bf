"""Swapped blocks with few channels, whose norm, perceptron and sum are one kernel in inference on a GPU."""

from __future__ import annotations

import pytest
import timm.models.convnext as timm_convnext
import timm.models.swin_transformer as timm_swin
import torch
import torchvision.models.convnext as vision_convnext
import torchvision.models.swin_transformer as vision_swin
from torch import nn

import bbfast
from bbfast import dispatch
from bbfast.triton_kernels import mlp as kernels

BLOCKS = {
    "timm swin": lambda: timm_swin.SwinTransformerBlock(
        16, (8, 8), num_heads=2, window_size=4, shift_size=2, drop_path=0.5
    ),
    "timm convnext": lambda: timm_convnext.ConvNeXtBlock(16, drop_path=0.5, ls_init_value=0.5),
    "torchvision swin": lambda: vision_swin.SwinTransformerBlock(
        16, 2, window_size=[4, 4], shift_size=[2, 2], stochastic_depth_prob=0.5
    ),
    "torchvision convnext": lambda: vision_convnext.CNBlock(16, 0.5, 0.5),
}
NORMS = {"timm swin": "norm2", "timm convnext": "norm", "torchvision swin": "norm2", "torchvision convnext": "block.2"}


@pytest.fixture
def launches(monkeypatch, device):
    """The arguments of each launch; skips where there can be none."""
    missing = dispatch.triton_unavailable_reasons(torch.zeros(1, device=device))
    if missing:
        pytest.skip("; ".join(missing))
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    calls, launch = [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: calls.append(args) or launch(*args))
    return calls


def block_and_input(kind, device):
    """In half precision, and what the block as it was makes of the input in double."""
    block = BLOCKS[kind]().half().eval().to(device)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 8, 8, 16).half().to(device)
    x = x.permute(0, 3, 1, 2) if "convnext" in kind else x
    return block, x


def expect(y, block, x):
    """`block` is not swapped; it comes back as it was."""
    with torch.no_grad():
        expected = block.double()(x.double())
    block.half()
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("kind", BLOCKS)
def test_inference_ends_in_one_kernel(kind, launches, device):
    block, x = block_and_input(kind, device)
    with bbfast.swapped(block), torch.no_grad():
        y = block(x)
    ((*_, norm_eps, act, _),) = launches
    # timm's ConvNeXt has a norm of a class of its own, which is called.
    assert act == "gelu" and (norm_eps is None) == (kind == "timm convnext")
    expect(y, block, x)


@pytest.mark.parametrize("kind", BLOCKS)
def test_hooks_on_the_norm_count(kind, launches, device):
    """Hung on after the swap, so that no plan knows of them."""
    block, x = block_and_input(kind, device)
    bbfast.swap(block)
    block.get_submodule(NORMS[kind]).register_forward_hook(lambda module, args, y: -2 * y)
    with torch.no_grad():
        y = block(x)
    bbfast.restore(block)
    expect(y, block, x)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("layer", ["fc1", "act", "fc2"])
def test_hooks_in_the_perceptron_count(kind, layer, launches, device):
    block, x = block_and_input(kind, device)
    path = {"fc1": {"torchvision swin": "mlp.0", "torchvision convnext": "block.3"}, "act": {}, "fc2": {}}
    path["act"] = {"torchvision swin": "mlp.1", "torchvision convnext": "block.4"}
    path["fc2"] = {"torchvision swin": "mlp.3", "torchvision convnext": "block.5"}
    bbfast.swap(block)
    hooked = block.get_submodule(path[layer].get(kind, f"mlp.{layer}"))
    hooked.register_forward_hook(lambda module, args, y: -2 * y)
    with torch.no_grad():
        y = block(x)
    assert not launches
    bbfast.restore(block)
    expect(y, block, x)


@pytest.mark.parametrize("kind", BLOCKS)
def test_gradients_and_dropped_samples_take_other_ways(kind, launches, device):
    block, x = block_and_input(kind, device)
    with bbfast.swapped(block):
        block(x).float().sum().backward()
        assert not launches
        with torch.no_grad():
            block.train()(x)
    assert all(arguments[8] is None for arguments in launches)  # no residual: the sum comes after what is dropped


def test_a_projection_that_drops_is_called(launches, device):
    """Neither its dropout, in training, nor a hook on it may get lost in the attention's sum."""
    block, x = block_and_input("timm swin", device)
    block.drop_path1 = block.drop_path2 = nn.Identity()
    bbfast.swap(block)
    with torch.no_grad():
        before = block(x)
        block.attn.proj_drop.p = 1.0
        block.attn.proj_drop.train()
        without_attention = block(x)
        bbfast.restore(block)
        torch.testing.assert_close(without_attention, block(x), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(without_attention, before, atol=0.05)
