"""`window_attention`: kernels and reference against float64, timm and torchvision; determinism, memory, compile."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule, check_op, poison_new_empty
from torch._dynamo.testing import CompileCounterWithBackend

from bbfast import dispatch, extension
from bbfast.ops import window_attention
from bbfast.reference.window_attention import relative_position_index
from bbfast.reference.window_attention import window_attention as reference

NAMES = ("qkv", "table", "qkv_bias")
PAD_ORDERS = ("shift_then_pad", "pad_then_shift")


@dataclasses.dataclass
class Case:
    """One call; `check` makes random inputs and compares the output and all gradients with float64."""

    size: tuple = (14, 14)
    window: tuple = (7, 7)
    shift: tuple = (0, 0)
    heads: int = 2
    head_dim: int = 16
    batch: int = 1
    scale: float | None = None
    bias: bool = True
    pad_order: str = "shift_then_pad"
    mask_value: float = -100.0
    dtype: torch.dtype = torch.float32
    amplitude: float = 1.0

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    def tensors(self, device):
        qkv = self.amplitude * torch.randn(self.batch, *self.size, 3 * self.channels, device=device)
        table = torch.randn((2 * self.window[0] - 1) * (2 * self.window[1] - 1), self.heads, device=device)
        bias = torch.randn(3 * self.channels, device=device) if self.bias else None
        return [None if t is None else t.to(self.dtype) for t in (qkv, table, bias)]

    def ours(self, qkv, table, bias):
        return window_attention(
            qkv,
            table,
            num_heads=self.heads,
            window_size=self.window,
            shift_size=self.shift,
            scale=self.scale,
            qkv_bias=bias,
            pad_order=self.pad_order,
            mask_value=self.mask_value,
        )

    def expression(self, qkv, table, bias):
        """The reference's forward pass, differentiated by torch."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        config = (self.heads, self.window, self.shift, scale, self.pad_order, self.mask_value)
        return reference(qkv, table, bias, *config)

    def check(self, device, tensors=None, grad_y=None):
        tensors = self.tensors(device) if tensors is None else tensors
        if grad_y is None:
            grad_y = torch.randn(*tensors[0].shape[:3], self.channels, device=device).to(self.dtype)
        y, grads = forward_and_backward(self.ours, tensors, grad_y)
        exact = forward_and_backward(self.expression, tensors, grad_y, torch.float64)
        plain = forward_and_backward(self.expression, tensors, grad_y)
        assert y.is_contiguous()
        assert_within_rule("y", y, exact[0], plain[0])
        pairs = self.batch * -(-self.size[0] // self.window[0]) * -(-self.size[1] // self.window[1])
        rows = {"qkv": 1, "table": pairs, "qkv_bias": pairs}
        for name, grad, exact_grad, plain_grad in zip(NAMES, grads, exact[1], plain[1]):
            if exact_grad is not None:
                assert_within_rule(f"grad {name}", grad, exact_grad, plain_grad, rows=rows[name])
        return y, grads


def forward_and_backward(function, tensors, grad_y, dtype=None):
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, grad_y.to(y.dtype), allow_unused=True, materialize_grads=True))
    return y.detach(), [None if leaf is None else next(found) for leaf in leaves]


# ---- the reference against timm and torchvision ----------------------------------------------------------------


def random_block(channels, rows, heads):
    """Weights of a Swin block's attention in float64, with an identity as its projection."""
    weight, bias = torch.randn(3 * channels, channels).double() / channels**0.5, torch.randn(3 * channels).double()
    table = torch.randn(rows, heads).double()
    return [t.requires_grad_() for t in (weight, bias, table)]


def compare(ours, theirs, leaves):
    y, expected = ours(), theirs()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    grad_y = torch.randn_like(y)
    grads, expected_grads = (torch.autograd.grad(out, leaves, grad_y) for out in (y, expected))
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


SIZES = [
    ((14, 14), 7, 3),
    ((9, 12), 7, 3),
    ((5, 9), 7, 3),
    ((16, 20), 8, 4),
    ((9, 13), (4, 8), (2, 3)),
    ((7, 9), 4, (0, 2)),
]


