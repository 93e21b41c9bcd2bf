"""The models that can be made by name, and the pretrained weights known for each."""

from __future__ import annotations

import difflib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bbfast.models._names import check_architecture, natural_key, split_model_name_tag
from bbfast.models._pretrained import DefaultCfg, PretrainedCfg, check_fields


@dataclass(frozen=True)
class _Model:
    entrypoint: Callable[..., nn.Module]
    module: str  # last part of the module's name, e.g. "efficientnet"
    weights: DefaultCfg = field(default_factory=DefaultCfg)

    def cfgs_by_name(self) -> dict[str, PretrainedCfg]:
        """By `architecture.tag`, the default first."""
        return {cfg.name: cfg for cfg in self.weights.cfgs.values()}


@dataclass(frozen=True)
class _Deprecated:
    module: str
    replacement: str | None  # `architecture` or `architecture.tag`; None: the model was removed


_models: dict[str, _Model] = {}
_deprecated: dict[str, _Deprecated] = {}


class UnknownModelError(RuntimeError, KeyError):
    """No model has this name."""

    __str__ = Exception.__str__  # KeyError's would quote the message


# ---- registering -----------------------------------------------------------------------------------------


def register_model(
    entrypoint: Callable[..., nn.Module] | None = None,
    *,
    pretrained_cfgs: DefaultCfg | Mapping[str, PretrainedCfg] | None = None,
):
    """Decorator that makes a function available to `create_model` under its own name.

    Args:
        entrypoint: `f(pretrained=False, **model_arguments) -> nn.Module`. One with pretrained_cfgs is also
            given `pretrained_cfg=`, the chosen one.
        pretrained_cfgs: by tag, the default first. Architecture and tag are filled in. None: what the module of the
            function has under its name in a dict `default_cfgs`, see `generate_default_cfgs`.

    Returns:
        The entrypoint itself. A name that was taken is overwritten, with a warning.

    Example:
        >>> @bbfast.register_model
        ... def tiny_net(pretrained=False, num_classes=1000):
        ...     return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
        >>> model = bbfast.create_model("tiny_net", num_classes=10)
    """
    if entrypoint is None:
        return functools.partial(register_model, pretrained_cfgs=pretrained_cfgs)
    if not callable(entrypoint):
        raise TypeError(f"register_model takes a function, got {type(entrypoint).__name__}")
    name = entrypoint.__name__
    check_architecture(name)
    if name in _models:
        warnings.warn(f"model {name} was registered before and is now overwritten", UserWarning, stacklevel=2)
    if pretrained_cfgs is None:
        module = sys.modules.get(entrypoint.__module__)
        pretrained_cfgs = getattr(module, "default_cfgs", {}).get(name, {})
    if not isinstance(pretrained_cfgs, DefaultCfg):
        pretrained_cfgs = DefaultCfg(tuple(pretrained_cfgs), pretrained_cfgs)
    cfgs = {tag: _complete(pretrained_cfgs.cfgs[tag], name, tag) for tag in pretrained_cfgs.tags}
    _models[name] = _Model(entrypoint, _last_part(entrypoint.__module__), DefaultCfg(tuple(cfgs), cfgs))
    _deprecated.pop(name, None)
    return entrypoint


def _complete(cfg: PretrainedCfg, architecture: str, tag: str) -> PretrainedCfg:
    cfg = cfg.replace(architecture=architecture, tag=tag or None)
    if cfg.hf_hub_id is not None and cfg.hf_hub_id.endswith("/"):
        cfg = cfg.replace(hf_hub_id=cfg.hf_hub_id + cfg.name)
    return cfg


def _last_part(module: str) -> str:
    return module.rpartition(".")[2]


def generate_default_cfgs(cfgs: Mapping[str, PretrainedCfg | Mapping[str, Any]]) -> dict[str, DefaultCfg]:
    """Groups `{"architecture.tag": cfg}` by architecture.

    The default is the first that has weights; a name without a tag that has weights, or a tag that ends in `*`, goes
    before.
    """
    grouped: dict[str, dict[str, PretrainedCfg]] = {}
    marked: dict[str, str] = {}
    for full_name, cfg in cfgs.items():
        name, tag = split_model_name_tag(full_name)
        if not isinstance(cfg, PretrainedCfg):
            check_fields(cfg, f"the cfg of {full_name}")
            cfg = PretrainedCfg(**cfg)
        if (cfg.has_weights and not tag) or (tag.endswith("*") and name not in marked):
            marked[name] = tag.rstrip("*")
        grouped.setdefault(name, {})[tag.rstrip("*")] = cfg
    return {name: _default_first(by_tag, marked.get(name)) for name, by_tag in grouped.items()}


