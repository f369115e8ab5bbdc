"""How many steps a second dreams make: through Gymnasium, against a loop written by hand, or another checkout.

The hand-rolled loop steps the same model in eager float32: noise, prior, means and standard deviations of all decoders,
reward. All get actions and give observations and rewards as NumPy arrays, and are measured in turns, each in a process
of its own. One slot goes through `gymnasium.make` with all its wrappers, more through `gymnasium.make_vec`; singles are
envs of `gymnasium.make` that are stepped side by side in one process. On one thread the seconds are those of the CPU,
so that other processes hardly matter.
Run `python -m benchmarks.dream_speed`; against another checkout of this repository, which dreams of the same weights,
`python -m benchmarks.dream_speed --against PATH --model FOLDER`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.world_model.checkpoint import save_model
from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel
from benchmarks.side_by_side import HERE, OTHER, Kind, Measured, check_against, measure, report, write

CELLS = ("rssm", "rssmo")


@dataclass
class DreamSpeed:
    """Compare the speed of dreams with that of a hand-rolled loop over the same model, or of another checkout."""

    model: str = "walker-state"
    """A folder or a bundled name of a walker model with heads and starts; or ``rssm`` or ``rssmo``: random weights in
    the released architecture, whose decoders of an rssm have standard deviations."""
    task: str = "walk"
    """The task whose reward is paid."""
    slots: tuple[int, ...] = (1, 16, 128, 1024)
    """Numbers of slots to measure."""
    singles: tuple[int, ...] = (8, 32)
    """Numbers of single dreams to measure, side by side in one process."""
    repeats: int = 9
    """Timed stretches of each kind, taken in turns."""
    seconds: float = 0.4
    """About how long one stretch takes."""
    threads: int = 1
    """CPU threads."""
    doubt: bool = False
    """Also measure dreams with doubt."""
    obs_type: Literal["state", "image", "latent"] = "state"
    """What dreams show."""
    against: Path | None = None
    """Another checkout, which dreams of the same model (a folder, then)."""
    precision: Literal["auto", "32-true"] = "32-true"
    """With `against`, that of both."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`.

        Raises:
            AimeGymError: If the other checkout is none, or is to dream with a model that is no folder.
        """
        check_against(self.against, self.model)
        base = "by hand" if self.against is None else OTHER
        rows: dict[str, Measured] = {}
        with tempfile.TemporaryDirectory() as folder:
            place = write_random_model(Path(folder), self.model) if self.model in CELLS else Path(self.model)
            told = {"model": str(place.resolve()) if place.is_dir() else self.model, "task": self.task}
            for slots in self.slots:
                rows[f"slots: {slots}"] = measure(self._kinds(told, slots), self.repeats, self.seconds, self.threads)
            for count in self.singles:
                shown = {**told, "count": count, "obs_type": self.obs_type}
                kinds = {"dream, auto": Kind("singles", shown)}
                if self.against is not None:
                    kinds[OTHER] = Kind("singles", shown, self.against)
                rows[f"singles: {count}"] = measure(kinds, self.repeats, self.seconds, self.threads)
        amounts = {name: float(name.partition(": ")[2]) for name in rows}
        report(f"{self.model}, {self.task}, threads: {self.threads}", rows, amounts, "steps", base)
        write(self.output, rows, amounts, base, model=self.model, threads=self.threads)

    def _kinds(self, told: dict[str, str], slots: int) -> dict[str, Kind]:
        """What is measured of so many slots."""
        by_hand, last = Kind("by_hand", {**told, "slots": slots}), self._types[-1]

        def dream(precision: str, checkout: Path = HERE, **options: Any) -> Kind:
            sizes = {"slots": slots, "obs_type": self.obs_type, "precision": precision}
            return Kind("dream", {**told, **sizes, **options}, checkout)

        kinds = {f"dream, {precision}": dream(precision) for precision in self._types}
        kinds[f"dream, {last}, reward head"] = dream(last, reward="head")
        if self.doubt:
            kinds[f"dream with doubt, {last}"] = dream(last, doubt=True)
        return kinds | ({"by hand": by_hand} if self.against is None else {OTHER: dream(last, self.against)})

    @property
    def _types(self) -> tuple[str, ...]:
        return (self.precision,) if self.against else ("auto", "32-true")


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
