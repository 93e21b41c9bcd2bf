"""timm's Swin block. Windows are neither rolled nor cut nor put together; sums and their norm are one pass."""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from bbfast import dispatch, ops
from bbfast.nn import apply_linear, apply_linear_act
from bbfast.reference.window_attention import Windows, relative_position_index
from bbfast.swap._blocks import add_branch, add_perceptron, draw_mask, perceptron_is_one_kernel
from bbfast.swap._fast import Fast, register, unsupported
from bbfast.swap._lending import can_lend, have_own_call, lender

PAD_ORDER = "shift_then_pad"
MASK_VALUE = -100.0

lender(nn.Softmax)
lender(nn.Dropout)

# ---- attention ---------------------------------------------------------------------------------------------

# They are called, on the whole map instead of on windows: pixels in another order, and none of the padding.
CALLED_BY_ATTENTION = ("qkv", "proj", "proj_drop")


def _attention_objections(attn: WindowAttention) -> list[str]:
    reasons = [
        f"has hooks or a forward of its own on its {name}, which would get a map instead of windows"
        for name in CALLED_BY_ATTENTION
        if have_own_call([getattr(attn, name)])
    ]
    index = attn.relative_position_index
    if not index.is_meta and not torch.equal(index, relative_position_index(attn.window_size, index.device)):
        reasons.append("has another relative_position_index than its window_size gives")
    return reasons


lender(
    WindowAttention,
    objections=_attention_objections,
    asked_once=True,
    inner=lambda attn: [("attn_drop", attn.attn_drop), ("softmax", attn.softmax)],
    relies_on=(
        "timm.models.swin_transformer.WindowAttention._get_rel_pos_bias",
        "timm.models.swin_transformer.get_relative_position_index",
    ),
)


def _why_windows_are_needed(attn: WindowAttention, is_padded: bool) -> str | None:
    """Why timm's attention must run in this call, on windows as it cuts them; None if the op gives the same."""
    if type(attn.softmax) is not nn.Softmax or attn.softmax.dim not in (-1, 3):
        return f"softmax is {attn.softmax}, not a softmax over the keys"
    if attn.attn_drop.p and (attn.training or attn.attn_drop.training):
        return f"attn_drop={attn.attn_drop.p} in training; no backend drops attention weights"
    for name in CALLED_BY_ATTENTION:
        module = getattr(attn, name)
        if have_own_call([module]):
            return f"{name} has hooks or a forward of its own, which take windows"
        if _draws(module):
            return f"{name} drops values at random, and would draw others for pixels in another order"
    if is_padded and type(attn.qkv) is not nn.Linear:
        return f"qkv is a {type(attn.qkv).__name__}; what it makes of the windows' padding takes another call"
    return None


def _draws(module: nn.Module) -> bool:
    if type(module) is nn.Linear or not module.training:
        return False
    return any(isinstance(inner, _DropoutNd) and inner.p and inner.training for inner in module.modules())


# ---- block ---------------------------------------------------------------------------------------------------


