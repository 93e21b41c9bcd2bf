"""Measures models and ops on this machine and renders the report, into a new folder of results.

python -m bbfast.benchmarks.run [MODEL...] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from bbfast.benchmarks.facts import ROOT, facts, new_results_folder
from bbfast.benchmarks.gpu_plan import MODELS

ON_CPU = 4  # so many of the models; the others would take an hour


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(MODELS if gpu else MODELS[:ON_CPU]))
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: a new one under benchmarks/results")
    args = parser.parse_args(argv)
    if args.output is None and not (ROOT / "setup.py").is_file():
        parser.error("--output FOLDER is needed where bbfast is installed without its sources")
    folder = args.output or new_results_folder(facts("cuda" if gpu else "cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    status = 0
    for command in commands(args.models, folder):
        print(f"==== {' '.join(command)}", flush=True)
        status = subprocess.run(command).returncode or status
    return status


def commands(models: list[str], folder: Path) -> list[list[str]]:
    """The models, the ops and the report; each is run even if one before it failed."""
    here = str(Path(__file__).parent)
    return [
        [sys.executable, "-m", "bbfast", "bench", *models, "--json", str(folder / "models.json")],
        [sys.executable, "-m", "pytest", here, "--benchmark-only", f"--benchmark-json={folder / 'ops.json'}"],
        [sys.executable, "-m", "bbfast.benchmarks.report", str(folder)],
    ]


if __name__ == "__main__":
    sys.exit(main())
