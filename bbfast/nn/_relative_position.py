"""Relative position bias tables for another window size."""

from __future__ import annotations

import numpy as np
import torch


def resize_relative_position_bias_table(
    table: torch.Tensor, window_size: tuple[int, int], new_window_size: tuple[int, int]
) -> torch.Tensor:
    """The table of `window_size` for `new_window_size`, in its dtype and on its device.

    Along each axis the old distances are placed in a geometric progression that ends where the new ones end, dense
    in the middle, where biases change most, and values between them are interpolated linearly (as BEiT's fine-tuning
    code does, and timm after it).

    Args:
        table: `[(2 wh - 1) * (2 ww - 1), num_heads]`.
        window_size, new_window_size: (height, width).
    """
    height, width = (2 * side - 1 for side in window_size)
    new_height, new_width = (2 * side - 1 for side in new_window_size)
    rows = (new_height * new_width, table.shape[1])
    if (height, width) == (new_height, new_width):
        return table
    if table.is_meta:
        return table.new_empty(rows)
    by_axis = table.detach().cpu().double().unflatten(0, (height, width))
    along_y, along_x = _interpolation_matrix(height, new_height), _interpolation_matrix(width, new_width)
    return torch.einsum("yh,xw,hwn->yxn", along_y, along_x, by_axis).reshape(rows).to(table)


def _interpolation_matrix(size: int, new_size: int) -> torch.Tensor:
    """`[new_size, size]`: what each old value adds to each new one; both sizes are odd, the middle is distance 0."""
    old, new = _geometric_distances(size, new_size), np.arange(new_size) - new_size // 2
    return torch.from_numpy(np.stack([np.interp(new, old, unit) for unit in np.eye(size)], axis=1))


def _geometric_distances(size: int, new_size: int) -> np.ndarray:
    """`size` distances around 0, each step `ratio` times as long as the one before, that reach about new_size // 2."""
    reach, steps = new_size // 2, size // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio ** np.arange(steps))
    return np.concatenate([-distances[::-1], [0.0], distances])
