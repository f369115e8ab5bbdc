"""Both worlds together on a tiny untrained model: comparisons, the report and the main job, end to end."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from rich.console import Console
from stable_baselines3 import PPO

import aime_gym
from aime_gym.agents import dreaming
from aime_gym.agents.dreaming import kept
from aime_gym.agents.shac import SHAC
from aime_gym.commands.compare import Compare
from aime_gym.commands.dream import Dream
from aime_gym.envs.sb3 import DreamVecEnv
from aime_gym.errors import AimeGymError, Terminated
from aime_gym.evaluation.both_worlds import PARTING_ERROR, Replay, replay
from aime_gym.evaluation.compare import Comparison, PolicyReturns, compare
from aime_gym.evaluation.report import write_report
from aime_gym.evaluation.returns import Episodes, name_policies
from aime_gym.evaluation.worlds import Worlds
from aime_gym.files import weights_digest
from aime_gym.parallel import claimed
from aime_gym.world_model.checkpoint import PRETRAINED
from aime_gym.world_model.trust import load_trust
from tests.tiny_model import make_tiny_model

STEPS = 15


def wave(observation: np.ndarray) -> np.ndarray:
    return np.sin(3 * observation[:, :6])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def worlds(model):
    worlds = Worlds("walker", "walk", model, max_episode_steps=STEPS)
    yield worlds
    worlds.close()


@pytest.fixture(scope="module")
def walker_agent(tmp_path_factory):
    agent = PPO("MlpPolicy", gym.make("AimeReal-Walker-v0"), device="cpu", seed=0)
    path = tmp_path_factory.mktemp("agents") / "agent.zip"
    agent.save(path)
    return path


# Paired starts


def test_real_episodes_begin_where_the_dream_does(worlds):
    starts = worlds.draw_starts(3, seed=4)
    assert len({*starts}) == 3
    np.testing.assert_array_equal(starts, worlds.draw_starts(3, seed=4))
    assert worlds.draw_starts(1, seed=4)[0] == starts[0]
    real = worlds.real_envs(3)
    observation, _ = real.reset(seed=[0, 1, 2], options=worlds.real_starts(starts))
    bank = aime_gym.load_pretrained_model(worlds.model.folder)
    with np.load(bank.folder / "starts.npz") as file:
        assert file["is_reset"][starts].all()
        filtered = np.concatenate([file[sensor.name][-1] for sensor in worlds.embodiment.sensors], axis=-1)
    np.testing.assert_allclose(observation, filtered[starts], atol=1e-5)
    real.close()


def test_more_episodes_than_starts_use_every_start_equally(worlds):
    drawn = worlds.draw_starts(13)
    counts = np.unique(drawn, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_dream_returns_do_not_depend_on_the_number_of_slots(worlds):
    from aime_gym.evaluation.returns import episode_returns

    starts = worlds.draw_starts(4)
    wide, narrow = worlds.dream_envs(4), worlds.dream_envs(1)
    np.testing.assert_allclose(
        episode_returns(wave, wide, seed=[3, 4, 5, 6], starts={"start": starts}).returns,
        episode_returns(wave, narrow, seed=[3, 4, 5, 6], starts={"start": starts}).returns,
        rtol=1e-4,
    )


# compare


def test_compare_is_seeded_and_tells_policies_apart(model, walker_agent):
    kwargs = {"task": "walk", "model": model, "episodes": 3, "max_episode_steps": STEPS}
    policies = {"wave": wave, "random": "random", "zero": "zero", "agent": str(walker_agent)}
    result = compare(policies, **kwargs)
    assert [policy.name for policy in result.policies] == list(policies)
    assert result.to_dict() == compare(policies, **kwargs).to_dict()
    assert result.model_digest == weights_digest(model)
    assert result.to_dict() != compare(policies, **kwargs, seed=1).to_dict()
    assert len({policy.real.mean for policy in result.policies}) == 4
    assert all(policy.doubt is not None and policy.doubt > 0 for policy in result.policies)
    assert result.metrics["mean_absolute_error"] == pytest.approx(np.mean([abs(p.gap) for p in result.policies]))
    assert (result.embodiment, result.task, result.model) == ("walker", "walk", "tiny")
    alone = aime_gym.compare(wave, "Walker", **kwargs)
    assert alone.policies[0].real.returns.tolist() == result.policies[0].real.returns.tolist()


def test_an_agent_on_latents_sees_the_estimate_of_the_real_state(model):
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=2, obs_type="latent", model=model, max_episode_steps=8)
    agent = PPO("MlpPolicy", envs, n_steps=4, batch_size=8, device="cpu", seed=0).learn(8)
    compared = compare(agent, model=model, episodes=2, max_episode_steps=STEPS)
    with Worlds("walker", "walk", model, "latent", STEPS) as worlds:
        starts = worlds.draw_starts(2)
        world = aime_gym.LatentObservation(gym.make("AimeReal-Walker-v0", max_episode_steps=STEPS), worlds.model)
        for episode, physics in enumerate(worlds.real_starts(starts)["physics"]):
            observation, _ = world.reset(seed=episode, options={"physics": physics})
            total, ended = 0.0, False
            while not ended:
                action = agent.predict(observation, deterministic=True)[0]
                observation, reward, _, ended, _ = world.step(action)
                total += float(reward)
            assert compared.policies[0].real.returns[episode] == pytest.approx(total, rel=1e-4)


def test_compare_rejects_what_does_not_fit(model, walker_agent, tmp_path):
    kwargs = {"model": model, "episodes": 1, "max_episode_steps": 2}
    cheetah = PPO("MlpPolicy", gym.make("AimeReal-Cheetah-v0"), device="cpu")
    with pytest.raises(AimeGymError, match="another body"):
        compare({"cheetah": cheetah}, **kwargs)
    with pytest.raises(AimeGymError, match=r"no agent nowhere\.zip"):
        compare("nowhere.zip", **kwargs)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(walker_agent.read_bytes()[:1000])
    with pytest.raises(AimeGymError, match=r"broken\.zip"):
        compare(broken, **kwargs)
    with pytest.raises(AimeGymError, match="at least one policy"):
        compare([], **kwargs)
    with pytest.raises(AimeGymError, match="walk"):
        compare(wave, task="wlak", **kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"episodes": episodes}, "episodes is a positive integer") for episodes in (0, 1.5, None)],
        *[({"seed": seed}, "seed is an integer, 0 or more") for seed in (-1, None, 0.5)],
        *[({"max_episode_steps": steps}, "max_episode_steps is a positive integer") for steps in (0, -1, 2.5)],
    ],
)
def test_compare_counts_in_whole_numbers(model, options, message):
    with pytest.raises(AimeGymError, match=message):
        compare("random", **{"model": model, "episodes": 1, "max_episode_steps": 2} | options)


def test_policies_get_names_of_their_own():
    assert list(name_policies([wave, wave, "random", "runs/a/agent.zip"])) == [
        "wave",
        "wave #2",
        "random",
        "runs/a/agent.zip",
    ]


def test_tables_break_no_words_at_80_columns():
    rng = np.random.default_rng(0)

    def episodes(mean: float) -> Episodes:
        return Episodes(mean + 90 * rng.standard_normal(5), np.full(5, 200), np.full(5, 12.3))

    names = ("SHAC from the dream", "random")
    policies = tuple(PolicyReturns(name, episodes(-1260), episodes(-1440)) for name in names)
    comparison = Comparison("Pendulum-v1", "own", "Pendulum-v1-state", 0, 200, policies, 1.0)
    text = io.StringIO()
    Console(file=text, width=80).print(comparison.table())
    words = {word for line in text.getvalue().splitlines() for word in line.split()}
    assert {"policy", "SHAC", "from", "dream", "random", "doubt", "12.3"} <= words
    assert max(map(len, text.getvalue().splitlines())) <= 80
    for policy in policies:
        low, high = policy.real.interval
        assert f"{policy.real.mean:.0f} [{low:.0f}, {high:.0f}]" in text.getvalue()


# Replay


def test_a_replay_dreams_the_real_actions_from_the_same_start(worlds):
    seen = replay(wave, worlds, seed=2, dreams=3)
    assert seen.real["velocity"].shape == (STEPS, 9)
    assert seen.dream["velocity"].shape == (STEPS, 3, 9)
    dream, real = worlds.evaluate(wave, episodes=1, seed=2)
    assert seen.real_rewards.sum() == pytest.approx(real.returns[0])
    # The same actions by hand, in a dream of one slot with the first dream's seed.
    envs = worlds.dream_envs(1)
    observation, _ = envs.reset(seed=[2], options={"start": worlds.draw_starts(1, 2)})
    actions = wave(np.concatenate([seen.real[s.name] for s in worlds.embodiment.sensors], axis=-1))
    for step in range(STEPS):
        np.testing.assert_allclose(observation[0, :14], seen.dream["orientations"][step, 0], atol=1e-5)
        observation, reward, *_ = envs.step(actions[step, None].astype(np.float32))
        np.testing.assert_allclose(reward[0], seen.dream_rewards[step, 0], atol=1e-5)
    envs.close()
    assert dream.returns.shape == (1,)


def test_parting_is_the_first_step_beyond_the_threshold():
    steps = np.arange(10, dtype=float)
    seen = Replay(
        real={"near": np.zeros((10, 1), np.float32), "far": np.zeros((10, 2), np.float32)},
        dream={"near": np.full((10, 2, 1), 0.1), "far": np.tile(steps[:, None, None], (1, 2, 2))},  # type: ignore[dict-item]
        real_rewards=np.zeros(10),
        dream_rewards=np.zeros((10, 2)),
        scale={"near": np.ones(1, np.float32), "far": np.full(2, 5.0, np.float32)},
        seconds=0.05,
    )
    np.testing.assert_allclose(seen.errors["far"], steps / 5)
    assert seen.parting("far") == 3 == int(np.flatnonzero(steps / 5 > PARTING_ERROR)[0])
    assert seen.parting("near") is None
    assert "part at step 3 (0.15 s): far" in seen.verdict
    assert "near never" in seen.verdict


# Report


def links(page: str) -> list[str]:
    """Everything that a browser would load."""
    found = re.findall(r"""(?:src|href|xlink:href)\s*=\s*["']([^"']*)["']|url\(["']?([^"')]*)""", page)
    return [link for pair in found for link in pair if link and not link.startswith("#")]


def test_the_report_needs_no_network(worlds, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    comparison = compare({"<wave>": wave}, model=model, episodes=2, max_episode_steps=STEPS)
    curve = [{"steps": 100.0 * i, "seconds": 1.0 * i, "return": 10.0 * i} for i in range(1, 5)]
    path = write_report(tmp_path / "report.html", comparison, wave, "<wave>", worlds, curve, {"algo": "ppo"})
    page = path.read_text()
    assert links(page) == []
    assert "<script" not in page
    assert comparison.verdict in page
    assert "&lt;wave&gt;" in page
    assert "<wave>" not in page
    assert page.count("<svg") == 2 + 2 + 3  # returns, learning, rewards, errors and a panel for each sensor
    assert "No video: Rendering is switched off" in page
    assert "Under the same actions" in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_report_shows_a_film_where_there_is_gl(worlds, model, tmp_path):
    try:
        gym.make("AimeReal-Walker-v0", render_mode="rgb_array").reset()[0]
        from aime_gym.evaluation.both_worlds import side_by_side

        film = side_by_side(wave, worlds, steps=4)
    except AimeGymError as error:
        pytest.skip(str(error))
    import imageio.v3 as imageio

    path = tmp_path / "film.mp4"
    path.write_bytes(film)
    frames = imageio.imread(path, plugin="FFMPEG")
    assert len(frames) == 4
    assert frames[0].shape[1] == 640
    left, right = frames[0][32:, :320], frames[0][32:, 320:]
    assert left.std() > 5
    assert right.std() > 5


# The main job


def test_the_dream_job_end_to_end(model, tmp_path, capsys):
    out = tmp_path / "run"
    job = Dream(
        **{"model": str(model), "steps": 600, "slots": 8, "horizon": 20, "trials": 2, "trial_every": 200},
        **{"episodes": 2, "max_episode_steps": STEPS, "video_steps": 0, "out": out},
    )
    job.run()
    assert sorted(path.name for path in out.iterdir()) == [
        *("agent.zip", "job.json", "newest-agent.zip", "report.html", "returns.json"),
    ]
    told = capsys.readouterr().out
    assert "SHAC from the dream" in told
    assert "8 real episodes chose the agent: 3 trials, and random actions" in told
    page = (out / "report.html").read_text()
    written = json.loads((out / "job.json").read_text())
    assert written["verdict"] in told
    assert f"<h1>{written['verdict']}</h1>" in page
    assert (written["real_episodes"], written["ended"], written["chosen_by"]) == (8, "steps", "real episodes")
    assert "8 real episodes chose the agent" in page
    assert written["outcome"] != "learned"
    longer = 2 * written["steps"]
    assert f"Train longer: aime-gym dream --model {model} --steps {longer} --slots 8 --horizon 20 " in told
    best = kept([point for point in written["curve"] if "real" in point])
    assert f"; the agent after {best['steps']:,} of them was kept, whose trial earned {best['real']:.0f}" in told
    assert "Train longer: aime-gym dream" in page
    saved = Comparison.from_json(out / "returns.json")
    assert saved.policies[0].name == "SHAC from the dream"
    assert saved.episodes == 2
    agent = SHAC.load(out / "agent.zip")  # like any of SB3's, in the real world
    observation, _ = gym.make("AimeReal-Walker-v0").reset(seed=0)
    assert agent.predict(observation)[0].shape == (6,)
    again = compare(out, model=model, episodes=2, max_episode_steps=STEPS)
    assert again.policies[0].real.returns.tolist() == saved.policies[0].real.returns.tolist()
    assert written["curve"][-1]["steps"] >= 600
    assert "How the agent learned" in page
    replace(job, out=tmp_path / "again").run()
    assert (tmp_path / "again" / "returns.json").read_bytes() == (out / "returns.json").read_bytes()


def test_the_dream_job_goes_on_and_refuses_the_folder_of_another(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aime_gym.evaluation.report.write_report", lambda *args, **kwargs: None)  # the costly part
    begun, reset = [], DreamVecEnv.reset

    def watched(envs):
        observations = reset(envs)
        if envs.num_envs == 8:
            begun.append(observations.copy())
        return observations

    monkeypatch.setattr(DreamVecEnv, "reset", watched)
    job = Dream(
        **{"model": str(model), "slots": 8, "horizon": 20, "trials": 2, "trial_every": 10**6, "episodes": 1},
        **{"max_episode_steps": 5, "video_steps": 0, "out": tmp_path / "run"},
    )
    replace(job, steps=320).run()
    begins = "SHAC learns walker walk in 8 dreams of tiny: at most 320 steps or 120 minutes. Ctrl-C ends it early.\n"
    assert capsys.readouterr().out.startswith(begins)
    told = json.loads((tmp_path / "run" / "job.json").read_text())
    assert (told["trials"], told["real_episodes"]) == (1, 4)
    replace(job, steps=640).run()
    assert (
        "SHAC goes on from 320 steps to learn walker walk in 8 dreams of tiny: at most 640 steps"
        in capsys.readouterr().out
    )
    more = json.loads((tmp_path / "run" / "job.json").read_text())
    assert more["steps"] == 640
    assert len(begun) == 2
    assert not np.array_equal(*begun)  # other dreams than those that it began with
    assert (more["trials"], more["real_episodes"]) == (2, 6)
    assert more["curve"][: len(told["curve"])] == told["curve"]
    assert [point["steps"] for point in more["curve"] if "real" in point] == [320, 640]
    replace(job, steps=640).run()  # once more, when there is nothing left to learn
    assert json.loads((tmp_path / "run" / "job.json").read_text())["curve"] == more["curve"]
    (tmp_path / "run" / "job.json").write_text(json.dumps({"settings": more["settings"]}))  # killed before it told more
    replace(job, steps=650, trials=0).run()
    assert "goes on from 640 steps" in capsys.readouterr().out
    seconds = [point["seconds"] for point in more["curve"]]
    assert seconds == sorted(seconds)
    agent = (tmp_path / "run" / "agent.zip").read_bytes()
    for other in ({"task": "run"}, {"seed": 1}, {"algo": "sac"}):
        with pytest.raises(AimeGymError, match="holds a run with other flags"):
            replace(job, **other).run()
    assert (tmp_path / "run" / "agent.zip").read_bytes() == agent


def test_the_dream_job_changes_its_judge(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aime_gym.evaluation.report.write_report", lambda *args, **kwargs: None)
    returns = iter([7.0, 7.0, 5.0])  # of random actions, of the agent in the world, and of the one after its dream
    monkeypatch.setattr(dreaming, "evaluate_policy", lambda *args, **kwargs: ([next(returns)], [5]))
    out = tmp_path / "run"
    job = Dream(
        **{"model": str(model), "slots": 8, "horizon": 20, "trial_every": 10**6, "episodes": 1},
        **{"max_episode_steps": 5, "video_steps": 0, "out": out},
    )
    replace(job, steps=256, trials=1).run()
    capsys.readouterr()
    replace(job, steps=512, trials=0).run()
    assert "no real episode chose the agent" in (told := capsys.readouterr().out)
    assert "(earlier ones asked 2 real episodes)" in told
    assert SHAC.load(out / "agent.zip").num_timesteps == 512
    replace(job, steps=768, trials=1).run()
    assert "goes on from 512 steps" in capsys.readouterr().out
    told = json.loads((out / "job.json").read_text())
    assert [point["steps"] for point in told["curve"]] == sorted(point["steps"] for point in told["curve"])
    assert (told["steps"], told["trials"], told["real_episodes"]) == (768, 3, 3)
    # The agent that earned 7 was given up when the dream was asked.
    assert SHAC.load(out / "agent.zip").num_timesteps == 768


def test_the_dream_alone_chooses_the_agent(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aime_gym.evaluation.report._replay_section", lambda *args: "")  # the costly part
    out = tmp_path / "run"
    job = Dream(
        **{"model": str(model), "slots": 8, "horizon": 20, "trials": 0, "trial_every": 160, "episodes": 2},
        **{"max_episode_steps": 5, "video_steps": 0, "out": out},
    )

    def made(*args, **keywords):
        raise ConnectionError("a real env was made")

    with monkeypatch.context() as patch:
        patch.setattr("aime_gym.envs.real.RealEnv.__init__", made)
        with pytest.raises(ConnectionError):  # of the evaluation
            replace(job, steps=320).run()
    assert "Evaluating 2 episodes" in capsys.readouterr().out
    first = json.loads((out / "job.json").read_text())
    assert (first["ended"], first["chosen_by"], first["real_episodes"]) == ("steps", "the dream alone", 0)
    assert [point["steps"] for point in first["curve"] if "low" in point] == [160, 320]
    replace(job, steps=640).run()
    told = capsys.readouterr().out
    assert "goes on from 320 steps" in told
    second = json.loads((out / "job.json").read_text())
    assert second["curve"][: len(first["curve"])] == first["curve"]
    trials = [point for point in second["curve"] if "low" in point]
    assert [point["steps"] for point in trials] == [160, 320, 480, 640]
    assert (second["trials"], second["real_episodes"]) == (4, 0)
    best = max(trials, key=lambda trial: (trial["low"], trial["predicted"]))
    assert SHAC.load(out / "agent.zip").num_timesteps == best["steps"]
    assert SHAC.load(out / "newest-agent.zip").num_timesteps == 640
    chosen = "no real episode chose the agent: the lower end of the return that the dream predicts did, in 4 trials."
    page = (out / "report.html").read_text()
    assert chosen in told
    assert chosen in page
    assert f"; the agent after {best['steps']:,} of them was kept, for which the dream predicts" in told
    assert "which chose the agent: no real episode did" in page
    assert Comparison.from_json(out / "returns.json").policies[0].name == "SHAC from the dream alone"
    task = second["settings"]["task"]
    whole = aime_gym.predict_return(out, model=model, task=task, episodes=16, seed=1_000_000)
    assert (best["low"], best["high"]) == whole.interval


def test_a_curve_on_record_is_taken_up_or_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("aime_gym.evaluation.report.write_report", lambda *args, **kwargs: None)
    curve = [{"steps": 8, "seconds": 1.0, "return": np.nan, "length": 20.0}]
    monkeypatch.setattr(dreaming, "learn", lambda *args, **kwargs: dreaming.Lesson("steps", curve))
    job = Dream(
        **{"model": str(model), "steps": 8, "slots": 8, "trials": 1, "episodes": 1, "max_episode_steps": 5},
        **{"video_steps": 0, "out": tmp_path / "run"},
    )
    job.run()
    path = tmp_path / "run" / "job.json"
    written = json.loads(path.read_text())
    assert written["curve"] == [{"steps": 8, "seconds": 1.0, "length": 20.0}]
    job.run()  # which takes that up
    real, low = {"real": 2.0}, {"beats_random": 1, "low": 2.0}
    for partial in (real, real | {"episodes": 1}, {"beats_random": True}, low, low | {"predicted": 3.0}):
        path.write_text(json.dumps(written | {"curve": [{"steps": 8, "seconds": 1.0, **partial}]}))
        with pytest.raises(AimeGymError, match="does not hold what became of a run"):
            job.run()


@pytest.mark.parametrize(("given", "used"), [(0, 0), (30, 30), (240, 40)])
def test_quick_limits_what_was_asked_for_and_adds_nothing(tmp_path, given, used):
    job = Dream(model="nowhere", video_steps=given, trials=given, patience=None, quick=True, out=tmp_path / "run")
    with pytest.raises(AimeGymError, match="nowhere"):
        job.run()
    assert (job.video_steps, job.trials, job.patience) == (used, min(given, 3), 3)


def test_the_dream_job_has_its_folder_to_itself(model, tmp_path):
    job = Dream(model=str(model), steps=10**9, out=tmp_path / "run")
    with claimed(tmp_path / "run"), pytest.raises(AimeGymError, match="is being written to by another call"):
        job.run()
    file = tmp_path / "file"
    file.write_text("a letter")
    with pytest.raises(AimeGymError, match="Expected a folder to write to"):
        replace(job, out=file).run()
    assert file.read_text() == "a letter"


def test_the_dream_job_closes_its_envs(model, tmp_path, monkeypatch):
    from stable_baselines3.common.vec_env import DummyVecEnv

    made, closed = [], []
    for kind in (DummyVecEnv, DreamVecEnv):
        begin, close = kind.__init__, kind.close
        monkeypatch.setattr(kind, "__init__", lambda self, *a, begin=begin: (made.append(self), begin(self, *a))[1])
        monkeypatch.setattr(kind, "close", lambda self, close=close: (closed.append(self), close(self))[1])
    Dream(
        **{"model": str(model), "steps": 64, "slots": 8, "horizon": 20, "trials": 1, "episodes": 1},
        **{"max_episode_steps": 5, "video_steps": 0, "out": tmp_path / "run"},
    ).run()
    assert len(made) == 2
    assert {id(one) for one in made} == {id(one) for one in closed}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_keeps_what_was_learned(model, tmp_path):
    out = tmp_path / "run"
    flags = ["--model", str(model), "--slots", "8", "--horizon", "20", "--trial-every", "1000000000"]
    command = [sys.executable, "-m", "aime_gym", "dream", *flags, "--steps", "1000000000", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "steps or" in line or "at most" in line:
                break
        deadline = time.monotonic() + 60
        while not (out / "job.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(3.0)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"--out {out}" in told.replace("\n", "")
    newest = SHAC.load(out / "newest-agent.zip")
    assert newest.num_timesteps > 0
    assert SHAC.load(out / "agent.zip").num_timesteps == newest.num_timesteps
    written = json.loads((out / "job.json").read_text())
    assert (written["ended"], written["steps"]) == ("terminated", newest.num_timesteps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps starts at 1; got 0"),
        ({"episodes": 0}, "--episodes starts at 1; got 0"),
        ({"threads": 0}, "--threads starts at 1; got 0"),
        ({"trials": -1}, "--trials starts at 0; got -1"),
        ({"trial_every": 0}, "--trial-every starts at 1; got 0"),
        ({"seed": -1}, "--seed starts at 0; got -1"),
        ({"minutes": 0.0}, "--minutes is more than 0; got 0"),
    ],
)
def test_the_dream_job_refuses_numbers_at_the_start(tmp_path, options, message):
    with pytest.raises(AimeGymError, match=message):
        Dream(model="nowhere", out=tmp_path / "run", **options).run()
    assert not (tmp_path / "run").exists()


def test_ctrl_c_keeps_the_agent_and_still_reports(model, tmp_path, monkeypatch):
    from aime_gym.agents import dreaming

    steps = dreaming._Progress._on_step

    def interrupted(self):
        if self.num_timesteps >= 80:
            raise KeyboardInterrupt
        return steps(self)

    monkeypatch.setattr(dreaming._Progress, "_on_step", interrupted)
    out = tmp_path / "run"
    job = Dream(
        model=str(model), steps=10_000, slots=8, horizon=20, episodes=1, max_episode_steps=5, video_steps=0, out=out
    )
    job.run()
    assert (out / "report.html").exists()
    assert SHAC.load(out / "agent.zip").num_timesteps == 80


@pytest.mark.parametrize(("way", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interrupted_evaluation_says_what_is_kept_and_how_to_go_on(
    model, tmp_path, monkeypatch, capsys, way, raised
):
    out = tmp_path / "run"
    flags = {"steps": 160, "slots": 8, "horizon": 20, "trials": 0, "episodes": 1, "max_episode_steps": 5}
    job = Dream(model=str(model), video_steps=0, quick=True, out=out, tensorboard=True, **flags)

    def interrupted(*args, **options):
        signal.raise_signal(way)

    with monkeypatch.context() as patch:
        patch.setattr("aime_gym.evaluation.compare.compare", interrupted)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
        try:
            with pytest.raises(raised):
                job.run()
        finally:
            signal.signal(signal.SIGINT, before)
    assert [*(out / "tensorboard").glob("events.out.tfevents.*")]
    job.tensorboard = False  # which a run that goes on may change
    told = capsys.readouterr().out
    assert f"The agent is in {out}, without its evaluation; to go on: aime-gym dream --model {model}" in told
    assert f"--tensorboard --out {out} --quick" in told
    monkeypatch.setattr("aime_gym.evaluation.report.write_report", lambda *args, **kwargs: None)  # the costly part
    job.run()
    told = capsys.readouterr().out
    assert "It learned in the dream for 160 steps, all that it was given; the agent after 160 of them was kept" in told
    assert f"Train longer, without the limits of --quick: aime-gym dream --model {model}" in told
    assert told.count("--quick") == 1


@pytest.mark.parametrize("algo", ["sac", pytest.param("td3", marks=pytest.mark.slow)])
def test_the_time_limit_ends_the_training_and_says_so(model, tmp_path, algo, capsys):
    out = tmp_path / "run"
    job = Dream(
        algo=algo,
        **{"model": str(model), "steps": 10**7, "minutes": 0.02, "slots": 4, "out": out},
        **{"episodes": 1, "max_episode_steps": 5, "video_steps": 0, "max_doubt": 100.0},
    )
    job.run()
    told = json.loads((out / "job.json").read_text())
    assert told["ended"] == "minutes"
    assert 0 < told["curve"][-1]["steps"] < 10**5
    assert "cut by --minutes, so that the agent depends on the speed of the machine" in capsys.readouterr().out


def test_the_compare_command(model, walker_agent, tmp_path, capsys):
    out = tmp_path / "compared"
    own = shutil.copytree(model, tmp_path / "model")
    command = Compare(
        (str(walker_agent), "random", "zero"),
        **{"episodes": 2, "model": str(own), "max_episode_steps": STEPS, "out": out, "video_steps": 0},
    )
    command.run()
    with pytest.raises(AimeGymError, match="5 policies or more; got 3 policies and --max-episode-steps"):
        dataclasses.replace(command, trust=True).run()
    with pytest.raises(AimeGymError, match="a folder of your own"):
        dataclasses.replace(command, trust=True, model=None).run()
    assert load_trust(own) == {}
    assert "random" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "returns.json"]
    assert links((out / "report.html").read_text()) == []


def test_the_compare_command_overwrites_nothing_but_its_own(model, tmp_path):
    command = Compare(
        ("zero",), episodes=1, model=str(model), max_episode_steps=2, video_steps=0, out=tmp_path / "compared"
    )
    command.run()
    command.run()
    before = (tmp_path / "compared" / "returns.json").read_bytes()
    with pytest.raises(AimeGymError, match=r"a comparison at walker walk, this one is at walker run"):
        replace(command, task="run").run()
    assert (tmp_path / "compared" / "returns.json").read_bytes() == before
    (tmp_path / "dreamt").mkdir()
    (tmp_path / "dreamt" / "job.json").write_text("{}")
    with pytest.raises(AimeGymError, match="choose another --out"):
        replace(command, out=tmp_path / "dreamt").run()


def test_what_dreams_are_worth_is_kept_beside_the_model(tmp_path):
    own = shutil.copytree(PRETRAINED / "pendulum-state", tmp_path / "model")
    before = load_trust(own)
    Compare(
        ("random", "zero", "random", "zero", "random"),
        **{"embodiment": "pendulum", "task": "lift", "episodes": 1, "model": str(own), "out": tmp_path / "compared"},
        **{"video_steps": 0, "trust": True},
    ).run()
    assert load_trust(own)["lift"].kin["policies"] == 5
    assert load_trust(own)["swingup"] == before["swingup"]


def test_importing_the_commands_costs_neither_torch_nor_sb3():
    code = (
        "import sys, aime_gym.commands.compare, aime_gym.commands.dream; "
        "assert not {'torch', 'stable_baselines3', 'matplotlib'} & {*sys.modules}, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
