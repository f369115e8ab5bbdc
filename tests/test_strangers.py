"""Policies that no model has met: plain files, runs that go on, and the same actions as the libraries' own agents."""

from __future__ import annotations

import json

import numpy as np
import pytest
from stable_baselines3 import PPO

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, Rhythm, load_plain, save_plain
from aime_gym.agents.strangers import learn_stranger
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.comparison import Comparison, PolicyReturns
from aime_gym.evaluation.returns import Episodes, episode_returns
from aime_gym.evaluation.strangers import Stranger, StrangerSet, judge
from aime_gym.evaluation.strangers_job import Strangers
from aime_gym.evaluation.worlds import make_real_envs


def random_mlp(seed: int = 0, activation: str = "relu", squash: bool = True) -> PlainMLP:
    rng = np.random.default_rng(seed)
    weights = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (8, 1)))
    biases = tuple(rng.standard_normal(size).astype(np.float32) for size in (8, 1))
    mean, std = (rng.uniform(0.5, 2, 3).astype(np.float32) for _ in range(2))
    return PlainMLP(weights, biases, mean, std, 5.0, activation, squash)


def random_rhythm(seed: int = 0) -> Rhythm:
    rng = np.random.default_rng(seed)
    return Rhythm(*(rng.uniform(0, 1, 2).astype(np.float32) for _ in range(4)))


@pytest.mark.parametrize("policy", [random_mlp(), random_mlp(1, "tanh", False), random_rhythm()])
def test_files_give_the_same_policy_back(policy, tmp_path):
    loaded = load_plain(save_plain(policy, tmp_path / "policy.safetensors"))
    observations, state, other = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), None, None
    for _ in range(3):
        actions, state = policy.predict(observations, state)
        again, other = loaded.predict(observations, other)
        np.testing.assert_array_equal(actions, again)
    assert np.abs(actions).max() <= 1


def test_transposed_weights_are_written_as_they_are(tmp_path):
    """safetensors 0.8.0 writes the memory under a NumPy view: findings/safetensors_numpy_scrambles_views.sh."""
    policy = random_mlp()
    columns = PlainMLP(tuple(np.asfortranarray(w) for w in policy.weights), policy.biases, policy.mean, policy.std)
    loaded = load_plain(save_plain(columns, tmp_path / "policy.safetensors"))
    assert isinstance(loaded, PlainMLP)
    np.testing.assert_array_equal(loaded.weights[0], policy.weights[0])


@pytest.mark.parametrize("name", ["weight0", "bias1", "mean", "std"])
def test_arrays_that_do_not_fit_together_are_refused(name, tmp_path, monkeypatch):
    policy = random_mlp()
    arrays = policy.arrays()
    monkeypatch.setattr(PlainMLP, "arrays", lambda self: {**arrays, name: np.ones((2, 7), np.float32)})
    save_plain(policy, tmp_path / "policy.safetensors")
    with pytest.raises(AimeGymError, match="plain policy"):
        load_plain(tmp_path / "policy.safetensors")


def test_rhythms_begin_anew_with_each_episode():
    rhythm, observations = random_rhythm(), np.zeros((2, 3))
    first, state = rhythm.predict(observations, None, np.array([True, True]))
    second, state = rhythm.predict(observations, state, np.array([False, False]))
    mixed, _ = rhythm.predict(observations, state, np.array([True, False]))
    np.testing.assert_array_equal(mixed[0], first[0])
    assert not np.array_equal(mixed[1], first[1])
    assert not np.array_equal(second[0], first[0])


def test_noise_belongs_to_the_episode_and_not_to_the_number_of_slots():
    returns = []
    for slots in (1, 3):
        envs = make_real_envs("pendulum", slots, task="swingup", max_episode_steps=20)
        policy = NoisyPolicy(random_mlp(), 0.3)
        recordings = episode_returns(policy, envs, 3, seed=5, record=True).recordings
        returns.append(np.stack([recording.actions for recording in recordings]))
        envs.close()
    np.testing.assert_allclose(returns[0], returns[1], atol=1e-6)
    clean = random_mlp().predict(recordings[0].observations)[0]
    assert 0.05 < np.abs(returns[1][0] - clean).mean() < 0.6


def test_a_run_keeps_its_policy_at_stages_of_skill():
    stages = list(learn_stranger("ppo", "pendulum", "swingup", 0, (0.5, 1.0), steps=4096))
    assert [steps for steps, _ in stages] == [2048, 4096]
    first, last = (policy.predict(np.eye(3, dtype=np.float32))[0] for _, policy in stages)
    assert not np.array_equal(first, last)


