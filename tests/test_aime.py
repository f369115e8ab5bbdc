"""AIME: imitation from observations alone, behind SB3's protocol."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy

import aime_gym
from aime_gym.agents.aime import AIME, imitation_loss
from aime_gym.commands.data_sets import Mix
from aime_gym.commands.imitate import Imitate
from aime_gym.data.dataset import WindowSampler
from aime_gym.data.demonstrations import (
    bundled_demonstrations,
    expert_return,
    find_demonstrations,
    read_true_actions,
)
from aime_gym.data.trajectories import (
    load_trajectory,
    read_metadata,
    recorded_tasks,
    save_trajectory,
    trajectory_paths,
    write_metadata,
)
from aime_gym.envs.sb3 import make_sb3_env
from aime_gym.envs.wrappers import LatentObservation
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.returns import Episodes
from aime_gym.training.trainer import Callback
from aime_gym.world_model.checkpoint import load_pretrained_model
from tests.random_data import record_random
from tests.random_models import random_model, write_random_model

OPTIONS = {"batch_size": 4, "horizon": 8, "hidden_size": 16, "precision": "32-true"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    """Three short random episodes of the real walker, with actions."""
    return record_random(tmp_path_factory.mktemp("data") / "walker", episodes=3, steps=20, task="walk")


def altered(source: Path, folder: Path, change) -> Path:
    """A copy of demonstrations with `change(trajectory)` applied to each."""
    for i, path in enumerate(trajectory_paths(source)):
        trajectory = load_trajectory(path)
        change(trajectory)
        save_trajectory(folder, i, trajectory)
    write_metadata(folder, {"embodiment": "walker"})
    return folder


def policy_of(agent: AIME) -> torch.Tensor:
    return torch.cat([value.flatten() for value in agent.module.state_dict().values()])


def test_learning_makes_held_out_demonstrations_likelier_and_leaves_the_model(model, demonstrations):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = []

    class Watch(Callback):
        def _on_evaluation(self, new):
            scores.append(new)
            return True

    agent = AIME(model, demonstrations, lr=3e-3, **OPTIONS)
    started = policy_of(agent)
    agent.learn(40, Watch())
    assert not torch.equal(policy_of(agent), started)
    losses = [score["held_out_loss"] for score in scores]
    assert min(losses) < losses[0]
    assert "held_out_action_mse" in scores[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_actions_are_never_read(model, demonstrations, tmp_path):
    def hide(trajectory):
        trajectory["pre_action"][:] = np.nan

    def remove(trajectory):
        del trajectory["pre_action"]

    def disguise(trajectory):
        trajectory["pre_action"] = np.array([None] * len(trajectory["pre_action"]))

    shown, hidden, removed, disguised = (
        policy_of(AIME(model, folder, **OPTIONS).learn(6))
        for folder in (
            demonstrations,
            altered(demonstrations, tmp_path / "nan", hide),
            altered(demonstrations, tmp_path / "none", remove),
            altered(demonstrations, tmp_path / "objects", disguise),
        )
    )
    assert torch.equal(shown, hidden)
    assert torch.equal(shown, removed)
    assert torch.equal(shown, disguised)


@pytest.mark.parametrize(
    "change",
    [
        lambda actions: actions[:, 0],
        lambda actions: actions[:, :1],
        lambda actions: actions[:-1],
        lambda actions: actions * np.inf,
        lambda actions: actions.astype(str),
        lambda actions: actions.astype(object),
    ],
    ids=["a vector", "other dims", "too few", "not finite", "text", "objects"],
)
def test_actions_that_do_not_fit_are_none(demonstrations, tmp_path, change):
    def alter(trajectory):
        with np.errstate(invalid="ignore"):
            trajectory["pre_action"] = change(trajectory["pre_action"])

    rows = sum(len(load_trajectory(path)["height"]) for path in trajectory_paths(demonstrations))
    assert read_true_actions(demonstrations, rows, 6).shape == (rows, 6)
    assert read_true_actions(altered(demonstrations, tmp_path / "altered", alter), rows, 6) is None


@pytest.mark.parametrize("mode", ["kl_only", "reconstruction_only"])
def test_the_parts_of_the_evidence_are_other_objectives(model, demonstrations, mode):
    part = AIME(model, demonstrations, mode=mode, **OPTIONS).learn(3)
    whole = AIME(model, demonstrations, **OPTIONS).learn(3)
    assert not torch.equal(policy_of(part), policy_of(whole))


@pytest.mark.parametrize("mode", ["full", "kl_only", "reconstruction_only"])
def test_images_are_encoded_once_and_the_loss_is_that_of_the_images(demonstrations, tmp_path, mode):
    rng = np.random.default_rng(0)

    def show(trajectory):
        trajectory["image"] = rng.integers(0, 256, (len(trajectory["height"]), 64, 64, 3), np.uint8)

    model = random_model(setup="visual", heads=False)
    agent = AIME(model, altered(demonstrations, tmp_path / "shown", show), mode=mode, **OPTIONS)
    started = policy_of(agent)
    agent.learn(1)
    assert not torch.equal(policy_of(agent), started)
    batch = agent._batches(agent.demonstrations, 4, (0, 0)).sample()
    assert ("image" in batch) == (mode != "kl_only")  # the KL needs embeddings alone
    places = {"at_start": agent.at_start, "least": 2}
    images = WindowSampler(agent.demonstrations, 4, OPTIONS["horizon"], (0, 0), ["image"], **places).sample()
    torch.manual_seed(1)
    loss, metrics = agent._loss(agent.module, batch)
    torch.manual_seed(1)
    expected = imitation_loss(model, images, agent.module["policy"], mode)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(metrics["kl_loss"], expected.metrics["kl_loss"], rtol=1e-5, atol=1e-4)
    assert expected.metrics["kl_loss"] > 0.1
    assert metrics.keys() >= {"kl_loss", "total_loss"}


def test_a_kl_that_is_reweighted_needs_the_images_themselves():
    model = random_model(setup="visual", heads=False, nll_reweight="dim_wise")
    policy = AIME(model, mode="kl_only", **OPTIONS).module["policy"]
    images = {"image": torch.rand(3, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    embeddings = model.encode(images)
    alone, known = (
        imitation_loss(model, images, policy, "kl_only", sample=False, embeddings=e) for e in (None, embeddings)
    )
    torch.testing.assert_close(known.loss, alone.loss)
    with pytest.raises(AimeGymError, match="needs image"):
        imitation_loss(model, {}, policy, "kl_only", embeddings=embeddings)


def test_the_inverse_dynamics_model_guides_and_stays_as_it_is(demonstrations, tmp_path):
    model = write_random_model(tmp_path / "with-idm", idm_mode="detach")
    agent = AIME(model, demonstrations, use_idm=True, lr=1e-2, **OPTIONS)
    guides = {"given": model.idm, "the agent's": agent._frozen.idm}
    before = {name: [value.clone() for value in guide.state_dict().values()] for name, guide in guides.items()}
    started = policy_of(agent)
    agent.learn(5)
    assert not torch.equal(policy_of(agent), started)
    assert {name.split(".")[0] for name in agent.module.state_dict()} == {"policy"}
    for name, guide in guides.items():
        assert all(torch.equal(a, b) for a, b in zip(guide.state_dict().values(), before[name], strict=True)), name
        assert all(value.grad is None for value in guide.parameters()), name


def test_a_model_without_one_is_told(demonstrations, tmp_path):
    model = write_random_model(tmp_path / "without-idm", idm_mode="none")
    with pytest.raises(AimeGymError, match="--idm-mode detach"):
        AIME(model, demonstrations, use_idm=True, **OPTIONS)
    guided = random_model(idm_mode="detach")
    with pytest.raises(AimeGymError, match="nothing to learn"):
        AIME(guided, demonstrations, use_idm=True, mode="reconstruction_only", **OPTIONS)


def test_imitators_log_for_tensorboard_as_sb3_does(model, demonstrations, tmp_path, monkeypatch):
    AIME(model, demonstrations, tensorboard_log=tmp_path, **OPTIONS).learn(1)
    assert len([*(tmp_path / "aime").glob("events.out.tfevents.*")]) == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(AimeGymError, match="one of 3 processes"):
        AIME(model, demonstrations, **OPTIONS).learn(1)


def test_a_stopped_run_resumes_bit_for_bit(model, demonstrations, tmp_path):
    whole = AIME(model, demonstrations, **OPTIONS).learn(8)

    class Stop(Callback):
        def _on_update_end(self):
            if self.trainer.update == 5:
                self.trainer.status = "interrupted"
            return True

    with pytest.raises(KeyboardInterrupt):
        AIME(model, demonstrations, **OPTIONS).learn(8, Stop(), tmp_path)
    resumed = AIME(model, demonstrations, **OPTIONS).learn(8, Stop(), tmp_path)
    assert torch.equal(policy_of(whole), policy_of(resumed))


def test_the_settings_of_the_original(model, demonstrations):
    """50 windows of 50 steps from anywhere in all demonstrations, and the last weights, not those best held out."""
    assert AIME.original(model).horizon == AIME.original(model).batch_size == 50
    last = {}

    class Watch(Callback):
        def _on_update_end(self):
            last.update({name: value.clone() for name, value in self.trainer.module.state_dict().items()})
            return True

        def _on_evaluation(self, scores):
            raise AssertionError("nothing is held out")

    agent = AIME.original(model, demonstrations, batch_size=6, horizon=8, lr=0.5)
    started = policy_of(agent)
    drawn = agent._batches(agent.demonstrations, 2000, (0,)).sample()["height"][0, :, 0]
    begin = np.isin(drawn.numpy(), agent.demonstrations.arrays["height"][agent.demonstrations.bounds[:, 0], 0])
    assert begin.mean() < 0.15  # one of the 14 places in each demonstration; by default a fifth more
    agent.learn(12, Watch())
    assert not torch.equal(policy_of(agent), started)
    assert all(torch.equal(value, last[name]) for name, value in agent.module.state_dict().items())
    usual = AIME(model)
    assert (usual.horizon, usual.batch_size, usual.held_out, usual.lr) == (32, 32, 0.2, 1e-3)


def test_the_learning_rate_falls_to_0_but_for_the_original(model, demonstrations):
    def rates(agent):
        class Watch(Callback):
            def _on_update_end(self):
                seen.append(self.trainer.optimizer.param_groups[0]["lr"])
                return True

        seen = []
        agent.learn(4, Watch())
        return seen

    falling = [0.5e-3 * (1 + math.cos(math.pi * update / 4)) for update in (1, 2, 3, 4)]
    assert rates(AIME(model, demonstrations, **OPTIONS)) == pytest.approx(falling, abs=1e-9)
    assert set(rates(AIME.original(model, demonstrations, batch_size=6, horizon=8))) == {3e-4}
    assert set(rates(AIME(model, demonstrations, schedule="constant", **OPTIONS))) == {1e-3}
    with pytest.raises(AimeGymError, match="schedule"):
        AIME(model, schedule="linear")


def test_one_demonstration_is_enough_where_none_is_held_out(model, demonstrations, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(trajectory_paths(demonstrations)[0], tmp_path / "one" / "0.npz")
    with pytest.raises(AimeGymError, match="two demonstrations or more, some to hold out"):
        AIME(model, tmp_path / "one", **OPTIONS)
    agent = AIME(model, tmp_path / "one", held_out=0, **OPTIONS)
    started = policy_of(agent)
    assert not torch.equal(policy_of(agent.learn(2)), started)
    with pytest.raises(AimeGymError, match="a demonstration and 99 rows in the longest"):
        AIME(model, tmp_path / "one", held_out=0, horizon=99)


# Acting


def test_it_acts_on_the_features_of_the_latent_wrapper(model):
    """The state that `predict` keeps is what `LatentObservation` shows, for each env on its own."""
    agent = AIME(model, **OPTIONS)
    worlds = [gymnasium.make("AimeReal-Walker-v0") for _ in range(3)]
    twins = [LatentObservation(gymnasium.make("AimeReal-Walker-v0"), model) for _ in range(3)]
    observations = np.stack([world.reset(seed=i)[0] for i, world in enumerate(worlds)])
    features = np.stack([twin.reset(seed=i)[0] for i, twin in enumerate(twins)])
    state, starts = None, np.ones(3, bool)
    for step in range(6):
        actions, state = agent.predict(observations, state, starts)
        np.testing.assert_allclose(state[0].numpy(), features, atol=1e-5)
        expected = agent.module["policy"](torch.from_numpy(features)).mode.detach().numpy()
        np.testing.assert_allclose(actions, expected, atol=1e-5)
        starts = np.array([False, step == 2, False])
        for i, (world, twin) in enumerate(zip(worlds, twins, strict=True)):
            observations[i], features[i] = world.step(actions[i])[0], twin.step(actions[i])[0]
            if starts[i]:
                observations[i], features[i] = world.reset(seed=9)[0], twin.reset(seed=9)[0]


def test_sb3_evaluates_it_alone_and_in_many_envs(model):
    agent = AIME(model, **OPTIONS)
    for envs in (1, 3):
        world = make_sb3_env("AimeReal-Walker-v0", n_envs=envs, seed=0, max_episode_steps=5)
        mean, _ = evaluate_policy(agent, world, 3, warn=False)
        assert mean > 0
    single, _ = gymnasium.make("AimeReal-Walker-v0", obs_type="dict").reset(seed=0)
    action, state = agent.predict(single)
    assert action.shape == (6,)
    assert agent.predict(single, state)[0].shape == (6,)


def test_compare_takes_it(model):
    comparison = aime_gym.compare({"aime": AIME(model, **OPTIONS)}, model=model, episodes=2, max_episode_steps=5)
    assert comparison.policies[0].real.mean > 0


def test_save_and_load(model, tmp_path):
    agent = AIME(model, seed=3, **OPTIONS)
    folder = agent.save(tmp_path / "agent")
    observations = np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32)
    for again in (AIME.load(folder), AIME.load(folder, model)):
        np.testing.assert_array_equal(again.predict(observations)[0], agent.predict(observations)[0])
    settings = json.loads((folder / "imitator.json").read_text())
    (folder / "imitator.json").write_text(json.dumps(settings | {"hidden_size": 8}))
    with pytest.raises(AimeGymError, match="shape"):
        AIME.load(folder)
    (folder / "imitator.json").write_text(json.dumps(settings | {"surprise": 1}))
    with pytest.raises(AimeGymError, match="surprise"):
        AIME.load(folder)
    (folder / "imitator.json").write_text(json.dumps(settings))
    file = folder / "imitator.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1  # the last bit of a weight: another agent
    file.write_bytes(damaged)
    with pytest.raises(AimeGymError, match=r"imitator\.safetensors is not the file that digests\.json"):
        AIME.load(folder)
    (folder / "imitator.json").write_text("{")
    with pytest.raises(AimeGymError, match="not the folder of a saved imitator"):
        AIME.load(folder)


# Bad input


def test_bad_demonstrations_are_refused(model, demonstrations, tmp_path):
    def poison(trajectory):
        trajectory["height"][3] = np.nan

    def shorten(trajectory):
        for key in trajectory:
            trajectory[key] = trajectory[key][:5]

    def blind(trajectory):
        del trajectory["velocity"]

    for change, told in ((poison, "'height' has a value in row 3"), (shorten, "8 rows"), (blind, "lacks velocity")):
        with pytest.raises(AimeGymError, match=told):
            AIME(model, altered(demonstrations, tmp_path / change.__name__, change), **OPTIONS)
    other = altered(demonstrations, tmp_path / "cheetah", lambda trajectory: None)
    write_metadata(other, {"embodiment": "cheetah"})
    with pytest.raises(AimeGymError, match="shows cheetah; the model is of walker"):
        AIME(model, other, **OPTIONS)
    with pytest.raises(AimeGymError, match="Unknown demonstrations"):
        AIME(model, "nowhere", **OPTIONS)
    with pytest.raises(AimeGymError, match="no demonstrations to learn from"):
        AIME(model, **OPTIONS).learn(1)


def test_bad_observations_and_states_are_refused(model):
    agent = AIME(model, **OPTIONS)
    good = np.zeros((2, 24), np.float32)
    _, state = agent.predict(good)
    for observation, told in (
        (good[:, :20], "24 values"),
        (good * np.nan, "not finite"),
        ({"height": good}, "lacks"),
        (None, "of numbers; got None"),
        (1.0, "24 values"),
    ):
        with pytest.raises(AimeGymError, match=told):
            agent.predict(observation)
    sees = AIME(random_model(setup="visual", standardise=False), **OPTIONS)
    for image in (np.zeros((3, 64, 64), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8)):
        with pytest.raises(AimeGymError, match=r"'image' is \(64, 64, 3\) uint8, or N of them; got"):
            sees.predict(image)
    with pytest.raises(AimeGymError, match=r"episode_start is \[2\]"):
        agent.predict(good, state, np.ones(3, bool))
    with pytest.raises(AimeGymError, match="state is of 2 envs"):
        agent.predict(good[:1], state)


# The command


@pytest.fixture(scope="module")
def without_rewards(tmp_path_factory) -> str:
    return str(write_random_model(tmp_path_factory.mktemp("models") / "headless", heads=False).folder)


@pytest.mark.parametrize(
    ("expert", "told", "dreams_rewards"),
    [
        (40.0, "at walk, 75% of the demonstrations' 40:", False),
        (40.0, "at walk, 75% of the demonstrations' 40:", True),
        (0.0, "at walk:", False),
        (-40, "at walk:", False),
    ],
)
def test_the_command_prints_one_real_return(
    demonstrations, without_rewards, model, tmp_path, monkeypatch, capsys, expert, told, dreams_rewards
):
    """From resets, in one sentence; what the agent earns from where dreams begin is in returns.json and the report."""
    resets = Episodes(np.array([20.0, 40.0]), np.array([500, 500]))
    elsewhere = Episodes(np.array([111.0, 113.0]), np.array([500, 500]))
    comparison = Comparison("walker", "walk", "tiny", 0, 500, (PolicyReturns("AIME", elsewhere, elsewhere),))
    monkeypatch.setattr("aime_gym.evaluation.returns.episode_returns", lambda *args: resets)
    monkeypatch.setattr("aime_gym.evaluation.compare.compare", lambda *args: comparison)
    monkeypatch.setattr("aime_gym.evaluation.report.write_report", lambda path, *told: path.write_text(str(told)))
    shown = altered(demonstrations, tmp_path / "shown", lambda trajectory: None)
    write_metadata(shown, {"embodiment": "walker", "expert_return": expert})
    out, folder = tmp_path / "out", str(model.folder) if dreams_rewards else without_rewards
    flags = {
        "updates": 1,
        "batch_size": 2,
        "horizon": 8,
        "episodes": 2,
        "video_steps": 0,
        "tensorboard": dreams_rewards,
    }
    Imitate(folder, str(shown), out=out, **flags).run()
    assert bool([*out.rglob("events.out.tfevents.*")]) == dreams_rewards
    printed = capsys.readouterr().out
    assert f"In the real walker the agent earns 30 {told} the mean of 2 episodes from resets" in printed
    assert "112" not in printed
    assert json.loads((out / "score.json").read_text())["returns"] == [20.0, 40.0]
    assert (out / "returns.json").exists() == dreams_rewards
    if dreams_rewards:
        returns = json.loads((out / "returns.json").read_text())
        assert returns["real_from_resets"]["mean"] == 30
        assert "not at resets" in returns["starts"]
        assert Comparison.from_json(out / "returns.json").policies[0].real.mean == 112
        assert "'real return from resets': '30 [" in (out / "report.html").read_text()
        assert "agent, report.html, returns.json, score.json" in printed


def test_a_model_with_a_camera_is_scored_on_what_it_observes(demonstrations, tmp_path):
    """Released models of sensors have the image in their config, too."""
    model = write_random_model(tmp_path / "model", setup="lpomdp", heads=False, has_image=True)
    assert "image" not in model.observed
    agent = AIME(model, demonstrations, **OPTIONS)
    real = Imitate(episodes=1).score(agent, tmp_path, "walk")
    assert real.lengths.tolist() == [500]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "swingupp"}, "Unknown task of walker 'swingupp'"),
        ({"task": "stand"}, "Unknown task of this model's heads 'stand'.* Known: walk, run"),
        ({"episodes": 0}, "--episodes starts at 1; got 0"),
        ({"threads": 0}, "--threads starts at 1; got 0"),
        ({"seed": -1}, "--seed starts at 0; got -1"),
        ({"algo": "bco"}, "pass body_data="),
        ({"device": "no-such-device"}, "'cpu' always can"),
    ],
)
def test_the_command_refuses_at_the_start_what_does_not_fit(model, demonstrations, tmp_path, options, message):
    with pytest.raises(AimeGymError, match=message):
        Imitate(str(model.folder), str(demonstrations), horizon=8, out=tmp_path / "out", **options).run()
    assert not (tmp_path / "out").exists()


# Data


def test_mix_makes_demonstrations_without_actions(demonstrations, tmp_path):
    again = shutil.copytree(demonstrations, tmp_path / "again")
    job = Mix((demonstrations, again), tmp_path / "mix", trajectories=2, observations_only=True)
    job.run()
    job.run()  # the same again changes nothing
    mixed = load_trajectory(tmp_path / "mix" / "3.npz", required=())
    assert set(mixed) == {"orientations", "height", "velocity"}
    np.testing.assert_array_equal(mixed["height"], load_trajectory(demonstrations / "2.npz")["height"])
    told = json.loads((tmp_path / "mix" / "dataset.json").read_text())
    ends = [load_trajectory(demonstrations / f"{i}.npz")["reward"].sum() for i in (0, 2)]
    assert told["expert_return"] == pytest.approx(np.mean(ends))
    with pytest.raises(AimeGymError, match="holds another data set"):
        Mix((demonstrations,), tmp_path / "mix").run()


def test_mix_does_not_go_on_when_a_source_has_grown(demonstrations, tmp_path):
    growing = shutil.copytree(demonstrations, tmp_path / "growing")
    job = Mix((growing, demonstrations), tmp_path / "mix")
    job.run()
    mixed = sorted((tmp_path / "mix").iterdir())
    (tmp_path / "mix" / "5.npz").unlink()  # as if it had been stopped
    count = len(trajectory_paths(growing))
    save_trajectory(growing, count, load_trajectory(growing / "0.npz"))
    with pytest.raises(AimeGymError, match=rf"other trajectories of {growing} than .* mix again"):
        job.run()
    (growing / f"{count}.npz").unlink()
    job.run()
    assert sorted((tmp_path / "mix").iterdir()) == mixed
    assert read_metadata(tmp_path / "mix")["chosen"][str(growing)] == list(range(count))


def test_mix_takes_beginnings_which_do_not_count_as_episodes(demonstrations, tmp_path):
    Mix((demonstrations,), tmp_path / "starts", first=5).run()
    Mix((demonstrations, tmp_path / "starts"), tmp_path / "both", observations_only=True).run()
    assert expert_return(tmp_path / "starts") is None
    assert expert_return(tmp_path / "both") == pytest.approx(expert_return(demonstrations))
    assert recorded_tasks(read_metadata(tmp_path / "both")) == {"walk"}
    count = len(trajectory_paths(demonstrations))
    whole, start = (load_trajectory(tmp_path / "both" / f"{i}.npz", required=())["height"] for i in (0, count))
    np.testing.assert_array_equal(start, whole[:5])
    with pytest.raises(AimeGymError, match="--first of 1 or more"):
        Mix((demonstrations,), tmp_path / "none", first=0).run()


def test_the_return_of_a_mix_is_unknown_where_an_episode_has_no_rewards(demonstrations, tmp_path):
    silent = altered(demonstrations, tmp_path / "silent", lambda trajectory: trajectory.pop("reward"))
    Mix((demonstrations, silent), tmp_path / "mix").run()
    assert expert_return(silent) is None
    assert expert_return(tmp_path / "mix") is None


def test_bundled_demonstrations_fit_the_bundled_model_and_show_no_actions():
    config = load_pretrained_model("walker-state").config
    assert "walker-walk" in bundled_demonstrations()
    for name in bundled_demonstrations():
        folder = find_demonstrations(name)
        for path in trajectory_paths(folder):
            trajectory = load_trajectory(path, required=())
            assert set(trajectory) == set(config.observed)
            assert len(trajectory["height"]) in (64, 501)
        assert AIME("walker-state", name).demonstrations.embodiment == "walker"
