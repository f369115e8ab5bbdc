"""The seven measures: a dream of itself is perfect in all of them, what is broken shows in its own, and runs go on."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from aime_gym.agents.numpy_policies import PlainMLP
from aime_gym.commands import score as score_job
from aime_gym.commands.score import optimise
from aime_gym.commands.strangers import Strangers
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.fidelity import (
    KINDS,
    Fidelity,
    action_distance,
    by_distance,
    calibration,
    counterfactual_fidelity,
    counterfactuals,
    covered,
    uncovered,
)
from aime_gym.evaluation.real_episodes import filter_episode, watch
from aime_gym.evaluation.score import ANCHORS, Score, exploitability, lift, write_card
from aime_gym.evaluation.validity import (
    accuracy,
    closed_loop_validity,
    compare_in,
    fitting,
    made_policies,
    rank_made,
    return_limit,
    reward_accuracy,
    spread_of,
    steps_within,
)
from aime_gym.evaluation.worlds import Worlds
from aime_gym.world_model.checkpoint import load_pretrained_model
from tests.tiny_model import make_tiny_model

QUIET = Console(quiet=True)


class OwnWorld(Worlds):
    """A world that is the dream of a model: of the model that is judged, or of another one."""

    def __init__(self, model, truth=None):
        super().__init__("pendulum", None, model, "latent", max_episode_steps=60, reward="head")
        self._truth = truth or copy.deepcopy(self.model)

    def dream_envs(self, num_envs, **kwargs):
        return super().dream_envs(num_envs, **{**kwargs, "deterministic": True})

    def real_envs(self, num_envs, max_episode_steps=None, **kwargs):
        return self._make_dream(num_envs, self._truth, deterministic=True)

    blind_envs = real_envs

    def real_starts(self, starts):
        return {"start": starts}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "pendulum")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other") / "model", "pendulum", seed=1)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("foreign") / "model", "Pendulum-v1")


def watched_in(worlds):
    policies = made_policies(worlds)
    return list(watch({name: policies[name] for name in list(policies)[:4]}, worlds, 2))


def test_a_dream_of_itself_is_perfect(tiny, tmp_path):
    with OwnWorld(load_pretrained_model(tiny)) as worlds:
        watched = watched_in(worlds)
        fidelity = counterfactual_fidelity(worlds, watched, 4)
        assert fidelity.error.shape == (4 * len(KINDS), 3)
        assert fidelity.error.max() < 1e-9  # batches of other sizes round otherwise
        assert fidelity.reward_error.max() < 1e-5
        assert fidelity.distance.max() > 0.5
        validity = closed_loop_validity(worlds, watched).summary()
        assert validity["sensors"] == validity["rewards"] == validity["length"] == 50
        rewards = reward_accuracy(worlds, watched)
        for found in (rewards.filtered, rewards.prior):
            assert found.r2 == pytest.approx(1, abs=1e-6)
            assert found.error < 1e-5
        verdict = rank_made(worlds, made_policies(worlds), 2).verdict
        assert verdict["spearman"] == 1
        assert verdict["mean_absolute_error"] < 1e-3
        agents = optimise(worlds, tmp_path, (256, 512), 0, QUIET)
        returns = compare_in(worlds, agents | dict(zip(ANCHORS, ANCHORS, strict=True)), 2)
        assert exploitability(returns, (256, 512))["gap"] == pytest.approx([0, 0], abs=1e-3)
        found = lift(returns, (256, 512))
        assert found["lift"] == pytest.approx(
            found["agent"] - max(found[name] for name in ("untrained", "random", "zero"))
        )


def test_another_world_is_told_from_it(tiny, other):
    with OwnWorld(load_pretrained_model(tiny), load_pretrained_model(other)) as worlds:
        watched = watched_in(worlds)
        assert np.median(counterfactual_fidelity(worlds, watched, 4).error) > 0.01
        validity = closed_loop_validity(worlds, watched).summary()
        assert validity["sensors"] < validity["length"]
        assert reward_accuracy(worlds, watched).filtered.error > 1e-3
        assert rank_made(worlds, made_policies(worlds), 2).verdict["mean_absolute_error"] > 1e-3


def test_a_broken_reward_head_lowers_the_accuracy_of_rewards_alone(tiny):
    found = []
    for broken in (False, True):
        model = load_pretrained_model(tiny)
        truth = copy.deepcopy(model)
        if broken:
            last = model.heads.rewards["swingup"][-1]
            with torch.no_grad():
                last.weight.neg_()
        with OwnWorld(model, truth) as worlds:
            watched = watched_in(worlds)
            rewards = reward_accuracy(worlds, watched)
            fidelity, validity = counterfactual_fidelity(worlds, watched, 4), closed_loop_validity(worlds, watched)
            found.append((rewards, fidelity, validity))
    (good, fine, long), (bad, still_fine, still_long) = found
    assert good.filtered.r2 > 0.999 > 0.5 > bad.filtered.r2
    assert good.prior.r2 > 0.999 > 0.5 > bad.prior.r2
    np.testing.assert_array_equal(fine.error, still_fine.error)
    np.testing.assert_array_equal(fine.doubt, still_fine.doubt)
    assert long.sensors == still_long.sensors
    assert still_fine.reward_error.mean() > fine.reward_error.mean()


def test_the_latents_of_an_episode_are_those_that_the_wrapper_shows(tiny):
    """The same episode, seen as sensors and as the wrapper's latents."""
    seen = {}
    for kind in ("state", "latent"):
        with Worlds("pendulum", None, load_pretrained_model(tiny), kind, 30) as worlds:
            recording = next(iter(watch({"random": "random"}, worlds, 1))).recordings[0]
            seen[kind] = filter_episode(worlds, recording.observations, recording.actions)
    torch.testing.assert_close(seen["state"], seen["latent"])


