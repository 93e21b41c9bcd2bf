"""Design spaces: constraints, sizes, random configurations, costs, networks, and the distribution of errors."""

import builtins
import importlib.util
import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bbfast.cli import main
from bbfast.design_space import (
    SPACES,
    AnyNetConfig,
    AnyNetXA,
    AnyNetXB,
    AnyNetXC,
    AnyNetXD,
    AnyNetXE,
    Complexity,
    ErrorDistribution,
    Population,
    RegNetConfig,
    RegNetX,
    RegNetXRefined,
    RegNetY,
    RegNetYRefined,
    _draws,
    build,
    compatible_stages,
    complexity,
    config_from_dict,
    get_space,
    plot_edfs,
)

ANYNETS = [AnyNetXA, AnyNetXB, AnyNetXC, AnyNetXD, AnyNetXE]
REGNETS = [RegNetX, RegNetY, RegNetXRefined, RegNetYRefined]


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


def by_name(space):
    return space.name


# ---- constraints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ANYNETS, ids=by_name)
def test_10000_samples_of_anynet_obey_the_paper(space, seed):
    configs = space.sample(10_000, seed)
    assert all(map(space.contains, configs))
    depths, widths, bottlenecks, group_widths = (
        np.array([getattr(config, axis) for config in configs])
        for axis in ("depths", "widths", "bottlenecks", "group_widths")
    )
    assert depths.shape == widths.shape == bottlenecks.shape == group_widths.shape == (10_000, 4)
    assert depths.min() >= 1 and depths.max() <= 16
    assert widths.min() >= 8 and widths.max() <= 1024 and not (widths % 8).any()
    assert set(bottlenecks.flat) == {1, 2, 4}
    assert set(group_widths.flat) == {1, 2, 4, 8, 16, 32}
    letter = space.name[-1]
    assert (np.ptp(bottlenecks, axis=1) == 0).all() == (letter in "BCDE")
    assert (np.ptp(group_widths, axis=1) == 0).all() == (letter in "CDE")
    assert (np.diff(widths) >= 0).all() == (letter in "DE")
    assert (np.diff(depths) >= 0).all() == (letter == "E")
    assert {config.se_ratio for config in configs} == {0}
    check_stages(configs)
    if letter in "DE":  # rounding to compatible widths keeps their order
        assert all(a.width <= b.width for config in configs for a, b in itertools.pairwise(config.stages))


@pytest.mark.parametrize("space", REGNETS, ids=by_name)
def test_10000_samples_of_regnet_obey_the_paper(space, seed):
    configs = space.sample(10_000, seed)
    refined = space in (RegNetXRefined, RegNetYRefined)
    assert all(map(space.contains, configs))
    depth, w0, wa, wm = (np.array([getattr(c, name) for c in configs]) for name in ("depth", "w0", "wa", "wm"))
    assert depth.max() <= 28 and depth.min() >= 12 if refined else depth.max() < 64 and depth.min() >= 4
    assert w0.min() >= 8 and w0.max() < 256 and not (w0 % 8).any()
    assert wa.min() > 0 and wa.max() < 256
    assert wm.min() >= (2 if refined else 1.5) and wm.max() <= 3
    assert {c.bottleneck for c in configs} == ({1} if refined else {1, 2, 4})
    assert {c.group_width for c in configs} == {1, 2, 4, 8, 16, 32}
    assert {c.se_ratio for c in configs} == {0.25 if "Y" in space.name else 0}
    assert {len(c.stages) for c in configs} == {4}
    assert all(a.width <= b.width for config in configs for a, b in itertools.pairwise(config.stages))
    assert all(sum(stage.depth for stage in config.stages) == config.depth for config in configs)
    check_stages(configs)


def check_stages(configs):
    """Every group is as wide as every other, and no stage is far from what was asked for."""
    for config in configs:
        for stage in config.stages:
            inner, remainder = divmod(stage.width, stage.bottleneck)
            assert remainder == 0 and inner % stage.group_width == 0
    for config in configs:
        if isinstance(config, AnyNetConfig):
            for stage, depth, width in zip(config.stages, config.depths, config.widths):
                assert stage.depth == depth and abs(stage.width - width) <= width / 3


def test_each_restriction_shrinks_the_space_before_it(seed):
    for larger, smaller in itertools.pairwise(ANYNETS):
        assert all(map(larger.contains, smaller.sample(200, seed)))
        assert not all(map(smaller.contains, larger.sample(200, seed)))
    for larger, smaller in ((RegNetX, RegNetXRefined), (RegNetY, RegNetYRefined)):
        assert all(map(larger.contains, smaller.sample(200, seed)))
        assert not all(map(smaller.contains, larger.sample(200, seed)))
    assert not any(map(RegNetX.contains, RegNetY.sample(20, seed)))


