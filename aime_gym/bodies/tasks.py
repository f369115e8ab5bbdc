"""Task rewards as plain functions of the physics, one a control step.

The built-in tasks are dm_control's own. The custom ones follow those of AIME (Zhang et al., NeurIPS 2023), corrected:
walking backward rewards walking backward. The formulas of the first AIME release stay reachable as ``"<task>-v1"``:
there, walker's ``walkbackward`` and ``runbackward`` read ``velocity[0]``, which is the *vertical* speed, and the reward
of an agent step is the one of its last control step where all other tasks sum over the action repeat; in these two the
speed is that of the last control step, and how well the walker stands is summed. Three bodies whose rewards are 0
almost everywhere have a guiding task of ours beside them, which says at any state what is nearer to the reward.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from aime_gym.bodies.body import Embodiment
from aime_gym.errors import AimeGymError
from aime_gym.gl import import_without_gl

Physics = Any
"""dm_control's `Physics` of the embodiment's domain."""

LARGEST_STATE = 1e6
"""The largest number in a physics state: MuJoCo gives up far beyond it, and no body comes near."""

# Bodies whose custom tasks run on the physics and start states of a built-in one.
_BASE_TASKS = {"walker": "stand", "cheetah": "run", "finger": "spin", "hopper": "stand", "pendulum": "swingup"}
# The target or the terrain lives in the MuJoCo model, and no sensor of ours sees it.
_HIDDEN_TARGET = {("finger", "turn_easy"), ("finger", "turn_hard"), ("quadruped", "escape")}
# The physics state holds a ball, which that of the body's first task lacks.
_OWN_WORLD = {("quadruped", "fetch")}
# The reward also charges for the action.
_CONTROL_COST = {("hopper", "stand"), ("cartpole", "swingup"), ("cartpole", "balance")} | {
    ("humanoid", task) for task in ("stand", "walk", "run")
}


class _TargetInState:
    """Makes the place of reacher's target, which is drawn at every reset, part of the physics state: its last numbers.

    With it rewards, pictures and twins of stored states need nothing else.
    """

    def get_state(self: Any) -> np.ndarray:
        """The state as dm_control has it, then the target's x and y."""
        return np.concatenate([super().get_state(), self.named.model.geom_pos["target", ["x", "y"]]])  # type: ignore[misc]

    def set_state(self: Any, state: np.ndarray) -> None:
        """Sets what `get_state` gives; the last two numbers are the target's x and y."""
        super().set_state(state[:-2])  # type: ignore[misc]
        self.named.model.geom_pos["target", ["x", "y"]] = state[-2:]


class _WithoutGL:
    """Physics without a GL context, for which copies of it are of a class made here.

    quadruped's escape would upload its new terrain to a context that dm_control makes for it at every reset.
    """

    contexts = None

    def __reduce__(self: Any) -> tuple[Any, ...]:
        """Pickles it by its bases, as the class itself has no name under which it could be found again."""
        return _copy_physics, (type(self).__bases__, self.__getstate__())


def _copy_physics(bases: tuple[type, ...], state: Any) -> Any:
    physics: Any = object.__new__(type("Physics", bases, {}))
    physics.__setstate__(state)
    return physics


@dataclass(frozen=True)
class StepReward:
    """The reward of an agent step: the sum of `each` over its control steps times `last` at the last of them."""

    each: Callable[[Physics], float] | None = None
    """None for 1, however many control steps there are."""
    last: Callable[[Physics], float] | None = None
    """None for 1."""

    def measure(self, physics: Physics) -> float:
        """What is summed, at one control step."""
        return 1.0 if self.each is None else float(self.each(physics))

    def total(self, measures: Sequence[float], physics: Physics) -> float:
        """The reward of an agent step.

        Args:
            measures: `measure` after each of its control steps.
            physics: After the last of them.
        """
        total = 1.0 if self.each is None else sum(measures)
        return float(total if self.last is None else total * self.last(physics))

    def of_one(self, physics: Physics) -> float:
        """The reward of a single control step."""
        return self.total([self.measure(physics)], physics)


