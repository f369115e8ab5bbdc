"""BC, BCO(0) and IIDM on a body whose actions can be read off its observations."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy

import aime_gym
from aime_gym.agents.imitator import MONITOR
from aime_gym.commands.collect import RecordTrajectories
from aime_gym.commands.data_sets import Mix
from aime_gym.data.trajectories import load_trajectory, save_trajectory, write_metadata
from aime_gym.envs.sb3 import make_sb3_env
from aime_gym.errors import AimeGymError
from aime_gym.training.callbacks import EarlyStopping, ProgressBar
from aime_gym.training.trainer import Callback, Trainer
from tests.random_models import random_model, write_random_model

BASELINES = ("BC", "BCO", "IIDM")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four short episodes of the real walker under a simple policy of what it sees."""
    folder = tmp_path_factory.mktemp("data") / "walker"
    env = gymnasium.make("AimeReal-Walker-v0", max_episode_steps=60)
    recorder = RecordTrajectories(env, lambda t: save_trajectory(folder, len(list(folder.glob("*.npz"))), t))
    weights = np.random.default_rng(0).normal(size=(24, 6)) / 3
    for episode in range(4):
        observation, _ = recorder.reset(seed=episode)
        for _ in range(60):
            observation = recorder.step(np.tanh(observation @ weights).astype(np.float32))[0]
    write_metadata(folder, {"embodiment": "walker", "task": "walk"})
    return folder


def make(name: str, model, data: Path, **options):
    body = {} if name == "BC" else {"body_data": [data], "body_updates": 600}
    return getattr(aime_gym, name)(model, data, lr=3e-3, batch_size=32, **body, **options)


@pytest.mark.parametrize("name", BASELINES)
def test_it_learns_from_demonstrations(name, model, data):
    scores = []

    class Watch(Callback):
        def _on_evaluation(self, new):
            scores.append(new)
            return True

    agent = make(name, model, data).learn(400, Watch())
    assert min(score["held_out_loss"] for score in scores) < scores[0]["held_out_loss"]
    if name != "IIDM":  # whose forward model is too crude here to tell the actions themselves
        assert scores[-1]["held_out_action_mse"] < 0.7 * float(agent.true_actions.var(0).mean())


@pytest.mark.parametrize("name", BASELINES)
def test_it_acts_saves_and_loads(name, model, data, tmp_path):
    agent = make(name, model, data)
    world = make_sb3_env("AimeReal-Walker-v0", n_envs=2, seed=0, max_episode_steps=5)
    assert evaluate_policy(agent, world, 2, warn=False)[0] > 0
    again = type(agent).load(agent.save(tmp_path / "agent"))
    observations = np.random.default_rng(0).normal(size=(4, 2, 24)).astype(np.float32)
    state = other = None
    for t, seen in enumerate(observations):
        starts = np.array([t == 0, t in (0, 2)])
        actions, state = agent.predict(seen, state, starts)
        same, other = again.predict(seen, other, starts)
        np.testing.assert_array_equal(actions, same)
    # The second env began again at t = 2: what it saw before is forgotten.
    fresh, fresh_state = agent.predict(observations[2, 1:])
    fresh, _ = agent.predict(observations[3, 1:], fresh_state)
    np.testing.assert_allclose(actions[1], fresh[0], atol=1e-6)
    with pytest.raises(AimeGymError, match=f"holds an agent of '{agent.name}'"):
        aime_gym.AIME.load(tmp_path / "agent")


@pytest.mark.parametrize(
    ("setup", "options", "frames"), [("mdp", {}, 1), ("mdp", {"stack": 3}, 3), ("lpomdp", {}, 5), ("visual", {}, 5)]
)
@pytest.mark.parametrize("name", BASELINES)
def test_the_policy_sees_one_frame_of_a_whole_state_and_five_of_a_part(name, setup, options, frames, data, tmp_path):
    """What was seen `frames` steps ago counts no more; a saved agent keeps its stack."""
    model = random_model(setup=setup, heads=False)
    agent = getattr(aime_gym, name)(model, **options)
    if setup == "mdp":
        agent = type(agent).load(agent.save(tmp_path / "agent"))
    rng = np.random.default_rng(0)
    shape = {"mdp": (24,), "lpomdp": (15,), "visual": (64, 64, 3)}[setup]
    seen = rng.normal(size=(8, 2, *shape)).astype(np.float32)
    if setup == "visual":
        seen = rng.integers(0, 255, seen.shape, np.uint8)
    last, before = len(seen) - 1, len(seen) - frames
    seen[before:, 1] = seen[before:, 0]  # two envs that differ up to there
    state = None
    for t, observation in enumerate(seen):
        actions, state = agent.predict(observation, state)
        assert np.allclose(*actions, atol=1e-6) == (t == last)
    if setup != "visual" and name == "BCO":
        trained = getattr(aime_gym, name)(model, data, data, body_updates=2, batch_size=4, **options).learn(2)
        assert not trained.demonstrations.arrays["label"][:frames].any()
        assert trained.demonstrations.arrays["label"][frames].all()


@pytest.mark.parametrize("name", BASELINES)
def test_the_settings_of_the_original_clip_nothing(name, model, data):
    body = {} if name == "BC" else {"body_data": [data], "body_updates": 2}
    kind = getattr(aime_gym, name)
    agent = kind.original(model, data, batch_size=8, **body)
    assert (agent.grad_clip, agent.lr, agent.held_out) == (np.inf, 1e-3, 0.3)
    assert name == "BC" or agent.body_batch_size == 50
    moved = []
    for learner in (agent, kind(model, data, batch_size=8, grad_clip=1e-13, **body)):
        before = learner.module["policy"].net[0].weight.detach().clone()
        learner.learn(1)
        moved.append((learner.module["policy"].net[0].weight.detach() - before).abs().max())
    assert moved[0] > 1e-4 > 1e-6 > moved[1]


