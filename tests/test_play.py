"""Dream and real env under the same keys, in a window and on film."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
from gymnasium.utils import env_checker
from stable_baselines3 import A2C

import aime_gym
from aime_gym.commands.play import DOWN, UP, Game, Play, keys_to_action
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.both_worlds import (
    BAR,
    HEIGHT,
    WIDTH,
    BothWorlds,
    doubt_bar,
    replay,
    side_by_side,
    what_the_film_shows,
)
from aime_gym.evaluation.worlds import Worlds
from aime_gym.world_model.checkpoint import load_starts
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def worlds():
    with Worlds("walker", "walk", max_episode_steps=6) as pair:
        yield pair


def test_both_worlds_are_the_dream_and_the_real_env_from_one_start(worlds):
    envs = BothWorlds(worlds, render_mode=None)
    observations, _ = envs.reset(seed=3)
    start = worlds.draw_starts(1, 3)
    alone = [worlds.dream_envs(1), worlds.real_envs(1)]
    for slot, (env, options) in enumerate(zip(alone, ({"start": start}, worlds.real_starts(start)), strict=True)):
        np.testing.assert_array_equal(observations[slot], env.reset(seed=[3], options=options)[0][0])
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 2, 6)).astype(np.float32)
    for step, pair in enumerate(actions):
        observations, rewards, _, truncations, infos = envs.step(pair)
        for slot, env in enumerate(alone):
            observation, reward, *_, info = env.step(pair[slot : slot + 1])
            np.testing.assert_array_equal(observations[slot], observation[0])
            assert rewards[slot] == reward[0]
            if slot == 0:
                assert infos["doubt"][0] == pytest.approx(info["doubt"][0])
        assert truncations.tolist() == [step == 5] * 2
    with pytest.raises(AimeGymError, match="reset"):
        envs.step(actions[0])
    for env in (*alone, envs):
        env.close()


def test_the_dream_is_shown_where_the_world_begins(worlds):
    """No sensor sees where the walker is along its way: the floor lay elsewhere in the dream's picture."""
    dream = worlds.dream_envs(3, render_mode="rgb_array")
    starts = worlds.draw_starts(3, 7)
    dream.reset(seed=0, options={"start": starts})
    (column,) = worlds.embodiment.translations
    real = worlds.real_starts(starts)["physics"][:, column]
    assert np.ptp(real) > 0.01
    np.testing.assert_allclose(dream.unwrapped.get_state()["root"][:, 0], real)
    bank = load_starts(worlds.model)
    frames = {name: bank[name][:, 0] for name in worlds.model.observed}
    actions = np.zeros((len(next(iter(frames.values()))), 6), np.float32)
    dream.reset(options={"start": {"observations": frames, "actions": actions}})  # of which that is not known
    assert (dream.unwrapped.get_state()["root"] == 0).all()
    dream.close()


def test_a_foreign_env_is_filmed_at_its_own_pace_beside_a_dream_without_pictures(tmp_path):
    pytest.importorskip("pygame")
    with Worlds("Pendulum-v1", None, make_tiny_model(tmp_path, "Pendulum-v1"), max_episode_steps=12) as pair:
        envs = BothWorlds(pair)
        assert envs.metadata["render_fps"] == 20  # a step takes 0.05 s; its frames a second say 30
        envs.reset(seed=0)
        (picture,) = envs.render()
        assert picture[BAR:-BAR, :WIDTH].std((0, 1)).max() == 0
        assert picture[BAR:-BAR, WIDTH:].std() > 5
        envs.close()
        assert "The dream has no picture" in what_the_film_shows(pair)
        assert "begins on its own" in what_the_film_shows(pair)
        film = tmp_path / "film.mp4"
        film.write_bytes(side_by_side("random", pair, steps=4))
        assert len(imageio.mimread(film)) == 4
        seen = replay("random", pair)
        assert seen.seconds == 0.05


def test_the_picture_shows_both_worlds_and_the_doubt(worlds, gl):
    envs = BothWorlds(worlds)
    envs.reset(seed=0)
    envs.step(np.zeros((2, 6), np.float32))
    (picture,) = envs.render()
    assert picture.shape == (BAR + HEIGHT + BAR, 2 * WIDTH, 3)
    assert np.abs(picture[BAR:-BAR, :WIDTH].astype(int) - picture[BAR:-BAR, WIDTH:]).mean() < 20, "same start"
    envs.close()
    calm, usual, alarm = (doubt_bar(doubt, 2.0).astype(int) for doubt in (0.0, 1.9, 9.0))
    assert (usual[:, :, 1] - usual[:, :, 0] > 30).sum() > (calm[:, :, 1] - calm[:, :, 0] > 30).sum()
    assert (alarm[:, :, 0] - alarm[:, :, 1] > 60).sum() > 2 * (usual[:, :, 1] - usual[:, :, 0] > 30).sum() * 0.9


