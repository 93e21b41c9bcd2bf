"""`mlp`: kernel and composition against float64, autograd, compile, the layer and lent modules."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule, check_op, poison_new_empty
from torch import nn

from bbfast import dispatch, exportable
from bbfast.nn import ConvNeXtBlock, Mlp, SwinBlock, apply_mlp
from bbfast.ops import mlp
from bbfast.reference.activation import ACTIVATIONS
from bbfast.reference.mlp import mlp as reference
from bbfast.triton_kernels import mlp as kernels
from bbfast.triton_kernels.mlp_sizes import MOST_CHANNELS

HALF = torch.float16
NAMES = (
    *("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
    *("norm_weight", "norm_bias", "layer_scale", "residual", "norm_eps"),
)


def use_backend(monkeypatch, backend, device):
    """One backend and nothing else, and NaN in what its kernel forgets to write."""
    missing = dispatch.triton_unavailable_reasons(torch.zeros(1, device=device))
    if backend == "triton" and missing:
        pytest.skip("; ".join(missing))
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)
    return HALF if backend == "triton" else torch.float32


def inputs(rows, channels, hidden, dtype, device, *, norm=True, scaled=True, residual=True) -> dict:
    """The arguments of an op call, by name."""

    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    return {
        "x": randn(*rows, channels) + 1,
        "fc1_weight": (torch.randn(hidden, channels, device=device) / channels**0.5).to(dtype),
        "fc1_bias": randn(hidden),
        "fc2_weight": (torch.randn(channels, hidden, device=device) / hidden**0.5).to(dtype),
        "fc2_bias": randn(channels),
        "norm_weight": randn(channels) if norm else None,
        "norm_bias": randn(channels) if norm else None,
        "layer_scale": randn(channels) if scaled else None,
        "residual": randn(*rows, channels) if residual else None,
        "norm_eps": 1e-5 if norm else None,
    }


def plain(arguments: dict, act: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    *tensors, norm_eps = (arguments[name] for name in NAMES)
    tensors = [tensor if tensor is None or dtype is None else tensor.to(dtype) for tensor in tensors]
    return reference(*tensors, norm_eps, act)


def expect(y, arguments, act="gelu", name="y"):
    assert_within_rule(name, y, plain(arguments, act, torch.float64), plain(arguments, act))


def test_reference_is_what_torch_says():
    a = inputs((2, 3), 5, 7, torch.float64, "cpu")
    x = F.layer_norm(a["x"], (5,), a["norm_weight"], a["norm_bias"], 1e-5)
    y = F.linear(F.gelu(F.linear(x, a["fc1_weight"], a["fc1_bias"])), a["fc2_weight"], a["fc2_bias"])
    torch.testing.assert_close(plain(a, "gelu"), a["residual"] + y * a["layer_scale"])


every_backend = pytest.mark.parametrize("backend", ["triton", "torch"])


@every_backend
@pytest.mark.parametrize(
    "rows, channels, hidden",
    [((130,), 24, 40), ((2, 5, 7), 96, 384), ((3, 4), 8, 8), ((1, 1), 128, 72), ((65,), 40, 160), ((3, 9), 104, 16)],
    ids=str,
)
@pytest.mark.parametrize("norm", [False, True])
def test_forward(backend, rows, channels, hidden, norm, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    for scaled, residual in itertools.product((False, True), repeat=2):
        a = inputs(rows, channels, hidden, dtype, device, norm=norm, scaled=scaled, residual=residual)
        with torch.no_grad():
            y = mlp(**a)
        expect(y, a, name=f"layer_scale {scaled}, residual {residual}")
        assert y.is_contiguous() and y.dtype == dtype
    assert dispatch.last_choices()["mlp"].backend == backend


@every_backend
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_without_biases(backend, act, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    a = inputs((33,), 16, 24, dtype, device) | dict.fromkeys(("fc1_bias", "fc2_bias", "norm_weight", "norm_bias"))
    with torch.no_grad():
        expect(mlp(**a, act=act), a, act)


@every_backend
def test_vectors_and_residual_of_other_dtypes(backend, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    a = inputs((3, 9), 24, 32, dtype, device)
    for name in ("norm_weight", "norm_bias", "residual"):
        wide = a | {name: a[name].float()}
        with torch.no_grad():
            y = mlp(**wide)
        expect(y, wide, name=name)
        assert y.dtype == (torch.float32 if name == "residual" else dtype)


@every_backend
def test_any_strides(backend, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    a = inputs((4, 6, 5), 24, 40, dtype, device)
    for name, lay in {
        "permuted": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
        "part of wider rows": lambda t: F.pad(t, (8, 16))[..., 8:-16],
        "part of odd rows": lambda t: F.pad(t, (1, 2))[..., 1:-2],
        "last axis strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": lambda t: t[:1].expand_as(t),
    }.items():
        moved = {**a, "x": lay(a["x"]), "residual": lay(a["residual"]), "fc1_weight": a["fc1_weight"].t().clone().t()}
        moved["norm_bias"] = a["norm_bias"].repeat_interleave(2)[::2]
        with torch.no_grad():
            expect(mlp(**moved), moved, name=name)


def test_rows_far_apart(monkeypatch, device):
    """Their offsets do not fit 32 bits."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    far = 2**31 + 64
    large = torch.empty(far + 8, dtype=HALF, device=device)
    a = inputs((2,), 8, 16, HALF, device)
    rows = large.as_strided((2, 8), (far, 1))
    rows.copy_(a["x"])
    with torch.no_grad():
        expect(mlp(**a | {"x": rows, "residual": rows}), a | {"residual": a["x"]})
    assert dispatch.last_choices()["mlp"].backend == "triton"


