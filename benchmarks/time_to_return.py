"""When a dream pays: what an agent costs in the dream of a finished model, and in the world.

    python -m benchmarks.time_to_return walker-walk cheetah-run

In the dream `aime-gym dream --trials 0` trains and chooses its agent without a real step. In the world
Stable-Baselines3's SAC learns with its defaults until it earns nine tenths of what the dream's agent earns there, or
its steps are used up. Real steps are control steps of the physics; minutes are CPU time of one thread, in the world
without the trials.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from aime_gym import REAL, compare
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.dream import Dream
from aime_gym.envs.sb3 import make_sb3_env
from aime_gym.files import write_atomically
from aime_gym.world_model.checkpoint import load_pretrained_model

SHARE = 0.9
"""The part of the better agent's return that counts as reached."""


@dataclass
class TimeToReturn:
    """Measure what an agent costs in the dream and in the world, and print a Markdown table."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional]
    """BODY-TASK of each, as walker-walk."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the agents."""
    steps: int = 60_000
    """Agent steps in the world, at most."""
    every: int = 2_000
    """Agent steps in the world between trials of five episodes."""
    dreams: Path = Path("runs/time-to-return")
    """Where the agents of dreams go."""
    output: Path = Path("benchmarks/results/time_to_return.json")
    """Where to write the numbers; what is there already is not measured again."""

    def run(self) -> None:
        """Measures what is missing, writes it after each agent, and prints the table."""
        torch.set_num_threads(1)
        told: dict[str, Any] = json.loads(self.output.read_text()) if self.output.exists() else {}
        for word in self.tasks:
            body, _, task = word.partition("-")
            cells = told.setdefault(word, {"model steps": model_steps(body), "dream": {}, "world": {}})
            for seed in map(str, self.seeds):
                if seed not in cells["dream"]:
                    cells["dream"][seed] = self.in_dream(body, task, int(seed))
                    write_atomically(self.output, json.dumps(told, indent=1) + "\n")
                if seed not in cells["world"]:
                    cells["world"][seed] = self.in_world(body, task, int(seed), SHARE * cells["dream"][seed]["real"])
                    write_atomically(self.output, json.dumps(told, indent=1) + "\n")
        print(*table({word: told[word] for word in self.tasks}), sep="\n")

    def in_dream(self, body: str, task: str, seed: int) -> dict[str, Any]:
        """What one agent of the dream costs, and its mean return of 20 episodes in the world."""
        out = self.dreams / f"{body}-{task}-{seed}"
        begin = time.process_time()
        job = Dream(body, task, trials=0, seed=seed, episodes=1, video_steps=0, minutes=None, out=out)
        job.run()
        minutes = (time.process_time() - begin) / 60
        steps = json.loads((out / "job.json").read_text())["steps"]
        earned = compare([out / "agent.zip"], body, task, 20, seed=seed).policies[0]
        return {"steps": steps, "minutes": minutes, "real": float(np.mean(earned.real.returns))}

    def in_world(self, body: str, task: str, seed: int, target: float) -> dict[str, Any]:
        """When SAC's return reached `target` in the world, if it did, and its returns on the way."""
        world, others = (
            make_sb3_env(REAL, embodiment=body, n_envs=1, seed=start, task=task) for start in (seed, 1_000_000 + seed)
        )
        agent = SAC("MlpPolicy", world, seed=seed, device="cpu")
        trials = Trials(others, self.every, target)
        begin = time.process_time()
        agent.learn(self.steps, callback=trials)
        world.close()
        others.close()
        minutes = (time.process_time() - begin - trials.seconds) / 60
        repeat = get_embodiment(body).action_repeat
        reached = trials.curve[-1][1] >= target
        return {
            "control steps": agent.num_timesteps * repeat,
            "minutes": minutes,
            "reached": reached,
            "curve": trials.curve,
        }


@dataclass
class Trials(BaseCallback):
    """Tries the agent on five episodes now and then, until it earns enough."""

    world: VecEnv
    every: int
    target: float
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every:
            return True
        begin = time.process_time()
        mean = float(evaluate_policy(self.model, self.world, 5, warn=False)[0])  # type: ignore[arg-type]
        self.seconds += time.process_time() - begin
        self.curve.append((self.num_timesteps, round(mean, 1)))
        return mean < self.target


def model_steps(body: str) -> int:
    """Control steps behind the bundled model of a body: its card's trajectories, which are whole episodes."""
    folder = load_pretrained_model(f"{body}-state").folder
    card = (Path(str(folder)) / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"\| data set \| trajectories \| held out \|\n\|[- |]+\n((?:\|.*\n)+)", card)
    counts = [sum(map(int, row.split("|")[2:4])) for row in rows[1].splitlines()] if rows else []
    return sum(counts) * get_embodiment(body).episode_control_steps


def table(told: Mapping[str, Any]) -> list[str]:
    """The lines of the Markdown table: means over seeds, and from which agent on the model has saved real steps."""
    titles = (
        *("task", "model: real steps", "dream: steps, CPU minutes", "real return"),
        *("SAC in the world: real steps to nine tenths", "CPU minutes", "the model pays from agent"),
    )
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join('---' for _ in titles)} |"]
    for word, cells in told.items():
        dream, world = list(cells["dream"].values()), list(cells["world"].values())
        steps, got = _mean(world, "control steps"), sum(run["reached"] for run in world)
        pays = int(np.ceil(cells["model steps"] / steps))
        told_of = (
            *(word.replace("-", " ", 1), f"{cells['model steps']:,}"),
            *(f"{_mean(dream, 'steps'):,.0f}, {_mean(dream, 'minutes'):.1f}", f"{_mean(dream, 'real'):.0f}"),
            f"{steps:,.0f}" + ("" if got == len(world) else f" ({got} of {len(world)} got there)"),
            f"{_mean(world, 'minutes'):.1f}",
            f"{pays}" + ("" if got == len(world) else " at the latest"),
        )
        lines.append(f"| {' | '.join(told_of)} |")
    return lines


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


if __name__ == "__main__":
    tyro.cli(TimeToReturn).run()
