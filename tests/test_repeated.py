"""Ops in inference that repeat an earlier call: the same values as written, and as written where somebody looks on."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from interpreted_replays import repeat_interpreted
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import bbfast
from bbfast import dispatch, extension, ops
from bbfast.ops import _repeated
from bbfast.triton_kernels import replay

pytest.importorskip("triton")
HALF = torch.float16


@pytest.fixture(autouse=True)
def repeating(monkeypatch):
    if reason := extension.unavailable_reason():
        pytest.skip(reason)
    if not torch.cuda.is_available():
        repeat_interpreted(monkeypatch)


@pytest.fixture(autouse=True)
def on_gpu():
    """Tensors are made on the GPU if there is one, else on the CPU, where kernels are interpreted."""
    with torch.device("cuda") if torch.cuda.is_available() else contextlib.nullcontext():
        yield


def randn(*shape):
    return torch.randn(shape).to(HALF)


def maps(*shape):
    return randn(*shape).to(memory_format=torch.channels_last)


def statistics(channels):
    return [torch.rand(channels) + 0.5 for _ in range(4)]


def norm(channels):
    return {"norm_weight": randn(channels), "norm_bias": randn(channels), "norm_eps": 1e-5}


# By name: an op and what makes new arguments of one kind for it.
CALLS = {
    "depthwise": (
        ops.depthwise_conv_bn_act,
        lambda: ((maps(2, 16, 7, 6), randn(16, 1, 3, 3), *statistics(16)), {"padding": "same", "stride": 2}),
    ),
    "depthwise, squeeze": (
        ops.depthwise_conv_bn_act,
        lambda: ((maps(2, 16, 7, 6), randn(16, 1, 3, 3), *statistics(16)), {"padding": (1, 1), "squeeze": True}),
    ),
    "depthwise, no norm": (
        ops.depthwise_conv_bn_act,
        lambda: ((maps(2, 16, 7, 6), randn(16, 1, 7, 7), *[None] * 4), {"padding": 3, "bias": randn(16)}),
    ),
    "pointwise": (
        ops.conv_bn_act,
        lambda: ((maps(2, 16, 5, 6), randn(24, 16, 1, 1), *statistics(24)), {"act": "silu", "gate": randn(2, 16)}),
    ),
    "pointwise, residual": (
        ops.conv_bn_act,
        lambda: ((maps(2, 16, 5, 6), randn(24, 16, 1, 1), *statistics(24)), {"residual": maps(2, 24, 5, 6)}),
    ),
    "batch norm": (
        ops.batch_norm_act,
        lambda: ((maps(2, 16, 5, 6), *statistics(16)), {"residual": maps(2, 16, 5, 6)}),
    ),
    "batch norm of rows": (ops.batch_norm_act, lambda: ((randn(5, 16), *statistics(16)), {"act": "gelu"})),
    "linear": (ops.linear_act, lambda: ((randn(3, 5, 16), randn(24, 16), randn(24)), {"residual": randn(3, 5, 24)})),
    "perceptron": (
        ops.mlp,
        lambda: ((randn(3, 5, 16), randn(32, 16), randn(32), randn(16, 32), randn(16)), norm(16)),
    ),
    "attention": (
        ops.window_attention,
        lambda: ((randn(2, 14, 14, 96), randn(169, 2)), {"num_heads": 2, "window_size": 7, "shift_size": 3}),
    ),
    "sum and norm": (
        ops.add_layer_norm,
        lambda: ((randn(3, 5, 16), randn(3, 5, 16), randn(16), randn(16)), {"mask": torch.rand(3).to(HALF)}),
    ),
    "norm": (ops.add_layer_norm, lambda: ((randn(3, 5, 16), None, randn(16), randn(16)), {})),
    "drop path": (
        ops.drop_path_add,
        lambda: ((maps(3, 16, 5, 6), maps(3, 16, 5, 6)), {"layer_scale": randn(16), "mask": torch.rand(3).to(HALF)}),
    ),
}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def count_repetitions(monkeypatch) -> list:
    """A list that grows with each call that is repeated."""
    repeated, run = [], replay._Plan.__call__
    monkeypatch.setattr(replay._Plan, "__call__", lambda plan, args: (repeated.append(plan), run(plan, args))[1])
    return repeated


@pytest.mark.parametrize("name", CALLS)
def test_repeated_calls_return_what_written_ones_do(name, monkeypatch):
    op, make = CALLS[name]
    repeated = count_repetitions(monkeypatch)
    kept = []
    for call in range(5):
        args, kwargs = make()
        results = as_tuple(op(*args, **kwargs))
        kept.append(results)  # so that a result that is handed out twice would show
        assert len(repeated) == max(0, call - 1)
        with monkeypatch.context() as patch:
            patch.setattr(replay, "enabled", False)
            expected = as_tuple(op(*args, **kwargs))
        assert len(results) == len(expected)
        for result, wanted in zip(results, expected):
            assert torch.equal(result, wanted) and result.stride() == wanted.stride() and result.dtype == wanted.dtype
    addresses = [result.data_ptr() for results in kept for result in results]
    assert len(set(addresses)) == len(addresses)


MODELS = {
    "mobilenetv3_small_050": (24, {"features_only": True, "out_indices": (0, 1)}),
    "convnext_atto": (32, {"dims": (16, 32, 32, 32), "features_only": True, "out_indices": (0, 1)}),
    "resnet10t": (32, {}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "embed_dim": 32, "depths": (2,), "num_heads": (2,)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_repeat_their_calls(name, monkeypatch):
    size, kwargs = MODELS[name]
    model = bbfast.create_model(name, pretrained=False, **kwargs).eval()
    model = model.to(HALF).to(memory_format=torch.channels_last)
    repeated = count_repetitions(monkeypatch)
    with torch.inference_mode():
        for _ in range(3):
            x = maps(2, 3, size, size)
            y = model(x)
            for parameter in model.parameters():  # counts at once
                parameter.data.mul_(1.01)
        assert repeated
        y = model(x)
        monkeypatch.setattr(replay, "enabled", False)
        for result, wanted in zip(y, model(x), strict=True):
            assert torch.equal(result, wanted)


# ---- keys --------------------------------------------------------------------------------------------------


def key(*args, **kwargs):
    return _repeated._key(args, kwargs)


def test_keys_tell_calls_apart(monkeypatch):
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    wanted = key(x, y, None, 1e-5, "relu", (1, 1), eps=1.0)
    assert wanted == key(torch.randn(4, 6), torch.randn(4, 6), None, 1e-5, "relu", [1, 1], eps=1.0)
    keys = [
        key(x, x, None, 1e-5, "relu", (1, 1), eps=1.0),  # one tensor in two places
        key(x, y[:3], None, 1e-5, "relu", (1, 1), eps=1.0),
        key(x, y.double(), None, 1e-5, "relu", (1, 1), eps=1.0),
        key(x, torch.randn(6, 4).T, None, 1e-5, "relu", (1, 1), eps=1.0),
        key(x, torch.randn(25)[1:].view(4, 6), None, 1e-5, "relu", (1, 1), eps=1.0),  # not aligned
        key(x, y.view(4, 6, 1), None, 1e-5, "relu", (1, 1), eps=1.0),
        key(x, None, y, 1e-5, "relu", (1, 1), eps=1.0),
        key(x, y, None, 1e-6, "relu", (1, 1), eps=1.0),
        key(x, y, None, 1e-5, "gelu", (1, 1), eps=1.0),
        key(x, y, None, 1e-5, "relu", (1, 2), eps=1.0),
        key(x, y, None, 1e-5, "relu", (1, True), eps=1.0),
        key(x, y, None, 1e-5, "relu", (1, 1.0), eps=1.0),
        key(x, y, None, 1e-5, "relu", (1, 1), eps=1),
        key(x, y, None, 1e-5, "relu", (1, 1), eps=True),
        key(x, y, None, 1e-5, "relu", (1, 1), eps=None),
        key(x, y, None, 1e-5, "relu", (1, 1), eps=torch.float32),
        key(x, y, None, 1e-5, "relu", (1, 1), epsilon=1.0),
        key(x, y, None, 1e-5, "relu", (1, 1), 1.0),
        key(x, y, None, 1e-5, "relu", 1, 1, eps=1.0),
    ]
    with torch.autocast(x.device.type, torch.bfloat16):
        keys.append(key(x, y, None, 1e-5, "relu", (1, 1), eps=1.0))
    with torch.autocast(x.device.type, torch.float16):
        keys.append(key(x, y, None, 1e-5, "relu", (1, 1), eps=1.0))
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    keys.append(key(x, y, None, 1e-5, "relu", (1, 1), eps=1.0))
    assert None not in keys and len({wanted, *keys}) == 1 + len(keys)


def test_what_cannot_be_told_apart_has_no_key(monkeypatch):
    x = torch.randn(4, 6)

    class Other(torch.Tensor):
        pass

    others = (x.as_subclass(Other), object(), (x, x), {}, np.float64(1), torch.empty(0), x.to_sparse(), x.to("meta"))
    others += (torch._neg_view(x), torch.complex(x, y := torch.randn(4, 6)).conj().imag, torch.complex(x, y).conj())
    for other in others:
        assert key(x, other) is None and key(x, other=other) is None
    assert key(1, x) is None and key() is None
    assert key(x, torch.nn.Parameter(x)) is None  # wants a gradient
    with torch.no_grad():
        assert key(x, torch.nn.Parameter(x)) is not None
    with torch.inference_mode():
        assert key(x) == key(torch.nn.Parameter(torch.randn(4, 6))) != key(x, x)
    monkeypatch.setattr(extension, "load", lambda: None)
    assert key(x) is None


# ---- calls that run as written -----------------------------------------------------------------------------


def linear(x=None, **kwargs):
    return ops.linear_act(randn(3, 5, 8) if x is None else x, randn(24, 8), **kwargs)


@pytest.fixture
def remembered():
    """`linear` has been recorded."""
    for _ in range(3):
        linear()
    assert any(isinstance(plan, replay._Plan) for plan in ops.linear_act.plans.values())


@contextlib.contextmanager
def profiling():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


@pytest.mark.parametrize("watch", [profiling, lambda: FlopCounterMode(display=False), bbfast.exportable])
def test_calls_that_are_watched_run_as_written(watch, remembered, monkeypatch):
    repeated = count_repetitions(monkeypatch)
    with watch():
        linear()
    # The launcher inside may be repeated all the same.
    assert not any(plan is known for plan in repeated for known in ops.linear_act.plans.values())
    linear()
    assert repeated[-1] in ops.linear_act.plans.values()


def test_profilers_see_names_of_ops(remembered):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear()
    assert "bbfast::linear_act" in {event.key for event in profile.key_averages()}


def test_tracers_see_the_op(remembered):
    x = randn(3, 5, 8)
    graph = torch.fx.experimental.proxy_tensor.make_fx(linear)(x).graph
    assert torch.ops.bbfast.linear_act.default in [node.target for node in graph.nodes]


def test_transforms_are_not_repeated(remembered, monkeypatch):
    x, weight = randn(3, 5, 8), randn(24, 8)
    repeated = count_repetitions(monkeypatch)
    y = torch.func.vmap(lambda row: ops.linear_act(row, weight))(x)
    torch.testing.assert_close(y, ops.linear_act(x, weight), rtol=1e-2, atol=1e-2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(ops.linear_act(dual, weight)).tangent is not None
    assert len(repeated) == 1


def test_gradients_are_not_repeated(remembered, monkeypatch):
    repeated = count_repetitions(monkeypatch)
    assert linear(randn(3, 5, 8).requires_grad_()).requires_grad
    assert not repeated
    with torch.no_grad():
        linear(randn(3, 5, 8).requires_grad_())
    assert len(repeated) == 1


def test_autocast_and_backend_belong_to_the_kind(remembered, monkeypatch):
    repeated = count_repetitions(monkeypatch)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        assert linear().dtype == torch.bfloat16
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    for _ in range(4):
        linear()
        assert dispatch.last_choices()["linear_act"].backend == "torch"
    assert not repeated
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    monkeypatch.setenv("BBFAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="BBFAST_BACKEND"):
        linear()


def test_running_statistics_move_in_repeated_calls(monkeypatch):
    repeated = count_repetitions(monkeypatch)
    for _ in range(4):
        x, (weight, bias, mean, var) = maps(2, 16, 5, 6), statistics(16)
        expected = mean.clone(), var.clone()
        ops.batch_norm_act(x, weight, bias, mean, var, training=True)
        torch.nn.functional.batch_norm(x.float(), *expected, weight, bias, training=True)
        torch.testing.assert_close((mean, var), expected, rtol=1e-4, atol=1e-5)
    assert len(repeated) == 2


def test_choices_are_noted_again(remembered):
    dispatch.forget_choices()
    linear()
    assert dispatch.last_choices()["linear_act"] == dispatch.Choice("triton", ())


def test_bad_arguments_raise_each_time(remembered):
    for _ in range(4):
        with pytest.raises(TypeError, match="layout"):
            ops.linear_act(randn(3, 8), torch.randn(24, 8).to_sparse())
        with pytest.raises(ValueError, match="act='mish'"):
            linear(act="mish")
        with pytest.raises(TypeError, match="unexpected keyword"):
            linear(axis=1)
        with pytest.raises(ValueError, match="device"):
            ops.linear_act(randn(3, 8), torch.empty(24, 8, dtype=HALF, device="meta"))


def test_sizes_arguments_and_their_order_tell_kinds_apart(monkeypatch):
    x, weight = randn(3, 8), randn(8, 8)
    for _ in range(3):
        plain = ops.linear_act(x, weight, act="relu")
    scale, residual = randn(8), randn(3, 8)
    for _ in range(3):
        one = ops.linear_act(x, weight, act="relu", layer_scale=scale, residual=residual)
        other = ops.linear_act(x, weight, residual=residual, layer_scale=scale, act="relu")
        assert torch.equal(one, other) and not torch.equal(one, plain)
    same = [ops.linear_act(x, weight, residual=r) for r in (x, x, x, randn(3, 8), x)]
    assert torch.equal(same[0], same[4]) and not torch.equal(same[0], same[3])
