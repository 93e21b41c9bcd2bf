"""The quantised linear rule of RegNet: from a line of widths to stages of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bbfast.models._layers import make_divisible
from bbfast.nn._arguments import check_int, check_positive

# The rule's widths are multiples of it.
_QUANTUM = 8


class RegNetStages(NamedTuple):
    """What the rule makes of its parameters, one entry per stage, narrow ones first.

    Attributes:
        widths: channels that go in and out of a stage's blocks.
        depths: blocks.
        group_sizes: channels per group of the 3x3 convolution.
        groups: groups of the 3x3 convolution.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    group_sizes: tuple[int, ...]
    groups: tuple[int, ...]


def regnet_stages(
    w0: int,
    wa: float,
    wm: float,
    depth: int,
    group_size: int,
    bottle_ratio: float = 1.0,
    group_min_ratio: float = 0.0,
) -> RegNetStages:
    """The stages of a RegNet: blocks of one width of `quantised_linear_widths`, made to fit its groups.

    Args:
        w0, wa, wm, depth: see `quantised_linear_widths`.
        group_size: channels per group of the 3x3 convolution; narrower bottlenecks are one group.
        bottle_ratio: channels of the 3x3 convolution per channel of the block (pycls divides by its ratio instead).
        group_min_ratio: see `fit_groups`.

    Raises:
        TypeError, ValueError: a parameter is of the wrong type, or out of the rule's range.

    Example:
        >>> regnet_stages(w0=48, wa=20.71, wm=2.65, depth=27, group_size=24)[:2]
        ((48, 120, 336, 888), (2, 6, 17, 2))
    """
    per_block = quantised_linear_widths(w0, wa, wm, depth)
    wanted = sorted(set(per_block))
    depths = tuple(per_block.count(width) for width in wanted)
    stages = len(wanted)
    widths, group_sizes = fit_groups(wanted, [bottle_ratio] * stages, [group_size] * stages, group_min_ratio)
    groups = tuple(bottleneck_width(w, bottle_ratio) // size for w, size in zip(widths, group_sizes))
    return RegNetStages(widths, depths, group_sizes, groups)


def quantised_linear_widths(w0: int, wa: float, wm: float, depth: int) -> tuple[int, ...]:
    """The width of each block: w0 + wa * j for block j, rounded to w0 * wm**k, then to a multiple of 8.

    In single precision, with halves to even, as timm has it.

    Args:
        w0: the first block's width, a multiple of 8.
        wa: by how much the line grows from block to block, at least 0.
        wm: the factor from one stage's width to the next one's, above 1.
        depth: blocks of the whole network.

    Raises:
        TypeError, ValueError: a parameter is of the wrong type, or out of range.
    """
    check_int("w0", w0, minimum=1)
    check_int("depth", depth, minimum=1)
    if wa != 0:
        check_positive("wa", wa)
    check_positive("wm", wm)
    if w0 % _QUANTUM:
        raise ValueError(f"w0={w0} is not allowed; it must be a multiple of {_QUANTUM}")
    if wm <= 1:
        raise ValueError(f"wm={wm} is not allowed; it must be above 1")
    # On the CPU whatever the default device: a model on device="meta" needs the numbers too.
    line = torch.arange(depth, device="cpu", dtype=torch.float32) * wa + w0
    exponents = torch.round(torch.log(line / w0) / math.log(wm))
    widths = torch.round(w0 * torch.pow(wm, exponents) / _QUANTUM) * _QUANTUM
    return tuple(widths.int().tolist())


def fit_groups(
    widths: Sequence[int],
    bottle_ratios: Sequence[float],
    group_sizes: Sequence[int],
    min_ratio: float = 0.0,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and group sizes per stage, changed so that groups divide the bottleneck.

    A group is at most as wide as the bottleneck, width * bottle_ratio, which then becomes the nearest multiple of the
    group's size; the width follows.

    Args:
        widths, bottle_ratios, group_sizes: one per stage.
        min_ratio: 0 rounds as pycls does; else as torchvision: no bottleneck loses more than a tenth.

    Returns:
        (widths, group_sizes).
    """
    fitted_widths, fitted_sizes = [], []
    for width, ratio, size in zip(widths, bottle_ratios, group_sizes, strict=True):
        check_int("group_size", size, minimum=1)
        check_positive("bottle_ratio", ratio)
        bottleneck = max(1, int(width * ratio))
        size = min(size, bottleneck)
        bottleneck = make_divisible(bottleneck, size, min_ratio) if min_ratio else round(bottleneck / size) * size
        fitted_widths.append(int(bottleneck / ratio))
        fitted_sizes.append(size)
    return tuple(fitted_widths), tuple(fitted_sizes)


def bottleneck_width(width: int, bottle_ratio: float) -> int:
    """Channels of the 3x3 convolution in a block of `width` channels."""
    return round(width * bottle_ratio)
