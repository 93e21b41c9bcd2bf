"""RegNet: stages of bottlenecks whose widths and depths follow from a line.

`Designing Network Design Spaces`, https://arxiv.org/abs/2003.13678, and the Z networks of `Fast and Accurate Model
Scaling`, https://arxiv.org/abs/2103.06877. Names, weights and state_dict keys are timm's. `AnyNet` is the same network
with the parameters of each stage given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bbfast.models._backbone import Backbone, prepare_images
from bbfast.models._classifier_head import ClassifierHead
from bbfast.models._factory import register_variants
from bbfast.models._layers import Activation, resolve_act
from bbfast.models._pretrained import PretrainedCfg
from bbfast.models._registry import register_model_deprecations
from bbfast.models._regnet_blocks import (
    Bottleneck,
    ConvNormAct,
    GroupNormAct,
    PreBottleneck,
    RegStage,
    resolve_norm,
)
from bbfast.models._regnet_rule import regnet_stages
from bbfast.models._regnet_weights import adapt_state_dict
from bbfast.nn._arguments import check_bool, check_int, check_positive, check_probability

_DOWNSAMPLES = ("conv1x1", "avg", "", None)


@dataclass(frozen=True)
class StageCfg:
    """The parameters of one stage.

    Args:
        depth: blocks.
        width: channels that go in and out of the blocks.
        bottle_ratio: channels of the 3x3 convolution per channel of the block.
        group_size: channels per group of the 3x3 convolution, of which there are round(width * bottle_ratio).
        se_ratio: squeezed channels of squeeze-and-excite per channel of a block's input; 0 leaves it out.
        stride: of the first block, in pixels.

    Raises:
        TypeError, ValueError: a parameter is of the wrong type, or not allowed.
    """

    depth: int
    width: int
    bottle_ratio: float = 1.0
    group_size: int = 1
    se_ratio: float = 0.0
    stride: int = 2

    def __post_init__(self):
        for name in ("depth", "width", "group_size", "stride"):
            check_int(name, getattr(self, name), minimum=1)
        check_positive("bottle_ratio", self.bottle_ratio)
        if self.se_ratio:
            check_positive("se_ratio", self.se_ratio)


class AnyNet(Backbone):
    """A stem, stages of bottlenecks, a pooled classifier: what RegNet is when the parameters of each stage are free.

    Convolutions, norms, activations and shortcuts run as fused ops, see `_regnet_blocks`: hooks on modules inside a
    block's layers and on the stem's do not run; hooks on blocks, stages, the classifier and the model do.

    Args:
        stages: the parameters of each stage.
        stem_width: channels of the stem, a 3x3 convolution of stride 2.
        downsample: the shortcut where a block changes the shape: "conv1x1", "avg" (pooled by averages first), None or
            `""` for none at all.
        linear_out: leave out the activation at the end of each block.
        preact: norm and activation before each convolution instead of after it.
        num_features: channels of a last 1x1 convolution; 0 leaves it out.
        act_layer: the activation, by timm's name.
        norm_layer: "batchnorm", "groupnorm", or `f(channels, *, act, device, dtype)`.
        in_chans: channels of the images. num_classes: classes; 0 leaves the classifier out.
        output_stride: 8, 16 or 32: strides beyond this become dilation.
        global_pool: see `GlobalPool2d`.
        drop_rate: dropout before the classifier.
        drop_path_rate: the last block drops its branch with this chance, the first never.
        zero_init_last: let blocks begin as their shortcuts.
        device, dtype: of parameters and buffers.

    Attributes:
        num_features, head_hidden_size: channels of `forward_features`, and of what the classifier takes.
        feature_info: for the stem and each stage its module, num_chs and reduction.
        pretrained_cfg, default_cfg: the same dict, about the model's weights.
    """

    adapt_state_dict = staticmethod(adapt_state_dict)

    def __init__(
        self,
        stages: Sequence[StageCfg],
        *,
        stem_width: int = 32,
        downsample: str | None = "conv1x1",
        linear_out: bool = False,
        preact: bool = False,
        num_features: int = 0,
        act_layer: str = "relu",
        norm_layer: str | Callable[..., nn.Module] = "batchnorm",
        in_chans: int = 3,
        num_classes: int = 1000,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device=None,
        dtype=None,
    ):
        stages = _check_stages(stages)
        for name, value in (("stem_width", stem_width), ("in_chans", in_chans)):
            check_int(name, value, minimum=1)
        check_int("num_features", num_features, minimum=0)
        for name, value in (("linear_out", linear_out), ("preact", preact), ("zero_init_last", zero_init_last)):
            check_bool(name, value)
        check_probability("drop_path_rate", drop_path_rate)
        if downsample not in _DOWNSAMPLES:
            raise ValueError(f"downsample={downsample!r} is not known; allowed: {', '.join(map(repr, _DOWNSAMPLES))}")
        super().__init__(num_classes, in_chans)
        factory = {"device": device, "dtype": dtype}
        act = resolve_act(act_layer)
        layer = {"act": act, "norm_layer": resolve_norm(norm_layer), **factory}
        self.drop_rate = drop_rate

        stem = ConvNormAct(in_chans, stem_width, 3, stride=2, **layer)
        self.stem = stem.conv if preact else stem
        self.feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
        rates = _drop_path_rates(drop_path_rate, [stage.depth for stage in stages])
        width, reduction = stem_width, 2
        for index, (stage, (stride, dilation)) in enumerate(zip(stages, _strides(stages, output_stride))):
            name = f"s{index + 1}"
            blocks = RegStage(
                stage.depth,
                width,
                stage.width,
                stride=stride,
                dilation=dilation,
                drop_path_rates=rates[index],
                block=PreBottleneck if preact else Bottleneck,
                bottle_ratio=stage.bottle_ratio,
                group_size=stage.group_size,
                se_ratio=stage.se_ratio,
                downsample=downsample,
                linear_out=linear_out,
                **layer,
            )
            self.add_module(name, blocks)
            width, reduction = stage.width, reduction * stride
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": name})

        if num_features:
            self.final_conv = ConvNormAct(width, num_features, **layer)
        else:
            self.final_conv = Activation(act) if linear_out or preact else nn.Identity()
        self.num_features = num_features or width
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory
        )
        _init_weights(self, zero_init_last)

    @property
    def head_hidden_size(self) -> int:
        return self.head.num_features

    @property
    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(info["module"]) for info in self.feature_info[1:]]

    # ---- forward

    def _maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        x = _apply_stem(self.stem, x)
        yield x
        for stage in self._stages:
            x = stage(x)
            yield x

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        return self.final_conv(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooling, dropout and classifier; pre_logits leaves it out: `[N, head_hidden_size]`."""
        return self.head(x, pre_logits)

    # ---- what one does with a model

    def get_classifier(self) -> nn.Module:
        """The last layer (`nn.Identity` where num_classes is 0)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, and the pooling unless global_pool is None."""
        weight = next(self.stem.parameters())
        self.head.in_features = self.num_features
        self.head.reset(num_classes, global_pool, device=weight.device, dtype=weight.dtype)
        self.num_classes = num_classes

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates; coarse: by stage."""
        return {"stem": r"^stem", "blocks": r"^s(\d+)" if coarse else r"^s(\d+)\.b(\d+)"}

    def _keep_maps(self, count: int, *, keep_norm: bool, keep_head: bool) -> None:
        cut = self.feature_info[count:]
        for info in cut:
            self.add_module(info["module"], nn.Identity())
        # A last convolution has a norm and is no part of a map.
        if cut or (isinstance(self.final_conv, ConvNormAct) and not (keep_norm and keep_head)):
            self.final_conv = nn.Identity()
            self.num_features = self.feature_info[count - 1]["num_chs"]
            self.reset_classifier(0, "")


class RegNet(AnyNet):
    """RegNet: an `AnyNet` whose stages follow from six numbers, see `regnet_stages`.

    Args:
        depth, w0, wa, wm: blocks of the whole network, and the line that their widths follow.
        group_size: channels per group of the 3x3 convolutions.
        bottle_ratio: channels of the 3x3 convolutions per channel of the block.
        se_ratio: squeezed channels of squeeze-and-excite per channel of a block's input (RegNetY has 0.25); 0 leaves
            it out.
        group_min_ratio: 0 fits widths to groups as pycls does, 0.9 as torchvision.
        stem_width, downsample, linear_out, preact, num_features, act_layer, norm_layer, in_chans, num_classes,
            output_stride, global_pool, drop_rate, drop_path_rate, zero_init_last, device, dtype: see `AnyNet`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or not allowed, or there are not four stages.
    """

    def __init__(
        self,
        *,
        depth: int = 21,
        w0: int = 80,
        wa: float = 42.63,
        wm: float = 2.66,
        group_size: int = 24,
        bottle_ratio: float = 1.0,
        se_ratio: float = 0.0,
        group_min_ratio: float = 0.0,
        stem_width: int = 32,
        downsample: str | None = "conv1x1",
        linear_out: bool = False,
        preact: bool = False,
        num_features: int = 0,
        act_layer: str = "relu",
        norm_layer: str | Callable[..., nn.Module] = "batchnorm",
        in_chans: int = 3,
        num_classes: int = 1000,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device=None,
        dtype=None,
    ):
        check_probability("group_min_ratio", group_min_ratio)
        stages = regnet_stages(w0, wa, wm, depth, group_size, bottle_ratio, group_min_ratio)
        if len(stages.widths) != 4:
            raise ValueError(
                f"w0={w0}, wa={wa}, wm={wm}, depth={depth} are not allowed: they give {len(stages.widths)} stages of "
                f"widths {stages.widths}, where a RegNet has four; AnyNet takes any number"
            )
        super().__init__(
            [
                StageCfg(depth, width, bottle_ratio, size, se_ratio)
                for depth, width, size in zip(stages.depths, stages.widths, stages.group_sizes)
            ],
            stem_width=stem_width,
            downsample=downsample,
            linear_out=linear_out,
            preact=preact,
            num_features=num_features,
            act_layer=act_layer,
            norm_layer=norm_layer,
            in_chans=in_chans,
            num_classes=num_classes,
            output_stride=output_stride,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            device=device,
            dtype=dtype,
        )


def _check_stages(stages: Sequence[StageCfg]) -> tuple[StageCfg, ...]:
    if not isinstance(stages, (tuple, list)) or not all(isinstance(stage, StageCfg) for stage in stages):
        raise TypeError(f"stages must be a tuple of StageCfg, got {stages!r}")
    if not stages:
        raise ValueError("stages must not be empty")
    return tuple(stages)


def _strides(stages: Sequence[StageCfg], output_stride: int) -> list[tuple[int, int]]:
    """(stride, dilation) of each stage behind a stem of stride 2, strides beyond output_stride made into dilation."""
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride={output_stride!r} is not allowed; use 8, 16 or 32")
    reduction, dilation, strides = 2, 1, []
    for stage in stages:
        if reduction >= output_stride:
            dilation *= stage.stride
            strides.append((1, dilation))
        else:
            reduction *= stage.stride
            strides.append((stage.stride, dilation))
    return strides


def _drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """One per block, from 0 to `last`, in single precision as timm has them."""
    rates = torch.linspace(0, last, sum(depths), device="cpu", dtype=torch.float32)
    return [part.tolist() for part in rates.split(list(depths))]


def _apply_stem(stem: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return stem(prepare_images(x, next(stem.parameters())))


def _init_weights(model: nn.Module, zero_init_last: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
        elif zero_init_last and isinstance(module, (Bottleneck, PreBottleneck)):
            module.zero_init_last()


# ---- pretrained weights ----------------------------------------------------------------------------------

# How photos became inputs where the weights were trained.
_TIMM = {"crop_pct": 0.95, "test_crop_pct": 1.0, "test_input_size": (3, 288, 288)}
_TIMM_256 = {"crop_pct": 1.0, "test_crop_pct": 1.0, "size": 256, "test_input_size": (3, 320, 320)}
_TORCHVISION = {"crop_pct": 0.965}
_TORCHVISION_384 = {"crop_pct": 1.0, "size": 384}
_PYCLS = {"crop_pct": 0.875}

# Tag, facts, and the models (`regnet...`) that have such weights; a model's first tag is its default one.
_WEIGHTS = [
    ("ra_in1k", _TIMM, "y_032"),
    ("ra3_in1k", _TIMM, "y_040 y_064 y_080 v_040 v_064"),
    ("ra3_in1k", _TIMM_256, "z_040 z_040_h"),
    ("sw_in12k_ft_in1k", _TIMM, "y_120 y_160"),
    ("lion_in12k_ft_in1k", _TIMM, "y_160"),
    ("sw_in12k", {"num_classes": 11821, **_TIMM}, "y_120 y_160"),
    ("untrained", {"hf_hub_id": None, **_TIMM}, "y_040_sgn z_005"),
    ("deit_in1k", _TIMM, "y_160"),
    ("tv2_in1k", _TORCHVISION, "x_004_tv x_008 x_016 x_032 x_080 x_160 x_320"),
    ("tv2_in1k", _TORCHVISION, "y_004 y_008_tv y_016 y_032 y_080_tv y_160 y_320"),
    ("swag_ft_in1k", _TORCHVISION_384, "y_160 y_320 y_1280"),
    ("swag_lc_in1k", _TORCHVISION, "y_160 y_320 y_1280"),
    ("seer_ft_in1k", _TORCHVISION_384, "y_320 y_640 y_1280 y_2560"),
    ("seer", {"num_classes": 0, **_TORCHVISION}, "y_320 y_640 y_1280"),
    ("pycls_in1k", _PYCLS, "x_002 x_004 x_006 x_008 x_016 x_032 x_040 x_064 x_080 x_120 x_160 x_320"),
    ("pycls_in1k", _PYCLS, "y_002 y_004 y_006 y_008 y_016 y_032 y_040 y_064 y_080 y_120 y_160 y_320"),
]


def _cfg(name: str, size: int = 224, hf_hub_id: str | None = "timm/", **facts) -> PretrainedCfg:
    return PretrainedCfg(
        hf_hub_id=hf_hub_id,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        first_conv="stem" if name.startswith("v_") else "stem.conv",
        classifier="head.fc",
        **facts,
    )


PRETRAINED_CFGS = {
    f"regnet{name}.{tag}": _cfg(name, **facts) for tag, facts, names in _WEIGHTS for name in names.split()
}

# ---- variants --------------------------------------------------------------------------------------------

_SE = {"se_ratio": 0.25}
_V = {"preact": True, "act_layer": "silu", **_SE}
_Z = {
    "bottle_ratio": 4.0,
    "downsample": None,
    "linear_out": True,
    "act_layer": "silu",
    "zero_init_last": False,
    **_SE,
}


def _line(w0: int, wa: float, wm: float, group_size: int, depth: int, **others) -> dict:
    return {"w0": w0, "wa": wa, "wm": wm, "group_size": group_size, "depth": depth, **others}


_VARIANTS = {
    "regnetx_002": _line(24, 36.44, 2.49, 8, 13),
    "regnetx_004": _line(24, 24.48, 2.54, 16, 22),
    "regnetx_004_tv": _line(24, 24.48, 2.54, 16, 22, group_min_ratio=0.9),
    "regnetx_006": _line(48, 36.97, 2.24, 24, 16),
    "regnetx_008": _line(56, 35.73, 2.28, 16, 16),
    "regnetx_016": _line(80, 34.01, 2.25, 24, 18),
    "regnetx_032": _line(88, 26.31, 2.25, 48, 25),
    "regnetx_040": _line(96, 38.65, 2.43, 40, 23),
    "regnetx_064": _line(184, 60.83, 2.07, 56, 17),
    "regnetx_080": _line(80, 49.56, 2.88, 120, 23),
    "regnetx_120": _line(168, 73.36, 2.37, 112, 19),
    "regnetx_160": _line(216, 55.59, 2.1, 128, 22),
    "regnetx_320": _line(320, 69.86, 2.0, 168, 23),
    "regnety_002": _line(24, 36.44, 2.49, 8, 13, **_SE),
    "regnety_004": _line(48, 27.89, 2.09, 8, 16, **_SE),
    "regnety_006": _line(48, 32.54, 2.32, 16, 15, **_SE),
    "regnety_008": _line(56, 38.84, 2.4, 16, 14, **_SE),
    "regnety_008_tv": _line(56, 38.84, 2.4, 16, 14, group_min_ratio=0.9, **_SE),
    "regnety_016": _line(48, 20.71, 2.65, 24, 27, **_SE),
    "regnety_032": _line(80, 42.63, 2.66, 24, 21, **_SE),
    "regnety_040": _line(96, 31.41, 2.24, 64, 22, **_SE),
    "regnety_064": _line(112, 33.22, 2.27, 72, 25, **_SE),
    "regnety_080": _line(192, 76.82, 2.19, 56, 17, **_SE),
    "regnety_080_tv": _line(192, 76.82, 2.19, 56, 17, group_min_ratio=0.9, **_SE),
    "regnety_120": _line(168, 73.36, 2.37, 112, 19, **_SE),
    "regnety_160": _line(200, 106.23, 2.48, 112, 18, **_SE),
    "regnety_320": _line(232, 115.89, 2.53, 232, 20, **_SE),
    "regnety_640": _line(352, 147.48, 2.4, 328, 20, **_SE),
    "regnety_1280": _line(456, 160.83, 2.52, 264, 27, **_SE),
    "regnety_2560": _line(640, 230.83, 2.53, 373, 27, **_SE),
    "regnety_040_sgn": _line(
        96, 31.41, 2.24, 64, 22, act_layer="silu", norm_layer=partial(GroupNormAct, group_size=16), **_SE
    ),
    "regnetv_040": _line(96, 31.41, 2.24, 64, 22, **_V),
    "regnetv_064": _line(112, 33.22, 2.27, 72, 25, downsample="avg", **_V),
    "regnetz_005": _line(16, 10.7, 2.51, 4, 21, num_features=1024, **_Z),
    "regnetz_040": _line(48, 14.5, 2.226, 8, 28, **_Z),
    "regnetz_040_h": _line(48, 14.5, 2.226, 8, 28, num_features=1536, **_Z),
}

register_variants(RegNet, PRETRAINED_CFGS, _VARIANTS, {"fused": {("stem",): _apply_stem}})
register_model_deprecations(__name__, {"regnetz_040h": "regnetz_040_h"})
