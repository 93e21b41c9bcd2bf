"""depthwise_conv_bn_act: kernels, reference and layer against float64 and torch."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule, check_op, poison_new_empty

from bbfast import dispatch, env, extension, nn
from bbfast.ops import depthwise_conv_bn_act as op
from bbfast.reference.activation import ACTIVATIONS
from bbfast.reference.depthwise_conv_bn_act import depthwise_conv_bn_act as reference
from bbfast.triton_kernels import depthwise_conv_bn_act as kernels

HALF = [torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@dataclasses.dataclass
class Case:
    """One call; `run` makes random inputs and compares outputs, running statistics and all gradients."""

    shape: tuple
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: object = (1, 1, 1, 1)
    dilation: tuple = (1, 1)
    act: str = "hardswish"
    training: bool = True
    channels_last: bool = True
    squeeze: bool = False
    bias: bool = False
    batch_norm: bool = True
    dtype: torch.dtype = torch.float32
    momentum: float = 0.1

    def inputs(self, device):
        n, c, h, w = self.shape
        x = torch.randn(n, c, h, w, device=device)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        vectors = {
            "bn_weight": torch.rand(c, device=device) + 0.5,
            "bn_bias": torch.randn(c, device=device),
            "running_mean": torch.randn(c, device=device),
            "running_var": torch.rand(c, device=device) + 0.5,
        }
        weight = torch.randn(c, 1, *self.kernel, device=device).to(self.dtype)
        bias = torch.randn(c, device=device).to(self.dtype) if self.bias else None
        return x.to(self.dtype), weight, bias, vectors if self.batch_norm else dict.fromkeys(vectors)

    def call(self, function, x, weight, bias, vectors):
        return function(
            x,
            weight,
            **vectors,
            bias=bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            training=self.training,
            momentum=self.momentum,
            act=self.act,
            squeeze=self.squeeze,
        )

    def results(self, function, inputs, dtype, grads=None, change=lambda x: x):
        """Outputs and gradients in `dtype` (BatchNorm's vectors in float32 at least), and the gradients used."""
        x, weight, bias, vectors = inputs
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        vectors = {k: None if v is None else v.detach().to(wide, copy=True) for k, v in vectors.items()}
        for name in ("bn_weight", "bn_bias"):
            if vectors[name] is not None:
                vectors[name].requires_grad_()
        out = self.call(function, change(leaves[0]), leaves[1], leaves[2], vectors)
        out = out if self.squeeze else (out,)
        if grads is None:
            grads = [torch.randn_like(o) for o in out]
        torch.autograd.backward(out, [g.to(dtype) for g in grads])
        named = {"y": out[0], "squeeze": out[1] if self.squeeze else None}
        named |= {name: None if t is None else t.grad for name, t in zip(("dx", "dweight", "dbias"), leaves)}
        named |= {f"d{k}": None if v is None else v.grad for k, v in vectors.items() if k.startswith("bn")}
        named |= {k: v for k, v in vectors.items() if k.startswith("running")}
        return {k: v.detach() for k, v in named.items() if v is not None}, grads

    def run(self, device, change=lambda x: x, grads=None):
        inputs = self.inputs(device)
        ours, grads = self.results(op, inputs, self.dtype, grads, change)
        exact, _ = self.results(_plain_torch, inputs, torch.float64, grads, change)
        baseline, _ = self.results(_plain_torch, inputs, self.dtype, grads, change)
        rows = ours["y"].numel() // self.shape[1]
        if self.training and self.bias:  # rounding noise around zero in torch, exactly zero here
            assert ours.pop("dbias").abs().max() == 0
        for name, value in ours.items():
            summed = name in ("dweight", "dbias", "dbn_weight", "dbn_bias")
            # The old mean and the batch's may cancel, and so may values in a mean and the terms of a channel's sum.
            terms = {"running_mean": inputs[3]["running_mean"], "dbn_weight": grads[0], "dbn_bias": grads[0]}
            term = terms[name].abs().max().item() if name in terms and terms[name].numel() else 0
            if name == "running_mean" and value.numel():
                term = max(term, self.momentum * exact["running_var"].max().sqrt().item())
            assert_within_rule(name, value, exact[name], baseline[name], rows=rows if summed else 1, largest_term=term)
        return ours


def _plain_torch(
    x, weight, bn_weight, bn_bias, running_mean, running_var, *, bias, stride, padding, dilation, **config
):
    training, act = config["training"], config["act"]
    if padding == "same":
        sides = []
        for size, k, s, d in zip(x.shape[2:], weight.shape[2:], stride, dilation):
            total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            sides.append((total // 2, total - total // 2))
        padding = sides[0] + sides[1]
    top, bottom, left, right = padding
    z = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups=x.shape[1])
    if training or running_mean is not None:
        z = F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, training, config["momentum"], 1e-5)
    y = ACTIVATIONS[act](z)
    return (y, y.mean((2, 3))) if config["squeeze"] else y


@pytest.fixture
def on_kernels(monkeypatch):
    """Everything runs on the Triton kernels or fails, into poisoned outputs."""
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)