def test_actions_that_are_taken_instead():
    own = np.full((20, 2), 0.25, np.float32)
    taken = counterfactuals(own, np.random.default_rng(0))
    assert tuple(taken) == KINDS
    np.testing.assert_array_equal(taken["policy"], own)
    np.testing.assert_array_equal(taken["opposite"], -own)
    assert set(np.unique(taken["saturated"])) == {-1.0, 1.0}
    assert (taken["held"] == taken["held"][0]).all()
    assert all(np.abs(actions).max() <= 1 for actions in taken.values())
    distance = {kind: action_distance(actions, own)[-1] for kind, actions in taken.items()}
    assert distance["policy"] == 0
    assert distance["opposite"] == pytest.approx(0.5)
    assert 0.2 < distance["near"] < 0.4 < distance["uniform"] < distance["saturated"]
    np.testing.assert_allclose(action_distance(np.array([[1.0], [0.0]]), np.zeros((2, 1))), [1, np.sqrt(0.5)])


def test_bins_hold_as_many_pairs_each_and_leave_out_what_is_not_known():
    distance, values = np.array([3, 1, 2, 0, 5, np.nan, 4.0]), np.array([30, 10, 20, 0, np.nan, 9, 40.0])
    assert by_distance(distance, values, 5) == [0, 10, 20, 30, 40]
    assert by_distance(distance, np.full(7, np.nan)) == [None] * 3


def test_a_horizon_ends_before_the_first_step_that_is_off():
    assert steps_within(np.array([0.1, 0.2, 0.9, 0.1]), 0.5) == 2
    assert steps_within(np.array([0.1, 0.2]), 0.5) == 2
    assert steps_within(np.array([0.1, np.nan, 0.1]), 0.5) == 1
    rng = np.random.default_rng(0)
    episodes = [3 * rng.standard_normal((400 - 50 * i, 2)) for i in range(4)]
    assert spread_of(episodes, np.array([3.0, 3.0])) == pytest.approx(2, rel=0.15)


def test_rewards_that_have_no_range_may_differ_by_a_share_of_one_step():
    assert return_limit([0.0, 200.0, 50.0], 2.0) == pytest.approx(20)
    assert return_limit([0.0, 0.0], 2.0) == pytest.approx(0.2)


