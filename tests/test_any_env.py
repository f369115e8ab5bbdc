"""Envs of other people, whatever they call their sensors and however they show a picture."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import A2C, PPO, SAC, HerReplayBuffer
from torch import nn

import aime_gym
from aime_gym.bodies.lookup import body_of_spaces, get_embodiment
from aime_gym.bodies.sensors import is_free, name_inside, own_name, picture_in
from aime_gym.commands.collect import Collect
from aime_gym.commands.pretrain import Pretrain
from aime_gym.commands.train import Train
from aime_gym.data.trajectories import load_trajectory
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.both_worlds import replay
from aime_gym.evaluation.worlds import Worlds
from aime_gym.flags import HeadsOptions, TrainOptions

TINY = {
    **{"memory_dim": 16, "stochastic_dim": 4, "hidden_size": 16, "encoder_size": 16, "decoder_size": 16},
    **{"batch_size": 4, "horizon": 8, "evaluation_windows": 4, "held_out": 0.3, "tensorboard": False, "threads": 1},
    **{"updates": 2, "image_width": 4},
    "heads": HeadsOptions(updates=2, batch_size=4, hidden_size=16, ensemble_hidden_size=8, ensemble=2),
}
ODD_NAMES = (
    *("joint pos/left", "a.b", "reward", "pre_action", "is_first", "is_terminal", "physics", "image", "tabular"),
    *("keys", "type", "file", "training", "", "_private", "größe", "sensor__keys", "sensor__", "plain"),
)


class Sensors(gym.Env):
    """Shows one number under each of many names."""

    def __init__(self, names=ODD_NAMES):
        self.names = names
        self.observation_space = spaces.Dict({name: spaces.Box(-np.inf, np.inf, (1,)) for name in names})
        self.action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-0.5, 0.5)
        return self._show(), {}

    def step(self, action):
        self.place += 0.1 * float(action[0])
        return self._show(), -abs(self.place), False, False, {}

    def _show(self):
        return {name: np.full(1, self.place + number, np.float32) for number, name in enumerate(self.names)}


class Picture(gym.Env):
    """Shows a picture and nothing else, as CarRacing does; knows no render modes."""

    observation_space = spaces.Box(0, 255, (24, 32, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(0.3, 0.7)
        return self._show(), {}

    def step(self, action):
        self.place = np.clip(self.place + 0.05 * float(action[0]), 0, 1)
        return self._show(), float(self.place), False, False, {}

    def _show(self):
        return np.full((24, 32, 3), round(255 * self.place), np.uint8)


class Mixed(gym.Env):
    """Shows parts of every kind, one within another."""

    observation_space = spaces.Dict(
        {
            "mode": spaces.Discrete(3, start=1),
            "arm": spaces.Tuple([spaces.Box(-np.inf, np.inf, (1, 2)), spaces.MultiBinary(2)]),
            "board": spaces.Dict({"squares": spaces.MultiDiscrete([[2, 3], [2, 4]])}),
        }
    )
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.mode = 0, int(self.np_random.integers(1, 4))
        return self._show(), {}

    def step(self, action):
        self.steps, self.mode = self.steps + 1, 1 + int(action)
        return self._show(), float(action), False, False, {}

    def _show(self):
        odd = self.steps % 2
        arm = np.array([[self.steps, -1]], np.float32), np.array([odd, 1], np.int8)
        return {"mode": self.mode, "arm": arm, "board": {"squares": np.array([[odd, 2], [0, 3 * odd]])}}


class Rendered(Picture):
    """Can be rendered, and says so nowhere."""

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.zeros((2, 2, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def envs():
    before = dict(gym.registry)
    gym.register("Sensors-v3", entry_point=Sensors, max_episode_steps=70)
    gym.register("Picture-v3", entry_point=Picture, max_episode_steps=70)
    gym.register("Mixed-v3", entry_point=Mixed, max_episode_steps=40)
    yield
    gym.registry.clear()
    gym.registry.update(before)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8), st.text(max_size=8))
def test_every_name_has_one_of_its_own_inside(one, other):
    assert is_free(name_inside(one))
    assert own_name(name_inside(one)) == one
    assert (name_inside(one) == name_inside(other)) == (one == other)
    modules = nn.ModuleDict({name_inside(one): nn.Identity()})
    assert list(modules) == [name_inside(one)]


@pytest.mark.parametrize("plain", ["orientations", "height", "velocity", "observation", "achieved_goal", "sensor_1"])
def test_plain_names_stay_as_they_are(plain):
    assert name_inside(plain) == plain


def test_sensors_of_any_name_are_collected_trained_and_dreamt(tmp_path, capsys):
    Collect("Sensors-v3", trajectories=4, out=tmp_path / "data", workers=1).run()
    assert "'a.b' is sensor__a_2e_b" in capsys.readouterr().out
    trajectory = load_trajectory(tmp_path / "data" / "0.npz")
    for number, name in enumerate(ODD_NAMES):
        first = trajectory[name_inside("")] - ODD_NAMES.index("")
        np.testing.assert_allclose(trajectory[name_inside(name)], first + number, atol=1e-4)
    Train((tmp_path / "data",), out=tmp_path / "model", **TINY).run()
    world = gym.make("AimeReal-v0", embodiment="Sensors-v3", obs_type="dict")
    dream = gym.make("AimeDream-v0", model=tmp_path / "model", obs_type="dict")
    assert dream.observation_space == world.observation_space
    assert {own_name(name) for name in dream.observation_space.spaces} == set(ODD_NAMES)
    observation, _ = dream.reset(seed=0)
    assert observation in dream.observation_space
    envs = aime_gym.make_sb3_env("AimeDream-v0", 2, model=tmp_path / "model", obs_type="dict")
    PPO("MultiInputPolicy", envs, n_steps=4, batch_size=8, n_epochs=1).learn(8)
    with Worlds("Sensors-v3", model=tmp_path / "model") as worlds:
        assert worlds.evaluate("zero", episodes=2)[1].lengths.tolist() == [70, 70]


MIXED = {"mode": 3, "arm/0": 2, "arm/1": 2, "board/squares": 11}
"""The parts of `Mixed`, by path, and how many numbers each becomes."""


def test_parts_of_every_kind_are_flattened_as_gymnasium_does():
    env, body = gym.make("Mixed-v3"), get_embodiment("Mixed-v3")
    assert sorted((own_name(sensor.name), sensor.dim) for sensor in body.sensors) == sorted(MIXED.items())
    world = gym.make("AimeReal-v0", embodiment="Mixed-v3")
    assert world.observation_space.shape == spaces.flatten_space(env.observation_space).shape
    shown, own = world.reset(seed=3)[0], env.reset(seed=3)[0]
    for action in (0, 2, 1):
        np.testing.assert_allclose(shown, spaces.flatten(env.observation_space, own))
        shown, own = world.step(action)[0], env.step(action)[0]


def test_parts_of_every_kind_are_collected_trained_dreamt_and_shown(tmp_path):
    Collect("Mixed-v3", trajectories=4, out=tmp_path / "data", workers=1).run()
    Train((tmp_path / "data",), out=tmp_path / "model", **TINY).run()
    world = gym.make("AimeReal-v0", embodiment="Mixed-v3", obs_type="dict")
    dream = gym.make("AimeDream-v0", model=tmp_path / "model", obs_type="dict")
    assert dream.observation_space == world.observation_space
    inside = {own: name_inside(own) for own in MIXED}
    assert dream.observation_space[inside["mode"]] == spaces.Discrete(3)
    assert dream.observation_space[inside["board/squares"]] == spaces.MultiDiscrete([2, 3, 2, 4])
    for env in (world, dream):
        assert env.reset(seed=0)[0] in env.observation_space
        shown = env.step(2)[0]
        assert shown in env.observation_space
    assert world.step(2)[0][inside["mode"]] == 2  # of 1 to 3 the last, from 0 on
    assert load_trajectory(tmp_path / "data" / "0.npz")[inside["mode"]].sum(1).tolist() == [1] * 41
    latents = aime_gym.LatentObservation(world, str(tmp_path / "model"))
    plain = aime_gym.LatentObservation(gym.make("AimeReal-v0", embodiment="Mixed-v3"), str(tmp_path / "model"))
    np.testing.assert_array_equal(latents.reset(seed=1)[0], plain.reset(seed=1)[0])
    frames = {name: np.stack([part]) for name, part in world.reset(seed=1)[0].items()}
    start = {"observations": frames, "actions": np.zeros((1, 3), np.float32)}
    assert dream.reset(options={"start": start})[0] in dream.observation_space
    envs = aime_gym.make_sb3_env("AimeDream-v0", 2, model=tmp_path / "model", obs_type="dict")
    agent = PPO("MultiInputPolicy", envs, n_steps=4, batch_size=8, n_epochs=1).learn(8)
    compared = aime_gym.compare(agent, "Mixed-v3", model=tmp_path / "model", episodes=1, max_episode_steps=12)
    assert np.isfinite(compared.policies[0].gap)
    with Worlds("Mixed-v3", model=tmp_path / "model", obs_type="dict") as worlds:
        assert len(replay(agent, worlds, dreams=2).real_rewards) > 1


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Blackjack-v1"])
def test_toys_of_gymnasium_are_bodies(env_id):
    env, world = gym.make(env_id), gym.make("AimeReal-v0", embodiment=env_id)
    np.testing.assert_array_equal(
        world.reset(seed=0)[0], spaces.flatten(env.observation_space, env.reset(seed=0)[0]).astype(np.float32)
    )
    assert world.action_space == env.action_space


def test_parts_of_one_path_are_refused():
    space = spaces.Dict({"a": spaces.Tuple([spaces.Discrete(2)]), "a/0": spaces.Discrete(2)})
    with pytest.raises(AimeGymError, match="Two parts of the observations of It-v0 are called 'a/0'"):
        body_of_spaces("It-v0", space, spaces.Discrete(2))


def test_an_env_that_shows_a_picture_alone_is_collected_trained_and_dreamt(tmp_path, capsys):
    body = get_embodiment("Picture-v3")
    assert (body.sensors, body.has_image) == ((), True)
    Collect("Picture-v3", trajectories=4, out=tmp_path / "data", workers=1).run()
    trajectory = load_trajectory(tmp_path / "data" / "0.npz", images=True)
    np.testing.assert_allclose(trajectory["reward"][1:, 0] * 255, trajectory["image"][1:, 0, 0, 0], atol=0.51)
    Train((tmp_path / "data",), out=tmp_path / "model", **TINY).run()
    assert "shows an image and nothing else" in capsys.readouterr().out
    world = gym.make("AimeReal-v0", embodiment="Picture-v3")
    dream = gym.make("AimeDream-v0", model=tmp_path / "model")
    assert dream.observation_space == world.observation_space == spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert dream.reset(seed=0)[0] in dream.observation_space
    with pytest.raises(AimeGymError, match="no ensemble: take doubt=True"):
        gym.make("AimeDream-v0", model=tmp_path / "model", doubt="ensemble")
    with Worlds("Picture-v3", model=tmp_path / "model") as worlds:
        dreamt, real = worlds.evaluate("zero", episodes=2)
        assert real.lengths.tolist() == [70, 70]
        assert np.isfinite(dreamt.returns).all()


@pytest.mark.parametrize("steps", [50, 6])
def test_episodes_shorter_than_windows_are_trained_on_and_dreamt(steps, tmp_path, capsys):
    gym.register(f"Short{steps}-v3", entry_point=Sensors, max_episode_steps=steps, kwargs={"names": ("place",)})
    Collect(f"Short{steps}-v3", trajectories=4, out=tmp_path / "data", workers=1).run()
    Train((tmp_path / "data",), out=tmp_path / "model", **{**TINY, "horizon": 60}).run()
    assert f"--horizon is {steps + 1}" in capsys.readouterr().out
    dream = gym.make("AimeDream-v0", model=tmp_path / "model")
    dream.reset(seed=0)
    ends = [dream.step(dream.action_space.sample())[3] for _ in range(steps)]
    assert ends == [False] * (steps - 1) + [True]


def test_an_env_that_shows_no_number_is_found_out_by_its_first_episode(tmp_path):
    class Broken(Sensors):
        def step(self, action):
            return {"place": np.full(1, np.nan, np.float32)}, 0.0, True, False, {}

    gym.register("Broken-v3", entry_point=Broken, max_episode_steps=5, kwargs={"names": ("place",)})
    with pytest.raises(AimeGymError, match="An episode of Broken-v3: 'place' has a value in row 1"):
        Collect("Broken-v3", trajectories=3, out=tmp_path / "data", workers=1).run()
    assert not list(tmp_path.rglob("*.npz"))


def test_an_env_that_cannot_be_made_says_so_in_its_own_words():
    class Failing(gym.Env):
        def __init__(self):
            raise RuntimeError("no licence here")

    gym.register("Failing-v3", entry_point=Failing)
    with pytest.raises(AimeGymError, match=r"Failing-v3.*no licence here"):
        get_embodiment("Failing-v3")


def test_an_env_without_render_modes_says_so_and_can_be_stepped_by_sb3():
    with pytest.raises(AimeGymError, match=r"Picture-v3 cannot be rendered .* it knows none at all"):
        gym.make("AimeReal-v0", embodiment="Picture-v3", render_mode="rgb_array")
    gym.register("Quiet-v3", entry_point=lambda render_mode=None, **kwargs: Rendered(render_mode), max_episode_steps=5)
    quiet = gym.make("AimeReal-v0", embodiment="Quiet-v3", render_mode="rgb_array")
    quiet.reset()
    assert quiet.render().shape == (2, 2, 3)
    envs = aime_gym.make_sb3_env("AimeReal-v0", 2, embodiment="Picture-v3")
    assert envs.reset().shape == (2, 64, 64, 3)
    assert envs.render_mode is None
    assert aime_gym.make_sb3_env("AimeReal-v0", embodiment="Pendulum-v1").render_mode == "rgb_array"


@pytest.mark.usefixtures("gl")
@pytest.mark.parametrize(
    "env_id", ["InvertedPendulum-v5", pytest.param("shimmy:dm_control/acrobot-swingup-v0", marks=pytest.mark.slow)]
)
def test_envs_of_others_have_pictures_without_a_display(env_id):
    code = f"""
