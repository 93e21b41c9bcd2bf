"""transformers' models, swapped: the blocks that are found, the numbers that stay."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numerics
import parity
import pytest
import swap_parity
import torch
from torch import nn

import bbfast

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# ---- small models with random weights ------------------------------------------------------------------------


def resnet(**arguments):
    arguments = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1], **arguments}
    return transformers.ResNetModel(transformers.ResNetConfig(**arguments))


def regnet(**arguments):
    arguments = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1], "groups_width": 8, **arguments}
    return transformers.RegNetModel(transformers.RegNetConfig(**arguments))


SWIN = {
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.3,
    "patch_size": 2,
    "image_size": (27, 34),  # maps of 14 x 17 and 7 x 9 patches: each is padded for its windows
}


def swin(**arguments):
    return transformers.SwinModel(transformers.SwinConfig(**{**SWIN, **arguments}))


def swin_classifier(**arguments):
    return transformers.SwinForImageClassification(transformers.SwinConfig(**{**SWIN, "num_labels": 7, **arguments}))


def swin_backbone(**arguments):
    config = transformers.SwinConfig(**{**SWIN, "out_features": ["stage1", "stage2"], **arguments})
    return transformers.SwinBackbone(config)


def donut(**arguments):
    return transformers.DonutSwinModel(transformers.DonutSwinConfig(**{**SWIN, **arguments}))


def maskformer_swin(**arguments):
    from transformers.models.maskformer import modeling_maskformer_swin

    config = transformers.MaskFormerSwinConfig(**{**SWIN, **arguments})
    return modeling_maskformer_swin.MaskFormerSwinModel(config)


CONVNEXT = {"hidden_sizes": [8, 12], "depths": [2, 1], "num_stages": 2, "drop_path_rate": 0.3}


def convnext(**arguments):
    arguments = {**CONVNEXT, "layer_scale_init_value": 1e-6, **arguments}
    return transformers.ConvNextModel(transformers.ConvNextConfig(**arguments))


def convnextv2_classifier(**arguments):
    config = transformers.ConvNextV2Config(**{**CONVNEXT, "num_labels": 7, **arguments})
    return transformers.ConvNextV2ForImageClassification(config)


def mobilenet_v1(**arguments):
    config = transformers.MobileNetV1Config(depth_multiplier=0.25, min_depth=8, **arguments)
    return transformers.MobileNetV1Model(config)


def mobilenet_v2(**arguments):
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, expand_ratio=2, **arguments)
    return transformers.MobileNetV2Model(config)


def efficientnet(**arguments):
    config = transformers.EfficientNetConfig(
        in_channels=[32, 8, 16],
        out_channels=[8, 16, 16],
        kernel_sizes=[3, 5, 3],
        strides=[1, 2, 1],
        num_block_repeats=[1, 2, 2],
        expand_ratios=[1, 3, 2],
        depthwise_padding=[1],
        hidden_dim=1280,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        **{"drop_connect_rate": 0.0, **arguments},
    )
    return transformers.EfficientNetModel(config)


def last(output):
    return output.last_hidden_state


def all_maps(output):
    return torch.cat([feature_map.flatten(1) for feature_map in output.feature_maps], dim=1)


def pooled(output):
    return output.pooler_output


RESNET = {"ResNetConvLayer": 4, "ResNetShortCut": 2, "ResNetBasicLayer": 3}
REGNET = {"RegNetConvLayer": 7, "RegNetShortCut": 2}
MOBILENET_V2 = {"MobileNetV2ConvLayer": 42, "MobileNetV2InvertedResidual": 10}
MODELS = {
    "swin": (swin, SWIN["image_size"], {"SwinLayer": 4}, last),
    "swin_classifier": (
        lambda: swin_classifier(qkv_bias=False, hidden_act="relu"),
        (48, 64),
        {"SwinLayer": 4},
        lambda output: output.logits,
    ),
    "swin_backbone": (swin_backbone, SWIN["image_size"], {"SwinLayer": 4}, all_maps),
    # Fewer tokens than channels: results of q, k and v are put together, not their weights.
    "swin_few_tokens": (
        lambda: swin(embed_dim=64, depths=[2], num_heads=[4], window_size=3),
        (6, 8),
        {"SwinLayer": 2},
        last,
    ),
    "donut": (donut, SWIN["image_size"], {"DonutSwinLayer": 4}, last),
    # Its window does not shrink with the map, and its shift stays: here they are wider than a map.
    "maskformer_swin": (maskformer_swin, (13, 18), {"MaskFormerSwinLayer": 4}, last),
    "resnet_basic": (lambda: resnet(layer_type="basic"), (33, 46), RESNET, last),
    "resnet_bottleneck": (
        lambda: resnet(layer_type="bottleneck", hidden_act="silu"),
        (33, 46),
        {"ResNetConvLayer": 7, "ResNetShortCut": 2, "ResNetBottleNeckLayer": 3},
        last,
    ),
    "regnet_x": (lambda: regnet(layer_type="x"), (33, 46), {**REGNET, "RegNetXLayer": 3}, last),
    "regnet_y": (lambda: regnet(layer_type="y"), (33, 46), {**REGNET, "RegNetYLayer": 3}, last),
    "convnext": (convnext, (40, 56), {"ConvNextLayer": 3}, pooled),
    "convnext_unscaled": (
        lambda: convnext(layer_scale_init_value=0.0, drop_path_rate=0.0, hidden_act="relu"),
        (40, 56),
        {"ConvNextLayer": 3},
        pooled,
    ),
    "convnextv2": (convnextv2_classifier, (40, 56), {"ConvNextV2Layer": 3}, lambda output: output.logits),
    "efficientnet": (
        efficientnet,
        (45, 64),
        {"EfficientNetBlock": 5, "EfficientNetExpansionLayer": 4, "EfficientNetFinalBlockLayer": 5},
        last,
    ),
    # Features are dropped where its sums are, and its activation is none that the ops know.
    "efficientnet_mish": (
        lambda: efficientnet(drop_connect_rate=0.5, hidden_act="mish"),
        (45, 64),
        {"EfficientNetBlock": 5, "EfficientNetExpansionLayer": 4, "EfficientNetFinalBlockLayer": 5},
        last,
    ),
    "mobilenet_v1": (mobilenet_v1, (45, 64), {"MobileNetV1ConvLayer": 27}, last),
    "mobilenet_v1_padded_evenly": (
        lambda: mobilenet_v1(tf_padding=False),
        (45, 64),
        {"MobileNetV1ConvLayer": 27},
        last,
    ),
    "mobilenet_v2": (mobilenet_v2, (45, 64), MOBILENET_V2, last),
    "mobilenet_v2_dilated": (
        lambda: mobilenet_v2(output_stride=8, tf_padding=False, hidden_act="hardswish"),
        (45, 64),
        MOBILENET_V2,
        last,
    ),
    "mobilenet_v2_dilated_tensorflow": (
        lambda: mobilenet_v2(output_stride=8, first_layer_is_expansion=False),
        (45, 64),
        {**MOBILENET_V2, "MobileNetV2ConvLayer": 43},
        last,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    build, size, blocks, pick = MODELS[name]
    # A backbone has a norm at its end that nobody asks for, and so a parameter without gradient.
    swap_parity.assert_swap_keeps_numbers(build, size, blocks, pick=pick, train="backbone" not in name)


# ---- what else can be asked of a model -------------------------------------------------------------------------


def swapped_pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model with random weights in double precision, in evaluation, and a swapped copy of it."""
    plain = swap_parity.randomise(model).double().eval()
    swapped = copy.deepcopy(plain)
    assert not bbfast.swap(swapped, strict=True).skipped
    return plain, swapped


