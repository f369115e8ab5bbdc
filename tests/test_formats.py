"""The promise of docs/formats.md: model folders and data sets of every version since 0.1 load, and mean the same.

`tests/formats/0.1` was written by version 0.1: `aime-gym collect pendulum --trajectories 2`, and `aime-gym train`
with 8 + 4 latents and three updates, and in expected.npz what that version's model made of the first trajectory. A new
version adds a folder of its own; none is ever written anew.
"""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import aime_gym
from aime_gym.data.trajectories import load_trajectory, trajectory_paths

VERSIONS = sorted((Path(__file__).parent / "formats").iterdir())


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def written(request) -> Path:
    return request.param


def test_a_model_predicts_what_it_predicted(written):
    model = aime_gym.load_pretrained_model(written / "model")
    rows, expected = load_trajectory(trajectory_paths(written / "data")[0]), np.load(written / "expected.npz")
    frames = {name: torch.from_numpy(rows[name][:20, None]).float() for name in model.observed}
    actions = torch.from_numpy(rows["pre_action"][:, None])
    with torch.no_grad():
        features, _ = model.observe(frames, actions[:20], sample=False)
        future = model.imagine(features[-1], actions[20:30], sample=False)
    np.testing.assert_allclose(features[:, 0], expected["features"], atol=1e-5)
    for name, shown in future.observations.items():
        np.testing.assert_allclose(shown[:, 0], expected[f"future_{name}"], atol=1e-5)


def test_a_model_dreams_and_is_paid_by_its_heads(written):
    dream = gym.make("AimeDream-v0", model=written / "model", reward="head", start="dataset", doubt=True)
    dream.reset(seed=0)
    observation, reward, _, _, info = dream.step(dream.action_space.sample())
    assert dream.observation_space.contains(observation)
    assert np.isfinite([reward, info["doubt"]]).all()


def test_a_model_is_trained_on_with_its_data(written, tmp_path):
    sizes = {"memory_dim": 8, "stochastic_dim": 4, "hidden_size": 8, "encoder_size": 8, "decoder_size": 8}
    run = aime_gym.Train(
        (written / "data",),
        out=tmp_path / "model",
        pretrained=str(written / "model"),
        updates=1,
        batch_size=2,
        horizon=16,
        tensorboard=False,
        heads=aime_gym.HeadsOptions(updates=0),
        **sizes,
    )
    run.run()
    assert aime_gym.load_pretrained_model(tmp_path / "model").config.embodiment == "pendulum"
