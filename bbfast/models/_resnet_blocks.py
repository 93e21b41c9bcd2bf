"""The blocks of ResNets, their shortcuts and their stems.

A convolution, its BatchNorm, its activation and, at the end of a block, the shortcut are one op. Attention, DropPath
in training and anti-aliasing stand between them where a model has them. The modules have timm's names, so that
state_dicts are exchangeable, but they only lend their parameters and state: hooks on convolutions, norms and
activations do not run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bbfast.models._backbone import prepare_images
from bbfast.models._layers import Activation, AvgPool2dSame, create_conv2d
from bbfast.models._resnet_layers import (
    DropBlock2d,
    conv_norm_act,
    create_aa,
    resolve_attention,
)
from bbfast.nn import DropPathAdd
from bbfast.ops._common import overridable
from bbfast.reference.activation import activation

# ---- blocks ----------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """What both blocks share: `act(branch(x) + shortcut(x))`.

    Args:
        inplanes: channels of x.
        planes: channels that the block's are derived from; it returns planes * expansion.
        stride: of the 3x3 convolution (the first of two), in pixels.
        downsample: makes the shortcut from x; None where x itself is it.
        cardinality, base_width, reduce_first: see `Bottleneck`.
        dilation, first_dilation: of the 3x3 convolutions, and of the first of them (None: dilation).
        act: by the ops' name.
        norm_layer: makes a norm of so many channels.
        attn_layer: attention at the end of the branch: "se", "eca", None, or a function of the channels.
        aa_layer: "avg" or "blur": a pooling takes over the stride. None: nothing does.
        drop_block: drops squares before the activation of the strided convolution; None: nothing does.
        drop_path_rate: chance of each sample's branch to be dropped in training.
    """

    expansion: int
    downsample: nn.Module | None

    def _build_middle(self, aa_layer: str | None, stride: int, drop_block, **factory) -> None:
        """What is around the activation of the strided convolution."""
        self.drop_block = nn.Identity() if drop_block is None else drop_block
        self.aa = nn.Identity() if aa_layer is None else create_aa(aa_layer, stride, **factory)

    def _build_end(self, channels: int, downsample, attn_layer, drop_path_rate: float, **factory) -> None:
        """What is around the addition of the shortcut."""
        make_attention = resolve_attention(attn_layer)
        self.se = None if make_attention is None else make_attention(channels, **factory)
        self.downsample = downsample
        self.drop_path = DropPathAdd(drop_path_rate) if drop_path_rate else None

    def _middle(self, conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The convolution that bears the stride, with all that belongs to it."""
        if self.training and isinstance(self.drop_block, DropBlock2d):
            x = activation(self.drop_block(conv_norm_act(conv, norm, x, "identity")), self.act)
        else:
            x = conv_norm_act(conv, norm, x, self.act)
        return self.aa(x)

    def _finish(self, conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """The last convolution, with the shortcut added to it."""
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
            if isinstance(self.aa, nn.AvgPool2d):
                _check_even(x, shortcut)
        drops_paths = self.training and self.drop_path is not None
        if self.se is None and not drops_paths:
            return conv_norm_act(conv, norm, x, self.act, residual=shortcut)
        x = conv_norm_act(conv, norm, x, "identity")
        if self.se is not None:
            x = self.se(x)
        if drops_paths:
            x = self.drop_path(shortcut, x)
        else:
            x = x + shortcut if torch.is_grad_enabled() else x.add_(shortcut)
        return activation(x, self.act)

    def zero_init_last(self) -> None:
        """Zeroes the last norm's weight: the block begins as its shortcut."""
        if getattr(self.last_norm, "weight", None) is not None:
            nn.init.zeros_(self.last_norm.weight)


@overridable
def _check_even(x: torch.Tensor, shortcut: torch.Tensor) -> None:
    """Means of 2x2 pixels leave out the last odd row or column, which shortcuts do not."""
    if x.shape[2:] != shortcut.shape[2:]:
        raise ValueError(
            f"aa_layer='avg' wants maps of even sides, but a block's branch is {tuple(x.shape[2:])} pixels where its "
            f"shortcut is {tuple(shortcut.shape[2:])}; give images whose sides are multiples of the model's stride"
        )


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; see `ResidualBlock`."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        base_width: int = 64,
        reduce_first: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        act: str = "relu",
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        attn_layer: str | Callable[..., nn.Module] | None = None,
        aa_layer: str | None = None,
        drop_block: DropBlock2d | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        for name, value, only in (("cardinality", cardinality, 1), ("base_width", base_width, 64)):
            if value != only:
                raise ValueError(f"{name}={value} is not allowed; BasicBlock knows {only} only")
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        first_planes = planes // reduce_first
        first_dilation = first_dilation or dilation
        aa_layer = aa_layer if stride == 2 or first_dilation != dilation else None
        self.act = act
        self.conv1 = create_conv2d(
            inplanes, first_planes, 3, stride=1 if aa_layer else stride, dilation=first_dilation, **factory
        )
        self.bn1 = norm_layer(first_planes, **factory)
        self._build_middle(aa_layer, stride, drop_block, **factory)
        self.conv2 = create_conv2d(first_planes, planes, 3, dilation=dilation, **factory)
        self.bn2 = norm_layer(planes, **factory)
        self._build_end(planes, downsample, attn_layer, drop_path_rate, **factory)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._middle(self.conv1, self.bn1, x)
        return self._finish(self.conv2, self.bn2, y, x)


class Bottleneck(ResidualBlock):
    """A 1x1 convolution to fewer channels, a 3x3 one with the stride, a 1x1 one to four times planes.

    Args:
        cardinality: groups of the 3x3 convolution, base_width: channels of each of them where planes is 64.
        reduce_first: divides the channels between the first and the second convolution.

    See `ResidualBlock` for the others.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        base_width: int = 64,
        reduce_first: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        act: str = "relu",
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        attn_layer: str | Callable[..., nn.Module] | None = None,
        aa_layer: str | None = None,
        drop_block: DropBlock2d | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        width = int(planes * (base_width / 64)) * cardinality
        first_planes = width // reduce_first
        outplanes = planes * self.expansion
        first_dilation = first_dilation or dilation
        aa_layer = aa_layer if stride == 2 or first_dilation != dilation else None
        self.act = act
        self.conv1 = create_conv2d(inplanes, first_planes, 1, **factory)
        self.bn1 = norm_layer(first_planes, **factory)
        self.conv2 = create_conv2d(
            first_planes,
            width,
            3,
            stride=1 if aa_layer else stride,
            dilation=first_dilation,
            groups=cardinality,
            **factory,
        )
        self.bn2 = norm_layer(width, **factory)
        self._build_middle(aa_layer, stride, drop_block, **factory)
        self.conv3 = create_conv2d(width, outplanes, 1, **factory)
        self.bn3 = norm_layer(outplanes, **factory)
        self._build_end(outplanes, downsample, attn_layer, drop_path_rate, **factory)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = conv_norm_act(self.conv1, self.bn1, x, self.act)
        y = self._middle(self.conv2, self.bn2, y)
        return self._finish(self.conv3, self.bn3, y, x)


# ---- shortcuts -------------------------------------------------------------------------------------------


class Downsample(nn.Sequential):
    """The shortcut of a block that changes a map's shape: perhaps a pooling, then convolution and norm as one op."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self) == 3:
            x = self[0](x)
        return conv_norm_act(self[-2], self[-1], x, "identity")


def downsample_conv(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int,
    stride: int,
    dilation: int,
    first_dilation: int,
    norm_layer: Callable[..., nn.Module],
    device=None,
    dtype=None,
) -> Downsample:
    """A strided convolution, 1x1 where it neither strides nor dilates."""
    factory = {"device": device, "dtype": dtype}
    kernel_size = 1 if stride == 1 and dilation == 1 else kernel_size
    dilation = first_dilation if kernel_size > 1 else 1
    conv = create_conv2d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, **factory)
    return Downsample(conv, norm_layer(out_channels, **factory))


