"""Logged data: arrays of a robot become a data set, a model and a dream, without any env."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces

import aime_gym
from aime_gym.cli import main
from aime_gym.commands.compare import Compare
from aime_gym.commands.data_sets import Import, Mix
from aime_gym.commands.dream import Dream
from aime_gym.commands.train import Train
from aime_gym.data import from_arrays
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import load_trajectory, read_metadata, trajectory_paths, write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.both_worlds import BothWorlds
from aime_gym.evaluation.compare import Comparison
from aime_gym.evaluation.worlds import Worlds, find_subject
from aime_gym.flags import HeadsOptions
from aime_gym.world_model.checkpoint import load_config
from tests.test_foreign import write_minari

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
    body = TrajectoryDataset(folder).body
    assert body is not None
    assert body.episode_steps == 4  # of the longest, not of the whole log


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
        (
            lambda parts: parts | {"action_space": spaces.Box(-1, 1, (2,))},
            r"shape \[2\], but actions have rows .*\[1\]",
        ),
        (lambda parts: parts | {"action_space": spaces.Box(-np.inf, 1, (1,))}, "expected a bounded Box"),
        (lambda parts: parts | {"action_space": (-1, 1)}, r"expected one of gymnasium.spaces.*got \(-1, 1\)"),
        (lambda parts: parts | {"action_space": "Discrete(2)"}, "expected one of gymnasium.spaces"),
        (lambda parts: parts | {"name": 3}, "name: expected letters.*got 3"),
        (lambda parts: parts | {"name": ".."}, "name: expected letters"),
        (lambda parts: parts | {"observations": Fails()}, r"got Fails \(call \.detach\(\) first\)"),
        (lambda parts: parts | {"observations": parts["observations"].astype(object)}, r"got object \[10, 2\]"),
        (lambda parts: parts | {"observations": np.ma.masked_greater(parts["observations"], 6)}, "masked in row 7"),
        # NumPy 2.4.6 finds these within any limit, see findings/numpy_limits_beyond_float16.sh.
        (lambda parts: parts | {"rewards": np.where(np.arange(10) == 4, np.inf, 1).astype(np.float16)}, "row 4 .* inf"),
        (lambda parts: parts | {"next_observations": parts["observations"][:, :1]}, r"rows of \[1\], but .* of \[2\]"),
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


class Fails:
    """Like a tensor with a gradient."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("call .detach() first")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rewards": None}, "rewards is missing. Where a function pays"),
        ({"terminations": ["no"] * 3}, "episode 0: terminations should be true or false"),
        (
            {"observations": {"a": [np.zeros((6, 1))] * 3, "b": [np.zeros((6, 1))] * 2}},
            r"\['a'\] 3, observations\['b'\] 2",
        ),
        ({"observations": {"a": 1.0}}, r"observations\['a'\] no list"),
        ({"actions": [np.zeros((0, 1))] * 3, "rewards": None}, "rewards is missing"),
    ],
)
def test_what_lists_of_episodes_lack_is_told(tmp_path, change, told):
    parts = {
        "observations": [np.arange(12.0).reshape(6, 2)] * 3,
        "actions": [np.arange(5.0)[:, None]] * 3,
        "rewards": [np.zeros(5)] * 3,
    }
    with pytest.raises(AimeGymError, match=told):
        from_arrays(**parts | change, out=tmp_path / "robot")
    assert not (tmp_path / "robot").exists()


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, np.ndarray.tolist])
def test_an_action_of_one_number_needs_no_axis(tmp_path, kind):
    """Arrays, tensors and lists are taken alike."""
    seen, done, earned = ([kind(rows)] * 3 for rows in (np.arange(12.0).reshape(6, 2), np.arange(5.0), np.ones(5)))
    folder = from_arrays(seen, done, earned, out=tmp_path / "robot")
    assert load_trajectory(folder / "0.npz")["pre_action"][1:].tolist() == [[-1.0], [-0.5], [0.0], [0.5], [1.0]]


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
    comparison = aime_gym.compare("random", model=model, episodes=2, real_episodes=0)  # the model says of what
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


