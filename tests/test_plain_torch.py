"""Ops are plain torch where others look inside: under `exportable`, torch.func and in forward-mode differentiation."""

from __future__ import annotations

import threading
import timeit

import pytest
import swap_parity
import torch
from torch import func, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import bbfast
from bbfast import dispatch, ops


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def statistics(channels: int) -> tuple[torch.Tensor, ...]:
    """BatchNorm's weight, bias, running_mean and running_var."""
    return double(channels), double(channels), double(channels), double(channels).square() + 0.5


def _conv(training: bool, act: str = "silu"):
    x, weight, residual = double(2, 4, 5, 6), double(6, 2, 3, 3), double(2, 6, 3, 3)
    *affine, mean, var = statistics(6)

    def call(x, weight, bn_weight, bn_bias, residual):
        return ops.conv_bn_act(
            x,
            weight,
            bn_weight,
            bn_bias,
            mean.clone(),
            var.clone(),
            stride=2,
            padding=1,
            groups=2,
            training=training,
            act=act,
            residual=residual,
        )

    return call, (x, weight, *affine, residual)


def _gated_conv():
    x, weight, residual, gate = double(2, 4, 5, 6), double(6, 4, 1, 1), double(2, 6, 5, 6), double(2, 4)
    *affine, mean, var = statistics(6)

    def call(x, weight, bn_weight, bn_bias, residual, gate):
        return ops.conv_bn_act(x, weight, bn_weight, bn_bias, mean, var, act="silu", residual=residual, gate=gate)

    return call, (x, weight, *affine, residual, gate)


def _depthwise(training: bool):
    *affine, mean, var = statistics(4)

    def call(x, weight, bn_weight, bn_bias):
        return ops.depthwise_conv_bn_act(
            x,
            weight,
            bn_weight,
            bn_bias,
            mean.clone(),
            var.clone(),
            padding="same",
            stride=2,
            training=training,
            act="gelu",
            squeeze=True,
        )

    return call, (double(2, 4, 5, 6), double(4, 1, 3, 3), *affine)


def _batch_norm(training: bool):
    *affine, mean, var = statistics(4)

    def call(x, weight, bias, residual):
        return ops.batch_norm_act(
            x, weight, bias, mean.clone(), var.clone(), residual=residual, training=training, act="silu"
        )

    return call, (double(3, 4, 5), *affine, double(3, 4, 5))


def _drop_path_add():
    mask = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)

    def call(residual, branch, layer_scale):
        return ops.drop_path_add(residual, branch, layer_scale=layer_scale, channel_dim=-1, mask=mask)

    return call, (double(3, 4, 5), double(3, 4, 5), double(5))


def _add_layer_norm(has_branch: bool):
    def call(residual, weight, bias, *branch):
        branch, layer_scale = branch or (None, None)
        mask = None if branch is None else torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)
        return ops.add_layer_norm(residual, branch, weight, bias, layer_scale=layer_scale, mask=mask)

    return call, (double(3, 4, 5), double(5), double(5), *((double(3, 4, 5), double(5)) if has_branch else ()))


def _linear_act():
    def call(x, weight, bias, layer_scale, residual):
        return ops.linear_act(x, weight, bias, act="silu", layer_scale=layer_scale, residual=residual)

    return call, (double(3, 4, 5), double(6, 5), double(6), double(6), double(3, 4, 6))


def _mlp():
    def call(x, fc1_weight, fc1_bias, fc2_weight, norm_weight, residual):
        layers = (fc1_weight, fc1_bias, fc2_weight, None)
        return ops.mlp(x, *layers, act="silu", norm_weight=norm_weight, norm_eps=1e-5, residual=residual)

    return call, (double(3, 4, 5), double(6, 5), double(6), double(5, 6), double(5), double(3, 4, 5))


def _window_attention(pad_order: str):
    def call(qkv, table, qkv_bias):
        return ops.window_attention(
            qkv, table, num_heads=2, window_size=(3, 2), shift_size=(1, 1), qkv_bias=qkv_bias, pad_order=pad_order
        )

    return call, (double(2, 4, 5, 12), double(15, 2), double(12))


CASES = {
    "conv_bn_act": lambda: _conv(False),
    "conv_bn_act in training": lambda: _conv(True),
    "conv_bn_act, gated": _gated_conv,
    "depthwise_conv_bn_act": lambda: _depthwise(False),
    "depthwise_conv_bn_act in training": lambda: _depthwise(True),
    "batch_norm_act": lambda: _batch_norm(False),
    "batch_norm_act in training": lambda: _batch_norm(True),
    "drop_path_add": _drop_path_add,
    "add_layer_norm": lambda: _add_layer_norm(True),
    "layer_norm": lambda: _add_layer_norm(False),
    "linear_act": _linear_act,
    "mlp": _mlp,
    "window_attention": lambda: _window_attention("shift_then_pad"),
    "window_attention, padded first": lambda: _window_attention("pad_then_shift"),
    "window_partition": lambda: (lambda x: ops.window_partition(x, (2, 3), 1), (double(2, 4, 5, 3),)),
    "window_reverse": lambda: (
        lambda windows: ops.window_reverse(windows, (2, 3), (4, 5), 1, pad_order="pad_then_shift"),
        (double(8, 6, 3),),
    ),
}
case = pytest.mark.parametrize("build", CASES.values(), ids=CASES)


