"""How `bbfast tune` finds the launches that a model makes, and the quickest right configuration of each.

What is timed is a whole call of a launcher, such as one forward of depthwise_conv_bn_act with all its kernels: a first
stage that leaves fewer partial sums makes the second one quicker, and that should count. A configuration is tried in
the call that makes the fewest other launches, with the other launches as they were already tuned.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from types import ModuleType
from unittest import mock

import torch
import triton
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

from bbfast.triton_kernels import tuned
from bbfast.triton_kernels.tuned import Tunable

# Tensors of up to so many elements (parameters, statistics, masks) are kept; larger ones get random values.
MOST_KEPT_ELEMENTS = 2**16
# A search ends after so many steps, each to the best neighbour of the best configuration so far.
MOST_STEPS = 3
# A configuration replaces the heuristic's where it is quicker by this share in rounds that take turns.
LEAST_GAIN = 0.03
CONFIRMING_ROUNDS = 5
# ptxas for sm_100 reserves two words here and there that no instruction touches.
RESERVED_WORDS = 2

Place = tuple[str, tuple]  # a Tunable's name and a key
Timer = Callable[[Callable[[], object]], float]


# ---- calls of launchers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """A tensor's shape, strides and alignment, and its values where they are few."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    misaligned: int
    values: torch.Tensor | None

    @staticmethod
    def of(x: torch.Tensor) -> _Kept:
        misaligned = x.data_ptr() % 16 // x.element_size()
        length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        values = None
        if length <= MOST_KEPT_ELEMENTS:
            values = x.detach().as_strided((length,), (1,), x.storage_offset()).clone()
        return _Kept(tuple(x.shape), x.stride(), x.dtype, x.device, misaligned, values)

    def tensor(self, generator: torch.Generator) -> torch.Tensor:
        length = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        flat = torch.empty(self.misaligned + length, dtype=self.dtype, device=self.device)
        if self.values is None:
            flat.normal_(generator=generator)
        else:
            flat[self.misaligned :] = self.values
        return flat.as_strided(self.shape, self.stride, self.misaligned)


@dataclass(frozen=True)
class Call:
    """One call of a launcher, which can be repeated: always with the same values."""

    launcher: Callable
    arguments: tuple
    places: tuple[Place, ...]

    def fresh_arguments(self) -> list:
        device = next(a.device for a in self.arguments if isinstance(a, _Kept))
        generator = torch.Generator(device).manual_seed(0)
        return [a.tensor(generator) if isinstance(a, _Kept) else a for a in self.arguments]

    def run(self, arguments: list, configs: dict[Place, object]) -> tuple[object, dict[Place, object]]:
        """What the launcher returns with these configurations, and the configurations of all its launches."""
        used: dict[Place, object] = {}

        def choose(tunable: Tunable, key: tuple, heuristic: Callable) -> object:
            place = (tunable.name, key)
            used[place] = configs[place] if place in configs else heuristic()
            return used[place]

        with tuned.intercepting(choose):
            return self.launcher(*arguments), used


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Collects, for every launch that is made inside, the call of a launcher that makes it among the fewest others."""
    best: dict[Place, Call] = {}
    calls: list[Call] = []

    def recording(launcher: Callable) -> Callable:
        def call(*arguments):
            seen: dict[Place, None] = {}

            def choose(tunable: Tunable, key: tuple, heuristic: Callable) -> object:
                seen[tunable.name, key] = None
                return heuristic()

            with tuned.intercepting(choose):
                result = launcher(*arguments)
            better = [place for place in seen if place not in best or len(seen) < len(best[place].places)]
            if better:
                kept = tuple(_Kept.of(a) if isinstance(a, torch.Tensor) else a for a in arguments)
                best.update(dict.fromkeys(better, Call(launcher, kept, tuple(seen))))
            return result

        return call

    with contextlib.ExitStack() as stack:
        for module in launcher_modules():
            for name in {"forward", "backward"} & set(vars(module)):
                stack.enter_context(mock.patch.object(module, name, recording(getattr(module, name))))
        yield calls
    calls += sorted({id(call): call for call in best.values()}.values(), key=lambda call: len(call.places))


def launcher_modules() -> list[ModuleType]:
    return [importlib.import_module(f"{tuned.__package__}.{name}") for name in tuned.LAUNCHERS]


# ---- the search --------------------------------------------------------------------------------------------


def gpu_ms(run: Callable[[], object]) -> float:
    """Median time on the GPU of what `run` launches, from a CUDA graph: the host's part is left out."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return triton.testing.do_bench(graph.replay, warmup=5, rep=30, return_mode="median")


