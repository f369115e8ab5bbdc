"""How far the returns of a model's dreams may be trusted: measured, kept beside the weights, said where it matters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aime_gym.errors import AimeGymError
from aime_gym.files import read_json, write_json
from aime_gym.world_model.checkpoint import PRETRAINED

TRUST = "trust.json"
LEAST_SPEARMAN = 0.8
"""Rank correlation of dream and real returns over policies of differing skill, from which on a dream deserves trust."""
LEAST_POLICIES = 5
"""Over fewer, a rank correlation says nothing."""
_warned: set[tuple[str, str, str]] = set()


class UntrustworthyDream(UserWarning):
    """The returns of this model's dreams have been found to tell little of the real ones."""


def save_trust(folder: Path, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes what was measured.

    Args:
        folder: Of the model.
        metrics: Task -> those of `aime_gym.evaluation.metrics.dope_metrics` over the policies that were tried.
    """
    write_json(folder / TRUST, metrics)


def load_trust(folder: Path) -> dict[str, dict[str, float | None]]:
    """Reads what `save_trust` wrote; empty where nothing was measured.

    Raises:
        AimeGymError: If the file is broken.
    """
    path = folder / TRUST
    if not path.exists():
        return {}
    what, remedy = "numbers by task", "Delete it to go without."
    content = read_json(path, what, remedy)
    try:
        return {str(task): {str(key): _number(value) for key, value in of.items()} for task, of in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise AimeGymError(f"{path} does not hold {what} ({error}). {remedy}") from error


def check_trust(folder: Path | None, policies: int, max_episode_steps: int | None) -> None:
    """Raises an `AimeGymError` unless a measurement may be kept in the folder, where another one may be."""
    if folder is None or folder.resolve().parent == PRETRAINED:
        raise AimeGymError("What dreams are worth is kept in a model's folder: give --model, a folder of your own.")
    if policies < LEAST_POLICIES or max_episode_steps is not None:
        raise AimeGymError(
            f"What dreams are worth is found from whole episodes of {LEAST_POLICIES} policies or more; got {policies} "
            f"policies and --max-episode-steps {max_episode_steps}."
        )


def is_trusted(folder: Path | None, task: str) -> bool:
    """Whether the dream's returns have been found to rank policies as the real env does.

    Raises:
        AimeGymError: As `load_trust`.
    """
    return folder is not None and _deserves_trust(load_trust(folder).get(task, {}))


def warn_of_distrust(folder: Path | None, task: str) -> None:
    """Warns, once for each measurement, if the dream's returns did not rank policies as the real env does."""
    if folder is None:
        return
    measured = load_trust(folder).get(task)
    if measured is None:
        return
    warning = str(folder), task, repr(measured)
    if not _deserves_trust(measured) and warning not in _warned:
        spearman = measured.get("spearman")
        _warned.add(warning)
        found = "is not defined" if spearman is None else f"is {spearman:.2f}"
        warnings.warn(
            f"Do not trust what agents earn at {task} in dreams of {folder.name}: the rank correlation of dream and "
            f"real returns over {measured.get('policies') or 0:.0f} policies {found}; from {LEAST_SPEARMAN} "
            f"over {LEAST_POLICIES} policies on a dream deserves trust. The table is in {folder / 'README.md'}.",
            UntrustworthyDream,
            stacklevel=3,
        )


def _deserves_trust(measured: Mapping[str, float | None]) -> bool:
    spearman, policies = measured.get("spearman"), measured.get("policies")
    return (spearman or 0) >= LEAST_SPEARMAN and (policies or 0) >= LEAST_POLICIES


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return number
