"""The distribution of a population's errors, by which the paper compares design spaces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bbfast.nn._arguments import check_int


class ErrorDistribution:
    """The errors of models that were drawn from one space and trained alike.

    Args:
        errors: one finite number per model, in any unit, at least one of them.

    Attributes:
        errors: float64 `[n]`, sorted.

    Raises:
        TypeError: `errors` is no sequence of numbers.
        ValueError: it is empty, not one-dimensional, or one is not finite.
    """

    def __init__(self, errors: Sequence[float]):
        values = np.asarray(errors)
        if values.dtype.kind not in "iuf" and values.size:
            raise TypeError(f"errors must be numbers, got {values.dtype}")
        if values.ndim != 1 or not values.size:
            raise ValueError(f"errors must be one number per model, at least one; got the shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"errors[{int(np.argmin(np.isfinite(values)))}] is not finite")
        self.errors = np.sort(values.astype(np.float64))

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def min(self) -> float:
        return float(self.errors[0])

    @property
    def mean(self) -> float:
        return float(self.errors.mean())

    def __call__(self, at) -> np.ndarray:
        """F(e) = (1/n) Σ 1[e_i < e]: the share of models whose error is below `e`.

        Args:
            at: an error or an array of them.

        Returns:
            float64 of the same shape, in 0..1.
        """
        return self._below(at) / len(self)

    def bootstrap_bands(
        self, at, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Between which values F(e) lies, error by error, when the models are drawn anew from these with replacement.

        Args:
            at: an error or an array of them.
            confidence: the share of the resampled F(e) that lies between, above 0 and below 1.
            resamples: how often n models are drawn.
            seed: the same seed gives the same bands.

        Returns:
            Lower and upper ends, float64 of the shape of `at`.
        """
        # Models are drawn by how often each comes; then F is a running sum.
        counts = self._resampled_counts(resamples, seed)
        below = np.concatenate([np.zeros((resamples, 1), dtype=counts.dtype), np.cumsum(counts, axis=1)], axis=1)
        return _percentiles(below[:, self._below(at)] / len(self), confidence)

    def bootstrap_mean(self, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Between which values the mean lies; the arguments are those of `bootstrap_bands`."""
        means = self._resampled_counts(resamples, seed) @ self.errors / len(self)
        low, high = _percentiles(means, confidence)
        return float(low), float(high)

    def _below(self, at) -> np.ndarray:
        """How many errors are below each of `at`."""
        at = np.asarray(at, dtype=np.float64)
        if np.isnan(at).any():
            raise ValueError("at must not hold NaN: nothing is below it or above")
        return np.searchsorted(self.errors, at, side="left")

    def _resampled_counts(self, resamples: int, seed: int) -> np.ndarray:
        """`[resamples, n]`: how often each model is drawn."""
        check_int("resamples", resamples, 1)
        check_int("seed", seed, 0)
        n = len(self)
        return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def _percentiles(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(confidence, float):
        raise TypeError(f"confidence must be a float, got {type(confidence).__name__}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not allowed; it must lie above 0 and below 1")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail], axis=0)
    return low, high