@pytest.fixture
def on_reference(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")


CASES = {
    "nhwc_k3_eval_bias_squeeze_odd_channels": Case((2, 21, 9, 10), training=False, bias=True, squeeze=True),
    "nhwc_k3_s2_same_train_squeeze_vectors": Case(
        (2, 16, 9, 8), stride=(2, 2), padding="same", act="silu", squeeze=True
    ),
    "nhwc_k5_s2_train_relu": Case((1, 8, 7, 9), (5, 5), (2, 2), (2, 2, 2, 2), act="relu", bias=True),
    "nhwc_k7_larger_than_map_frozen": Case((1, 8, 4, 5), (7, 7), padding=(3, 3, 3, 3), act="gelu", training=False),
    "nhwc_no_batch_norm_identity": Case((2, 9, 6, 5), act="identity", bias=True, batch_norm=False, training=False),
    "nhwc_k7_convolution_alone": Case(
        (1, 9, 3, 4), (7, 7), padding=(3, 3, 3, 3), act="identity", bias=True, batch_norm=False, training=False
    ),
    "nchw_k5_dilated_convolution_alone": Case(
        (1, 2, 5, 4), (5, 5), (1, 1), (4, 4, 4, 4), (2, 2), "identity", False, False, bias=True, batch_norm=False
    ),
    "nchw_k3_s2_asymmetric_train": Case((2, 3, 9, 11), stride=(2, 2), padding=(0, 1, 0, 1), channels_last=False),
    "nchw_5x3_dilated_frozen_bias": Case(
        (2, 3, 11, 9), (5, 3), (2, 1), (2, 1, 0, 3), (1, 2), "relu6", False, False, bias=True, squeeze=True
    ),
    "nchw_one_channel_one_image": Case((1, 1, 6, 7), act="relu6", channels_last=False),
    "nchw_k7_larger_than_map": Case((1, 2, 5, 4), (7, 7), padding=(3, 3, 3, 3), act="silu", channels_last=False),
    "even_kernel_stride_larger_than_kernel": Case((1, 5, 9, 9), (2, 2), (3, 3), (0, 0, 0, 0), act="gelu"),
    "momentum_0": Case((2, 4, 4, 4), momentum=0.0, act="relu"),
    "stride_3_dilation_3": Case((1, 8, 12, 13), stride=(3, 2), padding=(3, 3, 2, 2), dilation=(3, 2), act="identity"),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_against_float64(name, device, on_kernels):
    CASES[name].run(device)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("channels_last", [True, False])
def test_kernels_half_precision(dtype, channels_last, device, on_kernels):
    Case((2, 16, 7, 6), act="hardswish", squeeze=True, dtype=dtype, channels_last=channels_last).run(device)


@pytest.mark.parametrize(
    "channels_last, stride",
    [
        (True, 1),
        pytest.param(False, 2, marks=pytest.mark.slow),
        pytest.param(True, 2, marks=pytest.mark.slow),
        pytest.param(False, 1, marks=pytest.mark.slow),
    ],
)
def test_kernels_cut_into_many_programs(channels_last, stride, device, on_kernels, monkeypatch):
    """Several tiles along T, splits of S, channel tiles, image groups and row groups, all with tails."""
    choose = kernels.choose_config
    along_t, along_s = (5, 6) if stride == 1 else (6, 9)  # outputs: two tiles and two splits, the last ones not full

    def small(kernel, **shape):
        return dataclasses.replace(
            choose(kernel, **shape), block_t=4 // stride, block_c=16, tile_s=2 * stride, span=4, images=2, rows=2
        )

    monkeypatch.setattr(kernels, "choose_config", small)
    kernels.TUNABLE.forget()
    size = (along_t, along_s) if channels_last else (along_s, along_t)
    Case((3, 17, *size), stride=(stride, stride), squeeze=True, channels_last=channels_last).run(device)


@pytest.mark.parametrize(
    "change",
    {
        "channels": lambda x: x[:, 3:13],
        "rows_and_columns": lambda x: x[:, :, 1::2, ::2],
        "transposed": lambda x: x.transpose(2, 3),
        "batch": lambda x: x[::2],
    }.values(),
    ids=["channels", "rows_and_columns", "transposed", "batch"],
)
def test_kernels_take_slices_as_they_are(change, device, on_kernels):
    case = Case((3, 16, 8, 9), act="relu", training=False)
    x = change(case.inputs(device)[0])
    case.shape = (3, x.shape[1], 8, 9)
    whole = torch.randn(3, 16, 8, 9, device=device).to(memory_format=torch.channels_last)
    case.inputs = lambda device, make=case.inputs: (whole, *make(device)[1:])
    case.run(device, change=change)


def test_non_contiguous_gradients(device, on_kernels):
    case = Case((2, 8, 5, 6), squeeze=True)
    grad_y = torch.randn(1, 8, 1, 1, device=device).expand(2, 8, 5, 6)
    case.run(device, grads=[grad_y, torch.randn(8, 2, device=device).t()])
    case.run(device, grads=[torch.randn(2, 8, 6, 5, device=device).transpose(2, 3), torch.randn(2, 8, device=device)])


def test_only_the_squeeze_output_is_used(device, on_kernels):
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, device=device, requires_grad=True)
    statistics = (torch.zeros(4, device=device), torch.ones(4, device=device))
    squeezed = op(x, weight, None, None, *statistics, padding=1, squeeze=True)[1]
    grad = torch.randn_like(squeezed)
    ours = torch.autograd.grad(squeezed, (x, weight), grad)
    z = F.batch_norm(F.conv2d(x, weight, padding=1, groups=4), *statistics)
    for a, b in zip(ours, torch.autograd.grad(F.relu(z).mean((2, 3)), (x, weight), grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_at_their_kinks(act, device, on_kernels):
    """A 1x1 kernel of weight 1 without BatchNorm hands the kinks to the activation as they are."""
    points = torch.tensor([-6.5, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0, 7.5, float("nan")], device=device)
    x = points.view(1, 1, 2, 5).clone().requires_grad_()
    y = op(x, torch.ones(1, 1, 1, 1, device=device), None, None, None, None, act=act)
    expected = ACTIVATIONS[act](x)
    torch.testing.assert_close(y, expected, equal_nan=True)
    gradients = [torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (y, expected)]
    torch.testing.assert_close(gradients[0][..., :-1], gradients[1][..., :-1])


def test_large_mean_small_deviation(device, on_kernels):
    """E[x^2] - E[x]^2 in float32 would have no digit left."""
    x = (1e4 + torch.randn(4, 8, 6, 6, device=device)).to(memory_format=torch.channels_last)
    weight = torch.ones(8, 1, 1, 1, device=device)
    running_mean, running_var = torch.zeros(8, device=device), torch.ones(8, device=device)
    y = op(x, weight, None, None, running_mean, running_var, training=True, momentum=1.0, act="identity")
    exact = F.batch_norm(x.double(), None, None, training=True)
    assert (y.double() - exact).abs().max() < 2e-3  # the input itself carries 1e-3 of rounding
    torch.testing.assert_close(running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


def test_kernels_are_deterministic(device, on_kernels):
    case = Case((3, 8, 6, 7), squeeze=True, act="silu")
    inputs = case.inputs(device)
    first, grads = case.results(op, inputs, case.dtype)
    second, _ = case.results(op, inputs, case.dtype, grads)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("channels_last", [True, False])
def test_output_keeps_the_memory_format(channels_last, device):
    case = Case((2, 8, 6, 6), training=False, channels_last=channels_last)
    ours, _ = case.results(op, case.inputs(device), case.dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert ours["y"].is_contiguous(memory_format=layout)
    assert ours["dx"].is_contiguous(memory_format=layout)


def test_running_statistics_absent(device, on_kernels):
    """Without tracked statistics the batch's own normalise, and nothing is updated."""
    x, weight, _, _ = Case((2, 4, 5, 5)).inputs(device)
    y = op(x, weight, None, None, None, None, padding=1, training=True)
    torch.testing.assert_close(
        y,
        F.relu(F.batch_norm(F.conv2d(x, weight, padding=1, groups=4), None, None, training=True)),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training, device):
    x = torch.randn(0, 4, 5, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, device=device, requires_grad=True)
    mean, var = torch.full((4,), 2.0, device=device), torch.full((4,), 3.0, device=device)
    y, squeezed = op(x, weight, None, None, mean, var, training=training, squeeze=True, stride=2)
    assert y.shape == (0, 4, 2, 2) and squeezed.shape == (0, 4)
    (y.sum() + squeezed.sum()).backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))
    assert (mean == 2).all() and (var == 3).all()


def test_reference_gradcheck(device, on_reference):
    for training in (True, False):
        case = Case((2, 2, 4, 3), stride=(2, 1), padding=(0, 1, 2, 1), act="silu", training=training, squeeze=True)
        x, weight, _, vectors = case.inputs(device)
        vectors = {k: v.double() for k, v in vectors.items()}
        leaves = [t.double().requires_grad_() for t in (x, weight, vectors["bn_weight"], vectors["bn_bias"])]

        def call(x, weight, bn_weight, bn_bias, case=case, vectors=vectors):
            frozen = {k: vectors[k].clone() for k in ("running_mean", "running_var")}
            return case.call(op, x, weight, None, {"bn_weight": bn_weight, "bn_bias": bn_bias, **frozen})

        assert torch.autograd.gradcheck(call, leaves)


def test_reference_agrees_with_torch(device, on_reference):
    for name in ("nhwc_k3_s2_same_train_squeeze_vectors", "nchw_5x3_dilated_frozen_bias"):
        CASES[name].run(device)


ALONE = [
    Case((2, 24, 9, 10), (7, 7), padding=(3, 3, 3, 3), bias=True),
    Case((3, 9, 5, 4), (7, 7), padding=(3, 3, 3, 3), bias=False),
    Case((2, 16, 8, 7), (5, 5), padding=(4, 4, 4, 4), dilation=(2, 2), bias=True, squeeze=True),
    Case((2, 7, 8, 7), (3, 3), (2, 1), (0, 1, 2, 1), bias=True, channels_last=False),
]


@pytest.mark.filterwarnings("ignore:depthwise_conv_bn_act.* falls back")
@pytest.mark.parametrize("case", ALONE, ids=lambda case: f"{case.kernel[0]}x{case.kernel[1]}_{case.shape[1]}")
@pytest.mark.parametrize("backend", ["cpp", "onednn", "torch"])
def test_convolution_alone_on_the_cpu(backend, case, monkeypatch):
    """No BatchNorm and no activation, as ConvNeXt has it: result and gradients of input, weight and bias."""
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    case = dataclasses.replace(case, act="identity", batch_norm=False, training=False)
    ours = case.run("cpu")
    takes = {"cpp": case.channels_last and extension.load() is not None, "onednn": True, "torch": True}
    assert dispatch.last_choices()["depthwise_conv_bn_act"].backend == (backend if takes[backend] else "torch")
    assert ours.keys() == {"y", "dx", "dweight"} | ({"dbias"} if case.bias else set()) | (
        {"squeeze"} if case.squeeze else set()
    )


# By name: a gradient for an output of this shape.
GRADIENTS = {
    "nchw": lambda n, c, h, w: torch.randn(n, c, h, w),
    "nhwc": lambda n, c, h, w: torch.randn(n, h, w, c).permute(0, 3, 1, 2),
    "expanded": lambda n, c, h, w: torch.randn(1, c, 1, 1).expand(n, c, h, w),
    "transposed": lambda n, c, h, w: torch.randn(n, w, h, c).permute(0, 3, 2, 1),
    "slice": lambda n, c, h, w: torch.randn(n, h, w, c + 8).permute(0, 3, 1, 2)[:, 4:-4],
}


@pytest.mark.parametrize("make_grad", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("case", ALONE, ids=lambda case: f"{case.kernel[0]}x{case.kernel[1]}_{case.shape[1]}")
def test_backward_of_a_convolution_alone_does_not_convolve_again(case, make_grad, device, on_kernels, monkeypatch):
    case = dataclasses.replace(case, act="identity", batch_norm=False, training=False, squeeze=False)
    monkeypatch.setattr(kernels, "_conv_grad", None)  # not to be called
    y = case.call(op, *case.inputs(device))
    case.run(device, grads=[make_grad(*y.shape).to(device)])


def test_convolution_alone_under_autocast(on_reference):
    """As torch's conv2d: everything in half precision, gradients in the leaves' own."""
    x, weight, bias = torch.randn(2, 6, 8, 9), torch.randn(6, 1, 7, 7), torch.randn(6)
    leaves = [[t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2)]
    grad_out = torch.randn(2, 6, 8, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = op(leaves[0][0], leaves[0][1], *[None] * 4, bias=leaves[0][2], padding=3, act="identity")
        theirs = F.conv2d(*leaves[1], padding=3, groups=6)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    exact = F.conv2d(*(t.bfloat16().double() for t in (x, weight, bias)), padding=3, groups=6)
    assert_within_rule("y", ours, exact, theirs)
    for y in (ours, theirs):
        y.backward(grad_out)
    for mine, other in zip(*leaves):
        assert mine.grad.dtype == other.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, other.grad, rtol=0.05, atol=0.05 * other.grad.abs().max().item())


def test_channel_multiplier_runs_on_the_reference(device, monkeypatch):
    x, weight = torch.randn(2, 3, 6, 6, device=device), torch.randn(6, 1, 3, 3, device=device)
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    with pytest.warns(dispatch.FallbackWarning, match="channel multiplier 2"):
        y = op(x, weight, None, None, None, None, act="identity")
    torch.testing.assert_close(y, F.conv2d(x, weight, groups=3))
    assert dispatch.last_choices()["depthwise_conv_bn_act"].backend == "torch"
    monkeypatch.setenv("BBFAST_STRICT", "1")
    with pytest.raises(dispatch.BackendUnavailableError, match="channel multiplier 2"):
        op(x, weight, None, None, None, None)


def test_fallback_warns_once_per_reason(device, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    x = torch.randn(1, 3, 5, 5, device=device, dtype=torch.float64)
    weight = torch.randn(3, 1, 3, 3, device=device, dtype=torch.float64)
    with pytest.warns(dispatch.FallbackWarning, match="float64"):
        op(x, weight, None, None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(x, weight, None, None, None, None)


def test_unknown_environment_values_raise(device, monkeypatch):
    x, weight = torch.randn(1, 3, 5, 5, device=device), torch.randn(3, 1, 3, 3, device=device)
    monkeypatch.setenv("BBFAST_BACKEND", "tritan")
    with pytest.raises(ValueError, match=r"BBFAST_BACKEND='tritan'.*triton"):
        op(x, weight, None, None, None, None)
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    monkeypatch.setenv("BBFAST_STRICT", "yes")
    with pytest.raises(ValueError, match="BBFAST_STRICT='yes'"):
        op(x.double(), weight.double(), None, None, None, None)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(backend, permuted, device, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    x = (
        torch.randn(2, 6, 5, 3, device=device).permute(0, 3, 1, 2)
        if permuted
        else torch.randn(2, 3, 6, 5, device=device)
    )
    weight, bias = torch.randn(3, 1, 3, 3, device=device), torch.randn(3, device=device)
    vectors = [torch.rand(3, device=device) + 0.5 for _ in range(4)]
    geometry = ((2, 1), (1, 1, 0, 1), (1, 1))
    ops, traced = torch.ops.bbfast, backend == "torch"
    args = (x, weight, bias, *vectors, *geometry, 1e-5, "silu", True)
    check_op(ops.depthwise_conv_bn_act.default, args, traced=traced)
    args = (x, weight, None, *vectors, *geometry, 0.1, 1e-5, "relu", False)
    check_op(ops.depthwise_conv_bn_act_train.default, args, traced=traced)
    y = ops.depthwise_conv_bn_act(x, weight, bias, *vectors, *geometry, 1e-5, "silu", True)[0]
    tensors = (torch.randn_like(y), None, x, weight, bias, *vectors[:2], None, None, *vectors[2:])
    args = (*tensors, *geometry, False, 1e-5, "silu", True, False)
    check_op(ops.depthwise_conv_bn_act_backward.default, args, traced=traced)


@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph_dynamic(training, device, on_reference):
    layer = nn.DepthwiseConvBNAct(4, 3, stride=2, padding="same", act="hardswish", squeeze=True).to(device)
    layer.train(training)
    compiled_layer = copy.deepcopy(layer)
    compiled = torch.compile(compiled_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 4, 9, 8), (3, 4, 12, 7)):
        x = torch.randn(size, device=device)
        results = []
        for run, owner in ((layer, layer), (compiled, compiled_layer)):
            leaf = x.clone().requires_grad_()
            y, squeezed = run(leaf)
            (y.square().sum() + squeezed.sum()).backward()
            results.append([y, squeezed, leaf.grad, *(p.grad for p in owner.parameters()), *owner.buffers()])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def test_layer_counts_batches_as_batch_norm_does(device, on_reference):
    ours = nn.DepthwiseConvBNAct(4, momentum=None, act="identity").to(device)
    theirs = torch.nn.Sequential(copy.deepcopy(ours.conv), copy.deepcopy(ours.bn))
    theirs[0].padding = (1, 1)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5, device=device)
        torch.testing.assert_close(ours(x), theirs(x))
    for a, b in zip(ours.bn.buffers(), theirs[1].buffers()):
        torch.testing.assert_close(a, b)
    untracked = nn.DepthwiseConvBNAct(4).to(device).eval()
    untracked.bn.running_mean = untracked.bn.running_var = None
    x = torch.randn(2, 4, 5, 5, device=device)
    z = F.batch_norm(F.conv2d(x, untracked.conv.weight, padding=1, groups=4), None, None, training=True)
    torch.testing.assert_close(untracked(x), F.relu(z))


def test_layer_helper_refuses_what_it_would_compute_wrongly(device):
    bn, x = torch.nn.BatchNorm2d(4), torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        nn.apply_depthwise_conv_bn_act(
            torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), bn, x, act="relu"
        )
    with pytest.raises(ValueError, match="groups=2 for 4 channels"):
        nn.apply_depthwise_conv_bn_act(torch.nn.Conv2d(4, 4, 3, groups=2), bn, x, act="relu")


def test_synchronised_batch_norm_runs_unfused(device, monkeypatch):
    """Its statistics come from other processes, so it must be asked itself."""
    layer = nn.convert_sync_batchnorm(nn.DepthwiseConvBNAct(4, squeeze=True)).to(device)
    called = []
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", lambda bn, z: called.append(bn) or z)
    y, squeezed = layer(torch.randn(2, 4, 5, 5, device=device))
    assert called == [layer.bn]
    torch.testing.assert_close(squeezed, y.mean((2, 3)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_meta_tensors_and_traces(device, on_reference):
    layer = nn.DepthwiseConvBNAct(4, stride=2, padding="same", device="meta")
    y = layer(torch.empty(2, 4, 5, 5, device="meta", requires_grad=True))
    assert y.shape == (2, 4, 3, 3) and y.device.type == "meta"
    layer = nn.DepthwiseConvBNAct(4, stride=2, padding="same").eval()
    x = torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))


def test_autocast(device, on_reference):
    layer = nn.DepthwiseConvBNAct(4).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(torch.randn(2, 4, 5, 5, device=device))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.conv.weight.grad.dtype == torch.float32 and layer.bn.weight.grad.dtype == torch.float32


def test_twice_differentiating_raises(device, on_reference):
    x = torch.randn(1, 2, 4, 4, device=device, requires_grad=True)
    y = op(x, torch.randn(2, 1, 3, 3, device=device), None, None, None, None, act="silu")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_first_kernel_call_in_inference_mode():
    """The kernels are imported by their first call, wherever that is made."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    program = f"""
import torch, bbfast
with torch.inference_mode():
    x, weight = torch.randn(1, 2, 4, 4, device="{device}"), torch.randn(2, 1, 3, 3, device="{device}")
    bbfast.ops.depthwise_conv_bn_act(x, weight, None, None, None, None, act="hardswish")
assert bbfast.dispatch.last_choices()["depthwise_conv_bn_act"].backend == "triton"
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"BBFAST_BACKEND": "triton"})


def _bad(**changes):
    arguments = {
        "x": torch.randn(2, 4, 6, 6),
        "weight": torch.randn(4, 1, 3, 3),
        "bn_weight": None,
        "bn_bias": None,
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(x=torch.randn(4, 6, 6)), ValueError, r"x must have 4 dimensions \[N, C, H, W\]"),
        (_bad(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (_bad(x=torch.ones(2, 4, 6, 6, dtype=torch.int32)), TypeError, "x has dtype torch.int32"),
        (_bad(x=torch.randn(2, 5, 6, 6)), ValueError, r"weight must have shape .* C=5"),
        (_bad(x=torch.randn(2, 0, 6, 6)), ValueError, "x has no channels"),
        (_bad(weight=torch.randn(4, 2, 3, 3)), ValueError, "weight must have shape"),
        (_bad(weight=torch.randn(4, 1, 3, 3).half()), TypeError, "weight has dtype torch.float16 but x has"),
        (_bad(weight=torch.empty(4, 1, 3, 3, device="meta")), ValueError, "weight is on meta but x is on cpu"),
        (_bad(bn_weight=torch.ones(3)), ValueError, r"bn_weight must have shape \(4,\)"),
        (_bad(bias=torch.ones(5)), ValueError, r"bias must have shape \(4,\)"),
        (_bad(running_var=None), ValueError, "running_mean and running_var must both"),
        (_bad(running_mean=None, running_var=None, bn_bias=torch.ones(4)), ValueError, "needs running_mean"),
        (_bad(act="swish"), ValueError, "act='swish' is not known; allowed: identity, relu"),
        (_bad(act=None), TypeError, "act must be a string"),
        (_bad(momentum=float("nan")), ValueError, "momentum=nan"),
        (_bad(momentum=None), TypeError, "momentum=None"),
        (_bad(momentum="0.1"), TypeError, "momentum must be a float"),
        (_bad(eps=-1.0), ValueError, "eps=-1.0"),
        (_bad(stride=0), ValueError, "stride=0"),
        (_bad(stride=(1, 2, 3)), ValueError, "stride must be an int or two ints"),
        (_bad(stride=1.5), TypeError, "stride must be an int or two ints"),
        (_bad(dilation=True), TypeError, "dilation must be an int"),
        (_bad(padding=-1), ValueError, "padding=-1"),
        (_bad(padding="full"), ValueError, "padding='full' is not known"),
        (_bad(padding=(1, 1, 1, -1)), ValueError, "padding"),
        (_bad(dilation=4), ValueError, "the kernel spans 9 pixels along H"),
        (_bad(training=1), TypeError, "training must be a bool"),
        (_bad(squeeze=1), TypeError, "squeeze must be a bool"),
        (_bad(x=torch.randn(1, 4, 3, 3), training=True), ValueError, "more than 1 value per channel"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, message):
    before = [t.clone() for t in (arguments["running_mean"], arguments["running_var"]) if t is not None]
    with pytest.raises(error, match=message):
        op(**arguments)
    for saved, now in zip(before, (arguments["running_mean"], arguments["running_var"])):
        assert now is None or torch.equal(saved, now)


def test_reference_has_the_ops_signature_order():
    """The op hands its arguments to the reference by position."""
    names = list(inspect.signature(reference).parameters)
    assert names[:7] == ["x", "weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var"]
    assert names[7:] == ["stride", "padding", "dilation", "training", "momentum", "eps", "act", "squeeze"]


# ---- vectors of any strides ----------------------------------------------------------------------------------


def strided(vector: torch.Tensor) -> torch.Tensor:
    return torch.stack([vector, torch.full_like(vector, math.nan)], dim=1)[:, 0]


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("training, batch_norm", [(False, True), (True, True), (False, False)])
def test_vectors_of_any_strides(backend, training, batch_norm, monkeypatch, device):
    if backend == "auto":  # the CPU's own kernels
        monkeypatch.setattr(env, "TRITON_INTERPRET", False)
    elif missing := dispatch.triton_unavailable_reasons(torch.zeros(1, device=device)):
        pytest.skip("; ".join(missing))
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    x, weight, bias, vectors = Case((2, 8, 5, 6), bias=True, batch_norm=batch_norm, channels_last=False).inputs(device)

    def run(change, needs_grad):
        leaves = [change(t).detach().requires_grad_(needs_grad) for t in (weight.flatten(), bias)]
        leaves += [change(vectors[k]).detach().requires_grad_(needs_grad) for k in vectors if batch_norm and "bn" in k]
        w, b, *affine = leaves
        running = [change(vectors[k].clone()) if batch_norm else None for k in ("running_mean", "running_var")]
        y = op(x, w.view(weight.shape), *(affine or (None, None)), *running, bias=b, padding=1, training=training)
        return y, torch.autograd.grad(y.square().sum(), leaves) if needs_grad else [], running

    for needs_grad in (False, True):
        found, expected = run(strided, needs_grad), run(lambda t: t, needs_grad)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
