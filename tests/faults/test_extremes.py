"""Many dreams under the actions that no agent would take: all stays finite, and memory does not grow."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import psutil
import pytest

import aime_gym  # noqa: F401 - registers the ids

pytestmark = pytest.mark.slow

SLOTS, STEPS = 20_000, 50


def test_a_million_steps_of_extreme_actions_are_finite_and_flat_in_memory():
    envs = gym.make_vec(
        "AimeDream-Pendulum-v0", num_envs=SLOTS, doubt=True, max_episode_steps=20, autoreset_mode="SameStep"
    )
    envs.reset(seed=0)
    rng, process, used = np.random.default_rng(0), psutil.Process(), []
    corners = envs.single_action_space.low, envs.single_action_space.high
    for _ in range(STEPS):  # bang-bang, each entry at random: 20,000 slots of 50 steps are a million
        actions = np.where(rng.random(envs.action_space.shape) < 0.5, *corners).astype(np.float32)
        observations, rewards, *_, infos = envs.step(actions)
        assert np.isfinite(observations).all()
        assert np.isfinite(rewards).all()
        assert np.isfinite(infos["doubt"]).all()
        assert "diverged" not in infos
        used.append(process.memory_info().rss / 1e6)
    print(f"{used[-1]:.0f} MB, {used[-1] - used[24]:+.0f} MB in the last half")
    assert used[-1] - used[24] < 100  # a step's arrays are some tens of megabytes, and come and go