def test_choices_are_chosen_in_dreams_of_logged_data(tmp_path):
    seen, _, earned, marks = flat()
    chosen = np.arange(10) % 3
    with pytest.raises(AimeGymError, match="actions are whole numbers: give action_space"):
        from_arrays(seen, chosen, earned, None, marks, out=tmp_path / "chosen")
    with pytest.raises(AimeGymError, match=r"row 2 of actions, 2, lies outside Discrete\(2\)"):
        from_arrays(seen, chosen, earned, None, marks, out=tmp_path / "chosen", action_space=spaces.Discrete(2))
    data = from_arrays(seen, chosen, earned, None, marks, out=tmp_path / "chosen", action_space=spaces.Discrete(3))
    assert load_trajectory(data / "0.npz")["pre_action"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    Train((data,), out=tmp_path / "model", **TINY).run()
    dream = gym.make("AimeDream-v0", model=tmp_path / "model", reward_fn=lambda o, a, n: a[:, 2])
    assert dream.action_space == spaces.Discrete(3)
    dream.reset(seed=0)
    assert [dream.step(action)[1] for action in (2, 0, 1)] == [1, 0, 0]


@pytest.mark.parametrize("obs_type", ["state", "dict"])
def test_a_recording_of_a_dream_of_logged_data_is_known_by_its_data_alone(model, tmp_path, monkeypatch, obs_type):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env = gym.make("AimeDream-v0", model=model, obs_type=obs_type, max_episode_steps=5)
    rows, actions = np.arange(18, dtype=np.float32).reshape(6, 3), np.zeros((5, 2), np.float32)
    shown = {"place": rows[:, :2], "speed": rows[:, 2:]} if obs_type == "dict" else rows
    data = TrajectoryDataset(write_minari(minari, "test/dreamt-v0", env, shown, actions))
    body = data.body
    assert body is not None
    assert (body.name, body.logged_range) == ("test/dreamt-v0", ((-1.0, -1.0), (1.0, 1.0)))
    np.testing.assert_array_equal(np.concatenate([data.arrays[sensor.name] for sensor in body.sensors], 1), rows)


def test_functions_see_actions_in_the_units_of_the_data(model):
    envs = gym.make_vec("AimeDream-v0", model=model, num_envs=2, reward_fn=lambda o, a, n: a[:, 0])
    envs.reset(seed=0)
    _, rewards, *_ = envs.step(np.array([[-1, 0], [1, 0]], np.float32))
    low, high = envs.embodiment.logged_range
    np.testing.assert_allclose(rewards, [low[0], high[0]], rtol=1e-5)


@pytest.mark.parametrize("body", [3, {"sensors": {"place": 0}}, {"sensors": {}, "episode_steps": 3}])
def test_a_damaged_account_of_the_body_is_told(tmp_path, body):
    data = from_arrays(*episodes(), out=tmp_path / "robot")
    write_metadata(data, read_metadata(data) | {"body": body})
    with pytest.raises(AimeGymError, match=r"'body' is an object|a body that makes no sense"):
        TrajectoryDataset(data)


D4RL = {"observation": ("observations",), "action": "actions", "reward": "rewards"}


def write_hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def test_files_in_the_layout_of_d4rl_are_imported(tmp_path, capsys):
    seen, done, earned, marks = flat()
    fell, cut = marks & (np.arange(10) == 6), marks & (np.arange(10) != 6)
    arrays = {"observations": seen, "actions": done, "rewards": earned, "terminals": fell, "timeouts": cut}
    path = write_hdf5(tmp_path / "log.hdf5", **arrays, **{"infos/qpos": seen})
    Import((path,), out=tmp_path / "imported", **D4RL).run()
    assert f"3 episodes are in {tmp_path / 'imported'}: aime-gym train" in capsys.readouterr().out
    from_arrays(seen, done, earned, fell, cut, out=tmp_path / "arrays", name="imported")
    assert read_metadata(tmp_path / "imported") == read_metadata(tmp_path / "arrays")
    write_hdf5(tmp_path / "next.h5", **arrays, next_observations=seen + 1)
    Import((tmp_path / "next.h5",), out=tmp_path / "next", **D4RL).run()
    assert load_trajectory(tmp_path / "next" / "0.npz")["observation"][:, 0].tolist() == [0, 1, 2, 3]


def test_npz_files_are_episodes_with_arrays_of_any_name(tmp_path):
    seen, done, earned = episodes()
    for index, (observation, actions, rewards) in enumerate(zip(seen, done, earned, strict=True)):
        np.savez(tmp_path / f"log{index}.npz", torque=actions, paid=rewards, **observation)
    files = tuple(sorted(tmp_path.glob("log*.npz")))
    flags = ["--observation", "place", "speed", "--action", "torque", "--reward", "paid"]
    assert main(["import", *map(str, files), *flags, "--out", str(tmp_path / "robot")]) == 0
    from_arrays(seen, done, earned, out=tmp_path / "arrays", name="robot")
    assert read_metadata(tmp_path / "robot") == read_metadata(tmp_path / "arrays")


def test_problems_name_file_row_and_array(tmp_path):
    seen, done, earned, marks = flat()
    spoilt = seen.copy()
    spoilt[4, 1] = np.nan
    np.savez(tmp_path / "a.npz", obs=spoilt, act=done, rew=earned, end=marks)
    np.savez(tmp_path / "b.npz", obs=seen, rew=earned[:, None], end=marks)
    np.savez(tmp_path / "c.npz", obs=np.array([None] * 10), act=done, rew=earned, end=marks)
    (tmp_path / "d.npz").write_bytes(b"no archive")
    (tmp_path / "e.h5").write_bytes(b"no archive")
    files = tuple(tmp_path / f"{name}" for name in ("a.npz", "b.npz", "c.npz", "d.npz", "e.h5", "f.csv", "g.npz"))
    (tmp_path / "f.csv").write_text("1,2")
    with pytest.raises(AimeGymError) as told:
        Import(files, ("obs",), "act", "rew", truncation="end", out=tmp_path / "robot").run()
    for problem in (
        f"{tmp_path}/a.npz: row 4 of 'obs' is nan",
        f"{tmp_path}/b.npz lacks 'act'; it has 'obs', 'rew', 'end'",
        f"{tmp_path}/c.npz: 'obs' cannot be read (it holds pickled objects)",
        f"{tmp_path}/d.npz is not a readable npz file",
        f"{tmp_path}/e.h5 is not a readable HDF5 file",
        f"{tmp_path}/f.csv: expected an npz, HDF5 or Parquet file",
        f"There is no file {tmp_path}/g.npz",
    ):
        assert problem in str(told.value)
    assert not (tmp_path / "robot").exists()


def test_hdf5_is_read_within_bounds_and_within_the_file(tmp_path, monkeypatch):
    seen, done, earned, marks = flat()
    other = write_hdf5(tmp_path / "other.h5", observations=seen)
    path = write_hdf5(tmp_path / "log.h5", actions=done, rewards=earned, timeouts=marks)
    with h5py.File(path, "a") as file:
        file["observations"] = h5py.ExternalLink(str(other), "observations")
    with pytest.raises(AimeGymError, match="lacks 'observations'"):
        Import((path,), out=tmp_path / "robot", **D4RL).run()
    layout = h5py.VirtualLayout((10, 2), "f8")
    layout[:] = h5py.VirtualSource(str(other), "observations", (10, 2))
    with h5py.File(path, "a") as file:
        del file["observations"]
        file.create_virtual_dataset("observations", layout)
    with pytest.raises(AimeGymError, match="'observations' lies in other files, which are not read"):
        Import((path,), out=tmp_path / "robot", **D4RL).run()
    with h5py.File(path, "a") as file:
        del file["observations"]
        file["observations"] = seen
    monkeypatch.setattr("aime_gym.data.tables.LARGEST_NPZ", 100)
    with pytest.raises(AimeGymError, match=r"log.h5: its arrays take .* are read. Split it"):
        Import((path,), out=tmp_path / "robot", **D4RL).run()


def test_large_actions_are_scaled_by_their_range_as_others(tmp_path):
    seen, done, earned, marks = flat()
    folder = from_arrays(seen, 1e9 * done, earned, None, marks, out=tmp_path / "ticks")
    np.testing.assert_allclose(load_trajectory(folder / "0.npz")["pre_action"][1:, 0], [-1, -1 + 2 / 9], atol=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        ["play", "--model", "MODEL", "--video", "OUT/play.mp4"],
        ["score", "MODEL", "--out", "OUT/score"],
        ["explain", "MODEL", "random", "--out", "OUT/explain"],
        ["film", "MODEL", "DATA"],
        ["imitate", "--model", "MODEL", "--demonstrations", "DATA", "--algo", "bc", "--out", "OUT/imitate"],
        ["render", "DATA"],
        ["to-minari", "DATA", "logged/robot-v0"],
        ["compare", "random", "--model", "MODEL", "--out", "OUT/compare"],
    ],
)
def test_commands_that_need_a_real_env_refuse_before_they_begin(model, tmp_path, capsys, words):
    places = {"MODEL": str(model), "DATA": str(model.parent / "robot"), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert main(words) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("aime-gym: robot is known by logged data alone, so that there is no real env of it: ")
    assert not (tmp_path / "out").exists()


def test_a_mix_of_logged_data_is_of_their_body(tmp_path):
    one = from_arrays(*episodes(), out=tmp_path / "robot")
    Mix((one,), out=tmp_path / "mixed", trajectories=3).run()
    assert TrajectoryDataset(tmp_path / "mixed").body == TrajectoryDataset(one).body
    with pytest.raises(AimeGymError, match=r"need no import: aime-gym train minari:a/b-v0"):
        Import((Path("minari:a/b-v0"),), out=tmp_path / "imported").run()


def test_names_that_change_inside_are_told(tmp_path):
    seen = [{"arm.angle": np.arange(12.0).reshape(6, 2)}] * 3
    with pytest.warns(UserWarning, match=r"models of robot: 'arm.angle' is sensor__arm_2e_angle"):
        folder = from_arrays(seen, [np.arange(5.0)] * 3, [np.ones(5)] * 3, out=tmp_path / "robot")
    assert "sensor__arm_2e_angle" in load_trajectory(folder / "0.npz")


def chosen(count=12):
    """Rows of a machine: a gear of 3, two lamps, a level that is none of them, and a choice of 4 a step."""
    rows = np.arange(count)
    ends = np.isin(rows, (3, 7, count - 1))
    return rows % 3, np.stack([rows % 2 == 0, rows % 4 > 1], 1), rows / 10.0, rows % 4, -rows / 10.0, ends


def test_choices_among_observations_are_shown_again_in_dreams(tmp_path):
    gear, lamps, level, action, reward, ends = chosen()
    seen = {"gear": gear, "lamps": lamps, "level": level}
    shown = spaces.Dict(gear=spaces.Discrete(3), lamps=spaces.MultiBinary(2))
    told = {"action_space": spaces.Discrete(4), "observation_space": shown}
    data = from_arrays(seen, action, reward, None, ends, out=tmp_path / "machine", **told)
    trajectory = load_trajectory(data / "0.npz")
    assert trajectory["gear"].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert trajectory["lamps"].tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]
    Train((data,), out=tmp_path / "model", **TINY).run()
    dream = gym.make("AimeDream-v0", model=tmp_path / "model", obs_type="dict", start="dataset")
    assert dream.observation_space["gear"] == spaces.Discrete(3)
    assert dream.observation_space["lamps"] == spaces.MultiBinary(2)
    assert dream.observation_space["level"].shape == (1,)
    observation, _ = dream.reset(seed=0)
    assert observation in dream.observation_space
    assert dream.step(3)[0] in dream.observation_space
    body = TrajectoryDataset(data).body
    assert body is not None
    assert body == dream.unwrapped.embodiment


