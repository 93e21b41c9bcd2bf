"""Measures several models that prepare at the same time: `bbfast bench` for each, in turns on the GPU.

    python -m bbfast.benchmarks.together MODEL... --output FOLDER [--prefix NAME] [--prepare-seconds N] [-- OPTIONS]

OPTIONS go to each `bbfast bench`, for one case: one mode, one batch, one dtype. A model's results and output are
FOLDER/PREFIXMODEL.json and .log. Nothing is measured before all are ready; who is not after N seconds is stopped. The
exit status is 1 where a model failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bbfast.benchmarks import turns


def main() -> int:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        running = {model: start(model, args, folder) for model in args.models}
        try:
            give_the_word(running, folder, args.prepare_seconds)
            return finish(running, args)
        finally:
            for process in running.values():
                process.kill()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="takes results and logs")
    parser.add_argument("--prefix", default="models-", metavar="NAME", help="what names of files begin with")
    parser.add_argument("--prepare-seconds", type=float, default=600.0, metavar="N", help="to get ready; default 600")
    own = sys.argv[1:]
    own, options = (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])
    args = parser.parse_args(own)
    args.options = options
    return args


def start(model: str, args: argparse.Namespace, folder: Path) -> subprocess.Popen:
    """One model's benchmark, which compiles on its share of the cores."""
    command = [sys.executable, "-m", "bbfast", "bench", model, *args.options, "--turns", str(folder)]
    command += ["--json", str(stem(model, args).with_suffix(".json"))]
    threads = str(max(1, (os.cpu_count() or 1) // len(args.models)))
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads, **os.environ}
    with open(stem(model, args).with_suffix(".log"), "w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def stem(model: str, args: argparse.Namespace) -> Path:
    return args.output / f"{args.prefix}{model}"


def give_the_word(running: dict[str, subprocess.Popen], folder: Path, prepare_seconds: float) -> None:
    """Waits until every process is ready, or has ended, or must be stopped; then all may measure."""
    start, told = time.monotonic(), set()
    while len(told) < len(running):
        late = time.monotonic() - start > prepare_seconds
        for model, process in running.items():
            if model in told:
                continue
            seconds = f"{time.monotonic() - start:6.1f} s"
            if turns.is_ready(folder, process.pid):
                print(f"{seconds}  {model} is ready", flush=True)
            elif process.poll() is not None:
                print(f"{seconds}  {model} ended early", flush=True)
            elif late:
                process.kill()
                print(f"{seconds}  {model} is not ready and was stopped", flush=True)
            else:
                continue
            told.add(model)
        time.sleep(turns.POLL_SECONDS)
    (folder / turns.GO).touch()


def finish(running: dict[str, subprocess.Popen], args: argparse.Namespace) -> int:
    """Waits for all, shows what they printed, and says whether all went well."""
    failed = [model for model, process in running.items() if process.wait() != 0]
    for model in running:
        print(stem(model, args).with_suffix(".log").read_text(), flush=True)
    for model in failed:
        print(f"{model} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