@every_backend
def test_a_residual_that_is_x(backend, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    a = inputs((70,), 40, 64, dtype, device)
    a["residual"] = a["x"]
    with torch.no_grad():
        expect(mlp(**a), a)


@every_backend
def test_rows_far_from_zero_and_constant_rows(backend, monkeypatch, device):
    """The variance is taken around the mean; a row without any is its norm's bias."""
    dtype = use_backend(monkeypatch, backend, device)
    a = inputs((40,), 24, 32, dtype, device, residual=False)
    a["x"] += 100
    a["x"][7] = 3.0
    with torch.no_grad():
        expect(mlp(**a), a)


@every_backend
def test_large_constant_rows_without_the_norm_s_weight(backend, monkeypatch, device):
    """Minus their mean by their deviation is beyond float16, in channels that a tile has and the row has not."""
    dtype = use_backend(monkeypatch, backend, device)
    a = inputs((4,), 24, 32, dtype, device, scaled=False, residual=False) | {"norm_weight": None}
    a["x"][:] = 300.0
    for bias in (a["norm_bias"], None):
        with torch.no_grad():
            expect(mlp(**a | {"norm_bias": bias}), a | {"norm_bias": bias})


@every_backend
def test_infinity_stays_what_it_is(backend, monkeypatch, device):
    """It must not meet the zeros of hidden units that a tile has and the layer has not."""
    dtype = use_backend(monkeypatch, backend, device)
    a = inputs((4,), 16, 8, dtype, device, norm=False, scaled=False, residual=False)
    a |= {name: a[name].abs() for name in ("fc1_weight", "fc2_weight")}
    a["x"][0, 0] = float("inf")
    with torch.no_grad():
        y = mlp(**a, act="relu")
    assert y[0].isposinf().all() and y[1:].isfinite().all()


@every_backend
def test_a_row_that_is_not_finite_spoils_no_other(backend, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    a = inputs((40,), 24, 32, dtype, device)
    a["x"][3, 5], a["x"][20, 0] = float("nan"), float("inf")
    with torch.no_grad():
        y = mlp(**a)
    rows = torch.arange(40, device=device)
    assert torch.equal(y.isnan().any(1), (rows == 3) | (rows == 20))
    assert torch.equal(y.isnan(), plain(a, "gelu").isnan())


@every_backend
def test_no_rows(backend, monkeypatch, device):
    dtype = use_backend(monkeypatch, backend, device)
    with torch.no_grad():
        assert mlp(**inputs((0, 3), 16, 24, dtype, device)).shape == (0, 3, 16)


@pytest.mark.parametrize(
    "channels, hidden, dtype", [(12, 16, HALF), (16, 12, HALF), (16, 16, torch.float32), (136, 16, HALF)], ids=str
)
def test_what_the_kernel_leaves_to_other_ops(channels, hidden, dtype, monkeypatch, device):
    """Composed in the open: nothing is chosen here, so nothing is refused."""
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    a = inputs((5,), channels, hidden, dtype, device)
    with torch.no_grad():
        expect(mlp(**a), a)
    assert dispatch.last_choices()["mlp"].backend == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [40, 64, 96, 104, 128])
@pytest.mark.parametrize("batch", [1, 32])
def test_real_sizes(dtype, channels, batch, monkeypatch, device):
    """As in the first stages of ConvNeXt (without a norm, scaled) and Swin (with one, added to what it normalises)."""
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)
    for act in ACTIVATIONS:
        a = inputs((batch, 56, 56), channels, 4 * channels, dtype, device, norm=False)
        with torch.no_grad():
            expect(mlp(**a, act=act), a, act)
            a = inputs((batch, 56, 56), channels, 4 * channels, dtype, device, scaled=False)
            a["residual"] = a["x"]
            expect(mlp(**a, act=act), a, act)
    assert dispatch.last_choices()["mlp"].backend == "triton"


