"""The static kernel report: compiles the Triton kernels as their launchers would launch them, without a GPU.

    python -m bbfast.benchmarks.kernels [--arch 80 90 100] [--set NAME ...] [--case TEXT ...] [--json FILE] [--check]

Launchers run on meta tensors with their kernels replaced by recorders, so what is compiled is what a real launch of
that shape compiles: the same heuristics, constants and specialisations (1, multiples of 16, None). Registers, shared
memory and spills come from the cubin, instructions from its disassembly. Must run without TRITON_INTERPRET.

Times are floors, not measurements: bytes over 3.0 TB/s (device copy on an H100 80GB HBM3) and instructions over the
issue rate of its 132 multiprocessors (4 warps a cycle at 1.75 GHz). The larger one binds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bbfast.triton_kernels import (
    add_layer_norm,
    batch_norm_act,
    batch_statistics,
    depthwise_conv_bn_act,
    drop_path_add,
    window_attention,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MODULES = (add_layer_norm, batch_norm_act, batch_statistics, depthwise_conv_bn_act, drop_path_add, window_attention)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRITON_TYPES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int32: "i32", torch.int64: "i64"}

COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg")

REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
SECTOR_BYTES = 32
# The least that an architecture lets a program have: sm_86 and sm_89 count as sm_80.
SHARED_BYTES_PER_PROGRAM = {80: 101376, 90: 232448, 100: 232448}
COPY_BYTES_PER_SECOND = 3.0e12
LANE_INSTRUCTIONS_PER_SECOND = 132 * 4 * 32 * 1.75e9


# ---- recording launches ----------------------------------------------------------------------------------


@dataclass
class Launch:
    """One kernel launch as a launcher asked for it: argument values by name, and the compiler's options."""

    kernel: JITFunction
    programs: int
    values: dict
    options: dict

    def source(self) -> ASTSource:
        """What Triton would compile for these arguments, by its own specialisation rules."""
        constants, attributes = {}, {}

        def kind(value, path):
            if isinstance(value, torch.Tensor):
                attributes[path] = [["tt.divisibility", 16]]  # allocations are aligned
                return "*" + TRITON_TYPES[value.dtype]
            if isinstance(value, tuple):
                return tuple(kind(item, (*path, i)) for i, item in enumerate(value))
            if value is None or (type(value) is int and value == 1):
                constants[path] = value
                return "constexpr"
            if type(value) is int:
                if value % 16 == 0:
                    attributes[path] = [["tt.divisibility", 16]]
                return "i32" if -(2**31) <= value < 2**31 else "i64"
            return "fp32"

        signature = {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.values[parameter.name]
            if parameter.is_constexpr:
                constants[(index,)] = value
                signature[parameter.name] = "constexpr"
            else:
                signature[parameter.name] = kind(value, (index,))
        return ASTSource(self.kernel, signature, constants, attributes)


class _Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: JITFunction, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*args, **kwargs):
            options = {name: kwargs.pop(name) for name in COMPILER_OPTIONS if name in kwargs}
            values = {p.name: p.default for p in self.kernel.params}
            values |= dict(zip(values, args)) | kwargs
            programs = 1
            for size in grid(values) if callable(grid) else grid:
                programs *= size
            self.launches.append(Launch(self.kernel, programs, values, options))

        return record


@contextlib.contextmanager
def recorded_launches(arch: int) -> Iterator[list[Launch]]:
    """Inside, launches of all kernels, as on a GPU of compute capability `arch`, are collected and nothing runs."""
    launches: list[Launch] = []
    replaced = []
    for module in (depthwise_conv_bn_act, window_attention):
        replaced.append((module, "device_capability", module.device_capability))
        module.device_capability = lambda x: divmod(arch, 10)
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                replaced.append((module, name, value))
                setattr(module, name, _Recorder(value, launches))
    try:
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


# ---- compiling and reading cubins ------------------------------------------------------------------------


