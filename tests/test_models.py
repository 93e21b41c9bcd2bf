"""MobileNets and EfficientNets against timm's of the same name, with all parameters and statistics randomised."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn

import bbfast
from bbfast.models._efficientnet_builder import decode_arch_def
from bbfast.models._layers import Conv2dSame, make_divisible
from bbfast.models.mobilenetv3 import MobileNetV3

timm = pytest.importorskip("timm")
from parity import (  # noqa: E402
    assert_forward_agrees,
    assert_training_agrees,
    forward,
    make,
    on_meta,
    random_state,
    random_values,
    training_step,
)

NAMES = bbfast.list_models(module=("efficientnet", "mobilenetv3"))
# A training step of the large takes seconds, one of the huge gigabytes.
HUGE = [name for name in NAMES if name.endswith(("_b6", "_b7", "_b8", "_l2"))]
LARGE = [name for name in NAMES if re.search("_(b[1-5]|lite[1-4]|150d|120d)$", name)]
AT_FULL_SIZE = [
    "mobilenetv3_large_100",
    "tf_mobilenetv3_small_100",
    "mobilenetv2_100",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
]
ONE_OF_EACH_KIND = [
    "mobilenetv3_small_100",
    "tf_mobilenetv3_large_075",
    "tf_efficientnet_b0",
    "mobilenetv2_035",
]

# The same layers as in models that bear another number.
OTHER_WIDTHS = [
    *("mobilenetv2_050", "mobilenetv2_075", "mobilenetv2_140"),
    *("mobilenetv3_small_075", "mobilenetv3_large_075", "tf_mobilenetv3_small_075"),
]

# Maps of 33, 17, 9, 5, 3 and 2 pixels: odd ones meet strided "same" padding, none is a single pixel.
SMALL = 33

pytestmark = pytest.mark.usefixtures("reference_backend", "one_thread")


# ---- parity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_same_structure_as_timm(name):
    ours, theirs = on_meta(bbfast, name), on_meta(timm, name)
    assert describe(ours) == describe(theirs)
    for attribute in (
        "num_classes",
        "num_features",
        "head_hidden_size",
        "in_chans",
        "drop_rate",
        "feature_info",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.pretrained_cfg.items() <= theirs.pretrained_cfg.items()


def describe(model: nn.Module) -> list:
    """Keys with shapes and dtypes, in order, and the settings of every convolution and BatchNorm."""
    state = [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]
    norms = [(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    convs = [
        (m.kernel_size, m.stride, m.padding, m.dilation, m.groups) for m in model.modules() if isinstance(m, nn.Conv2d)
    ]
    return [state, norms, convs]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE + HUGE])
def test_forward_agrees(name):
    assert_forward_agrees(name, (SMALL, SMALL))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in OTHER_WIDTHS else [])
        for name in NAMES
        if name not in LARGE + HUGE
    ],
)
def test_training_agrees(name):
    """Single precision shows how the layers round, which differs between kinds and not between widths."""
    assert_training_agrees(name, (SMALL, SMALL + 7), single=name in ONE_OF_EACH_KIND)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in [*LARGE, *HUGE, *ONE_OF_EACH_KIND]])
def test_training_agrees_in_single_precision(name):
    assert_training_agrees(name, (SMALL, SMALL + 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE + HUGE)
def test_large_models_agree(name):
    assert_forward_agrees(name, (SMALL, SMALL))
    if not name.endswith("_l2"):  # twins of its 480 million parameters with all their gradients need 30 GB
        assert_training_agrees(name, (SMALL, SMALL + 7))


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_training_with_frozen_statistics_agrees(name):
    assert_training_agrees(name, (SMALL, SMALL + 7), train=False, single=name == ONE_OF_EACH_KIND[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND[1:])
def test_training_with_frozen_statistics_agrees_in_single_precision(name):
    assert_training_agrees(name, (SMALL, SMALL + 7), train=False)


@pytest.mark.parametrize("name", AT_FULL_SIZE)
def test_full_size_agrees(name):
    assert_forward_agrees(name, (224, 224))


FULL_SIZE_TRAINING = ["mobilenetv3_large_100"]


@pytest.mark.parametrize(
    "name", [n if n in FULL_SIZE_TRAINING else pytest.param(n, marks=pytest.mark.slow) for n in AT_FULL_SIZE]
)
def test_full_size_training_agrees(name):
    assert_training_agrees(name, (224, 231), batch=2)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_channels_last_equals_contiguous(name):
    state = random_state(name, num_classes=7)
    x, grad_out = torch.randn(4, 3, 48, 33), torch.randn(4, 7)
    model = make(bbfast, name, state, torch.float64, num_classes=7)
    contiguous = forward(model, x), training_step(model, x, grad_out)
    model = make(bbfast, name, state, torch.float64, num_classes=7).to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    channels_last = forward(model, x), training_step(model, x, grad_out)
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_b0"])
@pytest.mark.parametrize("backend", ["auto", "onednn"])
def test_fused_inference_agrees(name, backend, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    monkeypatch.setattr("bbfast.env.TRITON_INTERPRET", False)
    assert_forward_agrees(name, (64, 64))


@pytest.mark.parametrize("act_layer", ["relu", "relu6", "hard_swish", "swish", "gelu"])
def test_act_layer_agrees(act_layer):
    name = "mobilenetv2_035"
    state, x = random_state(name), torch.randn(2, 3, SMALL, SMALL)
    ours, theirs = (
        forward(make(library, name, state, torch.float64, act_layer=act_layer), x) for library in (bbfast, timm)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0"])
def test_output_stride_agrees(name, output_stride):
    state, x = random_state(name), torch.randn(2, 3, 96, 65)
    ours, theirs = (
        make(library, name, state, torch.float64, output_stride=output_stride) for library in (bbfast, timm)
    )
    assert ours.feature_info == theirs.feature_info
    torch.testing.assert_close(forward(ours, x), forward(theirs, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_in_chans(name, in_chans):
    state, x = random_state(name, in_chans=in_chans), torch.randn(2, in_chans, SMALL, SMALL)
    ours, theirs = (make(library, name, state, torch.float64, in_chans=in_chans) for library in (bbfast, timm))
    assert ours.in_chans == in_chans
    torch.testing.assert_close(forward(ours, x), forward(theirs, x), rtol=1e-9, atol=1e-9)


def test_empty_batch():
    model = bbfast.create_model("mobilenetv3_small_050", num_classes=5).eval()
    assert model(torch.randn(0, 3, 32, 32)).shape == (0, 5)


# ---- the head --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv2_035"])
@pytest.mark.parametrize(
    ("pool", "num_classes"),
    [("avg", 5), ("max", 5), ("avgmax", 5), ("catavgmax", 5), ("fastmax", 5), ("avg", 0), ("", 0)],
)
def test_head_agrees(name, pool, num_classes):
    arguments = {"num_classes": num_classes, "global_pool": pool}
    state, x = random_state(name, **arguments), torch.randn(2, 3, SMALL, 65)
    ours, theirs = (make(library, name, state, torch.float64, **arguments) for library in (bbfast, timm))
    assert ours.head_hidden_size == theirs.head_hidden_size
    torch.testing.assert_close(forward(ours, x), forward(theirs, x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        features = ours.forward_features(x.double())
        torch.testing.assert_close(features, theirs.forward_features(x.double()), rtol=1e-9, atol=1e-9)
        ours_head, theirs_head = (model.forward_head(features, pre_logits=True) for model in (ours, theirs))
    assert features.shape[1] == ours.num_features
    torch.testing.assert_close(ours_head, theirs_head, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv2_035"])
def test_reset_classifier(name):
    model = bbfast.create_model(name, num_classes=7, dtype=torch.bfloat16).eval()
    model.conv_stem.weight.requires_grad_(False)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert not model.get_classifier().training
    assert not model.conv_stem.weight.requires_grad
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, 3)
    model.reset_classifier(0, "max")
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).shape == (2, model.head_hidden_size, 2, 2)


def test_reset_classifier_keeps_the_model_where_it_fails():
    model = bbfast.create_model("mobilenetv3_small_050", num_classes=7)
    with pytest.raises(ValueError, match=r"global_pool='catavgmax'.*conv_head takes 288"):
        model.reset_classifier(3, "catavgmax")
    with pytest.raises(ValueError, match="num_classes=-1"):
        model.reset_classifier(-1)
    assert model.num_classes == 7
    assert model.get_classifier().out_features == 7


# ---- training --------------------------------------------------------------------------------------------


def test_drop_path_rates_follow_timm():
    ours = bbfast.create_model("mobilenetv3_large_100", drop_path_rate=0.2)
    theirs = timm.create_model("mobilenetv3_large_100", drop_path_rate=0.2)

    def rates(model):
        return [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.blocks for block in stage]

    assert rates(ours) == rates(theirs)
    assert rates(ours)[0] == 0.0 and rates(ours)[-1] == pytest.approx(0.2 * 15 / 16)


def test_grad_checkpointing_changes_nothing():
    name, arguments = "mobilenetv3_small_050", {"num_classes": 7, "drop_path_rate": 0.3}
    state, x, grad_out = random_state(name, **arguments), torch.randn(4, 3, 48, 48), torch.randn(4, 7)
    model = make(bbfast, name, state, torch.float64, **arguments)
    plain = training_step(model, x, grad_out)
    model = make(bbfast, name, state, torch.float64, **arguments)
    model.set_grad_checkpointing()
    checkpointed = training_step(model, x, grad_out)
    for key, value in plain.items():
        if not key.startswith("buffer"):
            torch.testing.assert_close(checkpointed[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0"])
def test_initialised_as_timm(name):
    ours, theirs = bbfast.create_model(name), timm.create_model(name)
    for (key, value), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
        if value.dim() < 2:
            assert torch.equal(value, other), key
        else:
            noise = 6 / math.sqrt(value.numel())  # six standard errors of a standard deviation
            assert value.std().item() == pytest.approx(other.std().item(), rel=noise), key


def test_synchronised_batch_norm_normalises_every_layer(monkeypatch):
    """Also after depthwise convolutions, whose op knows of its own process's statistics only."""
    name = "mobilenetv3_small_050"
    state, x = random_state(name), torch.randn(4, 3, 64, 64, dtype=torch.float64)
    expected = make(bbfast, name, state, torch.float64)(x)
    model = bbfast.nn.convert_sync_batchnorm(make(bbfast, name, state, torch.float64))
    synchronised = []

    def sync_forward(bn, z):  # torch's own wants processes and GPUs
        synchronised.append(bn)
        return nn.functional.batch_norm(z, None, None, bn.weight, bn.bias, True, eps=bn.eps)

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", sync_forward)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert set(synchronised) == {m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)}