def _default_first(by_tag: dict[str, PretrainedCfg], default: str | None) -> DefaultCfg:
    if default is None:
        default = next((tag for tag, cfg in by_tag.items() if cfg.has_weights), next(iter(by_tag)))
    tags = (default, *(tag for tag in by_tag if tag != default))
    return DefaultCfg(tags, {tag: by_tag[tag] for tag in tags})


def register_model_deprecations(module_name: str, deprecation_map: Mapping[str, str | None]) -> None:
    """Lets old names of models go on working, with a warning; no list shows them.

    Args:
        module_name: the module that registers the models, its `__name__`.
        deprecation_map: by old name, the `architecture` or `architecture.tag` that took its place, or None for a model
            that was removed.

    Raises:
        RuntimeError: a replacement is not registered, or has not this tag.

    Example:
        >>> register_model_deprecations(__name__, {"swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k"})
    """
    for name, replacement in deprecation_map.items():
        check_architecture(name)
        if replacement is not None:
            _lookup(split_model_name_tag(replacement)[0])
            get_pretrained_cfg(replacement)
        _models.pop(name, None)
        _deprecated[name] = _Deprecated(_last_part(module_name), replacement)


def current_name(model_name: str, stacklevel: int = 2) -> str:
    """`model_name`, or what took its place, with a warning; a tag of its own stays.

    Raises:
        RuntimeError: the model was removed, and nothing took its place.
    """
    name, tag = split_model_name_tag(model_name)
    if name not in _deprecated:
        return model_name
    replacement = _deprecated[name].replacement
    if replacement is None:
        raise RuntimeError(f"model {name} was removed, and no other took its place")
    if tag:
        replacement = f"{split_model_name_tag(replacement)[0]}.{tag}"
    warnings.warn(f"model {name} is now called {replacement}", UserWarning, stacklevel=stacklevel + 1)
    return replacement


# ---- looking up ------------------------------------------------------------------------------------------


def is_model(model_name: str) -> bool:
    """Whether `create_model` knows the architecture, by this or by a later name; a tag is ignored."""
    name = split_model_name_tag(model_name)[0]
    return name in _models or name in _deprecated


def is_model_in_modules(model_name: str, module_names: str | Iterable[str]) -> bool:
    """Whether one of the modules, e.g. "efficientnet", registers the architecture; a tag is ignored."""
    return _module_of(split_model_name_tag(model_name)[0]) in _as_list(module_names)


def is_model_pretrained(model_name: str) -> bool:
    """Whether weights are known for exactly this name; without a tag, whether the default ones are."""
    name = split_model_name_tag(model_name)[0]
    model = _models.get(name)
    return model is not None and model_name in _names_with_weights(name, model)


def model_entrypoint(model_name: str, module_filter: str | None = None) -> Callable[..., nn.Module]:
    """The function that makes `model_name`; a tag is ignored.

    Args:
        module_filter: the module that must register it.

    Raises:
        UnknownModelError: (a RuntimeError and a KeyError) the name is unknown; the message lists close matches.
        RuntimeError: another module registers it.
    """
    name = split_model_name_tag(model_name)[0]
    if module_filter and _module_of(name) != module_filter:
        raise RuntimeError(f"model {name!r} is not in the module {module_filter!r}")
    if name in _deprecated:
        return functools.partial(_make_replacement, name)
    return _lookup(name).entrypoint


def _make_replacement(name: str, pretrained: bool = False, **arguments) -> nn.Module:
    architecture, tag = split_model_name_tag(current_name(name))
    if tag and not arguments.get("pretrained_cfg"):
        arguments["pretrained_cfg"] = tag
    return _lookup(architecture).entrypoint(pretrained=pretrained, **arguments)


def get_pretrained_cfg(model_name: str, allow_unregistered: bool = True) -> PretrainedCfg | None:
    """What is known of the weights `architecture.tag`, or of the architecture's default ones.

    Returns:
        None where nothing is known of the architecture, if allow_unregistered.

    Raises:
        RuntimeError: the architecture has no such tag; or nothing is known of it, and this is not allowed.

    Example:
        >>> bbfast.models.get_pretrained_cfg("efficientnet_b0.ra_in1k").input_size
        (3, 224, 224)
    """
    name, tag = split_model_name_tag(model_name)
    weights = _models[name].weights if name in _models else DefaultCfg()
    if not tag and weights.tags:
        return weights.default
    if tag and tag in weights.cfgs:
        return weights.cfgs[tag]
    if tag and name in _models:
        known = ", ".join(filter(None, weights.tags)) or "none"
        raise RuntimeError(f"{name} has no pretrained tag {tag!r}; known tags: {known}")
    if allow_unregistered:
        return None
    raise RuntimeError(f"no pretrained_cfg is known for {name!r}")


