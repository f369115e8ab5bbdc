"""The commands `aime-gym import`, `render`, `mix` and `to-minari`: data sets made of files and of data sets."""

from __future__ import annotations

import copy
import inspect
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import gymnasium
import numpy as np
import tyro

from aime_gym import REAL
from aime_gym.bodies import tasks
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import IMAGE, body_document, get_embodiment, logged_body, one_body
from aime_gym.bodies.sensors import IMAGE_SIZE, Rendering
from aime_gym.data.demonstrations import mean_return, rewards_of
from aime_gym.data.minari_sets import import_minari, local_ids
from aime_gym.data.trajectories import (
    RENDERING,
    check_named_once,
    load_trajectory,
    metadata_to_go_on,
    note_rendering,
    read_metadata,
    recorded_tasks,
    rendering_of,
    save_trajectory,
    trajectories_digest,
    trajectory_keys,
    trajectory_paths,
    write_metadata,
    write_trajectory,
)
from aime_gym.errors import AimeGymError
from aime_gym.flags import Options
from aime_gym.gl import choose_backend
from aime_gym.observations import action_space, observation_space, to_shown
from aime_gym.parallel import all_claimed, available_cores, claimed, run_in_parallel

if TYPE_CHECKING:
    from aime_gym.envs.rendering import MuJoCoRenderer  # it imports torch, which takes seconds


@dataclass
class Import(Options):
    """Make a data set of logged arrays in files, which `aime-gym train` takes. No env is needed.

    Each npz, HDF5 or Parquet file holds one episode, or several whose ends are marked, as D4RL's do, or that are
    numbered, as LeRobot's are. Minari's sets need no import: aime-gym train minari:ID.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """npz, HDF5 and Parquet files, and folders of LeRobot's data sets, whose videos are left out."""
    observation: tuple[str, ...] = ()
    """The arrays that were seen, with a row a step, or one more; bytes [.., H, W, 3] are pictures. `observations`,
    `observation` or `observation.state` by default, whichever is there."""
    action: str | None = None
    """What was done then: numbers of any range. `actions` or `action` by default."""
    reward: str | None = None
    """What came of it; `rewards`, `reward` or `next.reward` by default. `zero` if nothing is known: a function of yours
    (reward_fn) can pay for dreams."""
    termination: str | None = None
    """Which rows end an episode by themselves; `terminations` or `terminals` by default, if there are such."""
    truncation: str | None = None
    """After which rows an episode was cut; `truncations` or `timeouts` by default, if there are such."""
    episode: str | None = None
    """The number of the episode that each row is of, in place of marked ends; `episode_index` by default, if it is
    there."""
    next_observation: tuple[str, ...] = ()
    """What each action led to, as many as observations; `next_observations` by default, if it is there."""
    choices: tuple[str, ...] = ()
    """Which of these arrays hold whole numbers that are choices: `action=4` for one among 0 to 3, `legs=3,2` for two
    numbers a row, `buttons=binary` for such that are on or off, `mode` for as many as the data show."""
    out: Path = Path("datasets/logged")
    """The new folder."""
    name: str | None = None
    """What the body is called; the name of the folder by default."""
    embodiment: str | None = None
    """The id of the Gymnasium env that the data are of, if there is one: it bounds the actions, and can be asked."""

    def run(self) -> None:
        """Reads, checks and writes, and prints where the data set is.

        Raises:
            AimeGymError: If something cannot be used; all problems are told at once, with file, row and name.
        """
        from aime_gym.data.logged import choices_in, write_logged
        from aime_gym.data.tables import read_sources

        if not self.files:
            raise AimeGymError("Expected files: aime-gym import logs/*.npz --observation angle speed --action torque")
        if local := [path for path in map(str, self.files) if path.startswith("minari:")]:
            raise AimeGymError(f"Minari's sets need no import: aime-gym train {local[0]}.")
        following: tuple[str, ...] | str | None = self.next_observation or (None if len(self.observation) < 2 else ())
        names = {
            "observations": self.observation if len(self.observation) > 1 else next(iter(self.observation), None),
            "actions": self.action,
            "rewards": () if self.reward == "zero" else self.reward,
            "terminations": self.termination,
            "truncations": self.truncation,
            "next_observations": following[0] if following and len(self.observation) < 2 else following,
            "episodes": self.episode,
        }
        problems: list[str] = []
        if following and len(following) != max(len(self.observation), 1):
            problems.append(f"--next-observation names {len(following)} arrays, --observation {len(self.observation)}.")
        sources = read_sources(self.files, names, problems)
        for place, source in enumerate(sources):
            if self.reward == "zero":
                source = source._replace(rewards=np.zeros(len(source.actions)))
            if isinstance(source.next_observations, dict):  # called as what they follow on
                renamed = dict(zip(self.observation, source.next_observations.values(), strict=False))
                source = source._replace(next_observations=renamed)
            sources[place] = source
        own, seen = choices_in(self.choices, sources, problems)
        out = write_logged(sources, self.out, self.name, self.embodiment, own, seen, problems)
        count = len(trajectory_paths(out))
        train = ["aime-gym", "train", str(out), "--out", f"models/{self.name or out.resolve().name}"]
        print(f"{count} episodes are in {out}: {shlex.join(train)}")