def images(model_size=SWIN["image_size"], batch=2):
    return torch.randn(batch, 3, *model_size, dtype=torch.float64)


def assert_same_tensors(ours, theirs):
    """Compares nested tuples and dicts of tensors to nine digits."""
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    elif hasattr(theirs, "items"):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same_tensors(ours[key], value)
    else:
        assert isinstance(theirs, tuple) and len(ours) == len(theirs)
        for our, their in zip(ours, theirs):
            assert_same_tensors(our, their)


@pytest.mark.parametrize("build", [swin, convnext, regnet, mobilenet_v2])
def test_hidden_states_are_the_same(build):
    plain, swapped = swapped_pair(build())
    x = images()
    with torch.no_grad():
        for arguments in ({"output_hidden_states": True}, {"return_dict": False}):
            assert_same_tensors(swapped(x, **arguments), plain(x, **arguments))


def test_weights_of_attention_are_handed_out():
    plain, swapped = swapped_pair(donut())
    x = images()
    with torch.no_grad():
        outputs = swapped(x, output_attentions=True)
        assert len(outputs.attentions) == 2
        assert_same_tensors(outputs, plain(x, output_attentions=True))


def test_windows_never_left_out():
    """With always_partition a shifted layer keeps shift and window on a map that is no longer than the window."""
    plain, swapped = swapped_pair(donut())
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = (
            model.encoder.layers[0].blocks[1](x, (4, 4), False, True) for model in (swapped, plain)
        )  # output_attentions=False, always_partition=True
        assert_same_tensors(ours, theirs)
        assert swapped.encoder.layers[0].blocks[1].shift_size == 2
        ours, theirs = (model.encoder.layers[0].blocks[1](x, (4, 4)) for model in (swapped, plain))
        assert_same_tensors(ours, theirs)
    assert swapped.encoder.layers[0].blocks[1].shift_size == 0


