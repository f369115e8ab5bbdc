"""How well a model's dreams judge policies that it has never met.

`python -m benchmarks.strangers FOLDER...` takes sets of `aime-gym strangers`, evaluates each policy in the dream and in
the real env from the same starts, and writes the returns, rank correlations and errors to
`benchmarks/results/strangers.json`, beside those of other bodies that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from aime_gym.evaluation.compare import compare
from aime_gym.evaluation.strangers import StrangerSet, judge
from aime_gym.files import read_json, write_json
from aime_gym.world_model.checkpoint import load_pretrained_model


@dataclass
class Judge:
    """Evaluate strangers in both worlds."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Sets of `aime-gym strangers`."""
    model: str | None = None
    """World model, by default each body's bundled one of states."""
    episodes: int = 10
    """Of each policy in each world."""
    noise: tuple[float, ...] = (0.3,)
    """Each run's last policy also acts with this noise."""
    seen: tuple[str, ...] = ("sac",)
    """Families whose algorithm has collected some of the model's data."""
    out: Path = Path("benchmarks/results/strangers.json")

    def run(self) -> None:
        """Evaluates, prints a line for each set, and writes."""
        results = read_json(self.out) if self.out.exists() else {}
        for folder in self.folders:
            strangers = StrangerSet.load(folder, self.noise)
            model = load_pretrained_model(self.model or f"{strangers.embodiment}-state")
            comparison = compare(strangers.policies, strangers.embodiment, strangers.task, self.episodes, model)
            verdict = judge(comparison, strangers, self.seen)
            returns = {p.name: [round(p.dream.mean, 1), round(p.real.mean, 1), p.doubt] for p in comparison.policies}
            key = f"{model.folder.name if model.folder else 'model'} {strangers.task}"
            results[key] = {**verdict, "episodes": self.episodes, "dream, real, doubt": returns}
            write_json(self.out, results)
            for name, of in {"unseen": verdict["unseen"], **verdict["families"]}.items():
                low, high = of["spearman_interval"] or (float("nan"), float("nan"))
                spearman = float("nan") if of["spearman"] is None else of["spearman"]
                print(
                    f"{key} {name}: Spearman {spearman:.2f} [{low:.2f}, {high:.2f}], mean error "
                    f"{of['mean_absolute_error']:.0f}, bias {of['bias']:+.0f}, {of['policies']} policies of "
                    f"{of['runs']} runs",
                    flush=True,
                )
            print(f"{key}: span {verdict['span']:.2f}, thirds {verdict['thirds']}, conclusive: {verdict['conclusive']}")


if __name__ == "__main__":
    tyro.cli(Judge).run()
