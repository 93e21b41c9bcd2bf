"""Launch configurations that were measured on a named GPU; where there are none, the heuristics decide.

A file `KERNEL.GPU.json` in one of `folders()` holds what was measured for one of NAMES on one kind of GPU:

    {"gpu": "NVIDIA H100 80GB HBM3", "facts": {...},
     "configs": [{"key": {...}, "config": {...} or null, "ms": 0.1, "heuristic_ms": 0.12, "versions": {...}}]}

The key is the problem as the heuristic sees it, to the number; null says that nothing beat the heuristic. Files are
read at the first launch on a GPU, and a wrong one is an error then: a configuration that cannot be, silently left out,
would never be missed. Launches elsewhere (the interpreter, meta tensors) look nothing up.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .integers import is_power_of_2

# The files whose kernels have tunable launches; each defines one Tunable of its name.
NAMES = (
    *("add_layer_norm", "batch_norm_act", "batch_statistics"),
    *("depthwise_conv_bn_act", "drop_path_add", "mlp", "pointwise", "window_attention"),
)
# The files with a `forward`, and perhaps a `backward`, that launch them.
LAUNCHERS = (
    *("add_layer_norm", "batch_norm_act", "conv_bn_act", "depthwise_conv_bn_act"),
    *("drop_path_add", "linear_act", "mlp", "window_attention"),
)
PACKAGED = Path(__file__).parent
# Beyond so many problems in one process (sizes that change from call to call) choices are made anew.
MOST_CHOICES = 4096


def _only_packaged() -> Sequence[Path]:
    return (PACKAGED,)


# Where files are looked for, the first folder first. Who uses this package may put another function here.
folders: Callable[[], Sequence[Path]] = _only_packaged

_intercept: Callable[[Tunable, Any, Callable[[], Any]], Any] | None = None
_generation = 0


class Tunable:
    """The launch configurations of one file of kernels.

    Args:
        name: one of NAMES.
        key_type: a NamedTuple of str, int and bool: all that a choice may depend on.
        config_type: a frozen dataclass of int.
        neighbours: configurations worth a try around a given one; some may be objected to.
        objection: why a configuration cannot be used for a key, or None.
    """

    def __init__(
        self,
        name: str,
        key_type: type[tuple],
        config_type: type,
        neighbours: Callable[[Any, Any], Iterable[Any]],
        objection: Callable[[Any, Any], str | None],
    ):
        self.name, self.key_type, self.config_type = name, key_type, config_type
        self._neighbours, self._objection = neighbours, objection
        self._tables: dict[str, dict] = {}
        self._choices: dict[tuple, Any] = {}

    def config(self, x: torch.Tensor, key: Any, heuristic: Callable[[], Any]) -> Any:
        """The configuration for `key` on x's GPU: what was measured there, or else what `heuristic` says.

        Raises:
            ValueError: a file for this GPU is not as it should be.
        """
        if _intercept is not None:
            return _intercept(self, key, heuristic)
        if not x.is_cuda:
            return heuristic()
        if isinstance(x, FakeTensor):  # stands for a tensor on a GPU that may be called otherwise next time
            return self._measured(x.get_device()).get(key) or heuristic()
        place = (x.get_device(), key)
        choice = self._choices.get(place)
        if choice is None:
            if len(self._choices) >= MOST_CHOICES:
                self._choices.clear()
            choice = self._choices[place] = self._measured(place[0]).get(key) or heuristic()
        return choice

    def _measured(self, device: int) -> dict:
        gpu = torch.cuda.get_device_name(device)
        if gpu not in self._tables:
            self._tables[gpu] = self.load(gpu)
        return self._tables[gpu]

    def load(self, gpu: str) -> dict:
        """All that was measured on this kind of GPU, by key; folders that come first win."""
        found = {}
        for path in reversed(files(self.name, gpu)):
            found |= {entry.key: entry.config for entry in read(path, self, gpu)}
        return found

    def forget(self) -> None:
        """Lets files and heuristics be asked again."""
        global _generation
        self._tables.clear()
        self._choices.clear()
        _generation += 1

    def neighbours(self, key: Any, config: Any) -> list:
        """Other configurations near `config` that can be used for `key`, each once."""
        near = dict.fromkeys(self._neighbours(key, config))
        return [other for other in near if other != config and self.objection(key, other) is None]

    def objection(self, key: Any, config: Any) -> str | None:
        """Why `config` cannot be used for `key`, or None."""
        for name, value in asdict(config).items():
            if value < 1:
                return f"{name}={value}; it must be at least 1"
        if not is_power_of_2(config.num_warps) or config.num_warps > 32:
            return f"num_warps={config.num_warps}; allowed are 1, 2, 4, 8, 16 and 32"
        return self._objection(key, config)


def tunables() -> dict[str, Tunable]:
    """All of them by name; imports the kernels, and with them Triton."""
    return {name: importlib.import_module(f".{name}", __package__).TUNABLE for name in NAMES}


@contextlib.contextmanager
def intercepting(choose: Callable[[Tunable, Any, Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside, `choose(tunable, key, heuristic)` decides about every launch of the process, on any device."""
    global _intercept
    before, _intercept = _intercept, choose
    try:
        yield
    finally:
        _intercept = before


