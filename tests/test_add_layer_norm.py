"""`add_layer_norm`: kernels and reference against float64 and timm, masks, checkpointing, compile, the layers."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule, check_op, poison_new_empty
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import bbfast.nn
from bbfast import dispatch
from bbfast.nn.add_layer_norm import apply_layer_norm
from bbfast.ops import add_layer_norm

NAMES = ("residual", "branch", "layer_scale", "weight", "bias")


def use_kernels(monkeypatch, x):
    """Forbids the reference, and fills what kernels forget to write with NaN."""
    if dispatch.triton_unavailable_reasons(x):
        pytest.skip("; ".join(dispatch.triton_unavailable_reasons(x)))
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)


def use_backend(monkeypatch, backend, x):
    if backend == "triton":
        use_kernels(monkeypatch, x)
    else:
        monkeypatch.setenv("BBFAST_BACKEND", "torch")


def inputs(*shape, device, dtype=torch.float32, scaled=False, branch=True):
    """The five tensors by name, None for those left out; the affine pair away from 1 and 0."""
    tensors = dict.fromkeys(NAMES)
    tensors["residual"] = torch.randn(shape, device=device).to(dtype)
    for name in NAMES[2 if scaled else 3 :]:
        tensors[name] = torch.randn(shape[-1], device=device).to(dtype)
    if branch:
        tensors["branch"] = torch.randn(shape, device=device).to(dtype)
    return tensors


def expression(residual, branch, layer_scale, weight, bias, mask=None, eps=1e-5):
    """The definition in torch's own functions, and the rule that a dropped branch does not count."""
    total = residual
    if branch is not None:
        branch = branch if layer_scale is None else branch * layer_scale
        if mask is not None:
            mask = mask.view(-1, *(1,) * (branch.dim() - 1))
            branch = torch.where(mask != 0, branch, 0) * mask
        total = residual + branch
    affine = [None if t is None else t.to(total.dtype) for t in (weight, bias)]
    return total, F.layer_norm(total, total.shape[-1:], *affine, eps)


def ours(residual, branch, layer_scale, weight, bias, mask=None, eps=1e-5):
    return add_layer_norm(residual, branch, weight, bias, layer_scale=layer_scale, mask=mask, eps=eps)


