"""`aime-gym demonstrations`: files of other people, and what a model can see of and explain in them."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.cli import main
from aime_gym.commands import imitate
from aime_gym.commands.data_sets import ToMinari
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.demonstrations import FilesOfOthers, expert_return, load_demonstrations
from aime_gym.data.trajectories import load_trajectory, read_metadata, trajectory_paths
from aime_gym.envs.wrappers import SETTLING, best_evidence
from aime_gym.errors import AimeGymError
from aime_gym.observations import to_tensors
from aime_gym.world_model.checkpoint import load_pretrained_model
from tests.random_data import record

STEPS = 50


@pytest.fixture(scope="module")
def swings(tmp_path_factory) -> Path:
    """Three random episodes of the pendulum."""
    with gymnasium.make("AimeReal-Pendulum-v0", max_episode_steps=STEPS) as env:
        return record(env, tmp_path_factory.mktemp("swings"), 3, STEPS, embodiment="pendulum")


@pytest.fixture
def shown(swings, tmp_path, monkeypatch):
    """What they show, [T, 3] each; the test is in a folder of its own, and few windows are scored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imitate, "WINDOWS", 4)
    monkeypatch.setattr(imitate, "STEPS", 12)
    monkeypatch.setattr(imitate, "UPDATES", 15)
    episodes = (load_trajectory(path) for path in trajectory_paths(swings))
    return [np.concatenate([one["orientation"], one["velocity"]], 1) for one in episodes]


def sensors(folder: str | Path, name: str) -> list[np.ndarray]:
    return [load_trajectory(path, (), images=True)[name] for path in trajectory_paths(Path(folder))]


def reads(**options) -> FilesOfOthers:
    return FilesOfOthers(get_embodiment("pendulum"), **{"arrays": {}, **options})


def test_files_of_any_kind_show_the_same(shown, swings, monkeypatch):
    """An array of all sensors, arrays by names, many episodes in one file, HDF5, Minari, our own folders: one set."""
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("minari")
    flat, ends = np.concatenate(shown), np.cumsum([len(one) for one in shown]) - 1
    np.savez("one.npz", observations=flat, timeouts=np.isin(np.arange(len(flat)), ends))
    numbers = np.repeat(np.arange(len(shown)), [len(one) for one in shown])
    with h5py.File("two.hdf5", "w") as file:
        for name, column in {"turn": flat[:, :2], "speed": flat[:, 2:], "number": numbers}.items():
            file[name] = column
    for i, one in enumerate(shown):
        np.savez(f"each{i}.npz", orientation=one[:, :2], velocity=one[:, 2], actions=np.zeros((len(one) - 1, 7)))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path.cwd()))
    ToMinari(swings, "pendulum/swings-v0").run()
    parts = {"orientation": "turn", "velocity": "speed"}
    sets = {
        "flat": reads().write(["one.npz"], Path("flat")),
        "named": reads(arrays=parts, episode="number").write(["two.hdf5"], Path("named")),
        "each": reads().write([f"each{i}.npz" for i in range(3)], Path("each")),
        "ours": reads().write([swings], Path("ours")),
        "minari": reads().write(["minari:pendulum/swings-v0"], Path("minari")),
    }
    for folder in sets.values():
        assert read_metadata(folder)["embodiment"] == "pendulum"
        for name, columns in (("orientation", slice(0, 2)), ("velocity", slice(2, 3))):
            for seen, one in zip(sensors(folder, name), shown, strict=True):
                np.testing.assert_array_equal(seen, one[:, columns])
        assert set(load_trajectory(folder / "0.npz", ())) == {"orientation", "velocity"}  # neither actions nor rewards
    model = load_pretrained_model("pendulum-state")
    assert len(load_demonstrations(sets["flat"], model.config, 16)) == 3
    assert expert_return(sets["ours"]) == pytest.approx(expert_return(swings))  # type: ignore[arg-type]


def test_what_an_env_of_others_shows_is_read_as_its_model_sees_it(tmp_path):
    states = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    np.savez(tmp_path / "log.npz", observations=states)
    folder = FilesOfOthers(get_embodiment("Pendulum-v1"), {}).write([tmp_path / "log.npz"], tmp_path / "out")
    (sensor,) = get_embodiment("Pendulum-v1").sensors
    np.testing.assert_array_equal(sensors(folder, sensor.name)[0], states)
    np.savez(tmp_path / "odd.npz", observations=states[:, :2])
    with pytest.raises(AimeGymError, match="Pendulum-v1"):
        FilesOfOthers(get_embodiment("Pendulum-v1"), {}).write([tmp_path / "odd.npz"], tmp_path / "odd")
    with pytest.raises(AimeGymError, match="shows Pendulum-v1; expected pendulum"):
        reads().write([folder], tmp_path / "mixed")


def test_rewards_become_the_return_that_imitators_are_compared_with(shown):
    for i, one in enumerate(shown):
        np.savez(f"{i}.npz", observations=one, rewards=np.full(len(one), 0.1 * (i + 1)))
    folder = reads().write([f"{i}.npz" for i in range(3)], Path("paid"), task="swingup")
    assert expert_return(folder) == pytest.approx(0.2 * (STEPS + 1))
    assert read_metadata(folder)["task"] == "swingup"


