"""What a finished model's folder holds beside weights: prediction errors, starts of dreams, and a card."""

from __future__ import annotations

import io
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aime_gym.bodies.body import Embodiment, canonical_setup
from aime_gym.bodies.lookup import has_time_limit
from aime_gym.bodies.sensors import varies
from aime_gym.data.dataset import BURN_IN, TrajectoryDataset
from aime_gym.data.trajectories import trajectory_paths, write_provenance
from aime_gym.errors import AimeGymError
from aime_gym.files import json_text, write_atomically, write_json
from aime_gym.flags import claim_run, command_line
from aime_gym.observations import to_tensors
from aime_gym.training.fit_heads import HeadsOptions, check_tasks, fit_heads, score_heads, with_rewards
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import TRUST

if TYPE_CHECKING:
    from aime_gym.data.dataset import TrajectoryDataset

STEPS = (1, 10, 40)
"""Prior steps compared by default."""


@torch.no_grad()
def prediction_error(
    model: Any,
    dataset: TrajectoryDataset,
    burn_in: int = BURN_IN,
    steps: Sequence[int] = STEPS,
    windows: int = 200,
    seed: int = 0,
    sample: bool = False,
) -> dict[str, float]:
    """Filters real frames, rolls the prior under the recorded actions and compares what it decodes with what happened.

    The squared error of each dim is divided by the variance of that dim over `dataset`, so that 1 is what predicting
    the mean would score; dims that are constant there are left out. An image is one sensor with one variance. Where the
    model writes angles as codes, errors are those of sines and cosines.

    Args:
        model: A `WorldModel`.
        dataset: Held-out trajectories of its embodiment.
        burn_in: Frames that are filtered, by posterior means.
        steps: Prior steps after the last filtered frame at which to compare.
        windows: How many windows; they depend on `seed` alone.
        seed: Draws windows and, if `sample`, the prior's noise.
        sample: Whether the prior samples or takes its means.

    Returns:
        ``nmse_{step}`` over all dims of the tabular sensors, ``nmse_{step}/{sensor}`` of each sensor, and ``nmse``, the
        geometric mean of the ``nmse_{step}``: falls are chaotic, and a plain mean would be all about the last step.
        Steps that no trajectory reaches are left out. Where trajectories have no more than `burn_in` frames, all but
        one of the longest are filtered.

    Raises:
        AimeGymError: If no trajectory reaches any of the steps.
    """
    device = next(model.parameters()).device
    names = [*model.observed, *model.probed]
    burn_in = min(burn_in, max(1, dataset.longest - 1))
    arrays, future = predict_windows(model, dataset, burn_in, max(steps), windows, seed, sample)
    is_padding = arrays.get("is_padding", np.zeros(arrays["pre_action"].shape[:2], bool))  # [T, W]

    means, stds = dataset.statistics([name for name in names if name != "image"], model.codes)
    scores: dict[str, float] = {}
    reached = [step for step in steps if not is_padding[burn_in + step - 1].all()]
    for step in reached:
        tabular = []
        true = ~is_padding[burn_in + step - 1]  # [W]
        decoded = model.decode(future[step - 1][torch.as_tensor(true, device=device)], names)  # images are large
        truths = to_tensors({name: arrays[name][burn_in + step - 1, true] for name in names}, device)
        for name in names:
            pair = decoded[name].float(), truths[name]
            predicted, truth = map(model.codes[name].encode, pair) if name in model.codes else pair
            error = predicted - truth  # [W, C]
            if name == "image":
                relative = error.square().mean().reshape(1) / truths[name].var()
            else:
                varying = torch.as_tensor(varies(means[name], stds[name]), device=device)
                std = torch.as_tensor(stds[name], device=device)
                relative = (error / std)[:, varying].square().mean(0)  # [C]
                tabular.append(relative)
            if len(relative):
                scores[f"nmse_{step}/{name}"] = float(relative.mean())
        if tabular:
            whole = torch.cat(tabular)
            scores[f"nmse_{step}"] = float(whole.mean()) if len(whole) else 0.0  # of constants there is none
        else:
            scores[f"nmse_{step}"] = scores[f"nmse_{step}/image"]
    if not reached:
        raise AimeGymError(
            f"No trajectory reaches step {min(steps)} after {burn_in} frames; the longest has {dataset.longest}."
        )
    scores["nmse"] = geometric_mean(scores[f"nmse_{step}"] for step in reached)
    return scores


