"""`depthwise_conv_bn_act` on MobileNetV3-Large's depthwise layers: eager, compiled and bbfast, interleaved.

    python benchmarks/bench_depthwise_conv_bn_act.py [--batch N] [--dtype bf16] [--layout NHWC] [--mode eval train]

One row per layer, mode and provider: p20/p50/p80 ms, GB/s (each input read once, each output written once), percent of
the bandwidth of a device copy measured in the same run, and the largest error against float64, which must pass the
tolerance rule or the row is an error: a fast wrong answer is no result. `train` is forward and backward. On a GPU
inputs rotate through more memory than the L2 cache holds. Writes depthwise_conv_bn_act.json into BBFAST_RESULTS_DIR,
or where --json says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table

from bbfast import dispatch
from bbfast.ops import depthwise_conv_bn_act
from bbfast.reference.activation import ACTIVATIONS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# channels, input size, kernel, stride, activation, squeeze output; each shape once
LAYERS = (
    (16, 112, 3, 1, "relu", False),
    (64, 112, 3, 2, "relu", False),
    (72, 56, 3, 1, "relu", False),
    (72, 56, 5, 2, "relu", True),
    (120, 28, 5, 1, "relu", True),
    (240, 28, 3, 2, "hardswish", False),
    (200, 14, 3, 1, "hardswish", False),
    (184, 14, 3, 1, "hardswish", False),
    (480, 14, 3, 1, "hardswish", True),
    (672, 14, 3, 1, "hardswish", True),
    (672, 14, 5, 2, "hardswish", True),
    (960, 7, 5, 1, "hardswish", True),
)


def eager(x, weight, bn_weight, bn_bias, mean, var, *, stride, padding, training, act, squeeze):
    z = F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])
    y = ACTIVATIONS[act](F.batch_norm(z, mean, var, bn_weight, bn_bias, training))
    return (y, y.mean((2, 3))) if squeeze else y


class Layer:
    """Inputs of one layer, several sets of them, and what to call on them."""

    def __init__(self, layer, batch: int, dtype: torch.dtype, layout: str, training: bool):
        channels, size, kernel, stride, act, squeeze = layer
        self.name = f"{channels}x{size}x{size} k{kernel} s{stride} {act}" + (" squeeze" if squeeze else "")
        self.config = {
            "stride": stride,
            "padding": kernel // 2,
            "training": training,
            "act": act,
            "squeeze": squeeze,
        }
        out = (size - 1) // stride + 1
        element = torch.finfo(dtype).bits // 8
        pixels = batch * channels * element
        trips_in, trips_out = (3, 2) if training else (1, 1)  # train: x, x again for the weight, dx; y, dy
        self.bytes = pixels * (trips_in * size * size + trips_out * out * out)
        sets = max(1, -(-(128 << 20) // (pixels * (size * size + out * out)))) if ON_GPU else 1
        memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        self.sets = []
        for _ in range(min(sets, 16)):
            x = torch.randn(batch, channels, size, size, device=DEVICE, dtype=dtype).to(memory_format=memory_format)
            weight = torch.randn(channels, 1, kernel, kernel, device=DEVICE, dtype=dtype)
            vectors = [torch.rand(channels, device=DEVICE) + 0.5 for _ in range(4)]
            leaves = [t.requires_grad_(training) for t in (x, weight, *vectors[:2])]
            grad = torch.randn(batch, channels, out, out, device=DEVICE, dtype=dtype).to(memory_format=memory_format)
            self.sets.append((leaves, vectors[2:], grad))

    def call(self, function, index: int):
        leaves, running, grad = self.sets[index % len(self.sets)]
        if not self.config["training"]:
            with torch.inference_mode():
                return function(*leaves, *running, **self.config)
        out = function(*leaves, *running, **self.config)
        y = out[0] if self.config["squeeze"] else out
        return torch.autograd.grad(y, leaves, grad)

    def check(self, function) -> float:
        """Largest error of the output against float64; raises where it breaks the tolerance rule."""
        leaves, running, _ = self.sets[0]
        config = self.config | {"squeeze": False}
        with torch.no_grad():
            few = [leaves[0][:2], *leaves[1:]]
            ours = function(*few, *(r.clone() for r in running), **config).double()
            same = eager(*few, *(r.clone() for r in running), **config).double()
            exact = eager(*(t.double() for t in few), *(r.double() for r in running), **config)
        error, baseline = ((out - exact).abs().max().item() for out in (ours, same))
        allowed = 2 * baseline + 4 * torch.finfo(leaves[0].dtype).eps * exact.abs().max().item()
        if not error <= allowed:
            raise RuntimeError(f"{self.name}: error {error:.3g} is above the allowed {allowed:.3g}")
        return error


def milliseconds(run: Callable[[int], object], rounds: int) -> list[float]:
    """Times of `rounds` calls, by events on a GPU and by the clock elsewhere."""
    times = []
    for index in range(rounds):
        if ON_GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(index)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run(index)
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def graphed(layer: Layer, function) -> Callable[[int], object]:
    """Replays of a CUDA graph, one for each input set, so that launches cost every provider the same."""
    graphs = []
    for index in range(len(layer.sets)):
        for _ in range(3):
            layer.call(function, index)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.call(function, index)
        graphs.append(graph)
    return lambda index: graphs[index % len(graphs)].replay()


def copy_gbps() -> float:
    """Bytes read plus bytes written per second of a large copy on this device."""
    source = torch.randn((1 << 30 if ON_GPU else 1 << 26) // 4, device=DEVICE)
    target = torch.empty_like(source)
    times = milliseconds(lambda _: target.copy_(source), 12)[2:]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e6


def measure(options, console: Console) -> list[dict]:
    bandwidth = copy_gbps()
    console.print(f"device copy: {bandwidth:.0f} GB/s")
    table = Table(title=f"batch {options.batch}, {options.dtype}, {options.layout}")
    for header in ("layer", "mode", "provider", "p20 ms", "p50 ms", "p80 ms", "GB/s", "% of copy", "error"):
        table.add_column(header, no_wrap=True, justify="left" if header in ("layer", "mode", "provider") else "right")
    rows = []
    compiled = torch.compile(eager, dynamic=False)
    for mode in options.mode:
        for shape in LAYERS:
            layer = Layer(shape, options.batch, DTYPES[options.dtype], options.layout, mode == "train")
            runs = {}
            for name, function in {"eager": eager, "compile": compiled, "bbfast": depthwise_conv_bn_act}.items():
                if name == "compile" and not options.compile:
                    continue
                error = layer.check(function)
                run = graphed(layer, function) if ON_GPU else partial(layer.call, function)
                milliseconds(run, 3)
                runs[name] = (run, error, [])
            for _ in range(options.repeats):
                for run, _, times in runs.values():
                    times += milliseconds(run, len(layer.sets))
            for name, (_, error, times) in runs.items():
                p20, p50, p80 = (
                    statistics.quantiles(times, n=10, method="inclusive")[1::3] if len(times) > 1 else times * 3
                )
                gbps = layer.bytes / p50 / 1e6
                rows.append(
                    {
                        "layer": layer.name,
                        "mode": mode,
                        "provider": name,
                        "p20_ms": p20,
                        "p50_ms": p50,
                        "p80_ms": p80,
                        "gbps": gbps,
                        "percent_of_copy": 100 * gbps / bandwidth,
                        "max_error": error,
                        "backend": dispatch.last_choices()["depthwise_conv_bn_act"].backend
                        if name == "bbfast"
                        else name,
                    }
                )
                numbers = (f"{p20:.4f}", f"{p50:.4f}", f"{p80:.4f}", f"{gbps:.0f}", f"{100 * gbps / bandwidth:.0f}")
                table.add_row(layer.name, mode, name, *numbers, f"{error:.1e}")
    console.print(table)
    return [{"copy_gbps": bandwidth}, *rows]


def environment() -> dict:
    def git(*args):
        found = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    return {
        "device": torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128 if ON_GPU else 2)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if ON_GPU else "fp32")
    parser.add_argument("--layout", choices=("NHWC", "NCHW"), default="NHWC")
    parser.add_argument("--mode", choices=("eval", "train"), nargs="+", default=["eval", "train"])
    parser.add_argument("--repeats", type=int, default=20 if ON_GPU else 3)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows = measure(options, console)
    folder = os.environ.get("BBFAST_RESULTS_DIR")
    output = options.json or (Path(folder) / "depthwise_conv_bn_act.json" if folder else None)
    if output:
        output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
