# %% [markdown]
# # skrl: PPO in many dreams, with the steps that there were
#
# skrl wraps a Gymnasium vector env as it is. It looks at no autoreset mode: what followed is what `step` returned. In
# NEXT_STEP it stores the step from an end to a beginning, which no action led to. In SAME_STEP it takes the
# beginning of the next episode for what followed the end, and unless `time_limit_bootstrap` is set, its PPO lets
# advantages run on across a truncation. Dreams in SAME_STEP have the last observation in `infos["final_obs"]`: a few
# lines put it where it belongs, and work with every agent of skrl. Tested with `pip install skrl==2.1.1`.

# %%
import gymnasium
import numpy as np
import torch
from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from skrl.utils.model_instantiators.torch import deterministic_model, gaussian_model

import aime_gym

STEPS = 6400
SLOTS = 64
ROLLOUT = 32
EPISODE_STEPS = 200
EPISODES = 4


# %%
class TruePPO(PPO):
    """PPO that is shown what followed the end of an episode, rather than the beginning of the next one."""

    def record_transition(self, *, next_observations, infos, **others):
        """Stores a step of every slot."""
        ended = others["terminated"] | others["truncated"]
        if ended.any():
            slots = ended.flatten().cpu().numpy()
            next_observations = next_observations.clone()
            next_observations[slots] = torch.as_tensor(np.stack(infos["final_obs"][slots]), device=self.device)
        super().record_transition(next_observations=next_observations, infos=infos, **others)


# %%
set_seed(0)
dreams = gymnasium.make_vec(
    "AimeDream-Pendulum-v0",
    num_envs=SLOTS,
    max_episode_steps=EPISODE_STEPS,
    autoreset_mode="SameStep",
    clip_actions=True,
)
dreams.reset(seed=0)
env = wrap_env(dreams, verbose=False)
spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": env.device}
network = [{"name": "net", "input": "OBSERVATIONS", "layers": [64, 64], "activations": "tanh"}]
agent = TruePPO(
    models={
        "policy": gaussian_model(**spaces, initial_log_std=-0.5, network=network, output="ACTIONS"),
        "value": deterministic_model(**spaces, network=network, output="ONE"),
    },
    memory=RandomMemory(memory_size=ROLLOUT, num_envs=SLOTS, device=env.device),
    cfg={"rollouts": ROLLOUT, "mini_batches": 8, "learning_rate": 3e-4, "time_limit_bootstrap": True},
    **spaces,
)
SequentialTrainer(env=env, agents=agent, cfg={"timesteps": STEPS // SLOTS, "headless": True}).train()


# %% [markdown]
# A callable of observations is a policy.


# %%
def act(observations):
    """The means of the actions [N, A] at observations [N, D]."""
    inputs = {"observations": torch.as_tensor(observations)}
    with torch.no_grad():
        return agent.policy.act(inputs, role="policy")[1]["mean_actions"].clamp(-1, 1).numpy()


print(aime_gym.compare(act, "Pendulum", episodes=EPISODES, max_episode_steps=EPISODE_STEPS))