def test_next_observations_and_starts_of_choices_are_taken(tmp_path):
    gear, *_, reward, ends = chosen()
    space = spaces.Discrete(3, start=5)
    told = {"action_space": spaces.Discrete(3), "observation_space": space}
    # Floats, as tables of other programs hold whole numbers.
    parts = (gear + 5.0, gear, reward, None, ends, np.roll(gear, -1) + 5.0)
    data = from_arrays(*parts, out=tmp_path / "machine", **told)
    assert load_trajectory(data / "1.npz")["observation"].argmax(1).tolist() == [1, 2, 0, 1, 2]
    with pytest.raises(AimeGymError, match=r"^row 3 of next_observations, 9.0, lies outside Discrete\(3, start=5\)"):
        from_arrays(*parts[:5], np.where(np.arange(12) == 3, 9.0, parts[5]), out=tmp_path / "other", **told)


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (spaces.Dict(gear=spaces.Discrete(2)), r"row 2 of observations\['gear'\], 2, lies outside Discrete\(2\)"),
        (spaces.Dict(level=spaces.Discrete(2)), r"row 1 of observations\['level'\], 0.1, lies outside"),
        (spaces.Dict(geer=spaces.Discrete(3)), r"observation_space has \['geer'\]; observations are \['gear', 'lamps'"),
        (spaces.Dict(lamps=spaces.MultiBinary(3)), r"shapes \{'lamps': \[3\]\}; observations have \{'lamps': \[2\]\}"),
        (spaces.Discrete(3), r"observation_space has \[''\]"),
        ({"gear": spaces.Discrete(3)}, "observation_space: expected one of gymnasium.spaces"),
        (spaces.Dict(gear=spaces.Text(3)), "Expected observations that are a Box, Discrete"),
    ],
)
def test_spaces_that_the_data_contradict_are_refused(tmp_path, space, told):
    gear, lamps, level, action, reward, ends = chosen()
    seen = {"gear": gear, "lamps": lamps, "level": level}
    with pytest.raises(AimeGymError, match=told):
        from_arrays(
            seen, action / 4, reward, None, ends, out=tmp_path / "machine", observation_space=space, name="machine"
        )
    assert not (tmp_path / "machine").exists()


