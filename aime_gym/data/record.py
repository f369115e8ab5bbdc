"""A wrapper that turns episodes of the real env into trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from aime_gym.data.trajectories import Trajectory, check_trajectory


class RecordTrajectories(gymnasium.Wrapper):
    """Hands every complete episode of an `AimeReal` env to a function, as a trajectory.

    All sensors are recorded, whatever the obs_type, the physics state of bodies of the suite, and images where the env
    shows them. Incomplete episodes are dropped. A complete one that training would refuse, because a sensor or a reward
    is not finite, raises an `AimeGymError`.

    Args:
        env: An env whose unwrapped self is a `RealEnv` or an `AdaptedEnv`, within its time limit.
        on_trajectory: Called with each complete trajectory, e.g. to save it.
    """

    def __init__(self, env: gymnasium.Env, on_trajectory: Callable[[Trajectory], object]):
        super().__init__(env)
        self._on_trajectory = on_trajectory
        self._rows: list[dict[str, Any]] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Starts an episode and its record."""
        observation, info = self.env.reset(**kwargs)
        assert self.action_space.shape is not None
        self._rows = []
        self._rows = [self._row(observation, np.zeros(self.action_space.shape, np.float32), 0.0, False, False)]
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps and records; the end of the episode completes the trajectory."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._rows.append(self._row(observation, action, float(reward), terminated or truncated, terminated))
        if terminated or truncated:
            trajectory = {key: np.stack([row[key] for row in self._rows]) for key in self._rows[0]}
            self._rows = []
            world: Any = self.unwrapped
            check_trajectory(f"An episode of {world.embodiment.name}", trajectory)
            self._on_trajectory(trajectory)
        return observation, reward, terminated, truncated, info

    def _row(self, seen: Any, action: np.ndarray, reward: float, last: bool, terminal: bool) -> dict[str, Any]:
        world: Any = self.unwrapped
        return {
            **({"image": seen} if world.obs_type == "image" else {}),
            **world.readings(),
            "pre_action": np.asarray(action, np.float32).copy(),
            "reward": np.array([reward], np.float32),
            "is_first": np.bool_(not self._rows),
            "is_last": np.bool_(last),
            "is_terminal": np.bool_(terminal),
        }
