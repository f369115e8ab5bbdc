"""Any Gymnasium env is a body: its data, its model, its dream under an id of its own, and Minari's data sets."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import aime_gym
from aime_gym.agents.dreaming import learn
from aime_gym.agents.plain import make_agent, observation_statistics
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import describe_env, from_own_actions, get_embodiment, to_own_action
from aime_gym.commands.collect import Collect
from aime_gym.commands.compare import Compare
from aime_gym.commands.data_sets import Mix
from aime_gym.commands.dream import Dream
from aime_gym.commands.pretrain import Pretrain
from aime_gym.commands.train import Train
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.minari_sets import read_minari
from aime_gym.data.trajectories import load_trajectory, save_trajectory, write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.worlds import Worlds
from aime_gym.files import DIGESTS
from aime_gym.flags import HeadsOptions, TrainOptions
from aime_gym.training.model_folder import make_starts
from aime_gym.world_model.checkpoint import load_pretrained_model
from tests.random_models import write_random_model

TINY = {
    **{"memory_dim": 16, "stochastic_dim": 4, "hidden_size": 16, "encoder_size": 16, "decoder_size": 16},
    **{"batch_size": 8, "horizon": 10, "evaluation_windows": 4, "held_out": 0.3, "tensorboard": False, "threads": 1},
}
HEADS = HeadsOptions(updates=150, batch_size=8, hidden_size=16, ensemble_hidden_size=8, ensemble=2, lr=1e-2)
SCARCELY = dataclasses.replace(HEADS, updates=2)
"""Heads that nothing is asked of."""


class Cliff(gym.Env):
    """A point that its action moves; beyond 1 it falls off, which costs 20. What it shows is a Dict with an image."""

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own convention

    def __init__(self, render_mode: str | None = None, sides: int = 1):
        self.observation_space = spaces.Dict(
            {
                "place": spaces.Box(-np.inf, np.inf, (1, sides), np.float64),
                "view": spaces.Box(0, 255, (8, 8, 3), np.uint8),
            }
        )
        self.action_space = spaces.Box(np.array([-1.0, 2.0]), np.array([3.0, 4.0]), dtype=np.float64)
        self.place, self.actions = 0.0, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.actions = self.np_random.uniform(-0.5, 0.5), []
        return self._show(), {}

    def step(self, action):
        self.actions.append(action)
        self.place += 0.3 * (float(action[0]) - 1)
        fell = abs(self.place) > 1
        return self._show(), -1.0 - self.place - 20 * fell, fell, False, {}

    def _show(self):
        view = np.full((8, 8, 3), np.clip(100 + 100 * self.place, 0, 255), np.uint8)
        return {"place": np.full((1, 1), self.place), "view": view}


class Bounded(gym.Env):
    """Shows the action that it was given, and accepts no other than its own."""

    def __init__(self, render_mode: str | None = None, low: float = -1, high: float = 1, dtype: str = "f4"):
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,))
        self.action_space = spaces.Box(low, high, (1,), np.dtype(dtype).type)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action in self.action_space
        return action.astype(np.float32), 0.0, False, False, {}


class Untaken(Bounded):
    """Takes actions of a kind that nothing here takes."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Dict({"push": spaces.Discrete(2)})


