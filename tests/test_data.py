"""Trajectories on disk and in memory, rewards relabelled, policies collected."""

import json
import os
import zipfile

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aime_gym.agents.numpy_policies import HeldActions, Stray
from aime_gym.agents.sb3 import load_sb3_agent
from aime_gym.bodies.body import Choices
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.collect import Collect, RecordTrajectories, collect
from aime_gym.commands.data_sets import Mix
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import load_trajectory, read_metadata, relabel, save_trajectory, write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_pretrained_model, load_starts

WALKER = get_embodiment("walker")


def record(task="walk", steps=12, seed=0, body=WALKER):
    """One short real episode."""
    trajectories = []
    env = gymnasium.make(f"AimeReal-{body.title}-v0", task=task, max_episode_steps=steps)
    env = RecordTrajectories(env, trajectories.append)
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        env.step(rng.uniform(-1, 1, body.action_dim).astype(np.float32))
    return trajectories[0]


@pytest.fixture(scope="module")
def trajectory():
    return record()


def test_a_recorded_trajectory_has_the_reference_layout(trajectory):
    assert trajectory["orientations"].shape == (13, 14)
    assert trajectory["height"].shape == (13, 1)
    assert trajectory["reward"].shape == (13, 1)
    assert trajectory["physics"].dtype == np.float64
    assert trajectory["orientations"].dtype == trajectory["pre_action"].dtype == np.float32
    assert not trajectory["pre_action"][0].any()
    assert trajectory["reward"][0] == 0
    assert trajectory["is_first"].tolist() == [True] + [False] * 12
    assert trajectory["is_last"].tolist() == [False] * 12 + [True]
    assert not trajectory["is_terminal"].any()


def test_a_file_gives_back_what_was_saved(trajectory, tmp_path):
    path = save_trajectory(tmp_path, 3, trajectory)
    loaded = load_trajectory(path)
    assert loaded.keys() == trajectory.keys()
    for key, array in trajectory.items():
        np.testing.assert_array_equal(loaded[key], array)
        assert loaded[key].dtype == array.dtype


def test_a_failed_write_leaves_the_old_file(trajectory, tmp_path, monkeypatch):
    path = save_trajectory(tmp_path, 0, trajectory)
    before = path.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match=r"No space left .* intact: .*0\.npz"):
        save_trajectory(tmp_path, 0, trajectory)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["0.npz"]


