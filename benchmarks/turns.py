"""Lets benchmarks in several processes prepare at the same time and measure one after the other.

A model with five compiled providers takes minutes to compile, of one or two processor cores, and seconds to measure,
of a GPU that nobody else may use meanwhile. So processes get ready side by side, wait until all others are, and then
have the GPU in turns: `together.py` starts them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

GO, LOCK, READY = "go", "lock", "ready"
POLL_SECONDS = 0.05


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Says that this process is ready, waits for the word and for its turn, and runs what is inside alone."""
    (folder / f"{os.getpid()}.{READY}").touch()
    while not (folder / GO).exists():
        time.sleep(POLL_SECONDS)
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it for a process that dies
        yield


def is_ready(folder: Path, pid: int) -> bool:
    return (folder / f"{pid}.{READY}").exists()
