"""Providers of one computation to rows of a table: checked, then timed in turns in one process.

Each round runs every provider once unmeasured and then measured. One process and short turns, so that all see the
same clock, heat and neighbours; the unmeasured call, so that none pays for caches and pages that the provider
before it left behind. What is measured is a steady state, as in a server or in a training loop.

On a GPU a measurement lies between two CUDA events and holds as many calls as fill `SAMPLE_MS`, each on another copy
of the input: together the copies are larger than the L2 cache. A pass over a whole model leaves nothing of its first
input in a CPU's caches, so one copy and one call do there. Settings such as TF32, cudnn.benchmark and clocks are the
user's: `facts` tells them, nothing here changes them.

A fast wrong answer is no result: see `Judge`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bbfast.benchmarks.judge import Judge, Values, WrongAnswerError
from bbfast.benchmarks.turns import turn

SAMPLE_MS = 10.0
MAX_CALLS = 100
MIN_ROUNDS = 5
WARM_UP_CALLS = 3  # a compiled model that replays CUDA graphs warms up, then records, then replays
EXAMPLE_SEED = 0


@dataclass
class Runner:
    """A provider that is ready to run.

    Attributes:
        call: takes the input, returns the output; one unit of work. Queues it on the current stream on a GPU.
        values: takes the output of the call that ran last; what of that call is compared, by name, the output first.
        notes: what the reader of the row should know, asked once after the first call.
        has_graphs: whether `call` replays CUDA graphs by itself.
    """

    call: Callable[[torch.Tensor], torch.Tensor]
    values: Callable[[torch.Tensor], Values]
    notes: Callable[[], list[str]] = list
    has_graphs: bool = False


@dataclass(frozen=True)
class Provider:
    """A way to do the computation; `build` makes it ready, and may take minutes or fail."""

    name: str
    build: Callable[[], Runner]


@dataclass(frozen=True)
class Settings:
    """How long to measure, and what.

    Attributes:
        rounds: how many; None goes on for `seconds` per provider, and at least `MIN_ROUNDS`.
        seconds: of wall-clock time per provider, unmeasured calls included.
        cuda_graphs: record each provider's call as a CUDA graph and replay that, on a GPU.
        turns: the folder of processes that take turns in measuring; see `turns.py`.
    """

    rounds: int | None = None
    seconds: float = 5.0
    cuda_graphs: bool = False
    turns: Path | None = None


@dataclass(frozen=True)
class Row:
    """One provider's result; the numbers are None where `failure` says why there are none.

    Attributes:
        images_per_s: by the median.
        peak_mib: the most memory that one call needs beside the input, weights and optimizer included; None on a CPU.
        speedup: median of the first provider / median of this one.
        max_error: largest difference to the first provider's output, relative to its largest value.
        rounds: measurements that the quantiles are of.
    """

    provider: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    min_ms: float | None = None
    images_per_s: float | None = None
    peak_mib: float | None = None
    speedup: float | None = None
    max_error: float | None = None
    rounds: int = 0
    notes: list[str] = field(default_factory=list)
    failure: str | None = None


def measure(
    providers: Sequence[Provider],
    inputs: Sequence[torch.Tensor],
    dtype: str,
    *,
    reference: Callable[[], Values] | None = None,
    settings: Settings | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """Checks and times all providers. What one of them raises becomes its row's failure and does not stop the others.

    Args:
        providers: the first one is the baseline.
        inputs: copies of the input, images first `[B, ...]`, on the device that is measured; see `copies`.
        dtype: one of `judge.DTYPES`, for the tolerance.
        reference: the values in float32, for a narrower dtype.
        settings: default `Settings()`.
        on_progress: is told what is being done, and how much of it.
    """
    settings = settings or Settings()
    on_progress("computing the reference", 0, 1)
    try:
        judge = Judge(dtype, inputs[0].is_cuda, reference and reference())
    except Exception as error:  # told in each row
        failure = f"there is no float32 result to compare with: {one_line(error)}"
        return [Row(provider.name, failure=failure) for provider in providers]

    contenders = [_Contender(provider, inputs) for provider in providers]
    for index, contender in enumerate(contenders):
        on_progress(f"preparing {contender.name}", index, len(contenders))
        with contender.excused():
            if contenders[0].failure is not None:
                raise WrongAnswerError(f"not judged, because {contenders[0].name} failed")
            contender.prepare(judge, settings.cuda_graphs)
    with _own_turn(inputs[0], settings.turns):
        _run_rounds(contenders, settings, on_progress)
        for contender in contenders:
            if contender.failure is None:
                with contender.excused():  # what was timed, such as a replayed graph, may differ from the first call
                    contender.check(judge)
    return [contender.row(contenders[0], len(inputs[0])) for contender in contenders]


class _Contender:
    """A provider with its measurements."""

    def __init__(self, provider: Provider, inputs: Sequence[torch.Tensor]):
        self.name = provider.name
        self.build = provider.build
        self.example = inputs[0]
        self.inputs = itertools.cycle(inputs)
        self.runner: Runner | None = None
        self.calls = 1
        self.samples_ms: list[float] = []
        self.peak_mib: float | None = None
        self.max_error: float | None = None
        self.notes: list[str] = []
        self.failure: str | None = None

    @contextlib.contextmanager
    def excused(self) -> Iterator[None]:
        """Whatever is raised inside, from a compiler or a full GPU too, becomes this provider's failure."""
        try:
            yield
        except Exception as error:
            self.failure = one_line(error)
            self.runner = None

    def prepare(self, judge: Judge, cuda_graphs: bool) -> None:
        before_mib = _allocated_mib(self.example)
        self.runner = self.build()
        self.check(judge)
        if not self.runner.has_graphs:  # replays allocate nothing: there the peak is that of the calls that record
            _forget_peak(self.example)  # what compiling took
        self.notes = self.runner.notes()
        for _ in range(WARM_UP_CALLS - 1):
            self.runner.call(next(self.inputs))
        self.peak_mib = _peak_mib(self.example, before_mib)
        if cuda_graphs and not self.runner.has_graphs:
            self.runner.call = replayed(self.runner.call, self.example)
        if self.example.is_cuda:
            self.calls = min(MAX_CALLS, max(1, math.ceil(SAMPLE_MS / self.sample_ms())))

    def check(self, judge: Judge) -> None:
        """Runs the example and has it judged.

        Raises:
            WrongAnswerError: the values are not finite, or further off than allowed.
        """
        torch.manual_seed(EXAMPLE_SEED)  # whoever draws random numbers draws the same ones
        values = self.runner.values(self.runner.call(self.example))
        self.max_error = max(self.max_error or 0.0, judge(values))

    def sample_ms(self) -> float:
        """Milliseconds of one call, after one that is not measured."""
        call = self.runner.call
        call(next(self.inputs))
        if not self.example.is_cuda:
            x = next(self.inputs)
            start = time.perf_counter()
            call(x)
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(self.calls):
            call(next(self.inputs))
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / self.calls

    def row(self, baseline: _Contender, batch: int) -> Row:
        if self.failure is not None:
            return Row(self.name, notes=self.notes, failure=self.failure)
        p20, p50, p80 = (float(value) for value in np.quantile(self.samples_ms, (0.2, 0.5, 0.8)))
        return Row(
            provider=self.name,
            p20_ms=p20,
            p50_ms=p50,
            p80_ms=p80,
            min_ms=min(self.samples_ms),
            images_per_s=1e3 * batch / p50,
            peak_mib=self.peak_mib,
            speedup=None if baseline.failure else float(np.median(baseline.samples_ms)) / p50,
            max_error=self.max_error,
            rounds=len(self.samples_ms),
            notes=self.notes,
        )


