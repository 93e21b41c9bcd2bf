"""`batch_norm_act`: kernels and reference against float64, torch.library, autograd, compile, the layer."""

import math

import pytest
import torch
from numerics import assert_within_rule, check_op, poison_new_empty
from torch import nn

import bbfast.nn
from bbfast import dispatch, env
from bbfast.ops import batch_norm_act
from bbfast.reference.activation import ACTIVATIONS
from bbfast.reference.batch_norm_act import batch_norm_act as reference

# Shapes with tails in every direction, C = 1, C % 8 != 0, N = 1, H or W = 1, several tiles and programs.
SHAPES = [(1, 1, 9, 13), (2, 67, 3, 1), (5, 8, 4, 4), (1, 130, 1, 1), (2, 3, 33, 35)]
MEMORY_FORMATS = ["contiguous", "channels_last", "sliced", "channels_last sliced", "permuted"]
CASES = [((2, 24, 3, 5), memory_format) for memory_format in MEMORY_FORMATS]
CASES += [(shape, memory_format) for shape in SHAPES for memory_format in MEMORY_FORMATS[:2]]


def use_kernels(monkeypatch, x):
    """Forbids the reference, and fills what kernels forget to write with NaN."""
    if dispatch.triton_unavailable_reasons(x):
        pytest.skip("; ".join(dispatch.triton_unavailable_reasons(x)))
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)


def laid_out(x: torch.Tensor, memory_format: str) -> torch.Tensor:
    """x's values with other strides."""
    n, c, h, w = x.shape
    if memory_format == "contiguous":
        return x.contiguous()
    if memory_format == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if memory_format == "sliced":
        out = x.new_full((n, c + 2, h + 1, w + 3), math.nan)[:, 1:-1, 1:, 2:-1]
    elif memory_format == "channels_last sliced":
        out = x.new_full((n, h + 1, w + 2, c + 3), math.nan).permute(0, 3, 1, 2)[:, 2:-1, 1:, 1:-1]
    else:
        out = x.new_empty((h, c, w, n)).permute(3, 1, 0, 2)
    return out.copy_(x)


def inputs(shape, device, dtype=torch.float32, residual=True, offset=0.5, parameter_dtype=torch.float32):
    """x, weight, bias, residual, running_mean, running_var."""
    channels = shape[1]
    x = (torch.randn(shape, device=device) * 2 + offset).to(dtype)
    weight, bias = torch.randn(2, channels, device=device).to(parameter_dtype)
    mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.2
    return x, weight, bias, torch.randn(shape, device=device).to(dtype) if residual else None, mean, var


def forward_and_backward(function, tensors, statistics, grad_y, dtype=None, **config):
    """y, gradients of x, weight, bias, residual, and the running statistics afterwards."""
    leaves = [None if t is None else (t.to(dtype) if dtype else t).detach() for t in tensors]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    statistics = [None if t is None else t.to(dtype or t.dtype, copy=True) for t in statistics]
    y = function(*leaves, *statistics, **config)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, grad_y.to(y.dtype)))
    return y.detach(), [None if leaf is None else next(found) for leaf in leaves], statistics


def ours(x, weight, bias, residual, mean, var, **config):
    return batch_norm_act(x, weight, bias, mean, var, residual=residual, **config)


def torch_version(x, weight, bias, residual, mean, var, *, training, momentum=0.1, eps=1e-5, act="relu"):
    return reference(x, weight, bias, residual, mean, var, training, momentum, eps, act)[0]


def check(tensors, statistics, *, grad_y=None, **config):
    """Forward, backward and running statistics against float64 by the tolerance rule."""
    grad_y = torch.randn_like(tensors[0]) if grad_y is None else grad_y
    y, grads, running = forward_and_backward(ours, tensors, statistics, grad_y, **config)
    exact = forward_and_backward(torch_version, tensors, statistics, grad_y, torch.float64, **config)
    plain = forward_and_backward(torch_version, tensors, statistics, grad_y, **config)
    rows = tensors[0].numel() // tensors[0].shape[1]
    assert_within_rule("y", y, exact[0], plain[0])
    for name, grad, exact_grad, plain_grad in zip(("x", "weight", "bias", "residual"), grads, exact[1], plain[1]):
        if exact_grad is not None and grad.dim() == 1:  # sums that may cancel, of about as large terms as dy is
            term = grad_y.abs().max().item()
            assert_within_rule(f"grad {name}", grad, exact_grad, plain_grad, rows=rows, largest_term=term)
        elif exact_grad is not None:
            assert_within_rule(f"grad {name}", grad, exact_grad, plain_grad)
    for name, value, exact_value, plain_value in zip(("mean", "var"), running, exact[2], plain[2]):
        if exact_value is not None:
            assert_within_rule(f"running {name}", value, exact_value, plain_value)
    return y


