"""Model-free Monte Carlo (Fonteneau, Murphy, Wehenkel and Ernst, 2010): episodes put together from logged transitions.

In each step the transition whose state and action lie nearest to those of the policy gives the reward and the next
state; each is used once for a policy. Distances are Euclidean, states and actions standardised by the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from aime_gym.errors import AimeGymError
from benchmarks.ope.acting import Policy, act
from benchmarks.ope.transitions import Array, Transitions


def estimate(
    data: Transitions, policies: Sequence[Policy], starts: Array, horizon: int, seed: int = 0
) -> NDArray[np.float64]:
    """Returns [P, E] of P policies from E starts.

    Args:
        data: Transitions of any policies.
        policies: To be evaluated.
        starts: [E, D]
        horizon: Steps of an episode.
        seed: Seed of the policies' noise.

    Raises:
        AimeGymError: If there are fewer transitions than steps.
    """
    count, needed = len(policies), len(starts) * horizon
    if needed > len(data):
        raise AimeGymError(f"{len(starts)} episodes of {horizon} steps need {needed} transitions; got {len(data)}.")
    rng = np.random.default_rng(seed)
    logged = torch.from_numpy(data.inputs)
    columns = logged.T.contiguous()
    offsets = logged.square().sum(1).repeat(count, 1)  # [P, N]; infinite where a transition has been used
    each, earned = np.arange(count), np.zeros((count, len(starts)))
    for index, start in enumerate(starts.astype(np.float32)):
        states = np.tile(start, (count, 1, 1))  # [P, 1, D]
        for step in range(horizon):
            inputs = data.standardise(states, act(policies, states, step, rng))[:, 0]
            chosen = torch.addmm(offsets, torch.from_numpy(inputs), columns, alpha=-2).argmin(1).numpy()
            offsets[each, chosen] = torch.inf
            earned[:, index] += data.rewards[chosen]
            states = data.next_states[chosen][:, None]
    return earned
