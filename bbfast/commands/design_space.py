"""`bbfast design-space`: random networks of a design space, and how the errors of trained ones are distributed."""

from __future__ import annotations

import itertools
from argparse import Namespace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bbfast.commands._common import CommandError, one_line_errors, print_titled, progress_bar
from bbfast.design_space import DesignSpace, ErrorDistribution, Population, get_space, plot_edfs
from bbfast.design_space._plot import import_figure


def run(args: Namespace) -> int:
    return {"sample": sample, "edf": edf}[args.action](args)


# ---- sample ----------------------------------------------------------------------------------------------


def sample(args: Namespace) -> int:
    """Draws configurations; prints them, or writes them for a training script to add errors to."""
    flops = None if args.flops is None else tuple(args.flops)
    with one_line_errors(ValueError, RuntimeError), progress_bar() as progress:
        space = get_space(args.space)
        stream = space.stream(args.seed, flops, image_size=args.image_size, max_tries=args.max_tries)
        drawn = itertools.islice(stream, args.count)
        configs = list(progress.track(drawn, total=args.count, description=f"Sampling {space.name}"))
    population = Population.of(space.name, configs, args.image_size, seed=args.seed, flops=flops)
    console = Console(highlight=False)
    if args.json is None:
        _print_population(console, space, population)
        return 0
    _save(population, args.json)
    console.print(Text(f"{_heading(space, population)}: {args.json}"), soft_wrap=True)
    return 0


def _save(population: Population, path: str) -> None:
    with one_line_errors(OSError):
        population.save(path)


def _heading(space: DesignSpace, population: Population) -> str:
    count = len(population.models)
    return f"{count} of the {space.size():.2g} configurations of {space.name}"


def _print_population(console: Console, space: DesignSpace, population: Population) -> None:
    columns = [name for name in population.models[0]["config"] if name != "se_ratio"]
    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name.replace("_", " "), no_wrap=True)
    costs = ("flops", "parameters", "activations")
    for name in costs:
        table.add_column(name, justify="right", no_wrap=True)
    for model in population.models:
        table.add_row(
            *(_as_text(model["config"][name]) for name in columns), *(f"{model[name] / 1e6:.2f} M" for name in costs)
        )
    size = population.settings["image_size"]
    print_titled(console, f"{_heading(space, population)}; flops are multiply-adds at {size} x {size}", table)


def _as_text(value) -> str:
    return "/".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


# ---- edf -------------------------------------------------------------------------------------------------


def edf(args: Namespace) -> int:
    """Compares the populations of several files, in a table and, where asked, in a picture."""
    bootstrap = {"confidence": args.confidence, "resamples": args.resamples, "seed": args.seed}
    if args.plot is not None:
        with one_line_errors(ModuleNotFoundError):
            import_figure()
    distributions = _distributions(args.files)
    rows = []
    with progress_bar() as progress:
        for name, errors in progress.track(distributions.items(), description="Resampling"):
            low, high = errors.bootstrap_mean(**bootstrap)
            rows.append((name, str(len(errors)), f"{errors.min:.4g}", f"{errors.mean:.4g}", f"{low:.4g}..{high:.4g}"))

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("space")
    for name in ("models", "least error", "mean error", f"mean, {args.confidence:.0%} bootstrap"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    print_titled(console, "Errors", table)
    if args.plot is not None:
        with one_line_errors(ValueError, OSError, prefix=f"{args.plot}: "):
            plot_edfs(distributions, args.plot, **bootstrap)
        console.print(Text(f"Drawn: {args.plot}"), soft_wrap=True)
    return 0


def _distributions(paths: list[str]) -> dict[str, ErrorDistribution]:
    """By the space's name; where two files hold the same space, by the files' names too."""
    with one_line_errors(ValueError, OSError):
        populations = [Population.load(path) for path in paths]
    spaces = [population.space for population in populations]
    found = {}
    for path, population in zip(paths, populations):
        name = population.space
        if spaces.count(name) > 1:
            name = f"{name} ({Path(path).name if paths.count(path) == 1 else path})"
        if name in found:
            raise CommandError(f"{path} is given twice, or another file has its name and space; rename one")
        with one_line_errors(ValueError, TypeError, prefix=f"{path}: "):
            found[name] = ErrorDistribution(population.errors)
    return found
