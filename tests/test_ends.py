"""What ends pay: an end has a reward of its own where the data show one, and dreams pay it when they end."""

from __future__ import annotations

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aime_gym
from aime_gym.data import from_arrays
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.envs.dream import rollout
from aime_gym.envs.dream_vector import DreamVectorEnv
from aime_gym.files import DIGESTS
from aime_gym.flags import HeadsOptions
from aime_gym.training.fit_heads import _otherwise_paid, fit_heads, with_rewards
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model
from aime_gym.world_model.heads import Heads, paid
from tests.test_padding import BODY, OPTIONS, short_episodes, tiny_model

TINY = {
    **{"memory_dim": 16, "stochastic_dim": 4, "hidden_size": 16, "encoder_size": 16, "decoder_size": 16},
    **{"batch_size": 8, "horizon": 10, "evaluation_windows": 4, "held_out": 0.2, "tensorboard": False, "threads": 1},
}
HEADS = HeadsOptions(updates=120, batch_size=8, hidden_size=16, ensemble_hidden_size=8, ensemble=2, lr=1e-2)
SLOTS = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A point that its action moves: beyond 1 an episode ends and pays 10, beyond -1 it ends and takes 10."""
    rng, places, pushes, paid = np.random.default_rng(0), [], [], []
    for _ in range(60):
        place, actions = [rng.uniform(-0.5, 0.5)], []
        while abs(place[-1]) <= 1 and len(actions) < 40:
            actions.append(rng.uniform(-1, 1))
            place.append(place[-1] + 0.3 * actions[-1])
        places.append(np.array(place)[:, None])
        pushes.append(np.array(actions)[:, None])
        paid.append(10 * np.trunc(np.clip(place[1:], -1.5, 1.5)))
    over = [bool(abs(place[-1]) > 1) for place in places]
    spaces = {"action_space": gym.spaces.Box(-1, 1, (1,))}
    return from_arrays(places, pushes, paid, over, out=tmp_path_factory.mktemp("ends") / "data", **spaces)


@pytest.fixture(scope="module")
def folder(data):
    out = data.parent / "model"
    aime_gym.Train((data,), out=out, updates=200, lr=5e-3, heads=HEADS, **TINY).run()
    return out


@pytest.fixture
def model(folder):
    return load_pretrained_model(folder)


def pushed(folder, push: float) -> tuple[np.ndarray, np.ndarray]:
    """What ending steps and others pay in dreams in which the point is always pushed."""
    dreams = gym.make_vec("AimeDream-v0", num_envs=SLOTS, model=str(folder), autoreset_mode="SameStep")
    dreams.reset(seed=0)
    ends, others = [], []
    for _ in range(12):
        _, rewards, terminations, _, _ = dreams.step(np.full((SLOTS, 1), push, np.float32))
        ends += rewards[terminations].tolist()
        others += rewards[~terminations].tolist()
    return np.array(ends), np.array(others)


@pytest.mark.parametrize(("push", "pays"), [(1.0, 10), (-1.0, -10)])
def test_a_dream_that_ends_pays_what_that_end_pays(folder, push, pays):
    assert load_pretrained_model(folder).heads.config["pays_ends"]
    ends, others = pushed(folder, push)
    assert len(ends) > 10
    assert np.abs(ends - pays).mean() < 1
    assert np.abs(others).mean() < 0.5


def step_once(model, push: float = 1.0, steps: int = 1, **options):
    """A dream of the point that is pushed: latents after each step, rewards and terminations, [T, N, ...]."""
    dreams = aime_gym.TensorDream(model, num_envs=SLOTS, autoreset_mode="Disabled", **options)
    state, came = dreams.reset(0), []
    with torch.no_grad():
        for _ in range(steps):
            state, _, rewards, terminations, _ = dreams.step(state, torch.full((SLOTS, 1), push))
            came.append((state.latents, rewards, terminations))
    return [torch.stack(each) for each in zip(*came, strict=True)]


def parts_of(model, latents):
    """What the two heads say, each by itself: of a step that ends and of one that does not."""
    heads = model.heads
    end = heads.ends["own"](latents)[..., 0] * heads.end_std + heads.end_mean
    step = heads.rewards["own"](latents)[..., 0] * heads.reward_std + heads.reward_mean
    return end.clamp(*heads.reward_limits), step.clamp(*heads.reward_limits)


def test_an_end_is_paid_by_its_own_head_and_nothing_else_is(model):
    latents, rewards, terminations = step_once(model, steps=6)
    assert 0 < terminations.sum() < terminations.numel()
    end, step = parts_of(model, latents)
    torch.testing.assert_close(rewards, torch.where(terminations, end, step), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rewards, model.heads.reward(latents, "own"), rtol=1e-4, atol=1e-4)


def test_a_function_may_end_episodes_where_the_world_does_not(model):
    """What the world pays at its own ends is paid where the head believes in one, too, as in the real env."""
    options = {"termination_fn": lambda before, action, after: after[:, 0].abs() > 0.5, "obs_type": "latent"}
    latents, rewards, terminations = step_once(model, steps=4, **options)
    over = terminations & (model.heads.continuation(latents) < 0.5)
    assert 0 < over.sum() < terminations.sum() < terminations.numel()
    end, step = parts_of(model, latents)
    torch.testing.assert_close(rewards, torch.where(over, end, step), rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_dreamt_again(model, tmp_path):
    save_model(model, tmp_path)
    (tmp_path / "starts.npz").write_bytes((model.folder / "starts.npz").read_bytes())
    for one, other in zip(step_once(model, steps=5), step_once(load_pretrained_model(tmp_path), steps=5), strict=True):
        assert torch.equal(one, other)


def test_models_of_before_pay_by_the_mean_as_they_did(model, tmp_path):
    """Their files say nothing of ends, and hold none."""
    heads = model.heads
    model.heads = Heads(**{**heads.config, "pays_ends": False})
    model.heads.load_state_dict(heads.state_dict(), strict=False)
    save_model(model, tmp_path)
    (tmp_path / "starts.npz").write_bytes((model.folder / "starts.npz").read_bytes())
    path = tmp_path / "heads.safetensors"
    weights, config = load_file(path), {**model.heads.config}
    assert not [name for name in weights if name.startswith(("ends.", "end_"))]
    del config["pays_ends"]
    (tmp_path / DIGESTS).unlink()
    save_file(weights, path, {"config": json.dumps(config)})
    old = load_pretrained_model(tmp_path)
    latents, rewards, terminations = step_once(old, steps=5)
    assert terminations.any()
    raw = old.heads.rewards["own"](latents)[..., 0] * old.heads.reward_std + old.heads.reward_mean
    torch.testing.assert_close(rewards, raw.clamp(*old.heads.reward_limits), rtol=1e-4, atol=1e-4)


def test_the_gradient_is_that_of_the_expectation(model):
    """An agent must be told that an end comes nearer, before the dream decides that it has come."""
    rewards, ends, logits = torch.zeros(3), torch.full((3,), -10.0), torch.tensor([-2.0, 0.5, 2.0])
    (asked := logits.clone()).requires_grad_()
    told = paid(rewards, ends, asked)
    assert told.tolist() == [0, -10, -10]
    told.sum().backward()
    torch.testing.assert_close(asked.grad, -10 * torch.sigmoid(logits) * torch.sigmoid(-logits))


def test_a_window_pays_what_steps_do_and_leads_to_the_end_that_pays(model):
    one, other = (DreamVectorEnv(model=model, num_envs=SLOTS) for _ in range(2))
    for each in (one, other):
        each.reset(seed=0)
    push = torch.full((1,), 0.8, requires_grad=True)
    window = rollout(one, lambda shown: push.expand(len(shown), 1), 4)
    goes_on = np.ones(SLOTS, bool)
    for t in range(4):
        _, rewards, terminations, _, _ = other.step(np.full((SLOTS, 1), 0.8, np.float32))
        np.testing.assert_allclose(window.rewards[t].numpy(force=True)[goes_on], rewards[goes_on], atol=1e-3)
        goes_on &= ~terminations
    assert 0 < goes_on.sum() < SLOTS
    (window.alive * window.rewards).mean().backward()
    assert push.grad.isfinite()
    assert push.grad > 0


def test_shac_learns_which_end_to_go_to(folder):
    envs = aime_gym.make_sb3_env("AimeDream-v0", n_envs=SLOTS, model=str(folder), seed=0, max_episode_steps=20)
    agent = aime_gym.SHAC("MlpPolicy", envs, seed=0, n_steps=8).learn(20_000)
    assert all(parameter.isfinite().all() for parameter in agent.policy.parameters())
    pushes = agent.predict(np.linspace(-0.5, 0.5, 11, dtype=np.float32)[:, None], deterministic=True)[0]
    assert (pushes > 0.3).all()


def episode(*rewards: float, terminates: bool = True) -> dict[str, np.ndarray]:
    """A trajectory with these rewards; row 0 is the reset, and has none."""
    over = np.arange(len(rewards) + 1) == (len(rewards) if terminates else -1)
    return {"reward": np.array([0, *rewards], np.float32)[:, None], "is_terminal": over}


@pytest.mark.parametrize(
    ("episodes", "found"),
    [
        ([episode(1, 1, 1, 1), episode(1, 1, 1)], []),  # CartPole
        ([episode(1, 1, 1, 0), episode(1, 1, 0), episode(1, 1, terminates=False)], [0, 0]),  # InvertedPendulum
        ([episode(0, 0, 0, 0)] * 9 + [episode(0, 0, 1)], [0] * 9 + [1]),  # a goal that is met once
        ([episode(0.3, -0.2, 0.5, 0.1), episode(0.2, 0.4, -0.1)], []),
        ([episode(0.3, -0.2, 0.5, -100), episode(0.2, 0.4, 100)], [-100, 100]),
        ([episode(7), episode(7)], []),  # nothing but ends
        ([episode(0.0, 1.0, terminates=False)], []),
    ],
)
def test_an_end_has_a_reward_of_its_own_where_the_data_show_one(episodes, found):
    assert _otherwise_paid(episodes, ["reward"])[:, 0].tolist() == found


def ending(pays: float) -> TrajectoryDataset:
    """Short episodes of 5 a step whose last step pays something else."""
    dataset = short_episodes()
    dataset.arrays["reward"][dataset.arrays["is_terminal"]] = pays
    return with_rewards(dataset, BODY, ("own",))


def test_heads_go_on_from_others_with_and_without_ends():
    world, still = tiny_model(), dataclasses.replace(OPTIONS, updates=1, lr=0.0)
    features = torch.randn(6, world.config.feature_dim)
    without = fit_heads(world, ending(5), still, callbacks=[])
    assert not without.config["pays_ends"]
    grown = fit_heads(world, ending(-100), still, callbacks=[], initial=without)
    assert grown.end_mean.tolist() == [-100]
    before = grown.ends["own"](features) * grown.end_std + grown.end_mean
    again = fit_heads(world, ending(-50), still, callbacks=[], initial=grown)
    assert again.end_mean.tolist() == [-50]
    torch.testing.assert_close(again.ends["own"](features) * again.end_std + again.end_mean, before)
    assert not fit_heads(world, ending(5), still, callbacks=[], initial=grown).config["pays_ends"]
