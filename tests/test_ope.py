"""Estimators of off-policy evaluation against a system whose returns are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, Rhythm
from aime_gym.bodies.body import Sensor
from aime_gym.commands.collect import Collect
from aime_gym.commands.strangers import Strangers
from aime_gym.data.trajectories import save_trajectory
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.returns import dope_metrics, episode_returns
from aime_gym.evaluation.strangers import SEED, StrangerSet
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import read_json
from benchmarks.off_policy import OffPolicy, reset_states, rows
from benchmarks.ope import constant, ensemble, fqe, neighbours
from benchmarks.ope.acting import NextActions, act
from benchmarks.ope.transitions import Transitions, read_transitions

HORIZON = 20


def move(states: np.ndarray, actions: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A point on a line that is pushed and slows down; it earns what it is near 0.5 and pays for pushing."""
    noise = 0.02 * rng.standard_normal(states.shape)
    following = 0.85 * states + 0.2 * actions + noise
    rewards = 1 - (following[..., 0] - 0.5) ** 2 - 0.1 * actions[..., 0] ** 2
    return following.astype(np.float32), rewards.astype(np.float32)


def logged(episodes: int = 80) -> Transitions:
    """Episodes of actions that are drawn anew every few steps."""
    rng = np.random.default_rng(0)
    states, actions, parts = rng.uniform(-1, 1, (episodes, 1)).astype(np.float32), np.zeros((episodes, 1), "f4"), []
    for step in range(HORIZON):
        if step % 8 == 0:
            actions = rng.uniform(-1, 1, (episodes, 1)).astype(np.float32)
        following, rewards = move(states, actions, rng)
        parts.append((states, actions, rewards, following))
        states = following
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Transitions(*columns, returns=columns[2].reshape(HORIZON, episodes).sum(0))


def spring(gain: float, push: float) -> PlainMLP:
    """Pushes by a line of the state."""
    weight, bias = np.array([[gain]], np.float32), np.array([push], np.float32)
    return PlainMLP((weight,), (bias,), np.zeros(1, np.float32), np.ones(1, np.float32), squash=False)


def wave(offset: float) -> Rhythm:
    """Half an episode forth, the other half back."""
    return Rhythm(*(np.array([value], np.float32) for value in (offset, 0.9, 1 / HORIZON, 0.0)))


POLICIES = [
    spring(-2, 1),
    spring(0, 0.4),
    spring(0, -0.5),
    spring(-1, -0.3),
    wave(0.0),
    NoisyPolicy(spring(-1, 0.5), 0.3),
]
STARTS = np.array([[-0.8], [0.0], [0.9]], np.float32)


@pytest.fixture(scope="module")
def data() -> Transitions:
    return logged()


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """Mean returns [P, E] of many episodes."""
    rng, repeats = np.random.default_rng(1), 200
    states = np.tile(np.repeat(STARTS, repeats, 0), (len(POLICIES), 1, 1))
    earned = np.zeros(states.shape[:2])
    for step in range(HORIZON):
        states, rewards = move(states, act(POLICIES, states, step, rng), rng)
        earned += rewards
    return earned.reshape(len(POLICIES), len(STARTS), repeats).mean(-1)


@pytest.mark.parametrize(
    ("estimate", "settings", "tolerance"),
    [
        (fqe.estimate, {"updates": 700, "first_updates": 200, "hidden": 32, "batch_size": 64, "lr": 3e-3}, 1.7),
        (ensemble.estimate, {"updates": 400, "hidden": 32, "members": 3, "lr": 3e-3}, 1.2),
        (neighbours.estimate, {}, 1.2),
    ],
)
def test_returns_of_a_known_system(estimate, settings, tolerance, data, truth):
    returns = estimate(data, POLICIES, STARTS, HORIZON, seed=0, **settings)
    assert returns.shape == truth.shape
    np.testing.assert_allclose(returns, truth, atol=3 * tolerance)
    assert np.abs(returns.mean(1) - truth.mean(1)).max() < tolerance
    assert np.ptp(truth.mean(1)) > 10 * tolerance
    assert (dope_metrics(returns.mean(1), truth.mean(1))["spearman"] or 0) > 0.8


@pytest.mark.parametrize(
    ("estimate", "settings"),
    [
        (fqe.estimate, {"updates": 30, "first_updates": 5, "hidden": 8}),
        (ensemble.estimate, {"updates": 5, "hidden": 8, "members": 2}),
        (neighbours.estimate, {}),
    ],
)
def test_the_seed_decides_and_nothing_else(estimate, settings, data):
    def run(seed: int) -> np.ndarray:
        return estimate(data, POLICIES[-2:], STARTS[:1], HORIZON, seed=seed, **settings)

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    assert not np.array_equal(first, run(1))