def test_data_of_an_env_of_choices_and_nested_parts_need_no_spaces(tmp_path):
    gym.register("Nested-v9", entry_point=Nested)
    gear, _, level, action, reward, ends = chosen()
    with pytest.raises(AimeGymError, match=r"observation_space: expected none beside env"):
        from_arrays(
            gear, action, reward, None, ends, env="Nested-v9", out=tmp_path / "a", observation_space=spaces.Discrete(3)
        )
    data = from_arrays(
        {"box/gear": gear, "level": level[:, None]}, action, reward, None, ends, env="Nested-v9", out=tmp_path / "b"
    )
    body = TrajectoryDataset(data).body
    assert body is not None
    gears = next(sensor for sensor in body.sensors if sensor.choices)
    assert load_trajectory(data / "0.npz")[gears.name].argmax(1).tolist() == [0, 1, 2, 0]


class Nested(gym.Env):
    """A gear in a box, and a level."""

    observation_space = spaces.Dict(
        box=spaces.Dict(gear=spaces.Discrete(3)), level=spaces.Box(-np.inf, np.inf, (1,), np.float32)
    )
    action_space = spaces.Discrete(4)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return {"box": {"gear": np.int64(0)}, "level": np.zeros(1, np.float32)}, {}

    def step(self, action):
        return *self.reset(), False, False, {}