# ---- kernels against float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape, memory_format", CASES)
def test_kernels_forward_and_backward(shape, memory_format, training, device, monkeypatch):
    *tensors, mean, var = inputs(shape, device)
    if training and shape[0] * shape[2] * shape[3] == 1:
        pytest.skip("one value has no variance")
    tensors[0] = laid_out(tensors[0], memory_format)
    use_kernels(monkeypatch, tensors[0])
    y = check(tensors, (mean, var), training=training, momentum=0.3, eps=1e-3, act="hardswish")
    expected = torch.channels_last if memory_format.startswith("channels_last") else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3)])
@pytest.mark.parametrize("interpret", [False, True])
def test_the_result_is_never_the_input(shape, interpret, monkeypatch, device):
    monkeypatch.setattr(env, "TRITON_INTERPRET", interpret)
    x = torch.randn(shape, device=device)
    y = batch_norm_act(x, None, None, None, None, act="identity")
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()
    batch_norm_act(x.requires_grad_(), None, None, None, None, act="identity").mul_(2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, "x's"])
def test_kernels_half(dtype, training, parameter_dtype, device, monkeypatch):
    parameter_dtype = dtype if parameter_dtype == "x's" else parameter_dtype
    *tensors, mean, var = inputs((3, 24, 6, 6), device, dtype, parameter_dtype=parameter_dtype)
    use_kernels(monkeypatch, tensors[0])
    statistics = [t.to(parameter_dtype) for t in (mean, var)]
    for memory_format in ("contiguous", "channels_last"):
        tensors[0] = laid_out(tensors[0], memory_format)
        check(tensors, statistics, training=training, act="silu")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_kernels_activations(act, training, residual, device, monkeypatch):
    *tensors, mean, var = inputs((2, 10, 5, 4), device, residual=residual)
    use_kernels(monkeypatch, tensors[0])
    check([laid_out(tensors[0], "channels_last"), *tensors[1:]], (mean, var), training=training, act=act)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_kinks_have_torchs_derivative(act, device, monkeypatch):
    """Without BatchNorm the activation meets -3, 0, 3 and 6 exactly; the truth is the installed torch."""
    kinks = torch.tensor([-6.0, -3.0, -0.0, 0.0, 3.0, 6.0, 2.0, -2.0], device=device)
    x = kinks.repeat(2, 3, 4, 1).requires_grad_()
    use_kernels(monkeypatch, x)
    y = batch_norm_act(x, None, None, None, None, act=act)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = ACTIVATIONS[act](x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_kernels_without_affine_parameters(missing, training, memory_format, device, monkeypatch):
    x, weight, bias, residual, mean, var = inputs((4, 6, 3, 3), device)
    use_kernels(monkeypatch, x)
    weight, bias = None if missing != "bias" else weight, None if missing != "weight" else bias
    check((laid_out(x, memory_format), weight, bias, residual), (mean, var), training=training, act="gelu")


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_large_mean_and_small_deviation(memory_format, device, monkeypatch):
    """E[x^2] - E[x]^2 would leave no digit of the variance."""
    *tensors, mean, var = inputs((2, 12, 9, 9), device)
    tensors[0] = laid_out(1000 + 0.05 * torch.randn_like(tensors[0]), memory_format)
    use_kernels(monkeypatch, tensors[0])
    check(tensors, (mean, var), training=True, act="identity")


def test_statistics_that_differ_from_sample_to_sample(device, monkeypatch):
    """Programs see parts of the batch with quite different means, some of them constant."""
    x, *others = inputs((9, 4, 4, 16), device)
    x = x * torch.tensor([0, 1e-3, 1, 5, 1, 1, 0, 1, 20.0], device=device).view(-1, 1, 1, 1)
    x = x + torch.linspace(-20, 80, 9, device=device).view(-1, 1, 1, 1)
    use_kernels(monkeypatch, x)
    for memory_format in ("contiguous", "channels_last"):
        check((laid_out(x, memory_format), *others[:3]), others[3:], training=True, act="relu6")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_grad_of_any_strides(layout, device, monkeypatch):
    *tensors, mean, var = inputs((2, 8, 4, 6), device)
    use_kernels(monkeypatch, tensors[0])
    grad_y = torch.randn_like(tensors[0])
    grad_y = torch.ones((), device=device).expand(2, 8, 4, 6) if layout == "expanded" else laid_out(grad_y, layout)
    tensors[3] = laid_out(tensors[3], "channels_last")
    for training in (False, True):
        check(tensors, (mean, var), grad_y=grad_y, training=training, act="silu")


@pytest.mark.parametrize("act", ["relu", "hardswish", "identity"])
@pytest.mark.parametrize("narrow", ["x", "residual"])
def test_residual_of_another_dtype_widens_the_output(narrow, act, device, monkeypatch):
    """And a narrower one costs x's gradient no digit."""
    x, weight, bias, residual, mean, var = inputs((2, 8, 4, 6), device)
    x, residual = (x.half(), residual) if narrow == "x" else (x, residual.half())
    use_kernels(monkeypatch, x)
    grad_y = torch.randn(x.shape, device=device)
    y = check((x, weight, bias, residual), (mean, var), grad_y=grad_y, training=True, act=act)
    assert y.dtype == torch.float32


def test_training_reads_the_residual_once_in_backward(device, monkeypatch):
    """Its gradient, which the first pass writes, stands for it in the second."""
    from bbfast.triton_kernels import batch_norm_act as kernels

    x, weight, bias, residual, mean, var = inputs((2, 8, 4, 6), device)
    use_kernels(monkeypatch, x)
    launched = []
    second = kernels._batch_norm_act_backward_input_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: (launched.append((args[2], options["ACT"])), second[grid](*args, **options))

    monkeypatch.setattr(kernels, "_batch_norm_act_backward_input_kernel", Spy())
    check((x, weight, bias, residual), (mean, var), training=True, act="hardswish")
    assert launched == [(None, "identity")]
    check((x, weight, bias, residual), (mean, var), training=False, act="hardswish")
    assert launched[1][0] is not None and launched[1][1] == "hardswish"


def test_wide_offsets(device, monkeypatch):
    """The code for tensors beyond 2^31 elements, at a small size."""
    from bbfast.triton_kernels import channel_tile

    *tensors, mean, var = inputs((2, 12, 3, 5), device)
    use_kernels(monkeypatch, tensors[0])
    monkeypatch.setattr(channel_tile, "WIDE_FROM", 0)
    for memory_format in MEMORY_FORMATS:
        tensors[0] = laid_out(tensors[0], memory_format)
        check(tensors, (mean, var), training=True, act="relu")


def test_other_ranks(device, monkeypatch):
    for shape in ((7, 12), (3, 12, 5)):
        x, weight, bias, residual, mean, var = inputs(shape, device)
        with monkeypatch.context() as patch:
            use_kernels(patch, x)
            for training in (False, True):
                check((x, weight, bias, residual), (mean, var), training=training, act="silu")
    transposed = torch.randn(3, 5, 12, device=device).transpose(1, 2)
    y = batch_norm_act(transposed, weight, bias, mean, var, act="silu")
    assert y.stride() == transposed.stride()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_two_runs_give_the_same_bits(training, memory_format, device, monkeypatch):
    *tensors, mean, var = inputs((2, 12, 9, 5), device)
    use_kernels(monkeypatch, tensors[0])
    tensors[0] = laid_out(tensors[0], memory_format)
    grad_y = torch.randn_like(tensors[0])
    runs = [forward_and_backward(ours, tensors, (mean, var), grad_y, training=training, act="gelu") for _ in range(2)]
    for first, second in zip(*[(y, *grads, *running) for y, grads, running in runs]):
        assert torch.equal(first, second)


# ---- running statistics, empty batches -------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(momentum, device, monkeypatch):
    x, weight, bias, _, mean, var = inputs((4, 6, 3, 5), device)
    use_kernels(monkeypatch, x)
    our_mean, our_var, torch_mean, torch_var = mean.clone(), var.clone(), mean.clone(), var.clone()
    batch_norm_act(x, weight, bias, our_mean, our_var, training=True, momentum=momentum)
    nn.functional.batch_norm(x, torch_mean, torch_var, weight, bias, True, momentum)
    torch.testing.assert_close(our_mean, torch_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_var, torch_var, rtol=1e-6, atol=1e-6)
    if momentum == 0:
        assert torch.equal(our_mean, mean) and torch.equal(our_var, var)
    before = our_mean.clone()
    batch_norm_act(x, weight, bias, our_mean, our_var, training=False)
    assert torch.equal(our_mean, before)


@pytest.mark.parametrize("training", [False, True])
def test_no_running_statistics(training, device, monkeypatch):
    x, weight, bias, residual, _, _ = inputs((4, 6, 3, 5), device)
    use_kernels(monkeypatch, x)
    if not training:
        weight = bias = None
    check((x, weight, bias, residual), (None, None), training=training, act="silu")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_empty_batch(shape, training, device):
    x, weight, bias, residual, mean, var = inputs(shape, device)
    x.requires_grad_(), weight.requires_grad_(), residual.requires_grad_()
    before = mean.clone(), var.clone()
    y = batch_norm_act(x, weight, bias, mean, var, residual=residual, training=training)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and residual.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


# ---- reference, torch.library, compile -------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_float64_runs_on_the_reference(training, device):
    *tensors, mean, var = inputs((2, 2, 3, 2), device)
    tensors = [t.double().requires_grad_() for t in tensors]
    statistics = (None, None) if training else (mean.double(), var.double())
    torch.autograd.gradcheck(lambda *t: ours(*t, *statistics, training=training, act="silu"), tensors)
    torch.autograd.gradcheck(lambda *t: torch_version(*t, *statistics, training=training, act="gelu"), tensors)
    if device == "cpu":
        assert dispatch.last_choices()["batch_norm_act"].backend == "torch"


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "channels_last sliced"])
def test_opcheck(backend, memory_format, device, monkeypatch):
    x, weight, bias, residual, mean, var = inputs((2, 3, 2, 3), device)
    if backend == "triton" and dispatch.triton_unavailable_reasons(x):
        pytest.skip("; ".join(dispatch.triton_unavailable_reasons(x)))
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    x = laid_out(x, memory_format)
    grad_y, batch_mean, invstd = torch.randn_like(x), mean.clone(), var.clone()
    ops, traced = torch.ops.bbfast, backend == "torch"
    check_op(ops.batch_norm_act.default, (x, weight, bias, residual, mean, var, 1e-5, "relu"), traced=traced)
    check_op(ops.batch_norm_act_train.default, (x, weight, None, residual, mean, var, 0.1, 1e-5, "silu"), traced=traced)
    check_op(ops.batch_norm_act_train.default, (x, None, bias, None, None, None, 0.1, 1e-5, "silu"), traced=traced)
    for act in ("relu", "identity"):
        rest = (batch_mean, invstd, None, None, True, 1e-5, act)
        check_op(ops.batch_norm_act_backward.default, (grad_y, x, weight, bias, residual, *rest), traced=traced)
    rest = (None, None, mean, var, False, 1e-5, "relu")
    check_op(ops.batch_norm_act_backward.default, (grad_y, x, None, bias, None, *rest), traced=traced)
    check_op(ops.batch_norm_act.default, (x, None, None, None, None, None, 1e-5, "identity"), traced=traced)


