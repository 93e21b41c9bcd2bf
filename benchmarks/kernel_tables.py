"""Reports of compiled kernels: their figures, tables of them, and JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bbfast.benchmarks.kernel_launches import MULTIPROCESSORS
from bbfast.benchmarks.kernel_work import Work
from bbfast.benchmarks.sass import Function, global_accesses, mix

REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
MOST_BLOCKS_PER_MULTIPROCESSOR = 32
COPY_BYTES_PER_SECOND = 3.0e12
LANE_INSTRUCTIONS_PER_SECOND = MULTIPROCESSORS * 4 * 32 * 1.75e9


@dataclass
class Report:
    """One compiled kernel and a launch of it; what is not told here stands in `Work` and `Function`.

    Attributes:
        occupancy: resident threads over the most that a multiprocessor takes, as registers allow.
        instructions: that the kernel has; `mix` counts them by kind, `accesses` those of global memory by bytes per
            thread, `opcodes` by opcode.
        memory_us, issue_us: floors of the launch; `binds` names the larger one.
        launches: of models, how many share this code, `models` by "model mode". The figures are the largest one's.
    """

    case: str
    op: str
    kernel: str
    arch: int
    tile: str
    num_warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    occupancy: float
    instructions: int
    mix: dict[str, int]
    accesses: dict[str, int]
    per_output: float | None
    outputs: int | None
    traffic_bytes: int
    bias_bytes: int | None
    least_bytes: int | None
    vector_bytes: int | None
    halo: float | None
    read_per_output_byte: float | None
    narrow: list[str]
    memory_us: float
    issue_us: float | None
    binds: str | None
    launches: int
    models: dict[str, int]
    opcodes: dict[str, int]

    @classmethod
    def of(
        cls,
        *,
        case: str,
        op: str,
        kernel: str,
        arch: int,
        tile: str,
        num_warps: int,
        shared_bytes: int,
        function: Function,
        work: Work,
        launches: int = 1,
        models: dict[str, int] | None = None,
    ) -> Report:
        threads = num_warps * 32
        memory_us = work.traffic_bytes / COPY_BYTES_PER_SECOND * 1e6
        issue_us = work.lane_instructions and work.lane_instructions / LANE_INSTRUCTIONS_PER_SECOND * 1e6
        figures = asdict(work)
        del figures["lane_instructions"]
        return cls(
            case=case,
            op=op,
            kernel=kernel,
            arch=arch,
            tile=tile,
            num_warps=num_warps,
            registers=function.registers,
            shared_bytes=shared_bytes,
            spill_bytes=function.spill_bytes,
            occupancy=resident_blocks(function.registers, threads) * threads / THREADS_PER_MULTIPROCESSOR,
            instructions=len(function.opcodes),
            mix=mix(function.opcodes),
            accesses=global_accesses(function.opcodes),
            memory_us=memory_us,
            issue_us=issue_us,
            binds=None if issue_us is None else "memory" if memory_us >= issue_us else "issue",
            launches=launches,
            models=models or {},
            opcodes=dict(Counter(function.opcodes)),
            **figures,
        )


def resident_blocks(registers: int, threads: int) -> int:
    """Blocks of that many threads that a multiprocessor holds, as registers allow."""
    per_block = -(-registers // 8) * 8 * threads
    by_threads = THREADS_PER_MULTIPROCESSOR // threads
    return min(by_threads, REGISTERS_PER_MULTIPROCESSOR // per_block, MOST_BLOCKS_PER_MULTIPROCESSOR)


def total(run: str, arch: int, launches: Sequence[Report]) -> dict:
    """The floors of all Triton launches of a model, in us; one that issue binds costs what issue costs."""
    bound = [row for row in launches if row.binds == "issue"]
    return {
        "run": run,
        "arch": arch,
        "launches": len(launches),
        "memory_us": sum(row.memory_us for row in launches),
        "issue_bound_launches": len(bound),
        "issue_above_memory_us": sum(row.issue_us - row.memory_us for row in bound),
        "unknown_issue_launches": sum(row.binds is None for row in launches),
    }


# ---- tables ----------------------------------------------------------------------------------------------

# (header, left-aligned, text of a report)
COLUMNS = (
    ("case", True, lambda r: r.case),
    ("kernel", True, lambda r: r.kernel.removesuffix("_kernel")),
    ("runs", False, lambda r: str(r.launches)),
    ("tile", True, lambda r: r.tile),
    ("warps", False, lambda r: str(r.num_warps)),
    ("reg", False, lambda r: str(r.registers)),
    ("shared B", False, lambda r: str(r.shared_bytes)),
    ("spill", False, lambda r: str(r.spill_bytes)),
    ("occ.", False, lambda r: f"{r.occupancy:.0%}"),
    ("instr.", False, lambda r: str(r.instructions)),
    ("loads B", True, lambda r: _widths(r, "load")),
    ("stores B", True, lambda r: _widths(r, "store")),
    ("mma", False, lambda r: str(r.mix.get("tensor cores", ""))),
    ("mufu", False, lambda r: str(r.mix.get("MUFU", ""))),
    ("conv.", False, lambda r: str(r.mix.get("conversions", ""))),
    ("int", False, lambda r: str(r.mix.get("integer", ""))),
    ("instr./out", False, lambda r: _number(r.per_output, ".1f")),
    ("MB", False, lambda r: f"{r.traffic_bytes / 1e6:.1f}"),
    ("halo", False, lambda r: _number(r.halo, ".2f")),
    ("memory us", False, lambda r: f"{r.memory_us:.1f}"),
    ("issue us", False, lambda r: _number(r.issue_us, ".1f")),
    ("binds", True, lambda r: r.binds or ""),
)


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else format(value, pattern)


def _widths(report: Report, which: str) -> str:
    """Such as 4x16 2x4: four accesses of 16 bytes per thread and two of 4."""
    counts = {int(name.split()[1]): n for name, n in report.accesses.items() if name.startswith(which)}
    return " ".join(f"{counts[width]}x{width}" for width in sorted(counts, reverse=True))


def print_tables(rows: Sequence[Report], totals: Sequence[dict]) -> None:
    """A table per op and architecture, in the order in which they come, and one of whole models."""
    console = Console(width=None if sys.stdout.isatty() else 240)
    for arch, op in dict.fromkeys((row.arch, row.op) for row in rows):
        table = Table(title=f"{op}, compiled for sm_{arch} and not run")
        for header, left, _ in COLUMNS:
            table.add_column(header, no_wrap=True, justify="left" if left else "right")
        for row in rows:
            if (row.arch, row.op) == (arch, op):
                table.add_row(*(text(row) for _, _, text in COLUMNS))
        console.print(table)
    if totals:
        console.print(_table_of_models(totals))


def _table_of_models(totals: Sequence[dict]) -> Table:
    table = Table(title="Triton launches of whole models, batch 128, bf16: floors, not measurements")
    headers = ("sm", "launches", "memory floor us", "bound by issue", "issue above memory us", "issue unknown")
    for header in ("model", *headers):
        table.add_column(header, justify="left" if header == "model" else "right")
    for row in totals:
        floors = (f"{row['memory_us']:.0f}", str(row["issue_bound_launches"]), f"{row['issue_above_memory_us']:.0f}")
        unknown = str(row["unknown_issue_launches"])
        table.add_row(row["run"], str(row["arch"]), str(row["launches"]), *floors, unknown)
    return table


def summary(rows: Sequence[Report], failures: int) -> str:
    """One line: how many kernels there are, what binds them, spills and problems."""
    binds = Counter(row.binds for row in rows)
    spills = sum(row.spill_bytes > 0 for row in rows)
    return (
        f"{len(rows)} kernels compiled: {binds['memory']} bound by memory, {binds['issue']} by instruction issue, "
        f"{binds[None]} not told; {spills} spill, {failures} problems"
    )


def write_json(path: Path, facts: dict, rows: Sequence[Report], totals: Sequence[dict], with_opcodes: bool) -> None:
    """Facts, the rates of the floors, whole models, and a report per line, with all opcodes or without."""
    reports = [asdict(row) for row in rows]
    for row in reports:
        if not with_opcodes:
            del row["opcodes"]
    rates = {
        "copy_bytes_per_second": COPY_BYTES_PER_SECOND,
        "lane_instructions_per_second": LANE_INSTRUCTIONS_PER_SECOND,
    }
    parts = [f'"facts": {json.dumps(facts, indent=1)}', f'"rates": {json.dumps(rates)}']
    for name, lines in (("totals", totals), ("reports", reports)):
        parts.append(f'"{name}": [\n' + ",\n".join(map(json.dumps, lines)) + "\n]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
