"""What every model can do beside classifying, one small model per family against timm's of the same name."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import numerics
import pytest
import torch
from torch import nn

import bbfast

timm = pytest.importorskip("timm")
from parity import forward, make, random_state, random_values  # noqa: E402

# By name, the arguments that make a quick model of it.
MODELS = {
    "mobilenetv3_small_050": {},
    "mobilenetv2_035": {},
    "efficientnet_lite0": {},
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "ls_init_value": 0.1},
    "convnextv2_atto": {"depths": (1, 1, 2, 1), "norm_layer": "simplenorm"},
    "resnet18": {},
    "seresnext26t_32x4d": {"layers": (1, 1, 1, 1), "cardinality": 2},
    "regnety_002": {},
    "regnetv_040": {"w0": 24, "wa": 36.44, "wm": 2.49, "depth": 13, "group_size": 8},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 2, 4),
        "img_size": (64, 92),
    },
}
SIZE = (64, 92)

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """bbfast's and timm's, double precision, in eval mode, the same random weights."""
    ours, theirs = (copy.deepcopy(model) for model in built_twins(name))
    state = random_values(ours.state_dict())
    for model in (ours, theirs):
        model.load_state_dict(state)
    return ours, theirs


@functools.cache
def built_twins(name: str) -> tuple[nn.Module, nn.Module]:
    """Built once, since that takes longer than to copy them and to use them."""
    arguments = {"num_classes": 5, **MODELS[name]}
    state = random_state(name, **arguments)
    return tuple(make(library, name, state, torch.float64, **arguments).eval() for library in (bbfast, timm))


def ours_of(name: str, **arguments) -> nn.Module:
    return bbfast.create_model(name, num_classes=5, **MODELS[name], **arguments).eval()


def images(dtype=torch.float64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *SIZE, dtype=dtype)


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# ---- maps ------------------------------------------------------------------------------------------------


def test_feature_info_tells_the_maps(name):
    model = ours_of(name)
    with torch.no_grad():
        maps = model.forward_intermediates(images(torch.float32), intermediates_only=True)
    assert len(maps) == len(model.feature_info) >= 4
    for found, info in zip(maps, model.feature_info):
        round_up = info["reduction"] - 1 if "convnext" not in name else 0  # ConvNeXt leaves out what is left over
        sizes = [(size + round_up) // info["reduction"] for size in SIZE]
        assert list(found.shape) == [2, info["num_chs"], *sizes]
        assert model.get_submodule(info["module"]) is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": 2, "norm": True},
        {"indices": (2, 0), "intermediates_only": True},
        {"indices": [-3], "intermediates_only": True, "stop_early": True},
        {"indices": (-1,), "norm": True, "intermediates_only": True, "stop_early": True},
    ],
    ids=str,
)
def test_forward_intermediates_agrees(name, arguments):
    ours, theirs = twins(name)
    x = images()
    with torch.no_grad():
        mine, other = ours.forward_intermediates(x, **arguments), theirs.forward_intermediates(x, **arguments)
        if not arguments.get("intermediates_only"):
            assert_same(mine[0], ours.forward_features(x))
            if isinstance(ours, bbfast.models.mobilenetv3.MobileNetV3) or "indices" not in arguments:
                assert_same(mine[0], other[0])
            mine, other = mine[1], other[1]
    assert len(mine) == len(other) > 0
    for ours_map, their_map in zip(mine, other):
        assert_same(ours_map, their_map)
        assert ours_map.is_contiguous()


def test_stopping_early_hands_out_the_last_map_made(name):
    model, x = ours_of(name), images(torch.float32)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x, indices=(1,), stop_early=True)
    as_nchw = last if last.shape == maps[0].shape else last.permute(0, 3, 1, 2)
    torch.testing.assert_close(as_nchw, maps[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"indices": 9}, ValueError, "indices=9 is not allowed: the model has"),
        ({"indices": (7,)}, ValueError, r"indices=\(7,\) is not allowed"),
        ({"indices": "1"}, TypeError, "indices must be an int or a tuple of ints, got str"),
        ({"output_fmt": "NHWC"}, ValueError, "output_fmt='NHWC' is not allowed; it must be 'NCHW'"),
    ],
    ids=str,
)
def test_wrong_arguments_of_forward_intermediates_are_named(name, arguments, error, message):
    with pytest.raises(error, match=message):
        ours_of(name).forward_intermediates(images(torch.float32), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": (1, 2)},
        {"indices": [0], "prune_norm": True},
        {"indices": 2, "prune_head": False},
        {"indices": 1, "prune_norm": True, "prune_head": False},
    ],
    ids=str,
)
def test_pruning_agrees(name, arguments):
    ours, theirs = twins(name)
    kept = ours.prune_intermediate_layers(**arguments)
    assert kept == theirs.prune_intermediate_layers(**arguments)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert ours.num_features == theirs.num_features
    x = images()
    with torch.no_grad():
        mine = ours.forward_intermediates(x, kept, intermediates_only=True)
        other = theirs.forward_intermediates(x, kept, intermediates_only=True)
        for ours_map, their_map in zip(mine, other, strict=True):
            assert_same(ours_map, their_map)
        assert_same(ours.forward_features(x), theirs.forward_features(x))
        ours.reset_classifier(3, "avg")
        assert ours(x).shape == (2, 3)


def test_pruning_leaves_no_unused_parameters(name):
    model = ours_of(name).train()
    model.prune_intermediate_layers(indices=(1,))
    model.forward_intermediates(images(torch.float32), (1,), intermediates_only=True)[0].sum().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


# ---- heads -----------------------------------------------------------------------------------------------


def test_head_agrees(name):
    ours, theirs = twins(name)
    assert ours.head_hidden_size == theirs.head_hidden_size
    x = images()
    with torch.no_grad():
        mine, other = (model.forward_head(model.forward_features(x), pre_logits=True) for model in (ours, theirs))
        assert_same(mine, other)
        assert mine.shape == (2, ours.head_hidden_size)
        assert_same(ours.get_classifier()(mine), ours(x))


@pytest.mark.parametrize(("num_classes", "global_pool"), [(3, None), (0, None), (4, "max"), (0, "")])
def test_reset_classifier_agrees(name, num_classes, global_pool):
    ours, theirs = twins(name)
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    others = {key: id(value) for key, value in ours.named_parameters()}
    for model in (ours, theirs):
        if isinstance(model, bbfast.models.mobilenetv3.MobileNetV3) and global_pool == "":
            global_pool = None  # timm's conv_head then runs on the map, and its linear classifier on its last axis
        model.reset_classifier(num_classes, global_pool)
        assert model.num_classes == num_classes
    classifier = ours.get_classifier()
    assert repr(classifier) == repr(theirs.get_classifier())
    for parameter in classifier.parameters():
        assert parameter.dtype == torch.float64 and parameter.requires_grad
    assert not classifier.training
    kept = {key: id(value) for key, value in ours.named_parameters() if not value.requires_grad}
    assert kept.items() <= others.items()
    with torch.no_grad():
        assert ours(images()).shape == theirs(images()).shape


@pytest.mark.parametrize("changed", ["constructor", "reset_classifier"])
def test_an_unpooled_map_has_no_linear_classifier(changed):
    for name in ("resnet18", "regnety_002", "efficientnet_lite0"):
        model = ours_of(name)
        before = model.get_classifier()
        with pytest.raises(ValueError, match=r"global_pool='' leaves a map.* num_classes=0, got 5"):
            if changed == "constructor":
                ours_of(name, global_pool="")
            else:
                model.reset_classifier(5, "")
        assert model.get_classifier() is before
        assert model.forward_head(torch.zeros(2, model.num_features, 2, 2)).shape == (2, 5)  # it still pools


# ---- training --------------------------------------------------------------------------------------------


def test_checkpointing_changes_no_gradient(name):
    model = ours_of(name, drop_path_rate=0.3).double().train()
    x, results = images(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        results.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][key], rtol=1e-9, atol=1e-12)


def test_checkpointing_keeps_less(name):
    model = ours_of(name).train()

    def kept(enable: bool) -> int:
        model.set_grad_checkpointing(enable)
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images(torch.float32))
        return sum(sizes)

    assert kept(True) < 0.8 * kept(False)


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_agrees(name, coarse):
    """The patterns may be written in another way; what counts are the groups."""
    ours, theirs = twins(name)
    groups = [
        timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        for model in (ours, theirs)
    ]
    assert groups[0] == groups[1]


# ---- copies and conversions ------------------------------------------------------------------------------


def test_made_on_meta(name):
    model = ours_of(name, device="meta")
    assert all(value.is_meta for value in model.state_dict().values())
    assert model(images(torch.float32).to("meta")).shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(name, dtype):
    model, x = ours_of(name), images(torch.float32)
    with torch.no_grad():
        exact = model(x)
        near = model.to(dtype)(x.to(dtype))
    assert near.dtype == dtype
    assert (near.float() - exact).abs().max() <= 0.1 * exact.abs().max() + 0.02


def test_channels_last_changes_no_number(name):
    ours, _ = twins(name)
    x = images()
    with torch.no_grad():
        expected = ours(x)
        ours.to(memory_format=torch.channels_last)
        assert_same(ours(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_answer_alike(name, copied):
    model, x = ours_of(name), images(torch.float32)
    if copied == "deepcopy":
        copy_of = copy.deepcopy(model)
    elif copied == "pickle":
        copy_of = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copy_of = torch.load(file, weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(copy_of(x), model(x), rtol=0, atol=0)


def test_fx_traces_inference_and_its_gradients(name):
    model = ours_of(name)
    traced = torch.fx.symbolic_trace(model)
    x = images(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    gradients = []
    for run in (model, traced):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))
    other_size = torch.randn(1, 3, *((64, 92) if "swin" in name else (33, 47)))
    with torch.no_grad():
        torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(other_size), model(other_size), rtol=0, atol=0)


# ---- on a GPU --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_on_a_gpu(name, dtype, channels_last, monkeypatch):
    """Inference by the kernels, against timm's in float64 and as far from it as timm's in the same dtype."""
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    arguments = {"num_classes": 5, **MODELS[name]}
    state = random_state(name, **arguments)
    x = images(torch.float32, batch=5)
    exact = forward(make(timm, name, state, torch.float64, **arguments), x)
    results = []
    for library in (bbfast, timm):
        model = make(library, name, state, **arguments).to("cuda", dtype)
        inputs = x.cuda()
        if channels_last:
            model.to(memory_format=torch.channels_last)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        results.append(forward(model, inputs).cpu())
    numerics.assert_within_rule("logits", results[0], exact, results[1])


@pytest.mark.gpu
def test_training_step_agrees_on_a_gpu(name, monkeypatch):
    """Autocast to bfloat16 and backward: finite, and the loss as near to float64's as timm's is."""
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    arguments = {"num_classes": 5, "drop_path_rate": 0.0, **MODELS[name]}
    state = random_state(name, **arguments)
    x, labels = images(torch.float32, batch=5), torch.arange(5)
    exact = nn.functional.cross_entropy(make(timm, name, state, torch.float64, **arguments).train()(x.double()), labels)
    errors = []
    for library in (bbfast, timm):
        model = make(library, name, state, **arguments).cuda().train()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(x.cuda())
        loss = nn.functional.cross_entropy(logits.float(), labels.cuda())
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        errors.append(abs(loss.item() - exact.item()))
    assert errors[0] <= 2 * errors[1] + 0.05 * abs(exact.item()), errors
