"""Feature extractors: a model cut after the last map that is wanted, which hands out maps instead of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_FORMATS = ("NCHW", "NHWC")


# ---- what there is to take -------------------------------------------------------------------------------


class FeatureInfo:
    """What is known of a model's feature maps, and which of them are taken.

    Args:
        info: for each map, in the network's order, `module` (its name in the whole model), `num_chs`, `reduction`
            (pixels of the input per pixel) and what else the family has to say; `index` is added.
        out_indices: the maps that are taken, each once, negative ones from the end; an int for the last so many,
            None for all.

    Raises:
        TypeError, ValueError: out_indices is something else, or not among the maps.
    """

    def __init__(self, info: Sequence[Mapping], out_indices: int | Sequence[int] | None = None):
        self.info = [{**entry, "index": index} for index, entry in enumerate(info)]
        self.out_indices = check_indices("out_indices", out_indices, len(self.info))

    def get(self, key: str, idx: int | Sequence[int] | None = None):
        """Entry `key` of the maps that are taken, as they were asked for; or of map idx, or of several maps."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[index][key] for index in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None):
        """All entries, or those called `keys`, as a dict per map; idx as for `get`."""
        if isinstance(idx, int):
            entry = self.info[idx]
            return entry if keys is None else {key: entry[key] for key in keys}
        return [self.get_dicts(keys, index) for index in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None):
        """Channels; idx as for `get`."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None):
        """Pixels of the input per pixel of the map, along each axis; idx as for `get`."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None):
        """The module whose output the map is, by its name in the whole model; idx as for `get`."""
        return self.get("module", idx)

    def __getitem__(self, index: int) -> dict:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


