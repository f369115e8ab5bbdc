#!/usr/bin/env bash
# TorchRL's WorldModelEnv cannot be made for an env whose action has more than one number: it expands the spec of the
# action to the batch alone, [N] for [N, A]. With one number it is made, and its specs of action and reward say [N]
# where the model takes and gives [N, 1], so that a rollout of random actions fails at its first step. The example of its
# docstring fails there, too. Hurts whoever imagines anything but a pendulum. One would bet that a generic env takes
# actions of any length. Remedy: make it around an env of one number, then set action_spec, reward_spec and done_spec.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 torchrl==0.14.1 tensordict==0.14.3 gymnasium==1.4.0 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import gymnasium
import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Composite, Unbounded
from torchrl.envs import GymWrapper, WorldModelEnv
from torchrl.modules import MLP, WorldModel


class Still(gymnasium.Env):
    """An env of so many numbers an action, of which only the specs are read."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))

    def __init__(self, numbers):
        self.action_space = gymnasium.spaces.Box(-1, 1, (numbers,))

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def imagined(numbers):
    """What comes of random actions in three slots."""
    dynamics = MLP(in_features=4 + numbers, out_features=4, depth=1)
    world_model = WorldModel(
        TensorDictModule(torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["latent"]),
        TensorDictModule(dynamics, in_keys=["latent", "action"], out_keys=[("next", "latent")]),
        TensorDictModule(torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
    )
    begin = world_model.encode(TensorDict({"observation": torch.ones(3, 3)}, batch_size=[3]))
    spec = Composite(latent=Unbounded((3, 4)), shape=[3])
    try:
        env = WorldModelEnv(world_model, GymWrapper(Still(numbers)), batch_size=[3], observation_spec=spec)
    except ValueError as error:
        return f"not made: {error}"
    shape = tuple(env.action_spec.shape)
    try:
        env.rollout(2, tensordict=begin, auto_reset=False)
    except RuntimeError as error:
        return f"{shape}, then {error}"
    return f"{shape}"


two, one = imagined(2), imagined(1)
print(f"torchrl {torchrl.__version__}")
print(f"actions of two numbers in three slots: expected (3, 2), seen {two}")
print(f"actions of one number: expected (3, 1), seen {one}")
sys.exit(0 if two.startswith("not made") and one.startswith("(3,), then") else 1)
PYTHON
echo "as described above"