class Told(Bounded):
    """Shows words."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Tuple([spaces.Text(9)])


@pytest.fixture(scope="module", autouse=True)
def cliff():
    gym.register("Cliff-v3", entry_point=Cliff, max_episode_steps=60)
    gym.register("Bounded-v3", entry_point=Bounded)
    gym.register("Untaken-v3", entry_point=Untaken)
    gym.register("Told-v3", entry_point=Told)
    yield
    del gym.registry["Cliff-v3"], gym.registry["Bounded-v3"], gym.registry["Untaken-v3"], gym.registry["Told-v3"]


@pytest.fixture
def registry():
    """What a test registers is gone after it."""
    before = dict(gym.registry)
    yield
    gym.registry.clear()
    gym.registry.update(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory, cliff):
    folder = tmp_path_factory.mktemp("cliff") / "random"
    Collect("Cliff-v3", trajectories=20, out=folder, workers=1).run()
    return folder


@pytest.fixture(scope="module")
def model(data):
    out = data.parent / "model"
    Train((data,), out=out, updates=300, lr=5e-3, heads=HEADS, **TINY).run()
    return out


def test_an_env_becomes_a_body():
    body = get_embodiment("Pendulum-v1")
    assert body.foreign
    assert body.name == "Pendulum-v1"
    assert [(sensor.name, sensor.dim) for sensor in body.sensors] == [("observation", 3)]
    assert (body.action_dim, body.action_repeat, body.episode_steps, body.tasks) == (1, 1, 200, ("own",))
    cliff = get_embodiment("Cliff-v3")
    assert cliff.has_image
    assert [sensor.name for sensor in cliff.sensors] == ["place"]
    assert get_embodiment("AimeReal-BallInCup-v0") is get_embodiment("AimeDream-BallInCup-v0")
    assert not get_embodiment("AimeReal-BallInCup-v0").foreign


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Untaken-v3", "actions in a Box of one number or more"),
        ("Told-v3", "observations that are a Box"),
        ("Nothing-v7", "neither a body of the suite nor an env that Gymnasium can make"),
        ("no_such_package:Nothing-v7", "no_such_package"),
    ],
)
def test_envs_that_cannot_be_a_body_say_why(name, message):
    with pytest.raises(AimeGymError, match=message):
        describe_env(name)


@pytest.mark.parametrize("obs_type", ["state", "dict", "image"])
def test_the_real_env_has_the_spaces_of_its_dream(obs_type):
    env = gym.make("AimeReal-v0", embodiment="Cliff-v3", obs_type=obs_type)
    check_env(env.unwrapped, skip_render_check=True)
    observation, _ = env.reset(seed=3)
    assert observation in env.observation_space
    if obs_type == "image":
        assert observation.shape == (64, 64, 3)
    with pytest.raises(AimeGymError, match=r"in \[-1, 1\]"):
        env.unwrapped.step(np.array([0.0, 1.5]))


def test_files_import_nothing(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("import gymnasium\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_random_model(tmp_path / "model")
    path = tmp_path / "model" / "config.yaml"
    (tmp_path / "model" / DIGESTS).unlink()
    content = [line for line in path.read_text().splitlines() if "action_dim" not in line]
    path.write_text("\n".join(content).replace("embodiment: walker", "embodiment: evil_module:X-v0"))
    with pytest.raises(AimeGymError, match="files import nothing: `import evil_module` first"):
        load_pretrained_model(tmp_path / "model")
    Collect("pendulum", trajectories=2, out=tmp_path / "data", workers=1).run()
    write_metadata(tmp_path / "data", {"embodiment": "evil_module:X-v0"})
    with pytest.raises(AimeGymError, match="files import nothing"):
        Train((tmp_path / "data",), out=tmp_path / "out", **TINY).run()
    assert "evil_module" not in sys.modules
    with pytest.raises(AimeGymError, match="neither a body of the suite nor an env"):
        get_embodiment("evil_module:X-v0")  # the user's own word is another thing
    assert "evil_module" in sys.modules


def test_actions_are_stretched_to_the_bounds_of_the_env():
    env = gym.make("AimeReal-v0", embodiment="Cliff-v3")
    env.reset(seed=0)
    for action in ([-1, -1], [1, 1], [0, 0.5]):
        env.step(np.array(action, np.float32))
    inner = env.unwrapped._env.unwrapped
    np.testing.assert_allclose(inner.actions, [[-1, 2], [3, 4], [1, 3.5]], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(low=st.floats(-4e5, 4e5, width=32), reach=st.floats(2**-10, 4e5, width=32), dtype=st.sampled_from(["f4", "f8"]))
@example(low=-0.95, reach=1.23, dtype="f4")
def test_no_rounding_leaves_the_bounds_of_the_env(low, reach, dtype):
    env = gym.make("AimeReal-v0", embodiment="Bounded-v3", low=low, high=low + reach, dtype=dtype)
    env.reset(seed=0)
    for action in np.linspace(-1, 1, 11, dtype=np.float32):
        taken = env.step(np.array([action]))[0].item()
        assert taken == pytest.approx(low + reach * (action + 1) / 2, rel=1e-5, abs=0.1)


@pytest.mark.parametrize(("low", "high", "dtype"), [(-128, 127, "i1"), (0, 255, "u1"), (0, 3, "i8")])
def test_envs_take_integer_actions_up_to_the_outer_values(low, high, dtype):
    env = gym.make("AimeReal-v0", embodiment="Bounded-v3", low=low, high=high, dtype=dtype)
    env.reset(seed=0)
    taken = [env.step(np.array([action], np.float32))[0].item() for action in (-1, -0.999, 0.999, 1)]
    assert taken == [low, low, high, high]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
def test_actions_of_any_number_kind_reach_both_bounds(dtype):
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    extremes = (limits.min, limits.max) if limits.bits < 32 or limits.dtype.kind != "f" else (-1e6, 1e6)
    for low, high in (extremes, (0, 3), (1, 1)):
        space = spaces.Box(low, high, (2,), np.dtype(dtype).type)
        grid = np.linspace(-1, 1, 81)
        taken = np.stack([to_own_action(np.array([action, -action], np.float32), space) for action in grid])
        assert taken.dtype == dtype
        assert all(own in space for own in taken)
        assert (taken[0].tolist(), taken[-1].tolist()) == ([low, high], [high, low])
        assert (np.diff(taken[:, 0].astype(object)) >= 0).all()  # nothing wraps around
        if high == 3 and limits.bits <= 64 and np.dtype(dtype).kind in "iu":
            assert set(taken[2:-2, 0].tolist()) == {0, 1, 2, 3}  # the outer values, too, without the outermost actions
        again = np.stack([to_own_action(action, space) for action in from_own_actions(taken, space)])
        np.testing.assert_allclose(again.astype(float), taken.astype(float), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("low", "high", "ends"),
    [
        (-np.inf, np.inf, (-1, 1)),
        (-1e10, 1e10, (-1, 1)),
        (5, np.inf, (5, 7)),
        (-np.inf, -3, (-5, -3)),
        (0, 2e6, (0, 2)),
        (-1e6, 1e6, (-1e6, 1e6)),
    ],
)
def test_bounds_that_nobody_means_are_none(low, high, ends):
    space = spaces.Box(low, high, (2,), np.float64)
    for action, end in zip((-1, 1), ends, strict=True):
        own = to_own_action(np.full(2, action), space)
        assert own.tolist() == [end, end]
        assert own in space
        np.testing.assert_allclose(from_own_actions(own[None], space), np.full((1, 2), action))


@pytest.mark.usefixtures("registry")
def test_actions_without_bounds_are_said_to_have_none():
    gym.register("Endless-v9", entry_point=Bounded, kwargs={"low": -1e10, "high": 1e10, "dtype": "f8"})
    with pytest.warns(UserWarning, match=r"no bounds.*stand for \[-1.0\] and \[1.0\]"):
        get_embodiment("Endless-v9")
    env = gym.make("AimeReal-v0", embodiment="Endless-v9")
    env.reset(seed=0)
    assert env.step(np.array([0.5]))[0].tolist() == [0.5]


class Restless(gym.Env):
    """Begins anywhere, whatever the seed, and cuts its episodes itself."""

    observation_space = action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, heeds: bool = False):
        self.heeds = heeds

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed if self.heeds else None)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), float(self.steps), False, self.steps == 12, {}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("heeds", [True, False])
def test_envs_that_ignore_seeds_are_found_at_the_first_look(heeds):
    gym.register("Restless-v9", entry_point=Restless, kwargs={"heeds": heeds})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            get_embodiment("Restless-v9")
    assert [str(one.message).startswith("Restless-v9 ignores reset(seed=...)") for one in said] == [True] * (not heeds)


@pytest.mark.usefixtures("registry")
def test_dreams_of_envs_that_cut_themselves_are_as_long_as_their_episodes(tmp_path):
    gym.register("Restless-v9", entry_point=Restless, kwargs={"heeds": True})
    Collect("Restless-v9", trajectories=4, out=tmp_path / "data", workers=1).run()
    heads = HeadsOptions(updates=2, batch_size=4, hidden_size=16, ensemble_hidden_size=8, ensemble=2)
    Train((tmp_path / "data",), out=tmp_path / "model", updates=2, heads=heads, **TINY).run()
    compared = aime_gym.compare("random", "Restless-v9", model=tmp_path / "model", episodes=2)
    assert compared.policies[0].dream.lengths.tolist() == compared.policies[0].real.lengths.tolist() == [12, 12]
    dream = gym.make("AimeDream-v0", model=tmp_path / "model")
    dream.reset(seed=0)
    assert [dream.step(dream.action_space.sample())[3] for _ in range(12)] == [False] * 11 + [True]
    Train(
        (tmp_path / "data",), out=tmp_path / "on", updates=2, heads=heads, pretrained=str(tmp_path / "model"), **TINY
    ).run()


@pytest.mark.usefixtures("registry")
def test_episodes_beyond_an_envs_own_are_said_not_to_be_had():
    gym.register("Restless-v9", entry_point=Restless, kwargs={"heeds": True})
    env = gym.make("AimeReal-v0", embodiment="Restless-v9", episode_steps=50)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for episode in range(2):
            env.reset(seed=episode)
            while not env.step(np.zeros(1))[3]:
                pass
    (once,) = said
    assert "after 12 steps: episode_steps=50 cannot lengthen" in str(once.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = gym.make("AimeReal-v0", embodiment="Restless-v9", episode_steps=9)
        short.reset(seed=0)
        assert [short.step(np.zeros(1))[3] for _ in range(9)][-1]


def test_pendulum_is_gymnasiums_own():
    ours, own = gym.make("AimeReal-v0", embodiment="Pendulum-v1"), gym.make("Pendulum-v1")
    np.testing.assert_array_equal(ours.reset(seed=4)[0], own.reset(seed=4)[0])
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 1)).astype(np.float32)
    for action in actions:
        a, b = ours.step(action), own.step(2 * action)
        np.testing.assert_allclose(a[0], b[0], atol=1e-6)
        np.testing.assert_allclose(a[1], b[1], atol=1e-6)
        assert a[2:4] == b[2:4]
    assert a[3]


def test_other_spaces_are_another_body():
    with pytest.raises(AimeGymError, match=r"'sides': 2\} is another body.* gymnasium\.register\('Mine-v0'"):
        gym.make("AimeReal-v0", embodiment="Cliff-v3", sides=2)


@pytest.mark.usefixtures("registry")
def test_an_env_need_not_know_render_modes():
    class Bare(gym.Env):
        observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

        def reset(self, **kwargs):
            super().reset(seed=kwargs.get("seed"))
            return np.zeros(1, np.float32), {}

    gym.register("Bare-v9", entry_point=Bare, max_episode_steps=5)
    assert gym.make("AimeReal-v0", embodiment="Bare-v9").reset(seed=0)[0].shape == (1,)


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
@pytest.mark.usefixtures("registry")
def test_an_id_that_is_registered_anew_is_another_body():
    for sides in (3, 7):
        gym.register("Cliff-v9", entry_point=Cliff, kwargs={"sides": sides}, max_episode_steps=10 * sides)
        body = get_embodiment("Cliff-v9")
        assert (body.sensors[0].dim, body.episode_steps) == (sides, 10 * sides)
        assert get_embodiment("Cliff-v9") is body
    for model in ("walker-state", "cheetah-state"):
        aime_gym.register_dream("Mine-v9", model)
        assert model == f"{get_embodiment('Mine-v9').name}-state"
        assert gym.spec("Mine-v9").kwargs["model"] == model


@pytest.mark.usefixtures("registry")
def test_a_dream_is_found_from_anywhere(tmp_path, monkeypatch):
    write_random_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    aime_gym.register_dream("Mine-v9", "model")
    monkeypatch.chdir("/")
    assert gym.make("Mine-v9", task="run").reset(seed=0)[0].shape == (24,)


@pytest.mark.parametrize("render_mode", ["rgb_array_list", "human"])
@pytest.mark.parametrize("env_id", ["AimeDream-v0", "AimeReal-v0"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ids_of_any_body_take_the_render_modes_of_the_others(env_id, render_mode, tmp_path):
    if env_id == "AimeDream-v0":
        write_random_model(tmp_path)
        env = gym.make(env_id, model=tmp_path, render_mode=render_mode)
    else:
        env = gym.make(env_id, embodiment="walker", render_mode=render_mode)
    assert env.render_mode == render_mode
    assert env.unwrapped.render_mode == "rgb_array"


def test_the_time_limit_is_the_bodys_own_unless_another_is_given():
    def length(**kwargs):
        env = gym.make("AimeReal-v0", embodiment="Pendulum-v1", **kwargs)
        env.reset(seed=0)
        for step in range(1, 400):
            if env.step(np.zeros(1, np.float32))[3]:
                return step
        raise AssertionError("it never ends")

    assert [length(), length(max_episode_steps=7), length(episode_steps=300)] == [200, 7, 300]


def test_dreams_side_by_side_have_the_same_time_limit(tmp_path):
    model = write_random_model(tmp_path)

    def length(**kwargs):
        return gym.make_vec("AimeDream-v0", num_envs=2, model=model, **kwargs).max_episode_steps

    assert [length(), length(episode_steps=700), length(max_episode_steps=7)] == [500, 700, 7]
    assert length(episode_steps=700, max_episode_steps=600) == 600
    assert aime_gym.make_sb3_env("AimeDream-v0", 2, model=model, episode_steps=9).get_attr("max_episode_steps")[0] == 9
    with pytest.raises(AimeGymError, match="episode_steps is a positive integer"):
        length(episode_steps=0)


def test_trajectories_record_everything(data):
    trajectory = load_trajectory(data / "3.npz", ("place", "pre_action", "reward"), images=True)
    assert trajectory["image"].shape == (len(trajectory["place"]), 64, 64, 3)
    assert "physics" not in trajectory
    assert "view" not in trajectory
    np.testing.assert_allclose(
        np.diff(trajectory["place"][:, 0]), 0.6 * trajectory["pre_action"][1:, 0], atol=1e-6
    )  # actions are stored in [-1, 1]
    over = np.abs(trajectory["place"][:, 0]) > 1
    np.testing.assert_allclose(trajectory["reward"][1:, 0], (-1 - trajectory["place"][:, 0] - 20 * over)[1:], atol=1e-5)
    np.testing.assert_array_equal(trajectory["is_terminal"], over)


def test_windows_hold_a_terminal_state(data):
    dataset = TrajectoryDataset(data)
    longest = max(
        len(trajectory["place"]) for trajectory in map(dataset.__getitem__, range(20)) if trajectory["is_terminal"][-1]
    )
    windows = dataset.sample_windows(50, longest + 1, np.random.default_rng(0), least=2)
    padding = windows["is_padding"]
    assert windows["is_terminal"][padding].any()
    ended = padding & windows["is_terminal"]
    assert (np.abs(windows["place"][ended]) > 1).all()
    assert not windows["pre_action"][padding].any()
    assert len(dataset.arrays["place"]) == sum(len(load_trajectory(path)["place"]) for path in data.glob("*.npz"))


def test_dreams_begin_at_resets_and_never_in_a_terminal_state(data):
    dataset = TrajectoryDataset(data)
    starts = make_starts(dataset, ["place"], n_reset=20, n_dataset=300, held=True)
    firsts = {round(float(dataset[i]["place"][0, 0]), 5) for i in range(len(dataset))}
    last = starts["place"][-1, :, 0]
    assert {round(float(place), 5) for place in last[starts["is_reset"]]} == firsts
    assert (np.abs(last) <= 1).all()
    assert not starts["pre_action"][:, starts["is_reset"]].any()


def test_a_model_knows_its_body_without_the_env(model):
    config = load_pretrained_model(model).config
    body = config.body
    assert isinstance(body, Embodiment)
    assert body.foreign
    assert (body.name, body.episode_steps, body.action_dim) == ("Cliff-v3", 60, 2)
    spec = gym.registry.pop("Cliff-v3")
    try:
        dream = gym.make("AimeDream-v0", model=str(model))
        assert dream.reset(seed=0)[0].shape == (1,)
    finally:
        gym.registry["Cliff-v3"] = spec


def test_a_learning_curve_is_of_episodes_as_they_end(model, tmp_path):
    """Rewards of some -1 a step, times all the steps of an episode that nobody lived to see, are no return."""
    envs = aime_gym.make_sb3_env("AimeDream-v0", n_envs=4, seed=0, model=model, max_episode_steps=60)
    agent = make_agent("shac", envs, observation_statistics(envs), 0)
    last = learn(agent, tmp_path / "agent.zip", Console(quiet=True), 2000).curve[-1]
    assert last["length"] < 40
    assert -2.2 * last["length"] < last["return"] < 0
    envs.close()


def test_dreams_terminate_where_the_model_believes_it(model):
    loaded = load_pretrained_model(model)
    assert loaded.heads.termination is not None
    envs = gym.make_vec("AimeDream-v0", num_envs=64, model=loaded, autoreset_mode="SameStep")
    observations, _ = envs.reset(seed=0)
    ends, inside = [], []
    for _ in range(40):
        observations, rewards, terminations, truncations, infos = envs.step(np.tile([1.0, 0.0], (64, 1)))
        assert (rewards <= loaded.heads.reward_limits[1]).all()
        assert (rewards >= loaded.heads.reward_limits[0]).all()
        ends += [abs(infos["final_obs"][slot][0]) for slot in terminations.nonzero()[0]]
        inside += list(np.abs(observations[~(terminations | truncations), 0]))
    assert len(ends) > 64, "who only goes right falls off again and again"
    assert np.mean(ends) > np.mean(inside)


def test_what_a_fall_costs_is_paid_in_dreams(model):
    envs = gym.make_vec("AimeDream-v0", num_envs=64, model=model, autoreset_mode="SameStep")
    envs.reset(seed=0)
    falls, costs = [], []
    for _ in range(40):
        observations, rewards, terminations, _, infos = envs.step(np.tile([1.0, 0.0], (64, 1)))
        for slot in terminations.nonzero()[0]:
            observations[slot] = infos["final_obs"][slot]
        falls += rewards[terminations].tolist()
        costs += (rewards + 1 + observations[:, 0]).tolist()
    assert np.mean(falls) < -10
    assert -22 < np.sum(costs) / len(falls) < -18  # 20, which the end pays alone


def test_sb3_is_told_falls_from_cuts(model, monkeypatch):
    """By this its buffers bootstrap: after a cut there is more to earn, after a fall there is not."""
    envs = aime_gym.make_sb3_env("AimeDream-v0", 64, model=model, seed=0, max_episode_steps=3)
    dream, told = envs.unwrapped.envs, []
    step = dream.step
    monkeypatch.setattr(dream, "step", lambda actions: told.append(step(actions)) or told[-1])
    envs.reset()
    falls = cuts = 0
    for _ in range(9):
        _, _, dones, infos = envs.step(np.tile([0.7, 0.0], (64, 1)).astype(np.float32))
        _, _, terminations, truncations, _ = told[-1]
        np.testing.assert_array_equal(dones, terminations | truncations)
        for slot in dones.nonzero()[0]:
            assert infos[slot]["TimeLimit.truncated"] == (not terminations[slot])
            assert infos[slot]["terminal_observation"].shape == (1,)
        falls, cuts = falls + terminations.sum(), cuts + (truncations & ~terminations).sum()
    assert min(falls, cuts) > 10


def test_a_dream_with_an_id_of_its_own(model):
    aime_gym.register_dream("CliffDream-v0", model, real="Cliff-v3")
    aime_gym.register_dream("DreamOfCliffs", model)  # Gymnasium allows it
    try:
        assert get_embodiment("DreamOfCliffs").name == "Cliff-v3"
        env = gym.make("CliffDream-v0")
        assert env.spec.max_episode_steps == 60
        check_env(env.unwrapped, skip_render_check=True)
        assert gym.make_vec("CliffDream-v0", num_envs=3).reset(seed=0)[0].shape == (3, 1)
        envs = aime_gym.make_sb3_env("CliffDream-v0", n_envs=2, seed=0)
        assert envs.num_envs == 2
        comparison = aime_gym.compare({"random": "random"}, "CliffDream-v0", episodes=3)
        assert (comparison.embodiment, comparison.task) == ("Cliff-v3", "own")
        real = comparison.policies[0].real
        assert (real.lengths < 60).any()
        assert np.isfinite(real.returns).all()
    finally:
        del gym.registry["CliffDream-v0"], gym.registry["DreamOfCliffs"]
    with pytest.raises(AimeGymError, match="'place': 1"):
        aime_gym.register_dream("CliffDream-v0", model, real="Pendulum-v1")
    with pytest.raises(AimeGymError, match="Expected a model of walker"):
        gym.make("AimeDream-Walker-v0", model=str(model))


def test_an_agent_learns_in_it_and_is_reported(model, tmp_path):
    job = Dream("Cliff-v3", model=str(model), steps=600, slots=8, horizon=20, episodes=2, video_steps=20, out=tmp_path)
    job.run()
    report = (tmp_path / "report.html").read_text()
    assert "Cliff-v3 own" in report
    assert "cannot be rendered" in report


def test_nothing_is_predicted_of_a_body_that_nobody_has_measured(model, tmp_path):
    with pytest.raises(AimeGymError, match=r"Nothing is known of what own of Cliff-v3 can earn.*or ask the real env"):
        aime_gym.compare("zero", "Cliff-v3", model=model, real_episodes=0)
    for job in (
        Compare(("zero",), "Cliff-v3", model=str(model), real_episodes=0, out=tmp_path / "out"),
        Dream("Cliff-v3", model=str(model), trials=0, out=tmp_path / "out"),
    ):
        with pytest.raises(AimeGymError, match="Nothing is known"):
            job.run()
    assert not (tmp_path / "out").exists()


def test_real_episodes_of_a_foreign_body_begin_as_its_env_begins_them(model):
    with Worlds("Cliff-v3", model=model) as worlds:
        assert worlds.real_starts(worlds.draw_starts(2)) is None
        _, real = worlds.evaluate("zero", episodes=3, seed=11)
        expected = []
        for seed in (11, 12, 13):
            place = gym.make("Cliff-v3").reset(seed=seed)[0]["place"].item()
            expected.append(60 * (-1 - place))  # the middle action does not move it
        np.testing.assert_allclose(real.returns, expected, rtol=1e-4)


@pytest.mark.slow  # tests/test_pretraining.py has rounds of such an env
def test_pretrain_makes_a_model_of_any_env(tmp_path):
    options = TrainOptions(**{**TINY, "horizon": 6, "updates": 3}, heads=SCARCELY)
    Pretrain(
        "Cliff-v3",
        **{"out": tmp_path / "model", "work": tmp_path / "work", "random": 4, "buffer": 6, "expert": 2},
        **{"rounds": 1, "workers": 1, "steps": 2, "trajectories": 2, "slots": 4, "horizon": 16, "noise": ()},
        **{"episodes": 2, "round_updates": 2, "round_head_updates": 2},
        train=options,
    ).run()
    assert load_pretrained_model(tmp_path / "model").config.embodiment == "Cliff-v3"
    steps = json.loads((tmp_path / "work" / "ledger.json").read_text())["datasets"]
    buffer = [load_trajectory(path) for path in (tmp_path / "work" / "datasets" / "own-buffer").glob("*.npz")]
    counted = sum(len(trajectory["reward"]) - 1 for trajectory in buffer)
    assert next(count for folder, count in steps.items() if folder.endswith("own-buffer")) == counted
    assert 300 <= counted <= 360, "six episodes of full length, in more that terminate"
    assert len(buffer) > 6


# Minari


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return pytest.importorskip("minari")


@pytest.mark.parametrize("body", ["pendulum", "Pendulum-v1"])
def test_data_sets_survive_minari(body, minari, tmp_path):
    from aime_gym.commands.data_sets import ToMinari

    Collect(body, trajectories=2, out=tmp_path / "data", workers=1).run()
    ToMinari(tmp_path / "data", "test/random-v0").run()
    ours, theirs = TrajectoryDataset(tmp_path / "data"), TrajectoryDataset("minari:test/random-v0")
    assert theirs.body == ours.body
    assert set(theirs.keys) == set(ours.keys)
    for key in ours.keys:
        np.testing.assert_allclose(theirs.arrays[key], ours.arrays[key], atol=1e-6, err_msg=key)
    env = minari.load_dataset("test/random-v0").recover_environment()
    assert env.unwrapped.embodiment.name == body
    with pytest.raises(AimeGymError, match="choose another id"):
        ToMinari(tmp_path / "data", "test/random-v0").run()


def test_images_survive_minari(minari, tmp_path):
    from aime_gym.commands.data_sets import ToMinari

    known = inspect.signature(minari.create_dataset_from_buffers).parameters
    loss = {"atol": 0 if "jpeg_encoding" in known else 255}  # older ones keep all images as JPEG
    rng = np.random.default_rng(0)
    shown = {"image": rng.integers(0, 256, (4, 64, 64, 3), np.uint8)}
    acted = {"pre_action": np.zeros((4, 1), np.float32), "reward": np.ones((4, 1), np.float32)}
    sensors = {"orientation": np.ones((4, 2), np.float32), "velocity": np.ones((4, 1), np.float32)}
    for index, images in enumerate((shown, shown)):
        save_trajectory(tmp_path / "data", index, {**acted, **sensors, **images})
    write_metadata(tmp_path / "data", {"embodiment": "pendulum"})
    ToMinari(tmp_path / "data", "test/images-v0").run()
    theirs = TrajectoryDataset("minari:test/images-v0", images=True)
    np.testing.assert_allclose(theirs[1]["image"], shown["image"], **loss)
    np.testing.assert_array_equal(theirs[1]["orientation"], sensors["orientation"])
    assert minari.load_dataset("test/images-v0").observation_space["image"].shape == (64, 64, 3)
    save_trajectory(tmp_path / "data", 2, {**acted, **sensors})  # one without: the images are left out
    ToMinari(tmp_path / "data", "test/some-v0").run()
    assert "image" not in TrajectoryDataset("minari:test/some-v0", images=True).keys
    gym.register("Seen-v3", entry_point=Seen, max_episode_steps=3)
    Collect("Seen-v3", trajectories=2, out=tmp_path / "seen", workers=1).run()
    ToMinari(tmp_path / "seen", "test/seen-v0").run()
    ours, theirs = TrajectoryDataset(tmp_path / "seen", images=True), TrajectoryDataset("minari:test/seen-v0")
    np.testing.assert_allclose(theirs.arrays["image"], ours.arrays["image"], **loss)
    np.testing.assert_allclose(theirs.arrays["pre_action"], ours.arrays["pre_action"], atol=1e-6)


class Seen(gym.Env):
    """An env that shows a picture and nothing else."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._picture(), {}

    def step(self, action):
        return self._picture(), 0.0, False, False, {}

    def _picture(self):
        return self.np_random.integers(0, 256, (64, 64, 3), np.uint8)


