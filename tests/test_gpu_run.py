"""`make gpu`: what is planned, in which order, and what a run keeps that is cut short."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from results_folders import FACTS

from bbfast.benchmarks import facts, gpu, warm_up
from bbfast.benchmarks.gpu_plan import MODELS, OPS, PROVIDERS, Planner, Step

ROOT = Path(__file__).resolve().parent.parent


def planned(folder: Path, quick: bool = False, on_gpu: bool = True, **more) -> list[Step]:
    return Planner(ROOT, folder / "build", folder, on_gpu, **more).steps(quick)


def python(name: str, code: str, limit_s: float = 60, **more) -> Step:
    return Step(name, [sys.executable, "-c", code], limit_s, **more)


@pytest.fixture
def new_run(tmp_path, monkeypatch):
    """Makes a run of the given steps, from a folder that stands for the built package."""
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu, "REPORT_SECONDS", 0)
    (tmp_path / "build").mkdir()
    (tmp_path / "results").mkdir()
    return lambda *steps, seconds=300.0, timm=None: gpu.Run(tmp_path / "results", list(steps), FACTS, seconds, timm)


def kept(run: gpu.Run) -> list[dict]:
    return json.loads((run.folder / "gpu.json").read_text())["steps"]


# ---- the plan ------------------------------------------------------------------------------------------------


def test_everything_is_planned_once_and_the_build_comes_first(tmp_path):
    names = [step.name for step in planned(tmp_path)]
    assert names[:3] == ["build", "info", "tests-gpu"] and names[-1] == "sanitizer"
    assert len(names) == len(set(names))
    assert [name for name in names if name.startswith("models-")][:2] == [
        f"models-infer-128-bf16-{model}" for model in MODELS[:2]
    ]
    for mode in ("infer", "train"):
        assert {f"models-{mode}-128-bf16-{model}" for model in MODELS} <= set(names)
    assert [name for name in names if name.startswith("ops-")][: len(OPS)] == [f"ops-{op}" for op in OPS]
    for mode in ("infer", "train"):  # compiled together before the first one is measured
        assert names.index(f"compile-{mode}") < names.index(f"models-{mode}-128-bf16-{MODELS[0]}")


def test_no_benchmark_of_an_op_is_forgotten(tmp_path):
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} - {"models"}
    assert set(OPS) <= files
    assert {f"ops-{op}" for op in files} <= {step.name for step in planned(tmp_path)}


def test_the_quick_plan_is_short(tmp_path):
    names = [step.name for step in planned(tmp_path, quick=True)]
    assert names == [
        *("build", "info", "tests-gpu", "compile-infer"),
        *(f"models-infer-128-bf16-{MODELS[0]}", f"ops-{OPS[0]}"),
        *(f"models-infer-128-bf16-{MODELS[1]}", f"ops-{OPS[1]}"),
    ]


def test_commands_name_their_files(tmp_path):
    steps = {step.name: step for step in planned(tmp_path, processes=4)}
    model = steps["models-infer-128-bf16-resnet50"].command
    assert model[1:5] == ["-m", "bbfast", "bench", "resnet50"]
    assert model[model.index("--providers") + 1] == PROVIDERS
    small = steps["models-infer-1-32-bf16-resnet50"]
    assert small.command[small.command.index("--batch") + 1] == "1,32" and small.limit_s == 240
    assert model[-2:] == ["--json", str(tmp_path / "models-infer-128-bf16-resnet50.json")]
    assert f"--benchmark-json={tmp_path / 'ops-window_attention.json'}" in steps["ops-window_attention"].command
    compiled = steps["compile-infer"].command
    assert compiled[2] == "bbfast.benchmarks.warm_up" and set(MODELS[:5]) <= set(compiled)
    assert "eager" not in compiled[-1].split(",") and "bbfast+compile" in compiled[-1].split(",")
    tests = steps["tests-gpu"].command
    assert tests[tests.index("-n") + 1] == "4" and str(ROOT / "tests" / "test_swap_gpu.py") in tests
    assert "-n" not in steps["ops-window_attention"].command  # benchmarks share the GPU with nobody


def test_without_a_gpu_the_same_steps_are_small(tmp_path):
    steps = planned(tmp_path, quick=True, on_gpu=False)
    model = next(step for step in steps if step.name.startswith("models-")).command
    assert model[model.index("--device") + 1] == "cpu" and model[model.index("--batch") + 1] == "1"


def test_the_sanitizer_runs_where_it_is(tmp_path):
    step = planned(tmp_path)[-1]
    assert (step.outcome, step.reason) == ("skipped", "compute-sanitizer is not on PATH")
    step = planned(tmp_path, sanitizer="/opt/compute-sanitizer")[-1]
    assert step.outcome == "waiting" and step.command[0] == "/opt/compute-sanitizer"


# ---- running -------------------------------------------------------------------------------------------------


def test_steps_pass_and_fail_and_leave_logs(new_run, capfd):
    run = new_run(python("good", "print('all is well')"), python("bad", "raise SystemExit(3)"))
    run.all()
    assert [(step["outcome"], step["exit_status"]) for step in kept(run)] == [("passed", 0), ("failed", 3)]
    assert (run.folder / "good.log").read_text() == "all is well\n"
    assert "all is well" in capfd.readouterr().out


def test_a_step_at_its_limit_may_still_write_its_results(new_run):
    code = """
