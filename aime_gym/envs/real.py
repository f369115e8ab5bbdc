"""The real world: dm_control through Shimmy, with the spaces and the clock of the dream."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from aime_gym import tasks
from aime_gym.embodiments import get_embodiment
from aime_gym.envs.rendering import MuJoCoRenderer, import_without_gl
from aime_gym.envs.spaces import action_space, check_action, real_observation_space, to_state
from aime_gym.errors import AimeGymError, known_keywords, unknown_name
from aime_gym.pictures import IMAGE_SIZE


class RealEnv(gymnasium.Env):
    """A dm_control body with AIME's sensors, action repeat and tasks.

    One step is one agent step: the action is held for the body's action repeat and the rewards are summed. Episodes
    never terminate; `gymnasium.make` truncates them after 1000 control steps, or after `max_episode_steps` agent steps.

    Args:
        embodiment: The body, e.g. ``"walker"``.
        task: One of its tasks; its first one by default.
        obs_type: ``"state"``, ``"dict"`` or ``"image"``; for ``"latent"`` wrap the env in `LatentObservation`. With
            images, `AsyncVectorEnv` needs ``context="spawn"`` where this process has rendered: GL survives no fork.
        setup: Which sensors are shown: ``"mdp"`` (all) or ``"lpomdp"`` (no velocities).
        render_mode: ``"rgb_array"`` or None.
        width: Of rendered frames, in pixels.
        height: Of rendered frames, in pixels.
        camera: Of MuJoCo, by its id or its name; -1 looks at the whole scene.

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
    ):
        self.embodiment = get_embodiment(embodiment)
        self.task = self.embodiment.check_task(task or self.embodiment.tasks[0])
        self.obs_type = obs_type
        self.sensors = self.embodiment.observed("mdp" if obs_type == "image" else setup)
        if render_mode not in (None, "rgb_array"):
            raise AimeGymError(f"render_mode is 'rgb_array' or None; got {render_mode!r}.")
        self.observation_space = real_observation_space(self.sensors, obs_type)
        self.action_space = action_space(self.embodiment.action_dim)

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
        action = check_action(action, self.embodiment.action_dim)
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
            self._renderers[key] = MuJoCoRenderer(self._dm_env.physics, width, height, camera)
        return self._renderers[key].render()
