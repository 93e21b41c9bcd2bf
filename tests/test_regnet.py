"""RegNets against timm's of the same name, with all parameters and statistics randomised."""

from __future__ import annotations

import copy
import io
import pickle

import numerics
import pytest
import torch
from torch import nn

import bbfast
from bbfast import dispatch
from bbfast.models._regnet_blocks import Bottleneck, GroupNormAct, PreBottleneck, RegStage
from bbfast.models._regnet_rule import fit_groups, quantised_linear_widths, regnet_stages
from bbfast.models._regnet_weights import adapt_state_dict
from bbfast.models.regnet import AnyNet, RegNet, StageCfg

timm = pytest.importorskip("timm")
from parity import (  # noqa: E402
    assert_equal_to_nine_digits,
    assert_forward_agrees,
    assert_training_agrees,
    forward,
    make,
    on_meta,
    random_state,
    training_step,
)
from timm.models import regnet as timm_regnet  # noqa: E402

NAMES = bbfast.list_models(module="regnet")
# Four stages of 16, 32, 64 and 128 channels in nine blocks: every path of a large network in a fraction of its time.
SHALLOW = {"w0": 16, "wa": 12.0, "wm": 2.0, "depth": 9, "group_size": 16}
QUICK = ["regnetx_002", "regnetx_004_tv", "regnety_002", "regnety_004", "regnety_008_tv", "regnetz_005"]
# A billion parameters, in three copies.
# Of a billion parameters and more; with a tenth of their widths, and as many stages.
HUGE = {
    "regnety_1280": {"w0": 64, "wa": 22.6, "group_size": 64},
    "regnety_2560": {"w0": 64, "wa": 23.1, "group_size": 64},
}
KINDS = {
    "regnetx_002": SHALLOW,
    "regnety_008_tv": SHALLOW,
    "regnety_040_sgn": SHALLOW,
    "regnetv_040": SHALLOW,
    "regnetv_064": SHALLOW,
    "regnetz_005": {**SHALLOW, "group_size": 4},
    "regnetz_040": {**SHALLOW, "group_size": 4},
}
FEW = ["regnety_008_tv", "regnetv_064", "regnetz_005"]
X, Y = "regnetx_002", "regnety_002"

pytestmark = pytest.mark.usefixtures("reference_backend", "one_thread")