@pytest.mark.parametrize("size, window, shift", SIZES + [((14, 15), 7, 0)])
def test_reference_is_timm(size, window, shift):
    swin = pytest.importorskip("timm.models.swin_transformer")
    channels, heads = 12, 3
    block = swin.SwinTransformerBlock(
        channels, size, heads, window_size=window, shift_size=shift, always_partition=True, dynamic_mask=True
    ).double()
    weight, bias, table = random_block(channels, len(block.attn.relative_position_bias_table), heads)
    index = block.attn.relative_position_index
    assert torch.equal(relative_position_index(block.window_size), index)
    x = torch.randn(2, *size, channels).double().requires_grad_()
    parameters = {"attn.qkv.weight": weight, "attn.qkv.bias": bias, "attn.relative_position_bias_table": table}
    parameters |= {"attn.proj.weight": torch.eye(channels).double(), "attn.proj.bias": torch.zeros(channels).double()}

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block._attn(x)

    def theirs():
        return torch.func.functional_call(Attention(), {f"block.{k}": v for k, v in parameters.items()}, (x,))

    def ours():
        config = {"num_heads": heads, "window_size": window, "shift_size": shift, "qkv_bias": bias}
        return window_attention(F.linear(x, weight, bias), table, **config)

    compare(ours, theirs, (x, weight, bias, table))


@pytest.mark.parametrize("size, window, shift", SIZES)
def test_reference_is_torchvision(size, window, shift):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    channels, heads = 12, 3
    pairs = [(value, value) if isinstance(value, int) else value for value in (window, shift)]
    # torchvision drops the shift where one window spans the padded map; the op does what it is told.
    pairs[1] = tuple(0 if w >= length else s for w, length, s in zip(pairs[0], size, pairs[1]))
    weight, bias, table = random_block(channels, (2 * pairs[0][0] - 1) * (2 * pairs[0][1] - 1), heads)
    x = torch.randn(2, *size, channels).double().requires_grad_()

    def theirs():
        position_bias = table[relative_position_index(pairs[0])].permute(2, 0, 1)[None]
        return swin.shifted_window_attention(
            x, weight, torch.eye(channels).double(), position_bias, list(pairs[0]), heads, list(pairs[1]), qkv_bias=bias
        )

    def ours():
        config = {"num_heads": heads, "window_size": window, "shift_size": pairs[1], "pad_order": "pad_then_shift"}
        return window_attention(F.linear(x, weight, bias), table, qkv_bias=bias, **config)

    compare(ours, theirs, (x, weight, bias, table))


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_reference_gradients(pad_order):
    """The written-out backward pass against torch's of the forward pass, in float64."""
    for size, window, shift in SIZES:
        window, shift = ((v, v) if isinstance(v, int) else v for v in (window, shift))
        case = Case(size, window, shift, heads=3, head_dim=4, batch=2, scale=-0.3, pad_order=pad_order)
        case.dtype = torch.float64
        tensors = case.tensors("cpu")
        grad_y = torch.randn(2, *size, 12).double()
        found, expected = (forward_and_backward(f, tensors, grad_y) for f in (case.ours, case.expression))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ---- kernels against float64 -----------------------------------------------------------------------------------

CASES = {
    "shifted": Case((14, 14), shift=(3, 3), heads=1),
    "two heads": Case((7, 14), shift=(3, 3)),
    "not shifted, one window": Case((7, 7), heads=1, batch=2),
    "padded": Case((9, 12), shift=(3, 3), heads=1),
    "padded first": Case((9, 12), shift=(3, 3), heads=1, pad_order="pad_then_shift"),
    "padded, shifted along one axis": Case((5, 9), shift=(0, 3), heads=1, bias=False),
    "padded first, small": Case((5, 9), shift=(3, 3), heads=1, pad_order="pad_then_shift"),
    "map smaller than the window": Case((2, 3), shift=(3, 4), heads=1, batch=2),
    "map smaller than the window, padded first": Case((2, 3), shift=(3, 4), heads=1, pad_order="pad_then_shift"),
    "8 x 8, another scale": Case((8, 16), (8, 8), (4, 4), heads=1, scale=0.7),
    "4 x 8, narrow heads": Case((9, 13), (4, 8), (2, 3), heads=3, head_dim=5, scale=-0.4),
    "2 x 3, wide heads": Case((5, 4), (2, 3), (1, 1), heads=1, head_dim=24),
    "one token": Case((3, 2), (1, 1), heads=2),
    "12 x 12": Case((12, 12), (12, 12), (6, 6), heads=1),
    "several tiles, two heads": Case((11, 3), (11, 6), (4, 3), heads=2),
    "several tiles, padded first": Case((5, 13), (12, 8), (6, 3), heads=1, pad_order="pad_then_shift"),
    "half precision": Case((9, 12), shift=(3, 3), heads=1, dtype=torch.float16),
    "half precision, padded first": Case(
        (9, 12), shift=(3, 3), heads=1, pad_order="pad_then_shift", dtype=torch.float16
    ),
    "half precision, several tiles": Case((9, 5), (9, 8), (4, 3), heads=1, dtype=torch.float16),
    "mask of minus infinity": Case((14, 7), shift=(3, 0), heads=1, mask_value=-math.inf),
    # The first tile of 32 keys holds none that the last queries may see.
    "mask of minus infinity, several tiles": Case((12, 8), (12, 8), (4, 0), heads=1, mask_value=-math.inf),
}