class _Namespaces(TorchDispatchMode):
    """Collects the namespaces of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.namespace)
        return function(*args, **(kwargs or {}))


def namespaces(call, *args) -> set[str]:
    with _Namespaces() as mode:
        call(*args)
    return mode.seen


def outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


# ---- gradients on a CPU ----------------------------------------------------------------------------------------

LEFT_TO_AUTOGRAD = {
    "depthwise_conv_bn_act": lambda: _depthwise(True),
    "batch_norm_act": lambda: _batch_norm(True),
    "batch_norm_act with running statistics": lambda: _batch_norm(False),
    "drop_path_add": _drop_path_add,
    "add_layer_norm": lambda: _add_layer_norm(True),
}


@pytest.mark.parametrize("name", LEFT_TO_AUTOGRAD)
def test_gradients_on_a_cpu_are_left_to_autograd(name, monkeypatch):
    """Same values as the op's own backward has, without its computing again what autograd can keep."""
    call, tensors = LEFT_TO_AUTOGRAD[name]()
    op = name.split()[0]

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        result = outputs(call(*leaves))
        return result, torch.autograd.grad(total(result), leaves)

    monkeypatch.setattr(bbfast.env, "TRITON_INTERPRET", True)
    with swap_parity.backend("torch"):
        expected = run()
    monkeypatch.setattr(bbfast.env, "TRITON_INTERPRET", False)
    with swap_parity.backend("torch"):
        run()
        assert dispatch.last_choices()[op] == dispatch.Choice("torch", ("BBFAST_BACKEND=torch",))
    assert namespaces(call, *[tensor.clone().requires_grad_() for tensor in tensors]) == {"aten"}
    assert dispatch.last_choices()[op] == dispatch.Choice("torch", (f"triton: {dispatch.TRITON_ON_CPU}",))
    found = run()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(found[0], expected[0]):
        assert ours.stride() == theirs.stride()

    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setenv("BBFAST_STRICT", "1")
    with pytest.raises(dispatch.BackendUnavailableError, match="triton: x is on the CPU"):
        run()


# ---- each op ---------------------------------------------------------------------------------------------------


