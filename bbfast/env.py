"""The environment variables that steer bbfast, read when an op runs and checked where they are read.

BBFAST_BACKEND: the one kernel backend that ops may use: auto (default), triton, cuda, cpp, onednn, or torch, which is
    the reference.
BBFAST_STRICT: 1 raises, with all the reasons, where an op would fall back to the reference; 0 is the default.
BBFAST_TUNED: 0 leaves all launch configurations to the heuristics, 1 (default) takes what was measured for the GPU.
BBFAST_TUNED_DIR: the folder where `bbfast tune` leaves what it measured, and which is asked before what bbfast brings
    along; default: bbfast/tuned in $XDG_CACHE_HOME or in ~/.cache. Both are read at a kernel's first launch.
BBFAST_REPLAY: 0 lets ops and launchers of kernels work out in each call what they did for such tensors before; 1 is
    the default. Read at import.
TRITON_INTERPRET: Triton's own: with 1 kernels run on CPU tensors. Must be set before bbfast is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from bbfast.triton_kernels import replay as _replay
from bbfast.triton_kernels import tuned as _tuned

BACKENDS = ("auto", "triton", "cuda", "cpp", "onednn", "torch")

# Triton fixes this when a kernel is decorated, so the value at import is the one that counts.
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend() -> str:
    """The backend that `BBFAST_BACKEND` names.

    Raises:
        ValueError: the variable holds an unknown name.
    """
    name = os.environ.get("BBFAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"BBFAST_BACKEND={name!r} is not a backend; allowed: {', '.join(BACKENDS)}")
    return name


def strict() -> bool:
    """Whether `BBFAST_STRICT` forbids falling back to the reference.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    return _switch("BBFAST_STRICT", "0")


def tuned() -> bool:
    """Whether measured launch configurations are taken where there are some.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    return _switch("BBFAST_TUNED", "1")


def tuned_folder() -> Path:
    """Where this user's measured launch configurations are, or will be."""
    if folder := os.environ.get("BBFAST_TUNED_DIR"):
        return Path(folder)
    # os.path also takes users without a home, who just have no such files.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bbfast", "tuned")


def tuned_folders() -> tuple[Path, ...]:
    """The folders where measured launch configurations are looked for, those that win first.

    Raises:
        ValueError: `BBFAST_TUNED` is neither 0 nor 1.
    """
    return (tuned_folder(), _tuned.PACKAGED) if tuned() else ()


# The kernels know nothing of bbfast and its variables, so they are told where to look, and whether to remember.
_tuned.folders = tuned_folders


def _switch(name: str, default: str) -> bool:
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r} is not allowed; use 0 or 1")
    return value == "1"


_replay.enabled = _switch("BBFAST_REPLAY", "1")
