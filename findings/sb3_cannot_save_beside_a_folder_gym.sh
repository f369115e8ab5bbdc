#!/usr/bin/env bash
# Stable-Baselines3 cannot save an agent if a folder named "gym" lies beside the script that trains it, as projects have
# that keep their own envs in one: agent.save() raises an AttributeError, after the training, and leaves a broken file.
# It imports OpenAI's Gym to write down its version where that is installed, and takes any folder of the name for it.
# One would bet that an optional line of diagnostics cannot lose a trained agent, nor does Gym have to be installed for it.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.3.0 stable-baselines3==2.9.2
mkdir -p "$scratch/project/gym"
cat > "$scratch/project/train.py" <<'PYTHON'
import sys
from pathlib import Path

import stable_baselines3

agent = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, device="cpu").learn(64)
folder, seen = Path(__file__).parent / "gym", {}
for there in (True, False):
    if not there:
        folder.rmdir()
        for name in [name for name in sys.modules if name == "gym"]:
            del sys.modules[name]
    try:
        agent.save(Path(__file__).parent / f"agent-{there}.zip")
        stable_baselines3.PPO.load(Path(__file__).parent / f"agent-{there}.zip")
        seen[there] = "a saved agent"
    except AttributeError as error:
        seen[there] = f"AttributeError: {error}"
print(f"stable-baselines3 {stable_baselines3.__version__}, gym not installed")
print(f"with an empty folder gym beside the script: expected a saved agent, seen {seen[True]}")
print(f"without it: expected a saved agent, seen {seen[False]}")
sys.exit(0 if seen[True].startswith("AttributeError") and seen[False] == "a saved agent" else 1)
PYTHON
"$scratch/venv/bin/python" -W ignore "$scratch/project/train.py"
echo "as described above"