def load(embodiment: Embodiment, task: str) -> Any:
    """Makes the dm_control environment of a task, without a time limit.

    Args:
        embodiment: The body.
        task: One of its tasks; custom tasks replace the reward of the body's base task.

    Returns:
        A `dm_control.rl.control.Environment` whose `task.get_reward(physics)` is the task's reward.

    Raises:
        AimeGymError: If the body has no such task.
    """
    embodiment.check_task(task)
    custom = _CUSTOM.get((embodiment.name, task))
    base = _BASE_TASKS[embodiment.name] if custom else task
    env = _as_new(embodiment.name, base)
    mixins = (_TargetInState,) if embodiment.name == "reacher" else ()
    env.physics.__class__ = type("Physics", (*mixins, _WithoutGL, type(env.physics)), {})
    if mixins:
        env.task.get_reward = partial(_reacher_reward, env.task.get_reward, env.task._target_size)
    if custom:
        env.task.get_reward = custom.of_one
    return env


_new: dict[tuple[str, str], Any] = {}
"""Worlds of the suite that nobody has stepped: MuJoCo takes ten times as long to compile a model as to copy it."""
_making = threading.Lock()


def _as_new(domain: str, task: str) -> Any:
    """A world of the suite that shares nothing with others, as `dm_control.suite.load` makes it."""
    with _making:
        if (domain, task) not in _new:
            suite = import_without_gl("dm_control.suite")
            _new[domain, task] = suite.load(domain, task, task_kwargs={"time_limit": float("inf")})
        env = copy.copy(_new[domain, task])
        env._physics, env._task = env.physics.copy(), copy.deepcopy(env.task)
    env.task._random = np.random.RandomState()
    return env


def step_reward(embodiment: Embodiment, task: str, env: Any) -> StepReward:
    """How the rewards of control steps make that of an agent step; `env` is what `load` made for the task."""
    return _CUSTOM.get((embodiment.name, task), StepReward(each=env.task.get_reward))


def is_function_of_state(embodiment: Embodiment, task: str) -> bool:
    """Whether the reward of one control step follows from `qpos` and `qvel` alone."""
    return (embodiment.name, task) not in _HIDDEN_TARGET | _CONTROL_COST


def hides_target(embodiment: Embodiment, task: str) -> bool:
    """Whether a target or terrain that is drawn at every reset lies outside the physics state."""
    return (embodiment.name, task) in _HIDDEN_TARGET


def is_replayable(embodiment: Embodiment, task: str) -> bool:
    """Whether state and action, in the world of the body's first task, determine the reward of one of its tasks."""
    return (embodiment.name, task) not in _HIDDEN_TARGET | _OWN_WORLD


def check_replayable(embodiment: Embodiment, task: str) -> None:
    """Raises an `AimeGymError` unless the task is known and `is_replayable`."""
    _check_target(embodiment, task)
    if (embodiment.name, task) in _OWN_WORLD:
        raise AimeGymError(
            f"The reward of {embodiment.name} {task} is about things that the world of {embodiment.tasks[0]} lacks, so "
            "it cannot be computed for states of that."
        )


def _check_target(embodiment: Embodiment, task: str) -> None:
    embodiment.check_task(task)
    if hides_target(embodiment, task):
        raise AimeGymError(
            f"The reward of {embodiment.name} {task} depends on a target or terrain that the physics state "
            "does not hold, so it cannot be computed for stored states. Choose another task."
        )


def rewards_of_states(embodiment: Embodiment, task: str, states: np.ndarray) -> np.ndarray:
    """Computes the reward of one control step in each of the given physics states.

    Args:
        embodiment: The body.
        task: A task whose reward is a function of the state alone, see `is_function_of_state`.
        states: `[T, nq + nv (+ na)]` float64, as in a trajectory's ``physics``.

    Returns:
        `[T]` float64 rewards, in [0, 1].

    Raises:
        AimeGymError: If the reward needs more than the state, or the states have another size.
    """
    _check_target(embodiment, task)
    if not is_function_of_state(embodiment, task):
        raise AimeGymError(
            f"The reward of {embodiment.name} {task} also depends on the action: "
            "use aime_gym.data.trajectories.relabel, which replays it."
        )
    env = load(embodiment, task)
    rewards = np.empty(len(states))
    for t, state in enumerate(states):
        set_physics_state(env.physics, state)
        rewards[t] = env.task.get_reward(env.physics)
    return rewards


