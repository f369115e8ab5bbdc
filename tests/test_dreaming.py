"""An agent that learns in the dream and is tried in the world now and then."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console
from stable_baselines3 import PPO

from aime_gym.agents import dreaming
from aime_gym.agents.dreaming import KeepBest, learn, make_agent
from aime_gym.agents.standardised import observation_statistics
from aime_gym.envs.sb3 import make_sb3_env
from aime_gym.world_model.checkpoint import load_pretrained_model
from tests.random_models import write_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def agent(model):
    loaded = load_pretrained_model(model.folder)
    envs = make_sb3_env("AimeDream-Walker-v0", n_envs=4, seed=0, model=loaded, max_episode_steps=8)
    return make_agent("ppo", envs, observation_statistics(envs), 0)


def test_the_agent_of_the_best_trial_is_kept(agent, tmp_path):
    world = make_sb3_env("AimeReal-Walker-v0", n_envs=2, seed=5, max_episode_steps=4)
    path = tmp_path / "agent.zip"
    trials = KeepBest(world, path, every=0.0)
    agent.learn(100, callback=trials)
    returns = [point["real"] for point in trials.curve]
    assert len(returns) == 32 + 1  # after every step of the one rollout, and at the end
    assert len(set(returns)) > 1
    kept = PPO.load(path)
    assert kept.num_timesteps == trials.curve[int(np.argmax(returns))]["steps"]


def test_training_ends_when_trials_get_no_better(agent, tmp_path, monkeypatch):
    world = make_sb3_env("AimeReal-Walker-v0", n_envs=1, seed=5, max_episode_steps=4)
    returns = iter([3.0, 1.0, 4.0, 2.0, 4.0, 3.0, 9.0])
    monkeypatch.setattr(dreaming, "evaluate_policy", lambda *args, **kwargs: ([next(returns)], [4]))
    trials = KeepBest(world, tmp_path / "agent.zip", every=0.0, patience=3)
    agent.learn(1000, callback=trials)
    assert [point["real"] for point in trials.curve] == [3, 1, 4, 2, 4, 3, 9]  # the last one as training ends
    assert PPO.load(tmp_path / "agent.zip").num_timesteps == trials.curve[-1]["steps"]


def test_trials_that_take_long_are_rare(agent, tmp_path, monkeypatch):
    """With images a trial takes as long as a minute of training: it may not eat up the time for training."""
    now, began = [0.0], []

    def trial(*args, **kwargs):
        began.append(now[0])
        now[0] += 2 * dreaming.LONG_TRIAL
        return [1.0], [4]

    def clock():
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr(dreaming, "evaluate_policy", trial)
    monkeypatch.setattr(dreaming.time, "monotonic", clock)
    world = make_sb3_env("AimeReal-Walker-v0", n_envs=1, seed=5, max_episode_steps=4)
    agent.learn(200, callback=KeepBest(world, tmp_path / "agent.zip", every=1.0))
    waited = np.diff(began)[:-1] - 2 * dreaming.LONG_TRIAL  # the last one comes as training ends
    assert len(waited) > 1
    assert ((waited > 2.0) & (waited < 2.5)).all()


def test_learning_ends_with_the_kept_agent(agent, tmp_path):
    world = make_sb3_env("AimeReal-Walker-v0", n_envs=1, seed=5, max_episode_steps=4)
    path = tmp_path / "agent.zip"
    curve = learn(agent, path, Console(quiet=True), 100, 1.0, 8, 8, world)
    assert sum("real" in point for point in curve) == 1
    assert all(("real" in point) != ("return" in point) for point in curve)
    kept = PPO.load(path).get_parameters()["policy"]
    for name, value in agent.get_parameters()["policy"].items():
        np.testing.assert_array_equal(value, kept[name])


def test_an_agent_learns_on(agent, tmp_path):
    for _ in range(2):
        curve = learn(agent, tmp_path / "agent.zip", Console(quiet=True), 100, 1.0, 8, 8)
    assert curve[-1]["steps"] == 2 * 4 * 32
    assert PPO.load(tmp_path / "agent.zip").num_timesteps == 2 * 4 * 32


def test_ctrl_c_ends_the_training_early_or_everything(agent, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(agent, "train", interrupt)
    path = tmp_path / "agent.zip"
    with pytest.raises(KeyboardInterrupt):
        learn(agent, path, Console(quiet=True), 100, 1.0, 8, 8, stoppable=False)
    assert not path.exists()
    learn(agent, path, Console(quiet=True), 100, 1.0, 8, 8)
    assert path.exists()
