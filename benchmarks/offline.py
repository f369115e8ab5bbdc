"""Agents from logged data alone: sets of a mediocre agent, a model, an agent of its dreams, and what the world pays it.

``medium`` is a fixed number of steps of an agent of SB3's SAC that was stopped at a third of what an expert earns, and
``medium-replay`` all that it did until then (after Fu et al., "D4RL", 2020). The model and its agent see nothing but a
set: the agent is chosen by what the dream predicts (`aime-gym dream --trials 0`), and only then tried in the real env,
beside behaviour cloning of the same set and the set's own mean return.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor

from aime_gym import BC, Train
from aime_gym.commands.dream import Dream
from aime_gym.data import from_arrays
from aime_gym.data.trajectories import load_trajectory, trajectory_paths
from aime_gym.evaluation.returns import PolicyLike, episode_returns, load_policy
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import read_json, write_json
from aime_gym.training.options import HeadsOptions
from aime_gym.world_model.checkpoint import load_pretrained_model

EXPERTS = {"HalfCheetah-v5": 12_135.0, "Hopper-v5": 3_234.3, "Walker2d-v5": 4_592.3}
"""What experts earn in an episode, by D4RL's reference scores."""
SETS = ("medium", "medium-replay")


class Log(gym.Wrapper):
    """Keeps observations, actions and rewards of all episodes, as anybody's log would."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observations: list[list[Any]] = []
        self.actions: list[list[Any]] = []
        self.rewards: list[list[float]] = []
        self.terminations: list[bool] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Begins an episode."""
        observation, info = self.env.reset(**kwargs)
        if self.actions and not self.actions[-1]:  # an episode of no step
            self._drop_last()
        self.observations.append([observation])
        self.actions.append([])
        self.rewards.append([])
        self.terminations.append(False)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps and notes it."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.observations[-1].append(observation)
        self.actions[-1].append(np.array(action))
        self.rewards[-1].append(float(reward))
        self.terminations[-1] = bool(terminated)
        return observation, reward, terminated, truncated, info

    @property
    def steps(self) -> int:
        """How many were taken."""
        return sum(map(len, self.actions))

    def write(self, out: Path, name: str) -> Path:
        """Writes the set."""
        if not self.actions[-1]:
            self._drop_last()
        parts = [[np.array(episode) for episode in part] for part in (self.observations, self.actions, self.rewards)]
        bounds = self.env.action_space  # the same for both sets, and those by which `AimeReal-v0` scales
        return from_arrays(*parts, self.terminations, out=out, name=name, action_space=bounds)

    def _drop_last(self) -> None:
        for part in (self.observations, self.actions, self.rewards, self.terminations):
            part.pop()  # type: ignore[attr-defined]


class StopAt(BaseCallback):
    """Ends training when the agent earns so much, the mean of ten episodes of its mode, in an env of its own."""

    def __init__(self, world: gym.Env, target: float, every: int):
        super().__init__()
        self.world, self.target, self.every = world, target, every
        self.curve: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every:
            return True
        earned = []
        for seed in range(10):
            observation, _ = self.world.reset(seed=1_000_000 + seed)
            total, over = 0.0, False
            while not over:
                action, _ = self.model.predict(observation, deterministic=True)
                observation, reward, terminated, truncated, _ = self.world.step(action)
                total, over = total + float(reward), terminated or truncated
            earned.append(total)
        self.curve.append((self.num_timesteps, float(np.mean(earned))))
        return self.curve[-1][1] < self.target


