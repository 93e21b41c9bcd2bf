"""Renders report.md and pictures in a results folder, from its JSON files alone.

python -m bbfast.benchmarks.report FOLDER

Whatever is missing is left out, and files that a run cut short left unreadable are named. Needs matplotlib for the
pictures; without it the report says so and has none.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from bbfast.benchmarks.read_results import Loss, Results, Row, fastest, losses, over, read


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds models*.json, ops*.json and gpu.json, or some of them")
    folder = parser.parse_args(argv).folder
    try:
        results = read(folder)
    except FileNotFoundError as error:
        parser.error(str(error))
    pictures = []
    if importlib.util.find_spec("matplotlib") is None:
        results.notes.append("no pictures: matplotlib is not installed")
    else:
        from bbfast.benchmarks import plots

        pictures = plots.draw_all(results)
    (folder / "report.md").write_text(render(results, pictures))
    print(folder / "report.md")
    return 0


def render(results: Results, pictures: list[str]) -> str:
    """The whole report. `pictures` are the names of files beside it."""
    lines = [f"# bbfast on {device_name(results.facts)}", "", *describe(results.facts)]
    if results.differences:
        lines += ["", "**Files of this folder were measured under different conditions:**", ""]
        lines += [f"- {difference}" for difference in results.differences]
    if results.notes:
        lines += ["", *(f"- {note}" for note in results.notes)]
    if results.rows:
        lines += ["", "## Where bbfast loses", "", *losing_lines(results)]
    if results.of("model"):
        lines += ["", "## Models", "", MODEL_COLUMNS_TEXT, "", *_shown(pictures, "models-"), *model_tables(results)]
    if results.of("op"):
        lines += ["", "## Ops", "", OP_COLUMNS_TEXT, "", *_shown(pictures, "ops-"), *_op_tables(results)]
    if results.steps:
        lines += ["", "## The run", "", *_step_table(results.steps)]
    return "\n".join(lines).rstrip() + "\n"


def _shown(pictures: list[str], prefix: str) -> list[str]:
    return [line for name in pictures if name.startswith(prefix) for line in (f"![{name}]({name})", "")]


# ---- what it was measured on ---------------------------------------------------------------------------------


def device_name(facts: dict) -> str:
    return facts.get("gpu") or facts.get("processor") or "an unknown machine"


def describe(facts: dict) -> list[str]:
    """Machine, versions, commit and settings, a line each, as far as they are known."""
    if not facts:
        return ["- no file tells what it was measured on"]
    if facts.get("gpu"):
        clocks = f"{_told(facts, 'clocks_sm_mhz')} of at most {_told(facts, 'clocks_max_sm_mhz')} MHz"
        machine = (
            f"{facts['gpu']}, driver {_told(facts, 'driver')}; clocks when it started: SM {clocks}, "
            f"memory {_told(facts, 'clocks_memory_mhz')} MHz; {_told(facts, 'processor')}"
        )
    else:
        machine = (
            f"{_told(facts, 'processor')}, {_told(facts, 'threads')} threads on {_told(facts, 'cores')} cores, "
            f"{_told(facts, 'instruction_set')}; load when it started: {_told(facts, 'load_average')}"
        )
    packages = ("torch", "triton", "timm", "torchvision", "transformers", "bbfast", "python")
    cuda = [("CUDA", "torch_cuda"), ("cuDNN", "cudnn")] if facts.get("gpu") else []
    versions = [f"{name} {_told(facts, key)}" for name, key in [*((name, name) for name in packages), *cuda]]
    dirty = {True: ", with changes that are not committed", False: ", as committed", None: ""}[facts.get("dirty")]
    settings = [("TF32 in matrix products", "tf32_matmul"), ("TF32 in cuDNN", "tf32_cudnn")]
    settings += [("cudnn.benchmark", "cudnn_benchmark")]
    return [
        f"- measured {_told(facts, 'started')}",
        f"- machine: {machine}",
        f"- versions: {', '.join(versions)}",
        f"- commit: {_told(facts, 'commit')}{dirty}",
        "- settings: " + ", ".join(f"{name} {_on(facts.get(key))}" for name, key in settings),
    ]


def _told(facts: dict, key: str) -> str:
    value = facts.get(key)
    if value is None:
        return "unknown"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _on(value: bool | None) -> str:
    return {True: "on", False: "off", None: "unknown"}[value]


# ---- losses --------------------------------------------------------------------------------------------------


def losing_lines(results: Results) -> list[str]:
    """Every case in which another provider is faster than each of bbfast's, worst first."""
    cases = [*results.of("model").items(), *results.of("op").items()]
    found = losses(dict(cases))
    compared = sum(any(row.ours for row in rows) and fastest(rows, False) is not None for _, rows in cases)
    if not compared:
        return ["Nothing was measured both with and without bbfast."]
    lines = [f"In none of the {compared} cases is another provider faster than the fastest of bbfast's."]
    if found:
        lines = [f"In {len(found)} of {compared} cases another provider is faster than the fastest of bbfast's:"]
        lines += _losing_table(found)
    lost = {loss.theirs.case for loss in found}
    narrow = [loss for loss in losses(dict(cases), compiled=False) if loss.theirs.case not in lost]
    if narrow:
        lines += ["", f"In {len(narrow)} more bbfast is the fastest only when `torch.compile` compiles it, too:"]
        lines += _losing_table(narrow)
    return lines