ANYNET = AnyNetConfig((1, 2, 3, 4), (8, 16, 32, 64), (2, 2, 2, 2), (4, 4, 4, 4))
REGNET = RegNetConfig(depth=13, w0=24, wa=36.44, wm=2.49, group_width=8)  # regnetx_002


@pytest.mark.parametrize(
    "space, config, words",
    [
        (AnyNetXA, replace(ANYNET, depths=(1, 2, 17, 4)), ["depths[2]=17; it must be one of 1, 2, ..., 16"]),
        (AnyNetXA, replace(ANYNET, widths=(8, 12, 32, 1032)), ["widths[1]=12", "widths[3]=1032; it must be one of 8"]),
        (AnyNetXA, replace(ANYNET, bottlenecks=(3, 1, 1, 1)), ["bottlenecks[0]=3; it must be one of 1, 2, 4"]),
        (AnyNetXA, replace(ANYNET, group_widths=(1, 2, 4, 64)), ["group_widths[3]=64; it must be one of 1, 2, 4, 8, "]),
        (AnyNetXA, replace(ANYNET, se_ratio=0.25), ["se_ratio=0.25; it must be 0"]),
        (AnyNetXA, AnyNetConfig((1,), (8,), (1,), (1,)), ["it has 1 stages; it must have 4"]),
        (AnyNetXA, REGNET, ["it must be an AnyNetConfig, got RegNetConfig"]),
        (AnyNetXB, replace(ANYNET, bottlenecks=(2, 2, 2, 1)), ["bottlenecks=(2, 2, 2, 1); all stages must have"]),
        (AnyNetXC, replace(ANYNET, group_widths=(4, 4, 8, 4)), ["group_widths=(4, 4, 8, 4); all stages must have"]),
        (AnyNetXD, replace(ANYNET, widths=(8, 32, 16, 64)), ["widths=(8, 32, 16, 64); it must not decrease"]),
        (AnyNetXE, replace(ANYNET, depths=(1, 2, 4, 3)), ["depths=(1, 2, 4, 3); it must not decrease"]),
        (RegNetX, ANYNET, ["it must be a RegNetConfig, got AnyNetConfig"]),
        (RegNetX, replace(REGNET, w0=256), ["w0=256; it must be one of 8, 16, ..., 248"]),
        (RegNetX, replace(REGNET, wa=256.0, wm=3.0), ["wa=256.0; it must be above 0 and below 256"]),
        (RegNetX, replace(REGNET, wm=3.01), ["wm=3.01; it must lie in 1.5..3"]),
        (RegNetX, replace(REGNET, wm=1.49), ["wm=1.49; it must lie in 1.5..3", "widths go up to w0 * wm**"]),
        (RegNetX, replace(REGNET, depth=64), ["depth=64; it must be one of 1, 2, ..., 63"]),
        (RegNetX, replace(REGNET, depth=3), ["its widths go up to w0 * wm**2; they must to w0 * wm**3"]),
        (RegNetX, replace(REGNET, bottleneck=8, group_width=24), ["bottleneck=8", "group_width=24"]),
        (RegNetY, REGNET, ["se_ratio=0; it must be 0.25"]),
        (RegNetXRefined, replace(REGNET, depth=29), ["depth=29; it must be one of 12, 13, ..., 28"]),
        (RegNetXRefined, replace(REGNET, bottleneck=2), ["bottleneck=2; it must be one of 1"]),
        (RegNetXRefined, replace(REGNET, wm=1.9), ["wm=1.9; it must lie in 2..3"]),
    ],
)
def test_violations_say_why(space, config, words):
    found = space.violations(config)
    assert not space.contains(config)
    for word in words:
        assert any(word in sentence for sentence in found), found


def test_equal_neighbours_are_allowed():
    config = replace(ANYNET, depths=(2, 2, 2, 2), widths=(64, 64, 64, 64))
    assert AnyNetXE.violations(config) == []


def test_a_level_without_blocks_is_no_stage():
    """Four widths, but from the powers 0, 2, 3 and 4 of wm: the paper's stage 1 would be empty."""
    config = RegNetConfig(depth=6, w0=8, wa=20.0, wm=1.9)
    assert len(config.stages) == 4 and config.levels == 5
    assert any("w0 * wm**4" in sentence for sentence in RegNetX.violations(config))


