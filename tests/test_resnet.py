"""ResNet and its descendants against timm's of the same name, with all parameters and statistics randomised."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from functools import partial

import numerics
import pytest
import torch
from torch import nn

import bbfast
from bbfast.models._resnet_layers import BlurPool2d, DropBlock2d, EcaModule
from bbfast.models._resnet_pruned import PRUNED_CHANNELS, narrow
from bbfast.models._resnet_variants import PRUNED_VARIANTS, VARIANTS
from bbfast.models.resnet import BasicBlock, Bottleneck

timm = pytest.importorskip("timm")
from parity import (  # noqa: E402
    assert_equal_to_nine_digits,
    assert_forward_agrees,
    assert_training_agrees,
    by_error,
    forward,
    make,
    on_meta,
    random_state,
    rounded_anew,
    training_step,
)

NAMES = bbfast.list_models(module="resnet")
# A quarter of the channels and one or two blocks a stage: every path of a ResNet in a fraction of its time.
CHANNELS = (32, 64, 96, 128)
SMALL = {"layers": (2, 1, 1, 2), "channels": CHANNELS}
SHALLOW = {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64), "num_classes": 5}
# One of each path: blocks, stems, shortcuts, groups, attention, anti-aliasing, replaced pooling, norms.
ONE_OF_EACH_KIND = [
    "resnet18",
    "resnet50",
    "resnet50d",
    "resnet26t",
    "resnext50_32x4d",
    "seresnet50",
    "ecaresnet26t",
    "resnetblur18",
    "resnetaa50",
    "resnetrs50",
    "resnet50_gn",
    "senet154",
    "test_resnet",
]


def distinct() -> list[str]:
    """Names that differ by more than their depth."""
    kinds = {}
    for name, arguments in VARIANTS.items():
        kinds.setdefault(str({k: v for k, v in arguments.items() if k != "layers"}), name)
    return list(kinds.values())


def small(name: str) -> dict:
    """The arguments that make `name` small."""
    return {} if name == "test_resnet" or name in PRUNED_VARIANTS else SMALL


def sides(name: str) -> tuple[int, int]:
    """Of images; odd maps but where means of 2x2 pixels cannot have them."""
    return (32, 64) if "aa" in name else (33, 40)


pytestmark = pytest.mark.usefixtures("reference_backend", "one_thread")


def twins(name: str, theirs: dict | None = None, **arguments) -> tuple[nn.Module, nn.Module]:
    """bbfast's and timm's, double precision, the same random weights; `theirs` are arguments that timm calls so."""
    state = random_state(name, **arguments)
    ours = make(bbfast, name, state, torch.float64, **arguments)
    return ours.eval(), make(timm, name, state, torch.float64, **{**arguments, **(theirs or {})}).eval()


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# ---- parity ----------------------------------------------------------------------------------------------


def test_every_name_of_timm_is_there():
    assert timm.list_models(module="resnet") == NAMES
    assert sorted(NAMES) == sorted({**VARIANTS, **PRUNED_VARIANTS})


@pytest.mark.parametrize("name", NAMES)
def test_same_structure_as_timm(name):
    ours, theirs = on_meta(bbfast, name), on_meta(timm, name)
    assert describe(ours) == describe(theirs)
    attributes = ("num_classes", "num_features", "head_hidden_size", "in_chans", "drop_rate", "feature_info")
    for attribute in attributes:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.group_matcher(coarse=True) == theirs.group_matcher(coarse=True)
    assert ours.get_classifier() is ours.fc and ours.get_classifier(name_only=True) == "fc"
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.pretrained_cfg.items() <= theirs.pretrained_cfg.items()
    assert ours.get_parameter(f"{ours.pretrained_cfg['first_conv']}.weight").shape[1] == 3


def describe(model: nn.Module) -> list:
    """Keys with shapes and dtypes, in order, and the settings of every convolution and norm."""
    state = [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]
    convs = [
        (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        for conv in model.modules()
        if isinstance(conv, (nn.Conv1d, nn.Conv2d))
    ]
    norms = [(m.eps, m.momentum, m.affine) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    groups = [(m.eps, m.num_groups) for m in model.modules() if isinstance(m, nn.GroupNorm)]
    return [state, convs, norms, groups]


@pytest.mark.parametrize("name", NAMES)
def test_every_tag_agrees(name):
    """In timm's order, the default first."""
    ours, theirs = [], []
    for tag in timm.models.resnet.default_cfgs[name].tags:
        ours.append(bbfast.models.get_pretrained_cfg(f"{name}.{tag}").to_dict())
        theirs.append(timm.models.get_pretrained_cfg(f"{name}.{tag}").to_dict())
    for cfg, other in zip(ours, theirs):
        assert cfg.items() <= other.items()
    assert bbfast.models.get_pretrained_cfg(name).tag == theirs[0]["tag"]
    assert list(bbfast.models.get_arch_pretrained_cfgs(name)) == [f"{name}.{cfg['tag']}" for cfg in theirs]