def test_an_id_that_minari_does_not_allow_leaves_nothing_in_its_store(minari, tmp_path):
    from aime_gym.commands.data_sets import ToMinari

    Collect("pendulum", trajectories=1, out=tmp_path / "data", workers=1).run()
    for bad in ("walk", "walker/walk", "../walk-v0"):
        with pytest.raises(AimeGymError, match=r"allows no id .* as in walker/walk-v0"):
            ToMinari(tmp_path / "data", bad).run()
    assert minari.list_local_datasets() == {}
    assert not list((tmp_path / "minari").rglob("*walk*"))


def test_a_mix_is_of_the_task_of_its_sources_in_minari(minari, tmp_path):
    from aime_gym.commands.data_sets import ToMinari

    Collect("cartpole", task="balance", trajectories=1, out=tmp_path / "data", workers=1).run()
    Mix((tmp_path / "data",), tmp_path / "mix").run()
    ToMinari(tmp_path / "mix", "test/mix-v0").run()
    assert minari.load_dataset("test/mix-v0").env_spec.kwargs["task"] == "balance"


def test_a_model_is_trained_on_a_data_set_of_minari(minari, tmp_path):
    from minari.data_collector import EpisodeBuffer

    rng, env, buffers = np.random.default_rng(0), gym.make("Pendulum-v1"), []
    for episode in range(4):
        observations, actions = [env.reset(seed=episode)[0]], rng.uniform(-2, 2, (60, 1)).astype(np.float32)
        rewards = []
        for action in actions:
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            rewards.append(float(reward))
        ends = [False] * 59 + [True]
        buffers.append(EpisodeBuffer(episode, None, None, np.stack(observations), actions, rewards, [False] * 60, ends))
    minari.create_dataset_from_buffers("pendulum/by-others-v0", buffers, env=env)
    Train((Path("minari:pendulum/by-others-v0"),), out=tmp_path / "model", updates=3, heads=SCARCELY, **TINY).run()
    config = load_pretrained_model(tmp_path / "model").config
    assert (config.body.name, config.body.episode_steps) == ("Pendulum-v1", 200)
    data = TrajectoryDataset("minari:pendulum/by-others-v0")
    assert np.abs(data.arrays["pre_action"]).max() <= 1
    np.testing.assert_allclose(data[1]["pre_action"][1:], buffers[1].actions / 2, atol=1e-6)


