"""The swap engine: all or nothing, exact undoing, honest reports, whatever hangs on a module."""

from __future__ import annotations

import copy
import functools
import io
import json
import re
import threading
import types
import warnings

import pytest
import swap_parity
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import bbfast
from bbfast.swap import _fast, record_sources
from bbfast.swap._fingerprint import fingerprint, fingerprint_of_source, known_sources


def conv_run(channels: int = 8) -> nn.Sequential:
    """A depthwise and a pointwise run, of which the second has no activation, and a pooling between them."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
        nn.AvgPool2d(2),
        nn.Conv2d(channels, 2 * channels, 1),
        nn.BatchNorm2d(2 * channels),
    )


def block(**arguments) -> InvertedResidual:
    """timm's block, whose input is added to its output."""
    return swap_parity.randomise(InvertedResidual(8, 8, exp_ratio=2, **arguments)).eval()


def small_model() -> nn.Module:
    return swap_parity.randomise(timm.create_model("mobilenetv3_small_050", num_classes=5)).eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, *(size or (8, 12, 10)))


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), swap_parity.backend("torch"):
        return model(x)


def only_row(report: bbfast.SwapReport):
    (row,) = report.rows
    return row


# ---- what happens to a model -------------------------------------------------------------------------------


def test_plan_changes_nothing_and_says_what_swap_does():
    model = small_model()
    before, state = swap_parity.classes(model), copy.deepcopy(model.state_dict())
    plan = bbfast.plan(model)
    assert plan.dry_run
    assert swap_parity.classes(model) == before
    report = bbfast.swap(model)
    assert not report.dry_run
    assert report.rows == plan.rows
    assert report.totals == {"swapped": 13}
    changed = {path for (path, old), (_, new) in zip(before, swap_parity.classes(model)) if old is not new}
    assert changed == {row.path for row in report.swapped}
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_swapped_blocks_are_still_what_they_were():
    model = small_model()
    parameters = dict(model.named_parameters())
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    bbfast.swap(model)
    fast = model.blocks[1][0]
    assert type(fast) is not InvertedResidual
    assert isinstance(fast, InvertedResidual)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes


def test_sequential_runs_are_fused_and_the_rest_is_called():
    model = swap_parity.randomise(conv_run()).eval()
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append("pool"))
    x = images()
    before = run(model, x)
    row = only_row(bbfast.swap(model))
    assert (row.path, row.status) == ("", "swapped")
    torch.testing.assert_close(run(model, x), before)
    assert calls == ["pool", "pool"]


def test_sequential_without_a_run_is_not_mentioned():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Flatten())
    assert not bbfast.plan(model).rows


@pytest.mark.parametrize("pick", [slice(0, 3), slice(4, 6), slice(1, 3)], ids=["with act", "without act", "no conv"])
def test_sequential_runs_train_alike(pick):
    model = swap_parity.randomise(conv_run()[pick])
    channels = 8
    swap_parity.assert_training_step_agrees(model.double(), images(channels, 6, 5))


def test_slices_and_sums_of_a_swapped_sequential():
    model = swap_parity.randomise(conv_run()).eval()
    x = images()
    middle, before = run(model[:3], x), run(model, x)
    bbfast.swap(model)
    torch.testing.assert_close(run(model[:3], x), middle)
    torch.testing.assert_close(run(model[:3] + model[3:], x), before)


def test_an_activation_that_ops_do_not_know_runs_itself():
    model = swap_parity.randomise(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.3))).eval()
    x = images()
    before = run(model, x)
    bbfast.swap(model)
    assert (before < 0).any()
    torch.testing.assert_close(run(model, x), before)


# ---- restoring ---------------------------------------------------------------------------------------------