def use_kernels(monkeypatch, device):
    """Forbids the reference, and fills what kernels forget to write with NaN."""
    reasons = dispatch.triton_unavailable_reasons(torch.empty(0, device=device))
    if reasons:
        pytest.skip("; ".join(reasons))
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setenv("BBFAST_STRICT", "1")
    poison_new_empty(monkeypatch)


EXTENSION = {"cpu": "cpp", "cuda": "cuda"}


def use_extension(monkeypatch, device):
    monkeypatch.setenv("BBFAST_BACKEND", EXTENSION[device])
    monkeypatch.setenv("BBFAST_STRICT", "1")


@pytest.mark.parametrize("name", CASES)
def test_kernels(name, device, monkeypatch):
    use_kernels(monkeypatch, device)
    CASES[name].check(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [7, 8, 12, 14, 16])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_kernels_at_real_sizes(dtype, window, head_dim, device, monkeypatch):
    use_kernels(monkeypatch, device)
    shift = (window // 2, window // 2)
    Case((57, 61), (window, window), shift, heads=3, head_dim=head_dim, batch=4, dtype=dtype).check(device)


@pytest.mark.parametrize("use", [use_kernels, use_extension])
@pytest.mark.parametrize("window", [(7, 7), (9, 8)])
def test_huge_logits(window, use, device, monkeypatch):
    """Logits of +-1e4 are finite, one-hot and right, where exponentials without the maximum would overflow."""
    use(monkeypatch, device)
    case = Case(window, window, heads=1, amplitude=50.0, scale=1.0)
    tensors = case.tensors(device)
    q, k, _ = tensors[0].flatten(1, 2).chunk(3, -1)
    assert (q @ k.transpose(1, 2)).abs().max() > 1e4
    y, grads = case.check(device, tensors)
    assert all(t.isfinite().all() for t in (y, *grads))


@pytest.mark.parametrize("use", [use_kernels, use_extension])
def test_a_masked_key_can_win(use, device, monkeypatch):
    """-100 is an offset, not a prohibition: a key that rolling brought along takes a query that wants it enough."""
    use(monkeypatch, device)
    case = Case((4, 4), (4, 4), (2, 2), heads=1, scale=1.0, bias=False)
    qkv, table, _ = case.tensors(device)
    qkv, table = torch.zeros_like(qkv), torch.zeros_like(table)
    qkv[0, 0, 0, 0] = 1.0  # query; rolled into another region than the key
    qkv[0, 2, 2, 16] = 200.0  # key
    qkv[0, 2, 2, 32:] = 1.0  # value
    assert torch.allclose(case.ours(qkv, table, None)[0, 0, 0], torch.ones(16, device=device))
    qkv[0, 2, 2, 16] = 50.0
    assert torch.allclose(case.ours(qkv, table, None)[0, 0, 0], torch.zeros(16, device=device))


@pytest.mark.parametrize("which", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("qkv", "grad")), "both"])
def test_other_strides(which, device, monkeypatch):
    """qkv as a view of [B, 3C, H, W], as a slice, and gradients that are not dense."""
    use_kernels(monkeypatch, device)
    case = Case((5, 9), shift=(3, 3), heads=2, batch=2)
    tensors = case.tensors(device)
    grad_y = torch.randn(2, 5, 9, 32, device=device)
    if which != "grad":
        tensors[0] = tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        tensors[1] = tensors[1].T.contiguous().T
        tensors[2] = torch.stack((tensors[2], tensors[2]), 1)[:, 0]
    if which != "qkv":
        grad_y = grad_y.new_full((3, 7, 9, 40), math.nan)[1:, 1:6, :, 3:35].copy_(grad_y)
    case.check(device, tensors, grad_y)


