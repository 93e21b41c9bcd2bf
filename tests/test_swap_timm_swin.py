"""timm's Swin, swapped: the numbers stay, in each state that a block can be in."""

from __future__ import annotations

import copy
import re

import pytest
import swap_parity
import torch
from torch import nn

import bbfast
from bbfast import dispatch

timm = pytest.importorskip("timm")
from parity import assert_equal_to_nine_digits, training_step  # noqa: E402
from timm.layers import LayerNorm, RmsNorm  # noqa: E402
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention  # noqa: E402

TINY = "swin_tiny_patch4_window7_224"
# Few channels and blocks: every path of a Swin in a fraction of its time.
SHALLOW = {"depths": (2, 2, 1, 1), "num_classes": 5}
NARROW = {"embed_dim": 16, "num_heads": (1, 2, 2, 4), **SHALLOW}
# Windows of 7 pixels divide none of the maps: 15 x 19, 8 x 10, 4 x 5, 2 x 3.
ODD = (60, 76)

pytestmark = pytest.mark.usefixtures("reference_backend")


def build(name: str = TINY, **arguments) -> nn.Module:
    arguments = {"img_size": ODD, "drop_path_rate": 0.3, "drop_rate": 0.2, **NARROW, **arguments}
    return timm.create_model(name, **arguments)


def make_block(dim=8, size=(10, 13), window=4, shift=2, **arguments) -> SwinTransformerBlock:
    """A block in double precision, and with shift so that all of it matters."""
    block = SwinTransformerBlock(dim, size, num_heads=2, window_size=window, shift_size=shift, **arguments)
    return swap_parity.randomise(block).double().eval()


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A swapped copy, and the model itself."""
    swapped = copy.deepcopy(model)
    assert bbfast.swap(swapped, strict=True).swapped
    return swapped, model


def assert_same_step(swapped: nn.Module, plain: nn.Module, x: torch.Tensor, *, train: bool = True) -> None:
    """Output and gradients of one seeded pass in double precision, to nine digits."""
    with torch.no_grad():
        grad_out = torch.randn_like(plain(x.double()))
    ours, theirs = (training_step(model, x, grad_out, train=train) for model in (swapped, plain))
    assert_equal_to_nine_digits(ours, theirs)


def attention_choice() -> str:
    """Why the last attention was not the op's; "" if it was."""
    (reason,) = dispatch.last_choices()["window_attention"].reasons
    return "" if reason == "BBFAST_BACKEND=torch" else reason


# ---- models ------------------------------------------------------------------------------------------------

MODELS = {
    TINY: {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "depths": (2, 1, 1, 1)},
    "swin_small_patch4_window7_224": {},
    "swin_base_patch4_window7_224": {"num_heads": (4, 2, 2, 2)},
    "swin_base_patch4_window12_384": {},
    "swin_large_patch4_window7_224": {"embed_dim": 24, "num_heads": (6, 3, 3, 3)},
    "swin_large_patch4_window12_384": {"depths": (2, 2), "num_heads": (2, 2)},
    "swin_s3_tiny_224": {},
    "swin_s3_small_224": {"depths": (2, 1, 1, 1)},
    "swin_s3_base_224": {},
    "swin_tiny_patch4_window7_224.ms_in22k": {"mlp_ratio": 2.0, "qkv_bias": False, "head_dim": 12},
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    arguments = {**NARROW, **MODELS[name]}
    blocks = {"SwinTransformerBlock": sum(arguments["depths"])}
    swap_parity.assert_swap_keeps_numbers(lambda: build(name, **arguments), ODD, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if "." not in name])
def test_whole_model(name):
    size = 384 if "384" in name else 224
    swap_parity.assert_swap_keeps_numbers(
        lambda: timm.create_model(name, drop_path_rate=0.3, num_classes=5),
        (size, size),
        {"SwinTransformerBlock": None},
        batch=1,
        train=False,
    )


