"""The compiled extension `bbfast._C`: loaded when first asked for, and never silently left out.

Absent is fine (a source tree that was not built): `load` returns None and ops say why they fall back. Present
but not loadable (built for another torch or Python, a damaged file) is an error wherever it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_NAME = "bbfast._C"
# What was added last: a build that lacks it is older than the Python around it.
_NEWEST = "call_key"
_REBUILD = "rebuild it with `pip install --no-build-isolation -e .` in bbfast's source folder"


class BrokenExtensionError(ImportError):
    """`bbfast._C` is there but does not load, or does not fit the torch that is installed."""


@functools.cache
def load() -> ModuleType | None:
    """The module `bbfast._C`, or None where it was not built.

    Raises:
        BrokenExtensionError: the file is there but cannot be used.
    """
    if importlib.util.find_spec(_NAME) is None:
        _check_for_other_pythons()
        return None
    try:
        module = importlib.import_module(_NAME)
    except Exception as error:
        raise BrokenExtensionError(f"{_NAME} is present but does not load ({error}); {_REBUILD}") from error
    _check_torch(module.build_info()["torch"])
    if not hasattr(module, _NEWEST):
        raise BrokenExtensionError(f"{_NAME} was built from older sources, without {_NEWEST}; {_REBUILD}")
    return module


def unavailable_reason() -> str | None:
    """Why `load` returns None; None where it returns the module.

    Raises:
        BrokenExtensionError: as `load`.
    """
    if load() is not None:
        return None
    return f"{_NAME} was not built; {_REBUILD}"


def _check_for_other_pythons() -> None:
    found = sorted(path.name for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if found:
        raise BrokenExtensionError(f"{_NAME} was built for another Python ({', '.join(found)}); {_REBUILD}")


def _check_torch(built_with: str) -> None:
    """C++ tensors keep their layout within a minor version of torch, not across them."""
    if built_with.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise BrokenExtensionError(
            f"{_NAME} was built with torch {built_with}, installed is torch {torch.__version__}; {_REBUILD}"
        )
