"""What a measurement is worth nothing without: machine, versions, settings and the commit that was measured.

Needs torch alone, so that it also works where bbfast is yet to be built.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bbfast", "triton", "timm", "torchvision", "transformers")


def facts(device: str | torch.device) -> dict:
    """Everything about the machine that a result needs, as plain values; None for what cannot be found out.

    Args:
        device: what is measured, `cpu` or `cuda`. The GPU's entries are None for `cpu`.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **source(),
        "device": "cuda" if on_gpu else "cpu",
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": smi("driver_version") if on_gpu else None,
        "clocks_sm_mhz": smi("clocks.sm") if on_gpu else None,
        "clocks_max_sm_mhz": smi("clocks.max.sm") if on_gpu else None,
        "clocks_memory_mhz": smi("clocks.mem") if on_gpu else None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        **{package: version(package) for package in PACKAGES},
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "bbfast_backend": os.environ.get("BBFAST_BACKEND", "auto"),
    }


def source() -> dict:
    """The commit of this checkout, and whether tracked files differ from it; None for both where this is none.

    Where files alone were copied to, `BBFAST_COMMIT=HASH` or `HASH-dirty` may tell it.
    """
    if output_of("git", "-C", str(ROOT), "rev-parse", "--show-toplevel") != str(ROOT):  # may be somebody else's
        told = os.environ.get("BBFAST_COMMIT")
        return {"commit": told and told.removesuffix("-dirty"), "dirty": told and told.endswith("-dirty")}
    commit = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    # Results of an earlier run change nothing that is measured.
    changes = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def smi(field: str) -> str | None:
    """One value that nvidia-smi knows about the first GPU."""
    return output_of("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0")


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_folder(found: dict) -> str:
    """A folder's name for the device, such as `nvidia-h100-80gb-hbm3` or `cpu-amd-epyc-7b13`."""
    name = found["gpu"] or "cpu " + re.sub(r"\b\d+-core\b|\bprocessor\b|\(\w+\)", "", found["processor"], flags=re.I)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_folder(found: dict) -> str:
    """A folder's name for one run: date, commit, and `-dirty` where the source differs from that commit."""
    commit = (found["commit"] or "unknown")[:10]
    return f"{found['started'][:10]}-{commit}{'-dirty' if found['dirty'] else ''}"


def new_results_folder(found: dict) -> Path:
    """Makes a folder for one run under benchmarks/results, numbered from the second of a day and commit on."""
    wanted = ROOT / "benchmarks" / "results" / device_folder(found) / run_folder(found)
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True)
    return folder
