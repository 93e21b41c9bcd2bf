"""Runs functions of tests/distributed_cases.py in two processes that talk over gloo, on the CPU."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

WORLD = 2


def run(cases: Sequence[str]) -> dict[str, list[tuple[str | None, object]]]:
    """For each case what each process has to say: the traceback or None, and what `<case>(rank)` returned.

    One pair of processes does them all, as most of the time goes into starting it. After an error in a process it does
    no more, and cases that are left have its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_work, (cases, folder), nprocs=WORLD, start_method="spawn")
        by_rank = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {case: [results[case] for results in by_rank] for case in cases}


def _work(rank: int, cases: Sequence[str], folder: str) -> None:
    os.environ.update(BBFAST_BACKEND="torch", OMP_NUM_THREADS="1")
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    import distributed_cases

    error, results = None, {}
    for case in cases:
        result = None
        if error is None:
            try:
                result = getattr(distributed_cases, case)(rank)
            except Exception:
                error = f"process {rank}, {case}:\n{traceback.format_exc()}"
        results[case] = error, result
    torch.save(results, Path(folder) / f"{rank}.pt")
    if error is None:
        dist.destroy_process_group()
