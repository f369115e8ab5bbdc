"""What came out of a training in the dream, in words: learned, not learned yet, or paid for by the dream alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aime_gym.agents.skill import beats_clearly
from aime_gym.evaluation.comparison import Comparison, PolicyReturns, plus_minus
from aime_gym.evaluation.metrics import bootstrap_interval, rounded

FAIR_SHARE = 0.5
"""Of what the dream promises beyond random actions, the world should pay this share at least."""


@dataclass(frozen=True)
class Verdict:
    """What became of an agent from a dream."""

    outcome: Literal["learned", "not learned", "dream pays"]
    """Whether the agent clearly beats random actions in the world, does not, or earns in the dream what the world pays
    less than half of."""
    text: str
    """The same in a sentence with both returns and that of random actions."""


def judge(comparison: Comparison) -> Verdict:
    """Judges the first policy of a comparison by the one that is called ``"random"``.

    Args:
        comparison: Of an agent and random actions, from the same starts.
    """
    agent = comparison.policies[0]
    random = next(policy for policy in comparison.policies if policy.name == "random")
    promised = agent.dream.mean - random.dream.mean
    paid = agent.real.mean - random.real.mean
    dreamt, earned = plus_minus(agent.dream), f"{plus_minus(agent.real)} in the real env"
    if beats_clearly(agent.dream.returns, random.dream.returns) and paid < FAIR_SHARE * promised:
        return Verdict(
            "dream pays",
            f"The dream pays for what the world does not: {dreamt} dreamt, {earned}, {_beside(agent, random)}.",
        )
    if beats_clearly(agent.real.returns, random.real.returns):
        return Verdict(
            "learned",
            f"Learned: {earned}, where random actions earn {rounded(random.real.mean)}; the dream said {dreamt}.",
        )
    return Verdict("not learned", f"Not learned yet: {earned}, {_beside(agent, random)}; the dream said {dreamt}.")


def _beside(agent: PolicyReturns, random: PolicyReturns) -> str:
    """How the agent's real return compares with that of random actions from the same starts."""
    chance = f"random actions ({rounded(random.real.mean)})"
    low, high = bootstrap_interval(agent.real.returns - random.real.returns)
    if high < 0:
        return f"worse than {chance}"
    return f"more than {chance}" if low > 0 else f"no better than {chance}"
