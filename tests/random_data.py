"""Short real trajectories of the walker under random actions."""

from pathlib import Path

import gymnasium

import aime_gym  # noqa: F401 - registers the ids
from aime_gym.commands.collect import RecordTrajectories
from aime_gym.data.trajectories import save_trajectory, write_metadata


def record_random(folder: Path, episodes: int, steps: int, **metadata: str) -> Path:
    """Fills a data set's folder with episodes that are cut after so many steps, and returns it."""
    env = gymnasium.make("AimeReal-Walker-v0", max_episode_steps=steps)
    recorder = RecordTrajectories(env, lambda t: save_trajectory(folder, len(list(folder.glob("*.npz"))), t))
    recorder.action_space.seed(0)
    for episode in range(episodes):
        recorder.reset(seed=episode)
        for _ in range(steps):
            recorder.step(recorder.action_space.sample())
    recorder.close()
    write_metadata(folder, {"embodiment": "walker", **metadata})
    return folder
