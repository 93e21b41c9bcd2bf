"""The folder in which timm and bbfast keep a model, on disk or on the hub: `config.json` and a file of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bbfast.models._hub import download_from_hub
from bbfast.models._pretrained import FIELDS, LOCATIONS, PretrainedCfg

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_PICKLED_WEIGHTS_FILE = "pytorch_model.bin"
# In a folder of this machine any of these will do, the first first; then any file that ends so.
_KNOWN_FILES = (WEIGHTS_FILE, _PICKLED_WEIGHTS_FILE, "pytorch_model.pth", "model.pth")
_KNOWN_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin")


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json` says: which model, about its weights, and with which arguments it was made."""

    architecture: str
    pretrained_cfg: PretrainedCfg
    model_args: Mapping[str, Any] = field(default_factory=dict)


def load_model_config(source: str, identifier: str, cache_dir: str | Path | None = None) -> ModelConfig:
    """The configuration of the model `source:identifier`.

    Args:
        source: "hf-hub" or "local-dir". identifier: the repository, or the folder.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: it is no JSON, or names no architecture.
        RuntimeError: the hub has it not, or cannot be reached.
    """
    if source == "hf-hub":
        path = download_from_hub(identifier, (CONFIG_FILE,), cache_dir)
        location = {"source": source, "hf_hub_id": identifier}
    else:
        folder = Path(identifier).expanduser()
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{source}:{identifier} has no {CONFIG_FILE}: there is no file {path}")
        location = {"source": source, "file": str(folder)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{source}:{identifier}: {path} is not JSON: {error}") from error
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, str):
        raise ValueError(f"{source}:{identifier}: {path} names no architecture")
    for name in ("pretrained_cfg", "model_args"):
        if not isinstance(content.get(name) or {}, dict):
            raise ValueError(f"{source}:{identifier}: {name} in {path} is no object")
    return _parse(architecture, content, location)


def _parse(architecture: str, content: dict, location: dict) -> ModelConfig:
    about = content.get("pretrained_cfg")
    if about is None:  # old files have no levels
        about = {"label_names": content.get("labels"), **content}
    # Newer versions of timm may say more. Where the weights are is known; a file of others must not choose it.
    fields = {name: value for name, value in about.items() if name in FIELDS and name not in LOCATIONS}
    # What is said of the model as a whole wins.
    whole = ("num_classes", "label_names", "label_descriptions")
    fields |= {name: content[name] for name in whole if content.get(name) is not None}
    model_args = {key: _with_tuples(value) for key, value in (content.get("model_args") or {}).items()}
    fields |= _adjusted(PretrainedCfg(**fields), model_args)
    return ModelConfig(architecture, PretrainedCfg(**{**fields, **location, "architecture": architecture}), model_args)


def _adjusted(cfg: PretrainedCfg, model_args: dict) -> dict:
    """The sizes of the images that a model made with `model_args` was trained for."""
    channels, size = cfg.input_size[0], cfg.input_size[1:]
    fixed = cfg.fixed_input_size
    if model_args.get("dynamic_img_size") or model_args.get("strict_img_size") is False:
        fixed = False
    if model_args.get("in_chans") is not None:
        channels = model_args["in_chans"]
    if fixed and model_args.get("img_size") is not None:
        img_size = model_args["img_size"]
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
    others = {name: getattr(cfg, name) for name in ("test_input_size", "min_input_size")}
    return {
        "fixed_input_size": fixed,
        "input_size": (channels, *size),
        **{name: None if other is None else (channels, *other[1:]) for name, other in others.items()},
    }


def _with_tuples(value):
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def weights_on_hub(hf_hub_filename: str | None) -> tuple[str, ...]:
    """The names under which a repository may have its weights, safetensors first."""
    name = hf_hub_filename or _PICKLED_WEIGHTS_FILE
    if not name.endswith(".bin"):
        return (name,)
    return name.replace("pytorch_model.bin", WEIGHTS_FILE).replace(".bin", ".safetensors"), name


def weights_in_folder(folder: str | Path) -> Path:
    """The file of weights in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(folder).expanduser()
    for name in _KNOWN_FILES:
        if (folder / name).is_file():
            return folder / name
    for suffix in _KNOWN_SUFFIXES:
        if found := sorted(path for path in folder.glob(f"*{suffix}") if path.is_file()):
            return found[0]
    raise FileNotFoundError(f"local-dir:{folder} holds no weights: no {WEIGHTS_FILE}, *.pth or *.bin")
