#!/usr/bin/env bash
# Training that is resumed by Stable-Baselines3's load(path, env=...) meets the same episodes a second time: load() seeds
# NumPy, PyTorch, the action space and the env with the seed that was saved. An agent that still explores at random then
# repeats each of its first run's steps, exactly, and a replay buffer that was kept holds all of them twice.
# One would bet that to go on with a run is to go on: the step counter, the weights and the optimiser do.
# Who resumes long runs is hurt, and whoever counts the steps of what was learned.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 stable-baselines3==2.9.2
cd "$scratch"
"$scratch/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import gymnasium
import numpy as np
import stable_baselines3
from stable_baselines3 import SAC

first = SAC("MlpPolicy", gymnasium.make("Pendulum-v1"), seed=0, learning_starts=1000, device="cpu").learn(400)
first.save("agent")
first.save_replay_buffer("buffer")

again = SAC.load("agent", env=gymnasium.make("Pendulum-v1"), device="cpu")
again.load_replay_buffer("buffer")
again.learn(400, reset_num_timesteps=False)

other = SAC.load("agent", env=gymnasium.make("Pendulum-v1"), device="cpu")
other.load_replay_buffer("buffer")
other.set_random_seed(1)
other.learn(400, reset_num_timesteps=False)


def repeated(agent):
    seen = np.concatenate([agent.replay_buffer.observations, agent.replay_buffer.actions], -1)[:800, 0]
    return np.mean(np.all(seen[:400] == seen[400:], -1))


same, different = repeated(again), repeated(other)
print(f"stable-baselines3 {stable_baselines3.__version__}: {again.num_timesteps} steps in two halves")
print(f"resumed by load(): expected no step twice, seen {same:.0%} of the second half equal to the first")
print(f"resumed, and set_random_seed(1) called after load(): {different:.0%}")
sys.exit(0 if same == 1 and different == 0 else 1)
PYTHON
echo "as described above"
