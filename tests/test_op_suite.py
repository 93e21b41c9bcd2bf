"""The per-op benchmarks: what they accept as a result, what they count, and what they write."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bbfast.benchmarks import bench_conv_bn_act as conv
from bbfast.benchmarks import bench_depthwise_conv_bn_act as depthwise
from bbfast.benchmarks import bench_drop_path_add as drop_path
from bbfast.benchmarks import bench_linear_act as linear
from bbfast.benchmarks import bench_mlp as perceptron
from bbfast.benchmarks import bench_window_attention as attention
from bbfast.benchmarks import conftest as benchmarks_conftest
from bbfast.benchmarks.op_case import BACKWARD, DTYPE, FORWARD, Case, WrongResult, check, expect, randn
from bbfast.benchmarks.op_suite import FILES, Suite
from bbfast.benchmarks.op_timing import GraphedCalls, Speeds, Work

ROOT = Path(__file__).resolve().parent.parent


def make_case(direction=FORWARD, **changes) -> Case:
    def double(x):
        return 2 * x

    settings = {"op": "double", "shape": "33x5", "inputs": lambda: (randn(33, 5),), "leaves": (0,)}
    settings |= {"eager": double, "bbfast": double, "work": Work(1320, 165)}
    return Case(direction=direction, **settings | changes)


def poisoned(x):
    y = 2 * x
    return torch.where(torch.arange(y.numel(), device=y.device).view_as(y) == 7, torch.nan, y)


# ---- what is accepted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_right_provider_has_no_error(direction):
    case = make_case(direction)
    max_error, gradient_error = check(case, lambda x: x + x, expect(case))
    assert max_error == 0
    assert gradient_error == (0 if direction == BACKWARD else None)


@pytest.mark.parametrize(
    "function, complaint",
    [
        (lambda x: 2.2 * x, "error of output 0"),
        (poisoned, "output 0 holds NaN or infinity"),
        (lambda x: 2 * x[:-1], "output 0 is .*32, 5.*eager's .*33, 5"),
        (lambda x: (2 * x).half(), "output 0 is torch"),
        (lambda x: (2 * x, x), "2 results, eager has 1"),
    ],
)
def test_a_wrong_output_is_refused(function, complaint):
    case = make_case()
    with pytest.raises(WrongResult, match=complaint):
        check(case, function, expect(case))


def test_a_wrong_gradient_is_refused():
    case = make_case(BACKWARD)
    with pytest.raises(WrongResult, match="error of gradient 0"):
        check(case, lambda x: x.detach() + 1.1 * x - 0.1 * x.detach(), expect(case))


def test_bits_may_be_asked_for():
    case = make_case(eager=lambda x: x, epsilons=0)
    eps = torch.finfo(DTYPE).eps
    assert check(make_case(eager=lambda x: x), lambda x: x * (1 + eps), expect(make_case(eager=lambda x: x)))[0] > 0
    with pytest.raises(WrongResult, match="allowed is 0"):
        check(case, lambda x: x * (1 + eps), expect(case))


# ---- what becomes of failures ------------------------------------------------------------------------------


@pytest.fixture
def failures() -> list:
    return []


@pytest.fixture
def suite(monkeypatch, failures) -> Suite:
    benchmark = SimpleNamespace(group=None, extra_info={}, stats=None, pedantic=lambda run, **plan: run())
    return Suite(benchmark, monkeypatch, Speeds(), {}, failures)


def cannot(x):
    raise RuntimeError("no kernel for this\nand a long story")


def test_what_others_cannot_run_is_skipped_and_noted(suite, failures):
    with pytest.raises(pytest.skip.Exception, match=r"rival cannot run this: RuntimeError: no kernel for this$"):
        suite.measure(make_case(others={"rival": cannot}), "rival")
    (failure,) = failures
    assert failure["provider"] == "rival" and failure["failure"] == "RuntimeError: no kernel for this"


def test_what_bbfast_cannot_run_fails_and_is_noted(suite, failures):
    with pytest.raises(RuntimeError, match="no kernel"):
        suite.measure(make_case(bbfast=cannot), "bbfast")
    assert [failure["op"] for failure in failures] == ["double"]


def test_a_wrong_rival_fails_and_is_noted(suite, failures):
    with pytest.raises(WrongResult):
        suite.measure(make_case(others={"rival": lambda x: 3 * x}), "rival")
    assert len(failures) == 1 and "error of output 0" in failures[0]["failure"]


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(pytest.UsageError, match="TRITON_INTERPRET=1"):
        benchmarks_conftest.pytest_configure(None)


# ---- what is counted ---------------------------------------------------------------------------------------


def test_work_of_a_depthwise_layer():
    shape = depthwise.Shape("some", channels=2, size=4, kernel=3, stride=2)
    x, weight, y = 2 * 4 * 4, 2 * 3 * 3, 2 * 2 * 2
    forward = depthwise.work_of(shape, FORWARD, 1, torch.float32)
    assert (forward.moved_bytes, forward.flops) == (4 * (x + weight + y), 2 * 9 * y) == (232, 144)
    backward = depthwise.work_of(shape, BACKWARD, 1, torch.float32)
    assert (backward.moved_bytes, backward.flops) == (4 * (58 + 58 + 50), 3 * 144)


def test_work_of_attention():
    shape = attention.Shape("some", size=4, channels=32, window=4, shift=0, batch=1)
    qkv, table, y = 16 * 96, 49, 16 * 32
    product = 2 * 16 * 16 * 32  # one window of 16 tokens
    forward = attention.work_of(shape, FORWARD, torch.bfloat16)
    assert (forward.moved_bytes, forward.flops) == (2 * (qkv + table + y), 2 * product) == (4194, 32768)
    backward = attention.work_of(shape, BACKWARD, torch.bfloat16)
    assert backward.moved_bytes == 2 * (qkv + table + y + qkv + table + y + qkv + table)
    assert backward.flops == 7 * product
    assert forward.on_tensor_cores and backward.on_tensor_cores


def test_work_of_a_gated_convolution():
    shape = conv.Shape("some", channels=8, out_channels=3, size=2, residual=True, gated=True)
    x, gate, weight, y = 4 * 8 * 4, 4 * 8, 3 * 8, 4 * 3 * 4
    forward = conv.work_of(shape, FORWARD, 4, torch.bfloat16)
    assert (forward.moved_bytes, forward.flops) == (2 * (x + gate + weight + y + y), 2 * 8 * y) == (560, 768)
    backward = conv.work_of(shape, BACKWARD, 4, torch.bfloat16)
    assert backward.moved_bytes == 2 * (x + gate + weight + y + y + x + gate + weight + y + x + gate + weight + y)
    assert backward.flops == 3 * 768


def test_work_of_a_linear_layer():
    shape = linear.Shape("some", size=2, channels=8, out_channels=3, residual=True, scaled=True)
    x, weight, y = 4 * 4 * 8, 8 * 3, 4 * 4 * 3
    work = linear.work_of(shape, 4, torch.bfloat16)
    assert (work.moved_bytes, work.flops) == (2 * (x + weight + 3 + 3 + y + y), 2 * 8 * y) == (508, 768)
    bare = linear.work_of(linear.Shape("some", size=2, channels=8, out_channels=3), 4, torch.bfloat16)
    assert bare.moved_bytes == 2 * (x + weight + 3 + y) and bare.on_tensor_cores


@pytest.mark.parametrize("scaled", [False, True])
def test_work_of_a_perceptron(scaled):
    work = perceptron.work_of(perceptron.Shape("some", size=2, channels=8, scaled=scaled), 4, torch.bfloat16)
    maps, vectors = (3, 32 + 4 * 8) if scaled else (2, 32 + 3 * 8)
    assert work.moved_bytes == 2 * (maps * 16 * 8 + 2 * 8 * 32 + vectors) and work.on_tensor_cores
    assert work.flops == 2 * 16 * (2 * 8 * 32)


@pytest.mark.parametrize("scaled", [False, True])
def test_every_input_of_a_perceptron_counts(scaled):
    case = perceptron.make_case(perceptron.Shape("some", size=3, channels=8, scaled=scaled), FORWARD)
    expected = expect(case)
    check(case, case.bbfast, expected)
    inputs = expected.first.inputs
    assert len(inputs) == (9 if scaled else 7)
    for index, replaced in enumerate(inputs):
        others = (*inputs[:index], torch.randn_like(replaced), *inputs[index + 1 :])
        for function in (case.eager, case.bbfast):
            with torch.no_grad():
                assert not torch.allclose(function(*others), function(*inputs)), f"input {index}"


@pytest.mark.parametrize("module, last", [(conv, "gated"), (linear, "scaled")], ids=["conv_bn_act", "linear_act"])
def test_every_input_counts(module, last):
    """A residual, a gate or a layer scale that got lost on the way would be timed as if it were there."""
    shape = module.Shape("some", channels=16, out_channels=8, size=3, act="identity", residual=True, **{last: True})
    case = module.make_case(shape, FORWARD)
    expected = expect(case)
    check(case, case.bbfast, expected)
    inputs = expected.first.inputs
    for index, changed in enumerate(inputs):
        others = (*inputs[:index], changed + 1, *inputs[index + 1 :])
        for function in (case.eager, case.bbfast):
            with torch.no_grad():
                assert not torch.allclose(function(*others), function(*inputs)), f"input {index}"


def test_work_of_a_residual_addition():
    shape = drop_path.Shape("some", channels=3, size=2)
    numel, kept = 4 * 3 * 4, 3 * 3 * 4  # one sample of four is dropped
    forward = drop_path.work_of(shape, FORWARD, 4, torch.float32)
    assert forward.moved_bytes == 4 * (numel + kept + numel) == 528
    backward = drop_path.work_of(shape, BACKWARD, 4, torch.float32)
    assert backward.moved_bytes == 528 + 4 * (numel + kept + numel)


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    speeds = Speeds(copy_gbps=1000, matrix_tflops=100, vector_tflops=10)
    assert speeds.floor_ms(Work(2_000_000, 1_000_000)) == pytest.approx(2e-3)
    assert speeds.floor_ms(Work(2_000_000, 10**9)) == pytest.approx(0.1)
    assert speeds.floor_ms(Work(2_000_000, 10**9, on_tensor_cores=True)) == pytest.approx(0.01)
    assert Speeds().floor_ms(Work(1, 1)) is None


@pytest.mark.gpu
def test_a_graph_runs_each_call_once_in_as_many():
    counts = torch.zeros(3, device="cuda")
    run = GraphedCalls([lambda i=i: counts[i].add_(1) for i in range(3)])
    counts.zero_()
    for _ in range(6):
        run()
    assert counts.tolist() == [2, 2, 2]


# ---- what is written ---------------------------------------------------------------------------------------


def test_every_benchmark_of_an_op_has_its_place():
    found = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py") if "cases(" in path.read_text()}
    assert found == set(FILES)


def test_the_json_of_one_small_case(tmp_path):
    output = tmp_path / "ops.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("PYTEST_XDIST_WORKER", None)  # as a worker of xdist's pytest-benchmark measures nothing
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={output}"]
    chosen = "convnext_tiny-3-forward and (eager or bbfast)"
    command += [str(ROOT / "benchmarks" / "bench_drop_path_add.py"), "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmarks of ops" in done.stdout

    found = json.loads(output.read_text())
    assert found["failures"] == []
    assert {"commit", "torch", "device", "threads"} <= found["machine_info"]["facts"].keys()
    by_provider = {row["extra_info"]["provider"]: row for row in found["benchmarks"]}
    assert by_provider.keys() == {"eager", "bbfast"}
    for provider, row in by_provider.items():
        info = row["extra_info"]
        assert row["group"] == f"drop_path_add {info['shape']} forward"
        assert info["op"] == "drop_path_add" and info["direction"] == "forward"
        assert info["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
        assert info["gbps"] == pytest.approx(info["moved_bytes"] / row["stats"]["median"] / 1e9)
        assert info["flops"] > 0 and 0 <= info["max_error"] < 1e-2
        on_gpu = torch.cuda.is_available()
        assert all((info[key] is not None) == on_gpu for key in ("floor_ms", "copy_gbps", "peak_mib"))
        assert info["backend"] == {"eager": None, "bbfast": "triton" if on_gpu else "torch"}[provider]
