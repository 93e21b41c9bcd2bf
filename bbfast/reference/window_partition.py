"""Cutting a map into padded, cyclically shifted windows, and putting it together again."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Pair = tuple[int, int]

# What torch.roll takes on every device, in the place of what it does not: for a copy only the bits count.
_SAME_BITS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def window_partition(x: torch.Tensor, window_size: Pair, shift_size: Pair, pad_order: str) -> torch.Tensor:
    """x [B, H, W, C] -> [B * windows, window rows * window columns, C], windows of an image in reading order."""
    if (bits := _same_bits(x.dtype)) is not None:
        return window_partition(x.view(bits), window_size, shift_size, pad_order).view(x.dtype)
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
    if (bits := _same_bits(windows.dtype)) is not None:
        return window_reverse(windows.view(bits), window_size, image_size, shift_size, pad_order).view(windows.dtype)
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


def _same_bits(dtype: torch.dtype) -> torch.dtype | None:
    """A dtype of as many bits that torch.roll takes everywhere, where `dtype` itself is not one."""
    return torch.uint8 if dtype.is_floating_point and dtype.itemsize == 1 else _SAME_BITS.get(dtype)


def count_windows(image_size: Pair, window_size: Pair) -> Pair:
    """Windows of an image, down and across; the last ones may reach into padding."""
    (height, width), (rows, columns) = image_size, window_size
    return -(-height // rows), -(-width // columns)
