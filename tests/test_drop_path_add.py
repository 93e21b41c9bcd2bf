"""`drop_path_add`: kernels and reference against float64, timm's masks, checkpointing, compile, the layers."""

import math

import pytest
import torch
from numerics import assert_within_rule, check_op, poison_new_empty
from torch.utils.checkpoint import checkpoint

import bbfast.nn
from bbfast import dispatch
from bbfast.ops import drop_path_add
from bbfast.reference.drop_path_add import drop_path_add as reference


def use_kernels(monkeypatch, x):
    """Forbids the reference, and fills what kernels forget to write with NaN."""
    if dispatch.triton_unavailable_reasons(x):
        pytest.skip("; ".join(dispatch.triton_unavailable_reasons(x)))
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x's values with other strides: dense, with channels inside (axis 1 last), or a slice of a larger tensor."""
    if layout == "dense":
        return x.contiguous()
    if layout == "axis 1 inside":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.new_full([size + 3 for size in x.shape], math.nan)[tuple(slice(1, -2) for _ in x.shape)].copy_(x)


def expression(residual, branch, layer_scale, mask, channel_dim):
    """The reference on any shape."""
    axes = (residual.movedim(channel_dim, 1), branch.movedim(channel_dim, 1))
    return reference(*axes, mask, layer_scale).movedim(1, channel_dim)


def forward_and_backward(function, residual, branch, layer_scale, grad_y, dtype=None, **config):
    leaves = [None if t is None else t.detach().to(dtype or t.dtype) for t in (residual, branch, layer_scale)]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    if dtype and config["mask"] is not None:
        config["mask"] = config["mask"].to(dtype)
    y = function(*leaves, **config)
    found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad_y.to(y.dtype)))
    return y.detach(), [None if leaf is None else next(found) for leaf in leaves]


def ours(residual, branch, layer_scale, mask, channel_dim):
    return drop_path_add(residual, branch, layer_scale=layer_scale, mask=mask, channel_dim=channel_dim)


def check(residual, branch, layer_scale, mask, channel_dim=1, grad_y=None):
    """Forward and backward against float64 by the tolerance rule."""
    grad_y = torch.randn_like(residual) if grad_y is None else grad_y
    config = {"mask": mask, "channel_dim": channel_dim}
    tensors = (residual, branch, layer_scale)
    y, grads = forward_and_backward(ours, *tensors, grad_y, **config)
    exact = forward_and_backward(expression, *tensors, grad_y, torch.float64, **config)
    plain = forward_and_backward(expression, *tensors, grad_y, **config)
    assert_within_rule("y", y, exact[0], plain[0])
    for name, grad, exact_grad, plain_grad in zip(("residual", "branch", "layer_scale"), grads, exact[1], plain[1]):
        if exact_grad is not None:
            rows = residual.numel() // residual.shape[channel_dim] if name == "layer_scale" else 1
            assert_within_rule(f"grad {name}", grad, exact_grad, plain_grad, rows=rows)
    return y


# ---- kernels against float64 -----------------------------------------------------------------------------

# [N, C, H, W] and the others, with tails, C = 1, C % 8 != 0, N = 1, several tiles and programs.
SHAPES = [
    ((3, 24, 5, 7), 1),
    ((2, 1, 9, 13), 1),
    ((1, 67, 3, 1), 1),
    ((2, 3, 33, 35), 1),
    ((3, 5, 7, 16), -1),
    ((3, 49, 24), -1),
    ((2, 9, 1), -1),
    ((3, 10, 7), 1),
    ((5, 12), 1),
    ((5, 3), -1),
]


@pytest.mark.parametrize("shape, channel_dim", SHAPES)
@pytest.mark.parametrize("scaled, masked", [(True, True), (False, True), (True, False)])
def test_kernels_forward_and_backward(shape, channel_dim, scaled, masked, device, monkeypatch):
    residual, branch = torch.randn(2, *shape, device=device)
    layer_scale = torch.randn(shape[channel_dim], device=device) if scaled else None
    mask = torch.tensor([1.25, 0.0, 1.25, 0.0, 0.5], device=device)[: shape[0]] if masked else None
    use_kernels(monkeypatch, residual)
    check(residual, branch, layer_scale, mask, channel_dim)


