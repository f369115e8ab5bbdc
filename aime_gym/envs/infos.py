"""Infos of vector envs as Gymnasium defines them: an array a key, and a mask ``_key`` of the slots that have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Infos = dict[str, Any]


def add_info(infos: Infos, key: str, values: np.ndarray, mask: NDArray[np.bool_] | None = None) -> None:
    """Adds `values` [N] of the slots in `mask` [N], by default all; a key that no slot has is left out."""
    if mask is None:
        mask = np.ones(len(values), bool)
    if not mask.any():
        return
    infos[key] = np.where(mask, values, np.zeros_like(values))
    infos[f"_{key}"] = mask.copy()


def split_final(infos: Infos, ended: NDArray[np.bool_], final_observations: Sequence[Any]) -> Infos:
    """Moves what a step said about slots that ended in it to ``final_info`` and ``final_obs`` (SAME_STEP autoreset).

    Args:
        infos: Of the step.
        ended: [N]
        final_observations: Of the slots that ended, in order.

    Returns:
        The infos of the step and the reset together, before the reset adds its own.
    """
    rest: Infos = {}
    final: Infos = {}
    for key in [key for key in infos if f"_{key}" in infos]:
        add_info(final, key, infos[key], infos[f"_{key}"] & ended)
        add_info(rest, key, infos[key], infos[f"_{key}"] & ~ended)
    observations = np.full(len(ended), None, dtype=object)
    for slot, observation in zip(ended.nonzero()[0], final_observations, strict=True):
        observations[slot] = observation
    rest |= {"final_obs": observations, "_final_obs": ended.copy(), "final_info": final, "_final_info": ended.copy()}
    return rest


def of_slot(infos: Infos, slot: int) -> Infos:
    """The info of one slot, as a single env gives it."""
    return {key: infos[key][slot].item() for key in infos if f"_{key}" in infos and infos[f"_{key}"][slot]}
