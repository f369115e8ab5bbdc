"""Recorded real episodes as a model sees them: the latents of their frames, and dreams that begin at one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.agents.standardised import sensor_statistics
from aime_gym.envs.dream_vector import DreamVectorEnv
from aime_gym.envs.spaces import to_sensors
from aime_gym.evaluation.worlds import Worlds
from aime_gym.scales import scale

BURN_IN = 10
"""Real frames that a dream is shown before it goes on alone, as where models are scored."""


@torch.inference_mode()
def compared(worlds: Worlds, observations: NDArray) -> NDArray:
    """What errors are of: sensors [..., D] of what policies see, ``"state"`` or ``"latent"``.

    Latents [..., F] are read as the sensors that the model decodes or probes; where it knows none, as their memory,
    since the rest of them is sampled.
    """
    if worlds.obs_type != "latent":
        return observations
    model, features = worlds.model, torch.as_tensor(observations, dtype=torch.float32)
    if not (names := read_sensors(worlds)):
        return features[..., : model.config.memory_dim].numpy()
    decoded = model.decode(features, names)
    return torch.cat([decoded[name] for name in names], -1).numpy()


def read_sensors(worlds: Worlds) -> list[str]:
    """Names of the tabular sensors that a model decodes or probes."""
    known = {*worlds.model.observed, *worlds.model.probed}
    return [sensor.name for sensor in worlds.model.config.sensors if sensor.name in known]


def observation_scale(worlds: Worlds) -> NDArray[np.float32]:
    """The standard deviation of what `compared` gives, by which errors are divided: [D].

    That of a ``"state"`` is of the model's training data where the model keeps it; else that of its bank of starts.
    """
    if worlds.obs_type == "latent":
        starts = compared(worlds, worlds.start_features.cpu().numpy())
        return scale(starts.mean(0), starts.std(0))
    return np.concatenate([std for _, std in sensor_statistics(worlds.model).values()])


@torch.inference_mode()
def filter_episode(worlds: Worlds, observations: NDArray, actions: NDArray[np.float32]) -> Tensor:
    """The latents of an episode's frames, by posterior means.

    Args:
        worlds: Of the model, with obs_type ``"state"`` or ``"latent"``.
        observations: [L, D]; latents, which are estimates already, stay.
        actions: [L, A], each taken at the frame of the same row.

    Returns:
        [L, F] float32.
    """
    if worlds.obs_type == "latent":
        return torch.as_tensor(observations)
    sensors = to_sensors(worlds.embodiment.observed(worlds.setup), observations)
    frames = {name: torch.as_tensor(values)[:, None] for name, values in sensors.items()}  # [L, 1, D]
    before = np.concatenate([np.zeros_like(actions[:1]), actions[:-1]])  # those that led to the frames
    return worlds.model.observe(frames, torch.as_tensor(before)[:, None], sample=False)[0][:, 0]


def begin_dreams(
    dreams: VectorEnv, observations: NDArray, actions: NDArray[np.float32], seeds: Sequence[int]
) -> NDArray:
    """Begins a dream in every slot where its real frames end.

    Args:
        dreams: N slots, with obs_type ``"state"`` or ``"latent"``.
        observations: [K, N, D]; of latents the last one is where the dream begins, as it has seen the others.
        actions: Those that led to the frames, [K, N, A].
        seeds: One a slot.

    Returns:
        What the dreams show first, [N, D]: the last frame as the model decodes it.
    """
    dream = cast(DreamVectorEnv, dreams.unwrapped)
    start: dict[str, Any] = {"start": {"observations": observations, "actions": actions}}
    if dream.obs_type != "latent":
        return cast(np.ndarray, dreams.reset(seed=list(seeds), options=start)[0])  # type: ignore[arg-type]  # Gymnasium takes lists
    dreams.reset(seed=list(seeds))  # type: ignore[arg-type]
    latents = torch.from_numpy(observations[-1].copy())
    dream.set_state(dream.get_state() | {"latents": latents, "observations": latents})
    return observations[-1].copy()