@pytest.mark.parametrize("layout", ["axis 1 inside", "sliced"])
@pytest.mark.parametrize("which", ["residual", "branch", "grad", "all"])
@pytest.mark.parametrize("scaled", [True, False])
def test_kernels_with_other_strides(layout, which, scaled, device, monkeypatch):
    for shape, channel_dim in (((2, 8, 4, 6), 1), ((2, 5, 12), -1)):
        tensors = dict(zip(("residual", "branch", "grad"), torch.randn(3, *shape, device=device)))
        for name in tensors:
            tensors[name] = laid_out(tensors[name], layout) if which in (name, "all") else tensors[name]
        layer_scale = torch.randn(shape[channel_dim], device=device) if scaled else None
        mask = torch.tensor([0.0, 2.0], device=device)
        with monkeypatch.context() as patch:
            use_kernels(patch, mask)
            y = check(tensors["residual"], tensors["branch"], layer_scale, mask, channel_dim, tensors["grad"])
        if which == "all" and layout == "axis 1 inside" and len(shape) == 4:
            assert y.stride() == tensors["residual"].stride()


def test_expanded_grad_and_strided_vectors(device, monkeypatch):
    residual, branch = torch.randn(2, 3, 6, 4, 4, device=device)
    use_kernels(monkeypatch, residual)
    grad_y = torch.ones((), device=device).expand(residual.shape)
    vectors = (
        torch.randn(6, 2, device=device)[:, 0],
        torch.tensor([[1.5, 0.0, 3.0]], device=device).T.expand(3, 2)[:, 1],
    )
    check(residual, branch, *vectors, grad_y=grad_y)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, "branch's", None])
def test_kernels_dtypes(residual_dtype, branch_dtype, scale_dtype, device, monkeypatch):
    residual, branch = torch.randn(3, 8, 6, device=device), torch.randn(3, 8, 6, device=device)
    residual, branch = residual.to(residual_dtype), branch.to(branch_dtype)
    scale_dtype = branch_dtype if scale_dtype == "branch's" else scale_dtype
    layer_scale = None if scale_dtype is None else torch.randn(6, device=device).to(scale_dtype)
    use_kernels(monkeypatch, residual)
    scaled_dtype = branch_dtype if layer_scale is None else torch.promote_types(branch_dtype, scale_dtype)
    mask = torch.tensor([1.0, 0.0, 1.0], device=device).to(scaled_dtype) / 0.9
    y = check(residual, branch, layer_scale, mask, -1)
    assert y.dtype == torch.promote_types(residual_dtype, scaled_dtype)


def test_wide_offsets(device, monkeypatch):
    """The code for tensors beyond 2^31 elements, at a small size."""
    from bbfast.triton_kernels import channel_tile

    residual, branch = torch.randn(2, 2, 12, 3, 5, device=device)
    use_kernels(monkeypatch, residual)
    monkeypatch.setattr(channel_tile, "WIDE_FROM", 0)
    for layout in ("dense", "axis 1 inside", "sliced"):
        mask, layer_scale = torch.tensor([0.0, 1.1], device=device), torch.randn(12, device=device)
        check(laid_out(residual, layout), branch, layer_scale, mask)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("scaled", [True, False])
def test_dropped_samples_are_not_read(backend, scaled, device, monkeypatch):
    """NaN and infinity in a dropped branch reach neither the output nor a gradient."""
    residual = torch.randn(4, 6, 5, device=device, requires_grad=True)
    branch = torch.randn(4, 6, 5, device=device)
    branch[1], branch[3] = math.nan, math.inf
    branch.requires_grad_()
    layer_scale = torch.randn(6, device=device, requires_grad=True) if scaled else None
    if backend == "triton":
        use_kernels(monkeypatch, residual)
    else:
        monkeypatch.setenv("BBFAST_BACKEND", "torch")
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    y = drop_path_add(residual, branch, layer_scale=layer_scale, mask=mask)
    assert torch.equal(y[1::2], residual[1::2])
    y.square().sum().backward()
    assert torch.equal(branch.grad[1::2], torch.zeros_like(branch.grad[1::2]))
    assert branch.grad.isfinite().all() and residual.grad.isfinite().all()
    assert layer_scale is None or layer_scale.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["dense", "axis 1 inside"])
