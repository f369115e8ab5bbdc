"""What measures speed: work in turns, here and in another checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aime_gym.errors import AimeGymError
from benchmarks.agent_speed import AgentSpeed
from benchmarks.gpu import Gpu
from benchmarks.side_by_side import OTHER, THIS, Kind, Measured, check_against, measure, write

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "aime_gym" / "pretrained" / "walker-state"


def test_ratios_are_of_neighbours_in_time(tmp_path: Path):
    """A machine that slows down for a while slows both, and the ratio stays."""
    measured = Measured({THIS: [1.0, 5.0, 2.0], OTHER: [2.0, 10.0, 4.0]})
    assert measured.ratios(OTHER) == {THIS: [2.0, 2.0, 2.0], OTHER: [1.0, 1.0, 1.0]}
    assert measured.rates(10)[THIS] == [10.0, 2.0, 5.0]
    write(tmp_path / "speed.json", {"steps": measured}, {"steps": 10.0}, OTHER, threads=1)
    told = json.loads((tmp_path / "speed.json").read_text())
    assert told["results"]["steps"]["ratio"][THIS] == 2.0
    assert told["results"]["steps"]["median"][THIS] == 5.0


def test_another_checkout_needs_the_same_weights(tmp_path: Path):
    """Names of bundled models stand for other weights elsewhere; a folder without the package is no checkout."""
    check_against(None, "walker-state")
    check_against(ROOT, str(MODEL))
    with pytest.raises(AimeGymError, match="give --model a folder"):
        check_against(ROOT, "walker-state")
    with pytest.raises(AimeGymError, match="--against takes a checkout"):
        check_against(tmp_path, str(MODEL))


@pytest.mark.slow
def test_work_is_done_in_processes(tmp_path: Path):
    """The same checkout twice: both do the work, and what fails there is told here."""
    options = {"model": str(MODEL), "task": "walk", "slots": 2}
    measured = measure({THIS: Kind("dream", options), OTHER: Kind("dream", options, ROOT)}, repeats=3, seconds=0.05)
    assert all(0.2 < ratio < 5 for ratio in measured.ratios(OTHER)[THIS])
    with pytest.raises(AimeGymError, match="failed in"):
        measure({THIS: Kind("dream", {**options, "task": "fly"})}, repeats=1)
    sizes = {"slots": 4, "batch_size": 2, "horizon": 4, "episodes": 2, "episode_steps": 3}
    AgentSpeed(str(MODEL), **sizes, repeats=1, seconds=0.01, against=ROOT, output=tmp_path / "speed.json").run()
    assert json.loads((tmp_path / "speed.json").read_text())["results"].keys() == {"SHAC", "AIME", "compare"}


@pytest.mark.slow
def test_what_a_gpu_is_to_do_runs_on_a_cpu(tmp_path: Path):
    """All parts but the capture of a graph, with tiny sizes; a part that fails would say so in its place."""
    sizes = {"slots": (8,), "image_slots": 2, "shac_slots": 4, "batch_size": 2, "horizon": 4}
    Gpu("cpu", **sizes, seconds=0.01, shac_seconds=0.1, output=tmp_path / "gpu.json").run()
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert "failed" not in json.dumps(told)
    assert told["float32 agrees with the CPU"]["within 1e-4"]
    assert told["dream"]["8 slots, 32-true"]["steps a second"] > 0
    assert told["SHAC"]["steps"] > 0