WIDE = ("resnext101_32x16d", "resnext101_32x32d", "wide_resnet50_2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in WIDE else []) for n in distinct()])
def test_forward_agrees(name):
    """With few blocks and channels; more of them are the same again."""
    ours, theirs = twins(name, **small(name))
    x = torch.randn(2, 3, *sides(name))
    assert_same(forward(ours, x), forward(theirs, x))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "resnet18" else pytest.mark.slow) for n in NAMES])
def test_whole_models_agree(name):
    assert_forward_agrees(name, sides(name), batch=1)


def test_full_size_agrees():
    assert_forward_agrees("resnet18", (224, 224), batch=1)


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [(name, torch.contiguous_format) for name in ONE_OF_EACH_KIND] + [("seresnet50", torch.channels_last)],
)
def test_fused_inference_agrees(name, memory_format, monkeypatch):
    """With the CPU's kernels, which reuse memory in places; the images stay as they are.

    Maps are channels_last inside, where torch's own rounding is another.
    """
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    state = random_state(name, **small(name))
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=memory_format)
    before = x.clone()
    exact = forward(make(timm, name, state, torch.float64, **small(name)), x)
    theirs = forward(make(timm, name, state, **small(name)), x.contiguous(memory_format=torch.channels_last))
    numerics.assert_within_rule("logits", forward(make(bbfast, name, state, **small(name)), x), exact, theirs)
    assert torch.equal(x, before)


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_training_agrees(name):
    arguments = {} if name == "test_resnet" else {**SHALLOW, "channels": CHANNELS, "num_classes": 7}
    assert_training_agrees(name, (64, 72) if "aa" not in name else (64, 96), single=False, **arguments)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("seresnet50", marks=pytest.mark.slow)])
def test_training_in_single_precision_agrees(name):
    assert_training_agrees(name, (64, 72), **SMALL)


@pytest.mark.parametrize("name", ["resnet50", "resnetaa50", "seresnet50"])
def test_frozen_statistics_agree(name):
    """Gradients in eval mode."""
    assert_training_agrees(name, (64, 64), train=False, single=False, **{**SHALLOW, "num_classes": 7})


