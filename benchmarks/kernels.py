"""The static kernel report: compiles kernels as they would be launched, without a GPU, and says what they cost.

    python -m bbfast.benchmarks.kernels [--arch 80 90 100] [--set NAME ...] [--case TEXT ...] [--json FILE] [--check]

`models`, the default set, takes every launch of eight models, inference and training at batch 128 in bf16, and the
CUDA kernels of csrc/. The other sets (kernel_cases.py) hold more shapes, dtypes and layouts. Launchers run on fake
tensors with their kernels replaced by recorders, so what is compiled is what a real launch of that shape compiles: the
same heuristics, constants and specialisations (1, multiples of 16, None). Registers, shared memory and spills come from
the cubin, instructions from its disassembly. Must run without TRITON_INTERPRET.

Times are floors, not measurements: bytes over 3.0 TB/s (device copy on an H100 80GB HBM3) and instructions over the
issue rate of its 132 multiprocessors (4 warps a cycle at 1.75 GHz), also where other architectures are compiled for.
The larger one binds.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget

from bbfast.benchmarks import cuda_kernels, kernel_tables
from bbfast.benchmarks.facts import facts
from bbfast.benchmarks.kernel_cases import CASES, cases
from bbfast.benchmarks.kernel_launches import NO_NAME, Argument, Launch, recorded_launches
from bbfast.benchmarks.kernel_models import MODELS, MODES, model_launches
from bbfast.benchmarks.kernel_tables import Report
from bbfast.benchmarks.kernel_work import VECTOR_BYTES, work_of
from bbfast.benchmarks.sass import Function, read_cubin

SETS = ("models", *CASES)
# The least that an architecture lets a program have: sm_86 and sm_89 count as sm_80.
SHARED_BYTES_PER_PROGRAM = {80: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Compiled:
    """What a launch was compiled to."""

    function: Function
    num_warps: int
    shared_bytes: int


@dataclass
class Use:
    """A launch that a report shows: one of a case, or the largest of those of models that share compiled code."""

    case: str
    launch: Launch
    launches: int = 1
    models: dict[str, int] = field(default_factory=dict)


# ---- which launches --------------------------------------------------------------------------------------


def case_uses(name: str, arch: int, gpu: str, texts: Sequence[str]) -> list[Use]:
    """The launches of a set of cases, one by one."""
    found = []
    for description, launch_all in cases(name):
        if any(text in description for text in texts):
            found += [Use(description, launch) for launch in recorded_launches(launch_all, arch, gpu)]
    return found


def model_uses(launches: dict[str, list[Launch]], texts: Sequence[str]) -> list[Use]:
    """Launches of models (by "model mode"), those that compile to the same code as one: that which moves most bytes."""
    found: dict[str, Use] = {}
    for run, recorded in launches.items():
        for launch in recorded:
            use = found.setdefault(launch.compilation, Use("", launch, 0))
            use.launches += 1
            use.models[run] = use.models.get(run, 0) + 1
            use.launch = max(use.launch, launch, key=_moved_bytes)
    for use in found.values():
        use.case = describe(use.launch)
    said = {name: f"{use.case} {use.launch.name} {' '.join(use.models)}" for name, use in found.items()}
    return [use for name, use in found.items() if any(text in said[name] for text in texts)]


def _moved_bytes(launch: Launch) -> int:
    return sum(tensor.nbytes for tensor in launch.tensors.values())


def describe(launch: Launch) -> str:
    """A launch by its largest tensor and what it was compiled for."""
    values = launch.values
    largest: Argument = max(launch.tensors.values(), key=lambda tensor: tensor.nbytes)
    text = f"{'x'.join(map(str, largest.shape))} {str(largest.dtype).removeprefix('torch.')}"
    if (len(largest.shape) == 4 and launch.name.startswith(("_batch_norm", "_drop_path"))) or "TILE_S" in values:
        text += " NHWC" if largest.stride[1] == 1 else ""
    if "TILE_S" in values:
        text += f" k{values['KERNEL_T']} s{values['STRIDE_T']}"
    if values.get("SHIFT_H"):
        text += " shifted"
    return " ".join([text, *(str(values[name]) for name in ("ACT", "STATISTICS") if name in values)])


# ---- compiling -------------------------------------------------------------------------------------------


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Triton keeps what it has compiled in its own cache, so a second report is quick."""
    kernel = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (function,) = read_cubin(file.name)
    return Compiled(function, kernel.metadata.num_warps, kernel.metadata.shared)


