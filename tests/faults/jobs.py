"""Small commands whose folders are compared with those of runs that nothing disturbed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aime_gym.evaluation.compare import Comparison
from aime_gym.files import digest_of
from tests.random_data import record_random
from tests.random_models import write_random_model

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


def prepare(folder: Path) -> dict[str, str]:
    """A tiny model, and data."""
    data = record_random(folder / "walker", episodes=4, steps=30, task="walk")
    model = write_random_model(folder / "model").folder
    return {"data": str(data), "model": str(model), "small": SMALL}


def start(command: str, out: Path, given: dict[str, str], **options: Any) -> subprocess.Popen:
    """Begins it, with its words in a file beside the folder; `options` are those of `Popen`."""
    words = [sys.executable, "-m", "aime_gym", *COMMANDS[command].format(out=out, **given).split()]
    log = open(out.with_suffix(".log"), "ab")  # noqa: SIM115 - the process has it
    return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, **options)


def finish(command: str, out: Path, given: dict[str, str]) -> float:
    """Runs to the end; how many seconds it took."""
    began = time.monotonic()
    assert start(command, out, given).wait(900) == 0, out.with_suffix(".log").read_text()[-3000:]
    return time.monotonic() - began


def content(command: str, out: Path) -> dict[str, str]:
    found = {str(path.relative_to(out)): digest_of(path) for path in sorted(out.glob(SAME[command]))}
    assert found
    return found


def check(command: str, out: Path, usual: Path) -> None:
    """Asserts that a folder is as one of a run that nobody killed."""
    if command in SAME:
        assert content(command, out) == content(command, usual)
    else:
        assert Comparison.from_json(out / "returns.json").episodes == 1
    assert not [*out.rglob(".aime_gym.lock")]
