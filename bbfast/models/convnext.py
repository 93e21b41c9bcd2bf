"""ConvNeXt: a convolutional network built like a Swin, of depthwise convolutions and perceptrons over channels.

`A ConvNet for the 2020s`, https://arxiv.org/abs/2201.03545, and `ConvNeXt V2: Co-designing and Scaling ConvNets with
Masked Autoencoders`, https://arxiv.org/abs/2301.00808. Names, weights and state_dict keys are timm's. Maps are
channels_last from the norm of the stem to the head, whatever the images are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from bbfast.models._backbone import Backbone, prepare_images, run_blocks
from bbfast.models._classifier_head import ClassifierHead
from bbfast.models._convnext_cfgs import DEPRECATED_NAMES, PRETRAINED_CFGS
from bbfast.models._convnext_weights import adapt_state_dict
from bbfast.models._factory import register_variants
from bbfast.models._layers import create_conv2d, make_divisible
from bbfast.models._norm_mlp_head import NormMlpClassifierHead
from bbfast.models._registry import register_model_deprecations
from bbfast.nn import ConvNeXtBlock, LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
from bbfast.nn._arguments import check_bool, check_int, check_ints, check_positive, check_probability

STAGES = 4

# By timm's names, norms over the last axis and over the channels of `[N, C, H, W]`.
_NORMS = {
    **dict.fromkeys(("layernorm", "layernorm2d"), (LayerNorm, LayerNorm2d)),
    **dict.fromkeys(("rmsnorm", "rmsnorm2d"), (RmsNorm, RmsNorm2d)),
    **dict.fromkeys(("simplenorm", "simplenorm2d"), (SimpleNorm, SimpleNorm2d)),
}
_ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hard_swish": nn.Hardswish,
    "hardswish": nn.Hardswish,
}
_STEMS = ("patch", "overlap", "overlap_tiered", "overlap_act")

# ---- parts -----------------------------------------------------------------------------------------------


def _make_stem(
    stem_type: str, in_chans: int, dim: int, *, patch_size: int, conv_bias: bool, act_layer, norm_layer, **factory
) -> nn.Sequential:
    """Patches, each mapped to a pixel; or two strided 3x3 convolutions, whose patches overlap. Then a norm."""
    if stem_type == "patch":
        convs = [nn.Conv2d(in_chans, dim, patch_size, patch_size, bias=conv_bias, **factory)]
    else:
        middle = make_divisible(dim // 2) if stem_type == "overlap_tiered" else dim
        convs = [
            create_conv2d(in_chans, middle, 3, stride=2, bias=conv_bias, **factory),
            *([act_layer()] if stem_type == "overlap_act" else []),
            create_conv2d(middle, dim, 3, stride=2, bias=conv_bias, **factory),
        ]
    return nn.Sequential(*convs, norm_layer(dim, **factory))


def _apply_first_conv(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return conv(prepare_images(x, conv.weight))


class ConvNeXtStage(nn.Module):
    """Where channels or resolution change a norm and a convolution for that, then blocks.

    Args:
        in_chs, out_chs: channels of the stage's input and of its blocks.
        stride: 1 or 2. dilation: of the convolution that changes resolution, and of the blocks.
        drop_path_rates: one per block.
        conv_bias: whether the convolutions have a bias.
        norm_layer, norm_layer_2d: make norms over the last axis, and over the channels of `[N, C, H, W]`.
        **block_arguments: the blocks' own, see `bbfast.nn.ConvNeXtBlock`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        stride: int,
        dilation: tuple[int, int],
        drop_path_rates: Sequence[float],
        conv_bias: bool,
        norm_layer: Callable[..., nn.Module],
        norm_layer_2d: Callable[..., nn.Module],
        device=None,
        dtype=None,
        **block_arguments,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        changes_size = stride > 1 or dilation[0] != dilation[1]
        self.downsample = nn.Identity()
        if changes_size or in_chs != out_chs:
            conv = create_conv2d(
                in_chs,
                out_chs,
                2 if changes_size else 1,
                stride=stride,
                dilation=dilation[0],
                pad_type="same" if dilation[1] > 1 else "valid",  # where dilation replaces a stride sizes stay
                bias=conv_bias,
                **factory,
            )
            self.downsample = nn.Sequential(norm_layer_2d(in_chs, **factory), conv)
        self.blocks = nn.Sequential(
            *(
                ConvNeXtBlock(
                    out_chs,
                    dilation=dilation[1],
                    drop_path=rate,
                    conv_bias=conv_bias,
                    norm_layer=norm_layer,
                    **block_arguments,
                    **factory,
                )
                for rate in drop_path_rates
            )
        )
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_blocks(self.blocks, self.downsample(x), self.grad_checkpointing)