@dataclass
class Report:
    """What a cubin says of one launch.

    Attributes:
        spill_bytes: bytes of the stack per thread, where instructions use it.
        occupancy: resident threads over the most that a multiprocessor takes, as registers allow.
        outputs: output elements of the launch; of attention kernels padded scores, each of which is much more work.
        per_output: lane-instructions per output (depthwise and attention kernels).
        traffic_bytes: what the launch must move at least, halos left out; halo is what they multiply reads with. Of
            attention kernels in whole sectors, as each head's rows are read, and with the bias, `bias_bytes` of it.
        least_bytes: the tensors of an attention kernel, each once.
        vector_bytes: what a thread loads at once, by the strides of the tensors.
        opcodes: how often each SASS opcode stands in the kernel, widths included (LDG.E.128).
    """

    case: str
    kernel: str
    arch: int
    tile: str
    num_warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    occupancy: float
    instructions: int
    per_output: float | None = None
    outputs: int | None = None
    traffic_bytes: int | None = None
    bias_bytes: int | None = None
    least_bytes: int | None = None
    vector_bytes: int | None = None
    halo: float | None = None
    read_per_output_byte: float | None = None
    opcodes: dict[str, int] = field(default_factory=dict)

    @property
    def memory_us(self) -> float | None:
        return self.traffic_bytes and self.traffic_bytes / COPY_BYTES_PER_SECOND * 1e6

    @property
    def issue_us(self) -> float | None:
        return self.outputs and self.per_output and self.per_output * self.outputs / LANE_INSTRUCTIONS_PER_SECOND * 1e6

    def narrow_accesses(self) -> list[str]:
        """Global loads and stores of less than 16 bytes per thread, those of the [N, C] means left out."""
        wide = (".128",)
        means = {"LDG.E", "STG.E", "LDG.E.U16", "STG.E.U16", "LDG.E.64", "STG.E.64"}
        found = {op: n for op, n in self.opcodes.items() if op.startswith(("LDG", "STG")) and not op.endswith(wide)}
        return [f"{n} {op}" for op, n in found.items() if n > 1 or op not in means]