def test_expanded_gradient(device, monkeypatch):
    use_kernels(monkeypatch, device)
    case = Case((4, 6), (4, 4), (1, 2), heads=2)
    case.check(device, grad_y=torch.ones((), device=device).expand(1, 4, 6, 32))


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float32, torch.float32), (torch.float32, torch.float16, None)]
)
def test_mixed_dtypes(dtypes, device, monkeypatch):
    """As under autocast: qkv in half precision, parameters in fp32; and the other way round."""
    use_kernels(monkeypatch, device)
    case = Case((5, 6), (4, 4), (1, 2), heads=2)
    tensors = [None if d is None else t.to(d) for t, d in zip(case.tensors(device), dtypes)]
    case.dtype = dtypes[0]
    y, grads = case.check(device, tensors)
    assert y.dtype == dtypes[0]
    assert [grad.dtype for grad in grads if grad is not None] == [d for d in dtypes if d is not None]


def test_gradients_are_the_same_on_every_run(device, monkeypatch):
    use_kernels(monkeypatch, device)
    for case in (Case((5, 9), shift=(3, 3), heads=1, batch=2), Case((9, 7), (9, 8), (4, 3), heads=1)):
        tensors = case.tensors(device)
        grad_y = torch.randn(case.batch, *case.size, case.channels, device=device)
        (y, grads), (y_again, grads_again) = (forward_and_backward(case.ours, tensors, grad_y) for _ in range(2))
        assert torch.equal(y, y_again)
        assert all(torch.equal(*pair) for pair in zip(grads, grads_again))


@pytest.mark.parametrize("tokens_beyond_64", [False, True])
def test_several_windows_per_program(tokens_beyond_64, device, monkeypatch):
    """Programs that walk over several windows, the last one over fewer: sums must carry on and partials add up."""
    from bbfast.triton_kernels import window_attention as kernels

    use_kernels(monkeypatch, device)
    monkeypatch.setattr(kernels, "_windows_per_program", lambda *args: 2)
    window, size = ((9, 8), (9, 20)) if tokens_beyond_64 else ((4, 4), (4, 18))
    Case(size, window, (1, 2), heads=1).check(device)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed(needs, device, monkeypatch):
    use_kernels(monkeypatch, device)
    for case in (Case((3, 5), (4, 4), (1, 2), heads=1), Case((9, 7), (9, 8), (1, 2), heads=1)):
        tensors = case.tensors(device)
        grad_y = torch.randn(1, *case.size, 16, device=device)
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs)]
        case.ours(*leaves).backward(grad_y)
        _, expected = forward_and_backward(case.expression, tensors, grad_y)
        for leaf, grad, need in zip(leaves, expected, needs):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-4)


