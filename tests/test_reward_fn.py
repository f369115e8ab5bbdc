"""Rewards and terminations by functions of the user's, in every dream and in the world beside it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

import aime_gym
from aime_gym.envs.dream import rollout
from aime_gym.envs.start_bank import shared_bank
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model
from tests.random_models import random_model, write_random_model

HEIGHT = 14
"""Where the walker's height is among its sensors."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


def of_tensors(observation, action, next_observation):
    assert isinstance(observation, torch.Tensor)
    return next_observation[:, HEIGHT] + 2 * observation[:, 0] - 0.1 * action.square().sum(1)


def of_arrays(observation, action, next_observation):
    assert isinstance(next_observation, np.ndarray)
    return np.maximum(next_observation[:, HEIGHT], 0) + 2 * observation[:, 0] - 0.1 * np.square(action).sum(1)


def by_name(observation, action, next_observation):
    return next_observation["height"][:, 0] + 2 * observation["orientations"][:, 0] - 0.1 * (action**2).sum(1)


def expected(before, actions, after, floor=-np.inf):
    return np.maximum(after[:, HEIGHT], floor) + 2 * before[:, 0] - 0.1 * np.square(actions).sum(1)


@pytest.mark.parametrize(("function", "floor"), [(of_tensors, -np.inf), (of_arrays, 0.0)])
def test_a_function_of_tensors_or_arrays_pays_each_step(model, function, floor):
    dreams = gym.make_vec("AimeDream-Walker-v0", num_envs=3, model=model, reward_fn=function)
    before, _ = dreams.reset(seed=0)
    for _ in range(3):
        actions = dreams.action_space.sample()
        after, rewards, *_ = dreams.step(actions)
        np.testing.assert_allclose(rewards, expected(before, actions, after, floor), atol=1e-5)
        before = after


def test_it_sees_dicts_where_the_dream_shows_dicts(model):
    dream = gym.make("AimeDream-Walker-v0", model=model, obs_type="dict", reward_fn=by_name)
    before, _ = dream.reset(seed=0)
    after, reward, *_ = dream.step(np.full(6, 0.5, np.float32))
    assert reward == pytest.approx(after["height"][0] + 2 * before["orientations"][0] - 0.15, abs=1e-5)


@pytest.mark.parametrize(("setup", "obs_type"), [("mdp", "latent"), ("lpomdp", "state"), ("visual", "latent")])
def test_it_sees_all_sensors_that_the_model_decodes(tmp_path, setup, obs_type):
    partial = write_random_model(tmp_path, setup=setup)
    shown = []

    def function(observation, action, next_observation):
        shown.append((observation.shape[1], next_observation.shape[1]))
        return next_observation[:, HEIGHT]

    dream = aime_gym.TensorDream(partial, num_envs=2, obs_type=obs_type, reward_fn=function)
    state = dream.reset(seeds=0)
    state, _, rewards, *_ = dream.step(state, torch.zeros(2, 6))
    assert set(shown) == {(24, 24)}
    np.testing.assert_allclose(rewards, partial.decode(state.latents, ["height"])["height"][:, 0].detach(), atol=1e-4)


@pytest.mark.parametrize("obs_type", ["state", "dict"])
def test_it_may_change_what_it_is_given(model, obs_type):
    """Clipping in place is common: neither the dream, nor the caller's actions, nor the gradient may suffer."""

    def careless(observation, action, next_observation):
        parts = [next_observation["height"] if obs_type == "dict" else next_observation[:, HEIGHT : HEIGHT + 1], action]
        if isinstance(action, torch.Tensor):
            for part in parts:
                part.mul_(2)
        return parts[0][:, 0] + parts[1].sum(1)

    options = {"num_envs": 3, "deterministic": True, "obs_type": obs_type}
    dream, plain = (aime_gym.TensorDream(model, **options, **own) for own in ({"reward_fn": careless}, {}))
    actions = torch.full((3, 6), 0.2, requires_grad=True)
    _, shown, rewards, *_ = dream.step(dream.reset(seeds=0), actions)
    assert torch.equal(actions, torch.full((3, 6), 0.2))
    torch.testing.assert_close(shown, plain.step(plain.reset(seeds=0), actions)[1])
    torch.testing.assert_close(rewards, 2 * shown[:, HEIGHT] + 12 * 0.2)
    rewards.sum().backward()
    assert actions.grad is not None


