"""`bbfast bench MODEL...`: eager, compiled, swapped and bbfast, checked and timed in turns on this machine."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import bbfast
from bbfast import dispatch, env
from bbfast.benchmarks import facts as machine
from bbfast.benchmarks import model_files
from bbfast.benchmarks.judge import DTYPES
from bbfast.commands._common import (
    CommandError,
    describe_device,
    one_line_errors,
    pick_device,
    print_titled,
    progress_bar,
)

# Of a pipe's or file's lines, where numbers must not be cut.
WIDTH_OF_FILES = 130
VARIABLES = ("BBFAST_BACKEND", "BBFAST_STRICT", "TRITON_INTERPRET")
# What is measured where nothing is asked for: on a CPU what ends while one looks on.
DEFAULTS = {
    "cuda": {"batch": (128,), "dtype": ("bf16",), "mode": ("infer", "train")},
    "cpu": {"batch": (8,), "dtype": ("fp32",), "mode": ("infer",)},
}


def run(args: Namespace) -> int:
    models = _import_models()
    device = pick_device(args.device)
    _check(args, models)
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = _cases(args, models, device)
    wanted = args.providers or (models.ON_CPU if device.type == "cpu" else list(models.PROVIDERS))
    wanted = [name for name in models.PROVIDERS if name == "eager" or name in wanted]  # eager is what all compare with
    left_out = {name: models.left_out(name, wanted) for name in args.models}

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    found = machine.facts(device)
    _print_heading(console, found, device, len(cases), left_out)
    results = []
    for case in cases:
        graphs = models.wants_graphs(case, args.cuda_graphs, device)
        settings = models.Settings(args.rounds, args.seconds, graphs, args.turns)
        providers = [name for name in wanted if name not in left_out[case.model]]
        results.append(_measure(case, models, providers, device, settings))
        _print_result(console, case, results[-1])
        _save(args, found, results)
    if args.plot:
        with one_line_errors(OSError, prefix=f"{args.plot}: "):
            model_files.draw(args.plot, results, _short_facts(found, device))
    for path in filter(None, (args.json, args.csv, args.plot)):
        console.print(Text(f"Written: {path}"), soft_wrap=True)
    failures = sum(row["failure"] is not None for result in results for row in result["rows"])
    if failures:
        print(f"bbfast bench: {failures} of the providers' rows failed, as told above", file=sys.stderr)
    return 1 if failures else 0


def _measure(case, models, providers: list[str], device: torch.device, settings) -> dict:
    with progress_bar() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.FallbackWarning)  # notes of the rows tell them
        task = progress.add_task(str(case))

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"{what}: {case}", completed=done, total=total)

        with one_line_errors(RuntimeError, ValueError, AssertionError, prefix=f"{case}: "):
            return models.measure_case(case, providers, device, settings, on_progress)


def _save(args: Namespace, found: dict, results: list[dict]) -> None:
    """After each case, so that a run cut short keeps what it had."""
    with one_line_errors(OSError):
        if args.json:
            model_files.write_json(args.json, {"facts": found, "results": results})
        if args.csv:
            model_files.write_csv(args.csv, results)


# ---- what was asked for ----------------------------------------------------------------------------------


def _import_models():
    try:
        from bbfast.benchmarks import models
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise CommandError("models are compared with timm's, which is missing; pip install 'bbfast[timm]'") from error
    return models


def _check(args: Namespace, models) -> None:
    """Everything that can be found wrong before anything runs.

    Raises:
        CommandError: naming the argument, what came and what is allowed.
    """
    for option, given, allowed in (
        ("--dtype", args.dtype, DTYPES),
        ("--mode", args.mode, models.MODES),
        ("--providers", args.providers, models.PROVIDERS),
    ):
        for value in given or ():
            if value not in allowed:
                raise CommandError(f"{option}: {value!r} is not known; allowed: {', '.join(allowed)}")
    if args.turns and len(args.models) > 1:
        raise CommandError("--turns: is for one model; every other one has a process of its own")
    for name in args.models:
        if not models.timm.is_model(name):
            close = difflib.get_close_matches(name, models.timm.list_models(), 3, 0.6)
            raise CommandError(
                f"MODEL: timm has no {name!r}; " + (f"meant: {', '.join(close)}?" if close else "see `bbfast list`")
            )
    with one_line_errors(ValueError):
        env.backend(), env.strict()
    if args.plot:
        with one_line_errors(ModuleNotFoundError, ValueError, prefix="--plot: "):
            model_files.check_picture(args.plot)
    for option, path in (("--json", args.json), ("--csv", args.csv), ("--plot", args.plot)):
        if path and Path(path).is_dir():
            raise CommandError(f"{option}: {path} is a folder; a file's name is needed")
        if path:
            with one_line_errors(OSError, prefix=f"{option}: "):
                Path(path).parent.mkdir(parents=True, exist_ok=True)


def _cases(args: Namespace, models, device: torch.device) -> list:
    defaults = DEFAULTS[device.type]
    return [
        models.Case(name, mode, batch, args.image_size or models.default_image_size(name), dtype)
        for name in args.models
        for dtype in args.dtype or defaults["dtype"]
        for mode in args.mode or defaults["mode"]
        for batch in args.batch or defaults["batch"]
    ]


# ---- printing --------------------------------------------------------------------------------------------


def _print_heading(
    console: Console, found: dict, device: torch.device, cases: int, left_out: dict[str, dict[str, str]]
) -> None:
    lines = [_short_facts(found, device)]
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    if device.type == "cuda":
        lines.append(
            f"TF32: products {_on(found['tf32_matmul'])}, convolutions {_on(found['tf32_cudnn'])}; cudnn.benchmark "
            f"{_on(found['cudnn_benchmark'])}; driver {found['driver']}; clock {found['clocks_sm_mhz']} of "
            f"{found['clocks_max_sm_mhz']} MHz"
        )
    for reasons in left_out.values():
        lines += [f"left out: {provider}: {reason}" for provider, reason in reasons.items()]
    title = f"bbfast {bbfast.__version__} on {describe_device(device)}: {cases} case{'s' if cases > 1 else ''}"
    print_titled(console, title)
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    console.print()


def _on(value: bool) -> str:
    return "on" if value else "off"


def _short_facts(found: dict, device: torch.device) -> str:
    commit = f", commit {found['commit'][:10]}{' with changes' if found['dirty'] else ''}" if found["commit"] else ""
    hardware = found["gpu"] or f"{found['processor']}, {found['threads']} of {found['cores']} cores"
    return f"{hardware}; torch {found['torch']}, timm {found['timm']}{commit}; {found['started'][:10]}"


def _print_result(console: Console, case, result: dict) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("provider", no_wrap=True)
    for name in ("images/s", "p20 ms", "p50 ms", "p80 ms", "peak MiB", "speed-up", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(row["provider"], *_cells(row))
    graphs = ", replayed from CUDA graphs" if result["cuda_graphs"] else ""
    print_titled(console, f"{case}, {result['memory_format']}{graphs}", table)
    for row in result["rows"]:
        for note in row["notes"]:
            console.print(Text(f"  {row['provider']}: {note}", "dim"), soft_wrap=True)
        if row["failure"]:
            console.print(Text(f"  {row['provider']} failed: {row['failure']}", "red"), soft_wrap=True)
    console.print()


def _cells(row: dict) -> Sequence[str]:
    if row["failure"]:
        return ("failed",)
    return (
        f"{row['images_per_s']:.1f}",
        *(f"{row[name]:.2f}" for name in ("p20_ms", "p50_ms", "p80_ms")),
        "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}",  # eager failed later than this one was judged
        f"{row['max_error']:.1e}",
    )
