#!/usr/bin/env bash
# RLlib's env runners read every Gymnasium vector env as one that resets itself in the step after an end (NEXT_STEP). One that
# says in its metadata that it does so in the same step (SAME_STEP) is taken without a word: of each episode but the first the
# first step is lost with its reward, the last observation is the first one of another episode, and the returns that RLlib
# reports are too small. It hurts whoever registers a vector env of his own (`vector_entry_point`), as those of JAX and of
# GPUs mostly reset in the same step. One would bet on an error, or on `final_obs` being read.
# Remedy: NEXT_STEP in RLlib, whatever the env could do.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.2.2 "ray[rllib]==2.60.0"
cat > "$scratch/sampled.py" <<'PYTHON'
import sys

import gymnasium
import numpy as np
import ray
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner


class Count(gymnasium.Env):
    """Shows how many steps an episode has had; each pays 1, and after five it is truncated."""

    observation_space = gymnasium.spaces.Box(0, 5, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(1, self.steps, np.float32), 1.0, False, self.steps == 5, {}


print(f"ray {ray.__version__}, gymnasium {gymnasium.__version__}")
seen = {}
for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
    name = f"Count{mode.name}-v0"

    def vector(num_envs, mode=mode, **settings):
        return SyncVectorEnv([Count] * num_envs, autoreset_mode=mode)

    gymnasium.register(name, entry_point=Count, vector_entry_point=vector)
    runners = {"num_env_runners": 0, "num_envs_per_env_runner": 2, "gym_env_vectorize_mode": "vector_entry_point"}
    runner = SingleAgentEnvRunner(config=PPOConfig().environment(name).env_runners(**runners))
    episodes = runner.sample(num_episodes=6, random_actions=True)[2:]  # without the first of each env
    runner.stop()
    seen[mode] = {(tuple(episode.get_observations().ravel().tolist()), episode.get_return()) for episode in episodes}
    print(f"{mode.name}: expected 0 to 5 and a return of 5, seen {seen[mode]}")
right, wrong = ((0.0, 1.0, 2.0, 3.0, 4.0, 5.0), 5.0), ((1.0, 2.0, 3.0, 4.0, 0.0), 4.0)
sys.exit(0 if list(seen.values()) == [{right}, {wrong}] else 1)
PYTHON
"$scratch/venv/bin/python" -W ignore "$scratch/sampled.py" 2> "$scratch/warnings" || { cat "$scratch/warnings"; exit 1; }
echo "as described above"
