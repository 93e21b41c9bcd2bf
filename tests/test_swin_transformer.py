"""Swin against timm's of the same name, with all parameters randomised."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import bbfast
from bbfast import dispatch
from bbfast.models._swin_weights import resample_patch_embed
from bbfast.nn._relative_position import resize_relative_position_bias_table

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

NAMES = bbfast.list_models(module="swin_transformer")
TINY = "swin_tiny_patch4_window7_224"
# Two blocks a stage, few channels: every path of a Swin in a fraction of its time.
SHALLOW = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "num_classes": 5}

pytestmark = pytest.mark.usefixtures("reference_backend")


def twins(name: str = TINY, **arguments) -> tuple[nn.Module, nn.Module]:
    """bbfast's and timm's, double precision, the same random weights."""
    state = random_state(name, **arguments)
    return tuple(make(library, name, state, torch.float64, **arguments).eval() for library in (bbfast, timm))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# ---- parity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_same_structure_as_timm(name):
    ours, theirs = on_meta(bbfast, name), on_meta(timm, name)
    for model in (ours, theirs):
        model.shapes = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
        model.layout = [
            (block.window_size, block.shift_size, block.attn.scale, getattr(block.drop_path1, "drop_prob", 0.0))
            for stage in model.layers
            for block in stage.blocks
        ]
    for attribute in ("shapes", "layout", "num_classes", "num_features", "head_hidden_size", "in_chans"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("feature_info", "output_fmt", "global_pool"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.group_matcher(coarse=True) == theirs.group_matcher(coarse=True)
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.pretrained_cfg.items() <= theirs.pretrained_cfg.items()


@pytest.mark.parametrize("name", NAMES)
def test_forward_agrees(name):
    """With two blocks a stage, one of each kind; the others are the same again."""
    assert_forward_agrees(name, (64, 92), batch=1, img_size=(64, 92), depths=(2, 2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_whole_models_agree(name):
    assert_forward_agrees(name, (64, 92), batch=1, img_size=(64, 92))


def test_full_size_agrees():
    assert_forward_agrees(TINY, (224, 224))


@pytest.mark.parametrize(
    "name",
    [TINY, *(pytest.param(n, marks=pytest.mark.slow) for n in ("swin_s3_tiny_224", "swin_small_patch4_window7_224"))],
)
def test_training_agrees(name):
    depths = (2, 2, 6, 2) if name == "swin_small_patch4_window7_224" else None
    changes = {} if depths is None else {"depths": depths}
    assert_training_agrees(name, (116, 96), batch=2, img_size=(116, 96), **changes)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"dynamic_img_size": True}, [(224, 224), (256, 192), (60, 100), (32, 32)]),
        ({"strict_img_size": False, "img_size": 256}, [(256, 256), (224, 228)]),
        ({"img_size": 112}, [(112, 112)]),
        ({"img_size": 112, "always_partition": True}, [(112, 112)]),
        ({"img_size": (96, 224), "always_partition": True, "strict_img_size": False}, [(96, 224), (92, 60)]),
        ({"img_size": 96, "window_size": (4, 8)}, [(96, 96)]),
        ({"img_size": 96, "window_size": [(4, 8), 6, 3, 2]}, [(96, 96)]),
        ({"img_size": 90, "patch_size": 5}, [(90, 90)]),
        ({"img_size": (55, 70)}, [(55, 70)]),  # patches leave pixels over
        ({"img_size": 64, "head_dim": 12, "qkv_bias": False, "mlp_ratio": (2.0, 3.0, 4.0, 1.5)}, [(64, 64)]),
        ({"img_size": 64, "in_chans": 1, "global_pool": "catavgmax"}, [(64, 64)]),
        ({"img_size": 64, "num_classes": 0, "global_pool": ""}, [(64, 64)]),
        ({"img_size": 64, "norm_layer": nn.RMSNorm}, [(64, 64)]),
    ],
    ids=str,
)
def test_sizes_and_windows_agree(arguments, sizes):
    """One model after the other size through the same modules; shifts and windows are those of its construction."""
    arguments = {**SHALLOW, **arguments}
    ours, theirs = twins(**arguments)
    for size in sizes:
        x = torch.randn(2, arguments.get("in_chans", 3), *size)
        assert_same(forward(ours, x), forward(theirs, x))


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": (256, 192)},
        {"img_size": (128, 160), "window_size": 4},
        {"img_size": 160, "window_size": (4, 5)},
        {"img_size": 256, "window_ratio": 8},
        {"img_size": 96, "always_partition": True},
        {"patch_size": 8},
        {},
    ],
    ids=str,
)
def test_set_input_size_agrees(change):
    ours, theirs = twins(**SHALLOW)
    for model in (ours, theirs):
        model.set_input_size(**change)
    assert ours.feature_info == theirs.feature_info
    size = theirs.patch_embed.img_size
    x = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        # Tables are interpolated in single precision by timm, in double precision here.
        torch.testing.assert_close(ours(x.double()), theirs(x.double()), rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):  # windows keep their share of the grid from here on
        model.set_input_size(img_size=(size[0] * 2, size[1]) if isinstance(size, tuple) else (size * 2, size))
    for mine, other in zip(ours.layers, theirs.layers):
        assert [(b.window_size, b.shift_size) for b in mine.blocks] == [
            (b.window_size, b.shift_size) for b in other.blocks
        ]


def test_intermediates_agree():
    ours, theirs = twins(img_size=96, **SHALLOW)
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    for arguments in (
        {},
        {"indices": 2, "norm": True},
        {"indices": [-3, 0], "intermediates_only": True},
        {"indices": [0, 1], "stop_early": True},
    ):
        with torch.no_grad():
            mine, other = ours.forward_intermediates(x, **arguments), theirs.forward_intermediates(x, **arguments)
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_head_agrees():
    ours, theirs = twins(img_size=64, **SHALLOW)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features = ours.forward_features(x)
        assert_same(features, theirs.forward_features(x))
        assert_same(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
    for model in (ours, theirs):
        model.reset_classifier(0, "max")
    assert isinstance(ours.get_classifier(), nn.Identity)
    assert_same(forward(ours, x), forward(theirs, x))
    ours.reset_classifier(3)
    assert ours.num_classes == 3 and ours.get_classifier().weight.dtype == torch.float64
    assert ours(x).shape == (2, 3) and ours.global_pool == "max"


# ---- layers alone ----------------------------------------------------------------------------------------


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


@pytest.mark.parametrize("masked", [False, True])
def test_window_attention_agrees(masked):
    theirs = randomised(timm.models.swin_transformer.WindowAttention(24, 3, window_size=(4, 3)))
    ours = bbfast.nn.WindowAttention(24, 3, window_size=(4, 3)).double()
    ours.load_state_dict(theirs.state_dict())
    windows = torch.randn(6, 12, 24, dtype=torch.float64)
    mask = -100.0 * torch.randint(0, 2, (2, 12, 12)).double() if masked else None
    assert_same(ours(windows, mask), theirs(windows, mask))


@pytest.mark.parametrize("size", [(14, 14), (9, 17), (3, 20)])
def test_shifted_window_attention_agrees_with_torchvision(size):
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    theirs = randomised(ShiftedWindowAttention(24, [7, 7], [3, 3], 3))
    ours = bbfast.nn.ShiftedWindowAttention(24, 3, window_size=7, shift_size=3, pad_order="pad_then_shift").double()
    ours.load_state_dict({key: theirs.state_dict()[key] for key in ours.state_dict()})
    if size[0] <= 7:  # torchvision drops the shift of an axis that one window covers
        ours.shift_size = (0, 3)
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    assert_same(ours(x), theirs(x))


# ---- weights from elsewhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("window_sizes", [((7, 7), (12, 12)), ((12, 12), (7, 7)), ((7, 7), (4, 9)), ((3, 5), (8, 8))])
def test_resized_tables_agree(window_sizes):
    old, new = window_sizes
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 3)
    shape = ((2 * new[0] - 1) * (2 * new[1] - 1), 3)
    expected = timm.layers.resize_rel_pos_bias_table(table, new, shape, old_window_size=old)
    torch.testing.assert_close(resize_relative_position_bias_table(table, old, new), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch_size", [(8, 8), (2, 4)])
def test_resampled_filters_agree(patch_size):
    weight = torch.randn(6, 3, 4, 4)
    expected = timm.layers.resample_patch_embed(weight, patch_size)
    torch.testing.assert_close(resample_patch_embed(weight, patch_size), expected)


def test_checkpoint_of_the_authors(tmp_path):
    """Patch merging at the end of stages, `head.`, and buffers that follow from the window."""
    arguments = {"img_size": 64, **SHALLOW}
    state = random_state(TINY, **arguments)
    theirs = {
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }
    for key, value in state.items():
        stage, _, rest = key.removeprefix("layers.").partition(".")
        key = f"layers.{int(stage) - 1}.{rest}" if rest.startswith("downsample") else key
        theirs[key.replace("head.fc.", "head.")] = value
    torch.save({"model": theirs}, tmp_path / "swin.pth")
    model = bbfast.create_model(TINY, checkpoint_path=tmp_path / "swin.pth", **arguments)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_checkpoint_of_another_window(tmp_path):
    state = random_state(TINY, **SHALLOW)
    torch.save(state, tmp_path / "swin.pth")
    arguments = {**SHALLOW, "img_size": 384, "window_size": 12}
    ours = bbfast.create_model(TINY, checkpoint_path=tmp_path / "swin.pth", **arguments).eval()
    theirs = timm.create_model(TINY, **arguments).eval()
    theirs.load_state_dict(timm.models.swin_transformer.checkpoint_filter_fn(state, theirs))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-5)


def test_a_file_of_the_same_window_loads_as_it_is(tmp_path):
    """Its tables have as many rows as those of a square window would: 3 x 27 and 9 x 9."""
    arguments = {**SHALLOW, "img_size": 112, "window_size": (2, 14)}
    state = random_state(TINY, **arguments)
    torch.save(state, tmp_path / "swin.pth")
    loaded = bbfast.create_model(TINY, checkpoint_path=tmp_path / "swin.pth", **arguments).state_dict()
    assert state["layers.0.blocks.0.attn.relative_position_bias_table"].shape[0] == 81
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


# ---- life of a model -------------------------------------------------------------------------------------


def test_initialised_as_timm():
    ours, theirs = bbfast.create_model(TINY), timm.create_model(TINY)
    for (key, value), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
        noise = 6 / value.numel() ** 0.5
        if value.dim() < 2 and not key.startswith("patch_embed.proj"):
            assert torch.equal(value, other), key
        elif value.numel() > 100:
            # Not the deviation: torch's truncated normal distribution gives one value in 2**24 at its far bound.
            ours_spread, theirs_spread = value.abs().median().item(), other.abs().median().item()
            assert ours_spread == pytest.approx(theirs_spread, rel=2 * noise + 0.02), key


def test_grad_checkpointing_changes_nothing():
    arguments = {"img_size": 64, "drop_path_rate": 0.3, **SHALLOW}
    state, x, grad_out = random_state(TINY, **arguments), torch.randn(4, 3, 64, 64), torch.randn(4, 5)
    results = []
    for enable in (False, True):
        model = make(bbfast, TINY, state, torch.float64, **arguments)
        model.set_grad_checkpointing(enable)
        results.append(training_step(model, x, grad_out))
    assert_equal_to_nine_digits(*results)


@pytest.mark.slow
def test_attention_dropout_keeps_the_expectation():
    """With dropout of attention the map is cut and put together again; without any dropped it is the fused result."""
    arguments = {"img_size": (60, 92), **SHALLOW}
    state, x = random_state(TINY, **arguments), torch.randn(2, 3, 60, 92, dtype=torch.float64)
    model = make(bbfast, TINY, state, torch.float64, attn_drop_rate=0.5, drop_path_rate=0.0, **arguments)
    expected = model.eval()(x)
    model.train()
    assert not torch.allclose(model(x), expected)
    for module in model.modules():
        if isinstance(module, bbfast.nn.WindowAttention):
            module.attn_drop.p = 1e-300  # drops nothing, but takes the path
    assert_same(model(x), expected)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same(model(x), expected)


@pytest.mark.filterwarnings("ignore:add_layer_norm.* falls back", "ignore:drop_path_add.* falls back")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extension_in_the_model(dtype, monkeypatch):
    """The C++ attention gives the model's numbers, forward and backward, on maps that windows do not divide."""
    arguments = {"img_size": (60, 92), "drop_path_rate": 0.0, **SHALLOW}
    state, x, grad_out = random_state(TINY, **arguments), torch.randn(2, 3, 60, 92), torch.randn(2, 5)
    expected = training_step(make(timm, TINY, state, torch.float64, **arguments), x, grad_out)
    monkeypatch.setenv("BBFAST_BACKEND", "cpp")
    found = training_step(make(bbfast, TINY, state, dtype, **arguments), x, grad_out)
    assert dispatch.last_choices()["window_attention"].backend == "cpp"
    assert dispatch.last_choices()["window_attention_backward"].backend == "cpp"
    if dtype is torch.float64:
        assert_equal_to_nine_digits(found, expected)
        return
    for key, value in expected.items():
        assert (found[key].double() - value).abs().max() <= 1e-4 * value.abs().max() + 1e-6, key


