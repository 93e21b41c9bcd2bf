"""What ops that add a branch under stochastic depth share: argument checks, and the draw of the mask."""

from __future__ import annotations

import torch

from bbfast.ops import _common


def check_branch(residual: torch.Tensor, branch) -> None:
    """Raises unless `branch` is a tensor of residual's shape on residual's device."""
    _common.check_tensor("branch", branch)
    if branch.shape != residual.shape:
        raise ValueError(f"branch must have residual's shape {tuple(residual.shape)}, got {tuple(branch.shape)}")
    if branch.device != residual.device:
        raise ValueError(f"branch is on {branch.device} but residual is on {residual.device}; move them to one device")


def check_vector(name: str, value, size: int, what: str, residual: torch.Tensor) -> None:
    """Raises unless `value` is None or a `[size]` tensor on residual's device, one value per `what`."""
    if value is None:
        return
    _common.check_tensor(name, value)
    if value.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), one value per {what}, got {tuple(value.shape)}")
    if value.device != residual.device:
        raise ValueError(f"{name} is on {value.device} but residual is on {residual.device}; move them to one device")


def check_drop(drop_prob, training, scale_by_keep) -> None:
    if isinstance(drop_prob, bool) or not isinstance(drop_prob, (int, float)):
        raise TypeError(f"drop_prob must be a float, got {type(drop_prob).__name__}")
    if not 0 <= drop_prob <= 1:  # NaN fails too
        raise ValueError(f"drop_prob={drop_prob} is not a probability; it must lie between 0 and 1")
    for name, value in (("training", training), ("scale_by_keep", scale_by_keep)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def scaled_dtype(branch: torch.Tensor, layer_scale: torch.Tensor | None) -> torch.dtype:
    """The dtype of `branch * layer_scale`, in which the mask is drawn."""
    return branch.dtype if layer_scale is None else torch.promote_types(branch.dtype, layer_scale.dtype)


def sample_multiplier(branch, layer_scale, drop_prob, training, scale_by_keep, mask) -> torch.Tensor | None:
    """What each sample of the branch is multiplied by, `[N]`: the given mask, a drawn one, or None for 1."""
    dtype = scaled_dtype(branch, layer_scale)
    if mask is not None:
        return mask.detach().to(dtype)
    if training and drop_prob > 0:
        return drop_path_mask(branch, drop_prob, scale_by_keep, dtype)
    return None


def drop_path_mask(x: torch.Tensor, drop_prob: float, scale_by_keep: bool = True, dtype=None) -> torch.Tensor:
    """Draws what each sample of a branch is multiplied by: `[N]` values 0 or 1 / keep (1 unless `scale_by_keep`).

    Draws as timm's drop_path does (one Bernoulli value per sample from torch's default generator, divided by the
    keep probability in the branch's dtype), so that equal seeds drop equal samples. `drop_prob=1` gives zeros.

    Args:
        x: the branch, samples first; gives N, device and, unless `dtype` says otherwise, the dtype.
    """
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.dim() - 1)
    mask = x.new_empty(shape, dtype=dtype or x.dtype).bernoulli_(keep_prob)
    if keep_prob > 0 and scale_by_keep:
        mask.div_(keep_prob)
    return mask.view(-1)