def _losing_table(found: list[Loss]) -> list[str]:
    head = ["", "| case | fastest | ms | fastest of bbfast's | ms | times slower |", "|---|---|--:|---|--:|--:|"]
    return head + [_losing_row(loss) for loss in found]


def _losing_row(loss: Loss) -> str:
    case = " ".join(loss.theirs.case)
    theirs = f"{loss.theirs.provider} | {number(loss.theirs.p50_ms)}"
    if loss.ours is None:
        return f"| {case} | {theirs} | none: {cell(loss.reason)} | | |"
    noise = ", within noise" if loss.times_slower <= 1 + max(loss.ours.spread, loss.theirs.spread) else ""
    return (
        f"| {case} | {theirs} | {loss.ours.provider} | {number(loss.ours.p50_ms)} | {times(loss.times_slower)}{noise} |"
    )


# ---- tables --------------------------------------------------------------------------------------------------

MODEL_COLUMNS_TEXT = """\
Milliseconds are medians, with the 20% and 80% quantiles in brackets. "Over" is how many times as fast as eager and as
`torch.compile` a row is. The error is the largest difference to eager's output over eager's largest value."""
OP_COLUMNS_TEXT = """\
GB/s counts what a call must read and write, once; "of copy" is its share of the bandwidth that a device-to-device copy
reached in the same run. The floor is the time that those bytes, or the arithmetic, must take. "Best other"
is the fastest provider that is not bbfast's."""
MODES = {"infer": "Inference", "train": "Training"}