def _own_turn(x: torch.Tensor, folder: Path | None) -> contextlib.AbstractContextManager:
    """What to measure in: where others wait for the GPU, too, one's turn, until which it has no memory to spare."""
    if folder is None:
        return contextlib.nullcontext()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
        torch.cuda.empty_cache()
    return turn(folder)


def _run_rounds(contenders: list[_Contender], settings: Settings, on_progress: Callable) -> None:
    budget_s = settings.seconds * sum(contender.failure is None for contender in contenders)
    start = time.perf_counter()
    for index in itertools.count():
        elapsed_s = time.perf_counter() - start
        if settings.rounds is None:
            over = index >= MIN_ROUNDS and elapsed_s >= budget_s
            on_progress("measuring, seconds", int(min(elapsed_s, budget_s)), math.ceil(budget_s))
        else:
            over = index >= settings.rounds
            on_progress("measuring, rounds", index, settings.rounds)
        if over or all(contender.failure for contender in contenders):
            return
        for contender in contenders:
            if contender.failure is None:
                with contender.excused():
                    contender.samples_ms.append(contender.sample_ms())


def replayed(call: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Callable:
    """Records `call` as a CUDA graph; the function returned copies its input to the graph's own, and replays it."""
    own_input = example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call(own_input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(own_input)

    def replay(x: torch.Tensor) -> torch.Tensor:
        own_input.copy_(x)
        graph.replay()
        return output

    return replay


def copies(x: torch.Tensor) -> list[torch.Tensor]:
    """As many copies of `x` as do not fit into a GPU's L2 cache together; only `x` on a CPU."""
    if not x.is_cuda:
        return [x]
    cache_bytes = torch.cuda.get_device_properties(x.device).L2_cache_size
    return [x, *(x.clone() for _ in range(math.ceil(cache_bytes / x.nbytes)))]


def one_line(error: BaseException) -> str:
    """The error's kind and the first line of its message, shortened: compilers tell stories."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# ---- memory of a GPU; nothing is known about a CPU's ------------------------------------------------------


def _allocated_mib(x: torch.Tensor) -> float:
    if not x.is_cuda:
        return 0.0
    gc.collect()  # what failed before may hang in cycles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(x.device)
    return torch.cuda.memory_allocated(x.device) / 2**20


def _forget_peak(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)


def _peak_mib(x: torch.Tensor, before_mib: float) -> float | None:
    if not x.is_cuda:
        return None
    torch.cuda.synchronize(x.device)  # and what went wrong in a kernel shows here, at its provider
    return torch.cuda.max_memory_allocated(x.device) / 2**20 - before_mib
