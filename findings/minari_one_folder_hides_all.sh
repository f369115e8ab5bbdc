#!/usr/bin/env bash
# minari.list_local_datasets() fails with a TypeError from int(None), and lists nothing at all, as soon as one data set
# in Minari's folder has a name without a version. Its name's pattern makes the version optional, and the function that
# parses it takes int() of it anyway. A folder that was renamed, copied or made by another tool hides every good one.
# One would bet that a listing skips, or names, what it cannot parse.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet "minari[hdf5]==0.5.4" gymnasium==1.4.0 numpy==2.4.6 pillow==13.0.0
cd "$scratch"
export MINARI_DATASETS_PATH="$scratch/minari"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import os
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

box = gym.spaces.Box(-1, 1, (2,), np.float32)
buffer = EpisodeBuffer(
    observations=np.zeros((3, 2), np.float32),
    actions=np.zeros((2, 2), np.float32),
    rewards=[0.0] * 2,
    terminations=[False] * 2,
    truncations=[False, True],
)
minari.create_dataset_from_buffers("robot/walk-v0", [buffer], observation_space=box, action_space=box)


def listed():
    try:
        return list(minari.list_local_datasets())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


print(f"minari {minari.__version__}")
before = listed()
root = Path(os.environ["MINARI_DATASETS_PATH"])
shutil.copytree(root / "robot/walk-v0", root / "robot/walk-copy")
after = listed()
print(f"one data set: expected ['robot/walk-v0'], seen {before}")
print(f"beside a copy without a version: expected ['robot/walk-v0'] still in the list, seen {after}")
sys.exit(0 if before == ["robot/walk-v0"] and isinstance(after, str) and "TypeError" in after else 1)
PYTHON
echo "as described above"
