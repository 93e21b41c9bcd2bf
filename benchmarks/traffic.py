"""Kernels, bytes and the least time of whole models on an H100, planned without a GPU.

    python -m bbfast.benchmarks.traffic [--model NAME ...] [--provider NAME ...] [--mode infer|train] [--batch 128]
        [--dtype bf16|fp16] [--json FILE] [--verbose]

Eager providers are counted op by op (`eager_kernels.py`), compiled ones as Inductor's scheduler fuses them
(`inductor_plan.py`), all on a pretended H100 (`fake_h100.py`). A kernel takes the longer of its bytes over 3.0 TB/s and
its FLOPs over 798 TFLOP/s (tensor cores) or 60 TFLOP/s (CUDA cores); both were measured on such a card. These are
floors, not measurements: real kernels are slower, by how much differs, and data that stays in the L2 cache is faster.

Training is forward and backward without the optimizer's step, all in the given dtype, of compiled providers only.

Each plan takes half a minute to minutes of one core, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bbfast.benchmarks.eager_kernels import CUDA_CORE_FLOPS_PER_SECOND, TENSOR_CORE_FLOPS_PER_SECOND, Kernel
from bbfast.benchmarks.facts import facts
from bbfast.benchmarks.kernel_tables import COPY_BYTES_PER_SECOND

DEVICE = "planned for an H100, no kernel ran"
MODELS = (
    "swin_tiny_patch4_window7_224",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "convnext_tiny",
    "resnet50",
    "regnety_016",
    "resnext50_32x4d",
    "swin_base_patch4_window7_224",
)
# "swapped" is timm's model after bbfast.swap; "+sdpa" is timm's with torch's scaled_dot_product_attention.
PROVIDERS = ("eager", "bbfast", "compile", "compile+sdpa", "bbfast+compile", "swapped+compile")
BASELINE = "compile"
MODES = {"infer": "inference", "train": "training"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Plan:
    """The kernels of one model under one provider; `floor_ms` is the sum of theirs."""

    model: str
    provider: str
    mode: str
    batch: int
    dtype: str
    kernels: tuple[Kernel, ...]

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def floor_ms(self) -> float:
        return sum(kernel.floor_ms for kernel in self.kernels)


# ---- planning --------------------------------------------------------------------------------------------


def plan(model: str, provider: str, mode: str, batch: int, dtype: str) -> Plan:
    """Plans one model, in this process: better in one that does nothing else."""
    from bbfast.benchmarks.eager_kernels import EagerKernels
    from bbfast.benchmarks.fake_h100 import fake_h100, to_fake_h100
    from bbfast.benchmarks.inductor_plan import InductorPlan

    network = _create(model, provider).train(mode == "train").to(DTYPES[dtype])
    # Convolutions run in channels_last, which is the fastest for all; a transformer's images are as torch makes them.
    layout = torch.contiguous_format if _is_transformer(model) else torch.channels_last
    network = network.to(memory_format=layout)
    with fake_h100(), torch.set_grad_enabled(mode == "train"):
        to_fake_h100(network)
        images = torch.empty(batch, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=DTYPES[dtype], device="cuda")
        images = images.to(memory_format=layout)
        if "compile" in provider:
            planned = InductorPlan()
            torch.compile(network, backend=planned)(images)
        else:
            with EagerKernels() as planned:
                network(images)
    return Plan(model, provider, mode, batch, dtype, tuple(planned.kernels))


def _create(model: str, provider: str) -> torch.nn.Module:
    import timm

    import bbfast

    if provider.startswith("bbfast"):
        return bbfast.create_model(model)
    timm.layers.set_fused_attn("sdpa" in provider, experimental="sdpa" in provider)
    network = timm.create_model(model)
    if provider.startswith("swapped"):
        bbfast.swap(network)
    return network


def _is_transformer(model: str) -> bool:
    return model.startswith("swin")


def plans(cases: Iterable[tuple[str, str]], mode: str, batch: int, dtype: str, workers: int) -> Iterable[Plan]:
    """Plans of (model, provider) cases in their order, each in a process of its own, `workers` at a time."""
    # A process for each plan, since torch remembers the H100. The server that they are forked from imports torch once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["timm", "bbfast.swap", "bbfast.benchmarks.inductor_plan", "torch._inductor.lowering"]
    )
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(plan, model, provider, mode, batch, dtype) for model, provider in cases]
        for future in futures:
            yield future.result()


def providers_of(model: str, wanted: Iterable[str]) -> list[str]:
    """The providers that differ for a model: convolutional networks have no attention."""
    return [provider for provider in wanted if _is_transformer(model) or "sdpa" not in provider]


# ---- results ---------------------------------------------------------------------------------------------


def results(done: list[Plan], measured_on: dict) -> dict:
    """What the JSON file holds: the facts, and per plan its sums and kernels."""
    rows = []
    for found in done:
        sums = {"kernels": len(found.kernels), "bytes": found.bytes, "flops": found.flops, "floor_ms": found.floor_ms}
        case = {"model": found.model, "provider": found.provider, "mode": found.mode, "image_size": IMAGE_SIZE}
        baseline = _baseline(found, done)
        ratio = baseline.floor_ms / found.floor_ms if baseline else None
        # Equal kernels once, in the order in which they first run.
        counts = Counter(found.kernels).items()
        kernels = [asdict(kernel) | {"floor_ms": kernel.floor_ms, "times": times} for kernel, times in counts]
        case |= {"batch": found.batch, "dtype": found.dtype}
        rows.append({**case, **sums, "speedup_over_compile": ratio, "list": kernels})
    return {"facts": measured_on, "results": rows}


def planning_facts() -> dict:
    """facts.py's for the machine that planned; the device is the one that was planned for."""
    peaks = {
        "copy_bytes_per_second": COPY_BYTES_PER_SECOND,
        "tensor_core_flops_per_second": TENSOR_CORE_FLOPS_PER_SECOND,
        "cuda_core_flops_per_second": CUDA_CORE_FLOPS_PER_SECOND,
    }
    return facts("cpu") | {"device": DEVICE, "peaks": peaks}


