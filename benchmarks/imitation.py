"""The table of imitation: normalised scores of AIME and its baselines, cell by cell, beside the published ones.

A score is the real return in percent of the mean return of the demonstrations. Every cell (row, column, seed) is a run
of `aime-gym imitate` in a folder of its own; the same command again goes on with the cells that are missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from aime_gym.data.demonstrations import expert_return, find_demonstrations
from aime_gym.evaluation.imitate_job import Imitate
from aime_gym.evaluation.metrics import bootstrap_interval
from aime_gym.files import write_atomically

COLUMNS: dict[str, dict[str, Any]] = {
    "AIME": {"algo": "aime"},
    "AIME kl_only": {"algo": "aime", "mode": "kl_only"},
    "AIME with IDM": {"algo": "aime", "use_idm": True},
    "BCO(0)": {"algo": "bco"},
    "IIDM": {"algo": "iidm"},
    "BC": {"algo": "bc"},
}
PUBLISHED = {
    ("stand", "mdp"): (87.8, 87.8),
    ("walk", "mdp"): (78.5, 89.2),
    ("run", "mdp"): (77.4, 59.8),
    ("stand", "lpomdp"): (83.5, 87.1),
    ("walk", "lpomdp"): (80.9, 53.5),
    ("run", "lpomdp"): (62.9, 23.2),
}
"""Task and setup -> AIME and BCO(0) of the paper, embodiment set mix (reference, section 6)."""


@dataclass
class Imitation:
    """Fill the table of imitation scores."""

    models: tuple[str, ...] = ("walker-state",)
    """World models, one a setup: folders or bundled names."""
    demonstrations: tuple[str, ...] = ("walker-walk",)
    """Folders or bundled names; with actions for 'BC'."""
    body_data: tuple[Path, ...] = ()
    """For BCO(0) and IIDM: trajectories of the body with actions."""
    columns: tuple[str, ...] = tuple(COLUMNS)
    """Which agents."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of each cell."""
    updates: int = 2000
    """Of AIME; the baselines, whose updates are small, have ten times as many."""
    episodes: int = 20
    """Of each seed, in the real env."""
    work: Path = Path("runs/imitation")
    """Runs of the cells."""
    picture: Path | None = None
    """Where to draw the table as bars."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Runs missing cells, prints the table and writes it."""
        cells: list[dict[str, Any]] = []
        for model in self.models:
            for name in self.demonstrations:
                for column in self.columns:
                    cells.append(self.cell(model, name, column))
        self.report(cells)

    def cell(self, model: str, demonstrations: str, column: str) -> dict[str, Any]:
        """One cell: its scores [seeds x episodes], in percent of the demonstrations' return."""
        folder = find_demonstrations(demonstrations)
        expert = expert_return(folder)
        scores = []
        setup, task = "", ""
        for seed in self.seeds:
            out = self.work / f"{Path(model).name}-{folder.name}-{column.replace(' ', '-')}-{seed}"
            job = Imitate(
                model=model,
                demonstrations=demonstrations,
                body_data=self.body_data,
                updates=self.updates if column.startswith("AIME") else 10 * self.updates,
                episodes=self.episodes,
                video_steps=0,
                seed=seed,
                out=out,
                **COLUMNS[column],
            )
            if not (out / "returns.json").exists():
                job.run()
            told = json.loads((out / "returns.json").read_text())
            real = next(iter(told["policies"].values()))["real"] if "policies" in told else told["real"]
            scores.append([100 * value / (expert or 1000.0) for value in real["returns"]])
            settings = json.loads((out / "settings.json").read_text())
            setup, task = settings["setup"], settings["task"]
        values = np.array(scores)
        low, high = bootstrap_interval(values.ravel())
        return {
            **{"task": task, "setup": setup, "column": column, "mean": float(values.mean()), "interval": [low, high]},
            **{"seeds": values.mean(1).tolist(), "updates": self.updates, "episodes": self.episodes, "expert": expert},
        }

    def report(self, cells: list[dict[str, Any]]) -> None:
        """Prints, draws and writes the table."""
        table = Table(
            title="Percent of the demonstrations' return: mean [95% interval], seeds", caption="of the real env"
        )
        for column in ("demonstrations", "agent", "score", "seeds", "published"):
            table.add_column(column)
        for cell in cells:
            low, high = cell["interval"]
            published = PUBLISHED.get((cell["task"], cell["setup"]), ("", ""))
            shown = {"AIME": published[0], "BCO(0)": published[1]}.get(cell["column"], "")
            score = rf"{cell['mean']:.0f} \[{low:.0f}, {high:.0f}]"
            seeds = ", ".join(f"{seed:.0f}" for seed in cell["seeds"])
            table.add_row(f"{cell['task']}, {cell['setup']}", cell["column"], score, seeds, str(shown))
        Console().print(table)
        if self.output:
            write_atomically(self.output, json.dumps({"cells": cells}, indent=2) + "\n")
        if self.picture:
            figure = Figure(figsize=(7, 0.5 + 0.32 * len(cells)), layout="constrained")
            axes = figure.subplots()
            labels = [f"{cell['task']}, {cell['setup']}: {cell['column']}" for cell in cells]
            means = np.array([cell["mean"] for cell in cells])
            bounds = np.abs(np.array([cell["interval"] for cell in cells]) - means[:, None]).T
            axes.barh(labels, means, xerr=bounds)
            axes.invert_yaxis()
            axes.set_xlabel("percent of the demonstrations' return")
            figure.savefig(self.picture, dpi=110)


if __name__ == "__main__":
    tyro.cli(Imitation).run()