@pytest.mark.parametrize("argument", ["strict_img_size", "dynamic_img_size"])
@pytest.mark.parametrize("size", [(60, 76), (96, 64), (20, 132)])
def test_images_of_any_size(argument, size):
    """Masks are made for each map; the last image is smaller than a window."""
    arguments = {argument: argument.startswith("dynamic")}
    swap_parity.assert_swap_keeps_numbers(
        lambda: build(img_size=64, **arguments), size, {"SwinTransformerBlock": 6}, batch=1
    )


@pytest.mark.parametrize("size", [(12, 132), (60, 76)])
def test_windows_larger_than_the_map(size):
    """always_partition pads small maps instead of shrinking their windows, and shifts them all the same."""
    swap_parity.assert_swap_keeps_numbers(
        lambda: build(img_size=size, always_partition=True), size, {"SwinTransformerBlock": 6}
    )


def test_features():
    swap_parity.assert_swap_keeps_numbers(
        lambda: build(features_only=True, out_indices=(0, 1, 3)),
        ODD,
        {"SwinTransformerBlock": 6},
        pick=lambda features: torch.cat([maps.flatten(1) for maps in features], dim=1),
    )


def test_dropout_after_layers():
    """proj_drop draws for pixels in the order of timm's windows, which is kept."""
    swap_parity.assert_swap_keeps_numbers(lambda: build(proj_drop_rate=0.2), ODD, {"SwinTransformerBlock": 6})


@pytest.mark.parametrize("norm_layer", [LayerNorm, RmsNorm])
def test_norm_that_no_op_knows(norm_layer):
    swap_parity.assert_swap_keeps_numbers(lambda: build(norm_layer=norm_layer), ODD, {"SwinTransformerBlock": 6})


def test_models_that_are_not_supported():
    for name, block in (
        ("swinv2_tiny_window8_256", "SwinTransformerV2Block"),
        ("swinv2_cr_tiny_224", "SwinTransformerV2CrBlock"),
    ):
        plan = bbfast.plan(timm.create_model(name, device="meta", depths=(1, 1, 1, 1)))
        assert [row.old.rpartition(".")[2] for row in plan.skipped] == 4 * [block]
        assert not plan.swapped
        assert all("cosine of queries and keys" in row.reason for row in plan.skipped)


# ---- what happens after the swap ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"img_size": (92, 68)},
        {"img_size": (92, 68), "window_size": (5, 3)},
        {"window_size": 4, "always_partition": True},
        {"img_size": (20, 36), "window_size": 6},
        {"patch_size": 2, "window_ratio": 8},
    ],
    ids=str,
)
def test_set_input_size(arguments):
    swapped, plain = twins(swap_parity.randomise(build()).double())
    size = arguments.get("img_size", ODD)
    for model in (swapped, plain):
        model.set_input_size(**arguments)
    assert_same_step(swapped, plain, torch.randn(2, 3, *size))
    bbfast.restore(swapped)
    assert swap_parity.classes(swapped) == swap_parity.classes(plain)
    with torch.no_grad():
        x = torch.randn(1, 3, *size).double()
        assert torch.equal(swapped.eval()(x), plain.eval()(x))


def test_set_input_size_of_a_model_for_any_size():
    swapped, plain = twins(swap_parity.randomise(build(strict_img_size=False)).double())
    for model in (swapped, plain):
        model.set_input_size((64, 64), window_size=6)
    assert_same_step(swapped, plain, torch.randn(2, 3, 84, 52))


def test_attention_dropout():
    """The op drops no weights, so timm's attention runs in training, and the op in evaluation."""
    swapped, plain = twins(swap_parity.randomise(build(attn_drop_rate=0.2)).double())
    x = torch.randn(2, 3, *ODD)
    assert_same_step(swapped, plain, x)
    assert "attn_drop=0.2" in attention_choice()
    assert_same_step(swapped, plain, x, train=False)
    assert not attention_choice()


def test_gradient_checkpointing():
    swapped, plain = twins(swap_parity.randomise(build()).double())
    swapped.set_grad_checkpointing()
    x = torch.randn(3, 3, *ODD)
    assert_same_step(swapped, plain, x)  # as without
    plain.set_grad_checkpointing()
    assert_same_step(swapped, plain, x)


