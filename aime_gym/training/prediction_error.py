"""How far the dream is from the truth after 1, 10 and 40 steps: the normalised mean squared error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aime_gym.bodies.sensors import varies
from aime_gym.data.dataset import BURN_IN
from aime_gym.errors import AimeGymError
from aime_gym.observations import to_tensors

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
    the mean would score; dims that are constant there are left out. An image is one sensor with one variance.

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

    means, stds = dataset.statistics([name for name in names if name != "image"])
    scores: dict[str, float] = {}
    reached = [step for step in steps if not is_padding[burn_in + step - 1].all()]
    for step in reached:
        tabular = []
        true = ~is_padding[burn_in + step - 1]  # [W]
        decoded = model.decode(future[step - 1][torch.as_tensor(true, device=device)], names)  # images are large
        truths = to_tensors({name: arrays[name][burn_in + step - 1, true] for name in names}, device)
        for name in names:
            error = decoded[name].float() - truths[name]  # [W, D]
            if name == "image":
                relative = error.square().mean().reshape(1) / truths[name].var()
            else:
                varying = torch.as_tensor(varies(means[name], stds[name]), device=device)
                std = torch.as_tensor(stds[name], device=device)
                relative = (error / std)[:, varying].square().mean(0)  # [D]
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
