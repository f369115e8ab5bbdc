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
) -> dict[str, np.ndarray]:
    """Picks windows to filter at the start of a dream: first frames of episodes, then windows from anywhere.

    Args:
        dataset: Real trajectories.
        observed: The sensors that the model sees.
        n_reset: Windows that begin with a reset, from different trajectories; fewer where there are fewer.
        n_dataset: Windows from anywhere.
        frames: Frames a window, K.
        seed: Draws the windows.

    Returns:
        Each observed sensor and ``pre_action`` as `[K, N, dim]`, ``physics`` `[N, nq + nv (+ na)]` at the last frame
        (where the data have it) and ``is_reset`` `[N]` bool.

    Raises:
        AimeGymError: If no trajectory has that many frames.
    """
    rng = np.random.default_rng(seed)
    begins = dataset.bounds[dataset.bounds[:, 1] - dataset.bounds[:, 0] >= frames, 0]
    if not len(begins):
        raise AimeGymError(f"A start needs {frames} frames; no trajectory has that many.")
    begins = rng.permutation(begins)[:n_reset]
    rows = begins[None, :] + np.arange(frames)[:, None]  # [K, N]
    anywhere = dataset.sample_windows(n_dataset, frames, rng)
    starts = {
        name: np.concatenate([dataset.arrays[name][rows], anywhere[name]], axis=1) for name in [*observed, "pre_action"]
    }
    if "physics" in anywhere:
        starts["physics"] = np.concatenate([dataset.arrays["physics"][rows[-1]], anywhere["physics"][-1]])
    starts["is_reset"] = np.arange(len(begins) + n_dataset) < len(begins)
    return starts