def test_autocast():
    model = bbfast.create_model("mobilenetv3_small_050", num_classes=5).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = model(torch.randn(2, 3, 64, 64))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


# ---- life of a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_copies_compute_the_same(name):
    model = make(bbfast, name, random_state(name)).eval()
    x = torch.randn(2, 3, SMALL, SMALL)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    )
    for twin in copies:
        assert torch.equal(forward(twin, x), forward(model, x))


def test_constructed_on_a_device_and_in_a_dtype():
    model = bbfast.create_model("efficientnet_b0", device="meta", dtype=torch.float16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors} == {torch.float16, torch.int64}


FEW_BLOCKS = [["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r2_k5_s2_e4_c24_se0.25"], ["cn_r1_k1_s1_c64"]]


@pytest.fixture(params=["few blocks", pytest.param("whole", marks=pytest.mark.slow)])
def to_compile(request) -> nn.Module:
    """A model with a block of each kind, with and without a shortcut; more of the same take their time."""
    if request.param == "whole":
        return make(
            bbfast, "mobilenetv3_small_050", random_state("mobilenetv3_small_050", num_classes=7), num_classes=7
        )
    model = MobileNetV3(decode_arch_def(FEW_BLOCKS), num_features=64, num_classes=7)
    model.load_state_dict(random_values(model.state_dict()))
    return model


