"""Reads a results folder: models*.json, ops*.json and gpu.json become rows, whatever is missing or cut short.

A case is what providers are compared on: model, mode, dtype, batch and image size, or op, shape, direction and dtype.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

# What may differ between two files without making them worth less together.
PASSING_FACTS = ("started", "load_average", "clocks_sm_mhz", "clocks_memory_mhz")


@dataclass(frozen=True)
class Row:
    """One provider's measurement of one case.

    Attributes:
        case: what was measured, as text; equal for rows that compare.
        p20_ms, p50_ms, p80_ms: None where there are no numbers.
        failure: why there are no numbers, in one line; None where there are.
        more: what else the file holds of the row and its case, under the names that it has there.
    """

    kind: str
    case: tuple[str, ...]
    provider: str
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    failure: str | None
    more: dict

    @property
    def ours(self) -> bool:
        return is_ours(self.provider)

    @property
    def spread(self) -> float:
        """From the 20% to the 80% quantile, as a share of the median; 0 where these are not known."""
        if None in (self.p20_ms, self.p50_ms, self.p80_ms):
            return 0.0
        return (self.p80_ms - self.p20_ms) / self.p50_ms


@dataclass
class Results:
    """Everything that a folder holds.

    Attributes:
        facts: on what the first file was measured; empty where no file tells.
        differences: facts in which files of the folder differ, one line each.
        steps: those of gpu.json, as written.
        notes: files that could not be read, and why, one line each.
    """

    folder: Path
    facts: dict = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> dict[tuple[str, ...], list[Row]]:
        """The rows of kind `model` or `op`, by case, in the order of the files."""
        cases: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            if row.kind == kind:
                cases.setdefault(row.case, []).append(row)
        return cases


def is_ours(provider: str) -> bool:
    """Whether a provider is bbfast: `bbfast`, `bbfast+compile`, `swapped nchw` and so on."""
    return provider.replace("+", " ").split()[0] in ("bbfast", "swapped")


def read(folder: Path) -> Results:
    """Reads a results folder.

    Raises:
        FileNotFoundError: there is no such folder, or it holds none of the files.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    paths = [*sorted(folder.glob("models*.json")), *sorted(folder.glob("ops*.json")), *folder.glob("gpu.json")]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no models*.json, ops*.json or gpu.json")
    results = Results(folder)
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            empty = path.stat().st_size == 0
            results.notes.append(f"{path.name}: {'empty, its run was cut short' if empty else f'unreadable ({error})'}")
            continue
        try:
            _add(results, path.name, content)
        except (KeyError, TypeError, AttributeError) as error:
            results.notes.append(f"{path.name}: not in the format of a results folder ({error!r})")
    return results


def _add(results: Results, name: str, content: dict) -> None:
    if name.startswith("models"):
        facts = content.get("facts", {})
        _merge(results, name, [row for case in content.get("results", []) for row in _model_rows(case)])
    elif name.startswith("ops"):
        facts = content.get("machine_info", {}).get("facts", {})
        rows = [_op_row(benchmark) for benchmark in content.get("benchmarks", [])]
        _merge(results, name, rows + [_op_row({"extra_info": failure}) for failure in content.get("failures", [])])
    else:
        facts = content.get("facts", {})
        results.steps = content.get("steps", [])
    if results.facts:
        results.differences += [f"{name}: {line}" for line in differing_facts(results.facts, facts)]
    else:
        results.facts = facts


def _merge(results: Results, name: str, rows: list[Row]) -> None:
    """Adds a file's rows. Providers compare within one run only: of a case in two files, the one with more counts."""
    for case in dict.fromkeys(row.case for row in rows):
        new = [row for row in rows if row.case == case]
        old = [row for row in results.rows if row.case == case]
        if old:
            results.notes.append(f"{name}: measures {' '.join(case)} once more; the fuller measurement counts")
        measured = [sum(row.p50_ms is not None for row in some) for some in (old, new)]
        if not old or measured[1] > measured[0]:
            results.rows = [row for row in results.rows if row.case != case] + new


