"""Launches listed by hand: shapes, dtypes and layouts beyond those of whole models; see kernel_models.py for these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from bbfast.benchmarks.kernel_launches import DTYPES
from bbfast.triton_kernels import (
    add_layer_norm,
    batch_norm_act,
    depthwise_conv_bn_act,
    drop_path_add,
    mlp,
    window_attention,
)
from bbfast.triton_kernels.mlp_sizes import MOST_CHANNELS
from bbfast.triton_kernels.pointwise_sizes import UNIT

CASES = ("mobilenetv3", "training", "window_attention", "sweep", "window_attention_sweep", "mlp_sweep")


@dataclass(frozen=True)
class DepthwiseShape:
    """A depthwise layer at 224 pixels: channels, input size, kernel, stride, activation, squeeze output."""

    channels: int
    size: int
    kernel: int
    stride: int
    act: str
    squeeze: bool = False
    dtype: str = "bf16"
    layout: str = "NHWC"
    batch: int = 128

    def __str__(self) -> str:
        text = f"{self.channels}x{self.size}x{self.size} k{self.kernel} s{self.stride} {self.act}"
        return text + (" squeeze" if self.squeeze else "") + f" {self.dtype} {self.layout}"

    def arguments(self):
        dtype = DTYPES[self.dtype]
        x = torch.empty(self.batch, self.channels, self.size, self.size, dtype=dtype, device="cuda")
        if self.layout == "NHWC":
            x = x.to(memory_format=torch.channels_last)
        weight = torch.empty(self.channels, 1, self.kernel, self.kernel, dtype=dtype, device="cuda")
        vector = torch.empty(self.channels, device="cuda")
        pad = self.kernel // 2
        return x, weight, vector, ((self.stride,) * 2, (pad,) * 4, (1, 1))

    def eval_forward(self) -> None:
        x, weight, v, geometry = self.arguments()
        depthwise_conv_bn_act.forward(x, weight, None, v, v, v, v, *geometry, False, 0.1, 1e-5, self.act, self.squeeze)

    def training_step(self) -> None:
        x, weight, v, geometry = self.arguments()
        config = (1e-5, self.act)
        y, squeezed, *_ = depthwise_conv_bn_act.forward(
            x, weight, None, v, v, v, v, *geometry, True, 0.1, *config, self.squeeze
        )
        depthwise_conv_bn_act.backward(
            y, squeezed, x, weight, None, v, v, v, v, None, None, *geometry, True, *config, True, True
        )

    def frozen_backward(self) -> None:
        x, weight, v, geometry = self.arguments()
        y = torch.empty_like(x[:, :, :: self.stride, :: self.stride])
        statistics = (None, None, v, v)
        config = (False, 1e-5, self.act, True, True)
        depthwise_conv_bn_act.backward(y, None, x, weight, None, v, v, *statistics, *geometry, *config)


# The depthwise layers of mobilenetv3_large_100, each shape once.
MOBILENETV3_LARGE = (
    DepthwiseShape(16, 112, 3, 1, "relu"),
    DepthwiseShape(64, 112, 3, 2, "relu"),
    DepthwiseShape(72, 56, 3, 1, "relu"),
    DepthwiseShape(72, 56, 5, 2, "relu", True),
    DepthwiseShape(120, 28, 5, 1, "relu", True),
    DepthwiseShape(240, 28, 3, 2, "hardswish"),
    DepthwiseShape(200, 14, 3, 1, "hardswish"),
    DepthwiseShape(184, 14, 3, 1, "hardswish"),
    DepthwiseShape(480, 14, 3, 1, "hardswish", True),
    DepthwiseShape(672, 14, 3, 1, "hardswish", True),
    DepthwiseShape(672, 14, 5, 2, "hardswish", True),
    DepthwiseShape(960, 7, 5, 1, "hardswish", True),
)


# (channels, size, kernel, stride)
SWEEP = (
    (32, 112, 3, 1),
    (144, 56, 3, 2),
    (240, 28, 5, 2),
    (672, 14, 5, 1),
    (768, 7, 7, 1),
    (21, 30, 3, 1),
    (64, 28, 13, 1),
)


def _batch_norm_act(channels: int, size: int, dtype: str, layout: str, act: str, residual: bool) -> Callable[[], None]:
    def run():
        x, _, v, _ = DepthwiseShape(channels, size, 1, 1, act, dtype=dtype, layout=layout).arguments()
        other = torch.empty_like(x) if residual else None
        batch_norm_act.forward(x, v, v, other, v, v, False, 0.1, 1e-5, act)
        y, mean, invstd = batch_norm_act.forward(x, v, v, other, v, v, True, 0.1, 1e-5, act)
        batch_norm_act.backward(y, x, v, v, other, mean, invstd, None, None, True, 1e-5, act)

    return run


def _drop_path_add(channels: int, size: int, dtype: str, layout: str, scaled: bool) -> Callable[[], None]:
    def run():
        x, _, v, _ = DepthwiseShape(channels, size, 1, 1, "", dtype=dtype, layout=layout).arguments()
        multiplier = torch.empty(x.shape[0], dtype=x.dtype, device="cuda")
        scale = v if scaled else None
        drop_path_add.forward(x, torch.empty_like(x), multiplier, scale)
        drop_path_add.backward(x, torch.empty_like(x), multiplier, scale, x.dtype)

    return run


def _add_layer_norm(channels: int, size: int, dtype: str, scaled: bool = False) -> Callable[[], None]:
    """A training step with drop path; without one, and in inference, where there is no layer scale either."""

    def run():
        x = torch.empty(128, size, size, channels, dtype=DTYPES[dtype], device="cuda")
        multiplier, vector, rows = x.new_empty(128), x.new_empty(channels), x.new_empty(x.shape[:-1]).float()
        affine = (vector, vector)
        for branch, drop, scale in ((x, multiplier, vector if scaled else None), (x, None, None), (None, None, None)):
            drop_dtype = None if drop is None else x.dtype
            add_layer_norm.forward(x, branch, drop, scale, *affine, 1e-5, x.dtype, drop is not None)
            vectors = (drop, scale, *affine)
            add_layer_norm.backward(
                x, x, x, None if scale is None else x, *vectors, rows, rows, x.dtype, drop_dtype, True
            )
            if scaled:
                break

    return run


def _mlp(channels: int, size: int, norm: bool, wide: bool) -> Callable[[], None]:
    """Of Swin with a norm, of a ConvNeXt that has normalised without one; `wide` are float32 maps under autocast."""

    def run():
        weights = torch.empty(2, 4 * channels, channels, dtype=torch.bfloat16, device="cuda")
        x = weights.new_empty(128, size, size, channels, dtype=torch.float32 if wide else torch.bfloat16)
        units, vector = (weights.new_empty(length) for length in (4 * channels, channels))
        layers = (weights[0], units, weights[1].view(channels, -1), vector)
        affine, scale, eps = ((vector, vector), None, 1e-5) if norm else ((None, None), vector, None)
        mlp.forward(x, *layers, *affine, scale, x, eps, "gelu", x.dtype)

    return run


@dataclass(frozen=True)
class AttentionShape:
    """A Swin block's attention: map, channels, heads, window, shift."""

    batch: int
    size: int
    channels: int
    heads: int
    window: int
    shift: int
    dtype: str = "bf16"

    def __str__(self) -> str:
        text = f"attention {self.size}x{self.size} window {self.window} shift {self.shift}"
        return f"{text} {self.heads} heads of {self.channels // self.heads} {self.dtype}"

    def forward_and_backward(self) -> None:
        shape, dtype = (self.batch, self.size, self.size), DTYPES[self.dtype]
        qkv = torch.empty(*shape, 3 * self.channels, dtype=dtype, device="cuda")
        table = torch.empty((2 * self.window - 1) ** 2, self.heads, device="cuda")
        qkv_bias = torch.empty(3 * self.channels, device="cuda")
        config = (self.heads, (self.window,) * 2, (self.shift,) * 2, 0.1, "shift_then_pad", -100.0)
        y = window_attention.forward(qkv, table, qkv_bias, *config)
        window_attention.backward(y, qkv, table, qkv_bias, *config, True, True)


