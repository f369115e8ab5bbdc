"""Trajectories on disk: a folder of npz files, and `dataset.json`, which says what was collected, how and by whom.

One file `0.npz, 1.npz, ...` a trajectory, in the layout of the released AIME data sets. Row 0 is the reset; row t holds
the action that led to it and the reward that came with it:

| key | shape, dtype |
| --- | --- |
| one per sensor | `[T, dim]` float32; other numbers become float32 in a `TrajectoryDataset` |
| `image` (optional) | `[T, 64, 64, 3]` uint8 |
| `pre_action` | `[T, A]` float32, zeros in row 0 |
| `reward` | `[T, 1]` float32, summed over the action repeat |
| `is_first`, `is_last`, `is_terminal` | `[T]` bool |
| `physics` (ours) | `[T, nq + nv (+ na)]` float64 |
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from aime_gym.bodies import tasks as task_rewards
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.bodies.sensors import Rendering, check_rendering, to_model_sizes
from aime_gym.errors import AimeGymError
from aime_gym.files import (
    DAMAGED_NPZ,
    files_digest,
    npz_names,
    read_json,
    read_npz,
    reason,
    write_atomically,
    write_json,
)

METADATA = "dataset.json"

RENDERING = "rendering"
"""The key of how images were drawn; where it is not there they have full quality."""

_METADATA_KINDS: dict[str, tuple[Any, str]] = {
    "embodiment": (str, "a string"),
    "task": (str, "a string"),
    "expert_return": ((int, float), "a number"),
    "sources": (dict, "an object"),
    "body": (dict, "an object"),
    RENDERING: (str, "a string"),
}


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Writes `dataset.json` whole or not at all."""
    write_json(folder / METADATA, metadata)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Reads `dataset.json`; empty where there is none, as in released data sets.

    Raises:
        AimeGymError: If the file is not a JSON object, or one of its values is of another kind than it should be.
    """
    path = Path(folder) / METADATA
    if not path.exists():
        return {}
    metadata = read_json(path)
    _check_metadata(path, metadata)
    return metadata


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise AimeGymError(f"{path} holds {metadata!r:.80} where an object is expected.")
    for key, (kind, told) in _METADATA_KINDS.items():
        if key in metadata and not isinstance(metadata[key], kind):
            raise AimeGymError(f"{path}: {key!r} is {told}; got {metadata[key]!r:.80}.")
    for source in metadata.get("sources", {}).values():
        _check_metadata(path, source)


def recorded_tasks(metadata: Mapping[str, Any]) -> set[str]:
    """The task of a collected data set, those of the sources of a mixed one."""
    own = {metadata["task"]} if "task" in metadata else set()
    return own.union(*map(recorded_tasks, metadata.get("sources", {}).values()))


def rendering_of(metadata: Mapping[str, Any]) -> Rendering:
    """How the images of a data set were drawn, those of a mixed one as its sources' unless it was rendered itself.

    Raises:
        AimeGymError: If sources differ, or it is unknown.
    """
    if RENDERING in metadata or not metadata.get("sources"):
        return check_rendering(metadata.get(RENDERING, "full"))
    return one_rendering({name: rendering_of(source) for name, source in metadata["sources"].items()})


def one_rendering(renderings: Mapping[str, Rendering]) -> Rendering:
    """The rendering that data sets share, by their names; an `AimeGymError` if they differ."""
    if len(set(renderings.values())) > 1:
        told = ", ".join(f"{name}: {rendering}" for name, rendering in renderings.items())
        raise AimeGymError(
            f"One model sees images of one rendering, as one world shows them; got {told}. `aime-gym render` draws "
            "copies without images anew."
        )
    return next(iter(renderings.values()), "full")


def rendering_of_all(folders: Iterable[str | Path]) -> Rendering:
    """The rendering that the images of all folders share; see `one_rendering`. Minari's sets do not count."""
    own = {str(each): Path(each) for each in folders if not str(each).startswith("minari:")}
    return one_rendering({name: rendering_of(read_metadata(folder)) for name, folder in own.items()})


def note_rendering(folder: Path, rendering: Rendering) -> None:
    """Writes into `dataset.json` how images are drawn that follow; full quality goes without saying."""
    before = read_metadata(folder)
    after = {key: value for key, value in before.items() if key != RENDERING}
    after |= {RENDERING: rendering} if rendering != "full" else {}
    if after != before:
        write_metadata(folder, after)


