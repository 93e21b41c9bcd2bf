"""The blocks of RegNet: a bottleneck whose 3x3 convolution has groups, behind or before its norms.

Where norms are BatchNorms, each convolution with its norm and activation is one op, and the last one of a block takes
the shortcut along. The modules have timm's names, so that state_dicts are exchangeable, but inside a block they only
lend their parameters and state: hooks on a `conv`, a `bn` or an `se` do not run. With another norm torch's own layers
run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bbfast.models._layers import AvgPool2dSame, SEModule, create_conv2d
from bbfast.models._regnet_rule import bottleneck_width
from bbfast.nn import BATCH_NORMS, BatchNormAct2d, DropPathAdd, apply_conv_bn_act, apply_gate
from bbfast.reference.activation import activation

# ---- norms and activations -------------------------------------------------------------------------------


class GroupNormAct(nn.GroupNorm):
    """`act(group_norm(x))`.

    Args:
        num_channels: channels of x.
        num_groups: groups of channels that share a mean and a variance.
        group_size: channels per group, instead of num_groups.
        act: by the ops' name.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        *,
        group_size: int | None = None,
        act: str = "relu",
        device=None,
        dtype=None,
    ):
        if group_size is not None:
            if num_channels % group_size:
                raise ValueError(f"group_size={group_size} does not divide {num_channels} channels")
            num_groups = num_channels // group_size
        super().__init__(num_groups, num_channels, eps=eps, device=device, dtype=dtype)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return activation(super().forward(x), self.act)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


_NORMS = {"batchnorm": BatchNormAct2d, "batchnorm2d": BatchNormAct2d, "groupnorm": GroupNormAct}


def resolve_norm(norm_layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The norm that timm calls `norm_layer`, or `norm_layer` itself: `f(channels, *, act, device, dtype)`.

    What it makes applies the activation after the norm and has its name as the attribute `act`.

    Raises:
        TypeError, ValueError: it is neither a function nor a known name.
    """
    if callable(norm_layer):
        return norm_layer
    allowed = f"allowed: {', '.join(map(repr, _NORMS))} and functions f(channels, *, act, device, dtype)"
    if not isinstance(norm_layer, str):
        raise TypeError(f"norm_layer={norm_layer!r} is no string and no function; {allowed}")
    if norm_layer not in _NORMS:
        raise ValueError(f"norm_layer={norm_layer!r} is not known; {allowed}")
    return _NORMS[norm_layer]


# ---- convolutions ----------------------------------------------------------------------------------------


class ConvNormAct(nn.Module):
    """`act(bn(conv(x)) + residual)`: a convolution without bias, a norm, an activation.

    Args:
        in_chs, out_chs, kernel_size, stride, dilation, groups: of the convolution, padded by half its extent.
        act: the activation, by the ops' name.
        norm_layer: makes the norm, see `resolve_norm`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act: str = "relu",
        norm_layer: Callable[..., nn.Module] = BatchNormAct2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = create_conv2d(
            in_chs, out_chs, kernel_size, stride=stride, dilation=dilation, groups=groups, **factory
        )
        self.bn = norm_layer(out_chs, act=act, **factory)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        act: str | None = None,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            x: `[N, in_chs, H, W]`; without autograd it is overwritten if gate is given.
            residual: of the result's shape, added before the activation.
            act: the activation where the module's own is "identity", as it must be where residual or act is given.
            gate: `[N, in_chs]`, a factor of x's channels.
        """
        return _conv_norm_act(self.conv, self.bn, x, residual, act, gate)


def _conv_norm_act(
    conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor, residual=None, act: str | None = None, gate=None
) -> torch.Tensor:
    """`act(norm(conv(x * gate)) + residual)`, as one op where the norm is a BatchNorm."""
    act = norm.act if act is None else act
    if isinstance(norm, BATCH_NORMS):
        return apply_conv_bn_act(conv, norm, x, act=act, residual=residual, gate=gate)
    x = x if gate is None else apply_gate(x, gate, inplace=True)
    y = norm(conv(x))  # activated, if the norm has an activation
    y = y if residual is None else y + residual
    return y if norm.act == act else activation(y, act)


def _conv(conv: nn.Conv2d, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`conv(x) + residual`."""
    return apply_conv_bn_act(conv, None, x, act="identity", residual=residual)


# ---- shortcuts -------------------------------------------------------------------------------------------


def _shortcut(
    kind: str | None, in_chs: int, out_chs: int, *, stride: int, dilation: tuple[int, int], preact: bool, **factory
) -> nn.Module | None:
    """What a block adds to its branch: its input, or that brought to the branch's shape, or nothing (None)."""
    if in_chs == out_chs and stride == 1 and dilation[0] == dilation[1]:
        return nn.Identity()
    if not kind:
        return None
    if kind == "conv1x1":
        return _projection(in_chs, out_chs, stride=stride, preact=preact, **factory)
    if dilation[0] > 1:
        pool = AvgPool2dSame()
    else:
        pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, _projection(in_chs, out_chs, stride=1, preact=preact, **factory))


