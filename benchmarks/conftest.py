"""Fixtures, options and reports of the per-op benchmarks; `op_suite.py` says what they measure."""

import gc
import os

import pytest
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bbfast.benchmarks import op_case, op_suite, op_timing
from bbfast.benchmarks.facts import facts

FACTS, FAILURES, ROWS = pytest.StashKey(), pytest.StashKey(), pytest.StashKey()
WIDTH = 200  # of the table at the end, also where it goes to a file
NUMBERS = {
    "median_ms": ("median ms", ".4f"),
    "floor_ms": ("floor ms", ".4f"),
    "gbps": ("GB/s", ".4g"),
    "percent_of_copy": ("% of copy", ".0f"),
    "peak_mib": ("peak MiB", ".1f"),
    "max_error": ("error", ".1e"),
}


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="benchmarks of ops: all shapes, and on a CPU torch.compile")


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1 would time Triton's interpreter, not kernels; unset it")
    config.stash[FACTS], config.stash[FAILURES], config.stash[ROWS] = facts(op_timing.DEVICE), [], []


def pytest_collection_modifyitems(config, items):
    """The most important files first; without --full not everything."""
    order = {name: position for position, name in enumerate(op_suite.FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if not config.getoption("--full"):
        left_out = [item for item in items if "full" in item.keywords]
        items[:] = [item for item in items if "full" not in item.keywords]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def speeds():
    return op_timing.measure_speeds(op_case.DTYPE)


@pytest.fixture(scope="session", autouse=True)
def lasting_objects():
    """What all the imports left behind is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def expected():
    """What eager torch computes for the group at hand."""
    return {}


@pytest.fixture
def suite(benchmark, monkeypatch, speeds, expected, request):
    stash = request.config.stash
    yield op_suite.Suite(benchmark, monkeypatch, speeds, expected, stash[FAILURES])
    if benchmark.stats:
        stash[ROWS].append({**benchmark.extra_info, "median_ms": benchmark.stats.stats.median * 1e3})
    gc.collect()
    if op_timing.ON_GPU:
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["facts"] = config.stash[FACTS]
    machine_info.pop("node", None)  # results are published; what the machine is called is nobody's business


def pytest_benchmark_update_json(config, output_json):
    output_json["failures"] = config.stash[FAILURES]


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[ROWS]:
        return
    table = Table(box=box.SIMPLE)
    shown = [key for key in NUMBERS if any(row[key] is not None for row in config.stash[ROWS])]  # a CPU has no floor
    for header in ("op, shape, direction", "provider", "backend"):
        table.add_column(header, no_wrap=True)
    for key in shown:
        table.add_column(NUMBERS[key][0], justify="right", no_wrap=True)
    last = None
    for row in config.stash[ROWS]:
        group = f"{row['op']} {row['shape']} {row['direction']}"
        numbers = ("" if row[key] is None else format(row[key], NUMBERS[key][1]) for key in shown)
        table.add_row("" if group == last else group, row["provider"], row["backend"] or "", *numbers)
        last = group
    terminalreporter.section("benchmarks of ops")
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as text:
        console.print(table)
    terminalreporter.write(text.get())