def test_ops_that_run():
    swapped, _ = twins(build())
    dispatch.forget_choices()
    swapped.train()(torch.randn(2, 3, *ODD)).sum().backward()
    ops = {"window_attention", "add_layer_norm", "drop_path_add"}
    assert dispatch.last_choices().keys() == ops | {f"{op}_backward" for op in ops}


@pytest.mark.parametrize("size, dynamic_mask", [((10, 13), False), ((8, 12), True)])
def test_compiled_block(size, dynamic_mask):
    block = make_block(size=size, dynamic_mask=dynamic_mask, drop_path=0.3)
    swapped, plain = twins(block)
    compiled = torch.compile(swapped, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, *size, 8, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), plain(x))


# ---- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused_attn", [False, True])
def test_scale(fused_attn):
    """timm's own product of matrices takes the attribute, torch's attention the heads' channels."""
    block = make_block()
    block.attn.fused_attn = fused_attn
    block.attn.scale = 0.9
    swapped, plain = twins(block)
    x = torch.randn(2, 10, 13, 8)
    assert_same_step(swapped, plain, x)
    assert not attention_choice()


@pytest.mark.parametrize("shift", [(2, 0), (0, 3), (1, 3)])
@pytest.mark.parametrize("dynamic_mask", [False, True])
def test_shift_along_each_axis(shift, dynamic_mask):
    swapped, plain = twins(make_block(shift=shift, window=(3, 5), dynamic_mask=dynamic_mask))
    assert_same_step(swapped, plain, torch.randn(2, 10, 13, 8))


def test_map_of_another_size_than_the_mask():
    """timm's mask goes with the windows by their number; the op would make the right one."""
    swapped, plain = twins(make_block(size=(4, 16)))
    assert_same_step(swapped, plain, torch.randn(2, 3, 15, 8))  # as many windows, laid out alike
    assert not attention_choice()
    assert_same_step(swapped, plain, torch.randn(2, 16, 4, 8))  # as many windows, laid out in another way
    assert "attn_mask is for maps of (4, 16), got (16, 4)" in attention_choice()
    assert_same_step(swapped, plain, torch.randn(2, 12, 16, 8))  # three times as many: timm reads them as three maps
    for model in (swapped, plain):
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 12, 4, 8).double())


def test_state_that_no_method_of_timm_leaves():
    swapped, plain = twins(make_block())
    x = torch.randn(2, 10, 13, 8)
    for model in (swapped, plain):
        model.attn_mask = None
    assert_same_step(swapped, plain, x)
    assert "attn_mask is not the one of this shift" in attention_choice()
    for model in (swapped, plain):
        model.shift_size = (-1, 4)
    assert_same_step(swapped, plain, x)
    assert "shift_size=(-1, 4) is not within window_size=(4, 4)" in attention_choice()


def test_strided_input():
    swapped, plain = twins(make_block(drop_path=0.3))
    wide = torch.randn(2, 8, 13, 10, dtype=torch.float64).permute(0, 3, 2, 1)
    torch.testing.assert_close(swapped(wide), plain(wide))