import gymnasium, aime_gym
env = gymnasium.make("AimeReal-v0", embodiment="{env_id}", render_mode="rgb_array")
env.reset(seed=0)
assert env.render().std() > 1
"""
    unset = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_rewards_of_goals_can_be_computed():
    class Goal(Sensors):
        def __init__(self):
            super().__init__(("observation", "achieved_goal", "desired_goal"))

        def compute_reward(self, achieved, desired, info):
            return -np.abs(achieved - desired)

    gym.register("Goal-v3", entry_point=Goal, max_episode_steps=5)
    envs = aime_gym.make_sb3_env("AimeReal-v0", 2, embodiment="Goal-v3", obs_type="dict")
    assert envs.env_method("compute_reward", 1.0, 3.0, {}) == [-2.0, -2.0]
    buffer = {"learning_starts": 12, "replay_buffer_class": HerReplayBuffer, "policy_kwargs": {"net_arch": [4]}}
    SAC("MultiInputPolicy", envs, **buffer).learn(20)
    assert not hasattr(gym.make("AimeReal-v0", embodiment="Pendulum-v1").unwrapped, "compute_reward")


@pytest.mark.parametrize(
    ("env_id", "obs_type", "policy"),
    [
        ("Sensors-v3", "dict", "MultiInputPolicy"),
        ("Picture-v3", "image", "CnnPolicy"),
    ],
)
def test_agents_on_all_that_envs_show_collect(env_id, obs_type, policy, tmp_path):
    envs = aime_gym.make_sb3_env("AimeReal-v0", embodiment=env_id, obs_type=obs_type)
    A2C(policy, envs, seed=0, policy_kwargs={"net_arch": [4]}).save(tmp_path / "agent.zip")
    Collect(env_id, policy=str(tmp_path / "agent.zip"), trajectories=1, out=tmp_path / "data", workers=1).run()
    actions = load_trajectory(tmp_path / "data" / "0.npz")["pre_action"][1:]
    assert len(actions) == 70
    assert np.ptp(actions) < 1, "not random ones"
    with pytest.raises(AimeGymError, match="Is it of another body"):
        Collect("Pendulum-v1", policy=str(tmp_path / "agent.zip"), trajectories=1, out=tmp_path / "other").run()
    assert not (tmp_path / "other").exists()


def test_sac_is_refused_where_there_are_no_sensors_before_a_step(tmp_path):
    with pytest.raises(AimeGymError, match="shows an image alone"):
        Collect("Picture-v3", policy="sac", trajectories=4, out=tmp_path / "data").run()
    with pytest.raises(AimeGymError, match="--buffer 0"):
        Pretrain("Picture-v3", out=tmp_path / "model", work=tmp_path / "work", train=TrainOptions(**TINY)).run()
    assert not list(tmp_path.iterdir())


BYTES = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
GRAY = BYTES[..., :1]


@pytest.mark.parametrize(
    ("shown", "high", "expected"),
    [
        (BYTES, 255, BYTES),
        (BYTES.transpose(2, 0, 1), 255, BYTES),
        (BYTES.astype(np.int64), 255, BYTES),
        ((BYTES / 255).astype(np.float32), 1, BYTES),
        (BYTES.transpose(2, 0, 1).astype(np.float64), 255, BYTES),
        (GRAY, 255, GRAY.repeat(3, -1)),
        (GRAY.transpose(2, 0, 1), 255, GRAY.repeat(3, -1)),
        (GRAY[..., 0], 255, GRAY.repeat(3, -1)),
        ((GRAY / 255).astype(np.float32), 1, GRAY.repeat(3, -1)),
    ],
)
def test_pictures_of_every_layout_are_one(shown, high, expected):
    read, usual = (
        picture_in(spaces.Box(0, top, array.shape, array.dtype.type), "it")
        for array, top in ((shown, high), (expected, 255))
    )
    np.testing.assert_array_equal(read(shown), usual(expected))
    assert read(shown).shape == (64, 64, 3)
    assert read(shown).dtype == np.uint8


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 255, (4, 84, 84), np.uint8),
        spaces.Box(0, 255, (84, 84, 12), np.uint8),
        spaces.Box(0, 255, (4, 84, 84, 3), np.uint8),
        spaces.Box(-np.inf, np.inf, (64, 64, 3), np.float32),
        spaces.Box(0, 1, (64, 64), np.float32),
    ],
)
def test_pictures_of_unknown_layouts_are_refused_with_the_remedy(space):
    with pytest.raises(AimeGymError, match=r"no frame stack.*FlattenObservation"):
        body_of_spaces("It-v0", space, spaces.Box(-1, 1, (1,)))


def test_parts_without_numbers_are_left_out():
    none, one = spaces.Box(-1, 1, (0,)), spaces.Box(-1, 1, (1,))
    body = body_of_spaces("It-v0", spaces.Dict({"none": none, "one": one}), one)
    assert [sensor.name for sensor in body.sensors] == ["one"]
    for observations, actions in ((none, one), (one, none)):
        with pytest.raises(AimeGymError, match="of one number or more; It-v0 has"):
            body_of_spaces("It-v0", observations, actions)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 1, (5000,), np.float32),
        spaces.Box(-np.inf, np.inf, (10, 13), np.float32),
        spaces.Box(0, 2, (9, 9), np.uint8),
        spaces.Box(0, 1, (4, 4, 3), np.float32),
        spaces.Box(0, 255, (8,), np.uint8),
        spaces.Box(-1, 1, (), np.float32),
    ],
)
def test_vectors_and_small_tables_stay_sensors(space):
    body = body_of_spaces("It-v0", space, spaces.Box(-1, 1, (1,)))
    assert [sensor.dim for sensor in body.sensors] == [int(np.prod(space.shape))]
    assert not body.has_image


def test_films_of_the_real_env_go_by_its_own_clock():
    """Gymnasium 1.4.0's Pendulum has a wrong pace: findings/gymnasium_pendulum_is_filmed_too_fast.sh."""
    env = gym.make("AimeReal-v0", embodiment="Pendulum-v1", render_mode="rgb_array")
    assert env.metadata["render_fps"] == 20 == round(1 / env.unwrapped.control_timestep)
    env.close()


