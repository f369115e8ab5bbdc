"""The dream and the real env as one: two slots that begin in the same state, and a picture of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from aime_gym.errors import AimeGymError
from aime_gym.evaluation.metrics import rounded
from aime_gym.evaluation.worlds import Worlds

WORLDS = ("dream", "real")
WIDTH, HEIGHT, BAR = 320, 240, 32
_INK, _PAPER, _CALM, _ALARM = (240, 240, 240), (24, 26, 30), (92, 160, 110), (214, 92, 70)
_BLANK = np.full((HEIGHT, WIDTH, 3), _PAPER, np.uint8)


class BothWorlds(VectorEnv):
    """Slot 0 is the dream and slot 1 the real env; both begin in the same state and take an action each.

    A slot whose episode has ended stays as it is, with rewards of 0, until `reset`.

    Args:
        worlds: Where; it makes the envs.
        max_episode_steps: Agent steps of an episode; those of `worlds` by default.
        render_mode: ``"rgb_array"`` or None.
    """

    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, worlds: Worlds, max_episode_steps: int | None = None, render_mode: str | None = "rgb_array"):
        self._worlds, self.render_mode, self.num_envs = worlds, render_mode, len(WORLDS)
        steps = min(max_episode_steps or worlds.max_episode_steps, worlds.max_episode_steps)
        options: dict[str, Any] = {"max_episode_steps": steps, "render_mode": render_mode}
        if render_mode and not worlds.embodiment.foreign:
            options |= {"width": WIDTH, "height": HEIGHT}
        dreamt = options if worlds.has_pictures else options | {"render_mode": None}
        self._envs = [worlds.dream_envs(1, **dreamt), worlds.real_envs(1, **options)]
        self.single_observation_space, self.single_action_space = worlds.observation_space, worlds.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        real: Any = self._envs[1]
        self.metadata = {**self.metadata, "render_fps": real.envs[0].unwrapped.metadata["render_fps"]}
        self._usual_doubt = worlds.usual_doubt if render_mode else 0.0  # for the picture alone
        self._ended = np.ones(self.num_envs, bool)
        self._returns, self._doubt = np.zeros(self.num_envs), 0.0
        self._observations: list[Any] = []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins an episode in both worlds.

        Args:
            seed: Chooses the start and seeds both episodes; of several, the first.
            options: None.
        """
        first = seed if seed is None or isinstance(seed, (int, np.integer)) else seed[0]
        super().reset(seed=None if first is None else int(first))
        own = int(self.np_random.integers(2**31)) if first is None else int(first)
        start = self._worlds.draw_starts(1, own)
        starts: list[dict[str, Any] | None] = [{"start": start}, self._worlds.real_starts(start)]
        self._observations = [
            env.reset(seed=[own], options=place)[0]  # type: ignore[arg-type]  # Gymnasium takes lists
            for env, place in zip(self._envs, starts, strict=True)
        ]
        self._ended[:], self._returns[:], self._doubt = False, 0.0, 0.0
        return self._stacked(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One step of each world whose episode goes on.

        Args:
            actions: [2, A]

        Returns:
            Observations, rewards, terminations and truncations of dream and real, and ``info["disagreement"]`` [2],
            how much the dream is to be doubted (0 for the real env).

        Raises:
            AimeGymError: If both episodes have ended.
        """
        if self._ended.all():
            raise AimeGymError("Both episodes have ended: call reset() first.")
        rewards = np.zeros(self.num_envs)
        terminations, truncations = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for slot in (~self._ended).nonzero()[0]:
            observation, reward, terminated, truncated, info = self._envs[slot].step(actions[slot : slot + 1])
            self._observations[slot] = observation
            rewards[slot], terminations[slot], truncations[slot] = reward[0], terminated[0], truncated[0]
            if slot == 0:
                self._doubt = float(info["disagreement"][0])
        self._returns += rewards
        self._ended |= terminations | truncations
        return self._stacked(), rewards, terminations, truncations, {"disagreement": np.array([self._doubt, 0.0])}

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """One picture of both worlds, [BAR + HEIGHT + BAR, 2 WIDTH, 3] uint8, with returns so far and doubt."""
        if not self.render_mode:
            return None
        pictures = []
        for name, env, earned in zip(WORLDS, self._envs, self._returns, strict=True):
            frames: Any = env.render()
            title = name if frames else f"{name} (no picture)"
            pictures.append(captioned(frames[0] if frames else _BLANK, f"{title}, return so far {rounded(earned)}"))
        return (np.vstack([np.hstack(pictures), doubt_bar(self._doubt, self._usual_doubt)]),)

    def close_extras(self, **kwargs: Any) -> None:
        """Closes both envs."""
        for env in self._envs:
            env.close()

    def _stacked(self) -> Any:
        first = self._observations[0]
        if isinstance(first, dict):
            return {name: np.concatenate([each[name] for each in self._observations]) for name in first}
        return np.concatenate(self._observations)


def captioned(frame: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """Fits a frame [H, W, 3] of any size under a line of text: [BAR + HEIGHT, WIDTH, 3]."""
    picture = Image.new("RGB", (WIDTH, BAR + HEIGHT), _PAPER)
    ImageDraw.Draw(picture).text((10, BAR // 2), text, _INK, ImageFont.load_default(15), anchor="lm")
    fitted = ImageOps.contain(Image.fromarray(frame), (WIDTH, HEIGHT))
    picture.paste(fitted, ((WIDTH - fitted.width) // 2, BAR + (HEIGHT - fitted.height) // 2))
    return np.asarray(picture)


def doubt_bar(doubt: float, usual: float) -> NDArray[np.uint8]:
    """A bar [BAR, 2 WIDTH, 3]: half full where the doubt is what 95 of 100 real moments stay below, red beyond."""
    picture = Image.new("RGB", (2 * WIDTH, BAR), _PAPER)
    draw = ImageDraw.Draw(picture)
    left, right = 150, 2 * WIDTH - 12
    share = min(1.0, doubt / (2 * usual)) if usual > 0 else 0.0
    draw.text((10, BAR // 2), f"doubt {doubt:.1f} nats", _INK, ImageFont.load_default(15), anchor="lm")
    draw.rectangle((left, 10, left + int(share * (right - left)), BAR - 10), _ALARM if doubt > usual else _CALM)
    draw.line(((left + right) // 2, 5, (left + right) // 2, BAR - 5), _INK)
    return np.asarray(picture)