@pytest.mark.parametrize("size", [(64, 72), (160, 96)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_drop_block_agrees(name, size):
    """The same squares under one seed, on maps smaller and larger than they are."""
    arguments = {**SHALLOW, "num_classes": 7, "drop_block_rate": 0.4}
    assert_training_agrees(name, size, single=False, drop_path_rate=0.2, **arguments)
    state = random_state(name, **arguments)
    x, grad_out = torch.randn(3, 3, *size), torch.randn(3, 7)
    model, without = (
        make(bbfast, name, state, torch.float64, **{**arguments, "drop_block_rate": rate}) for rate in (0.4, 0.0)
    )
    assert not torch.allclose(
        training_step(model, x, grad_out)["output"], training_step(without, x, grad_out)["output"]
    )


@pytest.mark.parametrize("name", ["resnet50", "test_resnet"])
def test_drop_path_rates_follow_timm(name):
    ours, theirs = (on_meta(library, name, drop_path_rate=0.2) for library in (bbfast, timm))

    def rates(model):
        blocks = [block for stage in (1, 2, 3, 4) for block in getattr(model, f"layer{stage}")]
        return [None if block.drop_path is None else block.drop_path.drop_prob for block in blocks]

    assert rates(ours) == rates(theirs)
    assert rates(ours)[0] is None and rates(ours)[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        (torch.float64, (32, 64, 128, 256)),
        pytest.param(torch.float64, (64, 128, 256, 512), marks=pytest.mark.slow),
        pytest.param(torch.float32, (64, 128, 256, 512), marks=pytest.mark.slow),
    ],
)
def test_five_training_steps_agree(dtype, channels):
    """Loss, gradients and running statistics of ResNet-50, step by step, with SGD in between."""
    name, arguments = "resnet50", {"num_classes": 7, "channels": channels}
    state = random_state(name, **arguments)
    batches = [(torch.randn(4, 3, 64, 64), torch.randint(0, 7, (4,))) for _ in range(5)]
    exact = five_steps(make(timm, name, state, torch.float64, **arguments), batches)
    if dtype is torch.float64:
        ours = five_steps(make(bbfast, name, state, dtype, **arguments), batches)
        for mine, other in zip(ours, exact):
            assert_equal_to_nine_digits(mine, other)
        return
    # Single precision loses a few digits more in each step, by chance: see parity.assert_training_agrees.
    states = [state, rounded_anew(state), rounded_anew(state)]
    ours, theirs = (
        [five_steps(make(library, name, rounded, dtype, **arguments), batches) for rounded in states]
        for library in (bbfast, timm)
    )
    for step, expected in enumerate(exact):
        for key in ("loss", "gradient of fc.weight", "buffer bn1.running_var", "buffer layer4.2.bn3.running_mean"):
            mine = by_error([results[step][key] for results in ours], expected[key])[1]
            other = by_error([results[step][key] for results in theirs], expected[key])[-1]
            numerics.assert_within_rule(f"step {step}: {key}", mine, expected[key], other)


def five_steps(model: nn.Module, batches) -> list[dict]:
    """Loss, gradients and running statistics of each step."""
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
    results = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.to(dtype)), labels)
        loss.backward()
        results.append(
            {
                "loss": loss.detach(),
                **{f"gradient of {key}": value.grad.clone() for key, value in model.named_parameters()},
                **{f"buffer {key}": value.clone() for key, value in model.named_buffers()},
            }
        )
        optimizer.step()
    return results


def test_grad_checkpointing_changes_nothing():
    name, arguments = "seresnet50", {**SHALLOW, "drop_path_rate": 0.3, "drop_block_rate": 0.2}
    state, x, grad_out = random_state(name, **arguments), torch.randn(4, 3, 64, 64), torch.randn(4, 5)
    results = []
    for enable in (False, True):
        model = make(bbfast, name, state, torch.float64, **arguments)
        model.set_grad_checkpointing(enable)
        step = training_step(model, x, grad_out)
        results.append({key: value for key, value in step.items() if not key.startswith("buffer")})
    assert_equal_to_nine_digits(results[1], results[0])


def test_initialised_as_timm():
    for name in ("resnet26t", "seresnet18", "resnet50_gn"):
        arguments = {"layers": (1, 1, 1, 1)}
        ours, theirs = bbfast.create_model(name, **arguments), timm.create_model(name, **arguments)
        for (key, value), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
            if value.dim() < 2 and ".se." not in key and not key.startswith("fc"):
                assert torch.equal(value, other), key
            elif value.numel() > 100:
                noise = 6 / math.sqrt(value.numel())
                assert value.std().item() == pytest.approx(other.std().item(), rel=noise), key
    plain = bbfast.create_model("resnet18", zero_init_last=False)
    assert all(torch.equal(block.bn2.weight, torch.ones_like(block.bn2.weight)) for block in plain.layer1)
    assert not bbfast.create_model("resnet18").layer1[0].bn2.weight.any()


