"""Elementwise ops in compiled inference: written out for Inductor where that is better, with equal values."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from bbfast import env, ops

VECTORS = [torch.rand(6).double() + 0.5 for _ in range(4)]
MAPS = [torch.randn(3, 6, 5, 4).double() for _ in range(2)]
MASK = torch.tensor([1.25, 0, 1.25]).double()


def batch_norm_act(x, residual):
    return ops.batch_norm_act(x, *VECTORS, residual=residual, act="hardswish")


def drop_path_add(x, residual):
    return ops.drop_path_add(residual, x, layer_scale=VECTORS[0], mask=MASK)


def add_layer_norm(x, residual):
    x, residual = x.permute(0, 2, 3, 1), residual.permute(0, 2, 3, 1)
    return torch.cat(ops.add_layer_norm(residual, x, *VECTORS[:2], mask=MASK))


every_op = pytest.mark.parametrize("op", [batch_norm_act, drop_path_add, add_layer_norm], ids=lambda op: op.__name__)


def compiled_ops(op, *inputs):
    """What `op` gives when compiled, and the names of the operators in the graph."""
    names = set()

    def note(graph, example_inputs):
        names.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    return compiled(*inputs), names


@every_op
@pytest.mark.parametrize("channels_last", [False, True])
def test_inference_is_written_out(op, channels_last, monkeypatch):
    monkeypatch.setattr(env, "TRITON_INTERPRET", False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, residual = (t.contiguous(memory_format=layout) for t in MAPS)
    expected = op(x, residual)
    found, names = compiled_ops(op, x, residual)
    assert names and not any(name.startswith("bbfast") for name in names)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("op", [drop_path_add, add_layer_norm], ids=lambda op: op.__name__)
def test_a_dropped_sample_is_not_read(op, monkeypatch):
    monkeypatch.setattr(env, "TRITON_INTERPRET", False)
    x, residual = (t.clone() for t in MAPS)
    x[1] = torch.nan
    found, _ = compiled_ops(op, x, residual)
    assert found.isfinite().all()
    torch.testing.assert_close(found, op(x, residual), rtol=1e-12, atol=1e-12)


@every_op
def test_gradients_on_a_cpu_are_written_out(op, monkeypatch):
    monkeypatch.setattr(env, "TRITON_INTERPRET", False)
    expected, found = [[t.clone().requires_grad_() for t in MAPS] for _ in range(2)]
    op(*expected).square().sum().backward()
    y, names = compiled_ops(op, *found)
    y.square().sum().backward()
    assert names and not any(name.startswith("bbfast") for name in names)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@every_op
@pytest.mark.parametrize("gradients", [False, True])
def test_with_kernels_the_op_stays(op, gradients, monkeypatch):
    monkeypatch.setattr(env, "TRITON_INTERPRET", True)
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    x, residual = (t.clone().requires_grad_(gradients) for t in MAPS)
    _, names = compiled_ops(op, x, residual)
    assert any(name.startswith("bbfast") for name in names)
