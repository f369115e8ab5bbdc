# %% [markdown]
# # Planning in a dream
#
# A planner needs no policy: it tries many plans in the dream from where the world stands now, does the first action of
# the best one in the world, and plans again from what it sees then. That is model-predictive control (MPC). Here are
# two ways to find a plan, and a loop that acts by them.

# %%
import gymnasium as gym
import torch

import aime_gym

EPISODE_STEPS = 500
PLANS, HORIZON = 64, 25

model = aime_gym.load_pretrained_model("cartpole-state")
dream = aime_gym.TensorDream(model, task="swingup", num_envs=PLANS, deterministic=True, max_episode_steps=None)

# %% [markdown]
# `dream.reset(..., start=latents)` puts one state into all slots: that of another dream, or what the model makes of the
# real env. What N plans earn from there is a loop of steps. Plans are tensors [H, N, A]: H steps, N plans, A numbers.


# %%
def returns(plans, latents):
    """What each plan earns in the dream from there: [N]."""
    state = dream.reset(seeds=0, start=latents)
    earned = torch.zeros(PLANS)
    for actions in plans:
        state, _, rewards, _, _ = dream.step(state, actions)
        earned = earned + rewards
    return earned


# %% [markdown]
# **The cross-entropy method (CEM)** draws plans around a mean, and moves the mean to the best tenth of them.


# %%
@torch.no_grad()
def by_cem(latents, mean, rounds=4):
    """A plan [H, A], sought around another one."""
    spread = torch.full_like(mean, 0.7)
    for _ in range(rounds):
        plans = (mean[:, None] + spread[:, None] * torch.randn(HORIZON, PLANS, mean.shape[-1])).clamp(-1, 1)
        best = plans[:, returns(plans, latents).topk(PLANS // 10).indices]
        mean, spread = best.mean(1), best.std(1) + 0.05
    return mean


# %% [markdown]
# **By gradient**: a dream can be differentiated, so that all plans climb at once; the best one is taken. A tanh keeps
# actions within [-1, 1].


# %%
def by_gradient(latents, mean, rounds=6):
    """A plan [H, A]: the best of many that climb from around another one."""
    around = mean[:, None] + 0.5 * torch.randn(HORIZON, PLANS, mean.shape[-1])
    raw = torch.atanh(around.clamp(-0.99, 0.99)).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.2)
    for _ in range(rounds):
        optimizer.zero_grad()
        (-returns(torch.tanh(raw), latents).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        plans = torch.tanh(raw)
        return plans[:, returns(plans, latents).argmax()]


# %% [markdown]
# In the world, `LatentObservation` shows the model's estimate of the state, which is where the dream goes on from. Each
# plan begins as the one before, a step later.


# %%
def act(find_plan, steps=EPISODE_STEPS):
    """The return of an episode in the real env."""
    world = aime_gym.LatentObservation(gym.make("AimeReal-Cartpole-v0", task="swingup"), model)
    latents, _ = world.reset(seed=0)
    plan, earned = torch.zeros(HORIZON, 1), 0.0
    for _ in range(steps):
        plan = find_plan(torch.from_numpy(latents), plan)
        latents, reward, _, truncated, _ = world.step(plan[0].numpy())
        plan, earned = torch.cat([plan[1:], plan[-1:]]), earned + reward
        if truncated:
            break
    return earned


# %%
if __name__ == "__main__":
    print("CEM:", act(by_cem))
    print("by gradient:", act(by_gradient))
