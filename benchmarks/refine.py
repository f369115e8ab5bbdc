"""What five real episodes of a misjudged stranger do to the dreams about it, and to those about all others.

    python -m benchmarks.refine ball_in_cup-catch/ars-0-5 cheetah-run/ars-1-7

Each stranger acts for five new real episodes, by which `aime-gym refine` corrects the bundled model of its body.
Errors are those of the ten episodes that the set of strangers publishes, none of which was learned from;
others are the strangers of other training runs.
"""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from aime_gym.commands.train import Refine
from aime_gym.evaluation.measure_trust import measure_trust
from aime_gym.evaluation.strangers import StrangerSet
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.model import WorldModel

SETS = Path(__file__).parent / "strangers"


def errors(model: WorldModel, strangers: StrangerSet, name: str) -> tuple[float, float, float]:
    """What a stranger is promised, what it earns, and the mean error about those of other runs."""
    model.folder = None  # whose provenance would leave the stranger itself out
    told = (measure_trust(model, strangers).trust.strangers or {})["returns"]
    others = [abs(of["dream"] - of["real"]) for of in told.values() if of["run"] != told[name]["run"]]
    return told[name]["dream"], told[name]["real"], float(np.mean(others))


@dataclass
class RefineStrangers:
    """Refine the bundled model of a body by each of some strangers, and print a Markdown table."""

    strangers: Annotated[tuple[str, ...], tyro.conf.Positional]
    """SET/NAME of each, as ball_in_cup-catch/ars-0-5."""
    out: Path = Path("runs/refine")
    """Where the models go."""
    updates: int = Refine.updates
    """Gradient steps of the model."""
    lr: float = Refine.lr
    """Their size."""
    seed: int = 0
    """Seed of the episodes and the training."""

    def run(self) -> None:
        """Refines and measures."""
        print(
            "| stranger | real | dreamt before | after | error before | after | others before | after | CPU minutes |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for word in self.strangers:
            place, name = word.split("/")
            strangers, base = StrangerSet.load(SETS / place), f"{place.rpartition('-')[0]}-state"
            policy, out = SETS / place / f"{name}.safetensors", self.out / f"{place}-{name}"
            begin = time.process_time()
            with redirect_stdout(sys.stderr):
                job = Refine(base, policy=str(policy), task=strangers.task, out=out)
                replace(job, updates=self.updates, lr=self.lr, seed=self.seed).run()
            minutes = (time.process_time() - begin) / 60
            pair = (errors(load_pretrained_model(model), strangers, name) for model in (base, out))
            (before, real, then), (after, _, now) = pair
            cells = (real, before, after, abs(before - real), abs(after - real), then, now)
            print(f"| {word} | {' | '.join(f'{cell:.0f}' for cell in cells)} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    tyro.cli(RefineStrangers).run()
