"""What acts by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np


@dataclass
class RandomPolicy:
    """Uniform actions, a stream of its own for each episode: the same in every world and batch size."""

    space: gym.spaces.Box
    generators: list[np.random.Generator] = field(default_factory=list)

    def begin(self, seeds: Sequence[int]) -> None:
        """Starts one stream a slot."""
        self.generators = [np.random.default_rng([seed, 1]) for seed in seeds]

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Returns uniform actions [B, A], whatever is seen, with the signature of SB3's agents."""
        low, high = self.space.low, self.space.high
        return np.stack([rng.uniform(low, high) for rng in self.generators]).astype(self.space.dtype), None
