"""How many steps a second dreams make: through Gymnasium, against a loop written by hand.

The hand-rolled loop steps the same model in eager float32: noise, prior, means and standard deviations of all decoders,
reward. Both get actions and give observations and rewards as NumPy arrays, and are measured in turns. One slot goes
through `gymnasium.make` with all its wrappers, more through `gymnasium.make_vec`.
Run `python -m benchmarks.dream_speed`.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import aime_gym  # noqa: F401 - registers the ids
from aime_gym.embodiments import get_embodiment
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model
from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel

CELLS = ("rssm", "rssmo")
BARS = {"1024": "at least 2x by hand", "1": "at least 2000 steps/s"}


@dataclass
class DreamSpeed:
    """Compare the speed of dreams with that of a hand-rolled loop over the same model."""

    model: str = "walker-state"
    """A folder or a bundled name of a walker model with heads and starts; or ``rssm`` or ``rssmo``: random weights in
    the released architecture, whose decoders of an rssm have standard deviations."""
    task: str = "walk"
    """Whose reward."""
    slots: tuple[int, ...] = (1, 16, 128, 1024)
    """Numbers of slots to measure."""
    repeats: int = 9
    """Timed stretches of each kind, taken in turns."""
    seconds: float = 0.4
    """Of one stretch, about."""
    threads: int = 1
    """CPU threads."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`."""
        torch.set_num_threads(self.threads)
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
        calls = {kind: calls_in(step, self.seconds) for kind, step in loops.items()}
        rates: dict[str, list[float]] = {kind: [] for kind in loops}
        for _ in range(self.repeats):
            for kind, step in loops.items():
                start = time.perf_counter()
                for _ in range(calls[kind]):
                    step()
                rates[kind].append(slots * calls[kind] / (time.perf_counter() - start))
        return rates

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


def dream(model: WorldModel, task: str, slots: int, precision: str) -> Callable[[], object]:
    """One step of the dream."""
    if slots == 1:
        env = gymnasium.make("AimeDream-Walker-v0", task=task, model=model)
        action = random_actions(model, 1)[0]
        env.reset(seed=0)

        def step_one() -> object:
            result = env.step(action)
            if result[3]:
                env.reset()
            return result

        return step_one
    envs = gymnasium.make_vec("AimeDream-Walker-v0", num_envs=slots, task=task, model=model, precision=precision)
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
