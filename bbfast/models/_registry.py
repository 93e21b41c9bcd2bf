"""The models that can be made by name, and the pretrained weights known for each."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from bbfast.models._pretrained import PretrainedCfg


@dataclass(frozen=True)
class _Model:
    entrypoint: Callable[..., nn.Module]
    module: str  # last part of the module's name, e.g. "efficientnet"
    cfgs: dict[str, PretrainedCfg] = field(default_factory=dict)  # by tag, the default first


_models: dict[str, _Model] = {}


# ---- registering -----------------------------------------------------------------------------------------


def register_model(
    entrypoint: Callable[..., nn.Module] | None = None,
    *,
    pretrained_cfgs: Mapping[str, PretrainedCfg] | None = None,
):
    """Decorator that makes a function available to `create_model` under its own name.

    Args:
        entrypoint: `f(pretrained=False, **model_arguments) -> nn.Module`. One with pretrained_cfgs is also
            given `pretrained_cfg=`, the chosen one.
        pretrained_cfgs: by tag, the default first. Architecture and tag are filled in.

    Returns:
        The entrypoint itself. A name that was taken is overwritten, with a warning.
    """
    if entrypoint is None:
        return functools.partial(register_model, pretrained_cfgs=pretrained_cfgs)
    if not callable(entrypoint):
        raise TypeError(f"register_model takes a function, got {type(entrypoint).__name__}")
    name = entrypoint.__name__
    _check_name(name)
    if name in _models:
        warnings.warn(f"model {name} was registered before and is now overwritten", UserWarning, stacklevel=2)
    cfgs = {tag: _complete(cfg, name, tag) for tag, cfg in (pretrained_cfgs or {}).items()}
    _models[name] = _Model(entrypoint, entrypoint.__module__.rpartition(".")[2], cfgs)
    return entrypoint


def _complete(cfg: PretrainedCfg, architecture: str, tag: str) -> PretrainedCfg:
    cfg = replace(cfg, architecture=architecture, tag=tag)
    if cfg.hf_hub_id is not None and cfg.hf_hub_id.endswith("/"):
        cfg = replace(cfg, hf_hub_id=cfg.hf_hub_id + cfg.name)
    return cfg


def group_by_architecture(cfgs: Mapping[str, PretrainedCfg]) -> dict[str, dict[str, PretrainedCfg]]:
    """Turns `{"architecture.tag": cfg}` into `{"architecture": {"tag": cfg}}`, in order."""
    grouped: dict[str, dict[str, PretrainedCfg]] = {}
    for full_name, cfg in cfgs.items():
        name, tag = split_model_name_tag(full_name)
        grouped.setdefault(name, {})[tag] = cfg
    return grouped


# ---- looking up ------------------------------------------------------------------------------------------


def split_model_name_tag(model_name: str) -> tuple[str, str]:
    """`"architecture.tag"` as (architecture, tag), split at the first dot; the tag may be empty."""
    if not isinstance(model_name, str):
        raise TypeError(f"model_name must be a string, got {type(model_name).__name__}")
    name, _, tag = model_name.partition(".")
    return name, tag


def is_model(model_name: str) -> bool:
    """Whether `create_model` knows the architecture; a tag is ignored."""
    return split_model_name_tag(model_name)[0] in _models


def model_entrypoint(model_name: str) -> Callable[..., nn.Module]:
    """The function that makes `model_name`; a tag is ignored.

    Raises:
        RuntimeError: the name is unknown; the message lists close matches.
    """
    return _lookup(split_model_name_tag(model_name)[0]).entrypoint


def get_pretrained_cfg(model_name: str) -> PretrainedCfg | None:
    """What is known of the weights `architecture.tag`, or of the architecture's default ones (None: nothing).

    Raises:
        RuntimeError: the architecture or its tag is unknown.
    """
    name, tag = split_model_name_tag(model_name)
    cfgs = _lookup(name).cfgs
    if not tag:
        return next(iter(cfgs.values()), None)
    if tag not in cfgs:
        known = ", ".join(cfgs) or "none"
        raise RuntimeError(f"{name} has no pretrained tag {tag!r}; known tags: {known}")
    return cfgs[tag]


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    include_tags: bool | None = None,
) -> list[str]:
    """The names of models, in natural order (b2 before b10).

    Args:
        filter: wildcard patterns (`*`, `?`, `[...]`); a name that matches any is listed. Empty: all names.
        module: only models of these modules, e.g. `"efficientnet"`.
        pretrained: only names with known weights.
        exclude_filters: patterns of names to leave out.
        include_tags: list `architecture.tag` names; a pattern without a dot then takes every tag. None: as
            pretrained.
    """
    include, exclude, modules = _as_list(filter), _as_list(exclude_filters), _as_list(module)
    if include_tags is None:
        include_tags = pretrained
    names = []
    for name, model in _models.items():
        if modules and model.module not in modules:
            continue
        if not include_tags:
            weights = any(cfg.has_weights for cfg in model.cfgs.values())
            names += [name] if weights or not pretrained else []
        else:
            names += [cfg.name for cfg in model.cfgs.values() if cfg.has_weights or not pretrained]
            names += [name] if not model.cfgs and not pretrained else []
    return sorted(
        (name for name in names if (not include or _matches(name, include)) and not _matches(name, exclude)),
        key=_natural_key,
    )


def _lookup(name: str) -> _Model:
    if name in _models:
        return _models[name]
    _check_name(name)
    close = difflib.get_close_matches(name, _models, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "bbfast.list_models() lists the names"
    raise RuntimeError(f"unknown model {name!r}; {hint}")


def _check_name(name: str) -> None:
    if not name or not re.fullmatch(r"\w+", name):
        raise ValueError(
            f"model_name {name!r} is not a model's name (letters, digits and underscores, then perhaps "
            ".tag); weights from a file go into checkpoint_path="
        )


def _as_list(patterns: str | Iterable[str]) -> list[str]:
    if not patterns:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _matches(name: str, patterns: list[str]) -> bool:
    architecture = name.partition(".")[0]
    return any(fnmatchcase(name if "." in pattern else architecture, pattern) for pattern in patterns)


def _natural_key(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name.lower()) if part]
