"""The evidence of a real env's observations, step by step."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

import aime_gym
from aime_gym.envs.wrappers import SETTLING, calibrate
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_pretrained_model
from tests.random_models import write_random_model


@pytest.fixture(scope="module")
def model():
    return load_pretrained_model("walker-state")


def run(env, steps: int = 30):
    """Observations, actions that led to them and infos of a random episode."""
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=3)
    rows = [(observation, np.zeros(6, np.float32), info)]
    for _ in range(steps):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        observation, _, _, _, info = env.step(action)
        rows.append((observation, action, info))
    return rows


def test_the_steps_add_up_to_the_evidence_of_the_episode(model):
    rows = run(aime_gym.Evidence(gymnasium.make("AimeReal-Walker-v0", obs_type="dict"), model))
    frames = {name: torch.tensor(np.stack([row[0][name] for row in rows]))[:, None] for name in model.observed}
    actions = torch.tensor(np.stack([row[1] for row in rows]))[:, None]
    expected = model.evidence(frames, actions, sample=False).per_step[:, 0]
    np.testing.assert_allclose([row[2]["evidence"] for row in rows], expected.numpy(), rtol=1e-4, atol=1e-3)


def test_the_world_it_knows_is_explained_and_a_broken_sensor_is_not(model):
    class Broken(gymnasium.ObservationWrapper):
        def observation(self, observation):
            return np.concatenate([observation[:14], observation[14:15] + 2.0, observation[15:]])

    flagged = {}
    for name, wrapped in (("whole", lambda env: env), ("broken", Broken)):
        env = aime_gym.Evidence(wrapped(gymnasium.make("AimeReal-Walker-v0")), model)
        flags = [info["unexplained"] for _, _, info in run(env, 60)]
        assert not any(flags[:SETTLING])
        flagged[name] = np.mean(flags)
    assert flagged["whole"] < 0.1
    assert flagged["broken"] > 0.5


def test_copies_of_a_first_frame_do_not_count_in_the_threshold(tmp_path):
    model = write_random_model(tmp_path, setup="mdp")
    path = tmp_path / "starts.npz"
    starts = dict(np.load(path))
    starts = {  # longer than the frames that settle the estimate
        name: rows if name in ("physics", "is_reset") else np.concatenate([rows, rows]) for name, rows in starts.items()
    }
    np.savez(path, **starts)  # type: ignore[arg-type]
    expected = calibrate(model)
    held = {
        name: rows if name in ("physics", "is_reset") else np.repeat(50 * rows[:1], len(rows), 0)
        for name, rows in starts.items()
    }
    held["pre_action"] = np.zeros_like(held["pre_action"])
    both = {name: np.concatenate([starts[name], held[name]], int(held[name].ndim > 2)) for name in starts}
    np.savez(path, **both)  # type: ignore[arg-type]
    assert calibrate(model) == pytest.approx(expected)


def test_the_threshold_can_be_given(model):
    env = aime_gym.Evidence(gymnasium.make("AimeReal-Walker-v0"), model, threshold=1e9)
    assert all(info["unexplained"] for _, _, info in run(env, 10)[SETTLING:])
    assert np.isfinite(calibrate(model))


def test_another_body_is_refused(model):
    with pytest.raises(AimeGymError, match="needs actions of shape"):
        aime_gym.Evidence(gymnasium.make("AimeReal-Pendulum-v0"), model)
    with pytest.raises(AimeGymError, match="the env shows"):
        aime_gym.Evidence(gymnasium.make("AimeReal-Walker-v0", setup="lpomdp"), model)


def test_a_model_of_too_few_frames_asks_for_a_threshold(tmp_path):
    few = write_random_model(tmp_path / "few")
    with pytest.raises(AimeGymError, match=r"4 frames in a row.*threshold="):
        aime_gym.Evidence(gymnasium.make("AimeReal-Walker-v0"), few)