def model_tables(results: Results) -> list[str]:
    """A table per mode, dtype, batch and image size, a row per model and provider; the fastest of a model is bold."""
    lines: list[str] = []
    headings: dict[tuple[str, ...], list[list[Row]]] = {}
    for (_, *group), rows in results.of("model").items():
        headings.setdefault(tuple(group), []).append(rows)
    for (mode, *group), cases in headings.items():
        lines += [f"### {', '.join([MODES.get(mode, mode), *group])}", ""]
        lines += ["| model | provider | ms | images/s | peak MiB | over eager | over compile | error |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
        lines += [_model_row(rows, row) for rows in cases for row in rows]
        lines += [""]
        notes = [note for rows in cases for note in _model_notes(rows)]
        lines += [*notes, ""] if notes else []
    return lines


def _model_notes(rows: list[Row]) -> list[str]:
    """How a model was run, and what its rows have to say for themselves; a note of several providers once."""
    model, about = rows[0].case[0], rows[0].more
    how = [about["memory_format"]] if about.get("memory_format") else []
    how += ["replayed from CUDA graphs"] if about.get("cuda_graphs") else []
    providers: dict[str, list[str]] = {}
    for row in rows:
        for note in row.more.get("notes") or ():
            providers.setdefault(note, []).append(row.provider)
    lines = [f"- {model}: {', '.join(how)}"] if how else []
    return lines + [f"- {model}, {', '.join(names)}: {note}" for note, names in providers.items()]


def _model_row(rows: list[Row], row: Row) -> str:
    head = f"| {row.case[0] if row is rows[0] else ''} | {_name(rows, row)}"
    if row.p50_ms is None:
        return f"{head} | {cell(row.failure or 'no numbers')} | | | | | |"
    images, peak, error = (row.more.get(key) for key in ("images_per_s", "peak_mib", "max_error"))
    gains = " | ".join(times(over(rows, row, base)) for base in ("eager", "compile"))
    return f"{head} | {_time(row)} | {number(images)} | {number(peak)} | {gains} | {_error(error)} |"


def _op_tables(results: Results) -> list[str]:
    """A table per op and direction, a row per shape, dtype and provider."""
    lines: list[str] = []
    headings: dict[tuple[str, str], list[list[Row]]] = {}
    for (op, _, direction, _), rows in results.of("op").items():
        headings.setdefault((op, direction), []).append(rows)
    columns = (
        "ms",
        "GB/s",
        "of copy",
        "floor ms",
        "over eager",
        "over compile",
        "over best other",
        "peak MiB",
        "error",
    )
    for (op, direction), cases in headings.items():
        lines += [f"### {op}, {direction}", "", f"| shape | provider | {' | '.join(columns)} |"]
        lines += ["|---|---|" + "--:|" * len(columns)]
        lines += [_op_row(rows, row) for rows in cases for row in rows]
        lines += [""]
    return lines


def _op_row(rows: list[Row], row: Row) -> str:
    _, shape, _, dtype = row.case
    backend = row.more.get("backend")
    name = _name(rows, row) + (f" ({backend})" if row.ours and backend else "")
    head = f"| {f'{shape} {dtype}' if row is rows[0] else ''} | {name}"
    if row.p50_ms is None:
        return f"{head} | {cell(row.failure or 'no numbers')} |" + " |" * 8
    gbps, copy, floor = (row.more.get(key) for key in ("gbps", "copy_gbps", "floor_ms"))
    share = f"{gbps / copy:.0%}" if gbps and copy else ""
    theirs = fastest(rows, False)
    best_other = times(theirs.p50_ms / row.p50_ms) if row.ours and theirs else ""
    gains = " | ".join([*(times(over(rows, row, base)) for base in ("eager", "compile")), best_other])
    rest = f"{number(row.more.get('peak_mib'))} | {_error(row.more.get('max_error'))}"
    return f"{head} | {_time(row)} | {number(gbps)} | {share} | {number(floor)} | {gains} | {rest} |"


def _step_table(steps: list[dict]) -> list[str]:
    lines = ["| step | outcome | s | log |", "|---|---|--:|---|"]
    for step in steps:
        outcome = step["outcome"] + (f": {cell(step['reason'])}" if step.get("reason") else "")
        lines += [f"| {step['name']} | {outcome} | {number(step.get('seconds'))} | {step.get('log') or ''} |"]
    return lines


# ---- cells ---------------------------------------------------------------------------------------------------


def _name(rows: list[Row], row: Row) -> str:
    measured = [other for other in rows if other.p50_ms is not None]
    best = min(measured, key=lambda other: other.p50_ms, default=None)
    return f"**{row.provider}**" if row is best else row.provider


def _time(row: Row) -> str:
    spread = f" ({number(row.p20_ms)}-{number(row.p80_ms)})" if row.p20_ms is not None else ""
    return number(row.p50_ms) + spread


def number(value: float | None) -> str:
    """Three figures or more, without exponent; nothing for None."""
    if value is None:
        return ""
    decimals = next((digits for digits, limit in ((4, 0.1), (3, 1), (2, 10), (1, 100)) if abs(value) < limit), 0)
    return f"{value:.{decimals}f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def cell(text: str) -> str:
    """Text of one table cell: one line, at most 160 characters, no column marks."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    return line if len(line) <= 160 else line[:157] + "..."


if __name__ == "__main__":
    sys.exit(main())