def test_a_plain_copy_that_acts_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(PPO, "predict", lambda self, obs, *a, **k: (np.full((len(obs), 1), 0.123, "f4"), None))
    with pytest.raises(AimeGymError, match="acts otherwise"):
        next(learn_stranger("ppo", "pendulum", "swingup", 0, (1.0,), steps=2048))


def test_the_command_goes_on_and_repeats_nothing(tmp_path):
    def strangers(seeds: int) -> dict:
        Strangers(
            "pendulum", families=("rhythm",), seeds=seeds, stages=(0.5, 1.0), effort=1 / 30, episodes=2, out=tmp_path
        ).run()
        return json.loads((tmp_path / "strangers.json").read_text())

    before, files = strangers(1), {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    after = strangers(2)
    assert len(files) == 2
    assert after["policies"].items() > before["policies"].items()
    assert all(path.read_bytes() == content for path, content in files.items())
    assert {entry["run"] for entry in after["policies"].values()} == {"rhythm-0", "rhythm-1"}
    assert after["training_steps"] == 2000
    before = (tmp_path / "strangers.json").read_bytes()
    for other in (
        Strangers("cartpole", families=("rhythm",), stages=(0.5, 1.0), effort=1 / 30, episodes=2, out=tmp_path),
        Strangers("pendulum", families=("rhythm",), stages=(0.5, 1.0), effort=1 / 30, episodes=3, out=tmp_path),
    ):
        with pytest.raises(AimeGymError, match="choose another folder"):
            other.run()
    assert (tmp_path / "strangers.json").read_bytes() == before
    (tmp_path / "strangers.json").write_text(json.dumps({**after, "policies": []}))
    with pytest.raises(AimeGymError, match="is no list of strangers"):
        Strangers("pendulum", families=("rhythm",), stages=(0.5, 1.0), effort=1 / 30, episodes=2, out=tmp_path).run()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"families": ("arss",)}, "Did you mean 'ars'"),
        ({"stages": (0.0,)}, "--stages"),
        ({"seeds": 0}, "--seeds starts at 1"),
    ],
)
def test_wrong_flags_leave_nothing(flags, message, tmp_path):
    with pytest.raises(AimeGymError, match=message):
        Strangers("pendulum", out=tmp_path / "out", **flags).run()
    assert not (tmp_path / "out").exists()


def a_set(tmp_path, families=("rhythm",)) -> StrangerSet:
    Strangers("pendulum", families=families, seeds=2, stages=(0.5, 1.0), effort=1 / 60, episodes=2, out=tmp_path).run()
    return StrangerSet.load(tmp_path, noise=(0.3,))


def test_a_set_refuses_a_policy_that_is_not_the_one_that_was_measured(tmp_path):
    strangers = a_set(tmp_path)
    assert len(strangers.members) == 6  # two stages of two runs, and the last of each with noise
    save_plain(random_rhythm(7), tmp_path / "rhythm-0-1.safetensors")
    with pytest.raises(AimeGymError, match="not the policy"):
        StrangerSet.load(tmp_path)


def test_the_verdict_is_over_runs_of_unseen_families():
    members = tuple(
        Stranger(f"{family}-{run}-{stage}", f"{family}-{run}", family, random_rhythm())
        for family in ("ars", "ppo", "sac")
        for run in range(4)
        for stage in range(3)
    )
    strangers = StrangerSet("pendulum", "swingup", 0.0, members)
    rng = np.random.default_rng(0)
    real = {m.name: 300.0 * (i % 3) + 30 * (i // 3 % 4) for i, m in enumerate(members)}
    # Dreams rank ars and ppo as the world does, and sac the other way round.
    dream = {m.name: -real[m.name] if m.family == "sac" else real[m.name] + rng.normal(0, 1) for m in members}

    def episodes(value: float) -> Episodes:
        return Episodes(np.array([value]), np.array([1]))

    policies = tuple(PolicyReturns(m.name, episodes(dream[m.name]), episodes(real[m.name])) for m in members)
    comparison = Comparison("pendulum", "swingup", "model", 0, 1, policies)
    verdict = judge(comparison, strangers, ("sac",))
    assert verdict["unseen"]["spearman"] > 0.99
    assert verdict["families"]["sac"]["spearman"] < -0.99
    assert verdict["all"]["spearman"] < 0.9
    assert verdict["unseen"]["runs"] == 8
    low, high = verdict["unseen"]["spearman_interval"]
    assert low <= verdict["unseen"]["spearman"] <= high
    assert verdict["span"] == 1.0
    assert verdict["thirds"] == pytest.approx([1 / 3] * 3)
    assert verdict["conclusive"]
    # Beside an agent that earns far more, the same set says nothing of the upper two thirds.
    assert not judge(comparison, strangers, ("sac",), best=5000.0)["conclusive"]
    assert not judge(comparison, strangers, ("sac", "ppo"))["conclusive"], "one unseen family is not enough"