def test_synchronised_batch_norm_normalises_every_layer(monkeypatch):
    """Plain BatchNorms are torch's to convert; activations are not lost with them."""
    name, arguments = "resnet26d", SHALLOW
    state, x = random_state(name, **arguments), torch.randn(4, 3, 64, 64, dtype=torch.float64)
    expected = make(bbfast, name, state, torch.float64, **arguments)(x)
    model = make(bbfast, name, state, torch.float64, **arguments)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    synchronised = []

    def sync_forward(bn, z):  # torch's own wants processes and GPUs
        synchronised.append(bn)
        return nn.functional.batch_norm(z, None, None, bn.weight, bn.bias, True, eps=bn.eps)

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", sync_forward)
    assert_same(model(x), expected)
    assert set(synchronised) == {m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)}


# ---- what one can choose ---------------------------------------------------------------------------------


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "senet154", "resnetblur50d", "resnetaa50", "ecaresnet26t"])
def test_output_stride_agrees(name, output_stride):
    arguments = {**SHALLOW, "layers": (1, 1, 2, 2), "channels": CHANNELS, "output_stride": output_stride}
    ours, theirs = twins(name, **arguments)
    assert ours.feature_info == theirs.feature_info
    x = torch.randn(2, 3, 64, 96)
    assert_same(forward(ours, x), forward(theirs, x))
    with torch.no_grad():
        assert ours.forward_features(x.double()).shape[2:] == (64 // output_stride, 96 // output_stride)


TIMM_AA = {"avg": nn.AvgPool2d, "blur": timm.layers.BlurPool2d}


@pytest.mark.parametrize(
    ("name", "arguments", "theirs"),
    [
        ("resnet18", {"in_chans": 1}, {}),
        ("resnet26t", {"in_chans": 5}, {}),
        ("resnet50", {"act_layer": "silu"}, {}),
        ("seresnet50", {"act_layer": "gelu"}, {}),
        ("resnet26t", {"act_layer": "hard_swish"}, {}),
        ("resnetrs50", {"act_layer": "relu6", "norm_layer": "groupnorm"}, {}),
        ("resnet18", {"norm_layer": partial(nn.BatchNorm2d, eps=1e-2)}, {}),
        ("resnet18", {"aa_layer": "avg"}, {"aa_layer": TIMM_AA["avg"]}),
        ("resnet26t", {"aa_layer": "blur", "replace_stem_pool": True}, {"aa_layer": TIMM_AA["blur"]}),
        ("resnet50", {"aa_layer": "avg", "replace_stem_pool": True}, {"aa_layer": TIMM_AA["avg"]}),
        ("resnet50", {"replace_stem_pool": True, "avg_down": True}, {}),
        ("resnet50", {"cardinality": 8, "base_width": 16, "block_reduce_first": 2, "down_kernel_size": 3}, {}),
        ("resnet50", {"stem_width": 20, "stem_type": "deep_tiered"}, {}),
        ("resnet18", {"block_args": {"attn_layer": "eca"}}, {}),
        ("resnet18", {"block": Bottleneck}, {"block": timm.models.resnet.Bottleneck}),
        ("resnet18", {"block_reduce_first": 2}, {}),
        ("resnet18", {"global_pool": "catavgmax"}, {}),
        ("resnet18", {"num_classes": 0, "global_pool": ""}, {}),
    ],
    ids=str,
)
def test_choices_agree(name, arguments, theirs):
    arguments = {**SHALLOW, "channels": CHANNELS, **arguments}
    ours, other = twins(name, theirs, **arguments)
    x = torch.randn(2, arguments.get("in_chans", 3), 64, 96)
    assert_same(forward(ours, x), forward(other, x))
    assert ours.head_hidden_size == other.head_hidden_size and ours.in_chans == other.in_chans


def test_unfused_norms_are_not_confused_with_fused_ones():
    """What is no BatchNorm runs as it is, with the activation behind it."""
    arguments = {**SHALLOW, "norm_layer": lambda channels, device, dtype: nn.InstanceNorm2d(channels)}
    model = bbfast.create_model("resnet18", **arguments).eval()
    block, x = model.layer1[0], torch.randn(2, 64, 8, 8)
    conv, norm = block.downsample
    with torch.no_grad():
        y = torch.relu(block.bn1(block.conv1(x)))
        torch.testing.assert_close(block(x), torch.relu(block.bn2(block.conv2(y)) + norm(conv(x))))


# ---- the head, intermediates, features -------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fast"])
def test_head_agrees(pool):
    ours, theirs = twins("resnet18", **SHALLOW, global_pool=pool)
    x = torch.randn(2, 3, 64, 72, dtype=torch.float64)
    with torch.no_grad():
        features = ours.forward_features(x)
        assert features.shape[1] == ours.num_features
        assert_same(features, theirs.forward_features(x))
        assert_same(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))


