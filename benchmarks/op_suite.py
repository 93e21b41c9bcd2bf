"""What the benchmarks of all ops share. A file bench_X.py holds an op's shapes, its providers and its work.

    pytest benchmarks/ --benchmark-json=ops.json
    pytest benchmarks/ -k "window_attention and bbfast" --full

A benchmark computes one op at one shape in one direction with one provider:

- eager: plain torch, as models without bbfast write it, and what every other provider is held against.
- compile: torch.compile of that.
- bbfast: the op; on a GPU with BBFAST_STRICT=1, so that a kernel that does not run is an error. On a CPU it may be the
  reference; `backend` tells. "bbfast onednn" forces that backend.
- others that an op knows, such as SDPA and flex_attention.

Before anything is timed, outputs and gradients are compared with eager's in the next wider dtype. A provider that is
wrong fails: a fast wrong answer is no result. Somebody else's provider that cannot run a shape is skipped with its own
error. Both kinds are listed under "failures" in the JSON. The providers of one group run right after each other.

Shapes are those of models, on a GPU at batch 128 in bfloat16, on a CPU fewer, at batch 2 in float32; `--full` takes
all. The group of a benchmark is "OP SHAPE DIRECTION"; `Suite.measure` says what its extra_info holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from bbfast import dispatch
from bbfast.benchmarks import op_timing
from bbfast.benchmarks.op_case import (
    BACKWARD,
    DTYPE,
    FORWARD,
    Case,
    Expected,
    WrongResult,
    call,
    check,
    expect,
    make_set,
)
from bbfast.benchmarks.op_timing import ON_GPU, Speeds

# The order of importance, for runs that may be cut short.
FILES = (
    "bench_window_attention.py",
    "bench_depthwise_conv_bn_act.py",
    "bench_conv_bn_act.py",
    "bench_mlp.py",
    "bench_linear_act.py",
    "bench_add_layer_norm.py",
    "bench_batch_norm_act.py",
    "bench_drop_path_add.py",
    "bench_window_partition.py",
)
GPU_ALONE = {
    "flex": "flex_attention is timed on a GPU only",
    "sdpa efficient": "torch has this backend on a GPU only",
    "sdpa cudnn": "torch has this backend on a GPU only",
}
COMPILED = ("compile", "flex")
CPU_ALONE = {"bbfast onednn": "oneDNN is timed on a CPU only"}


# ---- which benchmarks there are ----------------------------------------------------------------------------


def cases(
    shapes: Mapping[str, object],
    *,
    gpu: Sequence[str],
    cpu: Sequence[str],
    others: Sequence[str] = (),
    directions: Sequence[str] = (FORWARD, BACKWARD),
) -> Callable:
    """Decorates a benchmark of (shape, direction, provider).

    Args:
        shapes: all shapes by name.
        gpu, cpu: names of those to take on the device at hand; the rest is for `--full`.
        others: providers beside eager, compile and bbfast.
        directions: FORWARD, BACKWARD or both.
    """
    chosen = gpu if ON_GPU else cpu
    parameters = []
    for name in (*chosen, *(name for name in shapes if name not in chosen)):
        for direction in directions:
            for provider in ("eager", "compile", "bbfast", *others):
                # torch.compile takes 10 to 30 s on two cores: one shape will do there
                slow = not ON_GPU and provider == "compile" and (name, direction) != (cpu[0], FORWARD)
                marks = [pytest.mark.full] if slow or name not in chosen else []
                reason = (CPU_ALONE if ON_GPU else GPU_ALONE).get(provider)
                if reason:
                    marks.append(pytest.mark.skip(reason=reason))
                parameters.append(
                    pytest.param(shapes[name], direction, provider, id=f"{name}-{direction}-{provider}", marks=marks)
                )

    def decorate(function):
        parametrized = pytest.mark.parametrize("shape, direction, provider", parameters)(function)
        return pytest.mark.benchmark(timer=op_timing.clock)(parametrized)

    return decorate


# ---- one benchmark -----------------------------------------------------------------------------------------


class Suite:
    """Measures cases for one test; `benchmarks/conftest.py` makes it, as the fixture `suite`.

    Attributes:
        benchmark: pytest-benchmark's fixture.
        monkeypatch: pytest's, for the environment variables that steer bbfast.
        speeds: the device's.
        expected: what eager computes, by group; emptied when another group begins.
        failures: takes what could not be measured; part of the JSON.
    """

    def __init__(self, benchmark, monkeypatch, speeds: Speeds, expected: dict[str, Expected], failures: list[dict]):
        self.benchmark, self.monkeypatch = benchmark, monkeypatch
        self.speeds, self.expected, self.failures = speeds, expected, failures

    def measure(self, case: Case, provider: str) -> None:
        """Compares with eager, times, and fills in the benchmark's group and extra_info.

        extra_info: op, shape, direction, provider and dtype; moved_bytes and flops of the case's work; floor_ms, what
        these take at the device's own speed, and copy_gbps, its copy bandwidth as measured in this run (both null on a
        CPU); gbps and percent_of_copy, from the median; peak_mib (null on a CPU); backend, that bbfast took (null for
        others); max_error, the largest difference between outputs and eager's in the wider dtype, over eager's largest
        value; gradient_error, the norm of the difference over the norm (null without backward).

        Raises:
            WrongResult: the provider computes something else than eager.
        """
        info = {
            "op": case.op,
            "shape": case.shape,
            "direction": case.direction,
            "provider": provider,
            "dtype": str(DTYPE).removeprefix("torch."),
        }
        self.benchmark.group = case.group
        self.benchmark.extra_info.update(info)
        try:
            self._measure(case, provider)
        except (WrongResult, RuntimeError) as error:
            line = one_line(error)
            self.failures.append({**info, "failure": line})
            if isinstance(error, WrongResult) or provider in ("eager", "bbfast"):
                raise
            pytest.skip(f"{provider} cannot run this: {line}")

    def _measure(self, case: Case, provider: str) -> None:
        function = self._function(case, provider)
        if case.group not in self.expected:
            self.expected.clear()
            self.expected[case.group] = expect(case)
        expected = self.expected[case.group]
        dispatch.forget_choices()
        max_error, gradient_error = check(case, function, expected)
        backend = backend_taken() if provider.startswith("bbfast") else None

        copies = op_timing.copies_of_inputs(expected.first.nbytes)
        sets = [expected.first, *(make_set(case) for _ in range(copies - 1))]
        calls = [lambda chosen=chosen: call(case, function, chosen) for chosen in sets]
        self.benchmark.extra_info.update(
            moved_bytes=case.work.moved_bytes,
            flops=case.work.flops,
            floor_ms=self.speeds.floor_ms(case.work),
            copy_gbps=self.speeds.copy_gbps,
            peak_mib=op_timing.peak_mib(calls[0]),
            backend=backend,
            max_error=max_error,
            gradient_error=gradient_error,
            gbps=None,
            percent_of_copy=None,
        )
        run, plan = op_timing.plan(calls)
        self.benchmark.pedantic(run, **plan)
        if self.benchmark.stats:  # there are none where --benchmark-disable is set
            gbps = case.work.moved_bytes / self.benchmark.stats.stats.median / 1e9
            copy = self.speeds.copy_gbps
            self.benchmark.extra_info.update(gbps=gbps, percent_of_copy=100 * gbps / copy if copy else None)

    def _function(self, case: Case, provider: str) -> Callable:
        """What to time; sets the variables that steer bbfast."""
        self.monkeypatch.delenv("BBFAST_BACKEND", raising=False)
        self.monkeypatch.setenv("BBFAST_STRICT", "1" if ON_GPU else "0")
        if provider in COMPILED:
            torch.compiler.reset()  # what other shapes compiled does not make this one dynamic, or meet a limit
        if provider == "bbfast onednn":
            self.monkeypatch.setenv("BBFAST_BACKEND", "onednn")
            self.monkeypatch.setenv("BBFAST_STRICT", "1")
            return case.bbfast
        own = {"eager": case.eager, "bbfast": case.bbfast}
        return torch.compile(case.eager, dynamic=False) if provider == "compile" else {**own, **case.others}[provider]


def backend_taken() -> str:
    """The backend of the ops that just ran, or of each where they differ; torch where none had to choose."""
    choices = {op: choice.backend for op, choice in dispatch.last_choices().items()} or {"": "torch"}
    same = set(choices.values())
    return same.pop() if len(same) == 1 else ", ".join(f"{op}: {backend}" for op, backend in choices.items())


def one_line(error: Exception) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
