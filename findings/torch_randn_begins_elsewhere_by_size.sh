#!/usr/bin/env bash
# Of one seed, the first numbers of `torch.randn` depend on how many are drawn: 15 and 16 share none, 16 and 17 share one, 16 and 32 share
# 16. From 16 numbers on a CPU draws in blocks of 16, and draws the last 16 again where they fill no block. `torch.rand` does not do so,
# nor does numpy. It hurts whoever compares runs of one seed with another number of envs, actions or particles: noise of the envs that both
# have is other noise, so a result moves by chance where only the number was to change. Stable-Baselines3 draws its actions so.
# One would bet that a longer draw begins with the shorter one.
# Remedy: a generator for each env, or one large draw of which each takes its share.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 stable-baselines3==2.9.2
cat > "$scratch/draws.py" <<'PYTHON'
import sys

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env


def shared(draw, few, many):
    """How many of the first numbers of a longer draw are those of a shorter one."""
    return int((draw(few) == draw(many)[:few]).sum())


def seeded(function):
    def draw(size):
        torch.manual_seed(0)
        return function(size).numpy()

    return draw


print(f"torch {torch.__version__}")
seen = {}
for name, draw in {
    "torch.randn": seeded(torch.randn),
    "torch.rand": seeded(torch.rand),
    "numpy": lambda size: np.random.default_rng(0).standard_normal(size),
}.items():
    seen[name] = [shared(draw, *sizes) for sizes in ((15, 16), (16, 17), (16, 32))]
    print(f"{name}: of 15 and 16 expected 15 in common, of 16 and 17 and of 16 and 32 all 16; seen {seen[name]}")

actions = []
for envs in (8, 16):
    env = make_vec_env("Pendulum-v1", envs)
    agent = PPO("MlpPolicy", env, seed=0, device="cpu")
    torch.manual_seed(0)
    actions.append(agent.predict(np.zeros((envs, 3), np.float32), deterministic=False)[0][:, 0])
same = int(np.isclose(actions[0], actions[1][:8]).sum())
print(f"actions that PPO draws for the first 8 of 8 and of 16 envs, one seed: expected 8 alike, seen {same}")
whole = [15, 16, 16]
sys.exit(0 if seen == {"torch.randn": [0, 1, 16], "torch.rand": whole, "numpy": whole} and same == 0 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/draws.py"
echo "as described above"
