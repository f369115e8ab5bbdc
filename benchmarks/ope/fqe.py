"""Fitted Q evaluation (Le, Voloshin and Yue, 2019; for policy selection Paine et al., 2020), a network a policy.

Undiscounted and over a finite horizon, so that it estimates the return that is asked for: iteration k fits the value
with k steps to go,

    Q_k(s, a) = r + Q_{k-1}(s', pi(s', horizon - k + 1)),    Q_0 = 0,

by a few updates from the weights of iteration k - 1, whose frozen copy is the target network; iteration `horizon` is
the return. Networks give Q_k / k, the mean reward of the steps to go, which hardly moves from one iteration to the
next, and targets are kept within the rewards of the data. Policies that go by the clock are no special case.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ope.acting import NextActions, Policy, act
from benchmarks.ope.stacked_mlp import StackedMLP
from benchmarks.ope.transitions import Array, Transitions


def estimate(
    data: Transitions,
    policies: Sequence[Policy],
    starts: Array,
    horizon: int,
    seed: int = 0,
    hidden: int = 64,
    first_updates: int = 500,
    updates: int = 6000,
    batch_size: int = 256,
    lr: float = 5e-4,
) -> NDArray[np.float64]:
    """Returns [P, E] of P policies from E starts.

    Args:
        data: Transitions of any policies.
        policies: To be evaluated.
        starts: [E, D]
        horizon: Steps of an episode.
        seed: Seed of weights, batches and the policies' noise.
        hidden: Units of each of two hidden layers.
        first_updates: For one step to go.
        updates: For all other iterations together, at least one each.
        batch_size: Transitions an update, the same for every policy.
        lr: Adam's learning rate.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    inputs, rewards = torch.from_numpy(data.inputs), torch.from_numpy(data.rewards)
    scale = float(rewards.std().clamp(min=1e-6))
    low, high = float(rewards.min()) / scale, float(rewards.max()) / scale
    upcoming = NextActions(policies, data.next_states)
    network = StackedMLP(len(policies), (inputs.shape[1], hidden, hidden, 1), generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    target = copy.deepcopy(network)
    each = max(1, round(updates / max(1, horizon - 1)))
    for to_go in range(1, horizon + 1):
        target.load_state_dict(network.state_dict())
        for _ in range(first_updates if to_go == 1 else each):
            rows = rng.integers(len(data), size=batch_size)
            wanted = (rewards[rows] / scale).expand(len(policies), -1)
            if to_go > 1:
                actions = upcoming.draw(rows, horizon - to_go + 1, rng)
                states = np.broadcast_to(data.next_states[rows], (*actions.shape[:2], starts.shape[1]))
                with torch.no_grad():
                    rest = target(torch.from_numpy(data.standardise(states, actions)))[..., 0]
                wanted = ((wanted + (to_go - 1) * rest) / to_go).clamp(low, high)
            found = network(inputs[rows].expand(len(policies), -1, -1))[..., 0]
            optimizer.zero_grad()
            (found - wanted).square().mean(1).sum().backward()
            optimizer.step()
    draws = 16  # of noise
    states = np.broadcast_to(starts.astype(np.float32), (len(policies), draws, *starts.shape))
    states = states.reshape(len(policies), -1, starts.shape[1])
    actions = act(policies, states, 0, rng)
    with torch.no_grad():
        means = network(torch.from_numpy(data.standardise(states, actions)))[..., 0].clamp(low, high)
    return horizon * scale * means.reshape(len(policies), draws, -1).mean(1).double().numpy()
