"""What a newcomer tried with models of Gymnasium's own envs and with logged arrays, and what came of it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RescaleAction
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env

from aime_gym import AimeGymError, Evidence, LatentObservation, Train
from aime_gym.commands.data_sets import Mix
from aime_gym.commands.dream import Dream, _advice
from aime_gym.data import from_arrays
from tests.test_logged import TINY


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_slot_begins_anew_where_it_would_alone(deterministic):
    def starts(slots: int) -> list[list[int]]:
        envs = gym.make_vec(
            "AimeDream-v0", num_envs=slots, model="InvertedPendulum-v5", deterministic=deterministic, start="dataset"
        )
        envs.reset(seed=0)
        rngs = [np.random.default_rng(i) for i in range(slots)]
        told = [
            envs.step(np.stack([rng.uniform(-1, 1, 1).astype(np.float32) for rng in rngs]))[4]["start_index"][:2]
            for _ in range(60)
        ]
        return np.array(told).T.tolist()

    alone, among = starts(2), starts(5)
    assert among == alone
    assert len(set(alone[0])) > 2  # it did begin anew


def test_models_without_pictures_go_where_ids_go():
    """SB3 2.9 asks every env that it makes by its id for `render_mode="rgb_array"`, and takes a TypeError for a no."""
    envs = make_vec_env("AimeDream-v0", 2, env_kwargs={"model": "CartPole-v1"})
    A2C("MlpPolicy", envs, n_steps=4, device="cpu").learn(16)
    dream = gym.make("AimeDream-v0", model="InvertedPendulum-v5")
    assert dream.metadata["render_modes"] == []
    assert gym.make("AimeDream-Cartpole-v0").metadata["render_modes"] == ["rgb_array"]
    check_env(dream.unwrapped, skip_render_check=False)
    with pytest.raises(AimeGymError, match="leave render_mode out"):
        gym.make("AimeDream-v0", model="CartPole-v1", render_mode="rgb_array")


@pytest.mark.parametrize("wrapper", [Evidence, LatentObservation])
def test_actions_in_other_units_are_not_misread(wrapper):
    def told(env: gym.Env) -> np.ndarray:
        env.reset(seed=0)
        rng = np.random.default_rng(0)
        rows = [env.step(rng.uniform(-1, 1, 1).astype(np.float32)) for _ in range(8)]
        return np.array([row[4]["evidence"] if wrapper is Evidence else row[0] for row in rows])

    with pytest.raises(AimeGymError, match="RescaleAction"):
        wrapper(gym.make("Pendulum-v1"), "Pendulum-v1")
    scaled = RescaleAction(gym.make("Pendulum-v1"), -1, 1)
    ours = gym.make("AimeReal-v0", embodiment="Pendulum-v1")
    np.testing.assert_allclose(told(wrapper(scaled, "Pendulum-v1")), told(wrapper(ours, "Pendulum-v1")), atol=1e-3)


def test_a_start_takes_the_actions_that_a_step_takes():
    dream = gym.make("AimeDream-v0", model="Pendulum-v1")
    frames = np.tile(np.array([1, 0, 0], np.float32), (4, 1))
    dream.reset(options={"start": {"observations": frames, "actions": np.ones((4, 1))}})
    with pytest.raises(AimeGymError, match=r"in \[-1, 1\].*got 2"):
        dream.reset(options={"start": {"observations": frames, "actions": np.full((4, 1), 2.0)}})


@pytest.fixture
def log(tmp_path):
    rng = np.random.default_rng(0)
    return from_arrays(
        rng.normal(size=(6, 31, 3)), rng.uniform(-1, 1, (6, 30, 1)), np.ones((6, 30)), out=tmp_path / "d"
    )


def test_a_data_set_counts_once(log, tmp_path):
    again = log.parent / "." / log.name
    for job in (
        lambda: Train((log, again), tmp_path / "m", **TINY).train(),
        lambda: Mix((log, again), tmp_path / "mix").run(),
    ):
        with pytest.raises(AimeGymError, match="named twice"):
            job()
    assert not (tmp_path / "mix").exists()


def test_episodes_of_choices_can_be_stacked(tmp_path):
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(6, 30, 3)), rng.integers(0, 3, (6, 30)), rng.normal(size=(6, 30))
    choices = gym.spaces.Discrete(3)
    stacked = from_arrays(*parts, action_space=choices, out=tmp_path / "stacked", name="one")
    listed = from_arrays(*map(list, parts), action_space=choices, out=tmp_path / "listed", name="one")
    for path in sorted(listed.glob("*.npz")):
        with np.load(path) as one, np.load(stacked / path.name) as other:
            assert one.files == other.files
            assert all(np.array_equal(one[key], other[key]) for key in one.files)


def test_what_is_no_stack_of_choices_is_told_as_before(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(AimeGymError, match="one number a step"):
        from_arrays(rng.normal(size=(60, 3)), rng.normal(size=(60, 2)), rng.normal(size=(60, 3)), out=tmp_path / "flat")
    single = rng.normal(size=(6, 2, 3)), rng.uniform(-1, 1, (6, 1, 2)), rng.normal(size=(6, 1))
    assert len(list(from_arrays(*single, out=tmp_path / "single").glob("*.npz"))) == 6


def test_numbers_that_float32_cannot_tell_apart_are_told(tmp_path):
    time = 1.7e9 + 0.01 * np.arange(60.0)
    parts = np.random.default_rng(0).uniform(-1, 1, (60, 1)), np.ones(60)
    cuts = {"truncations": np.arange(60) % 30 == 29}
    with pytest.warns(UserWarning, match="time.*float32.*subtract"):
        from_arrays({"time": time[:, None]}, *parts, **cuts, out=tmp_path / "clock")
    wide = np.stack([1e6 * np.sin(time), time], 1)  # each column is looked at for itself
    with pytest.warns(UserWarning, match="wide.*float32"):
        from_arrays({"wide": wide}, *parts, **cuts, out=tmp_path / "wide")
    from_arrays({"time": time[:, None] - time[0], "fixed": np.full((60, 1), 1 / 3)}, *parts, **cuts, out=tmp_path / "c")


def test_more_steps_are_advised_than_were_taken(tmp_path):
    advice = _advice("not yet", {"ended": "steps", "steps": 11_520}, Dream(steps=6_000), tmp_path)
    assert "--steps 23040" in advice