def test_published_regnets_inside_and_outside():
    assert RegNetX.contains(REGNET) and RegNetXRefined.contains(REGNET)
    assert RegNetY.contains(replace(REGNET, se_ratio=0.25))
    regnety_016 = RegNetConfig(depth=27, w0=48, wa=20.71, wm=2.65, group_width=24, se_ratio=0.25)
    assert [sentence.split(";")[0] for sentence in RegNetY.violations(regnety_016)] == ["group_width=24"]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: replace(ANYNET, depths=(1, 2.0, 3, 4)), TypeError, "depths must be an int, got float"),
        (lambda: replace(ANYNET, widths=64), TypeError, "widths must be a tuple of ints, got int"),
        (lambda: replace(ANYNET, group_widths=(0, 1, 1, 1)), ValueError, "group_widths=0 is not allowed"),
        (lambda: replace(ANYNET, bottlenecks=(1, 1)), ValueError, r"bottlenecks=\(1, 1\) is not allowed; depths="),
        (lambda: replace(ANYNET, se_ratio=2), ValueError, "se_ratio=2 is not allowed"),
        (lambda: replace(REGNET, w0=20), ValueError, "w0=20 is not allowed; it must be a multiple of 8"),
        (lambda: replace(REGNET, wm=1.0), ValueError, "wm=1.0 is not allowed; it must be above 1"),
        (lambda: replace(REGNET, wa=math.nan), ValueError, "wa=nan is not allowed"),
        (lambda: replace(REGNET, depth="13"), TypeError, "depth must be an int, got str"),
        (lambda: config_from_dict({"depth": 3}), ValueError, "the keys depth is not known; it has depths, widths"),
        (lambda: config_from_dict([3]), TypeError, "a configuration must be a dict, got list"),
        (lambda: get_space("RegNetQ"), ValueError, "no design space 'RegNetQ'; there are AnyNetXA, "),
        (lambda: get_space(3), TypeError, "name must be a str, got int"),
    ],
)
def test_errors_of_configurations(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "space, arguments, error, message",
    [
        (AnyNetXA, {"widths": (16, 8)}, ValueError, r"widths=\(16, 8\) is not allowed; it must hold growing numbers"),
        (AnyNetXA, {"depths": range(0, 4)}, ValueError, r"depths=range\(0, 4\) is not allowed"),
        (AnyNetXA, {"depths": range(4, 4)}, ValueError, r"depths=range\(4, 4\) is not allowed"),
        (AnyNetXA, {"bottlenecks": 2}, TypeError, "bottlenecks must be a tuple of ints, got int"),
        (AnyNetXA, {"group_widths": [1, 2.0]}, TypeError, "group_widths must be an int, got float"),
        (AnyNetXA, {"stages": 0}, ValueError, "stages=0"),
        (RegNetX, {"w0_values": (8, 20)}, ValueError, "w0_values holds 20; they must be multiples of 8"),
        (RegNetX, {"min_wm": 3.5}, ValueError, "min_wm=3.5, max_wm=3.0 are not allowed"),
        (RegNetX, {"min_wm": 1.0}, ValueError, "min_wm=1.0, max_wm=3.0 are not allowed"),
        (RegNetX, {"max_wa": 0.0}, ValueError, "max_wa=0.0"),
        (RegNetX, {"se_ratio": -1.0}, ValueError, "se_ratio=-1.0"),
    ],
)
def test_errors_of_spaces(space, arguments, error, message):
    with pytest.raises(error, match=message):
        replace(space, **arguments)


def test_spaces_of_ones_own(seed):
    anynet = replace(AnyNetXE, name="mine", depths=[2], widths=[8, 16], group_widths=[8], bottlenecks=[1], stages=5)
    configs = anynet.sample(40, seed)
    assert {config.widths for config in configs} <= {(8,) * n + (16,) * (5 - n) for n in range(6)}
    assert len(set(configs)) > 2 and anynet.size() == 6
    regnet = replace(RegNetX, name="mine", w0_values=[8], max_wa=16.0, min_wm=2.0, max_wm=2.0)
    configs = regnet.sample(40, seed)
    assert all(config.w0 == 8 and config.wm == 2 and 0.5 <= config.wa < 16 for config in configs)


def test_configurations_survive_json(seed):
    for space in SPACES.values():
        for config in space.sample(5, seed):
            assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_compatible_stages_follow_the_rule_of_timm(rng):
    regnet = pytest.importorskip("timm.models.regnet")
    widths, group_widths = 8 * rng.integers(1, 129, 1000), rng.integers(1, 65, 1000)
    parameters = [[3] * 1000, widths.tolist(), rng.choice([1, 2, 4], 1000).tolist(), group_widths.tolist()]
    stages = compatible_stages(*parameters)
    ratios = [1 / bottleneck for bottleneck in parameters[2]]
    expected = regnet.adjust_widths_groups_comp(parameters[1], ratios, parameters[3])
    assert ([stage.width for stage in stages], [stage.group_width for stage in stages]) == expected
    assert [stage.bottleneck for stage in stages] == parameters[2]


