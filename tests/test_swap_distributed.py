"""Swapped models in two processes: DDP, SyncBatchNorm, FSDP2, and the example for torchrun."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_ddp.py"

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)


GRADIENTS = ("ddp_with_sync_batch_norm", "ddp", "ddp_swapped_afterwards", "fsdp_of_inner_layers_after_swap")
REFUSALS = ("fsdp_after_swap", "fsdp_before_swap", "fsdp_of_the_root_before_swap")


@pytest.fixture(scope="module")
def results() -> dict:
    return two_processes.run(GRADIENTS + REFUSALS)


def outcome(results: dict, case: str) -> list:
    """What the case returned in each process."""
    for error, _ in results[case]:
        assert error is None, error
    return [result for _, result in results[case]]


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_two_processes(case, results):
    outcome(results, case)


def test_fsdp_after_swap(results):
    for message in outcome(results, "fsdp_after_swap"):
        assert "reclassed by somebody else" in message
        assert "FSDPFastInvertedResidual" in message


def test_fsdp_before_swap_is_refused(results):
    for reasons in outcome(results, "fsdp_before_swap"):
        assert "FSDP2 sharded it; swap before fully_shard" in reasons["2"]
        assert "DTensor" in reasons["0"]


def test_fsdp_of_the_root_before_swap_is_refused(results):
    for reasons in outcome(results, "fsdp_of_the_root_before_swap"):
        assert all("DTensor" in reasons[path] for path in ("0", "1", "2", "3"))


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BBFAST_BACKEND": "torch"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_example():
    out = torchrun("--device", "cpu", "--steps", "2", "--batch-size", "2", "--size", "32", "--classes", "3")
    assert len(re.findall(r"step \d/2 {2}loss \d+\.\d+", out)) == 2, out
    assert "swapped" in out
    assert "2 processes" in out


def test_example_says_how_it_is_started(capsys, monkeypatch):
    example = runpy.run_path(str(EXAMPLE), run_name="train_ddp")
    with pytest.raises(SystemExit) as stopped:
        example["main"](["--help"])
    assert stopped.value.code == 0
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().out
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit, match="start this with torchrun"):
        example["main"](["--device", "cpu"])
