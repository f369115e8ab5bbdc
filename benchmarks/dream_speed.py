"""How many steps a second dreams make: through Gymnasium, against a loop written by hand.

The hand-rolled loop steps the same model in eager float32: noise, prior, means and standard deviations of all decoders,
reward. Both get actions and give observations and rewards as NumPy arrays, and are measured in turns. One slot goes
through `gymnasium.make` with all its wrappers, more through `gymnasium.make_vec`. On one thread the seconds are those
of the CPU, so that other processes hardly matter.
Run `python -m benchmarks.dream_speed`; against another checkout of this repository, which steps in a process of its own
in turns with this one, `python -m benchmarks.dream_speed --against PATH --model FOLDER`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import aime_gym  # noqa: F401 - registers the ids
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model
from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel

CELLS = ("rssm", "rssmo")
OTHER = """
import sys, time
from pathlib import Path
import torch
from aime_gym.world_model.checkpoint import load_pretrained_model
from benchmarks.dream_speed import dream

folder, task, slots, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
step = dream(load_pretrained_model(Path(folder)), task, int(slots), "32-true")
clock = time.process_time if threads == "1" else time.perf_counter
for _ in range(9):
    step()
for line in sys.stdin:
    start = clock()
    for _ in range(int(line)):
        step()
    print(clock() - start, flush=True)
"""
"""What the other checkout runs: its own benchmark's `dream`."""
BARS = {"1024": "at least 2x by hand", "1": "at least 2000 steps/s"}


@dataclass
class DreamSpeed:
    """Compare the speed of dreams with that of a hand-rolled loop over the same model."""

    model: str = "walker-state"
    """A folder or a bundled name of a walker model with heads and starts; or ``rssm`` or ``rssmo``: random weights in
    the released architecture, whose decoders of an rssm have standard deviations."""
    task: str = "walk"
    """The task whose reward is predicted."""
    slots: tuple[int, ...] = (1, 16, 128, 1024)
    """Numbers of slots to measure."""
    repeats: int = 9
    """Timed stretches of each kind, taken in turns."""
    seconds: float = 0.4
    """About how long one stretch takes."""
    threads: int = 1
    """CPU threads."""
    doubt: bool = False
    """Also measure dreams with doubt."""
    against: Path | None = None
    """Another checkout, whose dreams of the same model (a folder, then) are measured in turns, in float32 as ours."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`.

        Raises:
            AimeGymError: If the other checkout is to dream with a model that is no folder.
        """
        torch.set_num_threads(self.threads)
        if self.against is not None and not Path(self.model).is_dir():
            raise AimeGymError(f"Two checkouts may bundle different weights: give --model a folder, not {self.model}.")
        with tempfile.TemporaryDirectory() as folder:
            released = self.model in CELLS
            model = load_pretrained_model(write_random_model(Path(folder), self.model) if released else self.model)
            name = f"random weights in a released {self.model}" if released else self.model
            results = {str(slots): self.measure(model, slots) for slots in self.slots}
        self.report(name, results)

    def measure(self, model: WorldModel, slots: int) -> dict[str, list[float]]:
        """Steps a second, all slots together, of every stretch of every kind."""
        loops: dict[str, Callable[[], object]] = {"by hand": by_hand(model, self.task, slots)}
        for precision in ("auto",) if slots == 1 else ("auto", "32-true"):
            loops[f"dream, {precision}"] = dream(model, self.task, slots, precision)
        if self.doubt:
            loops["dream with doubt, 32-true"] = dream(model, self.task, slots, "32-true", doubt=True)
        calls = {kind: calls_in(step, self.seconds) for kind, step in loops.items()}
        rates: dict[str, list[float]] = {kind: [] for kind in loops}
        clock = time.process_time if self.threads == 1 else time.perf_counter
        other = None if self.against is None else self.other_checkout(slots)
        for _ in range(self.repeats):
            for kind, step in loops.items():
                start = clock()
                for _ in range(calls[kind]):
                    step()
                rates[kind].append(slots * calls[kind] / (clock() - start))
            if other is not None and other.stdin and other.stdout:
                steps = calls["dream, auto"]
                other.stdin.write(f"{steps}\n")
                other.stdin.flush()
                rates.setdefault("dream, other checkout", []).append(slots * steps / float(other.stdout.readline()))
        if other is not None:
            other.communicate()
        return rates

    def other_checkout(self, slots: int) -> subprocess.Popen[str]:
        """A process of the other checkout that takes as many steps as a line says, and answers with the seconds."""
        arguments = [str(Path(self.model).resolve()), self.task, str(slots), str(self.threads)]
        environment = {**os.environ, "PYTHONPATH": str(self.against)}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-W", "ignore", "-c", OTHER, *arguments]
        return subprocess.Popen(command, cwd=self.against, env=environment, **pipes)

    def report(self, name: str, results: dict[str, dict[str, list[float]]]) -> None:
        """Prints the table and writes the JSON file."""
        table = Table(title=f"Steps a second: {name}, {self.task}, {self.threads} thread(s)")
        for column in ("slots", "kind", "median", "lowest to highest", "ratio to by hand", "bar"):
            table.add_column(column, justify="left" if column in ("kind", "bar") else "right")
        medians = {n: {kind: statistics.median(r) for kind, r in rates.items()} for n, rates in results.items()}
        ratios = {n: {kind: m / kinds["by hand"] for kind, m in kinds.items()} for n, kinds in medians.items()}
        for slots, rates in results.items():
            for kind, values in rates.items():
                bar = BARS.get(slots, "") if kind == "dream, auto" else ""
                spread = f"{min(values):,.0f} to {max(values):,.0f}"
                table.add_row(slots, kind, f"{medians[slots][kind]:,.0f}", spread, f"{ratios[slots][kind]:.2f}", bar)
        Console().print(table)
        if self.output:
            result = {
                "model": name,
                "threads": self.threads,
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "steps_per_second": results,
                "median": medians,
                "ratio": ratios,
            }
            self.output.write_text(json.dumps(result, indent=2) + "\n")


