"""Data sets by name, each in a training and a held-out part, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from aime_gym.data.trajectories import TrajectoryDataset
from aime_gym.embodiments import Embodiment, canonical_setup
from aime_gym.errors import AimeGymError
from aime_gym.training.prediction_error import BURN_IN

Parts = Mapping[str, tuple[TrajectoryDataset, TrajectoryDataset]]
"""Name of a data set -> (its training part, its held-out part)."""


def split_by_name(
    folders: Sequence[Path], datasets: Sequence[TrajectoryDataset], held_out: float, seed: int
) -> dict[str, tuple[TrajectoryDataset, TrajectoryDataset]]:
    """Splits data sets, named as their folders are; by the whole path where several folders share a name.

    Raises:
        AimeGymError: As `TrajectoryDataset.split`.
    """
    names = [f.name if sum(g.name == f.name for g in folders) == 1 else str(f) for f in folders]
    return {name: dataset.split(held_out, seed) for name, dataset in zip(names, datasets, strict=True)}


def check_parts(parts: Parts, body: Embodiment, setup: str, reward: bool = False) -> None:
    """Checks that data sets have what models of a body in a setup see and predict.

    Args:
        parts: The data.
        body: Of the model.
        setup: Of the model; ``"visual"`` needs images.
        reward: Whether rewards are needed.

    Raises:
        AimeGymError: If one lacks a key, has it with another dim, or has too short trajectories.
    """
    needed = {s.name: s.dim for s in body.sensors} | {"pre_action": body.action_dim}
    needed |= {"image": 3} if canonical_setup(setup) == "visual" else {}
    needed |= {"reward": 1} if reward else {}
    for name, (part, _) in parts.items():
        got = {key: part.arrays[key].shape[-1] if key in part.arrays else "missing" for key in needed}
        wrong = [f"{key}: {got[key]}, expected dim {needed[key]}" for key in needed if got[key] != needed[key]]
        if wrong:
            mend = " `aime-gym render` adds images." if "image" in needed and got["image"] == "missing" else ""
            raise AimeGymError(f"{name} does not fit {body.name} in setup {setup}: {'; '.join(wrong)}.{mend}")
    rows = 2 if body.foreign else BURN_IN + 1  # heads of others see windows that begin before short episodes
    for name, split in parts.items():
        if (longest := min(part.longest for part in split)) < rows:
            raise AimeGymError(f"{name} needs trajectories of {rows} rows to train and to evaluate; got {longest}.")