def twins(name: str, **arguments) -> tuple[nn.Module, nn.Module]:
    """bbfast's and timm's, double precision, the same random weights."""
    state = random_state(name, **arguments)
    return tuple(make(library, name, state, torch.float64, **arguments).eval() for library in (bbfast, timm))


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# ---- structure -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_same_structure_as_timm(name):
    ours, theirs = (on_meta(library, name, drop_path_rate=0.3) for library in (bbfast, timm))
    assert describe(ours) == describe(theirs)
    for attribute in ("num_classes", "num_features", "head_hidden_size", "in_chans", "drop_rate", "feature_info"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.group_matcher(coarse=True) == theirs.group_matcher(coarse=True)
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.pretrained_cfg.items() <= theirs.pretrained_cfg.items()
    assert_derived(name, theirs)


def describe(model: nn.Module) -> list:
    """Keys with shapes and dtypes, in order, the settings of every convolution and norm, and drop path rates."""
    state = [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]
    norms = [(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms += [(m.eps, m.num_groups) for m in model.modules() if isinstance(m, nn.GroupNorm)]
    convs = [
        (m.kernel_size, m.stride, m.padding, m.dilation, m.groups) for m in model.modules() if isinstance(m, nn.Conv2d)
    ]
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "drop_path")]
    children = [name for name, _ in model.named_children()]
    return [state, norms, convs, rates, children]


def assert_derived(name: str, model: nn.Module) -> None:
    """From the six numbers alone, as many blocks and as wide as those of timm's model are."""
    cfg = timm_regnet.model_cfgs[name]
    stages = regnet_stages(
        cfg.w0, cfg.wa, cfg.wm, cfg.depth, cfg.group_size, cfg.bottle_ratio, group_min_ratio=cfg.group_min_ratio
    )
    theirs = [model.s1, model.s2, model.s3, model.s4]
    conv2 = [getattr(stage.b1.conv2, "conv", stage.b1.conv2) for stage in theirs]
    conv3 = [getattr(stage.b1.conv3, "conv", stage.b1.conv3) for stage in theirs]
    assert stages.depths == tuple(len(list(stage.children())) for stage in theirs)
    assert stages.widths == tuple(conv.out_channels for conv in conv3)
    assert stages.groups == tuple(conv.groups for conv in conv2)
    assert stages.group_sizes == tuple(conv.in_channels // conv.groups for conv in conv2)


def test_the_rule_agrees_for_random_parameters():
    for _ in range(200):
        w0, depth = 8 * int(torch.randint(1, 33, ())), int(torch.randint(1, 65, ()))
        wa, wm = torch.rand(()).item() * 256, 1.5 + 1.5 * torch.rand(()).item()
        widths, count, _ = timm_regnet.generate_regnet(wa, w0, wm, depth, 8)
        assert quantised_linear_widths(w0, wa, wm, depth) == tuple(widths)

        ratio = (0.25, 0.5, 1.0, 2.0, 4.0)[int(torch.randint(5, ()))]
        group_size, min_ratio = int(torch.randint(1, 129, ())), (0.0, 0.9)[int(torch.randint(2, ()))]
        unique = sorted(set(widths))
        theirs = timm_regnet.adjust_widths_groups_comp(unique, [ratio] * count, [group_size] * count, min_ratio)
        stages = regnet_stages(w0, wa, wm, depth, group_size, ratio, min_ratio)
        assert (list(stages.widths), list(stages.group_sizes)) == theirs
        assert fit_groups(unique, [ratio] * count, [group_size] * count, min_ratio) == (
            stages.widths,
            stages.group_sizes,
        )
        assert stages.depths == tuple(widths.count(width) for width in unique)


def test_example_of_the_paper():
    """RegNetY-1.6GF, table 11 of the appendix."""
    stages = regnet_stages(w0=48, wa=20.71, wm=2.65, depth=27, group_size=24)
    assert stages == ((48, 120, 336, 888), (2, 6, 17, 2), (24, 24, 24, 24), (2, 5, 14, 37))


def test_same_weights_as_timm():
    """All tags are known, each with timm's facts and each architecture's default first."""
    ours = bbfast.list_models(module="regnet", include_tags=True)
    assert ours == timm.list_models(module="regnet", include_tags=True)
    assert len(bbfast.list_models(module="regnet", pretrained=True)) == 65
    for name in ours:
        cfg = bbfast.models.get_pretrained_cfg(name).to_dict()
        assert cfg.items() <= timm.get_pretrained_cfg(name).to_dict().items(), name
    for name in NAMES:
        assert bbfast.models.get_pretrained_cfg(name).tag == timm.models.get_pretrained_cfg(name).tag


# ---- parity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_forward_agrees(name):
    assert_forward_agrees(name, (48, 35))


@pytest.mark.parametrize("name", KINDS)
def test_shallow_models_agree(name):
    assert_forward_agrees(name, (48, 35), **KINDS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_whole_models_agree(name):
    """Those of which three copies would fill a machine with narrower stages."""
    assert_forward_agrees(name, (33, 48), batch=1, **HUGE.get(name, {}))


@pytest.mark.parametrize("name", ["regnetx_002", "regnety_004"])
def test_full_size_agrees(name):
    assert_forward_agrees(name, (224, 231), batch=1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("regnetx_002", {}),
        ("regnety_004", {}),
        ("regnety_008_tv", {}),
        ("regnetz_005", {}),
        ("regnetv_040", SHALLOW),
        ("regnetv_064", SHALLOW),
        ("regnety_040_sgn", SHALLOW),
        ("regnetv_040", {**SHALLOW, "se_ratio": 0.0, "downsample": ""}),
        ("regnety_002", {**SHALLOW, "downsample": "avg", "bottle_ratio": 2.0, "num_features": 24}),
    ],
    ids=str,
)
def test_training_agrees(name, arguments):
    """Output, all gradients and running statistics of a step with dropped paths and features, to nine digits."""
    assert_training_agrees(name, (48, 35), batch=4, single=False, **arguments)


@pytest.mark.parametrize("name", ["regnety_008_tv", "regnetv_064"])
def test_training_agrees_in_single_precision(name):
    assert_training_agrees(name, (48, 35), **KINDS[name])


@pytest.mark.parametrize("name", ["regnety_008_tv", "regnetv_064", "regnetz_005"])
def test_training_with_frozen_statistics_agrees(name):
    assert_training_agrees(name, (48, 35), train=False, single=False, **KINDS[name])


def test_five_steps_of_training_agree():
    """Loss, gradients and running statistics of RegNetY-1.6GF step by step, in double precision."""
    name, arguments = "regnety_016", {"num_classes": 5, "drop_path_rate": 0.1}
    state, x, y = random_state(name, **arguments), torch.randn(5, 4, 3, 48, 48).double(), torch.randint(5, (5, 4))
    runs = []
    for library in (bbfast, timm):
        model = make(library, name, state, torch.float64, **arguments).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
        torch.manual_seed(3)  # the same paths are dropped
        steps = []
        for images, labels in zip(x, y):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
            steps.append((loss.detach(), gradients, {key: value.clone() for key, value in model.named_buffers()}))
            optimizer.step()
        runs.append(steps)
    for step, ((our_loss, our_gradients, our_buffers), (loss, gradients, buffers)) in enumerate(zip(*runs)):
        torch.testing.assert_close(our_loss, loss, rtol=1e-7, atol=0)
        for ours, theirs in ((our_gradients, gradients), (our_buffers, buffers)):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                allowed = 1e-6 * value.abs().max() + 1e-12
                assert (ours[key] - value).abs().max() <= allowed, f"step {step}: {key}"
    assert runs[0][-1][0] != runs[0][0][0]


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "auto") for name in KINDS), ("regnety_008_tv", "onednn"), ("regnetv_064", "onednn")]
)
def test_fused_inference_agrees(name, backend, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    monkeypatch.setattr("bbfast.env.TRITON_INTERPRET", False)
    assert_forward_agrees(name, (48, 35), **KINDS[name])


@pytest.mark.filterwarnings("ignore:.* falls back")
@pytest.mark.parametrize("block", [Bottleneck, PreBottleneck])
def test_kernels_in_a_block(block, monkeypatch, device):
    """A training step through the Triton kernels (interpreted without a GPU) gives the block's numbers."""
    module = block(4, 6, stride=2, group_size=2, drop_path_rate=0.5).to(device)
    x, grad_out = torch.randn(2, 4, 5, 4, device=device), torch.randn(2, 6, 3, 2, device=device)
    twin = copy.deepcopy(module).double()
    exact = training_step(twin, x, grad_out)
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    found = training_step(module, x, grad_out)
    assert dispatch.last_choices()["batch_norm_act_backward"].backend == "triton"
    scale = max(value.abs().max() for key, value in exact.items() if key.startswith("gradient"))
    for key, value in exact.items():
        assert (found[key] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-5 * scale, key


@pytest.mark.parametrize("name", FEW)
def test_channels_last_equals_contiguous(name):
    arguments = {"num_classes": 7, **KINDS[name]}
    state = random_state(name, **arguments)
    x, grad_out = torch.randn(3, 3, 48, 35), torch.randn(3, 7)
    model = make(bbfast, name, state, torch.float64, **arguments)
    contiguous = forward(model, x), training_step(model, x, grad_out)
    model = make(bbfast, name, state, torch.float64, **arguments).to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    channels_last = forward(model, x), training_step(model, x, grad_out)
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize(
    ("name", "arguments"), [("regnety_002", {}), ("regnetv_064", SHALLOW), ("regnety_040_sgn", SHALLOW)], ids=str
)
def test_output_stride_agrees(name, arguments, output_stride):
    """Odd maps, and shortcuts that are pooled at stride 1."""
    ours, theirs = twins(name, output_stride=output_stride, **arguments)
    assert ours.feature_info == theirs.feature_info
    x = torch.randn(2, 3, 67, 50)
    assert_same(forward(ours, x), forward(theirs, x))


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 11},
        {"w0": 32, "wa": 20.0, "wm": 2.2, "group_size": 24},
        {"bottle_ratio": 0.5, "se_ratio": 0.5},
        {"group_min_ratio": 0.9, "group_size": 40},
        {"stem_width": 20, "num_features": 40},
        {"downsample": "avg", "linear_out": True},
        {"downsample": "", "linear_out": False},
        {"preact": True, "act_layer": "gelu"},
        {"norm_layer": "groupnorm", "w0": 32, "wa": 24.0, "wm": 2.0, "depth": 11, "group_size": 32},
        {"act_layer": "hard_swish", "in_chans": 1},
        {"in_chans": 5, "preact": True},
    ],
    ids=str,
)
def test_keywords_agree(arguments):
    """Each of the configuration's fields can be given."""
    ours, theirs = twins("regnety_002", **arguments)
    assert [m.eps for m in ours.modules() if hasattr(m, "eps")] == [
        m.eps for m in theirs.modules() if hasattr(m, "eps")
    ]
    assert describe(ours) == describe(theirs) and ours.in_chans == arguments.get("in_chans", 3)
    x = torch.randn(2, ours.in_chans, 41, 48)
    assert_same(forward(ours, x), forward(theirs, x))


