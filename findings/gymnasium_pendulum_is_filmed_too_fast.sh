#!/usr/bin/env bash
# Gymnasium's Pendulum-v1 says render_fps 30, and one of its steps takes 0.05 s: 20 steps are a second. RecordVideo goes
# by render_fps, so that its films run one and a half times too fast, and whoever counts seconds by it is off as much.
# Shimmy's dm_control envs are further off: acrobot says 10 where 100 steps are a second, as it takes milliseconds a step
# for frames a second. One would bet that the env which everyone tries first is filmed at the pace at which it moves.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet gymnasium==1.4.0 shimmy==2.0.1 dm_control==1.0.50 mujoco==3.17.0 imageio==2.38.1 packaging==26.3 numpy==2.4.6
cd "$scratch"
export MUJOCO_GL=disable
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import gymnasium as gym
import shimmy

gym.register_envs(shimmy)
pendulum = gym.make("Pendulum-v1")
acrobot = gym.make("dm_control/acrobot-swingup-v0")
seen = {
    "Pendulum-v1": (pendulum.metadata["render_fps"], 1 / pendulum.unwrapped.dt),
    "acrobot by Shimmy": (acrobot.metadata["render_fps"], 1 / acrobot.unwrapped._env.control_timestep()),
}
print(f"gymnasium {gym.__version__}, shimmy {shimmy.__version__}")
for name, (frames, steps) in seen.items():
    print(f"{name}: expected render_fps {steps:g}, the steps of a second; seen {frames:g}")
sys.exit(0 if [round(frames / steps, 2) for frames, steps in seen.values()] == [1.5, 0.1] else 1)
PYTHON
echo "as described above"