def test_choices_are_named_in_words(tmp_path):
    gear, lamps, level, action, reward, ends = chosen()
    np.savez(tmp_path / "log.npz", gear=gear, lamps=lamps, level=level, push=action, paid=reward, end=ends)
    words = ["import", str(tmp_path / "log.npz"), "--observation", "gear", "lamps", "level", "--action", "push"]
    words += ["--reward", "paid", "--truncation", "end"]
    for index, own in enumerate((["gear", "lamps", "push"], ["gear=3", "lamps=binary", "push=4"])):
        assert main([*words, "--name", "machine", "--out", str(tmp_path / f"{index}"), "--choices", *own]) == 0
    body = TrajectoryDataset(tmp_path / "0").body
    assert body is not None
    assert body == TrajectoryDataset(tmp_path / "1").body
    shown = [(sensor.choices and sensor.choices.space) for sensor in body.sensors]
    assert shown == [spaces.Discrete(3), spaces.MultiBinary(2), None]
    assert body.choices is not None
    assert body.choices.space == spaces.Discrete(4)
    np.savez(tmp_path / "log.npz", gear=gear, lamps=lamps, level=level, push=lamps, paid=reward, end=ends)
    for own, space in (("push=3,2", spaces.MultiDiscrete([3, 2])), ("push=5", spaces.MultiDiscrete([5, 5]))):
        assert main([*words, "--name", "machine", "--out", str(tmp_path / own), "--choices", own]) == 0
        body = TrajectoryDataset(tmp_path / own).body
        assert body is not None
        assert body.choices is not None
        assert body.choices.space == space


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("gear=", "expected NAME, NAME=4"),
        ("gear=three", "expected NAME, NAME=4"),
        ("geer", "'geer' is no action or observation; those are 'gear', 'lamps', 'level', 'push'"),
        ("lamps=2,2,2", r"a row of shape \[2\]"),
        ("gear=0", "whole numbers from 0 on"),
        ("level", r"row 1 of observations\['level'\], 0.1, lies outside Discrete\(2\)"),
        ("gear=2", r"row 2 of observations\['gear'\], 2, lies outside Discrete\(2\)"),
        ("push=2", r"row 2 of actions, 2, lies outside Discrete\(2\)"),
    ],
)
def test_words_that_the_data_contradict_are_refused(tmp_path, word, told):
    gear, lamps, level, action, reward, ends = chosen()
    path = tmp_path / "log.npz"
    np.savez(path, gear=gear, lamps=lamps, level=level, push=action, rewards=reward, timeouts=ends)
    with pytest.raises(AimeGymError, match=told):
        Import(
            (path,), ("gear", "lamps", "level"), "push", choices=("push", word), name="machine", out=tmp_path / "out"
        ).run()
    assert not (tmp_path / "out").exists()


