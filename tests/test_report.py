"""report.md and its pictures are made from the JSON files alone, whatever is missing; losses are found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from results_folders import FACTS, model_row, op_benchmark, write_models, write_ops

from bbfast.benchmarks import read_results, report


@pytest.fixture
def folder(tmp_path):
    write_models(
        tmp_path,
        {
            "resnet50": [
                model_row("eager", 12.0),
                model_row("compile", 8.0),
                model_row("bbfast", 10.0),
                model_row("bbfast+compile", None, failure="RuntimeError: no\nmemory | at all"),
            ],
            "convnext_tiny": [model_row("eager", 9.0), model_row("compile", 6.0), model_row("swapped", 3.0)],
        },
    )
    attention = [op_benchmark("eager", [0.004, 0.005, 0.006]), op_benchmark("bbfast", [0.002] * 3, backend="triton")]
    tiny = [op_benchmark("eager", [0.001] * 3, shape="1x7x7x8"), op_benchmark("bbfast", [0.003] * 3, shape="1x7x7x8")]
    failed = op_benchmark("compile", [1.0])["extra_info"]
    write_ops(tmp_path, attention + tiny, [{**failed, "failure": "WrongResult: output 0"}])
    step = {"name": "models-infer", "outcome": "skipped", "reason": "no time left", "seconds": None, "log": ""}
    (tmp_path / "gpu.json").write_text(json.dumps({"facts": FACTS, "steps": [step]}))
    return tmp_path


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def test_the_report_holds_every_row(folder, capsys):
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    text = (folder / "report.md").read_text()
    assert text.startswith("# bbfast on Test GPU\n")
    assert f"- commit: {'c' * 40}, as committed" in text and "torch 9.9" in text
    assert "|  | **compile** | 8.00 (7.96-8.04) | 1000 | 100 | 1.50 | 1.00 | 1.0e-04 |" in text
    assert "|  | bbfast+compile | RuntimeError: no memory \\| at all | | | | | |" in text
    assert "| 2x4x4x8 bfloat16 | eager | 5.00 (4.40-5.60) | 1500 | 50% | 0.500 | 1.00 |  |  |  |  |" in text
    assert "|  | **bbfast** (triton) | 2.00 (2.00-2.00) | 1500 | 50% | 0.500 | 2.50 |  | 2.50 |  |  |" in text
    assert lines_with(text, "| compile | WrongResult: output 0 |")
    assert "| models-infer | skipped: no time left |  |  |" in text


def test_notes_of_rows_are_told_once(tmp_path):
    fallen = {"notes": ["window_attention ran as torch"]}
    rows = [model_row("eager", 2.0), {**model_row("bbfast", 1.0), **fallen}, {**model_row("swapped", 1.0), **fallen}]
    write_models(tmp_path, {"swin": rows})
    content = json.loads((tmp_path / "models.json").read_text())
    content["results"][0] |= {"cuda_graphs": True, "memory_format": "contiguous"}
    (tmp_path / "models.json").write_text(json.dumps(content))
    text = "\n".join(report.model_tables(read_results.read(tmp_path)))
    assert "- swin: contiguous, replayed from CUDA graphs\n" in text
    assert text.count("ran as torch") == 1 and "- swin, bbfast, swapped: window_attention ran as torch" in text


def test_losses_come_worst_first_and_gains_not_at_all(folder):
    losing = report.losing_lines(read_results.read(folder))
    assert losing[0].startswith("In 2 of 4 cases")
    assert losing[-2:] == [
        "| window_attention 1x7x7x8 forward bfloat16 | eager | 1.00 | bbfast | 3.00 | 3.00 |",
        "| resnet50 infer bf16 batch 8 224 px | compile | 8.00 | bbfast | 10.0 | 1.25 |",
    ]


def test_a_loss_smaller_than_the_spread_is_called_noise(tmp_path):
    write_models(tmp_path, {"swin": [model_row("eager", 10.0, spread=0.1), model_row("bbfast", 10.5)]})
    assert report.losing_lines(read_results.read(tmp_path))[-1].endswith("| 10.5 | 1.05, within noise |")


def test_gains_that_need_compilation_are_told(tmp_path):
    rows = [model_row("eager", 9.0), model_row("compile", 4.0), model_row("bbfast", 5.0)]
    write_models(tmp_path, {"swin": [*rows, model_row("bbfast+compile", 3.0)]})
    found = report.losing_lines(read_results.read(tmp_path))
    assert found[0].startswith("In none of the 1 cases")
    assert found[2].startswith("In 1 more bbfast is the fastest only when")
    assert found[-1] == "| swin infer bf16 batch 8 224 px | compile | 4.00 | bbfast | 5.00 | 1.25 |"


def test_a_failure_of_bbfast_is_the_worst_loss(tmp_path):
    rows = [model_row("eager", 5.0), model_row("bbfast", None, failure="WrongAnswerError: NaN")]
    write_models(tmp_path, {"slow": [model_row("eager", 1.0), model_row("bbfast", 9.0)], "wrong": rows})
    found = report.losing_lines(read_results.read(tmp_path))
    assert "wrong" in found[-2] and "none: WrongAnswerError: NaN" in found[-2]
    assert found[-1].endswith("| eager | 1.00 | bbfast | 9.00 | 9.00 |")


def test_without_bbfast_nothing_is_lost_or_won(tmp_path):
    write_models(tmp_path, {"resnet50": [model_row("eager", 5.0), model_row("compile", 4.0)]})
    assert report.losing_lines(read_results.read(tmp_path)) == ["Nothing was measured both with and without bbfast."]
    write_models(tmp_path, {"resnet50": [model_row("eager", 5.0), model_row("bbfast", 4.0)]})
    assert report.losing_lines(read_results.read(tmp_path))[0].startswith("In none of the 1 cases")


def test_pictures_are_drawn_and_shown(folder):
    pytest.importorskip("matplotlib")
    report.main([str(folder)])
    names = {"models-infer-bf16-batch8-224px.png", "ops-roofline.png", "ops-speedup.png"}
    assert {path.name for path in folder.glob("*.png")} == names
    text = (folder / "report.md").read_text()
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text


def test_pictures_survive_rows_without_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    write_models(tmp_path, {"a": [model_row("eager", None, failure="out of memory"), model_row("bbfast", 4.0)]})
    write_ops(tmp_path, [op_benchmark("bbfast", [0.1], gbps=None, copy_gbps=None, floor_ms=None)])
    assert report.main([str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*.png"))  # nothing to compare with, and no bandwidth
    assert "|  | **bbfast** | 4.00 (3.98-4.02) | 2000 | 100 |  |  | 1.0e-04 |" in (tmp_path / "report.md").read_text()


def test_without_matplotlib_the_report_says_so(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert report.main([str(folder)]) == 0
    assert "- no pictures: matplotlib is not installed" in (folder / "report.md").read_text()
    assert not list(folder.glob("*.png"))


def test_files_cut_short_are_named_and_the_rest_is_read(folder):
    (folder / "ops.json").write_text("")  # pytest-benchmark opens its file when it starts
    (folder / "models.json").write_text('{"facts": {"gpu"')
    write_models(folder, {"resnet50": [model_row("eager", 1.0)]}, {**FACTS, "torch": "8.8"}, "models-2.json")
    results = read_results.read(folder)
    assert [row.case[0] for row in results.rows] == ["resnet50"]
    assert any("ops.json: empty, its run was cut short" in note for note in results.notes)
    assert any(note.startswith("models.json: unreadable") for note in results.notes)
    assert results.differences == ["gpu.json: torch: 8.8 and 9.9"]


def test_of_a_case_in_two_files_the_fuller_one_counts(tmp_path):
    fuller = [model_row("eager", 2.0), model_row("bbfast", 1.0)]
    for one, two in ((fuller, fuller[:1]), (fuller[:1], fuller)):
        write_models(tmp_path, {"resnet50": one}, name="models-1.json")
        write_models(tmp_path, {"resnet50": two}, name="models-2.json")
        results = read_results.read(tmp_path)
        assert [row.provider for row in results.rows] == ["eager", "bbfast"]
        assert results.notes == [
            "models-2.json: measures resnet50 infer bf16 batch 8 224 px once more; the fuller measurement counts"
        ]


@pytest.mark.parametrize("content", ['{"benchmarks": [{"extra_info": {}, "stats": {}}]}', "[1]", '{"results": 3}'])
def test_files_of_another_format_are_named(tmp_path, content):
    write_models(tmp_path, {"resnet50": [model_row("eager", 1.0)]})
    (tmp_path / "ops.json").write_text(content)
    (tmp_path / "models-2.json").write_text(content)
    results = read_results.read(tmp_path)
    assert len(results.rows) == 1 and any("not in the format" in note for note in results.notes)


@pytest.mark.parametrize("make", [False, True], ids=["no folder", "empty folder"])
def test_a_folder_without_results_is_refused(tmp_path, make, capsys):
    folder = tmp_path / "results"
    if make:
        folder.mkdir()
    with pytest.raises(SystemExit) as exit_info:
        report.main([str(folder)])
    assert exit_info.value.code == 2
    assert ("holds no models*.json" if make else "is no folder") in capsys.readouterr().err


def test_quartiles_stand_for_rounds_that_were_not_kept():
    benchmark = op_benchmark("eager", [0.004, 0.005, 0.006])
    del benchmark["stats"]["data"]
    row = read_results._op_row(benchmark)
    assert (row.p20_ms, row.p50_ms, row.p80_ms) == pytest.approx((4.0, 5.0, 6.0))


@pytest.mark.parametrize(
    "provider, ours",
    [("bbfast", True), ("bbfast+compile", True), ("swapped nchw", True), ("bbfast onednn", True)]
    + [("eager", False), ("compile max-autotune", False), ("sdpa efficient", False)],
)
def test_which_providers_are_ours(provider, ours):
    assert read_results.is_ours(provider) is ours


@pytest.mark.parametrize(
    "value, text", [(None, ""), (0.01234, "0.0123"), (0.5, "0.500"), (12.34, "12.3"), (1234, "1234")]
)
def test_numbers_have_three_figures(value, text):
    assert report.number(value) == text


def test_what_pytest_benchmark_writes_is_read(tmp_path):
    pytest.importorskip("pytest_benchmark")
    info = op_benchmark("bbfast", [1.0])["extra_info"]
    (tmp_path / "test_it.py").write_text(
        f"def test_it(benchmark):\n    benchmark.extra_info.update({info!r})\n"
        "    benchmark.pedantic(sum, args=([1, 2],), rounds=9, iterations=3)\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "test_it.py",
        "--benchmark-json=ops.json",
    ]
    # As a worker of xdist's, of which this may be one, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (row,) = read_results.read(tmp_path).rows
    assert row.provider == "bbfast" and 0 < row.p20_ms <= row.p50_ms <= row.p80_ms < 1000
