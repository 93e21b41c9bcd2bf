"""The kernel behind pointwise `conv_bn_act` and `linear_act` in inference: products of matrices and what follows."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import assert_within_rule, poison_new_empty

from bbfast import dispatch, env
from bbfast.nn import apply_conv_bn_act, apply_gate, squeeze_excite_gate
from bbfast.ops import conv_bn_act
from bbfast.ops.conv_bn_act import is_for_kernel
from bbfast.reference.activation import ACTIVATIONS, activation
from bbfast.reference.conv_bn_act import conv_bn_act as reference

pytest.importorskip("triton")

from bbfast.triton_kernels import linear_act as linear_kernels
from bbfast.triton_kernels import pointwise, tuned
from bbfast.triton_kernels.pointwise_sizes import pays

HALF = torch.float16


@pytest.fixture
def kernels(monkeypatch, device):
    """Forbids everything but the kernel, and fills what it forgets to write with NaN."""
    reasons = dispatch.triton_unavailable_reasons(torch.empty(1, device=device))
    if reasons:
        pytest.skip("; ".join(reasons))
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)
    with torch.no_grad():
        yield


def maps(*shape, device, dtype=HALF):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def batch_norm(channels, device):
    """Weight, bias, running mean and variance."""
    return [torch.rand(channels, device=device) + shift for shift in (0.5, -0.5, -0.5, 0.5)]


def doubled(tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def expect(y, x, weight, bias, bn, residual, stride, act, gate, name="y"):
    tail = (stride, (0,) * 4, (1, 1), 1, False, 0.0, 1e-3, act)
    tensors = (x, weight, bias, *bn, residual)
    # What torch rounds before the product, the kernel does, too: compare from there on.
    rounded = x if gate is None else x * gate[:, :, None, None]
    exact = reference(*doubled((rounded, *tensors[1:])), *tail)
    assert_within_rule(name, y, exact, reference(*tensors, *tail, gate))


# (N, C, O, H, W, stride): tails of rows, columns and sums; one tile and many; a sample per pixel.
SHAPES = [
    (2, 24, 40, 7, 9, (1, 1)),
    (1, 8, 8, 1, 3, (1, 1)),
    (3, 72, 136, 5, 6, (2, 1)),
    (2, 200, 16, 9, 8, (1, 1)),
    (5, 16, 264, 6, 5, (2, 2)),
    (65, 40, 24, 1, 2, (1, 1)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bn, has_residual, has_gate", list(itertools.product((False, True), repeat=3)))
def test_convolution(shape, has_bn, has_residual, has_gate, kernels, device):
    n, c, o, h, w, stride = shape
    x, weight = maps(n, c, h, w, device=device), torch.randn(o, c, 1, 1, device=device).to(HALF) / c**0.5
    bias = None if has_bn else torch.randn(o, device=device).to(HALF)
    bn = batch_norm(o, device) if has_bn else [None] * 4
    gate = torch.rand(n, c, device=device).to(HALF) if has_gate else None
    small = x[:, :, :: stride[0], :: stride[1]].shape[2:]
    residual = maps(n, o, *small, device=device) if has_residual else None
    act = list(ACTIVATIONS)[(SHAPES.index(shape) + has_bn) % len(ACTIVATIONS)]
    y = conv_bn_act(
        x, weight, *bn, bias=bias, stride=stride, eps=1e-3, act=act, residual=residual, gate=gate
    )  # fmt: skip
    expect(y, x, weight, bias, bn, residual, stride, act, gate, act)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dispatch.last_choices()["conv_bn_act"].backend == "triton"


@pytest.mark.parametrize("tile", [pointwise.Tile(64, 64, 16, 4, 2), pointwise.Tile(64, 64, 16, 1, 2)], ids=str)
def test_the_residual_is_read_before_and_behind_the_product(tile, kernels, device):
    """Two groups of columns, of which the second has a tail."""
    assert tile.reads_ahead == (tile.num_warps == 4) and tile.parts == 2
    x, weight, bn = maps(2, 24, 7, 9, device=device), torch.randn(56, 24, 1, 1).to(device, HALF), batch_norm(56, device)
    residual = maps(2, 56, 7, 9, device=device)
    with tuned.intercepting(lambda tunable, key, heuristic: tile):
        y = conv_bn_act(x, weight, *bn, eps=1e-3, residual=residual)
    expect(y, x, weight, None, bn, residual, (1, 1), "relu", None)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [HALF, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_activations(act, dtype, kernels, device):
    x, weight = 3 * maps(2, 16, 5, 5, device=device, dtype=dtype), torch.randn(24, 16, 1, 1, device=device).to(dtype)
    bn, residual = batch_norm(24, device), maps(2, 24, 5, 5, device=device, dtype=dtype)
    y = conv_bn_act(x, weight, *bn, eps=1e-3, act=act, residual=residual)
    expect(y, x, weight, None, bn, residual, (1, 1), act, None)


def test_slices_are_read_where_they_are(kernels, device, monkeypatch):
    wide = maps(4, 32, 9, 12, device=device)
    x = wide[1:3, 8:24, 1:8, 2:9]
    weight, bn = torch.randn(40, 16, 1, 1, device=device).to(HALF), batch_norm(40, device)
    residual = maps(2, 48, 9, 9, device=device)[:, 8:, 2:, 2:]  # its pixels have no one distance: copied
    monkeypatch.setattr(torch.Tensor, "contiguous", _only_for(torch.Tensor.contiguous, (residual.shape,)))
    y = conv_bn_act(x, weight, *bn, eps=1e-3, residual=residual)
    monkeypatch.undo()
    expect(y, x, weight, None, bn, residual, (1, 1), "relu", None)


def _only_for(contiguous, shapes):
    def checked(self, *args, **kwargs):
        assert self.dim() != 4 or self.shape[2:] == (1, 1) or self.shape in shapes, f"copied {tuple(self.shape)}"
        return contiguous(self, *args, **kwargs)

    return checked


def test_offsets_beyond_32_bits(kernels, device):
    """Pages of the large tensor that nobody touches take no memory."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    far = 2**31 + 64
    large = torch.empty(far + 64, dtype=HALF, device=device)
    x = large.as_strided((2, 8, 1, 3), (far, 1, 24, 8))
    x.copy_(torch.randn(2, 8, 1, 3))
    weight = torch.randn(8, 8, 1, 1, device=device).to(HALF)
    y = conv_bn_act(x, weight, *[None] * 4, act="identity")
    expect(y, x.clone(), weight, None, [None] * 4, None, (1, 1), "identity", None)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_and_infinity(act, kernels, device):
    """As torch has them. Only gelu(-inf) is 0, its limit, where torch has NaN."""
    x = torch.eye(8, device=device).to(HALF)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), -float("inf")
    y = linear_kernels.forward(x, torch.eye(8, device=device).to(HALF), None, None, None, act, HALF)
    plain = activation(torch.nn.functional.linear(x.double(), torch.eye(8, device=device).double()), act)
    if act == "gelu":
        plain[2] = torch.where(plain[2].isnan() & ~x[2].isnan(), y[2].double(), plain[2])
    assert y.isnan().any()
    assert torch.equal(y.isnan(), plain.isnan()) and torch.equal(y.isinf(), plain.isinf())


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_half_precision_activations_are_right_everywhere(act, kernels, device):
    """Every finite float16 through the shorter formulas: half a unit of rounding, and what the docstrings allow."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(HALF)
    x = bits[bits.isfinite()].to(device)
    x = torch.nn.functional.pad(x, (0, -x.numel() % 8)).view(-1, 8)
    y = linear_kernels.forward(x, torch.eye(8, device=device).to(HALF), None, None, None, act, torch.float16).double()
    exact = activation(x.double(), act)
    eps, tiny = torch.finfo(HALF).eps, 2.0**-24
    relative = torch.where(x < -5, 1.0 if act == "gelu" else 1e-5, 6e-4 if act == "gelu" else 1e-5)
    assert ((y - exact).abs() <= exact.abs() * (eps / 2 + relative) + tiny).all()
    assert ((y - exact).abs() <= exact.abs() * eps / 2 + 2.3e-5).all()


# ---- who goes to the kernel ------------------------------------------------------------------------------


def test_which_products_pay():
    assert pays(512, 4096, False) and pays(4096, 256, False) and pays(4096, 4096, True)
    assert not pays(520, 264, False)


@pytest.mark.parametrize(
    "change",
    [
        {"x": lambda x: x.contiguous()},
        {"x": lambda x: x.float(), "weight": lambda w: w.float()},
        {"x": lambda x: x[:, :12], "weight": lambda w: w[:, :12]},
        {"weight": lambda w: w[:12]},
        {"weight": lambda w: w.repeat(1, 1, 3, 3), "padding": (1, 1, 1, 1)},
        {"padding": (1, 0, 0, 0)},
        {"groups": 2, "weight": lambda w: w[:, :8]},
        {"x": lambda x: x.repeat(1, 64, 1, 1), "weight": lambda w: w.repeat(17, 64, 1, 1)},
    ],
    ids=["NCHW", "fp32", "12 channels", "to 12", "3x3", "padding", "groups", "limited by arithmetic"],
)
def test_who_does_not_go(change, kernels, device):
    x, weight = maps(1, 16, 4, 4, device=device), torch.zeros(16, 16, 1, 1, device=device, dtype=HALF)
    assert is_for_kernel(x, weight, 1, (0, 0, 0, 0), False)
    x, weight = change.get("x", lambda x: x)(x), change.get("weight", lambda w: w)(weight)
    assert not is_for_kernel(x, weight, change.get("groups", 1), change.get("padding", (0, 0, 0, 0)), False)


def test_gradients_and_batch_statistics_do_not_go(device, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    x, weight = maps(2, 16, 4, 4, device=device), torch.randn(16, 16, 1, 1, device=device).to(HALF)
    bn = batch_norm(16, device)
    with torch.no_grad():
        conv_bn_act(x, weight, *bn, training=True)
    conv_bn_act(x, weight.requires_grad_(), *bn).sum().backward()
    assert dispatch.last_choices().get("conv_bn_act", dispatch.Choice("torch", ())).backend == "torch"
    assert weight.grad is not None


def test_unknown_gpus_say_why(monkeypatch, device):
    """Where the kernel is wanted and cannot run, the reference does and the reason is kept."""
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setattr(env, "TRITON_INTERPRET", True)
    monkeypatch.setattr(dispatch, "triton_unavailable_reasons", lambda x: ["made up for this test"])
    x, weight = maps(1, 16, 4, 4, device=device), torch.randn(16, 16, 1, 1, device=device).to(HALF)
    gate = torch.rand(1, 16, device=device).to(HALF)
    with torch.no_grad(), pytest.warns(dispatch.FallbackWarning, match="made up"):
        y = conv_bn_act(x, weight, *[None] * 4, gate=gate)
    expect(y, x, weight, None, [None] * 4, None, (1, 1), "relu", gate)
    assert dispatch.last_choices()["conv_bn_act"].backend == "torch"


# ---- the gate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gated_layer(grad, dtype, device):
    """In the kernel or before it, the same numbers; and only without gradients may x be overwritten."""
    x = maps(2, 16, 5, 4, device=device, dtype=dtype)
    conv = torch.nn.Conv2d(16, 24, 1, bias=False).to(device, dtype)
    bn = torch.nn.BatchNorm2d(24).eval().to(device)
    reduce, expand = (torch.nn.Conv2d(*size, 1).to(device, dtype) for size in ((16, 8), (8, 16)))
    with torch.set_grad_enabled(grad):
        gate = squeeze_excite_gate(x.mean((2, 3)), reduce, expand, act="relu", gate="sigmoid")
        expected = torch.relu(bn(conv(apply_gate(x, gate))))
        kept = x.clone()
        y = apply_conv_bn_act(conv, bn, x.clone() if not grad else x, act="relu", gate=gate)
    torch.testing.assert_close(y, expected, rtol=1e-2 if dtype == HALF else 1e-5, atol=1e-2 if dtype == HALF else 1e-5)
    assert torch.equal(x, kept)
    if grad:
        y.float().sum().backward()
        assert reduce.weight.grad is not None and conv.weight.grad is not None


@pytest.mark.parametrize(
    "error, match, gate",
    [
        (ValueError, r"gate must have shape \(2, 16\)", torch.zeros(2, 15)),
        (ValueError, "gate must have 2 dimensions", torch.zeros(2, 16, 1, 1)),
        (TypeError, "gate has dtype torch.float64", torch.zeros(2, 16).double()),
        (ValueError, "gate is on meta", torch.zeros(2, 16, device="meta")),
        (TypeError, "gate must be a torch.Tensor", [1.0]),
    ],
)
def test_bad_gate(error, match, gate):
    with pytest.raises(error, match=match):
        conv_bn_act(torch.zeros(2, 16, 4, 4), torch.zeros(8, 16, 1, 1), *[None] * 4, gate=gate)


# ---- launch configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_heuristic_chooses_what_fits(capability):
    for rows, summed, columns, gated in itertools.product(
        (1, 49, 6272, 401408), (8, 16, 24, 96, 144, 960, 4096), (8, 16, 72, 144, 256, 4096), (False, True)
    ):
        key = pointwise.Key("forward", "bfloat16", rows, summed, columns, "relu", gated, True)
        tile = pointwise.tile(key, 264, capability)
        assert pointwise.TUNABLE.objection(key, tile) is None, (key, tile)
        assert tile.block_k < 2 * max(summed, 16) and tile.block_n < 2 * max(columns, 64)
        buffers = tile.num_stages * tile.block_k * (tile.block_m + tile.block_n) * 2
        assert buffers <= (98304 if capability in ((9, 0), (10, 0)) else 49152)


def test_compiled_for_any_batch_without_another_graph(device):
    """Sizes are asked for while tracing; they must not tie the graph to one of them."""
    weight, bn = torch.randn(24, 16, 1, 1, device=device).to(HALF), batch_norm(24, device)

    def layer(x):
        return conv_bn_act(x, weight, *bn, act="silu")

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 16, 4, 5), (3, 16, 7, 6), (5, 16, 2, 3)):
            x = maps(*size, device=device)
            assert torch.equal(compiled(x), layer(x))