def test_swap_and_restore_twice():
    model, x = small_model(), torch.randn(2, 3, 64, 64)
    before, old_classes = run(model, x), swap_parity.classes(model)
    bbfast.swap(model)
    new_classes = swap_parity.classes(model)
    assert bbfast.swap(model).totals == {"already swapped": 13}
    assert swap_parity.classes(model) == new_classes
    assert bbfast.restore(model).totals == {"restored": 13}
    assert bbfast.restore(model).rows == ()
    assert swap_parity.classes(model) == old_classes
    assert torch.equal(run(model, x), before)


def test_swapped_undoes_what_it_did_and_no_more():
    model = small_model()
    bbfast.swap(model.blocks[0])
    before = swap_parity.classes(model)
    with bbfast.swapped(model) as report:
        assert report.totals == {"already swapped": 1, "swapped": 12}
        assert all(_fast.is_fast(type(model.get_submodule(row.path))) for row in report.rows)
    assert swap_parity.classes(model) == before
    with pytest.raises(KeyError), bbfast.swapped(model):
        raise KeyError("of the user")
    assert swap_parity.classes(model) == before


def test_copies_and_loaded_models_are_swapped_and_can_be_restored():
    model, x = small_model(), torch.randn(2, 3, 64, 64)
    before = run(model, x)
    bbfast.swap(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert swap_parity.classes(other) == swap_parity.classes(model)
        bbfast.restore(other)
        assert torch.equal(run(other, x), before)
    assert bbfast.plan(model).totals == {"already swapped": 13}


def test_who_was_reclassed_since_is_not_restored():
    model = small_model()
    bbfast.swap(model)
    fast = model.blocks[1][0]
    fast.__class__ = type("Somebodys", (type(fast),), {})
    before = swap_parity.classes(model)
    with pytest.raises(bbfast.SwapError, match=r"blocks\.1\.0: now a .*Somebodys"):
        bbfast.restore(model)
    assert swap_parity.classes(model) == before, "half restored"
    (row,) = bbfast.plan(model).skipped
    assert row.path == "blocks.1.0"
    assert "reclassed by somebody else since" in row.reason


# ---- all or nothing ----------------------------------------------------------------------------------------


def test_an_exception_in_the_middle_leaves_the_model_as_it_was():
    class Stubborn(InvertedResidual):
        """Refuses to become anything else, after the blocks before it did."""

        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = small_model()
    model.blocks[2][0].__class__ = Stubborn
    before = swap_parity.classes(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fast = type("FastStubborn", (_fast.Fast, Stubborn), {"objections": lambda block: []})
        monkeypatch.setitem(_fast._fast_classes, Stubborn, fast)
        monkeypatch.setattr(_fast, "objections_to", lambda block, cls: [])
        with pytest.raises(RuntimeError, match="no"):
            bbfast.swap(model)
    assert swap_parity.classes(model) == before


def test_strict_raises_before_anything_changes():
    model = small_model()
    model.blocks[1][0].conv_dw.register_forward_hook(lambda *_: None)
    before = swap_parity.classes(model)
    with pytest.raises(bbfast.SwapError, match=r"1 blocks? cannot be swapped:\n  blocks\.1\.0: conv_dw has forward"):
        bbfast.swap(model, strict=True)
    assert swap_parity.classes(model) == before


@pytest.mark.parametrize("function", [bbfast.plan, bbfast.swap, bbfast.restore])
def test_arguments_of_the_wrong_type(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        function({})


def test_options_of_the_wrong_type():
    with pytest.raises(TypeError, match="filter_fn must be callable or None, got str"):
        bbfast.swap(block(), filter_fn="blocks")
    with pytest.raises(TypeError, match="strict must be a bool, got int"):
        bbfast.swap(block(), strict=1)
    with pytest.raises(TypeError, match="model must be"), bbfast.swapped(None):
        pass


# ---- who is skipped, and why -------------------------------------------------------------------------------


def hooked(module: InvertedResidual):
    module.conv_dw.register_forward_hook(lambda *_: None)


def pre_hooked(module: InvertedResidual):
    module.bn1.register_forward_pre_hook(lambda *_: None)


def backward_hooked(module: InvertedResidual):
    module.bn1.act.register_full_backward_hook(lambda *_: None)


def weight_normed(module: InvertedResidual):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module.conv_pw)


def spectral_normed(module: InvertedResidual):
    nn.utils.spectral_norm(module.conv_pw)


def weight_normed_anew(module: InvertedResidual):
    parametrizations.weight_norm(module.conv_pw)


def parametrized(module: InvertedResidual):
    parametrize.register_parametrization(module.bn3, "weight", nn.Softplus())


def patched_on_the_instance(module: InvertedResidual):
    module.forward = types.MethodType(lambda self, x: x, module)


def patched_inside(module: InvertedResidual):
    module.bn2.forward = types.MethodType(lambda self, x: x, module.bn2)


def on_meta(module: InvertedResidual):
    module.to("meta")


def reflecting(module: InvertedResidual):
    module.conv_dw.padding_mode = "reflect"


def group_normed(module: InvertedResidual):
    module.bn2 = timm.layers.GroupNormAct(16, 2)


def lora_wrapped(module: InvertedResidual):
    cls = type("Conv2d", (nn.Conv2d,), {"__module__": "peft.tuners.lora.layer"})
    module.conv_pw.__class__ = cls


def quantised(module: InvertedResidual):
    module.conv_pw = torch.ao.nn.quantized.Conv2d(8, 16, 1)


def subclassed_inside(module: InvertedResidual):
    module.conv_pw.__class__ = type("MyConv", (nn.Conv2d,), {})


def dropping(module: InvertedResidual):
    module.bn1.drop = nn.Dropout(0.5)


def with_a_tensor_subclass(module: InvertedResidual):
    class Packed(torch.Tensor):
        pass

    weight = module.conv_pw.weight.detach().as_subclass(Packed)
    module.conv_pw.weight = nn.Parameter(weight)


REASONS = {
    hooked: "conv_dw has forward hooks, which the fused op would not run",
    pre_hooked: "bn1 has forward pre-hooks",
    backward_hooked: r"bn1\.act has backward hooks",
    weight_normed: r"conv_pw has weight_norm \(a forward pre-hook\)",
    spectral_normed: r"conv_pw has spectral_norm \(a forward pre-hook\)",
    weight_normed_anew: "conv_pw has a parametrized weight",
    parametrized: "bn3 has a parametrized weight",
    patched_on_the_instance: "it has a forward of its own",
    patched_inside: "bn2 has a forward of its own",
    on_meta: r"conv_pw\.weight is on the meta device",
    reflecting: "conv_dw has padding_mode='reflect'",
    group_normed: "bn2 is a .*GroupNormAct, which no fused op knows",
    lora_wrapped: r"conv_pw is wrapped by an adapter of weights \(peft",
    quantised: "conv_pw is quantised",
    subclassed_inside: "conv_pw is a MyConv, a subclass of Conv2d",
    dropping: "bn1 drops values between norm and activation",
    with_a_tensor_subclass: r"conv_pw\.weight is a Packed, not a plain tensor",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_blocks_that_cannot_run_fused_are_skipped(change):
    module = block()
    change(module)
    before = type(module)
    row = bbfast.plan(module).rows[0]
    assert (row.path, row.status, row.new) == ("", "skipped", "")
    assert re.search(REASONS[change], row.reason), row.reason
    bbfast.swap(module)
    assert type(module) is before


def test_inner_blocks_of_a_skipped_block_are_swapped():
    module = block()
    module.conv_pw.register_forward_hook(lambda *_: None)
    report = bbfast.swap(module)
    assert [row.path for row in report.swapped][:2] == ["bn1", "bn2"]


def test_subclasses_are_reported_and_left_alone():
    class MyResidual(InvertedResidual):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(MyResidual(8, 8), InvertedResidual(8, 8)).eval()
    report = bbfast.swap(model)
    assert report.skipped[0].path == "0"
    assert "a subclass of InvertedResidual" in report.skipped[0].reason
    assert type(model[0]) is MyResidual
    assert type(model[1]) is not InvertedResidual


def test_unsupported_blocks_are_reported():
    model = timm.models._efficientnet_blocks.CondConvResidual(8, 8, num_experts=2)
    row = bbfast.plan(model).rows[0]
    assert (row.status, row.path) == ("skipped", "")
    assert "mix their weights anew" in row.reason


def test_filter_gets_module_and_path():
    model = small_model()
    seen = {}

    def only_second_stage(module, path):
        seen[path] = type(module)
        return path.startswith("blocks.1.")

    report = bbfast.swap(model, filter_fn=only_second_stage)
    assert [row.path for row in report.swapped] == ["blocks.1.0", "blocks.1.1"]
    assert {row.reason for row in report.skipped} == {"filter_fn said no"}
    assert seen["blocks.0.0"] is DepthwiseSeparableConv


@pytest.mark.parametrize("wrap", [lambda forward: lambda self, x: x, None], ids=["replaced", "wrapped"])
def test_a_class_that_somebody_patched_is_skipped(monkeypatch, wrap):
    original = InvertedResidual.forward

    @functools.wraps(original)
    def wrapped(self, x):
        return 2 * original(self, x)

    monkeypatch.setattr(InvertedResidual, "forward", wrapped if wrap is None else wrap(original))
    row = bbfast.plan(block()).rows[0]
    assert row.status == "skipped"
    assert "InvertedResidual.forward is not the code of timm" in row.reason


def test_a_layer_that_somebody_patched_is_skipped(monkeypatch):
    monkeypatch.setattr(BatchNormAct2d, "forward", lambda self, x: x)
    assert "BatchNormAct2d.forward is not the code of timm" in bbfast.plan(block()).rows[0].reason
    monkeypatch.undo()
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: x)
    assert "Conv2d.forward was replaced after bbfast was imported" in bbfast.plan(block()).rows[0].reason


# ---- what changes after the swap ---------------------------------------------------------------------------


def replace_bn(module: InvertedResidual):
    module.bn2 = swap_parity.randomise(timm.layers.GroupNormAct(16, 2))


def wrap_conv(module: InvertedResidual):
    module.conv_pw = nn.Sequential(module.conv_pw, nn.Tanh())


def leave_out_conv(module: InvertedResidual):
    module.conv_dw = nn.Identity()


def leave_out_bn(module: InvertedResidual):
    module.bn3 = nn.Identity()


def put_an_activation_for_a_norm(module: InvertedResidual):
    module.bn2 = module.bn3 = nn.ReLU6()


def count_calls(module: InvertedResidual):
    module.conv_pw.register_forward_hook(lambda module, args, output: 2 * output)


LATER = [weight_normed, weight_normed_anew, spectral_normed, patched_inside, count_calls, replace_bn, subclassed_inside]
MISPLACED = [wrap_conv, leave_out_conv, leave_out_bn, put_an_activation_for_a_norm]


@pytest.mark.parametrize("change", MISPLACED, ids=lambda change: change.__name__)
def test_layers_in_places_where_they_are_not_expected(change):
    module, x = block(), images()
    change(module)
    before = run(module, x)
    bbfast.swap(module)
    torch.testing.assert_close(run(module, x), before)


@pytest.mark.parametrize("change", LATER + MISPLACED, ids=lambda change: change.__name__)
def test_what_is_hung_on_a_block_after_the_swap_counts(change):
    module = block()
    bbfast.swap(module)
    x = images()
    change(module)
    ours = run(module, x)
    bbfast.restore(module)
    torch.testing.assert_close(ours, run(module, x))


def test_global_hooks_see_inner_modules():
    module, seen = block(), []
    bbfast.swap(module)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        run(module, images())
    finally:
        handle.remove()
    assert nn.Conv2d in seen


def test_parameters_that_change_after_the_swap_count():
    module, x = block(), images()
    bbfast.swap(module)
    plain = copy.deepcopy(module)
    bbfast.restore(plain)
    with torch.no_grad():
        for model in (module, plain):
            model.conv_pw.weight.mul_(2)
            model.bn2.running_mean.add_(1)
            model.bn2.eps = 0.1
    torch.testing.assert_close(run(module, x), run(plain, x))


class Tripled(nn.Module):
    def forward(self, x):
        return 3 * x


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Sequential(Tripled())], ids=["activation", "container"])
def test_what_stands_in_for_stochastic_depth_runs(module):
    inverted, x = block(), images()
    inverted.drop_path = module
    before = run(inverted, x)
    assert "drop_path is not a layer of stochastic depth" in bbfast.plan(inverted).rows[0].reason
    bbfast.swap(inverted)
    torch.testing.assert_close(run(inverted, x), before)
    bbfast.restore(inverted)
    inverted.drop_path = nn.Identity()
    bbfast.swap(inverted)
    assert _fast.is_fast(type(inverted))
    inverted.drop_path = module
    torch.testing.assert_close(run(inverted, x), before)


