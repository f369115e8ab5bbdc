"""Minari, the Farama Foundation's format of offline data: its sets in, ours out. Needs the extra `aime-gym[minari]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import (
    IMAGE,
    Reader,
    body_of_spaces,
    from_own_actions,
    get_embodiment,
    has_bounds,
    is_own,
    range_of,
)
from aime_gym.bodies.sensors import IMAGE_SIZE
from aime_gym.data.trajectories import (
    Trajectory,
    check_trajectory,
)
from aime_gym.errors import AimeGymError, warn_caller
from aime_gym.observations import from_shown, to_sensors

PREFIX = "minari:"


def read_minari(source: str) -> tuple[Embodiment, list[Trajectory]]:
    """Reads a local Minari data set as trajectories.

    Args:
        source: ``"minari:DATASET-ID"``.

    Returns:
        The body, and its trajectories; actions are scaled from the bounds of the set's space to [-1, 1].

    Raises:
        AimeGymError: If Minari is not installed, there is no such local data set, its spaces are of another kind, or an
            episode does not pass the checks of our own files.
    """
    dataset_id = source.removeprefix(PREFIX)
    dataset = _load(dataset_id)
    space: Any = dataset.action_space
    spec = dataset.env_spec
    read: Callable[[Any], dict[str, np.ndarray]]
    if spec is not None and is_own(spec):
        body = get_embodiment(spec.kwargs["embodiment"], imports=False)
        read = _own_reader(source, body, spec, dataset.observation_space)
    else:
        endless = isinstance(space, gymnasium.spaces.Box) and not has_bounds(space)
        dreamt = spec is not None and str(spec.entry_point).startswith("aime_gym.")  # of whichever model it was
        has_env = spec is not None and not endless and not dreamt
        if endless:
            space = _range_of(source, dataset)
        name, limit = (spec.id, spec.max_episode_steps) if has_env else (dataset_id, None)
        body = body_of_spaces(name, dataset.observation_space, space, limit)
        if not has_env:
            body = replace(body, logged_range=range_of(space))
        read = Reader(name, dataset.observation_space).read
    trajectories = []
    for episode in _episodes(source, dataset):
        actions = from_own_actions(episode.actions, space)
        trajectories.append(_trajectory(f"{source}, episode {episode.id}", episode, actions, read))
        check_trajectory(f"{source}, episode {episode.id}", trajectories[-1])
    return body, trajectories


def _load(dataset_id: str) -> Any:
    """Minari's own `load_dataset`, which other files in its folder do not disturb."""
    minari = import_minari()
    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise AimeGymError(
            f"There is no local Minari data set {dataset_id!r}: `minari download {dataset_id}` fetches public ones. "
            f"Local: {', '.join(local_ids()) or 'none'}."
        ) from error
    except Exception as error:  # a file from outside can fail in any way inside Minari
        raise AimeGymError(f"Minari cannot read its data set {dataset_id} ({error!r}).") from error


def local_ids() -> list[str]:
    """What lies in Minari's folder; its own list fails as soon as one id is malformed."""
    from minari.storage.datasets_root_dir import get_dataset_path

    root = Path(get_dataset_path())
    ids = [path.parent.relative_to(root) for path in root.rglob("data") if path.is_dir()]
    return sorted(name.as_posix() for name in ids if not any(part.startswith(".") for part in name.parts))


def _episodes(source: str, dataset: Any) -> Iterator[Any]:
    """The episodes of a data set; an `AimeGymError` where Minari cannot read one."""
    episodes = dataset.iterate_episodes()
    while True:
        try:
            yield next(episodes)
        except StopIteration:
            return
        except Exception as error:  # see `_load`
            raise AimeGymError(
                f"{source}: Minari cannot read its episodes ({error!r}). In the formats arrow and parquet it fails at "
                "infos of one number a step: record them as hdf5 (data_format='hdf5'), or without infos."
            ) from error


def _range_of(source: str, dataset: Any) -> gymnasium.spaces.Box:
    """A Box from the lowest to the highest action of a data set whose own space has no bounds, which is said."""
    lowest, highest = zip(*((e.actions.min(0), e.actions.max(0)) for e in _episodes(source, dataset)), strict=True)
    low, high = np.min(lowest, 0).astype(np.float64), np.max(highest, 0).astype(np.float64)
    warn_caller(
        f"The actions of {source} have no bounds: -1 and 1 stand for the lowest and the highest of the data, "
        f"{low.ravel().tolist()} and {high.ravel().tolist()}, and its model dreams without its env."
    )
    return gymnasium.spaces.Box(low, high, dtype=np.float64)


def _own_reader(
    source: str, body: Embodiment, spec: EnvSpec, space: gymnasium.Space
) -> Callable[[Any], dict[str, np.ndarray]]:
    """Reads what an env of this package showed, whatever its obs_type."""
    sensors = body.observed(spec.kwargs.get("setup", "mdp"))
    if isinstance(space, gymnasium.spaces.Dict):
        return partial(from_shown, sensors)
    if space.shape == (IMAGE_SIZE, IMAGE_SIZE, 3):
        return lambda shown: {IMAGE: shown}
    if space.shape == (sum(sensor.dim for sensor in sensors),):
        return lambda shown: to_sensors(sensors, shown)
    raise AimeGymError(
        f"{source} was recorded in an env of {body.name} that shows {space}: expected obs_type 'state', 'dict' or "
        "'image', without a wrapper that changes it."
    )


def _trajectory(
    told: str, episode: Any, actions: np.ndarray, read: Callable[[Any], dict[str, np.ndarray]]
) -> Trajectory:
    """An episode of L steps as rows 0 to L."""
    rows, seen = len(actions) + 1, episode.observations
    for key, part in _parts(seen):
        if len(part) != rows:
            raise AimeGymError(
                f"{told}: {len(actions)} actions come with {rows} observations{key and f' of {key!r}'}; "
                f"got {len(part)}."
            )
    observed = [read(_row(seen, t)) for t in range(rows)]
    sensors = {name: np.stack([row[name] for row in observed]) for name in observed[0]}
    physics = (episode.infos or {}).get("physics")
    terminal = np.concatenate([[False], np.asarray(episode.terminations, bool)])
    return {
        **sensors,
        "pre_action": np.concatenate([np.zeros_like(actions[:1]), actions]).astype(np.float32),
        "reward": np.concatenate([[0.0], np.asarray(episode.rewards, np.float64)]).astype(np.float32)[:, None],
        "is_first": np.arange(rows) == 0,
        "is_last": np.arange(rows) == rows - 1,
        "is_terminal": terminal,
        **({"physics": np.asarray(physics, np.float64)} if physics is not None and len(physics) == rows else {}),
    }


def _parts(observations: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays in nested dicts and tuples, with the path to each."""
    if isinstance(observations, dict | tuple):
        for key, part in observations.items() if isinstance(observations, dict) else enumerate(observations):
            yield from _parts(part, f"{name}/{key}" if name else str(key))
    else:
        yield name, observations


def _row(observations: Any, t: int) -> Any:
    if isinstance(observations, dict):
        return {name: _row(part, t) for name, part in observations.items()}
    return tuple(_row(part, t) for part in observations) if isinstance(observations, tuple) else observations[t]


def import_minari() -> Any:
    """The package `minari`, or an `AimeGymError` that says how to install it."""
    try:
        import minari
    except ImportError as error:
        raise AimeGymError(f"Minari is not installed ({error}): pip install 'aime-gym[minari]'.") from error
    return minari