# Each op has a fake of its own; that each keeps every memory format is in test_opcheck.
@pytest.mark.parametrize("training, memory_format", [(False, "contiguous"), (True, "channels_last")])
def test_compile(training, memory_format, device, monkeypatch):
    def function(x, weight, bias, residual, mean, var):
        return ours(x * 1.5, weight, bias, residual, mean, var, training=training, act="hardswish")

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 6, 4, 3), (3, 6, 5, 8)):
        *tensors, mean, var = inputs(shape, device)
        tensors[0] = laid_out(tensors[0], memory_format)
        grad_y = torch.randn_like(tensors[0])
        expected = forward_and_backward(function, tensors, (mean, var), grad_y)
        found = forward_and_backward(compiled, tensors, (mean, var), grad_y)
        torch.testing.assert_close(found, expected)
        assert found[0].stride() == expected[0].stride()


def test_autocast_changes_nothing(device):
    *tensors, mean, var = inputs((2, 6, 4, 3), device)
    expected = ours(*tensors, mean, var, act="relu")
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ours(*tensors, mean, var, act="relu"), expected)


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
        ({"x": torch.zeros(2, 4, 3, 3, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.zeros(4)}, ValueError, "x must have 2 to 4 dimensions"),
        ({"x": torch.zeros(2, 0, 3, 3)}, ValueError, "x has no channels"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have shape \(4,\)"),
        ({"bias": torch.zeros(4, 1)}, ValueError, "bias must have shape"),
        ({"running_mean": None}, ValueError, "running_mean and running_var must both"),
        ({"running_mean": None, "running_var": None}, ValueError, "needs running_mean"),
        ({"residual": torch.zeros(2, 4, 3, 1)}, ValueError, "residual must have x's shape"),
        ({"residual": 3.0}, TypeError, "residual must be a torch.Tensor"),
        ({"residual": torch.zeros(2, 4, 3, 3, device="meta")}, ValueError, "residual is on meta"),
        ({"act": "swish"}, ValueError, "act='swish' is not known"),
        ({"act": None}, TypeError, "act must be a string"),
        ({"momentum": math.nan}, ValueError, "momentum=nan"),
        ({"momentum": None}, TypeError, "momentum=None"),
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"training": 1}, TypeError, "training must be a bool"),
        ({"x": torch.zeros(1, 4), "training": True}, ValueError, "more than 1 value per channel"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {
        "x": torch.zeros(2, 4, 3, 3),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
    } | change
    with pytest.raises(error, match=words):
        batch_norm_act(**arguments)


# ---- the layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_layer_follows_timm(config, monkeypatch):
    """Three training steps and evaluation, forward, gradients and buffers."""
    timm_layers = pytest.importorskip("timm.layers")
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    layer = bbfast.nn.BatchNormAct2d(6, eps=1e-3, act="silu", **config)
    timm_layer = timm_layers.BatchNormAct2d(6, eps=1e-3, act_layer="silu", inplace=False, **config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    timm_layer.load_state_dict(layer.state_dict())
    for training in (True, True, True, False):
        layer.train(training), timm_layer.train(training)
        x = torch.randn(3, 6, 5, 5, requires_grad=True)
        y, expected = layer(x), timm_layer(x)
        torch.testing.assert_close(y, expected)
        grad_y = torch.randn_like(y)
        wanted = [x, *layer.parameters()], [x, *timm_layer.parameters()]
        grads, expected_grads = (
            torch.autograd.grad(y, wanted[0], grad_y),
            torch.autograd.grad(expected, wanted[1], grad_y),
        )
        torch.testing.assert_close(grads, expected_grads)
        torch.testing.assert_close(layer.state_dict(), timm_layer.state_dict())


def test_layer_adds_the_residual_before_the_activation(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    layer = bbfast.nn.BatchNormAct2d(4, act="relu6").eval()
    x, residual = torch.randn(2, 2, 4, 3, 3) * 4
    plain = nn.BatchNorm2d(4).eval()
    torch.testing.assert_close(layer(x, residual), nn.functional.relu6(plain(x) + residual))
    assert "act='relu6'" in repr(layer)
    with pytest.raises(ValueError, match="4D"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="act='mish'"):
        bbfast.nn.BatchNormAct2d(4, act="mish")


def test_converting_to_synchronised_batch_norm_keeps_the_activation(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bbfast.nn.BatchNormAct2d(4, act="relu6"), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5) * 9
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"bbfast\.nn\.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    timm_layers = pytest.importorskip("timm.layers")
    with pytest.raises(RuntimeError, match=r"bbfast\.nn\.convert_sync_batchnorm"):
        timm_layers.convert_sync_batchnorm(model)

    weight, keys = model[1].weight, list(model.state_dict())
    converted = bbfast.nn.convert_sync_batchnorm(model)
    assert type(converted[1]) is bbfast.nn.SyncBatchNormAct2d and type(converted[2]) is nn.SyncBatchNorm
    assert converted[1].weight is weight and list(converted.state_dict()) == keys and not converted[1].training
    torch.testing.assert_close(converted(x), expected)
    assert bbfast.nn.convert_sync_batchnorm(converted)[1] is converted[1]
