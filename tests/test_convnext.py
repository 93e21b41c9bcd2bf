"""ConvNeXt against timm's of the same name, with all parameters randomised."""

from __future__ import annotations

import copy
import io
import re
from collections import Counter
from functools import partial

import numerics
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import bbfast
from bbfast import dispatch
from bbfast.models import _convnext_cfgs
from bbfast.nn import ConvNeXtBlock

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

NAMES = bbfast.list_models(module="convnext")
DEEP = [name for name in NAMES if not re.search("zepto|atto|femto|pico|test_", name)]
WIDE = [name for name in NAMES if re.search("large|huge", name)]
NAME = "convnext_tiny"
# Few channels and blocks: every path of a ConvNeXt in a fraction of its time.
SHALLOW = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}
# One of each kind of block: layer scale or GRN, linear or convolutional, each norm and stem.
KINDS = {
    "v1": {},
    "v1_conv_mlp": {"conv_mlp": True, "stem_type": "overlap"},
    "v2": {"use_grn": True, "ls_init_value": None},
    "v2_conv_mlp": {"use_grn": True, "ls_init_value": None, "conv_mlp": True, "stem_type": "overlap_tiered"},
    "rms": {"norm_layer": "rmsnorm2d", "act_layer": "silu"},
    "simple": {"norm_layer": "simplenorm", "conv_mlp": True, "stem_type": "overlap_act", "act_layer": "gelu_tanh"},
    "norm_first": {"head_norm_first": True, "kernel_sizes": (7, 5, 3, 3)},
    "hidden": {"head_hidden_size": 12, "use_grn": True},
}

pytestmark = pytest.mark.usefixtures("reference_backend", "one_thread")


def twins(name: str = NAME, **arguments) -> tuple[nn.Module, nn.Module]:
    """bbfast's and timm's, double precision, the same random weights."""
    state = random_state(name, **arguments)
    return tuple(make(library, name, state, torch.float64, **arguments).eval() for library in (bbfast, timm))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# ---- parity ----------------------------------------------------------------------------------------------


