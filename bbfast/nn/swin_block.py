"""The Swin transformer's block: attention within shifted windows, then a perceptron, each added to its input."""

from __future__ import annotations

import torch
from torch import nn

from bbfast.nn._arguments import check_bool, check_positive, check_probability
from bbfast.nn.add_layer_norm import apply_add_layer_norm, apply_layer_norm
from bbfast.nn.drop_path_add import DropPathAdd
from bbfast.nn.linear_act import only_runs
from bbfast.nn.mlp import Mlp, mlp_is_one_kernel
from bbfast.nn.window_attention import ShiftedWindowAttention
from bbfast.ops._common import pair


class SwinBlock(nn.Module):
    """`x += drop_path(attn(norm1(x)))`, then `x += drop_path(mlp(norm2(x)))`, on maps `[B, H, W, C]`.

    The first addition and norm2, where that is an nn.LayerNorm, are one pass over memory; hooks on norm2 and drop_path1
    do not run then. In inference on a GPU with few channels (see `bbfast.ops.mlp`) the addition is the end of the
    attention, and all the rest is one kernel.

    Args:
        dim, num_heads, head_dim, qkv_bias, attn_drop, proj_drop: see `ShiftedWindowAttention`.
        input_resolution: (height, width) of the map that the block is made for. Where an axis is not longer than the
            window, the window shrinks to it and the shift goes, unless always_partition; other maps run all the same.
        window_size, shift_size: what the block would like; attributes of these names say what it has.
        mlp_ratio: hidden channels of the perceptron per channel.
        drop_path: chance of each sample to leave out a branch in training.
        norm_layer: makes norm1 and norm2 from `dim`.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: int | tuple[int, int],
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        shift_size: int | tuple[int, int] = 0,
        always_partition: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer=nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.input_resolution = pair("input_resolution", input_resolution, 1)
        self.target_shift_size = pair("shift_size", shift_size, 0)
        self.always_partition = check_bool("always_partition", always_partition)
        window_size, shift_size = self._fit(pair("window_size", window_size, 1), self.target_shift_size)
        self.norm1 = norm_layer(dim, **factory)
        self.attn = ShiftedWindowAttention(
            dim,
            num_heads,
            head_dim=head_dim,
            window_size=window_size,
            shift_size=shift_size,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **factory,
        )
        self.drop_path1 = _drop_path(drop_path)
        self.norm2 = norm_layer(dim, **factory)
        hidden_dim = int(dim * check_positive("mlp_ratio", mlp_ratio))
        if hidden_dim < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves no hidden channel of {dim}")
        self.mlp = Mlp(dim, hidden_dim, drop=proj_drop, **factory)
        self.drop_path2 = _drop_path(drop_path)

    @property
    def window_size(self) -> tuple[int, int]:
        return self.attn.window_size

    @property
    def shift_size(self) -> tuple[int, int]:
        return self.attn.shift_size

    def _fit(self, window_size, shift_size) -> tuple[tuple[int, int], tuple[int, int]]:
        """(window, shift) for the block's map, per axis."""
        if self.always_partition:
            return window_size, shift_size
        axes = list(zip(self.input_resolution, window_size, shift_size))
        window = tuple(min(size, side) for size, side, _ in axes)
        shift = tuple(0 if size <= side else wish for size, side, wish in axes)
        return window, shift

    def set_input_size(
        self,
        input_resolution: tuple[int, int],
        window_size: int | tuple[int, int],
        always_partition: bool | None = None,
    ) -> None:
        """Prepares the block for maps of another size with another window; a shifted block shifts by half a window."""
        window_size = pair("window_size", window_size, 1)
        self.input_resolution = pair("input_resolution", input_resolution, 1)
        if always_partition is not None:
            self.always_partition = always_partition
        wish = tuple(side // 2 for side in window_size) if any(self.target_shift_size) else self.target_shift_size
        window_size, shift_size = self._fit(window_size, wish)
        self.attn.set_window_size(window_size)
        self.attn.shift_size = shift_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._ends_in_one_kernel(x):
            x = self.attn(apply_layer_norm(self.norm1, x), residual=x)
            return self.mlp(x, residual=x, norm=self.norm2)
        branch = self.attn(apply_layer_norm(self.norm1, x))
        if isinstance(self.norm2, nn.LayerNorm):
            x, normalised = apply_add_layer_norm(self.norm2, self.drop_path1, x, branch)
        else:
            x = _add(self.drop_path1, x, branch)
            normalised = self.norm2(x)
        if not _drops(self.drop_path2) and only_runs(self.mlp, Mlp):
            return self.mlp(normalised, residual=x)
        return _add(self.drop_path2, x, self.mlp(normalised))

    def _ends_in_one_kernel(self, x: torch.Tensor) -> bool:
        """Whether all after the attention's sum is one kernel, which that sum should then leave to normalise."""
        if _drops(self.drop_path1) or _drops(self.drop_path2):
            return False
        attn, mlp = self.attn, self.mlp
        if not (only_runs(attn, ShiftedWindowAttention) and only_runs(mlp, Mlp)):
            return False
        return mlp_is_one_kernel(self.norm2, mlp.fc1, "gelu", mlp.fc2, x, residual=x)


def _drops(drop_path: nn.Module) -> bool:
    return isinstance(drop_path, DropPathAdd) and drop_path.training and drop_path.drop_prob > 0


def _add(drop_path: nn.Module, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    return drop_path(x, branch) if isinstance(drop_path, DropPathAdd) else x + branch


def _drop_path(rate: float) -> nn.Module:
    return DropPathAdd(check_probability("drop_path", rate)) if rate else nn.Identity()