Trajectory = dict[str, np.ndarray]

LARGEST = 1e18
"""The largest value that is accepted: its square, and so its variance, is finite in float32."""

ROUNDING = 1e-3
"""How far actions may leave [-1, 1]: enough for the rounding of float16."""


def save_trajectory(folder: Path, index: int, trajectory: Trajectory) -> Path:
    """Writes `{index}.npz` whole or not at all.

    Args:
        folder: Made if it does not exist.
        index: The trajectory's number.
        trajectory: Arrays that share their first axis.

    Returns:
        The path of the file.
    """
    return write_trajectory(folder / f"{index}.npz", trajectory)


def write_trajectory(path: Path, trajectory: Trajectory) -> Path:
    """Writes a trajectory's file whole or not at all; one that was there stays until then."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **trajectory)  # type: ignore[arg-type]
    return write_atomically(path, buffer.getbuffer())


def trajectory_keys(path: Path) -> list[str]:
    """Which arrays a file holds, without reading them.

    Raises:
        AimeGymError: If it is no npz file.
    """
    if not path.is_file():
        raise AimeGymError(f"There is no trajectory file {path}.")
    try:
        return npz_names(path)
    except AimeGymError as error:
        raise AimeGymError(f"{error} Delete it and collect again.") from error


def load_trajectory(
    path: Path, required: Iterable[str] = ("pre_action",), images: bool = False, unread: Iterable[str] = ()
) -> Trajectory:
    """Reads and checks one file. Pickled objects are never loaded.

    Args:
        path: An npz file.
        required: Keys that must be there.
        images: Whether to read `image` too, the one large array.
        unread: Keys to leave unread, whatever they hold.

    Returns:
        All other arrays of the file, by key.

    Raises:
        AimeGymError: Naming the file, the key and what is wrong with it.
    """
    keys = trajectory_keys(path)
    names = [name for name in keys if (images or name != "image") and name not in set(unread)]
    missing = [key for key in required if key not in names]
    if missing:
        raise AimeGymError(f"{path} lacks {', '.join(missing)}; it has {', '.join(keys)}.")
    trajectory = read_npz(path, names)
    check_trajectory(path, trajectory)
    if "image" in trajectory:
        trajectory["image"] = to_model_sizes(trajectory["image"])
    return trajectory


def check_trajectory(path: Path | str, trajectory: Trajectory) -> None:
    """Raises an `AimeGymError`, which begins with `path`, if arrays are no trajectory: see the table above."""
    first = next(iter(trajectory), "")
    reference = "pre_action" if "pre_action" in trajectory else first
    length = len(trajectory[reference]) if reference and trajectory[reference].ndim else None
    if length == 1:
        raise AimeGymError(f"{path} has one row, the first frame of an episode of no step: leave it out.")
    for name, array in trajectory.items():
        if array.dtype.kind not in "fiub":
            raise AimeGymError(f"{path}: {name!r} has dtype {array.dtype}; expected numbers or booleans.")
        if array.ndim == 0 or len(array) == 0:
            raise AimeGymError(f"{path}: {name!r} has shape {array.shape}; expected one row a time step.")
        if length is not None and len(array) != length:
            raise AimeGymError(f"{path}: {name!r} has {len(array)} rows where {reference!r} has {length}.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            raise AimeGymError(f"{path}: {name!r} has a value in row {row} that is not finite.")
        if array.dtype.itemsize >= 4 and array.dtype.kind == "f" and (np.abs(array) > LARGEST).any():
            raise AimeGymError(f"{path}: {name!r} has a value that is too large for float32: beyond {LARGEST:g}.")
        if name in ("reward", "is_first", "is_last", "is_terminal") and array.size != len(array):
            raise AimeGymError(f"{path}: {name!r} has shape {list(array.shape)}; expected one number a row.")
        if name == "image" and (array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3):
            raise AimeGymError(
                f"{path}: 'image' is {array.dtype} {list(array.shape)}; expected uint8 [T, H, W, 3], channels last."
            )
        if name == "pre_action" and (outside := np.abs(array) > 1 + ROUNDING).any():
            row = int(np.argwhere(outside)[0, 0])
            raise AimeGymError(f"{path}: the action in row {row} leaves [-1, 1], to which actions are scaled here.")


def metadata_to_go_on(folder: Path) -> dict[str, Any]:
    """The metadata of a folder that trajectories are to be added to; empty where it is new.

    Raises:
        AimeGymError: If it holds trajectories that do not say what they are.
    """
    metadata = read_metadata(folder)
    if not metadata and folder.is_dir() and trajectory_paths(folder):
        raise AimeGymError(f"{folder} holds trajectories that do not say what they are: choose another --out.")
    return metadata


def count_steps(paths: Iterable[Path]) -> int:
    """Agent steps in trajectory files, of which only the actions are read.

    Raises:
        AimeGymError: If one is no trajectory.
    """
    steps = 0
    for path in paths:
        unread = [key for key in trajectory_keys(path) if key != "pre_action"]
        steps += len(load_trajectory(path, unread=unread)["pre_action"]) - 1
    return steps


def trajectory_paths(folder: Path) -> list[Path]:
    """The trajectory files of a folder in numeric order.

    Raises:
        AimeGymError: If the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AimeGymError(f"There is no data set folder {folder}. `aime-gym collect` makes one.")
    return sorted((p for p in folder.glob("*.npz") if p.stem.isdecimal()), key=lambda p: int(p.stem))