import time
try:
    print("on its way", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("written")
"""
    run = new_run(python("slow", code, limit_s=3), python("next", "pass"))
    run.all()
    assert [step["outcome"] for step in kept(run)] == ["cut short", "passed"]
    assert kept(run)[0]["reason"] == "stopped after 3 s"
    assert (run.folder / "slow.log").read_text() == "on its way\nwritten\n"


def test_what_does_not_stop_is_killed_with_its_children(new_run, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    run = new_run(python("stubborn", code, limit_s=2))
    run.all()
    assert kept(run)[0]["exit_status"] == -signal.SIGKILL
    child = Path(f"/proc/{(run.folder / 'stubborn.log').read_text().strip()}/stat")
    time.sleep(0.2)
    assert not child.exists() or child.read_text().split()[2] == "Z"  # nobody may be there to reap it


def test_what_is_built_already_is_looked_at_where_it_lies(new_run):
    run = new_run(python("build", "import os; print(os.getcwd())"))
    run.building = False
    for package in gpu.PACKAGES:
        (gpu.BUILD / package).mkdir(parents=True)
        (gpu.BUILD / package / "__init__.py").touch()
    run.all()
    assert kept(run)[0]["outcome"] == "passed"
    assert (run.folder / "build.log").read_text().strip() == str(gpu.BUILD)


def test_compiling_together_tells_what_failed(capfd, monkeypatch):
    small = ["--device", "cpu", "--batch", "1", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["warm_up", "mobilenetv3_small_050", *small, "--providers", "bbfast,other"])
    assert warm_up.main() == 0
    good, bad = capfd.readouterr().out.splitlines()
    assert good.endswith("mobilenetv3_small_050 infer bbfast")
    assert "infer other: " in bad and "is not known; allowed: eager" in bad


def test_without_time_steps_are_skipped(new_run):
    run = new_run(python("one", "pass"), seconds=gpu.WORTH_STARTING_SECONDS - 1)
    run.all()
    assert (run.steps[0].outcome, run.steps[0].reason) == ("skipped", "no time left")


def test_a_phase_whose_time_is_over_comes_last(new_run, monkeypatch):
    run = new_run(
        python("first", "pass", until=0.3),
        python("late", "pass", until=0.3),
        python("other", "pass", until=0.9),
        python("last", "pass"),
    )
    order = []
    monkeypatch.setattr(run, "one", lambda step: order.append(step.name))
    monkeypatch.setattr(run, "elapsed", lambda: 0.0 if not order else 0.5 * run.seconds)
    run.all()
    assert order == ["first", "other", "last", "late"]


def test_a_missing_module_skips_with_its_reason(new_run):
    run = new_run(python("models", "raise SystemExit(1)", needs=("no_such_module_here",)))
    run.all()
    assert run.steps[0].outcome == "skipped"
    assert run.steps[0].reason.startswith("cannot import no_such_module_here: ModuleNotFoundError")


def test_a_wheel_of_timm_is_imported_as_it_is(new_run, tmp_path):
    import zipfile

    wheel = tmp_path / "timm-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("timm/__init__.py", "print('from', __file__)")
    run = new_run(python("models", "import timm", needs=("timm",)), timm=wheel)
    run.all()
    assert (run.folder / "models.log").read_text() == f"from {wheel}/timm/__init__.py\n"


def test_nothing_runs_after_a_failed_build(new_run):
    run = new_run(python("build", "raise SystemExit(1)"), python("tests", "pass"))
    run.all()
    assert [step.outcome for step in run.steps] == ["failed", "skipped"]


def test_a_build_without_its_packages_has_failed(new_run):
    run = new_run(python("build", "pass"))
    (gpu.BUILD / "bbfast" / "triton_kernels").mkdir(parents=True)
    for package in ("bbfast", "bbfast/triton_kernels"):
        (gpu.BUILD / package / "__init__.py").touch()
    run.all()
    assert run.steps[0].outcome == "failed"
    assert run.steps[0].reason == f"not in {gpu.BUILD}: bbfast/benchmarks"


STOPPED = """
import sys
from pathlib import Path
from bbfast.benchmarks import gpu, gpu_plan

class OneStep(gpu_plan.Planner):
    def steps(self, quick):
        slow = [sys.executable, "-c", "import time; print('on its way', flush=True); time.sleep(60)"]
        return [gpu_plan.Step("build", slow, 60), gpu_plan.Step("tests", slow, 60)]

gpu.Planner, gpu.BUILD = OneStep, Path(sys.argv[-1]) / "build"
sys.exit(gpu.main())
"""


def test_a_run_that_is_told_to_stop_keeps_what_it_has(tmp_path):
    command = [sys.executable, "-c", STOPPED, "--without-gpu", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "on its way" in line and "====" not in line:
                process.send_signal(signal.SIGTERM)
                break
        output = process.stdout.read()
    assert process.returncode == 1 and "==== interrupted" in output
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["outcome"] for step in content["steps"]] == ["interrupted", "skipped"]
    assert content["ended"] and content["facts"]["torch"]


# ---- facts that a run passes on ------------------------------------------------------------------------------


def test_a_built_copy_learns_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    monkeypatch.delenv("BBFAST_COMMIT", raising=False)
    assert facts.source() == {"commit": None, "dirty": None}
    monkeypatch.setenv("BBFAST_COMMIT", "abc-dirty")
    assert facts.source() == {"commit": "abc", "dirty": True}
    monkeypatch.setenv("BBFAST_COMMIT", "abc")
    assert facts.source() == {"commit": "abc", "dirty": False}


def test_a_second_run_takes_a_new_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    found = {**FACTS, "processor": "x"}
    folders = [facts.new_results_folder(found) for _ in range(3)]
    names = ["2030-01-01-cccccccccc", "2030-01-01-cccccccccc-2", "2030-01-01-cccccccccc-3"]
    assert folders == [tmp_path / "benchmarks" / "results" / "test-gpu" / name for name in names]
