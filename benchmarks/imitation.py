"""The table of imitation: normalised scores of AIME and its baselines, cell by cell, beside the published ones.

A score is the real return, from resets of the env, in percent of the mean return of the demonstrations. Every cell
(row, column) has a run of `aime-gym imitate` for each seed, in a folder of its own; the same command again goes on with
those that are neither there nor in the JSON file of an earlier table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from aime_gym.commands.imitate import Imitate
from aime_gym.data.demonstrations import expert_return, find_demonstrations
from aime_gym.evaluation.returns import bootstrap_interval
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
"""Task and setup -> AIME and BCO(0) of the paper (Zhang et al., NeurIPS 2023), embodiment set mix."""


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
    """Seeds of each cell; all cells have one before any has two."""
    updates: int = 2000
    """Updates of AIME; the baselines, whose updates are small, have ten times as many."""
    episodes: int = 20
    """Episodes of each seed, in the real env."""
    learn: bool = True
    """Run the cells that are missing; without it, the table is of those that are there."""
    work: Path = Path("runs/imitation")
    """Runs of the cells."""
    picture: Path | None = None
    """Where to draw the table as bars."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Runs what is missing, prints the table and writes it."""
        cells = list(product(self.models, self.demonstrations, self.columns))
        earlier = json.loads(self.output.read_text())["cells"] if self.output and self.output.exists() else []
        known = {(cell["model"], cell["demonstrations"], cell["column"]): cell for cell in earlier}
        if self.learn:
            for seed, cell in product(self.seeds, cells):
                if str(seed) not in self.scores(*cell, known).get("returns", {}):
                    self.imitate(*cell, seed)
        for cell in cells:
            scores = self.scores(*cell, known)
            known.update({(scores["model"], scores["demonstrations"], scores["column"]): scores} if scores else {})
        self.report(list(known.values()))

    def folder(self, model: str, demonstrations: str, column: str, seed: int) -> Path:
        """The folder of a cell's run."""
        shown = find_demonstrations(demonstrations).name
        return self.work / f"{Path(model).name}-{shown}-{column.replace(' ', '-')}-{seed}"

    def imitate(self, model: str, demonstrations: str, column: str, seed: int) -> None:
        """One run of one cell."""
        Imitate(
            model=model,
            demonstrations=demonstrations,
            body_data=self.body_data,
            updates=self.updates if column.startswith("AIME") else 10 * self.updates,
            episodes=self.episodes,
            video_steps=0,
            seed=seed,
            out=self.folder(model, demonstrations, column, seed),
            **COLUMNS[column],
        ).run()

    def scores(
        self, model: str, demonstrations: str, column: str, known: dict[tuple[str, str, str], dict[str, Any]]
    ) -> dict[str, Any]:
        """What a cell's agents earn, in percent of the demonstrations' return; empty if none has run.

        Args:
            model: The model of the row.
            demonstrations: The demonstrations of the row.
            column: The column of the cell.
            known: Cells of an earlier table; runs that are there replace their seeds, or, where the demonstrations are
                others now, all of them.
        """
        shown = find_demonstrations(demonstrations)
        names = Path(model).name, shown.name, column
        cell = known.get(names, {})
        returns, expert = dict(cell.get("returns", {})), expert_return(shown) or 1000.0
        for seed in self.seeds:
            out = self.folder(model, demonstrations, column, seed)
            if (out / "score.json").exists():
                real = json.loads((out / "score.json").read_text())
                returns = returns if cell.get("expert") == expert else {}
                returns[str(seed)] = [round(100 * value / expert, 1) for value in real["returns"]]
                settings = json.loads((out / "settings.json").read_text())
                cell = {
                    **{"model": names[0], "demonstrations": names[1], "column": column, "expert": expert},
                    **{"task": settings["task"], "setup": settings["setup"], "updates": settings["updates"]},
                }
        if not returns:
            return {}
        values = np.concatenate(list(returns.values()))
        low, high = bootstrap_interval(values)
        return cell | {"mean": float(values.mean()), "interval": [low, high], "returns": returns}

    def report(self, cells: list[dict[str, Any]]) -> None:
        """Prints, draws and writes the table."""
        table = Table(title="Percent of the demonstrations' real return: mean [95% interval]")
        for name in ("", *self.columns, "paper: AIME", "paper: BCO(0)"):
            table.add_column(name)
        rows = list(dict.fromkeys((cell["task"], cell["setup"]) for cell in cells))
        found = {(cell["task"], cell["setup"], cell["column"]): cell for cell in cells}
        for task, setup in rows:
            shown = [_shown(found.get((task, setup, column))) for column in self.columns]
            published = (str(score) for score in PUBLISHED.get((task, setup), ("", "")))
            table.add_row(f"{task}, {setup}", *shown, *published)
        Console().print(table)
        if self.output:
            lines = ",\n".join(json.dumps(cell) for cell in cells)
            write_atomically(self.output, f'{{"cells": [\n{lines}\n]}}\n')
        if self.picture:
            self.draw(rows, found)

    def draw(self, rows: list[tuple[str, str]], found: dict[tuple[str, str, str], dict[str, Any]]) -> None:
        """Bars: a group for each row, and the paper's scores as marks."""
        assert self.picture is not None
        figure = Figure(figsize=(1.5 + 1.5 * len(rows), 3.6), layout="constrained")
        axes = figure.subplots()
        width = 0.85 / len(self.columns)
        for index, column in enumerate(self.columns):
            drawn = [(row, found[*key, column]) for row, key in enumerate(rows) if (*key, column) in found]
            if not drawn:
                continue
            places = [row + (index - (len(self.columns) - 1) / 2) * width for row, _ in drawn]
            means = np.array([cell["mean"] for _, cell in drawn])
            ends = np.array([cell["interval"] for _, cell in drawn])
            axes.bar(
                places, means, width, yerr=np.abs(ends - means[:, None]).T, label=column, error_kw={"linewidth": 1}
            )
            paper = {"AIME": 0, "BCO(0)": 1}.get(column)
            if paper is not None:
                scores = [PUBLISHED[rows[row]][paper] if rows[row] in PUBLISHED else np.nan for row, _ in drawn]
                axes.plot(places, scores, "k_", markersize=9, label="the paper's" if paper == 0 else None)
        axes.set_xticks(range(len(rows)), [f"{task}\n{setup}" for task, setup in rows])
        axes.set_ylabel("percent of the demonstrations' return")
        figure.legend(loc="outside upper center", ncols=len(self.columns) + 1, fontsize=8, frameon=False)
        figure.savefig(self.picture, dpi=110)


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    low, high = cell["interval"]
    seeds = len(cell["returns"])
    return rf"{cell['mean']:.0f} \[{low:.0f}, {high:.0f}], {seeds} {'seeds' if seeds > 1 else 'seed'}"


if __name__ == "__main__":
    tyro.cli(Imitation).run()
