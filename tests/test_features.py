"""Feature extractors against timm's of the same name, with all parameters and statistics randomised."""

from __future__ import annotations

import copy
import io
import pickle
import re

import numerics
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bbfast
from bbfast import models

timm = pytest.importorskip("timm")
from parity import (  # noqa: E402
    assert_equal_to_nine_digits,
    forward,
    make,
    on_meta,
    random_state,
    training_step,
)

TINY = "swin_tiny_patch4_window7_224"
SMALL = "mobilenetv3_small_050"  # its first map is the stem's
# Two blocks a stage, few channels: every path of a Swin in a fraction of its time.
SHALLOW = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "img_size": (64, 92)}
NAMES = bbfast.list_models()
_HUGE = r"_(b[5-8]|l2)$|swin_large|regnety_(640|1280|2560)|convnext\w*_(large|x+large|huge)"
HUGE = [name for name in NAMES if re.search(_HUGE, name)]
ONE_OF_EACH_KIND = [SMALL, "mobilenetv3_large_075", "tf_efficientnet_b0", "efficientnet_lite0", "mobilenetv2_035", TINY]
QUICK = [*ONE_OF_EACH_KIND, "mobilenetv3_small_100", "mobilenetv3_rw", "mobilenetv2_110d", "efficientnet_b0"]
ONE_PER_FAMILY = [SMALL, "mobilenetv2_035", TINY]

pytestmark = pytest.mark.usefixtures("reference_backend", "one_thread")


def sized(name: str) -> dict:
    """The arguments that make `name` small."""
    return {"features_only": True, **(SHALLOW if name == TINY else {})}


def images(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *((64, 92) if name == TINY else (41, 33)))


def twins(name: str, **arguments) -> tuple[nn.Module, nn.Module]:
    """bbfast's and timm's extractor, double precision, the same random weights."""
    arguments = {**sized(name), **arguments}
    state = random_state(name, timm, **arguments)
    return tuple(make(library, name, state, torch.float64, **arguments).eval() for library in (bbfast, timm))


def whole_state(name: str) -> dict[str, torch.Tensor]:
    """Random weights of the classifying model."""
    return random_state(name, **{**sized(name), "features_only": False})


def assert_same_maps(ours, theirs, **tolerance) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


def assert_holds(model: nn.Module, whole: dict[str, torch.Tensor]) -> None:
    """That the extractor has the whole model's weights."""
    for key, value in model.state_dict().items():
        assert torch.equal(value, whole[key.replace("layers_", "layers.")]), key


# ---- parity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_same_structure_as_timm(name):
    ours, theirs = (on_meta(library, name, features_only=True) for library in (bbfast, timm))
    for model in (ours, theirs):
        model.shapes = [(key, value.shape) for key, value in model.state_dict().items()]
    assert ours.shapes == theirs.shapes
    assert_same_info(ours.feature_info, theirs.feature_info)
    assert ours.in_chans == theirs.in_chans
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.pretrained_cfg.items() <= theirs.pretrained_cfg.items()
    assert ours.pretrained_cfg["first_conv"]


def assert_same_info(ours, theirs) -> None:
    assert ours.info == theirs.info
    assert ours.out_indices == theirs.out_indices
    assert len(ours) == len(theirs)
    assert ours[1] == theirs[1]
    for idx in (None, 2, (3, 0), [-1]):
        for question in ("channels", "reduction", "module_name", "get_dicts"):
            assert getattr(ours, question)(idx=idx) == getattr(theirs, question)(idx=idx), (question, idx)
        assert ours.get("num_chs", idx) == theirs.get("num_chs", idx)
        assert ours.get_dicts(["module", "index"], idx) == theirs.get_dicts(["module", "index"], idx)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_maps_agree(name):
    assert_maps_agree(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in HUGE])
def test_all_maps_agree(name):
    size = (192, 192) if "384" in name else (128, 128) if "swin" in name else (65, 65)
    arguments = {"img_size": size} if "swin" in name else {}
    assert_maps_agree(name, torch.randn(1, 3, *size), features_only=True, **arguments)


def assert_maps_agree(name: str, x: torch.Tensor | None = None, **arguments) -> None:
    arguments = arguments or sized(name)
    x = images(name) if x is None else x
    state = random_state(name, **arguments)
    ours = forward(make(bbfast, name, state, **arguments), x)
    theirs = forward(make(timm, name, state, **arguments), x)
    exact = forward(make(timm, name, state, torch.float64, **arguments), x)
    assert isinstance(ours, list) and len(ours) == len(theirs)
    for index, maps in enumerate(zip(ours, exact, theirs)):
        numerics.assert_within_rule(f"map {index}", *maps)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [SMALL, "efficientnet_lite0"])