@dataclass
class Offline:
    """Make the sets of a body, learn from each alone, and try the agents in the real env."""

    env: str = "Hopper-v5"
    """The id of a Gymnasium env."""
    expert: float | None = None
    """What an expert earns; by D4RL's reference scores for the three bodies of MuJoCo."""
    share: float = 1 / 3
    """The share of it at which the agent is stopped that makes the sets."""
    steps: int = 100_000
    """Steps of the medium set."""
    most: int = 1_000_000
    """Steps of SAC's training at most."""
    every: int = 2_000
    """Steps between looks at what SAC earns."""
    train: Train = field(default_factory=lambda: Train(updates=10_000, heads=HeadsOptions(updates=2_000)))
    """How models are trained; data sets and folders are filled in."""
    dream: Dream = field(default_factory=lambda: Dream(doubt_penalty=0.1, video_steps=0, minutes=None))
    """How agents learn in dreams; models and folders are filled in, and no trial is ever real."""
    clone_updates: int = 5_000
    """Updates of behaviour cloning."""
    episodes: int = 20
    """Real episodes that an agent is scored by, after all is chosen."""
    sets: tuple[str, ...] = SETS
    """Which sets to learn from."""
    seed: int = 0
    """Seed of everything."""
    work: Path = Path("offline")
    """Where sets, models and agents are kept; what is there is not made again."""
    output: Path = Path("benchmarks/results/offline.json")
    """Where to write the numbers, beside those of other bodies."""

    def run(self) -> None:
        """Makes what is missing, prints the table and writes `output`."""
        torch.set_num_threads(1)
        self.make_sets()
        told: dict[str, Any] = read_json(self.output) if self.output.exists() else {}
        for name in self.sets:
            told.setdefault(self.env, {})[name] = self.measure(name)
            write_json(self.output, told)
        self.report(told[self.env])

    def folder(self, name: str) -> Path:
        """The folder of a set, or of what was made of it."""
        return self.work / f"{self.env}-{name}"

    def make_sets(self) -> None:
        """SAC learns until it earns a share of the expert's return: what it did is one set, what it does another."""
        if all((self.folder(name) / "dataset.json").exists() for name in SETS):
            return
        expert = EXPERTS.get(self.env) if self.expert is None else self.expert
        if expert is None:
            raise SystemExit(f"What an expert earns in {self.env} is not known: give --expert.")
        learned, acted = Log(gym.make(self.env)), Log(gym.make(self.env))
        agent = SAC("MlpPolicy", Monitor(learned), seed=self.seed, device="cpu")
        stop = StopAt(gym.make(self.env), self.share * expert, self.every)
        agent.learn(self.most, callback=stop)
        learned.write(self.folder("medium-replay"), f"{self.env}-logged")
        while acted.steps < self.steps:
            observation, _ = acted.reset(seed=self.seed + len(acted.actions))
            over = False
            while not over:
                action, _ = agent.predict(observation)
                observation, _, terminated, truncated, _ = acted.step(action)
                over = terminated or truncated
        acted.write(self.folder("medium"), f"{self.env}-logged")
        write_json(self.folder("sac.json"), {"steps and returns": stop.curve})

    def measure(self, name: str) -> dict[str, Any]:
        """What the world pays the agent of a dream and a clone, and what the set earned."""
        data, model, agent = self.folder(name), self.folder(f"{name}-model"), self.folder(f"{name}-agent")
        if not (model / "config.yaml").exists():
            replace(self.train, datasets=(data,), out=model, seed=self.seed).train()
        if not (agent / "returns.json").exists():
            replace(self.dream, model=str(model), out=agent, trials=0, seed=self.seed).run()
        clone = BC(load_pretrained_model(model), demonstrations=data, seed=self.seed)
        clone.learn(self.clone_updates)
        earned = [float(load_trajectory(path)["reward"].sum()) for path in trajectory_paths(data)]
        returns = read_json(agent / "returns.json")
        dreamt = next(iter(returns["policies"].values()))["dream"]["mean"]
        return {
            "data": float(np.mean(earned)),
            "episodes of the data": len(earned),
            "dream": dreamt,
            "agent": self.score(load_policy(agent / "agent.zip")),
            "clone": self.score(clone),
        }

    def score(self, policy: PolicyLike) -> list[float]:
        """Real returns, of episodes that nothing was chosen by."""
        envs = make_real_envs(self.env, min(self.episodes, 10), obs_type="state")
        try:
            return episode_returns(policy, envs, self.episodes, seed=2_000_000).returns.tolist()
        finally:
            envs.close()

    def report(self, told: dict[str, Any]) -> None:
        """Prints real returns over the data's mean."""
        table = Table(title=f"{self.env}: real return of {self.episodes} episodes, and times the data's mean")
        for column in ("set", "data", "agent of the dream", "it was promised", "behaviour cloning"):
            table.add_column(column)
        for name, scores in told.items():
            mean = scores["data"]
            cells = [f"{np.mean(scores[of]):.0f} ({np.mean(scores[of]) / mean:.2f})" for of in ("agent", "clone")]
            table.add_row(name, f"{mean:.0f}", cells[0], f"{scores['dream']:.0f}", cells[1])
        Console().print(table)


if __name__ == "__main__":
    tyro.cli(Offline).run()