def test_a_dropout_put_into_a_norm_after_the_swap_runs():
    for module in (block(), swap_parity.randomise(BatchNormAct2d(8))):
        bbfast.swap(module)
        assert _fast.is_fast(type(module))
        norm = getattr(module, "bn1", module)
        norm.drop = nn.Tanh()
        x = images()
        ours = run(module.eval(), x)
        bbfast.restore(module)
        torch.testing.assert_close(ours, run(module, x))


def test_squeeze_and_excite_of_another_shape_runs_itself():
    module = swap_parity.randomise(InvertedResidual(8, 8, se_layer=SqueezeExcite)).eval()
    x = images()
    bbfast.swap(module)
    module.se.conv_reduce.padding, module.se.conv_expand.stride = (1, 1), (3, 3)
    ours = run(module, x)
    bbfast.restore(module)
    torch.testing.assert_close(ours, run(module, x))


def test_another_softmax_and_another_layer_scale_run():
    attention = SwinTransformerBlock(8, (12, 10), num_heads=2, window_size=4)
    scaled = UniversalInvertedResidual(8, 8, layer_scale_init_value=0.5)
    for module, x in ((attention, torch.randn(2, 12, 10, 8)), (scaled, images())):
        module = swap_parity.randomise(module).eval()
        bbfast.swap(module)
        assert _fast.is_fast(type(module))
        if module is attention:
            module.attn.fused_attn, module.attn.softmax = False, nn.Sigmoid()
        else:
            module.layer_scale = nn.ReLU()
        ours = run(module, x)
        bbfast.restore(module)
        torch.testing.assert_close(ours, run(module, x))


