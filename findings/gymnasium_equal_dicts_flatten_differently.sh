#!/usr/bin/env bash
# `Dict({"b": ..., "a": ...})` keeps its parts in alphabetical order, `Dict(b=..., a=...)` and `Dict(OrderedDict(...))` in the order written.
# Gymnasium says that the two spaces are equal, and flattens the same observation of theirs into different vectors. An agent that learned
# behind `FlattenObservation` in an env with the one is taken without a word by Stable-Baselines3 in an env with the other, and reads each
# number as another; so do two such envs side by side in `SyncVectorEnv`. It hurts whoever changes how an env spells its space, or rebuilds
# the space of a data set or a wrapper by `Dict({...})`. One would bet that equal spaces flatten alike.
# Remedy: name the parts wherever observations are kept, or write `Dict({...})` throughout; compare `list(space)` too.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 stable-baselines3==2.9.2
cat > "$scratch/orders.py" <<'PYTHON'
import sys

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from stable_baselines3 import PPO

parts = {"speed": spaces.Box(-1, 1, (1,)), "angle": spaces.Box(-1, 1, (1,))}
braces, keywords = spaces.Dict(parts), spaces.Dict(**parts)
shown = {"speed": np.float32([0.9]), "angle": np.float32([0.1])}
vectors = [spaces.flatten(space, shown).tolist() for space in (braces, keywords)]
print(f"gymnasium {gym.__version__}; parts {list(braces)} and {list(keywords)}")
print(f"equal: {braces == keywords}; flattened: expected one vector, seen {np.round(vectors, 1).tolist()}")


class Moves(gym.Env):
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return shown, {}

    def step(self, action):
        return shown, 0.0, False, False, {}


def make(space):
    return FlattenObservation(Moves(space))


side_by_side = gym.vector.SyncVectorEnv([lambda: make(braces), lambda: make(keywords)])
rows = side_by_side.reset()[0]
print(f"side by side: expected two equal rows, seen {np.round(rows, 1).tolist()}")
agent = PPO("MlpPolicy", make(braces), seed=0, device="cpu")
before, _ = agent.predict(agent.get_env().reset(), deterministic=True)
agent.set_env(make(keywords))
after, _ = agent.predict(agent.get_env().reset(), deterministic=True)
print(f"the same agent at the same moment: expected one action or an error, seen {before.item():.4f} and {after.item():.4f}")
seen = braces == keywords and vectors[0] == vectors[1][::-1] != vectors[1] and (rows[0] == rows[1][::-1]).all()
sys.exit(0 if seen and not np.allclose(before, after) else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/orders.py"
echo "as described above"