@dataclass
class Result:
    """What a search found for one launch: config None where nothing beat the heuristic's.

    Attributes:
        tried, dropped: configurations, and those of them that failed, spilled or gave other numbers.
    """

    heuristic: object
    config: object = None
    ms: float = 0.0
    heuristic_ms: float = 0.0
    tried: int = 0
    dropped: list[str] = field(default_factory=list)


def search(tunable: Tunable, key: tuple, call: Call, settled: dict[Place, object], timer: Timer) -> Result:
    """Looks for the quickest configuration of one launch of a call, in steps from the heuristic's.

    Args:
        settled: configurations of other launches that are decided already.
        timer: milliseconds that a function takes.
    """
    place = (tunable.name, key)
    arguments = call.fresh_arguments()
    expected, used = _checked_run(call, settled)
    result = Result(heuristic=used[place])
    times = {result.heuristic: timer(partial(call.run, arguments, {**settled, place: result.heuristic}))}
    best = result.heuristic
    tried = {best}
    for _ in range(MOST_STEPS):
        centre = best
        for config in tunable.neighbours(key, centre):
            if config in tried:
                continue
            tried.add(config)
            configs = {**settled, place: config}
            if problem := _problem(call, configs, expected):
                result.dropped.append(f"{config}: {problem}")
                continue
            times[config] = timer(partial(call.run, arguments, configs))
            best = min(best, config, key=times.__getitem__)
        if best == centre:
            break
    result.tried = len(tried) - 1
    result.ms = result.heuristic_ms = times[result.heuristic]
    if best != result.heuristic:
        rounds = [
            [timer(partial(call.run, arguments, {**settled, place: config})) for config in (result.heuristic, best)]
            for _ in range(CONFIRMING_ROUNDS)
        ]
        result.heuristic_ms, best_ms = (median(column) for column in zip(*rounds))
        result.ms = result.heuristic_ms
        if best_ms < (1 - LEAST_GAIN) * result.heuristic_ms:
            result.config, result.ms = best, best_ms
    return result


def _problem(call: Call, configs: dict[Place, object], expected: list[torch.Tensor]) -> str | None:
    """Why these configurations cannot be used, or None."""
    launched: list = []
    run = JITFunction.run

    def noting_run(*arguments, **options):
        launched.append(run(*arguments, **options))
        return launched[-1]

    try:
        with mock.patch.object(JITFunction, "run", noting_run):
            found, _ = _checked_run(call, configs)
    except torch.AcceleratorError:  # of the GPU itself: nothing runs in this process any more
        raise
    except (TritonError, RuntimeError) as error:  # does not compile, does not fit
        return " ".join(str(error).split())[-200:] or type(error).__name__
    spilled = max((kernel.n_spills for kernel in launched), default=0)
    if spilled > RESERVED_WORDS:
        return f"{spilled} words spilled"
    return _difference(found, expected)


def _checked_run(call: Call, configs: dict[Place, object]) -> tuple[list[torch.Tensor], dict[Place, object]]:
    """All tensors that a run returns or may have changed, and the configurations of its launches."""
    arguments = call.fresh_arguments()
    with _poisoned_outputs():
        results, used = call.run(arguments, configs)
    results = results if isinstance(results, tuple) else (results,)
    tensors = [t for t in (*results, *arguments) if isinstance(t, torch.Tensor)]
    return tensors, used


@contextlib.contextmanager
def _poisoned_outputs() -> Iterator[None]:
    """Fills what launchers allocate with NaN: memory that an earlier run left right would hide what is not written."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *arguments, **options):
        out = new_empty(self, *arguments, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    with mock.patch.object(torch.Tensor, "new_empty", poisoned):
        yield


def _difference(found: Iterable[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    """How the results differ by more than rounding, or None.

    Allowed are 4 eps of the coarsest dtype, and 4 eps of fp32 times the root of how many values may have been summed
    into one, both times the largest value.
    """
    coarsest = max(torch.finfo(t.dtype).eps for t in expected)
    most = max(t.numel() for t in expected)
    for index, (ours, theirs) in enumerate(zip(found, expected)):
        summed = most / max(1, theirs.numel())
        allowed = 4 * (coarsest + summed**0.5 * torch.finfo(torch.float32).eps) * theirs.abs().max().item()
        error = (ours.float() - theirs.float()).abs().max().item()
        if not error <= allowed:  # NaN is an error too
            return f"tensor {index} differs by {error:.3g} where {allowed:.3g} is rounding"
    return None