# ---- sizes -----------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_paper():
    assert AnyNetXA.size() == (16 * 128 * 3 * 6) ** 4  # 1.8e18
    assert AnyNetXB.size() == (16 * 128 * 6) ** 4 * 3  # 6.8e16
    assert AnyNetXC.size() == (16 * 128) ** 4 * 3 * 6  # 3.2e14
    # The paper divides by 4! once and twice, 1.3e13 and 5.5e11, which forgets equal neighbours.
    assert AnyNetXD.size() == 16**4 * math.comb(131, 4) * 18
    assert AnyNetXD.size() == pytest.approx(AnyNetXC.size() / 24, rel=0.05)
    assert AnyNetXE.size() == math.comb(19, 4) * math.comb(131, 4) * 18
    assert AnyNetXC.size() / 24**2 < AnyNetXE.size() < 1.5 * AnyNetXC.size() / 24**2
    assert RegNetX.size() == RegNetY.size() == 63 * 64**3 * 18
    assert RegNetX.size() == pytest.approx(3.0e8, rel=0.02)
    assert RegNetXRefined.size() == RegNetYRefined.size() == 17 * 64**3 * 6


@pytest.mark.parametrize("space", ANYNETS, ids=by_name)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_sizes_by_enumeration(space, stages):
    depths, widths, bottlenecks, group_widths = (1, 3), (8, 24, 40), (1, 2), (1, 8)
    space = replace(
        space,
        **{"depths": depths, "widths": widths, "bottlenecks": bottlenecks, "group_widths": group_widths},
        stages=stages,
    )
    everything = itertools.product(
        *(itertools.product(values, repeat=stages) for values in (depths, widths, bottlenecks, group_widths))
    )
    assert space.size() == sum(space.contains(AnyNetConfig(*parameters)) for parameters in everything)


# ---- sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES.values(), ids=by_name)
def test_samples_depend_on_the_seed_alone(space):
    first = space.sample(30, 5)
    assert space.sample(30, 5) == first
    assert space.sample(7, 5) == first[:7]
    assert space.sample(30, 6) != first
    assert space.sample(0, 5) == []


@pytest.mark.parametrize("space", [AnyNetXA, AnyNetXE, RegNetY], ids=by_name)
@pytest.mark.parametrize("image_size, flops", [(224, (360e6, 400e6)), (32, (2e6, 4e6))])
def test_samples_cost_what_was_asked(space, image_size, flops, seed):
    configs = space.sample(15, seed, flops, image_size=image_size)
    assert len(configs) == 15
    for config in configs:
        assert flops[0] <= complexity(config, image_size).flops <= flops[1]
        assert space.contains(config)


def test_no_sample_costs_so_little(seed):
    with pytest.raises(RuntimeError) as raised:
        AnyNetXA.sample(1, seed, (1, 2), max_tries=500)
    message = str(raised.value)
    assert "none of 500 candidates in a row from AnyNetXA has 1 to 2 multiply-adds at image_size=224" in message
    assert "90% have" in message and "widen flops" in message


def test_a_space_that_holds_nothing(seed):
    with pytest.raises(RuntimeError, match="none of 300 candidates in a row is in tiny; its constraints leave"):
        replace(RegNetX, name="tiny", depths=(2, 3)).sample(1, seed, max_tries=300)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"n": -1}, ValueError, "n=-1"),
        ({"n": 1.0}, TypeError, "n must be an int"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"max_tries": 0}, ValueError, "max_tries=0"),
        ({"flops": 400e6}, TypeError, "flops must be a pair of numbers or None, got 400000000.0"),
        ({"flops": ("1", "2")}, TypeError, "flops must be a pair of numbers"),
        ({"flops": (2, 1)}, ValueError, r"flops=\(2, 1\) is not allowed; it must be \(low, high\)"),
        ({"flops": (1, 2, 3)}, ValueError, r"flops=\(1, 2, 3\) is not allowed"),
        ({"image_size": 0}, ValueError, "image_size=0"),
        ({"image_size": (32, 32, 3)}, ValueError, "must be one int or two"),
    ],
)
def test_errors_of_sampling(arguments, error, message):
    with pytest.raises(error, match=message):
        RegNetX.sample(**{"n": 1, "seed": 0, **arguments})


def test_log_uniform_weights():
    assert _draws.log_uniform_weights([7]).tolist() == [1]
    assert _draws.log_uniform_weights((1, 2, 4, 8)) == pytest.approx([0.25] * 4)
    depths = _draws.log_uniform_weights(range(1, 17)).cumsum()
    assert depths == pytest.approx(np.log2(2 * np.arange(1, 17)) / 5)  # a straight line over the logarithm
    slopes = _draws.log_uniform_weights([8.0, 8.1, 8.2])
    assert slopes == pytest.approx(np.log([8 / 7.9, 8.1 / 8, 8.2 / 8.1]) / np.log(8.2 / 7.9))


def test_draws_that_do_not_decrease(rng):
    """Against the exact distribution: independent draws, given that they do not decrease."""
    weights = rng.dirichlet(np.ones(4))
    exact = {
        indices: math.prod(weights[list(indices)]) for indices in itertools.combinations_with_replacement(range(4), 3)
    }
    total, draws = sum(exact.values()), 200_000
    seen = Counter(map(tuple, _draws.draw_non_decreasing(rng, weights, (draws, 3)).tolist()))
    assert set(seen) <= set(exact)
    for indices, weight in exact.items():
        share = weight / total
        assert seen[indices] / draws == pytest.approx(share, abs=6 * math.sqrt(share / draws) + 1e-4)


