"""`add_layer_norm` against eager torch and torch.compile: forward, and forward with backward of both outputs.

    pytest benchmarks/bench_add_layer_norm.py --benchmark-only

Swin-T's four stages at batch 128 in bfloat16 on a GPU; the second stage at batch 8 in float32 on a CPU.
"""

import pytest
import torch
import torch.nn.functional as F

from bbfast import dispatch
from bbfast.ops import add_layer_norm

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
STAGES = [(128, 56, 96), (128, 28, 192), (128, 14, 384), (128, 7, 768)] if ON_GPU else [(8, 28, 192)]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def _eager(residual, branch, weight, bias, mask):
    total = residual + (branch if mask is None else branch * mask.view(-1, 1, 1, 1))
    return total, F.layer_norm(total, total.shape[-1:], weight, bias)


def _ours(residual, branch, weight, bias, mask):
    return add_layer_norm(residual, branch, weight, bias, mask=mask)


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


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: "x".join(map(str, stage)))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("drop", [False, True], ids=["no drop", "drop 1/4"])
@pytest.mark.parametrize("provider", ["eager", "compile", "reference", "kernels"])
def test_add_layer_norm(benchmark, provider, drop, backward, stage, monkeypatch):
    function = _provider(provider, monkeypatch)
    batch, size, channels = stage
    shape = (batch, size, size, channels)
    residual, branch, grad_total, grad_norm = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(4))
    weight, bias = (torch.randn(channels, device=DEVICE, dtype=DTYPE) for _ in range(2))
    mask = None
    if drop:
        mask = torch.ones(batch, device=DEVICE, dtype=DTYPE)
        mask[::4] = 0
    leaves = [tensor.requires_grad_(backward) for tensor in (residual, branch, weight, bias)]

    def run():
        outputs = function(residual, branch, weight, bias, mask)
        if backward:
            torch.autograd.grad(outputs, leaves, (grad_total, grad_norm))
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"add_layer_norm {shape} {DTYPE}"
    benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=3)
