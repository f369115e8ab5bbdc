"""The examples for libraries that this package does not bring along, run where these are installed.

`pytest -m slow tests/test_other_libraries.py` runs those whose library the environment has, beside the rest. The
nightly job `libraries` has an environment for each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import aime_gym  # noqa: F401
from tests.documents import blocks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
MODULES = {
    "SB3 Contrib and SBX": "sb3_contrib",
    "RL Zoo": "rl_zoo3",
    "Tianshou": "tianshou",
    "imitation": "imitation",
    "d3rlpy": "d3rlpy",
    "Weights & Biases": "wandb",
}
"""Heading of docs/libraries.md -> what its example imports."""


def needs(module: str, requirement: str) -> list[pytest.MarkDecorator]:
    lacks = find_spec(module) is None
    return [pytest.mark.slow, pytest.mark.skipif(lacks, reason=f"pip install {requirement} in an environment")]


def run(name: str, folder: Path, after: str = "", **constants: int) -> str:
    """What a script prints in a process of its own, with smaller constants and some lines more."""
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8") + after
    for constant, value in constants.items():
        text, found = re.subn(rf"^{constant} = .*$", f"{constant} = {value}", text, flags=re.MULTILINE)
        assert found == 1, f"{name}.py sets {constant} {found} times"
    return run_text(text, folder)


def run_text(text: str, folder: Path) -> str:
    """What a script prints in a process of its own, which begins in the folder."""
    path = folder / "example.py"
    path.write_text(text, encoding="utf-8")
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    patience = {"RAY_raylet_start_wait_time_s": "300", "RAY_worker_register_timeout_seconds": "300"}  # on busy machines
    environment = {**os.environ, **patience, "PYTHONPATH": search, "WANDB_MODE": "offline"}
    words = [sys.executable, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_of_the_page_is_run():
    examples = [heading for heading in re.findall(r"^## (.*)$", PAGE, re.MULTILINE) if blocks(section(heading), "text")]
    assert examples == [*MODULES]


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.slow
@pytest.mark.parametrize("heading", MODULES)
def test_the_example_of_the_page_runs(heading, tmp_path):
    if find_spec(MODULES[heading]) is None:
        pytest.skip(f"docs/libraries.md says how to install {heading}")
    (example,) = blocks(section(heading), "text")
    told = run_text(example, tmp_path)
    assert re.search(r"^ policy +dream +real", told, re.MULTILINE), told


class TestRLlib:
    pytestmark = (
        needs("ray.rllib", '"ray[rllib]==2.60.0"') if find_spec("ray") else needs("ray", '"ray[rllib]==2.60.0"')
    )

    def test_ppo_learns_in_dreams_and_is_tried_in_the_world(self, tmp_path):
        told = run("rllib_ppo", tmp_path, "print(evaluated_in)\n", ITERATIONS=2, SLOTS=4, EPISODE_STEPS=20, EPISODES=1)
        assert re.search(r"^2: [\d.]+ in the dream, [\d.]+ in the real env$", told, re.MULTILINE)
        assert "AimeReal-Pendulum-v0" in told


class TestTorchRL:
    pytestmark = needs("torchrl", "torchrl==0.14.1")

    def test_collects_in_dreams_and_in_the_world(self, tmp_path):
        after = (
            "import numpy as np\n"
            "assert batch['next', 'done'].sum() == SLOTS, batch\n"
            "assert (batch['next', 'doubt'] > 0).all()\n"
            "first = batch['start_index'][:, 0]\n"
            "assert (batch['next', 'start_index'].squeeze() == first.reshape(SLOTS, 1)).all()\n"
        )
        told = run("torchrl_collect", tmp_path, after, SLOTS=4, EPISODE_STEPS=6, FRAMES=48)
        assert told.count("4 dreams earned") == 2
        assert "the real env: " in told

    def test_the_info_of_a_single_dream_is_read_by_names(self):
        import gymnasium as gym
        from torchrl.envs import GymWrapper
        from torchrl.envs.gym_like import default_info_dict_reader

        env = GymWrapper(gym.make("AimeDream-Pendulum-v0", doubt=True, max_episode_steps=5))
        env.set_info_dict_reader(default_info_dict_reader(["doubt", "start_index"]))
        steps = env.rollout(5)
        assert steps["doubt"][0] == 0
        assert (steps["next", "doubt"] > 0).all()
        assert (steps["next", "start_index"] == steps["start_index"][0]).all()


class TestSkrl:
    pytestmark = needs("skrl", "skrl==2.1.1")

    def test_ppo_is_shown_what_followed_the_end_of_an_episode(self, tmp_path):
        after = (
            "shown = {}\n"
            "PPO.record_transition = lambda self, **told: shown.update(told)\n"
            "observations, infos = env.reset()\n"
            "for _ in range(EPISODE_STEPS):\n"
            "    before, (observations, _, _, truncated, infos) = observations, env.step(torch.zeros(SLOTS, 1))\n"
            "    told = {'terminated': truncated & False, 'truncated': truncated, 'infos': infos}\n"
            "    agent.record_transition(next_observations=observations, **told)\n"
            "    if truncated.any():\n"
            "        break\n"
            "assert truncated.all()\n"
            "jump = (observations - before).abs().max(-1).values\n"
            "assert ((shown['next_observations'] - before).abs().max(-1).values < jump).all(), jump\n"
        )
        told = run("skrl_ppo", tmp_path, after, STEPS=256, SLOTS=4, ROLLOUT=16, EPISODE_STEPS=20, EPISODES=1)
        assert re.search(r"^ act .*\d", told, re.MULTILINE)