def test_heuristic_chooses_what_fits():
    for rows, channels, capability in itertools.product(
        (1, 49, 6272, 401408), range(8, MOST_CHANNELS + 1, 8), ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    ):
        key = kernels.Key("forward", "bfloat16", rows, channels, 4 * channels, "gelu", True, True)
        tile = kernels.tile(key, 264, capability)
        assert kernels.TUNABLE.objection(key, tile) is None, (key, tile)
        left, right = kernels._cut(channels)
        assert (
            left + right >= channels
            and right < left < 2 * max(16, channels)
            and 0.75 * (left + right) <= max(12, channels + 8)
        )


# ---- torch.library, autograd, compile, autocast ----------------------------------------------------------


def test_opcheck(monkeypatch, device):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    for a in (inputs((3, 5), 16, 24, HALF, device), inputs((7,), 8, 16, HALF, device, norm=False, scaled=False)):
        check_op(torch.ops.bbfast.mlp.default, (*[a[name] for name in NAMES], "gelu"))


@pytest.mark.parametrize("norm, scaled", [(False, True), (True, False), (True, True)])
def test_gradients(norm, scaled):
    a = inputs((2, 3), 5, 7, torch.float64, "cpu", norm=norm, scaled=scaled)
    leaves = [value.requires_grad_() for value in a.values() if isinstance(value, torch.Tensor)]
    assert torch.autograd.gradcheck(lambda *_: plain(a, "silu"), leaves)
    found = torch.autograd.grad(mlp(**a, act="silu").square().sum(), leaves)
    wanted = torch.autograd.grad(plain(a, "silu").square().sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_compiled(dtype, grad, device):
    a = inputs((3, 4), 16, 24, dtype, device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: mlp(**a), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for rows in ((3, 4), (5, 7), (2, 9)):
            fresh = inputs(rows, 16, 24, dtype, device)
            a |= {name: fresh[name] for name in ("x", "residual")}
            if grad:
                a["fc1_weight"].requires_grad_()
            expected, found = mlp(**a), compiled(a)
            torch.testing.assert_close(found, expected)
            if grad:
                grads = (torch.autograd.grad(y.float().sum(), a["fc1_weight"])[0] for y in (found, expected))
                torch.testing.assert_close(*grads)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF], ids=str)
def test_autocast_casts_what_the_layers_cast(norm, dtype, monkeypatch):
    """float16 through the kernel, where Triton's interpreter stands for a GPU."""
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    a = inputs((3, 4), 16, 24, torch.float32, "cpu", norm=norm)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y = mlp(**a)
        x = F.layer_norm(a["x"], (16,), a["norm_weight"], a["norm_bias"], 1e-5) if norm else a["x"]
        hidden = F.gelu(F.linear(x, a["fc1_weight"], a["fc1_bias"]))
        theirs = a["residual"] + F.linear(hidden, a["fc2_weight"], a["fc2_bias"]) * a["layer_scale"]
        alone = mlp(**a | {"residual": None, "layer_scale": None})
    assert y.dtype == theirs.dtype == torch.float32 and alone.dtype == dtype
    torch.testing.assert_close(y, theirs, rtol=5e-2, atol=5e-2)