def in_processes(work: Callable, tasks: Sequence, what: str) -> list:
    """`work` of each task, several at a time, with a progress bar."""
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(work, *task) for task in tasks]
        progress = track(futures, what, console=Console(stderr=True), disable=not sys.stderr.isatty())
        return [future.result() for future in progress]


def compile_all(launches: Iterable[Launch], arch: int) -> dict[str, Compiled]:
    """By `Launch.compilation`."""
    distinct = {launch.compilation: launch for launch in launches}
    found = in_processes(compile_launch, [(launch, arch) for launch in distinct.values()], f"compiling for sm_{arch}")
    return dict(zip(distinct, found))


# ---- reports ---------------------------------------------------------------------------------------------


def op_of(launch: Launch) -> str:
    name = launch.module.rsplit(".", 1)[1].removesuffix("_kernels")
    return {"depthwise_conv": "depthwise_conv_bn_act"}.get(name, name)


def report(use: Use, compiled: Compiled, arch: int) -> Report:
    values = use.launch.values
    tile = ""
    if "TILE_S" in values:
        tile = f"{values['BLOCK_T']}x{values['BLOCK_C']} S{values['TILE_S']}/{values['span']}"
    elif "BLOCK_Q" in values:
        tile = f"{values['BLOCK_Q']}x{values['BLOCK_K']}"
    elif "WALK" in values:
        tile = f"{values['WALK'].block_c}x{values['WALK'].block_p}"
    elif "BLOCK_H" in values:
        tile = f"{values['BLOCK_M']}x{values['LEFT'] + values['RIGHT']}x{values['BLOCK_H']}"
    elif "BLOCK_M" in values:
        tile = f"{values['BLOCK_M']}x{values['BLOCK_N']}x{values['BLOCK_K']}"
    elif "BLOCK_R" in values:
        tile = f"{values['BLOCK_R']}" + (f"x{values['BLOCK_C']}" if "BLOCK_C" in values else "")
    return Report.of(
        case=use.case,
        op=op_of(use.launch),
        kernel=use.launch.name.strip("_"),
        arch=arch,
        tile=tile,
        num_warps=compiled.num_warps,
        shared_bytes=compiled.shared_bytes,
        function=compiled.function,
        work=work_of(use.launch, compiled.function, compiled.num_warps, arch),
        launches=use.launches,
        models=use.models,
    )


def model_reports(arch: int, gpu: str, texts: Sequence[str]) -> tuple[list[Report], list[dict]]:
    """The kernels of the models, and what all launches of each model come to."""
    runs = [(model, mode) for model in MODELS for mode in MODES]
    # In this process: torch's operators may wait for ever in a forked one.
    shown = track(runs, f"recording for sm_{arch}", console=Console(stderr=True), disable=not sys.stderr.isatty())
    launches = {f"{model} {mode}": model_launches(model, mode, arch, gpu) for model, mode in shown}
    uses = model_uses(launches, texts)
    compiled = compile_all([use.launch for use in uses], arch)
    rows = [report(use, compiled[use.launch.compilation], arch) for use in uses]
    if any(text for text in texts):  # then not all of a model's kernels are compiled
        return rows, []
    cost = functools.cache(lambda launch: report(Use("", launch), compiled[launch.compilation], arch))
    totals = [kernel_tables.total(run, arch, [cost(launch) for launch in found]) for run, found in launches.items()]
    return rows, totals


