"""`aime-gym render`: images for trajectories, from the physics states that they store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from aime_gym import tasks
from aime_gym.claims import all_claimed
from aime_gym.data.metadata import read_metadata, recorded_tasks
from aime_gym.data.trajectories import load_trajectory, trajectory_keys, trajectory_paths, write_trajectory
from aime_gym.embodiments import Embodiment, get_embodiment
from aime_gym.envs.rendering import MuJoCoRenderer, choose_backend
from aime_gym.errors import AimeGymError
from aime_gym.parallel import available_cores, run_in_parallel
from aime_gym.pictures import IMAGE_SIZE


@dataclass
class Render:
    """Add to trajectories the images that the real env shows; the same command again goes on where it stopped."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trajectories with physics, as `aime-gym collect` makes them. Their files are replaced one by one."""
    embodiment: str | None = None
    """Only for data sets that do not say which body they are of."""
    workers: int = field(default_factory=available_cores)
    """Processes."""

    def run(self) -> None:
        """Renders what lacks images, after a look at all folders."""
        if not self.datasets or self.workers < 1:
            raise AimeGymError("Expected one folder of trajectories or more, and --workers of 1 or more.")
        for folder in self.datasets:
            trajectory_paths(folder)  # which says so if there is no such folder
        with all_claimed(*self.datasets) as folders:
            jobs = {folder: jobs_of(folder, self.embodiment) for folder in folders}
            for folder, missing in jobs.items():
                if missing:
                    named = {str(job.path): job for job in missing}
                    run_in_parallel(render_file, named, self.workers, f"Rendering {folder}", "trajectories")
                print(f"All {len(trajectory_paths(folder))} trajectories of {folder} have images.")


class Job(NamedTuple):
    """A file to be rendered, and whose physics it holds."""

    path: Path
    embodiment: str
    task: str


def jobs_of(folder: Path, embodiment: str | None = None) -> list[Job]:
    """The files of a folder that lack images.

    Args:
        folder: Of trajectories.
        embodiment: Their body, where the folder's `dataset.json` does not say it.

    Raises:
        AimeGymError: If the folder is empty, its body is unknown, a file has neither images nor physics, or the
            physics are not all that the env shows.
    """
    paths = trajectory_paths(folder)
    if not paths:
        raise AimeGymError(f"{folder} holds no trajectories (0.npz, 1.npz, ...).")
    metadata = read_metadata(folder)
    given = get_embodiment(embodiment) if embodiment else None
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
            continue
        if "physics" not in keys:
            raise AimeGymError(
                f"{path} has no 'physics' (qpos and qvel a row), from which images are rendered; it has "
                f"{', '.join(keys)}. Data sets made by `aime-gym collect` have it."
            )
        jobs.append(Job(path, body.name, task))
    if jobs:
        choose_backend()  # where there is no GL, say so before any process starts
    return jobs


def render_file(job: Job) -> None:
    """Adds ``image`` `[T, 64, 64, 3]` uint8 to a file, which is written whole or stays as it was.

    Raises:
        AimeGymError: If the file is broken, its physics are of another body, or no GL library works.
    """
    trajectory = load_trajectory(job.path, required=("physics",))
    physics, renderer = _scene(job.embodiment, job.task)
    images = []
    for state in trajectory["physics"]:
        try:
            tasks.set_physics_state(physics, state)
        except AimeGymError as error:
            raise AimeGymError(f"{job.path}: 'physics' is not of {job.embodiment} {job.task}. {error}") from error
        images.append(renderer.render())
    write_trajectory(job.path, {**trajectory, "image": np.stack(images)})


@cache  # compiling a model and making a GL context take a second
def _scene(embodiment: str, task: str) -> tuple[Any, MuJoCoRenderer]:
    world = tasks.load(get_embodiment(embodiment), task)
    world.reset()  # some tasks hide parts of the model as an episode begins
    return world.physics, MuJoCoRenderer(world.physics, IMAGE_SIZE, IMAGE_SIZE)


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