def test_gradients_lead_through_it(model):
    dream = aime_gym.TensorDream(model, num_envs=3, reward_fn=of_tensors, deterministic=True)
    state, actions = dream.reset(seeds=0), torch.zeros(3, 6, requires_grad=True)
    *_, rewards, _, _ = dream.step(state, actions)
    (gradient,) = torch.autograd.grad(rewards.sum(), actions)
    with torch.no_grad():
        step = 1e-2 * torch.eye(6)[2].expand(3, 6)
        ends = [dream.step(state, step * sign)[2].sum() for sign in (1, -1)]
    assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float(gradient[:, 2].sum()), rel=0.05, abs=1e-4)


def test_agents_learn_of_it(model):
    def large(observation, action, next_observation):
        return 100 * of_tensors(observation, action, next_observation)

    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", 4, model=model, reward_fn=large, seed=0)
    agent = aime_gym.SHAC("MlpPolicy", envs, n_steps=4, seed=0)
    before = [weight.clone() for weight in agent.policy.parameters()]
    agent.learn(16)
    assert any(not torch.equal(one, other) for one, other in zip(before, agent.policy.parameters(), strict=True))
    assert envs.get_attr("reward_scale")[0] > 10  # that of the function, not that of the head, 1
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", 4, model=model, reward_fn=of_arrays, seed=0)
    PPO("MlpPolicy", envs, n_steps=4, batch_size=16, n_epochs=1, seed=0).learn(16)
    with pytest.warns(UserWarning, match=r"reward_fn has no gradient, .* write it with torch"):
        aime_gym.SHAC("MlpPolicy", envs, n_steps=4, seed=0).learn(16)


@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy"])
def test_shac_says_what_it_sees(model, policy):
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", 2, model=model, obs_type="dict", reward_fn=by_name)
    with pytest.raises(AimeGymError, match="obs_type='state'"):
        aime_gym.SHAC(policy, envs)


def test_a_reward_network_of_the_users_keeps_its_own_gradient(model):
    network = torch.nn.Linear(24, 1)
    rewards = {"reward_fn": lambda o, a, n: network(n)[:, 0]}
    aime_gym.SHAC("MlpPolicy", aime_gym.make_sb3_env("AimeDream-Walker-v0", 2, model=model, **rewards)).learn(8)
    assert network.weight.grad is None


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_what_a_function_is_bound_to_is_never_copied(model, make):
    class Robot:
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a robot")

        def height(self, observation, action, next_observation):
            return next_observation[:, HEIGHT]

    dream = make("AimeDream-Walker-v0", model=model.folder, reward_fn=Robot().height)
    again = make(dream.spec)
    for each in (dream, again):
        each.reset(seed=0)
    action = 0 * dream.action_space.sample()
    assert dream.step(action)[1] == again.step(action)[1]


def test_a_function_ends_episodes_in_dreams_and_in_what_shac_learns_from(model):
    def low(observation, action, next_observation):
        return next_observation[:, HEIGHT] < observation[:, HEIGHT]

    options = {"model": model, "num_envs": 16, "termination_fn": low}
    dreams = gym.make_vec("AimeDream-Walker-v0", autoreset_mode="SameStep", **options)
    before, _ = dreams.reset(seed=0)
    _, _, terminations, _, infos = dreams.step(np.zeros((16, 6), np.float32))
    after = np.stack([infos["final_obs"][slot] for slot in terminations.nonzero()[0]])
    assert 0 < terminations.sum() < 16
    assert (after[:, HEIGHT] < before[terminations, HEIGHT]).all()
    window = rollout(dreams, lambda shown: 0 * shown[:, :6], 2)
    assert window.continuations is not None
    fell = window.observations[1:, :, HEIGHT] < window.observations[:-1, :, HEIGHT]
    assert torch.equal(window.continuations < 0.5, fell)
    assert torch.equal(window.alive[1] == 0, fell[0])


