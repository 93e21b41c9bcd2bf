"""Cutting a map into padded, cyclically shifted windows, and putting it together again."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Pair = tuple[int, int]


def window_partition(x: torch.Tensor, window_size: Pair, shift_size: Pair, pad_order: str) -> torch.Tensor:
    """x [B, H, W, C] -> [B * windows, window rows * window columns, C], windows of an image in reading order."""
    batch, height, width, channels = x.shape
    (rows, columns), (down, across) = window_size, count_windows((height, width), window_size)
    padding = (0, 0, 0, across * columns - width, 0, down * rows - height)
    if pad_order == "pad_then_shift":
        x = F.pad(x, padding)
    x = torch.roll(x, (-shift_size[0], -shift_size[1]), (1, 2))
    if pad_order == "shift_then_pad":
        x = F.pad(x, padding)
    x = x.reshape(batch, down, rows, across, columns, channels).permute(0, 1, 3, 2, 4, 5)
    return x.clone(memory_format=torch.contiguous_format).view(batch * down * across, rows * columns, channels)


def window_reverse(
    windows: torch.Tensor, window_size: Pair, image_size: Pair, shift_size: Pair, pad_order: str
) -> torch.Tensor:
    """windows [B * windows, window rows * window columns, C] -> [B, H, W, C]; what was padding is cropped."""
    channels = windows.shape[2]
    (height, width), (rows, columns) = image_size, window_size
    down, across = count_windows(image_size, window_size)
    batch = windows.shape[0] // (down * across)
    x = windows.reshape(batch, down, across, rows, columns, channels).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, down * rows, across * columns, channels)
    if pad_order == "shift_then_pad":
        x = x[:, :height, :width]
    x = torch.roll(x, shift_size, (1, 2))
    if pad_order == "pad_then_shift":
        x = x[:, :height, :width]
    return x.clone(memory_format=torch.contiguous_format)


def count_windows(image_size: Pair, window_size: Pair) -> Pair:
    """Windows of an image, down and across; the last ones may reach into padding."""
    (height, width), (rows, columns) = image_size, window_size
    return -(-height // rows), -(-width // columns)
