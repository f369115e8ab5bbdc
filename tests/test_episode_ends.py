"""The benchmark of how episodes end: in dreams of a tiny model, and by numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from aime_gym.commands.strangers import Strangers
from aime_gym.evaluation.returns import Episodes
from aime_gym.files import read_json
from benchmarks.episode_ends import EpisodeEnds, ends_of, summary
from tests.tiny_model import make_tiny_model


class KnownWorlds:
    """Worlds in which episodes of a policy end as it says: the dream goes on twice as long, up to the limit."""

    max_episode_steps = 20

    def evaluate(self, policy, episodes, seed):
        real = np.full(episodes, policy)
        return [Episodes(lengths * 1.0, lengths) for lengths in (np.minimum(2 * real, 20), real)]


def test_lengths_and_falls_are_those_of_the_episodes():
    policies = {str(steps): ends_of(KnownWorlds(), steps, 4) for steps in (4, 8, 12, 20)}
    assert policies["12"]["dream"] == {"length": 20, "falls": 0, "return": 20}
    assert policies["12"]["real"] == {"length": 12, "falls": 1, "return": 12}
    told = summary(policies)
    assert told["length"]["mean_absolute_error"] == pytest.approx((4 + 8 + 8 + 0) / 4)
    assert told["falls"]["mean_absolute_error"] == pytest.approx(1 / 4)
    assert told["length, some fall"]["policies"] == 3
    assert told["length, some fall"]["spearman"] == pytest.approx(1)


def test_strangers_fall_in_both_worlds(tmp_path, capsys):
    model = make_tiny_model(tmp_path / "model", "CartPole-v1")
    flags = {"families": ("rhythm",), "seeds": 2, "stages": (0.5, 1.0), "effort": 0.003, "episodes": 2}
    Strangers("CartPole-v1", out=tmp_path / "set", **flags).run()
    measured = EpisodeEnds(
        str(model), tmp_path / "set", episodes=3, max_episode_steps=40, out=tmp_path / "ends.json"
    ).run()
    assert "Spearman" in capsys.readouterr().out
    assert measured == read_json(tmp_path / "ends.json")
    assert len(measured["policies"]) == 4
    for ends in measured["policies"].values():
        for world in ("dream", "real"):
            assert 0 < ends[world]["length"] <= 40
            assert (ends[world]["falls"] == 0) == (ends[world]["length"] == 40)
