"""The real env: a body of the suite, or any Gymnasium env in the same form, behind the ids `AimeReal-...`."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import TimeLimit

from aime_gym.bodies import lookup as foreign
from aime_gym.bodies import tasks
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.bodies.sensors import IMAGE_SIZE, Rendering, check_rendering
from aime_gym.envs.rendering import MuJoCoRenderer, forget_current_context
from aime_gym.errors import AimeGymError, check_positive, known_keywords, unknown_name, warn_caller
from aime_gym.gl import import_without_gl
from aime_gym.observations import action_space, real_observation_space, to_shown, to_state, to_vector


class RealEnv(gymnasium.Env):
    """A dm_control body with AIME's sensors, action repeat and tasks.

    One step is one agent step: the action is held for the body's action repeat and the rewards are summed. Episodes
    never terminate; `gymnasium.make` truncates them after 1000 control steps, or after `max_episode_steps` agent steps.

    Examples:
        >>> import gymnasium, aime_gym
        >>> world = gymnasium.make("AimeReal-Walker-v0", task="walk", obs_type="dict")
        >>> observation, info = world.reset(seed=0)
        >>> {name: part.shape for name, part in observation.items()}
        {'orientations': (14,), 'height': (1,), 'velocity': (9,)}

    Args:
        embodiment: The body, e.g. ``"walker"``.
        task: One of its tasks; its first one by default.
        obs_type: ``"state"``, ``"dict"`` or ``"image"``; for ``"latent"`` wrap the env in `LatentObservation`. With
            images, `AsyncVectorEnv` needs ``context="spawn"`` where this process has rendered: GL survives no fork.
        setup: Which sensors are shown: ``"mdp"`` (all) or ``"lpomdp"`` (no velocities).
        render_mode: ``"rgb_array"`` or None.
        width: Width of rendered frames in pixels.
        height: Height of rendered frames in pixels.
        camera: MuJoCo's camera, by its id or its name; -1 looks at the whole scene.
        clip_actions: Whether finite actions outside [-1, 1] are clipped to it rather than refused.
        rendering: ``"full"`` or, three times as fast on a CPU and hardly to be told from it, ``"fast"``.

    Raises:
        AimeGymError: If a name is unknown; the message suggests the nearest.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - Gymnasium's own convention

    @known_keywords("a real env")
    def __init__(
        self,
        embodiment: str,
        task: str | None = None,
        obs_type: str = "state",
        setup: str = "mdp",
        render_mode: str | None = None,
        width: int = 320,
        height: int = 240,
        camera: int | str = 0,
        clip_actions: bool = False,
        rendering: Rendering = "full",
    ):
        self.clip_actions, self.rendering = clip_actions, check_rendering(rendering)
        self.embodiment = get_embodiment(embodiment)
        self.task = self.embodiment.check_task(task or self.embodiment.tasks[0])
        self.obs_type = obs_type
        self.sensors = self.embodiment.observed("mdp" if obs_type == "image" else setup)
        if render_mode not in (None, "rgb_array"):
            raise AimeGymError(f"render_mode is 'rgb_array' or None; got {render_mode!r}.")
        self.observation_space = real_observation_space(self.sensors, obs_type)
        self.action_space = action_space(self.embodiment)

        shimmy = import_without_gl("shimmy.dm_control_compatibility")
        self._dm_env = tasks.load(self.embodiment, self.task)
        self._world = shimmy.DmControlCompatibilityV0(self._dm_env)
        self._reward = tasks.step_reward(self.embodiment, self.task, self._dm_env)
        self._dm_env.task.get_reward = self._reward.measure
        # Some suite bodies take actions beyond [-1, 1]; ours are the same box everywhere.
        spec = self._dm_env.action_spec()
        self._low, self._high = spec.minimum, spec.maximum

        self.render_mode = render_mode
        fps = 1 / (self._dm_env.control_timestep() * self.embodiment.action_repeat)
        self.metadata = {**self.metadata, "render_fps": round(fps)}
        self._frame_size = (width, height, camera)
        self._renderers: dict[tuple[int, int, int | str], MuJoCoRenderer] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray | dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Seeds this and all later resets.
            options: ``{"physics": state}`` starts from that physics state (`[nq + nv]` float64) instead of a drawn one.

        Returns:
            The observation and an empty info.

        Raises:
            AimeGymError: If an option is unknown, or the state has another size.
        """
        options = options or {}
        if unknown := set(options) - {"physics"}:
            raise unknown_name("reset option", unknown.pop(), ("physics",))
        super().reset(seed=seed)
        sensors, _ = self._world.reset(seed=int(self.np_random.integers(2**31)))
        if options.get("physics") is not None:
            self.set_physics_state(options["physics"])
            sensors = self._dm_env.task.get_observation(self._dm_env.physics)
        return self._observe(sensors), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray | dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Holds `action` `[action_dim]` for the action repeat; the reward is summed over it (v1 tasks: see `tasks`).

        Raises:
            AimeGymError: If the action has another shape, is not finite or leaves [-1, 1].
        """
        action = to_vector(action, self.embodiment, self.clip_actions)
        action = np.clip(action.astype(np.float64), self._low, self._high)
        measures = []
        for _ in range(self.embodiment.action_repeat):
            sensors, measure, _, _, _ = self._world.step(action)
            measures.append(measure)
        return self._observe(sensors), self._reward.total(measures, self._dm_env.physics), False, False, {}

    def render(self) -> np.ndarray | None:
        """The present state as `[height, width, 3]` uint8."""
        return self._render(*self._frame_size) if self.render_mode else None

    def close(self) -> None:
        """Frees the physics and GL contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._dm_env.close()

    @property
    def physics_state(self) -> np.ndarray:
        """The physics state now, `[nq + nv (+ na)]` float64."""
        return self._dm_env.physics.get_state()

    @property
    def physics(self) -> Any:
        """dm_control's physics, whose `model` (masses, friction, ...) may be changed to make another world of it."""
        return self._dm_env.physics

    def set_physics_state(self, state: np.ndarray) -> None:
        """Continues the episode from a physics state, `[nq + nv (+ na)]` float64."""
        tasks.set_physics_state(self._dm_env.physics, state)

    @property
    def control_timestep(self) -> float:
        """Seconds of one agent step."""
        return self._dm_env.control_timestep() * self.embodiment.action_repeat

    def readings(self) -> dict[str, np.ndarray]:
        """All tabular sensors now, whatever the obs_type: name -> `[dim]` float32, and the state as ``physics``."""
        sensors = self._all_sensors(self._dm_env.task.get_observation(self._dm_env.physics))
        return {**sensors, "physics": self.physics_state.astype(np.float64)}

    def _all_sensors(self, sensors: dict[str, Any]) -> dict[str, np.ndarray]:
        # Scalars such as the walker's height become shape (1,).
        return {s.name: np.array(sensors[s.name], np.float32).reshape(s.dim) for s in self.embodiment.sensors}

    def _observe(self, sensors: dict[str, Any]) -> np.ndarray | dict[str, np.ndarray]:
        if self.obs_type == "image":
            return self._render(IMAGE_SIZE, IMAGE_SIZE, 0)
        readings = self._all_sensors(sensors)
        if self.obs_type == "dict":
            return {s.name: readings[s.name] for s in self.sensors}
        return to_state(self.sensors, readings)

    def _render(self, width: int, height: int, camera: int | str) -> np.ndarray:
        key = (width, height, camera)
        if key not in self._renderers:
            self._renderers[key] = MuJoCoRenderer(self._dm_env.physics, width, height, camera, self.rendering)
        return self._renderers[key].render()


