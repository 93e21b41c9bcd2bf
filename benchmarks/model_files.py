"""Results of model benchmarks as files: JSON, CSV and a picture."""

from __future__ import annotations

import csv
import json
import os
import textwrap
from pathlib import Path

from bbfast.design_space._plot import import_figure

CASE_FIELDS = ("model", "mode", "batch", "image_size", "dtype")
# Bars beside one another that can still be read; more of them go into further rows.
BARS_PER_LINE = 24


def write_json(path: str | Path, data: dict) -> None:
    """Replaces the file in one move, so that a run cut short never leaves half of one."""
    _replace(Path(path), json.dumps(data, indent=1) + "\n")


def write_csv(path: str | Path, results: list[dict]) -> None:
    """A line per provider and case; `notes` are joined."""
    lines = [
        {**{name: result[name] for name in CASE_FIELDS}, **row, "notes": "; ".join(row["notes"])}
        for result in results
        for row in result["rows"]
    ]
    partial = _partial(Path(path))
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    partial.replace(path)


def _replace(path: Path, text: str) -> None:
    partial = _partial(path)
    partial.write_text(text)
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


# ---- picture ---------------------------------------------------------------------------------------------


def check_picture(path: str | Path) -> None:
    """Whether `draw` could write this file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
        ValueError: matplotlib does not know the format.
    """
    formats = import_figure()().canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"{path} has no suffix of a picture; known are {', '.join(sorted(formats))}")


def draw(path: str | Path, results: list[dict], title: str) -> None:
    """Bars of speed-up over eager: a group per case, a colour per provider, images per second written on the bars.

    Args:
        path: the picture; its suffix says the format.
        results: as in models.json; what failed has no bar and is named so.
        title: above all groups.
    """
    names = list(dict.fromkeys(row["provider"] for result in results for row in result["rows"]))
    lines = _in_lines(results)
    widest = max(sum(map(_width, line)) for line in lines)
    width = max(6.4, 1.5 + 0.42 * widest)  # inches
    figure = import_figure()(figsize=(width, 1.4 + 3.4 * len(lines)), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(12 * width)), fontsize=9)
    highest = max([row["speedup"] or 0 for result in results for row in result["rows"]] + [1.0])
    for axes, line in zip(figure.subplots(len(lines), 1, squeeze=False)[:, 0], lines):
        _draw_line(axes, line, names)
        axes.set_ylim(0, 1.3 * highest)  # room for the numbers
        axes.set_xlim(-1, widest - 1)
    handles, labels = _legend(figure.axes)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _in_lines(results: list[dict]) -> list[list[dict]]:
    lines, used = [[]], 0
    for result in results:
        if lines[-1] and used + _width(result) > BARS_PER_LINE:
            lines.append([])
            used = 0
        lines[-1].append(result)
        used += _width(result)
    return lines


def _width(result: dict) -> int:
    """Of a group and the gap behind it, in bars; the name of the model needs some."""
    return max(len(result["rows"]) + 1, 5)


def _draw_line(axes, results: list[dict], names: list[str]) -> None:
    start, centres = 0, []
    for result in results:
        for at, row in enumerate(result["rows"], start):
            colour = f"C{names.index(row['provider'])}"
            text = "failed" if row["failure"] else _count(row["images_per_s"])
            axes.bar(at, row["speedup"] or 0, width=0.9, color=colour, label=row["provider"])
            axes.text(at, row["speedup"] or 0, f" {text}", rotation=90, ha="center", va="bottom", fontsize=7)
        centres.append(start + (len(result["rows"]) - 1) / 2)
        start += _width(result)
    axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
    axes.set_xticks(centres, [_group_label(result) for result in results], fontsize=7)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("times eager's speed\n(on the bars: images/s)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _count(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def _group_label(result: dict) -> str:
    size = result["image_size"]
    return f"{result['model']}\n{result['mode']}, {result['dtype']}, batch {result['batch']}, {size} x {size}"


def _legend(all_axes) -> tuple[list, list[str]]:
    """One entry per provider; a colour is the same in all lines."""
    by_label = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            by_label.setdefault(label, handle)
    return list(by_label.values()), list(by_label)
