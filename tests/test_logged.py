"""Logged data: arrays of a robot become a data set, a model and a dream, without any env."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import aime_gym
from aime_gym.commands.compare import Compare
from aime_gym.commands.dream import Dream
from aime_gym.commands.train import Train
from aime_gym.data import from_arrays
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import load_trajectory, trajectory_paths
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.both_worlds import BothWorlds
from aime_gym.evaluation.compare import Comparison
from aime_gym.evaluation.worlds import Worlds, find_subject
from aime_gym.training.options import HeadsOptions
from aime_gym.world_model.checkpoint import load_config

TINY = {
    **{"memory_dim": 16, "stochastic_dim": 4, "hidden_size": 16, "encoder_size": 16, "decoder_size": 16},
    **{"batch_size": 4, "horizon": 8, "evaluation_windows": 4, "held_out": 0.3, "tensorboard": False, "threads": 1},
    **{"updates": 2, "image_width": 4},
    "heads": HeadsOptions(updates=2, batch_size=4, hidden_size=16, ensemble_hidden_size=8, ensemble=2),
}
LENGTHS = (30, 45, 12, 20, 38)
LOW, HIGH = np.array([-30.0, 5.0]), np.array([10.0, 5.5])


def episodes(lengths=LENGTHS, seed=0):
    """A cart that is pushed with up to 30 N: observations of both kinds, actions and rewards of each episode."""
    rng = np.random.default_rng(seed)
    seen, done, earned = [], [], []
    for length in lengths:
        actions = rng.uniform(LOW, HIGH, (length, 2))
        speed = np.concatenate([[0.0], np.cumsum(actions[:, 0]) * 0.01])
        place = np.concatenate([[0.5], 0.5 + np.cumsum(speed[1:]) * 0.1])
        seen.append({"place": np.stack([place, place**2], 1), "speed": speed})
        done.append(actions)
        earned.append(-np.abs(place[1:]))
    return seen, done, earned


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of logged episodes, two of which terminate."""
    folder = tmp_path_factory.mktemp("logged")
    data = from_arrays(*episodes(), [False, True, False, True, False], out=folder / "robot")
    Train((data,), out=folder / "model", **TINY).run()
    return folder / "model"


def test_lists_of_episodes_become_trajectories_with_actions_in_the_range_of_the_data(tmp_path):
    seen, done, earned = episodes()
    folder = from_arrays(seen, done, earned, [False, True, False, True, False], out=tmp_path / "robot")
    whole = np.concatenate(done)
    low, high = whole.min(0), whole.max(0)
    for index, length in enumerate(LENGTHS):
        trajectory = load_trajectory(folder / f"{index}.npz")
        np.testing.assert_allclose(trajectory["place"], seen[index]["place"], rtol=1e-6)
        np.testing.assert_allclose(trajectory["speed"][:, 0], seen[index]["speed"], rtol=1e-6)
        actions = low + (trajectory["pre_action"][1:] + 1) / 2 * (high - low)
        np.testing.assert_allclose(actions, done[index], atol=1e-5)
        np.testing.assert_allclose(trajectory["reward"][1:, 0], earned[index], rtol=1e-6)
        assert trajectory["is_terminal"].nonzero()[0].tolist() == ([length] if index in (1, 3) else [])
    body = TrajectoryDataset(folder).body
    assert body is not None
    assert (body.name, body.episode_steps, body.logged_range) == ("robot", 45, (tuple(low), tuple(high)))


def test_the_same_arrays_again_are_the_same_data_set_and_others_are_refused(tmp_path):
    folder = from_arrays(*episodes(), out=tmp_path / "robot")
    before = {path: path.stat().st_mtime_ns for path in trajectory_paths(folder)}
    assert from_arrays(*episodes(), out=folder) == folder
    assert {path: path.stat().st_mtime_ns for path in trajectory_paths(folder)} == before
    with pytest.raises(AimeGymError, match="another data set: choose another folder"):
        from_arrays(*episodes(seed=1), out=folder)


def flat(ends=(3, 7, 10)):
    """Ten rows in one array, [10, 2] observations that count them."""
    rows = np.arange(10.0)
    marks = np.zeros(10, bool)
    marks[np.array(ends) - 1] = True
    return np.stack([rows, rows], 1), rows[:, None] / 10, rows, marks


