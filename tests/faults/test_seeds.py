"""What a seed fixes, whatever the processes, the threads and the number of envs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

import aime_gym  # noqa: F401 - registers the ids

pytestmark = pytest.mark.slow

STEPS = 20
PROBE = """
import json, sys
from tests.faults.test_seeds import dreams
print(json.dumps(dreams(int(sys.argv[1]), precision="32-true").tolist()))
"""


def dreams(num_envs: int, **options: object) -> np.ndarray:
    """What the first three slots see and earn, `[STEPS, 3, D + 1]`, whatever happens in the others."""
    envs = gym.make_vec("AimeDream-Walker-v0", num_envs=num_envs, task="walk", max_episode_steps=8, **options)
    rng, told = np.random.default_rng(0), []
    envs.reset(seed=7)
    for _ in range(STEPS):
        actions = np.zeros((num_envs, 6), np.float32)
        actions[:3] = rng.uniform(-1, 1, (3, 6))
        observations, rewards, *_ = envs.step(actions)
        told.append(np.concatenate([observations[:3], rewards[:3, None]], 1))
    envs.close()
    return np.stack(told)


def in_a_process(num_envs: int, threads: int) -> np.ndarray:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-c", PROBE, str(num_envs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout))


@pytest.mark.parametrize("num_envs", [3, 64])
def test_a_seed_gives_one_dream_in_every_process(num_envs):
    np.testing.assert_array_equal(in_a_process(num_envs, 1), in_a_process(num_envs, 1))


def test_a_seed_gives_one_dream_with_any_number_of_threads():
    np.testing.assert_allclose(in_a_process(64, 1), in_a_process(64, 4), atol=1e-4)


@pytest.mark.parametrize("num_envs", [8, 9, 64, 500])
def test_a_seed_gives_one_dream_whatever_the_number_of_envs(num_envs):
    np.testing.assert_allclose(dreams(num_envs, precision="32-true"), dreams(3, precision="32-true"), atol=1e-4)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_single_dreams_are_the_slots_of_many(mode):
    np.testing.assert_allclose(dreams(3, vectorization_mode=mode), dreams(3), atol=1e-4)
