"""Plain policies off their path: what they do in any state at any step of an episode."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, PlainPolicy, Rhythm

Array = NDArray[np.float32]
Policy = PlainPolicy | NoisyPolicy


def noise_of(policy: Policy) -> float:
    """Standard deviation of the noise on a policy's actions."""
    return policy.noise if isinstance(policy, NoisyPolicy) else 0.0


def mode(policy: Policy, states: Array, step: int) -> Array:
    """A policy's actions [B, A] without its noise, in states [B, D], each at this step of its episode."""
    plain = policy.policy if isinstance(policy, NoisyPolicy) else policy
    return plain.predict(states, np.full(len(states), step) if isinstance(plain, Rhythm) else None)[0]


def act(policies: Sequence[Policy], states: Array, step: int, rng: np.random.Generator) -> Array:
    """Actions [P, B, A] of each policy in its own states [P, B, D], noise included."""
    modes = np.stack([mode(policy, rows, step) for policy, rows in zip(policies, states, strict=True)])
    return with_noise(modes, policies, rng)


def with_noise(modes: Array, policies: Sequence[Policy], rng: np.random.Generator) -> Array:
    """Actions [P, B, A] with each policy's noise, within [-1, 1]."""
    noise = np.array([noise_of(policy) for policy in policies], np.float32)[:, None, None]
    return np.clip(modes + noise * rng.standard_normal(modes.shape, np.float32), -1, 1)


class NextActions:
    """Actions of all policies in the next states of transitions, without computing the same network twice.

    Args:
        policies: P of them.
        states: [N, D]
    """

    def __init__(self, policies: Sequence[Policy], states: Array):
        self._policies = policies
        plain = [policy.policy if isinstance(policy, NoisyPolicy) else policy for policy in policies]
        self._looking = [isinstance(policy, PlainMLP) for policy in plain]
        modes = [mode(policy, states if looks else states[:1], 0) for policy, looks in self._rows()]
        shape = (len(states), modes[0].shape[-1])
        self._modes = np.stack([np.broadcast_to(rows, shape) for rows in modes])

    def draw(self, rows: NDArray[np.int64], step: int, rng: np.random.Generator) -> Array:
        """Actions [P, B, A] in the states of these rows [B], if it is this step of the episode."""
        modes = self._modes[:, rows]
        for index, (policy, looks) in enumerate(self._rows()):
            if not looks:  # blind: its action is one of the clock
                modes[index] = mode(policy, np.zeros((1, 1), np.float32), step)
        return with_noise(modes, self._policies, rng)

    def _rows(self) -> list[tuple[Policy, bool]]:
        return list(zip(self._policies, self._looking, strict=True))