@pytest.mark.parametrize("name", ["regnetx_002", "regnety_040_sgn"])
def test_zero_init_last(name):
    for zero in (False, True):
        ours, theirs = (
            library.create_model(name, zero_init_last=zero, **SHALLOW).s2.b1.conv3.bn.weight
            for library in (bbfast, timm)
        )
        assert torch.equal(ours, theirs) and ours.any() != zero


def test_empty_batch():
    for name, arguments in KINDS.items():
        model = bbfast.create_model(name, num_classes=5, **arguments).eval()
        assert model(torch.randn(0, 3, 32, 32)).shape == (0, 5)


# ---- free stages -----------------------------------------------------------------------------------------

STAGES = (
    StageCfg(depth=2, width=24, bottle_ratio=0.5, group_size=4, se_ratio=0.25),
    StageCfg(depth=1, width=24, bottle_ratio=1.0, group_size=8, stride=1),
    StageCfg(depth=3, width=40, bottle_ratio=0.25, group_size=2, se_ratio=0.5),
)


@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize("downsample", ["conv1x1", "avg", None])
def test_any_stages_agree(downsample, preact):
    """Each stage has its own bottleneck, groups, squeeze-and-excite and stride, as timm's have when put together."""
    arguments = {"downsample": downsample, "stem_width": 16, "num_classes": 0, "global_pool": ""}
    ours, width = AnyNet(STAGES, preact=preact, **arguments), 16
    stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False) if preact else timm.layers.ConvNormAct(3, 16, 3, stride=2)
    theirs = nn.Sequential(stem)
    for stage in STAGES:
        theirs.append(
            timm_regnet.RegStage(
                stage.depth,
                width,
                stage.width,
                stage.stride,
                1,
                block_fn=timm_regnet.PreBottleneck if preact else timm_regnet.Bottleneck,
                downsample=downsample,
                bottle_ratio=stage.bottle_ratio,
                group_size=stage.group_size,
                se_ratio=stage.se_ratio,
            )
        )
        width = stage.width
    theirs.append(nn.ReLU() if preact else nn.Identity())
    for key, value in theirs.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if key.endswith("var") else value.normal_(std=value[0].numel() ** -0.5)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 41, 32)
    assert_same(forward(ours.double(), x), forward(theirs.double(), x))
    assert [info["reduction"] for info in ours.feature_info] == [2, 4, 4, 8]
    assert [info["num_chs"] for info in ours.feature_info] == [16, 24, 24, 40]


