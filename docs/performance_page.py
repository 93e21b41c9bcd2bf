"""Writes docs/performance.md, and the table between two markers in README.md, from committed results.

python docs/performance_page.py            # writes both
python docs/performance_page.py --check    # exits with 1 where one is out of date

Results are folders that `make gpu` or `make bench` left under benchmarks/results and that git knows: `git add` a new
one first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bbfast.benchmarks.facts import output_of
from bbfast.benchmarks.read_results import Results, Row, fastest, read
from bbfast.benchmarks.report import describe, device_name, losing_lines, model_tables, number, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"

METHOD = """\
# Performance

Measure your own machine:

```
bbfast bench swin_tiny_patch4_window7_224    # one model, every provider
make bench                                   # models and ops, with a report under benchmarks/results
make gpu                                     # on a machine with a GPU and no network: build, tests and benchmarks
python -m bbfast.benchmarks.compare OLD NEW  # two results folders: what became slower or faster
```

This page is written by `python docs/performance_page.py` from the folders under `benchmarks/results`.

## How the numbers are made

**Models.** All providers of a case have the same weights, images, memory format and precision, and run in turns in one
process, so that they share clock, heat and neighbours; each is warmed up alike. On a GPU, CUDA events measure, and the
input rotates through more copies than the L2 cache holds. Shown are the median and the 20% and 80% quantiles. Training
is forward, loss, backward and an SGD step. Clocks, TF32 and cudnn.benchmark are recorded and never changed.

**A wrong answer has no time.** Before timing, a provider's output, and in training its loss and gradients, are held
against eager's. NaN, infinity or an error above the tolerance is a failure and shown as one. In bf16 and fp16 a
provider may err by twice eager's own distance to float32, and a few units in the last place.

**Ops.** Each op is timed alone, forward and with backward, at the shapes that the models have. *Moved bytes* are what
must be read and written once; the *floor* is the time that these bytes take at the bandwidth of a large copy measured
in the same run, or that the arithmetic takes, if that is longer. What reads from and writes to memory cannot be faster.

**Without a GPU.** `make traffic` plans compiled models with torch's real scheduler for an H100, under fake tensors, and
counts kernels and the bytes that they would move: a plan and no time. `make kernels` compiles the kernels for GPUs that
need not be there and reports registers, spills, width of loads, and whether memory or instructions bind.