def compile_launch(launch: Launch, arch: int, case: str) -> Report:
    compiled = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        opcodes, loops = _disassembly(_tool("nvdisasm", "-c", file.name))
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    threads = compiled.metadata.num_warps * 32
    per_block = -(-registers // 8) * 8 * threads
    blocks = min(THREADS_PER_MULTIPROCESSOR // threads, REGISTERS_PER_MULTIPROCESSOR // per_block, 32)
    values = launch.values
    tile = ""
    if "TILE_S" in values:
        tile = f"{values['BLOCK_T']}x{values['BLOCK_C']} S{values['TILE_S']}/{values['span']}"
    elif "BLOCK_Q" in values:
        tile = f"{values['BLOCK_Q']}x{values['BLOCK_K']}"
    report = Report(
        case=case,
        kernel=launch.kernel.__name__.strip("_"),
        arch=arch,
        tile=tile,
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        # ptxas for sm_100 reserves 8 bytes here and there that no instruction touches.
        spill_bytes=stack + local if any(opcode.startswith(("STL", "LDL")) for opcode in opcodes) else 0,
        occupancy=blocks * threads / THREADS_PER_MULTIPROCESSOR,
        instructions=len(opcodes),
        opcodes=dict(Counter(opcodes)),
    )
    if "TILE_S" in values:
        _add_depthwise_work(report, launch, loops)
    elif report.kernel.startswith("window_attention"):
        _add_attention_work(report, launch, loops)
    return report


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


def _disassembly(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes in order, and (first, length) of each loop: a branch to a label above it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif found := re.match(r"\s*(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\b(.*);", line):
            opcodes.append(found.group(1))
            target = re.search(r"`\((\.L_\w+)\)", found.group(2))
            first = labels.get(target.group(1)) if target else None
            # The endless branch onto itself after EXIT is padding, not a loop.
            if found.group(1).startswith("BRA") and first is not None and first < len(opcodes) - 1:
                loops.append((first, len(opcodes) - first))
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes.pop()
    return opcodes, loops


def _add_depthwise_work(report: Report, launch: Launch, loops: list[tuple[int, int]]) -> None:
    """Instructions per output and bytes, for the kernels that walk along S with one loop over kernel rows inside."""
    values = launch.values
    if report.kernel in ("forward_kernel", "statistics_kernel", "conv_grad_kernel") and len(loops) > 1:
        inner, walk = sorted(length for _, length in loops)[:2]
        per_tile = walk + (values["KERNEL_T"] - 1) * inner
        per_thread = values["BLOCK_T"] * values["BLOCK_C"] * values["TILE_S"] / (32 * report.num_warps)
        report.per_output = per_tile / per_thread
    if report.kernel != "forward_kernel":
        return
    x, channels = values["x_ptr"], values["channel_vectors"] * values["VECTOR"]
    images = launch.programs // (values["c_tiles"] * values["t_tiles"] * values["s_splits"])
    pixels_in, pixels_out = values["in_t"] * values["in_s"], values["out_t"] * values["out_s"]
    report.vector_bytes = values["VECTOR"] * x.element_size()
    report.outputs = images * channels * pixels_out
    report.traffic_bytes = images * channels * (pixels_in + pixels_out) * x.element_size()
    report.halo = _halo(values, "T", values["BLOCK_T"]) * _halo(values, "S", values["span"])
    report.read_per_output_byte = report.halo * pixels_in / pixels_out


def _add_attention_work(report: Report, launch: Launch, loops: list[tuple[int, int]]) -> None:
    """Instructions per padded score of the kernels that loop over windows and, where they are large, over tiles inside.

    The mask counts as if every window had one. sm_100's waits are loops too, so there is no telling which is which.
    """
    values = launch.values
    qkv, bias = values["qkv_ptr"], values["bias_ptr"]
    # Rows of C channels per token: q, k, v and y; q, k, v, dy, dq, dk and dv.
    rows = {"window_attention_forward_kernel": 4, "window_attention_backward_kernel": 7}.get(report.kernel)
    if rows:
        tokens, row_bytes = qkv[..., 0].numel(), values["HEAD_DIM"] * qkv.element_size()
        firsts = range(0, values["heads"] * row_bytes, row_bytes)
        sectors = sum(-(-(first + row_bytes) // SECTOR_BYTES) - first // SECTOR_BYTES for first in firsts)
        report.least_bytes = rows * tokens * values["heads"] * row_bytes
        report.bias_bytes = bias.nbytes
        report.traffic_bytes = rows * tokens * sectors * SECTOR_BYTES + bias.nbytes
    if report.arch >= 100 or not loops:
        return
    *inner, windows = sorted(length for _, length in loops)
    tiles = {"key_grad": values["QUERY_TILES"], "bias_grad": 1}.get(report.kernel.split("_", 2)[2][:-7])
    tiles = values["KEY_TILES"] if tiles is None else tiles
    per_thread = tiles * values["BLOCK_Q"] * values["BLOCK_K"] / (32 * report.num_warps)
    report.per_output = (windows + (tiles - 1) * sum(inner)) / per_thread
    scores = values["QUERY_TILES"] * values["BLOCK_Q"] * values["KEY_TILES"] * values["BLOCK_K"]
    report.outputs = values["num_windows"] * values["heads"] * scores


def _halo(values: dict, axis: str, block: int) -> float:
    """Input positions that all tiles along an axis read together, over the positions there are."""
    lower = axis.lower()
    size_in, size_out, pad = values[f"in_{lower}"], values[f"out_{lower}"], values[f"pad_{lower}"]
    stride, reach = values[f"STRIDE_{axis}"], (values[f"KERNEL_{axis}"] - 1) * values[f"DILATION_{axis}"]
    read = 0
    for first in range(0, size_out, block):
        last = min(first + block, size_out) - 1
        read += min(last * stride - pad + reach + 1, size_in) - max(first * stride - pad, 0)
    return read / size_in


# ---- cases -----------------------------------------------------------------------------------------------


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
        x = torch.empty(self.batch, self.channels, self.size, self.size, dtype=dtype, device="meta")
        if self.layout == "NHWC":
            x = x.to(memory_format=torch.channels_last)
        weight = torch.empty(self.channels, 1, self.kernel, self.kernel, dtype=dtype, device="meta")
        vector = torch.empty(self.channels, device="meta")
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
        multiplier = torch.empty(x.shape[0], dtype=x.dtype, device="meta")
        scale = v if scaled else None
        drop_path_add.forward(x, torch.empty_like(x), multiplier, scale)
        drop_path_add.backward(x, torch.empty_like(x), multiplier, scale, x.dtype)

    return run


def _add_layer_norm(channels: int, size: int, dtype: str, scaled: bool = False) -> Callable[[], None]:
    """A training step with drop path; without one, and in inference, where there is no layer scale either."""

    def run():
        x = torch.empty(128, size, size, channels, dtype=DTYPES[dtype], device="meta")
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
        qkv = torch.empty(*shape, 3 * self.channels, dtype=dtype, device="meta")
        table = torch.empty((2 * self.window - 1) ** 2, self.heads, device="meta")
        qkv_bias = torch.empty(3 * self.channels, device="meta")
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


# The first three make the default report.
SETS = ("mobilenetv3", "training", "window_attention", "sweep", "window_attention_sweep")


# ---- report ----------------------------------------------------------------------------------------------


def _compile_case(name: str, index: int, archs: tuple[int, ...]) -> list[Report]:
    description, launch_all = list(cases(name))[index]
    found = []
    for arch in archs:
        with recorded_launches(arch) as launches:
            launch_all()
        found += [compile_launch(launch, arch, description) for launch in launches]
    return found


def reports(name: str, archs: tuple[int, ...], texts: Sequence[str] = ("",)) -> list[Report]:
    """Compiles the cases of a set whose description holds one of the texts, several processes at a time."""
    indices = [i for i, (description, _) in enumerate(cases(name)) if any(text in description for text in texts)]
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(_compile_case, name, index, archs) for index in indices]
        progress = track(futures, f"compiling {name}", console=Console(stderr=True), disable=not sys.stderr.isatty())
        return [report for future in progress for report in future.result()]


def problems(report: Report) -> list[str]:
    """What a kernel must not show: spills, more than fits, narrow half-precision NHWC forwards, wide halos."""
    found = []
    if not report.occupancy:
        found.append(f"{report.registers} registers for each of {report.num_warps} warps are more than there are")
    if report.shared_bytes > SHARED_BYTES_PER_PROGRAM[report.arch]:
        found.append(f"{report.shared_bytes} bytes of shared memory are more than there are")
    if report.spill_bytes:
        found.append(f"{report.spill_bytes} bytes spilled")
    if report.vector_bytes == 16 and report.narrow_accesses():
        found.append(f"narrow accesses: {', '.join(report.narrow_accesses())}")
    if report.halo and report.halo > 1.15 and not report.case.startswith("training"):
        found.append(f"halo {report.halo:.2f}")
    return found


def print_table(rows: list[Report]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 230)
    table = Table(title="Triton kernels, compiled and not run")
    headers = ("case", "kernel", "sm", "tile", "warps", "reg", "shared B", "spill B", "occup.", "instr.")
    for header in (*headers, "instr./out", "MB", "halo", "read/out B", "memory us", "issue us", "binds"):
        table.add_column(
            header, no_wrap=True, justify="left" if header in ("case", "kernel", "tile", "binds") else "right"
        )

    def number(value, pattern):
        return "" if value is None else format(value, pattern)

    for r in rows:
        binds = ""
        if r.memory_us and r.issue_us:
            binds = "memory" if r.memory_us >= r.issue_us else "issue"
        table.add_row(
            r.case,
            r.kernel.removesuffix("_kernel"),
            str(r.arch),
            r.tile,
            str(r.num_warps),
            str(r.registers),
            str(r.shared_bytes),
            str(r.spill_bytes),
            f"{r.occupancy:.0%}",
            str(r.instructions),
            number(r.per_output, ".1f"),
            number(r.traffic_bytes and r.traffic_bytes / 1e6, ".1f"),
            number(r.halo, ".2f"),
            number(r.read_per_output_byte, ".2f"),
            number(r.memory_us, ".1f"),
            number(r.issue_us, ".1f"),
            binds,
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m bbfast.benchmarks.kernels")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, e.g. 80 90 100")
    parser.add_argument("--set", nargs="+", default=list(SETS[:3]), dest="sets")
    parser.add_argument(
        "--case", nargs="+", default=[""], dest="texts", metavar="TEXT", help="only cases described with one of these"
    )
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 on spills, narrow accesses or halos above 1.15")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    for name in options.sets:
        if name not in SETS:
            parser.error(f"--set {name!r} is not known; allowed: {', '.join(SETS)}")

    rows = [report for name in options.sets for report in reports(name, tuple(options.arch), options.texts)]
    if not rows:
        parser.error(f"--case {' '.join(options.texts)} describes no case of {', '.join(options.sets)}")
    print_table(rows)
    if options.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps({"versions": versions, "reports": [asdict(r) for r in rows]}, indent=1))
    failures = [f"{r.case}, {r.kernel}, sm_{r.arch}: {problem}" for r in rows for problem in problems(r)]
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(failures)} problems")
    return 1 if failures and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
