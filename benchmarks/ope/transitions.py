"""Logged data as transitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aime_gym.bodies.body import Sensor
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.errors import AimeGymError
from aime_gym.observations import to_state

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Transitions:
    """N steps of episodes that end by their length alone.

    Attributes:
        states: [N, D]
        actions: [N, A]
        rewards: [N]
        next_states: [N, D]
        returns: [episodes], sums of rewards.
    """

    states: Array
    actions: Array
    rewards: Array
    next_states: Array
    returns: Array

    def __len__(self) -> int:
        return len(self.rewards)

    @cached_property
    def inputs(self) -> Array:
        """States and actions beside each other, standardised: [N, D + A]."""
        return self.standardise(self.states, self.actions)

    @cached_property
    def _moments(self) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        return moments(self.states), moments(self.actions)

    def standardise(self, states: Array, actions: Array) -> Array:
        """States [..., D] and actions [..., A] by the mean and standard deviation of the data: [..., D + A]."""
        (mean, std), (action_mean, action_std) = self._moments
        return np.concatenate([(states - mean) / std, (actions - action_mean) / action_std], axis=-1)


def moments(array: Array) -> tuple[Array, Array]:
    """Mean and standard deviation over the first axis; 1 where nothing varies."""
    std = array.std(axis=0)
    return array.mean(axis=0), np.where(std > 1e-6, std, 1).astype(np.float32)


def read_transitions(folders: Sequence[Path], sensors: Sequence[Sensor]) -> Transitions:
    """Reads the trajectories of several folders.

    Args:
        folders: Folders that `aime-gym collect` wrote; their own rewards count.
        sensors: The sensors that make a state, in order.

    Raises:
        AimeGymError: If an episode ends in a terminal state, for which these estimators have no place.
    """
    dataset = TrajectoryDataset(list(folders), ("pre_action", "reward", *(sensor.name for sensor in sensors)))
    episodes = [dataset[index] for index in range(len(dataset))]
    if any("is_terminal" in episode and episode["is_terminal"].any() for episode in episodes):
        raise AimeGymError("Expected episodes that end by their length alone; some of these end in a terminal state.")
    states = [to_state(sensors, episode) for episode in episodes]
    rewards = [episode["reward"][1:].reshape(-1) for episode in episodes]
    return Transitions(
        np.concatenate([state[:-1] for state in states]),
        np.concatenate([episode["pre_action"][1:] for episode in episodes]),
        np.concatenate(rewards),
        np.concatenate([state[1:] for state in states]),
        np.array([reward.sum() for reward in rewards], np.float32),
    )
