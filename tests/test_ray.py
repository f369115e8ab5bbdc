"""`--workers ray`: jobs on Ray's own local cluster of two nodes leave what one process leaves.

`pytest -m slow tests/test_ray.py` runs it in an environment that has, beside the rest, ray 2.60.0.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aime_gym.cli import main
from aime_gym.commands.collect import Collect
from aime_gym.commands.pretrain import Pretrain
from aime_gym.commands.score import Score
from aime_gym.commands.strangers import Strangers
from aime_gym.errors import AimeGymError
from aime_gym.files import digest_of
from aime_gym.parallel import run_in_processes
from tests import quick_jobs
from tests.test_pretraining import TRAIN
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow
PATIENCE = {"RAY_raylet_start_wait_time_s": "300", "RAY_worker_register_timeout_seconds": "300"}
"""How long Ray waits for its own processes, which on a busy machine begin late."""
os.environ.update(PATIENCE)
ray = pytest.importorskip("ray")
ROOM = 80 * 1024**2
"""Bytes of each node's store of objects: the smallest one is 75 MB."""


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": ROOM}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_without_a_cluster_it_says_how_to_begin_one(tmp_path):
    assert not ray.is_initialized()
    with pytest.raises(AimeGymError, match="`ray start --head` begins one"):
        Collect("pendulum", trajectories=2, out=tmp_path / "data", workers="ray").run()
    with pytest.raises(AimeGymError, match="`ray start --head` begins one"):
        Strangers("pendulum", families=("rhythm",), out=tmp_path / "set", workers="ray").run()
    assert not [*tmp_path.iterdir()]


def test_both_machines_work_and_results_come_in_order(cluster):
    assert len({*run_in_processes(quick_jobs.node, dict.fromkeys("abcd"), "ray")}) == 2
    assert run_in_processes(quick_jobs.square, {"a": 3, "b": 2, "c": 4}, "ray") == [9, 4, 16]
    with pytest.raises(ValueError, match="no such thing"):
        run_in_processes(quick_jobs.fail, {"a": "", "b": "no such thing"}, "ray")


def test_data_are_those_of_one_process(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # folders of commands may be relative
    assert main(["collect", "pendulum", "--trajectories", "3", "--out", "spread", "--workers", "ray"]) == 0
    assert main(["collect", "pendulum", "--trajectories", "3", "--out", "alone", "--workers", "1"]) == 0
    for name in ("0.npz", "1.npz", "2.npz"):
        assert digest_of(Path("spread") / name) == digest_of(Path("alone") / name)


def test_agents_of_rounds_are_those_of_one_process(cluster, tmp_path):
    for workers in ("ray", 1):
        folder = tmp_path / str(workers)
        Pretrain(
            "Pendulum-v1",
            **{"out": folder / "model", "work": folder / "work", "random": 2, "buffer": 0, "rounds": 1},
            **{"steps": 2, "trajectories": 1, "slots": 4, "horizon": 16, "noise": (), "episodes": 1},
            **{"round_updates": 2, "round_head_updates": 2, "workers": workers},
            train=TRAIN,
        ).run()
    weights = [digest_of(tmp_path / workers / "model" / "model.safetensors") for workers in ("ray", "1")]
    assert weights[0] == weights[1]
    agents = [json.loads((tmp_path / w / "work" / "round-1" / "own-0.json").read_text()) for w in ("ray", "1")]
    assert agents[0] == agents[1]


def test_strangers_are_those_of_one_process(cluster, tmp_path):
    kept = {"families": ("rhythm", "ppo"), "seeds": 1, "stages": (0.5, 1.0), "effort": 1 / 60, "episodes": 2}
    for workers in ("ray", 1):
        Strangers("pendulum", **kept, workers=workers, out=tmp_path / str(workers)).run()
    assert contents(tmp_path / "ray") == contents(tmp_path / "1")


def test_a_score_is_that_of_one_process(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_tiny_model(tmp_path / "model", "Pendulum-v1")
    small = {"episodes": 2, "watch": 1, "states": 2, "steps": (256,), "max_episode_steps": 40}
    for workers in ("ray", 1):
        Score(str(model), **small, workers=workers, out=tmp_path / str(workers)).run()
    spread, alone = contents(tmp_path / "ray"), contents(tmp_path / "1")
    assert spread["score.json"] == alone["score.json"]
    assert {*spread} == {*alone}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
