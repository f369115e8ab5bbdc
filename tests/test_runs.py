"""What runs leave and go on with: one writer a folder, the same data and agents, the command, the random numbers."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import tyro
from stable_baselines3 import PPO

import aime_gym
from aime_gym.agents.sb3 import load_sb3_agent
from aime_gym.commands.collect import Collect, collect
from aime_gym.commands.compare import Compare
from aime_gym.commands.data_sets import Mix, Render
from aime_gym.commands.dream import Dream
from aime_gym.commands.imitate import Imitate
from aime_gym.commands.play import Film
from aime_gym.commands.pretrain import Pretrain, PretrainSmall
from aime_gym.commands.strangers import Strangers
from aime_gym.commands.train import FitHeads, Train
from aime_gym.data.trajectories import data_digest, load_trajectory, save_trajectory, write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.worlds import find_subject
from aime_gym.flags import HeadsOptions, TrainOptions, command_line
from aime_gym.parallel import claimed, generators_kept
from aime_gym.training.trainer import Trainer
from tests.random_data import record_random
from tests.random_models import write_random_model
from tests.tiny_model import make_tiny_model

TINY: dict[str, Any] = {
    **{"memory_dim": 8, "stochastic_dim": 4, "hidden_size": 8, "encoder_size": 8, "decoder_size": 8},
    **{"batch_size": 2, "horizon": 6, "updates": 2, "evaluate_every": 2, "evaluation_windows": 3, "held_out": 0.5},
    **{"precision": "32-true", "accelerator": "cpu", "tensorboard": False},
    "heads": HeadsOptions(updates=2, batch_size=2, hidden_size=8, ensemble_hidden_size=8, ensemble=2),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return record_random(tmp_path_factory.mktemp("data") / "walker-random", episodes=2, steps=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    write_random_model(folder)
    return folder


@pytest.fixture
def data(recorded, tmp_path) -> Path:
    return shutil.copytree(recorded, tmp_path / "data")


def change(folder: Path) -> None:
    """Other numbers in as many files of the same names and sizes."""
    for path in folder.glob("*.npz"):
        trajectory = load_trajectory(path)
        save_trajectory(folder, int(path.stem), {**trajectory, "height": trajectory["height"] + 1})


# --- one writer a folder


def test_no_command_writes_to_a_folder_that_another_one_holds(data, model, tmp_path):
    out = tmp_path / "out"
    calls = {
        "collect": Collect("pendulum", trajectories=1, out=out, workers=1),
        "sac": Collect("pendulum", policy="sac", trajectories=1, out=out, workers=1),
        "mix": Mix((data,), out),
        "train": Train((data,), out=out, **TINY),
        "fit-heads": FitHeads(str(model), (data,), out=out, held_out=0.5),
        "pretrain": Pretrain("pendulum", out=out, work=tmp_path / "work", train=TrainOptions(**TINY)),
        "pretrain's work": Pretrain("pendulum", out=tmp_path / "model", work=out, train=TrainOptions(**TINY)),
        "render": Render((out,)),
        "dream": Dream(model=str(model), out=out),
        "compare": Compare(("random",), model=str(model), out=out),
        "imitate": Imitate(str(model), str(data), out=out),
        "film": Film(str(model), data, out=out),
    }
    with claimed(out):
        for name, call in calls.items():
            with pytest.raises(AimeGymError, match="out is being written to by another call"):
                call.run()
            assert [path.name for path in out.iterdir()] == [".aime_gym.lock"], name
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "model").exists()


def test_a_trust_report_in_the_folder_of_its_model_is_refused_as_such(model):
    with pytest.raises(AimeGymError, match=r"holds something else.*: choose another --out"):
        Compare(("random",) * 5, "walker", "walk", model=str(model), out=model, trust=True).run()


def test_runs_do_not_overwrite_what_other_commands_left(data, model, tmp_path):
    calls: dict[str, Any] = {
        "agent.zip": Compare(("random",), model=str(model), out=tmp_path),
        "report.html": Dream(model=str(model), out=tmp_path),
        "returns.json": Imitate(str(model), str(data), out=tmp_path),
    }
    for name, call in calls.items():
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text("{}")
        call.out = out
        with pytest.raises(AimeGymError, match=rf"holds something else.*{name}\): choose another --out"):
            call.run()
        assert [path.name for path in out.iterdir()] == [name]


def test_a_file_in_place_of_the_folder_is_told_before_any_work(data, model, tmp_path):
    (tmp_path / "out").touch()
    for call in (
        Collect("pendulum", trajectories=1, out=tmp_path / "out", workers=1),
        Mix((data,), tmp_path / "out"),
        Train((tmp_path / "no data",), out=tmp_path / "out", **TINY),
        FitHeads("no model", (data,), out=tmp_path / "out"),
    ):
        with pytest.raises(AimeGymError, match=r"Expected a folder to write to; .*out is a file"):
            call.run()


# --- the same data and agents


def test_digests_follow_the_content_and_not_the_files(data, tmp_path):
    before = data_digest(data)
    shutil.copytree(data, tmp_path / "copy")
    (tmp_path / "copy" / "note.txt").touch()
    (tmp_path / "copy" / ".0.npz.12.tmp").touch()
    assert data_digest(tmp_path / "copy") == before
    rows = len(load_trajectory(data / "0.npz")["pre_action"])
    for index in (0, 1):
        image = np.zeros((rows, 64, 64, 3), np.uint8)
        save_trajectory(tmp_path / "copy", index, {**load_trajectory(data / f"{index}.npz"), "image": image})
    assert data_digest(tmp_path / "copy", images=False) == before != data_digest(tmp_path / "copy")
    change(data)
    assert data_digest(data) != before


def test_a_finished_model_keeps_its_heads_and_card_when_its_data_have_changed(data, tmp_path):
    plan = Train((data,), out=tmp_path / "model", **TINY)
    plan.run()
    plan.run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    change(data)
    with pytest.raises(AimeGymError, match=r"content of data: '\w+' there, '\w+' now.* --pretrained .*model goes on"):
        plan.run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()} == before


def test_an_imitator_does_not_go_on_with_other_demonstrations(data, model, tmp_path):
    aime_gym.BC(model, data, batch_size=2, held_out=0.5).learn(1, folder=tmp_path / "run")
    change(data)
    with pytest.raises(AimeGymError, match="content of demonstrations: "):
        aime_gym.BC(model, data, batch_size=2, held_out=0.5).learn(1, folder=tmp_path / "run")


def test_runs_that_noted_no_digests_go_on_and_note_them(data, model, tmp_path):
    """As runs of older versions are."""
    plan = Train((data,), out=tmp_path / "model", **TINY)
    plan.run()
    agent = aime_gym.BC(model, data, batch_size=2, held_out=0.5)
    agent.learn(1, folder=tmp_path / "run")
    for record, again in (
        (tmp_path / "model" / "run" / "train.json", plan.run),
        (tmp_path / "run" / "flags.json", lambda: agent.learn(1, folder=tmp_path / "run")),
    ):
        noted = json.loads(record.read_text())
        record.write_text(json.dumps({key: value for key, value in noted.items() if not key.startswith("content of ")}))
        again()
        assert json.loads(record.read_text()) == noted
        assert any(key.startswith("content of ") for key in noted)


def test_a_mixed_set_is_not_filled_up_from_sources_that_have_changed(data, tmp_path):
    Mix((data,), tmp_path / "mixed").run()
    (tmp_path / "mixed" / "1.npz").unlink()
    change(data)
    with pytest.raises(AimeGymError, match=r"begun with other trajectories of .*data than those there now"):
        Mix((data,), tmp_path / "mixed").run()


def test_trajectories_of_two_agents_of_one_path_are_not_mixed(tmp_path):
    from stable_baselines3 import PPO

    world = gymnasium.make("AimeReal-Pendulum-v0")
    for seed in (0, 1):
        PPO("MlpPolicy", world, seed=seed, device="cpu").save(tmp_path / f"{seed}.zip")
    shutil.copy(tmp_path / "0.zip", tmp_path / "agent.zip")
    job = ("pendulum", "swingup", str(tmp_path / "agent.zip"))
    collect(*job, 1, tmp_path / "out")
    shutil.copy(tmp_path / "1.zip", tmp_path / "agent.zip")
    collect(*job, 1, tmp_path / "out")  # which lacks nothing
    with pytest.raises(AimeGymError, match="not the agent any more that collected"):
        collect(*job, 2, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.npz")] == ["0.npz"]


# --- the body


def test_the_body_is_named_by_the_model_or_beside_the_agents(tmp_path):
    model = tmp_path / "model"
    make_tiny_model(model, "cartpole")
    for name, body in (("a", "cheetah"), ("b", "cheetah"), ("c", "hopper")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "agent.zip").touch()
        (tmp_path / name / "job.json").write_text(json.dumps({"settings": {"embodiment": body, "model": "x"}}))
    (tmp_path / "c" / "job.json").rename(tmp_path / "c" / "no.json")
    write_metadata(tmp_path / "c", {"embodiment": "hopper"})  # as SAC's training leaves it
    a, b, c = (str(tmp_path / name / "agent.zip") for name in "abc")
    assert find_subject(None, str(model)) == ("cartpole", str(model))
    assert find_subject(None, None, [a, str(tmp_path / "b"), "random"]) == ("cheetah", None)
    assert find_subject(None, None, [c]) == ("hopper", None)
    assert find_subject(None, None, ["random"]) == ("walker", None)
    assert find_subject("walker", None, [a]) == ("walker", None)
    with pytest.raises(AimeGymError, match="of several bodies: cheetah, hopper"):
        find_subject(None, None, [a, b, c])


def test_an_agent_of_an_env_without_a_bundled_model_brings_its_model_along(tmp_path):
    settings = {"embodiment": "MountainCarContinuous-v0", "model": "models/pendulum"}
    (tmp_path / "job.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "agent.zip").touch()
    assert find_subject(None, None, [tmp_path]) == ("MountainCarContinuous-v0", "models/pendulum")
    named = settings | {"embodiment": "antigravity:MountainCarContinuous-v0"}
    (tmp_path / "job.json").write_text(json.dumps({"settings": named}))
    with pytest.raises(AimeGymError, match="named in a file, and files import nothing"):
        find_subject(None, None, [tmp_path])


def test_the_dream_is_of_the_models_body(tmp_path):
    make_tiny_model(tmp_path / "model", "cartpole")
    options = {"episodes": 1, "max_episode_steps": 2, "video_steps": 0, "trials": 0}
    job = Dream(model=str(tmp_path / "model"), steps=10, slots=8, horizon=4, out=tmp_path / "dreamt", **options)
    job.run()
    assert json.loads((tmp_path / "dreamt" / "job.json").read_text())["settings"]["embodiment"] == "cartpole"


# --- the command


@pytest.mark.parametrize(
    "options",
    [
        Train((Path("a b"), Path("c")), out=Path("m"), tensorboard=False, kl_rebalance=None, use_reward=True),
        Train((Path("a"),), heads=HeadsOptions(tasks=("walk", "run"), updates=3), lr=1e-5),
        PretrainSmall("reacher", noise=(), rounds=1),
        PretrainSmall("reacher", tasks=("easy",), train=TrainOptions(updates=3)),
        Mix((Path("a"), Path("-b")), Path("out"), observations_only=True),
    ],
    ids=lambda options: type(options).__name__,
)
def test_the_command_of_options_makes_the_same_options(options):
    line = command_line(options)
    words = shlex.split(line)
    if "-b" not in words:
        assert tyro.cli(type(options), args=words[2:]) == options
    assert words[:2] == ["aime-gym", {"PretrainSmall": "pretrain-small"}.get(type(options).__name__, words[1])]


def test_a_card_tells_the_options_whatever_program_ran(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    plan = Train((data,), out=tmp_path / "model", **TINY)
    plan.run()
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"```\n{command_line(plan)}\n```" in card
    assert "kernel" not in card


def test_an_interrupted_training_tells_the_command_that_goes_on(data, tmp_path, monkeypatch, capsys):
    def interrupt(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_update", interrupt)
    plan = Train((data,), out=tmp_path / "model", **TINY)
    with pytest.raises(KeyboardInterrupt):
        plan.run()
    assert f"To go on: {command_line(plan)}" in capsys.readouterr().out.splitlines()


def test_an_interrupted_pretraining_tells_its_own_command_alone(data, tmp_path, monkeypatch, capsys):
    def interrupt(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_update", interrupt)
    write_metadata(data, {"embodiment": "walker", "task": "walk"})
    options = {"datasets": (data,), "out": tmp_path / "model", "work": tmp_path / "work"}
    plan = PretrainSmall("walker", ("walk",), train=TrainOptions(**TINY), **options)
    with pytest.raises(KeyboardInterrupt):
        plan.run()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("To go on")]
    assert told == [f"To go on: {command_line(plan)}"]
    again = tyro.cli(PretrainSmall, args=shlex.split(told[0].removeprefix("To go on: "))[2:])
    assert dataclasses.asdict(again) == dataclasses.asdict(plan)


# --- random numbers


def generators() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": str(np.random.get_state()), "torch": torch.get_rng_state().tolist()}  # noqa: NPY002


def dream(data: Path, model: Path, out: Path) -> None:
    env = gymnasium.make("AimeDream-v0", model=str(model), task="walk")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()


def load_an_agent(data: Path, model: Path, out: Path) -> None:
    with generators_kept():
        PPO("MlpPolicy", "Pendulum-v1", seed=3, device="cpu").save(out.with_suffix(".zip"))
    load_sb3_agent(out.with_suffix(".zip"))


ENTRIES = {
    "train": lambda data, model, out: Train((data,), out=out, **TINY).run(),
    "fit heads": lambda data, model, out: FitHeads(str(model), (data,), out, TINY["heads"], held_out=0.5).run(),
    "AIME": lambda data, model, out: aime_gym.AIME(model, data, batch_size=2, horizon=4, held_out=0.5).learn(1),
    "BC": lambda data, model, out: aime_gym.BC(model, data, batch_size=2, held_out=0.5).learn(1),
    "dream": dream,
    "random data": lambda data, model, out: Collect("pendulum", trajectories=1, out=out, workers=1).run(),
    "an agent of SB3": load_an_agent,
    "strangers": lambda data, model, out: Strangers(
        "pendulum", families=("ppo",), seeds=1, effort=1e-5, stages=(1.0,), episodes=1, out=out
    ).run(),
    "SAC's data": lambda data, model, out: Collect("pendulum", policy="sac", trajectories=1, expert=0, out=out).run(),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_callers_random_numbers_stay(name, data, model, tmp_path):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = generators()
    ENTRIES[name](data, model, tmp_path / "out")
    assert generators() == before
