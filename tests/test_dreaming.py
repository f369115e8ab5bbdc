"""An agent that learns in the dream and is tried in the world now and then."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rich.console import Console
from stable_baselines3 import PPO

from aime_gym.agents import dreaming
from aime_gym.agents.dreaming import RealJudge, Trials, beats_clearly, kept, last_trials, learn, newest
from aime_gym.agents.plain import load_plain_agent, make_agent, observation_statistics
from aime_gym.agents.sb3 import save_sb3_agent, take_up
from aime_gym.envs.sb3 import make_sb3_env
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_pretrained_model
from tests.random_models import write_random_model

RANDOM = (1.0, 1.2, 1.1)
"""Returns of random actions."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny")


def make(model, algo="ppo", **options):
    loaded = load_pretrained_model(model.folder)
    envs = make_sb3_env("AimeDream-Walker-v0", n_envs=4, seed=0, model=loaded, **{"max_episode_steps": 8, **options})
    return make_agent(algo, envs, observation_statistics(envs), 0)


@pytest.fixture
def agent(model):
    return make(model)


@pytest.fixture
def world():
    envs = make_sb3_env("AimeReal-Walker-v0", n_envs=2, seed=5, max_episode_steps=4)
    yield envs
    envs.close()


def same_weights(one, other):
    mine, theirs = (agent.get_parameters()["policy"] for agent in (one, other))
    return all(np.array_equal(weight, theirs[name]) for name, weight in mine.items())


@pytest.mark.parametrize("algo", ["shac", "sac"])
def test_an_agent_sees_all_turns_of_a_free_hinge_alike(tmp_path, algo):
    """Policies of the reacher's dream, as SB3 keeps them and as plain files; the shoulder is the first number."""
    model = load_pretrained_model("reacher-state")
    envs = make_sb3_env("AimeDream-Reacher-v0", n_envs=4, seed=0, model=model, max_episode_steps=8)
    agent = make_agent(algo, envs, observation_statistics(envs), 0)
    plain = load_plain_agent(save_sb3_agent(agent, tmp_path / "agent.zip"))
    frames = envs.reset()
    turned, elsewhere = frames.copy(), frames.copy()
    turned[:, 0] += 6 * np.pi
    elsewhere[:, 0] += np.pi
    for policy in (agent, plain):
        actions, same, others = (policy.predict(rows, deterministic=True)[0] for rows in (frames, turned, elsewhere))
        assert np.abs(actions - same).max() < 0.01 * np.abs(actions - others).max()
    np.testing.assert_array_equal(*(policy.predict(turned, deterministic=True)[0] for policy in (agent, plain)))
    envs.close()


def test_the_agent_of_the_best_trial_is_kept(agent, world, tmp_path):
    path = tmp_path / "agent.zip"
    judge = RealJudge(world)
    trials = Trials(judge, path, every=4)
    agent.learn(100, callback=trials)
    returns = [point["real"] for point in trials.curve]
    assert len(returns) == 32  # after every step of the one rollout
    assert len(set(returns)) > 1
    assert {point["episodes"] for point in trials.curve} == {2}
    assert len(set(judge.random)) == 2
    assert PPO.load(path).num_timesteps == kept(trials.curve)["steps"]
    assert kept(trials.curve)["real"] >= 0.98 * max(returns)


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ([77.0, 730.0, 962.0, 945.0], 3),  # five episodes do not tell them apart
        ([77.0, 962.0, 930.0], 1),
        ([900.0, 960.0, 945.0, 930.0, 990.0, 960.0], 4),
        ([-200.0, -150.0, -152.0, -160.0], 2),
        ([0.0, 0.0], 1),
    ],
)
def test_of_real_trials_that_are_alike_the_last_is_kept(returns, expected):
    trials = [{"real": real, "beats_random": True} for real in returns]
    assert kept(trials) is trials[expected]
    chosen, so_far = None, []
    for trial in trials:  # as a training meets them
        so_far.append(trial)
        chosen = trial if kept(so_far) is trial else chosen
    assert chosen is trials[expected]


def test_of_predicted_trials_the_best_is_kept():
    trials = [{"low": low, "predicted": predicted} for low, predicted in ((10.0, 90.0), (10.0, 95.0), (9.9, 99.0))]
    assert kept(trials) is trials[1]


