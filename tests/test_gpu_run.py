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

from bbfast.benchmarks import facts, gpu, together, turns
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
    models = [name for name in names if name.startswith("models-")]
    assert models[:2] == [f"models-infer-{MODELS[0]}", f"models-train-{MODELS[0]}"]
    for mode in ("infer", "train"):
        together = [step.command for step in planned(tmp_path) if step.name.startswith(f"models-{mode}-")]
        together = [command for command in together if command[2] == "bbfast.benchmarks.together"]
        assert [word for command in together for word in command if word in MODELS] == list(MODELS)
    assert [name for name in names if name.startswith("ops-")][: len(OPS)] == [f"ops-{op}" for op in OPS]


def test_no_benchmark_of_an_op_is_forgotten(tmp_path):
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} - {"models"}
    assert set(OPS) <= files
    assert {f"ops-{op}" for op in files} <= {step.name for step in planned(tmp_path)}


def test_the_quick_plan_is_short(tmp_path):
    names = [step.name for step in planned(tmp_path, quick=True)]
    assert names == [
        *("build", "info", "tests-gpu"),
        *(f"models-infer-{MODELS[0]}", f"ops-{OPS[0]}", f"ops-{OPS[1]}"),
    ]


def test_commands_name_their_files(tmp_path):
    steps = {step.name: step for step in planned(tmp_path, processes=4)}
    together = steps[f"models-infer-{MODELS[0]}"].command
    assert together[1:8] == ["-m", "bbfast.benchmarks.together", *MODELS[:5]]
    assert together[together.index("--prefix") + 1] == "models-infer-128-bf16-"
    assert together[together.index("--providers") + 1] == PROVIDERS
    small = steps["models-infer-1-32-bf16-resnet50"]
    assert small.command[1:5] == ["-m", "bbfast", "bench", "resnet50"]
    assert small.command[small.command.index("--batch") + 1] == "1,32" and small.limit_s == 240
    assert small.command[-2:] == ["--json", str(tmp_path / "models-infer-1-32-bf16-resnet50.json")]
    assert f"--benchmark-json={tmp_path / 'ops-window_attention.json'}" in steps["ops-window_attention"].command
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


def test_models_are_measured_in_turns(tmp_path, monkeypatch, capfd):
    names = ["mobilenetv3_small_050", "no_such_model", "mobilenetv3_small_075"]
    options = ["--device", "cpu", "--batch", "1", "--dtype", "fp32", "--providers", "eager,bbfast", "--rounds", "1"]
    command = ["together", *names, "--output", str(tmp_path), "--prefix", "m-", "--prepare-seconds", "120", "--"]
    monkeypatch.setattr(sys, "argv", command + options)
    assert together.main() == 1
    told = capfd.readouterr()
    assert "no_such_model ended early" in told.out and told.err == "no_such_model failed\n"
    assert "timm has no 'no_such_model'" in told.out
    for name in (names[0], names[2]):
        (result,) = json.loads((tmp_path / f"m-{name}.json").read_text())["results"]
        assert result["model"] == name and [row["failure"] for row in result["rows"]] == [None, None]
        assert f"{name} is ready" in told.out


def test_nobody_starts_before_the_word_and_turns_do_not_overlap(tmp_path):
    code = """
import sys, time
from pathlib import Path
from bbfast.benchmarks.turns import turn
with turn(Path(sys.argv[1])):
    print(time.monotonic(), flush=True)
    time.sleep(0.5)
    print(time.monotonic(), flush=True)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    while not all(turns.is_ready(tmp_path, process.pid) for process in processes):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    word = time.monotonic()
    (tmp_path / turns.GO).touch()
    spans = sorted([float(line) for line in process.communicate()[0].split()] for process in processes)
    times = [moment for span in spans for moment in span]
    assert times == sorted(times) and times[0] > word


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
