"""A policy side by side in both worlds, as an mp4."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray

from aime_gym.evaluation.both_worlds import BothWorlds
from aime_gym.evaluation.returns import PolicyLike, episode_returns
from aime_gym.evaluation.worlds import Worlds


def side_by_side(policy: PolicyLike, worlds: Worlds, seed: int = 0, steps: int | None = None) -> bytes:
    """Films the first of the paired episodes: the policy acting in the dream (left) and in the real env (right).

    Args:
        policy: See `aime_gym.evaluation.returns.PolicyLike`.
        worlds: Where.
        seed: As of `Worlds.evaluate`.
        steps: Agent steps to film; the whole episode by default.

    Returns:
        An mp4 (H.264) in real time.

    Raises:
        AimeGymError: If no GL library works; the message has the mend.
    """
    envs = BothWorlds(worlds, steps)
    frames: list[NDArray[np.uint8]] = []

    def film(_: NDArray[np.float64]) -> None:
        pictures = envs.render()
        assert pictures is not None
        frames.append(pictures[0])

    try:
        episode_returns(policy, envs, seed=[seed, seed], watch=film)
        return encode(frames, envs.metadata["render_fps"])
    finally:
        envs.close()


def what_the_film_shows(worlds: Worlds) -> str:
    """In what way both halves of a film are of the same episode."""
    if not worlds.has_pictures:
        return "The dream has no picture, as its model decodes none; each world begins on its own."
    if worlds.embodiment.foreign:
        return "Each world begins on its own."
    return (
        "Both begin at the same real moment. The dream shows what its model believes after ten frames up to there, so "
        "that its very first pose is an estimate."
    )


def encode(frames: Iterable[NDArray[np.uint8]], fps: int) -> bytes:
    """Frames [H, W, 3], of even H and W, as an mp4 that browsers play."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer: Any
        with imageio.get_writer(
            path, fps=fps, codec="libx264", pixelformat="yuv420p", quality=6, macro_block_size=2
        ) as writer:
            for frame in frames:
                writer.append_data(frame)
        return path.read_bytes()