def test_flat_arrays_are_cut_where_ends_are_marked(tmp_path):
    seen, done, earned, marks = flat()
    terminations = marks & (np.arange(10) == 6)
    folder = from_arrays(seen, done, earned, terminations, marks & ~terminations, out=tmp_path / "flat")
    first, second, third = (load_trajectory(path) for path in trajectory_paths(folder))
    # What the last action of a cut episode led to is unknown; after a termination the last frame is held.
    assert first["observation"][:, 0].tolist() == [0, 1, 2]
    assert first["reward"][:, 0].tolist() == [0, 0, 1]
    assert second["observation"][:, 0].tolist() == [3, 4, 5, 6, 6]
    assert second["reward"][:, 0].tolist() == [0, 3, 4, 5, 6]
    assert second["is_terminal"].tolist() == [False] * 4 + [True]
    assert third["observation"][:, 0].tolist() == [7, 8, 9]


def test_next_observations_tell_what_last_actions_led_to(tmp_path):
    seen, done, earned, marks = flat()
    folder = from_arrays(seen, done, earned, None, marks, seen + 1, out=tmp_path / "flat")
    shown = [load_trajectory(path)["observation"][:, 0].tolist() for path in trajectory_paths(folder)]
    assert shown == [[0, 1, 2, 3], [3, 4, 5, 6, 7], [7, 8, 9, 10]]


