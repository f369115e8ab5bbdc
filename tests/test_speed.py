"""What measures speed: work in turns, here and in another checkout."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from aime_gym.errors import AimeGymError
from benchmarks import peers
from benchmarks.agent_speed import AgentSpeed
from benchmarks.gpu import Gpu
from benchmarks.peers import Peers
from benchmarks.side_by_side import OTHER, THIS, Kind, Measured, check_against, measure, write

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "aime_gym" / "pretrained" / "walker-state"
INSTALLED = tuple(peer for peer in peers.INSTALL if find_spec(peer))


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


def test_peers_that_are_missing_name_the_extra(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(AimeGymError, match=r"torchrl is not installed: pip install .*\[benchmarks\]"):
        Peers().run()
    with pytest.raises(AimeGymError, match="--no-deps mbrl"):
        Peers(peers=("mbrl",)).run()
    with pytest.raises(AimeGymError, match="'tianshou'"):
        Peers(peers=("tianshou",)).run()


def test_peers_have_the_sizes_of_the_model():
    """A width that makes as many multiply-adds, of an MLP with that many hidden layers."""
    sizes = peers.sizes_of("walker-state", "walk")
    assert (sizes.rssm, sizes.features, sizes.state) == (484_864, 288, 24)
    for layers in (2, 4):
        width = peers._width(sizes.decoders, sizes.features, sizes.state, layers)
        count = (sizes.features + sizes.state) * width + (layers - 1) * width**2
        assert count == pytest.approx(sizes.decoders, rel=0.01)
    with pytest.raises(AimeGymError, match="needs reward heads and decoders of sensors"):
        peers.sizes_of("walker-pixels", "walk")


@pytest.mark.parametrize("shown", peers.SHOWN)
@pytest.mark.parametrize("work", [peers.dreamer_env, peers.world_model_env, peers.model_env])
def test_peers_dream_on(work, shown):
    """All slots go on from where the last step led, and give rewards and what is asked for."""
    if {peers.model_env: "mbrl"}.get(work, "torchrl") not in INSTALLED:
        pytest.skip("pip install -e '.[benchmarks]'")
    step = work("walker-state", "walk", 3, shown)
    first, second = (_shown_and_rewards(step(), shown) for _ in range(2))
    assert first[0].shape == (3, 24 if shown == "state" else 32)
    assert first[1].shape == (3, 1)
    assert np.isfinite(np.concatenate([*first, *second], -1)).all()
    assert (first[0] != second[0]).any(1).all()


def _shown_and_rewards(result, shown: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(result, list):
        return result[0], result[1]
    names = {"latent": ["state"], "state": ["reco_observation", "observation"]}[shown]
    (name,) = [name for name in names if name in result["next"].keys()]  # noqa: SIM118
    return result["next", name].numpy(), result["next", "reward"].numpy()


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="pip install -e '.[benchmarks]'")
def test_peers_are_measured(tmp_path: Path):
    Peers(slots=(2,), peers=INSTALLED, repeats=1, seconds=0.01, output=tmp_path / "peers.json").run()
    told = json.loads((tmp_path / "peers.json").read_text())
    assert {name.partition(",")[0] for name in told["results"]} == set(peers.SHOWN)
    for shown, counts in told["multiply_adds"].items():
        assert max(counts.values()) / min(counts.values()) < 1.01, shown
    for row in told["results"].values():
        assert all(rate > 0 for rate in row["median"].values())
        assert len(row["median"]) >= 3 + len(INSTALLED)
