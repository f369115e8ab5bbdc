"""Calibration of the doubt: does a model doubt most where it errs most, over policies and over steps?

The measure is that of the protocol of arXiv 2606.15032.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aime_gym.evaluation.comparison import Comparison
from aime_gym.evaluation.fidelity import Fidelity, rank_correlation

SHARES = tuple(share / 10 for share in range(1, 11))
"""Shares of the steps that are doubted least, at which the coverage curve is told."""


def calibration(fidelity: Fidelity | None, comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """How well the doubt tells errors.

    Args:
        fidelity: Doubt and errors of steps; None if they were not measured.
        comparisons: Doubt and errors of policies.

    Returns:
        ``"policies"``: rank correlation of a policy's doubt with the absolute error of its return, ``"count"`` of them;
        ``"steps"``: of a step's doubt with its error, the mean over horizons, as both grow with the horizon;
        ``"low"`` and ``"high"``: mean error of the halves with the lowest and the highest doubt; ``"coverage"``: mean
        error of each of `SHARES` that is doubted least. What is not known is None.
    """
    pairs = {p.name: (p.doubt, abs(p.gap)) for comparison in comparisons for p in comparison.policies}
    doubted = np.array([pair for pair in pairs.values() if pair[0] is not None], float).reshape(-1, 2)
    policies = rank_correlation(doubted[:, 0], doubted[:, 1])
    over_policies = {"policies": policies, "count": len(doubted)}
    if fidelity is None:
        return over_policies | {"steps": None, "low": None, "high": None, "coverage": []}
    columns = list(zip(fidelity.doubt.T, fidelity.error.T, strict=True))
    correlations = [value for pair in columns if (value := rank_correlation(*pair)) is not None]
    halves = [(covered(*pair, 0.5), uncovered(*pair, 0.5)) for pair in columns]
    return over_policies | {
        "steps": float(np.mean(correlations)) if correlations else None,
        "low": [low for low, _ in halves],
        "high": [high for _, high in halves],
        "coverage": [[covered(*pair, share) for share in SHARES] for pair in columns],
    }


def covered(doubt: NDArray, error: NDArray, share: float) -> float | None:
    """Mean error of the share of pairs [N] that is doubted least; None without any."""
    rows = _by_doubt(doubt, error)
    return float(error[rows[: max(1, round(share * len(rows)))]].mean()) if len(rows) else None


def uncovered(doubt: NDArray, error: NDArray, share: float) -> float | None:
    """Mean error of the pairs [N] that `covered` leaves out; None without any."""
    rows = _by_doubt(doubt, error)
    rest = rows[max(1, round(share * len(rows))) :]
    return float(error[rest].mean()) if len(rest) else None


def _by_doubt(doubt: NDArray, error: NDArray) -> NDArray[np.int64]:
    """The pairs that are known, the least doubted first; a doubt without bounds comes last."""
    known = np.flatnonzero(~np.isnan(doubt) & np.isfinite(error))
    return known[np.argsort(doubt[known], kind="stable")]
