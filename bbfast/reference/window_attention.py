"""Windowed multi-head attention with relative position bias on an un-partitioned map, the long way: tensors are
rolled, padded, partitioned, masked and put back, as the Swin paper and timm do it.

The backward pass is written out as well, since the op that runs it lies below autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class Windows:
    """Where the windows of a `[B, height, width, C]` map lie.

    Attributes:
        size, shift: (height, width) of a window, and by how much the map is rolled up and left first.
        pad_order: "shift_then_pad" rolls the map and pads what it gets (timm), "pad_then_shift" the other way round
            (torchvision, transformers).
    """

    height: int
    width: int
    size: tuple[int, int]
    shift: tuple[int, int]
    pad_order: str

    @property
    def count(self) -> tuple[int, int]:
        """Windows from top to bottom and from left to right."""
        return -(-self.height // self.size[0]), -(-self.width // self.size[1])

    @property
    def padded(self) -> tuple[int, int]:
        return self.count[0] * self.size[0], self.count[1] * self.size[1]

    def partition(self, x: torch.Tensor, fill: torch.Tensor | None) -> torch.Tensor:
        """[B, H, W, C] -> [B * windows, tokens, C]; padding holds `fill` [C] (None: zeros)."""
        if self.pad_order == "shift_then_pad":
            x = self._pad(self._roll(x, -1), fill)
        else:
            x = self._roll(self._pad(x, fill), -1)
        batch, channels = x.shape[0], x.shape[3]
        x = x.reshape(batch, self.count[0], self.size[0], self.count[1], self.size[1], channels).transpose(2, 3)
        return x.reshape(batch * self.count[0] * self.count[1], self.size[0] * self.size[1], channels)

    def reverse(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The map [B, H, W, C] that the windows came from, and the sum [C] of what lies in the padding."""
        batch, channels = windows.shape[0] // (self.count[0] * self.count[1]), windows.shape[2]
        x = windows.reshape(batch, *self.count, *self.size, channels).transpose(2, 3)
        x = x.reshape(batch, *self.padded, channels)
        if self.pad_order == "pad_then_shift":
            x = self._roll(x, 1)
        padding = x[:, self.height :].sum((0, 1, 2)) + x[:, : self.height, self.width :].sum((0, 1, 2))
        x = x[:, : self.height, : self.width]
        return (self._roll(x, 1) if self.pad_order == "shift_then_pad" else x).contiguous(), padding

    def masked_pairs(self, device: torch.device) -> torch.Tensor | None:
        """[windows, tokens, tokens]: pairs that only rolling brought together, on the padded map; None if it did not.

        Rolling wraps the first `shift` rows around to the bottom of the last row of windows (columns likewise), where
        they must not see the rows above them.
        """
        if not any(self.shift):
            return None
        regions = []
        for length, shift in zip(self.padded, self.shift):
            position = torch.arange(length, device=device)
            regions.append((position >= length - shift) if shift else torch.zeros_like(position, dtype=torch.bool))
        region = 2 * regions[0].long()[:, None] + regions[1].long()
        region = region.reshape(self.count[0], self.size[0], self.count[1], self.size[1]).transpose(1, 2)
        region = region.reshape(self.count[0] * self.count[1], -1)
        return region[:, :, None] != region[:, None, :]

    def _roll(self, x: torch.Tensor, sign: int) -> torch.Tensor:
        return x.roll((sign * self.shift[0], sign * self.shift[1]), (1, 2)) if any(self.shift) else x

    def _pad(self, x: torch.Tensor, fill: torch.Tensor | None) -> torch.Tensor:
        bottom, right = self.padded[0] - self.height, self.padded[1] - self.width
        if not (bottom or right):
            return x
        x = pad(x, (0, 0, 0, right, 0, bottom))
        if fill is None:
            return x
        rows = torch.arange(self.padded[0], device=x.device) < self.height
        columns = torch.arange(self.padded[1], device=x.device) < self.width
        return torch.where((rows[:, None] & columns)[:, :, None], x, fill.to(x.dtype))