def test_arguments_may_be_named_as_the_foreign_forward_names_them():
    model, x = swap_parity.randomise(conv_run()).eval(), images()
    with torch.no_grad(), swap_parity.backend("torch"):
        before = model(input=x)
        bbfast.swap(model)
        torch.testing.assert_close(model(input=x), before)


def test_sums_under_autocast_stay_as_wide_as_they_were():
    module, x = block(), images()
    with torch.autocast("cpu", torch.bfloat16):
        before = run(module, x)
        bbfast.swap(module)
        ours = run(module, x)
    assert ours.dtype == before.dtype == torch.float32
    torch.testing.assert_close(ours, before, rtol=0.05, atol=0.05)


# ---- where models are swapped ------------------------------------------------------------------------------


def test_shared_blocks_stay_shared():
    inner = block()
    model = nn.ModuleList([inner, nn.Sequential(inner), nn.Identity()])
    assert only_row(bbfast.swap(model)).path == "0"
    assert model[0] is model[1][0] is inner
    bbfast.restore(model)
    assert type(inner) is InvertedResidual


def test_swap_in_inference_mode_without_gradients_and_in_a_thread():
    x = images()
    for context in (torch.no_grad, torch.inference_mode):
        module = block()
        before = run(module, x)
        with context():
            bbfast.swap(module)
        torch.testing.assert_close(run(module, x), before)
    module = block()
    thread = threading.Thread(target=bbfast.swap, args=(module,))
    thread.start()
    thread.join()
    assert _fast.is_fast(type(module))


