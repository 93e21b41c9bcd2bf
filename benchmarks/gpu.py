"""Builds, tests and measures bbfast on a machine with a GPU, without installing anything and without a network.

    python3 benchmarks/gpu.py [--quick] [--output FOLDER] [--step-minutes N]

Needs torch, setuptools, ninja and pytest in the Python that runs it; nvcc for the CUDA half. The package is built into
build/gpu (`setup.py build`, since pip may be missing or forbidden to touch the system's Python) and everything runs
from there. Each step streams into its own log, and results.json is rewritten before and after every step, so that a
run cut short keeps what it had. The exit status is 1 where a step failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"


@dataclass
class Step:
    """One command of the run.

    Attributes:
        outcome: waiting, running, passed, failed, or interrupted.
        exit_status: the command's; negative where a signal ended it; None before it ended.
        log: file beside results.json.
    """

    name: str
    command: list[str]
    outcome: str = "waiting"
    exit_status: int | None = None
    seconds: float | None = None
    log: str = ""


def main() -> int:
    args = parse_arguments()
    if not torch.cuda.is_available() and not args.without_gpu:
        print("benchmarks/gpu.py: torch finds no GPU here (--without-gpu tries the script itself)", file=sys.stderr)
        return 1
    machine = describe_machine()
    folder = args.output or ROOT / "benchmarks" / "results" / folder_name(machine)
    folder.mkdir(parents=True, exist_ok=True)
    steps = plan(args.quick, folder)
    results = {"machine": machine, "quick": args.quick, "started": now(), "ended": None, "steps": steps}
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, _interrupt)

    shutil.rmtree(BUILD, ignore_errors=True)  # a module that was deleted must not live on in the copy
    try:
        for step in steps:
            print(f"==== {step.name}: {' '.join(step.command)}", flush=True)
            run(step, folder, 60 * args.step_minutes, lambda: write(results, folder))
            print(f"==== {step.name} {step.outcome} after {step.seconds:.0f} s\n", flush=True)
            if step.name == "build" and step.outcome != "passed":
                break
    except KeyboardInterrupt:
        print("==== interrupted", flush=True)
    results["ended"] = now()
    write(results, folder)
    for step in steps:
        print(f"{step.outcome:12} {step.name:28} {'' if step.seconds is None else f'{step.seconds:.0f} s'}")
    print(f"results: {folder}")
    return 0 if all(step.outcome == "passed" for step in steps) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the tests marked gpu, and no benchmarks")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: benchmarks/results/<GPU>-<commit>")
    parser.add_argument("--step-minutes", type=float, default=60, metavar="N", help="limit per step, default 60")
    parser.add_argument("--without-gpu", action="store_true", help="go on without a GPU, to try this script")
    return parser.parse_args()


def plan(quick: bool, folder: Path) -> list[Step]:
    """Build, tests, then every benchmarks/bench_*.py, which may leave files of its own in BBFAST_RESULTS_DIR."""
    tests = [sys.executable, "-m", "pytest", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    tests += [
        "-m",
        "gpu and not slow" if quick else "not slow",
        f"--junitxml={folder / 'tests.xml'}",
        str(ROOT / "tests"),
    ]
    steps = [
        Step("build", [sys.executable, str(ROOT / "setup.py"), "build", "--build-lib", str(BUILD)]),
        Step("info", [sys.executable, "-m", "bbfast", "info"]),
        Step("tests", tests),
    ]
    if not quick:
        scripts = sorted((ROOT / "benchmarks").glob("bench_*.py"))
        steps += [Step(script.stem, _benchmark_command(script, folder)) for script in scripts]
    return steps


def _benchmark_command(script: Path, folder: Path) -> list[str]:
    """A benchmark is a script, or a file of pytest-benchmark functions."""
    if "\nif __name__" in script.read_text():
        return [sys.executable, str(script)]
    pytest = [sys.executable, "-m", "pytest", "-q", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    return [*pytest, "--benchmark-only", f"--benchmark-json={folder / script.stem}.json", str(script)]


def run(step: Step, folder: Path, limit_s: float, save) -> None:
    """Runs one step, copying what it prints to the terminal and to its log.

    Raises:
        KeyboardInterrupt: the run is asked to stop; the step's processes are ended first.
    """
    step.log, step.outcome = f"{step.name}.log", "running"
    save()
    building = step.name == "build"
    # From build/gpu, because `python -m` puts the current folder before all others; the source tree comes last.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "BBFAST_RESULTS_DIR": str(folder)}
    if not building:
        environment["PYTHONPATH"] = os.pathsep.join([str(BUILD), str(ROOT), os.environ.get("PYTHONPATH", "")])
    start = time.monotonic()
    with open(folder / step.log, "w") as log:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT if building else BUILD,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(limit_s, end_group, [process])
        timer.start()
        try:
            for line in process.stdout:
                sys.stdout.write(line)
                log.write(line)
                log.flush()
            step.exit_status = process.wait()
            step.outcome = "passed" if step.exit_status == 0 else "failed"
        except KeyboardInterrupt:
            end_group(process)
            step.exit_status, step.outcome = process.wait(), "interrupted"
            raise
        finally:
            timer.cancel()
            step.seconds = round(time.monotonic() - start, 1)
            save()


def end_group(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def write(results: dict, folder: Path) -> None:
    """Replaces results.json in one move, so that a run cut short never leaves half a file."""
    text = json.dumps({**results, "steps": [asdict(step) for step in results["steps"]]}, indent=2)
    partial = folder / "results.json.partial"
    partial.write_text(text + "\n")
    partial.replace(folder / "results.json")


def describe_machine() -> dict:
    """What a measurement is worth nothing without."""
    commit = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": output_of(sys.executable, "-c", "import triton; print(triton.__version__)"),
        "nvcc": output_of("nvcc", "--version"),
        "python": sys.version,
        "commit": commit,
        "dirty": None if changes is None else changes != "",
    }


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def folder_name(machine: dict) -> str:
    gpu = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or "no GPU").lower()).strip("-")
    commit = (machine["commit"] or "unknown")[:10]
    return f"{gpu}-{commit}{'-dirty' if machine['dirty'] else ''}"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
