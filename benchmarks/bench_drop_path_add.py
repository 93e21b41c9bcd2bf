"""`drop_path_add` against eager torch and torch.compile: forward, and forward with backward.

    pytest benchmarks/bench_drop_path_add.py --benchmark-only

ConvNeXt-T's second stage at batch 128 in bfloat16, with layer scale, on a GPU; a small float32 map on a CPU.
"""

import pytest
import torch

from bbfast import dispatch
from bbfast.ops import drop_path_add

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPE = (128, 192, 28, 28) if ON_GPU else (8, 64, 28, 28)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def _eager(residual, branch, layer_scale, mask):
    if layer_scale is not None:
        branch = branch * layer_scale.view(-1, 1, 1)
    return residual + branch * mask.view(-1, 1, 1, 1)


def _ours(residual, branch, layer_scale, mask):
    return drop_path_add(residual, branch, layer_scale=layer_scale, mask=mask)


def _provider(name, monkeypatch):
    """The function to time; skips where the machine cannot run it."""
    if name == "kernels":
        reasons = dispatch.triton_unavailable_reasons(torch.empty(0, device=DEVICE))
        if reasons or not ON_GPU:
            pytest.skip("kernels are timed on a GPU only: " + "; ".join(reasons))
        monkeypatch.setenv("BBFAST_STRICT", "1")
        return _ours
    if name == "reference":
        monkeypatch.setenv("BBFAST_BACKEND", "torch")
        return _ours
    return torch.compile(_eager) if name == "compile" else _eager


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("scaled", [False, True], ids=["no scale", "layer scale"])
@pytest.mark.parametrize("provider", ["eager", "compile", "reference", "kernels"])
def test_drop_path_add(benchmark, provider, scaled, backward, memory_format, monkeypatch):
    function = _provider(provider, monkeypatch)
    residual, branch, grad_y = (
        torch.randn(SHAPE, device=DEVICE, dtype=DTYPE).contiguous(memory_format=memory_format) for _ in range(3)
    )
    layer_scale = torch.rand(SHAPE[1], device=DEVICE, dtype=DTYPE) if scaled else None
    mask = torch.ones(SHAPE[0], device=DEVICE, dtype=DTYPE)
    mask[::4] = 0
    leaves = [tensor.requires_grad_(backward) for tensor in (residual, branch, layer_scale) if tensor is not None]

    def run():
        y = function(residual, branch, layer_scale, mask)
        if backward:
            torch.autograd.grad(y, leaves, grad_y)
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"drop_path_add {tuple(SHAPE)} {DTYPE}"
    benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=3)
