"""What is known of a set of pretrained weights: where they are, and how they must be fed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Other habits: values in -1..1, or as they are.
HALF_MEAN_STD = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
UNIT_MEAN_STD = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

# Where weights can come from, the first that is there; `source` can force one of them.
LOCATIONS = ("state_dict", "file", "hf_hub_id", "url")
_SOURCE_FIELDS = (*LOCATIONS, "hf_hub_filename", "source")
_KEPT_IF_NONE = ("pool_size", "first_conv", "classifier")


@dataclass(frozen=True)
class PretrainedCfg:
    """Where a set of weights is, how it was trained and how it must be fed; the names are timm's.

    Lists become tuples. `replace` makes a copy with other values.

    Attributes:
        url: where a file is, or (url, name of the file in the cache). file: a path. state_dict: the weights themselves.
        hf_hub_id: repository on the Hugging Face hub, perhaps `@revision`; registering completes an `owner/` with
            `architecture.tag`. hf_hub_filename: its file, None for `model.safetensors` or `pytorch_model.bin`.
        source: "hf-hub" or "local-dir" where a model was named so; None takes the first of state_dict, file, hf_hub_id
            and url that is given.
        architecture, tag: the model's name and the weights' name; together `architecture.tag`.
        custom_load: the weights are not a state_dict; bbfast has no such model.
        input_size: (channels, height, width) in pixels; test_input_size: the one for evaluation, if another;
            min_input_size: the smallest. fixed_input_size: the model takes no other, unless told so.
        interpolation, crop_pct, test_crop_pct, crop_mode: how a photo becomes an input.
        mean, std: per input channel, for values in 0..1.
        num_classes: classes of the weights' classifier, without the first label_offset ones, which are no classes.
        label_names, label_descriptions: names of the classes, and what a name means.
        pool_size, test_pool_size: (height, width) of the last feature map at input_size, test_input_size.
        first_conv, classifier: names of the modules that depend on the input channels and on the classes: one name or
            several.
        license, description, origin_url, paper_name, paper_ids, notes: for people.
    """

    url: str | tuple[str, str] | None = None
    file: str | Path | None = None
    state_dict: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    hf_hub_id: str | None = None
    hf_hub_filename: str | None = None

    source: str | None = None
    architecture: str | None = None
    tag: str | None = None
    custom_load: bool | str = False

    input_size: tuple[int, int, int] = (3, 224, 224)
    test_input_size: tuple[int, int, int] | None = None
    min_input_size: tuple[int, int, int] | None = None
    fixed_input_size: bool = False
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    test_crop_pct: float | None = None
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    num_classes: int = 1000
    label_offset: int | None = None
    label_names: tuple[str, ...] | Mapping | None = field(default=None, repr=False)
    label_descriptions: Mapping[str, str] | None = field(default=None, repr=False)

    pool_size: tuple[int, int] | None = None
    test_pool_size: tuple[int, int] | None = None
    first_conv: str | tuple[str, ...] | None = None
    classifier: str | tuple[str, ...] | None = None

    license: str | None = None
    description: str | None = None
    origin_url: str | None = None
    paper_name: str | None = None
    paper_ids: str | tuple[str, ...] | None = None
    notes: tuple[str, ...] | None = None

    def __post_init__(self):
        for name, value in _fields(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.input_size, tuple) or len(self.input_size) != 3:
            raise ValueError(f"input_size={self.input_size!r} of a pretrained_cfg must be (channels, height, width)")

    @property
    def has_weights(self) -> bool:
        """Whether it is known where the weights are."""
        return any(getattr(self, location) for location in LOCATIONS)

    @property
    def name(self) -> str:
        """`architecture.tag`, or one of them, or nothing."""
        return ".".join(part for part in (self.architecture, self.tag) if part)

    def replace(self, **fields) -> PretrainedCfg:
        """A copy with other values.

        Raises:
            TypeError: there is no such field.
        """
        check_fields(fields, "pretrained_cfg_overlay")
        return dataclasses.replace(self, **fields)

    def to_dict(self, remove_source: bool = False, remove_null: bool = True) -> dict:
        """The fields by name, as models carry them in `model.pretrained_cfg`.

        Args:
            remove_source: leave out where the weights are.
            remove_null: leave out what is None; pool_size, first_conv and classifier stay.
        """
        return {
            name: value
            for name, value in _fields(self).items()
            if not (remove_source and name in _SOURCE_FIELDS)
            and not (remove_null and value is None and name not in _KEPT_IF_NONE)
        }


def _fields(cfg: PretrainedCfg) -> dict:
    """`dataclasses.asdict` would copy a state_dict."""
    return {name: getattr(cfg, name) for name in FIELDS}


FIELDS = tuple(entry.name for entry in dataclasses.fields(PretrainedCfg))


def check_fields(fields: Mapping, argument: str) -> None:
    """Raises TypeError if a key is no field of `PretrainedCfg`; `argument` begins the message."""
    for name in fields:
        if name not in FIELDS:
            close = difflib.get_close_matches(str(name), FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(FIELDS)}"
            raise TypeError(f"{argument} has no field {name!r}; {hint}")


@dataclass(frozen=True)
class DefaultCfg:
    """The weights of one architecture.

    Attributes:
        tags: names of the weights, the default first. cfgs: by tag.
    """

    tags: tuple[str, ...] = ()
    cfgs: Mapping[str, PretrainedCfg] = field(default_factory=dict)

    @property
    def is_pretrained(self) -> bool:
        """Whether it is known of any of them where they are."""
        return any(cfg.has_weights for cfg in self.cfgs.values())

    @property
    def default(self) -> PretrainedCfg:
        return self.cfgs[self.tags[0]]

    @property
    def default_with_tag(self) -> tuple[str, PretrainedCfg]:
        return self.tags[0], self.default

    def replace(self, **fields) -> DefaultCfg:
        """A copy with other values."""
        return dataclasses.replace(self, **fields)