def test_reset_classifier():
    model = bbfast.create_model("resnet26t", dtype=torch.bfloat16, **SHALLOW).eval()
    model.conv1[0].weight.requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    model.reset_classifier(3)
    assert model.num_classes == 3 and model.fc.weight.dtype == torch.bfloat16 and not model.fc.training
    assert not model.conv1[0].weight.requires_grad
    assert model(x).shape == (2, 3)
    model.reset_classifier(4, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features and model(x).shape == (2, 4)
    model.reset_classifier(0, "max")
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 2, 2)
    with pytest.raises(ValueError, match=r"global_pool=''.*num_classes=0, got 3"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="global_pool='median'"):
        model.reset_classifier(3, "median")
    assert model.num_classes == 0 and model.global_pool.pool_type == ""


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": 2},
        {"indices": [-3, 0], "intermediates_only": True},
        {"indices": [1, 2], "stop_early": True},
        {"indices": (0,), "stop_early": True, "norm": True},
    ],
    ids=str,
)
def test_intermediates_agree(arguments):
    ours, theirs = twins("resnet26t", **SHALLOW)
    x = torch.randn(2, 3, 64, 72, dtype=torch.float64)
    with torch.no_grad():
        mine, other = ours.forward_intermediates(x, **arguments), theirs.forward_intermediates(x, **arguments)
    if arguments.get("stop_early"):
        # The first is the last map made, which timm lets pass the pooling where that is the stem's.
        mine, other = mine[1], other[1]
    assert_same(mine, other)


