"""`make bench`: models, ops and report into one folder, each even if one before it failed."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

from bbfast.benchmarks import run


def test_everything_runs_although_the_models_fail(tmp_path, monkeypatch):
    commands = []

    def fails_once(command):
        commands.append(command)
        return SimpleNamespace(returncode=1 if len(commands) == 1 else 0)

    monkeypatch.setattr(subprocess, "run", fails_once)
    folder = tmp_path / "results"
    assert run.main(["resnet50", "--output", str(folder)]) == 1
    models, ops, report = commands
    assert models[1:] == ["-m", "bbfast", "bench", "resnet50", "--json", str(folder / "models.json")]
    assert f"--benchmark-json={folder / 'ops.json'}" in ops
    assert report[1:] == ["-m", "bbfast.benchmarks.report", str(folder)]
    assert folder.is_dir()
