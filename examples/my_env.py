# %% [markdown]
# # A dream of my own env, from nothing
#
# An env of Gymnasium becomes a body by its id. Here it is CartPole, whose actions are choices: random episodes, a
# small model of them, an agent that learns in its dreams alone, and what that is worth in the real env.

# %%
from pathlib import Path

import gymnasium as gym

import aime_gym

EPISODES, UPDATES, HEAD_UPDATES = 120, 1000, 300
STEPS = 80_000
OUT = Path("runs/my-env")

# %%
data, model = OUT / "data", OUT / "model"
aime_gym.Collect("CartPole-v1", trajectories=EPISODES, seed=1, out=data, workers=1).run()

# %% [markdown]
# The defaults are for bodies with many joints; this one needs less. Latents that may be precise (`min_std`, `kl_scale`,
# `free_nats`) matter where a small error grows, as with a pole that falls.

# %%
small = {"memory_dim": 128, "hidden_size": 128, "encoder_size": 128, "decoder_size": 128, "horizon": 32}
precise = {"min_std": 0.01, "kl_scale": 0.02, "free_nats": 0.0}
heads = aime_gym.HeadsOptions(updates=HEAD_UPDATES, hidden_size=64)
aime_gym.Train((data,), out=model, updates=UPDATES, heads=heads, **small, **precise).run()

# %% [markdown]
# The dream has the spaces of the env, and ends where the model expects that the world would.

# %%
aime_gym.register_dream("CartPoleDream-v0", model=model, real="CartPole-v1")
dream = gym.make("CartPoleDream-v0")
print(dream.observation_space, dream.action_space)

# %%
dreams = aime_gym.make_sb3_env("CartPoleDream-v0", n_envs=64, seed=0, start="dataset", max_episode_steps=32)
agent = aime_gym.SHAC("MlpPolicy", dreams, learning_rate=3e-3, seed=0)
agent.learn(STEPS)

# %%
print(aime_gym.compare({"shac": agent, "random": "random"}, "CartPoleDream-v0", episodes=5))
