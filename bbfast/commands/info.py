"""`bbfast info`: what is installed, what was built, and which backends can run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from argparse import Namespace
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import bbfast
from bbfast import env, extension
from bbfast.commands._common import print_titled
from bbfast.ops import _status
from bbfast.triton_kernels import tuned

PACKAGES = ("triton", "torchvision", "timm")
# Name, what it means when it is not set, and what raises ValueError where its value is not allowed.
VARIABLES = (
    ("BBFAST_BACKEND", "auto", env.backend),
    ("BBFAST_STRICT", "0", env.strict),
    ("BBFAST_TUNED", "1", env.tuned),
    ("BBFAST_TUNED_DIR", "~/.cache/bbfast/tuned", lambda: None),
    ("BBFAST_REPLAY", "1", lambda: None),
    ("TRITON_INTERPRET", "0", lambda: None),
    ("CUDA_VISIBLE_DEVICES", "all", lambda: None),
    ("BBFAST_CUDA", "auto; for the build", lambda: None),
    ("CUDA_HOME", "found on PATH; for the build", lambda: None),
    ("TORCH_CUDA_ARCH_LIST", "what nvcc can; for the build", lambda: None),
)


def run(args: Namespace) -> int:
    console = Console(highlight=False)
    _print_pairs(console, "Versions", _versions())
    _print_pairs(console, "Devices", _devices())
    _print_pairs(console, "Extension bbfast._C", _extension())
    _print_pairs(console, "Environment", _environment())
    _print_pairs(console, "Launch configurations", _launch_configurations())
    _print_backends(console)
    return 0


def _versions() -> list[tuple[str, str]]:
    rows = [
        ("bbfast", bbfast.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__} ({_torch_build()})"),
    ]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _torch_build() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "CPU only" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _devices() -> list[tuple[str, str]]:
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    rows = [("CPU", cpu)]
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no device or driver"
        return [*rows, ("GPU", f"none: {why}")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        details = (
            properties.name,
            f"compute capability {properties.major}.{properties.minor}",
            f"{properties.multi_processor_count} multiprocessors",
            f"{properties.total_memory / 2**30:.0f} GiB",
        )
        rows.append((f"GPU {index}", ", ".join(details)))
    return rows


def _extension() -> list[tuple[str, str]]:
    try:
        module = extension.load()
    except extension.BrokenExtensionError as error:
        return [("state", f"broken: {error}")]
    if module is None:
        return [("state", extension.unavailable_reason())]
    return [("state", "loaded"), *((name, _as_text(value)) for name, value in module.build_info().items())]


def _as_text(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)


def _environment() -> list[tuple[str, str]]:
    rows = []
    for name, default, check in VARIABLES:
        value = os.environ.get(name)
        text = f"not set ({default})" if value is None else value
        try:
            check()
        except ValueError as error:
            text = str(error)
        rows.append((name, text))
    return rows


def _launch_configurations() -> list[tuple[str, str]]:
    """The files of measured ones that launches on the GPUs here take."""
    gpus = [torch.cuda.get_device_properties(index).name for index in range(torch.cuda.device_count())]
    try:
        rows = [
            (name, f"{_measured(path, name, gpu)}, from {path}")
            for gpu in dict.fromkeys(gpus)
            for name in tuned.NAMES
            for path in tuned.files(name, gpu)
        ]
    except ValueError as error:  # BBFAST_TUNED
        return [("state", str(error))]
    if rows:
        return rows
    why = "BBFAST_TUNED=0" if not env.tuned() else "no GPU" if not gpus else "nothing measured; see `bbfast tune`"
    return [("state", f"none: heuristics ({why})")]


def _measured(path: Path, name: str, gpu: str) -> str:
    try:
        entries = tuned.read(path, tuned.tunables()[name], gpu)
    except (ValueError, ModuleNotFoundError) as error:
        return f"unusable: {error}"
    return f"{sum(entry.config is not None for entry in entries)} of {len(entries)} measured better on {gpu}"


def _print_backends(console: Console) -> None:
    console.print(
        Text("Backends", "bold"),
        "asked with a small float32 channels_last tensor; an op takes the first that runs, torch is the reference\n",
    )
    for (op, device), statuses in groupby(_status.backend_status(), key=lambda status: (status.op, status.device)):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True, min_width=8)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for status in statuses:
            runs = Text("no", "red") if status.reasons else Text("runs", "green")
            table.add_row(status.backend, runs, Text("; ".join(status.reasons)))
        console.print(Text(f"  {op} on {device}", "cyan"), table)


def _print_pairs(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True, style="cyan", min_width=20)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    print_titled(console, title, table, "")
