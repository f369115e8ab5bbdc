"""Real episodes of many policies, kept frame by frame: what dreams are held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aime_gym.evaluation.returns import PolicyLike, Recording, episode_returns
from aime_gym.evaluation.worlds import REAL_SLOTS, Worlds

FIRST_SEED = 2_000_000
"""Of the episodes that are watched, far from those of comparisons and of training."""


@dataclass(frozen=True)
class Watched:
    """The real episodes of one policy.

    Attributes:
        name: Of the policy.
        policy: What acted.
        seeds: [E], one an episode: of its reset and of a policy's own noise.
        starts: [E] indices into the model's bank of starts, where the physics of episodes begin if it is known.
        recordings: [E]
    """

    name: str
    policy: PolicyLike
    seeds: tuple[int, ...]
    starts: NDArray[np.int64]
    recordings: tuple[Recording, ...]


def watch(
    policies: Mapping[str, PolicyLike], worlds: Worlds, episodes: int, seed: int = 0, deterministic: bool = True
) -> Iterable[Watched]:
    """Runs real episodes of each policy in turn, with the same starts and seeds for all.

    Args:
        policies: By name.
        worlds: Where; its obs_type is ``"state"`` or ``"latent"``.
        episodes: E of each.
        seed: Of the starts and the episodes.
        deterministic: Whether policies give their mode.

    Yields:
        The episodes of each policy.
    """
    envs = worlds.real_envs(min(episodes, REAL_SLOTS))
    starts = worlds.draw_starts(episodes, FIRST_SEED + seed)
    seeds = tuple(FIRST_SEED + seed + i for i in range(episodes))
    try:
        for name, policy in policies.items():
            ran = episode_returns(policy, envs, None, seeds, worlds.real_starts(starts), deterministic, record=True)
            yield Watched(name, policy, seeds, starts, ran.recordings)
    finally:
        envs.close()
