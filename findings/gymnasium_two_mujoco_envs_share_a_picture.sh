#!/usr/bin/env bash
# Two MuJoCo envs of Gymnasium with `render_mode="rgb_array"` in one process: the picture of the first is another one as soon as the second
# has been drawn, from the same state, and it is black, without a word, when the second is closed. The off-screen viewer makes its GL context
# current when it is made, and never again, so that all of them draw into the context made last, with its textures and its lights. It hurts
# whoever films or learns from images of several envs at once (`SyncVectorEnv`, SB3's `DummyVecEnv`, an evaluation env beside the training
# one). One would bet that two envs share nothing.
# Remedy: one env a process (`AsyncVectorEnv`), or call `env.unwrapped.mujoco_renderer.viewer.make_context_current()` before every `render`.
# It needs a GL library for EGL, as Mesa's.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet 'gymnasium[mujoco]==1.4.0' mujoco==3.17.0 numpy==2.4.6
cd "$scratch"
MUJOCO_GL=egl "$scratch/venv/bin/python" -W ignore - 2> errors <<'PYTHON' || { cat errors; exit 1; }
import os
import sys

import gymnasium as gym
import mujoco
import numpy as np

first = gym.make("Hopper-v5", render_mode="rgb_array", width=64, height=64)
first.reset(seed=0)
alone = first.render().astype(float)
second = gym.make("HalfCheetah-v5", render_mode="rgb_array", width=64, height=64)
second.reset(seed=0)
second.render()
beside = first.render().astype(float)
first.unwrapped.mujoco_renderer.viewer.make_context_current()
mended = first.render().astype(float)
second.unwrapped.mujoco_renderer.viewer.make_context_current()
second.close()
closed = first.render().astype(float)
print(f"gymnasium {gym.__version__}, mujoco {mujoco.__version__}, {os.environ['MUJOCO_GL']}")
print(f"the first env's picture, mean of 255: alone {alone.mean():.1f}; expected the same beside another and after that")
print(f"is closed; seen {beside.mean():.1f} and {closed.mean():.1f}. With its context made current before: {mended.mean():.1f}.")
as_described = np.abs(beside - alone).mean() > 1 and closed.max() == 0 and np.abs(mended - alone).max() < 1
sys.stdout.flush()
os._exit(0 if as_described else 1)  # what the viewers do when they are collected is another matter
PYTHON
echo "as described above"
