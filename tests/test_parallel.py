"""Jobs in processes of their own: they end with their parent, tell who died, and do not run the user's script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.live import Live

from aime_gym.commands.collect import Collect
from aime_gym.commands.data_sets import Render
from aime_gym.commands.pretrain import Pretrain
from aime_gym.parallel import available_cores, run_in_parallel, run_in_processes
from tests.quick_jobs import LONG, die, fail, pid, show, square


def test_results_come_in_the_order_of_the_jobs():
    advanced = []
    jobs = {f"job {number}": number for number in range(9)}
    assert run_in_processes(square, jobs, 2, lambda: advanced.append(1)) == [number**2 for number in range(9)]
    assert len(advanced) == 9
    assert run_in_processes(square, {}, 2) == []


def test_a_single_job_has_a_process_of_its_own_unless_one_worker_was_asked_for():
    assert run_in_processes(pid, {"a": None}, 1) == [os.getpid()]
    assert run_in_processes(pid, {"a": None}, 2) != [os.getpid()]


def test_the_bar_of_a_single_job_is_not_shown_inside_that_of_all(monkeypatch):
    begun: list[bool] = []
    monkeypatch.setattr(Live, "start", lambda self, refresh=False: begun.append(True))
    run_in_parallel(show, {"a": 1}, 2, "Showing", "jobs")
    assert len(begun) == 1  # older versions of Rich refuse a second one


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSEGV])
def test_the_job_whose_process_died_is_named(way):
    begin = time.monotonic()
    with pytest.raises(ChildProcessError, match=rf"worked on trajectory 7 was ended by {way.name}.*same call goes on"):
        run_in_parallel(die, {"trajectory 6": 0, "trajectory 7": int(way)}, 2, "Dying", "jobs")
    assert time.monotonic() - begin < LONG / 2


def test_an_error_ends_the_other_jobs():
    begin = time.monotonic()
    with pytest.raises(ValueError, match="broken"):
        run_in_processes(fail, {"a": "", "b": "broken", "c": ""}, 2)
    assert time.monotonic() - begin < LONG / 2


def test_workers_are_as_many_as_this_process_may_use():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert {available_cores(), Collect().workers, Render(()).workers, Pretrain().workers} == {1}
    finally:
        os.sched_setaffinity(0, allowed)
    assert available_cores() == len(allowed)


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, way):
    code = f"""
import signal
from pathlib import Path
from aime_gym.parallel import run_in_processes
from tests.quick_jobs import beat
signal.signal(signal.SIGINT, signal.default_int_handler)
run_in_processes(beat, {{name: Path({str(tmp_path)!r}) / name for name in "ab"}}, 2)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.send_signal(way)
    parent.wait(timeout=20)
    time.sleep(0.5)
    beats = {path: path.read_text() for path in tmp_path.iterdir()}
    time.sleep(0.5)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == beats


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


SCRIPT = """
import gymnasium
import numpy as np
from pathlib import Path

with open("runs", "a") as file:
    file.write("x")

class Still(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))
    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}

gymnasium.register("Still-v0", entry_point=Still, max_episode_steps=3)
"""


def test_workers_do_not_run_a_script_without_a_main_guard_and_yet_know_its_envs(tmp_path):
    call = """
from aime_gym.parallel import run_in_processes
from tests.quick_jobs import make
print(run_in_processes(make, {"a": "Still-v0", "b": "Still-v0"}, 2, envs=["Still-v0"]))
"""
    assert run_script(tmp_path, SCRIPT + call) == "['Still', 'Still']\n"
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.slow
def test_a_script_without_a_main_guard_collects_and_renders(tmp_path, gl):
    calls = """
from aime_gym.commands.collect import Collect
from aime_gym.commands.data_sets import Render
Collect("Still-v0", trajectories=2, out=Path("still"), workers=2).run()
Collect("pendulum", trajectories=2, out=Path("data"), workers=2).run()
Render((Path("data"),), workers=2).run()
"""
    assert "All 2 trajectories of data have images." in run_script(tmp_path, SCRIPT + calls)
    assert (tmp_path / "runs").read_text() == "x"
    assert len(list(tmp_path.glob("*/*.npz"))) == 4


def run_script(folder: Path, content: str) -> str:
    (folder / "script.py").write_text(content)
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
