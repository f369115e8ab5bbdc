"""Returns, metrics and comparisons: against hand loops, hand values and SciPy."""

from __future__ import annotations

import dataclasses
import importlib
import json
import zipfile
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import aime_gym
from aime_gym.agents.sb3 import load_sb3_agent, save_sb3_agent
from aime_gym.agents.shac import SHAC
from aime_gym.commands.dream import Dream, _earlier
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.report import write_report
from aime_gym.evaluation.returns import (
    Episodes,
    bootstrap_interval,
    dope_metrics,
    episode_returns,
    load_policy,
    pearson,
    ranks,
    regret_at_1,
)
from aime_gym.evaluation.worlds import Worlds, make_real_envs
from aime_gym.files import Revision, json_text
from aime_gym.world_model.checkpoint import save_model
from tests.random_models import random_model, write_random_model

STEPS = 12


def wave(observation: np.ndarray) -> np.ndarray:
    """A policy whose actions in a row depend on that row alone, to the last bit."""
    return np.sin(3 * observation[:, :6])


@pytest.fixture(scope="module")
def walkers():
    envs = make_real_envs("Walker", 3, task="walk", max_episode_steps=STEPS)
    yield envs
    envs.close()


# Metrics


def test_dope_metrics_by_hand():
    metrics = dope_metrics([10.0, 30.0, 20.0], [1.0, 2.0, 3.0])
    assert metrics["pearson"] == pytest.approx(0.5)
    assert metrics["spearman"] == pytest.approx(0.5)
    assert metrics["mean_absolute_error"] == pytest.approx((9 + 28 + 17) / 3)
    assert metrics["regret_at_1"] == pytest.approx(1.0)  # the second looks best, the third is


def test_correlations_equal_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, size=(2, 9)).astype(float)
        assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
        assert dope_metrics(x, y)["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        np.testing.assert_array_equal(ranks(x), stats.rankdata(x))


def test_metrics_that_are_not_defined_are_none():
    assert dope_metrics([], []) == dict.fromkeys(
        ("pearson", "spearman", "mean_absolute_error", "regret_at_1"), None
    ) | {"policies": 0}
    one = dope_metrics([3.0], [1.0])
    assert (one["pearson"], one["spearman"], one["mean_absolute_error"], one["regret_at_1"]) == (None, None, 2.0, 0.0)
    assert dope_metrics([1.0, 1.0], [1.0, 2.0])["spearman"] is None
    with_nan = dope_metrics([1.0, np.nan, 2.0], [2.0, 9.0, 4.0])
    assert with_nan["policies"] == 2
    assert with_nan["pearson"] == pytest.approx(1.0)


def test_regret_of_the_best_choice_is_zero():
    assert regret_at_1([5.0, 9.0], [1.0, 4.0]) == 0.0
    assert regret_at_1([9.0, 5.0], [1.0, 4.0]) == 3.0


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 2.0, size=40), resamples=500, seed=i)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert bootstrap_interval([2.0] * 5) == (2.0, 2.0)
    values = rng.normal(size=20)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    low, high = bootstrap_interval(values)
    error = values.std() / np.sqrt(20)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.3 * error)


# Returns


def test_returns_equal_a_hand_loop(walkers):
    ran = episode_returns(wave, walkers, episodes=4, seed=7, record=True)
    for episode in range(4):
        env = gym.make("AimeReal-Walker-v0", task="walk", max_episode_steps=STEPS)
        observation, _ = env.reset(seed=7 + episode)
        total, done, observations, step = 0.0, False, [], 0
        while not done:
            action = wave(observation[None])[0]
            observations.append(observation)
            np.testing.assert_array_equal(ran.recordings[episode].actions[step], action)
            observation, reward, terminated, truncated, _ = env.step(action)
            done, total, step = terminated or truncated, total + float(reward), step + 1
        assert ran.returns[episode] == pytest.approx(total, abs=1e-12)
        np.testing.assert_array_equal(ran.recordings[episode].observations, observations)
        assert ran.recordings[episode].rewards.sum() == pytest.approx(total, abs=1e-12)
        env.close()
    assert ran.lengths.tolist() == [STEPS] * 4


@pytest.mark.parametrize("policy", [wave, "random", "zero"])
def test_returns_do_not_depend_on_the_number_of_slots(walkers, policy):
    alone = make_real_envs("Walker", 1, task="walk", max_episode_steps=STEPS)
    seeds = [5, 3, 11, 4, 8]
    np.testing.assert_array_equal(
        episode_returns(policy, walkers, seed=seeds).returns, episode_returns(policy, alone, seed=seeds).returns
    )
    alone.close()


