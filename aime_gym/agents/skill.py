"""When an agent has learned something: by what margin it must beat random actions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SPREADS = 3.0
"""How many standard deviations of random episodes lie between random actions and skill."""
FEWEST = 3
"""Episodes on either side, below which nothing is clear."""
ALIKE = 1e-6
"""Random episodes that spread by no more than this share of the largest return differ by rounding alone."""
LEAST_SPREAD = 0.01
"""The share of the largest return that counts as the spread, at least, where random episodes have none."""

Returns = Sequence[float] | NDArray[np.floating]


def beats_clearly(returns: Returns, random: Returns) -> bool:
    """Whether an agent's mean return lies so far above that of random actions that chance and luck explain it no more.

    It lies above by three standard deviations of random episodes, and still does when two standard errors of its own
    are taken off. Where random episodes are all alike, e.g. with a reward that they never find, the standard deviation
    is that of the agent's episodes, or a hundredth of the largest return if that is more. The unit of rewards does not
    matter.

    Args:
        returns: Of the agent's episodes.
        random: Of episodes of random actions. With fewer than three on either side the answer is no.

    Example:
        >>> beats_clearly([940.0, 955.0, 962.0], [38.0, 51.0, 29.0])
        True
        >>> beats_clearly([52.0, 61.0, 47.0], [38.0, 51.0, 29.0])
        False
    """
    earned, chance = np.asarray(returns, float), np.asarray(random, float)
    if min(len(earned), len(chance)) < FEWEST:
        return False
    largest, spread = max(np.abs(earned).max(), np.abs(chance).max()), chance.std()
    if spread <= ALIKE * largest:
        spread = max(earned.std(), LEAST_SPREAD * largest)
    return bool(earned.mean() - 2 * standard_error(earned) > chance.mean() + SPREADS * spread)


def standard_error(returns: NDArray[np.float64]) -> float:
    """That of a mean return; 0 of a single episode, whose spread is not known."""
    return float(returns.std(ddof=1) / np.sqrt(len(returns))) if len(returns) > 1 else 0.0