def test_training_ends_when_trials_get_no_better(agent, world, tmp_path, monkeypatch):
    returns = [3.0, 1.0, 4.0, 2.0, 4.0, 3.0, 9.0]
    trials = Trials(RealJudge(world, RANDOM), tmp_path / "agent.zip", every=4, patience=3)
    results = iter(returns)
    monkeypatch.setattr(dreaming, "evaluate_policy", lambda *args, **kwargs: (3 * [next(results)], [4]))
    lesson = learn(agent, tmp_path / "agent.zip", Console(quiet=True), 1000, trials=trials)
    assert [point["real"] for point in lesson.curve if "real" in point] == returns[:6]
    assert lesson.ended == "learned"
    assert PPO.load(tmp_path / "agent.zip").num_timesteps == 20
    assert PPO.load(newest(tmp_path / "agent.zip")).num_timesteps == 24
    assert agent.num_timesteps == 24
    assert same_weights(agent, PPO.load(tmp_path / "agent.zip"))
    again = Trials(RealJudge(world, RANDOM), tmp_path / "agent.zip", every=4, patience=3, earlier=lesson.curve)
    assert learn(agent, tmp_path / "agent.zip", Console(quiet=True), 1000, trials=again).ended == "learned"
    assert agent.num_timesteps == 24  # nothing is left to learn, nor to try
    assert again.curve == []


def test_no_patience_ends_the_training_of_an_agent_that_is_no_better_than_chance(agent, world, tmp_path, monkeypatch):
    monkeypatch.setattr(dreaming, "evaluate_policy", lambda *args, **kwargs: (3 * [1.1], [4]))
    trials = Trials(RealJudge(world, RANDOM), tmp_path / "agent.zip", every=4, patience=3)
    lesson = learn(agent, tmp_path / "agent.zip", Console(quiet=True), 100, trials=trials)
    assert lesson.ended == "steps"
    assert len(trials.curve) == 32


@pytest.mark.parametrize(
    ("returns", "random", "expected"),
    [
        ([900.0, 950.0, 920.0], [40.0, 30.0, 35.0], True),
        ([50.0, 45.0, 40.0], [40.0, 30.0, 35.0], False),  # more, by no more than luck
        ([900.0, 0.0, 0.0], [40.0, 30.0, 35.0], False),  # once
        ([-150.0, -170.0, -160.0], [-1200.0, -1300.0, -1250.0], True),
        ([9e-4, 9.5e-4, 9.2e-4], [4e-5, 3e-5, 3.5e-5], True),  # in any unit
        ([900.0, 905.0, 895.0], 3 * [0.0], True),  # random actions that never find the reward
        ([9e-4, 9.05e-4, 8.95e-4], 3 * [0.0], True),
        (3 * [6.01], 3 * [6.0], False),  # all alike, and so is the agent
        (3 * [-5.99], 3 * [-6.0], False),
        (3 * [0.101], 3 * [0.1], False),  # alike but for rounding
        ([0.0, 0.0, 0.0, 0.0, 1.0], 5 * [0.0], False),
        (5 * [0.0], 5 * [0.0], False),
        ([6.01], [6.0], False),  # too few
        ([1.0], 5 * [0.0], False),
        ([900.0, 905.0, 895.0], [0.0, 1.0], False),
    ],
)
def test_what_beats_random_actions_clearly(returns, random, expected):
    assert beats_clearly(returns, random) is expected


@pytest.mark.parametrize("algo", ["shac", "ppo"])
def test_the_clock_does_not_decide_what_is_learned(model, tmp_path, monkeypatch, algo):
    """A seed gives one agent, on a machine that does a step in no time or takes a minute for it."""
    agents, lessons, returns = [], [], []
    for number, pace in enumerate((0.0, 60.0)):
        ticks = itertools.count()
        monkeypatch.setattr(dreaming.time, "monotonic", lambda ticks=ticks, pace=pace: pace * next(ticks))
        world = make_sb3_env("AimeReal-Walker-v0", n_envs=2, seed=5, max_episode_steps=4)
        path, agent = tmp_path / str(number) / "agent.zip", make(model, algo)
        trials = Trials(RealJudge(world), path, every=40, patience=2)
        lessons.append(learn(agent, path, Console(quiet=True), 300, trials=trials))
        agents.append(agent)
        returns.append([point["real"] for point in trials.curve])
        world.close()
    assert same_weights(*agents)
    assert returns[0] == returns[1]
    assert lessons[0].ended == lessons[1].ended


def test_the_limit_of_minutes_says_that_it_cut(agent, tmp_path):
    lesson = learn(agent, tmp_path / "agent.zip", Console(quiet=True), 10**7, minutes=1e-4)
    assert lesson.ended == "minutes"
    assert agent.num_timesteps < 10**5


def test_the_curve_is_of_episodes_that_ended(model, tmp_path):
    """It was the mean reward of a step, times the steps of an evaluation episode."""
    agent = make(model, "shac")
    lesson = learn(agent, tmp_path / "agent.zip", Console(quiet=True), 400)
    last = lesson.curve[-1]
    assert last["return"] == pytest.approx(np.mean([episode["r"] for episode in agent.ep_info_buffer]))
    assert last["length"] == 8
    reward = last["return"] / 8
    assert 0 < reward < 2


