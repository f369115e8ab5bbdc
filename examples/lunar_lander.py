# %% [markdown]
# # A lander whose last step decides
#
# LunarLander pays 100 for a landing and takes 100 for a crash, at the step that ends the episode. It needs Box2D:
# `pip install -c .ci/constraints.txt -e ".[box2d]"`. A model of random episodes learns when they end, and what the end
# pays.

# %%
from pathlib import Path

import gymnasium as gym
import numpy as np

import aime_gym

EPISODES, UPDATES, HEAD_UPDATES = 150, 1500, 400
WATCHED = 20
OUT = Path("runs/lunar-lander")

# %%
data, model = OUT / "data", OUT / "model"
aime_gym.Collect("LunarLander-v3", trajectories=EPISODES, seed=1, out=data, workers=1).run()

# %% [markdown]
# Ends are rare, and all else is smooth: a quarter of the windows (`events`) are drawn around rows where the reward
# jumps. Four actions and six numbers need a small model.

# %%
small = {"memory_dim": 128, "hidden_size": 128, "encoder_size": 128, "decoder_size": 128, "horizon": 32}
precise = {"min_std": 0.01, "kl_scale": 0.02, "free_nats": 0.0, "events": 0.25}
heads = aime_gym.HeadsOptions(updates=HEAD_UPDATES, hidden_size=64)
aime_gym.Train((data,), out=model, updates=UPDATES, heads=heads, **small, **precise).run()

# %% [markdown]
# Random episodes crash, in the dream as in the world, and both take the 100 at the last step: where the data show that
# an end pays something else than the steps before it, it has a reward head of its own, which pays where the dream ends.
# The very step at which the ground comes is not known, so that the last ten are compared, too.

# %%
aime_gym.register_dream("LunarLanderDream-v0", model=model, real="LunarLander-v3")


def ends(env: gym.Env) -> dict[str, float]:
    """How many random episodes end by themselves, after how many steps, and what their last step and last ten pay."""
    env.action_space.seed(0)
    crashes, episodes = 0, []
    for seed in range(WATCHED):
        env.reset(seed=seed)
        terminated = truncated = False
        episodes.append([])
        while not (terminated or truncated):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            episodes[-1].append(float(reward))
        crashes += terminated
    told = {"crashes": crashes, "steps": np.mean([len(rewards) for rewards in episodes])}
    told |= {f"last {n}": np.mean([sum(rewards[-n:]) for rewards in episodes]) for n in (1, 10)}
    return {key: round(float(value)) for key, value in told.items()}


dream, world = gym.make("LunarLanderDream-v0"), gym.make("LunarLander-v3")
print(f"Of {WATCHED} random episodes: in the dream {ends(dream)}, in the world {ends(world)}")

# %%
print(aime_gym.compare({"random": "random", "zero": "zero"}, "LunarLanderDream-v0", episodes=5))