def _baseline(found: Plan, done: list[Plan]) -> Plan | None:
    return next((other for other in done if (other.model, other.provider) == (found.model, BASELINE)), None)


def print_table(done: list[Plan]) -> None:
    batch, dtype, mode = done[0].batch, done[0].dtype, MODES[done[0].mode]
    table = Table(title=f"Planned for an H100, batch {batch}, {dtype}, {mode}; no kernel ran")
    for header in ("model", "provider", "kernels", "GB", "floor ms", f"{BASELINE} / this"):
        table.add_column(header, no_wrap=True, justify="left" if header in ("model", "provider") else "right")
    last = None
    for found in done:
        if last not in (None, found.model):
            table.add_section()
        baseline = _baseline(found, done)
        ratio = f"{baseline.floor_ms / found.floor_ms:.2f}" if baseline else ""
        sums = (str(len(found.kernels)), f"{found.bytes / 1e9:.2f}", f"{found.floor_ms:.2f}", ratio)
        table.add_row("" if last == found.model else found.model, found.provider, *sums)
        last = found.model
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_kernels(found: Plan) -> None:
    print(f"{found.model}, {found.provider}:")
    for kernel in found.kernels:
        cores = "" if kernel.on_tensor_cores else " on CUDA cores"
        print(
            f"{kernel.bytes / 1e6:10.2f} MB {kernel.flops / 1e9:8.2f} GFLOP{cores} {1e3 * kernel.floor_ms:8.1f} us"
            f"  {kernel.name}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m bbfast.benchmarks.traffic")
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="names of timm's", metavar="NAME")
    parser.add_argument("--provider", nargs="+", default=list(PROVIDERS), choices=PROVIDERS, metavar="NAME")
    parser.add_argument("--mode", choices=list(MODES), default="infer")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--workers", type=int, default=1, help="plans at a time, each about 1.5 GB")
    parser.add_argument("--json", type=Path, help="write the plans to this file too, after each one")
    parser.add_argument("--verbose", action="store_true", help="print every kernel")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the kernels whose launches are counted; unset it")
    for name in ("batch", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is not allowed; it must be at least 1")

    wanted = [provider for provider in options.provider if options.mode == "infer" or "compile" in provider]
    left_out = " ".join(provider for provider in options.provider if provider not in wanted)
    if left_out:
        reason = f"--provider {left_out}: in --mode train only compiled providers can be planned"
        if not wanted:
            parser.error(reason)
        print(f"left out: {reason}", file=sys.stderr)
    cases = [(model, provider) for model in options.model for provider in providers_of(model, wanted)]
    found_here = planning_facts()
    done: list[Plan] = []
    for found in plans(cases, options.mode, options.batch, options.dtype, options.workers):
        done.append(found)
        print(f"{len(done)}/{len(cases)} {found.model} {found.provider}: {found.floor_ms:.2f} ms", file=sys.stderr)
        if options.verbose:
            print_kernels(found)
        if options.json:
            unfinished = options.json.with_suffix(".part")
            unfinished.write_text(json.dumps(results(done, found_here), indent=1))
            unfinished.replace(options.json)
    print_table(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