class OneLayer(nn.Module):
    """A layer of transformers on maps of 7 x 9 tokens."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, (7, 9))[0]


def test_layer_of_clap():
    from transformers.models.clap.modeling_clap import ClapAudioLayer

    config = transformers.ClapAudioConfig(window_size=4, attention_probs_dropout_prob=0.0)
    plain, swapped = swapped_pair(OneLayer(ClapAudioLayer(config, 8, (7, 9), 2, drop_path_rate=0.3, shift_size=2)))
    x, grad_out = torch.randn(2, 4, 63, 8, dtype=torch.float64)
    steps = [parity.training_step(model, x, grad_out) for model in (swapped, plain)]
    parity.assert_equal_to_nine_digits(*steps)


def test_map_smaller_than_the_window_fails_as_it_did():
    plain, swapped = swapped_pair(swin())
    x = images((6, 6))
    for model in (plain, swapped):
        with pytest.raises(RuntimeError, match="size"):
            model(x)


@pytest.mark.parametrize("build", [swin, donut])
@pytest.mark.parametrize("rate", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
def test_dropped_features_are_the_same(build, rate):
    plain, swapped = swapped_pair(build(**{rate: 0.5}))
    x, grad_out = images(), torch.randn(2, 63, 16, dtype=torch.float64)
    steps = [parity.training_step(Last(model), x, grad_out) for model in (swapped, plain)]
    parity.assert_equal_to_nine_digits(*steps)


class Last(nn.Module):
    """A model whose output is its last hidden state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).last_hidden_state


@pytest.mark.parametrize("build", [swin, donut])
def test_gradient_checkpointing(build):
    plain, swapped = swapped_pair(build())
    runs = []
    layer = swapped.encoder.layers[0].blocks[0]
    layer.layernorm_before.register_forward_hook(lambda *_: runs.append(1))
    swapped.gradient_checkpointing_enable()
    x, grad_out = images(), torch.randn(2, 63, 16, dtype=torch.float64)
    steps = [parity.training_step(Last(model), x, grad_out) for model in (swapped, plain)]
    parity.assert_equal_to_nine_digits(*steps)
    assert len(runs) > 1, "the layer did not run again in the backward pass"


