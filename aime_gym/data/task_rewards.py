"""Rewards of tasks by their formulas: of trajectories by replay of physics, of dreams by decoded physics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.bodies import tasks
from aime_gym.bodies import tasks as task_rewards
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.data.trajectories import Trajectory
from aime_gym.errors import AimeGymError
from aime_gym.world_model.model import WorldModel

_TOLERANCE = 1e-6


def relabel(trajectory: Trajectory, embodiment: Embodiment, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Computes the reward that each task would have given.

    The replay is bit for bit the live run; where it strays (another version of MuJoCo, say) it goes back to the stored
    state, so errors do not add up.

    Args:
        trajectory: With ``physics`` `[T, nq + nv (+ na)]` and ``pre_action`` `[T, A]`.
        embodiment: Its body.
        tasks: The tasks wanted; those whose target lies outside the physics state are refused.

    Returns:
        Task -> rewards `[T, 1]` float32, row 0 is 0.

    Raises:
        AimeGymError: If the trajectory has no physics or a task cannot be computed from it.
    """
    for task in tasks:
        task_rewards.check_replayable(embodiment, task)
    if "physics" not in trajectory:
        raise AimeGymError(
            "This trajectory has no 'physics' (qpos and qvel a row), from which rewards are computed; "
            "data sets made by `aime-gym collect` have it."
        )
    world = first_world(embodiment.name)
    physics = world.physics
    low, high = world.action_spec().minimum, world.action_spec().maximum
    step_rewards = [_step_reward(embodiment.name, task) for task in tasks]
    length = len(trajectory["physics"])
    rewards = np.zeros((len(tasks), length, 1), np.float32)
    for t in range(1, length):
        if t == 1 or np.abs(physics.get_state() - trajectory["physics"][t - 1]).max() > _TOLERANCE:
            task_rewards.set_physics_state(physics, trajectory["physics"][t - 1])
        world.task.before_step(np.clip(trajectory["pre_action"][t].astype(np.float64), low, high), physics)
        measures = []
        for _ in range(embodiment.action_repeat):
            physics.step(world._n_sub_steps)
            measures.append([reward.measure(physics) for reward in step_rewards])
        for i, reward in enumerate(step_rewards):
            rewards[i, t, 0] = reward.total([measure[i] for measure in measures], physics)
    return dict(zip(tasks, rewards, strict=True))


# Compiling a MuJoCo model costs as much as replaying a trajectory.
@cache
def first_world(embodiment: str) -> Any:
    """The dm_control environment of a body's first task, in which rewards are replayed."""
    body = get_embodiment(embodiment)
    return task_rewards.load(body, body.tasks[0])


@cache
def _step_reward(embodiment: str, task: str) -> task_rewards.StepReward:
    body = get_embodiment(embodiment)
    return task_rewards.step_reward(body, task, task_rewards.load(body, task))


Sensors = Mapping[str, NDArray[np.float64]]

States = NDArray[np.float64]


def formula_lacks(body: Embodiment, task: str, model: WorldModel) -> str | None:
    """Why a task's reward cannot be computed from what a model decodes; None where it can.

    Args:
        body: The body.
        task: One of its tasks.
        model: Decodes sensors, or has a head that decodes the physics state.
    """
    if body.foreign:
        return f"the reward of {body.name} is known to its env alone"
    try:
        tasks.check_replayable(body, task)
    except AimeGymError:
        return f"the reward of {body.name} {task} is about things that no sensor sees"
    if _reader(body, model) is None:
        return f"the model decodes no physics state of {body.name}"
    return None


class TaskFormula:
    """The reward of one task as a function of latents or of physics states, at the end of a step.

    The real reward of a step is a sum over its control steps, of which the frame shows the last. The formula is
    therefore evaluated there and taken times their number; errors of a dream are differences of two such values.

    Args:
        body: The body, of the suite.
        task: One for which `formula_lacks` gives None.
        model: What decodes.
    """

    def __init__(self, body: Embodiment, task: str, model: WorldModel):
        self._model, self._repeat = model, body.action_repeat
        self._env = tasks.load(body, task)
        self._reward = tasks.step_reward(body, task, self._env)
        spec = self._env.action_spec()
        self._low, self._high = spec.minimum, spec.maximum
        reader = _reader(body, model)
        assert reader is not None
        self._read: Callable[[Tensor], States] = reader

    def of_latents(self, features: Tensor, actions: NDArray[np.float32]) -> NDArray[np.float64]:
        """The reward of a step for what latents are decoded to.

        Args:
            features: [N, F]
            actions: [N, A], those that led there; some tasks charge for them.

        Returns:
            [N]
        """
        return self.of_states(self._read(features), actions)

    def of_states(self, states: States, actions: NDArray[np.float32]) -> NDArray[np.float64]:
        """The same for physics states [N, nq + nv (+ na)] as a trajectory's ``physics`` has them."""
        physics, rewards = self._env.physics, np.empty(len(states))
        for i, (state, action) in enumerate(zip(states, actions, strict=True)):
            physics.set_state(np.clip(np.nan_to_num(state), -tasks.LARGEST_STATE, tasks.LARGEST_STATE))
            mujoco.mj_step1(physics.model.ptr, physics.data.ptr)  # positions and velocities; forces cost the most
            physics.set_control(np.clip(action, self._low, self._high))
            rewards[i] = self._reward.total([self._reward.measure(physics)] * self._repeat, physics)
        return rewards