**Losses** are listed first, generated from the same rows: every case in which any other provider is faster than the
fastest of bbfast's.
"""

NO_RESULTS = """\
No results folder is committed yet. The older CPU results in `benchmarks/results/cpu-epyc-zen3` stand in the
[README](../README.md#measured); no GPU has run the kernels.
"""


PLANNED = """\
## Planned for an H100

No kernel ran: `make traffic` lets torch's own scheduler plan the compiled models and adds up what each kernel must move
and compute at the speeds of an H100. Least time in ms, number of kernels in brackets.
What carries the rest stands in [benchmarks/NOTES.md](../benchmarks/NOTES.md#traffic-of-compiled-models).
"""
PLANNED_CASE = "{mode}, {case}; [{name}](../{path}), torch {torch}, timm {timm}, commit {commit}:\n"
PLANNED_MODES = {"infer": "Inference", "train": "Forward and backward"}
PLANNED_PROVIDERS = {
    "eager": "timm eager",
    "compile": "compile",
    "compile+sdpa": "compile, SDPA",
    "bbfast+compile": "bbfast, compile",
}


def page(folders: list[Results], plans: list[Path]) -> str:
    """The whole text of performance.md.

    Args:
        folders: measured results, one for each device.
        plans: files of `make traffic`'s.
    """
    planned = [PLANNED, *(line for plan in plans for line in planned_lines(plan))]
    lines = [METHOD, *(planned if plans else []), "## Results", ""]
    for results in folders:
        link = f"../{results.folder.relative_to(ROOT)}/report.md"
        lines += [f"### {device_name(results.facts)}", "", *describe(results.facts), ""]
        lines += [f"All tables and pictures: [report]({link}).", ""]
        for picture in sorted(results.folder.glob("models-*.png")):
            lines += [f"![{picture.stem}](../{picture.relative_to(ROOT)})", ""]
        lines += ["#### Where bbfast loses", "", *losing_lines(results), ""]
        lines += [f"#{line}" if line.startswith("###") else line for line in model_tables(results)]
    text = "\n".join(lines if folders else [*lines, NO_RESULTS])
    return text.rstrip() + "\n"


def planned_lines(path: Path) -> list[str]:
    """A table of compiled models on a GPU that was not there."""
    content = json.loads(path.read_text())
    facts, rows = content["facts"], content["results"]
    by_model: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["provider"]] = row
    text = PLANNED_CASE.format(
        mode=PLANNED_MODES[rows[0]["mode"]],
        case=f"batch {rows[0]['batch']}, {rows[0]['dtype']}, {rows[0]['image_size']} px",
        name=path.name,
        path=path.relative_to(ROOT),
        torch=facts["torch"],
        timm=facts["timm"],
        commit=facts["commit"][:10],
    )
    shown = [provider for provider in PLANNED_PROVIDERS if any(provider in known for known in by_model.values())]
    names = [PLANNED_PROVIDERS[provider] for provider in shown]
    head = [f"| | {' | '.join(names)} | best of timm's / bbfast's |", f"|---|{'--:|' * (len(shown) + 1)}"]
    lines = [_planned_row(model, [known.get(provider) for provider in shown]) for model, known in by_model.items()]
    return [text, *head, *lines, ""]


def _planned_row(model: str, known: list[dict | None]) -> str:
    cells = [f"{row['floor_ms']:.2f} ({row['kernels']})" if row else "" for row in known]
    *theirs, ours = (row["floor_ms"] if row else float("inf") for row in known)
    return f"| {model} | {' | '.join(cells)} | {min(theirs) / ours:.2f} |"


def latest_plans(root: Path = ROOT) -> list[Path]:
    """The newest results of `make traffic` that git knows, of each mode."""
    newest: dict[str, tuple[str, Path]] = {}
    for path in filter(Path.is_file, _committed_files(root, f"{RESULTS}/planned/*.json")):
        content = json.loads(path.read_text())
        mode, started = content["results"][0]["mode"], content["facts"]["started"]
        newest[mode] = max(newest.get(mode, ("", path)), (started, path))
    return [newest[mode][1] for mode in PLANNED_MODES if mode in newest]


def latest(root: Path = ROOT) -> list[Results]:
    """The newest results of each device; GPUs come first."""
    newest: dict[str, Results] = {}
    for folder in committed_folders(root):
        results = read(folder)
        device = folder.parent.name
        if device not in newest or _started(newest[device]) < _started(results):
            newest[device] = results
    return sorted(newest.values(), key=lambda results: (not results.facts.get("gpu"), results.folder.parent.name))


def committed_folders(root: Path) -> list[Path]:
    """Folders of results that git knows; all that there are where this is no checkout."""
    paths = _committed_files(root, f"{RESULTS}/*/*/*.json")
    depth = len((root / RESULTS).parts) + 3  # device, run, file: older results are files of the device's folder
    names = {path.parent for path in paths if len(path.parts) == depth and _is_result(path.name)}
    return sorted(folder for folder in names if folder.is_dir())


def _committed_files(root: Path, pattern: str) -> list[Path]:
    listed = output_of("git", "-C", str(root), "ls-files", pattern)
    return [root / line for line in listed.splitlines()] if listed else list(root.glob(pattern))


def _is_result(name: str) -> bool:
    return name.endswith(".json") and name.startswith(("models", "ops", "gpu"))


def _started(results: Results) -> str:
    return results.facts.get("started") or ""


# ---- README --------------------------------------------------------------------------------------------------


def headline(folders: list[Results]) -> str:
    """What stands between the markers: a table from the newest GPU's folder, else the newest CPU's; or nothing."""
    folders = [results for results in folders if results.of("model")]
    on_gpu = [results for results in folders if results.facts.get("gpu")]
    if not folders:
        return ""
    results = max(on_gpu or folders, key=_started)
    cases = results.of("model")
    if on_gpu:  # the case that the README is about, if it was measured
        usual = {case: rows for case, rows in cases.items() if {"bf16", "batch 128"} <= set(case)}
        cases = usual or cases
    folder = results.folder.relative_to(ROOT)
    lines = [
        f"{device_name(results.facts)}, torch {results.facts.get('torch')}, medians in ms, from",
        f'[{folder.name}]({folder}/report.md); "compile" and "bbfast" are the fastest of their kinds:',
        "",
        "| | timm eager | compile | bbfast | over eager | over compile |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *(_headline_row(case, rows) for case, rows in cases.items())]) + "\n"


def _headline_row(case: tuple[str, ...], rows: list[Row]) -> str:
    model, *rest = case
    eager = next((row for row in rows if row.provider == "eager"), None)
    compiled = fastest([row for row in rows if row.provider.startswith("compile")], ours=False)
    ours = fastest(rows, ours=True)
    measured = [row.p50_ms if row else None for row in (eager, compiled, ours)]
    gains = [times(base / measured[2]) if base and measured[2] else "" for base in measured[:2]]
    return f"| {model}, {', '.join(rest)} | {' | '.join([*map(number, measured), *gains])} |"


def readme_with(text: str, block: str) -> str:
    """README's text with the block between its markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"README.md needs the markers {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{block}{END}{after}"


def main() -> None:
    folders = latest()
    readme, target = ROOT / "README.md", ROOT / "docs" / "performance.md"
    wanted = {target: page(folders, latest_plans()), readme: readme_with(readme.read_text(), headline(folders))}
    if "--check" not in sys.argv[1:]:
        for path, text in wanted.items():
            path.write_text(text)
        return
    outdated = [path.name for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if outdated:
        raise SystemExit(f"out of date: {', '.join(outdated)}; run python docs/performance_page.py")


if __name__ == "__main__":
    main()
