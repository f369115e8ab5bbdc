"""`aime-gym pretrain`: a model from nothing in rounds, that resumes, and counts its real steps."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from math import ceil
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from aime_gym.agents.plain import POLICY
from aime_gym.agents.sb3 import load_sb3_agent
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands import pretrain as pretraining
from aime_gym.commands.ledger import Ledger, Lesson, give, publish
from aime_gym.commands.pretrain import QUICK_LOOK, Pretrain, PretrainSmall
from aime_gym.data.trajectories import count_steps, load_trajectory, trajectory_paths
from aime_gym.errors import AimeGymError
from aime_gym.files import REVISION, read_revision, weights_digest, write_json
from aime_gym.flags import HeadsOptions, TrainOptions
from aime_gym.parallel import LOCK
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.trust import load_trust

TRAIN = TrainOptions(
    **{"memory_dim": 8, "stochastic_dim": 4, "hidden_size": 8, "encoder_size": 8, "decoder_size": 8},
    **{"batch_size": 2, "horizon": 6, "updates": 3, "evaluation_windows": 3, "held_out": 0.5},
    **{"precision": "32-true", "accelerator": "cpu", "tensorboard": False},
    heads=HeadsOptions(updates=2, batch_size=2, hidden_size=8, ensemble_hidden_size=8, ensemble=2),
)


STEPS = 40
"""Agent steps of an episode of `BODY`."""
BODY = "ShortPendulum-v1"


@pytest.fixture(scope="module", autouse=True)
def body():
    gymnasium.register(BODY, "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=STEPS)
    yield
    del gymnasium.registry[BODY]


@pytest.fixture(scope="module")
def run(tmp_path_factory, body) -> Pretrain:
    """Two rounds on the cheapest body."""
    folder = tmp_path_factory.mktemp("pretrain")
    job = Pretrain(
        BODY,
        ("own",),
        **{"out": folder / "model", "work": folder / "work", "random": 2, "buffer": 0, "rounds": 2, "workers": 1},
        **{"steps": 2, "trajectories": 2, "slots": 4, "horizon": 16, "noise": (), "episodes": 1},
        **{"round_updates": 2, "round_head_updates": 2, "tolerance": 0.0},
        train=TRAIN,
    )
    dataclasses.replace(job).run()
    return job


def test_rounds_leave_a_model_with_its_ledger(run):
    model = load_pretrained_model(run.out)
    assert model.config.embodiment == BODY
    ledger = json.loads((run.work / "ledger.json").read_text())
    # random, and in both rounds: an agent and an explorer, each half trained and trained
    assert list(ledger["datasets"].values()) == [2 * STEPS, 8 * STEPS, 8 * STEPS]
    assert [len(entry["agents"]) for entry in ledger["rounds"].values()] == [2, 2]
    names = {agent["agent"] for agent in ledger["rounds"]["2"]["agents"]}
    assert names == {"own-0-end", "explore-0-end"}
    # and what all of them, each at both stages, and two without skill are worth in the end
    steps = (2 * 9 + 2 * 2 + (2 * 4 + 2) * 2) * STEPS
    card = (run.out / "README.md").read_text()
    assert f"{steps:,} real env steps are behind this model. {18 * STEPS:,} of them are data" in card
    assert card.startswith("# model\n")
    assert f"## How it was made\n\n```\naime-gym pretrain {BODY} --tasks own " in card
    assert (run.out / "rounds.png").exists()
    trust = load_trust(run.out)["own"].kin
    assert trust["policies"] == 10
    assert f"over {trust['policies']:.0f} policies" in card
    assert "round-2/explore-0-half" in card


def test_random_episodes_that_end_soon_are_more(tmp_path):
    job = Pretrain("CartPole-v1", random=3, random_steps=200, buffer=0, workers=1, work=tmp_path)
    job.tasks = ("own",)
    (folder,) = job._collect_first(get_embodiment("CartPole-v1"))
    paths = trajectory_paths(folder)
    assert len(paths) == ceil(3 * 200 / count_steps(paths[:3])) > 3


@pytest.mark.slow
def test_a_first_look_ends_with_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "QUICK_LOOK", {**QUICK_LOOK, "steps": 512, "episodes": 2, "video_steps": 0})
    PretrainSmall("CartPole-v1", random_steps=0, workers=1, train=TRAIN, quick=True).run()
    assert read_revision(Path("models") / "CartPole-v1-quick") is not None
    run = Path("runs") / "pretrain-CartPole-v1-quick"
    assert (run / "agent" / "report.html").exists()
    ledger = json.loads((run / "ledger.json").read_text())
    assert list(ledger["datasets"]) == [str(run / "datasets" / "random")]
    assert "without --quick" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("returns", "agrees"),
    [
        ({"stand": [(400, 420), (90, 100)]}, True),
        ({"stand": [(400, 420), (0, 100)]}, False),
        ({"stand": [(0, 0), (1, 0)]}, False),
        ({"stand": [(0, 0), (1, 0)], "rise": [(400, 420)]}, False),  # which says nothing of stand
        ({"stand": [(90, 80)], "rise": [(400, 420)]}, True),
    ],
)
def test_rounds_go_on_until_agents_earn_what_they_dream(tmp_path, returns, agrees):
    agents = [
        {"task": task, "agent": "some", "dream": dream, "real": real, "doubt": None}
        for task, pairs in returns.items()
        for dream, real in pairs
    ]
    (tmp_path / "ledger.json").write_text(json.dumps({"rounds": {"1": {"agents": agents, "score_steps": 1}}}))
    assert Ledger(tmp_path / "ledger.json", get_embodiment("hopper")).agrees(1, 20) is agrees


def test_each_round_trains_on_with_its_own_data(run):
    flags = [json.loads((run.work / f"round-{n}" / "model" / "run" / "train.json").read_text()) for n in (0, 1, 2)]
    assert [len(each["datasets"]) for each in flags] == [1, 2, 3]
    assert [each["updates"] for each in flags] == [3, 2, 2]
    assert flags[0]["pretrained"] is None
    assert flags[2]["pretrained"].endswith("round-1/model")


def test_it_resumes_and_the_budget_ends_it(run):
    before = {path: path.stat().st_mtime_ns for path in run.work.rglob("*.*") if path.suffix in (".npz", ".zip")}
    dataclasses.replace(run, rounds=3, budget=45 * STEPS).run()  # a third round would pass it
    after = {path: path.stat().st_mtime_ns for path in run.work.rglob("*.*") if path.suffix in (".npz", ".zip")}
    assert after == before
    removed = trajectory_paths(run.work / "round-2" / "datasets" / "own-0-end")[0]
    removed.unlink()
    dataclasses.replace(run).run()
    assert removed.exists()


def test_the_model_may_lie_in_the_folder_of_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held: list[bool] = []
    monkeypatch.setattr(Pretrain, "_run_stages", lambda job: held.append((job.work / LOCK).exists()))
    Pretrain("pendulum", out=tmp_path / "one", work=Path("one"), train=TRAIN).run()
    assert held == [True]
    assert not (tmp_path / "one").exists()


def test_other_flags_are_refused(run):
    with pytest.raises(AimeGymError, match="steps: 2 there, 4 now"):
        dataclasses.replace(run, steps=4).run()
    with pytest.raises(AimeGymError, match="Did you mean 'own'"):
        dataclasses.replace(run, tasks=("owm",)).run()
    with pytest.raises(AimeGymError, match="--trajectories starts at 1"):
        dataclasses.replace(run, trajectories=0).run()
    with pytest.raises(AimeGymError, match="one is held out"):
        dataclasses.replace(run, buffer=4, expert=1).run()


@pytest.mark.parametrize("inside", ["round-0/model", "round-2", "datasets"])
def test_a_model_is_not_written_where_those_of_the_rounds_are(tmp_path, inside):
    job = Pretrain("pendulum", work=tmp_path / "work", out=tmp_path / "work" / inside, train=TRAIN)
    with pytest.raises(AimeGymError, match=r"--out .* lies among what --work .*: choose another folder"):
        job.run()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "--slots starts at 1"),
        ({"minutes": 0.0}, "--minutes is more than 0"),
        ({"horizon": 2}, "--horizon starts at 4"),
        ({"noise": (0.3, -0.3)}, "--noise starts at 0"),
        ({"train": dataclasses.replace(TRAIN, horizon=600)}, "episodes of pendulum have 500 steps"),
        ({"train": dataclasses.replace(TRAIN, grad_clip=-1.0)}, "--grad-clip is more than 0"),
        ({"train": dataclasses.replace(TRAIN, min_std=-1.0)}, "--min-std starts at 0"),
    ],
)
def test_what_later_stages_would_refuse_is_refused_at_once(tmp_path, options, message):
    with pytest.raises(AimeGymError, match=message):
        Pretrain("pendulum", **{"out": tmp_path / "model", "work": tmp_path / "work", "train": TRAIN} | options).run()
    assert not (tmp_path / "work").exists()


def test_a_sparse_body_is_led_by_its_guiding_task(tmp_path):
    job = Pretrain(
        "pendulum",
        **{"out": tmp_path / "model", "work": tmp_path / "work", "random": 2, "buffer": 2, "workers": 1},
        **{"expert": 2, "stray": 2, "noise": (), "rounds": 0, "episodes": 1},
        train=TRAIN,
    )
    job.run()
    # SAC learns the task and the one that guides to it; both have rewards, and are what dreams are measured by
    kinds = [f"{task}-{kind}" for task in ("lift", "swingup") for kind in ("buffer", "expert", "stray")]
    expected = sorted(["random", *kinds])
    assert sorted(path.name for path in (job.work / "datasets").iterdir()) == expected
    assert set(load_pretrained_model(job.out).heads.tasks) == set(load_trust(job.out)) == {"swingup", "lift"}


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("body", ["quadruped", "humanoid"])
def test_large_bodies_take_the_same_command(tmp_path, body, rounds):
    job = Pretrain(
        body,
        **{"out": tmp_path / "model", "work": tmp_path / "work", "random": 2, "buffer": 0, "workers": 1},
        **{"rounds": rounds, "steps": 2, "trajectories": 1, "slots": 4, "horizon": 16, "noise": (), "episodes": 1},
        **{"round_updates": 2, "round_head_updates": 2, "tolerance": 0.0, "explorers": 0},
        train=TRAIN,
    )
    job.run()
    with pytest.warns(match="Do not trust"):
        dream = gymnasium.make(f"AimeDream-{body.title()}-v0", model=str(job.out), start="dataset")
    dream.reset(seed=0)
    assert np.isfinite(dream.step(dream.action_space.sample())[0]).all()


@pytest.mark.slow
def test_agents_of_a_model_of_images_learn_on_its_latents(tmp_path, gl):
    job = Pretrain(
        "cartpole",
        **{"tasks": ("balance",), "out": tmp_path / "model", "work": tmp_path / "work", "random": 2, "buffer": 0},
        **{"rounds": 1, "steps": 2, "trajectories": 1, "slots": 4, "horizon": 16, "noise": (), "episodes": 1},
        **{"round_updates": 2, "round_head_updates": 2, "tolerance": 0.0, "explorers": 0, "workers": 1},
        train=dataclasses.replace(TRAIN, setup="visual", image_width=4),
    )
    job.run()
    model = load_pretrained_model(job.out)
    assert model.observed == ("image",)
    agent = load_sb3_agent(job.work / "round-1" / "balance-0-end.zip")
    assert agent.observation_space.shape == (model.config.feature_dim,)
    trajectory = load_trajectory(trajectory_paths(job.work / "round-1" / "round-1")[0], images=True)
    assert trajectory["image"].shape == (126, 64, 64, 3)


def test_agents_of_a_task_with_a_dash_learn_and_act_at_it(tmp_path, monkeypatch):
    job = Pretrain("cheetah", ("flip-v1",), work=tmp_path, trajectories=1)
    folder, acted, learned = tmp_path / "round-1", [], []
    folder.mkdir()
    for name in ("flip-v1-0-half", "flip-v1-0-end", "explore-0-end"):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            archive.writestr(POLICY, b"")  # what tells that opening it runs nothing
    monkeypatch.setattr(pretraining, "run_in_parallel", lambda work, jobs, *rest: acted.extend(jobs.values()))
    monkeypatch.setattr(pretraining.Mix, "run", lambda mix: None)
    job._run_agents(folder, "cheetah-state")
    assert {collect.task for collect in acted} == {"flip-v1"}

    class Done(Exception):
        pass

    def learn_at(env_id, task, **kwargs):
        learned.append(task)
        raise Done

    monkeypatch.setattr("aime_gym.envs.sb3.make_sb3_env", learn_at)
    for name in ("flip-v1-0", "explore-0"):
        with pytest.raises(Done):
            give(Lesson(job, folder, name, "cheetah-state", 0, None))
    assert learned == ["flip-v1", "flip-v1"]


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        ("pendulum", {"base": "no-such-model"}, "no-such-model"),
        ("pendulum", {"base": "walker-state"}, "of another architecture"),
        ("pendulum", {"datasets": ("no-such-data",)}, "no data set folder no-such-data"),
        ("Pendulum-v1", {"train": dataclasses.replace(TRAIN, setup="visual")}, "what Pendulum-v1 shows has no image"),
    ],
)
def test_what_later_stages_would_refuse_is_refused_before_a_step(body, options, message, tmp_path):
    with pytest.raises(AimeGymError, match=message):
        Pretrain(body, out=tmp_path / "model", work=tmp_path / "work", **{"train": TRAIN, **options}).run()
    assert not list(tmp_path.iterdir())


def test_neither_locks_nor_what_killed_writes_left_are_published(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text("# model\n\n## How it was made\n\n```\naime-gym train data\n```\n")
    for name in ("config.yaml", ".config.yaml.12.tmp", LOCK):
        (model / name).touch()
    ledger = Ledger(tmp_path / "ledger.json", get_embodiment("walker"))
    publish(model, tmp_path / "out", ledger, [], "aime-gym pretrain walker")
    assert read_revision(tmp_path / "out").number == 1
    (model / "config.yaml").write_text("other: weights")
    write_json(model / REVISION, {"revision": 1, "digest": weights_digest(model)})
    publish(model, tmp_path / "out", ledger, [], "aime-gym pretrain walker")
    assert read_revision(tmp_path / "out").number == 2, "the folder that is published to counts, not the work folder"
    assert {"config.yaml", "README.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not list((tmp_path / "out").glob(".*"))
    assert "```\naime-gym pretrain walker\n```" in (tmp_path / "out" / "README.md").read_text()
