"""Attention within windows as layers: of windows that were cut already, and of a whole map, shift included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bbfast import ops
from bbfast.nn._arguments import check_int, check_probability
from bbfast.nn._relative_position import resize_relative_position_bias_table
from bbfast.nn.linear_act import apply_linear, apply_linear_act, only_runs
from bbfast.ops._common import check_tensor, pair
from bbfast.ops.window_attention import PAD_ORDERS, explain_plain_attention
from bbfast.reference.window_attention import Windows, relative_position_index

MASK_VALUE = -100.0  # for pairs that only the shift brought together; a very large score still gets through


class WindowAttention(nn.Module):
    """Multi-head attention among the pixels of each window, with a learned bias per relative position.

    Args:
        dim: channels C of input and output.
        num_heads: heads; each has head_dim channels (None: dim // num_heads).
        window_size: an int or (height, width), in pixels.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop, proj_drop: dropout of the attention's weights and of the output.

    Attributes:
        relative_position_bias_table: `[(2 wh - 1) * (2 ww - 1), num_heads]`, one row per distance, downwards first.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_int("dim", dim, minimum=1)
        if dim % check_int("num_heads", num_heads, minimum=1) and head_dim is None:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; name head_dim")
        head_dim = dim // num_heads if head_dim is None else check_int("head_dim", head_dim, minimum=1)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = head_dim**-0.5
        self.window_size = pair("window_size", window_size, minimum=1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(self._table_rows(), num_heads, **factory))
        self.qkv = nn.Linear(dim, 3 * head_dim * num_heads, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(check_probability("attn_drop", attn_drop))
        self.proj = nn.Linear(head_dim * num_heads, dim, **factory)
        self.proj_drop = nn.Dropout(check_probability("proj_drop", proj_drop))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _table_rows(self) -> int:
        height, width = self.window_size
        return (2 * height - 1) * (2 * width - 1)

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Changes the window; the bias of each distance is interpolated from the old table."""
        window_size = pair("window_size", window_size, minimum=1)
        if window_size == self.window_size:
            return
        table = self.relative_position_bias_table
        resized = resize_relative_position_bias_table(table.detach(), self.window_size, window_size)
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)

    def forward(self, windows: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            windows: `[B * nW, wh * ww, C]`, the windows of an image one after the other.
            mask: `[nW, wh * ww, wh * ww]`, numbers that are added to the scores (query, key) of each window, or None.

        Raises:
            TypeError: windows or mask is no floating-point tensor (a mask of bools has no one meaning).
            ValueError: their shapes do not fit.
        """
        self._check(windows, mask)
        if mask is not None or self._attn_drop_rate():
            explain_plain_attention(windows, attn_drop=self._attn_drop_rate(), foreign_mask=mask is not None)
            return self._forward_plainly(windows, mask)
        maps = apply_linear(self.qkv, windows).unflatten(1, self.window_size)  # a map of one window each
        y = self._fused(maps, shift_size=(0, 0), pad_order="shift_then_pad").flatten(1, 2)
        return self.proj_drop(apply_linear(self.proj, y))

    def _check(self, windows, mask) -> None:
        height, width = self.window_size
        tokens = height * width
        check_tensor("windows", windows, rank=3, layout="[B * nW, wh * ww, C]")
        if windows.shape[1] != tokens or windows.shape[2] != self.dim:
            raise ValueError(f"windows must have shape [B * nW, {tokens}, {self.dim}], got {tuple(windows.shape)}")
        if mask is None:
            return
        check_tensor("mask", mask, rank=3, layout="[nW, wh * ww, wh * ww]")
        if mask.shape[1:] != (tokens, tokens) or not len(mask) or len(windows) % len(mask):
            raise ValueError(
                f"mask must have shape [nW, {tokens}, {tokens}] with nW windows per image, a divisor of the "
                f"{len(windows)} in all; got {tuple(mask.shape)}"
            )

    def _attn_drop_rate(self) -> float:
        return self.attn_drop.p if self.training else 0.0

    def _fused(self, qkv: torch.Tensor, *, shift_size: tuple[int, int], pad_order: str) -> torch.Tensor:
        return ops.window_attention(
            qkv,
            self.relative_position_bias_table,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift_size=shift_size,
            scale=self.scale,
            qkv_bias=self._padding(qkv),
            pad_order=pad_order,
        )

    def _padding(self, qkv: torch.Tensor) -> torch.Tensor | None:
        """What padded pixels, which are zeros, have as q, k and v: the bias, if `self.qkv` is still a linear layer."""
        if isinstance(self.qkv, nn.Linear):
            return self.qkv.bias
        return self.qkv(qkv.new_zeros(1, self.dim))[0]

    def _forward_plainly(self, windows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """With dropout of weights or a mask of the caller's, which the op does not know."""
        count, tokens, _ = windows.shape
        q, k, v = apply_linear(self.qkv, windows).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        index = relative_position_index(self.window_size, device=windows.device)
        scores = (q * self.scale) @ k.transpose(2, 3) + self.relative_position_bias_table[index].permute(2, 0, 1)
        if mask is not None:
            by_image = scores.view(-1, len(mask), self.num_heads, tokens, tokens) + mask[:, None]
            scores = by_image.view(count, self.num_heads, tokens, tokens)
        weights = F.dropout(scores.softmax(3), self.attn_drop.p, self.training)
        return self.proj_drop(apply_linear(self.proj, (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"


class ShiftedWindowAttention(WindowAttention):
    """`WindowAttention` of a whole map, whose windows it pads for, shifts and cuts without copying anything.

    Args:
        shift_size: an int or (height, width): how far the map is rolled up and to the left before it is cut. Pixels
            that only the roll brought together do not attend to each other.
        pad_order: `"shift_then_pad"` (timm) or `"pad_then_shift"` (torchvision, transformers); they differ where the
            window does not divide the map.
        dim, num_heads, head_dim, window_size, qkv_bias, attn_drop, proj_drop: see `WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        shift_size: int | tuple[int, int] = 0,
        pad_order: str = "shift_then_pad",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(
            dim,
            num_heads,
            head_dim=head_dim,
            window_size=window_size,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.shift_size = pair("shift_size", shift_size, minimum=0)
        if any(shift >= side for shift, side in zip(self.shift_size, self.window_size)):
            raise ValueError(f"shift_size={shift_size!r} must be smaller than window_size={window_size!r}")
        if pad_order not in PAD_ORDERS:
            raise ValueError(f"pad_order={pad_order!r} is not known; allowed: {', '.join(map(repr, PAD_ORDERS))}")
        self.pad_order = pad_order

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, H, W, C]` to the same shape; H and W need not be multiples of the window.

        A `residual` is what the result is added to, with the last layer, where nothing is dropped after that.
        """
        if self._attn_drop_rate():
            y = self._forward_by_windows(x)
        else:
            y = self._fused(apply_linear(self.qkv, x), shift_size=self.shift_size, pad_order=self.pad_order)
            if residual is not None and self._projection_is_all():
                return apply_linear_act(self.proj, y, residual=residual)
            y = self.proj_drop(apply_linear(self.proj, y))
        return y if residual is None else residual + y

    def _projection_is_all(self) -> bool:
        """Whether nothing happens after `proj`."""
        drop = self.proj_drop
        return only_runs(drop, nn.Dropout) and not (drop.training and drop.p)

    def _forward_by_windows(self, x: torch.Tensor) -> torch.Tensor:
        # The op does not drop weights: cut, attend, put together.
        explain_plain_attention(x, attn_drop=self._attn_drop_rate(), foreign_mask=False)
        windows = ops.window_partition(x, self.window_size, self.shift_size, pad_order=self.pad_order)
        windows = self._forward_plainly(windows, self._shift_mask(x))
        return ops.window_reverse(windows, self.window_size, x.shape[1:3], self.shift_size, pad_order=self.pad_order)

    def _shift_mask(self, x: torch.Tensor) -> torch.Tensor | None:
        windows = Windows(x.shape[1], x.shape[2], self.window_size, self.shift_size, self.pad_order)
        masked = windows.masked_pairs(x.device)
        return None if masked is None else x.new_zeros(masked.shape).masked_fill_(masked, MASK_VALUE)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift_size={self.shift_size}, pad_order={self.pad_order!r}"