def test_accuracy_of_rewards():
    true = np.array([0.0, 1.0, 2.0])
    assert accuracy(true, true).r2 == 1
    off = accuracy(true + 1, true)
    assert (off.error, off.bias) == (1, 1)
    assert off.r2 == pytest.approx(1 - 1 / true.var())
    assert accuracy(true, np.ones(3)).r2 is None


def test_doubt_that_tells_errors_is_told_from_doubt_that_does_not():
    error = np.arange(1.0, 11)
    assert covered(error, error, 0.5) == 3
    assert uncovered(error, error, 0.5) == 8
    assert covered(-error, error, 0.5) == 8
    unsure = np.where(error > 9, np.inf, error)
    assert uncovered(unsure, error, 0.9) == 10

    def of(doubt):
        column = np.ones((10, 1))
        return calibration(Fidelity((1,), ("near",) * 10, column, error[:, None], column, doubt[:, None]), ())

    assert of(error)["steps"] == pytest.approx(1)
    assert of(-error)["steps"] == pytest.approx(-1)
    assert of(error)["coverage"][0] == sorted(of(error)["coverage"][0])


def test_an_interrupted_optimisation_finds_the_same_agents(tiny, tmp_path):
    with Worlds("pendulum", None, load_pretrained_model(tiny)) as worlds:
        optimise(worlds, tmp_path / "once", (256, 512), 0, QUIET)
        optimise(worlds, tmp_path / "twice", (256,), 0, QUIET)
        again = optimise(worlds, tmp_path / "twice", (256, 512), 0, QUIET)
        once = optimise(worlds, tmp_path / "once", (256, 512), 0, QUIET)
    observations = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    acts = [agent.predict(observations, deterministic=True)[0] for agent in (*once.values(), *again.values())]
    assert len(once) == len(again) == 3
    for first, second in zip(acts[:3], acts[3:], strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(acts[1], acts[2])


def a_job(model: Path, out: Path, **flags) -> score_job.Score:
    settings = {"episodes": 2, "watch": 1, "states": 2, "steps": (256, 512), "max_episode_steps": 40}
    return score_job.Score(str(model), out=out, **{**settings, **flags})


def test_the_command_goes_on_where_it_was_stopped(foreign, tmp_path, monkeypatch, capsys):
    """With a foreign body, of which no physics is known."""

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)  # where no strangers lie
    with monkeypatch.context() as patched:
        patched.setattr(score_job._Measuring, "_ranking", stop)
        with pytest.raises(KeyboardInterrupt):
            a_job(foreign, tmp_path / "out").run()
    assert "to go on: aime-gym score" in capsys.readouterr().out.replace("\n", " ")
    before = Score.from_json(tmp_path / "out/score.json")
    assert before.fidelity is not None
    assert before.ranking is None
    assert not before.is_complete
    with monkeypatch.context() as patched:
        for done in ("_fidelity", "_validity", "_reward"):
            patched.setattr(score_job._Measuring, done, stop)
        a_job(foreign, tmp_path / "out").run()
    told = capsys.readouterr().out
    assert "No strangers were given" in told.replace("\n", " ")
    page = Score.from_json(tmp_path / "out/score.json")
    assert page.is_complete
    assert set(page.measures) == {
        *("fidelity", "validity", "reward", "ranking", "lift", "exploitability", "calibration"),
    }
    assert page.to_dict()["parts"]["fidelity"] == before.to_dict()["parts"]["fidelity"]
    assert json.loads((tmp_path / "out/score.json").read_text()) == json.loads(json.dumps(page.to_dict()))
    assert (tmp_path / "out/score.png").stat().st_size > 10_000
    assert not page.lacking
    kept = (tmp_path / "out/score.json").read_bytes()
    a_job(foreign, tmp_path / "out").run()
    assert (tmp_path / "out/score.json").read_bytes() == kept
    with pytest.raises(AimeGymError, match="choose another"):
        a_job(foreign, tmp_path / "out", seed=1).run()


