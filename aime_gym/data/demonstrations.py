"""Demonstrations: what an expert saw, without what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import load_trajectory, read_metadata, trajectory_keys, trajectory_paths
from aime_gym.errors import AimeGymError, unknown_name

if TYPE_CHECKING:
    from aime_gym.world_model.config import ModelConfig

BUNDLED = Path(__file__).parents[1] / "pretrained" / "demonstrations"


def bundled_demonstrations() -> list[str]:
    """Names of the demonstrations that come with the package."""
    return sorted(path.name for path in BUNDLED.iterdir() if path.is_dir()) if BUNDLED.is_dir() else []


def find_demonstrations(name_or_folder: str | Path) -> Path:
    """The folder of demonstrations.

    Args:
        name_or_folder: A bundled name (see `bundled_demonstrations`) or a folder of trajectories.

    Raises:
        AimeGymError: If there is neither.
    """
    if isinstance(name_or_folder, str) and name_or_folder in bundled_demonstrations():
        return BUNDLED / str(name_or_folder)
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    raise unknown_name("demonstrations (no bundled name, no folder)", str(name_or_folder), bundled_demonstrations())


def load_demonstrations(folder: Path, config: ModelConfig, horizon: int, least: int = 2) -> TrajectoryDataset:
    """Loads what a model observes of demonstrations; actions are not read.

    Args:
        folder: A folder of trajectories.
        config: The config of the model.
        horizon: Rows of a training window.
        least: How many there have to be: two where some are held out.

    Raises:
        AimeGymError: If the data are broken, too few, too short, or of another body or setup.
    """
    body = read_metadata(folder).get("embodiment")
    if body is not None and body != config.embodiment:
        raise AimeGymError(f"{folder} shows {body}; the model is of {config.embodiment}.")
    dataset = TrajectoryDataset(folder, config.observed, "image" in config.observed, unread=("pre_action",))
    for name in config.observed:
        expected = (64, 64, 3) if name == "image" else (config.dims[name],)
        if dataset.arrays[name].shape[1:] != expected:
            raise AimeGymError(
                f"{folder}: {name!r} has rows of shape {dataset.arrays[name].shape[1:]}; the model observes {expected}."
            )
    if dataset.longest < horizon or len(dataset) < least:
        some = "two demonstrations or more, some to hold out," if least > 1 else "a demonstration"
        raise AimeGymError(
            f"{folder} needs {some} and {horizon} rows in the longest; it has {len(dataset)}, and "
            f"{dataset.longest} rows."
        )
    ends = ["is_terminal"] if config.use_terminal and "is_terminal" in dataset.arrays else []
    kept = [*config.observed, *ends]
    dataset.arrays = {name: dataset.arrays[name] for name in kept}
    return dataset


def read_true_actions(folder: Path, rows: int, action_dim: int) -> np.ndarray | None:
    """The actions behind demonstrations [R, A], for analysis and for `BC` alone; None unless all are there and finite.

    Args:
        folder: A folder of trajectories.
        rows: R, of all trajectories together.
        action_dim: A
    """
    try:
        actions = np.concatenate([load_trajectory(path)["pre_action"] for path in trajectory_paths(folder)])
    except ValueError:  # an AimeGymError, or rows of different shapes
        return None
    actions = actions.astype(np.float32)
    return actions if actions.shape == (rows, action_dim) and np.isfinite(actions).all() else None


def expert_return(folder: Path) -> float | None:
    """The mean return of the demonstrations: what their card says, or that of whole episodes; None if unknown."""
    told = read_metadata(folder).get("expert_return")
    if told is not None:
        return float(told)
    rewards = []
    for path in trajectory_paths(folder):
        unread = [key for key in trajectory_keys(path) if key not in ("reward", "is_last")]
        rewards.append(rewards_of(load_trajectory(path, (), unread=unread)))
    return mean_return(rewards)


def rewards_of(trajectory: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `mean_return` needs of a trajectory."""
    return {key: trajectory[key] for key in ("reward", "is_last") if key in trajectory}


def mean_return(trajectories: Sequence[Mapping[str, np.ndarray]]) -> float | None:
    """The mean sum of rewards of whole episodes; None if there are none, or one of them has no rewards.

    A trajectory that stops before its episode does, as its ``is_last`` says, is no whole episode.
    """
    whole = [trajectory for trajectory in trajectories if "is_last" not in trajectory or trajectory["is_last"][-1]]
    if not whole or any("reward" not in trajectory for trajectory in whole):
        return None
    return float(np.mean([float(trajectory["reward"].sum()) for trajectory in whole]))