def states_of_sensors(body: str, sensors: Mapping[str, NDArray[Any]]) -> States:
    """The physics state that shows given sensors, for the bodies whose sensors tell all that a reward depends on.

    Coordinates that no sensor sees, such as how far a walker has come, are 0.

    Args:
        body: One of `READABLE`.
        sensors: Sensor -> [N, D].

    Returns:
        [N, nq + nv]; of a reacher with its target's place behind them.
    """
    return _STATES[body]({name: np.asarray(values, np.float64) for name, values in sensors.items()})


def _reader(body: Embodiment, model: WorldModel) -> Callable[[Tensor], States] | None:
    """From latents to physics states: by the decoded sensors, or else by the physics head."""
    names = [sensor.name for sensor in body.sensors]
    if body.name in _STATES and set(names) <= {*model.observed, *model.probed}:

        def read(features: Tensor) -> States:
            decoded = model.decode(features, names)
            return states_of_sensors(body.name, {name: value.cpu().numpy() for name, value in decoded.items()})

        return read
    heads = model.heads
    if heads is None or heads.state is None or body.name == "reacher":  # whose head does not know the target
        return None
    return lambda features: heads.physics(features).cpu().double().numpy()


def _joined(*columns: NDArray[np.float64]) -> States:
    """Columns [N] or [N, D], side by side."""
    return np.concatenate([column.reshape(len(column), -1) for column in columns], 1)


def _behind_zero(sensors: Sensors) -> States:
    """cheetah, hopper: ``position`` lacks the root's way, which comes first."""
    position = sensors["position"]
    return _joined(np.zeros(len(position)), position, sensors["velocity"])


def _as_they_are(sensors: Sensors) -> States:
    return _joined(sensors["position"], sensors["velocity"])


def _cartpole(sensors: Sensors) -> States:
    place, cosine, sine = sensors["position"].T
    return _joined(place, np.arctan2(sine, cosine), sensors["velocity"])


def _pendulum(sensors: Sensors) -> States:
    cosine, sine = sensors["orientation"].T
    return _joined(np.arctan2(sine, cosine), sensors["velocity"])


def _finger(sensors: Sensors) -> States:
    """The spinner's angle, on which no reward of ours depends, is not seen."""
    joints = sensors["position"][:, :2]
    return _joined(joints, np.zeros(len(joints)), sensors["velocity"])


def _reacher(sensors: Sensors) -> States:
    """The target lies beside the finger, at the end of two arms of 0.12 m."""
    shoulder, wrist = sensors["position"].T
    tip = 0.12 * np.stack([np.cos(shoulder) + np.cos(shoulder + wrist), np.sin(shoulder) + np.sin(shoulder + wrist)], 1)
    return _joined(sensors["position"], sensors["velocity"], tip + sensors["to_target"])


def _walker(sensors: Sensors) -> States:
    """Joints are differences of the seven bodies' directions: torso, then thigh, leg and foot of either side."""
    directions = sensors["orientations"].reshape(-1, 7, 2)
    angles = np.arctan2(directions[..., 1], directions[..., 0])  # [N, 7]
    parents = angles[:, [0, 1, 2, 0, 4, 5]]
    joints = np.mod(parents - angles[:, 1:] + np.pi, 2 * np.pi) - np.pi
    nothing = np.zeros(len(angles))
    return _joined(sensors["height"] - 1.3, nothing, angles[:, 0], joints, sensors["velocity"])


_STATES: Mapping[str, Callable[[Sensors], States]] = {
    "ball_in_cup": _as_they_are,
    "cartpole": _cartpole,
    "cheetah": _behind_zero,
    "finger": _finger,
    "hopper": _behind_zero,
    "pendulum": _pendulum,
    "reacher": _reacher,
    "walker": _walker,
}

READABLE = tuple(_STATES)
"""Bodies whose physics state follows from their sensors."""