def test_a_film_is_read_at_the_clock_of_the_body_and_cut_to_a_square(tmp_path):
    # imageio 2.38.1, asked for 20 a second, begins with 0, 2, 4: findings/imageio_fps_keeps_the_first_frames.sh
    brightness = np.arange(90) * 2
    with imageio.get_writer(tmp_path / "film.mp4", fps=30, codec="libx264", macro_block_size=2) as film:
        for value in brightness:
            frame = np.zeros((96, 160, 3), np.uint8)
            frame[:, 32:128] = value  # beside it is black
            film.append_data(frame)  # type: ignore[attr-defined]
    for told, expected in (
        ({"rate": 20.0}, brightness[np.round(np.arange(60) * 1.5).astype(int)]),
        ({"rate": None}, brightness),
        ({"rate": 20.0, "fps": 60.0}, brightness[::3]),  # played at half the speed
    ):
        folder = reads(**told).write([tmp_path / "film.mp4"], tmp_path / str(sorted(told)) / str(told["rate"]))
        (images,) = sensors(folder, "image")
        assert images.shape == (len(expected), 64, 64, 3)
        assert images.dtype == np.uint8
        np.testing.assert_allclose(images.mean((1, 2, 3)), expected, atol=6)
    with pytest.raises(AimeGymError, match="30 frames a second; pendulum takes 50 steps"):
        reads(rate=50.0).write([tmp_path / "film.mp4"], tmp_path / "few")
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    with pytest.raises(AimeGymError, match="not a readable film"):
        reads().write([tmp_path / "broken.mp4"], tmp_path / "none")


def test_pictures_in_arrays_become_small(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (12, 1, 1, 3), np.uint8)
    picture = np.zeros((12, 80, 128, 3), np.uint8)
    picture[:, :, 24:104] = colours  # beside the square is black
    np.savez(tmp_path / "pictures.npz", observations=picture)
    (images,) = sensors(folder := reads().write([tmp_path / "pictures.npz"], tmp_path / "out"), "image")
    np.testing.assert_array_equal(TrajectoryDataset(folder, ("image",), images=True).arrays["image"], images)
    assert images.shape == (12, 64, 64, 3)
    assert (images == colours).all()


@pytest.mark.parametrize(
    ("arrays", "told", "problem"),
    [
        ({"observations": np.zeros((9, 5))}, {}, "5 numbers; pendulum shows 3: orientation 2, velocity 1; or 2"),
        ({"orientation": np.zeros((9, 3))}, {}, "'orientation' has 3 numbers a row; pendulum's has 2"),
        ({"observations": np.full((9, 3), np.nan)}, {}, "row 0 of 'observations' is nan"),
        ({"turns": np.zeros((9, 2))}, {}, "lacks 'observations' or 'observation'"),
        ({"turns": np.zeros((9, 2))}, {"arrays": {"orientatoin": "turns"}}, "Did you mean 'orientation'"),
        ({"image": np.zeros((9, 64, 64, 3), np.float32)}, {}, "expected uint8"),
        ({"orientation": np.array(3.0)}, {}, "numbers, with a row a step"),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_is_written(arrays, told, problem, tmp_path):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(AimeGymError, match=problem):
        reads(**told).write([tmp_path / "odd.npz"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_best_actions_explain_as_much_as_the_true_ones(swings):
    model = load_pretrained_model("pendulum-state")
    names = (*model.observed, "pre_action")
    observations = to_tensors({name: np.stack(sensors(swings, name), 1)[:20] for name in names})
    true = observations.pop("pre_action")
    found, actions = best_evidence(model, observations, updates=15)
    none, known = (
        model.evidence(observations, acted, sample=False).per_step[SETTLING:].mean()
        for acted in (torch.zeros_like(true), true)
    )
    assert actions.shape == true.shape
    assert float(actions.abs().max()) <= 1
    assert float(found[SETTLING:].mean()) > max(float(none) + 0.1, float(known) - 0.05)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_command_says_before_training_whether_a_model_can_explain_them(shown, capsys):
    for i, one in enumerate(shown):
        np.savez(f"real{i}.npz", observations=one)
        np.savez(f"fast{i}.npz", observations=one[::2])
        np.savez(f"turn{i}.npz", orientation=one[:, :2])
    assert main(["demonstrations", *(f"real{i}.npz" for i in range(3)), "--body", "pendulum", "--out", "real"]) == 0
    assert "It can explain what they show: aime-gym imitate --model pendulum-state" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["demonstrations", *(f"fast{i}.npz" for i in range(3)), "--model", "pendulum-state", "--out", "f"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "It cannot explain what they show" in out
    assert "another clock" in out
    words = ["demonstrations", *(f"turn{i}.npz" for i in range(3)), "--body", "pendulum", "--out", "t"]
    assert main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "pendulum-state also needs velocity. `aime-gym train DATA --dynamics pendulum-state --setup lpomdp`" in out
    np.savez("carts.npz", observations=np.zeros((9, 4)))
    assert main(["demonstrations", "carts.npz", "--body", "CartPole-v1", "--out", "carts"]) == 0
    assert "not scored: imitators infer actions that are numbers" in " ".join(capsys.readouterr().out.split())
    assert main(["demonstrations", "real0.npz", "--body", "pendulm"]) == 2
    assert "Did you mean 'pendulum'" in capsys.readouterr().err
    assert main(["demonstrations", "real0.npz"]) == 2
    assert "--body walker" in capsys.readouterr().err
    assert main(["demonstrations", "real0.npz", "--model", "pendulum-state", "--observation", "velocity="]) == 2
    assert "SENSOR=NAME" in capsys.readouterr().err
