"""Whole models: timm eager, compiled and swapped, and bbfast, inference or training, interleaved in one run.

    python benchmarks/bench_models.py --model mobilenetv3_large_100 --batch 8 --size 224 --threads 2
    python benchmarks/bench_models.py --model resnet50 regnety_016 --mode train --device cuda --dtype bfloat16

Without arguments: one model per family on a GPU in bfloat16, inference and training, or mobilenetv3_large_100 on the
CPU. Prints the median and the quickest time of each provider, and how many times quicker it is than timm eager. Each
round runs every provider once unmeasured and then measured, so that all see the same neighbours and none starts in
pages that another one freed. Training is forward, backward and an SGD step, under autocast where the dtype is not
float32.
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
ONE_PER_FAMILY = (
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "resnet50",
    "regnety_016",
)
# Calls between two looks at the clock: the CPU's clock is fine enough for one, a GPU's events want more.
CALLS = {"cpu": 1, "cuda": 10}


@dataclass(frozen=True)
class Row:
    """Wall-clock and processor time of one call, and its distance from timm eager's output or loss."""

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
    """Gives norms, position biases and layer scales values that a broken fusion cannot hide behind."""
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
        if name.endswith((".gamma", ".grn.weight", ".grn.bias")):
            nn.init.uniform_(parameter, 0.1, 0.5)
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def providers(name: str, mode: str, x: torch.Tensor, with_compile: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """What is measured, by name: functions that run the model, or train it for a step, once.

    Args:
        mode: infer or train.
        x: images on the device and, for inference, in the dtype that models are to have.
    """
    original = timm.create_model(name, pretrained=False)
    randomise(original)
    state = original.state_dict()

    def make(library, *, channels_last: bool = False, swapped: bool = False, compiled: bool = False) -> Callable:
        model = library.create_model(name, pretrained=False)
        model.load_state_dict(state)
        model.to(x.device)
        images = x
        if channels_last:
            model.to(memory_format=CHANNELS_LAST)
            images = x.contiguous(memory_format=CHANNELS_LAST)
        if swapped:
            bbfast.swap(model)
        call = inference(model, images) if mode == "infer" else training_step(model, images)
        return call(torch.compile(model) if compiled else model)

    found = {
        "timm": make(timm),
        "timm channels_last": make(timm, channels_last=True),
        "timm swapped": make(timm, channels_last=True, swapped=True),
        "bbfast": make(bbfast),
        "bbfast channels_last": make(bbfast, channels_last=True),
    }
    if with_compile:
        found["timm compiled"] = make(timm, channels_last=x.is_cuda, compiled=True)
        found["timm swapped compiled"] = make(timm, channels_last=True, swapped=True, compiled=True)
        found["bbfast compiled"] = make(bbfast, channels_last=x.is_cuda, compiled=True)
    return found


def inference(model: nn.Module, x: torch.Tensor) -> Callable:
    model.eval().to(x.dtype)

    def call(run: nn.Module) -> Callable[[], torch.Tensor]:
        @torch.inference_mode()
        def logits() -> torch.Tensor:
            return run(x)

        return logits

    return call


def training_step(model: nn.Module, x: torch.Tensor) -> Callable:
    """Master weights stay float32; the step's learning rate is so small that every round does the same work."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    labels = torch.arange(len(x), device=x.device)
    images, autocast = x.float(), x.dtype != torch.float32

    def call(run: nn.Module) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, dtype=x.dtype if autocast else torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(run(images).float(), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return call


def measure(runs: dict[str, Callable[[], torch.Tensor]], repeats: int, device: str) -> list[Row]:
    """Times all providers in turn, `repeats` rounds."""
    wall = {name: [] for name in runs}
    cpu = {name: [] for name in runs}
    outputs = {}
    for name, run in runs.items():
        torch.manual_seed(0)  # the same paths are dropped in each model
        outputs[name] = run().float().clone()  # compiles, too
        if not outputs[name].isfinite().all():
            raise RuntimeError(f"{name} gives numbers that are not finite")
    for index in range(repeats):
        print(f"\rround {index + 1}/{repeats}", end="", flush=True)
        for name, run in runs.items():
            run()
            wall_ms, cpu_ms = time_calls(run, device)
            wall[name].append(wall_ms)
            cpu[name].append(cpu_ms)
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


def time_calls(run: Callable[[], torch.Tensor], device: str) -> tuple[float, float]:
    """Milliseconds per call on the wall (on a GPU: between its events) and of this process's time."""
    calls = CALLS[device]
    cpu_start, start = time.process_time(), time.perf_counter()
    if device == "cpu":
        for _ in range(calls):
            run()
        wall_ms = 1e3 * (time.perf_counter() - start)
    else:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        wall_ms = begin.elapsed_time(end)
    return wall_ms / calls, 1e3 * (time.process_time() - cpu_start) / calls


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
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "gpu": gpu,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "compiler": module.build_info()["compiler"] if module else None,
        "python": platform.python_version(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "bbfast": bbfast.__version__,
    }


def parse_arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(ONE_PER_FAMILY) if gpu else ["mobilenetv3_large_100"])
    parser.add_argument(
        "--mode", nargs="+", choices=("infer", "train"), default=["infer", "train"] if gpu else ["infer"]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=128 if gpu else 8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled providers out")
    parser.add_argument(
        "--json", type=Path, help="also write the rows to this file (default on a GPU: bench_models.json)"
    )
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.json is None and "BBFAST_RESULTS_DIR" in os.environ:
        args.json = Path(os.environ["BBFAST_RESULTS_DIR"]) / "bench_models.json"
    return args


def report(model: str, mode: str, rows: list[Row]) -> None:
    print(f"{model} {mode}")
    print(f"{'provider':22} {'p20':>8} {'p50':>8} {'p80':>8} {'min':>8} {'cpu':>8} ms  timm/this p50   min   error")
    for row in rows:
        print(
            f"{row.provider:22} {row.p20_ms:8.2f} {row.p50_ms:8.2f} {row.p80_ms:8.2f} {row.min_ms:8.2f} "
            f"{row.cpu_p50_ms:8.2f}     {row.speedup_p50:9.2f} {row.speedup_min:7.2f}   {row.max_error:.1e}"
        )
    by_name = {row.provider: row for row in rows}
    best = min(by_name["bbfast"].p50_ms, by_name["bbfast channels_last"].p50_ms)
    for other in ("timm", "timm channels_last", "timm compiled"):
        if row := by_name.get(other):
            print(f"{other} / the better of bbfast's layouts: p50 {row.p50_ms / best:.2f}")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    facts = environment(args)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    results = []
    for model in args.model:
        for mode in args.mode:
            shape = (args.batch, 3, args.size, args.size)
            x = torch.randn(shape).to(args.device, getattr(torch, args.dtype))
            runs = providers(model, mode, x, not args.no_compile)
            rows = measure(runs, args.repeats, args.device)
            report(model, mode, rows)
            results.append({"model": model, "mode": mode, "shape": shape, "rows": [asdict(row) for row in rows]})
            if args.json:  # after each, so that a run cut short keeps what it had
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({"environment": facts, "results": results}, indent=1))
            del runs
            torch.compiler.reset()
    for op, choice in dispatch.last_choices().items():
        print(f"{op} ran last on {choice.backend}" + "".join(f"; {reason}" for reason in choice.reasons))


if __name__ == "__main__":
    main()
