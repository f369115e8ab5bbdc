"""No stranger is in the data of a model that it judges: by digests of policies, and by what they would have done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aime_gym.agents.numpy_policies import PlainMLP, Rhythm, load_plain, save_plain
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.collect import Collect
from aime_gym.commands.data_sets import Mix
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.demonstrations import load_demonstrations
from aime_gym.data.trajectories import (
    POLICY,
    PROVENANCE,
    policies_of_data,
    policies_of_model,
    read_metadata,
    write_provenance,
)
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.measure_trust import COLLECTED, measure_trust
from aime_gym.evaluation.strangers import SEED, Stranger, StrangerSet, acted_in
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import digest_of, weights_digest
from aime_gym.training.model_folder import make_starts
from aime_gym.world_model.checkpoint import PRETRAINED, bundled_models, load_pretrained_model, load_starts
from tests.test_strangers import random_mlp, random_rhythm
from tests.tiny_model import make_tiny_model

PUBLISHED = sorted(path.parent for path in Path("benchmarks/strangers").glob("*/strangers.json"))
PENDULUM = get_embodiment("pendulum")
PENDULUM_SENSORS = [sensor.name for sensor in PENDULUM.sensors]


def gentle(seed: int) -> PlainMLP:
    """Actions within the box."""
    policy = random_mlp(seed, "tanh")
    return replace(policy, weights=(policy.weights[0], 0.2 * policy.weights[1]), biases=(policy.biases[0], np.zeros(1)))


@pytest.fixture(scope="module")
def leaked(tmp_path_factory) -> dict[str, Path]:
    """A policy, its episodes, and those of it with noise, mixed."""
    root = tmp_path_factory.mktemp("leaked")
    policy = save_plain(gentle(1), root / "stranger.safetensors")
    for name, noise in (("clean", 0.0), ("noisy", 0.3)):
        Collect("pendulum", policy=str(policy), kin=True, trajectories=1, noise=noise, out=root / name, workers=1).run()
    Mix((root / "noisy",), root / "mixed").run()
    return {"policy": policy, **{name: root / name for name in ("clean", "noisy", "mixed")}}


def test_data_are_not_collected_by_strangers_unasked(tmp_path):
    for policy in (gentle(0), random_rhythm()):
        path = save_plain(policy, tmp_path / "stranger.safetensors")
        with pytest.raises(AimeGymError, match="Give --kin"):
            Collect("pendulum", policy=str(path), out=tmp_path / "data").run()
    assert not (tmp_path / "data").exists()


def test_who_acted_is_known_of_data_and_of_models_of_them(leaked, tmp_path):
    digest = digest_of(leaked["policy"])
    assert read_metadata(leaked["clean"])[POLICY] == digest
    assert policies_of_data(leaked["clean"]) == policies_of_data(leaked["mixed"]) == {digest}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_provenance(tmp_path / "one", [leaked["mixed"]], [])
    write_provenance(tmp_path / "two", [], [None, tmp_path / "one"])
    assert policies_of_model(tmp_path / "two") == {digest}
    (tmp_path / "two" / PROVENANCE).write_text('{"policies": 3}')
    with pytest.raises(AimeGymError, match="digests of policies"):
        policies_of_model(tmp_path / "two")


def test_data_are_recognised_by_what_the_policy_would_have_done(leaked):
    clean, noisy = (make_starts(TrajectoryDataset(leaked[name]), PENDULUM_SENSORS) for name in ("clean", "noisy"))
    own = load_plain(leaked["policy"])
    assert acted_in(own, PENDULUM, clean)
    assert not acted_in(own, PENDULUM, noisy)
    assert not any(acted_in(gentle(seed), PENDULUM, clean) for seed in range(2, 30))
    always = replace(own, weights=(own.weights[0], 0 * own.weights[1]), biases=(own.biases[0], np.array([9.0], "f4")))
    pushed = {**clean, "pre_action": np.ones_like(clean["pre_action"])}
    assert not acted_in(always, PENDULUM, pushed), "whoever is saturated acts alike"
    still = replace(own, weights=(own.weights[0], 0 * own.weights[1]), biases=(own.biases[0], np.array([0.5], "f4")))
    held = {**clean, "pre_action": np.full_like(clean["pre_action"], np.tanh(0.5))}
    assert still.predict(np.zeros((1, 3), "f4"))[0] == pytest.approx(np.tanh(0.5))
    assert not acted_in(still, PENDULUM, held), "an action that is held is one coincidence, however long"


def test_kin_does_not_judge(leaked, tmp_path):
    folder = make_tiny_model(tmp_path / "tiny", "pendulum")
    sample = (1.0,)
    rhythm = Rhythm(*(wave[:1] for wave in random_rhythm().arrays().values()))
    members = (
        Stranger("by digest", "digest-0", "td3", rhythm, sample, digest="abc"),
        Stranger("by its acts", "acts-0", "ars", load_plain(leaked["policy"]), sample),
        Stranger("exploiter", "exploiter-0", "exploiter", gentle(3), sample, model=weights_digest(folder)),
        Stranger("of another", "exploiter-1", "exploiter", gentle(4), sample, model="another's"),
        Stranger("stranger", "ars-1", "ars", gentle(5), sample),
        Stranger("another", "ppo-0", "ppo", gentle(6), sample),
    )
    strangers = StrangerSet("pendulum", "swingup", 0.0, members)
    (folder / PROVENANCE).write_text(json.dumps({"policies": ["abc"]}))
    starts = make_starts(TrajectoryDataset(leaked["clean"]), PENDULUM_SENSORS)
    np.savez(folder / "starts.npz", **starts)
    found = measure_trust(load_pretrained_model(folder), strangers)
    assert found.trust.strangers["left_out"] == {
        "digest-0": COLLECTED,
        "acts-0": COLLECTED,
        "exploiter-0": "learned in its dreams",
    }
    assert len(found.comparison.policies) == 3
    assert found.trust.strangers["seen"] == ["ars", "exploiter"], "of a family that has collected data"
    assert found.trust.strangers["policies"] == 1
    with pytest.raises(AimeGymError, match="All of these strangers are kin"):
        measure_trust(load_pretrained_model(folder), replace(strangers, members=members[:3]))


def test_no_bundled_data_were_collected_by_a_plain_policy():
    for folder in sorted((PRETRAINED / "demonstrations").iterdir()):
        told = json.dumps(read_metadata(folder))
        assert '"policy"' in told
        assert ".safetensors" not in told
    assert [path for path in PRETRAINED.rglob("*.safetensors") if path.stem not in ("model", "heads")] == []


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_no_published_stranger_is_in_bundled_data(folder):
    """Neither its file, nor steps that it took, nor an episode that it was measured by."""
    strangers = StrangerSet.load(folder)
    body = get_embodiment(strangers.embodiment)
    digests = {member.digest for member in strangers.members}
    envs = make_real_envs(body.name, 10, task=strangers.task)
    first = envs.reset(seed=[SEED + index for index in range(10)])[0]
    envs.close()
    for name in bundled_models():
        model = load_pretrained_model(name)
        if model.config.embodiment != body.name:
            continue
        assert not digests & policies_of_model(model.folder)
        starts = load_starts(model)
        for member in strangers.members:
            assert not (isinstance(member.plain, PlainMLP) and acted_in(member.plain, body, starts)), member.name
        if "image" not in model.observed:
            rows = np.concatenate([starts[sensor.name] for sensor in body.sensors], axis=-1)[0]
            assert np.abs(rows[:, None] - first[None]).max(-1).min() > 1e-4
    for shown in (PRETRAINED / "demonstrations").glob(f"{body.name}-*"):
        assert not digests & policies_of_data(shown)
        data = load_demonstrations(shown, load_pretrained_model("walker-state").config, 100)
        rows = np.concatenate([data.arrays[sensor.name] for sensor in body.sensors], axis=-1)
        assert np.abs(rows[:, None] - first[None]).max(-1).min() > 1e-4
