"""A picture of several spaces' error distributions; matplotlib is imported only here, and only when asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bbfast.design_space._edf import ErrorDistribution


def plot_edfs(
    distributions: Mapping[str, ErrorDistribution],
    path: str | Path,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    title: str | None = None,
) -> None:
    """Draws the distributions of errors as steps within their bootstrap bands, the legend as [min | mean] name.

    Args:
        distributions: by the name that the legend shows, at least one.
        path: the picture; its suffix says the format: .png, .pdf, .svg and others of matplotlib.
        confidence, resamples, seed: of the bands, see `ErrorDistribution.bootstrap_bands`.
        title: a line above the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
        ValueError: there is no distribution, or matplotlib does not know the format.
    """
    figure_class = import_figure()
    if not distributions:
        raise ValueError("distributions must hold at least one")
    figure = figure_class(figsize=(6.4, 4.4), layout="constrained")  # without pyplot there is no global state
    axes = figure.subplots()
    low = min(distribution.errors[0] for distribution in distributions.values())
    high = max(distribution.errors[-1] for distribution in distributions.values())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    for name, distribution in distributions.items():
        # F steps up just after an error, so each value holds up to the error it is drawn at.
        at = np.concatenate([[low - margin], np.unique(distribution.errors), [high + margin]])
        bands = distribution.bootstrap_bands(at, confidence, resamples, seed)
        label = f"[{distribution.min:.3g} | {distribution.mean:.3g}] {name}"
        (line,) = axes.step(at, distribution(at), where="pre", label=label)
        axes.fill_between(at, *bands, step="pre", alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(
        xlabel="error e", ylabel="F(e): share of models below e", xlim=(low - margin, high + margin), ylim=(0, 1.02)
    )
    axes.grid(alpha=0.3)
    axes.legend(title="[min | mean]", loc="lower right")
    if title:
        axes.set_title(title)
    figure.savefig(path, dpi=150)


def import_figure():
    """matplotlib's Figure.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"plotting needs matplotlib ({error}); pip install 'bbfast[plot]' brings it", name=error.name
        ) from error
    return Figure