@dataclass
class Render(Options):
    """Add to trajectories the images that the real env shows; the same command again goes on where it stopped."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trajectories with physics, as `aime-gym collect` makes them. Their files are replaced one by one."""
    embodiment: str | None = None
    """Only for data sets that do not say which body they are of."""
    fast: bool = False
    """Draw three times as many images a second, which differ by some 0.1 of 255 on average. A model of them sees the
    world drawn alike."""
    workers: int = field(default_factory=available_cores)
    """Processes."""

    def run(self) -> None:
        """Renders what lacks images, after a look at all folders."""
        if not self.datasets or self.workers < 1:
            raise AimeGymError("Expected one folder of trajectories or more, and --workers of 1 or more.")
        for folder in self.datasets:
            trajectory_paths(folder)  # which says so if there is no such folder
        with all_claimed(*self.datasets) as folders:
            rendering: Rendering = "fast" if self.fast else "full"
            jobs = {folder: jobs_of(folder, self.embodiment, rendering) for folder in folders}
            for folder, missing in jobs.items():
                if missing:
                    note_rendering(folder, rendering)
                    named = {str(job.path): job for job in missing}
                    run_in_parallel(render_file, named, self.workers, f"Rendering {folder}", "trajectories")
                print(f"All {len(trajectory_paths(folder))} trajectories of {folder} have images.")


class Job(NamedTuple):
    """A file to be rendered, and whose physics it holds."""

    path: Path
    embodiment: str
    task: str
    rendering: Rendering


def jobs_of(folder: Path, embodiment: str | None = None, rendering: Rendering = "full") -> list[Job]:
    """The files of a folder that lack images.

    Args:
        folder: A folder of trajectories.
        embodiment: Their body, where the folder's `dataset.json` does not say it.
        rendering: How they are to be drawn.

    Raises:
        AimeGymError: If the folder is empty, its body is unknown, a file has neither images nor physics, the physics
            are not all that the env shows, or there are images that were drawn otherwise.
    """
    paths = trajectory_paths(folder)
    if not paths:
        raise AimeGymError(f"{folder} holds no trajectories (0.npz, 1.npz, ...).")
    metadata = read_metadata(folder)
    given = get_embodiment(embodiment) if embodiment else None
    if (logged := logged_body(metadata)) is not None:
        logged.check_env("nothing can be rendered, but from_arrays takes pictures beside the rest.")
    body = get_embodiment(metadata["embodiment"], imports=False) if "embodiment" in metadata else given
    if body is None:
        raise AimeGymError(f"{folder} does not say which body it is of: give --embodiment.")
    if given not in (None, body):
        raise AimeGymError(f"{folder} is of {body.name}; --embodiment is {embodiment}.")
    task = _task(folder, body, metadata)
    jobs = []
    for path in paths:
        keys = trajectory_keys(path)
        if "image" in keys:
            if (drawn := rendering_of(metadata)) != rendering:
                raise AimeGymError(
                    f"{folder} holds images of the rendering {drawn!r}, not {rendering!r}: "
                    f"{'leave --fast away' if drawn == 'full' else 'give --fast'}, or render a copy without images."
                )
            continue
        if "physics" not in keys:
            raise AimeGymError(
                f"{path} has no 'physics' (qpos and qvel a row), from which images are rendered; it has "
                f"{', '.join(keys)}. Data sets made by `aime-gym collect` have it."
            )
        jobs.append(Job(path, body.name, task, rendering))
    if jobs:
        choose_backend()  # where there is no GL, say so before any process starts
    return jobs