@pytest.mark.usefixtures("registry")
def test_actions_of_minari_without_bounds_have_the_range_of_the_data(minari, tmp_path):
    ends = {"low": -np.inf, "high": np.inf}
    gym.register("Endless-v9", entry_point="tests.test_foreign:Bounded", kwargs=ends, max_episode_steps=9)
    pushes = np.array([-3.0, 40.0, 40.0], np.float32)[:, None]
    write_minari(minari, "endless-v0", gym.make("Endless-v9"), np.zeros((4, 1), np.float32), pushes)
    with pytest.warns(UserWarning, match=r"lowest and the highest of the data, \[-3.0\] and \[40.0\]"):
        body, trajectories = read_minari("minari:endless-v0")
    assert (body.logged_range, body.name) == (((-3.0,), (40.0,)), "endless-v0")
    assert trajectories[0]["pre_action"][1:, 0].tolist() == [-1, 1, 1]


def test_a_missing_minari_data_set_is_named(minari):
    with pytest.raises(AimeGymError, match="minari download test/none-v0"):
        TrajectoryDataset("minari:test/none-v0")


def write_minari(minari, dataset_id, env, observations, actions, infos=None, space=None):
    """A data set of one episode as `minari.DataCollector` would leave it."""
    from minari.data_collector import EpisodeBuffer

    steps = len(actions)
    ends = [False] * (steps - 1) + [True]
    buffer = EpisodeBuffer(0, None, None, observations, actions, [0.5] * steps, [False] * steps, ends, infos)
    shown = space or env.observation_space
    minari.create_dataset_from_buffers(dataset_id, [buffer], env=env, observation_space=shown)
    return f"minari:{dataset_id}"


