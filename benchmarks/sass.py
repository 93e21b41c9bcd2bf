"""Reads NVIDIA machine code (SASS): registers, opcodes, loops, kinds of instructions and widths of accesses.

The disassembler and its companion come with Triton; no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Kinds of instructions by the opcode up to its first dot, or what that begins with.
EXACT_KINDS = {
    **dict.fromkeys(("LDG", "LDGSTS"), "global loads"),
    "STG": "global stores",
    **dict.fromkeys(("LDS", "STS", "LDSM", "STSM", "ATOMS"), "shared memory"),
    **dict.fromkeys(("LDL", "STL"), "local memory"),
    "MUFU": "MUFU",
    **dict.fromkeys(("F2F", "F2FP", "F2I", "F2IP", "I2F", "I2FP", "I2I", "I2IP", "FRND"), "conversions"),
    **dict.fromkeys(("SHFL", "MOV", "UMOV", "R2UR", "S2R", "S2UR", "CS2R", "R2P", "P2R", "MOVM"), "moves"),
}
KINDS_BY_PREFIX = {
    ("F", "H", "D"): "floating point",
    ("IADD", "IMAD", "LEA", "LOP", "SHF", "SHL", "SHR", "ISETP", "IMNMX", "IABS", "VIADD", "VIMNMX"): "integer",
    ("SEL", "PRMT", "PLOP", "SGXT", "POPC", "FLO", "BMSK", "BREV", "VOTE"): "integer",
    ("UIADD", "UIMAD", "ULEA", "ULOP", "USHF", "UISETP", "USEL", "UPRMT", "UPLOP", "USGXT", "UFLO", "UPOPC"): "integer",
}


@dataclass(frozen=True)
class Loop:
    """A branch to a label above it: its first instruction, and how many there are."""

    first: int
    length: int

    @property
    def end(self) -> int:
        return self.first + self.length

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.end <= self.end


@dataclass(frozen=True)
class Function:
    """One kernel of a cubin.

    Attributes:
        spill_bytes: bytes of the stack per thread, where instructions use it. ptxas for sm_100 reserves 8 bytes here
            and there that no instruction touches.
        opcodes: in order, widths included (LDG.E.128).
        loops: waits for a barrier left out.
    """

    name: str
    registers: int
    spill_bytes: int
    opcodes: tuple[str, ...]
    loops: tuple[Loop, ...]

    @cached_property
    def outer_loops(self) -> list[Loop]:
        """Loops that no other holds, in order."""
        return [loop for loop in self.loops if not any(other.holds(loop) for other in self.loops)]

    @cached_property
    def nest(self) -> list[Loop]:
        """The longest loop, the longest inside it, and so on."""
        found: list[Loop] = []
        inside = list(self.loops)
        while inside:
            found.append(max(inside, key=lambda loop: loop.length))
            inside = [loop for loop in inside if found[-1].holds(loop)]
        return found

    def body(self, loop: Loop) -> tuple[str, ...]:
        return self.opcodes[loop.first : loop.end]

    @property
    def outside(self) -> int:
        """Instructions in no loop, which each warp issues once."""
        return len(self.opcodes) - sum(loop.length for loop in self.outer_loops)


def read_cubin(path: str | Path) -> list[Function]:
    """The kernels of a cubin file."""
    usages = _usages(_tool("cuobjdump", "--dump-resource-usage", str(path)))
    found = []
    for name, text in _sections(_tool("nvdisasm", "-c", str(path))).items():
        registers, stack = usages[name]
        opcodes, loops = disassembly(text)
        uses_stack = any(opcode.startswith(("STL", "LDL")) for opcode in opcodes)
        found.append(Function(name, registers, stack if uses_stack else 0, tuple(opcodes), tuple(loops)))
    return found


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


def _usages(text: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes of stack and local memory) by function."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return {name: (int(registers), int(stack) + int(local)) for name, registers, stack, local in found}


def _sections(sass: str) -> dict[str, str]:
    """The text of each function."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+),.*$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def disassembly(sass: str) -> tuple[list[str], list[Loop]]:
    """The opcodes of one function in order, and its loops."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif found := re.match(r"\s*(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\b(.*);", line):
            opcodes.append(found.group(1))
            target = re.search(r"`\((\.L_\w+)\)", found.group(2))
            first = labels.get(target.group(1)) if target else None
            # The endless branch onto itself after EXIT is padding, not a loop.
            if found.group(1).startswith("BRA") and first is not None and first < len(opcodes) - 1:
                loops.append(Loop(first, len(opcodes) - first))
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes.pop()
    return opcodes, [loop for loop in loops if not _is_wait(opcodes[loop.first : loop.end])]


def _is_wait(body: list[str]) -> bool:
    """Whether a loop only asks a barrier again and again."""
    return len(body) <= 16 and any(opcode.startswith(("SYNCS", "NANOSLEEP")) for opcode in body)


def kind(opcode: str) -> str:
    """What an instruction is for, of a few kinds; bf16 becomes float32 in `integer` ones (shifts and permutations)."""
    base = opcode.split(".")[0]
    if base in EXACT_KINDS:
        return EXACT_KINDS[base]
    if base.endswith("MMA"):
        return "tensor cores"
    if opcode.startswith("IMAD.MOV"):
        return "moves"
    return next((kind for prefixes, kind in KINDS_BY_PREFIX.items() if base.startswith(prefixes)), "other")


def mix(opcodes) -> dict[str, int]:
    """How many instructions there are of each kind, most first."""
    return dict(Counter(map(kind, opcodes)).most_common())


def access_bytes(opcode: str) -> int:
    """What a thread loads or stores with a memory instruction, in bytes."""
    parts = opcode.split(".")
    if width := next((int(part) for part in parts if part in ("64", "128", "256")), None):
        return width // 8
    return 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else 4


def global_accesses(opcodes) -> dict[str, int]:
    """Counts such as {"load 16": 8, "store 2": 1}: loads and stores of global memory by bytes per thread."""
    found = Counter()
    for opcode in opcodes:
        if (which := kind(opcode)) in ("global loads", "global stores"):
            found[f"{which.split()[1][:-1]} {access_bytes(opcode)}"] += 1
    return dict(sorted(found.items()))
