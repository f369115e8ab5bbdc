"""Images rendered afterwards from stored physics are those that the real env shows live."""

import gymnasium
import numpy as np
import pytest

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.cli import main
from aime_gym.commands.collect import RecordTrajectories
from aime_gym.commands.data_sets import Mix, Render, jobs_of
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import (
    load_trajectory,
    read_metadata,
    rendering_of,
    save_trajectory,
    trajectory_keys,
    write_metadata,
)
from aime_gym.errors import AimeGymError


def record(body="walker", task="walk", steps=4, obs_type="state"):
    """A trajectory and, for obs_type="image", what the env showed on its way."""
    trajectories, images = [], []
    env = gymnasium.make(f"AimeReal-{get_embodiment(body).title}-v0", task=task, obs_type=obs_type)
    env = RecordTrajectories(gymnasium.wrappers.TimeLimit(env.unwrapped, steps), trajectories.append)
    env.action_space.seed(0)
    images.append(env.reset(seed=0)[0])
    for _ in range(steps):
        images.append(env.step(env.action_space.sample())[0])
    env.close()
    return trajectories[0], np.stack(images)


def make_dataset(folder, trajectories, body="walker", task="walk"):
    for index, trajectory in enumerate(trajectories):
        save_trajectory(folder, index, trajectory)
    write_metadata(folder, {"embodiment": body, "task": task})
    return folder


@pytest.fixture(scope="module")
def trajectory():
    return record()[0]


# The walker's camera follows it, the quadruped's root is a quaternion, "fetch" has a ball in its physics, and "spin"
# hides a target that the model has.
@pytest.mark.parametrize(
    ("body", "task"), [("walker", "run"), ("quadruped", "walk"), ("quadruped", "fetch"), ("finger", "spin")]
)
def test_images_are_those_of_the_live_env(gl, body, task, tmp_path):
    trajectory, live = record(body, task, obs_type="image")
    np.testing.assert_array_equal(trajectory.pop("image"), live)  # which the record keeps as it is shown
    folder = make_dataset(tmp_path, [trajectory], body, task)
    Render((folder,), workers=1).run()
    rendered = load_trajectory(folder / "0.npz", images=True)
    assert rendered["image"].dtype == np.uint8
    assert (live[0] != live[-1]).any()
    np.testing.assert_array_equal(rendered["image"], live)
    for key, array in trajectory.items():
        np.testing.assert_array_equal(rendered[key], array)


