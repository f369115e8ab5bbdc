#!/usr/bin/env bash
# From mujoco 3.12 on, `model.jnt_type[0] == mjtJoint.mjJNT_HINGE` is true and the same with its sides exchanged is
# false, because the array holds NumPy integers. `in (mjJNT_HINGE, mjJNT_SLIDE)` asks the second way and finds nothing.
# gymnasium-robotics 1.4.2 asks so where it reads joints: its Fetch envs cannot be made any more, whatever the user does.
# One would bet that equality does not depend on the order, and that a minor release of a simulator keeps envs working.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet mujoco==3.17.0 gymnasium-robotics==1.4.2 gymnasium==1.2.3 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import sys

import gymnasium as gym
import gymnasium_robotics
import mujoco

xml = "<mujoco><worldbody><body><joint type='hinge'/><geom size='.1'/></body></worldbody></mujoco>"
joint, hinge = mujoco.MjModel.from_xml_string(xml).jnt_type[0], mujoco.mjtJoint.mjJNT_HINGE
seen = (bool(joint == hinge), bool(hinge == joint), joint in (hinge,), int(joint) in (hinge,))
print(f"mujoco {mujoco.__version__}, gymnasium-robotics {gymnasium_robotics.__version__}")
print(f"array == enum, enum == array, array in (enum,), int(array) in (enum,): expected all True, seen {seen}")
gym.register_envs(gymnasium_robotics)
try:
    gym.make("FetchReach-v4").reset(seed=0)
    made = "made"
except Exception as error:
    made = f"{type(error).__name__}: {error}"
print(f"FetchReach-v4: expected an env, seen {made}")
sys.exit(0 if seen == (True, False, False, True) and made != "made" else 1)
PYTHON
echo "as described above"