def test_a_model_without_any_reward_is_paid_by_a_function(tmp_path, model):
    bare = random_model(heads=False)
    save_model(bare, tmp_path)
    (tmp_path / "starts.npz").write_bytes((model.folder / "starts.npz").read_bytes())
    with pytest.raises(AimeGymError, match=r"predicts no reward .* reward_fn"):
        gym.make("AimeDream-Walker-v0", model=tmp_path)
    dream = gym.make("AimeDream-Walker-v0", model=tmp_path, reward_fn=of_tensors)
    before, _ = dream.reset(seed=0)
    action = np.full(6, 0.5, np.float32)
    after, reward, *_ = dream.step(action)
    assert reward == pytest.approx(expected(before[None], action[None], after[None])[0], abs=1e-5)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            lambda o, a, n: n[:, :1],
            r"gave shape \[12, 1\].* of shape \[12\], one a slot: it is asked about 12 at once.* Take \[:, 0\]",
        ),
        (lambda o, a, n: n[0, 0], r"gave shape \[\]"),
        (lambda o, a, n: 1.0, r"gave shape \[\]"),
        (lambda o, a, n: n[:5, 0], r"gave shape \[5\]"),
        (lambda o, a, n: n[:, 0] * np.nan, "gave nan in slot 0"),
        (lambda o, a, n: n[:, 0] / 0.0, "gave -?inf in slot"),
        (lambda o, a, n: None, "gave NoneType"),
        (lambda o, a, n: ["up"] * len(n), "gave list"),
        (lambda o, a, n: o["height"], r"neither tensors \(.*\) nor arrays \(.*height is \[:, 14:15\].*obs_type='dict'"),
        (lambda o, a: 0.0, r"reward_fn failed: TypeError.*Expected reward_fn\(observation, action, next_observation\)"),
        (lambda o, a, n: n[:, 0] + 1j, "gave complex numbers"),
        ("height", "reward_fn is a function of"),
    ],
)
def test_what_a_function_may_not_give_is_told_when_the_dream_is_made(model, function, told):
    with pytest.raises(AimeGymError, match=told):
        gym.make("AimeDream-Walker-v0", model=model, reward_fn=function)


def test_terminations_are_true_or_false(model):
    with pytest.raises(AimeGymError, match=r"termination_fn gave .* true or false of shape"):
        gym.make("AimeDream-Walker-v0", model=model, termination_fn=lambda o, a, n: n[:, 0])


def test_a_function_that_fails_later_is_named(model):
    calls = []

    def fragile(observation, action, next_observation):
        calls.append(len(action))
        return next_observation[:, 0] * (np.nan if len(calls) > 2 else 1)

    dream = gym.make("AimeDream-Walker-v0", model=model, reward_fn=fragile)
    dream.reset(seed=0)
    dream.step(np.zeros(6, np.float32))
    with pytest.raises(AimeGymError, match="reward_fn gave nan in slot 0"):
        dream.step(np.zeros(6, np.float32))


def test_either_a_function_pays_or_what_reward_names(model):
    with pytest.raises(AimeGymError, match="reward='head': give one of them"):
        gym.make("AimeDream-Walker-v0", model=model, reward_fn=of_tensors, reward="head")


@pytest.mark.parametrize("arrays", [False, True])
def test_both_worlds_are_paid_by_it(model, arrays):
    def height(observation, action, next_observation):
        own = next_observation[:, HEIGHT]
        return own.astype(np.float64) if arrays else own

    def once(observation, action, next_observation):
        return np.ones(len(action), bool)

    told = aime_gym.compare("zero", "Walker", model=model, episodes=2, max_episode_steps=3, reward_fn=height)
    (zero,) = told.policies
    assert told.task == "height"
    assert (zero.real.returns > 3 * 0.5).all()  # a walker begins at a height of about 1.3
    assert (zero.real.returns < 3 * 2).all()
    told = aime_gym.compare(
        "zero", "Walker", model=model, episodes=2, max_episode_steps=3, reward_fn=height, termination_fn=once
    )
    assert told.policies[0].real.lengths.tolist() == told.policies[0].dream.lengths.tolist() == [1, 1]


def test_without_a_real_step_the_dreams_returns_stand_alone(model, tmp_path):
    told = aime_gym.compare(
        ["zero", "random"],
        "Walker",
        model=model,
        episodes=2,
        max_episode_steps=3,
        reward_fn=of_tensors,
        real_episodes=0,
    )
    assert [policy.told for policy in told.policies] == [None, None]
    assert "Nothing is known of how these dreams err" in " ".join(str(told).split())
    assert "in the dream alone: zero earns" in told.verdict
    assert type(told).from_json(told.to_json(tmp_path / "returns.json")).to_dict() == told.to_dict()


def test_angles_go_on_over_a_turn(tmp_path):
    """What a reward tells from how far a hinge has turned must not jump where the turn is complete."""
    bundled = load_pretrained_model("cheetah-state")
    dream = aime_gym.TensorDream(bundled, num_envs=64, obs_type="latent", reward_fn=lambda o, a, n: n[:, 1] - o[:, 1])
    bank = shared_bank(bundled)
    assert bank is not None
    state = dream.reset(seeds=0)
    for _ in range(5):
        state, _, rewards, *_ = dream.step(state, torch.zeros(64, 6))
        assert rewards.abs().max() < 3.2
