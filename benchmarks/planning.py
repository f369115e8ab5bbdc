"""What a planner earns in the world that learned nothing: `aime_gym.MPC` with its defaults, in a model of each body.

    python -m benchmarks.planning --tasks reacher/easy walker/walk --output planning.json

Returns are means of whole episodes in the real env and in the dream, with 95% bootstrap intervals over episodes. Times
are those of the CPU.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import aime_gym
from aime_gym.files import write_atomically

STEPS = 20
"""Steps that are timed, of one env."""
TASKS = (
    *("cartpole/swingup", "reacher/easy", "reacher/hard", "ball_in_cup/catch", "pendulum/swingup", "finger/spin"),
    *("hopper/stand", "cheetah/run", "walker/stand", "walker/walk", "walker/run"),
)


@dataclass
class Planning:
    """Let a planner act in both worlds, task by task, and print a Markdown table."""

    tasks: tuple[str, ...] = TASKS
    """BODY/TASK of each; its model is the bundled one of states."""
    episodes: int = 5
    """Episodes of each in both worlds, side by side."""
    plans: int = 64
    """See `aime_gym.MPC`, as are the next two."""
    horizon: int = 20
    rounds: int = 3
    seed: int = 0
    """Seed of the episodes and the planner."""
    output: Path | None = None
    """A JSON file of all numbers; what it holds already, of these settings, is not measured again."""

    def run(self) -> None:
        """Measures, and writes after each task."""
        told = json.loads(self.output.read_text()) if self.output and self.output.exists() else {}
        settings = {name: getattr(self, name) for name in ("episodes", "plans", "horizon", "rounds", "seed")}
        print("| task | real | dream | milliseconds a step |\n| --- | --- | --- | --- |", flush=True)
        for word in self.tasks:
            if not settings.items() <= told.get(word, {}).items():
                told[word] = {**settings, **self._measure(*word.split("/"))}
                if self.output:
                    write_atomically(self.output, json.dumps(told, indent=2).encode())
            row = told[word]
            means = [
                f"{np.mean(row[world]):.0f} [{row[f'{world} interval'][0]:.0f}, {row[f'{world} interval'][1]:.0f}]"
                for world in ("real", "dream")
            ]
            print(f"| {word} | {means[0]} | {means[1]} | {row['milliseconds']:.0f} |", flush=True)

    def _measure(self, body: str, task: str) -> dict[str, object]:
        model = f"{body}-state"
        planner = aime_gym.MPC(model, task, plans=self.plans, horizon=self.horizon, rounds=self.rounds, seed=self.seed)
        policy = aime_gym.compare(planner, body, task, self.episodes, model, self.seed).policies[0]
        assert policy.real is not None
        observation = np.zeros(planner.observation_space.shape or (), np.float32)
        _, state = planner.predict(observation)
        begin = time.process_time()
        for _ in range(STEPS):
            planner.predict(observation, state)
        seconds = time.process_time() - begin
        real, dream = policy.real, policy.dream
        told = {name: list(of.returns) for name, of in (("real", real), ("dream", dream))}
        intervals = {f"{name} interval": list(of.interval) for name, of in (("real", real), ("dream", dream))}
        return {**told, **intervals, "milliseconds": 1000 * seconds / STEPS}


if __name__ == "__main__":
    tyro.cli(Planning).run()