def test_starts_go_to_their_own_episodes(walkers):
    walkers.reset(seed=0)
    states = [env.unwrapped.physics_state for env in walkers.envs]
    assert not np.allclose(states[0], states[1])
    physics = np.stack([states[i] for i in (0, 1, 0, 2)])
    ran = episode_returns(wave, walkers, seed=[1, 2, 3, 4], starts={"physics": physics})
    assert ran.returns[0] == ran.returns[2]
    assert len({*ran.returns}) == 3


class Recurrent:
    """Counts the steps since the episode's start in its state, and remembers what it was told."""

    def __init__(self):
        self.starts, self.deterministic = [], set()

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        state = np.zeros(len(observation)) if state is None else state
        state = np.where(episode_start, 0.0, state + 1)
        self.starts.append(episode_start.copy())
        self.deterministic.add(deterministic)
        return np.tile(state[:, None] / 100, (1, 6)), state


def test_recurrent_policies_learn_when_episodes_start(walkers):
    policy = Recurrent()
    ran = episode_returns(policy, walkers, episodes=5, record=True)
    assert np.stack(policy.starts).shape == (2 * STEPS, 3)
    assert np.stack(policy.starts).all(axis=1).nonzero()[0].tolist() == [0, STEPS]
    assert np.stack(policy.starts).any(axis=1).nonzero()[0].tolist() == [0, STEPS]
    for recording in ran.recordings:
        np.testing.assert_allclose(recording.actions[:, 0], np.arange(STEPS) / 100, rtol=1e-6)
    assert policy.deterministic == {True}


class Countdown(gym.Env):
    """Ends after as many steps as its seed says; each step is worth one, and as much doubt as the seed."""

    observation_space = gym.spaces.Box(0, 9, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = self.left = seed if seed is not None else 1
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left <= 0, False, {"doubt": float(self.length)}


def test_episodes_of_unequal_length_end_on_their_own():
    envs = SyncVectorEnv([Countdown] * 2)
    ran = episode_returns(lambda observation: np.zeros((2, 1)), envs, seed=[2, 7, 5], record=True)
    assert ran.returns.tolist() == [2.0, 7.0, 5.0]
    assert ran.lengths.tolist() == [2, 7, 5]
    assert ran.doubt is not None
    assert ran.doubt.tolist() == [2.0, 7.0, 5.0]
    assert [len(recording.actions) for recording in ran.recordings] == [2, 7, 5]


def test_sampling_agents_are_seeded_and_leave_the_global_generator_alone(walkers):
    agent = PPO("MlpPolicy", gym.make("AimeReal-Walker-v0"), device="cpu", seed=0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = episode_returns(agent, walkers, deterministic=False)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.testing.assert_array_equal(first.returns, episode_returns(agent, walkers, deterministic=False).returns)
    assert not np.array_equal(first.returns, episode_returns(agent, walkers).returns)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda observation: observation[0, :6], "shape"),
        (lambda observation: np.full((3, 6), np.nan), "finite"),
        ("randm", "Did you mean 'random'"),
        (42, "int"),
    ],
)
def test_policies_that_cannot_act_are_named(walkers, policy, message):
    with pytest.raises(AimeGymError, match=message):
        episode_returns(policy, walkers)


def test_an_agent_that_learned_on_normalised_observations_acts_on_them(walkers):
    normaliser = VecNormalize(make_vec_env("AimeReal-Walker-v0"))
    normaliser.obs_rms.mean += 1.0
    agent = PPO("MlpPolicy", normaliser, device="cpu", seed=0)
    by_hand = episode_returns(
        lambda rows: agent.predict(normaliser.normalize_obs(rows), deterministic=True)[0], walkers, seed=3
    )
    np.testing.assert_array_equal(episode_returns(agent, walkers, seed=3).returns, by_hand.returns)


def test_tensors_are_actions(walkers):
    layer = torch.nn.Linear(24, 6)
    returns = episode_returns(lambda rows: layer(torch.as_tensor(rows)).tanh(), walkers).returns
    assert np.isfinite(returns).all()


def test_counts_must_fit(walkers):
    with pytest.raises(AimeGymError, match="one seed an episode"):
        episode_returns(wave, walkers, episodes=2, seed=[1, 2, 3])
    with pytest.raises(AimeGymError, match="one 'physics' an episode"):
        episode_returns(wave, walkers, episodes=2, starts={"physics": np.zeros((3, 18))})
    with pytest.raises(AimeGymError, match="at least one"):
        episode_returns(wave, walkers, episodes=0)


# Comparisons


def comparison() -> Comparison:
    def episodes(*returns: float, doubt: np.ndarray | None = None) -> Episodes:
        return Episodes(np.array(returns), np.full(len(returns), 500), doubt)

    return Comparison(
        "walker",
        "walk",
        "walker-state",
        0,
        500,
        (
            PolicyReturns("expert [1]", episodes(380.0, 400.0, doubt=np.array([0.25, 0.75])), episodes(290.0, 310.0)),
            PolicyReturns("random", episodes(38.0, 40.0), episodes(30.0, 32.0)),
            PolicyReturns("zero", episodes(26.0, 26.0), episodes(25.0, 25.0)),
        ),
    )