def test_autocast():
    block = make_block().float()
    swapped, plain = twins(block)
    x = torch.randn(2, 10, 13, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = swapped(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


class Adapted(nn.Module):
    """A linear layer and a low-rank update beside it, which is what adapters of weights put in its place."""

    def __init__(self, linear: nn.Linear, dropout: float = 0.0):
        super().__init__()
        self.linear = linear
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(linear.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, linear.out_features, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(self.dropout(x)))


@pytest.mark.parametrize("name", ["qkv", "proj"])
def test_adapted_layer_is_called(name):
    swapped, plain = twins(make_block(size=(8, 12)))
    layer = Adapted(getattr(plain.attn, name))
    for model in (swapped, plain):
        setattr(model.attn, name, copy.deepcopy(layer))
    assert_same_step(swapped, plain, torch.randn(2, 8, 12, 8))
    assert not attention_choice()
    assert_same_step(swapped, plain, torch.randn(2, 7, 12, 8))  # padded
    assert ("qkv is a Adapted; what it makes of the windows' padding" in attention_choice()) == (name == "qkv")


def test_layer_in_the_place_of_dropout_is_called():
    swapped, plain = twins(make_block())
    for model in (swapped, plain):
        model.attn.proj_drop = nn.Tanh()
    assert_same_step(swapped, plain, torch.randn(2, 10, 13, 8))
    assert not attention_choice()


@pytest.mark.parametrize("name", ["qkv", "proj"])
def test_adapted_layer_that_drops_values(name):
    swapped, plain = twins(make_block(size=(8, 12)))
    layer = Adapted(getattr(plain.attn, name), dropout=0.4)
    for model in (swapped, plain):
        setattr(model.attn, name, copy.deepcopy(layer))
    assert_same_step(swapped, plain, torch.randn(2, 8, 12, 8))
    assert f"{name} drops values at random" in attention_choice()
    assert_same_step(swapped, plain, torch.randn(2, 8, 12, 8), train=False)
    assert not attention_choice()


@pytest.mark.parametrize("name", ["norm1", "mlp", "attn.qkv", "attn.proj", "attn.proj_drop", "attn.softmax", "norm2"])
def test_hook_added_after_the_swap(name):
    """It runs, on what it would get from timm's block."""
    swapped, plain = twins(make_block())
    shapes = {}
    for key, model in (("ours", swapped), ("theirs", plain)):
        seen = shapes[key] = []
        model.get_submodule(name).register_forward_hook(lambda m, i, o, seen=seen: seen.append(i[0].shape) or 2 * o)
    assert_same_step(swapped, plain, torch.randn(2, 10, 13, 8))
    assert set(shapes["ours"]) == set(shapes["theirs"]) != set()


# ---- what is not swapped -----------------------------------------------------------------------------------


def hooked(name: str):
    return lambda block: block.get_submodule(name).register_forward_hook(lambda *args: None)


def with_attention_of_a_subclass(block):
    block.attn.__class__ = type("Attention", (WindowAttention,), {})


def with_forward_of_its_own(block):
    block.attn.proj.forward = block.attn.proj.forward


OBJECTIONS = {
    "attn_mask": (
        lambda block: block.attn_mask.mul_(0.5),
        "its attn_mask is not the one that its window_size, shift_size and input_resolution give",
    ),
    "no attn_mask": (
        lambda block: setattr(block, "attn_mask", None),
        "its attn_mask is not the one that its window_size, shift_size and input_resolution give",
    ),
    "shift_size": (
        lambda block: setattr(block, "shift_size", (2, 4)),
        "its shift_size=(2, 4) is not within its window_size=(4, 4)",
    ),
    "relative_position_index": (
        lambda block: block.attn.relative_position_index.zero_(),
        "attn has another relative_position_index than its window_size gives",
    ),
    "hooked qkv": (
        hooked("attn.qkv"),
        "attn has hooks or a forward of its own on its qkv, which would get a map instead of windows",
    ),
    "patched proj": (
        with_forward_of_its_own,
        "attn has hooks or a forward of its own on its proj, which would get a map instead of windows",
    ),
    "hooked attention": (hooked("attn"), "attn has forward hooks, which the fused op would not run"),
    "hooked softmax": (hooked("attn.softmax"), "attn.softmax has forward hooks, which the fused op would not run"),
    "hooked norm": (hooked("norm2"), "norm2 has forward hooks, which the fused op would not run"),
    "attention": (
        with_attention_of_a_subclass,
        "attn is a Attention, a subclass of WindowAttention; only exact classes are known",
    ),
}


@pytest.mark.parametrize("spoil, reason", OBJECTIONS.values(), ids=OBJECTIONS)
def test_block_that_is_skipped(spoil, reason):
    block = make_block()
    spoil(block)
    plan = bbfast.plan(block)
    assert [row.reason for row in plan.rows] == [reason]
    with pytest.raises(bbfast.SwapError, match=re.escape(reason)):
        bbfast.swap(block, strict=True)
