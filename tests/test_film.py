"""Films of recorded trajectories beside the dreams of their actions."""

import io

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from aime_gym.cli import main
from aime_gym.commands.collect import RecordTrajectories
from aime_gym.commands.play import Film, Footage, draw_gif, draw_strip, film, load_rows
from aime_gym.data.dataset import split_indices
from aime_gym.data.trajectories import save_trajectory, write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_pretrained_model
from tests.random_models import write_random_model
from tests.tiny_model import make_tiny_model

STEPS = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three real trajectories of 21 rows, with random images."""
    folder = tmp_path_factory.mktemp("dataset")
    trajectories = []
    env = RecordTrajectories(gymnasium.make("AimeReal-Walker-v0", max_episode_steps=20), trajectories.append)
    env.action_space.seed(0)
    rng = np.random.default_rng(0)
    for index in range(3):
        env.reset(seed=index)
        while len(trajectories) == index:
            env.step(env.action_space.sample())
        images = rng.integers(0, 256, (21, 64, 64, 3), np.uint8)
        save_trajectory(folder, index, {**trajectories[index], "image": images})
    write_metadata(folder, {"embodiment": "walker", "task": "walk"})
    return folder


@pytest.fixture(scope="module")
def visual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visual")
    write_random_model(folder, setup="visual", standardise=False)
    return folder


@pytest.fixture(scope="module")
def tabular(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tabular"))


def test_a_dream_of_images_is_compared_with_the_data(visual, dataset):
    model = load_pretrained_model(visual)
    rows = load_rows(dataset / "1.npz", model, first=3, count=10 + STEPS)
    footage = film(model, rows)
    with np.load(dataset / "1.npz") as archive:
        images, actions = archive["image"][3:], torch.as_tensor(archive["pre_action"][3:])
    np.testing.assert_array_equal(footage.truth, images[9 : 10 + STEPS])
    # By hand: ten posterior steps, then prior steps under the actions that came next.
    frames = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    state = model.initial_state(1)
    for t in range(10):
        state = model.posterior_step(state, actions[t, None], model.encode({"image": frames[None, t, None]})[0], None)
    for t in range(10, 10 + STEPS):
        state = model.prior_step(state, actions[t, None], None)
    image = (model.decode(state, ["image"])["image"][0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert np.abs(footage.dream[-1] - image).max() <= 1
    changed = {**rows, "image": rows["image"].copy()}
    changed["image"][10:] = 0  # nothing after the burn-in is seen
    np.testing.assert_array_equal(film(model, changed).dream, footage.dream)


def test_a_dream_of_states_is_rendered_where_the_truth_is(gl, tabular, dataset, monkeypatch):
    model = load_pretrained_model(tabular)
    rows = load_rows(dataset / "0.npz", model, first=0, count=10 + STEPS)
    believed = torch.as_tensor(rows["physics"][9:]).float()
    speed = believed[:, 10].numpy() * 0.05
    monkeypatch.setattr(model.heads, "physics", lambda features: believed[-len(features) :].clone())
    footage = film(model, rows)
    assert footage.fps == 20
    assert len(footage.truth) == len(footage.dream) == STEPS + 1
    assert footage.truth[0].shape == (240, 240, 3)
    # A model that believes the truth differs from it by rounding and by the integration of its speed alone.
    assert np.abs(np.subtract(footage.truth[0], footage.dream[0], dtype=int)).mean() < 0.5
    assert np.abs(speed).max() > 0
    monkeypatch.undo()
    wrong = film(model, rows)
    np.testing.assert_array_equal(wrong.truth, footage.truth)
    assert np.abs(np.subtract(wrong.truth[-1], wrong.dream[-1], dtype=int)).mean() > 1


def test_the_command_writes_a_strip_and_a_gif_of_a_held_out_trajectory(visual, dataset, tmp_path, capsys):
    out = tmp_path / "film"
    words = ["film", str(visual), str(dataset), "--steps", "4", "--every", "2", "--out", str(out)]
    assert main(words) == 0
    assert str(dataset / f"{split_indices(3)[1][0]}.npz") in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"strip.png", "film.gif"}
    gif = Image.open(out / "film.gif")
    assert (gif.n_frames, gif.width, gif.info["duration"], gif.info["loop"]) == (STEPS + 1, 3 * 320, 50, 0)
    assert Image.open(out / "strip.png").width == 3 * 150
    assert main([*words, "--trajectory", "0"]) == 0
    assert str(dataset / "0.npz") in capsys.readouterr().out


def test_equal_frames_differ_by_grey():
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 256, (3, 8, 8, 3), np.uint8))
    assert all((frame == 127).all() for frame in Footage(frames, frames, 20).difference)
    black, white = [np.zeros((8, 8, 3), np.uint8)], [np.full((8, 8, 3), 255, np.uint8)]
    assert Footage(black, white, 20).difference[0].max() == 255
    assert Footage(white, black, 20).difference[0].min() == 0


def test_strips_and_gifs_take_any_rows():
    frames = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)]
    strip = Image.open(io.BytesIO(draw_strip({"real": frames, "dream": frames}, 2)))
    assert strip.size == (450, 330)
    assert Image.open(io.BytesIO(draw_gif({"real": frames}, 10))).n_frames == 5


def test_what_cannot_be_filmed_is_named(visual, tabular, dataset, tmp_path):
    def refused(model, message, folder=dataset, **options):
        with pytest.raises(AimeGymError, match=message):
            Film(str(model), folder, out=tmp_path / "film", **options).run()

    refused(visual, r"0\.npz has 21 rows; a film from row 0 on needs 50", trajectory=0)
    refused(visual, r"no trajectory file .*7\.npz", trajectory=7)
    refused(visual, "--first starts at 0", steps=0)
    with np.load(dataset / "0.npz") as archive:
        bare = {key: archive[key] for key in archive.files if key not in ("image", "physics")}
    save_trajectory(tmp_path / "bare", 0, bare)
    refused(visual, r"`aime-gym render .*bare` adds it", tmp_path / "bare", trajectory=0)
    foreign = make_tiny_model(tmp_path / "foreign", "Pendulum-v1")
    refused(foreign, f"nothing of Pendulum-v1 to film. `aime-gym play .*--model {foreign} --video", tmp_path / "bare")
    refused(tabular, r"0\.npz lacks physics", tmp_path / "bare", trajectory=0)
    refused(visual, "none to hold out", tmp_path / "bare")
    write_metadata(tmp_path / "bare", {"embodiment": "cheetah"})
    refused(visual, r"is of cheetah; the model .* is of walker", tmp_path / "bare")
    assert not (tmp_path / "film").exists()