WINDOW_ATTENTION = (
    AttentionShape(128, 56, 96, 3, 7, 3),  # Swin-T, stages 1 to 4
    AttentionShape(128, 28, 192, 6, 7, 3),
    AttentionShape(128, 14, 384, 12, 7, 3),
    AttentionShape(128, 7, 768, 24, 7, 0),
    AttentionShape(32, 96, 128, 4, 12, 6),  # Swin-B at 384 pixels, stages 1 and 4
    AttentionShape(32, 12, 1024, 32, 12, 0),
)
# Maps that no window divides, so that padding takes part. Every tile that the launchers can choose: heads of 32, 64 and
# 128 channels, and of 20, whose rows vectors do not fit, against windows of each class of size.
WINDOW_ATTENTION_SWEEP = tuple(
    AttentionShape(8, 57, 3 * head_dim, 3, window, window // 2)
    for window in (4, 5, 7, 12, 16)
    for head_dim in (20, 32, 64, 128)
)


def cases(name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(description, what launches the kernels) of one set."""
    if name == "mobilenetv3":
        for shape in MOBILENETV3_LARGE:
            yield str(shape), shape.eval_forward
    elif name == "window_attention":
        for shape in WINDOW_ATTENTION:
            yield str(shape), shape.forward_and_backward
    elif name == "window_attention_sweep":
        for dtype in ("bf16", "fp32"):  # fp16's differ from bf16's in the instructions' type alone
            for shape in WINDOW_ATTENTION_SWEEP:
                shape = replace(shape, dtype=dtype)
                yield str(shape), shape.forward_and_backward
        shape = replace(WINDOW_ATTENTION[0], dtype="fp16")
        yield str(shape), shape.forward_and_backward
    elif name == "mlp_sweep":
        for channels in range(UNIT, MOST_CHANNELS + 1, UNIT):
            for size in (56, 4):  # many rows, and so few that tiles are smaller
                for norm, wide in ((True, False), (True, True), (False, False)):
                    text = f"mlp {channels}x{size}x{size}" + " norm" * norm + " fp32" * wide
                    yield text, _mlp(channels, size, norm, wide)
    elif name == "training":
        for index in (0, 1, 4, 10):
            yield f"training {MOBILENETV3_LARGE[index]}", MOBILENETV3_LARGE[index].training_step
        yield f"frozen {MOBILENETV3_LARGE[2]}", MOBILENETV3_LARGE[2].frozen_backward
        for channels, size in ((96, 56), (768, 7)):
            yield f"add_layer_norm {channels}x{size}x{size} bf16", _add_layer_norm(channels, size, "bf16")
        for layout in ("NHWC", "NCHW"):
            shape = DepthwiseShape(96, 56, 7, 1, "gelu", layout=layout)
            yield f"training {shape}", shape.training_step
            for dtype in ("bf16", "fp32"):
                yield (
                    f"batch_norm_act 256x56x56 {dtype} {layout}",
                    _batch_norm_act(256, 56, dtype, layout, "relu", True),
                )
                yield f"drop_path_add 96x56x56 {dtype} {layout}", _drop_path_add(96, 56, dtype, layout, True)
    else:
        for channels in (3, 24, 67, 384, 1000, 2048):
            for dtype in ("bf16", "fp32"):
                for scaled in (False, True):
                    text = f"add_layer_norm {channels}x14x14 {dtype}" + (" layer scale" if scaled else "")
                    yield text, _add_layer_norm(channels, 14, dtype, scaled)
        for layout in ("NHWC", "NCHW"):
            # Each tile that the elementwise ops can choose, by channels for NHWC and by map size for NCHW.
            for channels, size in (
                (8, 56),
                (24, 56),
                (32, 56),
                (64, 56),
                (96, 4),
                (96, 7),
                (96, 14),
                (96, 28),
                (67, 33),
            ):
                text = f"{channels}x{size}x{size} bf16 {layout}"
                yield f"batch_norm_act {text}", _batch_norm_act(channels, size, "bf16", layout, "gelu", True)
                yield f"drop_path_add {text}", _drop_path_add(channels, size, "bf16", layout, True)
            for dtype in DTYPES:
                for act in ("relu6", "gelu"):
                    for channels, size, kernel, stride in SWEEP:
                        shape = DepthwiseShape(channels, size, kernel, stride, act, kernel == 5, dtype, layout, 32)
                        yield f"training {shape}", shape.training_step
