"""The noise of the difference between two scores of one evaluation set: a paired bootstrap over its items."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

RESAMPLES = 500  # the standard error is then known to about 3 percent of itself


def bootstrap_difference(
    before: np.ndarray,
    after: np.ndarray,
    metric_of: Callable[[np.ndarray], float],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """The change of a metric between two encoders, and its standard error over evaluation sets of this size.

    Items are drawn with replacement, the same ones for both encoders, because an item that is hard for one is hard for
    the other. Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6.

    >>> before, after = np.zeros(100), np.repeat([0.0, 1.0], 50)
    >>> difference, error = bootstrap_difference(before, after, np.mean)
    >>> round(difference, 2), round(error, 2)  # the error of a mean of 100 values is 0.5 / sqrt(100)
    (0.5, 0.05)

    Args:
        before: Values [N, ...] of the N items with the first encoder, N >= 2.
        after: Values [N, ...] of the same items with the second encoder.
        metric_of: Maps values [M, ...] of M items to the metric.
        seed: Seed of the draws.
        resamples: Number of draws, >= 2.

    Returns:
        The metric of `after` minus that of `before`, and the standard deviation of this difference over the draws.
        Draws for which the metric is undefined (NaN) do not count; the standard error is NaN if fewer than half do.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"before and after must have the same N >= 2 items, got {len(before)} and {len(after)}")
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    with warnings.catch_warnings(action="ignore"):  # scipy warns of draws in which all values are equal
        for i in range(resamples):
            drawn = generator.integers(len(before), size=len(before))
            differences[i] = metric_of(after[drawn]) - metric_of(before[drawn])
    known = differences[np.isfinite(differences)]
    error = float(known.std(ddof=1)) if len(known) >= max(2, resamples / 2) else float("nan")
    return float(metric_of(after) - metric_of(before)), error
