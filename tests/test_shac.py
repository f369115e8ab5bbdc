"""Dreams with a gradient, and the SB3 agent that learns from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

import aime_gym
from aime_gym.agents.plain import make_agent, observation_statistics
from aime_gym.agents.sb3 import load_sb3_agent
from aime_gym.commands.collect import Collect
from aime_gym.data.trajectories import read_metadata
from aime_gym.envs.dream import DreamRollout, rollout
from aime_gym.envs.dream_vector import DreamVectorEnv
from aime_gym.world_model.heads import Heads
from tests.random_models import random_model, write_random_model

STEPS = 5


@pytest.fixture(scope="module", params=["rssmo", "rssm"])
def model(request, tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny", cell=request.param)


def linear_policy(weight):
    return lambda observations: torch.tanh(observations @ weight)


@pytest.fixture
def weight():
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(0)).mul(0.1).requires_grad_()


@pytest.mark.parametrize("options", [{}, {"doubt_penalty": 0.1}, {"reward": "disagreement", "doubt": "ensemble"}])
def test_a_window_is_what_steps_are(model, weight, options):
    envs = [DreamVectorEnv("walker", 3, model=model, max_episode_steps=50, **options) for _ in range(2)]
    observations = [each.reset(seed=4)[0] for each in envs][1]
    for _ in range(2):  # the second window goes on where the first ended
        window = rollout(envs[0], linear_policy(weight), STEPS)
        for t in range(STEPS):
            np.testing.assert_allclose(window.observations[t].detach(), observations, atol=1e-4)
            actions = linear_policy(weight)(torch.as_tensor(observations)).detach().numpy()
            observations, rewards, *_ = envs[1].step(actions)
            np.testing.assert_allclose(window.rewards[t].detach(), rewards, atol=1e-4)
        np.testing.assert_allclose(window.observations[-1].detach(), observations, atol=1e-4)
    stepped = [each.step(np.zeros((3, 6), np.float32))[0] for each in envs]
    np.testing.assert_allclose(*stepped, atol=1e-4)


def test_episodes_that_would_end_in_the_window_begin_anew(model, weight):
    envs = DreamVectorEnv("walker", 2, model=model, max_episode_steps=2 * STEPS - 1)
    envs.reset(seed=0)
    rollout(envs, linear_policy(weight), STEPS)
    window = rollout(envs, linear_policy(weight), STEPS)
    began = DreamVectorEnv("walker", 12, model=model)
    first, _ = began.reset(options={"start": np.arange(12)}, seed=0)
    for row in window.observations[0].detach().numpy():
        assert np.abs(first - row).max(1).min() < 1e-4
    with pytest.raises(aime_gym.AimeGymError, match="do not fit into episodes"):
        rollout(envs, linear_policy(weight), 2 * STEPS)


def test_a_dream_is_cut_where_it_is_doubted(model, weight):
    options = {"model": model, "max_episode_steps": None, "doubt": True}
    free = DreamVectorEnv("walker", 3, **options)
    observations, _ = free.reset(seed=4)
    doubts = []
    for _ in range(STEPS):
        actions = linear_policy(weight)(torch.as_tensor(observations)).detach().numpy()
        observations, _, _, _, infos = free.step(actions)
        doubts.append(infos["doubt"])
    limit = float(np.sort(np.max(doubts, 0))[1]) * 0.999  # two of three slots are doubted more
    envs = DreamVectorEnv("walker", 3, max_doubt=limit, **options)
    envs.reset(seed=4)
    window = rollout(envs, linear_policy(weight), STEPS)
    np.testing.assert_array_equal(window.cuts, np.array(doubts) > limit)
    ended = window.cuts.any(0)
    assert ended.sum() == 2
    following = rollout(envs, linear_policy(weight), STEPS).observations[0].detach()
    goes_on = (following == window.observations[-1].detach()).all(1)
    assert torch.equal(goes_on, ~ended)


def test_returns_of_shac_end_at_a_cut(tmp_path):
    model = write_random_model(tmp_path)
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=2, task="walk", model=model, seed=0)
    agent = aime_gym.SHAC("MlpPolicy", envs, seed=0, gamma=0.9, gae_lambda=0.7)
    observations, rewards = torch.randn(3, 2, 24), torch.rand(3, 2)
    cuts = torch.tensor([[False, True], [False, False], [False, False]])
    returns = agent._lambda_returns(observations, rewards, torch.ones(3, 2), cuts)
    values = agent.critic_target.predict_values(observations.flatten(0, 1)).view(3, 2)
    last = rewards[2] + 0.9 * values[2]
    middle = rewards[1] + 0.9 * (0.3 * values[1] + 0.7 * last)
    first = rewards[0] + 0.9 * torch.where(cuts[0], values[0], 0.3 * values[0] + 0.7 * middle)
    torch.testing.assert_close(returns, torch.stack([first, middle, last]))


def test_actor_critic_and_entropy_count_a_step_as_likely_as_it_is_reached(tmp_path, monkeypatch):
    model = write_random_model(tmp_path)
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=2, task="walk", model=model, seed=0)
    agent = aime_gym.SHAC("MlpPolicy", envs, seed=0, critic_epochs=1, n_steps=3).learn(6)
    observations, rewards, entropies = torch.randn(4, 2, 24), torch.rand(3, 2), torch.rand(3, 2)
    continuations = torch.tensor([[0.1, 1.0], [0.5, 1.0], [1.0, 0.2]])
    cuts = torch.tensor([[False, False], [False, True], [False, False]])
    agent._window = DreamRollout(observations, rewards, continuations, cuts, np.zeros(2, bool))
    monkeypatch.setattr(agent, "_entropies", lambda: entropies)
    losses = []
    monkeypatch.setattr(agent, "_step", lambda loss: losses.append(loss.item()) or 0.0)
    values = agent.policy.predict_values(observations[:-1].flatten(0, 1)).view(3, 2)
    returns = agent._lambda_returns(observations[1:], 0.01 * rewards, continuations, cuts)
    agent.train()
    alive = torch.tensor([[1, 1], [0.1, 1], [0.05, 0]])
    expected = -(alive * returns).mean() - agent.ent_coef * (alive * entropies).mean()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4)
    counted = (alive * (values - returns).square()).sum() / 5  # the sixth step is behind a cut
    assert losses[1] == pytest.approx(counted.item(), rel=1e-4)


def test_the_entropy_is_that_of_the_squashed_actions(tmp_path):
    model = write_random_model(tmp_path)
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=5, task="walk", model=model, seed=0)
    agent = aime_gym.SHAC("MlpPolicy", envs, seed=0, n_steps=3).learn(15)
    actions = torch.stack(agent._raw).detach().double().tanh()  # [H, N, A]
    torch.testing.assert_close(actions, torch.stack(agent._actions).detach().double(), rtol=0, atol=1e-6)
    spread = agent._uncertainties[0].detach().double()  # the window was dreamt with the policy of before
    torch.testing.assert_close(spread, torch.full_like(spread, 0.5 * np.log(2 * np.pi * np.e)), rtol=0, atol=1e-6)
    entropies = (spread + torch.log1p(-actions.square())).sum(-1)
    assert entropies.shape == (3, 5)
    torch.testing.assert_close(agent._entropies().detach().double(), entropies, rtol=1e-4, atol=1e-4)


def spoil(envs, slot):
    """Puts a slot where the model has no finite numbers."""
    state = envs.get_state()
    state["latents"][slot] = 1e38
    envs.set_state(state)


def test_a_slot_that_is_not_finite_leaves_the_gradient_of_the_others_alone(model, weight):
    gradients = []
    for spoilt in (False, True):
        envs = DreamVectorEnv("walker", 3, model=model)
        envs.reset(seed=1)
        if spoilt:
            spoil(envs, 1)
        window = rollout(envs, linear_policy(weight), STEPS)
        assert window.finite.tolist() == [True, not spoilt, True]
        assert window.finished.tolist() == [False, spoilt, False]
        kept = window.only(torch.tensor([True, False, True]))
        gradients.append(torch.autograd.grad(kept.rewards.sum() + kept.observations.sum(), weight)[0])
        assert rollout(envs, linear_policy(weight), STEPS).finite.all()  # it has begun anew
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_shac_learns_from_the_slots_that_are_finite_and_counts_the_others(tmp_path):
    model = write_random_model(tmp_path)
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=3, task="walk", model=model, seed=0)
    agent = aime_gym.SHAC("MlpPolicy", envs, seed=0, n_steps=3)
    before = [weight.clone() for weight in agent.policy.parameters()]

    class Spoil(BaseCallback):
        slots = (1,)

        def _on_rollout_start(self):
            for slot in self.slots:
                spoil(envs.envs, slot)

        def _on_step(self):
            assert np.isfinite(self.locals["rewards"]).all()
            return True

    with pytest.warns(UserWarning, match="1 of 3 dreams the model left the finite numbers") as told:
        agent.learn(18, callback=Spoil())
    assert [each.filename for each in told if "finite numbers" in str(each.message)] == [__file__]
    assert agent.logger.name_to_value["rollout/diverged"] == 2 or agent._diverged == 2
    after = list(agent.policy.parameters())
    assert all(weight.isfinite().all() for weight in after)
    assert sum(not torch.equal(*pair) for pair in zip(before, after, strict=True)) == len(before)
    assert all(np.isfinite(episode["r"]) for episode in agent.ep_info_buffer)
    Spoil.slots = (0, 1, 2)
    kept = [weight.clone() for weight in after]
    with pytest.warns(UserWarning, match="3 of 3 dreams"):
        agent.learn(9, callback=Spoil())
    assert all(torch.equal(*pair) for pair in zip(kept, agent.policy.parameters(), strict=True))


def test_what_shac_learns_does_not_depend_on_the_units_of_rewards(tmp_path):
    learned = []
    for unit in (1.0, 1e-4, 1e4):
        model = write_random_model(tmp_path / f"{unit:g}")
        config = {**model.heads.config, "reward_limits": (-unit, unit)}
        heads = Heads(**config)
        heads.load_state_dict(model.heads.state_dict())
        heads.reward_mean.fill_(0.1 * unit)
        heads.reward_std.fill_(0.2 * unit)
        model.heads = heads.requires_grad_(False)
        options = {"task": "walk", "model": model, "reward": "head"}
        envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=4, seed=0, **options)
        agent = aime_gym.SHAC("MlpPolicy", envs, seed=0).learn(64)
        learned.append(torch.cat([weight.detach().flatten() for weight in agent.policy.parameters()]))
    torch.testing.assert_close(learned[1], learned[0], atol=1e-4, rtol=1e-2)
    torch.testing.assert_close(learned[2], learned[0], atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("limit", [1e-9, 1e9])
def test_shac_learns_otherwise_if_doubtful_dreams_are_cut(tmp_path, limit):
    model = write_random_model(tmp_path)

    def learn(**options):
        envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=4, task="walk", model=model, seed=0, **options)
        agent = aime_gym.SHAC("MlpPolicy", envs, seed=0).learn(64)
        return torch.cat([weight.flatten() for weight in agent.policy.parameters()])

    assert torch.equal(learn(), learn(max_doubt=limit)) is (limit > 1)


def test_gradients_are_those_of_finite_differences(weight, tmp_path):
    model = write_random_model(tmp_path)
    model.heads.reward_mean.fill_(1.0)  # far from the limits, where the gradient of the clamp is 0
    envs = DreamVectorEnv("walker", 4, model=model, deterministic=False)
    envs.reset(seed=1)
    state = envs.get_state()

    def total(perturbed):
        envs.set_state(state)
        return rollout(envs, linear_policy(perturbed), STEPS).rewards.sum()

    (gradient,) = torch.autograd.grad(total(weight), weight)
    direction = gradient / gradient.norm()
    step = 1e-2
    slope = (total(weight.detach() + step * direction) - total(weight.detach() - step * direction)) / (2 * step)
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(slope, gradient.norm(), rtol=0.02, atol=1e-4)


def test_learns_acts_saves_and_loads(tmp_path):
    model = aime_gym.load_pretrained_model("walker-state")
    options = {"task": "stand", "start": "dataset", "max_episode_steps": 50, "model": model}
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=32, seed=0, **options)
    agent = make_agent("shac", envs, observation_statistics(envs), 0)
    before, _ = evaluate_policy(agent, envs, 32, warn=False)
    agent.learn(32 * 16 * 40)
    after, _ = evaluate_policy(agent, envs, 32, warn=False)
    assert agent.num_timesteps == 32 * 16 * 40
    assert after > before + 10
    agent.save(tmp_path / "agent.zip")
    loaded = load_sb3_agent(tmp_path / "agent.zip")
    assert isinstance(loaded, aime_gym.SHAC)
    world = aime_gym.make_sb3_env("AimeReal-Walker-v0", n_envs=1, task="stand", max_episode_steps=10)
    observation = world.reset()
    actions = [each.predict(observation, deterministic=True)[0] for each in (agent, loaded)]
    np.testing.assert_array_equal(*actions)
    assert np.abs(actions[0]).max() <= 1
    loaded.set_env(envs)
    loaded.learn(32 * 16, reset_num_timesteps=False)
    assert loaded.num_timesteps == 32 * 16 * 41


def test_callbacks_see_episodes_as_those_of_ppo_do(tmp_path):
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", 4, model=write_random_model(tmp_path), max_episode_steps=8)
    agent = aime_gym.SHAC("MlpPolicy", envs, n_steps=3, seed=0)
    rewards = []

    class Watch(StopTrainingOnMaxEpisodes):
        def _on_step(self):
            rewards.append(self.locals["rewards"])
            assert len(self.locals["infos"]) == len(self.locals["new_obs"]) == len(self.locals["actions"]) == 4
            return super()._on_step()

    agent.learn(640, callback=Watch(max_episodes=2))
    # windows of three steps fit twice into an episode of eight; all four slots end with the second and fourth window
    assert agent.num_timesteps == 4 * 12
    assert [episode["l"] for episode in agent.ep_info_buffer] == [6] * 8
    np.testing.assert_allclose([episode["r"] for episode in agent.ep_info_buffer][4:], sum(rewards[6:]), rtol=1e-5)


@pytest.mark.slow
def test_learns_on_latents_and_acts_in_the_real_env_through_them(tmp_path):
    model = aime_gym.load_pretrained_model("walker-state")
    options = {"task": "stand", "start": "dataset", "max_episode_steps": 32, "model": model, "obs_type": "latent"}
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=32, seed=1, **options)
    agent = make_agent("shac", envs, observation_statistics(envs), 1)
    before, _ = evaluate_policy(agent, envs, 32, warn=False)
    agent.learn(32 * 16 * 100)
    after, _ = evaluate_policy(agent, envs, 32, warn=False)
    assert after > before + 15
    agent.save(tmp_path / "agent.zip")
    comparison = aime_gym.compare(tmp_path / "agent.zip", task="stand", episodes=3, max_episode_steps=60)
    assert comparison.policies[0].real.mean == pytest.approx(comparison.policies[0].dream.mean, rel=0.35)
    Collect("walker", "stand", str(tmp_path / "agent.zip"), 1, model="walker-state", out=tmp_path / "data").run()
    assert read_metadata(tmp_path / "data")["model"] == "walker-state"
    with pytest.raises(aime_gym.AimeGymError, match="model"):
        Collect("walker", "stand", str(tmp_path / "agent.zip"), 1, out=tmp_path / "blind").run()


def test_refuses_the_real_world():
    world = aime_gym.make_sb3_env("AimeReal-Walker-v0", n_envs=1)
    with pytest.raises(aime_gym.AimeGymError, match="which only a dream has"):
        aime_gym.SHAC("MlpPolicy", world)


def test_refuses_wrappers_that_it_would_leave_out(tmp_path):
    model = write_random_model(tmp_path)
    envs = VecNormalize(aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=2, model=model))
    with pytest.raises(aime_gym.AimeGymError, match="without the VecNormalize around it"):
        aime_gym.SHAC("MlpPolicy", envs)


def test_a_reward_decoder_serves_as_heads_do(weight):
    model = random_model(heads=False, use_reward=True)
    envs = DreamVectorEnv("walker", 2, model=model)
    frames = {sensor.name: np.zeros((3, sensor.dim), np.float32) for sensor in envs.sensors}
    envs.reset(seed=0, options={"start": {"observations": frames, "actions": np.zeros((3, 6))}})
    assert rollout(envs, linear_policy(weight), STEPS).rewards.requires_grad
