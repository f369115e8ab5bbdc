"""Does an agent earn in the world what it earns in the dream? All bars in one command, resumed where it stopped.

Agents are trained by `aime-gym dream` with its defaults, for every task and seed. Then many policies are compared, as
they are and with noise: those agents, agents that learned in other dreams, others given by path, random and idle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from aime_gym.commands.dream import Dream
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.evaluation.compare import Comparison, compare
from aime_gym.evaluation.returns import bootstrap_interval, load_policy
from aime_gym.files import write_atomically
from aime_gym.parallel import available_cores, run_in_parallel
from aime_gym.training.model_folder import prediction_error
from aime_gym.world_model.checkpoint import load_pretrained_model
from benchmarks.doubt import Doubt, scores

RETURN_BARS = {"walk": (700, 900), "run": (200, 400)}
"""Task -> bar and aim for the real return of an agent from the dream."""


@dataclass
class Truth:
    """Measure the truth of a model's dreams: trained agents, many policies, open-loop error and doubt."""

    model: str = "walker-state"
    """A folder or a bundled name."""
    tasks: tuple[str, ...] = ("walk", "run")
    """What agents learn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the agents."""
    minutes: float | None = None
    """Minutes of an agent's training; the default of `aime-gym dream` by default."""
    agents: tuple[Path, ...] = ()
    """Saved agents from elsewhere: SAC's, or those of earlier dreams."""
    noise: tuple[float, ...] = (0.0, 0.3, 0.8)
    """Standard deviations of the noise with which every policy is compared."""
    episodes: int = 20
    """Episodes of an agent from the dream, in each world; the policies of the comparison have half of them."""
    held_out: tuple[Path, ...] = ()
    """Data sets that the model was not trained on, for the open-loop error."""
    exploiting: tuple[Path, ...] = ()
    """Data sets of agents that learned in this model's dream, which it was not trained on, for the doubt."""
    workers: int = field(default_factory=available_cores)
    """Agents that learn side by side."""
    work: Path = Path("runs/truth")
    """Agents and comparisons."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures what is not measured yet, prints the tables and writes `output`."""
        model = load_pretrained_model(self.model)
        jobs = {task: [self.job(task, seed) for seed in self.seeds] for task in self.tasks}
        waiting = [job for of_task in jobs.values() for job in of_task if not (job.out / "returns.json").exists()]
        missing = {str(job.out): job for job in waiting}
        run_in_parallel(Dream.run, missing, self.workers, f"Agents of {self.model}", "agents")
        trained = {task: [job.out for job in of_task] for task, of_task in jobs.items()}
        everyone = [*(path for folders in trained.values() for path in folders), *self.agents]
        compared = {task: self.compare_all(task, everyone) for task in self.tasks}
        open_loop = {
            folder.name: prediction_error(model, TrajectoryDataset(folder), windows=500) for folder in self.held_out
        }
        doubt: dict[str, Any] = {}
        if self.exploiting:
            job = Doubt((), self.model)
            parts = [job.measure(model, TrajectoryDataset(folder), 10) for folder in self.exploiting]
            doubt = scores(
                np.concatenate([errors for errors, _ in parts]),
                {kind: np.concatenate([signals[kind] for _, signals in parts]) for kind in parts[0][1]},
            )
        self.report(trained, compared, open_loop, doubt)

    def job(self, task: str, seed: int) -> Any:
        """The call of `aime-gym dream`."""
        out = self.work / f"{task}-{seed}"
        job = Dream(task=task, seed=seed, model=self.model, episodes=self.episodes, out=out, video_steps=0)
        return job if self.minutes is None else dataclasses.replace(job, minutes=self.minutes)

    def compare_all(self, task: str, agents: Sequence[Path]) -> Comparison:
        """All policies in both worlds, with and without noise."""
        path = self.work / f"policies-{task}.json"
        if not path.exists():
            policies: dict[str, Any] = {"random": "random", "zero": "zero"}
            for agent in agents:
                loaded = load_policy(agent)
                label = "/".join(agent.with_suffix("").parts[-3:])  # rounds of several runs have agents of one name
                policies |= {f"{label} + {std:g}" if std else label: Noisy(loaded, std) for std in self.noise}
            compare(policies, task=task, episodes=self.episodes // 2, model=self.model).to_json(path)
        return Comparison.from_json(path)

    def report(
        self,
        trained: dict[str, list[Path]],
        compared: dict[str, Comparison],
        open_loop: dict[str, dict[str, float]],
        doubt: dict[str, dict[str, float]],
    ) -> None:
        """Prints every number beside its bar, and writes the JSON file."""
        rows: list[tuple[str, str, str]] = []
        numbers: dict[str, Any] = {"model": self.model, "agents": {}, "policies": {}, "open_loop": open_loop}
        for task, folders in trained.items():
            firsts = [Comparison.from_json(folder / "returns.json").policies[0] for folder in folders]
            real, dream = ([getattr(first, world).mean for first in firsts] for world in ("real", "dream"))
            bar = "at least {}, aim {}".format(*RETURN_BARS[task]) if task in RETURN_BARS else ""
            rows.append((f"{task}: real return, {len(folders)} seeds", listed(real), bar))
            rows.append((f"{task}: dream return", listed(dream), ""))
            gaps = [d - r for d, r in zip(dream, real, strict=True)]
            rows.append((f"{task}: dream - real", listed(gaps), "under 100, aim 50"))
            numbers["agents"][task] = {"real": real, "dream": dream}
        for task, comparison in compared.items():
            metrics = comparison.metrics
            rows.append(
                (f"{task}: {len(comparison.policies)} policies", comparison.metrics_line(), "0.9, 0.9, under 80")
            )
            numbers["policies"][task] = dict(metrics) | {"count": len(comparison.policies)}
        for name, errors in open_loop.items():
            shown = " / ".join(f"{errors[f'nmse_{step}']:.3f}" for step in (1, 10, 40))
            rows.append((f"open-loop NMSE at 1 / 10 / 40, {name}", shown, "0.03 / 0.12 / 0.8 on experts"))
        for kind, score in doubt.items():
            shown = f"Spearman {score['spearman']:.2f}, ROC area of the worst tenth {score['roc']:.2f}"
            rows.append((f"doubt against ten-step error: {kind}", shown, "0.6, aim 0.8"))
        numbers["doubt"] = doubt
        table = Table(title=f"The truth of {self.model}")
        for column in ("what", "measured", "bar"):
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        if self.output:
            write_atomically(self.output, json.dumps(numbers, indent=2) + "\n")


@dataclass
class Noisy:
    """A policy with Gaussian noise on its actions; each episode has a stream of its own, the same in both worlds."""

    policy: Any
    std: float
    generators: list[np.random.Generator] = field(default_factory=list)

    @property
    def observation_space(self) -> Any:
        """The observation space of the policy."""
        return self.policy.observation_space

    def begin(self, seeds: Sequence[int]) -> None:
        """Starts one stream a slot."""
        self.generators = [np.random.default_rng([seed, 2]) for seed in seeds]

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """See `aime_gym.evaluation.returns.Policy`."""
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        noise = np.stack([rng.standard_normal(actions.shape[1:]) for rng in self.generators])
        return np.clip(actions + self.std * noise, -1, 1).astype(np.float32), state


def listed(values: Sequence[float]) -> str:
    """``"700 [680, 720] (690, 700, 710)"``: mean, interval over seeds, each seed."""
    low, high = bootstrap_interval(np.array(values))
    return f"{np.mean(values):.0f} [{low:.0f}, {high:.0f}] ({', '.join(f'{value:.0f}' for value in values)})"


if __name__ == "__main__":
    tyro.cli(Truth).run()
