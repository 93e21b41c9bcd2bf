"""The tolerance rule that every op and model is held to."""

from __future__ import annotations

import math

import torch


def assert_within_rule(
    name: str,
    ours: torch.Tensor,
    exact: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    *,
    k: float = 4,
    rows: int = 1,
    largest_term: float = 0,
) -> None:
    """Requires max|ours - exact| <= 2 max|torch - exact| + k sqrt(rows) eps max|exact|, and prints both errors.

    Args:
        ours: what is tested; its dtype decides eps.
        exact: the reference, computed in float64.
        torch_same_dtype: plain torch in ours' dtype.
        k: allowance in units of the dtype's eps.
        rows: how many values are summed into one (weight gradients): the allowance grows with its root.
        largest_term: magnitude of what was added to get these values, where they may cancel: then the allowance goes by
            it, since the rounding of the terms stays.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: dtype {ours.dtype}, torch gives {torch_same_dtype.dtype}"
    if ours.numel() == 0:
        return
    exact = exact.double().cpu()
    assert exact.isfinite().all(), f"{name}: the reference is not finite; the test compares nothing"
    our_error = (ours.double().cpu() - exact).abs().max().item()
    torch_error = (torch_same_dtype.double().cpu() - exact).abs().max().item()
    magnitude = max(exact.abs().max().item(), largest_term)
    allowed = 2 * torch_error + k * math.sqrt(rows) * torch.finfo(ours.dtype).eps * magnitude
    print(f"{name}: error {our_error:.3g}, torch's {torch_error:.3g}, allowed {allowed:.3g}")
    assert our_error <= allowed, f"{name}: error {our_error:.3g} > {allowed:.3g} (torch's own error {torch_error:.3g})"


def check_op(op, args: tuple, *, traced: bool = True) -> None:
    """`torch.library.opcheck`. Tracing by AOTAutograd takes most of its time and sees the op's fake, not the backend.

    Args:
        traced: False leaves that part out, for a backend after the first: mutated inputs, the autograd registration,
            and the fake's shapes, dtypes and strides beside the real ones are checked all the same.
    """
    every_backend = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, args, **({} if traced else {"test_utils": every_backend}))


def poison_new_empty(monkeypatch) -> None:
    """Makes `Tensor.new_empty` hand out NaN, so that an output that a kernel does not write shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
