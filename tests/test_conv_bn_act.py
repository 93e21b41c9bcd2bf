"""conv_bn_act against float64: the CPU kernel, the composition, the layer, squeeze-and-excite."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule
from torch import nn

from bbfast import dispatch, extension
from bbfast.nn import (
    ConvBNAct,
    SyncBatchNormAct2d,
    apply_conv_bn_act,
    apply_squeeze_excite,
    to_inference_layout,
)
from bbfast.ops import _onednn, conv_bn_act, depthwise_conv_bn_act
from bbfast.reference.activation import ACTIVATIONS
from bbfast.reference.conv_bn_act import conv_bn_act as reference

needs_onednn = pytest.mark.skipif(
    bool(_onednn.unsupported_reasons(torch.zeros(1))), reason="this torch has no oneDNN convolution"
)


needs_extension = pytest.mark.skipif(extension.load() is None, reason="bbfast._C was not built")


def force(monkeypatch, backend: str) -> str:
    """One kernel backend, and no silent way around it."""
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    monkeypatch.setenv("BBFAST_STRICT", "1")
    return backend


@pytest.fixture
def backend(monkeypatch) -> str:
    return force(monkeypatch, "onednn")


def batch_norm_tensors(channels: int) -> list[torch.Tensor]:
    """Weight, bias, running mean, running variance."""
    return [
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.randn(channels),
        torch.rand(channels) + 0.3,
    ]


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """`x` [N, C, H, W] in different places in memory."""
    n, c, h, w = x.shape
    wide = torch.full((n + 1, c + 3, h + 2, w + 4), float("nan"))
    nhwc = wide.contiguous(memory_format=torch.channels_last)
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[1:, 1 : c + 1, 2:, 1 : w + 1].copy_(x),
        "sliced_channels_last": nhwc[1:, 2 : c + 2, :h, 3 : w + 3].copy_(x),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


def expect(y, x, weight, bias, bn, residual, stride, padding, dilation, groups, eps, act, name="y"):
    tail = (stride, padding, dilation, groups, False, 0.1, eps, act)
    tensors = (x, weight, bias, *bn, residual)
    exact = reference(*[t if t is None else t.double() for t in tensors], *tail)
    assert_within_rule(name, y, exact, reference(*tensors, *tail))


# (N, C, O, H, W, kernel, stride, padding, dilation, groups). None gives so few outputs that torch is exact by luck.
SHAPES = [
    (2, 16, 24, 7, 7, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (1, 3, 16, 33, 29, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    (2, 3, 5, 10, 9, (3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1),
    (3, 13, 7, 5, 6, (1, 1), (2, 1), (0, 0, 0, 0), (1, 1), 1),
    (2, 12, 18, 9, 11, (3, 5), (1, 2), (2, 1, 0, 3), (2, 1), 3),
    (2, 9, 9, 8, 13, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 9),
    (4, 40, 10, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (4, 1, 1, 14, 13, (2, 2), (1, 1), (0, 1, 0, 1), (1, 1), 1),
    (30, 6, 6, 2, 2, (5, 5), (2, 2), (2, 2, 2, 2), (1, 1), 2),
    (0, 8, 4, 6, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
]


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias, has_bn, has_residual", list(itertools.product((False, True), repeat=3)))
def test_kernel(shape, has_bias, has_bn, has_residual, backend):
    n, c, o, h, w, kernel, stride, padding, dilation, groups = shape
    source = torch.randn(n, c, h, w)
    weight = torch.randn(o, c // groups, *kernel)
    bias = torch.randn(o) if has_bias else None
    bn = batch_norm_tensors(o) if has_bn else [None] * 4
    for act, (layout, x) in zip(itertools.cycle(ACTIVATIONS), layouts(source).items()):
        geometry = (stride, padding, dilation, groups)
        plain = reference(x, weight, None, *[None] * 4, None, *geometry, False, 0.1, 1e-5, "identity")
        residual = layouts(torch.randn(plain.shape))[layout] if has_residual else None
        y = conv_bn_act(
            x, weight, *bn, bias=bias, residual=residual, stride=stride, padding=padding, dilation=dilation,
            groups=groups, act=act, eps=1e-3,
        )  # fmt: skip
        expect(y, x, weight, bias, bn, residual, *geometry, 1e-3, act, f"{layout} {act}")
        wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        if "sliced" not in layout and layout != "transposed" and n > 0:
            assert y.is_contiguous(memory_format=wanted)
        if n > 0:
            assert dispatch.last_choices()["conv_bn_act"].backend == backend


# (N, C, O, H, W): panels of 16 and 8 outputs and what hangs over them, tiles of 6, 2 and 1 pixels and fewer.
POINTWISE_SHAPES = [
    (2, 16, 24, 7, 7),
    (1, 13, 37, 5, 6),
    (80, 2, 1, 3, 1),
    (60, 5, 3, 1, 2),
    (1, 64, 90, 1, 3),
    (1, 30, 40, 31, 33),
    (2, 300, 16, 6, 5),
    (0, 8, 4, 6, 6),
]


@needs_extension
@pytest.mark.parametrize("shape", POINTWISE_SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("has_bias, has_bn, has_residual", list(itertools.product((False, True), repeat=3)))
def test_pointwise_extension(shape, act, has_bias, has_bn, has_residual, monkeypatch):
    force(monkeypatch, "cpp")
    n, c, o, h, w = shape
    x = (4 * torch.randn(n, c, h, w)).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c, o, 1, 1).transpose(0, 1) / c**0.5  # weights may lie anyhow
    bias = torch.randn(o) if has_bias else None
    bn = batch_norm_tensors(o) if has_bn else [None] * 4
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    residuals = layouts(torch.randn(n, o, h, w)).values() if has_residual else [None]
    for residual in residuals:
        y = conv_bn_act(x, weight, *bn, bias=bias, residual=residual, act=act)
        expect(y, x, weight, bias, bn, residual, *geometry, 1e-5, act)
        if n > 0:
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert dispatch.last_choices()["conv_bn_act"].backend == "cpp"


@needs_extension
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3), (3, 2)])
def test_pointwise_extension_takes_strides_and_slices(stride, monkeypatch):
    force(monkeypatch, "cpp")
    weight, bn = torch.randn(9, 8, 1, 1), batch_norm_tensors(9)
    for layout in ("channels_last", "sliced_channels_last"):
        x = layouts(torch.randn(3, 8, 15, 14))[layout]
        y = conv_bn_act(x, weight, *bn, stride=stride, act="gelu")
        expect(y, x, weight, None, bn, None, stride, (0, 0, 0, 0), (1, 1), 1, 1e-5, "gelu", layout)
        residual = layouts(torch.randn(y.shape))[layout]
        y = conv_bn_act(x, weight, *bn, stride=stride, residual=residual)
        expect(y, x, weight, None, bn, residual, stride, (0, 0, 0, 0), (1, 1), 1, 1e-5, "relu", layout)


# (N, groups, input and output channels of each, H, W, stride, padding): panels of one, two and three vectors and what
# hangs over them, quads in wide and in narrow vectors, tiles of every size, columns that taps leave out.
GROUPED_SHAPES = [
    (2, 3, 24, 24, 7, 9, (1, 1), (1, 1, 1, 1)),
    (1, 2, 24, 24, 11, 19, (2, 2), (1, 1, 1, 1)),
    (2, 5, 8, 8, 13, 15, (2, 2), (1, 1, 1, 1)),
    (1, 2, 8, 8, 3, 37, (1, 1), (0, 0, 0, 0)),
    (1, 2, 16, 16, 22, 23, (1, 1), (1, 1, 1, 1)),
    (3, 7, 4, 4, 6, 5, (1, 1), (1, 1, 1, 1)),
    (1, 6, 4, 4, 9, 31, (2, 2), (1, 1, 1, 1)),
    (4, 2, 16, 16, 1, 10, (1, 1), (1, 1, 1, 1)),
    (4, 2, 40, 40, 10, 1, (1, 1), (1, 1, 1, 1)),
    (1, 2, 32, 32, 9, 6, (1, 2), (2, 0, 0, 2)),
    (2, 3, 12, 12, 8, 7, (1, 1), (2, 2, 2, 2)),
    (2, 3, 6, 10, 9, 8, (2, 1), (0, 1, 2, 2)),
    (1, 2, 3, 56, 4, 5, (1, 1), (1, 1, 1, 1)),
    (6, 2, 8, 8, 3, 2, (1, 1), (2, 2, 2, 2)),
    (6, 4, 4, 8, 2, 2, (3, 3), (5, 4, 4, 5)),
    (1, 10, 24, 24, 50, 28, (1, 1), (1, 1, 1, 1)),
    (0, 2, 8, 8, 5, 5, (1, 1), (1, 1, 1, 1)),
]


@needs_extension
@pytest.mark.parametrize("shape", GROUPED_SHAPES, ids=str)
@pytest.mark.parametrize("has_bias, has_bn, has_residual", list(itertools.product((False, True), repeat=3)))
def test_grouped_extension(shape, has_bias, has_bn, has_residual, monkeypatch):
    force(monkeypatch, "cpp")
    n, groups, depth, width, h, w, stride, padding = shape
    c, o = groups * depth, groups * width
    weight = torch.randn(o, depth, 3, 3) / depth**0.5
    weights = [weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT]
    bias = torch.randn(o) if has_bias else None
    bn = batch_norm_tensors(o) if has_bn else [None] * 4
    geometry = (stride, padding, (1, 1), groups)
    maps = layouts(2 * torch.randn(n, c, h, w))
    acts = iter(ACTIVATIONS)
    for layout in ("channels_last", "sliced_channels_last"):
        x = maps[layout]
        plain = reference(x, weight, None, *[None] * 4, None, *geometry, False, 0.1, 1e-5, "identity")
        residuals = layouts(torch.randn(plain.shape)).values() if has_residual else itertools.repeat(None)
        for weight, residual in zip(weights, residuals):
            act = next(acts)
            y = conv_bn_act(
                x, weight, *bn, bias=bias, residual=residual, stride=stride, padding=padding, groups=groups, act=act
            )
            expect(y, x, weight, bias, bn, residual, *geometry, 1e-5, act, f"{layout} {act}")
            if n > 0:
                assert y.is_contiguous(memory_format=torch.channels_last)
                assert dispatch.last_choices()["conv_bn_act"].backend == "cpp"


@needs_extension
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("width", [4, 8, 13, 24])
@pytest.mark.parametrize("has_residual", [False, True])
def test_grouped_extension_knows_every_activation(act, width, has_residual, monkeypatch):
    force(monkeypatch, "cpp")
    x = torch.randn(2, 3 * width, 7, 11).contiguous(memory_format=torch.channels_last)
    weight, bn = torch.randn(3 * width, width, 3, 3) / width**0.5, batch_norm_tensors(3 * width)
    residual = torch.randn_like(x) if has_residual else None
    y = conv_bn_act(x, weight, *bn, padding=1, groups=3, act=act, residual=residual)
    expect(y, x, weight, None, bn, residual, (1, 1), (1, 1, 1, 1), (1, 1), 3, 1e-5, act)


@needs_extension
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 2), (3, 10)])
def test_extension_does_not_depend_on_threads(batch, kernel, groups, monkeypatch):
    force(monkeypatch, "cpp")
    x = torch.randn(batch, 40, 25, 36).contiguous(memory_format=torch.channels_last)
    weight, bn = torch.randn(40, 40 // groups, kernel, kernel), batch_norm_tensors(40)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(conv_bn_act(x, weight, *bn, groups=groups, padding=kernel // 2, act="silu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_extension
@pytest.mark.parametrize(
    "reason, changes",
    [
        ("not pointwise", {"padding": (0, 0, 0, 1)}),
        ("not 3x3", {"groups": 2, "weight": torch.zeros(6, 2, 1, 1)}),
        ("not 3x3", {"groups": 2, "weight": torch.zeros(6, 2, 3, 1)}),
        ("not 3x3 without dilation", {"groups": 2, "weight": torch.zeros(6, 2, 3, 3), "dilation": (1, 2)}),
        ("channels per group", {"groups": 4, "weight": torch.zeros(8, 1, 3, 3)}),
        ("not pointwise", {"weight": torch.zeros(6, 4, 1, 3)}),
        ("not channels_last", {"x": torch.zeros(2, 4, 5, 5)}),
    ],
)
def test_pointwise_extension_says_why_not(reason, changes, monkeypatch):
    force(monkeypatch, "cpp")
    x = torch.zeros(2, 5, 5, 4).permute(0, 3, 1, 2)
    arguments = {"x": x, "weight": torch.zeros(6, 4, 1, 1), **changes}
    channels = arguments["weight"].shape[0]
    bn = dict(zip(("bn_weight", "bn_bias", "running_mean", "running_var"), batch_norm_tensors(channels)))
    with pytest.raises(dispatch.BackendUnavailableError, match=reason):
        conv_bn_act(**arguments, **bn)


# (N, C, O, H, W, padding): tiles that hang over odd edges, one row or column, edges on all sides of a tile, channels
# that no vector divides, panels of two vectors and of one, more than one group of panels, more than one chain.
WINOGRAD_SHAPES = [
    (2, 16, 24, 7, 7, (1, 1, 1, 1)),
    (1, 13, 37, 10, 9, (0, 0, 0, 0)),
    (30, 5, 3, 1, 2, (1, 1, 1, 1)),
    (2, 24, 40, 1, 21, (1, 1, 0, 0)),
    (3, 30, 8, 20, 1, (0, 2, 1, 1)),
    (1, 64, 90, 12, 15, (2, 0, 1, 2)),
    (1, 530, 16, 9, 6, (1, 1, 1, 1)),
    (2, 9, 150, 14, 14, (1, 0, 0, 1)),
    (6, 2, 4, 3, 3, (0, 0, 0, 0)),
    (0, 8, 4, 6, 6, (1, 1, 1, 1)),
]


@needs_extension
@pytest.mark.parametrize("shape", WINOGRAD_SHAPES, ids=str)
@pytest.mark.parametrize("has_bias, has_bn, has_residual", list(itertools.product((False, True), repeat=3)))
def test_winograd(shape, has_bias, has_bn, has_residual, monkeypatch):
    force(monkeypatch, "cpp")
    n, c, o, h, w, padding = shape
    source = torch.randn(n, c, h, w) + 2 * torch.rand(1)
    dense = torch.randn(o, c, 3, 3) / (3 * c**0.5)
    weights = [dense, dense.contiguous(memory_format=torch.channels_last), dense.mT.contiguous().mT]
    bias = torch.randn(o) if has_bias else None
    bn = batch_norm_tensors(o) if has_bn else [None] * 4
    geometry = ((1, 1), padding, (1, 1), 1)
    size = (n, o, h + padding[0] + padding[1] - 2, w + padding[2] + padding[3] - 2)
    residuals = itertools.cycle(layouts(torch.randn(size)).values() if has_residual else [None])
    maps = [layout for name, layout in layouts(source).items() if "channels_last" in name]
    for act, x, weight, residual in zip(ACTIVATIONS, itertools.cycle(maps), itertools.cycle(weights), residuals):
        y = conv_bn_act(x, weight, *bn, bias=bias, residual=residual, padding=padding, act=act)
        expect(y, x, weight, bias, bn, residual, *geometry, 1e-5, act, act)
        if n > 0:
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert dispatch.last_choices()["conv_bn_act"].backend == "cpp"


@needs_extension
@pytest.mark.parametrize("mean, weight_mean", [(0, 0), (30, 0), (0, 1), (-5, 2)])
@pytest.mark.parametrize("channels, size", [(32, 28), (128, 14), (512, 7)])
def test_winograd_rounds_no_worse_than_the_rule(channels, size, mean, weight_mean, monkeypatch):
    force(monkeypatch, "cpp")
    x = (torch.randn(2, channels, size, size) + mean).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(64, channels, 3, 3) + weight_mean) / (3 * channels**0.5)
    y = conv_bn_act(x, weight, *[None] * 4, padding=1, act="identity")
    expect(y, x, weight, None, [None] * 4, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, 1e-5, "identity")


@needs_extension
@pytest.mark.parametrize("tiles", [1, 30])
def test_winograd_does_not_depend_on_threads(tiles, monkeypatch):
    force(monkeypatch, "cpp")
    x = torch.randn(tiles, 20, 2, 2).contiguous(memory_format=torch.channels_last)
    weight, bn = torch.randn(40, 20, 3, 3), batch_norm_tensors(40)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(conv_bn_act(x, weight, *bn, padding=1, act="silu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_extension
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 2, 2, 0)])
@pytest.mark.parametrize("act", ["identity", "gelu"])
def test_winograd_keeps_what_is_not_finite_in_its_window(value, padding, act, monkeypatch):
    """3e38 is finite, but not when two are added, as the transform does."""
    force(monkeypatch, "cpp")
    clean = torch.randn(3, 26, 7, 8).contiguous(memory_format=torch.channels_last)
    x, weight, bn = clean.clone(), torch.randn(37, 26, 3, 3), batch_norm_tensors(37)
    x[1, 5, 4:7, 3] = value
    weight[:, 5] *= 1e-3
    residual = torch.randn(3, 37, 7, 8).contiguous(memory_format=torch.channels_last)
    y, before = (conv_bn_act(m, weight, *bn, residual=residual, padding=padding, act=act) for m in (x, clean))
    tensors = (x, weight, None, *bn, residual)
    settings = ((1, 1), padding, (1, 1), 1, False, 0.1, 1e-5, act)
    torch_y = reference(*tensors, *settings)
    assert torch.equal(y.isnan(), torch_y.isnan()) and torch.equal(y.isinf(), torch_y.isinf())
    exact = reference(*[t if t is None else t.double() for t in tensors], *settings)
    finite = torch_y.isfinite()
    small = finite & (exact.abs() < 1e6)
    assert not finite.all() or value == 3e38
    assert_within_rule("small", y[small], exact[small], torch_y[small])
    assert_within_rule("finite", y[finite], exact[finite], torch_y[finite])
    for sample in (0, 2):
        assert torch.equal(y[sample], before[sample])


@needs_extension
@pytest.mark.parametrize(
    "reason, changes",
    [
        ("does not have stride 1", {"stride": 2}),
        ("does not have stride 1", {"dilation": (1, 2)}),
        ("does not have stride 1", {"padding": (3, 0, 0, 0)}),
        ("not channels_last", {"x": torch.zeros(2, 4, 5, 5)}),
    ],
)
def test_winograd_says_why_not(reason, changes, monkeypatch):
    force(monkeypatch, "cpp")
    x = torch.zeros(2, 5, 5, 4).permute(0, 3, 1, 2)
    arguments = {"x": x, "weight": torch.zeros(6, 4, 3, 3), **changes}
    bn = dict(zip(("bn_weight", "bn_bias", "running_mean", "running_var"), batch_norm_tensors(6)))
    with pytest.raises(dispatch.BackendUnavailableError, match=reason):
        conv_bn_act(**arguments, **bn)


@needs_extension
@needs_onednn
@pytest.mark.parametrize(
    "channels, out_channels, batch, size, backend",
    [
        (24, 24, 8, 3, "cpp"),
        (16, 64, 8, 8, "onednn"),
        (64, 16, 8, 8, "onednn"),
    ],
)
def test_winograd_runs_where_it_pays(channels, out_channels, batch, size, backend, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    weight, bn = torch.randn(out_channels, channels, 3, 3) / (3 * channels**0.5), batch_norm_tensors(out_channels)
    with torch.no_grad():
        y = conv_bn_act(x, weight, *bn, padding=1)
    expect(y, x, weight, None, bn, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, 1e-5, "relu")
    choice = dispatch.last_choices()["conv_bn_act"]
    assert choice.backend == backend
    assert backend == "cpp" or any("to gain from Winograd" in reason for reason in choice.reasons)


# x, weight, and what else decides: many values for few pixels, in each of the ways that would prepare the weight
FEW_PIXELS = {
    "instead of Winograd": ((1, 40, 6, 7), (37, 40, 3, 3), {"padding": 1}),
    "one pixel": ((2, 24, 1, 1), (30, 24, 3, 3), {"padding": 1}),
    "pointwise": ((2, 512, 2, 3), (520, 512, 1, 1), {}),
    "pointwise with a stride": ((1, 512, 5, 4), (513, 512, 1, 1), {"stride": (2, 1)}),
    "stem": ((1, 3, 32, 32), (21, 3, 7, 7), {"stride": 2, "padding": 3}),
    "dilation": ((2, 5, 9, 8), (6, 5, 3, 2), {"dilation": (2, 3), "padding": (0, 2, 3, 1), "stride": (1, 2)}),
}


@needs_extension
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("case", FEW_PIXELS)
def test_few_pixels(case, act, weight_format, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    monkeypatch.setattr("bbfast.env.TRITON_INTERPRET", False)
    shape, weight_shape, keywords = FEW_PIXELS[case]
    weight = (torch.randn(weight_shape) / weight_shape[1]).contiguous(memory_format=weight_format)
    stride, dilation = (keywords.get(name, 1) for name in ("stride", "dilation"))
    stride, dilation = ((v, v) if isinstance(v, int) else v for v in (stride, dilation))
    padding = keywords.get("padding", 0)
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    channels = weight_shape[0]
    for layout, x in layouts(torch.randn(shape)).items():
        if "channels_last" not in layout or x.stride(3) == 1:  # one pixel: either format
            continue
        for bn, bias, has_residual in (
            (batch_norm_tensors(channels), None, True),
            (batch_norm_tensors(channels), torch.randn(channels), False),
            ([None] * 4, torch.randn(channels), False),
        ):
            with torch.no_grad():
                plain = reference(x, weight, bias, *bn, None, stride, padding, dilation, 1, False, 0.1, 1e-5, act)
                residual = torch.randn(plain.shape) if has_residual else None
                y = conv_bn_act(x, weight, *bn, bias=bias, act=act, residual=residual, **keywords)
            expect(y, x, weight, bias, bn, residual, stride, padding, dilation, 1, 1e-5, act, f"{layout} {act}")
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert dispatch.last_choices()["conv_bn_act"].backend == "cpp"


@needs_extension
@pytest.mark.parametrize(
    "shape, weight_shape, stride, padding, pays",
    [
        ((1, 512, 4, 4), (512, 512, 1, 1), 1, 0, True),
        ((1, 512, 4, 5), (512, 512, 1, 1), 1, 0, False),  # more pixels share a packed weight
        ((1, 512, 1, 1), (511, 512, 1, 1), 1, 0, False),  # quickly packed
        ((1, 64, 6, 8), (64, 64, 3, 3), 1, 1, True),
        ((1, 64, 7, 7), (64, 64, 3, 3), 1, 1, False),  # more pixels share a transformed weight
        ((4, 128, 8, 8), (64, 128, 3, 3), 2, 1, True),  # as many pixels as output channels
        ((4, 128, 8, 10), (64, 128, 3, 3), 2, 1, False),
        ((1, 3, 64, 64), (16, 3, 3, 3), 2, 1, True),  # small patches
        ((1, 3, 112, 112), (16, 3, 3, 3), 2, 1, False),
        ((1, 4, 2, 2), (4, 4, 3, 3), 1, 0, False),  # no room for the weight
        ((1, 4, 2, 2), (4, 2, 1, 1), 1, 0, False),  # the weight does not fit
    ],
)
def test_few_pixels_are_few_for_the_weight(shape, weight_shape, stride, padding, pays):
    x, weight = torch.empty(shape), torch.empty(weight_shape)
    assert extension.load().im2col_pays(x, weight, (stride,) * 2, (padding,) * 4, (1, 1), 1) == pays
    assert not extension.load().im2col_pays(x, weight, (stride,) * 2, (padding,) * 4, (1, 1), 2)


@needs_extension
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_few_pixels_keep_what_is_not_finite(act, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    x = torch.randn(2, 32, 4, 4)
    x[0, 3, 0, 0], x[1, :, 3, 3] = float("nan"), float("inf")
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bn = torch.rand(40, 32, 3, 3) + 0.1, batch_norm_tensors(40)
    with torch.no_grad():
        y = conv_bn_act(x, weight, *bn, act=act, padding=1)
    torch_y = reference(x, weight, None, *bn, None, (1, 1), (1,) * 4, (1, 1), 1, False, 0.1, 1e-5, act)
    assert y.isnan().any() and torch.equal(y.isnan(), torch_y.isnan()) and torch.equal(y.isinf(), torch_y.isinf())


@needs_onednn
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("pixels", [1, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_activations_with_and_without_residual(act, pixels, memory_format, backend):
    """Values that cross every kink of every activation."""
    x = (8 * torch.randn(2, 16, pixels, pixels)).contiguous(memory_format=memory_format)
    weight = torch.randn(24, 16, 1, 1) / 4
    bn = batch_norm_tensors(24)
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    for residual in (None, torch.randn(2, 24, pixels, pixels)):
        y = conv_bn_act(x, weight, *bn, act=act, residual=residual)
        expect(y, x, weight, None, bn, residual, *geometry, 1e-5, act)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    "backend, kernel, groups, memory_format",
    [
        *[
            pytest.param("cpp", *case, torch.channels_last, marks=needs_extension)
            for case in ((1, 1), (3, 1), (3, 2), (3, 4))
        ],
        *[
            pytest.param("onednn", *case, memory_format, marks=needs_onednn)
            for case in ((1, 1), (3, 1), (3, 8))
            for memory_format in (torch.contiguous_format, torch.channels_last)
        ],
    ],
)
@pytest.mark.parametrize("has_residual", [False, True])
def test_nan_and_infinity_pass_as_in_torch(act, backend, kernel, groups, memory_format, has_residual, monkeypatch):
    force(monkeypatch, backend)
    x = torch.randn(2, 8, 6, 6)
    x[0, 3, 2, 2] = float("nan")
    x[1, :, 3, 3] = float("inf")
    x = x.contiguous(memory_format=memory_format)
    weight = torch.rand(8, 8 // groups, kernel, kernel) + 0.1
    bn = batch_norm_tensors(8)
    residual = torch.randn(2, 8, 6, 6) if has_residual else None
    y = conv_bn_act(x, weight, *bn, act=act, padding=kernel // 2, groups=groups, residual=residual)
    torch_y = reference(
        x, weight, None, *bn, residual, (1, 1), (kernel // 2,) * 4, (1, 1), groups, False, 0.1, 1e-5, act
    )
    assert y.isnan().any() and torch.equal(y.isnan(), torch_y.isnan())
    assert torch.equal(y.isinf(), torch_y.isinf())


@needs_onednn
def test_inputs_are_left_alone(backend):
    for layout, x in layouts(torch.randn(2, 8, 5, 5)).items():
        residual = layouts(torch.randn(2, 8, 5, 5))[layout]
        tensors = [x, torch.randn(8, 8, 1, 1), *batch_norm_tensors(8), torch.randn(8), residual]
        before = [t.clone() for t in tensors]
        conv_bn_act(*tensors[:6], bias=tensors[6], residual=tensors[7], act="relu6")
        for old, new in zip(before, tensors):
            assert torch.equal(old, new)


# ---- parameters that change between calls ------------------------------------------------------------------


def sgd_step(layer):
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def data_edit(layer):
    layer.conv.weight.data.mul_(-1.5)
    layer.bn.weight.data.copy_(torch.rand(12) + 2)


def detached_numpy_edit(layer):
    layer.conv.weight.detach().numpy()[:] *= 2


def new_data(layer):
    layer.conv.weight.data = torch.randn_like(layer.conv.weight)


def load_other(layer):
    other = ConvBNAct(8, 12, layer.conv.kernel_size)
    nn.init.normal_(other.bn.running_mean)
    layer.load_state_dict(other.state_dict())


def batch_norm_edit(layer):
    with torch.no_grad():
        layer.bn.running_var.mul_(3)
        layer.bn.bias.add_(1)
        layer.bn.eps = 0.25


def train_step(layer):
    layer.train()(torch.randn(4, 8, 6, 6))
    layer.eval()


@pytest.mark.parametrize(
    "change",
    [sgd_step, data_edit, detached_numpy_edit, new_data, load_other, batch_norm_edit, train_step],
)
@pytest.mark.parametrize(
    "backend, kernel",
    [
        pytest.param("cpp", 1, marks=needs_extension),
        pytest.param("cpp", 3, marks=needs_extension),
        pytest.param("onednn", 3, marks=needs_onednn),
    ],
)
@pytest.mark.filterwarnings("ignore::bbfast.dispatch.FallbackWarning")  # of the train step
def test_changes_of_parameters_count_at_once(change, backend, kernel, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    layer = ConvBNAct(8, 12, kernel, act="hardswish").eval()
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        after = layer(x)
        conv, bn = layer.conv, layer.bn
        exact = copy.deepcopy(layer).double()
        exact = F.hardswish(exact.bn(F.conv2d(x.double(), exact.conv.weight, None, 1, kernel // 2)))
        same_dtype = F.hardswish(bn(F.conv2d(x, conv.weight, None, 1, kernel // 2)))
    assert (after - before).abs().max() > 1e-3
    assert_within_rule(change.__name__, after, exact, same_dtype)
    assert dispatch.last_choices()["conv_bn_act"].backend == backend


# ---- which way a call goes
# -----------------------------------------------------------------------------------


def call(dtype=torch.float32, grad=False, **keywords):
    x, weight = torch.randn(2, 4, 5, 5, dtype=dtype), torch.randn(6, 4, 1, 1, dtype=dtype)
    bn = [t.to(dtype) for t in batch_norm_tensors(6)]
    return conv_bn_act(x, weight.requires_grad_(grad), *bn, **keywords)


@needs_onednn
@pytest.mark.parametrize(
    "keywords, reason",
    [
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"grad": True}, "gradients are needed"),
        ({"training": True}, "training=True"),
    ],
)
def test_fallback_has_its_reason(keywords, reason, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    monkeypatch.setenv("BBFAST_STRICT", "1")
    with pytest.raises(dispatch.BackendUnavailableError, match=reason):
        call(**keywords)
    monkeypatch.setenv("BBFAST_STRICT", "0")
    assert call(**keywords).isfinite().all()
    choice = dispatch.last_choices()["conv_bn_act"]
    assert choice.backend == "torch" and any(reason in text for text in choice.reasons)


@needs_onednn
def test_onednn_switched_off(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "onednn")
    with (
        torch.backends.mkldnn.flags(enabled=False),
        pytest.warns(dispatch.FallbackWarning, match="switched off"),
        torch.no_grad(),
    ):
        call()
    assert not [r for r in _onednn.unsupported_reasons(torch.zeros(1)) if "switched off" in r]


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_that_the_processor_lacks_runs_on_the_reference(dtype, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)
    x, weight = torch.randn(2, 4, 5, 5, dtype=dtype), torch.randn(6, 4, 1, 1, dtype=dtype)
    bn = batch_norm_tensors(6)
    with torch.no_grad():
        y = conv_bn_act(x, weight, *bn)
    expect(y, x, weight, None, bn, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, 1e-5, "relu")
    choice = dispatch.last_choices()["conv_bn_act"]
    assert choice.backend == "torch"
    assert any(
        reason == f"onednn: x has dtype {dtype}, which oneDNN's convolution does not take on this CPU"
        for reason in choice.reasons
    )


def test_reference_on_demand(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    call()
    assert dispatch.last_choices()["conv_bn_act"].backend == "torch"


@pytest.mark.parametrize(
    "backend",
    [pytest.param("cpp", marks=needs_extension), pytest.param("onednn", marks=needs_onednn)],
)
def test_depthwise_op_takes_cpu_kernels(backend, monkeypatch):
    force(monkeypatch, backend)
    weight, bias = torch.randn(6, 1, 3, 3), torch.randn(6)
    for layout, x in layouts(torch.randn(2, 6, 9, 8)).items():
        if backend == "cpp" and "channels_last" not in layout:
            continue
        for act, padding in zip(ACTIVATIONS, itertools.cycle([(1, 1, 1, 1), (0, 1, 0, 1)])):
            for bn in (batch_norm_tensors(6), [None] * 4):
                geometry = ((2, 2), padding, (1, 1))
                y, squeezed = depthwise_conv_bn_act(
                    x, weight, *bn, bias=bias, stride=2, padding=padding, act=act, squeeze=True
                )
                expect(y, x, weight, bias, bn, None, *geometry, 6, 1e-5, act, f"{layout} {act}")
                assert_within_rule("squeezed", squeezed, y.double().mean((2, 3)), y.mean((2, 3)))
    assert dispatch.last_choices()["depthwise_conv_bn_act"].backend == backend


# ---- training and gradients
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_gradients(training, has_residual, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    x, weight, residual = torch.randn(3, 5, 7, 6), torch.randn(4, 5, 3, 3), torch.randn(3, 4, 4, 3)
    bn = batch_norm_tensors(4)
    grad_y = torch.randn(3, 4, 3, 4).transpose(2, 3)

    def run(dtype, fn):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, weight, *bn[:2], residual)]
        statistics = [t.to(dtype).clone() for t in bn[2:]]
        y = fn(leaves[0], leaves[1], *leaves[2:4], *statistics, leaves[4] if has_residual else None)
        used = leaves if has_residual else leaves[:4]
        return [y, *torch.autograd.grad(y, used, grad_y.to(dtype)), *statistics]

    def ours(x, w, bw, bb, mean, var, r):
        return conv_bn_act(x, w, bw, bb, mean, var, residual=r, stride=2, padding=1, act="silu", training=training)

    def plain(x, w, bw, bb, mean, var, r):
        geometry = ((2, 2), (1, 1, 1, 1), (1, 1), 1)
        return reference(x, w, None, bw, bb, mean, var, r, *geometry, training, 0.1, 1e-5, "silu")

    results = zip(run(torch.float32, ours), run(torch.float64, plain), run(torch.float32, plain))
    for index, (our, exact, same) in enumerate(results):
        assert_within_rule(f"output {index}", our.detach(), exact.detach(), same.detach(), rows=36)


# ---- torch.library, torch.compile, modes
# -----------------------------------------------------------------------


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("has_everything", [False, True])
def test_opcheck(permuted, has_everything, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    x = torch.randn(2, 6, 5, 7)
    x = x.permute(0, 1, 3, 2).contiguous(memory_format=torch.channels_last) if permuted else x
    bn = batch_norm_tensors(4) if has_everything else [None] * 4
    bias = torch.randn(4) if has_everything else None
    weight, residual = torch.randn(4, 3, 3, 3), torch.randn(2, 4, *x.shape[2:]) if has_everything else None
    args = (x, weight, bias, *bn, residual, (1, 1), (1, 1, 1, 1), (1, 1), 2, 1e-5, "gelu", None)
    torch.library.opcheck(torch.ops.bbfast.conv_bn_act.default, args)


@needs_onednn
def test_compile_inference(backend):
    weight, bn = torch.randn(6, 4, 3, 3), batch_norm_tensors(6)

    def two_layers(x):
        y = conv_bn_act(x, weight, *bn, padding="same", stride=2, act="hardswish")
        return conv_bn_act(y, torch.ones(6, 6, 1, 1), *[None] * 4, act="identity", residual=y)

    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((2, 4, 9, 8), (3, 4, 6, 11)):
            for layout in ("contiguous", "channels_last"):
                x = layouts(torch.randn(size))[layout]
                assert torch.equal(compiled(x), two_layers(x))


def test_compile_training(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    layer = ConvBNAct(4, 6, 3, stride=2, act="silu")
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 4, 9, 8), (3, 4, 6, 11)):
        x = torch.randn(size)
        ours, plain = compiled(x), other(x)
        torch.testing.assert_close(ours, plain)
        grads = [
            torch.autograd.grad(y.square().sum(), module.conv.weight)[0]
            for y, module in ((ours, layer), (plain, other))
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bn.running_var, other.bn.running_var)


@needs_onednn
def test_inference_mode(backend):
    x, weight, bn = torch.randn(2, 8, 5, 5), torch.randn(4, 8, 1, 1), batch_norm_tensors(4)
    with torch.inference_mode():
        y = conv_bn_act(x, weight, *bn, act="silu")
    expect(y.clone(), x, weight, None, bn, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, 1e-5, "silu")


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_autocast_bfloat16(act, monkeypatch):
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    x, weight, bn = torch.randn(2, 8, 5, 5), torch.randn(4, 8, 3, 3), batch_norm_tensors(4)
    residual = torch.randn(2, 4, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = conv_bn_act(x, weight, *bn, padding=1, act=act, residual=residual)
    assert y.dtype == torch.bfloat16
    low = [t.bfloat16() for t in (x, weight, residual)]
    tail = ((1, 1), (1, 1, 1, 1), (1, 1), 1, False, 0.1, 1e-5, act)
    doubles = [t.double() for t in (*low, *bn)]
    exact = reference(*doubles[:2], None, *doubles[3:], doubles[2], *tail)
    assert_within_rule("bf16", y, exact, reference(*low[:2], None, *bn, low[2], *tail))


# ---- layers
# ----------------------------------------------------------------------------------------------------


@needs_onednn
def test_layer_and_lent_modules(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "onednn")
    layer = ConvBNAct(6, 6, (3, 5), dilation=(2, 1), groups=2, bias=True, act="relu6").eval()
    x, residual = torch.randn(2, 6, 8, 9), torch.randn(2, 6, 8, 9)
    conv = copy.deepcopy(layer.conv)
    conv.padding = (2, 2)
    with torch.no_grad():
        plain = F.relu6(layer.bn(conv(x)) + residual)
        torch.testing.assert_close(layer(x, residual), plain)
        lent = apply_conv_bn_act(conv, layer.bn, x, act="relu6", residual=residual)
        torch.testing.assert_close(lent, plain)
        torch.testing.assert_close(apply_conv_bn_act(conv, None, x, act="silu"), F.silu(conv(x)))
    conv.padding_mode = "reflect"
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        apply_conv_bn_act(conv, None, x, act="relu")


def test_synchronised_batch_norm_activates_once():
    bn = SyncBatchNormAct2d(6, act="silu")
    conv, x, residual = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        y = apply_conv_bn_act(conv, bn, x, act="silu", residual=residual)
        expected = F.silu(F.batch_norm(conv(x), None, None, training=True) + residual)
    torch.testing.assert_close(y, expected)
    assert bn.num_batches_tracked == 1


def test_inference_layout():
    x = torch.randn(2, 3, 4, 5)
    assert to_inference_layout(x) is x  # gradients are on
    with torch.no_grad():
        y = to_inference_layout(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, y)


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_squeeze_excite(gate, act, memory_format):
    reduce, expand = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
    source = (3 * torch.randn(3, 12, 5, 4)).contiguous(memory_format=memory_format)

    def plain(x, reduce, expand):
        gates = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}
        return x * gates[gate](expand(ACTIVATIONS[act](reduce(x.mean((2, 3), keepdim=True)))))

    exact = plain(source.double(), copy.deepcopy(reduce).double(), copy.deepcopy(expand).double())
    x = source.clone().requires_grad_()
    ours = apply_squeeze_excite(x, x.mean((2, 3)), reduce, expand, act=act, gate=gate, inplace=True)
    assert_within_rule("y", ours.detach(), exact.detach(), plain(source, reduce, expand).detach())
    grads = torch.autograd.grad(ours.square().sum(), [x, reduce.weight])
    others = torch.autograd.grad(plain(x, reduce, expand).square().sum(), [x, reduce.weight])
    for our, other in zip(grads, others):
        torch.testing.assert_close(our, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        squeezed = source.mean((2, 3))
        kept = apply_squeeze_excite(source, squeezed, reduce, expand, act=act, gate=gate)
        assert torch.equal(source, x) and torch.equal(kept, ours)
        over = apply_squeeze_excite(source, squeezed, reduce, expand, act=act, gate=gate, inplace=True)
    assert over.data_ptr() == source.data_ptr() and torch.equal(over, kept)


def test_squeeze_excite_bad_input():
    x, reduce, expand = torch.randn(2, 4, 3, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
    squeezed = x.mean((2, 3))
    with pytest.raises(ValueError, match="gate='tanh'"):
        apply_squeeze_excite(x, squeezed, reduce, expand, act="relu", gate="tanh")
    with pytest.raises(ValueError, match="act='mish'"):
        apply_squeeze_excite(x, squeezed, reduce, expand, act="mish", gate="sigmoid")
    with pytest.raises(ValueError, match="squeezed must have shape"):
        apply_squeeze_excite(x, squeezed[:1], reduce, expand, act="relu", gate="sigmoid")
    with pytest.raises(ValueError, match="conv_reduce must be a 1x1 convolution"):
        apply_squeeze_excite(x, squeezed, nn.Conv2d(4, 2, 3), expand, act="relu", gate="sigmoid")


# ---- bad input
# ---------------------------------------------------------------------------------------------------


def bad(error, match, **changes):
    return pytest.param(error, match, changes, id=match)


@pytest.mark.parametrize(
    "error, match, changes",
    [
        bad(ValueError, "x must have 4 dimensions", x=torch.zeros(4, 5, 5)),
        bad(TypeError, "x has dtype torch.int64", x=torch.zeros(2, 4, 5, 5, dtype=torch.long)),
        bad(TypeError, "x must be a torch.Tensor", x=[1.0]),
        bad(ValueError, "weight must have shape", weight=torch.zeros(6, 3, 1, 1)),
        bad(ValueError, "weight has an empty dimension", weight=torch.zeros(6, 4, 0, 1)),
        bad(TypeError, "weight has dtype torch.float64", weight=torch.zeros(6, 4, 1, 1).double()),
        bad(ValueError, "groups=0", groups=0),
        bad(TypeError, "groups must be an int", groups=2.0),
        bad(ValueError, "weight must have shape", groups=4),
        bad(ValueError, "bias must have shape", bias=torch.zeros(5)),
        bad(TypeError, "bias has dtype", bias=torch.zeros(6).double()),
        bad(ValueError, "bn_weight must have shape", bn_weight=torch.zeros(4)),
        bad(ValueError, "running_mean and running_var", running_mean=None),
        bad(ValueError, "act='swoosh'", act="swoosh"),
        bad(ValueError, "eps=nan", eps=float("nan")),
        bad(ValueError, "momentum=nan", momentum=float("nan")),
        bad(TypeError, "momentum=None", momentum=None),
        bad(ValueError, "padding='full'", padding="full"),
        bad(ValueError, "stride", stride=0),
        bad(ValueError, "residual must have the output's shape", residual=torch.zeros(2, 6, 5, 4)),
        bad(TypeError, "residual has dtype", residual=torch.zeros(2, 6, 5, 5).double()),
        bad(ValueError, "the kernel spans", weight=torch.zeros(6, 4, 7, 7)),
        bad(ValueError, "weight is on meta", weight=torch.zeros(6, 4, 1, 1, device="meta")),
    ],
)
def test_bad_input(error, match, changes):
    bn = dict(zip(("bn_weight", "bn_bias", "running_mean", "running_var"), batch_norm_tensors(6)))
    arguments = {"x": torch.zeros(2, 4, 5, 5), "weight": torch.zeros(6, 4, 1, 1), **bn, **changes}
    with pytest.raises(error, match=match):
        conv_bn_act(**arguments)


@needs_onednn
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_bias_of_any_stride(kernel, layout, monkeypatch):
    """oneDNN itself takes strides for none."""
    monkeypatch.delenv("BBFAST_BACKEND", raising=False)
    x, weight, bias = (
        torch.randn(2, 8, 6, 7).to(memory_format=layout),
        torch.randn(8, 8, kernel, kernel),
        torch.randn(16),
    )
    for strided in (bias[::2], bias[:1].expand(8)):
        for groups, op in ((1, conv_bn_act), (8, depthwise_conv_bn_act)):
            given = weight if groups == 1 else weight[:, :1].contiguous()
            y = op(x, given, None, None, None, None, bias=strided, padding=kernel // 2, act="identity")
            expected = F.conv2d(x, given, strided, padding=kernel // 2, groups=groups)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
