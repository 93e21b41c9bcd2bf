"""Folding BatchNorms into convolutions: what is folded, what is not and why, and that the numbers stay."""

from __future__ import annotations

import copy
import io

import numerics
import pytest
import swap_parity
import timm
import torch
import torchvision
from torch import nn

import bbfast
from bbfast.nn import FoldedBatchNorm2d

LIBRARIES = {"bbfast": bbfast.create_model, "timm": timm.create_model, "torchvision": torchvision.models.get_model}

# library, name, how many BatchNorms have no convolution of their own
MODELS = [
    ("bbfast", "mobilenetv3_small_050", 0),
    ("bbfast", "tf_efficientnet_lite0", 0),
    ("bbfast", "resnet18d", 0),
    ("bbfast", "resnetaa50", 0),
    ("bbfast", "seresnet18", 0),
    ("bbfast", "regnety_002", 0),
    ("timm", "mobilenetv3_small_050", 0),
    ("timm", "tf_efficientnet_lite0", 0),
    ("torchvision", "mnasnet0_5", 0),
]


def build(library: str, name: str) -> nn.Module:
    return swap_parity.randomise(LIBRARIES[library](name, num_classes=5)).eval()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), swap_parity.backend("cpp"):
        return model(x.to(memory_format=torch.channels_last))


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


CASES = [(*model, False) for model in MODELS] + [(*model, True) for model in MODELS if model[0] != "bbfast"]


@pytest.mark.parametrize("library, name, left, swapped", CASES)
def test_numbers_stay(library, name, left, swapped):
    model = build(library, name).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64)
    exact = run(copy.deepcopy(model).double(), x.double())
    if swapped:
        bbfast.swap(model)
    before, count = run(model, x), batch_norms(model)
    report = bbfast.fold_bn_(model)
    assert report.totals.get("skipped", 0) == batch_norms(model) == left
    assert report.totals["folded"] == count - batch_norms(model) > 15
    numerics.assert_within_rule("output", run(model, x), exact, before)
    if swapped:
        bbfast.restore(model)
        numerics.assert_within_rule("output when restored", run(model, x), exact, before)
        bbfast.swap(model)
        assert not bbfast.plan(model).skipped
        numerics.assert_within_rule("output when swapped again", run(model, x), exact, before)


def test_features_only():
    model = swap_parity.randomise(bbfast.create_model("resnet18d", features_only=True, out_indices=(0, 2))).eval()
    x = torch.randn(2, 3, 64, 64)
    before = run(model, x)
    bbfast.fold_bn_(model)
    assert batch_norms(model) == 0
    for ours, theirs in zip(run(model, x), before):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def pair(**settings) -> nn.Sequential:
    """A convolution with a bias, a BatchNorm, and an activation that ops do not know."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **settings), nn.LeakyReLU(0.3))
    return swap_parity.randomise(layers).eval()


def test_biases_and_unknown_activations():
    for settings in ({}, {"affine": False}, {"eps": 0.3}):
        model, x = pair(**settings), torch.randn(2, 3, 9, 8)
        exact = run(copy.deepcopy(model).double(), x.double())
        before = run(model, x)
        bbfast.fold_bn_(model)
        assert isinstance(model[1], FoldedBatchNorm2d)
        assert (before < 0).any()
        numerics.assert_within_rule("output", run(model, x), exact, before)


def test_activations_inside_of_norms_stay():
    model = nn.Sequential(timm.layers.ConvNormAct(3, 8, 3, act_layer=nn.LeakyReLU), timm.layers.ConvNormAct(8, 8))
    model = swap_parity.randomise(model).eval()
    x = torch.randn(2, 3, 9, 8)
    before = run(model, x)
    assert bbfast.fold_bn_(model).totals == {"folded": 2}
    torch.testing.assert_close(run(model, x), before)
    bbfast.swap(model)
    torch.testing.assert_close(run(model, x), before)


def test_state_dict_copies_and_pickles():
    model, x = build("bbfast", "mobilenetv3_small_050"), torch.randn(1, 3, 64, 64)
    shapes = {key: value.shape for key, value in model.state_dict().items() if key.endswith("conv_pw.weight")}
    bbfast.fold_bn_(model)
    before, state = run(model, x), model.state_dict()
    assert not any("running" in key for key in state)
    assert shapes.items() <= {key: value.shape for key, value in state.items()}.items()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(other, x), before)
    assert bbfast.fold_bn_(model).rows == ()


def test_half_precision_is_rounded_once():
    model = pair().to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    bbfast.fold_bn_(model)
    bbfast.fold_bn_(exact)
    assert torch.equal(model[0].weight, exact[0].weight.to(torch.bfloat16))
    assert torch.equal(model[0].bias, exact[0].bias.to(torch.bfloat16))


# ---- what is refused ---------------------------------------------------------------------------------------


def test_train_mode_is_refused():
    model = build("bbfast", "mobilenetv3_small_050")
    state = copy.deepcopy(model.state_dict())
    model.blocks[1].train()
    with pytest.raises(bbfast.SwapError, match=r"blocks\.1\.0\.bn1 is in train mode: call model\.eval\(\) first"):
        bbfast.fold_bn_(model)
    assert state.keys() == model.state_dict().keys()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        bbfast.fold_bn_("resnet18")


@pytest.mark.parametrize("library", ["bbfast", "timm"])
def test_a_folded_model_does_not_train(library):
    model = build(library, "mobilenetv3_small_050")
    bbfast.fold_bn_(model)
    bbfast.swap(model)
    with pytest.raises(RuntimeError, match=r"folded into its convolutions by bbfast\.fold_bn_"):
        model.train()(torch.randn(2, 3, 64, 64))


def hooked(model: nn.Sequential):
    model[1].register_forward_hook(lambda *_: None)


def weight_normed(model: nn.Sequential):
    nn.utils.parametrizations.weight_norm(model[0])


def shared(model: nn.Sequential):
    model.append(model[0])


def tied(model: nn.Sequential):
    model.append(nn.Conv2d(3, 8, 3))
    model[3].weight = model[0].weight


def patched(model: nn.Sequential):
    model.forward = lambda x: x


REASONS = {
    hooked: "1 has forward hooks",
    weight_normed: "no convolution is known",
    shared: "used at several places",
    tied: "used at several places",
    patched: "forward of its own",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_what_cannot_be_folded_is_left_and_named(change):
    model = pair()
    change(model)
    state = copy.deepcopy(model.state_dict())
    (row,) = bbfast.fold_bn_(model).rows
    assert (row.path, row.status) == ("1", "skipped")
    assert REASONS[change] in row.reason
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_norms_without_statistics_or_convolution():
    model = nn.Sequential(pair(track_running_stats=False), nn.BatchNorm2d(8)).eval()
    reasons = {row.path: row.reason for row in bbfast.fold_bn_(model).skipped}
    assert reasons["0.1"] == "1 keeps no running statistics"
    assert reasons["1"] == "no convolution is known whose result it takes"