def case_reports(name: str, arch: int, gpu: str, texts: Sequence[str]) -> list[Report]:
    uses = case_uses(name, arch, gpu, texts)
    compiled = compile_all([use.launch for use in uses], arch)
    return [report(use, compiled[use.launch.compilation], arch) for use in uses]


def cuda_reports(arch: int, texts: Sequence[str]) -> list[Report]:
    """The kernels of csrc/*.cu, windows of swin_tiny's first stage."""
    rows = []
    for source in cuda_kernels.sources():
        if not any(text in f"csrc/{source.name}" for text in texts):
            continue
        for function in cuda_kernels.compiled(source, arch):
            kernel, vector_bytes = cuda_kernels.describe(function)
            rows.append(
                Report.of(
                    case=f"csrc/{source.name}",
                    op="window_partition",
                    kernel=kernel,
                    arch=arch,
                    tile=str(cuda_kernels.THREADS * cuda_kernels.UNROLL),
                    num_warps=cuda_kernels.THREADS // 32,
                    shared_bytes=0,
                    function=function,
                    work=cuda_kernels.work_of(function, vector_bytes),
                )
            )
    return rows


def problems(report: Report) -> list[str]:
    """What a kernel must not show: spills, more than fits, narrow accesses where wide ones are claimed, wide halos."""
    found = []
    if not report.occupancy:
        found.append(f"{report.registers} registers for each of {report.num_warps} warps are more than there are")
    if report.shared_bytes > SHARED_BYTES_PER_PROGRAM[report.arch]:
        found.append(f"{report.shared_bytes} bytes of shared memory are more than there are")
    if report.spill_bytes:
        found.append(f"{report.spill_bytes} bytes spilled")
    if report.narrow:
        found.append(f"narrow accesses: {', '.join(report.narrow)}")
    # Tiles of half vectors are smaller because that was quicker, halo and all: see NOTES.md.
    halved = report.vector_bytes is not None and report.vector_bytes < VECTOR_BYTES
    if report.halo and report.halo > 1.15 and not halved and not report.case.startswith("training"):
        found.append(f"halo {report.halo:.2f}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m bbfast.benchmarks.kernels")
    archs = {"default": [80, 90, 100], "choices": sorted(SHARED_BYTES_PER_PROGRAM)}
    parser.add_argument("--arch", type=int, nargs="+", **archs, help="compute capabilities")
    parser.add_argument("--set", nargs="+", default=["models"], dest="sets", choices=SETS)
    parser.add_argument(
        "--case",
        nargs="+",
        default=[""],
        dest="texts",
        metavar="TEXT",
        help="only what is described or called so",
    )
    parser.add_argument("--gpu", default=NO_NAME, help="take the launch configurations tuned for the GPU of this name")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 on spills, narrow accesses or halos above 1.15")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")

    started = facts("cpu")
    rows, totals = [], []
    for arch in options.arch:
        for name in options.sets:
            if name == "models":
                found, sums = model_reports(arch, options.gpu, options.texts)
                rows, totals = rows + found, totals + sums
                if reason := cuda_kernels.unavailable_reason():
                    print(f"CUDA kernels are left out: {reason}", file=sys.stderr)
                else:
                    rows += cuda_reports(arch, options.texts)
            else:
                rows += case_reports(name, arch, options.gpu, options.texts)
    if not rows:
        parser.error(f"--case {' '.join(options.texts)} describes no case of {', '.join(options.sets)}")
    kernel_tables.print_tables(rows, totals)
    if options.json:
        kernel_tables.write_json(options.json, started, rows, totals, with_opcodes="models" not in options.sets)
    failures = [f"{r.case}, {r.kernel}, sm_{r.arch}: {problem}" for r in rows for problem in problems(r)]
    for failure in failures:
        print(failure, file=sys.stderr)
    print(kernel_tables.summary(rows, len(failures)))
    return 1 if failures and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
