"""Dream and real env side by side: to act in, as a film, and as a dream of the actions of a real episode."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from aime_gym.agents.plain import sensor_statistics
from aime_gym.data.dataset import BURN_IN
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.returns import PolicyLike, Recording, episode_returns, rounded
from aime_gym.evaluation.worlds import Worlds
from aime_gym.observations import from_shown, to_sensors

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
        drawn: dict[str, Any] = {}
        if render_mode and not worlds.embodiment.foreign:
            options |= {"width": WIDTH, "height": HEIGHT}
            if not worlds.model.decodes_images:  # nobody acts on the pictures
                drawn["rendering"] = "fast"  # as the dream is drawn
        dreamt = options if worlds.has_pictures else options | {"render_mode": None}
        self._envs = [worlds.dream_envs(1, **dreamt), worlds.real_envs(1, **options | drawn)]
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
            Observations, rewards, terminations and truncations of dream and real, and ``info["doubt"]`` [2],
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
                self._doubt = float(info["doubt"][0])
        self._returns += rewards
        self._ended |= terminations | truncations
        return self._stacked(), rewards, terminations, truncations, {"doubt": np.array([self._doubt, 0.0])}

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


def side_by_side(policy: PolicyLike, worlds: Worlds, seed: int = 0, steps: int | None = None) -> bytes:
    """Films the first of the paired episodes: the policy acting in the dream (left) and in the real env (right).

    Args:
        policy: See `aime_gym.evaluation.returns.PolicyLike`.
        worlds: Where.
        seed: See `Worlds.evaluate`.
        steps: Agent steps to film; the whole episode by default.

    Returns:
        An mp4 (H.264) in real time.

    Raises:
        AimeGymError: If no GL library works; the message has the remedy.
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


PARTING_ERROR = 0.5
"""Dream and world have parted when a sensor is off by this many of its standard deviations (root mean square)."""


@dataclass(frozen=True)
class Replay:
    """The real episode of a policy (L steps), and N dreams of its actions, open loop."""

    real: Mapping[str, NDArray[np.float32]]
    """Sensor -> [L, D]; row 0 is the common start."""
    dream: Mapping[str, NDArray[np.float32]]
    """Sensor -> [L, N, D]; where the model writes angles as codes, the turn nearest to the real one."""
    real_rewards: NDArray[np.float64]
    """[L]"""
    dream_rewards: NDArray[np.float64]
    """[L, N]"""
    scale: Mapping[str, NDArray[np.float32]]
    """Sensor -> [D] standard deviation, of the model's training data where the model keeps it."""
    seconds: float | None
    """Duration of one step; None where the env has no clock."""

    @property
    def errors(self) -> dict[str, NDArray[np.float64]]:
        """Sensor -> [L]: root mean square of (dream - real) / scale, over dreams and dims."""
        return {
            name: np.sqrt((((self.dream[name] - real[:, None]) / self.scale[name]) ** 2).mean(axis=(1, 2)))
            for name, real in self.real.items()
        }

    def parting(self, name: str) -> int | None:
        """First step at which a sensor's error exceeds `PARTING_ERROR`; None if it never does."""
        beyond = np.flatnonzero(self.errors[name] > PARTING_ERROR)
        return int(beyond[0]) if len(beyond) else None

    @property
    def verdict(self) -> str:
        """Where they part, in words."""
        steps, length = {name: self.parting(name) for name in self.real}, len(self.real_rewards)
        parted = sorted((step, name) for name, step in steps.items() if step is not None)
        limit = f"off by more than {PARTING_ERROR:g} of its standard deviations"
        if not parted:
            return f"Under the same actions dream and world stay together for all {length} steps: no sensor is {limit}."
        (first, name), *others = parted
        after = "" if self.seconds is None else f" ({first * self.seconds:.2g} s)"
        when = f"at step {first}{after}" if first else "already at the start"
        later = [f"{other} at step {step}" for step, other in others]
        later += [f"{other} never" for other, step in steps.items() if step is None]
        return f"Under the same actions dream and world part {when}: {name} is then {limit}" + (
            f"; {', '.join(later)}." if later else "."
        )


def replay(policy: PolicyLike, worlds: Worlds, seed: int = 0, dreams: int = 16) -> Replay:
    """Runs the first of the paired episodes in the real env, then its actions in the dream.

    The dreams of a foreign body begin with the first `BURN_IN` frames of the real episode itself.

    Args:
        policy: See `aime_gym.evaluation.returns.PolicyLike`.
        worlds: With obs_type ``"state"``, ``"dict"`` or ``"latent"``.
        seed: See `Worlds.evaluate`, whose first episode this is.
        dreams: N, sampled side by side.

    Raises:
        AimeGymError: If the real episode is over before a dream can begin.
    """
    start = worlds.draw_starts(1, seed)
    real_envs, dream_envs = worlds.real_envs(1), worlds.dream_envs(dreams)
    try:
        ran = episode_returns(policy, real_envs, seed=[seed], starts=worlds.real_starts(start), record=True)
        real = ran.recordings[0]
        options: Any = start[0]
        if worlds.embodiment.foreign:
            if len(real.actions) <= BURN_IN:
                raise AimeGymError(f"A dream of it begins after {BURN_IN} steps; the episode has {len(real.actions)}.")
            options = {"observations": _rows(real.observations, 0, BURN_IN), "actions": real.actions[: BURN_IN - 1]}
            real = Recording(
                _rows(real.observations, BURN_IN - 1), real.actions[BURN_IN - 1 :], real.rewards[BURN_IN - 1 :]
            )
        observations, rewards = _dream(dream_envs, real.actions, seed, options)
        seconds = real_envs.envs[0].unwrapped.control_timestep  # type: ignore[attr-defined]
    finally:
        real_envs.close()
        dream_envs.close()
    sensors, length = worlds.embodiment.observed(worlds.setup), len(rewards)

    def split(observations: Any) -> dict[str, np.ndarray]:
        shows_parts = isinstance(observations, Mapping)
        return from_shown(sensors, observations) if shows_parts else to_sensors(sensors, observations)

    dreamt = [split(observation) for observation in observations]  # L of [N, D]
    truth = split(_rows(real.observations, 0, length))
    codes = worlds.model.config.codes
    return Replay(
        truth,
        {
            s.name: codes[s.name].nearest(np.stack([step[s.name] for step in dreamt]), truth[s.name][:, None])
            for s in sensors
        },
        real.rewards[:length],
        rewards,
        {name: std for name, (_, std) in sensor_statistics(worlds.model).items()},
        seconds,
    )


def _dream(
    envs: VectorEnv, actions: NDArray[np.float32], seed: int, start: Any
) -> tuple[list[Any], NDArray[np.float64]]:
    """The same actions [L, A] in every slot, until an episode ends: observations before each step, rewards [L, N]."""
    observation, _ = envs.reset(seed=seed, options={"start": start})
    observations, rewards = [], []
    for action in actions:
        observations.append(observation)
        observation, reward, terminated, truncated, _ = envs.step(np.repeat(action[None], envs.num_envs, axis=0))
        rewards.append(reward)
        if (terminated | truncated).any():
            break
    return observations, np.stack(rewards)


def _rows(observations: Any, begin: int, end: int | None = None) -> Any:
    """Rows of observations [L, ...] of any obs_type."""
    if isinstance(observations, Mapping):
        return {name: values[begin:end] for name, values in observations.items()}
    return observations[begin:end]