@pytest.mark.parametrize("setup", ["mdp", "lpomdp"])
def test_a_recording_of_our_own_env_has_its_sensors(minari, setup):
    env = gym.make("AimeReal-Walker-v0", setup=setup, max_episode_steps=5)
    seen, actions = [env.reset(seed=0)[0]], np.zeros((5, 6), np.float32)
    seen += [env.step(action)[0] for action in actions]
    data = TrajectoryDataset(write_minari(minari, "test/walker-v0", env, np.stack(seen), actions))
    assert data.body == get_embodiment("walker")
    sensors = get_embodiment("walker").observed(setup)
    np.testing.assert_array_equal(
        np.concatenate([data.arrays[sensor.name] for sensor in sensors], 1), np.stack(seen).astype(np.float32)
    )


@pytest.mark.parametrize("obs_type", ["state", "dict", "image"])
def test_a_recording_of_our_own_env_has_what_it_showed(minari, obs_type):
    gym.register("Machine-v9", entry_point=Machine, max_episode_steps=5)
    env = gym.make("AimeReal-v0", embodiment="Machine-v9", obs_type=obs_type)
    seen, actions = [env.reset(seed=0)[0]], np.arange(5) % 3
    seen += [env.step(action)[0] for action in actions]
    rows = {name: np.stack([row[name] for row in seen]) for name in seen[0]} if obs_type == "dict" else np.stack(seen)
    data = TrajectoryDataset(write_minari(minari, "test/machine-v0", env, rows, actions), images=True)
    assert data.body == get_embodiment("Machine-v9")
    if obs_type == "image":
        np.testing.assert_array_equal(data.arrays["image"], rows)
    else:
        gears = rows["gear"] if obs_type == "dict" else rows[:, :3].argmax(1)
        assert data.arrays["gear"].argmax(1).tolist() == gears.tolist() == [0, 0, 1, 2, 0, 1]
        assert data.arrays["level"].tolist() == [[row] for row in range(6)]
    assert data.arrays["pre_action"][1:].argmax(1).tolist() == actions.tolist()