def test_a_comparison_prints_its_numbers():
    text = str(comparison())
    assert "expert [1]" in text
    assert "390 [380, 400]" in text
    assert "300 [290, 310]" in text
    assert "0.5" in text  # the doubt
    assert "doubt = nats by which the model corrects its prediction when it sees what it dreamt" in " ".join(
        text.split()
    )
    assert "Spearman 1.00" in text
    assert "\x1b" not in text
    alone = Comparison("walker", "walk", "m", 0, 500, comparison().policies[:1])
    assert alone.verdict == "walk: dream 390 ± 10, real 300 ± 10 over 2 episodes; gap 90"


def test_returns_of_small_rewards_are_told_with_their_digits():
    dream, real = (Episodes(np.array([value, value]), np.full(2, 500), None) for value in (0.039, -0.0003))
    policy = PolicyReturns("expert", dream, real)
    small = Comparison("Small-v0", "own", "m", 0, 500, (policy,))
    assert "dream 0.039 ± 0, real -0.0003 ± 0" in small.verdict
    assert "0.039 [0.039, 0.039]" in str(small)


def test_a_comparison_survives_json(tmp_path):
    path = comparison().to_json(tmp_path / "deep" / "returns.json")
    assert Comparison.from_json(path).to_dict() == comparison().to_dict()
    data = json.loads(path.read_text())
    assert data["policies"]["random"]["real"]["returns"] == [30.0, 32.0]
    assert data["metrics"]["mean_absolute_error"] == pytest.approx((90 + 8 + 1) / 3)
    assert [p.name for p in path.parent.iterdir()] == ["returns.json"]
    left = dataclasses.replace(comparison(), usual_doubt=1.0)
    left.policies[0].dream.doubt[0] = np.inf  # a dream that left the finite numbers
    again = Comparison.from_json(left.to_json(path))
    assert again.policies[0].dream.doubt.tolist() == [np.inf, 0.75]
    assert again.is_doubtful(again.policies[0])
    named = dataclasses.replace(comparison(), model_digest="0123456789abcdef")
    assert Comparison.from_json(named.to_json(path)).model_digest == "0123456789abcdef"
    older = {key: value for key, value in data.items() if key != "model_digest"}  # as it was written before
    path.write_text(json.dumps(older))
    assert Comparison.from_json(path).model_digest is None
    other = Revision("walker-state", 3, "fedcba9876543210")
    policies = (dataclasses.replace(named.policies[0], learned_in=other), *named.policies[1:])
    stray = Comparison.from_json(dataclasses.replace(named, policies=policies, revision=4).to_json(path))
    assert stray.weights == (stray.model, 4, "0123456789abcdef")
    assert [p.learned_in for p in stray.policies] == [other, None, None]
    for key, odd in (("revision", "4"), ("learned_in", {"model": "a", "number": 1, "digest": "\x1b[31m"})):
        written = json.loads(path.read_text())
        (written if key == "revision" else written["policies"][policies[0].name])[key] = odd
        (tmp_path / "odd.json").write_text(json.dumps(written))
        with pytest.raises(AimeGymError, match="not hold a comparison"):
            Comparison.from_json(tmp_path / "odd.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(AimeGymError, match="not hold a comparison"):
        Comparison.from_json(path)


def test_agents_of_another_revision_are_told(tmp_path):
    """Files of agents say where they learned, whoever saved them; older ones, and what is printed of them, do not."""
    model = tmp_path / "model"
    first = write_random_model(model).revision
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=2, seed=0, model=model, task="walk", max_episode_steps=8)
    own = SHAC("MlpPolicy", envs, n_steps=4, policy_kwargs={"net_arch": [8]}, seed=0).learn(8)
    own.save(tmp_path / "by-sb3.zip")
    save_sb3_agent(own, tmp_path / "plain.zip")
    save_sb3_agent(PPO("MlpPolicy", envs, policy_kwargs={"net_arch": [8]}), tmp_path / "ppo.zip")
    old = PPO("MlpPolicy", envs, policy_kwargs={"net_arch": [8]})
    old.save(tmp_path / "old.zip")
    agents = {name: tmp_path / f"{name}.zip" for name in ("by-sb3", "plain", "ppo", "old")}

    def judged():
        return aime_gym.compare({**agents, "random": "random"}, "Walker", "walk", 2, model, max_episode_steps=3)

    same = judged()
    assert same.weights == first
    assert [p.learned_in for p in same.policies] == [first, first, first, None, None]
    assert not same.strays
    assert "another revision" not in str(same)
    save_model(random_model(seed=5), model)
    comparison = judged()
    assert comparison.weights.number == 2
    assert len(comparison.strays) == 3
    told = f"learned in another revision of this dream: model, revision 1 ({first.digest})"
    text = write_report(tmp_path / "report.html", comparison).read_text()
    for name in ("by-sb3", "plain", "ppo"):
        assert f"{name} {told}" in " ".join(str(comparison).split())
        assert f"{name} {told}" in text
    assert str(comparison.weights) in text
    assert "old learned" not in text
    written = json.loads(comparison.to_json(tmp_path / "returns.json").read_text())
    assert written["revision"] == 2
    assert written["policies"]["plain"]["learned_in"] == first._asdict()
    settings = []
    for seed in (5, 6):
        save_model(random_model(seed=seed), model)
        with Worlds("Walker", "walk", model) as worlds:
            settings.append(Dream(model=str(model))._settings(worlds))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.json").write_text(json.dumps({"settings": json.loads(json_text(settings[0]))}))
    assert _earlier(tmp_path / "run" / "job.json", settings[0]) == {}
    with pytest.raises(AimeGymError, match="content of model"):
        _earlier(tmp_path / "run" / "job.json", settings[1])  # an agent goes on in the weights in which it began
    elsewhere = dataclasses.replace(comparison, model="other")
    assert f"plain learned in the dreams of another model: {first}" in elsewhere.strays


