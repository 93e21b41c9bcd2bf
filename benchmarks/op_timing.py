"""The clock of the per-op suite, and the device's own speeds that its results are held against.

On a GPU one call may take less time than Python needs to launch it, so that a loop of launches would time Python.
Calls are therefore captured into one CUDA graph, one call for each copy of the inputs, and the graph is replayed: what
is timed is what the GPU does, for every provider alike. The copies together exceed the L2 cache and the outputs of a
graph lie side by side, so that each call finds in the cache no more than a model's layer would. Rounds of a few
milliseconds lie between two synchronisations, and their time is divided by the number of calls in them. What launches
cost a whole model is the business of the models' benchmarks.

On a CPU calls are timed as they are, with the same inputs each time, as often as one second allows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bbfast.benchmarks.facts import smi

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

GPU_ROUNDS, GPU_ROUND_SECONDS = 20, 5e-3
CPU_ROUNDS, CPU_ROUND_SECONDS, CPU_SECONDS = (5, 30), 2e-3, 1.0
ROTATION_OF_L2 = 3
MOST_COPIES = 64
REPEATS = 10  # between two synchronisations, whose own time then hardly counts


@dataclass(frozen=True)
class Work:
    """What computing something takes at least.

    Attributes:
        moved_bytes: every input read once and every output written once, in the forward and in the backward pass.
            Batch statistics need a second look at the map, which is free only where a cache holds it.
        flops: floating point operations, a multiply-add counted as two.
        on_tensor_cores: whether these are matrix products, which tensor cores do.
    """

    moved_bytes: int
    flops: int = 0
    on_tensor_cores: bool = False


@dataclass(frozen=True)
class Speeds:
    """The device's speeds; None where they are not known, as on a CPU.

    Attributes:
        copy_gbps: bytes read and written per second of a large copy, measured in this run, in GB/s.
        matrix_tflops: of a large matrix product in the suite's dtype, measured in this run.
        vector_tflops: of fp32 multiply-adds, from the number of cores and their highest clock.
    """

    copy_gbps: float | None = None
    matrix_tflops: float | None = None
    vector_tflops: float | None = None

    def floor_ms(self, work: Work) -> float | None:
        """The time below which `work` cannot be done; None where the device's bandwidth is not known."""
        if self.copy_gbps is None:
            return None
        tflops = self.matrix_tflops if work.on_tensor_cores else self.vector_tflops
        arithmetic_ms = work.flops / tflops / 1e9 if tflops else 0.0
        return max(work.moved_bytes / self.copy_gbps / 1e6, arithmetic_ms)


def measure_speeds(dtype: torch.dtype) -> Speeds:
    """Takes well below a second on a GPU; on a CPU nothing is measured."""
    if not ON_GPU:
        return Speeds()
    properties = torch.cuda.get_device_properties(DEVICE)
    lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128  # fp32 units of a multiprocessor
    clock_mhz = smi("clocks.max.sm")
    return Speeds(
        copy_gbps=_copy_gbps(),
        matrix_tflops=_matrix_tflops(dtype),
        vector_tflops=2 * lanes * properties.multi_processor_count * float(clock_mhz) / 1e6 if clock_mhz else None,
    )


def _copy_gbps() -> float:
    source = torch.randn(1 << 28, device=DEVICE)  # 1 GiB
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: [target.copy_(source) for _ in range(REPEATS)]) / REPEATS
    return 2 * source.nbytes / seconds / 1e9


def _matrix_tflops(dtype: torch.dtype, size: int = 8192) -> float:
    left, right = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = _median_seconds(lambda: [left @ right for _ in range(REPEATS)]) / REPEATS
    return 2 * size**3 / seconds / 1e12


def clock() -> float:
    """Seconds; all work that the GPU was given before is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def copies_of_inputs(bytes_of_one: int) -> int:
    """How many copies of inputs a benchmark should take turns with: at least two on a GPU, one on a CPU."""
    if not ON_GPU:
        return 1
    rotation = ROTATION_OF_L2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(MOST_COPIES, max(2, -(-rotation // max(1, bytes_of_one))))


class GraphedCalls:
    """One CUDA graph of several calls, replayed once in as many calls of this object."""

    def __init__(self, calls: Sequence[Callable[[], object]]):
        self.size, self._count = len(calls), 0
        self._calls = calls  # and with them the inputs that the graph reads
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            kept = [call() for call in calls]  # each call writes to memory of its own
        del kept

    def replay(self) -> None:
        self._graph.replay()

    def __call__(self) -> None:
        self._count += 1
        if self._count == self.size:
            self._count = 0
            self._graph.replay()


def plan(calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], dict[str, int]]:
    """What to hand to `benchmark.pedantic`: the function, and its rounds, warmup_rounds and iterations."""
    if ON_GPU:
        graphed = GraphedCalls(calls)
        replays = max(1, round(GPU_ROUND_SECONDS / _median_seconds(graphed.replay, repeats=3)))
        return graphed, {"rounds": GPU_ROUNDS, "warmup_rounds": 2, "iterations": replays * graphed.size}
    (call,) = calls
    seconds = _median_seconds(call, repeats=3)
    iterations = max(1, int(CPU_ROUND_SECONDS / seconds))
    fewest, most = CPU_ROUNDS
    rounds = min(most, max(fewest, int(CPU_SECONDS / (seconds * iterations))))
    return call, {"rounds": rounds, "warmup_rounds": 1, "iterations": iterations}


def peak_mib(call: Callable[[], object]) -> float | None:
    """The most memory that a call holds beyond its inputs, in MiB; None on a CPU."""
    if not ON_GPU:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _median_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)
