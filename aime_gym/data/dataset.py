"""Trajectories in memory: data sets, their parts, and windows of them as tensors.

In a batch of windows, ``is_padding`` ``[T, B]`` bool says which rows lie outside their trajectory; if none do, it is
absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, Unpack

import numpy as np

from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment, logged_body, one_body
from aime_gym.bodies.sensors import AngleCode
from aime_gym.data.trajectories import (
    Trajectory,
    check_named_once,
    load_trajectory,
    read_metadata,
    trajectory_keys,
    trajectory_paths,
)
from aime_gym.errors import AimeGymError
from aime_gym.observations import to_tensors

if TYPE_CHECKING:
    import torch  # imported late, so that commands which only print start at once
    from torch import Tensor


class Places(TypedDict, total=False):
    """Where windows may lie, beside anywhere within a trajectory: keywords of `draw_windows`."""

    at_start: float
    """Average share of windows that begin where a trajectory begins, instead of anywhere."""
    least: int | None
    """Rows of a window, from its first, that end within the trajectory; by default all: no padding behind it."""
    lead: int
    """Rows by which windows may begin before the trajectory."""
    events: np.ndarray | None
    """Rows that are rare and matter: trajectory and row within `arrays` of each, `[K, 2]`."""
    at_events: float
    """Share of windows, on average, that hold one of `events`, anywhere in them, instead of beginning anywhere."""


class Windows(NamedTuple):
    """Where B windows of T rows lie in the arrays of a data set.

    A row outside its trajectory is padding: it holds the nearest row of the trajectory, without an action. Only models
    of what comes after a termination may learn from it.

    Attributes:
        rows: `[T, B]` integers; an array, or a tensor.
        is_padding: `[T, B]` bool; None if no row is padding.
    """

    rows: Any
    is_padding: Any | None

    def take(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The windows of a data set.

        Args:
            arrays: Arrays or tensors with all its rows, as those here.

        Returns:
            Every key as `[T, B, ...]`, and ``is_padding`` if there is padding, whose ``pre_action`` is 0.
        """
        taken = {key: array[self.rows] for key, array in arrays.items()}
        if self.is_padding is not None:
            taken["is_padding"] = self.is_padding
            if "pre_action" in taken:
                taken["pre_action"][self.is_padding] = 0
        return taken