# ---- the model -------------------------------------------------------------------------------------------


class ConvNeXt(Backbone):
    """ConvNeXt: a stem, four stages of blocks at halving resolution, a head that pools, normalises and classifies.

    Depthwise convolutions, layer scales and sums run as fused ops, see `bbfast.nn.ConvNeXtBlock`: hooks on the modules
    that only lend their parameters do not run.

    Args:
        in_chans: channels of the images. num_classes: classes, 0 leaves the classifier out.
        global_pool: see `GlobalPool2d`; `""` classifies each pixel. Only head_norm_first allows "catavgmax", and there
            `""` needs num_classes=0.
        output_stride: 8, 16 or 32, pixels of the image per pixel of the last map; strides beyond become dilation.
        depths, dims: blocks and channels of each of the four stages.
        kernel_sizes: of their depthwise convolutions, odd; one for all, or four.
        ls_init_value: what layer scales start from; None for blocks without.
        stem_type: "patch" (patch_size pixels wide), "overlap" (two 3x3 convolutions of stride 2), "overlap_tiered" (the
            first has half as many channels), "overlap_act" (with an activation between).
        head_init_scale: factor on the linear layers of a new head.
        head_norm_first: normalise before pooling instead of after it.
        head_hidden_size: width of a hidden layer of the head, None for none; not with head_norm_first.
        conv_mlp: the perceptrons' weights are those of 1x1 convolutions.
        conv_bias: whether the convolutions of stem, blocks and between stages have a bias.
        use_grn: blocks have a global response norm, as in V2.
        act_layer: "gelu", "gelu_tanh", "silu", "swish", "relu", "relu6", "hard_swish" or "hardswish".
        norm_layer: "layernorm" (None too), "rmsnorm" or "simplenorm", each also with "2d". norm_eps: None for 1e-6.
        drop_rate: dropout before the classifier. drop_path_rate: the last block drops its branch with this chance, the
            first never.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: int | Sequence[int] = 7,
        ls_init_value: float | None = 1e-6,
        stem_type: str = "patch",
        patch_size: int = 4,
        head_init_scale: float = 1.0,
        head_norm_first: bool = False,
        head_hidden_size: int | None = None,
        conv_mlp: bool = False,
        conv_bias: bool = True,
        use_grn: bool = False,
        act_layer: str = "gelu",
        norm_layer: str | None = None,
        norm_eps: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        check_int("in_chans", in_chans, minimum=1)
        check_int("num_classes", num_classes, minimum=0)
        check_int("patch_size", patch_size, minimum=1)
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        check_positive("head_init_scale", head_init_scale)
        for name, value in (("conv_bias", conv_bias), ("head_norm_first", head_norm_first)):
            check_bool(name, value)
        _check_one_of("output_stride", output_stride, (8, 16, 32))
        _check_one_of("stem_type", stem_type, _STEMS)
        _check_one_of("act_layer", act_layer, _ACTIVATIONS)
        depths, dims = _four("depths", depths), _four("dims", dims)
        kernel_sizes = _four("kernel_sizes", [kernel_sizes] * STAGES if isinstance(kernel_sizes, int) else kernel_sizes)
        norm, norm_2d = _norm_layers(norm_layer, norm_eps)
        super().__init__(num_classes, in_chans)
        factory = {"device": device, "dtype": dtype}
        shared = {"conv_bias": conv_bias, "act_layer": _ACTIVATIONS[act_layer], **factory}
        self.drop_rate = drop_rate

        self.stem = _make_stem(stem_type, in_chans, dims[0], patch_size=patch_size, norm_layer=norm_2d, **shared)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        steps = _strides(patch_size if stem_type == "patch" else 4, output_stride)
        self.stages = nn.Sequential(
            *(
                ConvNeXtStage(
                    dims[max(stage - 1, 0)],
                    dims[stage],
                    stride=stride,
                    dilation=dilation,
                    drop_path_rates=rates[stage].tolist(),
                    kernel_size=kernel_sizes[stage],
                    ls_init_value=ls_init_value,
                    conv_mlp=conv_mlp,
                    use_grn=use_grn,
                    norm_layer=norm,
                    norm_layer_2d=norm_2d,
                    **shared,
                )
                for stage, (stride, dilation, _) in enumerate(steps)
            )
        )
        self.feature_info = [
            {"num_chs": dims[stage], "reduction": reduction, "module": f"stages.{stage}"}
            for stage, (_, _, reduction) in enumerate(steps)
        ]
        self.num_features = dims[-1]
        self.norm_pre = norm_2d(self.num_features, **factory) if head_norm_first else nn.Identity()
        self.head = self._make_head(num_classes, global_pool, head_norm_first, head_hidden_size, norm_2d, factory)
        _init_weights(self, head_init_scale)

    def _make_head(self, num_classes, global_pool, norm_first, hidden_size, norm_layer, factory) -> nn.Module:
        arguments = {"pool_type": global_pool, "drop_rate": self.drop_rate, **factory}
        if not norm_first:
            arguments |= {"norm_layer": norm_layer, "hidden_size": hidden_size}
            return NormMlpClassifierHead(self.num_features, num_classes, **arguments)
        if hidden_size is not None:
            raise ValueError(f"head_hidden_size={hidden_size!r} is not allowed with head_norm_first=True")
        return ClassifierHead(self.num_features, num_classes, **arguments)

    @property
    def head_hidden_size(self) -> int:
        return self.head.num_features

    # ---- forward

    def _maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        x = self.stem(prepare_images(x, self.stem[0].weight))
        for stage in self.stages:
            x = stage(x)
            yield x

    def _keep_maps(self, count: int, *, keep_norm: bool, keep_head: bool) -> None:
        self.stages = self.stages[:count]
        self.num_features = self.feature_info[count - 1]["num_chs"]
        if not keep_norm:
            self.norm_pre = nn.Identity()
        if not keep_head:
            self.reset_classifier(0, "", reset_other=True)

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm_pre(x)

    def _norm_last_map(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm_pre(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooling, norm, hidden layer, dropout and classifier; pre_logits leaves it out: `[N, head_hidden_size]`."""
        return self.head(x, pre_logits)

    # ---- what one does with a model

    @property
    def adapt_state_dict(self) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Function that turns a state_dict of ConvNeXt's authors or of OpenCLIP into this model's.

        See `_convnext_weights`. It does not hold the model, so that a feature extractor can keep it.
        """
        shapes = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        return partial(adapt_state_dict, shapes=shapes)

    def get_classifier(self) -> nn.Module:
        """The last layer (`nn.Identity` where num_classes is 0)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replaces the classifier by a fresh one, and the pooling unless global_pool is None.

        reset_other also takes the norm and the hidden layer out of the head.
        """
        check_bool("reset_other", reset_other)
        weight = self.stem[0].weight
        factory = {"device": weight.device, "dtype": weight.dtype}
        if isinstance(self.head, NormMlpClassifierHead):
            self.head.reset(num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **factory)
        else:
            self.head.in_features = self.num_features
            self.head.reset(num_classes, global_pool, **factory)
        self.num_classes = num_classes

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates; coarse: by stage."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm_pre", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}


# ---- arguments -------------------------------------------------------------------------------------------


def _check_one_of(name: str, value, allowed) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


def _four(name: str, values) -> tuple[int, ...]:
    values = check_ints(name, values, minimum=1)
    if len(values) != STAGES:
        raise ValueError(f"{name}={values!r} must have {STAGES} entries, one per stage")
    return values


def _norm_layers(norm_layer: str | None, norm_eps: float | None) -> tuple[Callable, Callable]:
    """What makes norms over the last axis, and over the channels of `[N, C, H, W]`."""
    norm_layer = "layernorm" if norm_layer is None else norm_layer
    _check_one_of("norm_layer", norm_layer, _NORMS)
    if norm_eps is None:
        return _NORMS[norm_layer]
    return tuple(partial(norm, eps=check_positive("norm_eps", norm_eps)) for norm in _NORMS[norm_layer])


def _strides(stem_stride: int, output_stride: int) -> list[tuple[int, tuple[int, int], int]]:
    """For each stage its stride, the dilations of its first convolution and of its blocks, its pixels per pixel."""
    reduction, dilation, steps = stem_stride, 1, []
    for stage in range(STAGES):
        stride = 2 if stage > 0 or reduction == 2 else 1
        if reduction >= output_stride and stride > 1:
            dilation, stride = 2 * dilation, 1
        reduction *= stride
        steps.append((stride, (1 if dilation in (1, 2) else 2, dilation), reduction))
    return steps


def _init_weights(model: ConvNeXt, head_init_scale: float) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Linear) and name.startswith("head."):
            with torch.no_grad():
                module.weight.mul_(head_init_scale)


# ---- variants --------------------------------------------------------------------------------------------

_ZEPTO = {"depths": (2, 2, 4, 2), "dims": (32, 64, 128, 256), "conv_mlp": True, "norm_layer": "simplenorm"}
_ATTO = {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), "conv_mlp": True}
_FEMTO = {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384), "conv_mlp": True}
_PICO = {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), "conv_mlp": True}
_NANO = {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), "conv_mlp": True}
_TINY = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
_SMALL = {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}
_BASE = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
_LARGE = {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)}
_XLARGE = {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)}
_HUGE = {"depths": (3, 3, 27, 3), "dims": (352, 704, 1408, 2816)}
_XXLARGE = {"depths": (3, 4, 30, 3), "dims": (384, 768, 1536, 3072), "norm_eps": 1e-5}
_TEST = {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128), "norm_eps": 1e-5}

_V2 = {"use_grn": True, "ls_init_value": None}

_VARIANTS = {
    "convnext_zepto_rms": _ZEPTO,
    "convnext_zepto_rms_ols": {**_ZEPTO, "stem_type": "overlap_act"},
    "convnext_atto": _ATTO,
    "convnext_atto_ols": {**_ATTO, "stem_type": "overlap_tiered"},
    "convnext_atto_rms": {**_ATTO, "norm_layer": "rmsnorm2d"},
    "convnext_femto": _FEMTO,
    "convnext_femto_ols": {**_FEMTO, "stem_type": "overlap_tiered"},
    "convnext_pico": _PICO,
    "convnext_pico_ols": {**_PICO, "stem_type": "overlap_tiered"},
    "convnext_nano": _NANO,
    "convnext_nano_ols": {**_NANO, "stem_type": "overlap"},
    "convnext_tiny_hnf": {**_TINY, "conv_mlp": True, "head_norm_first": True},
    "convnext_tiny": _TINY,
    "convnext_small": _SMALL,
    "convnext_base": _BASE,
    "convnext_large": _LARGE,
    "convnext_large_mlp": {**_LARGE, "head_hidden_size": 1536},
    "convnext_xlarge": _XLARGE,
    "convnext_xxlarge": _XXLARGE,
    "convnextv2_atto": {**_ATTO, **_V2},
    "convnextv2_femto": {**_FEMTO, **_V2},
    "convnextv2_pico": {**_PICO, **_V2},
    "convnextv2_nano": {**_NANO, **_V2},
    "convnextv2_tiny": {**_TINY, **_V2},
    "convnextv2_small": {**_SMALL, **_V2},
    "convnextv2_base": {**_BASE, **_V2},
    "convnextv2_large": {**_LARGE, **_V2},
    "convnextv2_huge": {**_HUGE, **_V2},
    "test_convnext": {**_TEST, "depths": (1, 2, 4, 2), "dims": (24, 32, 48, 64), "act_layer": "gelu_tanh"},
    "test_convnext2": {**_TEST, "act_layer": "gelu_tanh"},
    "test_convnext3": {**_TEST, "kernel_sizes": (7, 5, 5, 3), "act_layer": "silu"},
}

register_variants(
    ConvNeXt,
    PRETRAINED_CFGS,
    _VARIANTS,
    {"flatten_sequential": True, "fused": {("stem.0",): _apply_first_conv}},
)
register_model_deprecations(__name__, DEPRECATED_NAMES)
