"""From block strings such as `ir_r2_k3_s2_e6_c24_se0.25` to stages of blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from bbfast.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
)
from bbfast.models._layers import resolve_act, round_channels

# TensorFlow's BatchNorm epsilon, which weights ported from there were trained with.
BN_EPS_TF = 1e-3

_BLOCK_TYPES = {"ir": InvertedResidual, "ds": DepthwiseSeparableConv, "cn": ConvBnAct}
_STRING_ACTS = {"re": "relu", "r6": "relu6", "hs": "hard_swish", "sw": "swish"}
_OPTION = re.compile(r"(r|k|s|e|c|se)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class BlockArgs:
    """One block, before channels are scaled.

    Attributes:
        block_type: ir (inverted residual), ds (depthwise separable) or cn (convolution).
        kernel_size, stride: in pixels; stride counts for the first block of a stage only.
        out_chs: output channels at width 1.
        expansion: expanded channels per input channel (ir).
        se_ratio: reduced squeeze-and-excite channels per channel; 0 for none.
        act: the ops' name of the activation, or None for the model's.
        skip: True or False where the string says so, else None for the type's habit.
    """

    block_type: str
    kernel_size: int
    stride: int
    out_chs: int
    expansion: float = 1.0
    se_ratio: float = 0.0
    act: str | None = None
    skip: bool | None = None


# ---- decoding --------------------------------------------------------------------------------------------


def decode_arch_def(
    arch_def: Sequence[Sequence[str]], depth_multiplier: float = 1.0, fix_first_last: bool = False
) -> list[list[BlockArgs]]:
    """Stages of block strings as stages of blocks, repeats written out.

    Args:
        arch_def: for each stage its block strings: a type, then in any order `r` repeats, `k` kernel size,
            `s` stride, `e` expansion, `c` channels, `se` ratio, `nre`, `nr6`, `nhs` or `nsw` for the
            activation, `skip` or `noskip`.
        depth_multiplier: scales the number of blocks of each stage, rounded up.
        fix_first_last: leave the first and last stage as they are.
    """
    stages = []
    for index, strings in enumerate(arch_def):
        fixed = fix_first_last and index in (0, len(arch_def) - 1)
        decoded = [_decode_block(string) for string in strings]
        stages.append(_repeat(decoded, 1.0 if fixed else depth_multiplier))
    return stages


def _decode_block(string: str) -> tuple[BlockArgs, int]:
    block_type, *options = string.split("_")
    if block_type not in _BLOCK_TYPES:
        raise ValueError(f"block {string!r} has unknown type {block_type!r}; allowed: {', '.join(_BLOCK_TYPES)}")
    numbers, act, skip = {}, None, None
    for option in options:
        if option in ("skip", "noskip"):
            skip = option == "skip"
        elif option[0] == "n" and option[1:] in _STRING_ACTS:
            act = resolve_act(_STRING_ACTS[option[1:]])
        elif match := _OPTION.fullmatch(option):
            numbers[match[1]] = float(match[2])
        else:
            raise ValueError(f"block {string!r} has an unknown option {option!r}")
    if absent := [key for key in ("r", "k", "s", "c") if key not in numbers]:
        raise ValueError(f"block {string!r} lacks {', '.join(absent)}")
    block = BlockArgs(
        block_type=block_type,
        kernel_size=int(numbers["k"]),
        stride=int(numbers["s"]),
        out_chs=int(numbers["c"]),
        expansion=numbers.get("e", 1.0),
        se_ratio=numbers.get("se", 0.0),
        act=act,
        skip=skip,
    )
    return block, int(numbers["r"])


def _repeat(blocks: list[tuple[BlockArgs, int]], depth_multiplier: float) -> list[BlockArgs]:
    """Writes repeats out, the stage's total scaled and dealt out from the last block string to the first."""
    left = sum(repeats for _, repeats in blocks)
    scaled_left = math.ceil(left * depth_multiplier)
    stage: list[BlockArgs] = []
    for block, repeats in reversed(blocks):
        scaled = max(1, round(repeats / left * scaled_left))
        stage = [block] * scaled + stage
        left -= repeats
        scaled_left -= scaled
    return stage


