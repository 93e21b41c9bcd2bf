"""The short way to the CPU kernels: the same results as the long one, and taken only where nobody would notice."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bbfast import dispatch, extension, ops
from bbfast.ops import _cpp

CONV, DEPTHWISE = (importlib.import_module(f"bbfast.ops.{name}") for name in ("conv_bn_act", "depthwise_conv_bn_act"))


@pytest.fixture(autouse=True)
def extension_first(monkeypatch):
    if extension.load() is None:
        pytest.skip(extension.unavailable_reason())
    monkeypatch.setattr("bbfast.env.TRITON_INTERPRET", False)
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)


@pytest.fixture
def long_way(monkeypatch):
    """Counts the calls that went the long way, whose first step is a cast for autocast."""
    calls = []
    cast = CONV._common.to_autocast_dtype
    monkeypatch.setattr(CONV._common, "to_autocast_dtype", lambda *args: calls.append(1) or cast(*args))
    return calls


def arguments(depthwise: bool, **changes) -> dict:
    c, o = 12, 12 if depthwise else 20
    return {
        "x": torch.randn(2, c, 9, 6).contiguous(memory_format=torch.channels_last),
        "weight": torch.nn.Parameter(torch.randn(o, 1, 3, 3) if depthwise else torch.randn(o, c, 1, 1)),
        "bn_weight": torch.nn.Parameter(torch.randn(o)),
        "bn_bias": torch.randn(o),
        "running_mean": torch.randn(o),
        "running_var": torch.rand(o) + 0.5,
        **changes,
    }


def run(depthwise: bool, changes: dict):
    op = ops.depthwise_conv_bn_act if depthwise else ops.conv_bn_act
    return op(**arguments(depthwise, **changes))


POINTWISE_CALLS = [
    {},
    {"bias": torch.randn(20), "act": "silu", "eps": 1e-3},
    {"residual": torch.randn(2, 20, 9, 6).contiguous(memory_format=torch.channels_last), "stride": (1, 1)},
    {"bn_weight": None, "bn_bias": None, "running_mean": None, "running_var": None, "padding": (0, 0, 0, 0)},
    {"stride": (2, 3), "act": "gelu"},
]
GROUPED = {"weight": torch.nn.Parameter(torch.randn(20, 3, 3, 3)), "groups": 4}
GROUPED_CALLS = [
    {**GROUPED, "padding": (1, 1), "bias": torch.randn(20), "act": "silu"},
    {**GROUPED, "stride": (2, 1), "padding": (0, 1, 2, 1)},
    {**GROUPED, "padding": (1, 1), "residual": torch.randn(2, 20, 9, 6).contiguous(memory_format=torch.channels_last)},
]
WINOGRAD = {  # a 3x3 convolution that Winograd's transform makes quicker
    "x": torch.randn(2, 26, 9, 6).contiguous(memory_format=torch.channels_last),
    "weight": torch.nn.Parameter(torch.randn(30, 26, 3, 3)),
    **{name: torch.rand(30) + 0.5 for name in ("bn_weight", "bn_bias", "running_mean", "running_var")},
    "padding": (1, 1),
}
WINOGRAD_CALLS = [
    WINOGRAD,
    {**WINOGRAD, "bias": torch.randn(30), "act": "gelu", "padding": (0, 1, 2, 1)},
    {**WINOGRAD, "residual": torch.randn(2, 30, 9, 6).contiguous(memory_format=torch.channels_last)},
]
FEW_PIXELS = {**WINOGRAD, "x": torch.randn(2, 26, 4, 5).contiguous(memory_format=torch.channels_last)}
FEW_PIXELS_CALLS = [
    FEW_PIXELS,
    {**FEW_PIXELS, "bias": torch.randn(30), "act": "gelu", "stride": (2, 1), "padding": (0, 1, 2, 1)},
    {**FEW_PIXELS, "residual": torch.randn(2, 30, 4, 5).contiguous(memory_format=torch.channels_last)},
]
MANY_PIXELS = {**WINOGRAD, "x": torch.randn(2, 26, 40, 40).contiguous(memory_format=torch.channels_last)}
DEPTHWISE_CALLS = [
    {"stride": (1, 1), "dilation": (1, 1), "padding": (1, 1)},
    {"stride": (2, 1), "dilation": (1, 2), "padding": (0, 1, 3, 2), "act": "hardswish", "squeeze": True},
    {"stride": (2, 2), "dilation": (1, 1), "padding": (0, 0), "bias": torch.randn(12), "act": "gelu"},
    {
        **{"bn_weight": None, "bn_bias": None, "running_mean": None, "running_var": None},
        **{"bias": torch.randn(12), "act": "identity", "padding": (1, 1)},
    },
]
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("depthwise", "changes"),
    [(False, c) for c in POINTWISE_CALLS + GROUPED_CALLS + WINOGRAD_CALLS + FEW_PIXELS_CALLS]
    + [(True, c) for c in DEPTHWISE_CALLS],
)
def test_both_ways_agree(depthwise, changes, mode, long_way, monkeypatch):
    changes = {**PLAIN, **arguments(depthwise), **changes}
    with mode():
        short = run(depthwise, changes)
        assert not long_way, "the call went the long way"
        choices = dispatch.last_choices()
        monkeypatch.setattr(_cpp, "_may_take_short_way", lambda x: False)
        dispatch.forget_choices()
        long = run(depthwise, changes)
    assert len(long_way) == 1
    assert dispatch.last_choices() == choices
    for ours, theirs in zip(*(t if isinstance(t, tuple) else (t,) for t in (short, long)), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        assert not ours.requires_grad and ours.is_inference() == theirs.is_inference() and not ours._is_view()


OTHER_ARGUMENTS = [
    {"x": torch.randn(2, 12, 9, 6)},
    {"x": torch.randn(2, 12, 9, 6).as_subclass(type("Subclass", (torch.Tensor,), {}))},
    {"x": torch.randn(0, 12, 9, 6).contiguous(memory_format=torch.channels_last)},
    {"stride": 1},
    {"padding": "same"},
    {"padding": [0, 0]},
    {"eps": 0},
    {"training": True},
]


@pytest.mark.parametrize(
    ("depthwise", "changes"),
    [(depthwise, changes) for depthwise in (False, True) for changes in OTHER_ARGUMENTS]
    + [(False, {**MANY_PIXELS, **change}) for change in ({"dilation": (2, 2)}, {"padding": (3, 3)}, {"stride": (2, 2)})]
    + [(False, {"padding": (1, 1)}), (False, {**GROUPED, "dilation": (1, 2)})]
    + [(True, {"weight": torch.randn(24, 1, 3, 3)})],
)
def test_other_arguments_go_the_long_way(depthwise, changes, long_way):
    if depthwise and "weight" in changes:
        changes = {**changes, **dict.fromkeys(("bn_weight", "bn_bias", "running_mean", "running_var"))}
    with torch.no_grad():
        run(depthwise, {**PLAIN, **changes})
    assert len(long_way) >= 1


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"act": "mish"}, "act='mish'"),
        ({"stride": (True, 1)}, "stride"),
        ({"stride": (0, 1)}, "stride"),
        ({"padding": (-1, 0)}, "padding"),
        ({"running_var": None}, "running_mean and running_var"),
        ({"bn_bias": torch.randn(5)}, "bn_bias must have shape"),
        ({"bn_bias": torch.ones(1, dtype=torch.int64)}, "bn_bias has dtype torch.int64"),
        ({"weight": torch.randn(20, 5, 1, 1)}, "weight must have shape"),
        ({"weight": torch.randn(20, 12)}, "weight must have 4 dimensions"),
    ],
)
def test_wrong_arguments_are_named_as_ever(depthwise, changes, message):
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=message):
        run(depthwise, {**PLAIN, **changes})


class SeesDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("watch", [SeesDispatch, SeesFunctions])
def test_modes_see_the_op(watch, depthwise):
    with torch.no_grad(), watch() as mode:
        run(depthwise, PLAIN)
    assert any("conv_bn_act" in name for name in mode.seen)


@pytest.mark.parametrize("depthwise", [False, True])
def test_profiler_sees_the_op(depthwise):
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(depthwise, PLAIN)
    assert any(event.key.startswith("bbfast::") for event in profile.key_averages())


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    "around",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad, nullcontext],
    ids=["autocast", "gradients", "default"],
)
def test_autocast_and_gradients_go_the_long_way(around, depthwise, long_way):
    with around():
        y = run(depthwise, PLAIN)
    assert len(long_way) >= 1
    assert y.requires_grad


@pytest.mark.parametrize("depthwise", [False, True])
def test_fake_tensors_go_the_long_way(depthwise):
    with FakeTensorMode() as mode, torch.no_grad():
        y = run(depthwise, PLAIN)
    assert y.fake_mode is mode


@pytest.mark.parametrize("backend", ["torch", "onednn", "cpp"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_named_backends_go_the_long_way(depthwise, backend, long_way, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    with torch.no_grad():
        run(depthwise, PLAIN)
    assert len(long_way) >= 1
    assert {choice.backend for choice in dispatch.last_choices().values()} == {backend}
