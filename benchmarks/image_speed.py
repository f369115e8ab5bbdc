"""How many images a second a dream decodes, against stepping and rendering the real env on the same cores.

`python -m benchmarks.image_speed MODEL` measures both in turns: the dream with all its slots in one process on all
threads, real envs in as many processes as there are threads. Without a model it compares the two renderings of the real
env, full and fast, in one process and in two: seconds of a CPU a frame, which a busy machine leaves as they are, and by
how much their images of the same states differ.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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

    model: Annotated[str, tyro.conf.Positional] = ""
    """A folder or a bundled name of a model of images; none to compare renderings."""
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
        if not self.model:
            self.compare_renderings()
            return
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

    def compare_renderings(self) -> None:
        """Draws the same states in both, in turns, alone and beside each other, and says how much they cost."""
        os.environ["LP_NUM_THREADS"] = "1"  # of llvmpipe, which draws where there is no GPU
        alone: dict[str, list[Drawn]] = {"full": [], "fast": []}
        for _ in range(self.repeats):
            for rendering, draws in alone.items():
                draws += drawn_beside(self.embodiment, rendering, 1)
        beside = {rendering: drawn_beside(self.embodiment, rendering, 2) for rendering in alone}
        cost = {kind: statistics.median(one.seconds for one in draws) for kind, draws in alone.items()}
        cost_of_two = {kind: statistics.mean(one.seconds for one in draws) for kind, draws in beside.items()}
        difference = np.abs(alone["full"][0].frames.astype(float) - alone["fast"][0].frames)
        told = {
            "embodiment": self.embodiment,
            "frames": FRAMES,
            "cpu_milliseconds_a_frame": {kind: 1000 * value for kind, value in cost.items()},
            "times_as_many": cost["full"] / cost["fast"],
            "mean_difference_of_255": float(difference.mean()),
            "largest_difference_of_255": float(difference.max()),
            "two_processes_against_one": {kind: 2 * cost[kind] / cost_of_two[kind] for kind in cost},
        }
        Console().print_json(data=told)
        if self.output:
            write_atomically(self.output, json.dumps(told, indent=2) + "\n")


FRAMES = 120
"""Frames of a timed stretch: states on the way of random actions."""


class Drawn(NamedTuple):
    """What a process drew."""

    seconds: float
    """What a frame takes of a CPU."""
    frames: np.ndarray
    """[FRAMES, 64, 64, 3] uint8."""


def drawn_beside(embodiment: str, rendering: str, processes: int) -> list[Drawn]:
    """What so many processes draw at once, each the same states."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(draw, [embodiment] * processes, [rendering] * processes))


def draw(embodiment: str, rendering: str) -> Drawn:
    """Draws states of the real env, once for warmth and once timed."""
    size: dict[str, Any] = {"render_mode": "rgb_array", "width": 64, "height": 64}
    world: Any = gymnasium.make(REAL, embodiment=embodiment, rendering=rendering, **size)
    world.reset(seed=0)
    world.action_space.seed(0)
    states = []
    for _ in range(FRAMES):
        world.step(world.action_space.sample())
        states.append(world.unwrapped.physics_state)
    for _ in range(2):
        frames, seconds = [], 0.0
        for state in states:
            world.unwrapped.set_physics_state(state)
            begin = time.process_time()
            frames.append(world.unwrapped.render())
            seconds += time.process_time() - begin
    world.close()
    return Drawn(seconds / FRAMES, np.array(frames))


def frames_a_second(envs: gymnasium.vector.VectorEnv, steps: int) -> float:
    """Frames of all slots together, under random actions."""
    sample: Callable[[], np.ndarray] = envs.action_space.sample
    start = time.perf_counter()
    for _ in range(steps):
        envs.step(sample())
    return steps * envs.num_envs / (time.perf_counter() - start)


if __name__ == "__main__":
    tyro.cli(ImageSpeed).run()