def test_training_compiles_without_graph_breaks(to_compile):
    model, x, grad_out = to_compile, torch.randn(3, 3, 64, 64), torch.randn(3, 7)
    compiled_model = copy.deepcopy(model)
    compiled_model.compile(fullgraph=True, backend="aot_eager")
    compiled = training_step(compiled_model, x, grad_out)
    eager = training_step(model, x, grad_out)
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_inference_compiles_without_graph_breaks(to_compile):
    model, x = to_compile, torch.randn(3, 3, 64, 64)
    eager = forward(model, x)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(model, x), eager, rtol=1e-4, atol=1e-4)


def test_traces():
    name = "mobilenetv3_small_050"
    model = make(bbfast, name, random_state(name)).eval()
    x = torch.randn(2, 3, SMALL, SMALL)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x))


# ---- bad arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv3_rw", "efficientnet_b0", "mobilenetv2_035"])
def test_unknown_keyword_is_named(name):
    with pytest.raises(TypeError, match="drop_pth_rate"):
        bbfast.create_model(name, drop_pth_rate=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": -1}, ValueError, "num_classes=-1"),
        ({"num_classes": 10.0}, TypeError, "num_classes must be an int, got float"),
        ({"in_chans": 0}, ValueError, "in_chans=0"),
        ({"drop_rate": 1.5}, ValueError, "drop_rate=1.5"),
        ({"drop_path_rate": math.nan}, ValueError, "drop_path_rate=nan"),
        ({"drop_path_rate": "0.1"}, TypeError, "drop_path_rate must be a float, got str"),
        ({"global_pool": "median"}, ValueError, "global_pool='median'.*avgmax"),
        ({"global_pool": 3}, TypeError, "global_pool must be a string, got int"),
        ({"act_layer": "mish"}, ValueError, "act_layer='mish'.*hard_swish"),
        ({"act_layer": nn.ReLU}, TypeError, "act_layer must be a string"),
        ({"pad_type": "reflect"}, ValueError, "pad_type='reflect'"),
        ({"output_stride": 5}, ValueError, "output_stride=5"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model("efficientnet_b0", **arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"x must have shape \[N, 3, H, W\], got \(1, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), ValueError, r"x must have shape \[N, 3, H, W\], got \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "x is on meta but the model is on cpu"),
    ],
)
def test_bad_inputs_are_named(x, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model("mobilenetv3_small_050").eval()(x)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("xx_r1_k3_s1_c16", "unknown type 'xx'.*ir, ds, cn"),
        ("ir_r1_k3_s1_c16_nxx", "unknown option 'nxx'"),
        ("ir_k3_s1_c16", "lacks r"),
    ],
)
def test_bad_block_strings_are_named(block, message):
    with pytest.raises(ValueError, match=message):
        decode_arch_def([[block]])


