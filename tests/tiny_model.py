"""A tiny untrained world model of any body with real starts: everything about it is real but its knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.collect import RecordTrajectories
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.training.model_folder import make_starts
from aime_gym.world_model.checkpoint import save_model
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel


def make_tiny_model(folder: Path, embodiment: str = "walker", seed: int = 0) -> Path:
    """Writes the model's folder and returns it."""
    body = get_embodiment(embodiment)
    trajectories: list[dict[str, np.ndarray]] = []
    world = gym.make("AimeReal-v0", embodiment=body.name, episode_steps=30)
    env = RecordTrajectories(world, trajectories.append)
    env.action_space.seed(seed)
    for episode in range(6):
        env.reset(seed=seed + episode)
        while len(trajectories) == episode:
            env.step(env.action_space.sample())
    physics: Any = None if body.foreign else env.unwrapped._dm_env.physics.model  # type: ignore[attr-defined]
    env.close()
    data = TrajectoryDataset(trajectories)

    net = NetConfig("mlp", hidden_size=32, hidden_layers=1)
    config = ModelConfig(
        embodiment=body.name,
        setup="mdp",
        sensors=body.sensors,
        has_image=False,
        action_dim=body.action_dim,
        choices=body.choices,
        action_repeat=body.action_repeat,
        cell="rssmo",
        memory_dim=24,
        stochastic_dim=8,
        hidden_size=32,
        hidden_layers=1,
        norm="ln",
        min_std=0.1,
        encoders={"tabular": net},
        decoders={"tabular": NetConfig("dmlp", hidden_size=32, hidden_layers=1)},
        probes={},
        standardise=True,
    )
    torch.manual_seed(seed)
    model = WorldModel(config)
    mean, std = data.statistics([sensor.name for sensor in body.sensors], config.codes)
    model.set_standardisation(
        {name: torch.as_tensor(value) for name, value in mean.items()},
        {name: torch.as_tensor(value) for name, value in std.items()},
    )
    model.heads = Heads(
        config.feature_dim,
        body.action_dim,
        body.tasks,
        body.name,
        sum(config.codes[sensor.name].size for sensor in body.sensors),
        physics.nq if physics else 0,
        physics.nv if physics else 0,
        hidden_size=32,
    )
    save_model(model, folder)
    np.savez(folder / "starts.npz", **make_starts(data, model.observed, n_reset=6, n_dataset=6))  # type: ignore[arg-type]
    return folder
