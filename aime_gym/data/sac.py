"""Expert data from nothing: Stable-Baselines3's SAC in the real env, every training episode kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from aime_gym.agents.sb3 import agent_fields, save_sb3_agent, take_up
from aime_gym.data.collect import describe
from aime_gym.data.record import RecordTrajectories
from aime_gym.data.trajectories import Trajectory, count_steps, load_trajectory, save_trajectory, trajectory_paths
from aime_gym.embodiments import get_embodiment
from aime_gym.envs.spaces import to_state
from aime_gym.parallel import job_progress
from aime_gym.registration import REAL

_PREFILL = 5
"""Random trajectories before the first update, as the reference's Dreamer."""


class SACBuffer:
    """Trains SAC and writes its whole training buffer, random to expert, in order.

    The folder also holds `agent.zip` (the best agent by the mean return of ten training episodes, its `best_mean`) and
    `latest.zip`, from which a later call continues; the replay buffer is filled again from the trajectories.

    Args:
        embodiment: The body.
        task: The task to learn.
        folder: Where the trajectories go.
        seed: Of SAC and the env.
    """

    def __init__(self, embodiment: str, task: str, folder: Path, seed: int = 0):
        self.body, self.task, self.folder = get_embodiment(embodiment), task, folder
        describe(folder, embodiment=embodiment, task=task, policy="sac", seed=seed)
        self._paths = trajectory_paths(folder)
        self._steps = count_steps(self._paths)
        self._next = max((int(path.stem) + 1 for path in self._paths), default=0)
        env = gymnasium.make(REAL, embodiment=self.body.name, task=task)
        self._env = RecordTrajectories(env, self._keep)
        seed += self._next  # continue on other episodes than those that are already there
        latest = folder / "latest.zip"
        # Killed before its first save, a run leaves trajectories but no agent: a new one goes on from their data.
        prefill = max(0, _PREFILL * self.body.episode_steps - self._steps)
        self.agent = SAC("MlpPolicy", self._env, learning_starts=prefill, seed=seed, device="cpu")
        if latest.exists():
            take_up(self.agent, latest, ("num_timesteps", "_n_updates", "learning_starts"))
        self._refill()
        self._advance: Any = None

    def learn(self, trajectories: int) -> Path:
        """Trains for so many episodes of full length; Ctrl-C keeps what is complete.

        Where episodes terminate, the folder gets more of them.

        Returns:
            The path of the best agent; of the newest one before the first ten episodes are over.
        """
        steps = trajectories * self.body.episode_steps - self._steps
        title = f"SAC {self.body.name} {self.task} in {self.folder}"
        with job_progress(title, trajectories, "trajectories") as self._advance:
            self._advance(self._steps / self.body.episode_steps)
            if steps > 0:
                try:
                    self.agent.learn(steps, callback=_KeepBest(self.folder), reset_num_timesteps=False)
                finally:
                    save_sb3_agent(self.agent, self.folder / "latest.zip")
        return best_agent(self.folder)

    def _keep(self, trajectory: Trajectory) -> None:
        save_trajectory(self.folder, self._next, trajectory)
        self._next += 1
        self._advance((len(trajectory["pre_action"]) - 1) / self.body.episode_steps)

    def _refill(self) -> None:
        """Puts the stored trajectories back into the replay buffer."""
        replay = self.agent.replay_buffer
        assert replay is not None
        for path in self._paths:
            episode = load_trajectory(path)
            state = to_state(self.body.sensors, episode)
            for t in range(1, len(state)):
                last = bool(episode["is_last"][t])
                replay.add(
                    state[t - 1][None],
                    state[t][None],
                    episode["pre_action"][t][None],
                    episode["reward"][t],
                    np.array([last]),
                    [{"TimeLimit.truncated": last and not episode["is_terminal"][t]}],
                )


def best_agent(folder: Path) -> Path:
    """The best agent in a folder of SAC's training; the newest one before the first ten episodes are over."""
    best = folder / "agent.zip"
    return best if best.exists() else folder / "latest.zip"


class _KeepBest(BaseCallback):
    """Saves the newest agent every ten episodes, and the best one by their mean return."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder, self._returns = folder, [0.0]
        best = folder / "agent.zip"
        self._best = agent_fields(best).get("best_mean", -math.inf) if best.exists() else -math.inf

    def _on_step(self) -> bool:
        self._returns[-1] += float(self.locals["rewards"][0])
        if self.locals["dones"][0]:
            self._returns.append(0.0)
            if len(self._returns) > 10:
                mean, self._returns = float(np.mean(self._returns[:10])), [0.0]
                agent: Any = self.model
                save_sb3_agent(agent, self._folder / "latest.zip")
                if mean > self._best:
                    self._best = agent.best_mean = mean  # saved with the agent, in one file
                    save_sb3_agent(agent, self._folder / "agent.zip")
        return True
