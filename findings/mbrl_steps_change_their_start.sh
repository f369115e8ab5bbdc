#!/usr/bin/env bash
# mbrl-lib's ModelEnv is a function: step(actions, state) gives the next state. With one-dimensional models, its main use
# (PETS, MBPO), the state that is given becomes the next one, too, as both are one dict. A second plan from the same start
# begins where the first one ended, and is judged there; nothing fails. With PlaNetModel the given state stays. Hurts
# planners that branch. One would bet that what goes in and comes out are two states. Remedy: step(actions, dict(state)).
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 gymnasium==1.4.0 numpy==2.4.6 hydra-core==1.3.0 omegaconf==2.4.0 termcolor==3.3.0 tqdm==4.70.1
"$scratch/venv/bin/pip" install --quiet --no-deps mbrl==0.2.0  # which pins older releases than it works with
cd "$scratch"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import gymnasium
import mbrl
import numpy as np
import torch
from mbrl.models import GaussianMLP, ModelEnv, OneDTransitionRewardModel

torch.manual_seed(0)
model = OneDTransitionRewardModel(GaussianMLP(in_size=4, out_size=4, device="cpu"))
never = lambda actions, states: torch.zeros(len(states), 1, dtype=torch.bool)  # noqa: E731
env = ModelEnv(gymnasium.make("Pendulum-v1"), model, termination_fn=never)
actions = np.ones((1, 1), np.float32)


def twice(copied):
    """Where the same action leads from the same start, of means, without noise."""
    start = env.reset(np.zeros((1, 3), np.float32))
    return [env.step(actions, copied(start), sample=False)[0] for _ in range(2)]


given, kept = twice(lambda state: state), twice(dict)
print(f"mbrl {mbrl.__version__}")
print(f"one action from one start, twice: expected {given[0]} both times, seen {given[1]} the second time")
print(f"from a copy of the start: seen {kept[1]}")
sys.exit(0 if (given[0] != given[1]).any() and (kept[0] == kept[1]).all() else 1)
PYTHON
echo "as described above"
