"""AIME that goes on learning where it acts: SB3's protocol, any env, and learning that changes what it should."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import aime_gym
from aime_gym import AimeGymError, OnlineAIME
from aime_gym.agents.aime import Imagined, imagine, judge, policy_loss, value_loss
from aime_gym.commands.imitate import Imitate
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model, with_reward
from tests.random_data import record, record_random
from tests.random_models import random_model
from tests.tiny_model import make_tiny_model

SMALL: dict[str, Any] = {
    **{"imitation_updates": 2, "updates": 2, "likelihood_updates": 2, "imagined_starts": 8, "imagined_steps": 3},
    **{"batch_size": 4, "horizon": 5, "hidden_size": 8, "discriminator_size": 16},
}
V2 = Path(__file__).parent / "parity_v2" / "cheetah-lpomdp-rssmo"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return record_random(tmp_path_factory.mktemp("data"), 3, 12)


@pytest.fixture
def env():
    with gym.make("AimeReal-Walker-v0", max_episode_steps=12) as made:
        yield made


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name.split(".")[0] for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("reward", ["ail", "viper"])
def test_it_acts_learns_saves_and_goes_on(reward, data, env, tmp_path):
    given = random_model(heads=False)
    untouched = weights(given)
    agent = OnlineAIME(given, data, env, reward=reward, body_data=data, **SMALL)
    model, parts = weights(agent.model), weights(agent.module)
    seen: list[int] = []
    assert agent.learn(30, lambda names, _: seen.append(names["self"].num_timesteps) or True) is agent
    assert seen == list(range(1, 31))
    assert agent.num_timesteps == 30
    assert len(agent.returns) == 3  # 12, 12 and the 6 that were left
    assert not changed(untouched, given)
    assert {"decoders", "encoders", "cell"} <= changed(model, agent.model)
    assert changed(parts, agent.module) == {
        "policy",
        "value",
        "target",
        "average",
        *(["discriminator"] if reward == "ail" else []),
    }
    assert f"{reward}_reward" in agent.model.config.outputs

    agent.save(tmp_path / "agent")
    few = {key: SMALL[key] for key in ("updates", "horizon", "likelihood_updates")}
    again = OnlineAIME.load(tmp_path / "agent", env=env, demonstrations=data, **few)
    shown, _ = env.reset(seed=3)
    np.testing.assert_allclose(agent.predict(shown)[0], again.predict(shown)[0], atol=1e-6)
    before = weights(again.module["policy"])  # type: ignore[index]
    again.learn(5).learn(5, reset_num_timesteps=False)
    assert again.num_timesteps == 10
    assert changed(before, again.module["policy"])  # type: ignore[index]


def test_callbacks_and_evaluation_of_sb3_take_it(data, env, tmp_path):
    class Stops(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 7

    agent = OnlineAIME(random_model(heads=False), data, env, **SMALL)
    eval_env = Monitor(gym.make("AimeReal-Walker-v0", max_episode_steps=4))
    judged = EvalCallback(eval_env, eval_freq=3, n_eval_episodes=1, verbose=0, log_path=str(tmp_path))
    agent.learn(50, [Stops(), judged])
    assert agent.num_timesteps == 7
    assert judged.evaluations_timesteps == [3, 6]
    mean, _ = evaluate_policy(agent, eval_env, 1, warn=False)  # type: ignore[arg-type]
    assert np.isfinite(mean)
    eval_env.close()


def test_a_seed_gives_one_agent(data, env):
    policies = [
        weights(OnlineAIME(random_model(heads=False), data, env, seed=seed, **SMALL).learn(12).module)
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
    assert any(not torch.equal(policies[0][name], policies[2][name]) for name in policies[0])


def test_it_learns_in_a_foreign_env(tmp_path):
    model = make_tiny_model(tmp_path / "model", "Pendulum-v1")
    world = gym.make("AimeReal-v0", embodiment="Pendulum-v1", episode_steps=12)
    data = record(world, tmp_path / "data", 2, 12, embodiment="Pendulum-v1")
    agent = OnlineAIME(str(model), data, world, **SMALL).learn(14)
    assert len(agent.returns) == 2
    world.close()


def test_a_model_of_the_successor_learns_on(tmp_path):
    """With an end that it decodes, probes that it loses, and the real env's frames."""
    config = load_pretrained_model(V2).config
    world = gym.make("AimeReal-Cheetah-v0", max_episode_steps=8, setup="lpomdp")
    data = record(world, tmp_path / "data", 2, 8, embodiment="cheetah")
    agent = OnlineAIME(V2, data, world, **SMALL).learn(9)
    assert config.reward == "reward"
    assert agent.model.config.outputs == ("position", "ail_reward", "is_terminal")
    save_model(agent.model, tmp_path / "model")
    assert load_pretrained_model(tmp_path / "model").config == agent.model.config
    aime_gym.AIME(V2, data, batch_size=2, horizon=4).learn(2)
    world.close()


