"""Swapped models under torch.compile: one graph, any batch, nothing compiled twice, fewer kernels."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import swap_models
import swap_parity
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._inductor import async_compile, compile_fx, metrics
from torch._inductor.utils import run_and_get_code

import bbfast
from bbfast import env

small_models = pytest.mark.parametrize("name", swap_models.SMALL)


def default_run(*names: str) -> pytest.MarkDecorator:
    """All small models, those not named marked slow: each takes some seconds to trace."""
    marks = {name: [] if name in names else [pytest.mark.slow] for name in swap_models.SMALL}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in swap_models.SMALL])


mobile_first = default_run("mobile")
two_of_them = default_run("mobile", "swin")
whole_models = pytest.mark.parametrize("name", swap_models.WHOLE)


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    torch._dynamo.reset()
    # Under the interpreter nothing is left to Inductor, which would change the graphs.
    monkeypatch.setattr(env, "TRITON_INTERPRET", False)
    # Graphs are traced the same for every backend, and the interpreter of Triton's kernels would take minutes.
    with swap_parity.backend("torch"):
        yield


def explain(model: nn.Module, x: torch.Tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._dynamo.explain(model)(x)


def training_step(call, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = call(x).square().sum()
    loss.backward()
    return {"loss": loss.detach(), **{key: p.grad.clone() for key, p in model.named_parameters()}, **model.state_dict()}


@mobile_first
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_graph(name, training):
    model = swap_models.small(name).train(training)
    explanation = explain(model, swap_models.images())
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0
    if name == "mobile":
        targets = {str(node.target) for graph in explanation.graphs for node in all_nodes(graph)}
        assert any("bbfast" in target for target in targets), targets


def all_nodes(graph: torch.fx.GraphModule):
    """Those of the graphs inside, too, which autograd functions become."""
    return [
        node for module in graph.modules() if isinstance(module, torch.fx.GraphModule) for node in module.graph.nodes
    ]


@two_of_them
def test_any_batch_with_one_compilation(name):
    """And no more when it is called again: what a block asks in each call becomes a guard that holds."""
    model, counter = swap_models.small(name), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 2):
            torch.testing.assert_close(compiled(x := swap_models.images(batch)), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@mobile_first
def test_training_and_evaluation_each_compile_once(name):
    model, counter = swap_models.small(name), CompileCounter()
    compiled, x = torch.compile(model, fullgraph=True, backend=counter), swap_models.images()
    for _ in range(2):
        model.train()
        compiled(x).sum().backward()
        model.eval()
        compiled(x)
    assert counter.frame_count == 2


@mobile_first
def test_compiled_training_step_has_the_eager_numbers(name):
    """Through AOTAutograd, with gradients of all parameters and the running statistics, in double precision."""
    eager = swap_models.small(name).double().train()
    traced, x = copy.deepcopy(eager), swap_models.images().double()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    theirs, ours = training_step(eager, eager, x), training_step(compiled, traced, x)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_a_hook_on_a_bypassed_layer_compiles_anew_and_fires():
    """The check that a block makes in each call is part of the graph's guards."""
    model, calls = swap_models.small("mobile"), []
    counter = CompileCounter()
    compiled, x = torch.compile(model, backend=counter), swap_models.images()
    with torch.no_grad():
        before = compiled(x)
        compiled(x)
        assert counter.frame_count == 1
        model[2].conv_dw.register_forward_hook(lambda *args: calls.append(1))
        after = compiled(x)
    assert calls
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_swap_and_restore_reach_a_compiled_model():
    """Dynamo guards on the classes of the blocks."""
    model, seen = swap_models.small("mobile", swapped=False), []

    def backend(graph, inputs):
        seen.append(any("bbfast" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled, x = torch.compile(model, fullgraph=True, backend=backend), swap_models.images()
    with torch.no_grad():
        plain = compiled(x)
        with bbfast.swapped(model):
            fused = compiled(x)
        torch.testing.assert_close(compiled(x), plain)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    assert seen == [False, True]


@pytest.mark.slow
def test_inductor_on_the_cpu():
    """Generated, compiled and run."""
    model = swap_models.small("mobile")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3):
            torch.testing.assert_close(compiled(x := swap_models.images(batch)), model(x), rtol=1e-4, atol=1e-5)


def launches_and_bytes(model: nn.Module, x: torch.Tensor, monkeypatch) -> tuple[int, int]:
    """How many kernels a call of the compiled model launches, and the bytes that they move.

    A kernel is one of Inductor's (it is not compiled here), a convolution, a matrix product, or an op of ours.
    """
    torch._dynamo.reset()
    metrics.reset()
    monkeypatch.setattr(async_compile.AsyncCompile, "cpp_pybinding", lambda self, *args, **kwargs: lambda *args: None)
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "isEnabledFor", lambda level: True)  # counts bytes if so
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        _, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    calls = re.findall(r"^ +(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", code, re.MULTILINE)
    assert calls and metrics.num_bytes_accessed > 0
    return len(calls), metrics.num_bytes_accessed


@pytest.mark.thorough
def test_fewer_launches_and_bytes(monkeypatch):
    """The blocks' ops take their BatchNorms, activations and additions along."""
    x = swap_models.images()
    plain = launches_and_bytes(swap_models.small("mobile", swapped=False), x, monkeypatch)
    fused = launches_and_bytes(swap_models.small("mobile"), x, monkeypatch)
    print(f"(launches, bytes) of plain {plain}, of swapped {fused}")
    assert fused[0] < plain[0]
    assert fused[1] < plain[1]


# ---- whole models ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@whole_models
def test_whole_model_is_one_graph_for_any_batch(name):
    model, counter = swap_models.whole(name), CompileCounter()
    x = swap_models.images()
    assert explain(model, x).graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            compiled(swap_models.images(batch))
    assert counter.frame_count == 1


@pytest.mark.slow
@whole_models
def test_whole_model_in_inductor(name):
    model = swap_models.whole(name)
    compiled, x = torch.compile(model, fullgraph=True, dynamic=True), swap_models.images(3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@small_models
def test_cuda_graph(name):
    """Captured once, replayed on new images."""
    model = swap_models.small(name).cuda()
    static, x = swap_models.images().cuda(), swap_models.images().cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(static)
        static.copy_(x)
        graph.replay()
        torch.testing.assert_close(output, model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_compilation(mode):
    model = swap_models.small("mobile").cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            x = swap_models.images().cuda()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
