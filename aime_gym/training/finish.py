"""From a trained world model to a model folder: heads, starts, scores and a card."""

from __future__ import annotations

import io
import time
from collections.abc import Container, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from aime_gym.data.provenance import write_provenance
from aime_gym.data.starts import make_starts
from aime_gym.data.trajectories import TrajectoryDataset, trajectory_paths
from aime_gym.errors import AimeGymError
from aime_gym.files import json_text, write_atomically, write_json
from aime_gym.flags import claim_run, command_line
from aime_gym.training.fit_heads import HeadsOptions, check_tasks, fit_heads, score_heads, with_rewards
from aime_gym.training.parts import Parts
from aime_gym.training.prediction_error import prediction_error
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import TRUST

_IMAGE_NETWORKS = ("encoders.image", "decoders.image")
"""Most of the weights of a model of images; kept as bfloat16, in which they are computed."""


def claim_model_folder(out: Path, name: str, flags: Mapping[str, Any], free: Container[str] = ()) -> None:
    """Makes a model folder that of one run, whose flags go to `name` in its subfolder `run`.

    Raises:
        AimeGymError: If the folder holds another model, or the run there had other flags.
    """
    claim, model = out / "run" / name, out / "config.yaml"
    if out.is_dir() and trajectory_paths(out):
        raise AimeGymError(f"{out} holds trajectories: choose another --out.")
    if model.exists() and not claim.exists():
        raise AimeGymError(f"{out} holds a model that another command made: choose another --out.")
    claim_run(claim, flags, free, begun=model.exists() or any(claim.parent.rglob("*.pt")))


def finish_model_folder(
    model: WorldModel,
    out: Path,
    parts: Parts,
    options: HeadsOptions,
    seed: int,
    command: Any,
    cost: Mapping[str, Any],
    initial_heads: Heads | None = None,
) -> None:
    """Fits heads, scores all on held-out data and writes the model folder; prints the scores.

    Args:
        model: Trained; it is frozen and its `heads` are set.
        out: The folder; gets ``config.yaml``, ``model.safetensors``, ``heads.safetensors``, ``starts.npz``,
            ``scores.json``, ``provenance.json`` and the card ``README.md``.
        parts: The data.
        options: Of the heads; with 0 updates `initial_heads` stay as they are.
        seed: Of everything drawn.
        command: The command, a `Train` or a `FitHeads`, for the card.
        cost: Updates and seconds, for the card.
        initial_heads: To go on from, if any.
    """
    model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.startswith(_IMAGE_NETWORKS):
            weight.copy_(weight.bfloat16())
    body = model.config.body
    scores: dict[str, Any] = {"prediction": prediction_scores(model, {name: held for name, (_, held) in parts.items()})}
    start = time.monotonic()
    heads = initial_heads
    share = min(1.0, options.trajectories / sum(len(train) for train, _ in parts.values()))
    if options.updates:
        tasks = check_tasks(body, options.tasks)
        chosen = TrajectoryDataset.join([_some(train, share) for train, _ in parts.values()])
        labelled = with_rewards(chosen, body, tasks)
        heads = fit_heads(model, labelled, replace(options, tasks=tasks), seed, initial=initial_heads)
    if heads is not None:
        held = {name: with_rewards(_some(part, share), body, heads.tasks) for name, (_, part) in parts.items()}
        scores["heads"] = {name: score_heads(model, heads, part) for name, part in held.items()}
        model.heads = heads
    model.cpu()
    cost = {**cost, "heads_seconds": round(time.monotonic() - start)}

    together = TrajectoryDataset.join([train for train, _ in parts.values()])
    counts = (32, 96) if model.decodes_images else (128, 512)  # images are most of a model folder's bytes
    starts = make_starts(together, model.observed, *counts, seed=seed, held=body.foreign)
    for name in (TRUST, "rounds.png"):  # they are of the model that was there before
        (out / name).unlink(missing_ok=True)
    save_model(model, out, halved=_IMAGE_NETWORKS)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **starts)  # type: ignore[arg-type]
    write_atomically(out / "starts.npz", buffer.getbuffer())
    write_json(out / "scores.json", scores)
    bases = [getattr(command, name, None) for name in ("model", "pretrained", "dynamics")]
    write_provenance(out, command.datasets, [load_pretrained_model(base).folder for base in bases if base])
    write_atomically(out / "README.md", model_card(model, out.name, command, cost, parts, scores))
    print(f"The model is in {out}.\n\n{score_tables(scores)}")


def prediction_scores(model: WorldModel, held_out: Mapping[str, TrajectoryDataset]) -> dict[str, Any]:
    """NMSE by data set, for mean and sampled rollouts, see `prediction_error`."""
    return {
        name: {
            kind: prediction_error(model, dataset, windows=500, sample=kind == "sampled")
            for kind in ("mean", "sampled")
        }
        for name, dataset in held_out.items()
    }


def model_card(
    model: WorldModel,
    name: str,
    command: Any,
    cost: Mapping[str, Any],
    parts: Parts,
    scores: Mapping[str, Any],
) -> str:
    """Writes the card of a model: what it is, how it was made, what it cost and how good it is."""
    config = model.config
    flags = asdict(command)
    weights = sum(parameter.numel() for parameter in model.parameters())
    data = "\n".join(f"| {name} | {len(train)} | {len(held)} |" for name, (train, held) in parts.items())
    costs = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in cost.items())
    return f"""# {name}

A world model of {config.embodiment} in the setup {config.setup}. Cell {config.cell}, memory {config.memory_dim},
stochastic latent {config.stochastic_dim}, {weights / 1e6:.2f} million weights with its heads.
One step is {config.action_repeat} control steps.

## How it was made

```
{command_line(command)}
```

| data set | trajectories | held out |
| --- | --- | --- |
{data}

Seed {flags["seed"]}. Cost: {costs}.

## Held-out scores

{score_tables(scores)}

All flags:

```json
{json_text(flags)}
```
"""


def score_tables(scores: Mapping[str, Any]) -> str:
    """The scores as Markdown tables."""
    lines = ["NMSE after filtering 10 frames; 1 is what predicting the mean of the data set scores.", ""]
    rows = [errors for kinds in scores["prediction"].values() for errors in kinds.values()]
    steps = dict.fromkeys(key for errors in rows for key in errors if key.startswith("nmse_") and "/" not in key)
    lines += ["| data set | rollout | " + " | ".join(f"step {key[5:]}" for key in steps) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(steps)]
    for name, kinds in scores["prediction"].items():
        for kind, errors in kinds.items():
            shown = [f"{errors[key]:.4f}" if key in errors else "no episode is so long" for key in steps]
            lines.append(f"| {name} | {kind} | " + " | ".join(shown) + " |")
    if "heads" in scores:
        keys = list(next(iter(scores["heads"].values())))
        lines += ["", "R² of the heads (by the variance in all training data), on filtered features and on those of "]
        lines[-1] += "rollouts of up to 15 steps (prior); for disagreement its correlation with the error."
        lines += ["", "| head | " + " | ".join(scores["heads"]) + " |", "| --- |" + " --- |" * len(scores["heads"])]
        for key in keys:
            values = " | ".join(f"{table[key]:.4f}" for table in scores["heads"].values())
            lines.append(f"| {key.replace('_', ' ')} | {values} |")
    return "\n".join(lines)


def _some(dataset: TrajectoryDataset, share: float) -> TrajectoryDataset:
    """Evenly spaced trajectories: data sets go from a novice's to an expert's."""
    count = max(1, round(share * len(dataset)))
    return dataset.subset(np.linspace(0, len(dataset) - 1, count).round().astype(int))
