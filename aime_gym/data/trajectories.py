"""Trajectories: a folder of npz files on disk, time-major windows out.

One file `0.npz, 1.npz, ...` a trajectory, in the layout of the AIME reference §4. Row 0 is the reset; row t holds the
action that led to it and the reward that came with it:

| key | shape, dtype |
| --- | --- |
| one per sensor | `[T, dim]` float32; other numbers become float32 in a `TrajectoryDataset` |
| `image` (optional) | `[T, 64, 64, 3]` uint8 |
| `pre_action` | `[T, A]` float32, zeros in row 0 |
| `reward` | `[T, 1]` float32, summed over the action repeat |
| `is_first`, `is_last`, `is_terminal` | `[T]` bool |
| `physics` (ours) | `[T, nq + nv (+ na)]` float64 |

Beside them, `dataset.json` says what was collected and how.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from aime_gym.data.metadata import read_metadata
from aime_gym.data.windows import Places, Windows, draw_windows
from aime_gym.embodiments import Embodiment, get_embodiment
from aime_gym.errors import AimeGymError
from aime_gym.files import npz_names, read_npz, write_atomically
from aime_gym.pictures import to_model_sizes

Trajectory = dict[str, np.ndarray]
LARGEST = 1e18
"""Of a value: its square, and so its variance, is finite in float32."""
ROUNDING = 1e-3
"""By which actions may leave [-1, 1]; enough for float16."""


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


def split_indices(trajectories: int, held_out: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which of two or more trajectories are for training and which are held out, each in order."""
    order = np.random.default_rng(seed).permutation(trajectories)
    count = min(max(1, round(held_out * trajectories)), trajectories - 1)
    return np.sort(order[count:]), np.sort(order[:count])