def test_the_constant_is_the_mean_of_the_data(data):
    np.testing.assert_allclose(constant.estimate(data, POLICIES, STARTS, HORIZON), data.returns.mean(), rtol=1e-6)


def test_a_rhythm_is_asked_at_its_own_step():
    rng = np.random.default_rng(0)
    upcoming = NextActions([wave(0.0), spring(0, 0.25)], np.zeros((7, 1), np.float32))
    for step in (0, 6, 18):
        drawn = upcoming.draw(np.array([3, 3]), step, rng)
        np.testing.assert_allclose(drawn[0], 0.9 * np.sin(2 * np.pi * step / HORIZON), atol=1e-6)
        np.testing.assert_allclose(drawn[1], 0.25)


def test_no_transition_is_used_twice(data):
    columns = (data.states, data.actions, data.rewards, data.next_states)
    few = Transitions(*(column[: 2 * HORIZON] for column in columns), returns=data.returns)
    returns = neighbours.estimate(few, [spring(0, 0)], STARTS[:2], HORIZON)
    assert returns.sum() == pytest.approx(few.rewards.sum(), rel=1e-5)  # so all of them were used
    with pytest.raises(AimeGymError, match="need 60 transitions; got 40"):
        neighbours.estimate(few, [spring(0, 0)], STARTS, HORIZON)


def test_trajectories_become_transitions(tmp_path):
    rng, sensors = np.random.default_rng(0), (Sensor("position", 2), Sensor("velocity", 1))
    for index, steps in enumerate((3, 5)):
        dims = {"velocity": 1, "position": 2, "pre_action": 1, "reward": 1}
        episode = {name: rng.uniform(-1, 1, (steps + 1, dim)).astype(np.float32) for name, dim in dims.items()}
        episode["is_terminal"] = np.zeros(steps + 1, bool)
        save_trajectory(tmp_path, index, episode)
    data = read_transitions([tmp_path], sensors)
    assert data.states.shape == (8, 3)
    np.testing.assert_array_equal(data.next_states[3:7], data.states[4:])
    np.testing.assert_array_equal(data.states[3:, :2], episode["position"][:-1])
    np.testing.assert_array_equal(data.states[3:, 2:], episode["velocity"][:-1])
    np.testing.assert_array_equal(data.actions[3:], episode["pre_action"][1:])
    np.testing.assert_array_equal(data.rewards[3:, None], episode["reward"][1:])
    np.testing.assert_allclose(data.returns[1], episode["reward"][1:].sum(), rtol=1e-6)
    episode["is_terminal"][-1] = True
    save_trajectory(tmp_path, 2, episode)
    with pytest.raises(AimeGymError, match="terminal"):
        read_transitions([tmp_path], sensors)


@pytest.fixture(scope="module")
def rhythms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    Strangers("cartpole", families=("rhythm",), seeds=2, stages=(1.0,), effort=1 / 200, episodes=2, out=folder).run()
    return folder


def test_estimates_begin_where_the_real_episodes_of_a_set_did(rhythms):
    member = StrangerSet.load(rhythms).members[0]
    envs = make_real_envs("cartpole", 2, task="swingup", max_episode_steps=1)
    real = episode_returns(member.policy, envs, 2, seed=SEED, record=True).recordings
    envs.close()
    starts = reset_states("cartpole", "swingup", 2)
    np.testing.assert_array_equal(starts, np.stack([episode.observations[0] for episode in real]))


def test_the_command_judges_by_published_returns_and_keeps_what_is_there(rhythms, tmp_path, capsys):
    Collect("cartpole", "swingup", "random", 3, out=tmp_path / "data", workers=1).run()
    job = OffPolicy(
        rhythms, (tmp_path / "data",), tmp_path / "model", 1.0, ("nearest neighbours",), out=tmp_path / "found.json"
    )
    job.run()
    replace(job, methods=("constant",)).run()
    found = read_json(tmp_path / "found.json")["cartpole swingup"]
    real = {member.name: np.mean(member.returns) for member in StrangerSet.load(rhythms).members}
    assert found["real returns"] == pytest.approx(real, abs=0.06)
    assert found["real steps of data"] == 375
    assert (found["episodes"], found["runs"]) == (2, 2)
    assert list(found["methods"]) == ["nearest neighbours", "constant"]
    for method in found["methods"].values():
        errors = [abs(told - real[name]) for name, told in method["returns"].items()]
        assert method["mean_absolute_error"] == pytest.approx(np.mean(errors), abs=0.1)
    assert len(rows({"cartpole swingup": found})) == 4
    assert "| cartpole swingup | constant | - | - |" in capsys.readouterr().out
    with pytest.raises(AimeGymError, match="Did you mean 'constant'"):
        replace(job, methods=("constants",)).run()
