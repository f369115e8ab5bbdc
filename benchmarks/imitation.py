"""The table of imitation: normalised scores of AIME and its baselines, cell by cell, beside the published ones.

A score is the real return, from resets of the env, in percent of the mean return of the demonstrations. Every cell
(row, column) has a run of `aime-gym imitate` for each seed, in a folder of its own; the same command again goes on with
those that are neither there nor in the JSON file of an earlier table.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from aime_gym.commands.imitate import Imitate
from aime_gym.data.demonstrations import expert_return, find_demonstrations
from aime_gym.data.trajectories import read_metadata, trajectory_keys, trajectory_paths
from aime_gym.evaluation.returns import bootstrap_interval
from aime_gym.files import write_atomically
from aime_gym.parallel import claimed, make_console, so_many_threads
from aime_gym.world_model.checkpoint import load_config

COLUMNS: dict[str, dict[str, Any]] = {
    "AIME": {"algo": "aime"},
    "AIME kl_only": {"algo": "aime", "mode": "kl_only"},
    "AIME with IDM": {"algo": "aime", "use_idm": True},
    "BCO(0)": {"algo": "bco"},
    "IIDM": {"algo": "iidm"},
    "BC": {"algo": "bc"},
    "OnlineAIME": {"algo": "online"},
}
PUBLISHED = {
    ("walker", "stand", "mdp"): (87.8, 87.8),
    ("walker", "walk", "mdp"): (78.5, 89.2),
    ("walker", "run", "mdp"): (77.4, 59.8),
    ("walker", "stand", "lpomdp"): (83.5, 87.1),
    ("walker", "walk", "lpomdp"): (80.9, 53.5),
    ("walker", "run", "lpomdp"): (62.9, 23.2),
    ("cheetah", "run", "mdp"): (79.3, 27.3),
    ("cheetah", "runbackward", "mdp"): (100.5, 94.3),
    ("cheetah", "flip", "mdp"): (95.9, 42.9),
    ("cheetah", "flipbackward", "mdp"): (77.2, 82.5),
    ("cheetah", "run", "lpomdp"): (44.5, 24.9),
    ("cheetah", "runbackward", "lpomdp"): (97.9, 89.9),
    ("cheetah", "flip", "lpomdp"): (33.4, 25.0),
    ("cheetah", "flipbackward", "lpomdp"): (51.5, 45.6),
}
"""Body, task and setup -> AIME and BCO(0) of the paper (Zhang et al., NeurIPS 2023): walker from the data set mix,
cheetah from the buffer of the task itself."""

Row = tuple[str, str, str]
"""Body, task and setup."""


class Cell(NamedTuple):
    """What is measured: an agent that learned from some demonstrations with a model."""

    model: str
    demonstrations: str
    column: str


@dataclass
class Imitation:
    """Fill the table of imitation scores."""

    models: tuple[str, ...] = ("walker-state",)
    """World models, folders or bundled names. A cell takes the first one of its body and setup, and of 'AIME with IDM'
    the first with an inverse dynamics model."""
    demonstrations: tuple[str, ...] = ("walker-walk", "walker-run")
    """Folders or bundled names, of any bodies; with actions for 'BC'."""
    body_data: tuple[Path, ...] = ()
    """For BCO(0) and IIDM: trajectories of the bodies with actions, those that the models had."""
    columns: tuple[str, ...] = tuple(name for name in COLUMNS if name != "OnlineAIME")
    """Which agents; 'OnlineAIME' goes on from 'AIME' in the real env, and its curve is in the JSON file."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each cell; all cells have one before any has two."""
    updates: int = 2000
    """Updates of AIME; the baselines, whose updates are small, have ten times as many. Of OnlineAIME those before its
    first real step."""
    steps: int = 25_000
    """Real agent steps of OnlineAIME."""
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
        cells = self.cells()
        earlier = json.loads(self.output.read_text())["cells"] if self.output and self.output.exists() else []
        known = {Cell(cell["model"], cell["demonstrations"], cell["column"]): cell for cell in earlier}
        if self.learn:
            for seed, cell in product(self.seeds, cells):
                if str(seed) not in self.scores(cell, known).get("returns", {}):
                    self.imitate(cell, seed)
        for cell in cells:
            scores = self.scores(cell, known)
            known.update({_names(cell): scores} if scores else {})
        self.report(list(known.values()))

    def cells(self) -> list[Cell]:
        """The cells that can be filled, row by row; what the others lack is said."""
        configs = {model: load_config(model) for model in self.models}
        cells = []
        for shown, setup in product(self.demonstrations, dict.fromkeys(config.setup for config in configs.values())):
            folder = find_demonstrations(shown)
            body = read_metadata(folder)["embodiment"]
            fitting = [name for name, own in configs.items() if (own.embodiment, own.setup) == (body, setup)]
            for column in self.columns if fitting else ():
                able = [
                    name for name in fitting if not COLUMNS[column].get("use_idm") or configs[name].idm_mode != "none"
                ]
                lacks = "" if able else "no model has an inverse dynamics model"
                if COLUMNS[column]["algo"] in ("bco", "iidm") and not self.data_of(body):
                    lacks = "no --body-data are of the body"
                if column == "BC" and any(
                    "pre_action" not in trajectory_keys(path) for path in trajectory_paths(folder)
                ):
                    lacks = "the demonstrations have no actions"
                if lacks:
                    print(f"{folder.name}, {setup}, {column}: {lacks}.")
                else:
                    cells.append(Cell(able[0], shown, column))
        return cells

    def data_of(self, body: str) -> tuple[Path, ...]:
        """The data of a body."""
        return tuple(folder for folder in self.body_data if read_metadata(folder).get("embodiment") == body)

    def folder(self, cell: Cell, seed: int) -> Path:
        """The folder of a cell's run."""
        model, shown, column = _names(cell)
        return self.work / f"{model}-{shown}-{column.replace(' ', '-')}-{seed}"

    def imitate(self, cell: Cell, seed: int) -> None:
        """One run of one cell."""
        out, console = self.folder(cell, seed), make_console(soft_wrap=True, highlight=False)
        job = Imitate(
            model=cell.model,
            demonstrations=cell.demonstrations,
            body_data=self.data_of(load_config(cell.model).embodiment),
            updates=self.updates * (1 if "AIME" in cell.column else 10),
            steps=self.steps,
            episodes=self.episodes,
            seed=seed,
            **COLUMNS[cell.column],
        )
        with so_many_threads(1), claimed(out):
            agent, task, _ = job.learn(out, console)
            real = job.score(agent, out, task)
        console.print(f"{out}: {real.mean:.4g} at {task}.", markup=False)

    def scores(self, cell: Cell, known: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
        """What a cell's agents earn, in percent of the demonstrations' return; empty if none has run.

        Args:
            cell: The cell.
            known: Cells of an earlier table; runs that are there replace their seeds, or, where the demonstrations are
                others now, all of them.
        """
        names, expert = _names(cell), expert_return(find_demonstrations(cell.demonstrations)) or 1000.0
        found = known.get(names, {})
        returns = dict(found.get("returns", {}))
        for seed in self.seeds:
            out = self.folder(cell, seed)
            if (out / "score.json").exists():
                real = json.loads((out / "score.json").read_text())
                returns = returns if found.get("expert") == expert else {}
                returns[str(seed)] = [round(100 * value / expert, 1) for value in real["returns"]]
                settings = json.loads((out / "settings.json").read_text())
                curves = dict(found.get("curves", {})) | _curve(str(seed), out / "run" / "progress.csv", expert)
                found = {
                    **({"curves": curves} if curves else {}),
                    **{**names._asdict(), "expert": expert, "embodiment": load_config(cell.model).embodiment},
                    **{"task": settings["task"], "setup": settings["setup"], "updates": settings["updates"]},
                }
        if not returns:
            return {}
        values = np.concatenate(list(returns.values()))
        low, high = bootstrap_interval(values)
        return found | {"mean": float(values.mean()), "interval": [low, high], "returns": returns}

    def report(self, cells: list[dict[str, Any]]) -> None:
        """Prints, draws and writes the table."""
        table = Table(title="Percent of the demonstrations' real return: mean [95% interval]")
        for name in ("", *self.columns, "paper: AIME", "paper: BCO(0)"):
            table.add_column(name)
        found = {(*_row(cell), cell["column"]): cell for cell in cells}
        rows = list(dict.fromkeys(map(_row, cells)))
        for row in rows:
            shown = [_shown(found.get((*row, column))) for column in self.columns]
            published = (str(score) for score in PUBLISHED.get(row, ("", "")))
            table.add_row("{} {}, {}".format(*row), *shown, *published)
        Console().print(table)
        if self.output:
            lines = ",\n".join(json.dumps(cell) for cell in cells)
            write_atomically(self.output, f'{{"cells": [\n{lines}\n]}}\n')
        if self.picture:
            self.draw(rows, found)

    def draw(self, rows: list[Row], found: dict[tuple[str, str, str, str], dict[str, Any]]) -> None:
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
        axes.set_xticks(range(len(rows)), [f"{body}\n{task}\n{setup}" for body, task, setup in rows])
        axes.set_ylabel("percent of the demonstrations' return")
        figure.legend(loc="outside upper center", ncols=len(self.columns) + 1, fontsize=8, frameon=False)
        figure.savefig(self.picture, dpi=110)


def _curve(seed: str, log: Path, expert: float) -> dict[str, list[tuple[int, float]]]:
    """Real agent steps, and the mean return of the ten sampled episodes before, in percent of the demonstrations'."""
    if not log.exists():
        return {}
    with log.open(newline="") as file:
        rows = [(int(row["time/total_timesteps"]), float(row["rollout/ep_rew_mean"])) for row in csv.DictReader(file)]
    return {seed: [(steps, round(100 * earned / expert, 1)) for steps, earned in rows]}


def _names(cell: Cell) -> Cell:
    """A cell as files name it, without the places of folders."""
    return Cell(Path(cell.model).name, find_demonstrations(cell.demonstrations).name, cell.column)


def _row(cell: dict[str, Any]) -> Row:
    return cell.get("embodiment", "walker"), cell["task"], cell["setup"]  # earlier tables were of the walker alone


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    low, high = cell["interval"]
    seeds = len(cell["returns"])
    return rf"{cell['mean']:.0f} \[{low:.0f}, {high:.0f}], {seeds} {'seeds' if seeds > 1 else 'seed'}"


if __name__ == "__main__":
    tyro.cli(Imitation).run()
