"""One real episode, and what the dream makes of the same actions from the same start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from aime_gym.agents.standardised import sensor_statistics
from aime_gym.envs.spaces import to_sensors
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.returns import PolicyLike, Recording, episode_returns
from aime_gym.evaluation.worlds import Worlds

BURN_IN = 10
"""Real frames that a dream of a foreign body is shown before it goes on alone."""
PARTING_ERROR = 0.5
"""Dream and world have parted when a sensor is off by this many of its standard deviations (root mean square)."""


@dataclass(frozen=True)
class Replay:
    """The real episode of a policy (L steps), and N dreams of its actions, open loop."""

    real: Mapping[str, NDArray[np.float32]]
    """Sensor -> [L, D]; row 0 is the common start."""
    dream: Mapping[str, NDArray[np.float32]]
    """Sensor -> [L, N, D]."""
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
        seed: As of `Worlds.evaluate`, whose first episode this is.
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
        return dict(observations) if isinstance(observations, Mapping) else to_sensors(sensors, observations)

    dreamt = [split(observation) for observation in observations]  # L of [N, D]
    return Replay(
        split(_rows(real.observations, 0, length)),
        {s.name: np.stack([step[s.name] for step in dreamt]) for s in sensors},
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
