"""One real episode, and what the dream makes of the same actions from the same start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aime_gym.agents.standardised import sensor_statistics
from aime_gym.envs.spaces import to_sensors
from aime_gym.evaluation.returns import PolicyLike, episode_returns
from aime_gym.evaluation.worlds import Worlds

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
    seconds: float
    """Duration of one step."""

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
        when = f"at step {first} ({first * self.seconds:.2g} s)" if first else "already at the start"
        later = [f"{other} at step {step}" for step, other in others]
        later += [f"{other} never" for other, step in steps.items() if step is None]
        return f"Under the same actions dream and world part {when}: {name} is then {limit}" + (
            f"; {', '.join(later)}." if later else "."
        )


@dataclass
class _Actions:
    """The policy that repeats given actions [L, A] in every slot."""

    actions: NDArray[np.float32]
    step: int = 0

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        self.step += 1
        slots = len(next(iter(observation.values())) if isinstance(observation, Mapping) else observation)
        return np.repeat(self.actions[None, self.step - 1], slots, axis=0), None


def replay(policy: PolicyLike, worlds: Worlds, seed: int = 0, dreams: int = 16) -> Replay:
    """Runs the first of the paired episodes in the real env, then its actions in the dream.

    Args:
        policy: See `aime_gym.evaluation.returns.PolicyLike`.
        worlds: With obs_type ``"state"`` or ``"dict"``.
        seed: As of `Worlds.evaluate`, whose first episode this is.
        dreams: N, sampled side by side.
    """
    start = worlds.draw_starts(1, seed)
    real_envs, dream_envs = worlds.real_envs(1), worlds.dream_envs(dreams)
    try:
        ran = episode_returns(policy, real_envs, seed=[seed], starts={"physics": worlds.physics(start)}, record=True)
        real = ran.recordings[0]
        dreamt = episode_returns(
            _Actions(real.actions),
            dream_envs,
            seed=[seed + i for i in range(dreams)],
            starts={"start": np.repeat(start, dreams)},
            record=True,
        ).recordings
        seconds = real_envs.envs[0].unwrapped.control_timestep  # type: ignore[attr-defined]
    finally:
        real_envs.close()
        dream_envs.close()
    sensors = worlds.embodiment.observed(worlds.setup)

    def split(observations: Any) -> dict[str, np.ndarray]:
        return dict(observations) if isinstance(observations, Mapping) else to_sensors(sensors, observations)

    dream_sensors = [split(recording.observations) for recording in dreamt]
    return Replay(
        split(real.observations),
        {s.name: np.stack([dream[s.name] for dream in dream_sensors], axis=1) for s in sensors},
        real.rewards,
        np.stack([recording.rewards for recording in dreamt], axis=1),
        {name: std for name, (_, std) in sensor_statistics(worlds.model).items()},
        seconds,
    )