# ---- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, tokens", [((7, 7), 49), ((9, 8), 72)])
def test_only_outputs_are_large(window, tokens, device, monkeypatch):
    """No rolled, partitioned, masked or reversed tensor: what is allocated besides outputs does not grow with them."""
    from bbfast.triton_kernels import window_attention as kernels

    use_kernels(monkeypatch, device)
    monkeypatch.setattr(kernels, "_windows_per_program", lambda device, windows, *rest: windows)
    new_empty, allocated = torch.Tensor.new_empty, []

    def counted(self, size, *args, **kwargs):
        if size != 0:  # not the interpreter's own
            allocated.append(tuple(size) if isinstance(size, (tuple, torch.Size)) else (size,))
        return new_empty(self, size, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    for name in ("new_zeros", "new_full", "roll", "clone", "contiguous", "reshape", "copy_"):
        monkeypatch.setattr(torch.Tensor, name, _not_on_maps(name))
    beyond_outputs = []
    for batch in (1, 2):
        case = Case((window[0], 2 * window[1]), window, (3, 3), heads=1, batch=batch, bias=False)
        qkv, table, _ = case.tensors(device)
        config = (1, window, (3, 3), 0.25, "shift_then_pad", -100.0)
        allocated.clear()
        y = kernels.forward(qkv, table, None, *config)
        kernels.backward(torch.randn_like(y), qkv, table, None, *config, True, False)
        shapes = list(allocated)
        shapes.remove(tuple(y.shape))
        shapes.remove(tuple(qkv.shape))
        if tokens > 64:  # two fp32 values per token and head, for the backward kernels to share
            shapes.remove((2 * batch, 1, 2, 96))
        beyond_outputs.append(shapes)
    # The expanded bias of forward and of backward, the partial sums of its gradient, the table's gradient.
    assert beyond_outputs[0] == beyond_outputs[1] and len(beyond_outputs[0]) == 4


@pytest.mark.parametrize("window", [(7, 7), (9, 8)])
def test_forward_moves_each_element_once(window, device, monkeypatch):
    """Counted at every load and store: q is read once, k and v once per tile of queries, y is written once."""
    if device != "cpu":
        pytest.skip("only Triton's interpreter lets loads be counted")
    from triton.runtime.interpreter import InterpreterBuilder

    from bbfast.triton_kernels import window_attention as kernels

    use_kernels(monkeypatch, device)
    load, store, loaded, stored = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, [], []

    def counted_load(self, ptrs, mask, *args):
        loaded.append(torch.from_numpy(ptrs.data[mask.data].astype("int64")))
        return load(self, ptrs, mask, *args)

    def counted_store(self, ptrs, value, mask, *args):
        stored.append(torch.from_numpy(ptrs.data[mask.data].astype("int64")))
        return store(self, ptrs, value, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    case = Case((11, 10), window, (3, 4), heads=2)
    qkv, table, bias = case.tensors(device)
    y = kernels.forward(qkv, table, bias, case.heads, window, case.shift, 0.25, case.pad_order, case.mask_value)

    def times(addresses, tensor):
        """How often each element is among the addresses."""
        index = (torch.cat(addresses) - tensor.data_ptr()) // tensor.element_size()
        index = index[(index >= 0) & (index < tensor.numel())]
        return torch.bincount(index, minlength=tensor.numel()).view(tensor.shape)

    reads = times(loaded, qkv)
    query_tiles = kernels.forward_tile(window[0] * window[1], case.head_dim, case.dtype).query_tiles
    assert (query_tiles == 1) == (window == (7, 7))
    assert (reads[..., : case.channels] == 1).all() and (reads[..., case.channels :] == query_tiles).all()
    assert (times(stored, y) == 1).all()


def _not_on_maps(name):
    function = getattr(torch.Tensor, name)

    def guarded(self, *args, **kwargs):
        assert self.dim() < 4, f"the launcher calls {name} on a tensor of shape {tuple(self.shape)}"
        return function(self, *args, **kwargs)

    return guarded


# ---- the extension -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_extension(name, device, monkeypatch):
    use_extension(monkeypatch, device)
    CASES[name].check(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_extension_in_other_dtypes(dtype, pad_order, device, monkeypatch):
    use_extension(monkeypatch, device)
    Case((9, 12), shift=(3, 3), heads=3, batch=2, pad_order=pad_order, dtype=dtype).check(device)


@pytest.mark.parametrize("window", [(7, 7), (8, 8), (16, 17), (1, 3)])
@pytest.mark.parametrize("head_dim", [1, 4, 31, 32, 64])
def test_extension_sizes(window, head_dim, device, monkeypatch):
    """Tokens and head_dim that do and do not fill vectors; every count of queries that is left over."""
    use_extension(monkeypatch, device)
    Case((9, 10), window, (0, 1), heads=2, head_dim=head_dim, batch=2).check(device)


@pytest.mark.parametrize("strides", ["sliced", "permuted"])
def test_extension_with_strides(strides, device, monkeypatch):
    use_extension(monkeypatch, device)
    case = Case((9, 12), shift=(3, 3), batch=3)
    qkv, table, bias = case.tensors(device)
    if strides == "sliced":
        wide = torch.full((6, 11, 14, 3 * case.channels + 5), math.nan, device=device)
        wide[::2, 1:10, 2:, 5:] = qkv
        qkv = wide[::2, 1:10, 2:, 5:]
    else:
        qkv = qkv.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        table = table.T.contiguous().T
    case.check(device, [qkv, table, bias])


def test_extension_keeps_windows_and_heads_apart(device, monkeypatch):
    """What is not finite stays in its window and head, with padding, a mask and odd vectors around it."""
    use_extension(monkeypatch, device)
    case = Case((9, 12), shift=(3, 3), head_dim=12, batch=2, bias=False)
    qkv, table, _ = case.tensors(device)
    expected = case.ours(qkv, table, None)
    spoiled = qkv.clone()
    spoiled[1, 4, 5, 12:24] = math.nan  # queries of the second head
    spoiled[1, 4, 5, 36:48] = math.inf  # its keys
    spoiled[1, 4, 5, 60:72] = -math.inf  # its values
    y = case.ours(spoiled, table, None)
    different = (y != expected).any(0).any(2)
    assert different.any() and not different[1:3].any() and not different[:, :3].any() and not different[:, 10:].any()
    assert torch.equal(y[0], expected[0]) and torch.equal(y[..., :12], expected[..., :12])
    assert y[1, 4, 5, 12:].isnan().all()


def test_extension_does_not_depend_on_threads(monkeypatch):
    use_extension(monkeypatch, "cpu")
    case = Case((20, 23), shift=(3, 2), heads=3, batch=2)
    tensors = case.tensors("cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(case.ours(*tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"qkv": torch.zeros(1, 4, 4, 6, dtype=torch.float64)}, "qkv must be float32"),
        ({"qkv": torch.zeros(1, 4, 4, 7)}, "qkv's last axis"),
        ({"qkv": torch.zeros(1, 4, 6, 4).transpose(2, 3)}, "channels must lie side by side"),
        ({"table": torch.zeros(8, 1)}, "relative_position_bias_table must have shape"),
        ({"table": torch.zeros(9, 1, dtype=torch.int64)}, "relative_position_bias_table must be floating-point"),
        ({"qkv_bias": torch.zeros(5)}, "qkv_bias must have shape"),
        ({"shift_size": (2, 0)}, "a shift of 2 and a window of 2"),
        ({"window_size": (2**31, 2)}, "a shift of 1 and a window of 2147483648"),
    ],
)
def test_extension_checks_its_arguments(change, words):
    """A second wall behind the op's checks: nothing reads outside of a tensor, whoever calls."""
    arguments = {"qkv": torch.zeros(1, 4, 4, 6), "table": torch.zeros(9, 1), "qkv_bias": None, "num_heads": 1}
    arguments |= {"window_size": (2, 2), "shift_size": (1, 1), "scale": 1.0, "pad_first": False, "mask_value": -100.0}
    extension.load().window_attention(**arguments)
    with pytest.raises(ValueError, match=words):
        extension.load().window_attention(**(arguments | change))


# ---- reference, empty batches, torch.library, compile ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_in_each_dtype(dtype, device, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    for pad_order in PAD_ORDERS:
        Case((9, 12), shift=(3, 3), heads=3, batch=2, pad_order=pad_order, dtype=dtype).check(device)


@pytest.mark.parametrize("shape", [(0, 7, 7), (2, 0, 7)])
def test_empty_batch(shape, device):
    qkv = torch.randn(*shape, 48, device=device, requires_grad=True)
    table = torch.randn(169, 2, device=device, requires_grad=True)
    bias = torch.randn(48, device=device, requires_grad=True)
    y = window_attention(qkv, table, num_heads=2, window_size=7, shift_size=3, qkv_bias=bias)
    assert y.shape == (*shape, 16)
    y.sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert torch.equal(table.grad, torch.zeros_like(table)) and torch.equal(bias.grad, torch.zeros_like(bias))


def test_autocast(device, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    case = Case((4, 6), (4, 4), heads=1)
    tensors = case.tensors(device)
    with torch.autocast(device, torch.bfloat16):
        y = case.ours(*tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, case.ours(tensors[0].bfloat16(), *tensors[1:]))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float64}, "qkv has dtype torch.float64"),
        ({"window": (16, 17)}, "a window of 272 tokens; kernels take up to 256"),
        ({"head_dim": 129}, "head_dim is 129; kernels take up to 128"),
    ],
)
def test_what_the_triton_kernels_leave_to_others(change, words, device, monkeypatch):
    case = dataclasses.replace(Case((4, 5), (4, 4), heads=1, bias=False), **change)
    case.check(device)
    for op in ("window_attention", "window_attention_backward"):
        choice = dispatch.last_choices()[op]
        assert choice.backend == EXTENSION[device] and any(words in reason for reason in choice.reasons)
    monkeypatch.setenv("BBFAST_BACKEND", "triton")
    monkeypatch.setenv("BBFAST_STRICT", "1")
    with pytest.raises(dispatch.BackendUnavailableError, match=words):
        case.ours(*case.tensors(device))


