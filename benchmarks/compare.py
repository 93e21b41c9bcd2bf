"""Compares two results folders and flags what became slower or faster beyond noise.

python -m bbfast.benchmarks.compare OLD NEW [--noise 0.05]

Rows are joined by case and provider. A change counts where it exceeds the noise: the wider of both rows' spread from
their 20% to their 80% quantile, as a share of the median, and at least --noise. The exit status is 1 where a provider
of bbfast became slower or fails now, and 2 where a folder cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bbfast.benchmarks.read_results import PASSING_FACTS, Results, Row, differing_facts, read
from bbfast.benchmarks.report import number

# What two runs are meant to differ in.
COMPARED_FACTS = ("commit", "dirty", "bbfast")
COLOURS = {"slower": "red", "fails now": "red", "faster": "green", "works now": "green", "same": "", "fails": "dim"}


@dataclass(frozen=True)
class Change:
    """One case and provider that both folders hold.

    Attributes:
        noise: the share by which the time must change to count.
        verdict: slower, faster, same, fails now, works now, or fails (in both).
    """

    old: Row
    new: Row
    noise: float
    verdict: str

    @property
    def ratio(self) -> float | None:
        """New time over old; None where either has none."""
        return None if None in (self.old.p50_ms, self.new.p50_ms) else self.new.p50_ms / self.old.p50_ms

    @property
    def regression(self) -> bool:
        return self.new.ours and self.verdict in ("slower", "fails now")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="a results folder")
    parser.add_argument("new", type=Path, metavar="NEW", help="another one")
    parser.add_argument("--noise", type=_share, default=0.05, help="least change that counts, as a share; default 0.05")
    parser.add_argument("--all", action="store_true", help="show rows that did not change, too")
    args = parser.parse_args(argv)
    try:
        old, new = read(args.old), read(args.new)
    except FileNotFoundError as error:
        parser.error(str(error))
    changes = compare(old, new, args.noise)
    show(Console(width=None if sys.stdout.isatty() else 160), old, new, changes, args.all)
    return 1 if any(change.regression for change in changes) else 0


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it is a share, at least 0 and below 1")
    return value


def compare(old: Results, new: Results, noise: float) -> list[Change]:
    """Every case and provider that both hold, in the order of `new`."""
    before = {(row.case, row.provider): row for row in old.rows}
    pairs = [(before[row.case, row.provider], row) for row in new.rows if (row.case, row.provider) in before]
    return [_change(old_row, new_row, noise) for old_row, new_row in pairs]


def _change(old: Row, new: Row, least: float) -> Change:
    noise = max(least, old.spread, new.spread)
    if old.p50_ms is None or new.p50_ms is None:
        verdict = {(True, True): "fails", (True, False): "works now", (False, True): "fails now"}
        return Change(old, new, noise, verdict[old.p50_ms is None, new.p50_ms is None])
    ratio = new.p50_ms / old.p50_ms
    verdict = "slower" if ratio > 1 + noise else "faster" if ratio < 1 / (1 + noise) else "same"
    return Change(old, new, noise, verdict)


# ---- showing ---------------------------------------------------------------------------------------------------


def show(console: Console, old: Results, new: Results, changes: list[Change], everything: bool) -> None:
    """Prints what the folders differ in, a table of changes, and totals; regressions of bbfast come first."""
    for results in (old, new):
        for line in [*results.notes, *results.differences]:
            console.print(Text(f"{results.folder}: {line}"), soft_wrap=True)
    different = differing_facts(old.facts, new.facts, (*PASSING_FACTS, *COMPARED_FACTS))
    if not old.facts or not new.facts:
        different.append("one of the folders does not tell what it was measured on")
    if different:
        console.print(Text("APPLES AND PEARS: the two runs differ in more than the commit.", "bold red"))
        for line in different:
            console.print(Text(f"  {line}", "red"), soft_wrap=True)
    shown = changes if everything else [change for change in changes if change.verdict not in ("same", "fails")]
    if shown:
        console.print(_table(sorted(shown, key=_importance)))
    totals = [f"{sum(change.verdict == verdict for change in changes)} {verdict}" for verdict in COLOURS]
    regressions = sum(change.regression for change in changes)
    console.print(Text(f"{len(changes)} rows in both: {', '.join(totals)}"), soft_wrap=True)
    for name, results, other in (("OLD", old, new), ("NEW", new, old)):
        known = {(row.case, row.provider) for row in other.rows}
        alone = sum((row.case, row.provider) not in known for row in results.rows)
        if alone:
            console.print(f"{alone} rows only in {name}")
    style = "bold red" if regressions else "green"
    console.print(Text(f"{regressions} of bbfast's rows regressed", style))


def _importance(change: Change) -> tuple:
    return (not change.regression, -(change.ratio or float("inf")))


def _table(changes: list[Change]) -> Table:
    table = Table()
    for heading in ("case", "provider"):
        table.add_column(heading)
    for heading in ("old ms", "new ms", "new/old", "noise", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in changes:
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        table.add_row(
            " ".join(change.new.case),
            change.new.provider,
            number(change.old.p50_ms),
            number(change.new.p50_ms),
            ratio,
            f"{change.noise:.1%}",
            Text(change.verdict, COLOURS[change.verdict]),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
