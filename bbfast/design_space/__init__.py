"""Design spaces of networks, and how to compare them, after "Designing Network Design Spaces" (2020).

    configs = RegNetX.sample(100, seed=0, flops=(360e6, 400e6))
    model = build(configs[0], num_classes=10)

AnyNetXA to E, RegNetX and RegNetY know their constraints, their size, and how to draw random networks of a given cost;
`ErrorDistribution` and `plot_edfs` compare spaces by the errors of trained samples. This room stands above `models`,
whose RegNet blocks it builds with, and holds no model of its own.
"""

from bbfast.design_space._build import build
from bbfast.design_space._complexity import Complexity, complexity
from bbfast.design_space._configs import AnyNetConfig, RegNetConfig, Stage, compatible_stages, config_from_dict
from bbfast.design_space._edf import ErrorDistribution
from bbfast.design_space._plot import plot_edfs
from bbfast.design_space._population import Population
from bbfast.design_space._spaces import (
    SPACES,
    AnyNetSpace,
    AnyNetXA,
    AnyNetXB,
    AnyNetXC,
    AnyNetXD,
    AnyNetXE,
    DesignSpace,
    RegNetSpace,
    RegNetX,
    RegNetXRefined,
    RegNetY,
    RegNetYRefined,
    get_space,
)

__all__ = [
    "SPACES",
    "AnyNetConfig",
    "AnyNetSpace",
    "AnyNetXA",
    "AnyNetXB",
    "AnyNetXC",
    "AnyNetXD",
    "AnyNetXE",
    "Complexity",
    "DesignSpace",
    "ErrorDistribution",
    "Population",
    "RegNetConfig",
    "RegNetSpace",
    "RegNetX",
    "RegNetXRefined",
    "RegNetY",
    "RegNetYRefined",
    "Stage",
    "build",
    "compatible_stages",
    "complexity",
    "config_from_dict",
    "get_space",
    "plot_edfs",
]
