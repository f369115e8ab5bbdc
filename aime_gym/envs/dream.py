"""The dream: a world model as an env. `DreamVectorEnv` has all the logic; `DreamEnv` is one slot of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from aime_gym.envs.dream_vector import DreamVectorEnv, Observation
from aime_gym.envs.infos import of_slot
from aime_gym.envs.threads import one_thread
from aime_gym.errors import AimeGymError

__all__ = ["DreamEnv", "DreamVectorEnv"]


class DreamEnv(gymnasium.Env):
    """One dream: a `DreamVectorEnv` with one slot and no time limit of its own (`gymnasium.make` adds one).

    Args:
        embodiment: The body, e.g. ``"walker"``; by default the model's own.
        **kwargs: Those of `DreamVectorEnv`, without `num_envs`, `max_episode_steps` and `autoreset_mode`.
    """

    metadata = DreamVectorEnv.metadata

    def __init__(self, embodiment: str | None = None, **kwargs: Any):
        with one_thread():
            self._dream = DreamVectorEnv(
                embodiment, num_envs=1, max_episode_steps=None, autoreset_mode=AutoresetMode.DISABLED, **kwargs
            )
        self.render_mode = self._dream.render_mode
        self.observation_space = self._dream.single_observation_space
        self.action_space = self._dream.single_action_space
        self.embodiment, self.task, self.model = self._dream.embodiment, self._dream.task, self._dream.model
        self.metadata = {key: value for key, value in self._dream.metadata.items() if key != "autoreset_mode"}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins an episode; see `DreamVectorEnv.reset`. A seed gives what it gives to a slot there."""
        super().reset(seed=seed)
        observations, infos = self._dream.reset(seed=seed, options=options)
        return _first(observations), of_slot(infos, 0)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One agent step with `action` [A] in [-1, 1]; see `DreamVectorEnv.step`."""
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise AimeGymError(f"Expected an action of shape {self.action_space.shape}; got {action.shape}.")
        observations, rewards, terminations, truncations, infos = self._dream.step(action[None])
        ends = bool(terminations[0]), bool(truncations[0])
        return _first(observations), float(rewards[0]), *ends, of_slot(infos, 0)

    def render(self) -> np.ndarray | None:
        """The present latent as [height, width, 3] uint8."""
        frames = self._dream.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Frees the GL context."""
        self._dream.close()

    @property
    def starts(self) -> dict[str, np.ndarray]:
        """See `DreamVectorEnv.starts`."""
        return self._dream.starts

    def start_physics(self, index: int) -> NDArray[np.float64]:
        """See `DreamVectorEnv.start_physics`."""
        return self._dream.start_physics(index)

    def get_state(self) -> dict[str, Any]:
        """A copy of everything that decides what comes next; wrappers such as TimeLimit keep their own."""
        return self._dream.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `get_state` gave, bit for bit."""
        self._dream.set_state(state)


def _first(observations: Observation) -> Observation:
    if isinstance(observations, dict):
        return {name: values[0] for name, values in observations.items()}
    return observations[0]