def is_intercepting() -> bool:
    """Whether somebody decides about every launch, with `intercepting`."""
    return _intercept is not None


def generation() -> int:
    """How often a choice was forgotten: configurations that were taken before may be others now."""
    return _generation


# ---- what the kernels' files say their candidates with -----------------------------------------------------


def halved_and_doubled(config: Any, *names: str) -> Iterator[Any]:
    """`config` with one of its fields half and twice as large."""
    for name in names:
        value = getattr(config, name)
        yield from (replace(config, **{name: max(1, value // 2)}), replace(config, **{name: value * 2}))


# ---- files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One measured choice; config None: the heuristic's. `versions` are those of the packages that it came from."""

    key: Any
    config: Any
    ms: float
    heuristic_ms: float
    versions: dict = field(default_factory=dict, hash=False)


def file_name(name: str, gpu: str) -> str:
    return f"{name}.{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def files(name: str, gpu: str) -> list[Path]:
    """The files about these kernels on this kind of GPU, those that win first."""
    # Unlike Path.is_file, os.path's takes a folder that this user may not enter for one without such a file.
    return [path for folder in folders() if os.path.isfile(path := Path(folder) / file_name(name, gpu))]


def read(path: Path, tunable: Tunable, gpu: str) -> list[Entry]:
    """A file's entries.

    Raises:
        ValueError: the file, and in it the entry, the field and what is allowed.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _wrong(path, f"cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("configs"), list):
        raise _wrong(path, 'holds no {"gpu": ..., "configs": [...]}')
    if content.get("gpu") != gpu:
        raise _wrong(path, f"is for the GPU {content.get('gpu')!r}, but this is {gpu!r}")
    return [_entry(path, tunable, index, values) for index, values in enumerate(content["configs"])]


def _entry(path: Path, tunable: Tunable, index: int, values: Any) -> Entry:
    where = f"configs[{index}]"
    allowed = [item.name for item in fields(Entry)]
    if not isinstance(values, dict) or set(values) != set(allowed):
        raise _wrong(path, f"{where} must hold {', '.join(allowed)} and nothing else")
    for name in ("ms", "heuristic_ms"):
        if type(values[name]) not in (int, float) or not values[name] > 0:
            raise _wrong(path, f"{where}.{name}={values[name]!r} is not a time; allowed are numbers above 0")
    key = _fields(path, f"{where}.key", tunable.key_type, values["key"])
    config = None
    if values["config"] is not None:
        config = _fields(path, f"{where}.config", tunable.config_type, values["config"])
        if objection := tunable.objection(key, config):
            raise _wrong(path, f"{where}.config, for the key {values['key']}: {objection}")
    return Entry(key, config, values["ms"], values["heuristic_ms"], values["versions"])


def _fields(path: Path, where: str, kind: type, values: Any) -> Any:
    types = get_type_hints(kind)
    if not isinstance(values, dict):
        raise _wrong(path, f"{where} must be an object of {', '.join(types)}")
    for name in (*values, *types):
        if name not in types:
            raise _wrong(path, f"{where} has an unknown field {name!r}; allowed are {', '.join(types)}")
        if name not in values:
            raise _wrong(path, f"{where} lacks the field {name!r}; it must hold {', '.join(types)}")
        if type(values[name]) is not types[name]:
            raise _wrong(path, f"{where}.{name}={values[name]!r} is no {types[name].__name__}")
    return kind(**values)


def _wrong(path: Path, what: str) -> ValueError:
    return ValueError(f"launch configurations {path}: {what} (mend the file, measure it anew, or delete it)")


def write(path: Path, gpu: str, facts: dict, entries: Iterable[Entry]) -> None:
    """Writes a file at once: who reads it meanwhile, or cuts this short, finds the old one."""
    configs = [
        {**vars(entry), "key": entry.key._asdict(), "config": None if entry.config is None else asdict(entry.config)}
        for entry in entries
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps({"gpu": gpu, "facts": facts, "configs": configs}, indent=1) + "\n")
    unfinished.replace(path)
