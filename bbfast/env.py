"""The environment variables that steer bbfast, read when an op runs and checked where they are read.

BBFAST_BACKEND: the one kernel backend that ops may use: auto (default), triton, cuda, cpp, onednn, or torch, which is
    the reference.
BBFAST_STRICT: 1 raises, with all the reasons, where an op would fall back to the reference; 0 is the default.
TRITON_INTERPRET: Triton's own: with 1 kernels run on CPU tensors. Must be set before bbfast is imported.
"""

from __future__ import annotations

import os

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
    value = os.environ.get("BBFAST_STRICT", "0")
    if value not in ("0", "1"):
        raise ValueError(f"BBFAST_STRICT={value!r} is not allowed; use 0 or 1")
    return value == "1"
