#!/usr/bin/env bash
# Without a generator, mbrl-lib's ModelEnv makes one and never seeds it, so that all of them, in all processes, draw the
# same noise, whatever torch.manual_seed was told. Runs of several seeds imagine the same noise and look more alike than
# they are. With a generator, an ensemble's members are still drawn from torch's global one (propagation_method=
# "random_model", as in its examples), so that the generator alone repeats nothing. One would bet that a seed of
# torch changes the first and that a generator decides the second. Remedy: pass a seeded generator, and seed torch too.
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

real = gymnasium.make("Pendulum-v1")
never = lambda actions, states: torch.zeros(len(states), 1, dtype=torch.bool)  # noqa: E731
torch.manual_seed(0)
one = OneDTransitionRewardModel(GaussianMLP(in_size=4, out_size=4, device="cpu"))
five = OneDTransitionRewardModel(
    GaussianMLP(in_size=4, out_size=4, device="cpu", ensemble_size=5, propagation_method="random_model")
)


def stepped(model, generator=None):
    """Where ten slots are after one sampled step."""
    env = ModelEnv(real, model, termination_fn=never, generator=generator)
    return env.step(np.ones((10, 1), np.float32), env.reset(np.zeros((10, 3), np.float32)), sample=True)[0]


seeds = []
for seed in (1, 2):
    torch.manual_seed(seed)
    seeds.append(stepped(one))
generators = [stepped(five, torch.Generator().manual_seed(0)) for _ in range(2)]
same_of_seeds, same_of_generators = (bool((a == b).all()) for a, b in (seeds, generators))
print(f"mbrl {mbrl.__version__}")
print(f"two seeds of torch: expected other noise, seen the same: {same_of_seeds}")
print(f"an ensemble, two generators of one seed: expected the same steps, seen the same: {same_of_generators}")
sys.exit(0 if same_of_seeds and not same_of_generators else 1)
PYTHON
echo "as described above"
