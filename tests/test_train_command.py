"""`aime-gym train` from trajectories to a model folder, and what it refuses."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from lightning_fabric import Fabric

import aime_gym  # noqa: F401 - registers the ids
from aime_gym.commands.train import FitHeads, Train
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import load_trajectory, policies_of_model, save_trajectory, write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.returns import dope_metrics
from aime_gym.flags import HeadsOptions
from aime_gym.training.train import TrainingRun, reward_events
from aime_gym.training.trainer import load_snapshot, make_fabric
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.trust import Trust, load_trust, save_trust
from tests.random_data import record_random
from tests.random_models import write_random_model

TINY: dict[str, Any] = {
    **{"memory_dim": 8, "stochastic_dim": 4, "hidden_size": 8, "encoder_size": 8, "decoder_size": 8},
    **{"batch_size": 2, "horizon": 6, "updates": 4, "evaluate_every": 2, "evaluation_windows": 3, "held_out": 0.5},
    **{"precision": "32-true", "accelerator": "cpu", "tensorboard": False, "checkpoint_every": 1},
}
HEADS = HeadsOptions(updates=2, batch_size=2, hidden_size=8, ensemble_hidden_size=8, ensemble=2)


@pytest.fixture(scope="module")
def walker_data(tmp_path_factory) -> Path:
    """Two short random episodes of the real walker."""
    folder = tmp_path_factory.mktemp("data") / "walker-random"
    return record_random(folder, episodes=2, steps=60, policy_sha256="of whoever acted")


@pytest.fixture(scope="module")
def trained(walker_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "walker-tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["aime-gym", "train", str(walker_data)])  # the card quotes the command
        Train((walker_data,), out=out, heads=HEADS, **TINY).run()
    return out


def test_training_writes_a_model_folder_that_loads(trained):
    model = load_pretrained_model(trained)
    assert model.heads is not None
    assert policies_of_model(trained) == {"of whoever acted"}
    assert model.heads.tasks == ("walk", "stand", "run")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    starts = np.load(trained / "starts.npz")
    assert starts["orientations"].shape[0] == 10
    assert starts["physics"].shape == (len(starts["is_reset"]), 18)
    scores = json.loads((trained / "scores.json").read_text())
    assert {"mean", "sampled"} == set(scores["prediction"]["walker-random"])
    assert "reward_run_prior" in scores["heads"]["walker-random"]
    card = (trained / "README.md").read_text()
    assert "walker-random | 1 | 1 |" in card
    assert "updates 4" in card
    assert "\naime-gym train " in card
    updates = [json.loads(line)["update"] for line in (trained / "run" / "log.jsonl").read_text().splitlines()]
    assert updates == [2, 4]


def test_a_stopped_run_resumes_to_the_same_weights(walker_data, trained, tmp_path, monkeypatch):
    from aime_gym.training.trainer import Trainer

    run = Train((walker_data,), out=tmp_path / "model", heads=HEADS, **TINY)
    update = Trainer._update

    def power_cut(trainer):
        if trainer.update == 2:
            raise RuntimeError("power cut")
        update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run.run()
    assert not (tmp_path / "model" / "model.safetensors").exists()
    torch.manual_seed(99)
    run.run()
    unbroken, resumed = load_pretrained_model(trained), load_pretrained_model(tmp_path / "model")
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_folder_with_another_run_is_refused(walker_data, trained):
    flags = TINY | {"lr": 0.5, "memory_dim": 16}
    with pytest.raises(AimeGymError, match=r"memory_dim: 8 there, 16 now; lr: 0.001 there, 0.5 now"):
        Train((walker_data,), out=trained, heads=HEADS, **flags).run()


def test_a_run_does_not_go_on_with_more_data(walker_data, trained, tmp_path):
    """From more trajectories, others are held out."""
    data, out = shutil.copytree(walker_data, tmp_path / walker_data.name), shutil.copytree(trained, tmp_path / "model")
    plan = Train((data,), out=out, heads=HEADS, **TINY)
    flags = json.loads((out / "run" / "train.json").read_text())
    (out / "run" / "train.json").write_text(json.dumps(flags | {"datasets": [str(data)]}))
    plan.run()
    save_trajectory(data, 2, load_trajectory(data / "0.npz"))
    with pytest.raises(AimeGymError, match=r"\{'walker-random': 2\} there, \{'walker-random': 3\} now.* --pretrained"):
        plan.run()


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_record_of_flags_is_named(walker_data, tmp_path, content):
    path = tmp_path / "run" / "train.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(AimeGymError, match=r"train\.json does not hold the flags of a run"):
        Train((walker_data,), out=tmp_path, heads=HEADS, **TINY).run()


@pytest.mark.parametrize(
    ("place", "call", "presses", "told"),
    [
        ("trainer.Trainer._update", 1, 2, "Stopped at update 0, nothing saved."),
        ("train.prediction_error", 2, 1, "Stopped at update 4, saved up to update 4."),
    ],
    ids=["twice in the first update", "in the last evaluation"],
)
def test_ctrl_c_tells_what_is_saved(walker_data, tmp_path, monkeypatch, capsys, place, call, presses, told):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        for _ in range(presses if len(calls) == call else 0):
            signal.raise_signal(signal.SIGINT)  # to this thread: two that another thread gets may count as one
        return {"nmse": 1.0}

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    monkeypatch.setattr(f"aime_gym.training.{place}", interrupted)
    flags = TINY | {"evaluate_every": 3, "checkpoint_every": 100}
    with pytest.raises(KeyboardInterrupt):
        Train((walker_data,), out=tmp_path, heads=HEADS, **flags).run()
    assert told in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists() == ("nothing" not in told)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "--batch-size starts at 1; got 0"),
        ({"threads": -1}, "--threads starts at 1; got -1"),
        ({"seed": -1}, "--seed starts at 0; got -1"),
        ({"lr": -1.0}, "--lr starts at 0; got -1"),
        ({"lr": float("nan")}, "--lr starts at 0; got nan"),
        ({"kl_rebalance": 2.0}, "kl_rebalance: expected a number from 0 to 1, got 2.0"),
        ({"heads": HeadsOptions(tasks=("swingupp",))}, "Unknown task of walker 'swingupp'"),
        ({"accelerator": "gpuu"}, "--accelerator gpuu.* cannot be had here"),
        ({"strategy": "ddpp"}, "--strategy ddpp cannot be had here"),
        ({"devices": "two"}, "--devices two.* cannot be had here"),
        pytest.param(
            {"accelerator": "cuda"},
            "--accelerator cuda.* cannot be had here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_refused_at_the_start(walker_data, tmp_path, flags, message):
    with pytest.raises(AimeGymError, match=message):
        Train((walker_data,), out=tmp_path / "out", **TINY | flags).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["batch_size", "hidden_size", "ensemble", "ensemble_hidden_size", "trajectories"])
def test_numbers_of_heads_start_at_one(number):
    with pytest.raises(AimeGymError, match=f"--heads.{number.replace('_', '-')} starts at 1; got 0"):
        HeadsOptions(**{number: 0})


def test_data_without_physics_train_a_model_without_heads(walker_data, tmp_path):
    for index in range(2):
        trajectory = load_trajectory(walker_data / f"{index}.npz")
        save_trajectory(tmp_path / "data", index, {key: trajectory[key] for key in trajectory if key != "physics"})
    write_metadata(tmp_path / "data", {"embodiment": "walker"})
    plan = Train((tmp_path / "data",), out=tmp_path / "out", heads=HEADS, **TINY | {"updates": 1})
    with pytest.raises(AimeGymError, match=r"need physics, which these data lack.*--heads\.updates 0"):
        plan.run()
    assert not (tmp_path / "out").exists()
    replace(plan, heads=HeadsOptions(updates=0)).run()
    assert load_pretrained_model(tmp_path / "out").heads is None


def test_data_that_do_not_fit_are_refused(walker_data, tmp_path):
    trajectory = load_trajectory(walker_data / "0.npz")
    folders = {name: tmp_path / name for name in ("cheetah", "short", "unnamed")}
    for name, folder in folders.items():
        lacking = {key: value for key, value in trajectory.items() if name != "short" or key != "velocity"}
        for index in range(2):
            save_trajectory(folder, index, lacking)
    write_metadata(folders["cheetah"], {"embodiment": "cheetah"})
    write_metadata(folders["short"], {"embodiment": "walker"})
    out = tmp_path / "out"
    with pytest.raises(AimeGymError, match="different embodiments: cheetah, walker"):
        Train((walker_data, folders["cheetah"]), out=out, **TINY).run()
    with pytest.raises(AimeGymError, match="velocity: missing, expected dim 9"):
        Train((folders["short"],), out=out, **TINY).run()
    with pytest.raises(AimeGymError, match=r"unnamed do not say which body.*--embodiment"):
        Train((folders["unnamed"],), out=out, **TINY).run()
    assert TrainingRun((folders["unnamed"],), embodiment="walker", out=out, **TINY).load_data()[0].name == "walker"
    wider = {**trajectory, "physics": np.pad(trajectory["physics"], ((0, 0), (0, 13)))}
    for index in range(2):
        save_trajectory(tmp_path / "with-a-ball", index, wider)
    write_metadata(tmp_path / "with-a-ball", {"embodiment": "walker"})
    with pytest.raises(AimeGymError, match=r"walker is 18 numbers .* in these data it is 31"):
        Train((tmp_path / "with-a-ball",), out=out, heads=HEADS, **TINY).run()
    with pytest.raises(AimeGymError, match="least one data set"):
        Train((), out=out, **TINY).run()
    assert not out.exists()


def test_heads_can_be_fitted_to_a_model_again(walker_data, trained, tmp_path):
    out = tmp_path / "again"
    options = HeadsOptions(tasks=("flip",), updates=2, batch_size=2, hidden_size=8, ensemble_hidden_size=8)
    FitHeads(str(trained), (walker_data,), out=out, heads=options, held_out=0.5).run()
    model, base = load_pretrained_model(out), load_pretrained_model(trained)
    assert model.heads.tasks == ("flip",)
    for name, weight in base.state_dict().items():
        if not name.startswith("heads."):
            assert torch.equal(weight, model.state_dict()[name])
    with pytest.raises(AimeGymError, match="the model itself"):
        FitHeads(str(trained), (walker_data,), out=trained).run()
    with pytest.raises(AimeGymError, match="Did you mean 'walk'"):
        FitHeads(str(trained), (walker_data,), out=tmp_path / "new", heads=HeadsOptions(tasks=("wlak",))).run()
    assert not (tmp_path / "new").exists()


def test_heads_are_fitted_to_folders_of_the_same_name(walker_data, trained, tmp_path):
    folders = [shutil.copytree(walker_data, tmp_path / parent / "data") for parent in ("a", "b")]
    FitHeads(str(trained), tuple(folders), out=tmp_path / "model", heads=HEADS, held_out=0.5).run()
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(f"| {folder} | 1 | 1 |" in card for folder in folders)


def test_heads_need_what_the_model_sees(walker_data, tmp_path):
    write_random_model(tmp_path / "model", setup="visual")
    with pytest.raises(AimeGymError, match="walker-random does not fit walker in setup visual: image: missing"):
        FitHeads(str(tmp_path / "model"), (walker_data,), out=tmp_path / "out", heads=HEADS, held_out=0.5).run()
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_other_logs(walker_data, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "model")
    (folder / "config.yaml").unlink()
    Train((walker_data,), out=folder, heads=HEADS, **{**TINY, "tensorboard": True}).run()
    before = load_pretrained_model(folder)
    Train((walker_data,), out=folder, heads=HEADS, **TINY, deterministic=True).run()
    after = load_pretrained_model(folder)
    assert (before.config.deterministic, after.config.deterministic) == (False, True)
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name])


def test_a_model_is_not_written_over_that_of_another_command(walker_data, trained, tmp_path):
    folder = tmp_path / "model"
    write_random_model(folder)
    for command in (
        Train((walker_data,), out=folder, heads=HEADS, **TINY),
        FitHeads(str(trained), (walker_data,), folder),
    ):
        with pytest.raises(AimeGymError, match="holds a model that another command made"):
            command.run()
    save_trust(folder, {"walk": Trust(dope_metrics(range(9), range(9)))})
    shutil.copytree(trained / "run", folder / "run")
    Train((walker_data,), out=folder, heads=HEADS, **TINY).run()
    assert load_trust(folder) == {}  # which was of the other model


def test_a_model_is_not_written_among_its_data(walker_data, trained, tmp_path):
    data = shutil.copytree(walker_data, tmp_path / "data")
    before = sorted(path.name for path in data.iterdir())
    for command in (Train((data,), out=data, heads=HEADS, **TINY), FitHeads(str(trained), (data,), data)):
        with pytest.raises(AimeGymError, match="holds trajectories: choose another --out"):
            command.run()
    assert sorted(path.name for path in data.iterdir()) == before


def test_a_run_that_left_nothing_can_be_put_right(walker_data, tmp_path):
    with pytest.raises(AimeGymError, match="lower the learning rate"):
        Train((walker_data,), out=tmp_path / "model", heads=HEADS, **{**TINY, "lr": 1e30, "checkpoint_every": 9}).run()
    Train((walker_data,), out=tmp_path / "model", heads=HEADS, **TINY).run()


@pytest.mark.slow
def test_two_processes_train_one_model(walker_data, tmp_path):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items() if key != "tensorboard"]
    command = [sys.executable, "-m", "aime_gym", "train", str(walker_data), "--out", str(tmp_path / "model"), *flags]
    command += ["--devices=2", "--strategy=ddp", "--heads.updates=0"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert load_pretrained_model(tmp_path / "model").heads is None
    assert "updates 4" in (tmp_path / "model" / "README.md").read_text()


TOGETHER = {**TINY, "batch_size": 16, "updates": 200, "evaluate_every": 100, "evaluation_windows": 30, "lr": 3e-3}


def train_together(data: Path, out: Path, processes: int, **options: Any) -> subprocess.Popen[str]:
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TOGETHER.items() if key != "tensorboard"]
    command = [sys.executable, "-m", "aime_gym", "train", str(data), "--out", str(out), "--no-tensorboard", *flags]
    command += [f"--devices={processes}", "--strategy=ddp", "--heads.updates=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, text=True, **options)


def processes_of(parent: int) -> list[int]:
    """The processes that it has started to train with it."""
    return [child.pid for child in psutil.Process(parent).children() if "train" in child.cmdline()]


@pytest.mark.slow
def test_two_processes_survive_the_loss_of_one_and_learn_as_one_does(walker_data, tmp_path):
    alone = train_together(walker_data, tmp_path / "alone", 1)
    assert alone.wait(600) == 0
    out = tmp_path / "together"
    lost = train_together(walker_data, out, 2, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 300
        while not (out / "run" / "checkpoints" / "last.pt").exists():
            assert lost.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        (other,) = processes_of(lost.pid)
        os.kill(other, signal.SIGKILL)
        told = lost.communicate(timeout=300)[1]
    finally:
        if lost.poll() is None:
            os.killpg(lost.pid, signal.SIGKILL)
    assert lost.returncode != 0
    assert "One of the 2 processes that train together was lost" in told
    assert "The same command goes on from there" in told
    assert load_snapshot(out / "run" / "checkpoints" / "last.pt")["update"] >= 1
    again = train_together(walker_data, out, 2, stdout=subprocess.PIPE)
    assert "Resuming" in again.communicate(timeout=600)[0]
    assert again.returncode == 0
    (one, two) = (json.loads((each / "scores.json").read_text()) for each in (tmp_path / "alone", out))
    nmse = [next(iter(each["prediction"].values()))["mean"]["nmse"] for each in (one, two)]
    assert nmse[1] == pytest.approx(nmse[0], rel=0.05)


def test_processes_that_fabric_does_not_know_of_are_refused(walker_data, tmp_path, monkeypatch):
    """Each of them would train by itself, into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AimeGymError, match=r"one of 2 processes .* the training is one of 1.* --strategy ddp"):
        Train((walker_data,), out=tmp_path / "model", **TINY).run()
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_torchrun_without_flags_is_refused_once(walker_data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "aime_gym", "train"]
    command += [str(walker_data), "--out", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode != 0
    assert done.stderr.count("aime-gym: This is one of 2 processes") == 1
    assert not (tmp_path / "model").exists()


def test_fabric_says_nothing_of_the_precision_that_it_was_asked_for():
    told, log = [], logging.getLogger("lightning_fabric.utilities.rank_zero")
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    log.addHandler(handler)
    try:
        make_fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        assert told == []
        Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")  # others' own still do
        assert len(told) == 1
    finally:
        log.removeHandler(handler)


def test_training_goes_on_from_a_pretrained_model(walker_data, trained, tmp_path):
    options = {**TINY, "lr": 0.0, "deterministic": True}
    Train((walker_data,), out=tmp_path / "more", pretrained=str(trained), heads=HEADS, **options).run()
    before, after = load_pretrained_model(trained), load_pretrained_model(tmp_path / "more")
    assert (before.config.deterministic, after.config.deterministic) == (False, True)
    before.heads = after.heads = None
    for name, weight in after.state_dict().items():
        torch.testing.assert_close(weight, before.state_dict()[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(AimeGymError, match="another architecture: memory_dim: 8 there, 16 here"):
        Train((walker_data,), out=tmp_path / "other", pretrained=str(trained), **{**TINY, "memory_dim": 16}).run()


def test_sensors_are_standardised_by_the_data_that_a_model_trains_on_with(trained, tmp_path):
    folder = record_random(tmp_path / "fast", 3, 30)
    for index in range(3):
        trajectory = load_trajectory(folder / f"{index}.npz")
        save_trajectory(folder, index, trajectory | {"velocity": 10 * trajectory["velocity"]})
    Train((folder,), out=tmp_path / "more", pretrained=str(trained), heads=HEADS, **{**TINY, "lr": 0.0}).run()
    before, after = load_pretrained_model(trained), load_pretrained_model(tmp_path / "more")
    assert (after.normaliser["velocity"].std > 5 * before.normaliser["velocity"].std).all()
    states = torch.randn(4, before.config.feature_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after.decode(states), before.decode(states), rtol=1e-3, atol=1e-3)


def test_windows_hold_the_rare_rows_where_a_reward_jumps():
    trajectories = []
    for jump in (37, None, 5):
        reward = np.zeros((60, 1), np.float32)
        reward[: 60 if jump is None else jump] = 0.01 * np.arange(60 if jump is None else jump)[:, None] % 0.05
        if jump is not None:
            reward[jump:] = 1.0
        trajectories.append({"pre_action": np.zeros((60, 1), np.float32), "reward": reward})
    data = TrajectoryDataset(trajectories)
    events = reward_events(data)
    assert events.tolist() == [[0, 37], [2, 125]]
    places: dict[str, Any] = {"events": events, "at_events": 0.5, "least": 2}
    rows = data.draw_windows(4000, 10, np.random.default_rng(0), **places).rows
    for row in (37, 125):
        share = (rows == row).any(0).mean()
        assert 0.25 < share < 0.36  # a quarter, and what falls there anyway
    assert ((rows // 60) == rows[0] // 60).all()
    dense = [{"pre_action": np.zeros((60, 1), np.float32), "reward": np.random.default_rng(0).random((60, 1))}]
    assert len(reward_events(TrajectoryDataset(dense))) == 0
