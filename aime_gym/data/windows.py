"""Windows of trajectories: where they may lie, and which of their rows are padding.

In a batch, ``is_padding`` `[T, B]` bool says which rows lie outside their trajectory; if none do, it is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np

from aime_gym.errors import AimeGymError


class Places(TypedDict, total=False):
    """Where windows may lie, beside anywhere within a trajectory: keywords of `draw_windows`."""

    at_start: float
    """Share of windows, on average, that begin with a trajectory instead of anywhere."""
    least: int | None
    """Rows of a window, from its first, that end within the trajectory; by default all: no padding behind it."""
    lead: int
    """Rows by which windows may begin before the trajectory."""


class Windows(NamedTuple):
    """Where B windows of T rows lie in the arrays of a data set.

    A row outside its trajectory is padding: it holds the nearest row of the trajectory, without an action. Only models
    of what comes after a termination may learn from it.

    Attributes:
        rows: `[T, B]` integers; an array, or a tensor.
        is_padding: `[T, B]` bool; None if no row is padding.
    """

    rows: Any
    is_padding: Any | None

    def take(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The windows of a data set.

        Args:
            arrays: Of all its rows; arrays or tensors, as those here.

        Returns:
            Every key as `[T, B, ...]`, and ``is_padding`` if there is padding, whose ``pre_action`` is 0.
        """
        taken = {key: array[self.rows] for key, array in arrays.items()}
        if self.is_padding is not None:
            taken["is_padding"] = self.is_padding
            if "pre_action" in taken:
                taken["pre_action"][self.is_padding] = 0
        return taken


def draw_windows(
    bounds: np.ndarray,
    terminated: np.ndarray,
    batch_size: int,
    horizon: int,
    rng: np.random.Generator,
    at_start: float = 0.0,
    least: int | None = None,
    lead: int = 0,
) -> Windows:
    """Draws windows uniformly over all places where they may begin; what is drawn depends on real rows alone.

    Windows with padding hold a trajectory that is too short for them, or what follows a termination: up to a quarter of
    their rows.

    Args:
        bounds: First row and end row of every trajectory, `[N, 2]`.
        terminated: Which trajectories end with a termination, `[N]` bool.
        batch_size: Number of windows B.
        horizon: Their length T in rows.
        rng: Source of the draw.
        at_start: See `Places`, as for the two others.
        least: There.
        lead: There.

    Raises:
        AimeGymError: If no trajectory is long enough.
    """
    lengths, least = bounds[:, 1] - bounds[:, 0], horizon if least is None else least
    last = np.maximum(lengths - horizon + np.where(terminated, horizon // 4, 0), -lead)
    places = np.maximum(np.minimum(last, lengths - least) + lead + 1, 0)  # [N], in which windows can begin
    if places.sum() == 0:
        longest = int(lengths.max(initial=0))
        raise AimeGymError(f"A window of {least - lead} rows fits into no trajectory; the longest has {longest}.")
    ends = np.cumsum(places)
    draw = rng.integers(ends[-1], size=batch_size)
    which = np.searchsorted(ends, draw, side="right")
    first, end = bounds[which].T  # [B] each
    begin = first - lead + draw - (ends[which] - places[which])
    if at_start:
        begin = np.where(rng.random(batch_size) < at_start, first, begin)
    wanted = begin[None, :] + np.arange(horizon)[:, None]
    rows = np.clip(wanted, first, end - 1)
    is_padding = rows != wanted
    return Windows(rows, is_padding if is_padding.any() else None)
