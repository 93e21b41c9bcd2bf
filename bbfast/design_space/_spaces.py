"""Design spaces: which configurations they hold, how many, and random ones of a given cost.

After Radosavovic, Kosaraju, Girshick, He and Dollár, "Designing Network Design Spaces", 2020.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from bbfast.design_space._build import build
from bbfast.design_space._complexity import complexity
from bbfast.design_space._configs import AnyNetConfig, Config, RegNetConfig, levels_of
from bbfast.design_space._draws import draw, draw_non_decreasing, log_uniform_weights
from bbfast.nn._arguments import check_int, check_ints, check_positive, check_probability

# Candidates come in blocks of this many, so that the first n of a seed are the same for every n.
BLOCK = 1024
STAGES = 4
GROUP_WIDTHS = (1, 2, 4, 8, 16, 32)
BOTTLENECKS = (1, 2, 4)


class DesignSpace(ABC):
    """A set of configurations. `dataclasses.replace(space, ...)` makes a smaller or larger one."""

    name: str

    @abstractmethod
    def size(self) -> int:
        """The number of configurations."""

    @abstractmethod
    def violations(self, config: Config) -> list[str]:
        """Why `config` is outside, one sentence per broken rule; an empty list where it is inside."""

    @abstractmethod
    def _candidates(self, rng: np.random.Generator) -> Iterator[Config | None]:
        """Random configurations without end; each may still be outside, and None stands for one that surely is."""

    def contains(self, config: Config) -> bool:
        """Whether `config` is one of this space."""
        return not self.violations(config)

    def sample(
        self,
        n: int,
        seed: int,
        flops: tuple[float, float] | None = None,
        *,
        image_size: int | tuple[int, int] = 224,
        max_tries: int = 100_000,
    ) -> list[Config]:
        """`n` random configurations, drawn independently: one may come twice.

        Args:
            n: how many.
            seed: the same seed gives the same configurations, and the first ones of a larger `n`.
            flops: the least and the most multiply-adds of one image, as `complexity` counts them; None is any.
            image_size: the image's height and width, which flops refers to.
            max_tries: how many candidates in a row may be refused.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of range.
            RuntimeError: `max_tries` candidates in a row cost too much or too little.
        """
        check_int("n", n, 0)
        return list(itertools.islice(self.stream(seed, flops, image_size=image_size, max_tries=max_tries), n))

    def stream(
        self,
        seed: int,
        flops: tuple[float, float] | None = None,
        *,
        image_size: int | tuple[int, int] = 224,
        max_tries: int = 100_000,
    ) -> Iterator[Config]:
        """The configurations of `sample` one by one, without end."""
        check_int("seed", seed, 0)
        check_int("max_tries", max_tries, 1)
        flops = _check_flops(flops)
        complexity(AnyNetConfig((1,), (8,), (1,), (1,)), image_size)  # refuses a wrong image_size before anything runs
        return self._accepted(np.random.default_rng(seed), flops, image_size, max_tries)

    def _accepted(self, rng, flops, image_size, max_tries) -> Iterator[Config]:
        refused, seen = 0, []
        for config in self._candidates(rng):
            cost = None
            inside = config is not None and self.contains(config)
            if inside and flops is not None:
                cost = complexity(config, image_size).flops
                inside = flops[0] <= cost <= flops[1]
            if inside:
                refused, seen = 0, []
                yield config
                continue
            refused += 1
            if cost is not None:
                seen.append(cost)
            if refused >= max_tries:
                raise RuntimeError(_no_luck(self.name, flops, image_size, refused, seen))

    def build(self, config: Config, num_classes: int = 1000, in_chans: int = 3, **build_arguments) -> nn.Module:
        """The network of `config`, as `bbfast.design_space.build` makes it.

        Raises:
            ValueError: `config` is not of this space; the message says why.
        """
        if violations := self.violations(config):
            raise ValueError(f"config is not in {self.name}: {'; '.join(violations)}")
        return build(config, num_classes, in_chans, **build_arguments)


def _check_flops(flops) -> tuple[float, float] | None:
    if flops is None:
        return None
    if not isinstance(flops, (tuple, list)) or not all(_is_number(bound) for bound in flops):
        raise TypeError(f"flops must be a pair of numbers or None, got {flops!r}")
    if len(flops) != 2 or not 0 <= flops[0] <= flops[1]:
        raise ValueError(f"flops={flops} is not allowed; it must be (low, high) with 0 <= low <= high")
    return tuple(flops)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _no_luck(name: str, flops, image_size, refused: int, seen: list[int]) -> str:
    """What to say when `refused` candidates in a row did not fit."""
    if flops is None:
        return f"none of {refused} candidates in a row is in {name}; its constraints leave (almost) nothing"
    message = (
        f"none of {refused} candidates in a row from {name} has {flops[0]:g} to {flops[1]:g} multiply-adds "
        f"at image_size={image_size}"
    )
    if seen:
        low, median, high = np.percentile(seen, [5, 50, 95])
        message += f"; 90% have {low:.3g} to {high:.3g}, half of them less than {median:.3g}"
    return message + "; widen flops, change image_size, or raise max_tries"


# ---- AnyNet ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnyNetSpace(DesignSpace):
    """Networks whose stages choose their parameters by themselves, as far as the restrictions leave them free.

    Samples are log-uniform in every parameter, given the restrictions.

    Args:
        name: what messages call it.
        shared_bottleneck, shared_group_width: one value for all stages.
        increasing_widths, increasing_depths: no stage is narrower, or shallower, than the one before.
        depths, widths, bottlenecks, group_widths: what a stage may have, sorted.
        stages: how many.
        se_ratio: that of every network.
    """

    name: str
    shared_bottleneck: bool = False
    shared_group_width: bool = False
    increasing_widths: bool = False
    increasing_depths: bool = False
    depths: Sequence[int] = range(1, 17)
    widths: Sequence[int] = range(8, 1025, 8)
    bottlenecks: Sequence[int] = BOTTLENECKS
    group_widths: Sequence[int] = GROUP_WIDTHS
    stages: int = STAGES
    se_ratio: float = 0.0

    def __post_init__(self):
        _check_space(self, "depths", "widths", "bottlenecks", "group_widths")

    def size(self) -> int:
        """The number of configurations, exactly.

        Parameters are counted, as the paper does: two that `compatible_stages` rounds to the same network are two.
        Where widths or depths increase, the paper divides by 4!, which is right but for equal neighbours; these are
        counted here.
        """
        return math.prod(
            (
                _ways(len(self.depths), self.stages, non_decreasing=self.increasing_depths),
                _ways(len(self.widths), self.stages, non_decreasing=self.increasing_widths),
                _ways(len(self.bottlenecks), 1 if self.shared_bottleneck else self.stages),
                _ways(len(self.group_widths), 1 if self.shared_group_width else self.stages),
            )
        )

    def violations(self, config: Config) -> list[str]:
        if not isinstance(config, AnyNetConfig):
            return [f"it must be an AnyNetConfig, got {type(config).__name__}"]
        found = []
        if len(config.depths) != self.stages:
            found.append(f"it has {len(config.depths)} stages; it must have {self.stages}")
        for axis in ("depths", "widths", "bottlenecks", "group_widths"):
            allowed = getattr(self, axis)
            found += [
                f"{axis}[{stage}]={value}; it must be one of {_listed(allowed)}"
                for stage, value in enumerate(getattr(config, axis))
                if value not in allowed
            ]
        for axis, shared in (("bottlenecks", self.shared_bottleneck), ("group_widths", self.shared_group_width)):
            if shared and len(set(getattr(config, axis))) > 1:
                found.append(f"{axis}={getattr(config, axis)}; all stages must have the same")
        for axis, increasing in (("widths", self.increasing_widths), ("depths", self.increasing_depths)):
            values = getattr(config, axis)
            if increasing and any(after < before for before, after in itertools.pairwise(values)):
                found.append(f"{axis}={values}; it must not decrease from stage to stage")
        return found + _se_violations(config, self.se_ratio)

    def _candidates(self, rng: np.random.Generator) -> Iterator[AnyNetConfig]:
        while True:
            columns = [
                self._draw(rng, self.depths, increasing=self.increasing_depths),
                self._draw(rng, self.widths, increasing=self.increasing_widths),
                self._draw(rng, self.bottlenecks, shared=self.shared_bottleneck),
                self._draw(rng, self.group_widths, shared=self.shared_group_width),
            ]
            for parameters in zip(*columns):
                yield AnyNetConfig(*map(tuple, parameters), se_ratio=self.se_ratio)

    def _draw(self, rng, values: Sequence[int], increasing: bool = False, shared: bool = False) -> list[list[int]]:
        """`BLOCK` rows of one value per stage."""
        weights = log_uniform_weights(values)
        if increasing:
            indices = draw_non_decreasing(rng, weights, (BLOCK, self.stages))
        else:
            indices = draw(rng, weights, (BLOCK, 1 if shared else self.stages))
        return np.broadcast_to(np.asarray(values)[indices], (BLOCK, self.stages)).tolist()


def _ways(values: int, places: int, non_decreasing: bool = False) -> int:
    """In how many ways `places` can be filled, where order is free or must not decrease."""
    return math.comb(values + places - 1, places) if non_decreasing else values**places


# ---- RegNet ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegNetSpace(DesignSpace):
    """Networks of four stages whose widths and depths follow from a quantised linear rule.

    Samples are uniform in the depth and log-uniform in the others, wa and wm on the grids of `wa_values` and
    `wm_values` as in pycls; combinations that give another number of stages are left out, as in the paper.
    Configurations between the grids are inside all the same.

    Args:
        name: what messages call it.
        depths: blocks of the whole network, sorted.
        w0_values: widths of the first block, sorted multiples of 8.
        max_wa: what wa must stay below; above 0 it must be, too.
        min_wm, max_wm: the least and the most that wm may be.
        bottlenecks, group_widths: what all stages may have in common, sorted.
        stages: how many.
        se_ratio: that of every network.
    """

    name: str
    depths: Sequence[int] = range(1, 64)
    w0_values: Sequence[int] = range(8, 256, 8)
    max_wa: float = 256.0
    min_wm: float = 1.5
    max_wm: float = 3.0
    bottlenecks: Sequence[int] = BOTTLENECKS
    group_widths: Sequence[int] = GROUP_WIDTHS
    stages: int = STAGES
    se_ratio: float = 0.0

    _LEVELS = 64  # of w0, wa and wm, in the paper's count

    def __post_init__(self):
        _check_space(self, "depths", "w0_values", "bottlenecks", "group_widths")
        if unfit := [w0 for w0 in self.w0_values if w0 % 8]:
            raise ValueError(f"w0_values holds {unfit[0]}; they must be multiples of 8")
        for name in ("max_wa", "min_wm", "max_wm"):
            check_positive(name, getattr(self, name))
        if not 1 < self.min_wm <= self.max_wm:
            raise ValueError(f"min_wm={self.min_wm}, max_wm={self.max_wm} are not allowed; it must be 1 < min <= max")

    def size(self) -> int:
        """The number of configurations as the paper counts them, which is about 3e8 for RegNetX.

        wa and wm are real numbers, so the paper takes 64 levels of each of w0, wa and wm, wherever their bounds lie,
        times the depths, bottlenecks and group widths. It does not take off what gives another number of stages.
        """
        return len(self.depths) * self._LEVELS**3 * len(self.bottlenecks) * len(self.group_widths)

    def violations(self, config: Config) -> list[str]:
        if not isinstance(config, RegNetConfig):
            return [f"it must be a RegNetConfig, got {type(config).__name__}"]
        found = []
        for name, allowed in (
            ("depth", self.depths),
            ("w0", self.w0_values),
            ("bottleneck", self.bottlenecks),
            ("group_width", self.group_widths),
        ):
            if getattr(config, name) not in allowed:
                found.append(f"{name}={getattr(config, name)}; it must be one of {_listed(allowed)}")
        if not 0 < config.wa < self.max_wa:
            found.append(f"wa={config.wa}; it must be above 0 and below {self.max_wa:g}")
        if not self.min_wm <= config.wm <= self.max_wm:
            found.append(f"wm={config.wm}; it must lie in {self.min_wm:g}..{self.max_wm:g}")
        if config.levels != self.stages:
            found.append(f"its widths go up to w0 * wm**{config.levels - 1}; they must to w0 * wm**{self.stages - 1}")
        elif len(config.stages) != self.stages:  # two powers became one multiple of 8
            found.append(f"it has {len(config.stages)} stages; it must have {self.stages}")
        return found + _se_violations(config, self.se_ratio)

    @property
    def wa_values(self) -> list[float]:
        """What samples have as wa: tenths from max_wa / 32 on, which is 8 for RegNetX."""
        return [tenths / 10 for tenths in range(max(1, round(self.max_wa / 3.2)), math.ceil(self.max_wa * 10))]

    @property
    def wm_values(self) -> list[float]:
        """What samples have as wm: thousandths."""
        return [value / 1000 for value in range(math.ceil(self.min_wm * 1000), math.floor(self.max_wm * 1000) + 1)]

    def _candidates(self, rng: np.random.Generator) -> Iterator[RegNetConfig | None]:
        axes = (
            (self.depths, np.full(len(self.depths), 1 / len(self.depths))),
            *((values, log_uniform_weights(values)) for values in (self.w0_values, self.wa_values, self.wm_values)),
            *((values, log_uniform_weights(values)) for values in (self.bottlenecks, self.group_widths)),
        )
        while True:
            columns = [np.asarray(values)[draw(rng, weights, (BLOCK,))] for values, weights in axes]
            # Most go up to another power of wm; seeing it here, for many at a time, is quicker.
            fits = levels_of(*columns[:4]) == self.stages
            for fit, *parameters in zip(fits, *(column.tolist() for column in columns)):
                yield RegNetConfig(*parameters, se_ratio=self.se_ratio) if fit else None


# ---- what both share -------------------------------------------------------------------------------------


def _check_space(space: DesignSpace, *axes: str) -> None:
    """Raises TypeError or ValueError where a space could not be drawn from."""
    for name in axes:
        values = getattr(space, name)
        if not isinstance(values, range):  # a tuple cannot change later
            object.__setattr__(space, name, check_ints(name, values, 1))
        if not values or values[0] < 1 or any(after <= before for before, after in itertools.pairwise(values)):
            raise ValueError(f"{name}={values} is not allowed; it must hold growing numbers of at least 1")
    check_int("stages", space.stages, 1)
    check_probability("se_ratio", space.se_ratio)


def _se_violations(config: Config, se_ratio: float) -> list[str]:
    if config.se_ratio == se_ratio:
        return []
    return [f"se_ratio={config.se_ratio:g}; it must be {se_ratio:g}"]


def _listed(values: Sequence[int]) -> str:
    values = [str(value) for value in values]
    return ", ".join(values) if len(values) <= 8 else f"{values[0]}, {values[1]}, ..., {values[-1]}"


# ---- the paper's spaces ----------------------------------------------------------------------------------

AnyNetXA = AnyNetSpace("AnyNetXA")
AnyNetXB = AnyNetSpace("AnyNetXB", shared_bottleneck=True)
AnyNetXC = AnyNetSpace("AnyNetXC", shared_bottleneck=True, shared_group_width=True)
AnyNetXD = AnyNetSpace("AnyNetXD", shared_bottleneck=True, shared_group_width=True, increasing_widths=True)
AnyNetXE = AnyNetSpace(
    "AnyNetXE", shared_bottleneck=True, shared_group_width=True, increasing_widths=True, increasing_depths=True
)
RegNetX = RegNetSpace("RegNetX")
RegNetY = RegNetSpace("RegNetY", se_ratio=0.25)
# What the paper recommends after looking at the best models.
RegNetXRefined = RegNetSpace("RegNetXRefined", depths=range(12, 29), min_wm=2.0, bottlenecks=(1,))
RegNetYRefined = RegNetSpace("RegNetYRefined", depths=range(12, 29), min_wm=2.0, bottlenecks=(1,), se_ratio=0.25)

SPACES = {
    space.name: space
    for space in (
        *(AnyNetXA, AnyNetXB, AnyNetXC, AnyNetXD, AnyNetXE),
        *(RegNetX, RegNetY, RegNetXRefined, RegNetYRefined),
    )
}


def get_space(name: str) -> DesignSpace:
    """The space of the paper that is called `name`; upper and lower case are the same.

    Raises:
        TypeError: `name` is no str.
        ValueError: there is none; the message lists what there is.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    for known, space in SPACES.items():
        if known.lower() == name.lower():
            return space
    raise ValueError(f"there is no design space {name!r}; there are {', '.join(SPACES)}")
