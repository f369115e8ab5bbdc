#!/usr/bin/env bash
# Stable-Baselines3's VecVideoRecorder films at the env's `render_fps`. A VecEnv of one's own that declares
# `metadata = {"render_fps": ...}` as Gymnasium asks is filmed at 30 frames a second whatever it says: VecEnv.__init__
# replaces the metadata by {"render_modes": ...}. Natively batched simulators and world models are filmed too fast or
# too slow, and a policy looks nimbler than it is. One would bet that a base class keeps what its subclass declares.
# Remedy: set the entry after super().__init__().
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 stable-baselines3==2.9.2 gymnasium==1.4.0 numpy==2.4.6 moviepy==1.0.3
cd "$scratch"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import numpy as np
import stable_baselines3
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecVideoRecorder


class Batched(VecEnv):
    """Two envs stepped at once, five frames a second."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, again):
        self.render_mode = "rgb_array"
        super().__init__(2, spaces.Box(0, 1, (1,)), spaces.Box(-1, 1, (1,)))
        if again:
            self.metadata["render_fps"] = 5

    def reset(self):
        return np.zeros((2, 1), np.float32)

    def step_async(self, actions):
        pass

    def step_wait(self):
        return self.reset(), np.zeros(2), np.zeros(2, bool), [{}, {}]

    def get_images(self):
        return [np.zeros((64, 64, 3), np.uint8)] * 2

    def close(self):
        pass

    def get_attr(self, name, indices=None):
        return [getattr(self, name)] * 2

    def set_attr(self, name, value, indices=None):
        setattr(self, name, value)

    def env_method(self, name, *arguments, indices=None, **keywords):
        return [None, None]

    def env_is_wrapped(self, wrapper, indices=None):
        return [False, False]


seen = [
    VecVideoRecorder(Batched(again), "films", lambda step: False, video_length=2).frames_per_sec
    for again in (False, True)
]
print(f"stable-baselines3 {stable_baselines3.__version__}")
print(f"declared by the class: expected 5 frames a second, seen {seen[0]}; set after super().__init__: seen {seen[1]}")
sys.exit(0 if seen == [30, 5] else 1)
PYTHON
echo "as described above"
