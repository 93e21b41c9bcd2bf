"""The static kernel report: compiles every Triton kernel as its launcher would launch it, without a GPU.

    python -m benchmarks.kernels [--arch 80 90 100] [--dtype bf16] [--json FILE] [--check]

Launchers run on meta tensors with their kernels replaced by recorders, so what is compiled is what a real launch of
that shape compiles: the same heuristics, constants and specialisations (1, multiples of 16, None). Registers, shared
memory and spills come from the cubin, instructions from its disassembly. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Registers and threads of one multiprocessor, for occupancy: alike on 8.0, 9.0 and 10.0.
REGISTERS_PER_SM = 65536
THREADS_PER_SM = 2048
COPY_BANDWIDTH_BYTES = 3.0e12  # device copy measured on an H100 80GB HBM3


# ---- recording launches ----------------------------------------------------------------------------------


@dataclass
class Launch:
    """One kernel launch as a launcher asked for it."""

    kernel: JITFunction
    grid: tuple
    values: dict  # argument name -> what was passed
    options: dict  # num_warps, num_stages

    def source(self) -> ASTSource:
        """What Triton would compile for these arguments, by its own specialisation rules."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.values[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]  # allocations are aligned
            elif isinstance(value, bool):
                signature[parameter.name] = "i1"
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32"
        return ASTSource(self.kernel, signature, constants, attributes)

    @property
    def programs(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count


class _Recorder:
    def __init__(self, kernel: JITFunction, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*args, **kwargs):
            options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
            values = dict(zip((p.name for p in self.kernel.params), args)) | kwargs
            for parameter in self.kernel.params:
                if parameter.name not in values:
                    values[parameter.name] = parameter.default
            resolved = grid(values) if callable(grid) else grid
            self.launches.append(Launch(self.kernel, tuple(resolved), values, options))

        return record


@contextlib.contextmanager
def recorded_launches(*modules) -> Iterator[list[Launch]]:
    """Inside, launches of the modules' kernels are collected and nothing runs."""
    launches: list[Launch] = []
    replaced = []
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                replaced.append((module, name, value))
                setattr(module, name, _Recorder(value, launches))
    try:
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


# ---- compiling and reading cubins ------------------------------------------------------------------------


@dataclass
class Report:
    """What a cubin says.

    Attributes:
        loop_instructions: instructions of the largest loop (of the whole kernel where there is none).
        per_output: lane-instructions of that loop per output element, where the case says how many there are.
        opcodes: how often each SASS opcode stands in the kernel, widths included (LDG.E.128).
    """

    kernel: str
    case: str
    arch: int
    num_warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    occupancy: float
    instructions: int
    loop_instructions: int
    per_output: float | None
    opcodes: dict[str, int] = field(default_factory=dict)
    loops: list = None


def compile_launch(launch: Launch, arch: int, case: str, outputs_per_iteration: int | None = None) -> Report:
    compiled = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=launch.options)
    num_warps = compiled.metadata.num_warps
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", "-plr" if False else "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    # STACK holds spilled registers too; LOCAL is what the kernel declared.
    stack = int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1))
    shared = compiled.metadata.shared
    instructions, loops = _instructions(sass)
    loop = max([b - a for a, b in loops], default=len(instructions))
    threads = num_warps * 32
    blocks = min(THREADS_PER_SM // threads, REGISTERS_PER_SM // (max(-(-registers // 8) * 8, 8) * threads), 32)
    opcodes: dict[str, int] = {}
    for opcode in instructions:
        opcodes[opcode] = opcodes.get(opcode, 0) + 1
    return Report(
        kernel=launch.kernel.__name__,
        case=case,
        arch=arch,
        num_warps=num_warps,
        registers=registers,
        shared_bytes=shared,
        spill_bytes=stack,
        occupancy=blocks * threads / THREADS_PER_SM,
        instructions=len(instructions),
        loop_instructions=loop,
        per_output=loop * threads / outputs_per_iteration if outputs_per_iteration else None,
        opcodes=opcodes,
        loops=[(a, b - a) for a, b in loops],
    )


def _run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout


def _instructions(sass: str) -> tuple[list[str], int]:
    """(opcodes in order, size of the largest loop body): a loop is a branch to a label above it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+|\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif found := re.match(r"\s*(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\b(.*);", line):
            opcodes.append(found.group(1))
            target = re.search(r"`\((\.L_\w+)\)", found.group(2))
            # The endless branch after EXIT is padding, not a loop.
            if found.group(1).startswith("BRA") and target and labels.get(target.group(1), 10**9) < len(opcodes) - 1:
                loops.append((labels[target.group(1)], len(opcodes)))
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes.pop()
    return opcodes, loops
