# %% [markdown]
# # TorchRL: collect in dreams and in the real env
#
# TorchRL's `GymWrapper` takes dreams, single or side by side. It resets the slots that have ended itself, so that
# dreams side by side are made with `autoreset_mode="Disabled"`; it refuses Gymnasium's default, NEXT_STEP. Tested with
# `pip install torchrl==0.14.1`.
#
# Infos have the same keys at a reset and at every step, so that `auto_register_info_dict` makes columns of them. Of a
# single dream name them, as the digest of the weights, which a reset also tells, is a string, which TorchRL's tables
# cannot hold: `set_info_dict_reader(default_info_dict_reader(["doubt", "start_index"]))`.

# %%
import gymnasium as gym
import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper, RewardSum, TransformedEnv

import aime_gym  # noqa: F401  # registers the ids

SLOTS = 64
EPISODE_STEPS = 200
FRAMES = 64 * 200 * 4

# %%
dreams = gym.make_vec(
    "AimeDream-Pendulum-v0",
    num_envs=SLOTS,
    doubt=True,
    max_episode_steps=EPISODE_STEPS,
    autoreset_mode="Disabled",
)
env = TransformedEnv(GymWrapper(dreams).auto_register_info_dict(), RewardSum())

# %% [markdown]
# Any actor of TorchRL can collect; here a network that has learned nothing yet.

# %%
sizes = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
network = torch.nn.Sequential(torch.nn.Linear(*sizes), torch.nn.Tanh())
actor = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])

# %%
collector = Collector(
    env,
    actor,
    frames_per_batch=SLOTS * EPISODE_STEPS,
    total_frames=FRAMES,
    auto_register_policy_transforms=False,  # what recurrent actors need
)
for batch in collector:
    ended = batch["next", "done"].squeeze(-1)
    returns = batch["next", "episode_reward"][ended]
    print(f"{len(returns)} dreams earned {returns.mean():.1f}; doubt {batch['next', 'doubt'].mean():.3f} nats a step")
collector.shutdown()

# %% [markdown]
# The real env has the same spaces, so that the same actor acts in it.

# %%
world = GymWrapper(gym.make("AimeReal-Pendulum-v0", max_episode_steps=EPISODE_STEPS))
episode = world.rollout(EPISODE_STEPS, actor)
print(f"the real env: {episode['next', 'reward'].sum():.1f} in {len(episode)} steps")
