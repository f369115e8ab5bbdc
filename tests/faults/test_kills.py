"""Commands that are killed at random moments, again and again, and then end as if nothing had happened.

`pytest -m slow tests/faults` runs it: 105 kills in all; `AIME_GYM_KILLS=2` kills each command so often, in place of
fifteen times.
"""

from __future__ import annotations

import os
import signal
import subprocess

import numpy as np
import pytest

from tests.faults.jobs import COMMANDS, check, content, finish, prepare, start

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("AIME_GYM_KILLS", "15"))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    return prepare(tmp_path_factory.mktemp("given"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_killed_goes_on(command, given, tmp_path):
    usual, rng = tmp_path / "usual", np.random.default_rng(0)
    seconds = finish(command, usual, given)
    killed, runs = 0, 1
    while killed < KILLS:
        out = tmp_path / f"killed-{runs}"
        process = start(command, out, given)
        try:
            code = process.wait(rng.uniform(0.3, 1.0) * seconds)
            assert code == 0, out.with_suffix(".log").read_text()[-3000:]
            check(command, out, usual)  # it had ended before; the next one begins anew
            runs += 1
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    print(f"{command}: {killed} kills of {runs} runs")
    finish(command, out, given)
    check(command, out, usual)


@pytest.mark.parametrize("command", ["collect", "train"])
def test_two_processes_in_one_folder_leave_what_one_leaves(command, given, tmp_path):
    usual, out = tmp_path / "usual", tmp_path / "both"
    finish(command, usual, given)
    both = [start(command, out, given) for _ in range(2)]
    codes = sorted(process.wait(900) for process in both)
    log = out.with_suffix(".log").read_text()
    assert codes in ([0, 0], [0, 2]), log[-3000:]  # the second one is refused, or finds that all is done
    assert codes == [0, 0] or "is being written to by another call" in log
    assert content(command, out) == content(command, usual)