def downsample_avg(
    in_channels: int,
    out_channels: int,
    *,
    stride: int,
    dilation: int,
    norm_layer: Callable[..., nn.Module],
    device=None,
    dtype=None,
) -> Downsample:
    """Means of 2x2 pixels, then a 1x1 convolution. Where a dilation stands for the stride, means at every pixel."""
    factory = {"device": device, "dtype": dtype}
    pool: nn.Module = nn.Identity()
    if dilation > 1:
        pool = AvgPool2dSame()
    elif stride > 1:
        pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
    conv = create_conv2d(in_channels, out_channels, 1, **factory)
    return Downsample(pool, conv, norm_layer(out_channels, **factory))


# ---- stems -----------------------------------------------------------------------------------------------

STEM_TYPES = ("", "deep", "deep_tiered")


def stem_conv(
    in_chans: int, stem_width: int, stem_type: str, act: str, norm_layer: Callable[..., nn.Module], **factory
) -> nn.Module:
    """What is before `bn1`: a 7x7 convolution to 64 channels, or three 3x3 ones to 2 * stem_width.

    Args:
        stem_type: `""` for one; `"deep"` for three; `"deep_tiered"` for three, the first of them narrower.
    """
    if not stem_type:
        return create_conv2d(in_chans, 64, 7, stride=2, **factory)
    first = 3 * (stem_width // 4) if stem_type == "deep_tiered" else stem_width
    return nn.Sequential(
        create_conv2d(in_chans, first, 3, stride=2, **factory),
        norm_layer(first, **factory),
        Activation(act),
        create_conv2d(first, stem_width, 3, **factory),
        norm_layer(stem_width, **factory),
        Activation(act),
        create_conv2d(stem_width, 2 * stem_width, 3, **factory),
    )


def apply_stem(conv: nn.Module, norm: nn.Module, act: Activation, x: torch.Tensor) -> torch.Tensor:
    """`act(norm(conv(x)))` of images, an op for each convolution of `stem_conv`."""
    if not isinstance(conv, nn.Sequential):
        return conv_norm_act(conv, norm, prepare_images(x, conv.weight), act.act)
    x = conv_norm_act(conv[0], conv[1], prepare_images(x, conv[0].weight), conv[2].act)
    x = conv_norm_act(conv[3], conv[4], x, conv[5].act)
    return conv_norm_act(conv[6], norm, x, act.act)


class StemPool(nn.Sequential):
    """A strided 3x3 convolution in the place of the maximum; with anti-aliasing a pooling takes over its stride."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self) == 3:
            return conv_norm_act(self[0], self[1], x, self[2].act)
        return super().forward(x)


def stem_pool(
    channels: int, replace: bool, act: str, norm_layer: Callable[..., nn.Module], aa_layer: str | None, **factory
) -> nn.Module:
    """What halves the stem's map: a maximum of 3x3 pixels, or a convolution if `replace`."""
    pools = [] if aa_layer is None else [create_aa(aa_layer, 2, **factory)]
    if replace:
        conv = create_conv2d(channels, channels, 3, stride=1 if pools else 2, **factory)
        return StemPool(conv, *pools, norm_layer(channels, **factory), Activation(act))
    if aa_layer is None:
        return nn.MaxPool2d(3, 2, 1)
    return pools[0] if aa_layer == "avg" else nn.Sequential(nn.MaxPool2d(3, 1, 1), *pools)
