"""Two results folders compare: regressions beyond noise, gains, failures, and warnings about unlike machines."""

from __future__ import annotations

import pytest
from results_folders import FACTS, model_row, op_benchmark, write_models, write_ops

from bbfast.benchmarks import compare
from bbfast.benchmarks.read_results import read


def compared(tmp_path, old: list[dict], new: list[dict], *options: str, new_facts: dict = FACTS) -> int:
    write_models(tmp_path / "old", {"resnet50": old})
    write_models(tmp_path / "new", {"resnet50": new}, new_facts)
    return compare.main([str(tmp_path / "old"), str(tmp_path / "new"), *options])


def test_a_slower_bbfast_is_a_regression(tmp_path, capsys):
    assert compared(tmp_path, [model_row("bbfast", 10.0)], [model_row("bbfast", 10.8)]) == 1
    output = capsys.readouterr().out
    assert "1.080" in output and "slower" in output and "1 of bbfast's rows regressed" in output
    assert "APPLES" not in output


def test_a_slower_other_is_shown_and_no_regression(tmp_path, capsys):
    assert compared(tmp_path, [model_row("compile", 10.0)], [model_row("compile", 20.0)]) == 0
    output = capsys.readouterr().out
    assert "2.000" in output and "0 of bbfast's rows regressed" in output


@pytest.mark.parametrize("ms", [10.4, 9.7])
def test_changes_within_the_least_noise_do_not_count(tmp_path, ms, capsys):
    assert compared(tmp_path, [model_row("bbfast", 10.0)], [model_row("bbfast", ms)]) == 0
    assert "0 slower, 0 fails now, 0 faster, 0 works now, 1 same" in capsys.readouterr().out
    assert compared(tmp_path, [model_row("bbfast", 10.0)], [model_row("bbfast", ms)], "--noise", "0.01") == (ms > 10)


@pytest.mark.parametrize("spreads", [(0.2, 0.01), (0.01, 0.2)], ids=["old", "new"])
def test_a_wide_spread_of_either_row_is_noise(tmp_path, spreads):
    old, new = spreads
    assert compared(tmp_path, [model_row("bbfast", 10.0, old)], [model_row("bbfast", 11.5, new)]) == 0
    assert compared(tmp_path, [model_row("bbfast", 10.0, old)], [model_row("bbfast", 12.5, new)]) == 1


def test_failures_count_and_repairs_are_gains(tmp_path, capsys):
    failed = model_row("bbfast", None, failure="RuntimeError: no")
    assert compared(tmp_path, [model_row("bbfast", 10.0)], [failed]) == 1
    assert "fails now" in capsys.readouterr().out
    assert compared(tmp_path, [failed], [model_row("bbfast", 10.0)]) == 0
    assert "1 works now" in capsys.readouterr().out
    assert compared(tmp_path, [failed], [failed]) == 0


def test_rows_of_one_folder_alone_are_counted(tmp_path, capsys):
    old = [model_row("eager", 5.0), model_row("bbfast", 10.0)]
    assert compared(tmp_path, old, [model_row("eager", 5.0)]) == 0
    assert "1 rows only in OLD" in capsys.readouterr().out


def test_ops_are_joined_by_shape(tmp_path):
    write_ops(tmp_path / "old", [op_benchmark("bbfast", [0.001] * 5), op_benchmark("bbfast", [0.002] * 5, "other")])
    write_ops(tmp_path / "new", [op_benchmark("bbfast", [0.002] * 5, "other"), op_benchmark("bbfast", [0.004] * 5)])
    changes = compare.compare(read(tmp_path / "old"), read(tmp_path / "new"), 0.05)
    assert [(change.verdict, change.ratio) for change in changes] == [("same", 1.0), ("slower", 4.0)]


def test_another_machine_is_said_loudly(tmp_path, capsys):
    rows = [model_row("bbfast", 10.0)]
    later = {**FACTS, "commit": "d" * 40, "started": "2031-01-01"}
    compared(tmp_path, rows, rows, new_facts=later)
    assert "APPLES" not in capsys.readouterr().out
    compared(tmp_path, rows, rows, new_facts={**later, "gpu": "Other GPU"})
    output = capsys.readouterr().out
    assert "APPLES AND PEARS" in output and "gpu: Test GPU and Other GPU" in output
    compared(tmp_path, rows, rows, new_facts={})
    assert "does not tell what it was measured on" in capsys.readouterr().out


@pytest.mark.parametrize("noise", ["-0.1", "1", "much"])
def test_a_noise_that_is_no_share_is_refused(tmp_path, noise, capsys):
    with pytest.raises(SystemExit) as exit_info:
        compare.main([str(tmp_path), str(tmp_path), "--noise", noise])
    assert exit_info.value.code == 2 and f"{noise!r} is not allowed" in capsys.readouterr().err


def test_a_missing_folder_is_no_regression(tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        compare.main([str(tmp_path / "none"), str(tmp_path)])
    assert exit_info.value.code == 2