def test_the_settings_of_the_original():
    agent = OnlineAIME.original(random_model(heads=False))
    assert (agent.batch_size, agent.horizon, agent.lr, agent.imagined_starts) == (50, 50, 3e-4, 2500)
    assert (agent.imagined_steps, agent.demonstrated_starts, agent.noise, agent.sight) == (15, 0, 0.0, "embeddings")
    assert agent.average == 1
    network = agent.module["discriminator"].net[0]  # type: ignore[index]
    assert network.out_features == 1024


def test_moves_tell_what_single_frames_do_not(data):
    """A window and the same one played backward show the same frames, and opposite moves."""
    agent = OnlineAIME(random_model(heads=False), data, **SMALL)
    shown = agent.demonstrations
    assert shown is not None
    window = {name: torch.as_tensor(shown[0][name][:6, None]) for name in agent.model.observed}
    forward = agent._sights(window)
    backward = agent._sights({name: value.flip(0) for name, value in window.items()}).flip(0)
    frames = forward.shape[-1] // 2
    torch.testing.assert_close(forward[..., :frames], backward[..., :frames])
    units: Any = agent.module["units"]  # type: ignore[index]
    moves, turned = units.inverse(forward)[1:, 0, frames:], units.inverse(backward)[:-1, 0, frames:]
    torch.testing.assert_close(moves, -turned, rtol=1e-4, atol=1e-5)
    rows = torch.cat(
        [agent._sights({n: torch.as_tensor(shown[i][n][:, None]) for n in window})[1:, 0] for i in range(3)]
    )
    assert rows.mean(0).abs().max() < 1e-3
    assert rows.std(0).max() < 1.01


def test_noise_reaches_the_env_and_the_estimate_of_the_state(data, env):
    quiet, loud = (OnlineAIME(random_model(heads=False), data, env, noise=noise, **SMALL) for noise in (0.0, 0.5))
    first, second = (agent.learn(12)._replay[0]["pre_action"] for agent in (quiet, loud))
    assert np.abs(first[1] - second[1]).max() > 0.01
    assert np.abs(second).max() <= 1


def test_its_mode_is_that_of_the_policys_average(data, env):
    """A hand-written average over the updates; what explores is the policy of now."""
    agent = OnlineAIME(random_model(heads=False), data, env, average=0.25, noise=0.0, **SMALL)
    policy = agent.imitate(2).module["policy"]  # type: ignore[index]
    followed, plain = weights(policy), agent.update

    def update(*batches: Any) -> dict[str, torch.Tensor]:
        told = plain(*batches)
        for name, weight in policy.state_dict().items():
            followed[name] += 0.25 * (weight - followed[name])
        return told

    shown, _ = env.reset(seed=3)
    agent.update = update  # type: ignore[method-assign]
    agent.learn(24)
    torch.testing.assert_close(agent.module["average"].state_dict(), followed)  # type: ignore[index]
    mode, _ = agent.predict(shown)
    now = aime_gym.AIME(agent.model, **{key: SMALL[key] for key in ("batch_size", "horizon", "hidden_size")})
    now.module["policy"].load_state_dict(followed)  # type: ignore[index]
    np.testing.assert_allclose(now.predict(shown)[0], mode, atol=1e-6)


def test_futures_also_begin_in_demonstrations(data):
    agent = OnlineAIME(random_model(heads=False), data, **SMALL)
    model, policy, target = agent.model, *(agent.module[name] for name in ("policy", "target"))  # type: ignore[index]
    shown = agent._batches(agent.demonstrations, 4, (0,)).sample()  # type: ignore[arg-type]
    _, imagined, _, _ = policy_loss(model, policy, target, shown, model.initial_state(2), 3, 1.0, demonstrated=5)
    assert imagined.features.shape[:2] == (4, 7)
    assert not imagined.features[0, :2].any()
    assert imagined.features[0, 2:].any(-1).all()


