# %% [markdown]
# # First steps
#
# A dream is an env: it has the spaces, the steps and the seeds of any Gymnasium env, but what it shows is what a
# pretrained world model expects of the world.

# %%
import gymnasium as gym
import numpy as np

import aime_gym

EPISODES = 5

# %%
dream = gym.make("AimeDream-Walker-v0", task="walk")
world = gym.make("AimeReal-Walker-v0", task="walk")
print(dream.observation_space, dream.action_space, dream.unwrapped.revision)
assert dream.observation_space == world.observation_space
assert dream.action_space == world.action_space

# %% [markdown]
# The same actions from the same start, in both. A dream that begins in start 3 of the model goes on from real frames,
# whose physics the real env can begin with.

# %%
shown, _ = dream.reset(seed=0, options={"start": 3})
seen, _ = world.reset(seed=0, options={"physics": dream.unwrapped.start_physics(3)})
rng = np.random.default_rng(0)
for _ in range(20):
    action = rng.uniform(-1, 1, dream.action_space.shape).astype(np.float32)
    shown, promised, *_ = dream.step(action)
    seen, paid, *_ = world.step(action)
print(f"height: {shown[0]:.2f} in the dream, {seen[0]:.2f} in the world")
print(f"last reward: {promised:.2f} in the dream, {paid:.2f} in the world")

# %% [markdown]
# Dreams are cheap side by side, and say how much they are to be doubted, in nats.

# %%
dreams = gym.make_vec("AimeDream-Walker-v0", num_envs=64, task="walk", doubt=True)
dreams.reset(seed=0)
for _ in range(10):
    _, rewards, _, _, infos = dreams.step(dreams.action_space.sample())
print(f"rewards of {rewards.mean():.3f} on average, a doubt of {infos['doubt'].mean():.1f} nats")

# %% [markdown]
# What a policy earns in both worlds, from the same starts, with intervals:

# %%
comparison = aime_gym.compare(["random", "zero"], "Walker", task="walk", episodes=EPISODES, max_episode_steps=100)
print(comparison)