class Spelled(gym.Env):
    """Two numbers and a third one, in a space that is spelled with braces or with keywords."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, keywords: bool):
        parts: dict[str, spaces.Space] = {"speed": spaces.Box(-1, 1, (2,)), "angle": spaces.Box(-1, 1, (1,))}
        self.observation_space = spaces.Dict(**parts) if keywords else spaces.Dict(parts)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"speed": np.float32([0.1, 0.2]), "angle": np.float32([0.9])}, {}

    def step(self, action):
        return *self.reset()[:1], 0.0, False, False, {}


def test_equal_spaces_show_equal_states(monkeypatch):
    """Gymnasium 1.4.0 keeps the order of Dict(b=, a=) only: findings/gymnasium_equal_dicts_flatten_differently.sh."""
    envs = []
    for name, keywords in {"Braces-v0": False, "Keywords-v0": True}.items():
        monkeypatch.setitem(
            gym.registry, name, gym.envs.registration.EnvSpec(name, lambda keywords=keywords: Spelled(keywords))
        )
        envs.append(gym.make("AimeReal-v0", embodiment=name))
    first, second = (env.unwrapped._env.observation_space for env in envs)  # type: ignore[attr-defined]
    assert first == second
    assert list(first) != list(second)
    for env in envs:
        np.testing.assert_array_equal(env.reset()[0], np.float32([0.9, 0.1, 0.2]))


class Machine(gym.Env):
    """A gear that is chosen, a level that rises, and a picture of it."""

    observation_space = spaces.Dict(
        cam=spaces.Box(0, 255, (32, 24, 3), np.uint8),
        gear=spaces.Discrete(3),
        level=spaces.Box(-np.inf, np.inf, (1,), np.float32),
    )
    action_space = spaces.Discrete(3)

    def look(self):
        picture = np.full((32, 24, 3), 10 * self.level, np.uint8)
        return {"cam": picture, "gear": self.gear, "level": np.full(1, self.level, np.float32)}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.gear, self.level = np.int64(0), 0
        return self.look(), {}

    def step(self, action):
        self.gear, self.level = np.int64(action), self.level + 1
        return self.look(), 1.0, False, False, {}


def test_episodes_of_minari_pass_the_checks_of_our_own_files(minari):
    env = gym.make("Pendulum-v1")
    actions, observations = np.zeros((5, 1), np.float32), np.zeros((6, 3), np.float32)
    observations[3, 1] = np.nan
    with pytest.raises(AimeGymError, match=r"test/nan-v0, episode 0: 'observation' has a value in row 3"):
        TrajectoryDataset(write_minari(minari, "test/nan-v0", env, observations, actions))
    with pytest.raises(AimeGymError, match=r"episode 0: 5 actions come with 6 observations; got 4"):
        TrajectoryDataset(write_minari(minari, "test/rows-v0", env, np.zeros((4, 3), np.float32), actions))


def test_images_of_minari_become_those_of_models(minari):
    env, space = gym.make("Pendulum-v1"), spaces.Box(0, 255, (96, 80, 3), np.uint8)
    observations = np.random.default_rng(0).integers(0, 256, (6, 96, 80, 3), np.uint8)
    source = write_minari(minari, "test/big-v0", env, observations, np.zeros((5, 1), np.float32), space=space)
    assert TrajectoryDataset(source).arrays["image"].shape == (6, 64, 64, 3)


def test_a_malformed_set_of_minari_harms_no_other(minari, tmp_path):
    source = write_minari(
        minari, "test/good-v0", gym.make("Pendulum-v1"), np.zeros((6, 3), np.float32), np.zeros((5, 1), np.float32)
    )
    (tmp_path / "minari" / "test" / "without-version" / "data").mkdir(parents=True)
    assert len(TrajectoryDataset(source)) == 1
    with pytest.raises(AimeGymError, match=r"Local: test/good-v0, test/without-version\."):
        TrajectoryDataset("minari:test/none-v0")
    with pytest.raises(AimeGymError, match="Minari cannot read its data set test/without-version"):
        TrajectoryDataset("minari:test/without-version")


def test_what_minari_itself_cannot_read_is_said(minari, monkeypatch):
    from minari.dataset.minari_dataset import MinariDataset

    source = write_minari(
        minari, "test/good-v0", gym.make("Pendulum-v1"), np.zeros((6, 3), np.float32), np.zeros((5, 1), np.float32)
    )

    def fail(self):
        yield from ()
        raise ValueError("invalid literal for int() with base 10: b''")  # as with arrow and a number a step in infos

    monkeypatch.setattr(MinariDataset, "iterate_episodes", fail)
    with pytest.raises(AimeGymError, match=r"test/good-v0: .*data_format='hdf5'"):
        TrajectoryDataset(source)
