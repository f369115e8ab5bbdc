"""Commands that are killed at random moments, again and again, and then end as if nothing had happened.

`pytest -m slow tests/faults` runs it: 105 kills in all; `AIME_GYM_KILLS=2` kills each command so often, in place of
fifteen times.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aime_gym.evaluation.compare import Comparison
from aime_gym.files import digest_of
from tests.random_data import record_random
from tests.random_models import write_random_model

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("AIME_GYM_KILLS", "15"))
SMALL = "--setup mdp --memory-dim 8 --stochastic-dim 4 --hidden-size 16 --batch-size 4 --horizon 8 --precision 32-true"
COMMANDS = {
    "collect": "collect walker --policy random --trajectories 8 --workers 1 --out {out}",
    "collect by two": "collect walker --policy random --trajectories 8 --workers 2 --out {out}",
    "train": "train {data} {small} --updates 60 --checkpoint-every 5 --evaluate-every 20 --heads.updates 5 --out {out}",
    "fit-heads": "fit-heads {model} {data} --heads.updates 150 --heads.batch-size 4 --heads.hidden-size 16 "
    "--heads.ensemble 2 --heads.ensemble-hidden-size 8 --out {out}",
    "pretrain": "pretrain Pendulum-v1 --random 2 --buffer 0 --rounds 1 --steps 64 --slots 4 --horizon 16 "
    "--trajectories 1 --noise 0.3 --episodes 1 --round-updates 10 --round-head-updates 5 --tolerance 0 --workers 1 "
    "--train.memory-dim 8 --train.stochastic-dim 4 --train.hidden-size 8 --train.encoder-size 8 "
    "--train.decoder-size 8 --train.batch-size 2 --train.horizon 6 --train.updates 20 --train.evaluation-windows 3 "
    "--train.held-out 0.5 --train.precision 32-true --train.no-tensorboard --train.heads.updates 5 "
    "--train.heads.hidden-size 8 --train.heads.ensemble 2 --out {out}/model --work {out}/work",
    "imitate": "imitate --model {model} --demonstrations {data} --task walk --updates 40 --batch-size 4 --horizon 8 "
    "--episodes 1 --video-steps 0 --out {out}",
    "dream": "dream --model {model} --steps 1600 --slots 8 --horizon 20 --trial-every 400 --trials 1 --episodes 1 "
    "--max-episode-steps 20 --video-steps 0 --out {out}",
}
"""Each is told again, word for word, after it was killed."""
SAME = {"collect": "*.npz", "collect by two": "*.npz", "train": "*.safetensors", "imitate": "agent/*.safetensors"}
SAME |= {"fit-heads": "*.safetensors", "pretrain": "model/*.safetensors"}
"""Files that are then as they are without a kill, bit for bit."""


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """A tiny model, and data."""
    folder = tmp_path_factory.mktemp("given")
    data = record_random(folder / "walker", episodes=4, steps=30, task="walk")
    model = write_random_model(folder / "model").folder
    return {"data": str(data), "model": str(model), "small": SMALL}


def start(command: str, out: Path, given: dict[str, str]) -> subprocess.Popen:
    words = [sys.executable, "-m", "aime_gym", *COMMANDS[command].format(out=out, **given).split()]
    log = open(out.with_suffix(".log"), "ab")  # noqa: SIM115 - the process has it
    return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def finish(command: str, out: Path, given: dict[str, str]) -> float:
    """Runs to the end; how many seconds it took."""
    began = time.monotonic()
    assert start(command, out, given).wait(900) == 0, out.with_suffix(".log").read_text()[-3000:]
    return time.monotonic() - began


def content(command: str, out: Path) -> dict[str, str]:
    found = {str(path.relative_to(out)): digest_of(path) for path in sorted(out.glob(SAME[command]))}
    assert found
    return found


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


def check(command: str, out: Path, usual: Path) -> None:
    """Asserts that a folder is as one of a run that nobody killed."""
    if command in SAME:
        assert content(command, out) == content(command, usual)
    else:
        assert Comparison.from_json(out / "returns.json").episodes == 1
    assert not [*out.rglob(".aime_gym.lock")]


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