# ---- parts -----------------------------------------------------------------------------------------------


def test_repeats_are_scaled_as_in_timm():
    from timm.models._efficientnet_builder import decode_arch_def as timm_decode

    arch_def = [
        ["ds_r1_k3_s1_c16"],
        ["ir_r1_k3_s2_e6_c80", "ir_r1_k5_s1_e2.5_c80_nre", "ir_r2_k3_s1_e2.3_c80_se0.25"],
        ["ir_r3_k5_s2_e6_c160_noskip", "ir_r4_k5_s1_e6_c160"],
    ]
    for multiplier in (0.3, 0.5, 1.0, 1.2, 1.8, 3.1, 5.3):
        for fixed in (False, True):
            ours = decode_arch_def(arch_def, multiplier, fixed)
            theirs = timm_decode(arch_def, multiplier, fix_first_last=fixed)
            assert [[(b.kernel_size, b.out_chs, b.expansion) for b in stage] for stage in ours] == [
                [(b["dw_kernel_size"], b["out_chs"], b.get("exp_ratio", 1.0)) for b in stage] for stage in theirs
            ]


def test_make_divisible_agrees():
    from timm.layers import make_divisible as timm_make_divisible

    for value in torch.rand(200).mul(300).tolist() + [4, 11, 12, 72 / 4, 120 / 4]:
        assert make_divisible(value) == timm_make_divisible(value)
        assert make_divisible(value, 8, 16) == timm_make_divisible(value, 8, 16)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", [2, 3, 5])
def test_conv_with_same_padding_agrees(kernel_size, dilation, stride):
    from timm.layers import Conv2dSame as TimmConv2dSame

    conv = Conv2dSame(3, 4, kernel_size, stride, dilation=dilation, dtype=torch.float64)
    twin = TimmConv2dSame(3, 4, kernel_size, stride, dilation=dilation, dtype=torch.float64)
    twin.load_state_dict(conv.state_dict())
    for size in ((7, 8), (1, 13), (16, 3)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(conv(x), twin(x))


@pytest.mark.parametrize("backend", ["onednn", "torch"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_features_keep_the_memory_format(backend, memory_format, monkeypatch):
    """Inside, a model may change the format for speed; `.view` on its features must work as before."""
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=memory_format)
    for name in ("mobilenetv3_small_050", "efficientnet_lite0"):
        model = bbfast.create_model(name).eval()
        with torch.inference_mode():
            features = model.forward_features(x)
            assert features.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(model.forward_head(features), model(x))
