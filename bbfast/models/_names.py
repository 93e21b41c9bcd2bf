"""How models are named: `architecture`, `architecture.tag`, or `source:identifier`."""

from __future__ import annotations

import re

# Other spellings are accepted; see `_SOURCE_ALIASES`.
SOURCES = ("hf-hub", "local-dir")
_SOURCE_ALIASES = {"hf_hub": "hf-hub"}
# Two letters at least: `C:\weights` is a path on Windows.
_SOURCE_PATTERN = re.compile(r"([a-zA-Z][\w+.\-]+):(.*)", re.DOTALL)


def parse_model_name(model_name: str) -> tuple[str | None, str]:
    """(source, identifier) of a name: `"hf-hub:timm/resnet18.a1_in1k"` is `("hf-hub", "timm/resnet18.a1_in1k")`.

    Returns:
        The source is "hf-hub" or "local-dir", or None for the name of a registered model. What follows a source is
        taken as it is.

    Raises:
        TypeError: model_name is no string.
        ValueError: the source is unknown, nothing follows it, or a name without source holds `/`, a backslash or `:`.
    """
    if not isinstance(model_name, str):
        raise TypeError(f"model_name must be a string, got {type(model_name).__name__}")
    match = _SOURCE_PATTERN.fullmatch(model_name)
    if match is None:
        if any(character in model_name for character in "/\\:"):
            raise ValueError(
                f"model_name {model_name!r} is not a model's name; write 'hf-hub:{model_name}' for a repository on the "
                f"Hugging Face hub, 'local-dir:{model_name}' for a folder, or give a file as checkpoint_path="
            )
        return None, model_name
    source = _SOURCE_ALIASES.get(match[1].lower(), match[1].lower())
    if source not in SOURCES:
        raise ValueError(
            f"model_name {model_name!r} has the unknown source {match[1]!r}; allowed: {', '.join(SOURCES)}"
        )
    if not match[2]:
        raise ValueError(f"model_name {model_name!r} names nothing after {match[1]}:")
    return source, match[2]


def split_model_name_tag(model_name: str, no_tag: str = "") -> tuple[str, str]:
    """`"architecture.tag"` as (architecture, tag), split at the first dot; no_tag where there is none."""
    if not isinstance(model_name, str):
        raise TypeError(f"model_name must be a string, got {type(model_name).__name__}")
    name, dot, tag = model_name.partition(".")
    return name, tag if dot else no_tag


def safe_model_name(model_name: str, remove_source: bool = True) -> str:
    """`model_name` as a file's name: every sign that is no letter or digit becomes `_`."""
    name = parse_model_name(model_name)[1] if remove_source else model_name
    return re.sub(r"[\W_]", "_", name).rstrip("_")


def check_architecture(name: str) -> None:
    """Raises ValueError unless `name` could be the name of a registered model."""
    if not re.fullmatch(r"\w+", name):
        raise ValueError(
            f"model_name {name!r} is not a model's name (letters, digits and underscores, then perhaps .tag)"
        )


def natural_key(name: str) -> list[str | int]:
    """Sorts b2 before b10: text and numbers in turns, text first."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name.lower()))]
