#!/usr/bin/env bash
# Discrete(3, start=-1) of Gymnasium has the elements -1, 0 and 1: sell, hold and buy, say. PPO and A2C of Stable-Baselines3 take
# such an env, learn and predict without a word, but act with 0, 1 and 2: one action is never taken, and one that does not exist is.
# Whoever maps actions by a sum or an index trains on another env than was meant. One would bet on -1, 0 and 1, or on an error, as
# DQN raises one at its first update; only check_env, which nobody is made to call, warns.
# Remedy: give agents Discrete(3), and shift its elements in a wrapper (gymnasium.wrappers.TransformAction).
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.3.0 stable-baselines3==2.9.2
cat > "$scratch/act.py" <<'PYTHON'
import sys
import warnings

import gymnasium
import numpy as np
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO

torch.set_num_threads(1)
print(f"stable-baselines3 {stable_baselines3.__version__}, gymnasium {gymnasium.__version__}")


class Turn(gymnasium.Env):
    """Turns left, not at all or right, by what is added to its place; notes what it was told."""

    observation_space = spaces.Box(-9.0, 9.0, (1,))
    action_space = spaces.Discrete(3, start=-1)

    def __init__(self):
        self.told = set()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.place = 0, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.told.add(int(action))
        self.steps, self.place = self.steps + 1, np.clip(self.place + int(action), -9, 9)
        return np.array([self.place], np.float32), float(-abs(self.place)), False, self.steps == 8, {}


strange = 0
for algorithm in (PPO, A2C):
    env = Turn()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            algorithm("MlpPolicy", env, n_steps=64, device="cpu", seed=0).learn(256)
            seen = f"{sorted(env.told)} and {len([each for each in said if 'start' in str(each.message)])} warnings"
            strange += env.told == {0, 1, 2} and "0 warnings" in seen
        except Exception as error:
            seen = f"{type(error).__name__}: {error}"
    print(f"{algorithm.__name__} in {Turn.action_space}: expected actions among [-1, 0, 1], seen {seen}")
sys.exit(0 if strange == 2 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/act.py"
echo "as described above"
