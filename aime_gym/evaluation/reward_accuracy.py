"""Reward accuracy: what a model's reward says of real frames, and of its own prior's, against what the world paid.

The measure is that of the protocol of arXiv 2606.15032.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.errors import AimeGymError
from aime_gym.evaluation.filtered import BURN_IN, filter_episode
from aime_gym.evaluation.watched import Watched
from aime_gym.evaluation.worlds import Worlds
from aime_gym.world_model.model import WorldModel

PRIOR_STEPS = 20
"""Steps that the prior is rolled out under the real actions."""


@dataclass(frozen=True)
class Accuracy:
    """How well rewards are told.

    Attributes:
        r2: Share of the variance of the true rewards that is explained; None where they are all alike.
        error: Mean absolute error a step.
        bias: Mean error a step: what is promised too much.
    """

    r2: float | None
    error: float
    bias: float


@dataclass(frozen=True)
class RewardAccuracy:
    """How well rewards are told on real frames, and on prior rollouts of up to `steps` steps.

    Attributes:
        filtered: On the latents of real frames.
        prior: On the latents of the prior under the real actions.
        steps: Of the rollouts, at most.
        by_policy: Policy -> mean real reward a step, and that told of its filtered frames.
    """

    filtered: Accuracy
    prior: Accuracy | None
    steps: int
    by_policy: Mapping[str, tuple[float, float]]

    def summary(self) -> dict[str, Any]:
        """The numbers that are told."""
        return {
            "filtered": asdict(self.filtered),
            "prior": None if self.prior is None else asdict(self.prior),
            "steps": self.steps,
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self.summary() | {"by_policy": {name: list(pair) for name, pair in self.by_policy.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RewardAccuracy:
        """Reads what `to_dict` gave; a ValueError, a TypeError or a LookupError says what does not fit."""
        policies = {str(name): (float(real), float(told)) for name, (real, told) in data["by_policy"].items()}
        prior = None if data["prior"] is None else Accuracy(**data["prior"])
        return cls(Accuracy(**data["filtered"]), prior, int(data["steps"]), policies)


def accuracy(told: NDArray, true: NDArray) -> Accuracy:
    """Compares rewards [N] with true ones [N]."""
    error, variance = np.asarray(told, float) - true, float(np.var(true))
    r2 = None if variance == 0 else float(1 - (error**2).mean() / variance)
    return Accuracy(r2, float(np.abs(error).mean()), float(error.mean()))


@torch.inference_mode()
def told_reward(model: WorldModel, features: Tensor, task: str) -> Tensor:
    """The reward of the step that led to each latent [..., F], by the model's head, or its decoder: [...]."""
    if model.heads is None:
        return model.decode(features, ["reward"])["reward"].squeeze(-1)
    return model.heads.reward(features, task)


@torch.inference_mode()
def reward_accuracy(
    worlds: Worlds, watched: Sequence[Watched], track: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> RewardAccuracy:
    """Filters real episodes, and rolls the prior out along them, by means.

    Args:
        worlds: Both.
        watched: Real episodes of policies.
        track: Goes through the policies and shows how far it is.

    Raises:
        AimeGymError: If all episodes are over before an estimate is good.
    """
    model, task = worlds.model, worlds.task
    told: list[NDArray] = []
    true: list[NDArray] = []
    told_prior: list[NDArray] = []
    true_prior: list[NDArray] = []
    by_policy = {}
    for each in track(watched):
        first = len(true)
        for recording in each.recordings:
            observations, actions = np.asarray(recording.observations), recording.actions
            features = filter_episode(worlds, observations, actions)  # [L, F]
            begin = min(BURN_IN, len(actions)) - 1  # the last of the frames that make an estimate good
            told.append(told_reward(model, features[begin + 1 :], task).cpu().numpy())
            true.append(recording.rewards[begin:-1])
            states = range(begin, len(actions) - PRIOR_STEPS, PRIOR_STEPS)
            if len(states):
                windows = np.stack([actions[t : t + PRIOR_STEPS] for t in states], 1)  # [T, W, A]
                future = model.imagine(features[list(states)], torch.as_tensor(windows), sample=False, names=())
                told_prior.append(told_reward(model, future.features, task).cpu().numpy().ravel())
                true_prior.append(np.stack([recording.rewards[t : t + PRIOR_STEPS] for t in states], 1).ravel())
        own = [np.concatenate(rows[first:]) for rows in (true, told)]
        if len(own[0]):
            by_policy[each.name] = (float(own[0].mean()), float(own[1].mean()))
    if not sum(map(len, true)):
        raise AimeGymError(f"No real episode goes on after the {BURN_IN} frames that make an estimate good.")
    prior = accuracy(np.concatenate(told_prior), np.concatenate(true_prior)) if told_prior else None
    return RewardAccuracy(accuracy(np.concatenate(told), np.concatenate(true)), prior, PRIOR_STEPS, by_policy)
