"""Configurations: the parameters of one network of a design space, and the stages that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bbfast.models._regnet_rule import fit_groups, quantised_linear_widths
from bbfast.nn._arguments import check_int, check_ints, check_positive, check_probability


class Stage(NamedTuple):
    """Blocks of one width, as they are built.

    Attributes:
        depth: number of blocks; the first has stride 2.
        width: channels that go in and out of the blocks.
        bottleneck: how many times fewer channels the 3x3 convolution has.
        group_width: channels per group of the 3x3 convolution; divides width // bottleneck.
    """

    depth: int
    width: int
    bottleneck: int
    group_width: int


def compatible_stages(
    depths: Sequence[int], widths: Sequence[int], bottlenecks: Sequence[int], group_widths: Sequence[int]
) -> tuple[Stage, ...]:
    """The stages whose group widths divide their bottleneck widths, nearest to those asked for.

    The paper's and pycls's rule: a group is at most as wide as the bottleneck, whose width then becomes the nearest
    multiple of the group's (halves to even), and the stage's width follows. A width changes by a third at most.
    """
    ratios = [1 / bottleneck for bottleneck in bottlenecks]
    widths, group_widths = fit_groups(widths, ratios, group_widths)
    return tuple(map(Stage, depths, widths, bottlenecks, group_widths))


@dataclass(frozen=True)
class AnyNetConfig:
    """One network of AnyNetX: the parameters of each stage, as a space allows them.

    `stages` are the network's: where a group width does not divide width / bottleneck, they differ from the
    parameters by the rule of `compatible_stages`.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        bottlenecks: width divided by the channels of the 3x3 convolution, of each stage.
        group_widths: channels per group of the 3x3 convolution, of each stage.
        se_ratio: squeezed channels of squeeze-and-excitation over the block's input channels; 0 is none.

    Raises:
        TypeError: a parameter is of the wrong type.
        ValueError: a number is below 1, or the parameters are not of equally many stages.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    bottlenecks: tuple[int, ...]
    group_widths: tuple[int, ...]
    se_ratio: float = 0.0

    def __post_init__(self):
        for name in ("depths", "widths", "bottlenecks", "group_widths"):
            # Lists, as JSON has them, become tuples: a configuration can be a key.
            object.__setattr__(self, name, check_ints(name, getattr(self, name), 1))
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"{name}={getattr(self, name)} is not allowed; depths={self.depths} has {len(self.depths)} stages"
                )
        check_probability("se_ratio", self.se_ratio)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return compatible_stages(self.depths, self.widths, self.bottlenecks, self.group_widths)

    def to_dict(self) -> dict:
        """For JSON; `config_from_dict` reads it."""
        return asdict(self)


@dataclass(frozen=True)
class RegNetConfig:
    """One network of RegNet: block j wants width w0 + wa * j, rounded to w0 * wm**k and then to a multiple of 8.

    Args:
        depth: blocks of the whole network.
        w0: the first block's width, a multiple of 8.
        wa: by how much the width grows from block to block.
        wm: by which factor the rounded width grows from stage to stage, above 1.
        bottleneck, group_width: as in `AnyNetConfig`, the same in all stages.
        se_ratio: as in `AnyNetConfig`.

    Raises:
        TypeError: a parameter is of the wrong type.
        ValueError: a parameter is out of the range that the rule is defined for.
    """

    depth: int
    w0: int
    wa: float
    wm: float
    bottleneck: int = 1
    group_width: int = 1
    se_ratio: float = 0.0

    def __post_init__(self):
        for name in ("depth", "w0", "bottleneck", "group_width"):
            check_int(name, getattr(self, name), 1)
        if self.w0 % 8:
            raise ValueError(f"w0={self.w0} is not allowed; it must be a multiple of 8")
        for name in ("wa", "wm"):
            check_positive(name, getattr(self, name))
        if self.wm <= 1:
            raise ValueError(f"wm={self.wm} is not allowed; it must be above 1")
        check_probability("se_ratio", self.se_ratio)

    @property
    def levels(self) -> int:
        """How many powers of wm the widths run through, those that no block is rounded to included."""
        return int(levels_of(self.depth, self.w0, self.wa, self.wm))

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        per_block = quantised_linear_widths(self.w0, self.wa, self.wm, self.depth)
        widths = sorted(set(per_block))
        depths = [per_block.count(width) for width in widths]
        return compatible_stages(depths, widths, [self.bottleneck] * len(widths), [self.group_width] * len(widths))

    def to_dict(self) -> dict:
        """For JSON; `config_from_dict` reads it."""
        return asdict(self)


def levels_of(depth, w0, wa, wm):
    """`RegNetConfig.levels` of numbers or of arrays of them."""
    return 1 + np.rint(np.log(1 + wa * (depth - 1) / w0) / np.log(wm))


Config = AnyNetConfig | RegNetConfig


def config_from_dict(values: dict) -> Config:
    """The configuration that `to_dict` wrote.

    Raises:
        TypeError: `values` is no dict, or a value is of the wrong type.
        ValueError: the keys are neither AnyNetConfig's nor RegNetConfig's, or a value is not allowed.
    """
    if not isinstance(values, dict):
        raise TypeError(f"a configuration must be a dict, got {type(values).__name__}")
    for config_class in (AnyNetConfig, RegNetConfig):
        names = [field.name for field in fields(config_class)]
        if set(values) == set(names):
            return config_class(**values)
    raise ValueError(
        f"a configuration with the keys {', '.join(map(str, values)) or '(none)'} is not known; it has "
        + " or ".join(", ".join(field.name for field in fields(c)) for c in (AnyNetConfig, RegNetConfig))
    )