def relative_position_index(window_size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """[tokens, tokens]: the table's row for query i and key j.

    That is (dy + wh - 1)(2 ww - 1) + dx + ww - 1 where i lies dy below and dx to the right of j.
    """
    height, width = window_size
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    down = row[:, None] - row + height - 1
    right = column[:, None] - column + width - 1
    return down * (2 * width - 1) + right


def window_attention(
    qkv: torch.Tensor,
    relative_position_bias_table: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    scale: float,
    pad_order: str,
    mask_value: float,
    windows_type: type[Windows] = Windows,
) -> torch.Tensor:
    """[B, H, W, 3C] -> [B, H, W, C]; softmax in fp32 (fp64 for fp64), all else in the tensors' dtypes.

    windows_type: cuts the map and puts it together.
    """
    windows = windows_type(qkv.shape[1], qkv.shape[2], tuple(window_size), tuple(shift_size), pad_order)
    q, k, v = _heads(windows.partition(qkv, qkv_bias), 3, num_heads)
    attention = _probabilities(q, k, relative_position_bias_table, windows, scale, mask_value)
    return windows.reverse(_channels((attention.to(v.dtype) @ v)[None]))[0]


def window_attention_backward(
    grad_y: torch.Tensor,
    qkv: torch.Tensor,
    relative_position_bias_table: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    scale: float,
    pad_order: str,
    mask_value: float,
    windows_type: type[Windows] = Windows,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of qkv [B, H, W, 3C], of the table and of qkv_bias [3C] (through the padding alone; in qkv's dtype)."""
    windows = windows_type(qkv.shape[1], qkv.shape[2], tuple(window_size), tuple(shift_size), pad_order)
    q, k, v = _heads(windows.partition(qkv, qkv_bias), 3, num_heads)
    (grad_out,) = _heads(windows.partition(grad_y, None), 1, num_heads)
    attention = _probabilities(q, k, relative_position_bias_table, windows, scale, mask_value)

    grad_v = attention.to(v.dtype).transpose(-2, -1) @ grad_out
    grad_attention = (grad_out @ v.transpose(-2, -1)).to(attention.dtype)
    grad_scores = attention * (grad_attention - (attention * grad_attention).sum(-1, keepdim=True))
    grad_table = _sum_by_relative_position(grad_scores.sum(0), tuple(window_size))
    grad_scores = grad_scores.to(q.dtype)
    grad_q = grad_scores @ k * scale
    grad_k = grad_scores.transpose(-2, -1) @ (q * scale)
    grad_qkv, grad_bias = windows.reverse(_channels(torch.stack((grad_q, grad_k, grad_v))))
    return grad_qkv, grad_table.to(relative_position_bias_table.dtype), grad_bias


def _heads(windows: torch.Tensor, parts: int, num_heads: int) -> torch.Tensor:
    """[windows, tokens, parts * C] -> [parts, windows, heads, tokens, head_dim]."""
    count, tokens, channels = windows.shape
    head_dim = channels // (parts * num_heads)
    return windows.reshape(count, tokens, parts, num_heads, head_dim).permute(2, 0, 3, 1, 4)


def _channels(heads: torch.Tensor) -> torch.Tensor:
    """[parts, windows, heads, tokens, head_dim] -> [windows, tokens, parts * C]."""
    parts, count, num_heads, tokens, head_dim = heads.shape
    return heads.permute(1, 3, 0, 2, 4).reshape(count, tokens, parts * num_heads * head_dim)


def _probabilities(q, k, table, windows: Windows, scale: float, mask_value: float) -> torch.Tensor:
    """softmax(scale q k^T + bias + mask) [B * windows, heads, tokens, tokens], at least fp32."""
    scores = (q * scale) @ k.transpose(-2, -1)
    scores = scores + table[relative_position_index(windows.size, table.device)].permute(2, 0, 1)
    masked = windows.masked_pairs(scores.device)
    if masked is not None:
        mask = scores.new_zeros(masked.shape).masked_fill_(masked, mask_value)
        per_sample = (scores.shape[0] // masked.shape[0], *mask.shape[:1])
        scores = (scores.unflatten(0, per_sample) + mask[:, None]).flatten(0, 1)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _sum_by_relative_position(grad: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """[heads, tokens, tokens] -> [(2wh - 1)(2ww - 1), heads]: each table row's pairs summed, always in one order."""
    height, width = window_size
    grad = grad.reshape(-1, height, width, height, width).permute(0, 2, 4, 1, 3)
    grad = _sum_diagonals(grad)  # [heads, width, width, 2 height - 1]
    grad = _sum_diagonals(grad.permute(0, 3, 1, 2))
    return grad.flatten(1).T


def _sum_diagonals(x: torch.Tensor) -> torch.Tensor:
    """[..., n, n] -> [..., 2n - 1]: element i - j + n - 1 holds the sum of x[..., i, j].

    Rows of n values padded to 2n and read again as rows of 2n - 1 move right by one each, which turns diagonals into
    columns: no scattered additions, whose order would be a GPU's choice.
    """
    n = x.shape[-1]
    rows = pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return rows.unflatten(-1, (n, 2 * n - 1)).sum(-2)