@pytest.mark.slow
def test_parts_side_by_side_are_those_of_one_process(foreign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no strangers lie
    for workers in (1, 2):
        a_job(foreign, tmp_path / str(workers), workers=workers).run()
    alone, beside = ((tmp_path / workers / "score.json").read_bytes() for workers in ("1", "2"))
    assert alone == beside
    assert {path.name for path in (tmp_path / "1").iterdir()} == {path.name for path in (tmp_path / "2").iterdir()}


def test_parts_that_other_processes_had_measured_are_kept(foreign, tmp_path, monkeypatch):
    """A call that is killed leaves their pages."""
    monkeypatch.chdir(tmp_path)
    fails = {part: lambda self: pytest.fail("it was measured") for part in ("_fidelity", "_validity", "_reward")}
    others = dict.fromkeys(("_ranking", "_agents"), _cannot)
    with monkeypatch.context() as patched:
        for name, instead in (others | {"_reward": _cannot}).items():
            patched.setattr(score_job._Measuring, name, instead)
        a_job(foreign, tmp_path / "out").run()
    page = Score.from_json(tmp_path / "out/score.json")
    (tmp_path / "out/score.json").rename(tmp_path / "out/fidelity.json")
    for name, instead in (fails | others).items():
        monkeypatch.setattr(score_job._Measuring, name, instead)
    a_job(foreign, tmp_path / "out").run()
    assert Score.from_json(tmp_path / "out/score.json").to_dict() == page.to_dict()
    assert not (tmp_path / "out/fidelity.json").exists()


def _cannot(self):
    raise AimeGymError("not here")


def test_strangers_are_ranked_and_the_card_keeps_the_newest_page(tiny, foreign, tmp_path):
    Strangers(
        "pendulum", families=("rhythm",), seeds=2, stages=(1.0,), effort=1 / 60, episodes=2, out=tmp_path / "set"
    ).run()
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "README.md").write_text("# mine\n\nBefore.\n")
    a_job(model, tmp_path / "out", strangers=tmp_path / "set", card=True).run()
    page = Score.from_json(tmp_path / "out/score.json")
    assert page.ranking.are_strangers
    strangers = page.measures["ranking"]["strangers"]
    assert strangers["finding"] == "inconclusive"  # two runs of one family
    assert strangers["policies"] == len(page.ranking.comparison.policies) >= 2
    assert page.notes == ()
    card = (model / "README.md").read_text()
    assert card.startswith("# mine\n\nBefore.\n")
    assert card.count("Seven measures") == 1
    assert "seed 0" in card
    newer = write_card(model, replace(page, seed=7)).read_text()
    assert newer == card.replace("seed 0", "seed 7")
    assert write_card(model, replace(page, task="lift")).read_text().count("Seven measures") == 2
    with pytest.raises(AimeGymError, match="name a set of it"):
        a_job(foreign, tmp_path / "other", strangers=tmp_path / "set").run()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": (512, 256)}, "--steps"),
        ({"steps": ()}, "--steps"),
        ({"episodes": 0}, "--episodes starts at 1"),
        ({"card": True, "model": "pendulum-state"}, "folder of your own"),
    ],
)
def test_wrong_flags_leave_nothing(flags, message, tiny, tmp_path):
    model = flags.pop("model", tiny)
    with pytest.raises(AimeGymError, match=message):
        a_job(model, tmp_path / "out", **flags).run()
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AimeGymError, match=r"notes\.txt"):
        a_job(tiny, tmp_path).run()
    (tmp_path / "score.json").write_text('{"format": "aime_gym.score/1", "steps": 3}')
    with pytest.raises(AimeGymError, match="does not hold a score"):
        Score.from_json(tmp_path / "score.json")


def test_policies_that_see_something_else_are_left_out(tiny):
    layers = (np.zeros((3, 1), np.float32),), (np.zeros(1, np.float32),)
    sighted = PlainMLP(*layers, np.zeros(3, np.float32), np.ones(3, np.float32))
    model = load_pretrained_model(tiny)
    for kind, count in (("state", 11), ("latent", 10)):
        with Worlds("pendulum", None, model, kind) as worlds:
            assert len(fitting(worlds, made_policies(worlds) | {"sighted": sighted})) == count