# ---- building --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trunk:
    """Stages of blocks, what is known of the feature maps they make, and the channels of the last one."""

    stages: list[nn.Sequential]
    feature_info: list[dict]
    out_chs: int


def build_trunk(
    in_chs: int,
    stages: Sequence[Sequence[BlockArgs]],
    *,
    output_stride: int = 32,
    pad_type: str = "",
    act: str,
    bn: dict,
    round_chs_fn: Callable[[float], int] = round_channels,
    se_layer: Callable[..., SqueezeExcite] = SqueezeExcite,
    se_from_exp: bool = False,
    drop_path_rate: float = 0.0,
    device=None,
    dtype=None,
) -> Trunk:
    """Builds the blocks that follow a stem of stride 2.

    Args:
        in_chs: the stem's output channels.
        stages: see `decode_arch_def`.
        output_stride: strides beyond this become dilation.
        pad_type: see `create_conv2d`.
        act: the activation of blocks that name none, by the ops' name.
        bn: eps and momentum.
        round_chs_fn: scales and rounds output channels.
        se_layer: made with the channels it scales, `rd_ratio`, `act`, device and dtype.
        se_from_exp: a block's SE ratio is of the expanded channels, not of the input's.
        drop_path_rate: block i of n drops its branch with probability rate * i / n.
    """
    if output_stride not in (2, 4, 8, 16, 32):
        raise ValueError(f"output_stride={output_stride!r} is not allowed; use 2, 4, 8, 16 or 32")
    block_count = sum(len(stage) for stage in stages)
    block_index = 0
    stride, dilation = 2, 1
    feature_info = []
    if stages[0][0].stride > 1:  # the first block shrinks the map, so the stem's is the last one of its size
        feature_info.append({"module": "bn1", "num_chs": in_chs, "stage": 0, "reduction": stride})

    built = []
    for stage_index, stage in enumerate(stages):
        blocks = []
        for index, block in enumerate(stage):
            block = replace(block, stride=block.stride if index == 0 else 1)
            next_dilation = dilation
            if stride * block.stride > output_stride:
                next_dilation = dilation * block.stride
                block = replace(block, stride=1)
            stride *= block.stride
            out_chs = round_chs_fn(block.out_chs)
            arguments = {
                "stride": block.stride,
                "dilation": dilation,
                "pad_type": pad_type,
                "act": block.act or act,
                "bn": bn,
                "drop_path_rate": drop_path_rate * block_index / block_count,
                "device": device,
                "dtype": dtype,
            }
            if block.skip is not None:
                arguments["skip"] = block.skip
            expansion = 1.0
            if block.block_type == "ir":
                arguments["expansion"] = expansion = block.expansion
            if block.se_ratio and block.block_type != "cn":
                rd_ratio = block.se_ratio if se_from_exp else block.se_ratio / expansion
                arguments["se_layer"] = partial(se_layer, rd_ratio=rd_ratio)
            blocks.append(_BLOCK_TYPES[block.block_type](in_chs, out_chs, block.kernel_size, **arguments))
            in_chs, dilation = out_chs, next_dilation
            block_index += 1
        built.append(nn.Sequential(*blocks))
        if stage_index + 1 == len(stages) or stages[stage_index + 1][0].stride > 1:
            module = f"blocks.{stage_index}"
            feature_info.append({"module": module, "num_chs": in_chs, "stage": stage_index + 1, "reduction": stride})
    return Trunk(built, feature_info, in_chs)


def init_weights(model: nn.Module) -> None:
    """Initialises as TensorFlow's EfficientNet does: normal by fan-out per group, a uniform classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            limit = 1.0 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -limit, limit)
            nn.init.zeros_(module.bias)