def test_keys_push_one_dimension_each_and_add_up():
    meanings = keys_to_action(6)
    assert all(np.abs(action).max() <= 1 for action in meanings.values())
    np.testing.assert_array_equal(meanings[("q",)], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(meanings[("h",)], [0, 0, 0, 0, 0, -1])
    np.testing.assert_array_equal(meanings[("a", "w")], [-1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(meanings[("a", "q")], np.zeros(6))
    assert len(set(UP + DOWN)) == 20
    assert len(keys_to_action(21)) == sum(np.prod(range(20 - n + 1, 21)) // [1, 1, 2, 6][n] for n in (1, 2, 3))


def test_the_game_is_a_gymnasium_env(worlds):
    game = Game(BothWorlds(worlds, render_mode=None))
    env_checker.check_env(game, skip_render_check=True)
    agent = Game(BothWorlds(worlds, render_mode=None), "random")
    rewards = []
    for _ in range(2):
        agent.reset(seed=4)
        rewards.append([agent.step(np.zeros(6))[1] for _ in range(4)])
    assert rewards[0] == rewards[1]
    game.close(), agent.close()


def test_a_window_is_played_by_keys_until_escape(monkeypatch, gl):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame = pytest.importorskip("pygame")
    taken = []
    step = Game.step

    def watched(self, action):
        taken.append(action.copy())
        key = {2: pygame.K_q, 5: pygame.K_ESCAPE}.get(len(taken))
        if key is not None:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))
        return step(self, action)

    monkeypatch.setattr(Game, "step", watched)
    assert aime_gym.play("walker", steps=20) is None
    assert taken[0].tolist() == [0] * 6
    assert taken[-1].tolist() == [1, 0, 0, 0, 0, 0]


WINDOW = """
import gymnasium, pygame
from gymnasium.wrappers import HumanRendering
import aime_gym
from aime_gym.commands.play import Game

env = HumanRendering(gymnasium.make("AimeReal-Walker-v0", render_mode="rgb_array", width=64, height=48))
env.reset(seed=0)
env.step(env.action_space.sample())
env.close()

taken, step = [], Game.step

def watched(self, action):
    taken.append(pygame.display.get_driver())
    if len(taken) == 3:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_ESCAPE))
    return step(self, action)

Game.step = watched
aime_gym.play("walker", steps=20)
print(taken)
"""


@pytest.mark.skipif(shutil.which("xvfb-run") is None, reason="no Xvfb here (apt-get install xvfb)")
def test_a_window_on_a_screen_leaves_the_pictures(gl):
    """With SDL's dummy driver no window has a GL context; on a screen it has."""
    pytest.importorskip("pygame")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SDL_")}
    screen = ["xvfb-run", "--auto-servernum", sys.executable, "-W", "ignore", "-c", WINDOW]
    done = subprocess.run(screen, env=environment, capture_output=True, text=True, timeout=120)
    assert "['x11', 'x11', 'x11']" in done.stdout, done.stderr


@pytest.mark.parametrize("agent", [None, "random"])
def test_without_a_display_a_film_is_written(tmp_path, monkeypatch, capsys, gl, agent):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Play(steps=4, agent=agent).run()
    assert "runs/play.mp4" in capsys.readouterr().out
    assert len(imageio.mimread(tmp_path / "runs/play.mp4")) == 4


def test_what_cannot_be_played_is_refused(tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(AimeGymError, match="no display"):
        aime_gym.play("walker")
    with pytest.raises(AimeGymError, match="steps is a positive integer"):
        aime_gym.play("walker", steps=0, video=tmp_path / "film.mp4")
    with pytest.raises(AimeGymError, match="film is an mp4"):
        aime_gym.play("walker", steps=2, video=tmp_path / "film.gif")
    stranger = A2C("MlpPolicy", "Pendulum-v1", device="cpu")
    with pytest.raises(AimeGymError, match="another body"):
        aime_gym.play("walker", agent=stranger, steps=2, video=tmp_path / "film.mp4")


def test_an_agent_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AimeGymError, match=r"no agent .*none\.zip"):
        aime_gym.play("walker", agent=str(tmp_path / "none.zip"), video=tmp_path / "film.mp4")


@pytest.mark.parametrize("vector", [False, True])
def test_gymnasiums_recorders_film_dreams(tmp_path, gl, vector):
    if vector:
        if not hasattr(gym.wrappers.vector, "RecordVideo"):
            pytest.skip("this Gymnasium has no recorder of vector envs")
        envs = gym.make_vec("AimeDream-Walker-v0", num_envs=2, render_mode="rgb_array", max_episode_steps=5)
        env = gym.wrappers.vector.RecordVideo(envs, str(tmp_path), episode_trigger=lambda _: True, video_length=5)
    else:
        dream = gym.make("AimeDream-Walker-v0", render_mode="rgb_array", max_episode_steps=5)
        env = gym.wrappers.RecordVideo(dream, str(tmp_path), episode_trigger=lambda _: True)
    env.reset(seed=0)
    for _ in range(5):
        env.step(env.action_space.sample())
    env.close()
    films = list(tmp_path.glob("*.mp4"))
    assert films
    assert all(len(imageio.mimread(film)) >= 5 for film in films)