def differing_facts(old: dict, new: dict, ignored: tuple[str, ...] = PASSING_FACTS) -> list[str]:
    """Facts that both tell and that differ, one line each."""
    return [
        f"{key}: {old[key]} and {new[key]}" for key in old if key in new and key not in ignored and old[key] != new[key]
    ]


def _model_rows(result: dict) -> list[Row]:
    size = result.get("image_size")
    case = (result["model"], result["mode"], result["dtype"], f"batch {result['batch']}", f"{size} px")
    about = {key: value for key, value in result.items() if key != "rows"}
    return [
        Row(
            "model",
            case,
            row["provider"],
            *(row.get(key) for key in ("p20_ms", "p50_ms", "p80_ms")),
            row.get("failure"),
            {**about, **row},
        )
        for row in result.get("rows", [])
    ]


def _op_row(benchmark: dict) -> Row:
    """A pytest-benchmark entry; its times are in seconds. Those of the GPU's own clock, if told, are in extra_info."""
    info = benchmark.get("extra_info", {})
    case = (info["op"], info["shape"], info["direction"], info["dtype"])
    failure = info.get("failure")
    if failure is not None:
        times = (None, None, None)
    elif "p50_ms" in info:
        times = (info.get("p20_ms"), info["p50_ms"], info.get("p80_ms"))
    else:
        times = tuple(1000 * seconds for seconds in _quantiles(benchmark["stats"]))
    return Row("op", case, info["provider"], *times, failure, info)


def _quantiles(stats: dict) -> tuple[float, float, float]:
    """20%, 50% and 80% of the rounds; the quartiles stand for the outer two where single rounds were not kept."""
    rounds = stats.get("data") or []
    if len(rounds) < 2:
        return stats.get("q1", stats["median"]), stats["median"], stats.get("q3", stats["median"])
    fifths = statistics.quantiles(rounds, n=5, method="inclusive")
    return fifths[0], stats["median"], fifths[3]


# ---- comparing the rows of one case --------------------------------------------------------------------------


def fastest(rows: list[Row], ours: bool) -> Row | None:
    """The fastest of bbfast's providers or of the others, or None where none has numbers."""
    measured = [row for row in rows if row.ours is ours and row.p50_ms is not None]
    return min(measured, key=lambda row: row.p50_ms, default=None)


def over(rows: list[Row], row: Row, provider: str) -> float | None:
    """How many times as fast as `provider` a row is; None where either has no numbers."""
    base = next((other.p50_ms for other in rows if other.provider == provider), None)
    return None if base is None or not row.p50_ms else base / row.p50_ms


@dataclass(frozen=True)
class Loss:
    """A case in which another provider is faster than every one of bbfast's.

    Attributes:
        ours: the fastest of bbfast's; None where none has numbers.
        times_slower: our time over theirs; infinite where we have none.
        reason: why bbfast has no numbers, else empty.
    """

    rows: list[Row]
    theirs: Row
    ours: Row | None
    times_slower: float
    reason: str = ""


def losses(cases: dict[tuple[str, ...], list[Row]], compiled: bool = True) -> list[Loss]:
    """Where bbfast was measured or tried and loses, worst first; without `compiled`, as if nobody compiled it."""
    found = []
    for all_rows in cases.values():
        rows = [row for row in all_rows if compiled or not (row.ours and "compile" in row.provider)]
        theirs, ours = fastest(rows, False), fastest(rows, True)
        tried = [row for row in rows if row.ours]
        if theirs is None or not tried:
            continue
        if ours is None:
            reason = next((row.failure for row in tried if row.failure), "no numbers")
            found.append(Loss(rows, theirs, None, float("inf"), reason))
        elif theirs.p50_ms < ours.p50_ms:
            found.append(Loss(rows, theirs, ours, ours.p50_ms / theirs.p50_ms))
    return sorted(found, key=lambda loss: -loss.times_slower)
