"""Real returns from dreams alone: what strangers suggest, and how often it holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

import aime_gym
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.predict import Calibration, bundled_calibrations, predict_interval, relative_doubt
from aime_gym.world_model.trust import TRUST, Trust, load_trust
from benchmarks.predicted_returns import PredictedReturns
from tests.random_models import write_random_model


def strangers(dream, real, doubt=None, families=None) -> Calibration:
    count = len(dream)
    doubts = np.zeros(count) if doubt is None else np.asarray(doubt, float)
    runs = np.array([f"run-{index}" for index in range(count)])
    return Calibration(
        np.asarray(dream, float), np.asarray(real, float), doubts, runs, np.array(families or ["a"] * count), (0.0, 1.0)
    )


def test_an_interval_is_what_strangers_that_are_alike_suggest():
    places = np.linspace(0, 1, 50)
    exact = strangers(places, places)
    mean, low, high = predict_interval(0.5, 0.0, exact, [])
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))
    # Half of the promise is kept, at whatever is promised.
    mean, low, high = predict_interval(0.9, 0.0, strangers(places, places / 2), [])
    assert mean == pytest.approx(0.45, abs=0.1)
    assert low < 0.45 < high
    # Doubtful dreams err by a half either way, others not at all.
    doubt = np.tile([0.0, 5.0], 25)
    torn = strangers(places, places + np.where(doubt, np.tile([0, 0.5, 0, -0.5], 13)[:50], 0.0), doubt)
    _, *sure = predict_interval(0.5, 0.0, torn, [])
    _, *unsure = predict_interval(0.5, 5.0, torn, [])
    assert np.ptp(sure) < 0.05
    assert np.ptp(unsure) > 0.9


def test_strangers_of_other_models_speak_where_the_own_say_little():
    far = strangers([0.0, 0.01, 0.02], [0.0, 0.01, 0.02])  # nobody who was promised much
    others = [strangers(np.full(20, 0.9), np.linspace(0.1, 1.1, 20))]
    _, low, high = predict_interval(0.9, 0.0, far, others)
    assert low < 0.2
    assert high > 1.0
    assert predict_interval(0.9, 0.0, None, others) == pytest.approx(predict_interval(0.9, 0.0, far, others), abs=0.1)


def test_intervals_hold_for_families_that_were_left_out(tmp_path, capsys):
    assert len(bundled_calibrations()) >= 7
    PredictedReturns(tmp_path / "told.json").run()
    told = json.loads((tmp_path / "told.json").read_text())["all"]
    assert told["policies"] > 150
    assert 0.85 <= told["covered"] <= 0.97
    assert told["ratio"] <= 0.5
    assert "swingup" in capsys.readouterr().out


def test_a_policy_is_predicted_without_a_real_step(monkeypatch):
    comparison = aime_gym.compare("random", "Cartpole", task="swingup", episodes=4)
    monkeypatch.setattr("aime_gym.evaluation.worlds.Worlds.real_envs", None)
    told = aime_gym.predict_return("random", "Cartpole", task="swingup", episodes=4)
    assert told.interval[0] <= comparison.policies[0].real.mean <= told.interval[1]
    assert told.interval[0] <= told.mean <= told.interval[1]
    np.testing.assert_array_equal(told.dream.returns, comparison.policies[0].dream.returns)
    assert "random at cartpole swingup" in str(told)
    assert "40 strangers" in told.reason


def test_a_model_without_strangers_has_the_width_of_all_others(tmp_path):
    write_random_model(tmp_path)
    told = aime_gym.predict_return("zero", "Walker", task="walk", model=tmp_path, episodes=2)
    assert "No stranger" in told.reason
    assert told.interval[1] - told.interval[0] > 100


def test_broken_numbers_of_strangers_are_told(tmp_path):
    folder = bundled_folder = aime_gym.load_pretrained_model("cartpole-state").folder
    content = json.loads((bundled_folder / TRUST).read_text())
    assert Calibration.of(load_trust(folder)["swingup"]) is not None
    assert Calibration.of(Trust()) is None
    for name in ("config.yaml", "digests.json"):
        (tmp_path / name).write_bytes((bundled_folder / name).read_bytes())
    next(iter(content["tasks"]["swingup"]["strangers"]["returns"].values()))["dream"] = "many"
    (tmp_path / TRUST).write_text(json.dumps(content))
    with pytest.raises(AimeGymError, match=r"trust\.json.*many"):
        load_trust(tmp_path)


@pytest.mark.parametrize(("doubt", "usual", "expected"), [(None, 2.0, 0.0), (2.0, None, 0.0), (2 * np.e, 2.0, 1.0)])
def test_doubt_is_relative_to_what_is_usual(doubt, usual, expected):
    assert relative_doubt(doubt, usual) == pytest.approx(expected)
    assert relative_doubt(np.inf, 1.0) == 10.0
