"""Builds, tests and measures bbfast on a machine with a GPU, without installing anything and without a network.

    python3 benchmarks/gpu.py [--quick] [--minutes N] [--timm WHEEL] [--only 'models-*'] [--output FOLDER] [--built]

Needs torch, setuptools, ninja and pytest in the Python that runs it; nvcc for the CUDA half; timm for whole models and
pytest-benchmark for ops, which are skipped without. `BBFAST_COMMIT=HASH` tells the commit where there is no git. The
package is built into build/gpu (`setup.py build`, since pip may be missing or forbidden to touch the system's Python)
and everything runs from there, in the order of `gpu_plan.py`, until the time is over. With `--built` what lies there
is taken as it is: where minutes of a GPU count, build the same commit beforehand, for the same Python and torch.

Each step writes its own log and results, and gpu.json is rewritten before and after every step, so that a run cut short
keeps what it had. At the end, also of a run that was stopped, report.md is rendered. The exit status is 1 where a step
failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import torch

if __package__:
    from bbfast.benchmarks.facts import facts, new_results_folder
    from bbfast.benchmarks.gpu_plan import Planner, Step
else:  # run as a script, before bbfast is built
    from facts import facts, new_results_folder
    from gpu_plan import Planner, Step

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
REPORT_SECONDS = 40  # kept for importing torch before the first step, stopping the last one, and the report
WORTH_STARTING_SECONDS = 10
MOST_TESTS = 8  # at a time: they mostly compile, but each holds a CUDA context
GRACE_SECONDS = 10  # for pytest to write its results when it is stopped
IMPORT_EXTENSION = "import bbfast._C; print(bbfast._C.build_info())"
PACKAGES = ("bbfast", "bbfast/triton_kernels", "bbfast/benchmarks")


def main() -> int:
    args = parse_arguments()
    gpu = torch.cuda.is_available()
    if not gpu and not args.without_gpu:
        print("benchmarks/gpu.py: torch finds no GPU here (--without-gpu tries the script itself)", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)  # in the background it is ignored, which steps would inherit
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, _interrupt)
    found = facts("cuda" if gpu else "cpu")
    folder = args.output or new_results_folder(found)
    folder.mkdir(parents=True, exist_ok=True)
    processes = min(MOST_TESTS, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1
    planner = Planner(ROOT, BUILD, folder.resolve(), gpu, shutil.which("compute-sanitizer"), processes)
    steps = planner.steps(args.quick)
    steps = [step for step in steps if step.name == "build" or fnmatch.fnmatch(step.name, args.only)]
    run = Run(folder.resolve(), steps, found, 60 * (args.minutes or (3 if args.quick else 10)), args.timm)
    if args.built:
        run.building, steps[0].command = False, [sys.executable, "-c", IMPORT_EXTENSION]
    else:
        shutil.rmtree(BUILD, ignore_errors=True)  # a module that was deleted must not live on in the copy
    try:
        run.all()
    except KeyboardInterrupt:
        print("==== interrupted", flush=True)
    run.close()
    for step in steps:
        seconds = "" if step.seconds is None else f"{step.seconds:.0f} s"
        print(f"{step.outcome:12} {step.name:50} {seconds:>6} {step.reason or ''}".rstrip())
    print(f"results: {folder}")
    return 1 if any(step.outcome in ("failed", "interrupted") for step in steps) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some of the tests, two models, two ops; 3 minutes")
    parser.add_argument("--minutes", type=_minutes, metavar="N", help="time for everything; default 10, quick 3")
    parser.add_argument("--timm", type=Path, metavar="PATH", help="a wheel of timm, or a folder that holds the package")
    parser.add_argument("--only", default="*", metavar="WILDCARD", help="build, and the steps of these names")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: a new one under benchmarks/results")
    parser.add_argument("--built", action="store_true", help="take the package in build/gpu instead of building it")
    parser.add_argument("--without-gpu", action="store_true", help="go on without a GPU, to try this script")
    args = parser.parse_args()
    if args.timm and not args.timm.exists():
        parser.error(f"--timm {args.timm}: no such file or folder")
    return args


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it is a number of minutes above 0")
    return value


class Run:
    """Steps that share an amount of time, and what became of them."""

    def __init__(self, folder: Path, steps: list[Step], found: dict, seconds: float, timm: Path | None):
        self.folder, self.steps, self.seconds = folder, steps, seconds
        self.content = {"facts": found, "minutes": round(seconds / 60, 2), "ended": None}
        self.start = time.monotonic()
        self.lacking: dict[str, str | None] = {}
        self.building = True  # in the build step; else it looks whether what is there can be imported
        paths = [str(timm.resolve())] if timm else []
        commit = f"{found['commit']}{'-dirty' if found['dirty'] else ''}" if found["commit"] else None
        self.environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            # From build/gpu, because `python -m` puts the current folder before all others.
            "PYTHONPATH": os.pathsep.join([str(BUILD), *paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            **({"BBFAST_COMMIT": commit} if commit else {}),
        }

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def all(self) -> None:
        """Runs the steps; those whose phase is over come after the others.

        Raises:
            KeyboardInterrupt: the run is asked to stop; the step's processes are ended first.
        """
        queue, put_off = deque(step for step in self.steps if step.outcome == "waiting"), deque()
        while queue or put_off:
            if not queue:
                queue, put_off = put_off, deque()
                for step in queue:
                    step.until = 1.0
            step = queue.popleft()
            if step.until < 1 and self.elapsed() > step.until * self.seconds:
                put_off.append(step)
                continue
            self.one(step)
            if step.name == "build" and step.outcome != "passed":
                for left in (*queue, *put_off):
                    left.outcome, left.reason = "skipped", "nothing was built"
                return

    def one(self, step: Step) -> None:
        """Runs one step within its limit and what is left of the time."""
        left = self.seconds - REPORT_SECONDS - self.elapsed()
        if left < WORTH_STARTING_SECONDS:
            step.outcome, step.reason = "skipped", "no time left"
            return
        missing = [reason for module in step.needs if (reason := self.missing(module))]
        if missing:
            step.outcome, step.reason = "skipped", "; ".join(missing)
            return
        print(f"==== {step.name}: {' '.join(step.command)}", flush=True)
        self.command(step, min(step.limit_s, left))
        if step.name == "build" and step.outcome == "passed":
            lost = [package for package in PACKAGES if not (BUILD / package / "__init__.py").is_file()]
            if lost:
                step.outcome, step.reason = "failed", f"not in {BUILD}: {', '.join(lost)}"
        print(f"==== {step.name} {step.outcome} after {step.seconds:.0f} s\n", flush=True)
        self.save()

    def missing(self, module: str) -> str | None:
        """Why a module cannot be imported by the steps, or None."""
        if module not in self.lacking:
            tried = subprocess.run(
                [sys.executable, "-c", f"import {module}"], env=self.environment, capture_output=True, text=True
            )
            last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
            self.lacking[module] = None if tried.returncode == 0 else f"cannot import {module}: {last}"
        return self.lacking[module]

    def command(self, step: Step, limit_s: float) -> None:
        """Runs a step's command, copying what it prints to the terminal and to its log."""
        step.log, step.outcome = f"{step.name}.log", "running"
        self.save()
        building = step.name == "build" and self.building
        environment = {**(build_environment() if building else self.environment), **step.environment}
        start = time.monotonic()
        with open(self.folder / step.log, "w") as log, open(self.folder / step.log, errors="replace") as reader:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT if building else BUILD,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.monotonic() - start < limit_s:
                    time.sleep(0.1)
                    sys.stdout.write(reader.read())
                    sys.stdout.flush()
                if process.poll() is None:
                    step.reason = f"stopped after {limit_s:.0f} s"
                    end(process)
                step.exit_status = process.wait()
                step.outcome = "cut short" if step.reason else "passed" if step.exit_status == 0 else "failed"
            except KeyboardInterrupt:
                end(process)
                step.exit_status, step.outcome = process.wait(), "interrupted"
                raise
            finally:
                step.seconds = round(time.monotonic() - start, 1)
                sys.stdout.write(reader.read())
                self.save()

    def close(self) -> None:
        """Marks what never ran, and renders the report of what did."""
        for step in self.steps:
            if step.outcome == "waiting":
                step.outcome, step.reason = "skipped", "the run was stopped"
        self.content["ended"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.save()
        if any(step.name == "build" and step.outcome == "passed" for step in self.steps):
            command = [sys.executable, "-m", "bbfast.benchmarks.report", str(self.folder)]
            subprocess.run(command, cwd=BUILD, env=self.environment)

    def save(self) -> None:
        """Replaces gpu.json in one move, so that a run cut short never leaves half a file."""
        text = json.dumps({**self.content, "steps": [asdict(step) for step in self.steps]}, indent=1)
        partial = self.folder / "gpu.json.partial"
        partial.write_text(text + "\n")
        partial.replace(self.folder / "gpu.json")


def build_environment() -> dict[str, str]:
    """Builds for the GPU at hand alone, which takes a fraction of the time, unless the user names architectures."""
    if not torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ:
        return dict(os.environ)
    return {**os.environ, "TORCH_CUDA_ARCH_LIST": ".".join(map(str, torch.cuda.get_device_capability()))}


def end(process: subprocess.Popen) -> None:
    """Asks a step's processes to stop, as Ctrl-C does, and kills what remains."""
    for signal_number, seconds in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
