"""`triton_kernels/replay.py`: what launchers remember is what they would do again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bbfast.triton_kernels import replay, tuned

ROOT = Path(__file__).resolve().parent.parent


def test_repeated_calls_launch_what_written_ones_do():
    """Compiled for an H100, launches noted: see `replayed_launches.py`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "replayed_launches.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(", repeated\n") == 23


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(replay, "_is_eligible", lambda x: type(x) in replay.TENSORS)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)


def test_keys_tell_calls_apart(on_cpu):
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    key = replay._key((x, y, 1e-5, "relu", (1, 1)))
    assert key == replay._key((torch.randn(4, 6), torch.randn(4, 6), 1e-5, "relu", [1, 1]))
    others = [
        (x, x, 1e-5, "relu", (1, 1)),  # one tensor in two places
        (x, y[:3], 1e-5, "relu", (1, 1)),
        (x, y.double(), 1e-5, "relu", (1, 1)),
        (x, torch.randn(6, 4).T, 1e-5, "relu", (1, 1)),
        (x, torch.randn(25)[1:].view(4, 6), 1e-5, "relu", (1, 1)),  # not aligned
        (x, None, 1e-5, "relu", (1, 1)),
        (x, y, 1e-6, "relu", (1, 1)),
        (x, y, 1e-5, "gelu", (1, 1)),
        (x, y, 1e-5, "relu", (1, 2)),
        (x, y, True, "relu", (1, 1)),
        (x, y, 1, "relu", (1, 1)),
    ]
    keys = [replay._key(other) for other in others]
    assert None not in keys and len({key, *keys}) == 1 + len(others)


def test_what_cannot_be_told_apart_runs_as_written(on_cpu):
    x = torch.randn(4, 6)

    class Other(torch.Tensor):
        pass

    for args in ((x, x.as_subclass(Other)), (x, object()), (x, (x, x)), (x, torch.empty(0)), (None, x)):
        assert replay._key(args) is None
    assert replay._key((x,)) is not None
    with tuned.intercepting(lambda tunable, key, heuristic: heuristic()):
        assert replay._key((x,)) is None
    before = replay._key((x,))
    next(iter(tuned.tunables().values())).forget()
    assert replay._key((x,)) != before


def test_nothing_is_remembered_of_a_launcher_that_computes(on_cpu):
    @replay.remembers
    def doubled(x):
        return x * 2

    for _ in range(4):
        x = torch.randn(3)
        assert torch.equal(doubled(x), x * 2)
    assert list(doubled.plans.values()) == ["as written"]


def test_kinds_of_calls_are_not_kept_forever(on_cpu, monkeypatch):
    monkeypatch.setattr(replay, "MOST_PLANS", 5)

    @replay.remembers
    def fresh(x):
        return x.new_empty(x.shape)

    for size in range(1, 20):
        fresh(torch.randn(size))
        assert len(fresh.plans) <= 5
    for _ in range(3):
        y = fresh(torch.randn(2, 3).T)
    assert y.shape == (3, 2) and y.is_contiguous()


def test_ordinary_cpu_tensors_are_none_of_its_business():
    assert replay._key((torch.randn(3),)) is None


def test_one_recording_at_a_time(on_cpu):
    """Torch's flags of modes are the process's: a second thread runs as written and is recorded later."""

    @replay.remembers
    def fresh(x):
        return x.new_empty(x.shape)

    with replay._recording:
        for _ in range(3):
            fresh(torch.randn(3))
        assert list(fresh.plans.values()) == ["seen"]
    fresh(torch.randn(3))
    assert isinstance(next(iter(fresh.plans.values())), replay._Plan)


def test_recording_leaves_the_compiler_alone():
    """It neither imports Dynamo, which takes a second, nor sets the flags that Dynamo skips frames for."""
    code = """
import sys, torch
from torch.utils import _python_dispatch as modes
from bbfast.triton_kernels import replay
with replay._Recorder() as recorder:
    assert not modes.is_in_any_mode_without_ignore_compile_internals()
    torch.empty(3)
assert len(recorder.buffers) == 1 and "torch._dynamo" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
