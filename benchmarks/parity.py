"""How far our numbers are from those of the original AIME implementation.

`python -m benchmarks.parity FOLDER...` loads the checkpoint in each folder, computes everything that its `expected.npz`
holds from its `inputs.npz`, and prints the largest deviation of each array. It exits with 1 if one is above tolerance.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_policy, load_pretrained_model
from aime_gym.world_model.imitation import imitation_loss
from aime_gym.world_model.layers import TanhGaussianPolicy
from aime_gym.world_model.model import WorldModel

TOLERANCE = 1e-5
"""Largest absolute deviation of features and everything else that is not a loss."""
LOSS_TOLERANCE = 1e-4
"""Largest relative deviation of losses and metrics."""
IMITATION: dict[str, dict[str, Any]] = {
    "aime_full": {},
    "aime_kl_only": {"mode": "kl_only"},
    "aime_idm": {"use_idm": True},
}
"""Prefix of the keys -> arguments of `imitation_loss`."""


@dataclass
class Parity:
    """Compare world models with what the original implementation computed."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Each with config.yaml, model.pt, policy.pt, inputs.npz and expected.npz."""

    def run(self) -> None:
        """Prints all deviations; exits with 1 if one is above tolerance.

        Raises:
            AimeGymError: If a folder is incomplete.
        """
        failures = 0
        for folder in self.folders:
            print(folder)
            for comparison in compare(folder):
                print(f"  {comparison}")
                failures += not comparison.good
        print(f"{failures} above tolerance" if failures else "all within tolerance")
        sys.exit(1 if failures else 0)


@dataclass(frozen=True)
class Comparison:
    """One array of `expected.npz` and ours."""

    key: str
    deviation: float
    """Largest absolute deviation; relative for losses. Infinite if shapes differ or we have no such quantity."""
    tolerance: float
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether the deviation is within tolerance (NaN is not)."""
        return self.deviation <= self.tolerance

    def __str__(self) -> str:
        kind = "relative" if self.tolerance == LOSS_TOLERANCE else "absolute"
        return f"{'ok  ' if self.good else 'FAIL'} {self.key:55} {self.deviation:.1e} {kind} {self.note}"


def compare(folder: Path) -> list[Comparison]:
    """All arrays of `expected.npz` against ours.

    Raises:
        AimeGymError: If the folder is incomplete.
    """
    inputs = {name: torch.as_tensor(value) for name, value in _arrays(folder / "inputs.npz").items()}
    expected = _arrays(folder / "expected.npz")
    model = load_pretrained_model(folder)
    policy = load_policy(folder) if (folder / "policy.pt").exists() else None
    with torch.no_grad():
        ours = compute(model, policy, inputs)
    return [_compare(key, value, ours.get(key)) for key, value in expected.items()]


def compute(model: WorldModel, policy: TanhGaussianPolicy | None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that an `expected.npz` may hold, with means in place of samples."""
    actions = inputs["pre_action"]
    features, kl = model.observe(inputs, actions, sample=False)
    rollout = model.imagine(features[-1], actions, sample=False)
    ours = {"posterior_feature": features, "kl": kl, "prior_feature": rollout.features}
    ours |= {f"rollout_{name}": value for name, value in rollout.observations.items()}
    for name, decoder in model.decoders.items():
        output = decoder(features)
        ours |= {f"out_{name}_mean": output.mean, f"out_{name}_std": output.std}
    ours |= {f"probe_{name}": probe(features).mean for name, probe in model.probes.items()}
    ours["loss"], metrics = model.loss(inputs, sample=False)
    ours |= {f"metric_{name}": value for name, value in metrics.items()}
    if policy is None:
        return ours
    ours["policy_mode"] = policy(features).mode
    for prefix, arguments in IMITATION.items():
        if "use_idm" in arguments and model.idm is None:
            continue
        ours[f"{prefix}_loss"], metrics = imitation_loss(model, inputs, policy, sample=False, **arguments)
        ours[f"{prefix}_actions"] = metrics.pop("actions")
        ours |= {f"{prefix}_metric_{name}": value for name, value in metrics.items()}
    return ours


def _compare(key: str, expected: np.ndarray, ours: Tensor | None) -> Comparison:
    tolerance = LOSS_TOLERANCE if key.endswith("loss") or "metric_" in key else TOLERANCE
    if ours is None:
        return Comparison(key, np.inf, tolerance, "we have no such quantity")
    values = ours.double().numpy()
    if key.endswith("_std"):  # a constant std is kept as one number
        values, expected = np.broadcast_arrays(values, expected)
    if values.shape != expected.shape:
        return Comparison(key, np.inf, tolerance, f"expected shape {expected.shape}, got {values.shape}")
    deviation = np.abs(values - expected)
    if tolerance == LOSS_TOLERANCE:
        deviation = deviation / np.maximum(np.abs(expected), 1e-3)
    return Comparison(key, float(deviation.max()), tolerance)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise AimeGymError(f"There is no file {path}.")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


if __name__ == "__main__":
    try:
        tyro.cli(Parity).run()
    except AimeGymError as error:
        sys.exit(f"error: {error}")
