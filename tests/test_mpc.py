"""The planner: what its plans earn in the world, what decides them, and that envs do not influence each other."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

import aime_gym

SMALL = {"plans": 16, "horizon": 4, "rounds": 2}


def first_frames(count: int) -> np.ndarray:
    """What so many reachers show where episodes begin, [N, D]."""
    world = gymnasium.make("AimeReal-Reacher-v0", task="easy")
    return np.stack([world.reset(seed=seed)[0] for seed in range(count)])


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return first_frames(3)


def paid_for(sign: float):
    return lambda observation, action, next_observation: sign * action[:, 0]


def test_it_reaches_targets_in_the_world_though_it_learned_nothing():
    world = gymnasium.make("AimeReal-Reacher-v0", task="easy")
    earned = []
    for policy in (aime_gym.MPC("reacher-state", task="easy", plans=32, horizon=10, rounds=2), None):
        for seed in (1, 3):
            observation, _ = world.reset(seed=seed)
            world.action_space.seed(seed)
            state, total = None, 0.0
            for _ in range(60):
                if policy is None:
                    action = world.action_space.sample()
                else:
                    action, state = policy.predict(observation, state)
                observation, reward, *_ = world.step(action)
                total += float(reward)
            earned.append(total)
    planned, drawn = earned[:2], earned[2:]
    assert min(planned) > 100  # of 60 steps of 4 control steps, which earn 1 each in the target
    assert max(drawn) < 60


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_function_of_the_users_decides_what_plans_are_for(frames, sign):
    one = aime_gym.MPC("reacher-state", reward_fn=paid_for(sign), plans=32, horizon=3)
    other = aime_gym.MPC("reacher-state", reward_fn=paid_for(-sign), plans=32, horizon=3)
    assert sign * one.predict(frames[0])[0][0] > 0.9
    assert sign * other.predict(frames[0])[0][0] < -0.9


def test_plans_earn_nothing_after_their_end(frames):
    def pushes(observation, action, next_observation):
        return action[:, 0] > 0

    def always(observation, action, next_observation):
        return torch.ones(len(action))

    planner = aime_gym.MPC("reacher-state", reward_fn=always, termination_fn=pushes, plans=32, horizon=3, rounds=4)
    _, (_, _, plan, _) = planner.predict(frames)
    assert plan.shape == (3, 3, 2)
    assert (plan[:, :-1, 0] <= 0.05).all()  # the last step of a plan may end it


def test_what_a_plan_earns_is_what_a_loop_earns(frames):
    def near(observation, action, next_observation):
        return -next_observation.square().sum(1) - observation[:, 0] + action[:, 1]

    planner = aime_gym.MPC("reacher-state", reward_fn=near, precision="32-true", **SMALL)
    latents = planner.predict(frames)[1][0]
    plans = 2 * torch.rand(3, 16, 4, 2, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        told = planner._earned(plans, latents)
    model = aime_gym.load_pretrained_model("reacher-state")
    dream = aime_gym.TensorDream(model, reward_fn=near, deterministic=True, max_episode_steps=None)
    for env, plan in ((0, 3), (2, 11)):
        state, total = dream.reset(seeds=5, start=latents[env]), 0.0
        for action in plans[env, plan]:
            state, _, reward, *_ = dream.step(state, action[None])
            total += float(reward)
        assert float(told[env, plan]) == pytest.approx(total, rel=1e-4)


def test_envs_side_by_side_do_not_influence_each_other(frames):
    planner, other = (aime_gym.MPC("reacher-state", task="easy", **SMALL) for _ in range(2))
    before = torch.get_rng_state()
    together, state = planner.predict(frames)
    assert torch.equal(before, torch.get_rng_state())
    alone = [other.predict(frame)[0] for frame in frames]
    np.testing.assert_allclose(together, alone, atol=1e-4)

    # the second begins anew: it acts as one that has just begun, and the others go on
    onward, _ = planner.predict(frames, state, np.array([False, True, False]))
    np.testing.assert_allclose(onward[1], together[1], atol=1e-4)
    went_on, _ = planner.predict(frames, state, np.zeros(3, bool))
    np.testing.assert_allclose(onward[[0, 2]], went_on[[0, 2]], atol=1e-4)
    assert np.abs(went_on[1] - together[1]).max() > 1e-3


def test_both_worlds_take_it():
    planner = aime_gym.MPC("cartpole-state", task="swingup", **SMALL)
    told = aime_gym.compare({"planner": planner}, "Cartpole", "swingup", episodes=2, max_episode_steps=5)
    assert [len(world.returns) for world in (told.policies[0].dream, told.policies[0].real)] == [2, 2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"plans": 0}, "plans"),
        ({"horizon": 1.5}, "horizon"),
        ({"rounds": -1}, "rounds"),
        ({"spread": float("inf")}, "spread"),
        ({"seed": -1}, "seed"),
        ({"task": "hrad"}, "hard"),
        ({"model": "CartPole-v1-state"}, "SHAC"),
    ],
)
def test_what_it_cannot_plan_with_is_refused(options, told):
    with pytest.raises(aime_gym.AimeGymError, match=told):
        aime_gym.MPC(**{"model": "reacher-state", **options})