@pytest.mark.parametrize("prune_head", [True, False])
@pytest.mark.parametrize("indices", [1, 3, [0], [1, 2], [-2], [0, 4]], ids=str)
@pytest.mark.parametrize("name", ["resnetrs50"])
def test_pruning_agrees(name, indices, prune_head):
    ours, theirs = twins(name, **SHALLOW)
    kept = [model.prune_intermediate_layers(indices, prune_head=prune_head) for model in (ours, theirs)]
    assert kept[0] == kept[1]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for attribute in ("num_features", "head_hidden_size", "num_classes"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    x = torch.randn(2, 3, 64, 64)
    assert_same(forward(ours, x), forward(theirs, x))
    with torch.no_grad():
        maps = [model.forward_intermediates(x.double(), kept[0], intermediates_only=True) for model in (ours, theirs)]
    assert_same(*maps)


@pytest.mark.parametrize(
    ("name", "out_indices"),
    [("resnet26t", indices) for indices in (None, (0,), (1, 3), (4, 2), (-1, 0), 2)]
    + [("resnet18", (2, 4)), ("resnetrs50", None), ("resnetblur18", (0, 1)), ("resnetaa50", (0, 2))],
    ids=str,
)
def test_features_agree(name, out_indices):
    arguments = {"layers": SHALLOW["layers"], "channels": SHALLOW["channels"], "features_only": True}
    if out_indices is not None:
        arguments["out_indices"] = out_indices
    state = random_state(name, timm, **arguments)
    ours, theirs = (make(library, name, state, torch.float64, **arguments).eval() for library in (bbfast, timm))
    for question in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, question)() == getattr(theirs.feature_info, question)()
    x = torch.randn(2, 3, 64, 96)
    maps = forward(ours, x)
    assert_same(maps, forward(theirs, x))
    shapes = [(info["num_chs"], 64 // info["reduction"], 96 // info["reduction"]) for info in ours.feature_info.info]
    indices = sorted(index % 5 for index in ours.feature_info.out_indices)
    assert [tuple(y.shape[1:]) for y in maps] == [shapes[index] for index in indices]


# ---- layers alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 3, 5, 7])
def test_drop_block_alone(block_size):
    from timm.layers import DropBlock2d as TimmDropBlock2d

    ours, theirs = DropBlock2d(0.3, block_size, 0.7), TimmDropBlock2d(0.3, block_size, 0.7)
    for dtype, size in ((torch.float64, (9, 12)), (torch.float32, (4, 6)), (torch.bfloat16, (5, 2))):
        x = torch.randn(3, 4, *size, dtype=dtype)
        results = []
        for layer in (ours, theirs):
            torch.manual_seed(3)
            results.append(layer.train()(x))
            assert layer.eval()(x) is x
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("stride", [1, 2])
def test_blur_pool_alone(stride):
    theirs = timm.layers.BlurPool2d(5, stride=stride)
    for size in ((7, 8), (2, 9)):
        x = torch.randn(2, 5, *size)
        torch.testing.assert_close(BlurPool2d(stride)(x), theirs(x))
    assert not BlurPool2d().state_dict()


@pytest.mark.parametrize("channels", [16, 64, 256, 512, 1000, 2048])
def test_channel_attention_alone(channels):
    theirs = timm.layers.EcaModule(channels).double()
    ours = EcaModule(channels).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64)
    assert_same(ours(x), theirs(x))
    with torch.no_grad():
        assert_same(ours(x.clone()), theirs(x))


# ---- life of a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet50", "resnetrs50", "resnetblur18", "ecaresnet26t"])
def test_copies_compute_the_same(name):
    model = make(bbfast, name, random_state(name, **SHALLOW), **SHALLOW).eval()
    x = torch.randn(2, 3, 64, 64)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert torch.equal(forward(twin, x), forward(model, x))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("resnet50", torch.float16)]
    + [
        pytest.param(name, torch.bfloat16, marks=[] if name in ("resnetrs50", "resnetblur18") else pytest.mark.slow)
        for name in ONE_OF_EACH_KIND
    ],
)
def test_half_precision_agrees(name, dtype):
    """Converted models and those made so, beside timm's converted."""
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in small_state(name).items()}
    x = torch.randn(2, 3, 64, 96)
    exact = forward(make(timm, name, state, torch.float64, **small(name)), x.to(dtype))
    theirs = forward(make(timm, name, state, **small(name)).to(dtype), x)
    made = make(bbfast, name, state, dtype, **small(name))
    converted = make(bbfast, name, state, **small(name)).to(dtype)
    assert all(t.dtype in (dtype, torch.int64) for t in [*made.parameters(), *made.buffers()])
    ours = forward(made, x)
    assert torch.equal(ours, forward(converted, x))
    numerics.assert_within_rule("logits", ours, exact, theirs)


def small_state(name: str) -> dict:
    return random_state(name, **small(name))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_features_keep_the_memory_format(memory_format, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=memory_format)
    model = bbfast.create_model("resnet18", **SHALLOW).eval()
    extractor = bbfast.create_model("resnet18", features_only=True, layers=(1, 1, 1, 1)).eval()
    with torch.inference_mode():
        features = model.forward_features(x)
        assert features.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert all(y.is_contiguous(memory_format=memory_format) for y in extractor(x))


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnetrs50", "resnetblur18", "resnet26t"))],
)
def test_inference_compiles_without_graph_breaks(name):
    model, x = make(bbfast, name, random_state(name, **SHALLOW), **SHALLOW), torch.randn(2, 3, 64, 64)
    eager = forward(model, x)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(model, x), eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet50", "ecaresnet26t"))]
)
def test_training_compiles_without_graph_breaks(name):
    """Without dropped paths and squares, whose random numbers a graph draws in its own way."""
    state, x, grad_out = random_state(name, **SHALLOW), torch.randn(3, 3, 64, 64), torch.randn(3, 5)
    compiled_model = make(bbfast, name, state, torch.float64, **SHALLOW)
    compiled_model.compile(fullgraph=True, backend="aot_eager")
    compiled = training_step(compiled_model, x, grad_out)
    assert_equal_to_nine_digits(
        compiled, training_step(make(bbfast, name, state, torch.float64, **SHALLOW), x, grad_out)
    )