def test_a_regnet_is_an_anynet():
    derived = regnet_stages(SHALLOW["w0"], SHALLOW["wa"], SHALLOW["wm"], SHALLOW["depth"], SHALLOW["group_size"])
    stages = [
        StageCfg(depth, width, group_size=size, se_ratio=0.25)
        for depth, width, size in zip(derived.depths, derived.widths, derived.group_sizes)
    ]
    free, ruled = AnyNet(stages, num_classes=4), RegNet(**SHALLOW, se_ratio=0.25, num_classes=4)
    assert describe(free) == describe(ruled) and free.feature_info == ruled.feature_info
    free.load_state_dict(ruled.state_dict())
    x = torch.randn(2, 3, 40, 40)
    assert torch.equal(forward(free, x), forward(ruled, x))


def test_a_free_network_learns():
    """Blocks with one channel per group, and five stages."""
    stages = [StageCfg(1, width, group_size=1) for width in (8, 8, 16, 16, 24)]
    model = AnyNet(stages, num_classes=2, stem_width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8) % 2
    x[y == 1] += 1
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len(model.feature_info) == 6 and model.forward_features(x).shape == (8, 24, 2, 2)


# ---- maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("out_indices", [None, (-1, 1), (0,)], ids=str)
def test_extractors_agree(name, out_indices):
    arguments = {"features_only": True, "out_indices": out_indices, **KINDS[name]}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    ours, theirs = twins(name, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.feature_info.get_dicts() == theirs.feature_info.get_dicts()
    assert ours.pretrained_cfg.items() <= theirs.pretrained_cfg.items()
    x = torch.randn(2, 3, 48, 35)
    assert_same(forward(ours, x), forward(theirs, x))


def test_extractor_takes_images_of_any_layout_and_checks_them():
    model = bbfast.create_model(X, features_only=True, out_indices=(0, 2), **SHALLOW).eval()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert all(y.is_contiguous() for y in model(x))
        last = model(x.contiguous(memory_format=torch.channels_last))
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in last)
        torch.testing.assert_close(last, model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"x must have shape \[N, 3, H, W\]"):
        model(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("name", FEW)
def test_intermediates_agree(name):
    ours, theirs = twins(name, **KINDS[name])
    x = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    for arguments in (
        {},
        {"indices": 2, "norm": True},
        {"indices": [-3, 0], "intermediates_only": True},
        {"indices": [0, 1], "stop_early": True},
        {"indices": [0], "stop_early": True},
    ):
        with torch.no_grad():
            mine, other = ours.forward_intermediates(x, **arguments), theirs.forward_intermediates(x, **arguments)
        assert_same(mine, other)
    for y, info in zip(ours.forward_intermediates(x, intermediates_only=True), ours.feature_info):
        assert tuple(y.shape[1:]) == (info["num_chs"], 48 // info["reduction"], -(-48 // info["reduction"]))[:3] or (
            info["reduction"] == 32 and y.shape[1:] == (info["num_chs"], 2, 2)
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": [1]},
        {"indices": [0]},
        {"indices": [2, -4], "prune_head": False},
        {"indices": 2, "prune_norm": True, "prune_head": False},
        {"indices": None, "prune_head": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["regnetv_064", "regnetz_005"])
def test_pruning_agrees(name, arguments):
    ours, theirs = twins(name, num_classes=7, **KINDS[name])
    assert ours.prune_intermediate_layers(**arguments) == theirs.prune_intermediate_layers(**arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for attribute in ("num_classes", "num_features", "head_hidden_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    x = torch.randn(2, 3, 48, 35)
    assert_same(forward(ours, x), forward(theirs, x))
    with torch.no_grad():
        kept = range(len(ours.feature_info))  # timm's goes on to list the maps that are gone
        assert_same(ours.forward_intermediates(x.double(), kept), theirs.forward_intermediates(x.double(), kept))
    for model in (ours, theirs):
        model.reset_classifier(3, "avg")
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert ours.get_classifier().weight.shape == theirs.get_classifier().weight.shape


# ---- the head --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "num_classes"),
    [("avg", 5), ("max", 5), ("avgmax", 5), ("catavgmax", 5), ("fastmax", 5), ("avg", 0), ("", 0)],
)
@pytest.mark.parametrize("name", ["regnetz_005"])
def test_head_agrees(name, pool, num_classes):
    ours, theirs = twins(name, num_classes=num_classes, global_pool=pool, **KINDS[name])
    assert ours.head_hidden_size == theirs.head_hidden_size
    x = torch.randn(2, 3, 48, 65, dtype=torch.float64)
    assert_same(forward(ours, x), forward(theirs, x))
    with torch.no_grad():
        features = ours.forward_features(x)
        assert_same(features, theirs.forward_features(x))
        assert_same(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
    assert features.shape[1] == ours.num_features


@pytest.mark.parametrize("name", ["regnetx_002", "regnetv_040"])
def test_reset_classifier(name):
    model = bbfast.create_model(name, num_classes=7, dtype=torch.bfloat16, **KINDS[name]).eval()
    next(model.stem.parameters()).requires_grad_(False)
    model.reset_classifier(3)
    assert model.num_classes == 3 and model.get_classifier().weight.dtype == torch.bfloat16
    assert not model.get_classifier().training
    assert not next(model.stem.parameters()).requires_grad
    x = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    assert model(x).shape == (2, 3)
    model.reset_classifier(4, "catavgmax")
    assert model(x).shape == (2, 4) and model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(0, "")
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features, 2, 2)
    with pytest.raises(ValueError, match="num_classes=-1"):
        model.reset_classifier(-1, "max")
    assert model.num_classes == 0 and model(x).dim() == 4


# ---- weights from elsewhere ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "torchvision_name"), [("regnety_004", "regnet_y_400mf"), ("regnetx_004_tv", "regnet_x_400mf")]
)
def test_weights_of_torchvision(name, torchvision_name, tmp_path):
    """The same keys as timm's filter gives, the same network, and through files."""
    import torchvision

    theirs = getattr(torchvision.models, torchvision_name)(num_classes=5)
    state = {
        key: torch.rand_like(value) + 0.5 if value.is_floating_point() else value
        for key, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    adapted, expected = adapt_state_dict(state), timm_regnet._filter_fn(state)
    assert adapted.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in adapted.items())

    torch.save({"model": state}, tmp_path / "regnet.pth")
    ours = bbfast.create_model(name, num_classes=5, checkpoint_path=tmp_path / "regnet.pth")
    x = torch.randn(2, 3, 48, 48)
    assert_same(forward(ours.double(), x), forward(theirs.double(), x))
    extractor = bbfast.create_model(
        name, features_only=True, out_indices=(0, 3), checkpoint_path=tmp_path / "regnet.pth"
    )
    assert torch.equal(extractor.s3.b1.conv2.conv.weight, adapted["s3.b1.conv2.conv.weight"])


def test_weights_of_classy_vision():
    """A trunk and heads in a nested dict, of which those of self-supervised training are left out."""
    name, parts = "regnety_004", {}
    own = random_state(name)
    renamed = {
        "conv1.conv": "f.a.0",
        "conv1.bn": "f.a.1",
        "conv2.conv": "f.b.0",
        "conv2.bn": "f.b.1",
        "se.fc1": "f.se.excitation.0",
        "se.fc2": "f.se.excitation.2",
        "conv3.conv": "f.c",
        "conv3.bn": "f.final_bn",
        "downsample.conv": "proj",
        "downsample.bn": "bn",
    }
    for key, value in own.items():
        module, _, leaf = key.rpartition(".")
        if module.startswith("stem"):
            module = {"stem.conv": "conv1.stem.0", "stem.bn": "conv1.stem.1"}[module]
        elif module != "head.fc":
            stage, block, part = module.split(".", 2)
            module = f"res{stage[1:]}.block{stage[1:]}-{int(block[1:]) - 1}.{renamed[part]}"
        parts["0.clf.0." + leaf if module == "head.fc" else f"_feature_blocks.{module}.{leaf}"] = value
    heads = {key: value for key, value in parts.items() if key.startswith("0.clf")}
    heads |= {"0.projection_head.0.weight": torch.zeros(1), "0.prototypes0.weight": torch.zeros(1)}
    trunk = {key: value for key, value in parts.items() if key not in heads}
    file = {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}}}}
    for content in (file, {"model": file}, {**trunk, **heads}):
        adapted = adapt_state_dict(content)
        assert adapted.keys() == own.keys()
        assert all(torch.equal(value, own[key]) for key, value in adapted.items())
    assert timm_regnet._filter_fn(file).keys() == own.keys()