def test_a_model_keeps_all_it_knew_beside_the_reward():
    model = random_model(setup="lpomdp", heads=False)
    grown = with_reward(model, "ail_reward")
    own = grown.state_dict()
    lost = {name for name, value in model.state_dict().items() if name not in own or not torch.equal(value, own[name])}
    assert lost
    assert all(name.startswith(("probes.", "normaliser.velocity")) for name in lost)
    assert {name.split(".")[1] for name in own if name not in model.state_dict()} == {"ail_reward"}


def test_returns_are_those_of_a_loop():
    """A hand-written loop over one future: discounts stop at ends, and the last value stands for what follows."""
    steps, generator = 4, torch.Generator().manual_seed(0)
    rewards, ends = (torch.rand(steps + 1, 1, generator=generator) for _ in range(2))
    values = torch.rand(steps + 1, 1, 1, generator=generator)
    nothing = torch.zeros(steps, 1, 2)
    imagined = Imagined(values, nothing, nothing, nothing, rewards, ends)
    judged = judge(imagined, torch.nn.Identity(), 0.9, 0.8)
    follows, expected = float(values[-1]), []
    for t in reversed(range(steps)):
        follows = float(rewards[t] + 0.9 * (1 - ends[t]) * (0.2 * values[t + 1, 0] + 0.8 * follows))
        expected.insert(0, follows)
    np.testing.assert_allclose(judged.returns[:, 0], expected, rtol=1e-5)
    weights = np.cumprod([1.0, *(0.9 * (1 - ends[: steps - 1, 0].numpy()))])
    np.testing.assert_allclose(judged.weights[:, 0], weights, rtol=1e-5)
    errors = (judged.returns - values[:-1, :, 0]).square()
    loss = value_loss(imagined, judged, torch.nn.Identity())
    torch.testing.assert_close(loss, 0.5 * (judged.weights * errors).mean())


def test_what_is_gained_reaches_the_policy_through_the_dynamics():
    model = with_reward(random_model(heads=False), "ail_reward")
    agent = OnlineAIME(random_model(heads=False), **SMALL)
    policy = agent.module["policy"]  # type: ignore[index]
    imagined = imagine(model, policy, model.initial_state(3), 4)
    gradients = torch.autograd.grad(imagined.rewards[-1].sum(), [*policy.parameters()])
    assert all(gradient.any() for gradient in gradients)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another reward": ({"reward": "ot"}, "reward"),
    "another sight": ({"sight": "frames"}, "sight"),
    "noise below 0": ({"noise": -0.1}, "noise"),
    "an average that never moves": ({"average": 0.0}, "average"),
    "one imagined step": ({"imagined_steps": 1}, "imagined_steps"),
    "no imagined starts": ({"imagined_starts": 0}, "imagined_starts"),
    "a likelihood model that acts": ({"likelihood_model": random_model(heads=False), "reward": "viper"}, "actions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name):
    options, told = REFUSED[name]
    with pytest.raises(AimeGymError, match=told):
        OnlineAIME(random_model(heads=False), **options)


def test_it_needs_an_env_that_fits(data, env):
    agent = OnlineAIME(random_model(heads=False), data, **SMALL)
    with pytest.raises(AimeGymError, match="env"):
        agent.learn(3)
    with gym.make("Pendulum-v1") as other, pytest.raises(AimeGymError, match="actions"):
        agent.set_env(other)
    with pytest.raises(AimeGymError, match="demonstrations"):
        OnlineAIME(random_model(heads=False), env=env).learn(3)


@pytest.mark.slow
def test_the_command_learns_in_the_real_env(data, tmp_path):
    save_model(copy.deepcopy(random_model(heads=False)), tmp_path / "model")
    Imitate(
        str(tmp_path / "model"),
        str(data),
        "online",
        steps=30,
        updates=2,
        batch_size=2,
        horizon=4,
        episodes=1,
        video_steps=0,
        task="walk",
        out=tmp_path / "out",
    ).run()
    assert (tmp_path / "out" / "score.json").exists()
    assert (tmp_path / "out" / "run" / "progress.csv").exists()
    assert OnlineAIME.load(tmp_path / "out" / "agent").predict(np.zeros(24, np.float32))[0].shape == (6,)