class Pays(gym.Env):
    """Pays what it is told to."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, reward=0.0):
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), self.reward, False, False, {}


class Shows(Pays):
    """Shows something else than its space says."""

    observation_space = spaces.Dict(place=spaces.Box(-1, 1, (2,)), gear=spaces.Discrete(3))

    def __init__(self, shown):
        self.shown = shown

    def reset(self, *, seed=None, options=None):
        return self.shown, {}


@pytest.mark.parametrize(
    "shown", [{"place": np.zeros(2)}, {"place": np.zeros(3), "gear": 0}, {"place": "up", "gear": 0}, np.zeros(2)]
)
def test_observations_that_are_not_of_their_space_are_named(shown):
    gym.register("Shows-v3", entry_point=Shows, max_episode_steps=20, kwargs={"shown": shown})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make("AimeReal-v0", embodiment="Shows-v3", disable_env_checker=True)
        with pytest.raises(AimeGymError, match=r"Shows-v3 says that it shows '(place|gear)' in .*check_env"):
            env.reset(seed=0)


@pytest.mark.parametrize(("reward", "told"), [(np.ones(1), r"shape \[1\]"), (None, "None"), ("much", "'much'")])
def test_rewards_that_are_no_number_are_refused_before_anything_is_kept(tmp_path, reward, told):
    gym.register("Pays-v3", entry_point=Pays, max_episode_steps=20, kwargs={"reward": reward})
    with pytest.raises(AimeGymError, match=rf"Pays-v3 pays {told} for a step; expected one number"):
        Collect("Pays-v3", trajectories=2, out=tmp_path / "data", workers=1).run()
    assert not (tmp_path / "data" / "0.npz").exists()
    gym.register("Pays-v3", entry_point=Pays, max_episode_steps=20, kwargs={"reward": np.float64(0.5)})
    env = gym.make("AimeReal-v0", embodiment="Pays-v3")
    env.reset(seed=0)
    assert env.step(np.zeros(1, np.float32))[1] == 0.5
