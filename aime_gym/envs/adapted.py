"""The real world of a foreign body: any Gymnasium env, with the spaces that its dream has."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import gymnasium
import numpy as np

from aime_gym import foreign
from aime_gym.embodiments import get_embodiment
from aime_gym.envs.rendering import forget_current_context
from aime_gym.envs.spaces import action_space, check_action, real_observation_space, to_state
from aime_gym.errors import AimeGymError

Observation = np.ndarray | dict[str, np.ndarray]


_OF_GOALS = ("compute_reward", "compute_terminated", "compute_truncated")
"""Methods of envs with goals (`gymnasium_robotics.GoalEnv`), by which SB3's HerReplayBuffer relabels."""


class AdaptedEnv(gymnasium.Env):
    """A Gymnasium env as models see it: actions in [-1, 1], float32 sensors, images of 64x64.

    Args:
        embodiment: The env's id.
        task: ``"own"``: the env's own reward.
        obs_type: ``"state"``, ``"dict"`` or ``"image"``; by default ``"image"`` where it shows nothing else, else
            ``"state"``. For ``"latent"`` wrap the env in `LatentObservation`.
        setup: As of `RealEnv`; a foreign body's sensors are the same in all of them.
        render_mode: Of the env.
        **kwargs: Of the env.

    Raises:
        AimeGymError: If there is no such env, it does not show what `obs_type` asks for, cannot be rendered as asked
            for, or `kwargs` make another body of it.
    """

    _closed = False

    def __init__(
        self,
        embodiment: str,
        task: str | None = None,
        obs_type: str | None = None,
        setup: str = "mdp",
        render_mode: str | None = None,
        **kwargs: Any,
    ):
        self.embodiment = get_embodiment(embodiment)
        self.task = self.embodiment.check_task(task or self.embodiment.tasks[0])
        self.sensors = self.embodiment.sensors
        self.obs_type = obs_type = obs_type or ("state" if self.sensors else "image")
        if obs_type == "image" and not self.embodiment.has_image:
            raise AimeGymError(f"The observations of {self.embodiment.name} have no image; use obs_type 'state'.")
        self.observation_space = real_observation_space(self.sensors, obs_type)
        self.action_space = action_space(self.embodiment.action_dim)
        shown = {}  # not every env knows render modes
        if render_mode is not None:
            foreign.check_render_mode(self.embodiment.name, render_mode)
            shown = {"render_mode": render_mode}
        self._env = foreign.make_foreign(self.embodiment.name, **shown, **kwargs)
        self._check_body(kwargs)
        self._reader = foreign.Reader(self.embodiment.name, self._env.observation_space)
        for method in _OF_GOALS:
            if hasattr(self._env.unwrapped, method):
                setattr(self, method, self._env.get_wrapper_attr(method))
        self.render_mode = render_mode
        self.metadata = {"render_fps": 30, **self._env.metadata}
        if seconds := self.control_timestep:  # Gymnasium 1.4.0's Pendulum says 30 where 20 steps are a second
            self.metadata["render_fps"] = max(1, round(1 / seconds))
        if render_mode and not self.metadata.get("render_modes"):  # which not every env tells
            self.metadata["render_modes"] = [render_mode]
        self._readings: dict[str, np.ndarray] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict]:
        """Starts an episode; arguments are the env's own."""
        super().reset(seed=seed)
        if self.embodiment.has_image:
            self._settle_gl()
        observation, info = self._env.reset(seed=seed, options=options)
        return self._observe(observation), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One step with `action` [A] in [-1, 1], which is stretched to the env's own bounds.

        Raises:
            AimeGymError: If the action has another shape, is not finite or leaves [-1, 1].
        """
        action = check_action(action, self.embodiment.action_dim)
        if self.embodiment.has_image:
            self._settle_gl()
        own = foreign.to_own_action(action, self._env.action_space)  # type: ignore[arg-type]  # a Box: it is a body's
        observation, reward, terminated, truncated, info = self._env.step(own)
        return self._observe(observation), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """What the env renders."""
        self._settle_gl()
        return self._env.render()

    def close(self) -> None:
        """Closes the env; more than once is no harm."""
        if self._closed:
            return
        self._closed = True
        if viewer := self._settle_gl():
            viewer.con.free()  # while its own context is current: Gymnasium leaves it to whichever is then
        self._env.close()

    def __del__(self) -> None:
        """Closes an env that was dropped, whose pictures' memory garbage collection would free in another's context."""
        if "_env" in self.__dict__ and not sys.is_finalizing():
            with contextlib.suppress(Exception):  # in the midst of anything, where nobody could catch it
                self.close()

    def _settle_gl(self) -> Any:
        """Prepares GL for what the env may draw, or free, now; returns its off-screen viewer if it is Gymnasium's.

        Gymnasium draws into the viewer that was made last, whosever it is, and dm_control into that which it made
        current last, whatever others did since.
        """
        if self.render_mode == "human":
            return None
        forget_current_context()
        viewer = getattr(getattr(self._env.unwrapped, "mujoco_renderer", None), "viewer", None)
        if viewer is not None:
            viewer.make_context_current()
        return viewer

    @property
    def control_timestep(self) -> float | None:
        """Seconds of one step by the env's own clock; None where it has none, as frames a second are no clock."""
        return foreign.seconds_of_step(self._env)

    def readings(self) -> dict[str, np.ndarray]:
        """All sensors now: name -> [dim] float32, and the ``image`` [64, 64, 3] uint8 if there is one."""
        return dict(self._readings)

    def _check_body(self, kwargs: dict[str, Any]) -> None:
        """Raises an `AimeGymError` unless the env, made with `kwargs`, has the spaces that its id stands for."""
        name, env = self.embodiment.name, self._env
        made = foreign.body_of_spaces(name, env.observation_space, env.action_space, self.embodiment.episode_steps)
        if made != self.embodiment:
            self.close()
            raise AimeGymError(
                f"{name} with {kwargs} is another body: it shows {env.observation_space} and takes {env.action_space}. "
                f"Register it under an id of its own: gymnasium.register('Mine-v0', entry_point=..., kwargs={kwargs})."
            )

    def _observe(self, observation: Any) -> Observation:
        self._readings = self._reader.read(observation)
        if self.obs_type == "image":
            return self._readings[foreign.IMAGE].copy()
        shown = {sensor.name: self._readings[sensor.name].copy() for sensor in self.sensors}
        return shown if self.obs_type == "dict" else to_state(self.sensors, shown)
