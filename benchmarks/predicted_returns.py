"""How often a predicted return's interval holds, and how wide it is, by families of strangers that are left out.

Each stranger of a bundled model is predicted from its dreams and from the strangers of all other families, its own
model's and those of the others. The alternative is one interval for everybody: from the 5th to the 95th percentile of
what the other families earn at the task. The interval score (Gneiting and Raftery, JASA 2007) is the width and, for
what lies outside, twenty times how far; in shares of the range of returns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.evaluation.predict import LEVEL, bundled_calibrations, predict_interval, return_bounds


@dataclass
class PredictedReturns:
    """Measure the intervals of predicted returns on the strangers of all bundled models."""

    out: Path | None = None
    """Where the numbers go, as JSON."""

    def run(self) -> None:
        """Measures and prints."""
        known = bundled_calibrations()
        rows: dict[str, list[tuple[bool, float, bool, float]]] = {}
        for place, own in known.items():
            bounds = np.array(return_bounds(get_embodiment(place[0].rpartition("-")[0])))
            for dream, real, doubt, family in zip(own.dream, own.real, own.doubt, own.families, strict=True):
                others = [each.without(family) for other, each in known.items() if other != place]
                _, *ends = predict_interval(dream, doubt, own.without(family), others)
                low, high = np.clip(ends, *((bounds - own.range[0]) / (own.range[1] - own.range[0])))
                least, most = np.quantile(own.real[own.families != family], [0.05, 0.95])
                rows.setdefault(" ".join(place), []).append(
                    (
                        low <= real <= high,
                        _score(low, high, real),
                        least <= real <= most,
                        _score(least, most, real),
                    )
                )
        rows["all"] = [row for group in list(rows.values()) for row in group]
        table = Table("strangers of", "policies", "covered", "score", "constant: covered", "score", "ratio of scores")
        told = {}
        for name, group in rows.items():
            covered, score, plainly, plain = np.mean(group, 0)
            told[name] = {
                "policies": len(group),
                "covered": covered,
                "score": score,
                "constant": [plainly, plain],
                "ratio": score / plain,
            }
            table.add_row(
                name,
                str(len(group)),
                f"{covered:.0%}",
                f"{score:.2f}",
                f"{plainly:.0%}",
                f"{plain:.2f}",
                f"{score / plain:.2f}",
            )
        Console().print(table)
        if self.out is not None:
            self.out.write_text(json.dumps(told, indent=2))


def _score(low: float, high: float, real: float) -> float:
    return float(high - low + 2 / (1 - LEVEL) * (max(low - real, 0.0) + max(real - high, 0.0)))


if __name__ == "__main__":
    tyro.cli(PredictedReturns).run()