def forward_and_backward(function, tensors, grads, dtype=None, mask=None, **config):
    """Both outputs, and gradients of all inputs by name, for gradients (None: not used) of the outputs."""
    leaves = {n: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    config["mask"] = mask if mask is None or dtype is None else mask.to(dtype)
    outputs = function(**leaves, **config)
    used = [(y, g.to(y.dtype)) for y, g in zip(outputs, grads) if g is not None]
    wanted = {n: leaf for n, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(
        [y for y, _ in used], list(wanted.values()), [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return [y.detach() for y in outputs], dict(zip(wanted, found))


def check(tensors, grads=None, **config):
    """Forward and all gradients against float64 by the tolerance rule; returns what was found."""
    residual = tensors["residual"]
    grads = torch.randn(2, *residual.shape, device=residual.device) if grads is None else grads
    outputs, found = forward_and_backward(ours, tensors, grads, **config)
    exact = forward_and_backward(expression, tensors, grads, torch.float64, **config)
    plain = forward_and_backward(expression, tensors, grads, **config)
    assert_within_rule("sum", outputs[0], exact[0][0], plain[0][0])
    assert_within_rule("normalised", outputs[1], exact[0][1], plain[0][1])
    rows = residual.shape[:-1].numel()
    for name, grad in found.items():
        summed = 1 if name in ("residual", "branch") else rows
        assert_within_rule(f"grad {name}", grad, exact[1][name], plain[1][name], rows=summed)
    return outputs, found


def with_strides(x, layout):
    """x's values in other strides: channels outside (NCHW), a slice of a larger map, or rows of a wider tensor."""
    if layout == "NCHW":
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "sliced":
        return x.new_full([size + 3 for size in x.shape], math.nan)[tuple(slice(1, -2) for _ in x.shape)].copy_(x)
    return x.new_full((*x.shape[:-1], 3 * x.shape[-1]), math.nan)[..., x.shape[-1] : 2 * x.shape[-1]].copy_(x)


# ---- against float64 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("channels", [1, 3, 67, 96, 100, 768, 1000, 2048])
@pytest.mark.parametrize("scaled, masked", [(False, True), (True, True), (False, False)])
def test_forward_and_backward(backend, channels, scaled, masked, device, monkeypatch):
    shape = (3, 5, 7, channels) if channels <= 100 else (3, 7, channels)
    tensors = inputs(*shape, device=device, scaled=scaled)
    mask = torch.tensor([1.25, 0.0, 2.0], device=device) if masked else None
    use_backend(monkeypatch, backend, tensors["residual"])
    # One channel: the norm is its bias and its gradients vanish but for eps; 1e-2 keeps 1 / deviation small.
    (_, norm), _ = check(tensors, mask=mask, eps=1e-2 if channels == 1 else 1e-5)
    assert norm.is_contiguous()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 131])
def test_any_number_of_rows(backend, rows, device, monkeypatch):
    """Tiles that are not full, several programs, and samples that end inside a tile."""
    for shape in ((rows, 96), (1, rows, 24), (rows, 3, 40)):
        tensors = inputs(*shape, device=device)
        mask = torch.arange(shape[0], device=device) % 3 * 0.75
        with monkeypatch.context() as patch:
            use_backend(patch, backend, mask)
            check(tensors, mask=mask)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("used", ["sum", "normalised"])
@pytest.mark.parametrize("branch, scaled, masked", [(True, True, True), (True, False, False), (False, False, False)])
def test_one_output_used(backend, used, branch, scaled, masked, device, monkeypatch):
    tensors = inputs(2, 9, 40, device=device, branch=branch, scaled=scaled)
    grad = torch.randn(2, 9, 40, device=device)
    mask = torch.tensor([0.0, 1.5], device=device) if masked else None
    use_backend(monkeypatch, backend, grad)
    _, found = check(tensors, grads=(grad, None) if used == "sum" else (None, grad), mask=mask)
    assert used == "normalised" or not found["weight"].any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("left_out", [("branch",), ("weight",), ("bias",), ("weight", "bias"), NAMES[1:]])
def test_without(left_out, backend, device, monkeypatch):
    tensors = inputs(2, 5, 24, device=device) | dict.fromkeys(left_out)
    use_backend(monkeypatch, backend, tensors["residual"])
    check(tensors)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("frozen", NAMES)
def test_frozen_inputs_leave_the_other_gradients_alone(frozen, backend, device, monkeypatch):
    tensors = inputs(2, 5, 24, device=device, scaled=True)
    mask = torch.tensor([2.0, 0.0], device=device)
    use_backend(monkeypatch, backend, mask)
    grads = torch.randn(2, 2, 5, 24, device=device)
    _, expected = forward_and_backward(ours, tensors, grads, mask=mask)
    leaves = {n: t.clone().requires_grad_(n != frozen) for n, t in tensors.items()}
    torch.autograd.backward(ours(**leaves, mask=mask), tuple(grads))
    for name, leaf in leaves.items():
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[name]), name


@pytest.mark.parametrize("layout", ["NCHW", "sliced", "rows of a wider tensor"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_other_strides(layout, backend, device, monkeypatch):
    tensors = inputs(2, 4, 3, 24, device=device, scaled=True)
    for name in ("residual", "branch"):
        tensors[name] = with_strides(tensors[name], layout)
    grads = [with_strides(torch.randn(2, 4, 3, 24, device=device), layout) for _ in range(2)]
    use_backend(monkeypatch, backend, tensors["residual"])
    (total, norm), _ = check(tensors, grads, mask=torch.tensor([0.0, 1.5], device=device))
    assert total.is_contiguous() and norm.is_contiguous()


def test_expanded_gradients_and_strided_vectors(device, monkeypatch):
    tensors = inputs(3, 4, 24, device=device, scaled=True)
    for name in NAMES[2:]:
        tensors[name] = torch.randn(24, 2, device=device)[:, 0]
    use_kernels(monkeypatch, tensors["residual"])
    grads = [torch.full((), value, device=device).expand(3, 4, 24) for value in (1.0, 2.0)]
    check(tensors, grads, mask=torch.tensor([[1.5, 0.0, 3.0]], device=device).T.expand(3, 2)[:, 1])


def test_wide_row_numbers(device, monkeypatch):
    """The code for more than 2^31 rows, at a small size."""
    from bbfast.triton_kernels import add_layer_norm as kernels

    tensors = inputs(3, 11, 24, device=device)
    use_kernels(monkeypatch, tensors["residual"])
    monkeypatch.setattr(kernels, "WIDE_FROM", 0)
    check(tensors, mask=torch.tensor([0.0, 1.1, 1.0], device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("mixed", ["all", "residual float32", "affine float32"])
def test_half_precision(dtype, backend, mixed, device, monkeypatch):
    tensors = inputs(3, 5, 64, device=device, dtype=dtype)
    if mixed == "residual float32":
        tensors["residual"] = tensors["residual"].float()
    elif mixed == "affine float32":
        tensors |= {name: tensors[name].float() for name in ("weight", "bias")}
    mask = torch.tensor([1.0, 0.0, 1.0], device=device).to(dtype) / 0.9
    use_backend(monkeypatch, backend, mask)
    (total, norm), _ = check(tensors, mask=mask)
    assert total.dtype == norm.dtype == (torch.float32 if mixed == "residual float32" else dtype)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_norm_sees_the_rounded_sum(backend, device, monkeypatch):
    """A branch that rounding swallows must not show in the norm: the norm is that of the sum that is returned."""
    residual = (torch.randint(1, 4, (2, 3, 32), device=device) * 256).half()
    branch = torch.rand(2, 3, 32, device=device).half() * 0.1
    use_backend(monkeypatch, backend, residual)
    total, norm = add_layer_norm(residual, branch, None, None)
    assert torch.equal(total, residual)
    assert torch.equal(norm, add_layer_norm(residual, None, None, None)[1])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("channels", [67, 768])
def test_large_mean_beside_a_small_deviation(backend, channels, device, monkeypatch):
    tensors = inputs(2, 9, channels, device=device)
    tensors["residual"] += 1e4
    use_backend(monkeypatch, backend, tensors["residual"])
    # The sum is rounded: give float64 the rounded one.
    tensors["residual"] = tensors["residual"] + tensors["branch"]
    tensors["branch"] = torch.zeros_like(tensors["branch"])
    (_, norm), _ = check(tensors)
    if backend == "triton":  # the kernels lose nothing to the offset, where torch loses ten bits
        exact = expression(**{n: None if t is None else t.double() for n, t in tensors.items()})[1]
        assert_within_rule("normalised, no allowance for torch's error", norm, exact, exact.float())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_eps(backend, device, monkeypatch):
    tensors = inputs(2, 9, 40, device=device, branch=False)
    tensors["residual"] *= 1e-2
    use_backend(monkeypatch, backend, tensors["residual"])
    norms = [check(tensors, eps=eps)[0][1] for eps in (1e-3, 1e-6)]
    shrunk, full = ((norm - tensors["bias"]).abs().max() for norm in norms)
    assert shrunk < 0.5 * full  # by sqrt((1e-4 + 1e-6) / (1e-4 + 1e-3))
    constant = torch.full((2, 3, 40), 3.7, device=device)
    for eps in (1e-6, 1e-12):
        assert add_layer_norm(constant, None, None, None, eps=eps)[1].abs().max() < 1e-3 / math.sqrt(eps)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("scaled", [True, False])
def test_dropped_samples_are_not_read(backend, scaled, device, monkeypatch):
    """NaN and infinity in a dropped branch reach neither an output nor a gradient."""
    tensors = inputs(4, 6, 24, device=device, scaled=scaled)
    tensors["branch"][1], tensors["branch"][3] = math.nan, math.inf
    use_backend(monkeypatch, backend, tensors["residual"])
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    (total, norm), found = forward_and_backward(ours, tensors, torch.randn(2, 4, 6, 24, device=device), mask=mask)
    assert torch.equal(total[1::2], tensors["residual"][1::2]) and norm.isfinite().all()
    assert not found["branch"][1::2].any()
    assert all(grad.isfinite().all() for grad in found.values())


def test_two_runs_give_the_same_bits(device, monkeypatch):
    tensors = inputs(4, 37, 96, device=device, scaled=True)
    grads, mask = torch.randn(2, 4, 37, 96, device=device), torch.tensor([1.0, 0.0, 2.0, 1.0], device=device)
    use_kernels(monkeypatch, mask)
    (first, first_grads), (second, second_grads) = (
        forward_and_backward(ours, tensors, grads, mask=mask) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(grad, second_grads[name]) for name, grad in first_grads.items())


def test_backward_takes_several_programs_with_several_tiles(device, monkeypatch):
    """What the other tests rely on to meet uneven shares of the rows."""
    from bbfast.triton_kernels import add_layer_norm as kernels

    x = torch.zeros(4, 37, 96, device=device)
    walk = kernels._Walk("backward", x, (x,), reducing=True, scaled=False)
    assert walk.programs > 1 and walk.tiles_per_program > 1 and walk.rows % walk.tile.block_r
    assert walk.tiles % walk.tiles_per_program or device == "cuda"


# ---- without a branch --------------------------------------------------------------------------------------


def test_without_a_branch_the_sum_is_the_residual(device, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    residual, weight = torch.randn(2, 3, 8, device=device), torch.randn(8, device=device)
    assert add_layer_norm(residual, None, weight, None)[0] is residual
    leaf = residual.clone().requires_grad_()
    total, _ = add_layer_norm(leaf, None, weight, None)
    assert total.data_ptr() == leaf.data_ptr() and total.grad_fn is not None


# ---- timm, masks, autocast -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("drop_prob", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_equal_seeds_give_what_timm_gives(backend, drop_prob, scale_by_keep, device, monkeypatch):
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.DropPath(drop_prob, scale_by_keep).train()
    norm = torch.nn.LayerNorm(24, eps=1e-6, device=device)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    layer = bbfast.nn.AddLayerNorm(24, eps=1e-6, drop_prob=drop_prob, scale_by_keep=scale_by_keep, device=device)
    layer.load_state_dict(norm.state_dict())
    residual, branch = torch.randn(2, 16, 5, 24, device=device)
    use_backend(monkeypatch, backend, residual)

    def timm_block():
        x = residual + theirs(branch)
        return x, norm(x)

    for training in (True, False):
        theirs.train(training), layer.train(training)
        runs = (
            timm_block,
            lambda: layer(residual, branch),
            lambda: bbfast.nn.apply_add_layer_norm(norm, theirs, residual, branch),
        )
        results = []
        for run in runs:
            torch.manual_seed(7)
            results.append((*run(), torch.rand(3, device=device)))
        for found in results[1:]:
            torch.testing.assert_close(found, results[0])
        dropped = (results[0][0] == residual).flatten(1).all(1).float().mean()
        assert abs(dropped - drop_prob) < 0.4 if training else dropped == 0
    layer_grads, timm_grads = [], []
    theirs.train(), layer.train()
    for run, module, grads in ((timm_block, norm, timm_grads), (lambda: layer(residual, branch), layer, layer_grads)):
        torch.manual_seed(9)
        total, normalised = run()
        (total * normalised).sum().backward()
        grads += [module.weight.grad, module.bias.grad]
    torch.testing.assert_close(layer_grads, timm_grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_activation_checkpointing_drops_the_same_samples(backend, device, monkeypatch):
    residual = torch.randn(16, 3, 8, device=device, requires_grad=True)
    branch = torch.randn(16, 3, 8, device=device, requires_grad=True)
    use_backend(monkeypatch, backend, residual)
    layer = bbfast.nn.AddLayerNorm(8, drop_prob=0.5, device=device).train()

    def function(residual, branch):
        total, norm = layer(residual, branch * 2)
        return total.square() * norm

    grads = []
    for run in (function, lambda *tensors: checkpoint(function, *tensors, use_reentrant=False)):
        torch.manual_seed(11)
        y = run(residual, branch)
        torch.rand(5, device=device)  # the generator moves on before backward recomputes
        grads.append((y, *torch.autograd.grad(y.sum(), (residual, branch, layer.weight))))
    for plain, checkpointed in zip(*grads):
        assert torch.equal(plain, checkpointed)
    assert 0 < (grads[0][2].flatten(1) == 0).all(1).sum() < 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_on_the_cpu(dtype, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    residual, branch = torch.randn(2, 3, 5, 8).to(dtype)
    weight, bias = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        total, norm = add_layer_norm(residual, branch, weight, bias)
        expected = F.layer_norm(residual + branch, (8,), weight, bias)
    assert total.dtype == dtype
    torch.testing.assert_close(norm, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_on_a_gpu_gives_the_dtype_of_torch(dtype):
    """On tensors without storage, so that no GPU is needed."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            x, vector = torch.empty(2, 3, 8, device="cuda", dtype=dtype), torch.empty(8, device="cuda")
            affine = [vector if dtype != torch.float64 else vector.double() for _ in range(2)]
            expected = F.layer_norm(x, (8,), *affine)
            total, norm = add_layer_norm(x, x, *affine)
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert (total.dtype, norm.dtype) == (dtype, expected.dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32_norm_of_a_half_precision_sum(backend, device, monkeypatch):
    """What autocast on CUDA asks of the op, where the device is a CPU too."""
    module = importlib.import_module("bbfast.ops.add_layer_norm")
    tensors = inputs(2, 3, 5, 24, device=device, dtype=torch.float16)
    tensors |= {name: tensors[name].float() for name in ("weight", "bias")}
    use_backend(monkeypatch, backend, tensors["residual"])
    monkeypatch.setattr(module, "_norm_dtype", lambda device_type, dtype: torch.float32)

    def in_float32(residual, branch, weight, bias, **config):
        total, _ = expression(residual, branch, None, None, None)
        x = total if total.dtype == torch.float64 else total.float()
        return total, F.layer_norm(x, x.shape[-1:], weight, bias)

    def under_test(residual, branch, weight, bias, **config):
        return ours(residual, branch, None, weight, bias)

    del tensors["layer_scale"]
    grads = torch.randn(2, 2, 3, 5, 24, device=device)
    outputs, found = forward_and_backward(under_test, tensors, grads)
    rounded = [forward_and_backward(in_float32, tensors, grads, dtype) for dtype in (None, torch.float64)]
    assert outputs[1].dtype == torch.float32
    torch.testing.assert_close(outputs[1], rounded[0][0][1], rtol=1e-5, atol=1e-5)
    for name, grad in found.items():
        assert_within_rule(f"grad {name}", grad, rounded[1][1][name], rounded[0][1][name], rows=30)


# ---- fallbacks, empty batches, torch.library, compile ------------------------------------------------------


def test_more_channels_than_a_row_of_registers_holds(device, monkeypatch):
    tensors = inputs(2, 2, 2049, device=device)
    for name in ("BBFAST_BACKEND", "BBFAST_STRICT"):
        monkeypatch.delenv(name, raising=False)
    if not dispatch.triton_unavailable_reasons(tensors["residual"]):
        monkeypatch.setenv("BBFAST_STRICT", "1")
        with pytest.raises(dispatch.BackendUnavailableError, match=r"2049 channels; kernels .* at most 2048"):
            ours(**tensors)
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    check(tensors)


def test_the_op_and_the_kernels_agree_on_the_most_channels():
    from bbfast.triton_kernels import add_layer_norm as kernels

    module = importlib.import_module("bbfast.ops.add_layer_norm")
    assert module.MOST_CHANNELS == kernels.MOST_CHANNELS


@pytest.mark.parametrize("branch", [True, False])
def test_empty_batch(branch, device):
    for shape in ((0, 3, 8), (2, 0, 3, 8), (0, 8)):
        tensors = inputs(*shape, device=device, branch=branch, scaled=branch)
        outputs, found = forward_and_backward(ours, tensors, torch.randn(2, *shape, device=device))
        assert all(y.shape == shape for y in outputs)
        assert all(torch.equal(grad, torch.zeros_like(tensors[name])) for name, grad in found.items())
        drawn = add_layer_norm(tensors["residual"], tensors["residual"], None, None, drop_prob=0.5, training=True)
        assert drawn[1].shape == shape


def test_float64_runs_on_the_reference(device):
    tensors = {
        n: t.requires_grad_() for n, t in inputs(3, 2, 5, device=device, dtype=torch.float64, scaled=True).items()
    }
    mask = torch.tensor([0.0, 1.0, 1.5], device=device, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *t: ours(*t, mask), tuple(tensors.values()))
    torch.autograd.gradcheck(
        lambda r, w, b: ours(r, None, None, w, b), tuple(tensors[n] for n in NAMES if n in "residual weight bias")
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["dense", "NCHW", "sliced"])
def test_opcheck(backend, layout, device, monkeypatch):
    tensors = inputs(2, 2, 4, 3, device=device, scaled=True)
    residual, branch, grad = (torch.randn(2, 2, 4, 3, device=device) for _ in range(3))
    if backend == "triton" and dispatch.triton_unavailable_reasons(residual):
        pytest.skip("; ".join(dispatch.triton_unavailable_reasons(residual)))
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    if layout != "dense":
        residual, branch, grad = (with_strides(x, layout) for x in (residual, branch, grad))
    branch = branch.half()
    mask, (scale, weight, bias) = torch.tensor([0.0, 1.5], device=device), [tensors[name] for name in NAMES[2:]]
    mean = rstd = torch.rand(2, 2, 4, device=device)
    ops, traced = torch.ops.bbfast, backend == "torch"
    single, half = torch.float32, torch.float16
    for forward, backward in (
        ((branch, mask, scale, weight, bias), (grad, grad, branch, mask, scale, weight, bias)),
        ((branch, None, None, weight, None), (None, grad, None, mask, None, weight, None)),
        ((None, None, None, None, bias), (grad, None, None, None, None, None, bias)),
    ):
        for keep_statistics in (True, False):
            check_op(ops.add_layer_norm.default, (residual, *forward, 1e-5, half, keep_statistics), traced=traced)
        own_dtype = None if forward[0] is None else half
        affine_grads = backward[1] is not None
        args = (residual, *backward, mean, rstd, single, own_dtype, affine_grads)
        check_op(ops.add_layer_norm_backward.default, args, traced=traced)
    check_op(
        ops.add_layer_norm_backward.default, (residual, *backward, mean, rstd, single, single, False), traced=traced
    )


@pytest.mark.parametrize("branch, scaled", [(True, True), (True, False), (False, False)])
def test_compile(branch, scaled, device, monkeypatch):
    def function(residual, branch, layer_scale, weight, bias, mask=None):
        branch = None if branch is None else branch * 2
        total, norm = ours(residual * 1.5, branch, layer_scale, weight, bias, mask)
        return total * norm, norm

    torch.compiler.reset()
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 6, 4, 12), (3, 5, 6, 12)):
        tensors = inputs(*shape, device=device, branch=branch, scaled=scaled)
        grads = torch.randn(2, *shape, device=device)
        mask = torch.arange(shape[0], device=device).float() if branch else None
        expected = forward_and_backward(function, tensors, grads, mask=mask)
        torch.testing.assert_close(forward_and_backward(compiled, tensors, grads, mask=mask), expected)


def test_compile_draws_the_mask(device, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    torch.compiler.reset()
    layer = bbfast.nn.AddLayerNorm(2, drop_prob=0.5, device=device).train()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    residual, branch = torch.zeros(200, 3, 2, device=device), torch.ones(200, 3, 2, device=device, requires_grad=True)
    total, _ = compiled(residual, branch)
    total.sum().backward()
    assert torch.equal(total, branch.grad) and set(total.unique().tolist()) == {0.0, 2.0}
    assert 50 < (total[:, 0, 0] == 0).sum() < 150


# ---- layers ----------------------------------------------------------------------------------------------


def test_layer_has_the_keys_and_values_of_layer_norm():
    for options in ({}, {"bias": False}, {"elementwise_affine": False}):
        layer, norm = bbfast.nn.AddLayerNorm(12, **options), torch.nn.LayerNorm(12, **options)
        assert list(layer.state_dict()) == list(norm.state_dict())
        assert all(torch.equal(value, norm.state_dict()[name]) for name, value in layer.state_dict().items())
    assert "drop_prob=0.100" in repr(bbfast.nn.AddLayerNorm(12, drop_prob=0.1))


def test_apply_lends_parameters(device, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    norm = torch.nn.LayerNorm(8, eps=1e-3, device=device)
    residual, branch = torch.randn(2, 3, 4, 8, device=device)
    for drop_path in (None, torch.nn.Identity(), bbfast.nn.DropPath(0.9).eval()):
        total, normalised = bbfast.nn.apply_add_layer_norm(norm, drop_path, residual, branch)
        assert torch.equal(total, residual + branch)
        torch.testing.assert_close(normalised, norm(total))
    dropped, _ = bbfast.nn.apply_add_layer_norm(norm, bbfast.nn.DropPath(1.0).train(), residual, branch)
    assert torch.equal(dropped, residual)
    total, normalised = bbfast.nn.apply_add_layer_norm(norm, None, residual, None)
    assert torch.equal(total, residual)
    normalised.sum().backward()
    assert norm.weight.grad is not None and norm.bias.grad is not None


@pytest.mark.parametrize("of_maps", [False, True], ids=["last axis", "NCHW"])
def test_a_norm_without_a_sum_runs_on_the_kernel(of_maps, device, monkeypatch):
    """As in models: `LayerNorm2d` by itself, and whatever plain LayerNorm a block hands on."""
    x = torch.randn(2, 5, 3, 24, device=device)
    use_kernels(monkeypatch, x)
    norm = (bbfast.nn.LayerNorm2d(24) if of_maps else torch.nn.LayerNorm(24)).to(device)
    torch.nn.init.uniform_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    y = norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if of_maps else apply_layer_norm(norm, x)
    assert dispatch.last_choices()["add_layer_norm"].backend == "triton"
    weight, bias = norm.weight.double(), norm.bias.double()
    exact = F.layer_norm(x.double(), (24,), weight, bias, norm.eps)
    assert_within_rule("y", y, exact, F.layer_norm(x, (24,), norm.weight, norm.bias, norm.eps))


def test_norms_that_are_more_than_layer_norm_are_called(device):
    x = torch.randn(2, 3, 8, device=device)
    hooked, other = torch.nn.LayerNorm(8, device=device), torch.nn.LayerNorm(2, device=device)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(apply_layer_norm(hooked, x), F.layer_norm(x, (8,)) + 1)
    assert apply_layer_norm(torch.nn.Identity(), x) is x
    several = torch.nn.LayerNorm((3, 8), device=device)
    torch.testing.assert_close(apply_layer_norm(several, x), several(x))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        apply_layer_norm(other, x)


@pytest.mark.parametrize(
    "norm, drop_path, error, words",
    [
        (torch.nn.BatchNorm2d(3), None, TypeError, "norm must be an nn.LayerNorm, got BatchNorm2d"),
        (torch.nn.LayerNorm((4, 3)), None, ValueError, "norm must normalise the last dimension alone"),
        (torch.nn.LayerNorm(5), None, ValueError, "norm is for 5 channels but residual has shape"),
        (torch.nn.LayerNorm(3), torch.nn.Dropout(0.1), TypeError, "drop_path must be a DropPath .* got Dropout"),
    ],
)
def test_apply_names_what_does_not_fit(norm, drop_path, error, words):
    with pytest.raises(error, match=words):
        bbfast.nn.apply_add_layer_norm(norm, drop_path, torch.zeros(2, 4, 3), torch.zeros(2, 4, 3))


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"residual": None}, TypeError, "residual must be a torch.Tensor"),
        ({"residual": torch.zeros(3)}, ValueError, r"residual must be \[N, ..., C\]"),
        ({"residual": torch.zeros(2, 0)}, ValueError, "residual must have at least one channel"),
        ({"branch": torch.zeros(2, 4, 3, dtype=torch.int32)}, TypeError, "branch has dtype torch.int32"),
        ({"branch": torch.zeros(2, 4, 1)}, ValueError, "branch must have residual's shape"),
        ({"branch": torch.zeros(2, 4, 3, device="meta")}, ValueError, "branch is on meta"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \(3,\), one value per channel"),
        ({"bias": torch.zeros(3, 1)}, ValueError, r"bias must have shape \(3,\), one value per channel"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias is on meta"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor"),
        ({"layer_scale": torch.zeros(4)}, ValueError, r"layer_scale must have shape \(3,\)"),
        ({"layer_scale": torch.zeros(3), "branch": None}, ValueError, "layer_scale needs a branch"),
        ({"mask": torch.zeros(2), "branch": None}, ValueError, "mask needs a branch"),
        ({"mask": torch.zeros(2, 1)}, ValueError, r"mask must have shape \(2,\), one value per sample"),
        ({"drop_prob": 1.5}, ValueError, "drop_prob=1.5"),
        ({"drop_prob": "0.1"}, TypeError, "drop_prob must be a float"),
        ({"training": 1}, TypeError, "training must be a bool"),
        ({"scale_by_keep": None}, TypeError, "scale_by_keep must be a bool"),
        ({"eps": -1e-5}, ValueError, "eps=-1e-05"),
        ({"eps": math.nan}, ValueError, "eps=nan"),
        ({"eps": "small"}, TypeError, "eps must be a float"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"residual": torch.zeros(2, 4, 3), "branch": torch.zeros(2, 4, 3), "weight": None, "bias": None}
    with pytest.raises(error, match=words):
        add_layer_norm(**(arguments | change))
