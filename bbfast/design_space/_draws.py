"""Random draws from sorted lists of values, many at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def log_uniform_weights(values: Sequence[float]) -> np.ndarray:
    """Probabilities of `values`, sorted and above 0, that spread them evenly over their logarithms.

    A value stands for what lies between the one below it and itself, as in pycls; below the first there is one more
    step, or half of the first where a step would be more. Powers of two are thus equally probable.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1:
        return np.ones(1)
    below = values[0] - min(values[1] - values[0], values[0] / 2)
    weights = np.diff(np.log(values), prepend=np.log(below))
    return weights / weights.sum()


def draw(rng: np.random.Generator, weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Independent indices with probabilities `weights`."""
    return rng.choice(len(weights), shape, p=weights)


def draw_non_decreasing(rng: np.random.Generator, weights: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Rows of indices that never decrease, as if rows of `draw` were thrown away until one does not.

    Nothing is thrown away: each index is drawn with its probability given the one before it, which the total weight
    of all ways to go on tells.
    """
    rows, columns = shape
    ways = np.ones(len(weights))  # of going on after this index
    masses = []
    for _ in range(columns):
        masses.append(weights * ways)
        ways = np.cumsum(masses[-1][::-1])[::-1]
    indices = np.zeros(shape, dtype=np.int64)
    previous = np.zeros(rows, dtype=np.int64)
    for column, mass in enumerate(reversed(masses)):
        cumulative = np.concatenate([[0.0], np.cumsum(mass)])
        level = rng.uniform(cumulative[previous], cumulative[-1])
        # Rounding could put the level on an edge of the range.
        previous = np.clip(np.searchsorted(cumulative, level, side="right") - 1, previous, len(weights) - 1)
        indices[:, column] = previous
    return indices
