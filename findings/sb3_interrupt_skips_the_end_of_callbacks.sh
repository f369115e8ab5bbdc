#!/usr/bin/env bash
# Callbacks of Stable-Baselines3 have a method for the end of a training, `_on_training_end`, where people save agents, write what was
# measured and close files. It is called when training ends by its steps, and when a callback stops it. After Ctrl-C, the usual way to
# end a long training early, it is not called: `learn` has no `finally`. Nor after an error in the env. Whoever saves there loses the
# agent of hours, with every algorithm. One would bet that what opens at the start is closed at the end.
# Remedy: catch KeyboardInterrupt around `learn` and save there; the agent is as it was after the last update.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.3.0 stable-baselines3==2.9.2
cat > "$scratch/end.py" <<'PYTHON'
import os
import signal
import sys

import stable_baselines3
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback

torch.set_num_threads(1)
print(f"stable-baselines3 {stable_baselines3.__version__}")


class Keep(BaseCallback):
    """Notes its calls, and ends the training after 100 steps in one of three ways."""

    def __init__(self, way):
        super().__init__()
        self.way, self.calls = way, []

    def _on_training_start(self):
        self.calls.append("start")

    def _on_step(self):
        if self.n_calls == 100 and self.way == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        return not (self.n_calls == 100 and self.way == "callback")

    def _on_training_end(self):
        self.calls.append("end")


strange = 0
for algorithm, options in ((PPO, {"n_steps": 64}), (DQN, {})):
    for way in ("steps", "callback", "Ctrl-C"):
        keep = Keep(way)
        agent = algorithm("MlpPolicy", "CartPole-v1", device="cpu", seed=0, **options)
        try:
            agent.learn(256, callback=keep)
            left = "returns"
        except KeyboardInterrupt:
            left = "raises KeyboardInterrupt"
        print(f"{algorithm.__name__} ended by {way}: learn {left}; expected start and end, seen {' and '.join(keep.calls)}")
        strange += keep.calls == (["start"] if way == "Ctrl-C" else ["start", "end"])
sys.exit(0 if strange == 6 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/end.py"
echo "as described above"
