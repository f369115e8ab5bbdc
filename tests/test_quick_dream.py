"""The first thing a new user runs: `aime-gym dream --quick`, beside other jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from aime_gym.agents.sb3 import load_sb3_agent


@contextmanager
def busy_machine(processes: int = 2) -> Iterator[None]:
    """Two processes that take what they get of the machine."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def dream(out: Path, *flags: str) -> dict:
    """Runs the command, and returns what job.json tells."""
    command = [sys.executable, "-m", "aime_gym", "dream", "--quick", "--video-steps", "0", "--out", str(out), *flags]
    subprocess.run(command, check=True)
    return json.loads((out / "job.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_walker_walks_beside_two_busy_processes(tmp_path, seed):
    with busy_machine():
        told = dream(tmp_path / "run", "--seed", str(seed))
    returns = json.loads((tmp_path / "run" / "returns.json").read_text())["policies"]
    assert told["outcome"] == "learned", told["verdict"]
    assert returns["SHAC from the dream"]["real"]["mean"] >= 900, told["verdict"]


@pytest.mark.slow
def test_a_seed_gives_one_agent_whatever_the_load(tmp_path):
    flags = ("--steps", "20000", "--trial-every", "8000", "--trials", "2", "--episodes", "2")
    told = [dream(tmp_path / "idle", *flags)]
    with busy_machine():
        told.append(dream(tmp_path / "busy", *flags))
    for name in ("agent.zip", "newest-agent.zip"):
        one, other = (load_sb3_agent(tmp_path / run / name).get_parameters()["policy"] for run in ("idle", "busy"))
        for key, weights in one.items():
            np.testing.assert_array_equal(weights, other[key])
    real = [[point["real"] for point in run["curve"] if "real" in point] for run in told]
    assert real[0] == real[1]
    assert len(real[0]) == 3
