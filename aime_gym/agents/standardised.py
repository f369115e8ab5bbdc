"""Observations in units that networks like: a features extractor that travels inside a saved SB3 agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from aime_gym.agents.shac import dream_of
from aime_gym.scales import scale

LIMIT = 10.0
"""Standardised values are clipped here, so that no outlier of one sensor drowns the others."""
_LEAST_STD = 0.02
"""Of a latent: those that hardly vary in the few real frames of a model's starts are not blown up."""


class Statistics(NamedTuple):
    """Mean and standard deviation of observations, [D] each."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]


class StandardisedObservation(BaseFeaturesExtractor):
    """Subtracts a mean from ``"state"`` or ``"latent"`` and divides by a standard deviation, both fixed.

    Unlike `VecNormalize` there is nothing beside the agent to save and nothing that changes during training.

    Args:
        observation_space: A Box of shape [D].
        mean: [D]
        std: [D]
    """

    def __init__(self, observation_space: spaces.Box, mean: Sequence[float], std: Sequence[float]):
        super().__init__(observation_space, features_dim=int(np.prod(observation_space.shape)))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, observations: Tensor) -> Tensor:
        """Standardises [B, D]."""
        return ((observations - self.mean) / self.std).clamp(-LIMIT, LIMIT)


def observation_statistics(envs: VecEnv) -> Statistics:
    """Those of what SB3's dreams show, ``"state"`` or ``"latent"``; raises as `dream_of` if they are others."""
    dream = dream_of(envs)
    if dream.obs_type == "latent":
        features = dream.start_features.cpu().numpy()  # [M, F]
        return Statistics(features.mean(0), np.maximum(features.std(0), _LEAST_STD))
    sensors = sensor_statistics(dream.model).values()
    return Statistics(*(np.concatenate(moments) for moments in zip(*sensors, strict=True)))


def sensor_statistics(model: Any) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Mean and standard deviation [D] of every observed sensor, constants as of `scale`.

    They are those of the model's training data where the model keeps them (`config.standardise`), else those of
    the last frames of its `starts.npz`.

    Args:
        model: A `WorldModel`.
    """
    from aime_gym.world_model.checkpoint import load_starts

    names = [sensor.name for sensor in model.config.sensors if sensor.name in model.config.observed]
    if model.config.standardise:
        buffers = dict(model.named_buffers())
        moments = {
            name: tuple(buffers[f"normaliser.{name}.{kind}"].cpu().numpy() for kind in ("mean", "std"))
            for name in names
        }
    else:
        frames = load_starts(model)  # of which the last are no copies of the ones before
        moments = {name: (frames[name][-1].mean(axis=0), frames[name][-1].std(axis=0)) for name in names}
    return {name: (mean, scale(mean, std)) for name, (mean, std) in moments.items()}
