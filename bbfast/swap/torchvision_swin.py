"""torchvision's Swin transformer blocks; of maps `[B, H, W, C]`, and around 3-D attention `[B, T, H, W, C]`."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformerBlock
from torchvision.ops.misc import MLP

from bbfast import ops
from bbfast.nn import linear
from bbfast.reference.window_attention import relative_position_index
from bbfast.swap._blocks import PERCEPTRONS, add_branch, add_perceptron, draw_mask, perceptron_is_one_kernel
from bbfast.swap._fast import Fast, register, unsupported
from bbfast.swap._lending import lender

_SWIN = "torchvision.models.swin_transformer"


@register
class FastShiftedWindowAttention(Fast, ShiftedWindowAttention):
    """Attention straight from the map, without padding, shifting or cutting it.

    As in torchvision, `qkv` and `proj` are never called: their weights are read.
    """

    asked_once = True  # it compares a whole index
    relies_on = (
        f"{_SWIN}.shifted_window_attention",
        f"{_SWIN}._get_relative_position_bias",
        f"{_SWIN}.ShiftedWindowAttention.get_relative_position_bias",
    )

    @classmethod
    def objections(cls, block):
        window, shift = block.window_size, block.shift_size
        if not all(0 <= by < side for by, side in zip(shift, window)):
            return [f"shift_size={shift} is not smaller than window_size={window} along each axis"]
        index = block.relative_position_index
        if not index.is_meta and not torch.equal(index, relative_position_index(window, index.device).flatten()):
            return ["relative_position_index is not that of its window"]
        return []

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and (self.attention_dropout or self.dropout):
            # Weights would have to be dropped inside the op; and what is drawn for windows is not for a map.
            return ShiftedWindowAttention.forward(self, x)
        y = ops.window_attention(
            linear(x, self.qkv.weight, self.qkv.bias),
            self.relative_position_bias_table,
            num_heads=self.num_heads,
            window_size=tuple(self.window_size),
            shift_size=self._shift_on(x),
            qkv_bias=self.qkv.bias,
            pad_order="pad_then_shift",
        )
        return linear(y, self.proj.weight, self.proj.bias)

    def _shift_on(self, x: torch.Tensor) -> tuple[int, int]:
        """A window that holds the whole map along an axis does not shift along it."""
        axes = zip(x.shape[1:3], self.window_size, self.shift_size)
        return tuple(0 if size <= side else shift for size, side, shift in axes)


@register
class FastSwinTransformerBlock(Fast, SwinTransformerBlock):
    """The first sum and norm2 are one op, where norm2 is an nn.LayerNorm; the perceptron and the second sum are two."""

    drops = ("stochastic_depth",)

    @classmethod
    def lent(cls, block):
        norm = [("norm2", block.norm2)] if _is_channel_norm(block.norm2) else []
        return [*super().lent(block), *norm]

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.attn(self.norm1(x))
        drop_path = self.stochastic_depth
        if _is_channel_norm(self.norm2) and perceptron_is_one_kernel(x, self.norm2, self.mlp, drop_path):
            x = x + branch
            return add_perceptron(x, x, self.mlp, drop_path, norm=self.norm2)
        if _is_channel_norm(self.norm2):
            mask = draw_mask(self.stochastic_depth, branch)
            norm = self.norm2
            x, normalised = ops.add_layer_norm(x, branch, norm.weight, norm.bias, mask=mask, eps=norm.eps)
        else:
            x = self._add(x, branch)
            normalised = self.norm2(x)
        return add_perceptron(x, normalised, self.mlp, self.stochastic_depth)

    def _add(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        pixels = (tensor.flatten(1, -2) for tensor in (x, branch))  # a video has more axes than the op takes
        return add_branch(*pixels, self.stochastic_depth, channel_dim=-1).view(x.shape)


def _parts_of_perceptron(mlp: MLP):
    """None unless its layers are those that it is made of where it has two and no norm."""
    layers = list(mlp._modules.values())
    plain = type(mlp).forward is nn.Sequential.forward
    if not plain or len(layers) != 5 or not (type(layers[2]) is type(layers[4]) is nn.Dropout):
        return None
    first, act, drop, second, last_drop = layers
    return first, act, second, [drop, last_drop]


lender(MLP)
PERCEPTRONS[MLP] = _parts_of_perceptron


def _is_channel_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1


unsupported(
    f"{_SWIN}.SwinTransformerBlockV2", "Swin V2 normalises a branch behind its last layer, which no fused op does"
)
unsupported(
    f"{_SWIN}.ShiftedWindowAttentionV2",
    "Swin V2 attends by cosines, with a bias that a perceptron computes, which window_attention does not",
)