def test_fused_inference_agrees(name, memory_format, monkeypatch):
    """The blocks after a tap, which reuse memory in places, leave its map alone; its format is the images'."""
    monkeypatch.setenv("BBFAST_BACKEND", "onednn")
    state, x = random_state(name, features_only=True), images(name).contiguous(memory_format=memory_format)
    ours = forward(make(bbfast, name, state, features_only=True), x)
    theirs = forward(make(timm, name, state, torch.float64, features_only=True), x)
    assert_same_maps([y.double() for y in ours], theirs, rtol=1e-4, atol=1e-4)
    assert all(y.is_contiguous(memory_format=memory_format) for y in ours)


class Joined(nn.Module):
    """All maps in one tensor, each weighed differently."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([y.flatten(1) for y in self.model(x)], 1)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_gradients_agree(name):
    """Of input and parameters; with the same paths dropped."""
    x, results = images(name, batch=3), []
    for model in twins(name, drop_path_rate=0.3):
        model = Joined(model)
        if not results:
            grad_out = torch.randn_like(forward(model, x))
        results.append(training_step(model, x, grad_out))
    assert_equal_to_nine_digits(*results)


@pytest.mark.parametrize("out_indices", [(-1, 1), [0], 3, (2, 0, -1)], ids=str)
@pytest.mark.parametrize("name", [SMALL, TINY])
def test_out_indices_agree(name, out_indices):
    """Maps in the network's order, feature_info in that of out_indices."""
    # timm's MobileNets keep stages that no map needs, so they need weights that ours passes over.
    state = random_state(name, timm, **sized(name), out_indices=out_indices)
    ours, theirs = (
        make(library, name, state, torch.float64, **sized(name), out_indices=out_indices) for library in (bbfast, timm)
    )
    assert_same_info(ours.feature_info, theirs.feature_info)
    x = images(name)
    assert_same_maps(forward(ours, x), forward(theirs, x))


@pytest.mark.parametrize("out_indices", [None, (-1, 1)])
def test_dict_of_maps_agrees(out_indices):
    ours, theirs = twins(TINY, feature_cls="dict", out_indices=out_indices)
    x = images(TINY)
    mine, others = forward(ours, x), forward(theirs, x)
    assert list(mine) == list(others)
    assert_same_maps(mine.values(), others.values())


def test_dict_of_maps_where_timm_has_lists_only():
    ours, theirs = twins(SMALL)
    model = make(bbfast, SMALL, theirs.state_dict(), torch.float64, **sized(SMALL), feature_cls="DICT")
    x = images(SMALL)
    maps = forward(model, x)
    assert list(maps) == ["0", "1", "2", "3", "4"]
    assert_same_maps(maps.values(), forward(theirs, x))
    assert type(ours) is models.FeatureListNet and type(model) is models.FeatureDictNet


@pytest.mark.parametrize("name", [SMALL, TINY])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_fmt(name, memory_format):
    own, theirs = twins(name)
    assert own.output_fmt == ("NHWC" if name == TINY else "NCHW")
    x = images(name).contiguous(memory_format=memory_format)
    expected = forward(theirs, x)
    for output_fmt in ("NCHW", "NHWC"):
        model = make(bbfast, name, own.state_dict(), torch.float64, **sized(name), output_fmt=output_fmt)
        assert model.output_fmt == output_fmt
        order = (0, 1, 2, 3) if output_fmt == own.output_fmt else (0, 3, 1, 2) if name == TINY else (0, 2, 3, 1)
        maps = forward(model, x)
        assert_same_maps(maps, [y.permute(order) for y in expected])
        layout = memory_format if output_fmt == "NCHW" else torch.contiguous_format
        assert all(y.is_contiguous(memory_format=layout) for y in maps)


def test_nchw_maps_of_swin_are_those_of_timms_getter():
    arguments = {**sized(TINY), "out_indices": (0, 2)}
    state = random_state(TINY, timm, **arguments, feature_cls="getter")
    theirs = make(timm, TINY, state, torch.float64, **arguments, feature_cls="getter")
    state = {key.removeprefix("model."): value for key, value in state.items()}
    ours = make(bbfast, TINY, state, torch.float64, **arguments, output_fmt="NCHW")
    x = images(TINY)
    assert_same_maps(forward(ours, x), forward(theirs, x))


