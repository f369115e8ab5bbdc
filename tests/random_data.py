"""Short real trajectories under random actions."""

from pathlib import Path

import gymnasium

import aime_gym  # noqa: F401 - registers the ids
from aime_gym.commands.collect import RecordTrajectories
from aime_gym.data.trajectories import save_trajectory, write_metadata


def record(env: gymnasium.Env, folder: Path, episodes: int, steps: int, **metadata: str) -> Path:
    """Fills a data set's folder with random episodes of so many steps, which the env ends, and returns it."""
    recorder = RecordTrajectories(env, lambda t: save_trajectory(folder, len(list(folder.glob("*.npz"))), t))
    recorder.action_space.seed(0)
    for episode in range(episodes):
        recorder.reset(seed=episode)
        for _ in range(steps):
            recorder.step(recorder.action_space.sample())
    write_metadata(folder, metadata)
    return folder


def record_random(folder: Path, episodes: int, steps: int, **metadata: str) -> Path:
    """The same of the walker."""
    with gymnasium.make("AimeReal-Walker-v0", max_episode_steps=steps) as env:
        return record(env, folder, episodes, steps, **{"embodiment": "walker", **metadata})
