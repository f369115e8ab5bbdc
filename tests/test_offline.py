"""The offline benchmark, tiny: sets, a model, an agent of its dreams, and real scores beside a clone."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

from aime_gym import Train
from aime_gym.commands.dream import Dream
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import load_trajectory
from aime_gym.files import read_json
from benchmarks.offline import Log, Offline
from tests.test_logged import TINY


def test_a_log_is_what_was_done(tmp_path):
    world = Log(gym.make("InvertedPendulum-v5"))
    for seed in range(2):
        world.reset(seed=seed)
        over = False
        while not over:
            _, _, terminated, truncated, _ = world.step(np.array([3.0], np.float32))
            over = terminated or truncated
    world.reset(seed=2)  # an episode of no step is none, nor is one between others
    other = Log(gym.make("InvertedPendulum-v5"))
    other.reset(seed=3)
    other.step(np.zeros(1, np.float32))
    world.extend(other)
    folder = world.write(tmp_path / "pushed", "pushed")
    trajectory = load_trajectory(folder / "0.npz")
    assert trajectory["pre_action"][1:].tolist() == [[1.0]] * len(world.actions[0])
    assert trajectory["is_terminal"].tolist() == [False] * len(world.actions[0]) + [True]
    np.testing.assert_allclose(trajectory["observation"], world.observations[0], rtol=1e-6)
    assert len(TrajectoryDataset(folder)) == 3


def test_an_agent_goes_on_where_it_was_stopped(tmp_path):
    job = Offline("InvertedPendulum-v5", most=96, every=64, work=tmp_path)
    _, first = job.learn(target=np.inf)
    agent, log = replace(job, most=192).learn(target=np.inf)
    assert (first.steps, log.steps) == (128, 192)

    def rows(episodes, begin=0):
        return np.concatenate([np.array(own[begin:]) for own in episodes if len(own) > begin])

    done = rows(log.actions)
    np.testing.assert_array_equal(done[:128], rows(first.actions))
    assert not np.array_equal(done[128:], done[:64])  # it does not begin anew
    buffer = agent.replay_buffer
    assert buffer.size() == log.steps
    np.testing.assert_allclose(buffer.actions[:192, 0] * 3, done, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(buffer.next_observations[:192, 0], rows(log.observations, 1), rtol=1e-5, atol=1e-6)
    ends = [[False] * (len(own) - 1) + [over] for own, over in zip(log.rewards, log.terminations, strict=True) if own]
    assert buffer.dones[:192, 0].tolist() == [end for own in ends for end in own]


@pytest.mark.slow
def test_sets_lead_to_scores_without_a_look_at_the_world(tmp_path, capsys):
    job = Offline(
        "Hopper-v5",
        expert=9.0,
        steps=1_500,
        most=400,
        every=200,
        train=Train(**TINY),
        dream=Dream(steps=64, slots=4, horizon=4, trial_every=32, episodes=3, video_steps=0),
        penalties=(0.3, 0.1),
        clone_updates=2,
        episodes=2,
        work=tmp_path / "work",
        output=tmp_path / "offline.json",
    )
    job.run()
    told = read_json(tmp_path / "offline.json")["Hopper-v5"]
    assert set(told) == {"medium", "medium-replay"}
    for scores in told.values():
        assert len(scores["agent"]) == len(scores["clone"]) == 2
        assert scores["data"] > 0
        assert f"{scores['penalty']:g}" == max(scores["lower ends"], key=scores["lower ends"].get)
        assert set(scores["lower ends"]) == {"0.3", "0.1"}
    assert TrajectoryDataset(tmp_path / "work" / "Hopper-v5-medium").counts.sum() > 1
    before = (tmp_path / "work" / "Hopper-v5-medium" / "0.npz").stat().st_mtime_ns
    job.run()  # what is there is not made again
    assert (tmp_path / "work" / "Hopper-v5-medium" / "0.npz").stat().st_mtime_ns == before
    assert "times the data's mean" in capsys.readouterr().out
