"""The bank of real frames that a dream begins from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aime_gym.data.trajectories import TrajectoryDataset
from aime_gym.errors import AimeGymError


def make_starts(
    dataset: TrajectoryDataset,
    observed: Iterable[str],
    n_reset: int = 128,
    n_dataset: int = 512,
    frames: int = 10,
    seed: int = 0,
    held: bool = False,
) -> dict[str, np.ndarray]:
    """Picks windows to filter at the start of a dream: first frames of episodes, then windows from anywhere.

    Args:
        dataset: Real trajectories.
        observed: The sensors that the model sees.
        n_reset: Windows that begin with a reset, from different trajectories; fewer where there are fewer.
        n_dataset: Windows from anywhere.
        frames: Frames a window, K.
        seed: Draws the windows.
        held: Whether windows may end earlier than K frames after the reset, even with it: they begin with copies of the
            first frame then. For episodes that can be over sooner.

    Returns:
        Each observed sensor and ``pre_action`` as `[K, N, dim]`, ``physics`` `[N, nq + nv (+ na)]` at the last frame
        (where the data have it) and ``is_reset`` `[N]` bool. No window ends in a terminal state.

    Raises:
        AimeGymError: If no trajectory has that many frames.
    """
    rng = np.random.default_rng(seed)
    first = 0 if held else frames - 1
    bounds = dataset.bounds[dataset.bounds[:, 1] - dataset.bounds[:, 0] > first]
    if not len(bounds):
        raise AimeGymError(f"A start needs {frames} frames; no trajectory has that many.")
    ends = np.concatenate([np.arange(begin + first, end) for begin, end in bounds])
    begins = np.repeat(bounds[:, 0], bounds[:, 1] - bounds[:, 0] - first)
    goes_on = np.ones(len(ends), bool)
    if "is_terminal" in dataset.arrays:
        goes_on = ~dataset.arrays["is_terminal"].reshape(-1)[ends].astype(bool)
    at_reset = rng.permutation((ends == begins + first).nonzero()[0])[:n_reset]
    chosen = np.concatenate([at_reset, rng.choice(goes_on.nonzero()[0], n_dataset)])
    wanted = ends[chosen] - np.arange(frames)[::-1, None]  # [K, N]
    rows = np.maximum(wanted, begins[chosen])
    starts = {name: dataset.arrays[name][rows] for name in [*observed, "pre_action"]}
    starts["pre_action"] = np.where((wanted == rows)[..., None], starts["pre_action"], 0).astype(np.float32)
    if "physics" in dataset.arrays:
        starts["physics"] = dataset.arrays["physics"][rows[-1]]
    starts["is_reset"] = np.arange(len(chosen)) < len(at_reset)
    return starts