@torch.no_grad()
def predict_windows(
    model: Any,
    dataset: TrajectoryDataset,
    burn_in: int = BURN_IN,
    steps: int = max(STEPS),
    windows: int = 200,
    seed: int = 0,
    sample: bool = False,
) -> tuple[dict[str, np.ndarray], Tensor]:
    """Draws windows, filters their first frames and rolls the prior out under the recorded actions.

    Args:
        model: A `WorldModel`.
        dataset: Trajectories of its embodiment.
        burn_in: Frames that are filtered, by posterior means.
        steps: Prior steps after the last filtered frame, L.
        windows: How many, W; they depend on `seed` alone.
        seed: Draws windows and, if `sample`, the prior's noise.
        sample: Whether the prior samples or takes its means.

    Returns:
        The recorded rows, name -> [burn_in + L, W, ...], and the predicted features [L, W, F]. Where trajectories end
        within L steps, rows behind their end are padding, which ``is_padding`` [burn_in + L, W] says.

    Raises:
        AimeGymError: If no trajectory has a frame more than are filtered.
    """
    device = next(model.parameters()).device
    arrays = dataset.sample_windows(windows, burn_in + steps, np.random.default_rng(seed), least=burn_in + 1)
    actions = to_tensors({"pre_action": arrays["pre_action"]}, device)["pre_action"]
    generator = torch.Generator(device=device).manual_seed(seed)
    frames = to_tensors({name: arrays[name][:burn_in] for name in model.observed}, device)
    features, _ = model.observe(frames, actions[:burn_in], sample=False)
    return arrays, model.imagine(features[-1], actions[burn_in:], sample=sample, generator=generator, names=()).features


def geometric_mean(values: Iterable[float]) -> float:
    """Exponential of the mean logarithm; errors of different sizes count by their ratios."""
    return float(np.exp(np.mean(np.log(np.maximum(list(values), 1e-12)))))


def make_starts(
    dataset: TrajectoryDataset,
    observed: Iterable[str],
    n_reset: int = 128,
    n_dataset: int = 512,
    frames: int = 10,
    seed: int = 0,
    held: bool = False,
) -> dict[str, np.ndarray]:
    """Picks windows to filter at the start of a dream: first frames of episodes, then windows from anywhere.

    Args:
        dataset: Real trajectories.
        observed: The sensors that the model sees.
        n_reset: Windows that begin with a reset, from different trajectories; fewer where there are fewer.
        n_dataset: Windows from anywhere.
        frames: Frames a window, K.
        seed: Draws the windows.
        held: Whether windows may end earlier than K frames after the reset, even with it: they begin with copies of the
            first frame then. For episodes that can be over sooner.

    Returns:
        Each observed sensor and ``pre_action`` as `[K, N, dim]`, ``physics`` `[N, nq + nv (+ na)]` at the last frame
        (where the data have it) and ``is_reset`` `[N]` bool. No window ends in a terminal state.

    Raises:
        AimeGymError: If no trajectory has that many frames.
    """
    rng = np.random.default_rng(seed)
    first = 0 if held else frames - 1
    bounds = dataset.bounds[dataset.bounds[:, 1] - dataset.bounds[:, 0] > first]
    if not len(bounds):
        raise AimeGymError(f"A start needs {frames} frames; no trajectory has that many.")
    ends = np.concatenate([np.arange(begin + first, end) for begin, end in bounds])
    begins = np.repeat(bounds[:, 0], bounds[:, 1] - bounds[:, 0] - first)
    goes_on = np.ones(len(ends), bool)
    if "is_terminal" in dataset.arrays:
        goes_on = ~dataset.arrays["is_terminal"].reshape(-1)[ends].astype(bool)
    at_reset = rng.permutation((ends == begins + first).nonzero()[0])[:n_reset]
    chosen = np.concatenate([at_reset, rng.choice(goes_on.nonzero()[0], n_dataset)])
    wanted = ends[chosen] - np.arange(frames)[::-1, None]  # [K, N]
    rows = np.maximum(wanted, begins[chosen])
    starts = {name: dataset.arrays[name][rows] for name in [*observed, "pre_action"]}
    starts["pre_action"] = np.where((wanted == rows)[..., None], starts["pre_action"], 0).astype(np.float32)
    if "physics" in dataset.arrays:
        starts["physics"] = dataset.arrays["physics"][rows[-1]]
    starts["is_reset"] = np.arange(len(chosen)) < len(at_reset)
    return starts


Parts = Mapping[str, tuple[TrajectoryDataset, TrajectoryDataset]]
"""Name of a data set -> (its training part, its held-out part)."""


