"""Policies that no model has met: plain files, runs that go on, and the same actions as the libraries' own agents."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import PPO

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, Rhythm, load_plain, save_plain
from aime_gym.agents.strangers import learn_stranger
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.compare import Compare
from aime_gym.commands.strangers import Strangers
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.measure_trust import FRAMES, _begin_all, measure_trust
from aime_gym.evaluation.returns import Episodes, episode_returns
from aime_gym.evaluation.strangers import SEED, Stranger, StrangerSet, judge
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import weights_digest
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.trust import Trust, load_trust
from tests.tiny_model import make_tiny_model


def random_mlp(seed: int = 0, activation: str = "relu", squash: bool = True, inputs: int = 3) -> PlainMLP:
    rng = np.random.default_rng(seed)
    weights = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((inputs, 8), (8, 1)))
    biases = tuple(rng.standard_normal(size).astype(np.float32) for size in (8, 1))
    mean, std = (rng.uniform(0.5, 2, inputs).astype(np.float32) for _ in range(2))
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


def test_equal_policies_have_equal_files(tmp_path):
    """By their digests a set knows policies that are there twice, though safetensors 0.8.0 orders metadata at random.

    See findings/safetensors_metadata_has_no_order.sh.
    """
    files = {save_plain(random_mlp(), tmp_path / f"{index}.safetensors").read_bytes() for index in range(20)}
    assert len(files) == 1


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


def test_runs_that_other_processes_had_done_are_entered(rhythms, tmp_path):
    """A call that is killed leaves their records."""
    for path in rhythms.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = json.loads((rhythms / "strangers.json").read_text())
    for run in {entry["run"] for entry in whole["policies"].values()}:
        policies = {name: entry for name, entry in whole["policies"].items() if entry["run"] == run}
        (tmp_path / f"{run}.json").write_text(json.dumps(policies))
    (tmp_path / "strangers.json").write_text(json.dumps({**whole, "policies": {}, "training_steps": 0}))
    a_set(tmp_path)
    assert json.loads((tmp_path / "strangers.json").read_text()) == whole
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in rhythms.iterdir()}


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_process(tmp_path):
    kept = {"families": ("rhythm", "ppo"), "seeds": 2, "stages": (0.5, 1.0), "effort": 1 / 60, "episodes": 2}
    for workers in (1, 2):
        Strangers("pendulum", **kept, workers=workers, out=tmp_path / str(workers)).run()
    alone, beside = ({path.name: path.read_bytes() for path in (tmp_path / w).iterdir()} for w in ("1", "2"))
    assert len(alone) == 1 + 2 * 2 * 2
    assert alone == beside


@pytest.mark.slow
def test_imitators_come_to_do_what_their_expert_does(pendulum, tmp_path):
    expert = save_plain(random_mlp(), tmp_path / "expert.safetensors")
    flags = {"families": (), "seeds": 2, "stages": (0.01, 1.0), "episodes": 2, "out": tmp_path / "set"}
    Strangers("pendulum", imitate=expert, **flags).run()
    index = json.loads((tmp_path / "set" / "strangers.json").read_text())
    assert {entry["family"] for entry in index["policies"].values()} == {"imitator"}
    assert {entry["run"] for entry in index["policies"].values()} == {"imitator-expert-0", "imitator-expert-1"}
    assert index["training_steps"] == 2 * 5 * 500
    observations = np.random.default_rng(0).uniform(-1, 1, (200, 3)).astype(np.float32)
    wanted = load_plain(expert).predict(observations)[0]
    early, late = (
        load_plain(tmp_path / "set" / f"imitator-expert-0-{stage}.safetensors").predict(observations)[0]
        for stage in range(2)
    )
    assert np.abs(late - wanted).mean() < 0.5 * np.abs(early - wanted).mean()
    with pytest.raises(AimeGymError, match="there is none at"):
        Strangers("pendulum", imitate=tmp_path / "nobody.safetensors", **flags).run()


def test_exploiters_are_kin_of_the_model_in_whose_dreams_they_learned_alone(pendulum, tmp_path):
    own = shutil.copytree(pendulum, tmp_path / "own")
    flags = {"families": (), "seeds": 1, "stages": (0.5, 1.0), "effort": 0.03, "episodes": 1, "out": tmp_path / "set"}
    Strangers("pendulum", exploit=str(own), **flags).run()
    index = json.loads((tmp_path / "set" / "strangers.json").read_text())
    first, last = index["policies"].values()
    assert (first["steps"], last["steps"], index["training_steps"]) == (0, 0, 0), "no real step"
    assert 3000 <= first["dream_steps"] < last["dream_steps"]
    assert first["model"] == weights_digest(own)
    strangers = StrangerSet.load(tmp_path / "set")
    assert not np.array_equal(*(member.policy.predict(np.eye(3, dtype="f4"))[0] for member in strangers.members))
    with pytest.raises(AimeGymError, match="are kin of the model"):
        measure_trust(load_pretrained_model(own), strangers)
    other = make_tiny_model(tmp_path / "other", "pendulum", seed=1)
    said = measure_trust(load_pretrained_model(other), strangers, episodes=1).trust.strangers
    assert said["seen"] == ["exploiter"], "reported apart, as SHAC's rounds collect data"
    assert said["families"]["exploiter"]["policies"] == 2
    for model, message in (("walker-state", "Expected a model of pendulum"), ("no-such", "no-such")):
        with pytest.raises(AimeGymError, match=message):
            Strangers("pendulum", exploit=model, **flags).run()


def test_strangers_can_learn_from_a_guiding_task(pendulum, tmp_path, monkeypatch):
    """They learn from its reward, are judged at the other task, and the list, what is published and the card say so."""
    learnt: list[str] = []

    def learning(family: str, body: str, task: str, *rest):
        learnt.append(task)
        return learn_stranger(family, body, task, *rest)

    monkeypatch.setattr("aime_gym.agents.strangers.learn_stranger", learning)
    flags = {"families": ("rhythm",), "seeds": 1, "stages": (1.0,), "effort": 1 / 60, "episodes": 1}
    raw, own = tmp_path / "raw", shutil.copytree(pendulum, tmp_path / "own")
    Strangers("pendulum", learn="lift", out=raw, **flags).run()
    assert learnt == ["lift"]
    assert json.loads((raw / "strangers.json").read_text())["settings"]["learn"] == "lift"
    Strangers("pendulum", out=raw, episodes=1, publish=tmp_path / "published").run()
    published = StrangerSet.load(tmp_path / "published")
    assert (published.task, published.learn) == ("swingup", "lift")
    assert published.members[0].returns[0] < 100, "the reward of lift is above 0 nearly everywhere"
    Compare(strangers=tmp_path / "published", model=str(own), out=tmp_path / "out", trust=True).run()
    assert "which learned from the reward of lift" in (own / "README.md").read_text()
    with pytest.raises(AimeGymError, match="choose another folder"):
        Strangers("pendulum", out=raw, **flags).run()
    with pytest.raises(AimeGymError, match="Did you mean 'lift'"):
        Strangers("pendulum", learn="lit", out=tmp_path / "new", **flags).run()


def test_a_published_set_gets_more_real_episodes(tmp_path):
    raw, published = tmp_path / "raw", tmp_path / "published"
    flags = {"task": "lift", "families": ("rhythm",), "seeds": 1, "stages": (1.0,), "effort": 1 / 60}
    Strangers("pendulum", out=raw, episodes=1, **flags).run()
    Strangers("pendulum", task="lift", out=raw, episodes=1, publish=published).run()
    before = StrangerSet.load(published)
    Strangers("pendulum", task="lift", out=published, measure=True, episodes=3).run()
    after = StrangerSet.load(published)
    envs = make_real_envs("pendulum", 1, task="lift")
    for member, known in zip(after.members, before.members, strict=True):
        assert (len(member.returns), member.returns[:1]) == (3, known.returns), "what was measured is kept"
        if member.policy is member.plain:
            own = [episode_returns(member.policy, envs, 1, seed=SEED + i).mean for i in range(3)]
            assert len(set(own)) == 3
            assert member.returns == pytest.approx(own, abs=1e-3)
    envs.close()
    with pytest.raises(AimeGymError, match="no published set"):
        Strangers("pendulum", task="lift", out=raw, measure=True, episodes=3).run()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"families": ("arss",)}, "Did you mean 'ars'"),
        ({"stages": (0.0,)}, "--stages"),
        ({"noise": (0.3, 0.0)}, "--noise"),
        ({"seeds": 0}, "--seeds starts at 1"),
    ],
)
def test_wrong_flags_leave_nothing(flags, message, tmp_path):
    with pytest.raises(AimeGymError, match=message):
        Strangers("pendulum", out=tmp_path / "out", **flags).run()
    assert not (tmp_path / "out").exists()


def a_set(folder: Path, families=("rhythm",)) -> Path:
    Strangers("pendulum", families=families, seeds=2, stages=(0.5, 1.0), effort=1 / 60, episodes=2, out=folder).run()
    return folder


@pytest.fixture(scope="module")
def rhythms(tmp_path_factory) -> Path:
    return a_set(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "pendulum")


def test_a_set_refuses_a_policy_that_is_not_the_one_that_was_measured(rhythms, tmp_path):
    folder = shutil.copytree(rhythms, tmp_path / "set")
    strangers = StrangerSet.load(folder)
    assert [len(member.returns) for member in strangers.members] == [2] * 4  # two stages of two runs
    save_plain(random_rhythm(7), folder / "rhythm-0-1.safetensors")
    with pytest.raises(AimeGymError, match="not the policy"):
        StrangerSet.load(folder)


def test_the_verdict_is_over_runs_of_unseen_families():
    members = tuple(
        Stranger(f"{family}-{run}-{stage}", f"{family}-{run}", family, random_rhythm())
        for family in ("ars", "ppo", "sac")
        for run in range(6)
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
    assert verdict["spearman"] > 0.99
    assert verdict["families"]["sac"]["spearman"] < -0.99
    assert verdict["seen"] == ["sac"]
    assert (verdict["policies"], verdict["runs"]) == (36, 12)
    for name in ("spearman", "pearson", "mean_absolute_error", "bias"):
        (low, high), (inner_low, inner_high) = (verdict["intervals"][name][percent] for percent in ("95", "90"))
        assert low <= inner_low <= verdict[name] <= inner_high <= high
    assert verdict["range"] == [0.0, max(real.values())]
    assert verdict["span"] == 1.0
    assert verdict["thirds"] == pytest.approx([1 / 3] * 3)
    assert Trust(strangers=verdict).finding == "trusted"
    # Beside an agent that earns far more, the same set says nothing of the upper two thirds.
    assert Trust(strangers=judge(comparison, strangers, ("sac",), best=5000.0)).finding == "inconclusive"
    assert Trust(strangers=judge(comparison, replace(strangers, best=5000.0))).finding == "inconclusive"
    assert Trust(strangers=judge(comparison, strangers, ("sac", "ppo"))).finding == "inconclusive"


def test_dreams_of_strangers_begin_as_their_real_episodes(rhythms, pendulum):
    strangers, model = StrangerSet.load(rhythms), load_pretrained_model(pendulum)
    noisy = Stranger("noisy", "run", "ars", NoisyPolicy(random_mlp(), 0.3), (0.0, 0.0))
    for member in (strangers.members[0], noisy):
        (begun,) = _begin_all(model, get_embodiment("pendulum"), "swingup", [member], [SEED, SEED + 1])
        envs = make_real_envs("pendulum", 1, task="swingup", max_episode_steps=FRAMES)
        episodes = episode_returns(member.policy, envs, 2, seed=SEED, record=True)
        envs.close()
        frames = np.concatenate([begun.frames[name] for name in model.observed], axis=-1)
        for index, recording in enumerate(episodes.recordings):
            np.testing.assert_allclose(frames[:, index], recording.observations, atol=1e-5)
            np.testing.assert_allclose(begun.actions[:, index], recording.actions[:-1], atol=1e-5)


def test_what_strangers_dream_does_not_depend_on_their_number(rhythms, pendulum, monkeypatch):
    strangers, model = StrangerSet.load(rhythms), load_pretrained_model(pendulum)
    together = measure_trust(model, strangers).comparison.policies
    monkeypatch.setattr("aime_gym.evaluation.measure_trust.MOST_SLOTS", 2)
    alone = measure_trust(model, strangers).comparison.policies
    for one, other, member in zip(together, alone, strangers.members, strict=True):
        np.testing.assert_allclose(one.dream.returns, other.dream.returns, rtol=1e-3, atol=1e-3)
        assert one.doubt == pytest.approx(other.doubt, rel=1e-2)
        assert one.real.returns.tolist() == list(member.returns)
        assert one.dream.lengths.tolist() == [500, 500]


def test_strangers_of_other_bodies_are_refused(rhythms, pendulum):
    model, strangers = load_pretrained_model(pendulum), StrangerSet.load(rhythms)
    with pytest.raises(AimeGymError, match="Expected a model of pendulum"):
        measure_trust(load_pretrained_model("walker-state"), strangers)
    wide = replace(strangers, members=(Stranger("wide", "r", "ppo", random_mlp(inputs=5), (1.0,)),))
    with pytest.raises(AimeGymError, match="wide sees 5 numbers and gives 1; the body shows 3 and takes 1"):
        measure_trust(model, wide)


def test_the_command_keeps_what_strangers_say(rhythms, pendulum, tmp_path, capsys):
    own = shutil.copytree(pendulum, tmp_path / "own")
    command = Compare(strangers=rhythms, model=str(own), out=tmp_path / "out", trust=True)
    command.run()
    said = load_trust(own)["swingup"]
    assert said.strangers["policies"] == 4
    assert said.strangers["set"] == StrangerSet.load(rhythms).digest
    assert said.line in " ".join(capsys.readouterr().out.split())
    assert Comparison.from_json(tmp_path / "out" / "returns.json").trust == said.line
    assert "**swingup**: 4 policies of 2 runs" in (own / "README.md").read_text()
    assert load_trust(own)["swingup"] == said
    for changes, message in (
        ({"agents": ("random",)}, "leave out agents"),
        ({"task": "lift"}, "takes the policies, the task swingup"),
        ({"model": None}, "a folder of your own"),
        ({"model": "pendulum-state"}, "a folder of your own"),
    ):
        with pytest.raises(AimeGymError, match=message):
            replace(command, **changes).run()
