"""The kernels of csrc/*.cu, compiled by nvcc for GPUs that need not be here."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from bbfast.benchmarks.facts import ROOT
from bbfast.benchmarks.kernel_work import Work
from bbfast.benchmarks.sass import Function, global_accesses, read_cubin

# What a kernel's vector type promises to move at once, by its name in the mangled symbol.
VECTOR_TYPES = {"5uint4": 16, "5uint2": 8, "j": 4, "t": 2, "h": 1}
INDEX_TYPES = {"i": "int32", "l": "int64"}
# The map of swin_tiny's first stage, batch 128 in bf16, read once and written once.
MAP_BYTES = 128 * 56 * 56 * 96 * 2
# As in csrc/window.cu.
THREADS, UNROLL = 256, 4


def unavailable_reason() -> str | None:
    if not (ROOT / "csrc").is_dir():
        return "csrc/ is not here"
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def compiled(source: Path, arch: int) -> list[Function]:
    """The kernels of a CUDA source, as setup.py has them compiled.

    Raises:
        RuntimeError: nvcc fails; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{run.stderr}")
        return read_cubin(cubin)


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*.cu"))


def describe(function: Function) -> tuple[str, int]:
    """(kernel with its template arguments, bytes of its vectors) of a window copy.

    Raises:
        ValueError: another kernel, which this file must be taught.
    """
    found = re.search(r"window_copy_kernelI(5uint4|5uint2|j|t|h)(i|l)Lb([01])E", function.name)
    if found is None:
        raise ValueError(f"{function.name} is not known; benchmarks/cuda_kernels.py must say what it costs")
    vector, index, reverse = found.groups()
    name = f"window_{'reverse' if reverse == '1' else 'partition'}, {VECTOR_TYPES[vector]} bytes, {INDEX_TYPES[index]}"
    return name, VECTOR_TYPES[vector]


def work_of(function: Function, vector_bytes: int) -> Work:
    """The work of copying swin_tiny's first map; per output is per vector."""
    vectors = MAP_BYTES // vector_bytes
    body = function.nest[0].length if function.nest else len(function.opcodes)
    outside = len(function.opcodes) - body
    programs = -(-vectors // (THREADS * UNROLL))
    narrower = [n for n in global_accesses(function.opcodes) if int(n.split()[1]) < vector_bytes]
    return Work(
        traffic_bytes=2 * MAP_BYTES,
        outputs=vectors,
        per_output=body / UNROLL,
        lane_instructions=programs * THREADS * (body + outside),
        vector_bytes=vector_bytes,
        narrow=[f"{name.replace(' ', 's of ')} bytes" for name in narrower],
    )