def test_own_weights_stay_as_they_are():
    """Also those whose parts are called as a part of another library's."""
    for name in (Y, "regnetv_040"):
        state = random_state(name)
        adapted = bbfast.create_model(name, device="meta").adapt_state_dict(state)
        assert list(adapted) == list(state)
        assert all(adapted[key] is value for key, value in state.items())
    assert pickle.loads(pickle.dumps(RegNet.adapt_state_dict)) is adapt_state_dict


@pytest.mark.parametrize("name", ["regnetx_002", "regnetv_040"])
def test_first_convolution_is_adapted(name):
    """V has a bare convolution for a stem, so another name for it."""
    whole = random_state(name, **SHALLOW)
    weights = {"state_dict": whole}
    model = bbfast.create_model(
        name, pretrained=True, pretrained_cfg_overlay=weights, in_chans=1, num_classes=3, **SHALLOW
    )
    first = model.pretrained_cfg["first_conv"] + ".weight"
    torch.testing.assert_close(model.state_dict()[first], whole[first].sum(1, keepdim=True))
    assert torch.equal(model.s4.b1.conv1.state_dict().popitem()[1], whole_of(whole, "s4.b1.conv1."))


def whole_of(state: dict, prefix: str) -> torch.Tensor:
    return [value for key, value in state.items() if key.startswith(prefix)][-1]


