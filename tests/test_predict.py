"""Real returns from dreams alone: what strangers suggest, and how often it holds."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import aime_gym
from aime_gym.commands.compare import Compare
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison
from aime_gym.evaluation.predict import Calibration, DreamJudge, bundled_calibrations, predict_interval, relative_doubt
from aime_gym.evaluation.worlds import Worlds
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


def test_without_strangers_of_its_own_a_higher_promise_never_has_a_lower_end():
    """Who is promised more at equal doubt is chosen, however strangers of other tasks erred about such promises."""
    places = np.linspace(0, 1, 40)
    others = [strangers(places, np.where(np.arange(40) % 10 == 8, 0.0, places))]  # some of which are promised too much
    ends = np.array([predict_interval(promise, 0.0, None, others) for promise in np.linspace(0, 1, 50)])
    assert (np.diff(ends, axis=0) > 0).all()
    assert np.ptp(ends[:, 2] - ends[:, 1]) < 1e-6


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
    no_real_env(monkeypatch)
    told = aime_gym.predict_return("random", "Cartpole", task="swingup", episodes=4)
    assert told.interval[0] <= comparison.policies[0].real.mean <= told.interval[1]
    assert told.interval[0] <= told.mean <= told.interval[1]
    np.testing.assert_array_equal(told.dream.returns, comparison.policies[0].dream.returns)
    assert "random at cartpole swingup" in str(told)
    assert "40 strangers" in told.reason


def no_real_env(monkeypatch):
    def made(*args, **keywords):
        raise AssertionError("a real env was made")

    monkeypatch.setattr("aime_gym.envs.real.RealEnv.__init__", made)
    monkeypatch.setitem(sys.modules, "dm_control", None)  # nor is the simulator needed


def test_a_comparison_without_a_real_step_predicts(monkeypatch, tmp_path):
    no_real_env(monkeypatch)
    task = {"embodiment": "Cartpole", "task": "swingup", "episodes": 4}
    compared = aime_gym.compare(["random", "zero", lambda rows: rows[:, :1]], **task, real_episodes=0)
    told = aime_gym.predict_return("zero", **task)
    policy = compared.policies[1]
    assert (policy.predicted.mean, policy.predicted.interval) == (told.mean, told.interval)
    np.testing.assert_array_equal(policy.dream.returns, told.dream.returns)
    assert (compared.episodes, compared.real_episodes) == (4, 0)
    for asked, quantity in ((policy, "real"), (policy, "gap"), (policy, "gap_interval"), (compared, "metrics")):
        with pytest.raises(AimeGymError, match="real env is not known, as that was not asked"):
            getattr(asked, quantity)
    text = " ".join(str(compared).split())
    assert "4 dreams, no real episode" in text
    assert f"{told.mean:.0f} [{told.interval[0]:.0f}, {told.interval[1]:.0f}]" in text
    assert "predicted [90% interval], without a real step It rests on 40 strangers" in text
    assert "gap" not in text
    assert "the real env was not asked" in compared.verdict
    written = json.loads(compared.to_json(tmp_path / "returns.json").read_text())
    assert (written["real_episodes"], written["metrics"]) == (0, None)
    assert (written["policies"]["zero"]["real"], written["policies"]["zero"]["gap"]) == (None, None)
    assert written["policies"]["zero"]["predicted"]["interval"] == list(told.interval)
    assert Comparison.from_json(tmp_path / "returns.json").to_dict() == compared.to_dict()
    for wrong in (None, {"mean": 1.0, "interval": [0.0], "reason": ""}, {"mean": "much"}):
        written["policies"]["zero"]["predicted"] = wrong
        (tmp_path / "odd.json").write_text(json.dumps(written))
        with pytest.raises(AimeGymError, match="not hold a comparison"):
            Comparison.from_json(tmp_path / "odd.json")


def test_the_command_compares_without_a_real_step(monkeypatch, tmp_path, capsys):
    no_real_env(monkeypatch)
    job = Compare(("random", "zero"), "cartpole", "swingup", episodes=2, real_episodes=0, out=tmp_path / "out")
    job.run()
    assert "without a real step" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the real env was not asked" in page
    assert "<th>predicted</th>" in page
    assert "It rests on 40 strangers" in page
    assert "<video" not in page
    assert json.loads((tmp_path / "out" / "returns.json").read_text())["real_episodes"] == 0


def test_a_trial_in_the_dream_says_what_is_predicted(monkeypatch):
    no_real_env(monkeypatch)
    judge = DreamJudge(Worlds("Cartpole", "swingup"), seed=7, episodes=3)
    told = aime_gym.predict_return("zero", "Cartpole", task="swingup", episodes=3, seed=7)
    verdict = judge.judge("zero")
    assert (verdict["low"], verdict["predicted"], verdict["high"]) == (told.interval[0], told.mean, told.interval[1])
    assert verdict == judge.judge("zero") | {"dream": told.dream.mean}
    assert not verdict["beats_random"]
    judge._random = told.interval[0] - 1
    assert judge.judge("zero")["beats_random"]
    judge.close()
    cut = Worlds("Cartpole", "swingup", max_episode_steps=5)
    with cut, pytest.raises(AimeGymError, match="whole episodes"):
        DreamJudge(cut)


def test_twins_of_the_first_dreams_are_enough():
    task = {"embodiment": "Pendulum", "task": "swingup", "episodes": 4, "max_episode_steps": 10}
    few, all_ = (aime_gym.compare("random", **task, real_episodes=count).policies[0] for count in (2, None))
    np.testing.assert_array_equal(few.real.returns, all_.real.returns[:2])
    np.testing.assert_array_equal(few.dream.returns, all_.dream.returns)
    assert few.gap == all_.dream.returns[:2].mean() - all_.real.returns[:2].mean()
    many = aime_gym.compare("random", **task | {"episodes": 2}, real_episodes=4)
    assert many.policies[0].gap == pytest.approx(few.gap, rel=1e-4)  # dreams in batches of two and of four
    assert "2 dreams, 4 real episodes" in str(many)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"real_episodes": -1}, "--real-episodes starts at 0; got -1"),
        ({"real_episodes": 0, "max_episode_steps": 5}, "whole episodes, 125 steps of cartpole"),
        ({"real_episodes": 0, "trust": True}, "--trust compares as many real episodes as dreams"),
        (
            {"real_episodes": 0, "strangers": Path("benchmarks/strangers/cartpole-swingup"), "agents": ()},
            "leave out agents",
        ),
    ],
)
def test_a_comparison_that_cannot_be_without_the_world_is_refused_at_once(tmp_path, flags, message):
    model = tmp_path / "model"
    shutil.copytree(aime_gym.load_pretrained_model("cartpole-state").folder, model)
    named = {"agents": ("random",) * 5, "model": str(model), "out": tmp_path / "out"}
    with pytest.raises(AimeGymError, match=message):
        Compare(**named | flags).run()
    assert not (tmp_path / "out").exists()
    assert json.loads((model / TRUST).read_text())["tasks"]["swingup"]["kin"]["policies"] == 11


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
