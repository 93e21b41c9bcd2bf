"""`bbfast tune`: measures launch configurations for given models on the GPU at hand, for later runs to use."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import bbfast
from bbfast import data, dispatch, env
from bbfast.benchmarks.facts import facts
from bbfast.commands._common import RUN_ERRORS, CommandError, one_line_errors, progress_bar
from bbfast.triton_kernels import tuned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("infer", "train")


def run(args: Namespace) -> int:
    _require_gpu()
    # Needs Triton, which there need not be where there is no GPU.
    from bbfast.commands import _tuning

    device = torch.device("cuda", torch.cuda.current_device())
    folder = Path(args.output) if args.output else env.tuned_folder()
    with one_line_errors(*RUN_ERRORS, OSError):
        found = facts("cuda")
        versions = {"bbfast": bbfast.__version__, "triton": found["triton"]}
        store = Store(folder, torch.cuda.get_device_name(device), found, versions, again=args.again)
        calls = []
        for name, batch, dtype, mode in product(args.models, args.batch, args.dtype, args.mode):
            with one_line_errors(RuntimeError, ValueError), _tuning.recorded_calls() as more:
                run_model(name, batch, DTYPES[dtype], mode, device)
            calls += more
            torch.cuda.empty_cache()
        if not calls:
            raise CommandError(f"no Triton kernel ran in {', '.join(args.models)}; `bbfast info` says why not")
        tune(calls, store, args.kernels)
    _print_table(Console(highlight=False), store)
    return 0


def _require_gpu() -> None:
    """Raises CommandError where nothing could be measured."""
    if not torch.cuda.is_available():
        raise CommandError("needs the GPU that is tuned for; torch sees none (torch.cuda.is_available() is False)")
    if env.TRITON_INTERPRET:
        raise CommandError("TRITON_INTERPRET=1 interprets the kernels, which have no speed then; unset it")
    if reasons := dispatch.triton_unavailable_reasons(torch.empty(1, device="cuda")):
        raise CommandError("; ".join(reasons))


def run_model(name: str, batch: int, dtype: torch.dtype, mode: str, device: torch.device) -> None:
    """One inference in `dtype`, or one training step under autocast to it, on random photos."""
    model = bbfast.create_model(name).to(device, memory_format=torch.channels_last)
    size = data.resolve_model_data_config(model)["input_size"]
    photos = torch.randn(batch, *size, device=device).to(memory_format=torch.channels_last)
    if mode == "infer":
        with torch.inference_mode():
            model.eval().to(dtype)(photos.to(dtype))
        return
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model.train()(photos).float().square().mean()
    loss.backward()


class Store:
    """The files of one folder for one GPU: what they hold already, and what is added.

    Args:
        facts: what is known of this measurement; goes into the files.
        versions: of the packages that what is quickest depends on; what was measured with others is measured anew.
        again: whether what the files hold is to be measured anew.

    Raises:
        ValueError: a file there is not as it should be.
    """

    def __init__(self, folder: Path, gpu: str, facts: dict, versions: dict[str, str], *, again: bool):
        self.folder, self.gpu, self.facts, self.versions = folder, gpu, facts, versions
        self.entries: dict[str, dict[tuple, tuned.Entry]] = {}
        # What need not be measured (again), with the configuration that replaces the heuristic's, or None.
        self.done: dict[tuple[str, tuple], object] = {}
        self.added: list[tuple[str, tuned.Entry, object]] = []
        for name, tunable in tuned.tunables().items():
            path = self.path(name)
            self.entries[name] = {entry.key: entry for entry in tuned.read(path, tunable, gpu)} if path.exists() else {}
            for key, entry in self.entries[name].items():
                if entry.versions == self.versions and not again:
                    self.done[name, key] = entry.config

    def path(self, name: str) -> Path:
        return self.folder / tuned.file_name(name, self.gpu)

    def settled(self) -> dict[tuple[str, tuple], object]:
        return {place: config for place, config in self.done.items() if config is not None}

    def add(self, place: tuple[str, tuple], result) -> None:
        """Writes the file with this result in it."""
        name, key = place
        entry = tuned.Entry(key, result.config, result.ms, result.heuristic_ms, self.versions)
        self.entries[name][key] = entry
        self.done[place] = result.config
        self.added.append((name, entry, result.heuristic))
        tuned.write(self.path(name), self.gpu, self.facts, self.entries[name].values())


def tune(calls: list, store: Store, kernels: list[str] | None = None, timer: Callable | None = None) -> None:
    """Searches the configurations of all launches of these calls that the store lacks, and adds them to it.

    Args:
        calls: as `_tuning.recorded_calls` leaves them.
        kernels: only these of tuned.NAMES.
        timer: as in `_tuning.search`; None: the GPU's time.
    """
    from bbfast.commands import _tuning

    tunables = tuned.tunables()
    timer = timer or _tuning.gpu_ms

    def missing(places) -> list:
        return [p for p in places if p not in store.done and (not kernels or p[0] in kernels)]

    with progress_bar() as progress:
        places = {place for call in calls for place in missing(call.places)}
        bar = progress.add_task("tuning", total=len(places))
        for call in calls:
            # Asked again after each launch: a first stage with other partial sums has another second stage.
            while pending := missing(call.run(call.fresh_arguments(), store.settled())[1]):
                name, key = place = pending[0]
                progress.update(bar, description=f"{name} {getattr(key, 'kernel', '')}")
                if place not in places:
                    places.add(place)
                    progress.update(bar, total=len(places))
                store.add(place, _tuning.search(tunables[name], key, call, store.settled(), timer))
                progress.advance(bar)


def _print_table(console: Console, store: Store) -> None:
    if not store.added:
        console.print(f"nothing to do: all launches are in {store.folder} (--again measures them anew)")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("kernels", "key", "heuristic ms", "tuned ms", "configuration"):
        table.add_column(header, justify="right" if header.endswith("ms") else "left", overflow="fold")
    for name, entry, heuristic in store.added:
        changes = "the heuristic's" if entry.config is None else ", ".join(_changes(heuristic, entry.config))
        key = " ".join(f"{field}={value}" for field, value in entry.key._asdict().items())
        table.add_row(name, key, f"{entry.heuristic_ms:.4f}", f"{entry.ms:.4f}", changes)
    console.print(table)
    quicker = sum(entry.config is not None for _, entry, _ in store.added)
    console.print(f"{quicker} of {len(store.added)} launches became quicker; files in {store.folder}")


def _changes(heuristic: object, config: object) -> Iterator[str]:
    before = asdict(heuristic)
    return (f"{name} {before[name]} -> {value}" for name, value in asdict(config).items() if value != before[name])