def test_swapped_model_is_saved_as_what_it_was(tmp_path):
    model = swap_parity.randomise(swin_classifier()).eval()
    x = torch.randn(1, 3, *SWIN["image_size"])
    exact_model = copy.deepcopy(model).double()
    with torch.no_grad():
        exact, before = exact_model(x.double()).logits, model(x).logits
    bbfast.swap(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["SwinForImageClassification"]
    loaded, notes = transformers.SwinForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    with torch.no_grad():
        numerics.assert_within_rule("logits", loaded.eval()(x).logits, exact, before)
        bbfast.swap(loaded)
        numerics.assert_within_rule("logits of the swapped one", loaded(x).logits, exact, before)


def test_compiled_in_one_graph():
    plain, swapped = swapped_pair(swin())
    x = images()
    compiled = torch.compile(swapped.encoder.layers[0], fullgraph=True, backend="aot_eager")
    tokens = torch.randn(2, 14 * 17, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_same_tensors(compiled(tokens, (14, 17))[:2], plain.encoder.layers[0](tokens, (14, 17))[:2])
        assert_same_tensors(swapped(x), plain(x))


@pytest.mark.thorough
def test_nothing_is_imported_that_the_user_did_not_import():
    code = """
import sys, transformers
model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
before = {name for name in sys.modules if name.startswith("transformers")}
import bbfast
assert bbfast.plan(model).swapped
print(sorted({name for name in sys.modules if name.startswith("transformers")} - before))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- linear layers with something to them ------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """What adapters of weights put around a linear layer."""

    def __init__(self, base_layer: nn.Linear, rate: float):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, dtype=torch.float64)
        self.up = nn.Linear(2, base_layer.out_features, dtype=torch.float64)
        self.dropout = nn.Dropout(rate)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(self.dropout(x)))


LoraLinear.__module__ = "adapters.lora.layer"


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_lora(rate):
    model = swin(drop_path_rate=0.0)
    for stage in model.encoder.layers:
        for block in stage.blocks:
            for name in ("q_proj", "v_proj", "o_proj"):
                setattr(block.attention, name, LoraLinear(getattr(block.attention, name), rate))
    plain, swapped = swapped_pair(model)
    x, grad_out = images(), torch.randn(2, 63, 16, dtype=torch.float64)
    steps = [parity.training_step(Last(model), x, grad_out) for model in (swapped, plain)]
    parity.assert_equal_to_nine_digits(*steps)


def test_lora_after_the_swap():
    plain, swapped = swapped_pair(donut())
    torch.manual_seed(3)
    wrapped = LoraLinear(swapped.encoder.layers[0].blocks[1].attention.self.key, 0.0)
    swapped.encoder.layers[0].blocks[1].attention.self.key = wrapped
    plain.encoder.layers[0].blocks[1].attention.self.key = copy.deepcopy(wrapped)
    x = images()
    with torch.no_grad():
        assert_same_tensors(swapped(x), plain(x))


def test_one_bias_missing():
    plain, swapped = swapped_pair(swin())
    for model in (plain, swapped):
        model.encoder.layers[0].blocks[1].attention.k_proj.bias = None
    x = images()
    with torch.no_grad():
        assert_same_tensors(swapped(x), plain(x))


# ---- what is skipped ---------------------------------------------------------------------------------------------


def skipped(model: nn.Module, path: str) -> str:
    return next(row.reason for row in bbfast.plan(model).skipped if row.path == path)


BLOCK = "encoder.layers.0.blocks.1"


def test_attention_of_somebodys_choice_is_skipped():
    model = swin()
    bbfast.swap(model)
    model.set_attn_implementation("eager")
    x = torch.randn(1, 3, *SWIN["image_size"])
    with torch.no_grad():
        assert len(model(x, output_attentions=True).attentions) == 2
    bbfast.restore(model)
    assert "'eager' attention" in skipped(model, BLOCK)


@pytest.mark.parametrize(
    "build, inner",
    [
        (swin, "attention"),
        (swin, "attention.q_proj"),
        (swin, "attention.o_proj"),
        (swin, "attention.relative_position_bias"),
        (swin, "dropout"),
        (swin, "layernorm_after"),
        (donut, "attention.self"),
        (donut, "attention.self.value"),
        (donut, "attention.self.dropout"),
        (donut, "attention.output"),
        (donut, "attention.output.dense"),
        (donut, "drop_path"),
    ],
)
def test_hooks_on_parts_of_the_attention(build, inner):
    """A hook is a reason before a swap, and after it one to run the foreign forward."""
    plain, swapped = swapped_pair(build())
    seen = {swapped: [], plain: []}
    for model, shapes in seen.items():

        def hook(module, args, output, shapes=shapes):
            shapes.append([getattr(value, "shape", value) for value in args])

        model.get_submodule(f"{BLOCK}.{inner}").register_forward_hook(hook)
    x = images()
    with torch.no_grad():
        assert_same_tensors(swapped(x), plain(x))
    assert seen[plain] and seen[swapped] == seen[plain]
    assert f"{inner} has forward hooks" in skipped(plain, BLOCK)


def test_linear_layers_that_nobody_knows():
    model = swin()
    model.encoder.layers[0].blocks[0].attention.q_proj = nn.Bilinear(8, 8, 8)
    assert "q_proj is a torch.nn.modules.linear.Bilinear" in skipped(model, "encoder.layers.0.blocks.0")
    model.encoder.layers[0].blocks[1].attention.q_proj = nn.Identity()
    assert "q_proj is a layer of class Identity; only linear ones" in skipped(model, BLOCK)
    model = donut()
    model.encoder.layers[0].blocks[1].attention.self.value = nn.Identity()
    assert "value is a layer of class Identity; only linear ones" in skipped(model, BLOCK)


class MixesTokens(nn.Sequential):
    """Nothing that acts on each token alone."""

    def forward(self, x):
        return super().forward(x) + x.cumsum(1)


@pytest.mark.parametrize("build, name", [(swin, "attention.o_proj"), (donut, "attention.output.dense")])
def test_layers_that_nobody_knows_after_the_swap(build, name):
    plain, swapped = swapped_pair(build())
    for model in (plain, swapped):
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(f"{BLOCK}.{parent}")
        setattr(parent, child, MixesTokens(getattr(parent, child)))
    x = images()
    with torch.no_grad():
        assert_same_tensors(swapped(x), plain(x))


def test_patched_layer(monkeypatch):
    from transformers.models.swin.modeling_swin import SwinLayer

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states, None

    monkeypatch.setattr(SwinLayer, "forward", forward)
    assert "SwinLayer.forward is not the code of transformers" in skipped(swin(), BLOCK)


def test_activation_before_the_sum():
    model = resnet(layer_type="basic")
    layer = model.encoder.stages[0].layers[0]
    layer.layer[1].activation = nn.ReLU()
    assert "layer.1 has an activation" in skipped(model, "encoder.stages.0.layers.0")
    layer.layer[1].activation = nn.Identity()
    plain, swapped = swapped_pair(model)
    for each in (plain, swapped):
        each.encoder.stages[0].layers[0].layer[1].activation = nn.ReLU()
    x = images()
    with torch.no_grad():
        assert_same_tensors(swapped(x), plain(x))


def test_padding_that_no_op_knows():
    model = mobilenet_v2()
    layer = model.layer[0].conv_3x3
    layer.convolution.dilation = (2, 2)
    assert "pads in a way of its own" in skipped(model, "layer.0.conv_3x3")


def test_second_version_of_swin_is_skipped():
    config = transformers.Swinv2Config(embed_dim=8, depths=[1], num_heads=[2], window_size=4, image_size=16)
    report = bbfast.plan(transformers.Swinv2Model(config))
    assert [row.reason for row in report.skipped] and "cosines" in report.skipped[0].reason
