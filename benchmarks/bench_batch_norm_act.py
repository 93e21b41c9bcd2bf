"""`batch_norm_act` against eager torch and torch.compile: forward, and forward with backward.

    pytest benchmarks/bench_batch_norm_act.py --benchmark-only

ResNet-50's second stage at batch 128 in bfloat16, with residual and relu, on a GPU; a small float32 map on a CPU.
"""

import pytest
import torch
import torch.nn.functional as F

from bbfast import dispatch
from bbfast.ops import batch_norm_act

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPE = (128, 512, 28, 28) if ON_GPU else (8, 64, 28, 28)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def _eager(x, weight, bias, mean, var, residual, training):
    return F.relu(F.batch_norm(x, mean, var, weight, bias, training) + residual)


def _ours(x, weight, bias, mean, var, residual, training):
    return batch_norm_act(x, weight, bias, mean, var, residual=residual, training=training)


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
@pytest.mark.parametrize("mode", ["eval", "train", "train with backward"])
@pytest.mark.parametrize("provider", ["eager", "compile", "reference", "kernels"])
def test_batch_norm_act(benchmark, provider, mode, memory_format, monkeypatch):
    function = _provider(provider, monkeypatch)
    x, residual, grad_y = (
        torch.randn(SHAPE, device=DEVICE, dtype=DTYPE).contiguous(memory_format=memory_format) for _ in range(3)
    )
    weight, bias = (torch.rand(SHAPE[1], device=DEVICE) for _ in range(2))
    statistics = torch.zeros(SHAPE[1], device=DEVICE), torch.ones(SHAPE[1], device=DEVICE)
    backward = mode == "train with backward"
    leaves = [tensor.requires_grad_(backward) for tensor in (x, weight, bias, residual)]

    def run():
        y = function(x, weight, bias, *statistics, residual, mode != "eval")
        if backward:
            torch.autograd.grad(y, leaves, grad_y)
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"batch_norm_act {mode} {tuple(SHAPE)} {DTYPE}"
    benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=3)