Observation = np.ndarray | dict[str, np.ndarray]

_OF_GOALS = ("compute_reward", "compute_terminated", "compute_truncated")
"""Methods of envs with goals (`gymnasium_robotics.GoalEnv`), by which SB3's HerReplayBuffer relabels."""


class AdaptedEnv(gymnasium.Env):
    """A Gymnasium env as models see it: actions in [-1, 1] or its own choices, float32 sensors, images of 64x64.

    Args:
        embodiment: The env's id.
        task: ``"own"``: the env's own reward.
        obs_type: ``"state"``, ``"dict"`` or ``"image"``; by default ``"image"`` where it shows nothing else, else
            ``"state"``. For ``"latent"`` wrap the env in `LatentObservation`.
        setup: See `RealEnv`; a foreign body's sensors are the same in all of them.
        render_mode: The env's own.
        clip_actions: Whether finite actions outside [-1, 1] are clipped to it rather than refused.
        **kwargs: Keywords of the env.

    Raises:
        AimeGymError: If there is no such env, it does not show what `obs_type` asks for, cannot be rendered as asked
            for, or `kwargs` make another body of it.
    """

    asked_steps: int | None = None
    """Steps of an episode that were asked for, until it is said that the env does not take so many."""
    _closed, _taken = False, 0

    def __init__(
        self,
        embodiment: str,
        task: str | None = None,
        obs_type: str | None = None,
        setup: str = "mdp",
        render_mode: str | None = None,
        clip_actions: bool = False,
        **kwargs: Any,
    ):
        self.embodiment, self.clip_actions = get_embodiment(embodiment), clip_actions
        self.task = self.embodiment.check_task(task or self.embodiment.tasks[0])
        self.sensors = self.embodiment.sensors
        self.obs_type = obs_type = obs_type or ("state" if self.sensors else "image")
        if obs_type == "image" and not self.embodiment.has_image:
            raise AimeGymError(f"The observations of {self.embodiment.name} have no image; use obs_type 'state'.")
        self.observation_space = real_observation_space(self.sensors, obs_type)
        self.action_space = action_space(self.embodiment)
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
        self._taken = 0
        return self._observe(observation), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One step with `action` [A] in [-1, 1], which is stretched to the env's own bounds, or with a choice.

        Raises:
            AimeGymError: If the action has another shape, is not finite or not in the space, or the env pays
                something else than one number.
        """
        action = to_vector(action, self.embodiment, self.clip_actions)
        if self.embodiment.has_image:
            self._settle_gl()
        own = foreign.to_own_action(action, self._env.action_space)
        observation, reward, terminated, truncated, info = self._env.step(own)
        self._taken += 1
        if truncated and self.asked_steps is not None and self._taken < self.asked_steps:
            warn_caller(
                f"{self.embodiment.name} truncates its episodes itself, this one after {self._taken} steps: "
                f"episode_steps={self.asked_steps} cannot lengthen them."
            )
            self.asked_steps = None
        return self._observe(observation), self._number(reward), bool(terminated), bool(truncated), info

    def _number(self, reward: Any) -> float:
        """The reward of a step; an `AimeGymError` if it is not one number."""
        if type(reward) is not float and (np.ndim(reward) or np.asarray(reward).dtype.kind not in "fiub"):
            told = f"shape {list(np.shape(reward))}" if np.ndim(reward) else repr(reward)
            raise AimeGymError(
                f"{self.embodiment.name} pays {told} for a step; expected one number. "
                "gymnasium.wrappers.TransformReward makes it one, e.g. by lambda reward: float(reward[0])."
            )
        return float(reward)

    def render(self) -> Any:
        """What the env renders."""
        self._settle_gl()
        return self._env.render()

    def close(self) -> None:
        """Closes the env; it may be called more than once."""
        if self._closed:
            return
        self._closed = True
        if viewer := self._settle_gl():
            viewer.con.free()  # while its own context is current: Gymnasium leaves it to whichever is then
        self._env.close()

    def __del__(self) -> None:
        """Closes an env that was dropped, whose pictures' memory garbage collection would free in another's context."""
        if "_env" in self.__dict__ and not sys.is_finalizing():
            with contextlib.suppress(Exception):  # garbage collection runs anywhere, where nothing could catch it
                self.close()

    def _settle_gl(self) -> Any:
        """Prepares GL for what the env may draw, or free, now; returns its off-screen viewer if it is Gymnasium's.

        Gymnasium draws into the viewer that was made last, whatever env it belongs to, and dm_control into the one that
        it made current last, whatever others did since.
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
        return to_shown(self.sensors, shown) if self.obs_type == "dict" else to_state(self.sensors, shown)


def make_real(embodiment: str, episode_steps: int | None = None, **kwargs: Any) -> gymnasium.Env:
    """The real env of a body: that of its own id for one of the suite, an `AdaptedEnv` for a foreign one.

    Args:
        embodiment: A name of the suite or the id of a Gymnasium env.
        episode_steps: When to truncate; after the body's own episode by default. `gymnasium.make` does not hand on its
            `max_episode_steps`, which comes on top and so can only be shorter.
        **kwargs: Keywords of the env.
    """
    body = get_embodiment(embodiment)
    steps = episode_length(episode_steps, body)
    if body.foreign:
        env = AdaptedEnv(body.name, **kwargs)
        env.asked_steps = episode_steps
        return TimeLimit(env, steps)
    # Gymnasium adds what "human" and "rgb_array_list" need, as it does within a foreign env.
    return gymnasium.make(f"AimeReal-{body.title}-v0", max_episode_steps=steps, disable_env_checker=True, **kwargs)


def episode_length(episode_steps: int | None, body: Embodiment) -> int:
    """Steps until truncation: those asked for, or the body's own."""
    return body.episode_steps if episode_steps is None else check_positive(episode_steps, "episode_steps")
