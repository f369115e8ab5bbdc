"""Minari, the Farama Foundation's format of offline data: its sets in, ours out. Needs the extra `aime-gym[minari]`."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import tyro
from gymnasium.envs.registration import EnvSpec

from aime_gym.data.metadata import read_metadata, recorded_tasks
from aime_gym.data.trajectories import Trajectory, check_trajectory, load_trajectory, trajectory_keys, trajectory_paths
from aime_gym.embodiments import Embodiment, get_embodiment
from aime_gym.envs.spaces import action_space, observation_space, to_sensors
from aime_gym.errors import AimeGymError
from aime_gym.foreign import IMAGE, Reader, body_of_spaces, from_own_actions, is_own
from aime_gym.pictures import IMAGE_SIZE
from aime_gym.registration import REAL

PREFIX = "minari:"


def read_minari(source: str) -> tuple[Embodiment, list[Trajectory]]:
    """Reads a local Minari data set as trajectories.

    Args:
        source: ``"minari:DATASET-ID"``.

    Returns:
        The body, and its trajectories; actions are scaled from the bounds of the set's space to [-1, 1].

    Raises:
        AimeGymError: If Minari is not installed, there is no such local data set, its spaces are not Boxes, or an
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
        name, limit = (dataset_id, None) if spec is None else (spec.id, spec.max_episode_steps)
        body = body_of_spaces(name, dataset.observation_space, space, limit)
        read = Reader(name, dataset.observation_space).read
    trajectories = []
    for episode in _episodes(source, dataset):
        actions = from_own_actions(episode.actions, space)
        trajectories.append(_trajectory(f"{source}, episode {episode.id}", episode, actions, read))
        check_trajectory(f"{source}, episode {episode.id}", trajectories[-1])
    return body, trajectories


def _load(dataset_id: str) -> Any:
    """Minari's own `load_dataset`, whatever else lies in its folder."""
    minari = _import_minari()
    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise AimeGymError(
            f"There is no local Minari data set {dataset_id!r}: `minari download {dataset_id}` fetches public ones. "
            f"Local: {', '.join(_local_ids()) or 'none'}."
        ) from error
    except Exception as error:  # a file from outside can fail in any way inside Minari
        raise AimeGymError(f"Minari cannot read its data set {dataset_id} ({error!r}).") from error


def _local_ids() -> list[str]:
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
        except Exception as error:  # as of `_load`
            raise AimeGymError(
                f"{source}: Minari cannot read its episodes ({error!r}). In the formats arrow and parquet it fails at "
                "infos of one number a step: record them as hdf5 (data_format='hdf5'), or without infos."
            ) from error


def _own_reader(
    source: str, body: Embodiment, spec: EnvSpec, space: gymnasium.Space
) -> Callable[[Any], dict[str, np.ndarray]]:
    """Reads what an env of this package showed, whatever its obs_type."""
    sensors = body.observed(spec.kwargs.get("setup", "mdp"))
    if isinstance(space, gymnasium.spaces.Dict):
        return dict
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
    for key, part in seen.items() if isinstance(seen, dict) else {"": seen}.items():
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


def _row(observations: Any, t: int) -> Any:
    return {name: part[t] for name, part in observations.items()} if isinstance(observations, dict) else observations[t]


