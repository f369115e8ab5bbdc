"""When an agent has learned something: by what margin it must beat random actions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SPREADS = 3.0
"""How many standard deviations of random episodes lie between random actions and skill."""

Returns = Sequence[float] | NDArray[np.floating]


def beats_clearly(returns: Returns, random: Returns) -> bool:
    """Whether an agent's mean return lies so far above that of random actions that chance and luck explain it no more.

    It lies above by three standard deviations of random episodes, and still does when two standard errors of its own
    are taken off. The unit of rewards does not matter.

    Args:
        returns: Of the agent's episodes.
        random: Of episodes of random actions.

    Example:
        >>> beats_clearly([940.0, 955.0, 962.0], [38.0, 51.0, 29.0])
        True
        >>> beats_clearly([52.0, 61.0, 47.0], [38.0, 51.0, 29.0])
        False
    """
    earned, chance = np.asarray(returns, float), np.asarray(random, float)
    return bool(earned.mean() - 2 * standard_error(earned) > chance.mean() + SPREADS * chance.std())


def standard_error(returns: NDArray[np.float64]) -> float:
    """That of a mean return; 0 of a single episode, whose spread is not known."""
    return float(returns.std(ddof=1) / np.sqrt(len(returns))) if len(returns) > 1 else 0.0
