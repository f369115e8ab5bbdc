"""How long until an agent earns a given return in the world: learning in the dream against learning in the world.

The same algorithm with the same settings where it can learn in both, SB3's SAC in the real env as it comes, and SHAC,
which needs the gradient that only a dream has. All are tried on the same real episodes; trials count as time.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from aime_gym.agents.plain import make_agent, observation_statistics
from aime_gym.envs.sb3 import make_sb3_env
from aime_gym.files import write_atomically
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.model import WorldModel

ARMS = ("SHAC, dream", "SAC, dream", "SAC, real", "PPO, dream", "PPO, real")
DREAMS = {"SHAC": 64, "SAC": 32, "PPO": 64}
REAL_ENVS = {"SAC": 2, "PPO": 16}
"""How many side by side; each real env is a process."""


@dataclass
class TimeToReturn:
    """Measure the time to a real return, in the dream and in the world."""

    task: str = "walk"
    """A task of the walker."""
    model: str = "walker-state"
    """A folder or a bundled name."""
    target: float = 700.0
    """Real return, mean of 10 episodes."""
    arms: tuple[str, ...] = ARMS
    """Which learners."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the agents."""
    minutes: float = 20.0
    """A learner that has not got there by then has failed."""
    every: float = 20.0
    """Seconds between trials."""
    output: Path = Path("benchmarks/results/time_to_return.json")
    """Where to write the numbers; what is there already is not measured again."""

    def run(self) -> None:
        """Measures what is missing, prints the table and writes `output`."""
        torch.set_num_threads(1)
        model = load_pretrained_model(self.model)
        runs: dict[str, Any] = json.loads(self.output.read_text())["runs"] if self.output.exists() else {}
        for arm in self.arms:
            for seed in self.seeds:
                key = f"{arm}, seed {seed}"
                if key not in runs:
                    runs[key] = self.measure(arm, seed, model)
                    told = {"task": self.task, "target": self.target, "minutes": self.minutes, "runs": runs}
                    write_atomically(self.output, json.dumps(told, indent=2) + "\n")
        self.report(runs)

    def measure(self, arm: str, seed: int, model: WorldModel) -> dict[str, Any]:
        """Trains one agent: when it got there, if it did, and its curve of real returns over seconds."""
        algo, where = arm.split(", ")
        envs = self.dream(model, seed, DREAMS[algo]) if where == "dream" else self.real(seed, REAL_ENVS[algo])
        if arm == "SAC, real":
            agent: BaseAlgorithm = SAC("MlpPolicy", envs, gradient_steps=-1, seed=seed, device="cpu")
        else:
            agent = make_agent(algo.lower(), envs, observation_statistics(self.dream(model, seed, 1)), seed)
        trials = Trials(make_sb3_env("AimeReal-Walker-v0", n_envs=10, seed=1_000_000, task=self.task), self)
        agent.learn(10**9, callback=trials)
        envs.close()
        reached = trials.curve[-1][1] >= self.target
        Console().print(f"{arm}, seed {seed}: {trials.curve[-1]}")
        return {
            "seconds": trials.curve[-1][0] if reached else None,
            "steps": agent.num_timesteps,
            "curve": trials.curve,
        }

    def dream(self, model: WorldModel, seed: int, slots: int) -> VecEnv:
        """Dreams as `aime-gym dream` makes them."""
        options: dict[str, Any] = {"task": self.task, "model": model, "max_episode_steps": 125, "start": "dataset"}
        return make_sb3_env("AimeDream-Walker-v0", n_envs=slots, seed=seed, **options)

    def real(self, seed: int, envs: int) -> VecEnv:
        """Real envs in processes of their own, `envs` of them in all."""
        options = {"task": self.task}
        return make_vec_env(
            "AimeReal-Walker-v0",
            envs,
            seed,
            env_kwargs=options,
            vec_env_cls=SubprocVecEnv,
            vec_env_kwargs={"start_method": "spawn"},
        )

    def report(self, runs: dict[str, Any]) -> None:
        """Prints the median time of each arm and its ratio to that of the first."""
        table = Table(title=f"Time to a real return of {self.target:g} at {self.task}")
        for column in ("learner", "seconds: median (each seed)", "times the first"):
            table.add_column(column)
        first: float | None = None
        for arm in self.arms:
            times = [runs[key]["seconds"] or np.inf for key in runs if key.startswith(f"{arm}, seed")]
            median = float(np.median(times))
            first = first or median
            shown = ", ".join(f"{seconds:.0f}" if np.isfinite(seconds) else "not reached" for seconds in times)
            reached = np.isfinite(median)
            ratio = f"{median / first:.1f}" if reached else f"over {60 * self.minutes / first:.1f}"
            table.add_row(arm, f"{median:.0f} ({shown})" if reached else shown, ratio)
        Console().print(table)


@dataclass
class Trials(BaseCallback):
    """Tries the agent in the world now and then, until it earns enough or time is up."""

    world: VecEnv
    job: TimeToReturn
    curve: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def _on_training_start(self) -> None:
        self._began = self._tried = time.monotonic()

    def _on_step(self) -> bool:
        if time.monotonic() - self._tried < self.job.every:
            return True
        mean = float(evaluate_policy(self.model, self.world, 10, warn=False)[0])  # type: ignore[arg-type]
        self._tried = time.monotonic()
        self.curve.append((round(self._tried - self._began, 1), round(mean, 1)))
        return mean < self.job.target and self._tried - self._began < 60 * self.job.minutes


if __name__ == "__main__":
    tyro.cli(TimeToReturn).run()
