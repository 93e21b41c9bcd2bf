"""Compiles what model benchmarks will run, several at a time, so that they find it in the caches of the compilers.

    python -m bbfast.benchmarks.warm_up MODEL... [--mode infer,train] [--batch 128] [--dtype bf16] [--providers ...]

`torch.compile` keeps one or two processor cores busy for tens of seconds per provider, and Triton compiles one kernel
after the other. A benchmark must not share the GPU while it measures, but compiling may share the processor: here each
model with each provider is one `bbfast bench --rounds 1` in a process of its own, and what they measure is thrown away.
What Inductor and Triton compile they keep on disk (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR), where later processes
find it. The exit status is 0 even if a provider fails: the benchmark itself will tell.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

MOST_PROCESSES = 12  # each holds a model, its images and a CUDA context


def main() -> int:
    args = parse_arguments()
    jobs = list(product(args.mode, args.models, args.providers))
    with ThreadPoolExecutor(args.processes) as pool:
        for line in pool.map(lambda job: run(*job, args), jobs):
            print(line, flush=True)
    return 0


def parse_arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--mode", type=names, default=["infer"], metavar="NAME,...")
    parser.add_argument("--batch", default="128", metavar="N,...")
    parser.add_argument("--dtype", default="bf16", metavar="NAME,...")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--providers", type=names, default=["compile", "bbfast+compile"], metavar="NAME,...")
    parser.add_argument("--processes", type=int, default=min(MOST_PROCESSES, os.cpu_count() or 1), metavar="N")
    return parser.parse_args()


def run(mode: str, model: str, provider: str, args: argparse.Namespace) -> str:
    """Runs one provider once; a line about it."""
    command = [sys.executable, "-m", "bbfast", "bench", model, "--mode", mode, "--batch", args.batch]
    command += ["--dtype", args.dtype, "--device", args.device, "--providers", provider, "--rounds", "1"]
    start = time.monotonic()
    done = subprocess.run(command, env=environment(args.processes), capture_output=True, text=True)
    told = "" if done.returncode == 0 else f": {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return f"{time.monotonic() - start:6.1f} s  {model} {mode} {provider}{told}"


def environment(processes: int) -> dict[str, str]:
    """Each process compiles kernels on its share of the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads, **os.environ}


if __name__ == "__main__":
    sys.exit(main())
