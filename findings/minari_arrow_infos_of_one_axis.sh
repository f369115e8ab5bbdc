#!/usr/bin/env bash
# A Minari data set in the arrow format takes a step-wise info that is one number a step (a NumPy array of shape [T]),
# says nothing, and cannot be read again: iterate_episodes fails with a ValueError from int(b''). The trailing shape,
# which is empty, is stored as "" and parsed as one number. The HDF5 format and arrays of shape [T, 1] work.
# Whoever records one number a step (a success flag, a cost, a distance) finds out when the robot is back in its box.
# One would bet that what create_dataset_from_buffers accepts can be read.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet "minari[arrow,hdf5]==0.5.4" gymnasium==1.4.0 numpy==2.4.6 pillow==13.0.0
cd "$scratch"
export MINARI_DATASETS_PATH="$scratch/minari"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

box = gym.spaces.Box(-1, 1, (2,), np.float32)


def read_back(data_format, shape):
    """What comes of writing and reading five steps with an info of this shape."""
    rng = np.random.default_rng(0)
    buffer = EpisodeBuffer(
        observations=rng.uniform(-1, 1, (6, 2)).astype(np.float32),
        actions=rng.uniform(-1, 1, (5, 2)).astype(np.float32),
        rewards=[0.0] * 5,
        terminations=[False] * 5,
        truncations=[False] * 4 + [True],
        infos={"cost": rng.uniform(size=(6, *shape))},
    )
    name = f"costs/{data_format}{len(shape)}-v0"
    minari.create_dataset_from_buffers(
        name, [buffer], observation_space=box, action_space=box, data_format=data_format
    )
    try:
        return next(minari.load_dataset(name).iterate_episodes()).infos["cost"].shape
    except Exception as error:
        return f"{type(error).__name__}: {error}"


print(f"minari {minari.__version__}")
seen = {(kind, shape): read_back(kind, shape) for kind in ("arrow", "hdf5") for shape in ((), (1,))}
for (kind, shape), outcome in seen.items():
    print(f"{kind}, info of shape {(6, *shape)}: expected {(6, *shape)}, seen {outcome}")
broken = [key for key, outcome in seen.items() if isinstance(outcome, str)]
sys.exit(0 if broken == [("arrow", ())] else 1)
PYTHON
echo "as described above"