def write_parquet(path, **columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow = pytest.importorskip("pyarrow")
    lists = {name: own if isinstance(own, arrow.Array) else arrow.array(own.tolist()) for name, own in columns.items()}
    parquet.write_table(arrow.table(lists), path, row_group_size=4)
    return path


def lerobot(count=12):
    """Columns of LeRobot's data sets: episodes 0 to 2 of 4, 4 and 4 rows."""
    rows = np.arange(count)
    return {
        "observation.state": np.stack([rows, rows**2], 1).astype(np.float32),
        "action": np.stack([rows / 7, rows % 2], 1).astype(np.float32),
        "next.reward": (rows % 4 == 3).astype(np.float32),
        "next.done": rows % 4 == 3,
        "timestamp": (rows % 4).astype(np.float32),
        "episode_index": rows // 4,
    }


@pytest.mark.parametrize("layout", ["v2", "v3"])
def test_data_sets_of_lerobot_are_imported(tmp_path, layout):
    arrow = pytest.importorskip("pyarrow")
    columns, folder = lerobot(), tmp_path / "set"
    if layout == "v2":  # a file an episode, of lists
        for own in range(3):
            part = {name: rows[own * 4 : own * 4 + 4] for name, rows in columns.items()}
            write_parquet(folder / f"data/chunk-000/episode_{own:06d}.parquet", **part)
    else:  # episodes one after another, of lists of a fixed size
        columns["action"] = arrow.FixedSizeListArray.from_arrays(columns["action"].ravel(), 2)
        write_parquet(folder / "data/chunk-000/file-000.parquet", **columns)
    (folder / "meta").mkdir()
    (folder / "meta/info.json").write_text("{}")
    assert main(["import", str(folder), "--name", "robot", "--out", str(tmp_path / "robot")]) == 0
    columns = lerobot()
    ends, parts = columns["episode_index"], ("observation.state", "action", "next.reward")
    from_arrays(
        *(columns[name] for name in parts), None, np.diff(ends, append=9) > 0, out=tmp_path / "arrays", name="robot"
    )
    assert read_metadata(tmp_path / "robot") == read_metadata(tmp_path / "arrays")
    assert len(trajectory_paths(tmp_path / "robot")) == 3
    words = ["--termination", "next.done", "--reward", "zero", "--out", str(tmp_path / "ended"), "--name", "robot"]
    assert main(["import", str(folder), *words]) == 0
    trajectory = load_trajectory(tmp_path / "ended" / "2.npz")
    assert trajectory["is_terminal"].tolist() == [False] * 4 + [True]
    assert not trajectory["reward"].any()


def test_problems_of_parquet_files_name_file_row_and_column(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    columns = lerobot()
    rows = range(12)
    few = arrow.array([[1.0, 2.0]] * 9 + [[1.0]] + [[1.0, 2.0]] * 2)
    spoilt = {
        "ragged": {"observation.state": few},
        "empty": {"next.reward": arrow.array([None if row == 6 else 1.0 for row in rows])},
        "hole": {"observation.state": arrow.array([[None if row == 5 else 1.0, 2.0] for row in rows])},
        "nan": {"observation.state": arrow.array([[np.nan if row == 7 else 1.0, 2.0] for row in rows])},
        "text": {"action": arrow.array(["left"] * 12)},
        "video": {"observation.state": arrow.array([{"path": "a.mp4", "timestamp": 0.1}] * 12)},
        "again": {"episode_index": np.array([0] * 4 + [1] * 4 + [0] * 4)},
        "half": {"episode_index": np.arange(12) / 4},
        "lacks": {"observation.state": None},
    }
    for name, own in spoilt.items():
        parts = {key: part for key, part in (columns | own).items() if part is not None}
        write_parquet(tmp_path / f"{name}.parquet", **parts)
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    (tmp_path / "folder").mkdir()
    files = tuple(tmp_path / f"{name}.parquet" for name in [*spoilt, "broken"])
    with pytest.raises(AimeGymError) as told:
        Import((*files, tmp_path / "folder"), out=tmp_path / "robot").run()
    for problem in (
        "ragged.parquet: 'observation.state' has lists of several lengths; expected one: row 9 has 1 numbers, others 2",
        "empty.parquet: 'next.reward' is empty in row 6",
        "hole.parquet: 'observation.state' lacks a number in row 5",
        "nan.parquet: row 7 of 'observation.state' is nan",
        "text.parquet: 'action' is string; expected numbers",
        "video.parquet: 'observation.state' is struct<path",
        "again.parquet: the rows of an episode belong together; row 8 of 'episode_index' goes back to an earlier one",
        "half.parquet: 'episode_index' should be a whole number a row; got float64 [12]",
        "lacks.parquet lacks 'observations' or 'observation' or 'observation.state'; it has 'action', 'next.reward'",
        "broken.parquet is not a readable Parquet file",
        "folder is a folder, and not one of LeRobot's data sets (meta/info.json): name files",
    ):
        assert problem in str(told.value)
    assert not (tmp_path / "robot").exists()
    monkeypatch.setattr("aime_gym.data.tables.LARGEST_NPZ", 100)
    whole = write_parquet(tmp_path / "whole.parquet", **lerobot())
    with pytest.raises(AimeGymError, match=r"whole.parquet: its arrays take .* are read. Split it"):
        Import((whole,), out=tmp_path / "robot").run()
