"""The pictures of a report: speed-ups of models as bars and of ops as a map, and a roofline of achieved GB/s."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy

from bbfast.benchmarks.read_results import Results, Row, fastest, is_ours, over

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

COLOURS = {
    "eager": "#9a9a9a",
    "eager+sdpa": "#5f5f5f",
    "compile": "#9ecae1",
    "compile+sdpa": "#6baed6",
    "compile max-autotune": "#4292c6",
    "compile reduce-overhead": "#084594",
    "bbfast": "#fdae6b",
    "bbfast+compile": "#d94801",
    "swapped": "#a1d99b",
    "swapped+compile": "#238b45",
}
MARKERS = "osD^vPX*<>"
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}


def draw_all(results: Results) -> list[str]:
    """Draws every picture that the rows allow into the results' folder and returns the files' names."""
    names = []
    for group, cases in model_groups(results).items():
        name = f"models-{'-'.join(group)}.png".replace(" ", "")
        names += _save(_bars(group, cases), results.folder / name)
    ops = results.of("op")
    for name, figure in (("ops-roofline.png", _roofline(ops)), ("ops-speedup.png", _heat_map(ops))):
        names += _save(figure, results.folder / name)
    return names


def model_groups(results: Results) -> dict[tuple[str, ...], dict[str, list[Row]]]:
    """(mode, dtype, batch, image size) to rows by model."""
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for (model, *group), rows in results.of("model").items():
        groups.setdefault(tuple(group), {})[model] = rows
    return groups


def _save(figure, path: Path) -> list[str]:
    if figure is None:
        return []
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return [path.name]


def _bars(group: tuple[str, ...], cases: dict[str, list[Row]]):
    """Bars of speed-up over eager, one cluster per model; a provider that failed is marked where its bar would be."""
    cases = {model: rows for model, rows in cases.items() if any(over(rows, row, "eager") for row in rows)}
    if not cases:
        return None
    providers = _in_order({row.provider for rows in cases.values() for row in rows})
    bars = sum(len(rows) for rows in cases.values()) + len(cases)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.19 * bars))
    middles, y, longest = [], 0, 1.0
    for rows in cases.values():
        middles.append(y + (len(rows) - 1) / 2)
        for row in sorted(rows, key=lambda row: providers.index(row.provider)):
            gain = over(rows, row, "eager")
            if gain is None:
                axes.text(0.02, y, f"{row.provider}: failed", va="center", fontsize=7, color="#b00000")
            else:
                axes.barh(y, gain, color=_colour(row.provider, providers), height=0.85)
                axes.text(gain, y, f" {gain:.2f}", va="center", fontsize=7, bbox=BEHIND_TEXT)
                longest = max(longest, gain)
            y += 1
        y += 1
    axes.set_yticks(middles, list(cases))
    axes.set_ylim(y - 1, -1)
    axes.set_xlim(0, 1.08 * longest)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as eager (more is better)")
    axes.set_title(", ".join(group))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_colour(provider, providers)) for provider in providers]
    axes.legend(handles, providers, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _roofline(cases: dict[tuple[str, ...], list[Row]]):
    """Achieved GB/s of bbfast, and of the fastest other as a hollow mark, against the bytes that a call must move."""
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for (op, *_), rows in cases.items():
        for ours in (True, False):
            best = fastest(rows, ours)
            if best and best.more.get("gbps") and best.more.get("moved_bytes"):
                points.setdefault((op, ours), []).append((best.more["moved_bytes"] / 1e6, best.more["gbps"]))
    if not points:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    palette = matplotlib.colormaps["tab10"]
    for index, op in enumerate(sorted({op for op, _ in points})):
        style = {"s": 38, "marker": MARKERS[index % len(MARKERS)], "color": palette(index % 10)}
        axes.scatter(*_columns(points.get((op, True), [])), label=op, **style)
        axes.scatter(*_columns(points.get((op, False), [])), **{**style, "facecolors": "none"})
    copies = [row.more["copy_gbps"] for rows in cases.values() for row in rows if row.more.get("copy_gbps")]
    if copies:
        copy = float(numpy.median(copies))
        axes.axhline(copy, color="black", linewidth=1, linestyle="--")
        axes.annotate(
            f"copy, measured: {copy:.0f} GB/s",
            (0.01, copy),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that a call must move, MB")
    axes.set_ylabel("achieved GB/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title("Achieved bandwidth: filled marks are bbfast, hollow ones the fastest other")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _heat_map(cases: dict[tuple[str, ...], list[Row]]):
    """Speed-up over eager, a row per shape, a column per provider: blue is faster, red slower, grey has no numbers."""
    cases = {case: rows for case, rows in sorted(cases.items()) if any(over(rows, row, "eager") for row in rows)}
    if not cases:
        return None
    providers = _in_order({row.provider for rows in cases.values() for row in rows if row.provider != "eager"})
    if not providers:
        return None
    gains = numpy.full((len(cases), len(providers)), numpy.nan)
    for y, rows in enumerate(cases.values()):
        for row in rows:
            gain = over(rows, row, "eager")
            if row.provider != "eager" and gain is not None:
                gains[y, providers.index(row.provider)] = gain
    figure, axes = pyplot.subplots(figsize=(3.5 + 1.0 * len(providers), 1.5 + 0.24 * len(cases)))
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad="#dddddd")
    reach = max(1.0, float(numpy.nanmax(numpy.abs(numpy.log2(gains)))))
    image = axes.imshow(numpy.log2(gains), cmap=colours, vmin=-reach, vmax=reach, aspect="auto")
    for (y, x), gain in numpy.ndenumerate(gains):
        if not math.isnan(gain):
            shade = "white" if abs(math.log2(gain)) > 0.65 * reach else "black"
            axes.text(x, y, f"{gain:.2f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set_yticks(range(len(cases)), [" ".join(case) for case in cases], fontsize=8)
    axes.set_xticks(range(len(providers)), providers, fontsize=8, rotation=30, ha="left")
    axes.xaxis.tick_top()
    ops = [case[0] for case in cases]
    for y in range(1, len(ops)):
        if ops[y] != ops[y - 1]:
            axes.axhline(y - 0.5, color="black", linewidth=1)
    axes.set_title("times as fast as eager", fontsize=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    ticks = range(-math.floor(reach), math.floor(reach) + 1)
    bar.set_ticks(list(ticks), labels=[f"{2.0**tick:g}" for tick in ticks])
    return figure


def _in_order(providers: set[str]) -> list[str]:
    """Those of others first, bbfast's last; within both the known ones first."""
    known = list(COLOURS)
    return sorted(providers, key=lambda name: (is_ours(name), known.index(name) if name in known else 99, name))


def _colour(provider: str, providers: list[str]) -> str:
    unknown = [name for name in providers if name not in COLOURS]
    return COLOURS.get(provider) or matplotlib.colormaps["Purples"](0.4 + 0.5 * unknown.index(provider) / len(unknown))