def set_physics_state(physics: Physics, state: np.ndarray) -> None:
    """Puts the physics into a stored state, as after a reset: no warm start of the solver is left behind.

    Args:
        physics: dm_control's physics.
        state: `[nq + nv (+ na)]` float64.

    Raises:
        AimeGymError: If the size differs, or a value is not finite or beyond `LARGEST_STATE`.
    """
    state = np.asarray(state, np.float64)
    expected, good = physics.get_state().shape, bool((np.abs(state) <= LARGEST_STATE).all())
    if state.shape != expected or not good:
        raise AimeGymError(
            f"A physics state of this body is {expected[0]} finite numbers (qpos, qvel); got shape {state.shape}"
            f"{'' if good else f' with values that are not finite, or beyond {LARGEST_STATE:g}'}."
        )
    with physics.reset_context():
        physics.set_state(state)


def _reacher_reward(reward: Callable[[Physics], float], target_size: float, physics: Physics) -> float:
    """dm_control keeps the size of a task's target in the model; physics of another task have another."""
    physics.named.model.geom_size["target", 0] = target_size
    return reward(physics)


def _backward(physics: Physics, speed: float) -> float:
    return float(np.clip(-physics.speed() / speed, 0, 1))


def _flip(physics: Physics, direction: float) -> float:
    return float(np.clip(direction * physics.velocity()[2] / 5, 0, 1))


def _walker_stand(physics: Physics) -> float:
    walker = import_without_gl("dm_control.suite.walker")
    return walker.PlanarWalker(move_speed=0).get_reward(physics)


def _walker_backward(physics: Physics, speed: float) -> float:
    move = np.clip(-physics.horizontal_velocity() / speed, 0, 1)
    return float(_walker_stand(physics) * (5 * move + 1) / 6)


def _backward_v1(physics: Physics, speed: float) -> float:
    vertical = physics.velocity()[0]  # v1 took the first velocity for the horizontal one
    return float((5 * np.clip(-vertical / speed, 0, 1) + 1) / 6)


def _jump(physics: Physics) -> float:
    return float(np.clip(physics.torso_height() / 5, 0, 1))


def _push(physics: Physics) -> float:
    finger = import_without_gl("dm_control.suite.finger")
    return float(np.clip((1 - physics.hinge_velocity() / finger._SPIN_VELOCITY) / 2, 0, 1))


def _rise(physics: Physics) -> float:
    hopper = import_without_gl("dm_control.suite.hopper")
    return float(np.clip((1 + physics.height() / hopper._STAND_HEIGHT) / 2, 0, 1))


def _lift(physics: Physics) -> float:
    return float((1 + physics.pole_vertical()) / 2)


_CORRECTED: dict[tuple[str, str], Callable[[Physics], float]] = {
    ("cheetah", "runbackward"): partial(_backward, speed=10),
    ("cheetah", "flip"): partial(_flip, direction=1),
    ("cheetah", "flipbackward"): partial(_flip, direction=-1),
    ("walker", "walkbackward"): partial(_walker_backward, speed=1),
    ("walker", "runbackward"): partial(_walker_backward, speed=8),
    ("walker", "flip"): partial(_flip, direction=1),
    ("walker", "flipbackward"): partial(_flip, direction=-1),
    ("walker", "jump"): _jump,
}
_GUIDING: dict[tuple[str, str], Callable[[Physics], float]] = {
    ("finger", "push"): _push,
    ("hopper", "rise"): _rise,
    ("pendulum", "lift"): _lift,
}
_CUSTOM = {
    **{key: StepReward(each=reward) for key, reward in (_CORRECTED | _GUIDING).items()},
    **{(body, f"{task}-v1"): StepReward(last=reward) for (body, task), reward in _CORRECTED.items()},
    ("walker", "walkbackward-v1"): StepReward(_walker_stand, partial(_backward_v1, speed=1)),
    ("walker", "runbackward-v1"): StepReward(_walker_stand, partial(_backward_v1, speed=8)),
}
