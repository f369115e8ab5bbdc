"""How many images a second a dream decodes, against stepping and rendering the real env on the same cores.

`python -m benchmarks.image_speed MODEL` measures both in turns: the dream with all its slots in one process on all
threads, real envs in as many processes as there are threads.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from aime_gym import DREAM, REAL
from aime_gym.files import write_atomically


@dataclass
class ImageSpeed:
    """Compare images a second of the dream and of the real env."""

    model: Annotated[str, tyro.conf.Positional]
    """A folder or a bundled name of a model of images."""
    embodiment: str = "walker"
    """Its body."""
    slots: int = 64
    """Dreams side by side."""
    repeats: int = 5
    """Timed stretches of each kind, taken in turns."""
    threads: int = 2
    """CPU threads of the dream, and processes of the real env."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`."""
        torch.set_num_threads(self.threads)
        names: dict[str, Any] = {"embodiment": self.embodiment, "obs_type": "image"}
        dream = gymnasium.make_vec(DREAM, num_envs=self.slots, model=self.model, **names)
        world = gymnasium.make_vec(REAL, num_envs=self.threads, vectorization_mode="async", **names)
        rates: dict[str, list[float]] = {"dream": [], "real env": []}
        for envs in (dream, world):
            envs.reset(seed=0)
            frames_a_second(envs, 5)
        for _ in range(self.repeats):
            rates["dream"].append(frames_a_second(dream, 40))
            rates["real env"].append(frames_a_second(world, 60))
        dream.close()
        world.close()
        medians = {kind: statistics.median(values) for kind, values in rates.items()}
        table = Table(title=f"Images a second, {self.model}, {self.slots} slots, {self.threads} threads")
        for column in ("kind", "median", "lowest to highest", "ratio"):
            table.add_column(column, justify="left" if column == "kind" else "right")
        for kind, values in rates.items():
            ratio = medians[kind] / medians["real env"]
            table.add_row(kind, f"{medians[kind]:,.0f}", f"{min(values):,.0f} to {max(values):,.0f}", f"{ratio:.1f}")
        Console().print(table)
        if self.output:
            told = {"model": self.model, "slots": self.slots, "threads": self.threads, "rates": rates}
            write_atomically(self.output, json.dumps(told | {"median": medians}, indent=2) + "\n")


def frames_a_second(envs: gymnasium.vector.VectorEnv, steps: int) -> float:
    """Frames of all slots together, under random actions."""
    sample: Callable[[], np.ndarray] = envs.action_space.sample
    start = time.perf_counter()
    for _ in range(steps):
        envs.step(sample())
    return steps * envs.num_envs / (time.perf_counter() - start)


if __name__ == "__main__":
    tyro.cli(ImageSpeed).run()