@pytest.mark.slow
def test_dropping_compiles_without_graph_breaks():
    arguments = {**SHALLOW, "drop_path_rate": 0.3, "drop_block_rate": 0.3}
    model = bbfast.create_model("resnet18", **arguments)
    model.compile(fullgraph=True, backend="aot_eager")
    model(torch.randn(3, 3, 64, 64)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", ["resnet18", "ecaresnet26t", "resnetrs50", "resnetblur18", "resnetaa50", "resnet50_gn"]
)
def test_fx_traces_inference(name):
    arguments = {**SHALLOW, "channels": CHANNELS}
    model = make(bbfast, name, random_state(name, **arguments), **arguments).eval()
    traced = torch.fx.symbolic_trace(model)
    for x in (torch.randn(2, 3, 64, 64), torch.randn(1, 3, 32, 96)):
        with torch.no_grad():
            torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)


def test_hooks_on_blocks_run():
    model = bbfast.create_model("resnet18", **SHALLOW)
    called = []
    for name in ("maxpool", "layer1", "layer2.0", "global_pool", "fc"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    model(torch.randn(2, 3, 64, 64))
    assert called == ["maxpool", "layer1", "layer2.0", "global_pool", "fc"]


def test_changed_stems_run():
    """As for small images: a 3x3 convolution and no pooling."""
    model = bbfast.create_model("resnet18", **SHALLOW).eval()
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    with torch.no_grad():
        assert model.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 64, 4, 4)


def test_autocast():
    model = bbfast.create_model("seresnet50", **SHALLOW)
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = model.train(mode)(torch.randn(2, 3, 64, 64))
        assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_empty_batch():
    for name in ("resnet18", "seresnet50", "ecaresnet26t", "resnetblur18", "resnetrs50"):
        assert bbfast.create_model(name, **SHALLOW).eval()(torch.randn(0, 3, 64, 64)).shape == (0, 5)


# ---- weights and names of before -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet26t"])
def test_pretrained_weights_are_adapted(name):
    """The first convolution, wherever it is, to the input's channels; another classifier is left as it is."""
    architecture = {"layers": SHALLOW["layers"], "channels": SHALLOW["channels"]}
    overlay = {"state_dict": random_state(name, **architecture)}
    arguments = {"pretrained": True, "in_chans": 1, "num_classes": 3, **architecture}
    ours, theirs = (
        library.create_model(name, pretrained_cfg_overlay=copy.deepcopy(overlay), **arguments).state_dict()
        for library in (bbfast, timm)
    )
    assert ours.keys() == theirs.keys()
    assert ours["fc.weight"].shape == (3, 64 if name == "resnet18" else 256)
    for key in ours.keys() - {"fc.weight", "fc.bias"}:
        assert torch.equal(ours[key], theirs[key]), key


def test_old_names_are_timms():
    ours, theirs = (library.models.get_deprecated_models("resnet") for library in (bbfast, timm))
    assert ours == theirs and len(ours) == 43
    with pytest.warns(UserWarning, match=r"gluon_resnet50_v1d is now called resnet50d\.gluon_in1k"):
        model = bbfast.create_model("gluon_resnet50_v1d", device="meta")
    assert model.pretrained_cfg["tag"] == "gluon_in1k"