@dataclass
class ToMinari:
    """Write a data set of trajectories as a local Minari data set, with images where all of them have some."""

    dataset: Annotated[Path, tyro.conf.Positional]
    """A folder of trajectories with actions and rewards."""
    dataset_id: Annotated[str, tyro.conf.Positional]
    """Its id in Minari, e.g. walker/walk-v0."""

    def run(self) -> None:
        """Writes it and prints how to read it back.

        Raises:
            AimeGymError: If Minari is not installed, has such a data set already or allows no such id, or the folder
                is no data set.
        """
        minari = _import_minari()
        _check_id(self.dataset_id)
        if self.dataset_id in _local_ids():
            raise AimeGymError(f"Minari has {self.dataset_id} already: choose another id, or `minari delete` it.")
        metadata = read_metadata(self.dataset)
        if not metadata.get("embodiment"):
            raise AimeGymError(f"{self.dataset} does not say which body it is of.")
        paths = trajectory_paths(self.dataset)
        if not paths:
            raise AimeGymError(f"{self.dataset} holds no trajectories (0.npz, 1.npz, ...).")
        has_image = all(IMAGE in trajectory_keys(path) for path in paths)
        body = get_embodiment(metadata["embodiment"], imports=False)
        tasks = sorted(recorded_tasks(metadata)) or [body.tasks[0]]
        env = copy.deepcopy(gymnasium.spec(REAL))
        obs_type = "dict" if body.sensors else "image"
        env.kwargs = {"embodiment": body.name, "task": tasks[0], "obs_type": obs_type}  # an env has one task
        episodes = [_episode(index, path, body, has_image) for index, path in enumerate(paths)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no author is named
            minari.create_dataset_from_buffers(
                self.dataset_id,
                episodes,
                env=env,
                observation_space=_space(body, has_image),
                action_space=action_space(body.action_dim),
                algorithm_name=str(metadata.get("policy", "")) or None,
                description=f"{body.name} {', '.join(tasks)}: trajectories of aime_gym, one agent step a row.",
                **_lossless(minari),
            )
        print(f"{len(paths)} trajectories are in Minari: minari.load_dataset({self.dataset_id!r}).")


def _check_id(dataset_id: str) -> None:
    """Minari itself checks ids, and that they have a version, only after it has begun to write."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:  # the latter where there is no version
        raise AimeGymError(
            f"Minari allows no id {dataset_id!r}: expected letters, digits, - and _, maybe after a namespace and a "
            "slash, and a version, as in walker/walk-v0."
        ) from error


def _lossless(minari: Any) -> dict[str, bool]:
    """Keywords by which images stay what they are; Minari before 0.5.4 has none, and keeps them as JPEG."""
    known = inspect.signature(minari.create_dataset_from_buffers).parameters
    return {"jpeg_encoding": False} if "jpeg_encoding" in known else {}


def _space(body: Embodiment, has_image: bool) -> gymnasium.Space:
    """What the written episodes show: the body's sensors, and the image beside them or alone."""
    if not body.sensors:
        return observation_space((), "image")
    space = observation_space(body.sensors, "dict")
    assert isinstance(space, gymnasium.spaces.Dict)
    return gymnasium.spaces.Dict({**space, IMAGE: observation_space((), "image")}) if has_image else space


def _episode(index: int, path: Path, body: Embodiment, has_image: bool) -> Any:
    from minari.data_collector import EpisodeBuffer

    required = ["pre_action", "reward", *(sensor.name for sensor in body.sensors)]
    trajectory = load_trajectory(path, required if body.sensors else [*required, IMAGE], images=has_image)
    shown: Any = {sensor.name: trajectory[sensor.name].astype(np.float32) for sensor in body.sensors}
    if has_image:
        shown = {**shown, IMAGE: trajectory[IMAGE]} if body.sensors else trajectory[IMAGE]
    steps = len(trajectory["pre_action"]) - 1
    terminal = trajectory.get("is_terminal", np.zeros(steps + 1, bool)).reshape(-1)[1:].astype(bool)
    return EpisodeBuffer(
        id=index,
        observations=shown,
        actions=trajectory["pre_action"][1:].astype(np.float32),  # type: ignore[arg-type]
        rewards=trajectory["reward"].reshape(-1)[1:].tolist(),
        terminations=terminal.tolist(),
        truncations=((np.arange(steps) == steps - 1) & ~terminal).tolist(),
        infos={"physics": trajectory["physics"]} if "physics" in trajectory else None,
    )


def _import_minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise AimeGymError(f"Minari is not installed ({error}): pip install 'aime-gym[minari]'.") from error
    return minari
