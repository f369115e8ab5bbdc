"""`aime-gym refine`: the model learns from the new episodes, keeps what it knew, and is left as it was."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aime_gym.agents.numpy_policies import Rhythm, save_plain
from aime_gym.commands.collect import collect
from aime_gym.commands.train import REFINED, Refine
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import policies_of_model, write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.measure_trust import FRAMES, dream_recorded
from aime_gym.files import digest_of, files_digest, read_json, weights_digest
from aime_gym.training.refine import dreams_of, labelled, mixture, refine
from aime_gym.training.trainer import Trainer
from aime_gym.world_model.checkpoint import load_pretrained_model, load_starts
from aime_gym.world_model.model import WorldModel
from tests.random_data import record_random
from tests.random_models import write_random_model
from tests.tiny_model import make_tiny_model

QUICK: dict[str, Any] = {"updates": 4, "head_updates": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> Path:
    """Two real episodes of sixty rows."""
    return record_random(tmp_path_factory.mktemp("data") / "mine", 2, 60, task="walk", policy_sha256="of whoever acted")


@pytest.fixture(scope="module")
def refined(tiny, episodes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("refined") / "model"
    Refine(str(tiny), (episodes,), out=out, **QUICK).run()
    return out


def rhythm(folder: Path) -> Path:
    """A plain policy of the walker."""
    numbers = np.random.default_rng(0).uniform(0, 0.5, (4, 6)).astype(np.float32)
    return save_plain(Rhythm(*numbers), folder / "rhythm.safetensors")


def told_by(model: WorldModel, data: TrajectoryDataset) -> torch.Tensor:
    """What a model decodes after having seen whole trajectories of equal length."""
    arrays = {name: torch.as_tensor(np.stack([data[i][name] for i in range(len(data))], 1)) for name in data.keys}
    features, _ = model.observe(arrays, arrays["pre_action"], sample=False)
    return torch.cat([*model.decode(features).values()], -1)


def test_the_episodes_are_learned_and_the_model_of_before_stays(tiny, episodes, refined, tmp_path):
    digest = weights_digest(tiny)
    job = Refine(str(tiny), (episodes,), out=tmp_path / "more", updates=12, head_updates=0, lr=2e-2)
    job.run()
    told = read_json(tmp_path / "more" / REFINED)
    assert told["nmse"]["after"] < 0.8 * told["nmse"]["before"]
    assert weights_digest(tiny) == digest != weights_digest(refined)


def test_the_folder_is_a_model_of_its_own(tiny, episodes, refined):
    model = load_pretrained_model(refined)  # which checks digests
    assert model.heads is not None
    assert model.heads.config == load_pretrained_model(tiny).heads.config  # type: ignore[union-attr]
    for name, array in load_starts(model).items():
        np.testing.assert_array_equal(array, load_starts(load_pretrained_model(tiny))[name])
    assert json.loads((refined / "digests.json").read_text())["model.safetensors"] == digest_of(
        refined / "model.safetensors"
    )
    assert policies_of_model(refined) == {"of whoever acted"}
    assert not (refined / "trust.json").exists()
    assert "aime-gym refine" in (refined / "README.md").read_text()


def test_rehearsal_keeps_what_the_model_knew(tiny, episodes):
    model = load_pretrained_model(tiny)
    data, dreams = labelled(model, TrajectoryDataset(episodes)), dreams_of(model, rows=40)
    known = told_by(model, dreams)
    lost = {}
    for share in (0.3, 0.99):
        after = refine(model, data, dreams, 25, 0, share=share, lr=1e-2)
        lost[share] = float((told_by(after, dreams) - known).square().mean())
    assert lost[0.3] < 0.7 * lost[0.99]


def test_dreams_begin_with_real_frames_and_tell_what_the_heads_say(tiny):
    model = load_pretrained_model(tiny)
    starts, dreams = load_starts(model), dreams_of(model, rows=25, seed=3)
    frames, count = starts["pre_action"].shape[:2]
    assert len(dreams) == 2 * count
    for i in range(2 * count):
        for name in (*model.observed, "pre_action"):
            np.testing.assert_array_equal(dreams[i][name][:frames], starts[name][:, i % count])
        assert dreams[i]["physics"].shape == (25, starts["physics"].shape[1])
        seen = {name: torch.as_tensor(dreams[i][name])[:, None] for name in (*model.observed, "pre_action")}
        features, _ = model.observe(seen, seen["pre_action"], sample=False)
        paid = model.heads.reward(features, "walk")  # type: ignore[union-attr]
        np.testing.assert_allclose(dreams[i]["reward of walk"], paid, atol=1e-5)
    acted = {action.tobytes() for action in starts["pre_action"].reshape(-1, 6)}
    assert {action.tobytes() for action in dreams.arrays["pre_action"]} <= acted


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_share_is_that_of_the_rows(share):
    data, dreams = (
        TrajectoryDataset([{"pre_action": np.full((rows, 1), value, np.float32)} for _ in range(count)])
        for count, rows, value in ((2, 50, 1.0), (40, 60, 0.0))
    )
    windows = mixture(data, dreams, share).sample_windows(4000, 5, np.random.default_rng(0))
    assert windows["pre_action"].mean() == pytest.approx(share, abs=0.05)


def test_a_recorded_episode_goes_on_in_the_dream_where_its_frames_end(tiny, episodes):
    model, data = load_pretrained_model(tiny), TrajectoryDataset(episodes)
    asked: list[np.ndarray] = []

    class Counts:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            state = np.zeros(len(observation), int) if state is None else state
            asked.append(state)
            if len(asked) <= FRAMES - 1:  # the recorded frames, one after the other
                shown = np.concatenate([data[0][s.name][len(asked) - 1] for s in model.config.sensors])
                np.testing.assert_array_equal(observation[0], shown)
            return np.zeros((len(observation), 6), np.float32), state + 1

    dream, real = dream_recorded(model, Counts(), data, "walk", copies=3)
    assert [int(state[0]) for state in asked] == list(range(60))
    assert dream.lengths.tolist() == [60] * 6
    np.testing.assert_allclose(real, [data[i]["reward"].sum() for i in range(2)], rtol=1e-6)
    begun = np.repeat([data[i]["reward"][:FRAMES].sum() for i in range(2)], 3)
    assert (dream.returns >= begun - 1e-6).all()


def test_the_plain_policy_that_the_episodes_name_is_judged(tiny, tmp_path, capsys):
    path, out = rhythm(tmp_path), tmp_path / "out"
    data = record_random(tmp_path / "data", 1, 40, task="run", policy=str(path), policy_sha256=digest_of(path))
    Refine(str(tiny), (data,), out=out, **QUICK).run()
    told = read_json(out / REFINED)
    assert (told["policy"], told["task"], told["episodes"]) == ("rhythm", "run", 1)
    assert told["dream"]["before"] != told["dream"]["after"]
    assert "Error of the dream about rhythm at run" in capsys.readouterr().out
    assert policies_of_model(out) == {digest_of(path)}


@pytest.mark.slow
def test_the_command_collects_the_episodes_that_collect_would(tiny, tmp_path):
    path, names = rhythm(tmp_path), ("collected", "given")
    collect("walker", "run", str(path), 1, tmp_path / "data")
    Refine(str(tiny), policy=str(path), collect=1, task="run", out=tmp_path / names[0], **QUICK).run()
    Refine(str(tiny), (tmp_path / "data",), out=tmp_path / names[1], **QUICK).run()
    assert len({weights_digest(tmp_path / name) for name in names}) == 1
    told = [read_json(tmp_path / name / REFINED) for name in names]
    assert told[0]["dream"] == told[1]["dream"]


def test_a_file_names_no_agent_that_is_code(tiny, episodes, tmp_path):
    agent = tmp_path / "agent.zip"
    agent.write_bytes(b"no agent: to open it would be an error")
    data = record_random(tmp_path / "data", 1, 40, task="walk", policy=str(agent), policy_sha256=digest_of(agent))
    Refine(str(tiny), (data,), out=tmp_path / "out", **QUICK).run()
    assert read_json(tmp_path / "out" / REFINED)["policy"] is None


def test_a_stopped_run_resumes_to_the_same_weights(tiny, episodes, refined, tmp_path, monkeypatch, capsys):
    job = Refine(str(tiny), (episodes,), out=tmp_path / "model", **QUICK)
    update = Trainer._update

    def stop(trainer):
        update(trainer)
        if trainer.update == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", stop)
        with pytest.raises(KeyboardInterrupt):
            job.run()
    assert "To go on: aime-gym refine" in capsys.readouterr().out
    job.run()
    assert "Resuming at update 2 of 4." in capsys.readouterr().out
    assert weights_digest(tmp_path / "model") == weights_digest(refined)
    before = files_digest(sorted(path for path in job.out.rglob("*") if path.is_file()))  # type: ignore[union-attr]
    job.run()
    assert "is complete" in capsys.readouterr().out
    assert files_digest(sorted(path for path in job.out.rglob("*") if path.is_file())) == before  # type: ignore[union-attr]


def test_rehearsed_choices_are_choices_where_starts_have_no_actions(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "CartPole-v1")
    starts = load_starts(load_pretrained_model(folder))
    np.savez(
        folder / "starts.npz", **{name: array if name == "is_reset" else array[:1] for name, array in starts.items()}
    )
    dreamt = dreams_of(load_pretrained_model(folder), rows=12)
    actions = np.concatenate([dreamt[i]["pre_action"][1:] for i in range(len(dreamt))])
    assert set(map(tuple, actions)) == {(0.0, 1.0), (1.0, 0.0)}


def test_own_data_are_rehearsed_in_place_of_dreams(tiny, episodes, refined, tmp_path):
    own = record_random(tmp_path / "own", 2, 40, task="walk", policy_sha256="an older one")
    Refine(str(tiny), (episodes,), rehearse=(own,), out=tmp_path / "out", **QUICK).run()
    assert weights_digest(tmp_path / "out") != weights_digest(refined)
    assert policies_of_model(tmp_path / "out") == {"of whoever acted", "an older one"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"episodes": ()}, "Expected real episodes, or a policy"),
        ({"share": 1.0}, "--share lies between 0 and 1"),
        ({"updates": 0}, "--updates starts at 1"),
        ({"task": "run"}, "The rewards of these episodes are of walk; expected run"),
        ({"policy": "nobody.zip"}, "There is no agent nobody.zip"),
        ({"strangers": Path("nowhere")}, "nowhere"),
        ({"episodes": (Path("nowhere"),)}, "There is no data set folder nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(tiny, episodes, tmp_path, flags, message):
    out = tmp_path / "out"
    with pytest.raises(AimeGymError, match=message):
        Refine(**{"model": str(tiny), "episodes": (episodes,), "out": out, **QUICK, **flags}).run()
    assert not out.exists()


def test_models_that_cannot_be_refined_are_refused(tiny, episodes, refined, tmp_path):
    with pytest.raises(AimeGymError, match="is the folder of the model itself"):
        Refine(str(tiny), (episodes,), out=tiny, **QUICK).run()
    with pytest.raises(AimeGymError, match="holds a run with other flags"):
        Refine(str(tiny), (episodes,), out=refined, **{**QUICK, "seed": 1}).run()
    write_random_model(tmp_path / "pixels", setup="visual")
    with pytest.raises(AimeGymError, match="is a model of images"):
        Refine(str(tmp_path / "pixels"), (episodes,), out=tmp_path / "out", **QUICK).run()
    write_random_model(tmp_path / "blank", starts=False)
    with pytest.raises(AimeGymError, match=r"has no starts\.npz to dream from"):
        Refine(str(tmp_path / "blank"), (episodes,), out=tmp_path / "out", **QUICK).run()
    write_metadata(other := tmp_path / "other", {"embodiment": "cheetah"})
    for path in episodes.glob("*.npz"):
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(AimeGymError, match="The episodes are of cheetah"):
        Refine(str(tiny), (other,), out=tmp_path / "out", **QUICK).run()
    assert not (tmp_path / "out").exists()