def test_plain_torch_on_demand():
    a = inputs((3,), 8, 16, torch.float32, "cpu")
    x = a.pop("x")
    with exportable():
        traced = torch.jit.trace(lambda x: mlp(x, **a), x)
        residual = a.pop("residual")
        mapped = torch.vmap(lambda x, residual: mlp(x, residual=residual, **a))(x[:, None], residual[:, None])
    assert not any("bbfast" in node.kind() for node in traced.graph.nodes())
    torch.testing.assert_close(mapped[:, 0], plain({"x": x, "residual": residual, **a}, "gelu"))


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_shapes_on_meta(norm_eps):
    x, fc1, fc2 = (torch.empty(shape, device="meta", dtype=HALF) for shape in ((2, 16), (24, 16), (16, 24)))
    y = mlp(x, fc1, None, fc2, None, norm_eps=norm_eps)
    assert y.is_meta and y.shape == (2, 16) and y.dtype == HALF


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (TypeError, "x must be a torch.Tensor", {"x": [1.0]}),
        (ValueError, r"x must be \[N, ..., C\]", {"x": torch.zeros(8)}),
        (ValueError, r"x must be \[N, ..., C\]", {"x": torch.zeros(3, 0)}),
        (TypeError, "x has dtype torch.float64 but fc1_weight has torch.float32", {"x": torch.zeros(3, 8).double()}),
        (ValueError, r"fc1_weight must be \[hidden, C\] with C=8", {"fc1_weight": torch.zeros(16, 7)}),
        (ValueError, r"fc1_weight must be \[hidden, C\]", {"fc1_weight": torch.zeros(0, 8)}),
        (ValueError, "fc1_weight must have 2 dimensions", {"fc1_weight": torch.zeros(16, 8, 1)}),
        (ValueError, r"fc2_weight must be \[C, hidden\], \(8, 16\)", {"fc2_weight": torch.zeros(16, 8)}),
        (TypeError, "fc2_weight has dtype torch.float16", {"fc2_weight": torch.zeros(8, 16).half()}),
        (ValueError, "fc2_weight is on meta", {"fc2_weight": torch.zeros(8, 16, device="meta")}),
        (ValueError, "fc1_bias must have shape", {"fc1_bias": torch.zeros(8)}),
        (TypeError, "fc2_bias has dtype", {"fc2_bias": torch.zeros(8).double()}),
        (ValueError, "norm_weight must have shape", {"norm_weight": torch.zeros(16), "norm_eps": 1e-5}),
        (ValueError, "norm_weight and norm_bias need a norm", {"norm_weight": torch.zeros(8)}),
        (ValueError, "norm_eps=-1 is not allowed", {"norm_eps": -1}),
        (TypeError, "norm_eps must be a float", {"norm_eps": "1e-5"}),
        (ValueError, "layer_scale must have shape", {"layer_scale": torch.zeros(16)}),
        (ValueError, "residual must have x's shape", {"residual": torch.zeros(3, 16)}),
        (ValueError, "act='swoosh'", {"act": "swoosh"}),
    ],
)
def test_bad_input(error, match, changes):
    arguments = {"x": torch.zeros(3, 8), "fc1_weight": torch.zeros(16, 8), "fc1_bias": None}
    arguments |= {"fc2_weight": torch.zeros(8, 16), "fc2_bias": None, **changes}
    with pytest.raises(error, match=match):
        mlp(**arguments)


# ---- the layer, lent modules and blocks ------------------------------------------------------------------


def test_layer():
    layer, norm, x = Mlp(8, 16), nn.LayerNorm(8), torch.randn(2, 3, 8)
    expected = layer.fc2(F.gelu(layer.fc1(x)))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x, residual=x), x + expected)
    torch.testing.assert_close(layer(x, x, norm), x + layer.fc2(F.gelu(layer.fc1(norm(x)))))
    dropping = Mlp(8, 16, drop=1.0)
    torch.testing.assert_close(dropping(x, residual=x), x)
    torch.testing.assert_close(dropping.eval()(x), dropping.fc2(F.gelu(dropping.fc1(x))))


