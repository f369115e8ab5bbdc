# %% [markdown]
# # An end that pays: LunarLander
#
# In LunarLander the last step of an episode decides: 100 for a landing, -100 for a crash, and what comes before it only
# leads there. Here a model learns that from episodes of random actions and of Gymnasium's own controller, with and
# without wrong actions, and is asked what it thinks of four policies. `pip install "gymnasium[box2d]"` brings the env.

# %%
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d.lunar_lander import heuristic

import aime_gym

EPISODES, UPDATES, HEAD_UPDATES = 40, 2000, 600
EVALUATION = 10
OUT = Path("runs/lunar-lander")
env = gym.make("LunarLander-v3")

# %% [markdown]
# Episodes of five kinds: the controller with so many wrong actions, and last random ones alone.

# %%
rng = np.random.default_rng(0)


def act(observation: np.ndarray, wrong: float) -> int:
    """The controller's action for one observation [8], or with the probability `wrong` any."""
    return int(rng.integers(4)) if rng.random() < wrong else heuristic(env, observation)


observations, actions, rewards, terminations, truncations = [], [], [], [], []
for episode in range(5 * EPISODES):
    wrong = (0.0, 0.1, 0.3, 0.5, 1.0)[episode % 5]
    seen, done = [env.reset(seed=episode)[0]], [False]
    did, got, ended = [], [], []
    while not any(done):
        did.append(act(seen[-1], wrong))
        observation, reward, *done, _ = env.step(did[-1])
        seen.append(observation)
        got.append(reward)
        ended.append(done)
    observations.append(np.array(seen))
    actions.append(np.array(did))
    rewards.append(np.array(got))
    terminations.append(np.array(ended)[:, 0])
    truncations.append(np.array(ended)[:, 1])
ends = np.array([each[-1] for each in rewards])
print(f"{sum(map(len, rewards)):,} steps; {np.mean(ends == 100):.0%} land, {np.mean(ends == -100):.0%} crash")

# %%
data = aime_gym.data.from_arrays(
    observations, actions, rewards, terminations, truncations, out=OUT / "data", env="LunarLander-v3"
)
small = {"memory_dim": 128, "hidden_size": 128, "encoder_size": 128, "decoder_size": 128, "horizon": 32}
precise = {"min_std": 0.01, "kl_scale": 0.02, "free_nats": 0.0, "events": 0.3}
heads = aime_gym.HeadsOptions(updates=HEAD_UPDATES, hidden_size=128)
aime_gym.Train((data,), out=OUT / "model", updates=UPDATES, heads=heads, **small, **precise).run()

# %% [markdown]
# Policies that are asked about take batches of observations [N, 8]; none of these acted in the data as it is.


# %%
def controller(wrong: float):
    """The controller with so many wrong actions, for a batch of observations."""
    return lambda seen: np.array([act(each, wrong) for each in np.asarray(seen)])


policies = {f"{wrong:.0%} wrong": controller(wrong) for wrong in (0.05, 0.2, 0.4)}
aime_gym.register_dream("LunarDream-v0", model=OUT / "model", real="LunarLander-v3")
comparison = aime_gym.compare(policies | {"random": "random"}, "LunarDream-v0", episodes=EVALUATION)
print(comparison)

# %% [markdown]
# How dreams end: the last reward of each.

# %%
dream = gym.make("LunarDream-v0")
for wrong in (0.05, 1.0):
    ends = []
    for seed in range(EVALUATION):
        observation, _ = dream.reset(seed=seed)
        terminated = truncated = False
        while not (terminated or truncated):
            observation, reward, terminated, truncated, _ = dream.step(act(observation, wrong))
        ends.append(round(float(reward)))
    print(f"{wrong:.0%} wrong: last rewards of dreams {ends}")
