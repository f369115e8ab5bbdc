"""The scale on which a sensor or reward varies, whatever its units."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

Moments = TypeVar("Moments", np.ndarray, Tensor)

ROUNDING = 1e-6
"""Dims that vary by a smaller share of their mean are constant: float32 has hardly more digits."""
NOISE = 1e-12
"""Dims that vary by a smaller share of the largest dim beside them are constant: so does what is 0 but for rounding."""


def varies(mean: Moments, std: Moments) -> Moments:
    """Which dims are no constants.

    Args:
        mean: Of each dim over the data, [D].
        std: Standard deviation of each dim, [D].

    Returns:
        [D] bool
    """
    return (std > ROUNDING * abs(mean)) & (std > NOISE * _largest(mean, std))


def scale(mean: Moments, std: Moments) -> Moments:
    """What to divide dims by so that they are of size 1: their standard deviation.

    That of constants is the size of the largest dim beside them, or 1 if all are always 0; arguments as of `varies`.
    """
    largest, divisor = _largest(mean, std), std + 0
    divisor[~varies(mean, std)] = largest if largest > 0 else 1.0
    return divisor


def _largest(mean: Moments, std: Moments) -> Moments:
    return (abs(mean) + std).max()