# ---- life of a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["regnety_002", "regnetv_064", "regnetz_005"])
def test_initialised_as_timm(name):
    ours, theirs = (library.create_model(name, **KINDS.get(name, {})) for library in (bbfast, timm))
    for (key, value), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
        noise = 6 / value.numel() ** 0.5
        if value.dim() < 2:
            assert torch.equal(value, other), key
        elif value.numel() > 100:
            assert value.std().item() == pytest.approx(other.std().item(), rel=noise + 0.02), key


@pytest.mark.parametrize("name", ["regnety_008_tv", "regnetv_064"])
def test_grad_checkpointing_changes_nothing(name):
    arguments = {"num_classes": 5, "drop_path_rate": 0.3, **KINDS[name]}
    state, x, grad_out = random_state(name, **arguments), torch.randn(4, 3, 40, 40), torch.randn(4, 5)
    results = []
    for enable in (False, True):
        model = make(bbfast, name, state, torch.float64, **arguments)
        model.set_grad_checkpointing(enable)
        calls = count_calls(model.s3.b1)
        results.append(training_step(model, x, grad_out))
        assert len(calls) == (2 if enable else 1)
    plain, recomputed = ({k: v for k, v in r.items() if not k.startswith("buffer")} for r in results)
    assert_equal_to_nine_digits(recomputed, plain)
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing and not model.s1.grad_checkpointing


