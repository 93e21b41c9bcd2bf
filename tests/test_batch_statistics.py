"""The second stages of reductions, against float64."""

import pytest
import torch
from numerics import assert_within_rule, poison_new_empty

from bbfast import dispatch

kernels = pytest.importorskip("bbfast.triton_kernels.batch_statistics")


@pytest.fixture(autouse=True)
def need_kernels(device):
    reasons = dispatch.triton_unavailable_reasons(torch.empty(0, device=device))
    if reasons:
        pytest.skip("; ".join(reasons))


def partial_statistics(groups) -> torch.Tensor:
    """[P, 3, C] fp32 partials of a list of [rows, C] groups, some of them empty."""
    rows = []
    for group in groups:
        count = torch.full((group.shape[1],), float(group.shape[0]), device=group.device)
        mean = group.double().mean(0) if len(group) else torch.zeros_like(count).double()
        rows.append(torch.stack([count, mean.float(), (group.double() - mean).square().sum(0).float()]))
    return torch.stack(rows)


# (partials, channels): one and several tiles of both configurations, tails, one channel, one partial.
SHAPES = [(1, 1), (7, 24), (64, 65), (65, 5), (300, 9), (513, 1)]


@pytest.mark.parametrize("num_partials, channels", SHAPES)
@pytest.mark.parametrize("offset, spread", [(0.0, 1.0), (1000.0, 0.01)])
def test_finalize_statistics(num_partials, channels, offset, spread, device, monkeypatch):
    sizes = torch.randint(0, 6, (num_partials,)).tolist()
    sizes[0] = 2
    groups = [offset + spread * torch.randn(size, channels, device=device) for size in sizes]
    running_mean, running_var = torch.randn(channels, device=device), torch.rand(channels, device=device)
    momentum, eps = 0.3, 1e-5
    largest_mean = running_mean.abs().max().item()

    values = torch.cat(groups).double()
    mean, var = values.mean(0), values.var(0, correction=0)
    expected_mean = (1 - momentum) * running_mean.double() + momentum * mean
    expected_var = (1 - momentum) * running_var.double() + momentum * values.var(0)
    partials = partial_statistics(groups)

    poison_new_empty(monkeypatch)
    ours_mean, ours_invstd = kernels.finalize_statistics(partials, running_mean, running_var, momentum, eps)

    # A mean near 0 is a difference of partial means as large as single values, whose rounding is allowed.
    k = 4 * (1 + (values - mean).abs().max().item() / mean.abs().max().item())
    assert_within_rule("mean", ours_mean, mean, mean.float(), k=k)
    # The partials' means are rounded to fp32: what that alone does to M2 is allowed.
    rounding = offset * torch.finfo(torch.float32).eps / spread
    invstd = (var + eps).rsqrt()
    assert_within_rule("invstd", ours_invstd, invstd, invstd.float(), k=4 + rounding * 1e7)
    assert_within_rule(
        "running_mean", running_mean, expected_mean, expected_mean.float(), k=k, largest_term=largest_mean
    )
    assert_within_rule("running_var", running_var, expected_var, expected_var.float(), k=8 + rounding * 1e7)


def test_finalize_takes_running_statistics_of_other_dtypes_and_strides(device):
    partials = partial_statistics([torch.randn(9, 6, device=device), torch.randn(3, 6, device=device)])
    batch_mean, batch_var = torch.zeros(6, device=device), torch.zeros(6, device=device)
    kernels.finalize_statistics(partials, batch_mean, batch_var, 1.0, 1e-5)
    for dtype in (torch.float16, torch.float64):
        strided = torch.zeros(2, 12, dtype=dtype, device=device)[:, ::2]
        strided[0], strided[1] = torch.arange(6), torch.arange(6) + 1
        before = strided.clone()
        kernels.finalize_statistics(partials, strided[0], strided[1], 0.0, 1e-5)
        assert torch.equal(strided, before)
        kernels.finalize_statistics(partials, strided[0], strided[1], 1.0, 1e-5)
        assert torch.equal(strided, torch.stack([batch_mean, batch_var]).to(dtype))


