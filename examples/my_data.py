# %% [markdown]
# # A dream of my logged data
#
# A world model needs no simulator: logged arrays are enough. In place of a log, a point that is pushed along a line and
# should stay near 1. The page [I have numpy arrays of my robot](../docs/my-data.md) goes further.

# %%
from pathlib import Path

import gymnasium as gym
import numpy as np

import aime_gym

EPISODES, UPDATES, HEAD_UPDATES = 40, 1000, 300
STEPS = 50_000
OUT = Path("runs/my-data")

# %%
rng = np.random.default_rng(0)
observations, actions, rewards = [], [], []
for _ in range(EPISODES):
    forces = np.repeat(rng.uniform(-5, 5, (20, 1)), 10, axis=0)  # [200, 1] newtons
    place, speed = np.zeros((201, 1)), np.zeros((201, 1))
    for t, force in enumerate(forces):
        speed[t + 1] = 0.95 * speed[t] + 0.02 * force
        place[t + 1] = place[t] + 0.1 * speed[t + 1]
    observations.append({"place": place, "speed": speed})
    actions.append(forces)
    rewards.append(-np.abs(place[1:, 0] - 1))

# %%
data = aime_gym.data.from_arrays(observations, actions, rewards, out=OUT / "data", name="robot")
small = {"memory_dim": 64, "hidden_size": 64, "encoder_size": 64, "decoder_size": 64, "batch_size": 16, "horizon": 32}
heads = aime_gym.HeadsOptions(updates=HEAD_UPDATES, hidden_size=64)
aime_gym.Train((data,), out=OUT / "model", updates=UPDATES, lr=2e-3, heads=heads, **small).run()

# %%
dream = gym.make("AimeDream-v0", model=OUT / "model", start="dataset", obs_type="dict")
observation, info = dream.reset(seed=0)
observation, reward, terminated, truncated, info = dream.step(np.array([1.0], np.float32))
print(observation, reward)

# %% [markdown]
# An agent of these dreams. There is no real env to ask, so the dream is; `real_episodes=0` says so.

# %%
own = {"model": OUT / "model", "start": "dataset", "max_episode_steps": 32}
agent = aime_gym.SHAC("MlpPolicy", aime_gym.make_sb3_env("AimeDream-v0", n_envs=64, seed=0, **own), seed=0)
agent.learn(STEPS)
policies = {"shac": agent, "random": "random"}
print(aime_gym.compare(policies, "robot", model=OUT / "model", episodes=8, real_episodes=0))