@case
def test_exportable_gives_the_same_in_operators_of_torch(build):
    call, tensors = build()
    fused = outputs(call(*tensors))
    # Off its kernel this one is torch's operators anyway.
    assert "bbfast" in namespaces(call, *tensors) or build is _linear_act
    with bbfast.exportable():
        assert namespaces(call, *tensors) == {"aten"}
        plain = outputs(call(*tensors))
    for ours, theirs in zip(plain, fused, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@case
def test_exportable_can_be_differentiated_twice(build):
    call, tensors = build()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with bbfast.exportable():
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@case
def test_forward_mode(build):
    call, tensors = build()
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    _, tangent = func.jvp(call, tensors, tuple(tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, direction) for tensor, direction in zip(tensors, tangents)]
        by_hand = [forward_ad.unpack_dual(output).tangent for output in outputs(call(*duals))]
    step = 1e-6
    ahead, behind = (
        outputs(call(*[tensor + sign * step * direction for tensor, direction in zip(tensors, tangents)]))
        for sign in (1, -1)
    )
    for ours, same, plus, minus in zip(outputs(tangent), by_hand, ahead, behind, strict=True):
        torch.testing.assert_close(ours, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(same, ours)


@case
def test_gradients_of_torch_func(build):
    call, tensors = build()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    ours = func.grad(lambda *args: total(call(*args)), argnums=tuple(range(len(tensors))))(*tensors)
    theirs = torch.autograd.grad(total(call(*leaves)), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def total(result) -> torch.Tensor:
    return sum(output.square().sum() for output in outputs(result))


@pytest.mark.parametrize("build", [build for name, build in CASES.items() if "training" not in name])
def test_vmap_over_the_first_tensor(build):
    call, (x, *rest) = build()
    stacked = torch.stack([x, torch.randn_like(x), torch.randn_like(x)])
    together = outputs(func.vmap(lambda x: call(x, *rest))(stacked))
    one_by_one = zip(*[outputs(call(x, *rest)) for x in stacked])
    for ours, theirs in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["conv_bn_act", "depthwise_conv_bn_act", "batch_norm_act"])
@pytest.mark.parametrize("batch", [0, 3])
def test_running_statistics_move_as_they_do_in_the_kernels(name, batch):
    x, weight = torch.randn(batch, 4, 5, 5), {"conv_bn_act": torch.randn(4, 4, 1, 1)}.get(name, torch.randn(4, 1, 3, 3))
    tensors = (x,) if name == "batch_norm_act" else (x, weight)

    def moved():
        mean, var = torch.ones(4), torch.full((4,), 2.0)
        y = getattr(ops, name)(*tensors, None, None, mean, var, training=True, momentum=0.3)
        return y, mean, var

    with swap_parity.backend("torch"):
        fused = moved()
    with bbfast.exportable():
        plain = moved()
    torch.testing.assert_close(plain, fused)
    assert (plain[1] == 1).all() == (batch == 0)


@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_others", [torch.contiguous_format, torch.channels_last])
def test_outputs_keep_the_memory_format(of_x, of_others):
    """Where plain torch would let the weight or the residual decide."""
    x, y = torch.randn(2, 4, 5, 6).to(memory_format=of_x), torch.randn(2, 4, 5, 6).to(memory_format=of_others)
    dense, depthwise = (torch.randn(4, c, 3, 3).to(memory_format=of_others) for c in (4, 1))
    mean, var = torch.zeros(4), torch.ones(4)
    with bbfast.exportable():
        for output in (
            ops.conv_bn_act(x, dense, None, None, mean, var, padding=1, residual=y),
            ops.depthwise_conv_bn_act(x, depthwise, None, None, mean, var, padding=1),
            ops.batch_norm_act(x, None, None, mean, var, residual=y),
            ops.drop_path_add(x, y, layer_scale=mean),
        ):
            assert output.is_contiguous(memory_format=of_x)


def test_quick_paths_of_the_cpu_kernels_are_not_taken():
    x = torch.randn(1, 8, 7, 7).to(memory_format=torch.channels_last)
    mean, var = torch.zeros(8), torch.ones(8)

    def call():
        ops.conv_bn_act(x, torch.ones(8, 8, 1, 1), None, None, mean, var)
        ops.depthwise_conv_bn_act(x, torch.ones(8, 1, 3, 3), None, None, mean, var)

    with torch.no_grad(), swap_parity.backend("cpp"):
        call()
        assert dispatch.last_choices()
    dispatch.forget_choices()
    with torch.no_grad(), bbfast.exportable():
        assert "convolution" in " ".join(op for op in aten_names(call))
        assert not dispatch.last_choices()


def aten_names(call) -> set[str]:
    names = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    with Names():
        call()
    return names


def test_arguments_are_checked_all_the_same():
    with bbfast.exportable(), pytest.raises(ValueError, match="act='swish' is not known"):
        ops.batch_norm_act(torch.ones(2, 3), None, None, None, None, act="swish")


def test_exportable_nests_holds_in_threads_and_ends_with_an_exception():
    seen = []
    with bbfast.exportable():
        with pytest.raises(KeyError), bbfast.exportable():
            raise KeyError
        thread = threading.Thread(target=lambda: seen.append(dispatch.wants_plain_torch()))
        thread.start()
        thread.join()
        assert dispatch.wants_plain_torch()
    assert seen == [True]
    assert not dispatch.wants_plain_torch()


def test_the_question_costs_next_to_nothing():
    """0.15 microseconds, asked once or twice in each call; the bound leaves room for a busy machine."""
    seconds = min(timeit.repeat(dispatch.wants_plain_torch, number=20_000, repeat=5)) / 20_000
    assert seconds < 2e-6


# ---- gradients of gradients outside of it ---------------------------------------------------------------------

ONCE = [name for name in CASES if not name.startswith(("window_partition", "window_reverse", "conv_bn_act"))]


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("squared", [False, True])
def test_gradients_of_kernel_gradients_are_refused(name, squared):
    """Wherever there are some in plain torch: for each tensor alone, and from a constant incoming gradient, too."""
    call, tensors = CASES[name]()
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def make_penalty():
        result = sum(y.square().sum() if squared else y.sum() for y in outputs(call(*tensors)))
        return sum(grad.square().sum() for grad in torch.autograd.grad(result, tensors, create_graph=True))

    with bbfast.exportable():
        plain = torch.autograd.grad(make_penalty(), tensors, allow_unused=True)
    penalty = make_penalty()
    for tensor in [tensor for tensor, grad in zip(tensors, plain, strict=True) if grad is not None]:
        with pytest.raises(RuntimeError, match=r"once_differentiable.*with bbfast\.exportable\(\)"):
            torch.autograd.grad(penalty, tensor, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty.backward()


def test_the_gradient_itself_is_right_where_a_graph_of_it_is_asked_for():
    call, tensors = CASES["batch_norm_act in training"]()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    plain = torch.autograd.grad(total(call(*leaves)), leaves)
    recorded = torch.autograd.grad(total(call(*leaves)), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


# ---- torch.func and torch.compile together ---------------------------------------------------------------------


def test_transforms_inside_a_compiled_function():
    call, (x, *rest) = CASES["depthwise_conv_bn_act"]()
    compiled = torch.compile(func.grad(lambda x: total(call(x, *rest))), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), func.grad(lambda x: total(call(x, *rest)))(x))


def test_exportable_inside_and_around_a_compiled_function():
    """The graph follows the switch: it is traced anew, and again found when the switch is back."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    bbfast.swap(layer)
    graphs = []

    def keep(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    compiled, x = torch.compile(layer, fullgraph=True, backend=keep), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            fused = compiled(x)
            with bbfast.exportable():
                plain = compiled(x)
    torch.testing.assert_close(fused, plain)
    assert ["bbfast" in " ".join(graph) for graph in graphs] == [True, False]