def test_plain_attention_is_explained(monkeypatch):
    windows, mask = torch.randn(4, 49, 32), torch.randn(2, 49, 49)
    layer = bbfast.nn.ShiftedWindowAttention(32, 2, shift_size=3, attn_drop=0.1)
    layer(torch.randn(1, 9, 9, 32))
    choice = dispatch.last_choices()["window_attention"]
    assert choice == dispatch.Choice("torch", ("attn_drop=0.1 in training; no backend drops attention weights",))
    bbfast.nn.WindowAttention(32, 2).eval()(windows, mask)
    choice = dispatch.last_choices()["window_attention"]
    assert choice.backend == "torch" and "a mask was given" in choice.reasons[0]

    monkeypatch.setenv("BBFAST_STRICT", "1")  # no fallback where plain torch was asked for
    layer(torch.randn(1, 9, 9, 32))
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    with pytest.raises(dispatch.BackendUnavailableError, match=r"attn_drop=0\.1"):
        layer(torch.randn(1, 9, 9, 32))


def test_copies_and_layouts_compute_the_same():
    model = make(bbfast, TINY, random_state(TINY, img_size=64, **SHALLOW), img_size=64, **SHALLOW).eval()
    x = torch.randn(2, 3, 64, 64)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert torch.equal(forward(twin, x), forward(model, x))
    last = forward(copy.deepcopy(model).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, forward(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inference_compiles_for_any_size():
    """One graph, whether a map's sides are even or odd before patches are merged."""
    arguments = {"dynamic_img_size": True, **SHALLOW, "depths": (2, 1), "num_heads": (1, 2)}
    state = random_state(TINY, **arguments)
    model, compiled = (make(bbfast, TINY, state, torch.float64, **arguments) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in ((64, 96), (92, 60), (68, 72), (72, 68)):
        x = torch.randn(2, 3, *size)
        assert_same(forward(compiled, x), forward(model, x))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


def test_training_compiles_without_graph_breaks():
    """Shifted and whole windows on both sides of a merging of patches; further stages are the same again."""
    arguments = {"img_size": (60, 92), **SHALLOW, "depths": (2, 2), "num_heads": (1, 2)}
    state, x = random_state(TINY, **arguments), torch.randn(2, 3, 60, 92)
    model, compiled = (make(bbfast, TINY, state, torch.float64, **arguments) for _ in range(2))
    compiled.compile(fullgraph=True, backend="aot_eager")
    assert_equal_to_nine_digits(*(training_step(m, x, torch.ones(2, 5)) for m in (compiled, model)))


def test_empty_batch():
    assert bbfast.create_model(TINY, img_size=64, **SHALLOW).eval()(torch.randn(0, 3, 64, 64)).shape == (0, 5)


class Wrapped(nn.Module):
    """As adapters and quantization do it: a module in the place of a linear layer, without its attributes."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_qkv_may_be_replaced():
    layer, x = bbfast.nn.ShiftedWindowAttention(32, 2, shift_size=3).eval(), torch.randn(1, 9, 12, 32)
    nn.init.normal_(layer.qkv.bias)
    expected = layer(x)
    layer.qkv = Wrapped(layer.qkv)
    torch.testing.assert_close(layer(x), expected)


# ---- bad arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 7}, TypeError, "window"),
        ({"window_size": 0}, ValueError, "window_size=0"),
        ({"window_size": (7, 7, 7)}, ValueError, r"window_size=\(7, 7, 7\)"),
        ({"num_heads": (3, 6)}, ValueError, r"num_heads=\(3, 6\)"),
        ({"num_heads": (5, 5, 5, 5)}, ValueError, "num_heads=5 does not divide dim=96"),
        ({"drop_path_rate": 2}, ValueError, "drop_path_rate=2"),
        ({"mlp_ratio": (1.0, 2.0)}, ValueError, "mlp_ratio"),
        ({"global_pool": "median"}, ValueError, "global_pool='median'"),
        ({"num_classes": -1}, ValueError, "num_classes=-1"),
        ({"img_size": "large"}, TypeError, "img_size"),
        ({"img_size": 3}, ValueError, "img_size=3 is not allowed; it must be at least patch_size=4"),
        ({"window_size": 7.0}, TypeError, "window_size must be an int"),
        ({"num_heads": 4}, TypeError, "num_heads must be a tuple"),
        ({"depths": 2}, TypeError, "depths must be a tuple"),
        ({"depths": (), "num_heads": ()}, ValueError, "depths must not be empty"),
        ({"depths": (2, 2, 6, -1)}, ValueError, "depths=-1"),
        ({"embed_dim": "a"}, TypeError, "embed_dim must be an int"),
        ({"head_dim": 0}, ValueError, "head_dim=0"),
        ({"mlp_ratio": -1.0}, ValueError, r"mlp_ratio=-1\.0"),
        ({"mlp_ratio": 0.001}, ValueError, r"mlp_ratio=0\.001 leaves no hidden channel"),
        ({"attn_drop_rate": -1}, ValueError, "attn_drop_rate=-1"),
        ({"always_partition": "maybe"}, TypeError, "always_partition must be a bool"),
        ({"strict_img_size": 1}, TypeError, "strict_img_size must be a bool"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(TINY, **arguments)


@pytest.mark.parametrize(
    ("arguments", "x", "error", "message"),
    [
        ({}, torch.zeros(1, 3, 64, 64), ValueError, "64 x 64 pixels but the model was made for 224 x 224"),
        ({"dynamic_img_size": True}, torch.zeros(1, 3, 66, 64), ValueError, "66 pixels along H"),
        ({}, torch.zeros(1, 1, 224, 224), ValueError, r"x must have shape \[N, 3, H, W\]"),
        ({}, [1.0], TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_inputs_are_named(arguments, x, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(TINY, **{**SHALLOW, **arguments})(x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"img_size": "a", "patch_size": 8}, TypeError, "img_size"),
        ({"img_size": (1, 2, 3), "patch_size": 8}, ValueError, "img_size"),
        ({"img_size": 4, "patch_size": 8}, ValueError, "img_size=4 is not allowed"),
        ({"patch_size": 128}, ValueError, "at least patch_size=128"),
        ({"img_size": 128, "window_size": "7"}, TypeError, "window_size"),
        ({"img_size": 128, "window_ratio": 0}, ValueError, "window_ratio=0"),
        ({"img_size": 128, "always_partition": 1}, TypeError, "always_partition"),
    ],
    ids=str,
)
def test_refused_sizes_change_nothing(change, error, message):
    arguments = {"img_size": 64, **SHALLOW}
    model, x = make(bbfast, TINY, random_state(TINY, **arguments), **arguments).eval(), torch.randn(1, 3, 64, 64)
    expected = forward(model, x)
    with pytest.raises(error, match=message):
        model.set_input_size(**change)
    assert torch.equal(forward(model, x), expected)


@pytest.mark.parametrize("indices", [(0.5,), "a", 1.5])
def test_bad_indices_are_named(indices):
    with pytest.raises(TypeError, match=r"indices must (be an int or a tuple of|hold) ints"):
        bbfast.create_model(TINY, img_size=64, **SHALLOW).forward_intermediates(torch.zeros(1, 3, 64, 64), indices)


@pytest.mark.parametrize(
    ("windows", "mask", "error", "message"),
    [
        ("x", None, TypeError, "windows must be a torch.Tensor"),
        (torch.zeros(4, 48, 32), None, ValueError, r"windows must have shape \[B \* nW, 49, 32\]"),
        (torch.zeros(4, 49, 32), torch.ones(2, 49, 49, dtype=torch.bool), TypeError, r"mask has dtype torch\.bool"),
        (torch.zeros(4, 49, 32), torch.zeros(3, 49, 49), ValueError, "a divisor of the 4 in all"),
        (torch.zeros(4, 49, 32), torch.zeros(2, 7, 49), ValueError, r"mask must have shape \[nW, 49, 49\]"),
    ],
)
def test_bad_windows_are_named(windows, mask, error, message):
    with pytest.raises(error, match=message):
        bbfast.nn.WindowAttention(32, 2)(windows, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shift_size": 7}, "shift_size=7 must be smaller than window_size=7"),
        ({"pad_order": "nope"}, "pad_order='nope' is not known"),
        ({"head_dim": -3}, "head_dim=-3"),
    ],
)
def test_bad_layer_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bbfast.nn.ShiftedWindowAttention(32, 2, **arguments)