class TrajectoryDataset:
    """Trajectories in memory, and windows of them.

    All rows lie in one array a key, so that a batch of windows is one indexing operation; splits share these arrays.
    They are rows of the trajectories and nothing else: padding exists in windows alone.

    Args:
        folders: One folder or several, or a list of trajectories; ``"minari:ID"`` is a local data set of Minari.
        required: Keys that every trajectory must have; only keys that all trajectories have are kept.
        images: Whether to load `image`.
        unread: Keys to leave unread, whatever they hold.

    Raises:
        AimeGymError: If a file is broken, a folder is empty or the folders hold different embodiments.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path] | Sequence[Trajectory],
        required: Iterable[str] = ("pre_action",),
        images: bool = False,
        unread: Iterable[str] = (),
    ):
        if isinstance(folders, str | Path):
            folders = [folders]
        trajectories: list[Trajectory] = []
        pictures: list[Path] = []
        bodies: dict[str, Embodiment | None] = {}
        begins: list[int] = []
        for source in folders:
            begins.append(len(trajectories))
            if isinstance(source, dict):
                trajectories.append(source)
                continue
            if str(source).startswith("minari:"):
                from aime_gym.data.minari_sets import read_minari

                body, episodes = read_minari(str(source))
                bodies[body.name] = body
                trajectories += episodes
                continue
            paths = trajectory_paths(Path(source))
            if not paths:
                raise AimeGymError(f"{source} holds no trajectories (0.npz, 1.npz, ...).")
            name = read_metadata(Path(source)).get("embodiment")
            bodies |= {str(name): None} if name else {}
            tabular = [key for key in required if key != "image"]
            trajectories += [load_trajectory(path, tabular, False, unread) for path in paths]
            if images:
                pictures += [path for path in paths if "image" in required or "image" in trajectory_keys(path)]
        if not trajectories:
            raise AimeGymError("A data set needs at least one folder or trajectory; got none.")
        if len(bodies) > 1:
            raise AimeGymError(f"These data sets are of different embodiments: {', '.join(sorted(bodies))}.")
        self.embodiment: str | None = next(iter(bodies), None)
        self._body = next(iter(bodies.values()), None)
        keys = [key for key in trajectories[0] if all(key in trajectory for trajectory in trajectories)]
        for key in keys:
            shapes = {trajectory[key].shape[1:] for trajectory in trajectories}
            if len(shapes) > 1:
                raise AimeGymError(f"{key!r} has rows of different shapes in these trajectories: {sorted(shapes)}.")
        self.arrays = {key: _in_one(key, [t[key] for t in trajectories]) for key in keys}
        ends = np.cumsum([len(next(iter(t.values()))) for t in trajectories])
        self.bounds = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
        """`[N, 2]` first row and end row of every trajectory within `arrays`."""
        self.counts = np.diff([*begins, len(trajectories)])
        """Trajectories of each source."""
        if pictures and len(pictures) == len(trajectories):
            self.arrays["image"] = _load_images(pictures, self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Trajectory:
        begin, end = self.bounds[index]
        return {key: array[begin:end] for key, array in self.arrays.items()}

    @property
    def body(self) -> Embodiment | None:
        """Whose trajectories they are; None if the folders do not say."""
        if self._body is None and self.embodiment is not None:
            self._body = get_embodiment(self.embodiment, imports=False)
        return self._body

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that every trajectory has."""
        return tuple(self.arrays)

    @property
    def longest(self) -> int:
        """Rows of the longest trajectory."""
        return int((self.bounds[:, 1] - self.bounds[:, 0]).max())

    @classmethod
    def join(cls, parts: Sequence[TrajectoryDataset]) -> TrajectoryDataset:
        """The trajectories of several data sets; in the memory of these where they are subsets of the same one."""
        first = parts[0]
        if all(part.arrays.get(key) is array for part in parts for key, array in first.arrays.items()):
            whole = first.subset([])
            whole.bounds = np.concatenate([part.bounds for part in parts])
            return whole
        return cls([part[i] for part in parts for i in range(len(part))])

    def subset(self, indices: Sequence[int] | np.ndarray) -> TrajectoryDataset:
        """The given trajectories, sharing memory with this data set."""
        part = object.__new__(TrajectoryDataset)
        part.embodiment, part._body, part.arrays = self.embodiment, self._body, self.arrays
        part.bounds = self.bounds[np.asarray(indices, int)]
        part.counts = np.array([len(part)])
        return part

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[TrajectoryDataset, TrajectoryDataset]:
        """Splits by trajectory into a training and a held-out part; at least one trajectory each.

        Raises:
            AimeGymError: If there are fewer than two trajectories or `held_out` is not within (0, 1).
        """
        if not 0 < held_out < 1 or len(self) < 2:
            raise AimeGymError(
                f"A split needs a held-out share within (0, 1) and two trajectories; got {held_out} of {len(self)}."
            )
        train, held = split_indices(len(self), held_out, seed)
        return self.subset(train), self.subset(held)

    def sample_windows(
        self, batch_size: int, horizon: int, rng: np.random.Generator, least: int | None = None
    ) -> Trajectory:
        """Draws windows uniformly over all places where one fits.

        Args:
            batch_size: Number of windows B.
            horizon: Their length T in rows.
            rng: Source of the draw.
            least: Rows, from the first one, that are of a trajectory: the others may be padding, see `Windows`.

        Returns:
            Every key as `[T, B, ...]`, and ``is_padding`` `[T, B]` bool if there is padding.

        Raises:
            AimeGymError: If no trajectory is long enough.
        """
        return self.draw_windows(batch_size, horizon, rng, least=least).take(self.arrays)

    def draw_windows(
        self, batch_size: int, horizon: int, rng: np.random.Generator, **places: Unpack[Places]
    ) -> Windows:
        """Where windows lie within `arrays`: arguments and errors as of `aime_gym.data.windows.draw_windows`."""
        terminated = np.zeros(len(self), bool)
        if "is_terminal" in self.arrays:
            terminated = self.arrays["is_terminal"].reshape(-1)[self.bounds[:, 1] - 1].astype(bool)
        return draw_windows(self.bounds, terminated, batch_size, horizon, rng, **places)

    def add(self, key: str, values: Sequence[np.ndarray]) -> None:
        """Adds a key: one `[T, ...]` array for each trajectory of this data set; rows outside it are zero."""
        rows = len(next(iter(self.arrays.values())))
        array = np.zeros((rows, *values[0].shape[1:]), values[0].dtype)
        for (begin, end), value in zip(self.bounds, values, strict=True):
            array[begin:end] = value
        self.arrays = {**self.arrays, key: array}

    def statistics(self, names: Iterable[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Mean and standard deviation of each named key over all rows, `[dim]` float32 each."""
        rows = np.concatenate([np.arange(begin, end) for begin, end in self.bounds])
        names = list(names)
        mean = {name: self.arrays[name][rows].mean(0, dtype=np.float64).astype(np.float32) for name in names}
        std = {name: self.arrays[name][rows].std(0, dtype=np.float64).astype(np.float32) for name in names}
        return mean, std


def read_data_sets(folders: Sequence[Path], images: bool = False) -> list[TrajectoryDataset]:
    """Reads several data sets into the same arrays, so that images need not be copied when they are joined.

    Args:
        folders: Of trajectories, or ``"minari:ID"``; of one embodiment.
        images: As of `TrajectoryDataset`.

    Raises:
        AimeGymError: As `TrajectoryDataset`.
    """
    whole = TrajectoryDataset(folders, images=images)
    ends = np.cumsum(whole.counts)
    return [whole.subset(np.arange(end - count, end)) for end, count in zip(ends, whole.counts, strict=True)]


def _in_one(key: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """All rows of a key: as float32, which models work in, but for images, physics states and flags."""
    if key in ("image", "physics") or key.startswith("is_"):
        return np.concatenate(parts)
    return np.concatenate(parts, dtype=np.float32, casting="unsafe")


def _load_images(paths: Sequence[Path], bounds: np.ndarray) -> np.ndarray:
    """Images of all trajectories, one file at a time: together they are most of the memory.

    Args:
        paths: The files.
        bounds: First row and end row of each, [N, 2].

    Returns:
        [rows, H, W, 3]

    Raises:
        AimeGymError: If a file has none, or they are of different sizes.
    """
    images: np.ndarray | None = None
    for path, (begin, end) in zip(paths, bounds, strict=True):
        unread = [key for key in trajectory_keys(path) if key != "image"]
        own = load_trajectory(path, ("image",), True, unread)["image"]
        if images is None:
            images = np.empty((bounds[-1, 1], *own.shape[1:]), own.dtype)
        expected = (end - begin, *images.shape[1:])
        if own.shape != expected:
            raise AimeGymError(f"{path}: 'image' has shape {own.shape}; expected {expected}.")
        images[begin:end] = own
    assert images is not None
    return images