@register
class FastSwinTransformerBlock(Fast, SwinTransformerBlock):
    """Attention reads the windows where they lie in the map; the sum and norm2 are one op, perceptron and sum two.

    With few channels, in inference on a GPU, the sum is the end of the attention, and all that follows one op.
    """

    lends = ("attn",)
    drops = ("drop_path1", "drop_path2")
    asked_once = True  # it compares masks; what changes later, _attend asks
    relies_on = (
        "timm.models.swin_transformer.SwinTransformerBlock._attn",
        "timm.models.swin_transformer.SwinTransformerBlock.get_attn_mask",
        "timm.models.swin_transformer.window_partition",
        "timm.models.swin_transformer.window_reverse",
        "timm.layers.mlp.Mlp.forward",
    )

    @classmethod
    def lent(cls, block):
        return [*super().lent(block), *([("norm2", block.norm2)] if _is_layer_norm(block.norm2) else [])]

    @classmethod
    def objections(cls, block):
        window, shift = tuple(block.window_size), tuple(block.shift_size)
        if not _shift_fits(window, shift):
            return [f"its shift_size={shift} is not within its window_size={window}"]
        if not _dynamic_mask(block) and not _has_mask_of_shift(block):
            return ["its attn_mask is not the one that its window_size, shift_size and input_resolution give"]
        return []

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        drops = (self.drop_path1, self.drop_path2)
        if _is_layer_norm(self.norm2) and perceptron_is_one_kernel(x, self.norm2, self.mlp, *drops):
            x = self._attend(self.norm1(x), shortcut=x)
            return add_perceptron(x, x, self.mlp, self.drop_path2, norm=self.norm2)
        batch, height, width, channels = x.shape
        branch = self._attend(self.norm1(x))
        if _is_layer_norm(self.norm2):
            mask = draw_mask(self.drop_path1, branch)
            x, y = ops.add_layer_norm(x, branch, self.norm2.weight, self.norm2.bias, mask=mask, eps=self.norm2.eps)
            x, y = (maps.reshape(batch, height * width, channels) for maps in (x, y))
        else:
            x = add_branch(x, branch, self.drop_path1, channel_dim=-1).reshape(batch, height * width, channels)
            y = self.norm2(x)
        return add_perceptron(x, y, self.mlp, self.drop_path2).reshape(batch, height, width, channels)

    def _attend(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        """What `_attn` returns, added to a shortcut if there is one."""
        attn = self.attn
        reason = self._why_mask_is_needed(x) or _why_windows_are_needed(attn, self._pads(x))
        if reason is not None:
            if not torch.compiler.is_compiling():  # a graph has no side effects
                dispatch.fall_back("window_attention", x, [reason])
            branch = self._attn(x)
            return branch if shortcut is None else shortcut + branch
        y = ops.window_attention(
            apply_linear(attn.qkv, x),
            attn.relative_position_bias_table,
            num_heads=attn.num_heads,
            window_size=self.window_size,
            shift_size=self.shift_size,
            scale=None if attn.fused_attn else attn.scale,  # torch's own attention goes by the heads' channels
            qkv_bias=attn.qkv.bias if self._pads(x) else None,
            pad_order=PAD_ORDER,
            mask_value=MASK_VALUE,
        )
        if shortcut is None:
            return attn.proj_drop(attn.proj(y))
        if can_lend([attn.proj, attn.proj_drop]) and not _draws(attn.proj_drop):
            return apply_linear_act(attn.proj, y, residual=shortcut)
        return shortcut + attn.proj_drop(attn.proj(y))

    def _pads(self, x: torch.Tensor) -> bool:
        return x.shape[1] % self.window_size[0] != 0 or x.shape[2] % self.window_size[1] != 0

    def _count_windows(self, size) -> tuple[int, int]:
        return -(-size[0] // self.window_size[0]), -(-size[1] // self.window_size[1])

    def _why_mask_is_needed(self, x: torch.Tensor) -> str | None:
        """Why `attn_mask` must be used as it is; None if it says what the op does for this shift anyway."""
        if not _shift_fits(self.window_size, self.shift_size):
            return f"shift_size={self.shift_size} is not within window_size={self.window_size}"
        if _dynamic_mask(self):
            return None
        if (self.attn_mask is not None) != any(self.shift_size):
            return "attn_mask is not the one of this shift"
        if any(self.shift_size) and self._count_windows(x.shape[1:3]) != self._count_windows(self.input_resolution):
            return f"attn_mask is for maps of {tuple(self.input_resolution)}, got {tuple(x.shape[1:3])}"
        return None


def _is_layer_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1


def _shift_fits(window_size, shift_size) -> bool:
    return all(0 <= shift < side for shift, side in zip(shift_size, window_size))


def _dynamic_mask(block: SwinTransformerBlock) -> bool:
    return getattr(block, "dynamic_mask", False)


def _has_mask_of_shift(block: SwinTransformerBlock) -> bool:
    mask = block.attn_mask
    if mask is None or mask.is_meta:
        return (mask is None) == (not any(block.shift_size))
    height, width = block.input_resolution
    windows = Windows(height, width, tuple(block.window_size), tuple(block.shift_size), PAD_ORDER)
    pairs = windows.masked_pairs(mask.device)
    return pairs is not None and torch.equal(mask, pairs.to(mask.dtype) * MASK_VALUE)


for name in ("swin_transformer_v2.SwinTransformerV2Block", "swin_transformer_v2_cr.SwinTransformerV2CrBlock"):
    unsupported(
        f"timm.models.{name}",
        "its attention goes by the cosine of queries and keys, and a perceptron gives its bias; no op computes that",
    )
