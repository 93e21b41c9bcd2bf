"""Exchanges the classes of a model's blocks for fast ones, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from bbfast.swap import _fast
from bbfast.swap._report import SwapReport, SwapRow

Filter = Callable[[nn.Module, str], bool]
Move = tuple[nn.Module, type[nn.Module]]


class SwapError(RuntimeError):
    """A model could not be swapped, or not be restored, as was asked; it is as it was before."""


def plan(model: nn.Module, *, filter_fn: Filter | None = None) -> SwapReport:
    """What `swap` would do to `model`, which stays as it is.

    Args:
        model: any module; blocks are looked for at every depth.
        filter_fn: takes (module, path) of a block, returns whether it may be swapped.

    Raises:
        TypeError: `model` is not a module, or `filter_fn` not callable.
    """
    report, _ = _survey(model, filter_fn)
    return report


def swap(model: nn.Module, *, filter_fn: Filter | None = None, strict: bool = False) -> SwapReport:
    """Lets the blocks of `model` that bbfast knows run as fused ops; in place, and undone by `restore`.

    Each such block gets another class, a subclass of its own with another forward. Parameters, buffers, state_dict
    keys, hooks, shared modules and the optimiser's references stay; outputs and gradients are equal within rounding.
    A block that the fused ops cannot run as it is keeps its class, and the report says why. Swapping twice changes
    nothing more.

    Args:
        model: any module; blocks of timm, torchvision, transformers and runs of layers in nn.Sequential are found at
            every depth.
        filter_fn: takes (module, path) of a block, returns whether it may be swapped.
        strict: raise if any block is skipped, instead of reporting it.

    Returns:
        A row for each block.

    Raises:
        TypeError: an argument of the wrong type.
        SwapError: `strict`, and a block would be skipped. Whatever is raised, the model is as it was.
    """
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be a bool, got {type(strict).__name__}")
    report, moves = _survey(model, filter_fn)
    if strict and report.skipped:
        listed = "\n".join(f"  {row.path or '(the model)'}: {row.reason}" for row in report.skipped)
        raise SwapError(f"strict=True, and {len(report.skipped)} blocks cannot be swapped:\n{listed}")
    _reclass(moves)
    return SwapReport(report.rows, notes=report.notes)


def restore(model: nn.Module) -> SwapReport:
    """Gives all swapped blocks of `model` their classes back, whoever swapped them; a copy's or a loaded model's, too.

    Raises:
        TypeError: `model` is not a module.
        SwapError: a block was reclassed by somebody else since it was swapped; nothing is restored then.
    """
    _check_module(model)
    rows, moves, strangers = [], [], []
    for path, block in model.named_modules():
        if not isinstance(block, _fast.Fast):
            continue
        cls = type(block)
        if not _fast.is_fast(cls):
            strangers.append(f"  {path or '(the model)'}: now a {cls.__module__}.{cls.__qualname__}")
            continue
        foreign = _fast.foreign_class(cls)
        moves.append((block, foreign))
        rows.append(SwapRow(path, _name(cls), _name(foreign), "restored"))
    if strangers:
        listed = "\n".join(strangers)
        raise SwapError(
            f"these blocks were reclassed by somebody else since they were swapped; undo that first:\n{listed}"
        )
    _reclass(moves)
    return SwapReport(tuple(rows))


@contextlib.contextmanager
def swapped(model: nn.Module, *, filter_fn: Filter | None = None, strict: bool = False) -> Iterator[SwapReport]:
    """`swap` for the time of a `with` block; afterwards the blocks swapped by it are what they were before.

    Takes, returns and raises what `swap` does. Blocks that were swapped already stay swapped.
    """
    _check_module(model)
    fast_before = {id(block) for block in model.modules() if isinstance(block, _fast.Fast)}
    report = swap(model, filter_fn=filter_fn, strict=strict)
    ours = [block for block in model.modules() if isinstance(block, _fast.Fast) and id(block) not in fast_before]
    try:
        yield report
    finally:
        _reclass([(block, _fast.foreign_class(type(block))) for block in ours if _fast.is_fast(type(block))])


def _reclass(moves: list[Move]) -> None:
    """All of them, or none."""
    done: list[Move] = []
    try:
        for block, cls in moves:
            done.append((block, type(block)))
            block.__class__ = cls
    except BaseException:
        for block, cls in done:
            object.__setattr__(block, "__class__", cls)
        raise


# ---- survey ----------------------------------------------------------------------------------------------


def _survey(model: nn.Module, filter_fn: Filter | None) -> tuple[SwapReport, list[Move]]:
    """The report of a dry run, and what would have to be done."""
    _check_module(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable or None, got {type(filter_fn).__name__}")
    notes = _fast.load_adapters()
    rows: list[SwapRow] = []
    moves: list[Move] = []
    bypassed: set[int] = set()
    for path, block in model.named_modules():  # parents before their children, shared ones once
        if id(block) in bypassed:
            continue
        row, fast = _judge(path, block, filter_fn)
        if row is not None:
            rows.append(row)
        if row is not None and row.status == "swapped":
            moves.append((block, fast))
        if fast is not None:
            bypassed.update(id(inner) for _, inner in fast.lent(block) if inner is not None)
    return SwapReport(tuple(rows), dry_run=True, notes=notes), moves


def _judge(path: str, block: nn.Module, filter_fn: Filter | None) -> tuple[SwapRow | None, type[_fast.Fast] | None]:
    """The row of a block, None if nobody would expect one, and the fast class that it has or shall get."""
    cls = type(block)
    if isinstance(block, _fast.Fast):
        if _fast.is_fast(cls):
            return SwapRow(path, _name(_fast.foreign_class(cls)), _name(cls), "already swapped"), cls
        return _skipped(path, cls, "it was swapped, and reclassed by somebody else since"), None
    if reason := _fast.unsupported_reason(cls):
        return _skipped(path, cls, reason), None
    fast = _fast.fast_class(cls)
    if fast is None:
        return _judge_stranger(path, cls), None
    if not fast.concerns(block):
        return None, None
    if filter_fn is not None and not filter_fn(block, path):
        return _skipped(path, cls, "filter_fn said no"), None
    if reasons := _fast.objections_to(block, fast):
        return _skipped(path, cls, "; ".join(reasons)), None
    return SwapRow(path, _name(cls), _name(fast), "swapped"), fast


def _judge_stranger(path: str, cls: type[nn.Module]) -> SwapRow | None:
    """Subclasses of known blocks are reported; those of torch's own containers are not blocks of a kind."""
    known = [base for base in cls.__mro__[1:] if _fast.fast_class(base) and not base.__module__.startswith("torch.")]
    if not known:
        return None
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return _skipped(path, cls, "FSDP2 sharded it; swap before fully_shard")
    return _skipped(path, cls, f"a subclass of {known[0].__name__}; only exactly that class is known to run fused")


def _skipped(path: str, cls: type[nn.Module], reason: str) -> SwapRow:
    return SwapRow(path, _name(cls), "", "skipped", reason)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_module(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
