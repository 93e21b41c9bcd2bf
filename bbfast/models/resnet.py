"""ResNet and its descendants: blocks whose branch is added to a shortcut.

`Deep Residual Learning for Image Recognition`, https://arxiv.org/abs/1512.03385, with the changes of `Bag of Tricks`
(https://arxiv.org/abs/1812.01187), ResNeXt (1611.05431), Wide ResNet (1605.07146), SENet (1709.01507), ECA-Net
(1910.03151), anti-aliasing (1904.11486), ResNet-RS (2103.07579) and pruning (2002.08258). Names, weights and state_dict
keys are timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.models._backbone import Backbone
from bbfast.models._factory import register_variants
from bbfast.models._layers import Activation, resolve_act
from bbfast.models._pool import GlobalPool2d
from bbfast.models._registry import register_model_deprecations
from bbfast.models._resnet_blocks import (
    STEM_TYPES,
    BasicBlock,
    Bottleneck,
    ResidualBlock,
    apply_stem,
    downsample_avg,
    downsample_conv,
    stem_conv,
    stem_pool,
)
from bbfast.models._resnet_cfgs import DEPRECATED_NAMES, pretrained_cfgs
from bbfast.models._resnet_layers import DropBlock2d, check_aa_layer, resolve_norm
from bbfast.models._resnet_pruned import narrow
from bbfast.models._resnet_variants import PRUNED_VARIANTS, VARIANTS
from bbfast.nn._arguments import check_bool, check_int, check_ints, check_probability

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]

STAGES = 4


class ResNet(Backbone):
    """Stem, four stages of blocks at halving resolution, a pooled classifier.

    Convolutions, BatchNorms, activations and shortcuts run as fused ops, so hooks on the stem's modules and on
    modules inside blocks do not run; hooks on blocks, stages, `maxpool`, the classifier and the model do.

    Args:
        block: `BasicBlock` or `Bottleneck`, one for all stages or one per stage.
        layers: blocks of each of the four stages.
        num_classes: classes of the classifier; 0 leaves it out. in_chans: channels of the input.
        output_stride: 32, 16 or 8; strides beyond this become dilation.
        global_pool: see `GlobalPool2d`; `""`, which leaves the map unpooled, goes with num_classes=0.
        cardinality: groups of a Bottleneck's 3x3 convolution; base_width: channels of each where the stage has 64.
        stem_width, stem_type: see `stem_conv`. replace_stem_pool: a strided convolution instead of the maximum.
        block_reduce_first: divides the channels that a block's first convolution makes.
        down_kernel_size: of the shortcuts' strided convolutions. avg_down: means of 2x2 pixels and a 1x1 convolution.
        channels: of the stages; a Bottleneck returns four times as many.
        act_layer: by timm's name. norm_layer: "batchnorm2d", "groupnorm", or a function of channels, device and dtype;
            a BatchNorm is fused, others are not.
        aa_layer: "avg" or "blur" shrink maps after a convolution that does not, None leaves it to the convolution.
        drop_rate: dropout before the classifier. drop_path_rate: block i of n drops its branch, per sample, with
            probability rate * i / (n - 1). drop_block_rate: of the squares dropped in the last two stages.
        zero_init_last: zero the last norm's weight of each block; the block begins as its shortcut.
        block_args: more for each block: attn_layer, which is "se", "eca", None or a function of channels, device and
            dtype.
        device, dtype: of parameters and buffers.
    """

    def __init__(
        self,
        block: type[ResidualBlock] | Sequence[type[ResidualBlock]],
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        cardinality: int = 1,
        base_width: int = 64,
        stem_width: int = 64,
        stem_type: str = "",
        replace_stem_pool: bool = False,
        block_reduce_first: int = 1,
        down_kernel_size: int = 1,
        avg_down: bool = False,
        channels: Sequence[int] = (64, 128, 256, 512),
        act_layer: str = "relu",
        norm_layer: str | Callable[..., nn.Module] = "batchnorm2d",
        aa_layer: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        zero_init_last: bool = True,
        block_args: Mapping | None = None,
        device=None,
        dtype=None,
    ):
        check_int("in_chans", in_chans, minimum=1)
        check_int("stem_width", stem_width, minimum=4)
        for name, value in (
            ("cardinality", cardinality),
            ("base_width", base_width),
            ("block_reduce_first", block_reduce_first),
            ("down_kernel_size", down_kernel_size),
        ):
            check_int(name, value, minimum=1)
        for name, value in (
            ("drop_rate", drop_rate),
            ("drop_path_rate", drop_path_rate),
            ("drop_block_rate", drop_block_rate),
        ):
            check_probability(name, value)
        for name, value in (
            ("replace_stem_pool", replace_stem_pool),
            ("avg_down", avg_down),
            ("zero_init_last", zero_init_last),
        ):
            check_bool(name, value)
        if stem_type not in STEM_TYPES:
            raise ValueError(f"stem_type={stem_type!r} is not known; allowed: {', '.join(map(repr, STEM_TYPES))}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r} is not allowed; it must be 8, 16 or 32")
        check_aa_layer(aa_layer)
        super().__init__(num_classes, in_chans)
        factory = {"device": device, "dtype": dtype}
        act, norm = resolve_act(act_layer), resolve_norm(norm_layer)
        self.drop_rate = drop_rate

        inplanes = 2 * stem_width if stem_type else 64
        self.conv1 = stem_conv(in_chans, stem_width, stem_type, act, norm, **factory)
        self.bn1 = norm(inplanes, **factory)
        self.act1 = Activation(act)
        self.feature_info = [{"num_chs": inplanes, "reduction": 2, "module": "act1"}]
        self.maxpool = stem_pool(inplanes, replace_stem_pool, act, norm, aa_layer, **factory)

        stages = make_stages(
            _check_blocks(block),
            _check_stages("channels", channels),
            _check_stages("layers", layers),
            inplanes,
            output_stride=output_stride,
            avg_down=avg_down,
            down_kernel_size=down_kernel_size,
            drop_path_rate=drop_path_rate,
            drop_block_rate=drop_block_rate,
            norm_layer=norm,
            block_args={
                "cardinality": cardinality,
                "base_width": base_width,
                "reduce_first": block_reduce_first,
                "act": act,
                "aa_layer": aa_layer,
                **(block_args or {}),
            },
            **factory,
        )
        for name, stage, info in stages:
            self.add_module(name, stage)
            self.feature_info.append({**info, "module": name})
        self.num_features = self.feature_info[-1]["num_chs"]
        self._set_classifier(num_classes, global_pool)
        self.init_weights(zero_init_last)

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Normal weights of convolutions, by their fan-out; zero ones of each block's last norm if zero_init_last."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock) and zero_init_last:
                module.zero_init_last()

    # ---- forward

    def _maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        x = apply_stem(self.conv1, self.bn1, self.act1, x)
        yield x
        x = self.maxpool(x)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for stage in stages[: len(self.feature_info) - 1]:
            x = self._run(stage, x)
            yield x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooling, dropout and classifier; pre_logits leaves it out: `[N, head_hidden_size]`."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    # ---- what one does with a model

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last layer (`nn.Identity` where num_classes is 0), or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, and the pooling unless global_pool is None."""
        self._set_classifier(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        check_int("num_classes", num_classes, minimum=0)
        pool = GlobalPool2d(global_pool, flatten=True)
        pool.check_classifier(num_classes)
        weight = next(self.conv1.parameters())
        self.num_classes = num_classes
        self.global_pool = pool.train(self.training)
        self.head_hidden_size = self.num_features * pool.feat_mult()
        factory = {"device": weight.device, "dtype": weight.dtype}
        fc = nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()
        self.fc = fc.train(self.training)

    def _keep_maps(self, count: int, *, keep_norm: bool, keep_head: bool) -> None:
        for stage in range(count, 1 + STAGES):
            setattr(self, f"layer{stage}", nn.Sequential())
        if count == 1:
            self.maxpool = nn.Identity()
        self.num_features = self.feature_info[count - 1]["num_chs"]

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates; coarse: by stage."""
        return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def make_stages(
    blocks: Sequence[type[ResidualBlock]],
    channels: Sequence[int],
    layers: Sequence[int],
    inplanes: int,
    *,
    output_stride: int,
    avg_down: bool,
    down_kernel_size: int,
    drop_path_rate: float,
    drop_block_rate: float,
    norm_layer: Callable[..., nn.Module],
    block_args: Mapping,
    device=None,
    dtype=None,
) -> Iterator[tuple[str, nn.Sequential, dict]]:
    """The name, the blocks and num_chs and reduction of each stage; the arguments are `ResNet`'s."""
    factory = {"norm_layer": norm_layer, "device": device, "dtype": dtype}
    net_stride, dilation, previous_dilation = 4, 1, 1
    index = 0
    for stage, (block, planes, depth) in enumerate(zip(blocks, channels, layers)):
        stride = 1 if stage == 0 else 2
        if net_stride >= output_stride:
            dilation, stride = dilation * stride, 1
        net_stride *= stride

        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or inplanes != outplanes:
            if avg_down:
                downsample = downsample_avg(inplanes, outplanes, stride=stride, dilation=dilation, **factory)
            else:
                downsample = downsample_conv(
                    inplanes,
                    outplanes,
                    kernel_size=down_kernel_size,
                    stride=stride,
                    dilation=dilation,
                    first_dilation=previous_dilation,
                    **factory,
                )
        modules = []
        for _ in range(depth):
            modules.append(
                block(
                    inplanes,
                    planes,
                    stride=stride,
                    downsample=downsample,
                    dilation=dilation,
                    first_dilation=previous_dilation,
                    drop_block=_drop_block(stage, drop_block_rate),
                    drop_path_rate=drop_path_rate * index / max(sum(layers) - 1, 1),
                    **block_args,
                    **factory,
                )
            )
            inplanes, stride, downsample, previous_dilation = outplanes, 1, None, dilation
            index += 1
        yield f"layer{stage + 1}", nn.Sequential(*modules), {"num_chs": outplanes, "reduction": net_stride}


def _drop_block(stage: int, rate: float) -> DropBlock2d | None:
    """Squares of 5 pixels in the last stage but one, fewer of them than the 3 pixels wide ones in the last."""
    if not rate or stage < STAGES - 2:
        return None
    return DropBlock2d(rate, 5, 0.25) if stage == STAGES - 2 else DropBlock2d(rate, 3)


def _check_blocks(block) -> tuple[type[ResidualBlock], ...]:
    """One block per stage."""
    blocks = tuple(block) if isinstance(block, (tuple, list)) else (block,) * STAGES
    if not all(isinstance(one, type) and issubclass(one, ResidualBlock) for one in blocks):
        raise TypeError(f"block must be BasicBlock, Bottleneck or {STAGES} of these, got {block!r}")
    return _check_count("block", blocks)


def _check_stages(name: str, values) -> tuple[int, ...]:
    return _check_count(name, check_ints(name, values, minimum=1))


def _check_count(name: str, values: tuple) -> tuple:
    if len(values) != STAGES:
        raise ValueError(f"{name} must have one entry for each of the {STAGES} stages, got {len(values)}")
    return values


def _pruned_resnet(*, pruned_channels, **model_arguments) -> ResNet:
    """A ResNet whose convolutions keep only some of their channels."""
    model = ResNet(**model_arguments)
    narrow(model, pruned_channels)
    return model


# ---- registration ----------------------------------------------------------------------------------------

PRETRAINED_CFGS = pretrained_cfgs(
    deep_stems=[name for name, arguments in {**VARIANTS, **PRUNED_VARIANTS}.items() if "stem_type" in arguments]
)
FEATURE_CFG = {"fused": {("conv1", "bn1", "act1"): apply_stem}}

register_variants(ResNet, PRETRAINED_CFGS, VARIANTS, FEATURE_CFG)
register_variants(_pruned_resnet, PRETRAINED_CFGS, PRUNED_VARIANTS, FEATURE_CFG)
register_model_deprecations(__name__, DEPRECATED_NAMES)