def test_state_dicts_go_both_ways():
    plain, other = small_model(), small_model()
    bbfast.swap(other)
    x = torch.randn(2, 3, 64, 64)
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(run(other, x), run(plain, x))
    third = small_model()
    third.load_state_dict(other.state_dict())
    assert torch.equal(run(third, x), run(plain, x))


def test_a_model_of_ones_own():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model("mobilenetv3_small_050", features_only=True, out_indices=(1, 3))
            self.neck = nn.ModuleList([conv_run(16), conv_run(24)])

        def forward(self, x):
            return [neck(feature) for neck, feature in zip(self.neck, self.body(x))]

    model = Detector().eval()
    neck = [feature.shape[1] for feature in model.body(torch.randn(1, 3, 64, 64))]
    model.neck = nn.ModuleList([conv_run(channels) for channels in neck])
    swap_parity.randomise(model.eval())
    x = torch.randn(2, 3, 64, 64)
    before = run(model, x)
    report = bbfast.swap(model)
    assert {row.path.partition(".")[0] for row in report.swapped} == {"body", "neck"}
    for ours, theirs in zip(run(model, x), before):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scripting_says_to_restore_first():
    model = small_model()
    bbfast.swap(model)
    before = swap_parity.classes(model)
    with pytest.raises(RuntimeError, match=r"call bbfast\.restore\(model\)"):
        torch.jit.script(model)
    assert swap_parity.classes(model) == before


