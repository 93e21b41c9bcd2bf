"""`linear_act`: kernel and composition against float64, autograd, compile, the layer and lent modules."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule, check_op, poison_new_empty
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from bbfast import dispatch, exportable
from bbfast.nn import ConvNeXtBlock, LinearAct, SwinBlock, apply_linear_act
from bbfast.ops import _onednn, linear_act
from bbfast.reference.activation import ACTIVATIONS
from bbfast.reference.linear_act import linear_act as reference

HALF = torch.float16


def use_backend(monkeypatch, backend, device):
    """One backend and nothing else, and NaN in what its kernel forgets to write."""
    missing = dispatch.triton_unavailable_reasons(torch.zeros(1, device=device))
    if backend == "triton" and missing:
        pytest.skip("; ".join(missing))
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)
    return HALF if backend == "triton" else torch.float32


def inputs(rows, k, n, dtype, device, *, scaled=True, residual=True, residual_dtype=None):
    """x, weight, bias, layer_scale, residual."""
    x, weight = torch.randn(*rows, k, device=device), torch.randn(n, k, device=device) / k**0.5
    tensors = [x.to(dtype), weight.to(dtype), torch.randn(n, device=device).to(dtype)]
    tensors.append(torch.randn(n, device=device).to(dtype) if scaled else None)
    tensors.append(torch.randn(*rows, n, device=device).to(residual_dtype or dtype) if residual else None)
    return tensors


def call(x, weight, bias, layer_scale, residual, act="gelu"):
    return linear_act(x, weight, bias, act=act, layer_scale=layer_scale, residual=residual)


def expect(y, tensors, act, name="y"):
    exact = reference(*[None if t is None else t.double() for t in tensors], act)
    assert_within_rule(name, y, exact, reference(*tensors, act))


every_backend = pytest.mark.parametrize("backend", ["triton", "torch"])


@every_backend
@pytest.mark.parametrize(
    "rows, k, n", [((130,), 24, 40), ((2, 5, 7), 96, 136), ((3, 4), 8, 8), ((1, 1), 200, 16)], ids=str
)
@pytest.mark.parametrize("scaled, residual", list(itertools.product((False, True), repeat=2)))
def test_forward(backend, rows, k, n, scaled, residual, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    for act in ACTIVATIONS:
        tensors = inputs(rows, k, n, dtype, device, scaled=scaled, residual=residual)
        with torch.no_grad():
            y = call(*tensors, act)
        expect(y, tensors, act, act)
        assert y.is_contiguous()
    assert dispatch.last_choices()["linear_act"].backend == backend


@every_backend
@pytest.mark.parametrize("residual_dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("scale_dtype", [None, torch.float32], ids=str)
def test_dtypes_are_promoted_as_in_torch(backend, residual_dtype, scale_dtype, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    tensors = inputs((3, 9), 16, 24, dtype, device, residual_dtype=residual_dtype)
    tensors[3] = None if scale_dtype is None else tensors[3].to(scale_dtype)
    with torch.no_grad():
        expect(call(*tensors), tensors, "gelu")


@every_backend
def test_any_strides(backend, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    tensors = inputs((4, 6, 5), 24, 40, dtype, device)
    variants = {
        "permuted": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
        "part of wider rows": lambda t: F.pad(t, (8, 16))[..., 8:-16],
        "part of odd rows": lambda t: F.pad(t, (1, 2))[..., 1:-2],
        "last axis strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": lambda t: t[:1].expand_as(t),
    }
    for name, lay in variants.items():
        moved = [lay(tensors[0]), tensors[1].t().contiguous().t(), *tensors[2:4], lay(tensors[4])]
        with torch.no_grad():
            expect(call(*moved), moved, "gelu", name)


@every_backend
def test_no_rows(backend, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    tensors = inputs((0, 3), 16, 24, dtype, device)
    with torch.no_grad():
        assert call(*tensors).shape == (0, 3, 24)


def test_a_single_row_without_axis():
    tensors = inputs((), 16, 24, torch.float32, "cpu")
    with torch.no_grad():
        expect(call(*tensors), tensors, "gelu")


@pytest.mark.parametrize(
    "k, n, dtype", [(12, 16, HALF), (16, 12, HALF), (16, 16, torch.float32), (520, 264, HALF)], ids=str
)
def test_what_the_kernel_leaves_to_torch(k, n, dtype, monkeypatch, device):
    """Composed in the open: nothing is chosen, so nothing is refused."""
    use_backend(monkeypatch, "triton", device)
    monkeypatch.delenv("BBFAST_STRICT")
    tensors = inputs((5,), k, n, dtype, device)
    with torch.no_grad():
        expect(call(*tensors), tensors, "gelu")


@pytest.mark.parametrize("scaled, residual", list(itertools.product((False, True), repeat=2)))
def test_onednn_on_the_cpu(scaled, residual, monkeypatch):
    tensors = inputs((4, 9), 128, 40, torch.float32, "cpu", scaled=scaled, residual=residual)
    if reasons := _onednn.linear_unsupported_reasons(*tensors[:2]):
        pytest.skip("; ".join(reasons))
    use_backend(monkeypatch, "onednn", "cpu")
    kept = [None if tensor is None else tensor.clone() for tensor in tensors]
    for act in ACTIVATIONS:
        for x in (tensors[0], tensors[0].transpose(0, 1).contiguous().transpose(0, 1)):
            with torch.no_grad():
                y = call(x, *tensors[1:], act)
            expect(y, tensors, act, act)
            assert y.is_contiguous() and dispatch.last_choices()["linear_act"].backend == "onednn"
    for bias in (torch.randn(80)[::2], torch.randn(1).expand(40)):  # oneDNN itself takes strides for none
        given = [tensors[0], tensors[1], bias, *tensors[3:]]
        with torch.no_grad():
            expect(call(*given, "relu"), given, "relu")
    if residual:  # what is wider than the product is not written over it
        with torch.no_grad():
            assert call(*tensors[:4], tensors[4].double()).dtype == torch.float64
    for tensor, before in zip(tensors, kept):
        assert tensor is None or torch.equal(tensor, before)


@pytest.mark.parametrize("place", [3, 4], ids=["layer_scale", "residual"])
def test_what_only_stands_for_tensors_is_not_written_over(place, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    tensors = inputs((3,), 16, 24, torch.float32, "cpu")
    pair = [tensors[place], tensors[place] + 100]
    wrapped = [*tensors[:place], TwoTensor(*pair), *tensors[place + 1 :]]
    with torch.no_grad():
        y = call(*wrapped)
        for ours, one in zip((y.a, y.b), pair):
            torch.testing.assert_close(ours, call(*tensors[:place], one, *tensors[place + 1 :]))


@pytest.mark.parametrize(
    "rows, k, dtype, transposed",
    [(31, 128, torch.float32, False), (32, 127, torch.float32, False), (40, 128, torch.float64, False)]
    + [(40, 128, torch.float32, True)],
    ids=str,
)
def test_what_onednn_leaves_to_torch(rows, k, dtype, transposed, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    tensors = inputs((rows,), k, 24, dtype, "cpu")
    if transposed:
        tensors[1] = tensors[1].t().contiguous().t()
    with torch.no_grad():
        expect(call(*tensors), tensors, "gelu")
    assert dispatch.last_choices()["linear_act"].backend == "torch"


# ---- torch.library, autograd, compile, autocast ----------------------------------------------------------


def test_opcheck(monkeypatch, device):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    for tensors in (inputs((3, 5), 16, 24, HALF, device), inputs((7,), 8, 16, HALF, device, scaled=False)):
        check_op(torch.ops.bbfast.linear_act.default, (*tensors, "gelu"))


@pytest.mark.parametrize("rows", [(6,), (2, 3), (2, 3, 2), (2, 1, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients(rows, scaled):
    tensors = inputs(rows, 5, 7, torch.float64, "cpu", scaled=scaled)
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    assert torch.autograd.gradcheck(lambda *_: reference(*tensors, "silu"), leaves)
    found = torch.autograd.grad(call(*tensors, "silu").square().sum(), leaves)
    wanted = torch.autograd.grad(reference(*tensors, "silu").square().sum(), leaves)
    for ours, plain in zip(found, wanted):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_compiled(dtype, grad, device):
    tensors = inputs((3, 4), 16, 24, dtype, device)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for rows in ((3, 4), (5, 7), (2, 9)):
            tensors[0], tensors[4] = inputs(rows, 16, 24, dtype, device)[::4]
            if grad:
                tensors[1].requires_grad_()
            expected = call(*tensors)
            found = compiled(*tensors)
            torch.testing.assert_close(found, expected)
            if grad:
                mine, theirs = (torch.autograd.grad(y.float().sum(), tensors[1])[0] for y in (found, expected))
                torch.testing.assert_close(mine, theirs)


def test_autocast_casts_what_linear_casts():
    tensors = inputs((3, 4), 16, 24, torch.float32, "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, plain = call(*tensors), reference(*tensors, "gelu")
        alone = linear_act(*tensors[:3])
    assert y.dtype == plain.dtype == torch.float32 and alone.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)


def test_plain_torch_on_demand():
    tensors = inputs((3,), 8, 16, torch.float32, "cpu")
    with exportable():
        traced = torch.jit.trace(lambda x: linear_act(x, *tensors[1:3]), tensors[0])
        vmapped = torch.vmap(lambda x: linear_act(x, *tensors[1:3]))(tensors[0])
    assert not any("bbfast" in node.kind() for node in traced.graph.nodes())
    torch.testing.assert_close(vmapped, reference(*tensors[:3], None, None, "gelu"))


# ---- the layer and lent modules --------------------------------------------------------------------------


def test_layer():
    layer, plain = LinearAct(8, 16, act="silu"), nn.Linear(8, 16)
    plain.load_state_dict(layer.state_dict())
    x, residual, scale = torch.randn(3, 8), torch.randn(3, 16), torch.randn(16)
    torch.testing.assert_close(layer(x, residual, scale), residual + scale * F.silu(plain(x)))
    assert "act='silu'" in repr(layer)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _replace_forward(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0] + 3,)),
        _replace_forward,
        lambda layer: torch.nn.utils.parametrizations.weight_norm(layer, dim=None),
        lambda layer: setattr(layer, "__class__", Doubled),
    ],
    ids=["hook", "pre-hook", "forward replaced", "weight_norm", "subclass"],
)
def test_what_somebody_did_to_a_linear_layer_counts(change):
    linear = nn.Linear(8, 16)
    change(linear)
    x, residual, scale = torch.randn(3, 8), torch.randn(3, 16), torch.randn(16)
    with torch.no_grad():
        y = apply_linear_act(linear, x, act=nn.GELU(), residual=residual, layer_scale=scale)
        torch.testing.assert_close(y, residual + scale * F.gelu(linear(x)))


def test_a_weight_of_a_class_of_its_own_is_left_to_its_layer():
    """As quantisation and sharding put it into a plain nn.Linear."""
    linear, x = nn.Linear(8, 16), torch.randn(3, 8)
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    assert type(linear.weight) is TwoTensor
    with torch.no_grad():
        y = apply_linear_act(linear, x, act="gelu")
    assert type(y) is TwoTensor
    torch.testing.assert_close(y.a, F.gelu(F.linear(x, weight, linear.bias)))


@pytest.mark.parametrize(
    "act",
    [
        nn.GELU(),
        nn.GELU("tanh"),
        nn.ReLU(),
        nn.ReLU6(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Identity(),
        nn.Tanh(),
        nn.Softplus(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("make", [nn.Linear, lambda k, n: nn.Conv2d(k, n, 1)], ids=["linear", "convolution"])
def test_activations_that_are_modules(act, make):
    layer, x = make(8, 16), 3 * torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        plain = F.linear(x, layer.weight.flatten(1), layer.bias)
        torch.testing.assert_close(apply_linear_act(layer, x, act=act), act(plain))
    hooked = type(act)()
    hooked.register_forward_hook(lambda module, args, y: y + 1)
    with torch.no_grad():
        torch.testing.assert_close(apply_linear_act(layer, x, act=hooked), type(act)()(plain) + 1)


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (TypeError, "x must be a torch.Tensor", {"x": [1.0]}),
        (TypeError, "x has dtype torch.int64", {"x": torch.zeros(3, 8, dtype=torch.long)}),
        (ValueError, r"x must be \[..., K\] with K=8", {"x": torch.zeros(3, 7)}),
        (ValueError, r"x must be \[..., K\]", {"x": torch.tensor(1.0)}),
        (ValueError, "weight must have 2 dimensions", {"weight": torch.zeros(16, 8, 1)}),
        (ValueError, "weight has an empty dimension", {"weight": torch.zeros(0, 8)}),
        (TypeError, "weight has dtype torch.float64", {"weight": torch.zeros(16, 8).double()}),
        (ValueError, "weight is on meta", {"weight": torch.zeros(16, 8, device="meta")}),
        (ValueError, "bias must have shape", {"bias": torch.zeros(8)}),
        (TypeError, "bias has dtype", {"bias": torch.zeros(16).double()}),
        (ValueError, "layer_scale must have shape", {"layer_scale": torch.zeros(8)}),
        (ValueError, "residual must have the output's shape", {"residual": torch.zeros(3, 8)}),
        (ValueError, "residual is on meta", {"residual": torch.zeros(3, 16, device="meta")}),
        (ValueError, "act='swoosh'", {"act": "swoosh"}),
        (TypeError, "act must be a string", {"act": nn.GELU()}),
    ],
)
def test_bad_input(error, match, changes):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(16, 8), **changes}
    with pytest.raises(error, match=match):
        linear_act(**arguments)


# ---- perceptrons that take the sum along -----------------------------------------------------------------


@pytest.mark.parametrize("block", ["swin", "convnext"])
def test_a_hook_on_a_perceptron_sees_its_own_result(block):
    """Not that with the sum, which it is only given where nobody looks."""
    block = SwinBlock(16, (8, 8), window_size=4).eval() if block == "swin" else ConvNeXtBlock(16).eval()
    x = torch.randn(2, 8, 8, 16) if isinstance(block, SwinBlock) else torch.randn(2, 8, 8, 16).permute(0, 3, 1, 2)
    seen = []
    with torch.no_grad():
        before = block(x)
        block.mlp.register_forward_hook(lambda module, args, y: seen.append((args, y)))
        torch.testing.assert_close(block(x), before)
        ((inputs, y),) = seen
        assert len(inputs) == 1
        torch.testing.assert_close(y, block.mlp.fc2(F.gelu(block.mlp.fc1(inputs[0]))))