def count_calls(module: nn.Module) -> list:
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_synchronised_batch_norm_normalises_every_layer(monkeypatch):
    for name in (Y, "regnetv_064"):
        state, x = random_state(name, **SHALLOW), torch.randn(4, 3, 40, 40, dtype=torch.float64)
        expected = make(bbfast, name, state, torch.float64, **SHALLOW)(x)
        model = bbfast.nn.convert_sync_batchnorm(make(bbfast, name, state, torch.float64, **SHALLOW))
        synchronised = []

        def sync_forward(bn, z, synchronised=synchronised):  # torch's own wants processes and GPUs
            synchronised.append(bn)
            return nn.functional.batch_norm(z, None, None, bn.weight, bn.bias, True, eps=bn.eps)

        monkeypatch.setattr(nn.SyncBatchNorm, "forward", sync_forward)
        assert_same(model(x), expected)
        assert set(synchronised) == {m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)}
        monkeypatch.undo()


@pytest.mark.parametrize("preact", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(preact):
    """Inference and a training step, of few blocks because compiling takes its time."""
    torch._dynamo.reset()
    eager = AnyNet(STAGES[:2], preact=preact, num_classes=5, drop_path_rate=0.3, zero_init_last=False).double()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend="aot_eager")
    x, grad_out = torch.randn(3, 3, 40, 40), torch.randn(3, 5)
    assert_same(forward(compiled, x), forward(eager, x))
    assert_equal_to_nine_digits(*(training_step(model, x, grad_out) for model in (compiled, eager)))


@pytest.mark.parametrize("name", FEW)
def test_copies_compute_the_same(name):
    model = make(bbfast, name, random_state(name, **KINDS[name]), **KINDS[name]).eval()
    x, saved = torch.randn(2, 3, 48, 48), io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert torch.equal(forward(twin, x), forward(model, x))


def test_traces():
    model, x = AnyNet(STAGES[:2]).eval(), torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert_same(torch.jit.trace(model, x, check_trace=False)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FEW)
def test_half_precision(name, dtype):
    """Judged beside timm's own error in this dtype."""
    state, x = random_state(name, **KINDS[name]), torch.randn(2, 3, 48, 48).to(dtype)
    ours, theirs = (forward(make(lib, name, state, **KINDS[name]).to(dtype), x) for lib in (bbfast, timm))
    rounded = {key: v.to(dtype).double() if v.is_floating_point() else v for key, v in state.items()}
    exact = forward(make(timm, name, rounded, torch.float64, **KINDS[name]), x)
    numerics.assert_within_rule("logits", ours, exact, theirs, rows=64)


def test_autocast():
    for name, arguments in KINDS.items():
        model = bbfast.create_model(name, num_classes=5, **arguments)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(3, 3, 64, 64))
            y.sum().backward()
            with torch.no_grad():
                inferred = model.eval()(torch.randn(2, 3, 64, 64))
        assert y.dtype == inferred.dtype == torch.bfloat16 and inferred.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_constructed_on_a_device_and_in_a_dtype():
    model = bbfast.create_model("regnety_016", device="meta", dtype=torch.float16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors} == {torch.float16, torch.int64}
    with torch.device("meta"):
        assert describe(RegNet(**SHALLOW)) == describe(RegNet(**SHALLOW, device="cpu"))


