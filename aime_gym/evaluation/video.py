"""A policy side by side in both worlds, as an mp4."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from aime_gym.evaluation.returns import PolicyLike, episode_returns
from aime_gym.evaluation.worlds import Worlds

WIDTH, HEIGHT, BAR = 320, 240, 32
_INK, _PAPER = (240, 240, 240), (24, 26, 30)


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
    start = worlds.draw_starts(1, seed)
    steps = min(steps or worlds.max_episode_steps, worlds.max_episode_steps)
    films, fps = [], 20
    for caption, make, options in (
        ("dream", worlds.dream_envs, {"start": start}),
        ("real", worlds.real_envs, worlds.real_starts(start)),
    ):
        envs: VectorEnv = make(1, max_episode_steps=steps, render_mode="rgb_array", width=WIDTH, height=HEIGHT)
        frames: list[NDArray[np.uint8]] = []

        def film(returns: NDArray[np.float64], envs=envs, frames=frames, caption=caption) -> None:
            images = envs.render()
            assert images is not None
            frames.append(captioned(images[0], f"{caption}, return so far {returns[0]:.0f}"))

        try:
            episode_returns(policy, envs, seed=[seed], starts=options, watch=film)
            fps = envs.metadata.get("render_fps", fps)
        finally:
            envs.close()
        films.append(frames)
    return encode((np.hstack(pair) for pair in zip(*films, strict=False)), fps)


def captioned(frame: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """Fits a frame [H, W, 3] of any size under a line of text: [BAR + HEIGHT, WIDTH, 3]."""
    picture = Image.new("RGB", (WIDTH, BAR + HEIGHT), _PAPER)
    ImageDraw.Draw(picture).text((10, BAR // 2), text, _INK, ImageFont.load_default(15), anchor="lm")
    fitted = ImageOps.contain(Image.fromarray(frame), (WIDTH, HEIGHT))
    picture.paste(fitted, ((WIDTH - fitted.width) // 2, BAR + (HEIGHT - fitted.height) // 2))
    return np.asarray(picture)


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