def test_learning_ends_with_the_kept_agent(agent, world, tmp_path):
    path = tmp_path / "agent.zip"
    curve = learn(agent, path, Console(quiet=True), 100, trials=Trials(RealJudge(world), path, every=10**6)).curve
    assert sum("real" in point for point in curve) == 1
    assert all(("real" in point) != ("return" in point) for point in curve)
    assert same_weights(agent, PPO.load(path))


def test_an_agent_learns_on(agent, tmp_path):
    for _ in range(2):
        curve = learn(agent, tmp_path / "agent.zip", Console(quiet=True), 100).curve
    assert curve[-1]["steps"] == 2 * 4 * 32
    assert PPO.load(tmp_path / "agent.zip").num_timesteps == 2 * 4 * 32


def test_the_curve_is_recorded_whenever_the_agent_is_saved(model, world, tmp_path, monkeypatch):
    """What a killed process has tried is known, as its agent is."""
    monkeypatch.setattr(dreaming, "SAVE_EVERY", 0.0)
    agent, path, records = make(model), tmp_path / "agent.zip", []
    trials = Trials(RealJudge(world, RANDOM), path, every=40)
    curve = learn(agent, path, Console(quiet=True), 128, trials=trials, record=records.append).curve
    assert len(records) == 32 + 4 + 1
    assert records[-1] == curve
    assert [sum("real" in point for point in record) for record in records[-3:]] == [3, 4, 4]


def test_a_trial_is_on_record_as_soon_as_its_agent_is_saved(agent, world, tmp_path):
    """A process may be killed at any time: a worse agent must not take the best one's place then."""
    path, records = tmp_path / "agent.zip", []

    def kill(curve):
        records.append((curve, PPO.load(newest(path)).num_timesteps))
        raise MemoryError

    with pytest.raises(MemoryError):
        learn(agent, path, Console(quiet=True), 1000, trials=Trials(RealJudge(world), path, every=40), record=kill)
    ((curve, steps),) = records
    assert [point["steps"] for point in curve if "real" in point] == [40]
    assert steps == PPO.load(path).num_timesteps == 40


def test_random_actions_are_measured_until_they_are_as_many_as_the_envs(agent, world, tmp_path):
    judge = RealJudge(world, [1.0])
    agent.learn(100, callback=Trials(judge, tmp_path / "agent.zip", every=10**6))
    assert judge.random[0] == 1.0
    assert len(judge.random) == 1 + 2


def test_a_new_agent_takes_up_what_was_saved(model, agent, tmp_path):
    learn(agent, tmp_path / "agent.zip", Console(quiet=True), 100)
    other = make(model)
    assert not same_weights(agent, other)
    assert take_up(other, tmp_path / "agent.zip") == other.num_timesteps == 4 * 32
    assert same_weights(agent, other)
    (tmp_path / "broken.zip").write_bytes((tmp_path / "agent.zip").read_bytes()[:1000])
    with pytest.raises(AimeGymError, match="no such agent to go on with"):
        take_up(other, tmp_path / "broken.zip")


def test_trials_go_on_from_those_before(agent, world, tmp_path, monkeypatch):
    """The best agent so far stays, and patience is not given anew."""
    path = tmp_path / "agent.zip"
    path.write_bytes(b"the best so far")
    earlier = [{"steps": 4, "seconds": 1.0, "real": real, "episodes": 2, "beats_random": True} for real in (7.0, 6.0)]
    trials = Trials(RealJudge(world, RANDOM), path, 4, patience=3, earlier=[{"steps": 2, "return": 1.0}, *earlier])
    results = iter([5.0, 6.5, 100.0])
    monkeypatch.setattr(dreaming, "evaluate_policy", lambda *args, **kwargs: ([next(results)], [4]))
    agent.learn(1000, callback=trials)
    assert [point["real"] for point in trials.curve] == [5.0, 6.5]
    assert path.read_bytes() == b"the best so far"


class Verdicts:
    """A judge without a world, whose verdicts are known before."""

    decides = "low"

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def judge(self, agent):
        low, mean = next(self.numbers)
        return {"predicted": mean, "low": low, "high": mean + 50.0, "dream": mean, "beats_random": low > 3}

    def close(self):
        pass