@pytest.mark.parametrize("algorithm", [PPO, A2C, SAC, TD3, DDPG])
def test_saved_agents_act_as_before(tmp_path, walkers, algorithm):
    kwargs = {} if algorithm in (PPO, A2C) else {"buffer_size": 10}
    agent = algorithm("MlpPolicy", gym.make("AimeReal-Walker-v0"), device="cpu", seed=0, **kwargs)
    agent.save(tmp_path / "agent.zip")
    observation, _ = walkers.reset(seed=0)
    np.testing.assert_array_equal(
        load_sb3_agent(tmp_path / "agent.zip").predict(observation, deterministic=True)[0],
        agent.predict(observation, deterministic=True)[0],
    )


class OfAnotherLibrary:
    """Acts as d3rlpy's algorithms do: `predict` takes a batch of observations alone, and gives actions alone."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        return np.tanh(x[:, :6])


class Callable:
    """Has no `predict`, but can be called."""

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        return np.tanh(observations[:, :6])


def test_objects_of_other_libraries_act_as_functions_do(walkers):
    expected = episode_returns(lambda rows: np.tanh(rows[:, :6]), walkers, seed=3).returns
    for policy in (OfAnotherLibrary(), Callable()):
        np.testing.assert_array_equal(episode_returns(policy, walkers, seed=3).returns, expected)


@pytest.mark.parametrize(
    ("module", "drops", "said"),
    [
        ("sbx.ppo.policies", "policy.pth", "cannot be loaded as a PPO agent"),
        ("sb3_contrib.ars.policies", "clip_range gae_lambda", "an unknown algorithm"),
    ],
)
def test_agents_that_cannot_be_loaded_by_their_file_are_given_as_objects(tmp_path, walkers, module, drops, said):
    """Their files hold fields as those of SB3's agents do, but other parts."""
    path = tmp_path / "agent.zip"
    PPO("MlpPolicy", gym.make("AimeReal-Walker-v0"), device="cpu").save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name not in drops.split()}
    fields = json.loads(members["data"])
    fields["policy_class"]["__module__"] = module
    members["data"] = json.dumps({name: value for name, value in fields.items() if name not in drops.split()})
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(AimeGymError, match=said) as error:
        load_policy(path)
    assert f"of {module.partition('.')[0]} ({module}): load it in Python by its own class" in str(error.value)
    assert "give the object to aime_gym.compare" in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sbx") is None, reason="pip install 'aime-gym[strangers]'")
@pytest.mark.parametrize("name", ["sb3_contrib.CrossQ", "sb3_contrib.ARS", "sbx.PPO", "sbx.TD3", "sbx.CrossQ"])
def test_agents_of_other_libraries_act_as_objects(tmp_path, name):
    library, _, kind = name.partition(".")
    algorithm = getattr(importlib.import_module(library), kind)
    env = aime_gym.make_sb3_env("AimeDream-Pendulum-v0", seed=0, max_episode_steps=10)
    agent = algorithm("LinearPolicy" if kind == "ARS" else "MlpPolicy", env, seed=0)
    compared = aime_gym.compare(agent, "Pendulum", episodes=1, max_episode_steps=5)
    assert np.isfinite(compared.policies[0].real.mean)
    agent.save(tmp_path / "agent.zip")
    with pytest.raises(AimeGymError, match="give the object to aime_gym"):
        load_policy(tmp_path / "agent.zip")