def test_finalize_without_running_statistics(device):
    partials = partial_statistics([torch.randn(9, 6, device=device)])
    mean, invstd = kernels.finalize_statistics(partials, None, None, 0.1, 1e-3)
    running = torch.zeros(6, device=device), torch.ones(6, device=device)
    with_running = kernels.finalize_statistics(partials, *running, 0.1, 1e-3)
    assert torch.equal(mean, with_running[0]) and torch.equal(invstd, with_running[1])


@pytest.mark.parametrize("num_partials, columns", [*SHAPES, (3, 16400)])
def test_sum_partials(num_partials, columns, device, monkeypatch):
    partials = torch.randn(num_partials, columns, device=device)
    poison_new_empty(monkeypatch)
    ours = kernels.sum_partials(partials)
    assert_within_rule("sum", ours, partials.double().sum(0), partials.sum(0), rows=num_partials)
    assert torch.equal(ours, kernels.sum_partials(partials))


@pytest.mark.parametrize("num_partials, columns", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sum_partials_into(num_partials, columns, dtype, device, monkeypatch):
    partials = torch.randn(num_partials, 2 * columns, device=device)
    expected = kernels.sum_partials(partials)
    poison_new_empty(monkeypatch)
    for channels in {1, columns}:
        first, second = (torch.full((channels,), torch.nan, dtype=dtype, device=device) for _ in range(2))
        assert torch.equal(kernels.sum_partials_into(partials, first, second, keep_sums=True), expected)
        assert torch.equal(first, expected[:channels].to(dtype))
        assert torch.equal(second, expected[columns:][:channels].to(dtype))
        second.fill_(torch.nan)
        assert kernels.sum_partials_into(partials, None, second) is None
        assert torch.equal(second, expected[columns:][:channels].to(dtype))
    monkeypatch.setattr(kernels, "launch_kernel", None)
    assert kernels.sum_partials_into(partials, None) is None  # nothing is launched for nobody
    monkeypatch.undo()
    first = torch.full((2 * columns,), torch.nan, dtype=dtype, device=device)
    kernels.sum_partials_into(partials, first)
    assert torch.equal(first, expected.to(dtype))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("taps", [(3, 5), (1, 2), (7, 7)])
def test_sum_taps_into(taps, channels_last, device):
    partials = torch.randn(5, *taps, 24, device=device)
    grad_weight = torch.full((19, 1, *(taps if channels_last else taps[::-1])), torch.nan, device=device)
    kernels.sum_taps_into(partials, grad_weight, channels_last)
    sums = kernels.sum_partials(partials.flatten(1)).view(partials.shape[1:])[..., :19]
    assert torch.equal(grad_weight, sums.permute((2, 0, 1) if channels_last else (2, 1, 0)).unsqueeze(1))


def test_merge_welford(device):
    """The helper inside a kernel: two sets, one empty set, two empty sets."""
    import triton
    import triton.language as tl

    merge_welford = kernels.merge_welford

    global _merge_kernel

    @triton.jit
    def _merge_kernel(a_ptr, b_ptr, out_ptr, merge: tl.constexpr, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        count, mean, m2 = merge(
            tl.load(a_ptr + lane),
            tl.load(a_ptr + BLOCK + lane),
            tl.load(a_ptr + 2 * BLOCK + lane),
            tl.load(b_ptr + lane),
            tl.load(b_ptr + BLOCK + lane),
            tl.load(b_ptr + 2 * BLOCK + lane),
        )
        tl.store(out_ptr + lane, count)
        tl.store(out_ptr + BLOCK + lane, mean)
        tl.store(out_ptr + 2 * BLOCK + lane, m2)

    first = [torch.randn(n, 1, device=device) for n in (5, 0, 4, 0)]
    second = [torch.randn(n, 1, device=device) for n in (2, 3, 0, 0)]
    a = torch.cat([partial_statistics([g])[0] for g in first], 1).contiguous()
    b = torch.cat([partial_statistics([g])[0] for g in second], 1).contiguous()
    exact = torch.cat([partial_statistics([torch.cat([f, s])])[0] for f, s in zip(first, second)], 1)
    out = torch.full_like(a, torch.nan)
    _merge_kernel[(1,)](a, b, out, merge_welford, BLOCK=4)
    torch.testing.assert_close(out, exact)
