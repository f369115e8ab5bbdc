"""The right way to train in a dream: `aime-gym dream` without a penalty, and with one setting changed at a time.

Every row says what its agents earn in the dream and in the world, and in what time. Runs that are complete are not
repeated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from aime_gym.commands.dream import Dream
from aime_gym.evaluation.compare import Comparison
from aime_gym.files import write_atomically
from aime_gym.parallel import available_cores, run_in_parallel

ROWS: dict[str, dict[str, Any]] = {
    "base": {},
    "begins at resets": {"start": "reset"},
    "horizon 125": {"horizon": 125},
    "horizon 500": {"horizon": 500},
    "means of latents": {"deterministic": True},
    "penalty 0.003": {"doubt_penalty": 0.003},
    "penalty 0.01": {"doubt_penalty": 0.01},
    "penalty 0.03": {"doubt_penalty": 0.03},
    "penalty 0.1": {"doubt_penalty": 0.1},
    "ends where doubt is 25": {"max_doubt": 25.0},
    "16 slots": {"slots": 16},
    "256 slots": {"slots": 256},
    "PPO, 128 slots": {"algo": "ppo", "slots": 128},
    "SAC, 32 slots": {"algo": "sac", "slots": 32},
    "TD3, 32 slots": {"algo": "td3", "slots": 32},
    "chosen by the dream alone": {"trials": 0},
}
"""What each row changes of the base, which is the defaults without a penalty; the last one asks no real
episode which agent to keep."""


@dataclass
class DreamSettings:
    """Compare ways to train in the dream."""

    task: str = "walk"
    """A task of the walker."""
    model: str = "walker-state"
    """A folder or a bundled name."""
    minutes: float = 4.0
    """Minutes of every agent's training."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each row."""
    episodes: int = 20
    """Episodes of the evaluation of each agent, in each world."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Which of them."""
    workers: int = field(default_factory=available_cores)
    """Agents that learn side by side."""
    work: Path = Path("runs/dream-settings")
    """Agents."""
    output: Path = Path("benchmarks/results/dream_settings.json")
    """Where to write the numbers; the curve over penalties goes beside it, as a png."""

    def run(self) -> None:
        """Trains what is missing, prints the table, and writes numbers and picture."""
        jobs = {row: [self.job(row, seed) for seed in self.seeds] for row in self.rows}
        waiting = [job for of_row in jobs.values() for job in of_row if not (job.out / "returns.json").exists()]
        missing = {str(job.out): job for job in waiting}
        run_in_parallel(Dream.run, missing, self.workers, f"Agents of {self.model}", "agents")
        self.report({row: [self.result(job) for job in of_row] for row, of_row in jobs.items()})

    def job(self, row: str, seed: int) -> Any:
        """The call of `aime-gym dream`."""
        out = self.work / f"{self.task}-{row.replace(' ', '-').replace(',', '')}-{seed}"
        settings: dict[str, Any] = {"episodes": self.episodes, "video_steps": 0, "doubt_penalty": 0.0}
        settings |= {"minutes": self.minutes, "steps": 10**9, "patience": None}  # all have the same time
        return Dream(task=self.task, model=self.model, seed=seed, out=out, **settings | ROWS[row])

    def result(self, job: Any) -> dict[str, float]:
        """Returns and seconds of one agent."""
        agent = Comparison.from_json(job.out / "returns.json").policies[0]
        curve = json.loads((job.out / "job.json").read_text())["curve"]
        return {"dream": agent.dream.mean, "real": agent.real.mean, "seconds": curve[-1]["seconds"]}

    def report(self, results: dict[str, list[dict[str, float]]]) -> None:
        """Prints, draws and writes."""
        table = Table(
            title=f"{self.task}, {self.model}: means over {len(self.seeds)} seeds of {self.episodes} episodes"
        )
        for column in ("setting", "dream return", "real return", "gap", "seconds"):
            table.add_column(column, justify="left" if column == "setting" else "right")
        means = {}
        for row, agents in results.items():
            dream, real, seconds = (float(np.mean([agent[key] for agent in agents])) for key in agents[0])
            means[row] = {"dream": dream, "real": real, "gap": dream - real, "seconds": seconds}
            each = ", ".join(f"{agent['real']:.0f}" for agent in agents) if len(agents) > 1 else ""
            table.add_row(
                row,
                f"{dream:.0f}",
                f"{real:.0f}" + (f" ({each})" if each else ""),
                f"{dream - real:.0f}",
                f"{seconds:.0f}",
            )
        Console().print(table)
        told = {"task": self.task, "model": self.model, "minutes": self.minutes, "means": means, "runs": results}
        write_atomically(self.output, json.dumps(told, indent=2) + "\n")
        penalties = {row: ROWS[row].get("doubt_penalty", 0.0) for row in means if row.startswith(("base", "penalty"))}
        if len(penalties) > 2:
            self.draw({penalty: means[row] for row, penalty in penalties.items()})

    def draw(self, means: dict[float, dict[str, float]]) -> None:
        """Returns over the penalty."""
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        order = sorted(means)
        for world in ("dream", "real"):
            axes.plot(range(len(order)), [means[penalty][world] for penalty in order], marker="o", label=world)
        axes.set_xticks(range(len(order)), [f"{penalty:g}" for penalty in order])
        axes.set(xlabel="doubt_penalty", ylabel=f"return, {self.task}", ylim=(0, None))
        axes.legend(frameon=False)
        figure.savefig(self.output.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    tyro.cli(DreamSettings).run()