def split_by_name(
    folders: Sequence[Path], datasets: Sequence[TrajectoryDataset], held_out: float, seed: int
) -> dict[str, tuple[TrajectoryDataset, TrajectoryDataset]]:
    """Splits data sets, named as their folders are; by the whole path where several folders share a name.

    Raises:
        AimeGymError: For the same reasons as `TrajectoryDataset.split`.
    """
    names = [f.name if sum(g.name == f.name for g in folders) == 1 else str(f) for f in folders]
    return {name: dataset.split(held_out, seed) for name, dataset in zip(names, datasets, strict=True)}


def check_parts(parts: Parts, body: Embodiment, setup: str, reward: bool = False) -> None:
    """Checks that data sets have what models of a body in a setup see and predict.

    Args:
        parts: The data.
        body: The body of the model.
        setup: The setup of the model; ``"visual"`` needs images.
        reward: Whether rewards are needed.

    Raises:
        AimeGymError: If one lacks a key, has it with another dim, or has too short trajectories.
    """
    needed = {s.name: s.dim for s in body.sensors} | {"pre_action": body.action_dim}
    needed |= {"image": 3} if canonical_setup(setup) == "visual" else {}
    needed |= {"reward": 1} if reward else {}
    for name, (part, _) in parts.items():
        got = {key: part.arrays[key].shape[-1] if key in part.arrays else "missing" for key in needed}
        wrong = [f"{key}: {got[key]}, expected dim {needed[key]}" for key in needed if got[key] != needed[key]]
        if wrong:
            remedy = " `aime-gym render` adds images." if "image" in needed and got["image"] == "missing" else ""
            raise AimeGymError(f"{name} does not fit {body.name} in setup {setup}: {'; '.join(wrong)}.{remedy}")
    rows = 2 if body.foreign else BURN_IN + 1  # heads of others see windows that begin before short episodes
    for name, split in parts.items():
        if (longest := min(part.longest for part in split)) < rows:
            raise AimeGymError(f"{name} needs trajectories of {rows} rows to train and to evaluate; got {longest}.")


def as_long_as_seen(body: Embodiment, parts: Sequence[TrajectoryDataset]) -> Embodiment:
    """A body whose env has no limit of steps, with episodes as long as the longest that was cut in the data, if any.

    Args:
        body: The body.
        parts: The data.
    """
    if has_time_limit(body):
        return body
    cut = [0]
    for part in parts:
        begins, ends = part.bounds.T
        terminal = part.arrays.get("is_terminal")
        cut += [0] if terminal is None else (ends - begins - 1)[~np.ravel(terminal)[ends - 1].astype(bool)].tolist()
    return replace(body, episode_control_steps=max(cut)) if max(cut) else body


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
        options: Options of the heads; with 0 updates `initial_heads` stay as they are.
        seed: Seed of everything that is drawn.
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
        chosen = TrajectoryDataset.join([evenly(train, share) for train, _ in parts.values()])
        labelled = with_rewards(chosen, body, tasks)
        heads = fit_heads(model, labelled, replace(options, tasks=tasks), seed, initial=initial_heads)
    if heads is not None:
        held = {name: with_rewards(evenly(part, share), body, heads.tasks) for name, (_, part) in parts.items()}
        scores["heads"] = {name: score_heads(model, heads, part) for name, part in held.items()}
        model.heads = heads
    model.cpu()
    cost = {**cost, "heads_seconds": round(time.monotonic() - start)}

    together = TrajectoryDataset.join([train for train, _ in parts.values()])
    if body.logged:
        earned = [float(together[i]["reward"].sum()) for i in range(len(together))]
        scores["returns"] = [min(earned), max(earned)]
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
    """NMSE by data set, for mean and sampled rollouts of 500 windows, see `prediction_error`; fewer where rows are."""
    scores: dict[str, Any] = {}
    for name, dataset in held_out.items():
        windows = min(500, int(np.diff(dataset.bounds).sum()))
        scores[name] = {
            kind: prediction_error(model, dataset, windows=windows, sample=kind == "sampled")
            for kind in ("mean", "sampled")
        }
    return scores


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


def evenly(dataset: TrajectoryDataset, share: float) -> TrajectoryDataset:
    """A share of the trajectories, at least one, evenly spaced: data sets go from a novice's to an expert's."""
    count = max(1, round(share * len(dataset)))
    return dataset.subset(np.linspace(0, len(dataset) - 1, count).round().astype(int))