def test_samples_are_log_uniform(rng):
    widths = np.array([config.widths for config in AnyNetXA.sample(5000, int(rng.integers(1000)))])
    for threshold in (32, 128, 512):
        share = math.log(threshold / 4) / math.log(1024 / 4)
        assert (widths <= threshold).mean() == pytest.approx(share, abs=6 * math.sqrt(0.25 / widths.size))


# ---- costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["regnetx_004", "regnetx_016", "regnetx_080", "regnety_002", "regnety_320"])
def test_parameters_of_published_regnets(name):
    timm = pytest.importorskip("timm")
    from timm.models.regnet import model_cfgs

    cfg = model_cfgs[name]
    config = RegNetConfig(cfg.depth, cfg.w0, cfg.wa, cfg.wm, group_width=cfg.group_size, se_ratio=cfg.se_ratio)
    model = timm.create_model(name, device="meta")
    assert complexity(config).parameters == sum(p.numel() for p in model.parameters())


def test_published_flops():
    """The papers' tables: 200 and 1600 million multiply-adds, 2.2 and 7.9 million activations."""
    assert complexity(REGNET).flops == pytest.approx(200e6, rel=0.03)
    assert complexity(REGNET).activations == pytest.approx(2.2e6, rel=0.03)
    x_016 = complexity(RegNetConfig(depth=18, w0=80, wa=34.01, wm=2.25, group_width=24))
    assert (x_016.parameters, x_016.flops) == (9_190_136, pytest.approx(1.6e9, rel=0.02))
    assert x_016.activations == pytest.approx(7.9e6, rel=0.02)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"image_size": 31.5}, TypeError, "image_size must be an int, got float"),
        ({"image_size": (32, 0)}, ValueError, "image_size=0 is not allowed"),
        ({"num_classes": -1}, ValueError, "num_classes=-1"),
        ({"in_chans": 0}, ValueError, "in_chans=0"),
    ],
)
def test_errors_of_complexity(arguments, error, message):
    with pytest.raises(error, match=message):
        complexity(REGNET, **arguments)


class ConvolutionOutputs(TorchDispatchMode):
    """Counts elements that convolutions put out, and matrix products, as which one-pixel convolutions may run."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("space", SPACES.values(), ids=by_name)
def test_complexity_of_built_networks(space, seed, torch_backend):
    """Odd sizes, and another number of channels and classes than the usual ones."""
    for config in space.sample(1, seed, (1e6, 4e6), image_size=32):
        model = space.build(config, num_classes=7, in_chans=2).eval()
        x = torch.randn(1, 2, 33, 50)
        with FlopCounterMode(display=False) as flops, ConvolutionOutputs() as outputs:
            assert model(x).shape == (1, 7)
        expected = complexity(config, (33, 50), num_classes=7, in_chans=2)
        assert expected.parameters == sum(p.numel() for p in model.parameters())
        assert expected.flops == flops.get_total_flops() / 2
        assert expected.activations == outputs.elements - 7  # those of the classifier do not count


def test_complexity_by_hooks_in_timm(seed):
    regnet = pytest.importorskip("timm.models.regnet")
    for config in RegNetX.sample(1, seed, (1e6, 5e6), image_size=32) + RegNetY.sample(
        2, seed, (1e6, 5e6), image_size=32
    ):
        names = ("depth", "w0", "wa", "wm", "se_ratio")
        cfg = regnet.RegNetCfg(
            **{name: getattr(config, name) for name in names},
            bottle_ratio=1 / config.bottleneck,
            group_size=config.group_width,
        )
        model = regnet.RegNet(cfg, num_classes=5).eval()
        seen = Counter()

        def count(module, inputs, output, seen=seen):
            seen["flops"] += output.numel() * module.weight[0].numel()
            seen["activations"] += output.numel() if isinstance(module, torch.nn.Conv2d) else 0

        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(count)
        model(torch.randn(1, 3, 47, 33))
        parameters = sum(p.numel() for p in model.parameters())
        assert complexity(config, (47, 33), 5) == Complexity(parameters, seen["flops"], seen["activations"])


# ---- networks --------------------------------------------------------------------------------------------


@pytest.fixture
def torch_backend(monkeypatch):
    """Whole models in Triton's interpreter would take minutes."""
    monkeypatch.setenv("BBFAST_BACKEND", "torch")


