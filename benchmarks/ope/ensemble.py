"""An ensemble of networks on states, rolled out for whole episodes.

Each member predicts a Gaussian over the change of the state and the reward (PETS, Chua et al., 2018; MBPO, Janner et
al., 2019), learns from a resampling of the transitions of its own, and dreams its own episodes (TS-infinity). As whole
episodes are longer than what such models are made for, their states and rewards are kept within the box of the data's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ope.acting import Policy, act
from benchmarks.ope.stacked_mlp import StackedMLP
from benchmarks.ope.transitions import Array, Transitions, moments

_LOG_VARIANCE = (-12.0, 1.0)
"""Soft bounds, where the change of every value has a variance of 1."""


def estimate(
    data: Transitions,
    policies: Sequence[Policy],
    starts: Array,
    horizon: int,
    seed: int = 0,
    members: int = 5,
    hidden: int = 200,
    updates: int = 4000,
    batch_size: int = 256,
    lr: float = 1e-3,
) -> NDArray[np.float64]:
    """Returns [P, E] of P policies from E starts, means over members.

    Args:
        data: Transitions of any policies.
        policies: To be evaluated.
        starts: [E, D]
        horizon: Steps of an episode.
        seed: Seed of weights, batches and all noise.
        members: Networks.
        hidden: Units of each of three hidden layers.
        updates: Updates, each of all members at once.
        batch_size: Transitions a member and update.
        lr: Adam's learning rate at the beginning; it falls to zero by a cosine.
    """
    ensemble = Ensemble(data, members, hidden, seed)
    ensemble.fit(data, updates, batch_size, lr)
    return ensemble.returns(policies, starts, horizon)


@dataclass
class Ensemble:
    """Networks from standardised states and actions to the standardised change of the state and the reward.

    Args:
        data: Its moments and bounds are kept.
        members: G
        hidden: Units of a hidden layer.
        seed: Seed of everything random.
    """

    data: Transitions
    members: int
    hidden: int
    seed: int

    def __post_init__(self) -> None:
        changes = self.data.next_states - self.data.states
        self._targets = np.concatenate([changes, self.data.rewards[:, None]], axis=1)
        self._mean, self._std = moments(self._targets)
        states = np.concatenate([self.data.states, self.data.next_states])
        self._low, self._high = states.min(axis=0), states.max(axis=0)
        self._rng = np.random.default_rng(self.seed)
        self._generator = torch.Generator().manual_seed(self.seed)
        sizes = (self.data.inputs.shape[1], *[self.hidden] * 3, 2 * self._targets.shape[1])
        self.network = StackedMLP(self.members, sizes, self._generator)

    def fit(self, data: Transitions, updates: int, batch_size: int, lr: float) -> None:
        """Maximises the likelihood of the transitions."""
        inputs = torch.from_numpy(data.inputs)
        targets = torch.from_numpy((self._targets - self._mean) / self._std)
        own = self._rng.integers(len(data), size=(self.members, len(data)))
        optimizer = torch.optim.Adam(self.network.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            rows = np.take_along_axis(own, self._rng.integers(len(data), size=(self.members, batch_size)), axis=1)
            mean, log_variance = self._predict(inputs[rows])
            errors = (targets[rows] - mean).square() * torch.exp(-log_variance) + log_variance
            optimizer.zero_grad()
            errors.mean((1, 2)).sum().backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def returns(self, policies: Sequence[Policy], starts: Array, horizon: int) -> NDArray[np.float64]:
        """Returns [P, E] of whole episodes under each policy, one in each member."""
        count, begun, dim = len(policies), len(starts), starts.shape[1]
        low, high = float(self.data.rewards.min()), float(self.data.rewards.max())
        states = np.tile(starts.astype(np.float32), (count, self.members, 1))  # [P, G E, D]
        earned = np.zeros((count, self.members * begun))
        for step in range(horizon):
            inputs = self.data.standardise(states, act(policies, states, step, self._rng))
            mean, log_variance = self._predict(_by_member(torch.from_numpy(inputs), self.members))
            noise = torch.randn(mean.shape, generator=self._generator)
            sampled = _by_policy(mean + noise * torch.exp(log_variance / 2), count).numpy() * self._std + self._mean
            states = np.clip(states + sampled[..., :dim], self._low, self._high)
            earned += np.clip(sampled[..., dim], low, high)
        return earned.reshape(count, self.members, begun).mean(1)

    def _predict(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of variances, [G, B, D + 1] each, for inputs [G, B, D + A]."""
        mean, log_variance = self.network(inputs).chunk(2, dim=-1)
        low, high = _LOG_VARIANCE
        log_variance = high - F.softplus(high - log_variance)
        return mean, low + F.softplus(log_variance - low)


def _by_member(rows: Tensor, members: int) -> Tensor:
    """[P, G E, X] as [G, P E, X]."""
    return rows.unflatten(1, (members, -1)).transpose(0, 1).flatten(1, 2)


def _by_policy(rows: Tensor, policies: int) -> Tensor:
    """[G, P E, X] as [P, G E, X]."""
    return rows.unflatten(1, (policies, -1)).transpose(0, 1).flatten(1, 2)
