"""How well returns in one world tell the returns in another: the DOPE metrics, and intervals of a mean.

Source: Fu et al., "Benchmarks for Deep Off-Policy Evaluation", ICLR 2021, section 4.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray


class DopeMetrics(TypedDict):
    """Agreement of estimated and true returns over policies; None where it is not defined."""

    policies: int
    pearson: float | None
    spearman: float | None
    mean_absolute_error: float | None
    regret_at_1: float | None


def dope_metrics(estimates: ArrayLike, truths: ArrayLike) -> DopeMetrics:
    """Compares the estimated with the true return of each policy.

    Args:
        estimates: [P] returns in the dream. Policies with a return that is not finite are left out.
        truths: [P] returns in the real env.

    Returns:
        Correlations are None for fewer than two policies or where all returns are equal; the others are None
        without any policy. Error and regret are in units of return.
    """
    estimate, truth = np.asarray(estimates, float), np.asarray(truths, float)
    known = np.isfinite(estimate) & np.isfinite(truth)
    estimate, truth = estimate[known], truth[known]
    return {
        "policies": len(truth),
        "pearson": pearson(estimate, truth),
        "spearman": pearson(ranks(estimate), ranks(truth)),
        "mean_absolute_error": float(np.abs(estimate - truth).mean()) if len(truth) else None,
        "regret_at_1": regret_at_1(estimate, truth) if len(truth) else None,
    }


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Linear correlation of two samples [P]; None if it is not defined."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks [P] from 1; equal values share the mean of their ranks."""
    _, group, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def regret_at_1(estimates: ArrayLike, truths: ArrayLike) -> float:
    """True return lost by picking the policy with the highest estimate instead of the best one."""
    truths = np.asarray(truths, float)
    return float(truths.max() - truths[np.argmax(np.asarray(estimates, float))])


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979), the same for the same seed.

    Args:
        values: [E] independent measurements, e.g. one return an episode.
        confidence: Probability that the interval is to cover.
        resamples: Number of resampled means.
        seed: Of the resampling.

    Returns:
        Lower and upper end.
    """
    values = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def rounded(number: float) -> str:
    """A return as people read it: whole, or with two digits where rewards are small."""
    return f"{number:.0f}" if abs(number) >= 1 or number == 0 else f"{number:.2g}"