def test_all_names_are_there():
    assert timm.list_models(module="convnext") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_same_structure_as_timm(name):
    ours, theirs = (on_meta(library, name, drop_path_rate=0.3) for library in (bbfast, timm))
    for model in (ours, theirs):
        model.shapes = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
        model.convs = [
            (m.kernel_size, m.stride, m.padding, m.dilation) for m in model.modules() if isinstance(m, nn.Conv2d)
        ]
        model.norms = [module.eps for module in model.modules() if hasattr(module, "eps")]
        blocks = [block for stage in model.stages for block in stage.blocks]
        model.rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
        model.drop_rate = float(model.drop_rate)
    for attribute in ("shapes", "convs", "norms", "rates", "num_classes", "num_features", "head_hidden_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("in_chans", "drop_rate", "feature_info"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.group_matcher(coarse=True) == theirs.group_matcher(coarse=True)
    assert hasattr(ours, "no_weight_decay") == hasattr(theirs, "no_weight_decay")
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.pretrained_cfg.items() <= theirs.pretrained_cfg.items()


def test_all_tags_agree():
    tagged = bbfast.list_models(module="convnext", include_tags=True)
    assert tagged == timm.list_models(module="convnext", include_tags=True)
    for name in tagged:
        ours, theirs = bbfast.models.get_pretrained_cfg(name).to_dict(), timm.get_pretrained_cfg(name).to_dict()
        assert ours.items() <= theirs.items(), name
        assert {"hf_hub_id", "test_input_size", "test_crop_pct"} & theirs.keys() <= ours.keys(), name
    for name in NAMES:
        assert bbfast.models.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(name).tag, name


def test_old_names_agree():
    theirs = timm.models.get_deprecated_models("convnext")
    assert {old: theirs[old] for old in theirs if old.startswith("convnext")} == _convnext_cfgs.DEPRECATED_NAMES
    with pytest.warns(UserWarning, match="convnext_tiny_in22k"):
        model = bbfast.create_model("convnext_tiny_in22k", device="meta")
    assert (model.pretrained_cfg["tag"], model.num_classes) == ("fb_in22k", 21841)


@pytest.mark.parametrize("name", NAMES)
def test_forward_agrees(name):
    """With one block a stage where there are many, and fewer channels where these are very many."""
    arguments = {"depths": (1, 1, 1, 1)} if name in DEEP else {}
    arguments |= {"dims": (24, 48, 96, 192)} if name in WIDE else {}
    assert_forward_agrees(name, (33, 40), batch=1, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_whole_models_agree(name):
    assert_forward_agrees(name, (64, 73), batch=1)


@pytest.mark.parametrize("name", ["convnext_atto", pytest.param(NAME, marks=pytest.mark.slow)])
def test_full_size_agrees(name):
    assert_forward_agrees(name, (224, 224), batch=1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convnext_atto", {"depths": (1, 1, 2, 1)}),
        ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (24, 48, 96, 192)}),
        ("convnextv2_atto", {}),
        ("convnext_zepto_rms", {}),
        ("convnext_nano_ols", {"depths": (1, 1, 2, 1)}),
        ("test_convnext2", {}),
    ],
)
def test_training_agrees(name, arguments):
    """Double precision for all; in single precision, three times the work, one of each kind of block."""
    single = name in ("convnext_tiny", "test_convnext2")
    assert_training_agrees(name, (64, 73), batch=2, single=single, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_training_of_each_kind_agrees(kind):
    assert_training_agrees(NAME, (57, 66), batch=2, single=False, **{**SHALLOW, "num_classes": 7, **KINDS[kind]})


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_stride": 8},
        {"output_stride": 16, "stem_type": "overlap"},
        {"output_stride": 8, "patch_size": 8},
        {"patch_size": 2},
        {"patch_size": 2, "output_stride": 8},
        {"in_chans": 1},
        {"in_chans": 5, "stem_type": "overlap_tiered"},
        {"conv_bias": False},
        {"conv_bias": False, "stem_type": "overlap_act", "conv_mlp": True},
        {"kernel_sizes": 3, "norm_eps": 1e-2},
        {"kernel_sizes": (9, 7, 5, 3), "norm_layer": "rmsnorm", "norm_eps": 1e-2},
        {"dims": (16, 16, 32, 32), "norm_layer": "layernorm2d"},
        {"norm_layer": "simplenorm2d", "head_norm_first": True, "norm_eps": 1e-2},
        {"act_layer": "relu"},
        {"act_layer": "relu6"},
        {"act_layer": "hard_swish"},
        {"act_layer": "swish", "head_hidden_size": 7},
        {"global_pool": "max"},
        {"global_pool": "avgmax", "head_hidden_size": 7},
        {"global_pool": "", "head_hidden_size": 7},
        {"global_pool": ""},
        {"global_pool": "catavgmax", "head_norm_first": True},
        {"global_pool": "", "head_norm_first": True, "num_classes": 0},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_arguments_agree(arguments):
    """On maps that strides divide and on others, down to one pixel."""
    arguments = {**SHALLOW, **arguments}
    ours, theirs = twins(**arguments)
    assert ours.feature_info == theirs.feature_info
    assert ours.head_hidden_size == theirs.head_hidden_size
    for size in ((64, 64), (75, 97), (66, 34)):
        x = torch.randn(2, arguments.get("in_chans", 3), *size, dtype=torch.float64)
        assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_equals_contiguous(kind):
    arguments = {**SHALLOW, **KINDS[kind]}
    state = random_state(NAME, **arguments)
    x, grad_out = torch.randn(3, 3, 64, 45), torch.randn(3, 5)
    model = make(bbfast, NAME, state, torch.float64, **arguments)
    contiguous = forward(model, x), training_step(model, x, grad_out)
    model = make(bbfast, NAME, state, torch.float64, **arguments).to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    channels_last = forward(model, x), training_step(model, x, grad_out)
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_are_never_copied(memory_format):
    """Once the stem's norm has made a map channels_last, every block gets and hands out such."""
    model = bbfast.create_model(NAME, **{**SHALLOW, **KINDS["v1_conv_mlp"]})
    seen = []
    for module in model.modules():
        if isinstance(module, ConvNeXtBlock):
            module.register_forward_hook(lambda module, args, y: seen.extend((args[0], y)))
    x = torch.randn(2, 3, 96, 96).contiguous(memory_format=memory_format)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            features = model.forward_features(x)
        assert features.is_contiguous(memory_format=memory_format)
    assert len(seen) == 20
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


# ---- kernels -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:drop_path_add.* falls back")
@pytest.mark.parametrize("backend", ["auto", "onednn"])
@pytest.mark.parametrize("kind", ["v1", "v2_conv_mlp"])
def test_fused_inference_agrees(kind, backend, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    monkeypatch.setattr("bbfast.env.TRITON_INTERPRET", False)
    assert_forward_agrees(NAME, (64, 73), **{**SHALLOW, **KINDS[kind]})
    expected = {"auto": ("cpp", "onednn"), "onednn": ("onednn",)}[backend]  # cpp where the extension is built
    assert dispatch.last_choices()["depthwise_conv_bn_act"].backend in expected


@pytest.mark.parametrize("kind", ["v1", "v2_conv_mlp"])
def test_fused_training_agrees(kind, monkeypatch):
    """With the kernels that the CPU has, which take running statistics only: here there are none."""
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    monkeypatch.setattr("bbfast.env.TRITON_INTERPRET", False)
    assert_training_agrees(NAME, (57, 66), batch=2, **{**SHALLOW, "num_classes": 7, **KINDS[kind]})
    assert dispatch.last_choices()["depthwise_conv_bn_act"].backend in ("cpp", "onednn")


@pytest.mark.parametrize(
    ("arguments", "channels_last"),
    [
        ({"kernel_size": 3, "drop_path": 0.4}, True),
        ({"kernel_size": 3, "drop_path": 0.4}, False),
        ({"kernel_size": 3, "dilation": 2, "conv_mlp": True, "use_grn": True, "ls_init_value": None}, True),
    ],
    ids=["layer_scale", "layer_scale_nchw", "grn"],
)
def test_kernels_in_the_block(arguments, channels_last, device, monkeypatch):
    """Depthwise convolution and layer scale with dropped paths on the Triton kernels, forward and backward."""
    block = ConvNeXtBlock(10, **arguments).to(device)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 10, 4, 3, device=device)
    x, grad_out = x.to(memory_format=torch.channels_last) if channels_last else x, torch.randn_like(x)

    def step(dtype, backend):
        monkeypatch.setenv("BBFAST_BACKEND", backend)
        monkeypatch.setenv("BBFAST_STRICT", "1")
        twin, leaf = copy.deepcopy(block).to(dtype), x.to(dtype, copy=True).requires_grad_()
        torch.manual_seed(3)
        y = twin(leaf)
        y.backward(grad_out.to(dtype))
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return {"y": y, "dx": leaf.grad, **{f"d{name}": p.grad for name, p in twin.named_parameters()}}

    exact, baseline = step(torch.float64, "torch"), step(torch.float32, "torch")
    for key, value in step(torch.float32, "triton").items():
        rows = 1 if key in ("y", "dx") else x.numel() // 10
        numerics.assert_within_rule(key, value, exact[key], baseline[key], rows=rows)
    ops = ["depthwise_conv_bn_act"] + (["drop_path_add"] if "drop_path" in arguments else [])
    for op in ops:
        assert dispatch.last_choices()[op].backend == dispatch.last_choices()[f"{op}_backward"].backend == "triton"


# ---- precisions --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of timm's RmsNorm under autocast
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_timms(kind, dtype):
    """All parameters in half precision, and autocast (to bfloat16, which CPUs have)."""
    arguments = {**SHALLOW, **KINDS[kind]}
    state, x = random_state(NAME, **arguments), torch.randn(2, 3, 64, 73).to(dtype)
    state = {key: value.to(dtype) for key, value in state.items()}
    exact = forward(make(timm, NAME, state, torch.float64, **arguments), x)
    ours, theirs = (forward(make(library, NAME, state, dtype, **arguments), x) for library in (bbfast, timm))
    numerics.assert_within_rule("logits", ours, exact, theirs)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            ours, theirs = (forward(make(library, NAME, state, **arguments), x) for library in (bbfast, timm))
        assert ours.dtype == dtype
        numerics.assert_within_rule("logits under autocast", ours, exact, theirs)


def test_training_under_autocast():
    """Errors of several draws together: a sum in bfloat16 that cancels is, alone, right or wrong by chance."""
    arguments = {**SHALLOW, **KINDS["v2_conv_mlp"], "ls_init_value": 1e-6}
    error, baseline, norm = Counter(), Counter(), Counter()
    for _ in range(4):
        state, x, grad_out = random_state(NAME, **arguments), torch.randn(3, 3, 64, 73), torch.randn(3, 5)
        exact = training_step(make(timm, NAME, state, torch.float64, **arguments), x, grad_out)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (
                training_step(make(library, NAME, state, **arguments), x, grad_out) for library in (bbfast, timm)
            )
        for key, value in exact.items():
            assert ours[key].dtype == theirs[key].dtype, key
            error[key] += (ours[key].double() - value).square().sum().item()
            baseline[key] += (theirs[key].double() - value).square().sum().item()
            norm[key] += value.square().sum().item()
    for key in norm:
        allowed = 2 * baseline[key] ** 0.5 + 0.01 * norm[key] ** 0.5
        assert error[key] ** 0.5 <= allowed, f"{key}: error {error[key] ** 0.5:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_hold_small_variances(dtype):
    """Variance and eps, 1e-8 and 1e-6, would be nothing in float16 if they were added there."""
    x = (1e-4 * torch.randn(2, 4, 4, 64)).to(dtype)
    for norm in (bbfast.nn.SimpleNorm, bbfast.nn.RmsNorm, bbfast.nn.LayerNorm):
        layer = norm(64)
        expected, found = layer(x.float()), norm(64, dtype=dtype)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", ["LayerNorm", "RmsNorm", "SimpleNorm"])
def test_norms_under_autocast(norm):
    """No warning of the weights, which stay in single precision; torch's own LayerNorm rounds its result on the CPU."""
    layer, x = getattr(bbfast.nn, norm)(6), torch.randn(2, 3, 4, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == (torch.bfloat16 if norm == "LayerNorm" else torch.float32)
    torch.testing.assert_close(found.float(), layer(x.float()), rtol=0.01, atol=0.01)


def test_grn_holds_large_norms():
    """The norm over a large map is beyond float16."""
    x = 60 * torch.rand(1, 1024, 1024, 2)
    layer = bbfast.nn.GlobalResponseNorm(2)
    nn.init.ones_(layer.weight)
    found = copy.deepcopy(layer).half()(x.half())
    torch.testing.assert_close(found.float(), layer(x.half().float()), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["LayerNorm", "RmsNorm", "SimpleNorm"])
def test_norms_agree(norm):
    ours, theirs = getattr(bbfast.nn, norm), getattr(timm.layers, norm)
    ours_2d, theirs_2d = getattr(bbfast.nn, f"{norm}2d"), getattr(timm.layers, f"{norm}2d")
    x = 3 + torch.randn(2, 5, 7, 3, dtype=torch.float64)
    for mine, other, y in ((ours, theirs, x), (ours_2d, theirs_2d, x.permute(0, 3, 1, 2))):
        mine, other = mine(3, eps=0.1, dtype=torch.float64), other(3, eps=0.1).double()
        state = {key: torch.randn_like(value) for key, value in other.state_dict().items()}
        mine.load_state_dict(state)
        other.load_state_dict(state)
        assert_same(mine(y), other(y))
        assert_same(mine(y.contiguous()), other(y))


def test_grn_agrees():
    ours, theirs = bbfast.nn.GlobalResponseNorm(6, dtype=torch.float64), timm.layers.grn.GlobalResponseNorm(6).double()
    state = {"weight": torch.randn(6), "bias": torch.randn(6)}
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    x[:, :, :, 2] = 0  # a channel that does not respond
    for model in (ours, theirs):
        model.load_state_dict(state)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = [model(leaf) for model, leaf in zip((ours, theirs), leaves)]
    assert_same(*results)
    grad_out = torch.randn_like(x)
    for result in results:
        result.backward(grad_out)
    assert_same(*(leaf.grad for leaf in leaves))
    assert_same(ours.weight.grad, theirs.weight.grad)


# ---- features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": 2, "norm": True},
        {"indices": (2, 0), "stop_early": True},
        {"indices": [-1], "norm": True, "stop_early": True},
        {"indices": (-4, -2), "intermediates_only": True, "stop_early": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["v1", "norm_first"])
def test_forward_intermediates_agrees(kind, arguments):
    ours, theirs = twins(**{**SHALLOW, **KINDS[kind]})
    x = torch.randn(2, 3, 64, 73, dtype=torch.float64)
    results, expected = (model.forward_intermediates(x, **arguments) for model in (ours, theirs))
    if not arguments.get("intermediates_only"):
        (last, results), (their_last, expected) = results, expected
        assert_same(last, their_last)
    assert len(results) == len(expected) > 0
    for mine, other in zip(results, expected):
        assert_same(mine, other)


@pytest.mark.parametrize(
    "arguments",
    [
        {"indices": (0, 2)},
        {"indices": 1, "prune_head": False},
        {"indices": (-1,), "prune_norm": True, "prune_head": False},
        {"indices": (1,), "prune_norm": True, "prune_head": False},
        {"indices": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["hidden", "norm_first"])
def test_prune_intermediate_layers_agrees(kind, arguments):
    ours, theirs = twins(**{**SHALLOW, **KINDS[kind]})
    kept = [model.prune_intermediate_layers(**arguments) for model in (ours, theirs)]
    assert kept[0] == kept[1]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert (ours.num_features, ours.head_hidden_size) == (theirs.num_features, theirs.head_hidden_size)
    assert ours.num_classes == theirs.num_classes
    x = torch.randn(2, 3, 64, 73, dtype=torch.float64)
    assert_same(ours(x), theirs(x))
    for (last, maps), (their_last, their_maps) in [[m.forward_intermediates(x, kept[0]) for m in (ours, theirs)]]:
        assert_same(last, their_last)
        for mine, other in zip(maps, their_maps, strict=True):
            assert_same(mine, other)
    ours(x).sum().backward()
    assert [key for key, parameter in ours.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("out_indices", [None, (-1, 1), 2], ids=str)
@pytest.mark.parametrize("kind", ["v1", "simple", "v2_conv_mlp", "norm_first"])
def test_features_agree(kind, out_indices):
    arguments = {**SHALLOW, **KINDS[kind], "features_only": True, "num_classes": 0, "out_indices": out_indices}
    arguments = {key: value for key, value in arguments.items() if value is not None or key == "ls_init_value"}
    state = random_state(NAME, timm, **arguments)
    ours, theirs = (make(library, NAME, state, torch.float64, **arguments) for library in (bbfast, timm))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.feature_info.get_dicts() == theirs.feature_info.get_dicts()
    x = torch.randn(2, 3, 64, 73)
    for mine, other in zip(forward(ours, x), forward(theirs, x), strict=True):
        assert_same(mine, other)
        assert mine.is_contiguous()


@pytest.mark.parametrize(
    "name", ["convnext_atto_ols", "convnextv2_atto", "convnext_zepto_rms_ols", "convnext_tiny_hnf"]
)
def test_extractors_have_timms_keys(name):
    ours, theirs = (on_meta(library, name, features_only=True) for library in (bbfast, timm))
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert ours.feature_info.info == theirs.feature_info.info


# ---- the head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v1", "hidden", "norm_first"])
def test_head_agrees(kind):
    ours, theirs = twins(**{**SHALLOW, **KINDS[kind]})
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = [model.forward_features(x) for model in (ours, theirs)]
    assert_same(*features)
    assert_same(ours.forward_head(features[0], pre_logits=True), theirs.forward_head(features[1], pre_logits=True))
    assert ours.forward_head(features[0], pre_logits=True).shape == (2, ours.head_hidden_size)
    assert_same(ours.forward_head(features[0]), ours(x))
    assert ours.get_classifier() is ours.head.fc


@pytest.mark.parametrize(
    "reset",
    [
        (3,),
        (3, "max"),
        (0,),
        (0, ""),
        (4, None, True),
        (4, "avgmax", True),
        (0, "", True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["v1", "hidden", "norm_first"])
def test_reset_classifier_agrees(kind, reset):
    ours, theirs = twins(**{**SHALLOW, **KINDS[kind]})
    trained = {key: value.clone() for key, value in ours.state_dict().items() if "head.fc" not in key}
    ours.head.requires_grad_(False)
    for model in (ours, theirs):
        model.reset_classifier(*reset)
    shapes = [[(key, value.shape, value.dtype) for key, value in m.state_dict().items()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for attribute in ("num_classes", "num_features", "head_hidden_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for key, value in ours.state_dict().items():
        if key in trained:
            assert torch.equal(value.flatten(), trained[key].flatten()), key
    assert not any(module.training for module in ours.modules())
    assert {key for key, p in ours.head.named_parameters() if p.requires_grad} == (
        {"fc.weight", "fc.bias"} if reset[0] else set()
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 73, dtype=torch.float64)
    assert_same(ours(x), theirs(x))


def test_classifier_of_pixels_and_back():
    """Without pooling the head's layers are convolutions, with it linear again; the hidden one keeps its values."""
    ours, theirs = twins(**{**SHALLOW, **KINDS["hidden"]})
    hidden = ours.head.pre_logits.fc.weight.clone()
    x = torch.randn(2, 3, 64, 73, dtype=torch.float64)
    for pool in ("", "avg"):
        for model in (ours, theirs):
            model.reset_classifier(6, pool)
        assert torch.equal(ours.head.pre_logits.fc.weight.flatten(), hidden.flatten())
        theirs.load_state_dict(ours.state_dict())
        assert_same(ours(x), theirs(x))


def test_refused_resets_change_nothing():
    for kind in ("hidden", "norm_first"):
        model = make(bbfast, NAME, random_state(NAME, **SHALLOW, **KINDS[kind]), **SHALLOW, **KINDS[kind])
        x = torch.randn(1, 3, 64, 64)
        expected = forward(model, x)
        for arguments in ((3, "median"), (-1,), (3, 7), (3, "avg", 1), (3, "catavgmax" if kind == "hidden" else "")):
            with pytest.raises((TypeError, ValueError)):
                model.reset_classifier(*arguments)
            assert torch.equal(forward(model, x), expected)
            assert model.num_classes == 5


# ---- weights from elsewhere --------------------------------------------------------------------------------


def of_the_authors(state: dict) -> dict:
    """Their names, perceptrons that are linear, GRN's vectors with three more axes."""
    theirs = {"norms.3.weight": torch.ones(3), "projectors.0.weight": torch.ones(3, 3)}
    for key, value in state.items():
        for pattern, name in (
            (r"^stem\.", "downsample_layers.0."),
            (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
            (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
            ("conv_dw", "dwconv"),
            (r"mlp\.fc", "pwconv"),
            (r"mlp\.grn\.weight", "grn.gamma"),
            (r"mlp\.grn\.bias", "grn.beta"),
            (r"^head\.norm", "norm"),
            (r"^head\.fc", "head"),
        ):
            key = re.sub(pattern, name, key)
        if "pwconv" in key and key.endswith("weight"):
            value = value.flatten(1)
        theirs[key] = value[None, None, None] if ".grn." in key else value
    return theirs


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("kind", ["v1", "v1_conv_mlp", "v2", "v2_conv_mlp"])
def test_checkpoint_of_the_authors(kind, headless, tmp_path):
    """As timm reads it; without a head as masked autoencoders have none, where timm keeps the norm that it made."""
    arguments = {**SHALLOW, **KINDS[kind], "stem_type": "patch", **({"num_classes": 0} if headless else {})}
    state = random_state(NAME, **arguments)
    theirs = of_the_authors({k: v for k, v in state.items() if not (headless and k.startswith("head"))})
    model = bbfast.create_model(NAME, **arguments)
    adapted = model.adapt_state_dict(theirs)
    expected = timm.models.convnext.checkpoint_filter_fn(theirs, timm.create_model(NAME, **arguments))
    fresh = {"head.norm.weight": torch.ones(32), "head.norm.bias": torch.zeros(32)} if headless else {}
    assert adapted.keys() == (expected | fresh).keys() == state.keys()
    assert all(torch.equal(adapted[key], value) for key, value in (expected | fresh).items())
    torch.save({"model": theirs}, tmp_path / "convnext.pth")
    loaded = bbfast.create_model(NAME, checkpoint_path=tmp_path / "convnext.pth", **arguments).state_dict()
    assert all(torch.equal(loaded[key], fresh.get(key, value)) for key, value in state.items())


@pytest.mark.parametrize("kind", ["v1", "hidden"])
def test_checkpoint_of_open_clip(kind, tmp_path):
    arguments = {**SHALLOW, **KINDS[kind]}
    state = {**random_state(NAME, **arguments), "head.fc.bias": torch.zeros(5)}
    theirs = {"logit_scale": torch.zeros(()), "text.positional_embedding": torch.zeros(3)}
    for key, value in state.items():
        if key.startswith("head.pre_logits"):
            key = key.replace("head.pre_logits.fc", "visual.head.mlp.fc1")
        elif key.startswith("head.fc"):
            key = key.replace("head.fc", "visual.head.mlp.fc2" if kind == "hidden" else "visual.head.proj")
        else:
            key = f"visual.trunk.{key}"
        theirs[key] = value
    del theirs["visual.head.mlp.fc2.bias" if kind == "hidden" else "visual.head.proj.bias"]
    expected = timm.models.convnext.checkpoint_filter_fn(theirs, timm.create_model(NAME, **arguments))
    torch.save(theirs, tmp_path / "open_clip.pt")
    loaded = bbfast.create_model(NAME, checkpoint_path=tmp_path / "open_clip.pt", **arguments).state_dict()
    assert loaded.keys() == expected.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_checkpoint_of_the_other_perceptron(conv_mlp, tmp_path):
    """Linear layers load into 1x1 convolutions and the other way round; an extractor takes its part."""
    state = random_state(NAME, **SHALLOW, conv_mlp=not conv_mlp)
    torch.save(state, tmp_path / "convnext.pth")
    arguments = {**SHALLOW, "conv_mlp": conv_mlp, "checkpoint_path": tmp_path / "convnext.pth"}
    model = bbfast.create_model(NAME, **arguments)
    assert all(torch.equal(value.flatten(), state[key].flatten()) for key, value in model.state_dict().items())
    extractor = bbfast.create_model(NAME, features_only=True, out_indices=(0, 1), **arguments)
    whole = model.state_dict()
    for key, value in extractor.state_dict().items():
        assert torch.equal(value, whole[re.sub(r"^(stem|stages)_", r"\1.", key)]), key


def test_checkpoint_that_does_not_fit(tmp_path):
    state = of_the_authors(random_state(NAME, **SHALLOW))
    del state["stages.0.0.gamma"]
    torch.save(state, tmp_path / "convnext.pth")
    with pytest.raises(ValueError, match=r"missing keys: stages\.0\.blocks\.0\.gamma"):
        bbfast.create_model(NAME, checkpoint_path=tmp_path / "convnext.pth", **SHALLOW)


# ---- life of a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "convnext_zepto_rms_ols"])
def test_initialised_as_timm(name):
    arguments = {"head_init_scale": 3.0, "ls_init_value": 0.5}
    ours, theirs = (library.create_model(name, **arguments) for library in (bbfast, timm))
    for (key, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if value.dim() < 2:
            assert torch.equal(value, other), key
        elif value.numel() > 100:
            # Not the deviation: torch's truncated normal now and then gives a value of -2, a hundred deviations out.
            widths = [tensor.abs().median().item() for tensor in (value, other)]
            assert widths[0] == pytest.approx(widths[1], rel=8 / value.numel() ** 0.5 + 0.02), key


@pytest.mark.parametrize("kind", ["v1", "v2_conv_mlp"])
def test_grad_checkpointing_changes_nothing(kind):
    arguments = {"drop_path_rate": 0.5, **SHALLOW, **KINDS[kind]}
    state, x, grad_out = random_state(NAME, **arguments), torch.randn(4, 3, 64, 64), torch.randn(4, 5)
    results, runs = [], []
    for enable in (False, True):
        model = make(bbfast, NAME, state, torch.float64, **arguments)
        model.set_grad_checkpointing(enable)
        model.stages[2].blocks[0].register_forward_pre_hook(lambda *args: runs.append(1))
        results.append(training_step(model, x, grad_out))
    assert_equal_to_nine_digits(*results)
    assert len(runs) == 3


def test_copies_compute_the_same():
    for kind in ("hidden", "v2_conv_mlp"):
        arguments = {**SHALLOW, **KINDS[kind]}
        model = make(bbfast, NAME, random_state(NAME, **arguments), **arguments).eval()
        x, saved = torch.randn(2, 3, 64, 64), io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for twin in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
            assert torch.equal(forward(twin, x), forward(model, x))


# All that a block can have, at once; its parts alone take as long to trace.
COMPILED = {
    "everything": {"use_grn": True, "conv_mlp": True, "norm_layer": "simplenorm"},
    **{kind: pytest.param(KINDS[kind], marks=pytest.mark.slow) for kind in KINDS},
}


@pytest.mark.parametrize("arguments", COMPILED.values(), ids=COMPILED)
def test_inference_compiles_for_any_size(arguments):
    arguments = {**SHALLOW, "depths": (1, 1, 1, 1), **arguments}
    state = random_state(NAME, **arguments)
    model, compiled = (make(bbfast, NAME, state, torch.float64, **arguments) for _ in range(2))
    counter = CompileCounter()
    compiled.compile(fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in ((64, 96), (92, 71), (69, 72), (75, 66)):
        x = torch.randn(2, 3, *size)
        assert_same(forward(compiled, x), forward(model, x))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arguments", COMPILED.values(), ids=COMPILED)
def test_training_compiles_without_graph_breaks(arguments, dynamic):
    arguments = {**SHALLOW, "depths": (1, 1, 1, 1), "drop_path_rate": 0.5, **arguments}
    state, x = random_state(NAME, **arguments), torch.randn(4, 3, 71, 66)
    model, compiled = (make(bbfast, NAME, state, torch.float64, **arguments) for _ in range(2))
    compiled.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_equal_to_nine_digits(*(training_step(m, x, torch.ones(4, 5)) for m in (compiled, model)))


def test_blocks_train_compiled_for_any_size():
    block = ConvNeXtBlock(6, use_grn=True, ls_init_value=0.5, dtype=torch.float64)
    nn.init.normal_(block.conv_dw.weight)
    nn.init.normal_(block.mlp.grn.weight)
    compiled = copy.deepcopy(block)
    compiled.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 6, 7, 8), (2, 6, 4, 9)):
        x, grad_out = torch.randn(shape).to(memory_format=torch.channels_last), torch.randn(shape)
        assert_equal_to_nine_digits(*(training_step(m, x, grad_out) for m in (compiled, block)))
        for model in (compiled, block):
            model.zero_grad()


def test_empty_batch():
    for kind in ("v1", "v2_conv_mlp"):
        model = bbfast.create_model(NAME, **SHALLOW, **KINDS[kind])
        y = model(torch.randn(0, 3, 64, 64))
        assert y.shape == (0, 5)
        y.sum().backward()
        assert all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters())


class Wrapped(nn.Module):
    """As adapters do it: a module in the place of a layer, without its attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_layers_of_perceptrons_may_be_replaced(conv_mlp):
    block, x = ConvNeXtBlock(8, conv_mlp=conv_mlp, ls_init_value=1.0), torch.randn(2, 8, 5, 6)
    expected = block(x)
    block.mlp.fc1, block.mlp.fc2 = Wrapped(block.mlp.fc1), Wrapped(block.mlp.fc2)
    torch.testing.assert_close(block(x), expected)


def test_hooks_on_stages_blocks_and_norms_run():
    model, seen = bbfast.create_model(NAME, **SHALLOW), []
    for name in (
        "stem.0",
        "stem.1",
        "stages.1",
        "stages.1.downsample.1",
        "stages.2.blocks.1",
        "stages.2.blocks.1.norm",
    ):
        model.get_submodule(name).register_forward_hook(lambda module, args, y, name=name: seen.append(name))
    model(torch.randn(1, 3, 64, 64))
    assert len(seen) == 6


# ---- bad arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 7}, TypeError, "dim"),
        ({"in_chans": 0}, ValueError, "in_chans=0"),
        ({"num_classes": -1}, ValueError, "num_classes=-1"),
        ({"num_classes": "many"}, TypeError, "num_classes must be an int"),
        ({"output_stride": 4}, ValueError, "output_stride=4 is not known; allowed: 8, 16, 32"),
        ({"depths": (1, 2)}, ValueError, r"depths=\(1, 2\) must have 4 entries"),
        ({"depths": (1, 2, 3, 0)}, ValueError, "depths=0"),
        ({"dims": 96}, TypeError, "dims must be a tuple"),
        ({"dims": (1, 2, 3)}, ValueError, r"dims=\(1, 2, 3\) must have 4 entries"),
        ({"kernel_sizes": 4}, ValueError, "kernel_size=4 is not allowed; it must be odd"),
        ({"kernel_sizes": (7, 7)}, ValueError, r"kernel_sizes=\(7, 7\) must have 4 entries"),
        ({"kernel_sizes": 7.0}, TypeError, "kernel_sizes must be a tuple of ints"),
        ({"ls_init_value": "small"}, TypeError, "ls_init_value must be a float or None, got str"),
        ({"stem_type": "conv"}, ValueError, "stem_type='conv' is not known; allowed: 'patch', 'overlap'"),
        ({"patch_size": 0}, ValueError, "patch_size=0"),
        ({"head_init_scale": -1.0}, ValueError, r"head_init_scale=-1\.0"),
        ({"head_norm_first": 1}, TypeError, "head_norm_first must be a bool"),
        (
            {"head_norm_first": True, "head_hidden_size": 8},
            ValueError,
            "head_hidden_size=8 is not allowed with head_norm",
        ),
        (
            {"head_norm_first": True, "global_pool": ""},
            ValueError,
            "global_pool='' leaves a map",
        ),
        ({"head_hidden_size": 0}, ValueError, "head_hidden_size=0"),
        ({"global_pool": "catavgmax"}, ValueError, "global_pool='catavgmax' is not allowed; .* must keep the channels"),
        ({"global_pool": "median"}, ValueError, "global_pool='median' is not known"),
        ({"conv_mlp": 1}, TypeError, "conv_mlp must be a bool"),
        ({"conv_bias": 0}, TypeError, "conv_bias must be a bool"),
        ({"use_grn": "yes"}, TypeError, "use_grn must be a bool"),
        ({"act_layer": "mish"}, ValueError, "act_layer='mish' is not known; allowed: 'gelu'"),
        ({"act_layer": nn.GELU}, ValueError, "act_layer=<class .*GELU'> is not known"),
        ({"norm_layer": "batchnorm2d"}, ValueError, "norm_layer='batchnorm2d' is not known; allowed: 'layernorm'"),
        ({"norm_eps": 0}, ValueError, "norm_eps=0"),
        ({"drop_rate": 2}, ValueError, "drop_rate=2"),
        ({"drop_path_rate": -0.1}, ValueError, r"drop_path_rate=-0\.1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(NAME, **{**SHALLOW, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio=0"),
        ({"mlp_ratio": 0.01}, ValueError, r"mlp_ratio=0\.01 leaves no hidden channel of 8"),
        ({"drop_path": 1.5}, ValueError, r"drop_path=1\.5"),
        ({"kernel_size": 0}, ValueError, "kernel_size=0"),
        ({"dilation": 0}, ValueError, "dilation=0"),
    ],
    ids=str,
)
def test_bad_block_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ConvNeXtBlock(8, **arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 1, 64, 64), ValueError, r"x must have shape \[N, 3, H, W\], got \(1, 1, 64, 64\)"),
        (torch.zeros(3, 64, 64), ValueError, r"x must have shape \[N, 3, H, W\]"),
        ([1.0], TypeError, r"x must be a torch\.Tensor, got list"),
    ],
    ids=["channels", "rank", "list"],
)
def test_bad_inputs_are_named(x, error, message):
    for arguments in ({}, {"features_only": True}):
        with pytest.raises(error, match=message):
            bbfast.create_model(NAME, **SHALLOW, **arguments)(x)


@pytest.mark.parametrize("indices", [(0.5,), "a", 1.5, (4,), 0])
def test_bad_indices_are_named(indices):
    model = bbfast.create_model(NAME, **SHALLOW)
    x = torch.zeros(1, 3, 64, 64)
    for call in (partial(model.forward_intermediates, x), model.prune_intermediate_layers):
        with pytest.raises((TypeError, ValueError), match=r"^indices"):
            call(indices)
    assert len(model.stages) == 4


def test_head_for_other_channels_is_refused():
    model = bbfast.create_model(NAME, **SHALLOW)
    with pytest.raises(ValueError, match="in_features=8 does not fit the norm of 32 channels"):
        model.head.reset(3, in_features=8)