def test_layer_on_a_single_row(device):
    layer, x = Mlp(16, 64).half().to(device), torch.randn(16).half().to(device)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=1e-2, atol=1e-2)


@pytest.fixture
def one_kernel(monkeypatch, device):
    """The arguments of each launch; skips where there can be none."""
    missing = dispatch.triton_unavailable_reasons(torch.zeros(1, device=device))
    if missing:
        pytest.skip("; ".join(missing))
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    calls, launch = [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: calls.append(args) or launch(*args))
    return calls


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("part", ["norm", "fc1", "act", "fc2"])
@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward"])
def test_what_somebody_did_to_a_module_counts(part, change, one_kernel, device):
    parts = {"norm": nn.LayerNorm(8), "fc1": nn.Linear(8, 16), "act": nn.GELU(), "fc2": nn.Linear(16, 8)}
    parts = {name: module.half().to(device) for name, module in parts.items()}
    module, x, scale = parts[part], torch.randn(5, 8).half().to(device), torch.randn(8).half().to(device)
    with torch.no_grad():
        apply_mlp(*parts.values(), x, residual=x, layer_scale=scale)
        assert len(one_kernel) == 1
        if change == "hook":
            module.register_forward_hook(lambda module, args, y: 2 * y)
        elif change == "pre-hook":
            module.register_forward_pre_hook(lambda module, args: (2 * args[0] + 3,))
        else:
            forward = module.forward
            module.forward = lambda x: 2 * forward(x)
        y = apply_mlp(*parts.values(), x, residual=x, layer_scale=scale)
        branch = parts["fc2"](parts["act"](parts["fc1"](parts["norm"](x))))
        torch.testing.assert_close(y, x + branch * scale, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("norm", [Doubled(8), nn.RMSNorm(8), nn.LayerNorm((5, 8)), None], ids=str)
def test_a_norm_of_another_kind_is_called(norm, one_kernel, device):
    norm = norm and norm.half().to(device)
    fc1, fc2, x = (part.half().to(device) for part in (nn.Linear(8, 16), nn.Linear(16, 8), torch.randn(5, 8)))
    with torch.no_grad():
        y = apply_mlp(norm, fc1, "gelu", fc2, x)
        torch.testing.assert_close(y, fc2(F.gelu(fc1(x if norm is None else norm(x)))), rtol=1e-2, atol=1e-2)
    assert len(one_kernel) == 1 and one_kernel[0][9] is None


def test_a_norm_of_another_size_is_an_error(one_kernel, device):
    norm = nn.LayerNorm(8, elementwise_affine=False)
    fc1, fc2, x = (part.half().to(device) for part in (nn.Linear(24, 16), nn.Linear(16, 24), torch.randn(5, 24)))
    with torch.no_grad(), pytest.raises(RuntimeError, match="normalized_shape"):
        apply_mlp(norm, fc1, "gelu", fc2, x)


BLOCKS = {
    "swin": lambda: SwinBlock(16, (8, 8), window_size=4, shift_size=2, num_heads=1, drop_path=0.5),
    "convnext": lambda: ConvNeXtBlock(16, ls_init_value=0.5, drop_path=0.5),
}


def block_and_input(kind, device):
    block = BLOCKS[kind]().half().to(device)
    x = torch.randn(2, 8, 8, 16).half().to(device)
    return block, x if kind == "swin" else x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_end_in_one_kernel(kind, one_kernel, monkeypatch, device):
    block, x = block_and_input(kind, device)
    with torch.no_grad():
        y = block.eval()(x)
        assert len(one_kernel) == 1
        monkeypatch.setenv("BBFAST_BACKEND", "torch")
        torch.testing.assert_close(y.double(), block.double()(x.double()), rtol=2e-2, atol=2e-2)
        assert len(one_kernel) == 1


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_give_gradients(kind, one_kernel, device):
    block, x = block_and_input(kind, device)
    block.eval()(x).float().sum().backward()
    assert block.mlp.fc1.weight.grad.abs().sum() > 0 and not one_kernel


def test_a_swin_block_that_drops_samples_adds_first(one_kernel, device):
    """Its perceptron is one kernel all the same, without norm and sum."""
    block, x = block_and_input("swin", device)
    with torch.no_grad():
        block.train()(x)
    (arguments,) = one_kernel
    assert arguments[8:10] == (None, None)


@pytest.mark.parametrize("kind, name", [("swin", "mlp"), ("swin", "attn"), ("convnext", "mlp")])
@pytest.mark.parametrize("how", ["another module", "subclass"])
def test_blocks_call_what_took_a_layer_s_place_with_x_alone(kind, name, how, one_kernel, device):
    block, x = block_and_input(kind, device)
    seen = []

    class Recorder(nn.Module if how == "another module" else type(getattr(block, name))):
        def forward(self, *args, **named):
            seen.append((args, named))
            return args[0]

    if how == "another module":
        setattr(block, name, Recorder())
    else:
        getattr(block, name).__class__ = Recorder
    with torch.no_grad():
        block.eval()(x)
    ((args, named),) = seen
    assert len(args) == 1 and not named


class Negative(nn.Module):
    def forward(self, x):
        return -x


@pytest.mark.parametrize("module", [Negative(), nn.Identity(), nn.Dropout(1.0)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_what_comes_after_the_attention_s_projection_is_called(module, training, one_kernel, device):
    block, x = block_and_input("swin", device)
    block.drop_path1 = block.drop_path2 = nn.Identity()
    block.attn.proj_drop = module
    block.train(training)
    with torch.no_grad():
        y = block(x)
        assert len(one_kernel) == 1
        z = x + block.attn(block.norm1(x))
        torch.testing.assert_close(y, z + block.mlp(block.norm2(z)), rtol=2e-2, atol=2e-2)


def test_what_took_the_place_of_no_norm_is_called(one_kernel, device):
    """Between the layers of a ConvNeXt's perceptron."""

    class Doubled(nn.Identity):
        def forward(self, x):
            return 2 * x

    block, x = block_and_input("convnext", device)
    perceptron, x = block.mlp, x.permute(0, 2, 3, 1)
    perceptron.grn = Doubled()
    with torch.no_grad():
        y = perceptron.eval()(x)
        expected = perceptron.fc2(2 * F.gelu(perceptron.fc1(x)))
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind, called", [("swin", {"attn.proj", "attn.proj_drop"}), ("convnext", {"norm", "mlp.grn"})])
def test_hooks_on_all_modules_see_all(kind, called, one_kernel, device):
    block, x = block_and_input(kind, device)
    names, seen = {module: name for name, module in block.named_modules()}, {}

    def note(module, args, y):
        seen[names[module]] = args

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        with torch.no_grad():
            block.eval()(x)
    finally:
        handle.remove()
    assert called <= set(seen) and not one_kernel
    assert all(len(args) == 1 for name, args in seen.items() if "drop_path" not in name)


@pytest.mark.parametrize("name", ["attn", "attn.proj_drop", "norm2", "mlp"])
def test_a_forward_that_comes_after_compiling_counts(name, one_kernel, device):
    block, x = block_and_input("swin", device)
    torch._dynamo.reset()
    compiled = torch.compile(block.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(x)
        module = block.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args, **named: 3 * forward(*args, **named)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-2, atol=1e-2)
        assert name == "norm2" or not torch.allclose(compiled(x), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["attn", "norm2", "mlp"])
def test_hooks_in_a_swin_block_see_what_they_saw(name, one_kernel, device):
    """Attention and perceptron their own results, without the sum; the norm what it makes of it."""
    block, x = block_and_input("swin", device)
    with torch.no_grad():
        before, seen = block.eval()(x), []
        getattr(block, name).register_forward_hook(lambda module, args, y: seen.append((args, y)))
        after = block(x)
        torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
        if name == "mlp":
            ((args, y),) = seen
            assert len(args) == 1
            torch.testing.assert_close(y, block.mlp.fc2(F.gelu(block.mlp.fc1(args[0]))), rtol=1e-2, atol=1e-2)
        elif name == "attn":
            ((args, y),) = seen
            assert len(args) == 1 and not torch.equal(y, before)