def check_indices(name: str, indices: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Which of `count` maps are meant: indices, each once, negative ones from the end; an int for the last so many.

    Returns:
        The indices as they came, or all of them for None.

    Raises:
        TypeError, ValueError: `indices`, which the caller calls `name`, is something else, or not among the maps.
    """
    if indices is None:
        return tuple(range(count))
    is_count = isinstance(indices, int) and not isinstance(indices, bool)
    if is_count and 1 <= indices <= count:
        return tuple(range(-indices, 0))
    if not is_count:
        if isinstance(indices, str) or not isinstance(indices, Sequence):
            raise TypeError(f"{name} must be an int or a tuple of ints, got {type(indices).__name__}")
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool):
                raise TypeError(f"{name} must hold ints only, got {index!r}")
        positions = {index % count for index in indices if -count <= index < count}
        if indices and len(positions) == len(indices):
            return tuple(indices)
    raise ValueError(
        f"{name}={indices!r} is not allowed: the model has {count} feature maps; take the last 1 to {count} "
        f"by an int, or different ones by indices in {-count}..{count - 1}"
    )


# ---- extractors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """What runs next: the extractor's `modules`, by their names, as `call(*modules, x)` (None: the one module)."""

    modules: tuple[str, ...]
    call: Callable[..., torch.Tensor] | None
    tap: str | None  # the name under which the result is handed out


class FeatureDictNet(nn.Module):
    """Runs the children of `model` one after the other up to the last map wanted, and returns the maps in a dict.

    The extractor shares its modules with `model` and has their names and state_dict keys, as timm's extractors do; what
    is not needed it leaves out. `load_state_dict` also takes the whole model's weights: it renames what is called
    otherwise here, and passes over what was left out.

    Args:
        model: one whose direct children, or their children where a child is an `nn.Sequential`, run in the order of
            their registration, and whose list `feature_info` names those with maps, see `FeatureInfo`. Where weights
            have other names elsewhere, its attribute `adapt_state_dict` is a function that translates them; one that
            can be pickled and does not hold the model.
        out_indices: see `FeatureInfo`.
        output_fmt: "NCHW" or "NHWC", the layout of the maps; None: the model's own (its `output_fmt`, or "NCHW").
        flatten_sequential: name the children of a Sequential `layers_0` instead of `layers.0`.
        fused: for names of children that follow each other, the function that computes them at once:
            `f(*children, x)`.

    Attributes:
        feature_info: a `FeatureInfo`; its lists are in the order of out_indices. output_fmt: the layout of the maps.
        pretrained_cfg, default_cfg: the same dict, about the weights, without what concerns a classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        out_indices: int | Sequence[int] | None = None,
        output_fmt: str | None = None,
        *,
        flatten_sequential: bool = False,
        fused: Mapping[tuple[str, ...], Callable[..., torch.Tensor]] | None = None,
    ):
        super().__init__()
        self.feature_info = FeatureInfo(getattr(model, "feature_info", ()), out_indices)
        self._model_fmt = getattr(model, "output_fmt", _FORMATS[0])
        self.output_fmt = self._model_fmt if output_fmt is None else output_fmt
        if self.output_fmt not in _FORMATS:
            raise ValueError(f"output_fmt={output_fmt!r} is not allowed; it must be 'NCHW' or 'NHWC'")
        self.in_chans = getattr(model, "in_chans", None)
        self.grad_checkpointing = False
        about_classifier = ("num_classes", "classifier")
        cfg = getattr(model, "pretrained_cfg", {})
        self.pretrained_cfg = {key: value for key, value in cfg.items() if key not in about_classifier}
        self.default_cfg = self.pretrained_cfg
        self._adapt = getattr(model, "adapt_state_dict", None)

        taps = {name: str(index) for name, index in zip(self.feature_info.module_name(), self.feature_info.out_indices)}
        parts = list(_parts(model, taps, flatten_sequential))
        if absent := taps.keys() - {part for part, _, _ in parts}:
            raise ValueError(f"feature_info names {', '.join(sorted(absent))}, which {type(model).__name__} has not")
        end = 1 + max(index for index, (part, _, _) in enumerate(parts) if part in taps)
        for _, own_name, module in parts[:end]:
            self._add(own_name, module)
        # By name in the whole model, the name here; None where there is no such part.
        self._own_names = {part: own_name if index < end else None for index, (part, own_name, _) in enumerate(parts)}
        self._steps = self._plan([part for part, _, _ in parts[:end]], taps, fused or {})

    def _add(self, name: str, module: nn.Module) -> None:
        container, _, child = name.rpartition(".")
        if container and not hasattr(self, container):
            self.add_module(container, nn.Sequential())
        self.get_submodule(container).add_module(child, module)

    def _plan(self, parts: list[str], taps: Mapping[str, str], fused: Mapping) -> list[_Step]:
        steps = []
        while parts:
            run = next((names for names in fused if tuple(parts[: len(names)]) == names), (parts[0],))
            modules = tuple(self._own_names[part] for part in run)
            steps.append(_Step(modules, fused.get(run), taps.get(run[-1])))
            parts = parts[len(run) :]
        return steps

    # ---- forward

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The maps of images `[N, in_chans, H, W]`, in the network's order, by their index in out_indices as a string.

        Maps are contiguous where x is; from channels_last images NCHW maps keep the strides that the network gave them.
        """
        return self._collect(x)

    def _collect(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        images, maps = x, {}
        for index, step in enumerate(self._steps):
            if self.grad_checkpointing and torch.is_grad_enabled() and index > 0:
                x = checkpoint(self._run, step, x, use_reentrant=False)
            else:
                x = self._run(step, x)
            if step.tap is not None:
                maps[step.tap] = self._formatted(x, images)
        return maps

    def _run(self, step: _Step, x: torch.Tensor) -> torch.Tensor:
        modules = [self.get_submodule(name) for name in step.modules]
        return modules[0](x) if step.call is None else step.call(*modules, x)

    def _formatted(self, x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        if self.output_fmt != self._model_fmt:
            x = x.permute((0, 3, 1, 2) if self.output_fmt == "NCHW" else (0, 2, 3, 1))
        return x.contiguous() if images.is_contiguous() else x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether stages recompute their activations in the backward pass instead of keeping them.

        Outputs and gradients stay the same. BatchNorm's running statistics take the batch in twice, as in timm.
        """
        self.grad_checkpointing = enable

    # ---- weights

    def adapt_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The extractor's part, under its names, of its own, the whole model's, or any state_dict which that reads."""
        if self._adapt is not None:
            state_dict = self._adapt(state_dict)
        return {own: value for key, value in state_dict.items() if (own := self._own_key(key)) is not None}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            own = self._own_key(key.removeprefix(prefix))
            if own is None:
                del state_dict[key]
            elif prefix + own != key:
                state_dict[prefix + own] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _own_key(self, key: str) -> str | None:
        for part, own_name in self._own_names.items():
            if key.startswith(part + "."):
                return None if own_name is None else own_name + key.removeprefix(part)
        return key

    def extra_repr(self) -> str:
        return f"out_indices={self.feature_info.out_indices}, output_fmt={self.output_fmt!r}"


class FeatureListNet(FeatureDictNet):
    """`FeatureDictNet` that returns the maps in a list."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps of images `[N, in_chans, H, W]`, in the network's order (whatever the order of out_indices).

        Maps are contiguous where x is; from channels_last images NCHW maps keep the strides that the network gave them.
        """
        return list(self._collect(x).values())


def _parts(model: nn.Module, taps: Mapping[str, str], flatten: bool):
    """(name, name in the extractor, module) of what runs as a whole: children, or those of a Sequential."""
    for name, child in model.named_children():
        tapped_inside = any(tap.startswith(f"{name}.") for tap in taps)
        if isinstance(child, nn.Sequential) and (flatten or tapped_inside):
            for inner_name, inner in child.named_children():
                yield f"{name}.{inner_name}", f"{name}_{inner_name}" if flatten else f"{name}.{inner_name}", inner
        else:
            yield name, name, child


FEATURE_CLASSES = {"list": FeatureListNet, "dict": FeatureDictNet}


def resolve_feature_cls(feature_cls: str | type[FeatureDictNet]) -> type[FeatureDictNet]:
    """The class called `feature_cls`, or feature_cls itself if it is one.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(feature_cls, type) and issubclass(feature_cls, FeatureDictNet):
        return feature_cls
    allowed = f"allowed: {', '.join(map(repr, FEATURE_CLASSES))}, FeatureDictNet and classes derived from it"
    if not isinstance(feature_cls, str):
        raise TypeError(f"feature_cls={feature_cls!r} is no string and no feature extractor; {allowed}")
    if feature_cls.lower() not in FEATURE_CLASSES:
        raise ValueError(f"feature_cls={feature_cls!r} is not known; {allowed}")
    return FEATURE_CLASSES[feature_cls.lower()]