def test_sizes_and_channels_of_the_input():
    for name, arguments in ((TINY, {"strict_img_size": False}), (SMALL, {})):
        ours, theirs = twins(name, in_chans=1, **arguments)
        for size in ((64, 64), (100, 60)):
            x = torch.randn(1, 1, *size)
            assert_same_maps(forward(ours, x), forward(theirs, x))


# ---- only what is needed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@pytest.mark.parametrize("out_indices", [None, 1, (0,), (1, 2), (-2,)], ids=str)
def test_every_parameter_is_used(name, out_indices):
    model = bbfast.create_model(name, **sized(name), out_indices=out_indices)
    sum(y.sum() for y in model(images(name, batch=4))).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_nothing_else_is_kept():
    model = bbfast.create_model(TINY, **sized(TINY), out_indices=(1,))
    assert [name for name, _ in model.named_children()] == ["patch_embed", "layers_0", "layers_1"]
    model = bbfast.create_model("efficientnet_b0", features_only=True, out_indices=(0, 2))
    assert [name for name, _ in model.named_children()] == ["conv_stem", "bn1", "blocks"]
    assert len(model.blocks) == 3
    model = bbfast.create_model(SMALL, features_only=True, out_indices=(0,))
    assert [name for name, _ in model.named_children()] == ["conv_stem", "bn1"]


# ---- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SMALL, TINY])
def test_weights_are_exchangeable_with_timm(name):
    ours, theirs = (library.create_model(name, **sized(name)) for library in (bbfast, timm))
    state = random_state(name, **sized(name))
    for source, target in ((ours, theirs), (theirs, ours)):
        source.load_state_dict(state)
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(source.state_dict(), strict=True)
        assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("name", [SMALL, TINY])
