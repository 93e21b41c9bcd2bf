"""How pretrained weights get into a model that may have other channels and classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from bbfast.models._checkpoint import adapt, check_fits, existing_file, read_checkpoint, unwrap
from bbfast.models._download import download_url
from bbfast.models._hub import download_from_hub
from bbfast.models._hub_folder import weights_in_folder, weights_on_hub
from bbfast.models._pretrained import LOCATIONS, PretrainedCfg

_IF_DAMAGED = "; delete it, and it is fetched anew"


def load_pretrained(model: nn.Module, cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> None:
    """Finds the weights that `cfg` names, where need be on the net, and loads them into `model`.

    The first convolution is adapted to the model's `in_chans` (one channel gets the sum over the input channels, more
    get the filters repeated and rescaled); a classifier for another number of classes is left as it is.

    Args:
        model: with `num_classes`, and with `adapt_state_dict` where it can read other weights than its own.
        cfg: the weights are its state_dict, else its file, else on the hub, else at its url, unless its source says
            which.
        cache_dir: for what comes from the net; None is the hub's or torch.hub's own cache.

    Raises:
        RuntimeError: no weights are known, or they cannot be fetched.
        FileNotFoundError: the file or folder is not there.
        ValueError: the weights cannot be read, or do not fit the model.
    """
    location = check_loadable(cfg)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("pretrained=True cannot fill a model on the meta device; make it on another one")
    state_dict, argument = _read(cfg, location, cache_dir)
    state_dict = adapt(state_dict, model)
    own = model.state_dict()
    for name in _names(cfg.first_conv):
        _adapt_first_conv(state_dict, f"{name}.weight", own)
    left_as_is = set()
    for key in (f"{name}.{part}" for name in _names(cfg.classifier) for part in ("weight", "bias")):
        if getattr(model, "num_classes", cfg.num_classes) != cfg.num_classes:
            left_as_is.add(key)
            state_dict.pop(key, None)
        elif cfg.label_offset and key in state_dict:
            state_dict[key] = state_dict[key][cfg.label_offset :]
    check_fits(state_dict, own, argument, may_miss=left_as_is)
    model.load_state_dict(state_dict, strict=False)


def check_loadable(cfg: PretrainedCfg) -> str:
    """Where the weights are, one of `LOCATIONS`, or "folder".

    Raises:
        RuntimeError: nobody knows, or they are of a kind that bbfast does not read.
    """
    if cfg.custom_load:
        raise RuntimeError(f"the pretrained weights of {cfg.name} are no state_dict (custom_load), which bbfast needs")
    if cfg.source == "local-dir" and cfg.file:
        return "folder"
    if cfg.source == "hf-hub" and cfg.hf_hub_id:
        return "hf_hub_id"
    for location in LOCATIONS:
        if getattr(cfg, location):
            return location
    raise RuntimeError(
        f"no pretrained weights exist for {cfg.name or 'this model'}; use pretrained=False, or "
        "checkpoint_path= for weights of your own"
    )


def _read(cfg: PretrainedCfg, location: str, cache_dir: str | Path | None) -> tuple[dict[str, torch.Tensor], str]:
    """The weights, and how messages shall call them."""
    if location == "state_dict":
        argument = "the state_dict of pretrained_cfg"
        return unwrap(cfg.state_dict, argument), argument
    if_damaged = ""
    if location == "folder":
        path = weights_in_folder(cfg.file)
        argument = f"local-dir: {path}"
    elif location == "file":
        path = existing_file(cfg.file, "the file of pretrained_cfg")
        argument = f"the file of pretrained_cfg: {path}"
    else:
        path, if_damaged = _download(cfg, location, cache_dir), _IF_DAMAGED
        argument = f"the weights of {cfg.name}: {path}"
    return read_checkpoint(path, argument=argument, if_damaged=if_damaged), argument


def _download(cfg: PretrainedCfg, location: str, cache_dir: str | Path | None) -> Path:
    try:
        if location == "hf_hub_id":
            return download_from_hub(cfg.hf_hub_id, weights_on_hub(cfg.hf_hub_filename), cache_dir)
        return download_url(cfg.url, cache_dir)
    except RuntimeError as error:
        raise RuntimeError(
            f"the pretrained weights of {cfg.name}: {error}; use checkpoint_path= for a file, or pretrained=False"
        ) from error


def _names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def _adapt_first_conv(state_dict: dict, key: str, own: Mapping) -> None:
    weight = state_dict.get(key)
    if weight is None or key not in own or weight.dim() != 4:
        return
    source, wanted = weight.shape[1], own[key].shape[1]
    if source == wanted:
        return
    adapted = weight.float()
    if wanted == 1:
        adapted = adapted.sum(dim=1, keepdim=True)
    else:
        repeats = -(-wanted // source)
        adapted = adapted.repeat(1, repeats, 1, 1)[:, :wanted] * (source / wanted)
    state_dict[key] = adapted.to(weight.dtype)
