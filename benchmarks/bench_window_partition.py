"""`window_partition` and `window_reverse` at Swin-T's shapes: eager, compiled and bbfast, interleaved.

    python benchmarks/bench_window_partition.py [--batch N] [--dtype bf16] [--threads N] [--json FILE]

One row per op, map and provider: p20/p50/p80 ms, GB/s (the map once, the windows once), percent of the bandwidth of a
device copy measured in the same run, and times eager's speed by medians. Eager is roll, pad, view, permute and
contiguous, as in timm; a provider whose result differs from it in one bit is an error. Where one window is the whole
map (Swin's last stage) eager only makes views, or one plain copy. Each op is the other's backward pass, so there is no
mode for that. On a GPU calls are replayed from CUDA graphs and rotate through more memory than the L2 cache holds.
Writes window_partition.json into BBFAST_RESULTS_DIR, or where --json says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_depthwise_conv_bn_act import DEVICE, DTYPES, ON_GPU, copy_gbps, environment, milliseconds
from rich.console import Console
from rich.table import Table

from bbfast import dispatch
from bbfast.ops import window_partition, window_reverse

# height, width, channels, window, shift: Swin-T's four stages at 224 x 224, and a map that the window does not divide
MAPS = (
    (56, 56, 96, 7, 0),
    (56, 56, 96, 7, 3),
    (28, 28, 192, 7, 3),
    (14, 14, 384, 7, 3),
    (7, 7, 768, 7, 0),
    (50, 75, 96, 7, 3),
)
L2_BYTES = 128 << 20


def eager_partition(x, window, shift):
    """timm's way: roll, pad, view, permute, contiguous."""
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    x = x.view(batch, x.shape[1] // window, window, x.shape[2] // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, channels)


def eager_reverse(windows, window, size, shift):
    """timm's way: view, permute, contiguous, crop, roll."""
    down, across = (-(-length // window) for length in size)
    channels = windows.shape[2]
    x = windows.view(-1, down, across, window, window, channels).permute(0, 1, 3, 2, 4, 5).contiguous()
    x = x.view(-1, down * window, across * window, channels)[:, : size[0], : size[1]].contiguous()
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


class Case:
    """One op on one map: several sets of inputs, and what to call on them."""

    def __init__(self, op: str, shape: tuple, batch: int, dtype: torch.dtype):
        height, width, channels, window, shift = shape
        self.name = f"{height}x{width}x{channels} window {window} shift {shift}"
        windows = batch * -(-height // window) * -(-width // window)
        inputs = {
            "window_partition": (batch, height, width, channels),
            "window_reverse": (windows, window * window, channels),
        }
        self.bytes = dtype.itemsize * channels * (batch * height * width + windows * window * window)
        sets = min(16, -(-L2_BYTES // self.bytes)) if ON_GPU else 1
        self.sets = [torch.randn(inputs[op], device=DEVICE, dtype=dtype) for _ in range(sets)]
        if op == "window_partition":
            config, functions = (window, shift), (eager_partition, window_partition)
        else:
            config, functions = (window, (height, width), shift), (eager_reverse, window_reverse)
        eager, ours = functions
        self.providers = {
            name: partial(self.call, function, config)
            for name, function in (("eager", eager), ("compile", torch.compile(eager, dynamic=False)), ("bbfast", ours))
        }

    def call(self, function, config, index: int) -> torch.Tensor:
        with torch.inference_mode():
            return function(self.sets[index % len(self.sets)], *config)

    def check(self, provider: str) -> None:
        if not torch.equal(self.providers[provider](0), self.providers["eager"](0)):
            raise RuntimeError(f"{self.name}: {provider} differs from eager")


def graphed(case: Case, run: Callable[[int], object]) -> Callable[[int], object]:
    """Replays of a CUDA graph, one for each input set, so that launches cost every provider the same."""
    graphs = []
    for index in range(len(case.sets)):
        for _ in range(3):
            run(index)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(index)
        graphs.append(graph)
    return lambda index: graphs[index % len(graphs)].replay()


def measure_case(op: str, case: Case, options, bandwidth: float) -> list[dict]:
    runs = {}
    for name, run in case.providers.items():
        if name == "compile" and not options.compile:
            continue
        case.check(name)
        runs[name] = (graphed(case, run) if ON_GPU else run, [])
    for _ in range(options.repeats):
        for run, times in runs.values():
            milliseconds(run, 1)  # unmeasured, so that none starts in pages or caches that another one left
            times += milliseconds(run, len(case.sets))
    rows = []
    eager_ms = statistics.median(runs["eager"][1])
    for name, (_, times) in runs.items():
        p20, p50, p80 = statistics.quantiles(times, n=10, method="inclusive")[1::3]
        gbps = case.bytes / p50 / 1e6
        rows.append(
            {
                "op": op,
                "map": case.name,
                "provider": name,
                "backend": dispatch.last_choices()[op].backend if name == "bbfast" else name,
                "p20_ms": p20,
                "p50_ms": p50,
                "p80_ms": p80,
                "gbps": gbps,
                "percent_of_copy": 100 * gbps / bandwidth,
                "times_eager": eager_ms / p50,
            }
        )
    return rows


def measure(options, console: Console) -> list[dict]:
    bandwidth = copy_gbps()
    console.print(f"device copy: {bandwidth:.1f} GB/s")
    table = Table(title=f"batch {options.batch}, {options.dtype}")
    texts = ("op", "map", "provider")
    for header in (*texts, "p20 ms", "p50 ms", "p80 ms", "GB/s", "% of copy", "times eager"):
        table.add_column(header, no_wrap=True, justify="left" if header in texts else "right")
    rows = []
    for op in ("window_partition", "window_reverse"):
        for shape in MAPS:
            torch.compiler.reset()
            case = Case(op, shape, options.batch, DTYPES[options.dtype])
            for row in measure_case(op, case, options, bandwidth):
                times = (f"{row[key]:.4f}" for key in ("p20_ms", "p50_ms", "p80_ms"))
                rates = (f"{row['gbps']:.1f}", f"{row['percent_of_copy']:.0f}", f"{row['times_eager']:.2f}")
                table.add_row(op, case.name, row["provider"], *times, *rates)
                rows.append(row)
    console.print(table)
    return [{"copy_gbps": bandwidth}, *rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128 if ON_GPU else 8)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if ON_GPU else "fp32")
    parser.add_argument("--repeats", type=int, default=20, help="rounds, at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = measure(options, console)
    folder = os.environ.get("BBFAST_RESULTS_DIR")
    output = options.json or (Path(folder) / "window_partition.json" if folder else None)
    if output:
        settings = {"batch": options.batch, "dtype": options.dtype, "threads": options.threads}
        load = None if ON_GPU else os.getloadavg()[0]
        found = {"environment": {**environment(), **settings, "load_average": load}, "rows": rows}
        output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
