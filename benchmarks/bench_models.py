"""CPU inference of a whole model: timm eager, timm compiled and bbfast, interleaved in one run.

    python benchmarks/bench_models.py --model mobilenetv3_large_100 --batch 8 --size 224 --threads 2
    python benchmarks/bench_models.py --model swin_tiny_patch4_window7_224

Prints the median and the quickest time of each provider, and how many times quicker it is than timm eager. Each
round runs every provider once unmeasured and then measured, so that all see the same neighbours and none starts in
pages that another one freed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import nn

import bbfast
from bbfast import dispatch, extension

CHANNELS_LAST = torch.channels_last


@dataclass(frozen=True)
class Row:
    """Wall-clock and processor time of one forward pass, and its distance from timm eager's output."""

    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    min_ms: float
    cpu_p50_ms: float
    speedup_p50: float
    speedup_min: float
    max_error: float


def randomise(model: nn.Module) -> None:
    """Gives norms and position biases values that a broken fusion cannot hide behind."""
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def providers(name: str, x: torch.Tensor, with_compile: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """What is measured, by name: functions that run the model once."""
    x_last = x.contiguous(memory_format=CHANNELS_LAST)

    def make(create) -> nn.Module:
        model = create(name, pretrained=False).eval()
        model.load_state_dict(state)
        return model

    original = timm.create_model(name, pretrained=False).eval()
    randomise(original)
    state = original.state_dict()
    original_last = make(timm.create_model).to(memory_format=CHANNELS_LAST)
    ours = make(bbfast.create_model)
    ours_last = make(bbfast.create_model).to(memory_format=CHANNELS_LAST)
    found = {
        "timm": lambda: original(x),
        "timm channels_last": lambda: original_last(x_last),
        "bbfast": lambda: ours(x),
        "bbfast channels_last": lambda: ours_last(x_last),
    }
    if with_compile:
        original_compiled = torch.compile(make(timm.create_model))
        ours_compiled = torch.compile(make(bbfast.create_model))
        found["timm compiled"] = lambda: original_compiled(x)
        found["bbfast compiled"] = lambda: ours_compiled(x)
    return found


def measure(runs: dict[str, Callable[[], torch.Tensor]], repeats: int) -> list[Row]:
    """Times all providers in turn, `repeats` rounds."""
    wall = {name: [] for name in runs}
    cpu = {name: [] for name in runs}
    outputs = {name: run().clone() for name, run in runs.items()}  # compiles, too
    for index in range(repeats):
        print(f"\rround {index + 1}/{repeats}", end="", flush=True)
        for name, run in runs.items():
            run()
            cpu_start, start = time.process_time(), time.perf_counter()
            run()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - cpu_start))
    print()
    exact = outputs["timm"]
    base = wall["timm"]
    rows = []
    for name in runs:
        p20, p50, p80 = quantile(wall[name], 0.2), statistics.median(wall[name]), quantile(wall[name], 0.8)
        rows.append(
            Row(
                provider=name,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                min_ms=min(wall[name]),
                cpu_p50_ms=statistics.median(cpu[name]),
                speedup_p50=statistics.median(base) / p50,
                speedup_min=min(base) / min(wall[name]),
                max_error=(outputs[name] - exact).abs().max().item() / exact.abs().max().item(),
            )
        )
    return rows


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that is measured, with `-dirty` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def environment(args: argparse.Namespace) -> dict:
    module = extension.load()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "compiler": module.build_info()["compiler"] if module else None,
        "python": platform.python_version(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "model": args.model,
        "shape": [args.batch, 3, args.size, args.size],
        "dtype": "float32",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "bbfast": bbfast.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenetv3_large_100")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled providers out")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    facts = environment(args)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    with torch.inference_mode():
        runs = providers(args.model, torch.randn(facts["shape"]), not args.no_compile)
        rows = measure(runs, args.repeats)

    print(f"{'provider':22} {'p20':>8} {'p50':>8} {'p80':>8} {'min':>8} {'cpu':>8} ms  timm/this p50   min   error")
    for row in rows:
        print(
            f"{row.provider:22} {row.p20_ms:8.2f} {row.p50_ms:8.2f} {row.p80_ms:8.2f} {row.min_ms:8.2f} "
            f"{row.cpu_p50_ms:8.2f}     {row.speedup_p50:9.2f} {row.speedup_min:7.2f}   {row.max_error:.1e}"
        )
    by_name = {row.provider: row for row in rows}
    if compiled := by_name.get("timm compiled"):
        ours = by_name["bbfast"]
        ratios = compiled.p50_ms / ours.p50_ms, compiled.min_ms / ours.min_ms
        print(f"timm compiled / bbfast: p50 {ratios[0]:.2f}, min {ratios[1]:.2f}")
    for op, choice in dispatch.last_choices().items():
        print(f"{op} ran last on {choice.backend}" + "".join(f"; {reason}" for reason in choice.reasons))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": facts, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