def render_file(job: Job) -> None:
    """Adds ``image`` `[T, 64, 64, 3]` uint8 to a file, which is written whole or stays as it was.

    Raises:
        AimeGymError: If the file is broken, its physics are of another body, or no GL library works.
    """
    trajectory = load_trajectory(job.path, required=("physics",))
    physics, renderer = _scene(job.embodiment, job.task, job.rendering)
    images = []
    for state in trajectory["physics"]:
        try:
            tasks.set_physics_state(physics, state)
        except AimeGymError as error:
            raise AimeGymError(f"{job.path}: 'physics' is not of {job.embodiment} {job.task}. {error}") from error
        images.append(renderer.render())
    write_trajectory(job.path, {**trajectory, "image": np.stack(images)})


@cache  # compiling a model and making a GL context take a second
def _scene(embodiment: str, task: str, rendering: Rendering) -> tuple[Any, MuJoCoRenderer]:
    world = tasks.load(get_embodiment(embodiment), task)
    world.reset()  # some tasks hide parts of the model as an episode begins
    from aime_gym.envs.rendering import MuJoCoRenderer

    return world.physics, MuJoCoRenderer(world.physics, IMAGE_SIZE, IMAGE_SIZE, rendering=rendering)


def _task(folder: Path, body: Embodiment, metadata: Mapping[str, Any]) -> str:
    """The task whose model the physics are of; bodies look alike in all tasks unless a target is drawn anew."""
    recorded = sorted(recorded_tasks(metadata)) or [body.tasks[0]]
    for task in recorded:
        if tasks.hides_target(body, body.check_task(task)):
            raise AimeGymError(
                f"{folder} is of {body.name} {task}, whose images show a target or terrain that was drawn at every "
                "reset and is not part of the physics: it cannot be rendered afterwards."
            )
    return recorded[0]