def by_hand(model: WorldModel, task: str, slots: int) -> Callable[[], object]:
    """One step of the loop that anyone would write."""
    state = model.initial_state(slots)
    generator = torch.Generator().manual_seed(0)
    actions = random_actions(model, slots)

    @torch.no_grad()
    def step() -> object:
        nonlocal state
        noise = torch.randn(slots, model.config.stochastic_dim, generator=generator)
        state = model.prior_step(state, torch.from_numpy(actions), noise)
        decoded = {name: decoder(state) for name, decoder in model.decoders.items()}
        stds = {name: normal.std.expand_as(normal.mean).numpy() for name, normal in decoded.items()}
        means = {
            name: (model.normaliser[name].inverse(normal.mean) if name in model.normaliser else normal.mean)  # type: ignore[operator]
            for name, normal in decoded.items()
        }
        observation = torch.cat(list(means.values()), 1).numpy()
        assert model.heads is not None
        return observation, stds, model.heads.reward(state, task).numpy()

    return step


def dream(model: WorldModel, task: str, slots: int, precision: str, **options: Any) -> Callable[[], object]:
    """One step of the dream."""
    options |= {"task": task, "model": model, "precision": precision}
    if slots == 1:
        env = gymnasium.make("AimeDream-Walker-v0", **options)
        action = random_actions(model, 1)[0]
        env.reset(seed=0)

        def step_one() -> object:
            result = env.step(action)
            if result[3]:
                env.reset()
            return result

        return step_one
    envs = gymnasium.make_vec("AimeDream-Walker-v0", num_envs=slots, **options)
    actions = random_actions(model, slots)
    envs.reset(seed=0)
    return lambda: envs.step(actions)


def random_actions(model: WorldModel, slots: int) -> np.ndarray:
    """Uniform, [N, A]."""
    return np.random.default_rng(0).uniform(-1, 1, (slots, model.config.action_dim)).astype(np.float32)


def calls_in(step: Callable[[], object], seconds: float) -> int:
    """How many calls take about `seconds`."""
    for _ in range(3):
        step()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds / 4:
        step()
        count += 1
    return max(1, 4 * count)


def write_random_model(folder: Path, cell: str) -> Path:
    """A model that knows nothing, with heads and starts."""
    walker = get_embodiment("walker")
    config = ModelConfig.for_embodiment(walker, "mdp", cell, probes={}, idm_mode="none")
    torch.manual_seed(0)
    model = WorldModel(config)
    dim = sum(sensor.dim for sensor in walker.sensors)
    model.heads = Heads(config.feature_dim, walker.action_dim, walker.tasks, walker.name, dim, 9, 9, hidden_size=256)
    save_model(model, folder)
    rng = np.random.default_rng(0)
    shapes = {sensor.name: sensor.dim for sensor in walker.sensors} | {"pre_action": walker.action_dim}
    frames = {name: rng.uniform(-1, 1, (10, 64, dim)).astype(np.float32) for name, dim in shapes.items()}
    np.savez(folder / "starts.npz", is_reset=np.ones(64, bool), **frames)  # type: ignore[arg-type]
    return folder


if __name__ == "__main__":
    tyro.cli(DreamSpeed).run()