BREAKAGES = {
    "missing key": (lambda t: t.pop("pre_action"), "lacks pre_action"),
    "short": (lambda t: t.update(height=t["height"][:-1]), "'height' has 12 rows"),
    "NaN": (lambda t: t["velocity"].__setitem__((4, 2), np.nan), "'velocity' has a value in row 4"),
    "object": (lambda t: t.update(height=np.array([{"a": 1}] * 13, object)), "'height' cannot be read"),
    "text": (lambda t: t.update(height=np.array(["x"] * 13)), "'height' has dtype"),
    "rewards": (
        lambda t: t.update(reward=np.zeros((13, 2))),
        r"'reward' has shape \[13, 2\]; expected one number a row",
    ),
    "scalar": (lambda t: t.update(height=np.float32(1)), r"'height' has shape \(\)"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_file_is_described(name, trajectory, tmp_path):
    breakage, message = BREAKAGES[name]
    broken = {key: array.copy() for key, array in trajectory.items()}
    breakage(broken)
    np.savez(tmp_path / "0.npz", **broken)
    with pytest.raises(AimeGymError, match=message) as error:
        load_trajectory(tmp_path / "0.npz")
    assert "0.npz" in str(error.value)


@pytest.mark.parametrize(
    "images",
    [np.zeros((13, 3, 64, 64), np.uint8), np.zeros((13, 64, 64, 3), np.float32), np.zeros((13, 64, 64), np.uint8)],
)
def test_images_of_another_layout_are_described(images, trajectory, tmp_path):
    path = save_trajectory(tmp_path, 0, {key: array[:13] for key, array in trajectory.items()} | {"image": images})
    with pytest.raises(AimeGymError, match=r"0\.npz: 'image' is .*; expected uint8 \[T, H, W, 3\]"):
        load_trajectory(path, images=True)


def test_images_of_another_size_become_those_of_models(trajectory, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (13, 128, 128, 3), np.uint8)
    path = save_trajectory(tmp_path, 0, {key: array[:13] for key, array in trajectory.items()} | {"image": images})
    small = images.reshape(13, 64, 2, 64, 2, 3).mean((2, 4))
    np.testing.assert_allclose(load_trajectory(path, images=True)["image"], small, atol=1)


@pytest.mark.parametrize(
    "fields",
    [
        "'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), ",
        "'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000000000,), ",
        "'descr': '<f4', 'fortran_order': False, 'shape': (13, ",
        "'descr': '<04', 'fortran_order': False, 'shape': (13 1), ",
        "'descr': (), 'fortran_order': False, 'shape': (13, 1), ",
        "'descr': '<f4', b'fortran_order': False, 'shape': (13, 1), ",
    ],
)
def test_headers_that_make_no_sense_are_described(fields, tmp_path):
    header = f"{{{fields}}}".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        archive.writestr("height.npy", b"\x93NUMPY\x01\x00\x76\x00" + header.encode() + bytes(52))
    with pytest.raises(AimeGymError, match=r"0\.npz: 'height' cannot be read"):
        load_trajectory(tmp_path / "0.npz", ("height",))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([1], r"expected keys and values; got \[1\]"),
        ({"sources": [1]}, r"'sources' is an object; got \[1\]"),
        ({"sources": {"a": 1}}, "holds 1 where an object"),
        ({"sources": {"a": {"task": 1}}}, "'task' is a string; got 1"),
        ({"expert_return": "high"}, "'expert_return' is a number; got 'high'"),
        ({"embodiment": ["walker"]}, "'embodiment' is a string"),
    ],
)
def test_metadata_of_another_form_are_described(metadata, message, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(metadata))
    with pytest.raises(AimeGymError, match=rf"dataset\.json.*{message}"):
        read_metadata(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_never_give_anything_but_a_clear_error(data, trajectory, tmp_path_factory):
    path = save_trajectory(tmp_path_factory.mktemp("damaged"), 0, trajectory)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
            content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = load_trajectory(path)
    except AimeGymError as error:
        message = str(error)
    else:  # the damage hit bytes that carry nothing
        assert all(np.isfinite(array).all() for array in loaded.values())
        return
    assert str(path) in message


def test_an_empty_or_foreign_folder_is_refused(tmp_path, trajectory):
    with pytest.raises(AimeGymError, match="no data set folder"):
        TrajectoryDataset(tmp_path / "none")
    with pytest.raises(AimeGymError, match="holds no trajectories"):
        TrajectoryDataset(tmp_path)
    for name in ("walker", "cheetah"):
        save_trajectory(tmp_path / name, 0, trajectory)
        write_metadata(tmp_path / name, {"embodiment": name})
    with pytest.raises(AimeGymError, match="different embodiments: cheetah, walker"):
        TrajectoryDataset([tmp_path / "walker", tmp_path / "cheetah"])
    with zipfile.ZipFile(tmp_path / "walker" / "1.npz", "w"):
        pass
    with pytest.raises(AimeGymError, match=r"1\.npz lacks pre_action"):
        TrajectoryDataset(tmp_path / "walker")


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    horizon=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_lie_within_one_trajectory(lengths, horizon, seed):
    dataset = TrajectoryDataset(
        [
            {"pre_action": np.zeros((n, 1), np.float32), "tag": np.stack([np.full(n, i), np.arange(n)], 1)}
            for i, n in enumerate(lengths)
        ]
    )
    if max(lengths) < horizon:
        with pytest.raises(AimeGymError, match="fits into no trajectory"):
            dataset.sample_windows(4, horizon, np.random.default_rng(seed))
        return
    windows = dataset.sample_windows(40, horizon, np.random.default_rng(seed))
    tags = windows["tag"].astype(int)  # [T, B, 2]
    assert tags.shape == (horizon, 40, 2)
    assert (tags[..., 0] == tags[0, :, 0]).all()
    assert (np.diff(tags[..., 1], axis=0) == 1).all()
    assert (tags[-1, :, 1] < np.array(lengths)[tags[0, :, 0]]).all()
    again = dataset.sample_windows(40, horizon, np.random.default_rng(seed))
    np.testing.assert_array_equal(again["tag"], tags)


def test_every_window_is_equally_likely():
    lengths = [5, 11]
    dataset = TrajectoryDataset(
        [{"pre_action": np.zeros((n, 1), np.float32), "row": 100 * i + np.arange(n)} for i, n in enumerate(lengths)]
    )
    starts = dataset.sample_windows(20_000, 4, np.random.default_rng(0))["row"][0]
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == [0, 1, *range(100, 108)]
    np.testing.assert_allclose(counts / 20_000, 0.1, atol=0.015)


def test_a_split_is_by_trajectory_and_shares_memory(trajectory):
    dataset = TrajectoryDataset([trajectory] * 10)
    train, held_out = dataset.split(0.2, seed=1)
    assert (len(train), len(held_out)) == (8, 2)
    rows = {tuple(bound) for bound in train.bounds} | {tuple(bound) for bound in held_out.bounds}
    assert len(rows) == 10
    assert train.arrays["height"] is dataset.arrays["height"]
    with pytest.raises(AimeGymError, match="held-out share"):
        dataset.split(1.0)


def test_statistics_are_those_of_the_subset(trajectory):
    other = {key: array + 1 if array.dtype == np.float32 else array for key, array in trajectory.items()}
    mean, std = TrajectoryDataset([trajectory, other]).subset([1]).statistics(["velocity"])
    np.testing.assert_allclose(mean["velocity"], other["velocity"].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std["velocity"], other["velocity"].std(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("body", "task"),
    [("walker", "run"), ("cheetah", "flip-v1"), ("cartpole", "swingup"), ("reacher", "hard"), ("hopper", "rise")],
)
def test_relabelling_gives_the_reward_that_the_env_gave(body, task):
    body = get_embodiment(body)
    trajectory = record(task, steps=40, seed=2, body=body)
    rewards = relabel(trajectory, body, [task, body.tasks[0]])
    np.testing.assert_allclose(rewards[task], trajectory["reward"], atol=1e-6)
    assert rewards[body.tasks[0]].shape == (41, 1)


def test_relabelling_refuses_what_it_cannot_know(trajectory):
    with pytest.raises(AimeGymError, match="target or terrain"):
        relabel(trajectory, get_embodiment("finger"), ["turn_easy"])
    with pytest.raises(AimeGymError, match="no 'physics'"):
        relabel({"pre_action": trajectory["pre_action"]}, WALKER, ["walk"])


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_random_collection_is_the_same_however_it_is_split(tmp_path, workers):
    collect("pendulum", "swingup", "random", 3, tmp_path / "a", seed=4, workers=workers)
    collect("pendulum", "swingup", "random", 2, tmp_path / "b", seed=4, workers=1)
    kept = (tmp_path / "b" / "0.npz").stat().st_mtime_ns
    collect("pendulum", "swingup", "random", 3, tmp_path / "b", seed=4, workers=1)
    assert (tmp_path / "b" / "0.npz").stat().st_mtime_ns == kept
    for i in range(3):
        a, b = load_trajectory(tmp_path / "a" / f"{i}.npz"), load_trajectory(tmp_path / "b" / f"{i}.npz")
        np.testing.assert_array_equal(a["physics"], b["physics"])
    assert not np.array_equal(load_trajectory(tmp_path / "a" / "0.npz")["physics"], a["physics"])
    metadata = json.loads((tmp_path / "a" / "dataset.json").read_text())
    assert metadata["embodiment"] == "pendulum"
    with pytest.raises(AimeGymError, match="choose another --out"):
        collect("pendulum", "swingup", "random", 4, tmp_path / "b", seed=5)


def test_episodes_begin_within_those_that_a_model_has_stored(tmp_path):
    collect("pendulum", "swingup", "random", 4, tmp_path / "inside", starts="pendulum-state")
    starts = load_starts(load_pretrained_model("pendulum-state"))
    inside = starts["physics"][~starts["is_reset"]]
    begun = np.stack([load_trajectory(tmp_path / "inside" / f"{i}.npz")["physics"][0] for i in range(4)])
    assert len(np.unique(begun, axis=0)) > 1
    assert all((np.abs(inside - state).max(1) < 1e-9).any() for state in begun)
    collect("pendulum", "swingup", "random", 4, tmp_path / "again", starts="pendulum-state", workers=2)
    again = load_trajectory(tmp_path / "again" / "3.npz")
    np.testing.assert_array_equal(again["physics"], load_trajectory(tmp_path / "inside" / "3.npz")["physics"])
    with pytest.raises(AimeGymError, match="starts='pendulum-state', now asked for None"):
        collect("pendulum", "swingup", "random", 5, tmp_path / "inside")
    with pytest.raises(AimeGymError, match="Expected a model of cheetah; got one of pendulum"):
        collect("cheetah", "run", "random", 1, tmp_path / "other", starts="pendulum-state")
    with pytest.raises(AimeGymError, match="Pendulum-v1-state stores none"):
        collect("Pendulum-v1", "own", "random", 1, tmp_path / "other", starts="Pendulum-v1-state")
    assert not (tmp_path / "other").exists()


def test_held_actions_stay_for_a_while_and_often_reach_their_bounds(tmp_path):
    collect("pendulum", "swingup", "held", 6, tmp_path / "held", seed=4, workers=1)
    stays, saturated = [], []
    for i in range(6):
        actions = load_trajectory(tmp_path / "held" / f"{i}.npz")["pre_action"][1:, 0]
        stays.append(np.mean(actions[1:] == actions[:-1]))
        saturated.append(np.mean(np.abs(actions) == 1))
    assert 0.3 < np.mean(stays) < 0.97
    assert np.std(stays) > 0.05  # each trajectory has its own mean
    assert 0.3 < np.mean(saturated) < 0.7


def test_an_agent_strays_for_stretches_and_comes_back():
    rng = np.random.default_rng(0)
    strays = Stray(HeldActions(2, np.random.default_rng(1)), 0.25, rng)
    own = np.full(2, 0.5)
    theirs = np.array([not np.array_equal(strays(own), own) for _ in range(20_000)])
    assert abs(theirs.mean() - 0.25) < 0.04
    begins = np.flatnonzero(theirs[1:] & ~theirs[:-1])
    assert 5 < theirs.sum() / len(begins) < 11
    never = Stray(HeldActions(2, np.random.default_rng(1)), 0.0, rng)
    assert all(np.array_equal(never(own), own) for _ in range(500))


def test_held_choices_are_elements_of_their_space():
    choices = Choices("multi_discrete", (3, 2))
    held = HeldActions(5, np.random.default_rng(0), choices)
    drawn = np.stack([held() for _ in range(2000)])
    assert {tuple(values) for values in drawn} == {(i, j) for i in range(3) for j in range(2)}
    assert choices.space.contains(held())
    single = Choices("discrete", (4,))
    assert single.space.contains(HeldActions(4, np.random.default_rng(0), single)())


def test_sac_keeps_its_buffer_and_continues(tmp_path):
    from aime_gym.commands.collect import TrainingBuffer

    TrainingBuffer("pendulum", "swingup", tmp_path, seed=0).learn(1)
    again = TrainingBuffer("pendulum", "swingup", tmp_path, seed=0)
    assert again.agent.replay_buffer.size() == 500
    agent = again.learn(2)
    assert {path.name for path in tmp_path.glob("*.npz")} == {"0.npz", "1.npz"}
    first, second = load_trajectory(tmp_path / "0.npz"), load_trajectory(tmp_path / "1.npz")
    assert not np.array_equal(first["physics"], second["physics"])
    collect("pendulum", "swingup", str(agent), 1, tmp_path / "expert", noise=0.1, stray=0.5)
    with pytest.raises(AimeGymError, match=r"stray=0\.5, now asked for None"):
        collect("pendulum", "swingup", str(agent), 2, tmp_path / "expert", noise=0.1)
    assert load_sb3_agent(agent).action_space.shape == (1,)
    assert len(TrajectoryDataset(tmp_path / "expert")) == 1


def test_sac_writes_over_no_episode_where_one_is_missing(tmp_path):
    flags = {"policy": "sac", "expert": 0, "out": tmp_path / "buffer"}
    Collect("cartpole", "balance", trajectories=3, **flags).run()
    (tmp_path / "buffer" / "1.npz").unlink()
    kept = (tmp_path / "buffer" / "2.npz").read_bytes()
    Collect("cartpole", "balance", trajectories=4, **flags).run()
    assert sorted(path.stem for path in (tmp_path / "buffer").glob("*.npz")) == ["0", "2", "3", "4"]
    assert (tmp_path / "buffer" / "2.npz").read_bytes() == kept


def test_folders_of_something_else_are_refused(tmp_path, trajectory):
    save_trajectory(tmp_path / "bare", 0, trajectory)
    Collect("walker", trajectories=1, out=tmp_path / "random", workers=1).run()
    Mix((tmp_path / "random",), tmp_path / "demonstrations", observations_only=True).run()
    for folder, message in (("bare", "do not say what they are"), ("demonstrations", "was collected with")):
        with pytest.raises(AimeGymError, match=message):
            Collect("walker", trajectories=2, out=tmp_path / folder, workers=1).run()
        assert [path.name for path in (tmp_path / folder).glob("*.npz")] == ["0.npz"]
    with pytest.raises(AimeGymError, match="do not say what they are"):
        Mix((tmp_path / "random",), tmp_path / "bare", observations_only=True).run()
    (tmp_path / "empty").mkdir()
    with pytest.raises(AimeGymError, match="no trajectories"):
        Mix((tmp_path / "empty",), tmp_path / "new").run()


def test_actions_out_of_bounds_are_refused(tmp_path, trajectory):
    path = save_trajectory(tmp_path, 0, trajectory | {"pre_action": 2 * trajectory["pre_action"] + 0.1})
    with pytest.raises(AimeGymError, match=r"the action in row \d+ leaves \[-1, 1\]"):
        load_trajectory(path)


def test_sac_repeats_no_episode_after_a_kill_before_its_first_save(tmp_path):
    from aime_gym.commands.collect import TrainingBuffer

    TrainingBuffer("pendulum", "swingup", tmp_path, seed=0).learn(1)
    (tmp_path / "latest.zip").unlink()  # what a kill prevents
    again = TrainingBuffer("pendulum", "swingup", tmp_path, seed=0)
    again.learn(2)
    first, second = load_trajectory(tmp_path / "0.npz"), load_trajectory(tmp_path / "1.npz")
    assert not np.array_equal(first["physics"], second["physics"])
    assert again.agent.replay_buffer.size() == 1000, "the data of both runs"


class Job(gymnasium.Env):
    """Pays the same at every step, whatever one does."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))
    pay = 0.0

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), self.pay, False, False, {}


def test_sac_keeps_a_better_agent_when_it_goes_on(tmp_path, monkeypatch):
    from aime_gym.commands.collect import TrainingBuffer

    spec = gymnasium.envs.registration.EnvSpec("Job-v0", entry_point=Job, max_episode_steps=2)
    monkeypatch.setitem(gymnasium.registry, "Job-v0", spec)
    best = []
    for trajectories, pay in ((10, 2.0), (20, 1.0), (30, 3.0)):
        monkeypatch.setattr(Job, "pay", pay)
        TrainingBuffer("Job-v0", "own", tmp_path).learn(trajectories)
        best.append((tmp_path / "agent.zip").read_bytes())
    assert best[0] == best[1] != best[2]


@pytest.mark.parametrize("data", ["{", "[1]", "5", '{"clip_range": 1}'])
def test_an_agent_that_is_none_is_named(data, tmp_path):
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as archive:
        archive.writestr("data", data)
    content = bytearray((tmp_path / "agent.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 10] ^= 0 if data[-1] != "}" else 64  # how it is compressed
    (tmp_path / "agent.zip").write_bytes(content)
    with pytest.raises(AimeGymError, match=r"agent\.zip is not an agent saved by Stable-Baselines3"):
        load_sb3_agent(tmp_path / "agent.zip")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (Collect("wlaker"), "Did you mean 'walker'"),
        (Collect("walker", task="jog"), "Unknown task"),
        (Collect("walker", policy="agent.zip"), "no 'agent.zip'"),
        (Collect("walker", trajectories=0), "--trajectories starts at 1; got 0"),
        (Collect("walker", seed=-1), "--seed starts at 0; got -1"),
        (Collect("walker", stray=0.2), "of a saved agent; got 0.2"),
        (Collect("walker", policy="agent.zip", stray=1.0), "below 1"),
    ],
)
def test_collect_names_mistakes(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AimeGymError, match=message):
        command.run()
    assert list(tmp_path.iterdir()) == []
