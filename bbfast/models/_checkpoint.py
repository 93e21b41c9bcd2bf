"""Weights from files: read safely, unwrapped, and checked against the model before anything changes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

# Checkpoints of training scripts keep the weights under one of these, the averaged ones first.
_WRAPPER_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
# DistributedDataParallel and torch.compile each put a prefix before every key, in either order.
_WRAPPER_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
# Where torch.load names the class or function that a pickle would call, and where it finds no pickle at all.
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")
_NO_PICKLE = re.compile(r"Unsupported operand \d+")


def load_checkpoint(model: nn.Module, checkpoint_path: str | Path) -> None:
    """Loads the file `checkpoint_path` into `model`; every parameter and buffer must be there, with its
    shape.

    Args:
        model: any module.
        checkpoint_path: `.safetensors`, or what `torch.save` wrote (read with `weights_only=True`); a
            training checkpoint's `state_dict_ema`, `model_ema`, `state_dict` or `model` is unwrapped, and the
            prefixes `module.` and `_orig_mod.` are dropped. BatchNorm's `num_batches_tracked` may be missing. A model
            with a method `adapt_state_dict` translates the files of its authors.

    Raises:
        TypeError: checkpoint_path is no path.
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or its keys or shapes do not fit the model.
    """
    path = existing_file(checkpoint_path, "checkpoint_path")
    argument = f"checkpoint_path: {path}"
    state_dict = adapt(read_checkpoint(path, argument=argument), model)
    check_fits(state_dict, model.state_dict(), argument)
    model.load_state_dict(state_dict, strict=False)


def existing_file(path: str | Path, argument: str) -> Path:
    """`path` with `~` expanded, if there is such a file; `argument` begins the error messages."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"{argument} must be a path, got {type(path).__name__}")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{argument}: there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{argument}: {path} is not a file")
    return path


def adapt(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """With the model's own keys and sizes, where the model knows of files that have others."""
    return model.adapt_state_dict(state_dict) if hasattr(model, "adapt_state_dict") else state_dict


def read_checkpoint(path: str | Path, *, argument: str, if_damaged: str = "") -> dict[str, torch.Tensor]:
    """The tensors by name that a checkpoint file holds, unwrapped.

    Args:
        argument: begins the error messages. if_damaged: what to do about a file that cannot be read, their end.

    Raises:
        ValueError: the file is no checkpoint, or holds more than tensors and plain containers.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            # Training scripts keep their arguments beside the weights; a Namespace is no more than a dict.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any layer: zip, pickle, header, dtype
        if refused := _REFUSED_GLOBAL.search(str(error)):
            raise ValueError(
                f"{argument} holds more than tensors and plain containers, and is not read, as that could run any "
                f"code: {refused[1]}"
            ) from error
        raise ValueError(f"{argument} cannot be read as a checkpoint: {_reason(error)}{if_damaged}") from error
    return unwrap(content, argument)


def _reason(error: Exception) -> str:
    """What went wrong, in a line; the exception's name too where its message is only a key or a number."""
    if no_pickle := _NO_PICKLE.search(str(error)):
        return f"no tensors and plain containers ({no_pickle[0]})"
    line = str(error).strip().partition("\n")[0]
    return line if " " in line else f"{type(error).__name__} {line}".strip()


def unwrap(content, argument: str) -> dict[str, torch.Tensor]:
    """The tensors by name in a checkpoint's content; `argument` begins the error messages."""
    if isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPER_KEYS if isinstance(content.get(key), Mapping)), None)
        content = content if inner is None else inner
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{argument} holds no weights: expected a dict of tensors, got {_describe(content)}")
    state_dict = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{argument} is not a dict of tensors: entry {key!r} is {_describe(value)}")
        for prefix in _WRAPPER_PREFIXES:
            key = key.removeprefix(prefix)
        state_dict[key] = value
    return state_dict


def _describe(value) -> str:
    return "an empty dict" if value == {} else f"a {type(value).__name__}"


def check_fits(state_dict: Mapping, own: Mapping, argument: str, may_miss: frozenset | set = frozenset()) -> None:
    """Raises one ValueError that lists everything that does not fit."""
    missing = [
        key for key in own if key not in state_dict and key not in may_miss and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state_dict if key not in own]
    shapes = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in state_dict.items()
        if key in own and value.shape != own[key].shape
    ]
    problems = [
        f"{label}: {_some(found)}"
        for label, found in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("wrong shapes", shapes),
        )
        if found
    ]
    if problems:
        raise ValueError(f"{argument} does not fit the model; {'; '.join(problems)}")


def _some(names: list[str], shown: int = 4) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