def check_named_once(folders: Iterable[str | Path]) -> None:
    """Raises an `AimeGymError` if one data set is named twice, whose trajectories would then count twice."""
    known: dict[str, str | Path] = {}
    for folder in folders:
        place = str(folder) if str(folder).startswith("minari:") else str(Path(folder).resolve())
        if place in known:
            raise AimeGymError(f"The data set {folder} is named twice ({known[place]}, {folder}): name it once.")
        known[place] = folder


def describe(folder: Path, **metadata: Any) -> None:
    """Writes what a folder holds, or checks it where the folder has data already.

    Raises:
        AimeGymError: If the folder was collected with other settings.
    """
    before = metadata_to_go_on(folder)
    begun = any(path.suffix in (".npz", ".zip") for path in folder.iterdir()) if folder.is_dir() else False
    before = before if begun else {}
    for key in (*metadata, "model", "sources", "starts", "stray") if before else ():
        there, value = before.get(key), metadata.get(key)
        if there != value:
            raise AimeGymError(
                f"{folder} was collected with {key}={there!r:.80}, now asked for {value!r}: choose another --out."
            )
    write_metadata(folder, {**before, **metadata})


def data_digest(source: str | Path, images: bool = True) -> str:
    """The digest of a data set, 16 hexadecimal digits.

    Of npz files only the directories are read, see `trajectories_digest`.

    Args:
        source: A folder of trajectories, or ``"minari:ID"``, whose files are read as a whole.
        images: Whether ``image`` counts, which may have been rendered later.

    Raises:
        AimeGymError: If there is no such folder, or a file is damaged.
    """
    if str(source).startswith("minari:"):
        from minari.storage.datasets_root_dir import get_dataset_path

        files = Path(get_dataset_path(str(source).removeprefix("minari:"))).rglob("*")
        return files_digest(sorted(path for path in files if path.is_file()))
    return trajectories_digest(trajectory_paths(Path(source)), images)