@pytest.mark.parametrize("out_indices", [None, (0, 2)])
def test_whole_models_weights(name, out_indices, tmp_path):
    """Through load_state_dict, alone and as a part, and from files: the whole model's, and the extractor's own."""
    arguments = {**sized(name), "out_indices": out_indices}
    whole = whole_state(name)
    given = dict(whole)
    model = bbfast.create_model(name, **arguments)
    model.load_state_dict(whole, strict=True)
    assert_holds(model, whole)
    assert whole.keys() == given.keys()

    parts = nn.ModuleDict({"backbone": bbfast.create_model(name, **arguments)})
    parts.load_state_dict({f"backbone.{key}": value for key, value in whole.items()}, strict=True)
    assert_holds(parts["backbone"], whole)

    save_file(whole, tmp_path / "whole.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "own.pth")
    for file in ("whole.safetensors", "own.pth"):
        assert_holds(bbfast.create_model(name, **arguments, checkpoint_path=tmp_path / file), whole)


@pytest.mark.parametrize("name", [SMALL, TINY])
def test_weights_that_do_not_fit(name, tmp_path):
    whole = whole_state(name)
    model = bbfast.create_model(name, **sized(name))
    first = next(iter(whole))
    for damaged, message in (
        ({key: value for key, value in whole.items() if key != first}, f"missing keys: {first}"),
        ({**whole, "extra.weight": torch.zeros(1)}, "unexpected keys: extra.weight"),
        ({**whole, first: torch.zeros(3)}, f"wrong shapes: {first}"),
    ):
        with pytest.raises(RuntimeError, match=first if "extra" not in message else "extra.weight"):
            model.load_state_dict(damaged)
        torch.save(damaged, tmp_path / "damaged.pth")
        with pytest.raises(ValueError, match=message):
            models.load_checkpoint(model, tmp_path / "damaged.pth")


def test_checkpoint_of_swins_authors(tmp_path):
    """Patch merging at the end of stages, `head.`, and buffers that follow from the window."""
    whole = whole_state(TINY)
    theirs = {"layers.0.blocks.1.attn_mask": torch.zeros(1)}
    for key, value in whole.items():
        stage, _, rest = key.removeprefix("layers.").partition(".")
        key = f"layers.{int(stage) - 1}.{rest}" if rest.startswith("downsample") else key
        theirs[key.replace("head.fc.", "head.")] = value
    torch.save({"model": theirs}, tmp_path / "swin.pth")
    model = bbfast.create_model(TINY, **sized(TINY), out_indices=(1, 2), checkpoint_path=tmp_path / "swin.pth")
    assert_holds(model, whole)


def test_checkpoint_of_another_window(tmp_path):
    torch.save(random_state(TINY, **{**SHALLOW, "img_size": 224}), tmp_path / "swin.pth")
    arguments = {**SHALLOW, "img_size": 384, "window_size": 12, "checkpoint_path": tmp_path / "swin.pth"}
    assert_holds(
        bbfast.create_model(TINY, features_only=True, out_indices=2, **arguments),
        bbfast.create_model(TINY, **arguments).state_dict(),
    )


def test_pretrained():
    """The weights of the whole model, whatever its classes, adapted to the input's channels."""
    whole = random_state(SMALL)
    arguments = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": whole}, "features_only": True}
    assert_holds(bbfast.create_model(SMALL, out_indices=(0, 3), **arguments), whole)
    gray = bbfast.create_model(SMALL, in_chans=1, num_classes=10, **arguments)
    torch.testing.assert_close(gray.conv_stem.weight.detach(), whole["conv_stem.weight"].sum(1, keepdim=True))


# ---- life of an extractor --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SMALL, TINY])
def test_copies_compute_the_same(name, tmp_path):
    model, _ = twins(name, out_indices=(1, 3))
    x, saved = images(name), io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    whole = random_state(name, **{**sized(name), "features_only": False})
    torch.save(whole, tmp_path / "whole.pth")
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert_same_maps(forward(twin, x), forward(model, x))
        assert twin.feature_info.get_dicts() == model.feature_info.get_dicts()
        models.load_checkpoint(twin.float(), tmp_path / "whole.pth")
        assert_holds(twin, whole)


def test_extractor_holds_its_own_tensors_only():
    """A pickle that carried the whole model along would be as large as that."""
    whole = bbfast.create_model(TINY, **{**SHALLOW, "num_classes": 0})
    model = bbfast.create_model(TINY, **sized(TINY), out_indices=(0,))
    assert len(pickle.dumps(model)) < len(pickle.dumps(whole)) / 10


@pytest.mark.parametrize("name", [SMALL, TINY])
def test_compiles_without_graph_breaks(name):
    arguments = {**sized(name), "out_indices": (0, 1), **({"depths": (1, 1, 1, 1)} if name == TINY else {})}
    state, x = random_state(name, **arguments), images(name, batch=3)
    eager, compiled = (Joined(make(bbfast, name, state, torch.float64, **arguments)) for _ in range(2))
    compiled.compile(fullgraph=True, backend="aot_eager")
    grad_out = torch.randn_like(forward(eager, x))
    assert_equal_to_nine_digits(training_step(compiled, x, grad_out), training_step(eager, x, grad_out))


@pytest.mark.parametrize("name", [SMALL, TINY])
def test_grad_checkpointing_changes_nothing(name, monkeypatch):
    arguments = {**sized(name), "drop_path_rate": 0.3}
    state, x = random_state(name, **arguments), images(name, batch=3)
    plain, recomputing = (Joined(make(bbfast, name, state, torch.float64, **arguments)) for _ in range(2))
    recomputing.model.set_grad_checkpointing()
    grad_out = torch.randn_like(forward(plain, x))
    expected = training_step(plain, x, grad_out)
    stages = []
    run = models.FeatureDictNet._run
    monkeypatch.setattr(models.FeatureDictNet, "_run", lambda *args: [stages.append(args[1]), run(*args)][1])
    results = training_step(recomputing, x, grad_out)
    assert len(stages) == 2 * len(set(stages)) - 1  # each twice but the stem
    assert_equal_to_nine_digits(*({k: v for k, v in r.items() if "buffer" not in k} for r in (results, expected)))
    stages.clear()
    recomputing.model.set_grad_checkpointing(False)
    training_step(recomputing, x, grad_out)
    assert len(stages) == len(set(stages))


def test_training_moves_statistics_and_evaluation_does_not():
    model = bbfast.create_model(SMALL, features_only=True)
    assert model.training
    before = copy.deepcopy(model.state_dict())
    model.eval()(images(SMALL))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.train()(images(SMALL, batch=4))
    assert not any(torch.equal(v, before[key]) for key, v in model.state_dict().items() if "running" in key)


def test_hooks_on_stages_run():
    for name, stage in ((SMALL, "blocks.1"), (TINY, "layers_1")):
        model, seen = bbfast.create_model(name, **sized(name)), []
        model.get_submodule(stage).register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        maps = model(images(name))
        assert any(torch.equal(seen[0], y) for y in maps)


def test_empty_batch():
    maps = bbfast.create_model(SMALL, features_only=True).eval()(torch.randn(0, 3, 64, 64))
    assert [tuple(y.shape) for y in maps[-2:]] == [(0, 24, 4, 4), (0, 288, 2, 2)]


class Net(nn.Module):
    """Of somebody else: steps that nothing is said of but their order and two maps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 2, stride=2))
        self.head = nn.Linear(5, 2)
        self.feature_info = [
            {"num_chs": 4, "reduction": 2, "module": "stem"},
            {"num_chs": 8, "reduction": 2, "module": "body.1"},
        ]


@pytest.mark.parametrize("flatten_sequential", [False, True])
def test_own_network(flatten_sequential):
    net, x = Net(), torch.randn(2, 3, 9, 9)
    model = models.FeatureListNet(net, flatten_sequential=flatten_sequential)
    first, second = model(x)
    assert torch.equal(first, net.stem(x)) and torch.equal(second, net.body[:2](net.stem(x)))
    last = "body_1.weight" if flatten_sequential else "body.1.weight"
    assert list(model.state_dict())[2] == last
    assert model.state_dict()[last].data_ptr() == net.body[1].weight.data_ptr()
    assert model.output_fmt == "NCHW" and model.pretrained_cfg == {}

    @models.register_model
    def own_net(pretrained=False, features_only=False, **arguments):
        return models.FeatureListNet(net, **arguments) if features_only else net

    try:
        assert len(bbfast.create_model("own_net", features_only=True, out_indices=(1,))(x)) == 1
    finally:
        models._registry._models.pop("own_net")


# ---- bad arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out_indices": (0, 5)}, ValueError, r"^out_indices=\(0, 5\) is not allowed: the model has 5 feature maps"),
        ({"out_indices": (-6,)}, ValueError, r"^out_indices=\(-6,\) .* the last 1 to 5 by an int, .* in -5\.\.4$"),
        ({"out_indices": (1, -4)}, ValueError, r"^out_indices=\(1, -4\) is not allowed: .* different ones"),
        ({"out_indices": ()}, ValueError, r"^out_indices=\(\) is not allowed"),
        ({"out_indices": 0}, ValueError, "^out_indices=0 is not allowed"),
        ({"out_indices": 6}, ValueError, "^out_indices=6 is not allowed"),
        ({"out_indices": -1}, ValueError, "^out_indices=-1 is not allowed"),
        ({"out_indices": True}, TypeError, "^out_indices must be an int or a tuple of ints, got bool$"),
        ({"out_indices": "12"}, TypeError, "^out_indices must be an int or a tuple of ints, got str$"),
        ({"out_indices": (0, 1.0)}, TypeError, r"^out_indices must hold ints only, got 1\.0$"),
        ({"out_indices": (False,)}, TypeError, "^out_indices must hold ints only, got False$"),
        ({"feature_cls": "getter"}, ValueError, "^feature_cls='getter' is not known; allowed: 'list', 'dict', Feature"),
        ({"feature_cls": 3}, TypeError, "^feature_cls=3 is no string and no feature extractor; allowed: 'list'"),
        ({"feature_cls": nn.ModuleDict}, TypeError, "^feature_cls=<class .* is no string and no feature extractor"),
        ({"output_fmt": "nchw"}, ValueError, "^output_fmt='nchw' is not allowed; it must be 'NCHW' or 'NHWC'$"),
        ({"features_only": 1}, TypeError, "^features_only must be a bool, got int$"),
        ({"features_only": False, "out_indices": (1,)}, TypeError, "^out_indices can only be given with features_only"),
        ({"features_only": False, "feature_cls": "dict", "output_fmt": "NCHW"}, TypeError, "^feature_cls and output_f"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(SMALL, **{"features_only": True, **arguments})


def test_bad_arguments_come_before_weights(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("fetched weights"))
    with pytest.raises(ValueError, match="out_indices"):
        bbfast.create_model(SMALL, pretrained=True, features_only=True, out_indices=9)


def test_network_whose_maps_are_not_there():
    net = Net()
    net.feature_info[1]["module"] = "body.1.inner"
    with pytest.raises(ValueError, match=r"^feature_info names body\.1\.inner, which Net has not$"):
        models.FeatureListNet(net)
    with pytest.raises(ValueError, match="the model has 0 feature maps"):
        models.FeatureListNet(nn.Identity(), 1)


def test_bad_images_are_named():
    for name in (SMALL, TINY):
        model = bbfast.create_model(name, **sized(name))
        with pytest.raises(TypeError, match=r"^x must be a torch\.Tensor, got list"):
            model([1])
        with pytest.raises(ValueError, match=r"x must have shape \[N, 3, H, W\], got \(1, 4, 64, 64\)"):
            model(torch.randn(1, 4, 64, 64))
