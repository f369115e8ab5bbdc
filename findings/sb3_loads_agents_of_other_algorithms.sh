#!/usr/bin/env bash
# PPO.load() and A2C.load() of Stable-Baselines3 take the file of another algorithm's agent, of sb3-contrib's TRPO as well,
# without a word, and learn() goes on with the loss of the one and the settings of the other: an A2C agent that is loaded as
# PPO updates after every 5 steps, with batches of 64. Whoever mixes up two files of one folder gets curves that look like a
# weak agent's. One would bet that a class checks what it loads, as SAC's file loaded as TQC raises at the first update.
# Remedy: keep the algorithm's name with the file, and compare it before loading.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.3.0 stable-baselines3==2.9.2 sb3-contrib==2.9.2
cat > "$scratch/load.py" <<'PYTHON'
import sys
from pathlib import Path

import gymnasium
import sb3_contrib
import stable_baselines3
import torch
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO

torch.set_num_threads(1)
print(f"stable-baselines3 {stable_baselines3.__version__}, sb3-contrib {sb3_contrib.__version__}")
scratch, strange = Path(sys.argv[1]), 0
for saved, settings, loaded in ((A2C, {}, PPO), (TRPO, {"n_steps": 128}, PPO), (TRPO, {"n_steps": 128}, A2C)):
    path = scratch / f"{saved.__name__}.zip"
    saved("MlpPolicy", "CartPole-v1", device="cpu", **settings).learn(128).save(path)
    try:
        agent = loaded.load(path, env=gymnasium.make("CartPole-v1"), device="cpu")
        before = [weight.clone() for weight in agent.policy.parameters()]
        agent.learn(256)
        learned = any((one != other).any() for one, other in zip(before, agent.policy.parameters()))
        seen = f"a {loaded.__name__} that {'learned' if learned else 'stood still'} from rollouts of {agent.n_steps} steps"
        strange += learned
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        seen = f"{type(error).__name__}: {error}"
    print(f"{saved.__name__}'s file by {loaded.__name__}.load: expected an error, seen {seen}")
sys.exit(0 if strange == 3 else 1)
PYTHON
"$scratch/venv/bin/python" -W ignore "$scratch/load.py" "$scratch"
echo "as described above"
