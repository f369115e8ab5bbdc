"""Demonstrations: what an expert saw, without what it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import IMAGE, Reader, make_foreign
from aime_gym.bodies.sensors import to_model_size, to_model_sizes
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.logged import write_set
from aime_gym.data.minari_sets import PREFIX, read_minari
from aime_gym.data.tables import HDF5, PARQUET, checked_table, cut, names_in, read_sources, refuse
from aime_gym.data.trajectories import load_trajectory, read_metadata, trajectory_keys, trajectory_paths
from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.files import LARGEST_NPZ, reason
from aime_gym.observations import from_shown, to_sensors

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


FILMS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
"""Files that are read as films."""

LEAST_FRAMES = 0.9
"""Frames of a film for each agent step."""


@dataclass(frozen=True)
class FilesOfOthers:
    """How the files of other people are read as demonstrations of a body.

    Args:
        body: The body that they show.
        arrays: What arrays are called in files, by sensor (``"image"`` for pictures), or ``""`` for one array of all
            sensors in the body's order. By default arrays that are called as sensors, else ``observations``,
            ``observation`` or ``observation.state``.
        reward: What rewards are called; by default `rewards`, `reward` or `next.reward`, if there are such.
        episode: What the number of the episode of each row is called; by default ``episode_index``, if it is there.
        rate: Agent steps a second of the body's env, at which frames of films are taken; None takes every frame.
        fps: Frames of a film in a second of what it shows; by default those in which it is played.
    """

    body: Embodiment
    arrays: Mapping[str, str]
    reward: str | None = None
    episode: str | None = None
    rate: float | None = None
    fps: float | None = None

    def write(self, files: Sequence[str | Path], out: Path, task: str | None = None) -> Path:
        """Writes what files show as demonstrations, which hold sensors and pictures of 64 x 64 and nothing else.

        Args:
            files: npz, HDF5 or Parquet files of one episode or several, with or without actions; films, of which each
                is an episode; folders of trajectories; ``"minari:ID"``.
            out: The folder to write. One that holds the same already stays as it is.
            task: What they are demonstrations of, if it is known.

        Returns:
            The folder.

        Raises:
            AimeGymError: If something cannot be used. The message lists all problems; nothing is written then.
        """
        problems: list[str] = []
        shown: list[dict[str, np.ndarray]] = []
        returns: list[float | None] = []
        for file in files:
            try:
                for seen, earned in self._read(file, problems):
                    shown.append(seen)
                    returns.append(earned)
            except AimeGymError as error:
                problems.append(str(error))
        kinds = {tuple(sorted(seen)) for seen in shown}
        if len(kinds) > 1:
            problems.append(f"Files show different sensors: {'; '.join(', '.join(kind) for kind in sorted(kinds))}.")
        refuse(problems)
        if not shown:
            raise AimeGymError("Expected files: aime-gym demonstrations walks/*.npz --body walker")
        whole = [number for number in returns if number is not None]
        known: dict[str, Any] = {"policy": "demonstrations", **({"task": task} if task else {})}
        if len(whole) == len(returns):
            known["expert_return"] = sum(whole) / len(whole)
        write_set(out, self.body, known, shown)
        return out

    def _read(self, file: str | Path, problems: list[str]) -> Iterable[tuple[dict[str, np.ndarray], float | None]]:
        """What each episode of a file shows, by sensor, and what it earned where that is known."""
        path, told = Path(file), str(file)
        if told.startswith(PREFIX):
            body, trajectories = read_minari(told)
            if body.name != self.body.name:
                raise AimeGymError(f"{told} shows {body.name}; expected {self.body.name}.")
            return [self._seen(each) for each in trajectories]
        if path.is_dir() and trajectory_paths(path):
            named = read_metadata(path).get("embodiment", self.body.name)
            if named != self.body.name:
                raise AimeGymError(f"{told} shows {named}; expected {self.body.name}.")
            return [self._seen(load_trajectory(one, (), images=True)) for one in trajectory_paths(path)]
        if path.suffix.lower() in FILMS:
            return [({IMAGE: self._film(path)}, None)]
        known = (".npz", *HDF5, *PARQUET)
        if not path.is_dir() and path.suffix not in known:
            raise AimeGymError(f"{told}: expected {', '.join(known)}, a film ({', '.join(FILMS)}), or {PREFIX}ID.")
        return self._from_arrays(path, problems)

    def _seen(self, trajectory: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float | None]:
        names = [sensor.name for sensor in self.body.sensors]
        return {name: trajectory[name] for name in (*names, IMAGE) if name in trajectory}, mean_return([trajectory])

    def _from_arrays(self, path: Path, problems: list[str]) -> Iterable[tuple[dict[str, np.ndarray], float | None]]:
        arrays = dict(self.arrays)
        if not arrays and path.is_file():
            there = names_in(path)
            arrays = {name: name for name in (*(s.name for s in self.body.sensors), IMAGE) if name in there}
        ours = {own: name for name, own in arrays.items()}
        names = {
            "observations": arrays[""] if [*arrays] == [""] else tuple(ours) or None,
            "actions": (),
            "rewards": self.reward,
            "terminations": None,
            "truncations": None,
            "next_observations": (),
            "episodes": self.episode,
        }
        for source in read_sources([path], names, problems, needed=("observations",)):
            seen = source.observations
            rows = np.shape(next(iter(seen.values())) if isinstance(seen, Mapping) else seen)[:1]
            rewards = np.zeros(rows) if source.rewards is None else source.rewards
            steps = np.zeros((*np.shape(rewards)[:1], 1))  # nobody knows what was done
            table = checked_table(source._replace(actions=steps, rewards=rewards), problems)
            if table is None:
                continue
            table.terminations[:] = False  # the last row is what was seen before, or after, the last step
            earned = [float(part.sum()) for part in np.split(table.rewards, np.flatnonzero(table.ends[:-1]) + 1)]
            for episode, own in zip(cut(table, problems), earned, strict=False):
                columns = {ours.get(key, ""): column for key, column in episode.observations.items()}
                yield self._sensors(str(path), columns), None if source.rewards is None else own

    def _sensors(self, told: str, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays [T, ...] by the names of sensors, or all in one, as the body's sensors [T, D]."""
        flat = columns.get("")
        if flat is not None and (flat.dtype != np.uint8 or flat.ndim != 4):
            return self._split(told, flat)
        columns = {IMAGE: flat} if flat is not None else dict(columns)
        pictures = columns.pop(IMAGE, None)
        seen = from_shown(self.body.sensors, columns)
        dims = {sensor.name: sensor.dim for sensor in self.body.sensors}
        for name, column in seen.items():
            if name not in dims:
                raise unknown_name(f"sensor of {self.body.name}", name, (*dims, IMAGE))
            seen[name] = column = column.reshape(len(column), -1).astype(np.float32)
            if column.shape[1] != dims[name]:
                size = column.shape[1]
                raise AimeGymError(f"{told}: {name!r} has {size} numbers a row; {self.body.name}'s has {dims[name]}.")
        if pictures is not None:
            if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
                kind = f"{pictures.dtype} {list(pictures.shape)}"
                raise AimeGymError(f"{told}: pictures are {kind}; expected uint8 [T, H, W, 3], channels last.")
            seen[IMAGE] = to_model_sizes(middle(pictures))
        return seen

    def _split(self, told: str, flat: np.ndarray) -> dict[str, np.ndarray]:
        if self.body.foreign and not self.body.logged:
            env = make_foreign(self.body.name)
            reader = Reader(self.body.name, env.observation_space)
            env.close()
            rows = [reader.read(row) for row in flat]
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        flat = flat.reshape(len(flat), -1).astype(np.float32)
        sizes = {}
        for setup in ("mdp", "lpomdp"):
            sensors = self.body.observed(setup)
            sizes[sum(sensor.dim for sensor in sensors)] = sensors
        if flat.shape[1] not in sizes:
            orders = "; or ".join(
                f"{size}: {', '.join(f'{sensor.name} {sensor.dim}' for sensor in sensors)}"
                for size, sensors in sizes.items()
            )
            raise AimeGymError(f"{told}: a row has {flat.shape[1]} numbers; {self.body.name} shows {orders}.")
        return to_sensors(sizes[flat.shape[1]], flat)

    def _film(self, path: Path) -> np.ndarray:
        """The frames of a film at the body's steps [T, 64, 64, 3] uint8."""
        import imageio.v2 as imageio  # late: it takes a while

        if not path.is_file():
            raise AimeGymError(f"There is no file {path}.")
        frames: list[np.ndarray] = []
        try:
            film: Any
            with imageio.get_reader(path, "ffmpeg") as film:
                # imageio 2.38's own fps= keeps the first frames (findings/imageio_fps_keeps_the_first_frames.sh).
                fps = self.fps or float(film.get_meta_data()["fps"])
                every = 1.0 if self.rate is None else fps / self.rate
                if every < LEAST_FRAMES:
                    told = f"{path} has {fps:g} frames a second; {self.body.name} takes {self.rate:g} steps a second"
                    raise AimeGymError(f"{told}, each of which has to be seen.")
                for number, frame in enumerate(film):
                    while round(len(frames) * every) <= number:
                        frames.append(to_model_size(middle(frame[None])[0]))
                        if len(frames) * frames[0].nbytes > LARGEST_NPZ:
                            raise AimeGymError(f"{path} is too long: cut it into episodes.")
        except AimeGymError:
            raise
        except Exception as error:  # a damaged film makes ffmpeg and its reader fail in any way
            raise AimeGymError(f"{path} is not a readable film ({reason(error)}).") from error
        if len(frames) < 2:
            raise AimeGymError(f"{path} shows {len(frames)} steps of {self.body.name}; expected two or more.")
        return np.stack(frames)


def middle(pictures: np.ndarray) -> np.ndarray:
    """The largest square in the middle of pictures: [T, H, W, 3] -> [T, S, S, 3]."""
    height, width = pictures.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[:, top : top + side, left : left + side]