def get_pretrained_cfg_value(model_name: str, cfg_key: str) -> Any | None:
    """One field of `get_pretrained_cfg`, None if there is no such field.

    Raises:
        RuntimeError: the architecture or its tag is unknown.
    """
    return getattr(get_pretrained_cfg(model_name, allow_unregistered=False), cfg_key, None)


def get_arch_pretrained_cfgs(model_name: str) -> dict[str, PretrainedCfg]:
    """What is known of all weights of the architecture, by `architecture.tag`; a tag is ignored."""
    model = _models.get(split_model_name_tag(model_name)[0])
    return {} if model is None else model.cfgs_by_name()


def _lookup(name: str) -> _Model:
    if name in _models:
        return _models[name]
    check_architecture(name)
    close = difflib.get_close_matches(name, _models, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "bbfast.list_models() lists the names"
    raise UnknownModelError(f"unknown model {name!r}; {hint}")


def _module_of(name: str) -> str | None:
    entry = _models.get(name) or _deprecated.get(name)
    return None if entry is None else entry.module


# ---- lists -----------------------------------------------------------------------------------------------


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """The names of models, in natural order (b2 before b10); no deprecated ones.

    Args:
        filter: wildcard patterns (`*`, `?`, `[...]`); a name that matches any is listed. Empty: all names.
        module: only models of these modules, e.g. "efficientnet".
        pretrained: only names with known weights.
        exclude_filters: patterns of names to leave out.
        name_matches_cfg: only names with a pretrained_cfg.
        include_tags: list `architecture.tag` names; a pattern without a dot then takes every tag. None: as
            pretrained.

    Example:
        >>> bbfast.list_models("mobilenetv3_small*", exclude_filters="*_050")
        ['mobilenetv3_small_075', 'mobilenetv3_small_100']
    """
    include, exclude, modules = _as_list(filter), _as_list(exclude_filters), _as_list(module)
    if include_tags is None:
        include_tags = pretrained
    if include_tags:
        include, exclude = _of_any_tag(include), _of_any_tag(exclude)
    names: set[str] = set()
    for name, model in _models.items():
        if modules and model.module not in modules:
            continue
        cfgs = model.cfgs_by_name()
        own = set(cfgs or (name,)) if include_tags else {name}
        if pretrained:
            own &= _names_with_weights(name, model)
        if name_matches_cfg and not cfgs:
            continue
        names |= own
    listed = (name for name in names if (not include or _matches(name, include)) and not _matches(name, exclude))
    return sorted(listed, key=natural_key)


def list_pretrained(filter: str | Iterable[str] = "", exclude_filters: str | Iterable[str] = "") -> list[str]:
    """The `architecture.tag` names of all known weights; see `list_models`.

    Example:
        >>> bbfast.list_pretrained("swin_tiny*", exclude_filters="*in22k")
        ['swin_tiny_patch4_window7_224.ms_in1k', 'swin_tiny_patch4_window7_224.ms_in22k_ft_in1k']
    """
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


def list_modules() -> list[str]:
    """The modules that register models, e.g. "efficientnet", sorted."""
    return sorted({entry.module for entry in (*_models.values(), *_deprecated.values())})


def get_deprecated_models(module: str = "") -> dict[str, str | None]:
    """By old name, what took its place (None: nothing); of one module, or of all."""
    return {name: old.replacement for name, old in _deprecated.items() if module in ("", old.module)}


def _names_with_weights(name: str, model: _Model) -> set[str]:
    """`architecture.tag` of all weights, and the architecture's own name if the default is one of them."""
    names = {full_name for full_name, cfg in model.cfgs_by_name().items() if cfg.has_weights}
    return names | {name} if model.weights.tags and model.weights.default.has_weights else names


def _as_list(patterns: str | Iterable[str]) -> list[str]:
    if not patterns:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _of_any_tag(patterns: list[str]) -> list[str]:
    """Patterns without a tag, and the same with every tag."""
    expanded = []
    for pattern in patterns:
        name, tag = split_model_name_tag(pattern)
        expanded += [pattern] if tag else [f"{name}.*", pattern]
    return expanded


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
