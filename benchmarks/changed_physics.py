"""Does the evidence notice that the world has changed? A walker, and walkers with a heavier torso.

An agent acts in each world; the mean evidence of a window of steps is the signal, and the ROC curve says how well it
tells windows of a changed world from those of the original one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

import aime_gym
from aime_gym.envs.wrappers import SETTLING
from aime_gym.evaluation.returns import load_policy
from benchmarks.doubt import roc_area


@dataclass
class ChangedPhysics:
    """Tell a walker from one with a heavier torso by the evidence of what it shows."""

    agent: str
    """A saved SB3 agent that acts in every world, or 'random'."""
    model: str = "walker-state"
    """A folder or a bundled name of a walker model."""
    masses: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)
    """Factors on the mass of the torso."""
    episodes: int = 10
    """In each world."""
    window: int = 25
    """Steps over which the evidence is averaged."""
    seed: int = 0
    """Seed of the episodes; the worlds have the same ones."""
    picture: Path | None = None
    """Where to draw the ROC curves."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, draws and writes."""
        usual, share = self.measure(1.0)
        table = Table(title=f"{self.model}: windows of {self.window} steps, {self.episodes} episodes in each world")
        for column in ("torso mass", "evidence a step, nats", "steps flagged", "ROC area"):
            table.add_column(column, justify="right")
        table.add_row("1", f"{usual.mean():.1f}", f"{share:.1%}", "")
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        axes = figure.subplots()
        results = {}
        for mass in self.masses:
            changed, share = self.measure(mass)
            signal = -np.concatenate([usual, changed])
            positive = np.arange(len(signal)) >= len(usual)
            area = roc_area(signal, positive)
            results[str(mass)] = {"evidence": float(changed.mean()), "flagged": share, "roc": area}
            table.add_row(f"{mass:g}", f"{changed.mean():.1f}", f"{share:.1%}", f"{area:.2f}")
            order = positive[np.argsort(-signal)]
            axes.plot(
                np.cumsum(~order) / (~order).sum(), np.cumsum(order) / order.sum(), label=f"{mass:g}x ({area:.2f})"
            )
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(xlabel="share of unchanged windows flagged", ylabel="share of changed windows flagged")
        axes.legend(title="torso mass (area)", frameon=False)
        Console().print(table)
        if self.picture:
            figure.savefig(self.picture, dpi=110)
        if self.output:
            self.output.write_text(
                json.dumps({"model": self.model, "agent": self.agent, "masses": results}, indent=2) + "\n"
            )

    def measure(self, mass: float) -> tuple[NDArray[np.float64], float]:
        """The mean evidence of each window [W] in a world with that torso, and the share of steps flagged."""
        world = gymnasium.make("AimeReal-Walker-v0", task="walk")
        env = aime_gym.Evidence(world, self.model)
        torso = env.unwrapped.physics.named.model.body_mass  # type: ignore[attr-defined]
        torso["torso"] *= mass
        policy = load_policy(self.agent)
        rng = np.random.default_rng(self.seed)
        windows, flags = [], []
        for episode in track(range(self.episodes), f"torso {mass:g}x", transient=True):
            observation, _ = env.reset(seed=self.seed + episode)
            steps, ended = [], False
            while not ended:
                if policy == "random":
                    action = rng.uniform(-1, 1, 6).astype(np.float32)
                else:
                    action = policy.predict(observation, deterministic=True)[0]  # type: ignore[union-attr]
                observation, _, terminated, truncated, info = env.step(action)
                steps.append(info["evidence"])
                flags.append(info["unexplained"])
                ended = terminated or truncated
            settled = np.array(steps[SETTLING:])
            settled = settled[: len(settled) // self.window * self.window]
            windows.append(settled.reshape(-1, self.window).mean(1))
        env.close()
        return np.concatenate(windows), float(np.mean(flags))


if __name__ == "__main__":
    tyro.cli(ChangedPhysics).run()
