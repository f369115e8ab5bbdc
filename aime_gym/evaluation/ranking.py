"""Policy ranking: do dreams order policies as the world does, those that the model has never met?

The measure is that of the protocol of arXiv 2606.15032.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, Rhythm
from aime_gym.agents.strangers import draw_rhythm
from aime_gym.data.content import model_digest
from aime_gym.evaluation.comparison import Comparison, PolicyReturns
from aime_gym.evaluation.measure_trust import measure_trust
from aime_gym.evaluation.returns import PolicyLike
from aime_gym.evaluation.strangers import StrangerSet
from aime_gym.evaluation.worlds import Worlds

RHYTHMS = 8
"""Blind sine waves that are made where no strangers are given."""
NOISE = 0.3


@dataclass(frozen=True)
class Ranking:
    """How well dreams rank policies.

    Attributes:
        comparison: Both worlds' returns of each.
        verdict: The metrics of `aime_gym.evaluation.metrics.dope_metrics`; of a set of strangers what
            `aime_gym.world_model.trust.Trust` holds of them, and its ``"finding"``.
    """

    comparison: Comparison
    verdict: Mapping[str, Any]

    @property
    def are_strangers(self) -> bool:
        """Whether these are strangers of a set, and not what was made on the spot."""
        return "families" in self.verdict

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"verdict": dict(self.verdict), "comparison": self.comparison.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ranking:
        """Reads what `to_dict` gave; raises as `Comparison.from_dict`."""
        return cls(Comparison.from_dict(data["comparison"]), dict(data["verdict"]))


def compare_in(
    worlds: Worlds,
    policies: Mapping[str, PolicyLike],
    episodes: int,
    seed: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Comparison:
    """Evaluates policies, which see what `worlds` shows, in both worlds; see `aime_gym.compare`."""
    results = [
        PolicyReturns(name, *worlds.evaluate(policy, episodes, seed)) for name, policy in track(policies.items())
    ]
    return Comparison(
        worlds.embodiment.name,
        worlds.task,
        worlds.model_name,
        seed,
        worlds.max_episode_steps,
        tuple(results),
        worlds.usual_doubt,
        model_digest=model_digest(worlds.model.folder) if worlds.model.folder else None,
    )


def rank_strangers(worlds: Worlds, strangers: StrangerSet, seen: Iterable[str], episodes: int) -> Ranking:
    """Dreams of strangers beside the real returns that their set publishes; see `measure_trust`.

    Args:
        worlds: Of the model.
        strangers: A set of the same body and task.
        seen: Families whose algorithm has collected some of the model's data, which do not count.
        episodes: Of each, at most as many as the set has.

    Raises:
        AimeGymError: If the model does not decode what they see, or is one in whose dreams some of them have learned.
    """
    found = measure_trust(worlds.model, strangers, episodes, seen)
    return Ranking(found.comparison, {**(found.trust.strangers or {}), "finding": found.trust.finding})


def rank_made(
    worlds: Worlds,
    policies: Mapping[str, PolicyLike],
    episodes: int,
    seed: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Ranking:
    """Evaluates policies that belong to no set in both worlds, see `compare_in`."""
    comparison = compare_in(worlds, policies, episodes, seed, track)
    return Ranking(comparison, dict(comparison.metrics))


def fitting(worlds: Worlds, policies: Mapping[str, Any]) -> dict[str, Any]:
    """Those plain policies that can act on what `worlds` shows: blind ones always."""

    def fits(policy: Any) -> bool:
        inner = policy.policy if isinstance(policy, NoisyPolicy) else policy
        return not isinstance(inner, PlainMLP) or inner.mean.shape == worlds.observation_space.shape

    return {name: policy for name, policy in policies.items() if fits(policy)}


def made_policies(worlds: Worlds, seed: int = 0) -> dict[str, PolicyLike]:
    """Policies that no model was brought up with: random and zero actions, and rhythms, half of them with noise."""
    rng = np.random.default_rng([seed, 5])
    size = int(np.prod(worlds.action_space.shape or ()))
    rhythms: list[Rhythm] = [draw_rhythm(rng, size, None) for _ in range(RHYTHMS)]
    made: dict[str, PolicyLike] = {"random": "random", "zero": "zero"}
    for number, rhythm in enumerate(rhythms):
        noisy = bool(number % 2)
        made[f"rhythm-{number}{f', noise {NOISE:g}' if noisy else ''}"] = (
            NoisyPolicy(rhythm, NOISE) if noisy else rhythm
        )
    return made
