#!/usr/bin/env bash
# `MultiBinary(5)` and `MultiBinary((5,))` have the same shape, the same elements and the same batches, and Gymnasium says that they are not
# equal: it compares what was written, not the shape. An agent that learned in an env with the one is refused by Stable-Baselines3 in an env
# with the other, and so are two such envs side by side in `SyncVectorEnv`; the message shows two spaces that look alike. It hurts whoever
# rebuilds a space from a shape, as wrappers, recorders and files of spaces do. One would bet that 5 and (5,) are one shape, as in numpy.
# Remedy: write one form throughout, `MultiBinary(int(n))`; compare `type` and `shape`.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 stable-baselines3==2.9.2
cat > "$scratch/binaries.py" <<'PYTHON'
import sys

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from stable_baselines3 import PPO

number, row = spaces.MultiBinary(5), spaces.MultiBinary((5,))
print(f"gymnasium {gym.__version__}; shapes {number.shape} and {row.shape}")
same_batches = batch_space(number, 3) == batch_space(row, 3)
element = np.ones(5, np.int8)
alike = number.shape == row.shape and element in number and element in row and same_batches
print(f"same shape, elements and batches: {alike}; equal: expected True, seen {number == row}")


class Switches(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


refused = []
try:
    gym.vector.SyncVectorEnv([lambda: Switches(number), lambda: Switches(row)])
except RuntimeError as error:
    refused.append(str(error))
try:
    PPO("MlpPolicy", Switches(number), device="cpu").set_env(Switches(row))
except ValueError as error:
    refused.append(str(error))
print("side by side and as another env of an agent: expected no error, seen")
print(*refused, sep="\n")
sys.exit(0 if alike and number != row and len(refused) == 2 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/binaries.py"
echo "as described above"