# ---- bad arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"width": 24}, TypeError, "width"),
        ({"drop_pth_rate": 0.1}, TypeError, "drop_pth_rate"),
        ({"depth": 3}, ValueError, r"depth=3 are not allowed: they give 3 stages of widths"),
        ({"depth": 0}, ValueError, "depth=0"),
        ({"depth": 3.0}, TypeError, "depth must be an int"),
        ({"w0": 20}, ValueError, "w0=20 is not allowed; it must be a multiple of 8"),
        ({"w0": 0}, ValueError, "w0=0"),
        ({"wa": -1.0}, ValueError, r"wa=-1\.0"),
        ({"wm": 1.0}, ValueError, r"wm=1\.0 is not allowed; it must be above 1"),
        ({"wm": "2"}, TypeError, "wm must be a float"),
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"bottle_ratio": 0}, ValueError, "bottle_ratio=0"),
        ({"se_ratio": -0.5}, ValueError, r"se_ratio=-0\.5"),
        ({"group_min_ratio": 2.0}, ValueError, r"group_min_ratio=2\.0"),
        ({"stem_width": 0}, ValueError, "stem_width=0"),
        ({"num_features": -1}, ValueError, "num_features=-1"),
        ({"downsample": "max"}, ValueError, "downsample='max' is not known; allowed: 'conv1x1', 'avg', '', None"),
        ({"linear_out": 1}, TypeError, "linear_out must be a bool"),
        ({"preact": "yes"}, TypeError, "preact must be a bool"),
        ({"zero_init_last": 0}, TypeError, "zero_init_last must be a bool"),
        ({"act_layer": "mish"}, ValueError, "act_layer='mish'"),
        ({"norm_layer": "layernorm"}, ValueError, "norm_layer='layernorm' is not known; allowed: 'batchnorm'"),
        ({"norm_layer": 3}, TypeError, "norm_layer=3 is no string and no function"),
        ({"output_stride": 4}, ValueError, "output_stride=4"),
        ({"in_chans": 0}, ValueError, "in_chans=0"),
        ({"num_classes": -1}, ValueError, "num_classes=-1"),
        ({"drop_rate": 1.5}, ValueError, r"drop_rate=1\.5"),
        ({"drop_path_rate": -1}, ValueError, "drop_path_rate=-1"),
        ({"global_pool": "median"}, ValueError, "global_pool='median'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(X, **arguments)


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ((), ValueError, "stages must not be empty"),
        ([(1, 8)], TypeError, "stages must be a tuple of StageCfg"),
        (StageCfg(1, 8), TypeError, "stages must be a tuple of StageCfg"),
        ([StageCfg(1, 24, group_size=16)], ValueError, "group_size=16 does not divide the 24 channels"),
    ],
    ids=str,
)
def test_bad_stages_are_named(stages, error, message):
    with pytest.raises(error, match=message):
        AnyNet(stages)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 0}, ValueError, "depth=0"),
        ({"width": 8.0}, TypeError, "width must be an int"),
        ({"stride": 0}, ValueError, "stride=0"),
        ({"group_size": True}, TypeError, "group_size must be an int"),
        ({"bottle_ratio": -1.0}, ValueError, r"bottle_ratio=-1\.0"),
        ({"se_ratio": "a"}, TypeError, "se_ratio must be a float"),
    ],
    ids=str,
)
def test_bad_parameters_of_a_stage_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        StageCfg(**{"depth": 1, "width": 8, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"x must have shape \[N, 3, H, W\], got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "x is on meta but the model is on cpu"),
    ],
    ids=["list", "gray", "meta"],
)
@pytest.mark.parametrize("name", [X, "regnetv_040"])
def test_bad_inputs_are_named(name, x, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(name, **SHALLOW).eval()(x)


def test_groups_of_a_norm_are_checked():
    with pytest.raises(ValueError, match="group_size=16 does not divide 24 channels"):
        GroupNormAct(24, group_size=16)


def test_parts_can_be_built_alone():
    x = torch.randn(2, 12, 9, 9)
    assert Bottleneck(12, 16, stride=2, group_size=4)(x).shape == (2, 16, 5, 5)
    assert PreBottleneck(12, 16, stride=2, group_size=4, se_ratio=0.0)(x).shape == (2, 16, 5, 5)
    stage = RegStage(3, 12, 16, stride=1, group_size=8)
    assert stage(x).shape == (2, 16, 9, 9) and [name for name, _ in stage.named_children()] == ["b1", "b2", "b3"]