def test_a_published_configuration_is_timms_network(torch_backend):
    timm = pytest.importorskip("timm")
    original = timm.create_model("regnety_002", num_classes=10).eval()
    for parameter in original.parameters():  # blocks begin as their shortcuts, which would hide the rest
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() == 1 else None
    model = build(replace(REGNET, se_ratio=0.25), num_classes=10).eval()
    model.load_state_dict(original.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", [AnyNetXA, RegNetY], ids=by_name)
def test_built_networks_have_the_stages_asked_for(space, seed):
    for config in space.sample(5, seed, (1e6, 1e7), image_size=32):
        model = build(config, device="meta")
        for index, stage in enumerate(config.stages, start=1):
            blocks = list(model.get_submodule(f"s{index}").children())
            assert len(blocks) == stage.depth
            for block in blocks:
                assert block.conv3.conv.out_channels == stage.width
                assert block.conv2.conv.in_channels * stage.bottleneck == stage.width
                assert block.conv2.conv.weight.shape[1] == stage.group_width
                assert isinstance(block.se, torch.nn.Identity) == (config.se_ratio == 0)
            assert [block.conv2.conv.stride[0] for block in blocks] == [2] + [1] * (stage.depth - 1)
        assert model.stem.conv.out_channels == 32 and model.head.fc.out_features == 1000


def test_built_networks_train(seed, torch_backend):
    space = replace(AnyNetXA, name="small", depths=(1, 2), widths=(8, 16, 24), se_ratio=0.25)
    (config,) = space.sample(1, seed)
    model = space.build(config, num_classes=3, in_chans=1, drop_path_rate=0.1)
    x, y = torch.randn(12, 1, 32, 32), torch.arange(12) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert min(losses[-5:]) < 0.5 * losses[0], losses


def test_build_hands_its_arguments_on():
    model = build(ANYNET, 0, 4, global_pool="max", drop_rate=0.3, drop_path_rate=0.2, dtype=torch.float64, device="cpu")
    assert model.stem.conv.weight.shape == (32, 4, 3, 3) and model.stem.conv.weight.dtype == torch.float64
    assert model.num_classes == 0 and model.drop_rate == 0.3
    assert model.s4.b4.drop_path.drop_prob == pytest.approx(0.2)
    assert model.s4.b4.conv3.bn.weight.eq(0).all()
    assert build(ANYNET, zero_init_last=False, device="cpu").s4.b4.conv3.bn.weight.eq(1).all()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: build({"depths": (1,)}), TypeError, "config must be an AnyNetConfig or a RegNetConfig, got dict"),
        (lambda: build(ANYNET, num_classes=-1), ValueError, "num_classes=-1"),
        (lambda: RegNetX.build(REGNET, drop_rat=0.1), TypeError, "drop_rat"),
        (lambda: RegNetX.build(replace(REGNET, w0=256, wm=3.5)), ValueError, "config is not in RegNetX: w0=256; .*wm="),
    ],
)
def test_errors_of_build(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- the distribution of errors --------------------------------------------------------------------------


def random_errors(rng, size=None):
    """With ties: hundredths."""
    return rng.integers(20, 60, size or int(rng.integers(1, 200))) / 100


def test_edf_is_the_share_of_smaller_errors(rng):
    for _ in range(20):
        errors = random_errors(rng)
        at = np.concatenate([errors, errors, rng.random(30), [-1.0, 2.0]]).reshape(2, -1)
        distribution = ErrorDistribution(errors)
        expected = (errors < at[..., None]).mean(axis=-1)
        assert distribution(at).shape == at.shape
        np.testing.assert_allclose(distribution(at), expected, rtol=1e-12)
        assert distribution.min == errors.min()
        assert distribution.mean == pytest.approx(errors.mean())
        assert len(distribution) == len(errors)


def test_edf_is_strict():
    distribution = ErrorDistribution([3, 1, 1, 2])
    assert distribution([0, 1, 1.5, 2, 3, 3.5]).tolist() == [0, 0, 0.5, 0.5, 0.75, 1]
    assert distribution(2) == 0.5


def test_bootstrap_bands_against_resampling(rng):
    """The same draws, each taken as the list of errors that it stands for."""
    errors, resamples, confidence = random_errors(rng, 37), 200, 0.9
    at = np.concatenate([errors, rng.random(20)])
    counts = np.random.default_rng(11).multinomial(37, np.full(37, 1 / 37), size=resamples)
    drawn = np.stack([np.repeat(np.sort(errors), row) for row in counts])
    shares = (drawn[:, :, None] < at).mean(axis=1)
    distribution = ErrorDistribution(errors)
    low, high = distribution.bootstrap_bands(at, confidence, resamples, seed=11)
    np.testing.assert_allclose(low, np.quantile(shares, 0.05, axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(high, np.quantile(shares, 0.95, axis=0), rtol=1e-9, atol=1e-12)
    mean = distribution.bootstrap_mean(confidence, resamples, seed=11)
    assert mean == pytest.approx(tuple(np.quantile(drawn.mean(axis=1), [0.05, 0.95])))
    assert (low <= distribution(at) + 1e-12).all() and (distribution(at) <= high + 1e-12).all()
    assert (distribution.bootstrap_bands(at, confidence, resamples, seed=12)[0] != low).any()


def test_bootstrap_bands_hold_what_they_promise(rng):
    """Of many samples from a known distribution, about as many bands hold the truth as `confidence` says."""
    held = []
    for _ in range(200):
        low, high = ErrorDistribution(rng.random(80)).bootstrap_bands(0.4, 0.9, 300, seed=int(rng.integers(2**31)))
        held.append(low <= 0.4 <= high)
    assert np.mean(held) == pytest.approx(0.9, abs=0.12)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ErrorDistribution([]), ValueError, "at least one"),
        (lambda: ErrorDistribution([[0.1]]), ValueError, r"got the shape \(1, 1\)"),
        (lambda: ErrorDistribution([0.1, math.nan]), ValueError, r"errors\[1\] is not finite"),
        (lambda: ErrorDistribution(["0.1"]), TypeError, "errors must be numbers"),
        (lambda: ErrorDistribution([0.1])(math.nan), ValueError, "at must not hold NaN"),
        (lambda: ErrorDistribution([0.1]).bootstrap_bands(0.1, confidence=1.0), ValueError, "confidence=1.0"),
        (lambda: ErrorDistribution([0.1]).bootstrap_bands(0.1, confidence=1), TypeError, "confidence must be a float"),
        (lambda: ErrorDistribution([0.1]).bootstrap_bands(0.1, resamples=0), ValueError, "resamples=0"),
        (lambda: ErrorDistribution([0.1]).bootstrap_mean(seed=-1), ValueError, "seed=-1"),
    ],
)
def test_errors_of_distributions(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_plot_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="distributions must hold at least one"):
        plot_edfs({}, tmp_path / "edf.png")


