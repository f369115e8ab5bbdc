# %% [markdown]
# # PPO on tensors
#
# An agent of one's own needs no arrays and no copies: `TensorDream` takes tensors and gives tensors, on the CPU or a
# GPU. Here is PPO (Schulman et al., 2017) in two dozen lines. Each update dreams short episodes from moments of real
# data, all of one length, so that nothing has to be reset within them.

# %%
import torch
from torch import nn
from torch.distributions import Independent, Normal

import aime_gym

UPDATES = 150
SLOTS, STEPS = 256, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# %%
torch.manual_seed(0)
dream = aime_gym.TensorDream("cartpole-state", num_envs=SLOTS, start="dataset", max_episode_steps=None, device=DEVICE)
observation_dim, action_dim = dream.blank().observations.shape[1], dream.embodiment.action_dim
actor = nn.Sequential(nn.Linear(observation_dim, 64), nn.Tanh(), nn.Linear(64, action_dim)).to(DEVICE)
critic = nn.Sequential(nn.Linear(observation_dim, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(-2)).to(DEVICE)
log_std = torch.full((action_dim,), -0.5, device=DEVICE, requires_grad=True)
optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters(), log_std], lr=3e-3)


def policy(observations):
    """The distribution of actions [..., A] at observations [..., D]."""
    return Independent(Normal(actor(observations), log_std.exp()), 1)


# %% [markdown]
# Tensors are time first: observations [H, N, D], actions [H, N, A], rewards, values and advantages [H, N], for H steps
# of N dreams. A batch is all dreams at some of the steps.


# %%
def ppo(updates=UPDATES, gamma=0.98, lam=0.95, clip=0.2, epochs=4):
    """Learns, and returns the mean reward a step of each update's dreams."""
    curve = []
    for update in range(updates):
        with torch.no_grad():
            state, seen, acted, paid = dream.reset(seeds=update * SLOTS), [], [], []
            for _ in range(STEPS):
                seen.append(state.observations)
                acted.append(policy(seen[-1]).sample())
                state, _, rewards, _, _ = dream.step(state, acted[-1].clamp(-1, 1))
                paid.append(rewards)
            values, gains = critic(torch.stack([*seen, state.observations])), [torch.zeros_like(rewards)]
            for t in reversed(range(STEPS)):  # generalised advantages, from the last step back
                gains.append(paid[t] + gamma * values[t + 1] - values[t] + gamma * lam * gains[-1])
            seen, acted, gains = torch.stack(seen), torch.stack(acted), torch.stack(gains[:0:-1])
            returns, before = gains + values[:-1], policy(seen).log_prob(acted)
            gains = (gains - gains.mean()) / gains.std()
        for rows in torch.cat([torch.randperm(STEPS) for _ in range(epochs)]).chunk(4 * epochs):
            ratio = (policy(seen[rows]).log_prob(acted[rows]) - before[rows]).exp()
            gain = torch.minimum(ratio * gains[rows], ratio.clamp(1 - clip, 1 + clip) * gains[rows]).mean()
            loss = (critic(seen[rows]) - returns[rows]).square().mean() - gain - 1e-3 * log_std.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append(torch.stack(paid).mean().item())
    return curve


# %% [markdown]
# What the agent is worth in the world, `compare` says: a policy is any function of an observation.


# %%
@torch.no_grad()
def act(observation):
    """The mean action at an observation of the env."""
    return actor(torch.as_tensor(observation, device=DEVICE)).clamp(-1, 1).cpu().numpy()


if __name__ == "__main__":
    curve = ppo()
    print(f"reward a step: {curve[0]:.2f} at first, {curve[-1]:.2f} at last")
    print(aime_gym.compare({"ppo": act, "random": "random"}, "Cartpole", task="swingup", episodes=5))
