"""Random windows of trajectories as tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Unpack

import numpy as np
import torch
from torch import Tensor

from aime_gym.data.windows import Places, Windows

Batch = dict[str, Tensor]


class WindowDataset(Protocol):
    """What the sampler needs of a data set; `aime_gym.data.trajectories.TrajectoryDataset` has it."""

    arrays: dict[str, np.ndarray]

    def draw_windows(
        self, batch_size: int, horizon: int, rng: np.random.Generator, **places: Unpack[Places]
    ) -> Windows:
        """Where random windows lie in the arrays; see `aime_gym.data.windows.draw_windows`."""


class BatchSource(Protocol):
    """Where a `Trainer` gets its batches, with a state that a checkpoint can hold."""

    def sample(self) -> Any:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides the batches to come."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`."""

    def reseed(self, number: int) -> None:
        """Begins another stream of batches: the one with this number, of the same seed."""


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
        self._arrays = {
            name: torch.as_tensor(dataset.arrays[name]).to(device) for name in self.names
        }  # a CPU's: no copy
        self.seed = seed
        self.rng = np.random.default_rng(seed)

    def sample(self) -> Batch:
        """The next batch: name -> `[T, B, ...]` float32.

        If some rows are padding, ``is_padding`` `[T, B]` bool says which; their ``pre_action`` is 0.
        """
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


def to_tensors(arrays: Mapping[str, np.ndarray] | Mapping[str, Tensor], device: torch.device | str = "cpu") -> Batch:
    """Turns arrays into float32 tensors; an uint8 ``image`` `[..., H, W, C]` becomes `[..., C, H, W]` in [0, 1]."""
    tensors = {}
    for name, array in arrays.items():
        tensor = torch.as_tensor(array).to(device)
        if name == "image" and tensor.dtype == torch.uint8:
            tensor = tensor.movedim(-1, -3).float() / 255
        tensors[name] = tensor.float()
    return tensors
