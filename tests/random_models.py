"""Small world models with random weights, heads and starts: everything a dream needs but the training."""

from pathlib import Path

import numpy as np
import torch

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel

FRAMES, RESETS, STARTS = 4, 5, 12


CELLS = [
    ("rssmo", {}),
    ("rssm", {"decoders": {"tabular": NetConfig("smlp", 16, 2)}, "standardise": False}),
    ("rssm", {"decoders": {"tabular": NetConfig("ssmlp", 16, 1, "leakyrelu")}, "hidden_layers": 0}),
    ("rssmo", {"setup": "lpomdp", "norm": None, "hidden_size": 24}),
]
"""Cells and options of models that differ in all that a step is made of."""


def random_config(cell: str = "rssmo", setup: str = "mdp", **overrides) -> ModelConfig:
    """A walker model of 16 + 4 latents."""
    net = NetConfig("dmlp", 16, 2, "swish", "ln")
    encoder = NetConfig("identity") if cell == "rssm" else NetConfig("mlp", 16, 2, "swish", "ln", have_head=False)
    sizes = {"memory_dim": 16, "stochastic_dim": 4, "hidden_size": 16, "standardise": True}
    nets = {
        "encoders": {"tabular": encoder, "visual": NetConfig("cnn_ha", width=4)},
        "decoders": {"tabular": net, "visual": NetConfig("cnn_ha", width=4)},
        "probes": {"tabular": net} if setup != "mdp" else {},
    }
    return ModelConfig.for_embodiment(get_embodiment("walker"), setup, cell, **(sizes | nets | overrides))  # type: ignore[arg-type]


def random_model(cell: str = "rssmo", setup: str = "mdp", heads: bool = True, seed: int = 0, **overrides) -> WorldModel:
    """That model with random weights and, if asked for, random heads for walk and run."""
    body = get_embodiment("walker")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WorldModel(random_config(cell, setup, **overrides))
        if model.config.standardise:
            model.set_standardisation(
                {sensor.name: torch.randn(sensor.dim) for sensor in body.sensors},
                {sensor.name: torch.rand(sensor.dim) + 0.5 for sensor in body.sensors},
            )
        if heads:
            dim = sum(sensor.dim for sensor in body.sensors)
            model.heads = Heads(model.config.feature_dim, 6, ("walk", "run"), "walker", dim, 9, 9, hidden_size=16)
            model.heads.reward_mean.uniform_(0.5, 1.0)
            model.heads.reward_std.fill_(0.2)
    return model.eval().requires_grad_(False)


def write_random_model(folder: Path, starts: bool = True, **options) -> WorldModel:
    """Saves that model with random frames to start from, and loads it."""
    model = random_model(**options)
    save_model(model, folder)
    if starts:
        rng = np.random.default_rng(0)
        bank = {
            s.name: rng.normal(size=(FRAMES, STARTS, s.dim)).astype(np.float32)
            for s in model.config.sensors
            if s.name in model.observed
        }
        if "image" in model.observed:
            bank["image"] = rng.integers(0, 256, (FRAMES, STARTS, 64, 64, 3), np.uint8)
        bank["pre_action"] = rng.uniform(-1, 1, (FRAMES, STARTS, 6)).astype(np.float32)
        bank["physics"] = rng.normal(size=(STARTS, 18)) * 0.1
        bank["is_reset"] = np.arange(STARTS) < RESETS
        np.savez(folder / "starts.npz", **bank)
    return load_pretrained_model(folder)