@pytest.mark.parametrize("backend, layout", [("torch", "dense"), ("torch", "permuted"), ("triton", "permuted")])
def test_opcheck(backend, layout, device, monkeypatch):
    if backend == "triton":
        use_kernels(monkeypatch, device)
        monkeypatch.undo()
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    case = Case((2, 3), (2, 2), heads=1, batch=2)
    qkv, table, bias = case.tensors(device)
    grad_y = torch.randn(2, 2, 3, 16, device=device)
    if layout == "permuted":
        qkv, grad_y = (t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (qkv, grad_y))
    config = (1, (2, 2), (1, 0), None, "shift_then_pad", -100.0)
    ops, traced = torch.ops.bbfast, backend == "torch"
    for with_bias in (bias, None):
        check_op(ops.window_attention.default, (qkv, table, with_bias, *config), traced=traced)
        needed = (True, with_bias is not None)
        check_op(
            ops.window_attention_backward.default, (grad_y, qkv, table, with_bias, *config, *needed), traced=traced
        )
    check_op(ops.window_attention_backward.default, (grad_y, qkv, table, None, *config, False, False), traced=traced)


def test_compile(device, monkeypatch):
    """One graph, forward and backward, for every batch and image size."""
    torch.compiler.reset()
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    backend = CompileCounterWithBackend("aot_eager")

    def function(qkv, table, bias):
        return window_attention(qkv * 1.5, table, num_heads=2, window_size=(4, 5), shift_size=2, qkv_bias=bias) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch, size in ((5, (9, 12)), (3, (8, 10)), (4, (6, 21))):
        case = Case(size, (4, 5), heads=2, batch=batch)
        tensors = case.tensors(device)
        grad_y = torch.randn(batch, *size, 32, device=device)
        expected = forward_and_backward(function, tensors, grad_y)
        torch.testing.assert_close(forward_and_backward(compiled, tensors, grad_y), expected)
    assert backend.frame_count <= 2  # of one trace: forward and, later, backward


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"qkv": None}, TypeError, "qkv must be a torch.Tensor"),
        ({"qkv": torch.zeros(1, 7, 7, 48, dtype=torch.int32)}, TypeError, "qkv has dtype torch.int32"),
        ({"qkv": torch.zeros(7, 7, 48)}, ValueError, r"qkv must have 4 dimensions \[B, H, W, 3C\]"),
        ({"qkv": torch.zeros(1, 7, 7, 44)}, ValueError, r"qkv's last axis must hold \(3, num_heads=2, head_dim\)"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got float"),
        ({"num_heads": True}, TypeError, "num_heads must be an int, got bool"),
        ({"num_heads": 0}, ValueError, "num_heads=0"),
        ({"relative_position_bias_table": [1]}, TypeError, "relative_position_bias_table must be a torch.Tensor"),
        ({"relative_position_bias_table": torch.zeros(169, 3)}, ValueError, r"table must have shape \(169, 2\)"),
        ({"relative_position_bias_table": torch.zeros(169, 2, device="meta")}, ValueError, "table is on meta"),
        ({"window_size": 8}, ValueError, r"table must have shape \(225, 2\) for window_size=\(8, 8\)"),
        ({"qkv_bias": torch.zeros(16)}, ValueError, r"qkv_bias must have shape \(48,\)"),
        ({"qkv_bias": torch.zeros(48, dtype=torch.bool)}, TypeError, "qkv_bias has dtype torch.bool"),
        ({"qkv_bias": torch.zeros(48, device="meta")}, ValueError, "qkv_bias is on meta"),
        ({"window_size": 0}, ValueError, "window_size=0"),
        ({"window_size": "7"}, TypeError, "window_size must be an int or two ints"),
        ({"shift_size": -1}, ValueError, "shift_size=-1"),
        ({"shift_size": (0, 7)}, ValueError, r"shift_size=\(0, 7\) must be smaller than window_size=\(7, 7\)"),
        ({"scale": "1"}, TypeError, "scale must be a float"),
        ({"scale": math.inf}, ValueError, "scale=inf"),
        ({"mask_value": None}, TypeError, "mask_value must be a float"),
        ({"mask_value": math.nan}, ValueError, "mask_value=nan"),
        ({"pad_order": "pad"}, ValueError, "pad_order='pad' is not known; allowed: 'shift_then_pad', 'pad_then_shift'"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"qkv": torch.zeros(1, 7, 7, 48), "relative_position_bias_table": torch.zeros(169, 2)}
    arguments |= {"num_heads": 2, "window_size": 7} | change
    with pytest.raises(error, match=words):
        window_attention(**arguments)
