"""How fast the real env parts from itself: replays of the same actions from states that are a little off.

An open-loop prediction can be no better than the world's own replay from as good an estimate of the state. This says
how good that is: the error of a dream after 40 steps counts against the error here, not against zero.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium
import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from aime_gym import REAL
from aime_gym.data.dataset import BURN_IN, TrajectoryDataset, split_indices
from aime_gym.envs.real import RealEnv
from aime_gym.files import write_atomically
from aime_gym.training.model_folder import STEPS, prediction_error
from aime_gym.world_model.checkpoint import load_pretrained_model


@dataclass
class Divergence:
    """Measure open-loop errors (NMSE) of the real env from perturbed states, beside those of a model."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trajectories with physics."""
    model: str = "walker-state"
    """The model beside it: a folder or a bundled name."""
    offsets: tuple[float, ...] = (1e-8, 1e-6, 1e-4, 1e-2)
    """Squared errors of the first state, in variances of the data."""
    windows: int = 100
    """Windows of each data set."""
    seed: int = 0
    """Draws windows and errors."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Prints one table and writes it."""
        model = load_pretrained_model(self.model)
        rows: list[dict[str, object]] = []
        for folder in self.datasets:
            whole = TrajectoryDataset(folder)
            held = whole.subset(split_indices(len(whole))[1])
            errors = prediction_error(model, held, windows=self.windows, seed=self.seed)
            rows.append({"data": folder.name, "what": self.model, "nmse": [errors[f"nmse_{step}"] for step in STEPS]})
            for offset in self.offsets:
                nmse = self.replay(held, offset)
                rows.append({"data": folder.name, "what": f"real env, first state off by {offset:g}", "nmse": nmse})
        table = Table(title=f"open-loop NMSE, {self.windows} windows", caption="1 is what predicting the mean scores")
        for column in ("data", "prediction", *(f"step {step}" for step in STEPS)):
            table.add_column(column)
        for row in rows:
            table.add_row(str(row["data"]), str(row["what"]), *(f"{value:.3g}" for value in row["nmse"]))  # type: ignore[attr-defined]
        Console(width=110).print(table)
        if self.output:
            write_atomically(self.output, json.dumps({"windows": self.windows, "rows": rows}, indent=2) + "\n")

    def replay(self, dataset: TrajectoryDataset, offset: float) -> list[float]:
        """NMSE of all sensors after 1, 10 and 40 steps of the real env from states with Gaussian errors."""
        rng = np.random.default_rng(self.seed)
        window = dataset.sample_windows(self.windows, BURN_IN + max(STEPS), np.random.default_rng(self.seed))
        body = dataset.body
        assert body is not None
        world = gymnasium.make(REAL, embodiment=body.name).unwrapped
        assert isinstance(world, RealEnv)
        names = [sensor.name for sensor in body.sensors]
        _, std = dataset.statistics(names)
        physics = dataset.arrays["physics"][np.concatenate([np.arange(*bounds) for bounds in dataset.bounds])]
        scale = physics.std(0) * np.sqrt(offset)
        scale[list(body.translations)] = 0.0  # where the body is matters to nothing
        squares: dict[int, list[NDArray[np.float64]]] = {step: [] for step in STEPS}
        world.reset(seed=0)
        for i in range(self.windows):
            state = window["physics"][BURN_IN - 1, i]
            world.set_physics_state(state + scale * rng.standard_normal(len(state)))
            for step in range(1, max(STEPS) + 1):
                row = BURN_IN - 1 + step
                world.step(window["pre_action"][row, i])
                if step in squares:
                    readings = world.readings()
                    off = [(readings[n] - window[n][row, i]) / np.maximum(std[n], 1e-5) for n in names]
                    squares[step].append(np.concatenate(off).astype(np.float64) ** 2)
        return [float(np.mean(squares[step])) for step in STEPS]


if __name__ == "__main__":
    tyro.cli(Divergence).run()
