"""What strangers may have said of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aime_gym.files import weights_digest


def some_strangers(folder: Path, spearman: float | None = 0.9, error: float = 20.0, **changes: Any) -> dict[str, Any]:
    """A conclusive measurement of the weights in a folder, good by default."""
    ends = {"95": [0.5, 0.95], "90": [0.6, 0.93]}
    group = {
        "policies": 20,
        "pearson": 0.8,
        "spearman": spearman,
        "mean_absolute_error": error,
        "regret_at_1": 0.0,
        "bias": -3.0,
        "runs": 6,
        "intervals": dict.fromkeys(("spearman", "pearson", "mean_absolute_error", "bias"), ends),
    }
    return {
        **group,
        "policies": 40,
        "runs": 12,
        "families": {"ars": group, "ppo": group, "sac": group},
        "seen": ["sac"],
        "range": [20.0, 420.0],
        "span": 0.9,
        "thirds": [0.5, 0.25, 0.25],
        "episodes": 10,
        "seed": 500_000,
        "set": "0" * 64,
        "model": weights_digest(folder),
        **changes,
    }