def test_all_problems_are_told_at_once_and_nothing_is_written(tmp_path):
    seen, done, earned = episodes()
    seen[1]["speed"][7] = np.nan
    done[2][3, 1] = np.inf
    earned = [rewards[:, None] for rewards in earned]
    del seen[3]["place"]
    with pytest.raises(AimeGymError) as told:
        from_arrays(seen, done, earned, [False] * 4 + ["no"], out=tmp_path / "robot")
    for problem in (
        "episode 1: row 7 of observations['speed'] is nan",
        "episode 2: row 3 of actions is inf",
        r"episode 0: rewards should be one number a step, shape [30]; got [30, 1]. 4 more like it.",
    ):
        assert problem in str(told.value)
    assert not (tmp_path / "robot").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda parts: parts | {"actions": None}, "actions is missing"),
        (lambda parts: parts | {"rewards": None}, "rewards is missing. Where a function pays"),
        (lambda parts: parts | {"rewards": parts["rewards"][:, None]}, r"shape \[10\]; got \[10, 1\]"),
        (lambda parts: parts | {"rewards": parts["rewards"][1:]}, "rewards has 9 rows where actions has 10"),
        (lambda parts: parts | {"observations": parts["observations"][2:]}, "observations has 8 rows"),
        (lambda parts: parts | {"observations": ["up", "down"] * 5}, "observations should be numbers"),
        (lambda parts: parts | {"observations": {3: parts["observations"]}}, "array or a dict of arrays by name"),
        (lambda parts: parts | {"truncations": None}, r"Two episodes or more are needed.*truncations\[999::1000\]"),
        (lambda parts: parts | {"truncations": np.arange(10.0)}, "truncations should be true or false"),
        (lambda parts: parts | {"truncations": parts["truncations"] | (np.arange(10) == 3)}, "row 3: .* of one row"),
        (lambda parts: parts | {"action_space": spaces.Box(-1, 0.5, (1,))}, "row 6 of actions, .* lies outside"),
        (lambda parts: parts | {"action_space": spaces.Box(-1, 1, (2,))}, r"bounded Box of shape \[1\]"),
        (lambda parts: parts | {"name": "walker"}, "no body or env; got 'walker'"),
        (lambda parts: parts | {"env": "Pendulum-v1"}, r"Pendulum-v1 shows .*\[3\].*here are .*\[2\]"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_written(tmp_path, change, told):
    seen, done, earned, marks = flat()
    parts = change({"observations": seen, "actions": done, "rewards": earned, "truncations": marks})
    with pytest.raises(AimeGymError, match=told):
        from_arrays(**parts, out=tmp_path / "flat")
    assert not (tmp_path / "flat").exists()


def test_data_of_an_env_are_scaled_by_its_bounds(tmp_path):
    world = gym.make("Pendulum-v1", max_episode_steps=12)
    world.action_space.seed(0)
    seen, done, earned = [], [], []
    for seed in range(3):
        shown, actions, rewards = [world.reset(seed=seed)[0]], [], []
        for _ in range(12):
            actions.append(world.action_space.sample())
            observation, reward, *_ = world.step(actions[-1])
            shown.append(observation)
            rewards.append(reward)
        seen.append(np.stack(shown))
        done.append(np.stack(actions))
        earned.append(np.array(rewards))
    folder = from_arrays(seen, done, earned, env="Pendulum-v1", out=tmp_path / "pendulum")
    np.testing.assert_allclose(load_trajectory(folder / "0.npz")["pre_action"][1:] * 2, done[0], atol=1e-6)
    data = TrajectoryDataset(folder)
    assert data.embodiment == "Pendulum-v1"
    assert data.body is not None
    assert not data.body.logged


def test_pictures_are_taken_as_they_come(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (10, 32, 24, 3)).astype(np.uint8)
    _, done, earned, marks = flat()
    folder = from_arrays({"camera": pictures, "speed": earned}, done, earned, None, marks, out=tmp_path / "seen")
    trajectory = load_trajectory(folder / "0.npz", images=True)
    assert trajectory["image"].shape == (3, 64, 64, 3)
    assert trajectory["speed"].tolist() == [[0], [1], [2]]


def test_data_sets_of_other_scales_are_not_mixed(tmp_path):
    one = from_arrays(*episodes(), out=tmp_path / "one", name="robot")
    other = from_arrays(*episodes(seed=1), out=tmp_path / "other", name="robot")
    with pytest.raises(AimeGymError, match=r"differ in what -1 and 1 stand for.*action_space"):
        TrajectoryDataset([one, other])
    bounds = spaces.Box(LOW, HIGH, dtype=np.float64)
    longer = from_arrays(*episodes((60, 5)), out=tmp_path / "long", name="robot", action_space=bounds)
    short = from_arrays(*episodes(seed=1), out=tmp_path / "short", name="robot", action_space=bounds)
    body = TrajectoryDataset([short, longer]).body
    assert body is not None
    assert body.episode_steps == 60


def test_a_dream_of_logged_data_has_the_spaces_of_the_data(model):
    dream = gym.make("AimeDream-v0", model=model, obs_type="dict", start="dataset")
    assert {name: part.shape for name, part in dream.observation_space.spaces.items()} == {"place": (2,), "speed": (1,)}
    observation, _ = dream.reset(seed=0)
    assert observation in dream.observation_space
    assert dream.action_space == spaces.Box(-1, 1, (2,))
    observation, reward, *_ = dream.step(dream.action_space.sample())
    assert observation in dream.observation_space
    assert np.isfinite(reward)
    assert load_config(model).body == dream.unwrapped.embodiment
    own = gym.wrappers.RescaleAction(dream, *(np.float32(end) for end in dream.unwrapped.embodiment.logged_range))
    own.reset(seed=0)
    own.step(np.array([-10, 5.2], np.float32))


def test_agents_are_compared_in_the_dream_alone(model, tmp_path):
    comparison = aime_gym.compare("random", "robot", model=model, episodes=2, real_episodes=0)
    (random,) = comparison.policies
    assert random.predicted is not None
    low, high = random.predicted.interval
    assert low < random.predicted.mean < high
    assert "what the data's episodes earned" in random.predicted.reason
    assert Comparison.from_json(comparison.to_json(tmp_path / "returns.json")).to_dict() == comparison.to_dict()


def test_what_needs_a_real_env_says_so_in_one_line(model):
    with pytest.raises(AimeGymError, match=r"^robot is known by logged data alone, .*real_episodes=0 of compare"):
        aime_gym.compare("random", "robot", model=model, episodes=2)
    with (
        Worlds("robot", model=model) as worlds,
        pytest.raises(AimeGymError, match=r"^robot is known by logged data alone"),
    ):
        BothWorlds(worlds)
    assert find_subject(None, model) == ("robot", model)
    with pytest.raises(AimeGymError, match=r"give from_arrays env='Pendulum-v1'"):
        aime_gym.register_dream("RobotDream-v0", model, real="Pendulum-v1")


def test_an_agent_learns_in_the_dream_of_logged_data_alone(model, tmp_path, capsys):
    tiny = {"steps": 64, "slots": 4, "horizon": 4, "trial_every": 32, "episodes": 3, "video_steps": 0}
    with pytest.raises(AimeGymError, match=r"^robot is known by logged data alone, .*trials=0 of dream"):
        Dream(model=str(model), out=tmp_path / "agent", **tiny).run()
    assert not (tmp_path / "agent").exists()
    Dream(model=str(model), out=tmp_path / "agent", trials=0, **tiny).run()
    assert "no real episode chose the agent" in capsys.readouterr().out
    assert "predicted" in (tmp_path / "agent" / "report.html").read_text()
    Compare((str(tmp_path / "agent" / "agent.zip"), "random"), real_episodes=0, episodes=2, out=tmp_path / "both").run()
    assert Comparison.from_json(tmp_path / "both" / "returns.json").embodiment == "robot"
