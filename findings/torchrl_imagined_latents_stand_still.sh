#!/usr/bin/env bash
# TorchRL's WorldModelEnv says that without `observation_spec` it "exposes the latent state under latent_key". It takes
# the observation spec of the real env, in which there is no latent, drops the next latents that the model computes, and
# makes every step from the first one. An imagined trajectory of any length repeats one step; nothing warns, and an agent
# learns from it. One would bet that the default does what is written, or that a rollout that lacks its state fails.
# Remedy: observation_spec=Composite(latent=Unbounded((N, L)), shape=[N]).
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 torchrl==0.14.1 tensordict==0.14.3 gymnasium==1.4.0 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Composite, Unbounded
from torchrl.envs import GymEnv, WorldModelEnv
from torchrl.modules import MLP, WorldModel

torch.manual_seed(0)
world_model = WorldModel(
    TensorDictModule(torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["latent"]),
    TensorDictModule(MLP(in_features=5, out_features=4, depth=1), in_keys=["latent", "action"], out_keys=[("next", "latent")]),
    TensorDictModule(torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
)
begin = world_model.encode(TensorDict({"observation": torch.ones(1, 3)}, batch_size=[1]))


def different_latents(**options):
    env = WorldModelEnv(world_model, GymEnv("Pendulum-v1"), batch_size=[1], **options)
    still = lambda td: td.set("action", torch.ones(1, 1))  # noqa: E731
    with torch.no_grad():
        steps = env.rollout(10, still, tensordict=begin.clone(), auto_reset=False)
    return len(steps["latent"][0].unique(dim=0))


spec = Composite(latent=Unbounded((1, 4)), shape=[1])
seen = different_latents(), different_latents(observation_spec=spec)
print(f"torchrl {torchrl.__version__}")
print(f"ten imagined steps: expected 10 different latents, seen {seen[0]}; with an observation_spec: seen {seen[1]}")
sys.exit(0 if seen == (1, 10) else 1)
PYTHON
echo "as described above"
