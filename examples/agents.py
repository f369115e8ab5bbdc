# %% [markdown]
# # Train agents in a dream, and compare
#
# Stable-Baselines3 trains in a dream as in any env, but a step of many dreams is one step of the model. `SHAC` is an
# agent of this package that also uses the gradient of the dream, and needs fewer steps by far. `aime-gym dream` does
# all of this, chooses the best stage of the agent by short trials, and writes a report.

# %%
from pathlib import Path

from stable_baselines3 import PPO

import aime_gym

STEPS = 250_000
EPISODES = 10
OUT = Path("runs/agents")

# %%
task = {"task": "walk", "start": "dataset", "max_episode_steps": 32}
dreams = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=64, seed=0, **task)
shac = aime_gym.SHAC("MlpPolicy", dreams, learning_rate=3e-3, seed=0)
shac.learn(STEPS)

# %%
dreams = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=64, seed=0, **task)
ppo = PPO("MlpPolicy", dreams, n_steps=32, batch_size=256, n_epochs=4, gamma=0.98, seed=0)
ppo.learn(STEPS)

# %% [markdown]
# Both worlds, without a word about which is which: an agent that has found an error of the model is paid in the dream
# and not in the world.

# %%
agents = {"shac": shac, "ppo": ppo, "random": "random"}
comparison = aime_gym.compare(agents, "Walker", task="walk", episodes=EPISODES)
print(comparison)

# %% [markdown]
# Without one real step: what the world is expected to pay, given what is known of how these dreams err.

# %%
print(aime_gym.predict_return(shac, "Walker", task="walk", episodes=EPISODES))

# %% [markdown]
# Agents are saved and loaded as any other agent of SB3.

# %%
OUT.mkdir(parents=True, exist_ok=True)
shac.save(OUT / "shac.zip")
again = aime_gym.SHAC.load(OUT / "shac.zip")