def draw_windows(
    bounds: np.ndarray,
    terminated: np.ndarray,
    batch_size: int,
    horizon: int,
    rng: np.random.Generator,
    at_start: float = 0.0,
    least: int | None = None,
    lead: int = 0,
    events: np.ndarray | None = None,
    at_events: float = 0.0,
) -> Windows:
    """Draws windows uniformly over all places where they may begin; what is drawn depends on real rows alone.

    Windows with padding hold a trajectory that is too short for them, or what follows a termination: up to a quarter of
    their rows.

    Args:
        bounds: First row and end row of every trajectory, `[N, 2]`.
        terminated: Which trajectories end with a termination, `[N]` bool.
        batch_size: Number of windows B.
        horizon: Their length T in rows.
        rng: Source of the draw.
        at_start: See `Places`, as for the others.
        least: There.
        lead: There.
        events: There.
        at_events: There.

    Raises:
        AimeGymError: If no trajectory is long enough.
    """
    lengths, least = bounds[:, 1] - bounds[:, 0], horizon if least is None else least
    last = np.maximum(lengths - horizon + np.where(terminated, horizon // 4, 0), -lead)
    places = np.maximum(np.minimum(last, lengths - least) + lead + 1, 0)  # [N], in which windows can begin
    if places.sum() == 0:
        longest = int(lengths.max(initial=0))
        raise AimeGymError(f"A window of {least - lead} rows fits into no trajectory; the longest has {longest}.")
    ends = np.cumsum(places)
    draw = rng.integers(ends[-1], size=batch_size)
    which = np.searchsorted(ends, draw, side="right")
    first, end = bounds[which].T  # [B] each
    begin = first - lead + draw - (ends[which] - places[which])
    if at_start:
        begin = np.where(rng.random(batch_size) < at_start, first, begin)
    if at_events and events is not None and len(events := events[places[events[:, 0]] > 0]):
        chosen, (owner, row) = rng.random(batch_size) < at_events, events[rng.integers(len(events), size=batch_size)].T
        latest = bounds[owner, 0] - lead + places[owner] - 1
        around = np.clip(row - rng.integers(horizon, size=batch_size), bounds[owner, 0] - lead, latest)
        begin = np.where(chosen, around, begin)
        first, end = np.where(chosen, bounds[owner].T, (first, end))
    wanted = begin[None, :] + np.arange(horizon)[:, None]
    rows = np.clip(wanted, first, end - 1)
    is_padding = rows != wanted
    return Windows(rows, is_padding if is_padding.any() else None)


BURN_IN = 10
"""Frames filtered by default (Zhang et al., NeurIPS 2023)."""


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
        check_named_once(source for source in folders if not isinstance(source, dict))
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
            told = read_metadata(Path(source))
            if name := told.get("embodiment"):
                logged = [body for body in (bodies.get(name), logged_body(told)) if body is not None]
                bodies[name] = one_body(logged) if logged else None
            tabular = [key for key in required if key != "image"]
            trajectories += [_but_images(path, tabular, unread) for path in paths]
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
        """The body whose trajectories they are; None if the folders do not say."""
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
        """Where windows lie within `arrays`; for arguments and errors see `aime_gym.data.dataset.draw_windows`."""
        terminated = np.zeros(len(self), bool)
        if "is_terminal" in self.arrays:
            terminated = self.arrays["is_terminal"].reshape(-1)[self.bounds[:, 1] - 1].astype(bool)
        return draw_windows(self.bounds, terminated, batch_size, horizon, rng, **places)

    def add(self, key: str, values: Sequence[np.ndarray]) -> None:
        """Adds a key: one `[T, ...]` array for each trajectory of this data set; rows outside it are zero."""
        array = np.zeros((len(next(iter(self.arrays.values()))), *values[0].shape[1:]), values[0].dtype)
        for (begin, end), value in zip(self.bounds, values, strict=True):
            array[begin:end] = value
        self.arrays = {**self.arrays, key: array}

    def statistics(
        self, names: Iterable[str], codes: Mapping[str, AngleCode] | None = None
    ) -> tuple[Trajectory, Trajectory]:
        """Mean and standard deviation of each named key, or of its code, over all rows: `[dim]` float32 each."""
        rows = np.concatenate([np.arange(begin, end) for begin, end in self.bounds])
        values = {name: self.arrays[name][rows] for name in names}
        values |= {name: code.encode(values[name]) for name, code in (codes or {}).items() if name in values}
        mean = {name: of.mean(0, dtype=np.float64).astype(np.float32) for name, of in values.items()}
        std = {name: of.std(0, dtype=np.float64).astype(np.float32) for name, of in values.items()}
        return mean, std


def read_data_sets(folders: Sequence[Path], images: bool = False) -> list[TrajectoryDataset]:
    """Reads several data sets into the same arrays, so that images need not be copied when they are joined.

    Args:
        folders: Folders of trajectories, or ``"minari:ID"``, all of one embodiment.
        images: See `TrajectoryDataset`.

    Raises:
        AimeGymError: For the same reasons as `TrajectoryDataset`.
    """
    whole = TrajectoryDataset(folders, images=images)
    ends = np.cumsum(whole.counts)
    return [whole.subset(np.arange(end - count, end)) for end, count in zip(ends, whole.counts, strict=True)]


def _in_one(key: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """All rows of a key: as float32, which models work in, but for images, physics states and flags."""
    if key in ("image", "physics") or key.startswith("is_"):
        return np.concatenate(parts)
    return np.concatenate(parts, dtype=np.float32, casting="unsafe")


def _but_images(path: Path, required: Sequence[str], unread: Iterable[str]) -> Trajectory:
    """All but the images of a file; of one that holds nothing else, where it begins."""
    read = load_trajectory(path, required, False, unread)
    return read or {"is_first": np.arange(len(load_trajectory(path, ("image",), True)["image"])) == 0}


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


Batch = dict[str, "Tensor"]


class WindowDataset(Protocol):
    """What the sampler needs of a data set; `aime_gym.data.dataset.TrajectoryDataset` has it."""

    arrays: dict[str, np.ndarray]

    def draw_windows(
        self, batch_size: int, horizon: int, rng: np.random.Generator, **places: Unpack[Places]
    ) -> Windows:
        """Where random windows lie in the arrays; see `aime_gym.data.dataset.draw_windows`."""


class WindowSampler:
    """Draws time-major windows with a generator of its own.

    Args:
        dataset: Where the windows are. Its arrays go to the device once, so that a GPU never waits for images.
        batch_size: Windows a batch, B.
        horizon: Steps a window, T.
        seed: Ints, e.g. a run's seed and a process' rank.
        names: The arrays to keep.
        device: Where the tensors go.
        **places: Where windows may lie; by default anywhere within a trajectory, without padding.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        batch_size: int,
        horizon: int,
        seed: tuple[int, ...],
        names: Iterable[str],
        device: torch.device | str = "cpu",
        **places: Unpack[Places],
    ):
        self._places = places
        self.dataset, self.batch_size, self.horizon = dataset, batch_size, horizon
        self.names, self.device = tuple(names), device
        import torch

        self._arrays = {
            name: torch.as_tensor(dataset.arrays[name]).to(device) for name in self.names
        }  # a CPU's: no copy
        self.seed = seed
        self.rng = np.random.default_rng(seed)

    def sample(self) -> Batch:
        """The next batch: name -> `[T, B, ...]` float32.

        If some rows are padding, ``is_padding`` `[T, B]` bool says which; their ``pre_action`` is 0.
        """
        import torch

        windows = self.dataset.draw_windows(self.batch_size, self.horizon, self.rng, **self._places)
        there = Windows(*(None if part is None else torch.as_tensor(part).to(self.device) for part in windows))
        taken = there.take(self._arrays)
        padding = {"is_padding": taken.pop("is_padding")} if there.is_padding is not None else {}
        return {**to_tensors(taken, self.device), **padding}

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"rng": json.dumps(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the stream of batches where `state_dict` was taken."""
        self.rng.bit_generator.state = json.loads(state["rng"])

    def reseed(self, number: int) -> None:
        """Begins another stream of batches: the one with this number, of the same seed."""
        self.rng = np.random.default_rng((*self.seed, number))
