#!/usr/bin/env bash
# Gymnasium's vector envs can leave resets to the caller (autoreset_mode=DISABLED), who then resets finished envs alone
# by `options={"reset_mask": ...}`. The vector RecordEpisodeStatistics takes every such reset for one of all envs: as
# soon as one env finishes, returns and lengths of all the others start again from zero, and are reported far too small.
# One would bet that the wrapper, which comes from the same package as the mask, counts only what the mask resets.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet gymnasium==1.4.0 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import sys

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics


class Timer(gym.Env):
    """Pays 1 a step and is truncated after `length` of them."""

    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length):
        self.length = length

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, False, self.steps == self.length, {}


lengths = (3, 5)
timers = [lambda length=length: Timer(length) for length in lengths]
envs = RecordEpisodeStatistics(SyncVectorEnv(timers, autoreset_mode=AutoresetMode.DISABLED))
envs.reset(seed=0)
seen = {length: [] for length in lengths}
for _ in range(15):
    *_, truncations, infos = envs.step(np.zeros(2, int))
    for index in truncations.nonzero()[0]:
        seen[lengths[index]].append(int(infos["episode"]["l"][index]))
    if truncations.any():
        envs.reset(options={"reset_mask": truncations})
print(f"gymnasium {gym.__version__}")
for length, reported in seen.items():
    print(f"episodes of {length} steps: expected {[length] * len(reported)}, seen {reported}")
sys.exit(0 if any(length > reported[0] for length, reported in seen.items()) else 1)
PYTHON
echo "as described above"