def _projection(in_chs: int, out_chs: int, *, stride: int, preact: bool, norm_layer, **factory) -> nn.Module:
    if preact:  # the next block has a norm
        return create_conv2d(in_chs, out_chs, 1, stride=stride, **factory)
    return ConvNormAct(in_chs, out_chs, stride=stride, act="identity", norm_layer=norm_layer, **factory)


# ---- blocks ----------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """RegNet's block: 1x1, 3x3 with groups, squeeze-and-excite, 1x1, shortcut, activation.

    Args:
        in_chs, out_chs: channels of the input and of the output.
        stride: of the 3x3 convolution and the shortcut.
        dilation: of the 3x3 convolution in this block and in the stage's next ones.
        bottle_ratio: channels of the 3x3 convolution per channel of the output.
        group_size: channels per group of the 3x3 convolution, which it divides.
        se_ratio: squeezed channels per channel of the input; 0 leaves squeeze-and-excite out.
        downsample: the shortcut where shapes change: "conv1x1", "avg" (pooled by averages first), None or `""` for
            none at all.
        linear_out: leave out the activation after the sum.
        act: the activation, by the ops' name.
        norm_layer: makes the norms, see `resolve_norm`.
        drop_path_rate: the branch is dropped with this chance, sample by sample, in training.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        bottle_ratio: float = 1.0,
        group_size: int = 1,
        se_ratio: float = 0.25,
        downsample: str | None = "conv1x1",
        linear_out: bool = False,
        act: str = "relu",
        norm_layer: Callable[..., nn.Module] = BatchNormAct2d,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        layer = {"norm_layer": norm_layer, **factory}
        mid_chs = bottleneck_width(out_chs, bottle_ratio)
        groups = _groups(mid_chs, group_size)
        self.conv1 = ConvNormAct(in_chs, mid_chs, act=act, **layer)
        self.conv2 = ConvNormAct(
            mid_chs, mid_chs, 3, stride=stride, dilation=dilation[0], groups=groups, act=act, **layer
        )
        self.se = _squeeze_excite(in_chs, mid_chs, se_ratio, act, **factory)
        self.conv3 = ConvNormAct(mid_chs, out_chs, act="identity", **layer)
        self.act = "identity" if linear_out else act
        self.downsample = _shortcut(
            downsample, in_chs, out_chs, stride=stride, dilation=dilation, preact=False, **layer
        )
        self.drop_path = DropPathAdd(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def zero_init_last(self) -> None:
        """Makes the block begin as its shortcut."""
        nn.init.zeros_(self.conv3.bn.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, in_chs, H, W]` to `[N, out_chs, H', W']`, sizes divided by the stride and rounded up."""
        y, gate = self.conv2(self.conv1(x)), None
        if isinstance(self.se, SEModule):
            gate = self.se.factors(y)
        else:
            y = self.se(y)
        if self.downsample is None:
            return self.conv3(y, act=self.act, gate=gate)
        shortcut = self.downsample(x)
        if self.training and isinstance(self.drop_path, DropPathAdd):
            return activation(self.drop_path(shortcut, self.conv3(y, gate=gate)), self.act)
        return self.conv3(y, residual=shortcut, act=self.act, gate=gate)


class PreBottleneck(nn.Module):
    """`Bottleneck` with norm and activation before each convolution, and none after the sum.

    The shortcut begins after the first norm and activation. Arguments are Bottleneck's; linear_out changes nothing.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        bottle_ratio: float = 1.0,
        group_size: int = 1,
        se_ratio: float = 0.25,
        downsample: str | None = "conv1x1",
        linear_out: bool = False,
        act: str = "relu",
        norm_layer: Callable[..., nn.Module] = BatchNormAct2d,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        mid_chs = bottleneck_width(out_chs, bottle_ratio)
        groups = _groups(mid_chs, group_size)
        self.norm1 = norm_layer(in_chs, act=act, **factory)
        self.conv1 = create_conv2d(in_chs, mid_chs, 1, **factory)
        self.norm2 = norm_layer(mid_chs, act=act, **factory)
        self.conv2 = create_conv2d(mid_chs, mid_chs, 3, stride=stride, dilation=dilation[0], groups=groups, **factory)
        self.se = _squeeze_excite(in_chs, mid_chs, se_ratio, act, **factory)
        self.norm3 = norm_layer(mid_chs, act=act, **factory)
        self.conv3 = create_conv2d(mid_chs, out_chs, 1, **factory)
        self.downsample = _shortcut(
            downsample,
            in_chs,
            out_chs,
            stride=stride,
            dilation=dilation,
            preact=True,
            norm_layer=norm_layer,
            **factory,
        )
        self.drop_path = DropPathAdd(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def zero_init_last(self) -> None:
        """Does nothing: the block has no norm after its last convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, in_chs, H, W]` to `[N, out_chs, H', W']`, sizes divided by the stride and rounded up."""
        x = self.norm1(x)
        y = _conv_norm_act(self.conv1, self.norm2, x)
        if isinstance(self.se, nn.Identity):
            y = _conv_norm_act(self.conv2, self.norm3, y)
        else:
            y = self.norm3(self.se(_conv(self.conv2, y)))
        if self.downsample is None:
            return _conv(self.conv3, y)
        shortcut = self.downsample(x)
        if self.training and isinstance(self.drop_path, DropPathAdd):
            return self.drop_path(shortcut, _conv(self.conv3, y))
        return _conv(self.conv3, y, residual=shortcut)


def _groups(channels: int, group_size: int) -> int:
    if channels % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {channels} channels of the 3x3 convolution")
    return channels // group_size


def _squeeze_excite(in_chs: int, channels: int, se_ratio: float, act: str, **factory) -> nn.Module:
    """Squeezed channels are counted from the block's input, not from the bottleneck that is scaled."""
    if not se_ratio:
        return nn.Identity()
    return SEModule(channels, max(1, round(in_chs * se_ratio)), act=act, **factory)


class RegStage(nn.Module):
    """`depth` blocks with one output shape, named b1, b2, ...; the first has the stride.

    Args:
        depth: number of blocks.
        in_chs, out_chs: channels of the stage's input and of its blocks.
        stride: of the first block.
        dilation: of the blocks after the first, which has half of it: the stride that it stands for comes after it.
        drop_path_rates: one per block.
        block: `Bottleneck` or `PreBottleneck`; block_arguments: the others that it takes.
    """

    def __init__(
        self,
        depth: int,
        in_chs: int,
        out_chs: int,
        *,
        stride: int = 2,
        dilation: int = 1,
        drop_path_rates: Sequence[float] | None = None,
        block: type[nn.Module] = Bottleneck,
        **block_arguments,
    ):
        super().__init__()
        self.grad_checkpointing = False
        block_dilation = 1 if dilation in (1, 2) else 2
        for index in range(depth):
            self.add_module(
                f"b{index + 1}",
                block(
                    in_chs if index == 0 else out_chs,
                    out_chs,
                    stride=stride if index == 0 else 1,
                    dilation=(block_dilation, dilation),
                    drop_path_rate=drop_path_rates[index] if drop_path_rates else 0.0,
                    **block_arguments,
                ),
            )
            block_dilation = dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self.children():
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x