# ---- bad arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "test_resnet", "ecaresnet50d_pruned"])
def test_unknown_keyword_is_named(name):
    with pytest.raises(TypeError, match="drop_pth_rate"):
        bbfast.create_model(name, drop_pth_rate=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": nn.Linear}, TypeError, "block must be BasicBlock, Bottleneck or 4 of these"),
        ({"block": [BasicBlock, Bottleneck]}, ValueError, "block must have one entry for each of the 4 stages, got 2"),
        ({"layers": (2, 2)}, ValueError, "layers must have one entry for each of the 4 stages, got 2"),
        ({"layers": (2, 2, 0, 2)}, ValueError, "layers=0"),
        ({"channels": (8, 16)}, ValueError, "channels must have one entry for each of the 4 stages"),
        ({"channels": 64}, TypeError, "channels must be a tuple of ints, got int"),
        ({"num_classes": -1}, ValueError, "num_classes=-1"),
        ({"in_chans": 0}, ValueError, "in_chans=0"),
        ({"output_stride": 4}, ValueError, "output_stride=4 is not allowed; it must be 8, 16 or 32"),
        ({"stem_type": "shallow"}, ValueError, "stem_type='shallow' is not known; allowed: '', 'deep', 'deep_tiered'"),
        ({"stem_width": 2, "stem_type": "deep_tiered"}, ValueError, "stem_width=2"),
        ({"cardinality": 2}, ValueError, "cardinality=2 is not allowed; BasicBlock knows 1 only"),
        ({"base_width": 128}, ValueError, "base_width=128 is not allowed; BasicBlock knows 64 only"),
        ({"avg_down": 1}, TypeError, "avg_down must be a bool, got int"),
        ({"drop_rate": 1.5}, ValueError, "drop_rate=1.5"),
        ({"drop_path_rate": "0.1"}, TypeError, "drop_path_rate must be a float, got str"),
        ({"drop_block_rate": -1}, ValueError, "drop_block_rate=-1"),
        ({"act_layer": "mish"}, ValueError, "act_layer='mish'.*hard_swish"),
        ({"norm_layer": "layernorm"}, ValueError, "norm_layer='layernorm' is not known.*groupnorm"),
        ({"norm_layer": 3}, TypeError, "norm_layer must be a string or a function, got int"),
        ({"aa_layer": "max"}, ValueError, "aa_layer='max' is not known; allowed: avg, blur and None"),
        ({"aa_layer": nn.AvgPool2d}, TypeError, "aa_layer must be a string or None, got <class"),
        ({"block_args": {"attn_layer": "cbam"}}, ValueError, "attn_layer='cbam' is not known; allowed: se, eca"),
        ({"block_args": {"attn_layer": 3}}, TypeError, "attn_layer must be a string, a function or None, got int"),
        ({"block_args": {"attn": "se"}}, TypeError, "unexpected keyword argument 'attn'"),
        ({"global_pool": "median"}, ValueError, "global_pool='median'"),
        ({"global_pool": ""}, ValueError, "global_pool='' leaves a map"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model("resnet18", device="meta", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": (1, 1, 1, 1)}, re.escape("layers=(1, 1, 1, 1) is not allowed; what was pruned has (3, 4, 6, 3)")),
        ({"norm_layer": "groupnorm"}, "norm_layer must be a BatchNorm2d in a pruned model, got GroupNorm"),
        ({"cardinality": 2}, "block and cardinality of a pruned model"),
        ({"block": BasicBlock}, "block and cardinality of a pruned model"),
    ],
    ids=str,
)
def test_only_whole_models_are_pruned(arguments, message):
    model = bbfast.create_model("ecaresnet50d", device="meta", **arguments)
    with pytest.raises(ValueError, match=message):
        narrow(model, PRUNED_CHANNELS["ecaresnet50d"])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"x must have shape \[N, 3, H, W\], got \(1, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), ValueError, r"x must have shape \[N, 3, H, W\], got \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "x is on meta but the model is on cpu"),
    ],
)
@pytest.mark.parametrize("name", ["resnet18", "resnet26t"])
def test_bad_inputs_are_named(name, x, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(name, **SHALLOW).eval()(x)


@pytest.mark.parametrize("name", ["resnetaa50", "seresnetaa50d"])
def test_odd_maps_are_refused_where_means_of_pixels_cannot_have_them(name):
    model = bbfast.create_model(name, **{**SHALLOW, "channels": CHANNELS}).eval()
    with pytest.raises(ValueError, match=r"aa_layer='avg'.*\(2, 2\) pixels where its shortcut is \(2, 3\)"):
        model(torch.randn(1, 3, 33, 40))
    model.train()
    with pytest.raises(ValueError, match=r"\(1, 1\) pixels where its shortcut is \(2, 2\)"):
        model(torch.randn(2, 3, 48, 48))
