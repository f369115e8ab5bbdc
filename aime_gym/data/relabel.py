"""Rewards of other tasks for stored trajectories: replay the actions from the stored physics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from aime_gym import tasks as task_rewards
from aime_gym.data.trajectories import Trajectory
from aime_gym.embodiments import Embodiment, get_embodiment
from aime_gym.errors import AimeGymError

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