def test_plot(rng, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))
    distributions = {"first": ErrorDistribution(random_errors(rng)), "second": ErrorDistribution([0.5])}
    plot_edfs(distributions, tmp_path / "edf.png", resamples=50)
    assert (tmp_path / "edf.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    for line, band, distribution in zip(axes.lines, axes.collections, distributions.values()):
        x, y = line.get_xydata().T
        assert line.get_drawstyle() == "steps-pre" and set(distribution.errors) <= set(x)
        np.testing.assert_allclose(y, distribution(x))
        assert y[0] == 0 and y[-1] == 1
        assert len(band.get_paths()) == 1
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split("] ")[1] for label in labels] == ["first", "second"]


@pytest.fixture
def without_matplotlib(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_plot_without_matplotlib(without_matplotlib, tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bbfast\[plot\]'"):
        plot_edfs({"a": ErrorDistribution([0.1])}, tmp_path / "edf.png")


# ---- files and the command line --------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def error_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err.strip()


def write_errors(path, space, errors):
    Population(space, [{"error": error} for error in errors]).save(path)
    return str(path)


def test_sample_as_json(tmp_path, capsys):
    path = tmp_path / "sample.json"
    command = ["design-space", "sample", "anynetxa", "-n", "9", "--flops", "2e6", "4e6", "--image-size", "32"]
    assert main([*command, "--seed", "3", "--json", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"9 of the 1.8e+18 configurations of AnyNetXA: {path}\n" and captured.err == ""
    population = Population.load(path)
    assert population.configs == AnyNetXA.sample(9, 3, (2e6, 4e6), image_size=32)
    assert population.space == "AnyNetXA"
    assert {"seed": 3, "flops": [2e6, 4e6], "image_size": 32}.items() <= population.settings.items()
    for model, config in zip(population.models, population.configs):
        cost = complexity(config, 32)
        assert (model["parameters"], model["flops"], model["activations"]) == (
            *(cost.parameters, cost.flops, cost.activations),
        )


@pytest.mark.parametrize("space", [AnyNetXD, RegNetY], ids=by_name)
def test_sample_as_a_table(space, capsys):
    assert main(["design-space", "sample", space.name, "-n", "3", "--seed", "4"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for config in space.sample(3, 4):
        cost = complexity(config)
        values = config.to_dict()
        values.pop("se_ratio")
        cells = ["/".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values.values()]
        for number in (cost.flops, cost.parameters, cost.activations):
            cells += [f"{number / 1e6:.2f}", "M"]
        assert cells in lines


def test_edf_of_files(rng, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    errors = {"AnyNetXA": random_errors(rng, 40), "RegNetX": random_errors(rng, 30)}
    paths = [write_errors(tmp_path / f"{name}.json", name, values) for name, values in errors.items()]
    picture = tmp_path / "edf.svg"
    assert main(["design-space", "edf", *paths, "--plot", str(picture), "--resamples", "200", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    for name, values in errors.items():
        distribution = ErrorDistribution(values)
        low, high = distribution.bootstrap_mean(0.95, 200, 5)
        numbers = f"{values.min():.4g}", f"{distribution.mean:.4g}", f"{low:.4g}..{high:.4g}"
        assert [name, str(len(values)), *numbers] in lines
    assert f"Drawn: {picture}" in out and "<svg" in picture.read_text()


def test_edf_of_one_space_in_two_files(tmp_path, capsys):
    paths = [write_errors(tmp_path / f"{name}.json", "RegNetX", [0.1, 0.2]) for name in ("short", "long")]
    assert main(["design-space", "edf", *paths]) == 0
    out = capsys.readouterr().out
    assert "RegNetX (short.json)" in out and "RegNetX (long.json)" in out


def test_edf_without_matplotlib(tmp_path, capsys, without_matplotlib):
    path = write_errors(tmp_path / "errors.json", "RegNetX", [0.1, 0.2])
    assert main(["design-space", "edf", path]) == 0
    capsys.readouterr()
    assert main(["design-space", "edf", path, "--plot", "edf.png"]) == 1
    assert "plotting needs matplotlib" in error_line(capsys)


def test_edf_of_an_unknown_format(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write_errors(tmp_path / "errors.json", "RegNetX", [0.1, 0.2])
    assert main(["design-space", "edf", path, "--plot", str(tmp_path / "edf.doc")]) == 1
    captured = capsys.readouterr()
    assert "edf.doc: Format 'doc' is not supported" in captured.err


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "No such file"),
        ("RegNetX", "is not JSON"),
        ("[1, 2]", "holds no population"),
        ('{"space": "RegNetX", "models": [3]}', "holds no population"),
        ('{"space": "RegNetX", "models": []}', "at least one"),
        ('{"space": "RegNetX", "models": [{"error": 0.1}, {}]}', "models[1] has no error; build and train"),
        ('{"space": "RegNetX", "models": [{"error": "low"}]}', "models[0] has the error 'low', which is no number"),
        ('{"space": "RegNetX", "models": [{"error": NaN}]}', "errors[0] is not finite"),
    ],
)
def test_edf_of_files_that_hold_none(content, complaint, tmp_path, capsys):
    path = tmp_path / "errors.json"
    if content is not None:
        path.write_text(content)
    assert main(["design-space", "edf", str(path)]) == 1
    line = error_line(capsys)
    assert line.startswith("bbfast design-space: ") and str(path) in line and complaint in line


def test_edf_of_a_file_given_twice(tmp_path, capsys):
    path = write_errors(tmp_path / "errors.json", "RegNetX", [0.1, 0.2])
    assert main(["design-space", "edf", path, path]) == 1
    assert f"{path} is given twice" in error_line(capsys)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["sample", "RegNetQ"], "there is no design space 'RegNetQ'; there are AnyNetXA, "),
        (["sample", "RegNetX", "--flops", "4", "2"], "flops=(4.0, 2.0) is not allowed"),
        (["sample", "AnyNetXA", "--flops", "1", "2", "--max-tries", "50"], "none of 50 candidates in a row"),
        (["sample", "RegNetX", "-n", "1", "--json", "/nowhere/sample.json"], "/nowhere/sample.json"),
    ],
)
def test_errors_of_sample_on_the_command_line(arguments, complaint, capsys):
    assert main(["design-space", *arguments]) == 1
    assert complaint in error_line(capsys)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "the following arguments are required: ACTION"),
        (["sample"], "the following arguments are required: NAME"),
        (["sample", "RegNetX", "--seed", "-1"], "not a whole number of at least 0"),
        (["sample", "RegNetX", "--flops", "1"], "expected 2 arguments"),
        (["edf", "x.json", "--confidence", "1"], "'1' is not a number above 0 and below 1"),
        (["edf", "x.json", "--confidence", "often"], "'often' is not a number above 0"),
    ],
)
def test_wrong_usage(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["design-space", *arguments])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


# ---- the example -----------------------------------------------------------------------------------------


def test_example(tmp_path, capsys, torch_backend):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    path = Path(__file__).parent.parent / "examples" / "design_space_digits.py"
    spec = importlib.util.spec_from_file_location("design_space_digits", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    flops = ["--flops", "3e5", "8e5"]
    example.main(["-n", "2", "--epochs", "1", "--images", "64", "--seed", "1", *flops, "--out", str(tmp_path)])
    assert (tmp_path / "edf.png").read_bytes().startswith(b"\x89PNG")
    for space in (AnyNetXA, RegNetX):
        population = Population.load(tmp_path / f"{space.name}.json")
        assert population.configs == space.sample(2, 1, (3e5, 8e5), image_size=32)
        assert all(0 <= error <= 1 and (error * 597) % 1 == pytest.approx(0, abs=1e-6) for error in population.errors)
        assert population.settings["epochs"] == 1 and population.settings["images"] == 64
    capsys.readouterr()
    assert main(["design-space", "edf", str(tmp_path / "AnyNetXA.json"), str(tmp_path / "RegNetX.json")]) == 0
    assert "RegNetX" in capsys.readouterr().out