def test_the_agent_with_the_highest_lower_end_is_kept(agent, tmp_path):
    path = tmp_path / "agent.zip"
    sure = Verdicts((0.0, 5.0), (0.0, 9.0), (4.0, 6.0), (3.0, 900.0), (4.0, 5.0), (2.0, 7.0))
    later = Verdicts((5.0, 5.0), *4 * [(1.0, 1.0)])
    lesson = learn(agent, path, Console(quiet=True), 1000, trials=Trials(sure, path, every=4, patience=3))
    assert lesson.ended == "learned"  # at the sixth trial: what the dream promised in the fourth did not count
    assert PPO.load(path).num_timesteps == 12
    assert PPO.load(newest(path)).num_timesteps == 24
    trials = Trials(later, path, every=4, patience=4, earlier=lesson.curve)
    agent.num_timesteps = 24
    learn(agent, path, Console(quiet=True), 4, trials=trials, record=lambda curve: None)
    assert PPO.load(path).num_timesteps == 28


@pytest.mark.parametrize("algo", ["shac", "ppo"])
def test_before_the_end_the_best_agent_is_refined_in_smaller_steps(model, tmp_path, algo):
    agent, path = make(model, algo, obs_type="state"), tmp_path / "agent.zip"
    best, worse = (9.0, 9.0), (4.0, 4.0)
    rate, window = agent.learning_rate, 4 * agent.n_steps
    seen = []

    class Watching(Trials):
        def _on_rollout_start(self):
            super()._on_rollout_start()
            is_best = path.exists() and same_weights(self.model, type(agent).load(path))
            seen.append((round(rate / self.model.learning_rate), is_best))

    def trials(*verdicts, earlier=()):
        return Watching(Verdicts(*verdicts), path, window, patience=2, refinements=1, earlier=earlier)

    first = trials(best, worse, worse, worse, worse)
    lesson = learn(agent, path, Console(quiet=True), 100 * window, trials=first)
    assert lesson.ended == "learned"
    assert [told["low"] for told in first.curve] == [9.0, 4.0, 4.0, 4.0, 4.0]
    assert agent.learning_rate == agent.lr_schedule(1.0) == rate
    # A trial comes with the last step of a window, before the agent has learned from it.
    assert seen == [(1, False), (1, False), (1, False), (3, True), (3, False)]
    cut = [point for point in lesson.curve if "low" in point][:4]  # as if it had been killed after four trials
    seen.clear()
    again = trials(worse, earlier=cut)
    assert learn(agent, path, Console(quiet=True), 100 * window, trials=again).ended == "learned"
    assert seen == [(3, True)]  # `learn` had left the best one


def test_equal_lower_ends_are_told_apart_by_what_is_expected(agent, tmp_path):
    path, verdicts = tmp_path / "agent.zip", ((0.0, 5.0), (0.0, 9.0), (0.0, 7.0))
    trials = Trials(Verdicts(*verdicts, *100 * [(0.0, 1.0)]), path, every=4)
    learn(agent, path, Console(quiet=True), 12, trials=trials)
    assert PPO.load(path).num_timesteps == 8


def test_trials_of_another_judge_do_not_count(agent, world, tmp_path):
    """Their agent is not kept: the first one that the new judge sees takes its place."""
    path = tmp_path / "agent.zip"
    real = {"steps": 4, "seconds": 1.0, "real": 1e9, "episodes": 2, "beats_random": True}
    low = {"steps": 8, "seconds": 2.0, "low": 1e9, "predicted": 1e9, "high": 1e9, "dream": 0.0, "beats_random": True}
    learned = {"steps": 9, "return": 1.0}
    assert last_trials([real, low, learned, low, learned]) == [low, low]
    assert last_trials([low, real, learned]) == [real]
    assert last_trials([learned]) == []
    for judge, earlier in ((RealJudge(world, RANDOM), [real, real, low]), (Verdicts((1.0, 1.0)), [low, low, real])):
        path.write_bytes(b"another's best")
        trials = Trials(judge, path, every=10**6, patience=1, earlier=earlier)
        assert not trials.is_enough
        agent.learn(1, callback=trials)
        assert path.read_bytes() != b"another's best"
        assert Trials(judge, path, 4, patience=1, earlier=[*earlier, earlier[0], earlier[0]]).is_enough


def test_ctrl_c_ends_the_training_early_or_everything(agent, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(agent, "train", interrupt)
    path = tmp_path / "agent.zip"
    with pytest.raises(KeyboardInterrupt):
        learn(agent, path, Console(quiet=True), 100, stoppable=False)
    assert not path.exists()
    assert learn(agent, path, Console(quiet=True), 100).ended == "interrupted"
    assert path.exists()


def test_ctrl_c_loses_nothing_since_the_last_trial(agent, world, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(agent, "train", interrupt)
    path = tmp_path / "agent.zip"
    lesson = learn(agent, path, Console(quiet=True), 1000, trials=Trials(RealJudge(world), path, every=10**6))
    assert [point["steps"] for point in lesson.curve if "real" in point] == [128]
    assert PPO.load(path).num_timesteps == PPO.load(newest(path)).num_timesteps == 128
