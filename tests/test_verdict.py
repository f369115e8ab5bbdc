"""What `aime-gym dream` says of an agent: learned, not learned yet, or paid for by the dream alone."""

from __future__ import annotations

import numpy as np
import pytest

from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.report import judge
from aime_gym.evaluation.returns import Episodes


def compared(dream: float, real: float, random_dream: float = 43.0, random_real: float = 44.0) -> Comparison:
    """An agent and random actions, with twenty episodes around these means."""
    rng = np.random.default_rng(0)

    def episodes(mean: float) -> Episodes:
        return Episodes(mean + 10 * rng.standard_normal(20), np.full(20, 500))

    agent = PolicyReturns("SHAC from the dream", episodes(dream), episodes(real))
    random = PolicyReturns("random", episodes(random_dream), episodes(random_real))
    return Comparison("walker", "walk", "walker-state", 0, 500, (agent, random))


@pytest.mark.parametrize(
    ("returns", "outcome", "begins", "beside"),
    [
        ((962, 961), "learned", "Learned: 96", "where random actions earn 4"),
        ((600, 400), "learned", "Learned: ", "where random actions earn"),
        ((460, 23), "dream pays", "The dream pays for what the world does not: 4", "worse than random actions (4"),
        ((288, 29), "dream pays", "The dream pays", "worse than random actions (4"),
        ((900, 300), "dream pays", "The dream pays", "more than random actions (4"),
        ((55, 17), "not learned", "Not learned yet: 1", "worse than random actions (4"),
        ((44, 44), "not learned", "Not learned yet: 4", "no better than random actions (4"),
        ((70, 60), "not learned", "Not learned yet: ", "more than random actions (4"),
    ],
)
def test_the_verdict_is_in_words(returns, outcome, begins, beside):
    verdict = judge(compared(*returns))
    assert verdict.outcome == outcome
    assert verdict.text.startswith(begins)
    assert beside in verdict.text


def test_returns_may_be_negative():
    assert judge(compared(-132, -140, -1200, -1210)).outcome == "learned"
    assert judge(compared(-132, -1300, -1200, -1210)).outcome == "dream pays"
    assert judge(compared(-1190, -1205, -1200, -1210)).outcome == "not learned"