# ---- the report --------------------------------------------------------------------------------------------


def test_report_as_text_and_dict():
    model = small_model()
    model.blocks[1][0].conv_dw.register_forward_hook(lambda *_: None)
    plan = bbfast.plan(model)
    lines = str(plan).splitlines()
    assert lines[0].split() == ["path", "class", "status", "reason"]
    assert any("InvertedResidual -> FastInvertedResidual" in line and "swapped" in line for line in lines)
    assert any(line.startswith("blocks.1.0 ") and "skipped" in line and "forward hooks" in line for line in lines)
    assert lines[-1].startswith("plan (nothing was changed): ")
    as_dict = json.loads(json.dumps(plan.to_dict()))
    assert as_dict["totals"] == plan.totals
    assert as_dict["rows"][0].keys() == {"path", "old", "new", "status", "reason"}
    assert as_dict["dry_run"] is True


def test_report_of_a_model_without_blocks():
    report = bbfast.swap(nn.Linear(2, 3))
    assert report.rows == ()
    assert str(report) == "no block of this model is one that bbfast knows a fast class for"


# ---- the code that was read --------------------------------------------------------------------------------


def test_fingerprints_see_code_and_nothing_else():
    source = "def f(x):\n    return x + 1\n"
    same = 'def f(x):\n    """Adds."""\n\n    # one\n    return x  +  1\n'
    assert fingerprint_of_source(source) == fingerprint_of_source(same)
    assert fingerprint_of_source(source) != fingerprint_of_source(source.replace("+", "-"))
    assert fingerprint_of_source("def f(x):\n    if x:\n        x = 1\n    y = 2\n") != fingerprint_of_source(
        "def f(x):\n    if x:\n        x = 1\n        y = 2\n"
    )


def test_recorded_sources_are_what_runs():
    from pathlib import Path

    root = Path(timm.__file__).parents[1]
    name = "timm.models._efficientnet_blocks.InvertedResidual.forward"
    found = fingerprint_of_source(record_sources.source_of(name, root))
    assert found == fingerprint(InvertedResidual.forward)
    assert timm.__version__ in known_sources("timm")[name][found]
    assert record_sources.source_of("timm.models._efficientnet_blocks.Nothing.forward", root) is None


def test_every_recorded_name_is_one_that_adapters_ask_for():
    assert set(known_sources("timm")) == set(record_sources.names_read("timm"))