@dataclass
class Mix(Options):
    """Make one data set of several; the same command again goes on where it stopped."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trajectories of one embodiment."""
    out: Path
    """The new folder."""
    trajectories: int | None = None
    """At most so many from each folder, spread evenly over it; all by default."""
    first: int | None = None
    """Only the first so many rows of each trajectory: many beginnings at the size of a few episodes."""
    observations_only: bool = False
    """Leave out actions, rewards and physics: demonstrations to imitate from observation."""

    def run(self) -> None:
        """Copies trajectories, whole files or none, and prints where they are.

        Raises:
            AimeGymError: If there is no folder, they are broken or of different embodiments, or the new one holds
                something else, or other trajectories of them.
        """
        if not self.datasets or any(number is not None and number < 1 for number in (self.trajectories, self.first)):
            raise AimeGymError(
                "Expected one folder of trajectories or more, and --trajectories and --first of 1 or more."
            )
        check_named_once(self.datasets)
        sources = {str(folder): read_metadata(folder) for folder in self.datasets}
        bodies = {metadata.get("embodiment") for metadata in sources.values()}
        if len(bodies) > 1:
            raise AimeGymError(f"These data sets are of different embodiments: {', '.join(sorted(map(str, bodies)))}.")
        logged = [body for metadata in sources.values() if (body := logged_body(metadata)) is not None]
        files = {str(folder): self._chosen(folder) for folder in self.datasets}
        paths = [path for folder in self.datasets for path in files[str(folder)]]
        chosen = {folder: [int(path.stem) for path in own] for folder, own in files.items()}
        metadata = {
            **({"embodiment": body} if (body := bodies.pop()) else {}),
            **({"body": body_document(one_body(logged))} if logged else {}),
            "sources": sources,
            "trajectories": self.trajectories,
            **({"first": self.first} if self.first else {}),
            "observations_only": self.observations_only,
        }
        rendering_of(metadata)
        if not paths:
            raise AimeGymError(f"There are no trajectories in {', '.join(map(str, self.datasets))}.")
        content = {folder: trajectories_digest(own) for folder, own in files.items()}
        with claimed(self.out):
            self._fill(metadata, chosen, content, paths)

    def _fill(
        self, metadata: dict[str, Any], chosen: dict[str, list[int]], content: dict[str, str], paths: list[Path]
    ) -> None:
        before = metadata_to_go_on(self.out)
        same = {key: value for key, value in before.items() if key in metadata} == metadata
        if trajectory_paths(self.out) and not same:
            raise AimeGymError(f"{self.out} holds another data set: choose another --out.")
        # Files that are there stay, but of which trajectory a file is changes where a source grows or is made anew.
        changed = [folder for folder, own in chosen.items() if before.get("chosen", chosen).get(folder) != own]
        changed += [folder for folder, own in content.items() if before.get("content", content).get(folder) != own]
        if changed and trajectory_paths(self.out):
            raise AimeGymError(
                f"{self.out} was begun with other trajectories of {', '.join(dict.fromkeys(changed))} than those "
                "there now: choose another --out, or delete it and mix again."
            )
        metadata |= {"chosen": chosen, "content": content}
        metadata |= {RENDERING: before[RENDERING]} if RENDERING in before else {}
        write_metadata(self.out, metadata)
        rewards = []
        for index, path in enumerate(paths):
            trajectory = load_trajectory(path, images=True)
            trajectory = {key: value[: self.first] for key, value in trajectory.items()}
            rewards.append(rewards_of(trajectory))
            if self.observations_only:
                hidden = ("pre_action", "reward", "physics", "is_first", "is_last", "is_terminal")
                trajectory = {key: value for key, value in trajectory.items() if key not in hidden}
            if not (self.out / f"{index}.npz").exists():
                save_trajectory(self.out, index, trajectory)
        if (earned := mean_return(rewards)) is not None:
            metadata["expert_return"] = earned
            write_metadata(self.out, metadata)
        print(f"{len(paths)} trajectories are in {self.out}.")

    def _chosen(self, folder: Path) -> list[Path]:
        paths = trajectory_paths(folder)
        count = min(len(paths), self.trajectories or len(paths))
        return [paths[i] for i in np.linspace(0, len(paths) - 1, count).round().astype(int)]


@dataclass
class ToMinari(Options):
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
        minari = import_minari()
        _check_id(self.dataset_id)
        if self.dataset_id in local_ids():
            raise AimeGymError(f"Minari has {self.dataset_id} already: choose another id, or `minari delete` it.")
        metadata = read_metadata(self.dataset)
        if not metadata.get("embodiment"):
            raise AimeGymError(f"{self.dataset} does not say which body it is of.")
        paths = trajectory_paths(self.dataset)
        if not paths:
            raise AimeGymError(f"{self.dataset} holds no trajectories (0.npz, 1.npz, ...).")
        has_image = all(IMAGE in trajectory_keys(path) for path in paths)
        if (logged := logged_body(metadata)) is not None:
            logged.check_env("Minari's sets of ours name their env; minari.create_dataset_from_buffers needs none.")
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
                action_space=action_space(body),
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
            f"Minari allows no id {dataset_id!r}: expected letters, digits, - and _, maybe after a namespace of "
            "two characters or more and a slash, and a version, as in walker/walk-v0."
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
    shown = to_shown(body.sensors, shown)
    if has_image:
        shown = {**shown, IMAGE: trajectory[IMAGE]} if body.sensors else trajectory[IMAGE]
    steps, actions = len(trajectory["pre_action"]) - 1, trajectory["pre_action"][1:].astype(np.float32)
    terminal = trajectory.get("is_terminal", np.zeros(steps + 1, bool)).reshape(-1)[1:].astype(bool)
    return EpisodeBuffer(
        id=index,
        observations=shown,
        actions=body.choices.decode(actions) if body.choices else actions,  # type: ignore[arg-type]
        rewards=trajectory["reward"].reshape(-1)[1:].tolist(),
        terminations=terminal.tolist(),
        truncations=((np.arange(steps) == steps - 1) & ~terminal).tolist(),
        infos={"physics": trajectory["physics"]} if "physics" in trajectory else None,
    )