def test_two_runs_give_the_same_bits(layout, device, monkeypatch):
    residual, branch, grad_y = torch.randn(3, 4, 12, 9, 5, device=device)
    layer_scale, mask = torch.randn(12, device=device), torch.tensor([1.0, 0.0, 2.0, 1.0], device=device)
    use_kernels(monkeypatch, residual)
    branch = laid_out(branch, layout)
    config = {"mask": mask, "channel_dim": 1}
    runs = [forward_and_backward(ours, residual, branch, layer_scale, grad_y, **config) for _ in range(2)]
    for first, second in zip(*[(y, *grads) for y, grads in runs]):
        assert torch.equal(first, second)


# ---- the mask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 1.0, 0.0])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_equal_seeds_drop_what_timm_drops(dtype, drop_prob, scale_by_keep, device, monkeypatch):
    timm_layers = pytest.importorskip("timm.layers")
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    residual, branch = torch.randn(2, 64, 4, 3, 2, device=device).to(dtype)
    theirs = timm_layers.DropPath(drop_prob, scale_by_keep).train()
    layer, layer_with_sum = (
        bbfast.nn.DropPath(drop_prob, scale_by_keep),
        bbfast.nn.DropPathAdd(drop_prob, scale_by_keep),
    )
    results = []
    for run in (theirs, layer.train(), lambda b: layer_with_sum.train()(torch.zeros_like(b), b)):
        torch.manual_seed(7)
        results.append((run(branch), torch.rand(3)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][1], results[2][1])
    dropped = (results[0][0] == 0).flatten(1).all(1).float().mean()
    assert abs(dropped - drop_prob) < 0.35
    layer.eval(), layer_with_sum.eval()
    assert layer(branch) is branch
    assert torch.equal(layer_with_sum(residual, branch), residual + branch)


def test_layer_scale_and_drop_path_follow_timm(device, monkeypatch):
    """A ConvNeXt block's ending, with an fp32 scale on a half-precision branch as under autocast."""
    timm_layers = pytest.importorskip("timm.layers")
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    residual, branch = torch.randn(2, 16, 6, 3, 3, device=device)
    gamma = torch.randn(6, device=device)
    for branch_dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        half = branch.to(branch_dtype)
        expected = timm_layers.DropPath(0.3).train()(half * gamma.reshape(1, -1, 1, 1)) + residual
        torch.manual_seed(3)
        y = bbfast.nn.DropPathAdd(0.3).train()(residual, half, gamma)
        torch.testing.assert_close(y, expected)
        torch.manual_seed(3)
        tokens = bbfast.nn.DropPathAdd(0.3).train()(residual.movedim(1, -1), half.movedim(1, -1), gamma, channel_dim=-1)
        torch.testing.assert_close(tokens, expected.movedim(1, -1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_activation_checkpointing_drops_the_same_samples(backend, device, monkeypatch):
    residual = torch.randn(16, 4, 3, device=device, requires_grad=True)
    branch = torch.randn(16, 4, 3, device=device, requires_grad=True)
    if backend == "triton" and dispatch.triton_unavailable_reasons(residual):
        pytest.skip("; ".join(dispatch.triton_unavailable_reasons(residual)))
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    layer = bbfast.nn.DropPathAdd(0.5).train()

    def function(residual, branch):
        return layer(residual, branch * 2).square()

    grads = []
    for run in (function, lambda *tensors: checkpoint(function, *tensors, use_reentrant=False)):
        torch.manual_seed(11)
        y = run(residual, branch)
        torch.rand(5, device=device)  # the generator moves on before backward recomputes
        grads.append((y, *torch.autograd.grad(y.sum(), (residual, branch))))
    for plain, checkpointed in zip(*grads):
        assert torch.equal(plain, checkpointed)


# ---- empty batches, reference, torch.library, compile ------------------------------------------------------


def test_empty_batch(device):
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3), (0, 4)):
        residual, branch = torch.randn(2, *shape, device=device).requires_grad_()
        layer_scale = torch.randn(4, device=device, requires_grad=True)
        y = drop_path_add(residual, branch, drop_prob=0.5, training=True, layer_scale=layer_scale)
        assert y.shape == shape
        (grad,) = torch.autograd.grad(y.sum(), layer_scale)
        assert torch.equal(grad, torch.zeros_like(grad))


def test_float64_runs_on_the_reference(device):
    residual, branch = (torch.randn(3, 2, 3, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2))
    layer_scale = torch.randn(2, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([0.0, 1.0, 1.5], device=device)
    for function in (ours, expression):
        torch.autograd.gradcheck(lambda *t, f=function: f(*t, mask.double(), 1), (residual, branch, layer_scale))
    torch.autograd.gradcheck(lambda *t: ours(*t, None, mask.double(), 1), (residual, branch))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["dense", "axis 1 inside", "sliced"])
