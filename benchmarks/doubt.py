"""Is the doubt worth something? How candidates for it rank the real error of the dream, window by window.

The data should be of policies that the model was not trained with, best of agents that learned in its dream: they go
where the model is wrong. Each window is filtered for ten frames; then the prior takes its means under the recorded
actions, and its decoded sensors are compared with the recorded ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from aime_gym.data.dataset import BURN_IN, TrajectoryDataset
from aime_gym.errors import AimeGymError
from aime_gym.observations import to_tensors
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.model import WorldModel

SAMPLES = 8
"""Sampled rollouts of a window, for their spread."""


@dataclass
class Doubt:
    """Rank the dream's real one-step and ten-step errors by several signals of doubt."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trajectories of policies that the model does not know."""
    model: str = "walker-state"
    """A folder or a bundled name; it needs heads."""
    steps: tuple[int, ...] = (1, 10)
    """Lengths of rollouts."""
    windows: int = 2000
    """Windows a data set."""
    seed: int = 0
    """Draws windows and samples."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`.

        Raises:
            AimeGymError: If the model has no heads, or data are broken or of another body.
        """
        torch.manual_seed(self.seed)
        model = load_pretrained_model(self.model)
        if model.heads is None:
            raise AimeGymError(f"{self.model} has no ensemble. Fit one with `aime-gym fit-heads MODEL DATASET`.")
        data = {folder.name: TrajectoryDataset(folder) for folder in self.datasets}
        results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        parts: dict[int, list[tuple[NDArray, dict[str, NDArray]]]] = {step: [] for step in self.steps}
        for name, dataset in data.items():
            for step in self.steps:
                measured = self.measure(model, dataset, step)
                parts[step].append(measured)
                results.setdefault(name, {})[str(step)] = scores(*measured)
        if len(data) > 1:
            results["together"] = {
                str(step): scores(
                    np.concatenate([errors for errors, _ in each]),
                    {kind: np.concatenate([signals[kind] for _, signals in each]) for kind in each[0][1]},
                )
                for step, each in parts.items()
            }
        self.report(results)

    @torch.no_grad()
    def measure(self, model: WorldModel, dataset: TrajectoryDataset, steps: int) -> tuple[NDArray, dict[str, NDArray]]:
        """The real error of each window's rollout [W], and every signal of doubt about it [W]."""
        heads = model.heads
        assert heads is not None
        arrays = dataset.sample_windows(self.windows, BURN_IN + steps, np.random.default_rng(self.seed))
        names = list(model.observed)
        batch = to_tensors({name: arrays[name] for name in [*names, "pre_action"]})
        actions = batch["pre_action"]
        features, _ = model.observe({name: batch[name][:BURN_IN] for name in names}, actions[:BURN_IN], sample=False)
        start, taken = features[-1], actions[BURN_IN:]  # [W, F], [L, W, A]
        future = model.imagine(start, taken, sample=False, names=names)

        codes = model.config.codes
        truth = torch.cat([codes[name].encode(batch[name][BURN_IN:]) for name in names], -1)  # [L, W, C]
        order = [sensor.name for sensor in model.config.sensors]
        stds = dict(zip(order, heads.target_std.split([codes[name].size for name in order]), strict=True))
        scale = torch.cat([stds[name] for name in names])  # [C], of the model's own data

        def error_of(observations: dict[str, Tensor]) -> Tensor:
            return (torch.cat([codes[name].encode(observations[name]) for name in names], -1) - truth) / scale

        error = error_of(future.observations).square().mean((0, 2))  # [W], over all steps of the rollout
        before = torch.cat([start[None], future.features[:-1]])  # [L, W, F]
        signals = {"ensemble": heads.disagreement(before, taken).mean(0)}
        sampled = torch.stack(
            [error_of(model.imagine(start, taken, names=names).observations) for _ in range(SAMPLES)]
        )  # [K, L, W, D]
        signals["spread of samples"] = sampled.std(0).mean((0, 2))
        steps_doubt = model.doubt(future.features)  # [L, W]
        signals["posterior, mean of the steps"] = steps_doubt.mean(0)
        signals["posterior, largest of the steps"] = steps_doubt.amax(0)
        seen = {name: future.observations[name] for name in names}
        signals["posterior, filtering on"] = refiltering_kl(model, start, seen, taken)
        return error.numpy(), {kind: signal.numpy() for kind, signal in signals.items()}

    def report(self, results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
        """Prints the table and writes the JSON file."""
        table = Table(title=f"Doubt of {self.model} against the real error of its rollouts")
        for column in ("data", "steps", "signal", "Spearman", "ROC area, worst tenth"):
            table.add_column(column, justify="left" if column in ("data", "signal") else "right")
        for name, lengths in results.items():
            for step, kinds in lengths.items():
                for kind, score in kinds.items():
                    table.add_row(name, step, kind, f"{score['spearman']:.2f}", f"{score['roc']:.2f}")
        Console().print(table)
        if self.output:
            self.output.write_text(json.dumps({"model": self.model, "scores": results}, indent=2) + "\n")


def refiltering_kl(model: WorldModel, start: Tensor, seen: dict[str, Tensor], actions: Tensor) -> Tensor:
    """How much the posterior moves when the dream's own frames are filtered: mean KL a step, [W]."""
    _, kl = model.observe(seen, actions, state=start, sample=False)
    return kl.sum(-1).mean(0) if kl.ndim == 3 else kl.mean(0)


def scores(error: NDArray, signals: dict[str, NDArray]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation, and the area under the ROC curve for the tenth of windows with the largest error."""
    worst = error >= np.quantile(error, 0.9)
    return {
        kind: {"spearman": float(spearmanr(signal, error)[0]), "roc": roc_area(signal, worst)}
        for kind, signal in signals.items()
    }


def roc_area(signal: NDArray, positive: NDArray[np.bool_]) -> float:
    """The chance that a positive window has more of the signal than another one (Mann and Whitney)."""
    ranks, count = rankdata(signal), int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(signal) - count)))


if __name__ == "__main__":
    tyro.cli(Doubt).run()
