"""How dreams rank policies, and what an agent that optimises in one earns in the world (after arXiv 2606.15032)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, Rhythm
from aime_gym.agents.strangers import draw_rhythm
from aime_gym.envs.sb3 import learned_in
from aime_gym.evaluation.compare import Comparison, PolicyReturns, told_of_weights
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
        verdict: The metrics of `aime_gym.evaluation.returns.dope_metrics`; of a set of strangers what
            `aime_gym.world_model.trust.Trust` holds of them, and its ``"finding"``.
    """

    comparison: Comparison
    verdict: Mapping[str, Any]

    @property
    def are_strangers(self) -> bool:
        """Whether these are strangers of a set, and not what was made on the spot."""
        return "families" in self.verdict

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain JSON values."""
        return {"verdict": dict(self.verdict), "comparison": self.comparison.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ranking:
        """Reads what `to_dict` gave; for errors see `Comparison.from_dict`."""
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
        PolicyReturns(name, *worlds.evaluate(policy, episodes, seed), learned_in(policy))
        for name, policy in track(policies.items())
    ]
    return Comparison(
        worlds.embodiment.name,
        worlds.task,
        worlds.model_name,
        seed,
        worlds.max_episode_steps,
        tuple(results),
        worlds.usual_doubt,
        **told_of_weights(worlds.model),
    )


def rank_strangers(worlds: Worlds, strangers: StrangerSet, seen: Iterable[str], episodes: int) -> Ranking:
    """Dreams of strangers beside the real returns that their set publishes; see `measure_trust`.

    Args:
        worlds: Both worlds of the model.
        strangers: A set of the same body and task.
        seen: Families whose algorithm has collected some of the model's data, which do not count.
        episodes: Episodes of each, at most as many as the set has.

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
    """The plain policies that can act on what `worlds` shows: blind ones always."""

    def fits(policy: Any) -> bool:
        inner = policy.policy if isinstance(policy, NoisyPolicy) else policy
        return not isinstance(inner, PlainMLP) or inner.mean.shape == worlds.observation_space.shape

    return {name: policy for name, policy in policies.items() if fits(policy)}


def made_policies(worlds: Worlds, seed: int = 0) -> dict[str, PolicyLike]:
    """Policies that no model was trained with: random and zero actions, and rhythms, half of them with noise."""
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


STEPS = (40_000, 200_000, 600_000)
"""Dream steps of optimising at which the agent is judged: 1, 5 and 15 minutes at 40,000 steps a minute, as one core has
taken them; counted, so that a busy machine finds the same agents."""

UNTRAINED = "untrained"

ANCHORS = ("random", "zero")
"""Policies that need no training, by which returns are measured."""


def agent_name(steps: int) -> str:
    """What an agent is called by its steps of optimising."""
    return f"after {steps:,} steps" if steps else UNTRAINED


def lift(agents: Comparison, steps: Sequence[int], best: float | None = None) -> dict[str, Any]:
    """What the last agent earns in the world beyond its start.

    Args:
        agents: Both worlds' returns of the agents and of `ANCHORS`.
        steps: Steps of optimising.
        best: The best real return that is known, for the share that the lift is of the way from random actions to it.

    Returns:
        Mean real returns: ``"agent"`` with its ``"interval"``, ``"untrained"``, ``"random"``, ``"zero"``; the
        ``"lift"`` over the best of these three; ``"share"``, None without a `best` above random actions.
    """
    by_name = {policy.name: policy for policy in agents.policies}
    agent = by_name[agent_name(steps[-1])].real
    begun = {name: by_name[name].real.mean for name in (UNTRAINED, *ANCHORS)}
    way = None if best is None else best - begun["random"]
    return {
        "steps": steps[-1],
        "agent": agent.mean,
        "interval": list(agent.interval),
        **begun,
        "lift": agent.mean - max(begun.values()),
        "share": (agent.mean - begun["random"]) / way if way is not None and way > 0 else None,
    }


def exploitability(agents: Comparison, steps: Sequence[int]) -> dict[str, Any]:
    """By how much the dream overestimates the agent that optimises in it, after each number of steps.

    Args:
        agents: Both worlds' returns of the agents.
        steps: Steps of optimising after which agents were kept.

    Returns:
        ``"steps"``, and for each the mean return in the ``"dream"``, in the ``"real"`` env, their ``"gap"`` and its
        ``"interval"``.
    """
    by_name: Mapping[str, PolicyReturns] = {policy.name: policy for policy in agents.policies}
    chosen = [by_name[agent_name(taken)] for taken in steps]
    return {
        "steps": list(steps),
        "dream": [policy.dream.mean for policy in chosen],
        "real": [policy.real.mean for policy in chosen],
        "gap": [policy.gap for policy in chosen],
        "interval": [list(policy.gap_interval) for policy in chosen],
    }