def test_the_body_is_learned_from_batches_of_their_own_size_at_a_rate_that_falls(model, data):
    sizes, steps = set(), []

    class Watched(aime_gym.BCO):
        def _inverse_loss(self, network, batch):
            sizes.add(batch["pre_action"].shape[1])
            steps.append(network.net[0].weight.detach().clone())
            return super()._inverse_loss(network, batch)

    Watched(model, data, data, body_updates=40, body_batch_size=7, batch_size=4).learn(2)
    assert sizes == {7, 2000}  # the latter are held out
    moved = [float((after - before).abs().max()) for before, after in pairwise(steps) if not torch.equal(after, before)]
    assert moved[-1] < 0.1 * max(moved)


def test_only_bc_needs_the_actions(model, data, tmp_path):
    Mix((data,), tmp_path / "seen", observations_only=True).run()
    for name in ("BCO", "IIDM"):
        body = {"body_data": [data], "body_updates": 20}
        getattr(aime_gym, name)(model, tmp_path / "seen", **body).learn(2)
    with pytest.raises(AimeGymError, match="lack"):
        aime_gym.BC(model, tmp_path / "seen").learn(2)
    with pytest.raises(AimeGymError, match="pass body_data="):
        aime_gym.BCO(model, tmp_path / "seen").learn(2)


def test_a_call_that_was_wrong_can_be_put_right(model, data, tmp_path):
    options = {"batch_size": 4, "held_out": 0.25}
    with pytest.raises(AimeGymError, match="pass body_data="):
        aime_gym.BCO(model, data, **options).learn(2, folder=tmp_path)
    agent = aime_gym.BCO(model, data, str(data), body_updates=3, **options)
    agent.learn(2, [ProgressBar("x"), EarlyStopping(5)], folder=tmp_path)
    aime_gym.BCO(model, data, data, body_updates=3, **options).learn(2, folder=tmp_path)  # it is complete


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"lr": -1.0},
        {"batch_size": 0},
        {"horizon": 0},
        {"grad_clip": 0},
        {"held_out": 1},
        {"held_out": -0.1},
        {"at_start": 1.5},
    ],
)
def test_numbers_that_cannot_be_are_refused(model, data, wrong):
    with pytest.raises(AimeGymError, match=next(iter(wrong))):
        aime_gym.AIME(model, data, **wrong)


def test_a_folder_is_of_one_run(model, data, tmp_path):
    def learn(name, updates=3, lr=1e-3, **options):
        getattr(aime_gym, name)(model, data, batch_size=8, lr=lr, **options).learn(updates, folder=tmp_path)

    learn("BC")
    learn("BC")
    body = {"body_data": [data], "body_updates": 2}
    for other, told in (
        (lambda: learn("IIDM", **body), "algo: 'bc' there, 'iidm' now"),
        (lambda: learn("BC", lr=1e-2), "lr: 0.001 there, 0.01 now"),
        (lambda: learn("BC", updates=4), "updates: 3 there, 4 now"),
    ):
        with pytest.raises(AimeGymError, match=told):
            other()


@pytest.mark.parametrize("name", ["BCO", "IIDM"])
def test_images_that_a_model_of_states_does_not_see_change_no_run(name, model, data, tmp_path):
    body = shutil.copytree(data, tmp_path / "body")

    def learn():
        agent = getattr(aime_gym, name)(model, data, body_data=[body], body_updates=2, batch_size=8)
        agent.learn(1, folder=tmp_path / "run")

    learn()
    trajectory = load_trajectory(body / "0.npz")
    image = np.zeros((len(trajectory["pre_action"]), 64, 64, 3), np.uint8)
    save_trajectory(body, 0, {**trajectory, "image": image})
    learn()
    save_trajectory(body, 0, {**trajectory, "height": trajectory["height"] + 1})
    with pytest.raises(AimeGymError, match=f"content of {body}: "):
        learn()


@pytest.mark.parametrize("name", ["BCO", "IIDM"])
def test_a_stop_while_the_body_is_learned_resumes_there(name, model, data, tmp_path, monkeypatch):
    def learn(folder=None):
        agent = getattr(aime_gym, name)(model, data, body_data=[data], body_updates=20, batch_size=8)
        return agent.learn(3, ProgressBar("Imitating", MONITOR), folder).module.state_dict()

    shown: list[tuple[str, int]] = []
    start = ProgressBar._on_training_start
    monkeypatch.setattr(
        ProgressBar,
        "_on_training_start",
        lambda self: (shown.append((self.title, self.trainer.update)), start(self)),
    )
    update = Trainer._update

    def interrupted(trainer):
        update(trainer)
        if trainer.update == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path)
    resumed = learn(tmp_path)
    assert shown == [("Learning what actions do", 0), ("Learning what actions do", 7), ("Imitating", 0)]
    for key, weight in learn().items():
        assert torch.equal(weight, resumed[key])


def test_demonstrations_too_short_for_a_window_are_left_out(model, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    short = {key: value[:4] for key, value in load_trajectory(data / "0.npz").items()}
    save_trajectory(folder, 4, short)
    agent = aime_gym.BCO(model, folder, body_data=[data], body_updates=2, stack=5).learn(2)
    labels = agent.demonstrations.arrays["label"]
    assert labels[:-4].any()
    assert not labels[-4:].any()