def test_opcheck(backend, layout, device, monkeypatch):
    residual, branch, grad_y = torch.randn(3, 2, 3, 2, 4, device=device)
    if backend == "triton" and dispatch.triton_unavailable_reasons(residual):
        pytest.skip("; ".join(dispatch.triton_unavailable_reasons(residual)))
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    residual, branch = laid_out(residual, layout), laid_out(branch, layout).half()
    mask, layer_scale = torch.tensor([0.0, 1.5], device=device), torch.randn(3, device=device)
    ops, traced = torch.ops.bbfast, backend == "torch"
    for m, scale in ((mask, layer_scale), (mask, None), (None, layer_scale)):
        check_op(ops.drop_path_add.default, (residual, branch, m, scale), traced=traced)
        kept = None if scale is None else branch
        check_op(
            ops.drop_path_add_backward.default, (laid_out(grad_y, layout), kept, m, scale, torch.float16), traced=traced
        )


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("scaled", [True, False])
def test_compile(channel_dim, scaled, device, monkeypatch):
    def function(residual, branch, layer_scale, mask, channel_dim):
        return drop_path_add(residual * 1.5, branch * 2, layer_scale=layer_scale, mask=mask, channel_dim=channel_dim)

    torch.compiler.reset()
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 6, 4, 6), (3, 6, 5, 6)):
        residual, branch, grad_y = torch.randn(3, *shape, device=device)
        layer_scale = torch.randn(6, device=device) if scaled else None
        config = {"mask": torch.arange(shape[0], device=device).float(), "channel_dim": channel_dim}
        expected = forward_and_backward(function, residual, branch, layer_scale, grad_y, **config)
        found = forward_and_backward(compiled, residual, branch, layer_scale, grad_y, **config)
        torch.testing.assert_close(found, expected)


def test_compile_draws_the_mask(device, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    torch.compiler.reset()
    layer = bbfast.nn.DropPathAdd(0.5).train()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    residual = torch.zeros(200, 3, 2, device=device)
    branch = torch.ones(200, 3, 2, device=device, requires_grad=True)
    y = compiled(residual, branch)
    y.sum().backward()
    assert torch.equal(y, branch.grad) and set(y.unique().tolist()) == {0.0, 2.0}
    assert 50 < (y[:, 0, 0] == 0).sum() < 150


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"residual": None}, TypeError, "residual must be a torch.Tensor"),
        ({"residual": torch.zeros(2)}, ValueError, "residual must have 2 to 4 dimensions"),
        ({"branch": torch.zeros(2, 4, 3, dtype=torch.int32)}, TypeError, "branch has dtype torch.int32"),
        ({"branch": torch.zeros(2, 4, 1)}, ValueError, "branch must have residual's shape"),
        ({"branch": torch.zeros(2, 4, 3, device="meta")}, ValueError, "branch is on meta"),
        ({"layer_scale": torch.zeros(3)}, ValueError, r"layer_scale must have shape \(4,\), one value per channel"),
        ({"layer_scale": torch.zeros(4), "channel_dim": -1}, ValueError, r"layer_scale must have shape \(3,\)"),
        ({"layer_scale": 1e-6}, TypeError, "layer_scale must be a torch.Tensor"),
        ({"mask": torch.zeros(2, 1)}, ValueError, r"mask must have shape \(2,\), one value per sample"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, TypeError, "mask has dtype torch.bool"),
        ({"channel_dim": 0}, ValueError, "channel_dim=0"),
        ({"channel_dim": "last"}, ValueError, "channel_dim='last'"),
        ({"drop_prob": 1.5}, ValueError, "drop_prob=1.5"),
        ({"drop_prob": math.nan}, ValueError, "drop_prob=nan"),
        ({"drop_prob": "0.1"}, TypeError, "drop_prob must be a float"),
        ({"training": 1}, TypeError, "training must be a bool"),
        ({"scale_by_keep": None}, TypeError, "scale_by_keep must be a bool"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"residual": torch.zeros(2, 4, 3), "branch": torch.zeros(2, 4, 3)} | change
    with pytest.raises(error, match=words):
        drop_path_add(**arguments)