def test_a_second_run_renders_only_what_is_new(gl, trajectory, tmp_path, capsys):
    folder = make_dataset(tmp_path, [trajectory] * 2)
    assert main(["render", str(folder), "--workers", "1"]) == 0
    assert "All 2 trajectories" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    save_trajectory(folder, 2, trajectory)
    assert main(["render", str(folder), "--workers", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    images = TrajectoryDataset(folder, images=True).arrays["image"]
    assert images.shape == (15, 64, 64, 3)
    np.testing.assert_array_equal(images[:5], images[10:])
    assert jobs_of(folder) == []


def test_images_drawn_fast_say_so_and_mix_with_no_others(gl, trajectory, tmp_path):
    """They are those that the env shows if asked for them; a folder goes on as it was begun."""
    fast, full = (make_dataset(tmp_path / name, [trajectory]) for name in ("fast", "full"))
    assert main(["render", str(fast), "--fast", "--workers", "1"]) == 0
    Render((full,), workers=1).run()
    assert read_metadata(fast) == {**read_metadata(full), "rendering": "fast"}
    env = gymnasium.make("AimeReal-Walker-v0", task="walk", obs_type="image", rendering="fast")
    live, _ = env.reset(options={"physics": trajectory["physics"][2]})
    env.close()
    np.testing.assert_array_equal(load_trajectory(fast / "0.npz", images=True)["image"][2], live)
    for folder, asked, told in ((fast, False, "'fast'.*give --fast"), (full, True, "'full'.*leave --fast away")):
        save_trajectory(folder, 1, trajectory)
        with pytest.raises(AimeGymError, match=told):
            Render((folder,), fast=asked, workers=1).run()
    with pytest.raises(AimeGymError, match="one rendering"):
        Mix((fast, full), tmp_path / "both").run()
    Mix((fast,), tmp_path / "mixed").run()
    assert rendering_of(read_metadata(tmp_path / "mixed")) == "fast"


def test_a_folder_of_two_names_is_rendered_once(gl, trajectory, tmp_path, capsys):
    folder = make_dataset(tmp_path, [trajectory])
    Render((folder, folder / ".." / folder.name), workers=1).run()
    assert capsys.readouterr().out == f"All 1 trajectories of {folder} have images.\n"
    assert jobs_of(folder) == []


def test_a_broken_state_is_named_and_its_file_stays(gl, trajectory, tmp_path):
    short = {**trajectory, "physics": trajectory["physics"][:, :-1]}
    folder = make_dataset(tmp_path, [trajectory, short])
    with pytest.raises(AimeGymError, match=r"1\.npz: 'physics' is not of walker walk.* 18 finite numbers"):
        Render((folder,), workers=1).run()
    assert [("image" in trajectory_keys(folder / f"{i}.npz")) for i in (0, 1)] == [True, False]
    nan = {**trajectory, "physics": np.full_like(trajectory["physics"], np.nan)}
    save_trajectory(folder, 1, nan)
    with pytest.raises(AimeGymError, match=r"1\.npz: 'physics' has a value in row 0"):
        Render((folder,), workers=1).run()


def test_what_cannot_be_rendered_is_named_before_anything_is(trajectory, tmp_path):
    folder = make_dataset(tmp_path / "a", [trajectory])
    with pytest.raises(AimeGymError, match="is of walker; --embodiment is cheetah"):
        jobs_of(folder, "cheetah")
    save_trajectory(folder, 1, {key: array for key, array in trajectory.items() if key != "physics"})
    with pytest.raises(AimeGymError, match=r"1\.npz has no 'physics'"):
        jobs_of(folder)
    (folder / "1.npz").write_bytes(b"no archive")
    with pytest.raises(AimeGymError, match=r"1\.npz is not a readable npz file"):
        jobs_of(folder)
    with pytest.raises(AimeGymError, match="holds no trajectories"):
        jobs_of(make_dataset(tmp_path / "empty", []))
    with pytest.raises(AimeGymError, match="Did you mean 'walker'"):
        jobs_of(make_dataset(tmp_path / "misspelt", [trajectory], body="wlaker"))
    with pytest.raises(AimeGymError, match="one folder of trajectories or more"):
        Render(()).run()


def test_a_data_set_without_a_body_needs_one(trajectory, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    save_trajectory(tmp_path, 0, trajectory)
    with pytest.raises(AimeGymError, match="give --embodiment"):
        jobs_of(tmp_path)
    assert jobs_of(tmp_path, "walker") == [(tmp_path / "0.npz", "walker", "walk", "full")]


def test_hidden_targets_are_refused_in_mixed_data_too(trajectory, tmp_path):
    folder = make_dataset(tmp_path, [trajectory])
    write_metadata(folder, {"embodiment": "finger", "task": "turn_easy"})
    with pytest.raises(AimeGymError, match="finger turn_easy, whose images show a target"):
        jobs_of(folder)
    sources = {task: {"embodiment": "finger", "task": task} for task in ("spin", "turn_hard")}
    write_metadata(folder, {"embodiment": "finger", "sources": sources})
    with pytest.raises(AimeGymError, match="finger turn_hard"):
        jobs_of(folder)


def test_a_missing_gl_library_is_named_at_once(trajectory, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(AimeGymError, match="MUJOCO_GL"):
        Render((make_dataset(tmp_path, [trajectory]),)).run()