def trajectories_digest(paths: Iterable[Path], images: bool = True) -> str:
    """Says what npz files hold, from the size and the checksum of each array in their directories, however large.

    Args:
        paths: The files.
        images: Whether ``image`` counts.

    Raises:
        AimeGymError: If a file is damaged.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = sorted((info.filename, info.file_size, info.CRC) for info in archive.infolist())
        except DAMAGED_NPZ as error:
            raise AimeGymError(f"{path} is not a readable npz file ({reason(error)}).") from error
        digest.update(repr((path.name, [array for array in arrays if images or array[0] != "image.npy"])).encode())
    return digest.hexdigest()[:16]


PROVENANCE = "provenance.json"
"""The file in a model's folder: the SHA-256 of each policy's file that acted in any of its data, as far as the data and
the models that it goes on from have told."""

POLICY = "policy_sha256"
"""The name in `dataset.json` of the digest of the policy that acted."""


def policies_of_data(source: str | Path) -> frozenset[str]:
    """Digests of the policies that a folder of trajectories is from, also of what was mixed into it.

    Args:
        source: The folder, or ``"minari:ID"``, which tells nothing.

    Raises:
        AimeGymError: If its `dataset.json` is damaged.
    """
    return frozenset() if str(source).startswith("minari:") else _named(read_metadata(Path(source)))


def policies_of_model(folder: Path | None) -> frozenset[str]:
    """Digests of the policies that acted in a model's data; empty where nothing is known.

    Raises:
        AimeGymError: If the file is damaged.
    """
    if folder is None or not (folder / PROVENANCE).exists():
        return frozenset()
    policies = read_json(folder / PROVENANCE, "digests of policies", "Get or make the model again.").get("policies")
    if not isinstance(policies, list) or not all(isinstance(one, str) for one in policies):
        raise AimeGymError(f"{folder / PROVENANCE} does not hold digests of policies. Get or make the model again.")
    return frozenset(policies)


def write_provenance(folder: Path, datasets: Iterable[str | Path], bases: Iterable[Path | None]) -> None:
    """Writes which policies acted in a model's data.

    Args:
        folder: The folder of the model.
        datasets: What it learned from.
        bases: Folders of the models that it goes on from.
    """
    known = frozenset[str]().union(*map(policies_of_data, datasets), *map(policies_of_model, bases))
    write_json(folder / PROVENANCE, {"policies": sorted(known)})


def _named(metadata: Mapping[str, Any]) -> frozenset[str]:
    own = metadata.get(POLICY)
    return frozenset([own] if isinstance(own, str) else []).union(*map(_named, metadata.get("sources", {}).values()))


_TOLERANCE = 1e-6
"""How far a replay may stray from the stored state."""


def relabel(trajectory: Trajectory, embodiment: Embodiment, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Computes the reward that each task would have given.

    The replay is bit for bit the live run; where it strays (another version of MuJoCo, say) it goes back to the stored
    state, so errors do not add up.

    Args:
        trajectory: With ``physics`` `[T, nq + nv (+ na)]` and ``pre_action`` `[T, A]`.
        embodiment: Its body.
        tasks: The tasks wanted; those whose target lies outside the physics state are refused.

    Returns:
        Task -> rewards `[T, 1]` float32, row 0 is 0.

    Raises:
        AimeGymError: If the trajectory has no physics or a task cannot be computed from it.
    """
    for task in tasks:
        task_rewards.check_replayable(embodiment, task)
    if "physics" not in trajectory:
        raise AimeGymError(
            "This trajectory has no 'physics' (qpos and qvel a row), from which rewards are computed; "
            "data sets made by `aime-gym collect` have it."
        )
    world = first_world(embodiment.name)
    physics = world.physics
    low, high = world.action_spec().minimum, world.action_spec().maximum
    step_rewards = [_step_reward(embodiment.name, task) for task in tasks]
    length = len(trajectory["physics"])
    rewards = np.zeros((len(tasks), length, 1), np.float32)
    for t in range(1, length):
        if t == 1 or np.abs(physics.get_state() - trajectory["physics"][t - 1]).max() > _TOLERANCE:
            task_rewards.set_physics_state(physics, trajectory["physics"][t - 1])
        world.task.before_step(np.clip(trajectory["pre_action"][t].astype(np.float64), low, high), physics)
        measures = []
        for _ in range(embodiment.action_repeat):
            physics.step(world._n_sub_steps)
            measures.append([reward.measure(physics) for reward in step_rewards])
        for i, reward in enumerate(step_rewards):
            rewards[i, t, 0] = reward.total([measure[i] for measure in measures], physics)
    return dict(zip(tasks, rewards, strict=True))


# Compiling a MuJoCo model costs as much as replaying a trajectory.
@cache
def first_world(embodiment: str) -> Any:
    """The dm_control environment of a body's first task, in which rewards are replayed."""
    body = get_embodiment(embodiment)
    return task_rewards.load(body, body.tasks[0])


@cache
def _step_reward(embodiment: str, task: str) -> task_rewards.StepReward:
    body = get_embodiment(embodiment)
    return task_rewards.step_reward(body, task, task_rewards.load(body, task))
