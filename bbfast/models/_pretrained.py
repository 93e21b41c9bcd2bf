"""What is known of a set of pretrained weights, and how weights get into a model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Other habits: values in -1..1, or as they are.
HALF_MEAN_STD = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
UNIT_MEAN_STD = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

# Checkpoints of training scripts keep the weights under one of these, the averaged ones first.
_WRAPPER_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
# DistributedDataParallel and torch.compile each put a prefix before every key, in either order.
_WRAPPER_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
_HUB_FILE = "model.safetensors"


@dataclass(frozen=True)
class PretrainedCfg:
    """How a set of weights was trained and must be fed; the names are timm's.

    Attributes:
        architecture, tag: the model's name and the weights' name; together `architecture.tag`.
        hf_hub_id: repository on the Hugging Face hub, or None where no weights exist; registering completes
            an `owner/` with `architecture.tag`.
        input_size: (channels, height, width) in pixels; test_input_size: the one for evaluation, if another.
        pool_size: (height, width) of the last feature map at input_size.
        interpolation, crop_pct, test_crop_pct, crop_mode: how a photo becomes an input.
        mean, std: per input channel, for values in 0..1.
        num_classes: classes of the weights' classifier.
        fixed_input_size: the model is made for input_size and takes no other, unless told so.
        first_conv, classifier: names of the modules that depend on the input channels and on the classes.
    """

    architecture: str = ""
    tag: str = ""
    hf_hub_id: str | None = None
    input_size: tuple[int, int, int] = (3, 224, 224)
    test_input_size: tuple[int, int, int] | None = None
    pool_size: tuple[int, int] | None = None
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    test_crop_pct: float | None = None
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    num_classes: int = 1000
    fixed_input_size: bool = False
    first_conv: str | None = None
    classifier: str | None = None

    @property
    def has_weights(self) -> bool:
        return self.hf_hub_id is not None

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture

    def to_dict(self) -> dict:
        """The fields that say something, as models carry them in `model.pretrained_cfg`."""
        always = ("pool_size", "first_conv", "classifier")
        return {key: value for key, value in asdict(self).items() if value is not None or key in always}


# ---- weights from the Hugging Face hub -------------------------------------------------------------------


def load_pretrained(model: nn.Module, cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> None:
    """Downloads the weights that `cfg` names (or finds them in the hub's cache) and loads them into `model`.

    The first convolution is adapted to the model's `in_chans` (one channel gets the sum over the input
    channels, more get the filters repeated and rescaled); a classifier for another number of classes is left
    as it is.

    Raises:
        RuntimeError: no weights are known, or they cannot be fetched.
        ValueError: the weights do not fit the model.
    """
    if not cfg.has_weights:
        raise RuntimeError(
            f"no pretrained weights exist for {cfg.name or type(model).__name__}; use pretrained=False, or "
            "checkpoint_path= for weights of your own"
        )
    path = _download(cfg, cache_dir)
    state_dict = _adapt(read_checkpoint(path, argument=f"the weights of {cfg.name}"), model)
    own = model.state_dict()
    left_as_is = set()
    if cfg.first_conv is not None:
        _adapt_first_conv(state_dict, f"{cfg.first_conv}.weight", own)
    if cfg.classifier is not None and model.num_classes != cfg.num_classes:
        left_as_is = {f"{cfg.classifier}.weight", f"{cfg.classifier}.bias"}
        for key in left_as_is:
            state_dict.pop(key, None)
    _check_fits(state_dict, own, f"the weights of {cfg.name}", may_miss=left_as_is)
    model.load_state_dict(state_dict, strict=False)


def _download(cfg: PretrainedCfg, cache_dir) -> str:
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise RuntimeError("pretrained=True needs the package huggingface_hub, which is not installed") from error
    try:
        return hf_hub_download(cfg.hf_hub_id, _HUB_FILE, cache_dir=cache_dir)
    except Exception as error:  # the hub's own, requests' and httpx's errors have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"the pretrained weights of {cfg.name} could not be fetched from {cfg.hf_hub_id} on the "
            f"Hugging Face hub ({reason}); use checkpoint_path= for a file, or pretrained=False"
        ) from error


def _adapt_first_conv(state_dict: dict, key: str, own: Mapping) -> None:
    weight = state_dict.get(key)
    if weight is None or key not in own:
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


# ---- weights from a file ---------------------------------------------------------------------------------


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
    if not isinstance(checkpoint_path, (str, Path)):
        raise TypeError(f"checkpoint_path must be a path, got {type(checkpoint_path).__name__}")
    path = Path(checkpoint_path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"checkpoint_path: there is no file {path}")
    if not path.is_file():
        raise ValueError(f"checkpoint_path: {path} is not a file")
    state_dict = _adapt(read_checkpoint(path, argument=f"checkpoint_path: {path}"), model)
    _check_fits(state_dict, model.state_dict(), f"checkpoint_path: {path}")
    model.load_state_dict(state_dict, strict=False)


def _adapt(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """With the model's own keys and sizes, where the model knows of files that have others."""
    return model.adapt_state_dict(state_dict) if hasattr(model, "adapt_state_dict") else state_dict


def read_checkpoint(path: str | Path, *, argument: str) -> dict[str, torch.Tensor]:
    """The tensors by name that a checkpoint file holds, unwrapped; `argument` begins the error messages."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{argument} is not a checkpoint that can be read safely (tensors and plain containers only): "
            f"{_first_line(error)}"
        ) from error
    except Exception as error:  # a damaged file can fail in any layer: zip, pickle, header, dtype
        raise ValueError(f"{argument} cannot be read as a checkpoint: {_first_line(error)}") from error
    return _unwrap(content, argument)


def _first_line(error: Exception) -> str:
    """What went wrong; the exception's name too where its message is only a key or a number."""
    line = str(error).strip().partition("\n")[0]
    return line if " " in line else f"{type(error).__name__} {line}".strip()


def _unwrap(content, argument: str) -> dict[str, torch.Tensor]:
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


def _check_fits(state_dict: Mapping, own: Mapping, argument: str, may_miss: frozenset | set = frozenset()) -> None:
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
