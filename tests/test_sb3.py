"""Stable-Baselines3 on the native dream."""

import sys

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize, VecVideoRecorder

import aime_gym
from aime_gym.agents.sb3 import load_agent, save_sb3_agent
from aime_gym.envs.dream import DreamVectorEnv
from aime_gym.envs.sb3 import DreamVecEnv, make_sb3_env
from aime_gym.errors import AimeGymError
from tests.random_models import write_random_model

ID = "AimeDream-Walker-v0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("models") / "tabular")


@pytest.mark.parametrize("obs_type", ["state", "dict"])
def test_is_the_vector_dream(model, obs_type):
    options = {"model": model, "max_episode_steps": 5, "doubt": True, "obs_type": obs_type}
    envs = make_sb3_env(ID, n_envs=3, seed=7, **options)
    dream = gym.make_vec(ID, num_envs=3, autoreset_mode="SameStep", **options)

    def same(a, b):
        for one, other in zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]:
            np.testing.assert_array_equal(one, other)

    expected, infos = dream.reset(seed=7)
    same(envs.reset(), expected)
    assert [info["start_index"] for info in envs.unwrapped.reset_infos] == infos["start_index"].tolist()
    rng = np.random.default_rng(0)
    returns = np.zeros(3)
    for t in range(12):
        actions = rng.uniform(-1, 1, (3, 6)).astype(np.float32)
        observations, rewards, dones, infos = envs.step(actions)
        expected, expected_rewards, _, truncations, expected_infos = dream.step(actions)
        same(observations, expected)
        assert rewards.dtype == np.float32
        np.testing.assert_allclose(rewards, expected_rewards, rtol=1e-6)
        np.testing.assert_array_equal(dones, truncations)
        assert dones.all() == (t % 5 == 4)
        returns += rewards
        for slot, info in enumerate(infos):
            doubts = expected_infos["final_info"] if dones[slot] else expected_infos
            assert info["doubt"] == pytest.approx(doubts["doubt"][slot])
            assert ("episode" in info) == dones[slot] == ("terminal_observation" in info)
            if dones[slot]:
                same(info["terminal_observation"], expected_infos["final_obs"][slot])
                assert info["TimeLimit.truncated"] is True
                assert info["episode"]["l"] == 5
                assert info["episode"]["r"] == pytest.approx(returns[slot], rel=1e-5)
                assert info["episode"]["t"] >= 0
                assert info["start_index"] == expected_infos["final_info"]["start_index"][slot]
                begun = envs.unwrapped.reset_infos[slot]  # where SB3 looks for what a reset says
                assert begun["start_index"] == expected_infos["start_index"][slot]
                assert begun["doubt"] == 0
        returns[dones] = 0


def test_seeds_and_options_count_for_one_reset(model):
    envs = make_sb3_env(ID, n_envs=2, seed=0, model=model)
    first, second = envs.reset(), envs.reset()
    assert not np.array_equal(first, second)
    envs.seed(0)
    np.testing.assert_array_equal(envs.reset(), first)
    envs.set_options({"start": 9})
    envs.reset()
    assert [info["start_index"] for info in envs.unwrapped.reset_infos] == [9, 9]
    envs.set_options([{"start": np.array([4, 5])} for _ in range(2)])
    envs.reset()
    assert [info["start_index"] for info in envs.unwrapped.reset_infos] == [4, 5]
    envs.set_options([{"start": 1}, {"start": 2}])
    with pytest.raises(AimeGymError, match="same options"):
        envs.reset()


def test_unseeded_envs_differ(model):
    first, second = (make_sb3_env(ID, n_envs=6, model=model, obs_type="latent") for _ in range(2))
    first.reset()
    second.reset()
    actions = np.zeros((6, 6), np.float32)
    assert not np.array_equal(first.step(actions)[0], second.step(actions)[0])


def test_attributes_are_shared(model):
    envs = make_sb3_env(ID, n_envs=3, model=model, task="run")
    assert envs.get_attr("task") == ["run"] * 3
    assert envs.get_attr("render_mode", [0, 2]) == [None, None]
    assert not envs.has_attr("colour")
    envs.set_attr("max_episode_steps", 1)
    envs.reset()
    assert envs.step(np.zeros((3, 6)))[2].all()
    with pytest.raises(AimeGymError, match="share their attributes"):
        envs.set_attr("max_episode_steps", 2, indices=[1])
    assert len(envs.env_method("get_state", indices=[0, 1])) == 2
    assert envs.env_is_wrapped(gym.Wrapper) == [False] * 3
    assert envs.get_images() == [None] * 3


def test_spaces_of_a_slot_are_those_of_one_env(model):
    envs = make_sb3_env(ID, n_envs=3, model=model)
    for name in ("action_space", "observation_space"):
        assert envs.get_attr(name, [0, 2]) == [getattr(envs, name)] * 2


def test_dreams_are_filmed_at_their_own_pace(model, tmp_path):
    envs = make_sb3_env(ID, n_envs=2, model=model, render_mode="rgb_array")
    fps = gym.make(ID, model=model, render_mode="rgb_array").metadata["render_fps"]
    recorder = VecVideoRecorder(envs, str(tmp_path), lambda step: False)
    assert recorder.frames_per_sec == fps == 20


def test_ppo_and_sac_learn(model, tmp_path):
    envs = make_sb3_env(ID, n_envs=8, seed=0, model=model, max_episode_steps=16)
    ppo = PPO("MlpPolicy", envs, n_steps=32, batch_size=64, n_epochs=2, policy_kwargs={"net_arch": [16]}, device="cpu")
    ppo.learn(512)
    assert ppo.num_timesteps == 512
    assert len(ppo.ep_info_buffer) == 32
    assert np.isfinite(evaluate_policy(ppo, envs, n_eval_episodes=8)[0])
    ppo.save(tmp_path / "ppo")
    loaded = PPO.load(tmp_path / "ppo", env=make_sb3_env("AimeReal-Walker-v0", max_episode_steps=8), device="cpu")
    assert np.isfinite(evaluate_policy(loaded, loaded.get_env(), n_eval_episodes=1)[0])
    sac = SAC("MlpPolicy", envs, learning_starts=64, batch_size=32, policy_kwargs={"net_arch": [16]}, device="cpu")
    sac.learn(240)
    assert sac.num_timesteps == 240


def test_other_ids_are_stepped_in_turn(model):
    real = make_sb3_env("AimeReal-Walker-v0", n_envs=2, seed=1, task="run", max_episode_steps=3)
    dream = aime_gym.make_sb3_env(f"aime_gym:{ID}", n_envs=2, model=model)
    assert isinstance(real.unwrapped, DummyVecEnv)
    assert isinstance(dream, VecMonitor)
    assert real.observation_space == dream.observation_space
    assert real.action_space == dream.action_space
    real.reset()
    infos = [real.step(np.zeros((2, 6)))[3] for _ in range(3)][-1]
    assert infos[0]["episode"]["l"] == 3


def test_an_agent_behind_vec_normalize_is_evaluated_in_the_real_env_while_it_learns(model, tmp_path):
    dream = VecNormalize(make_sb3_env(ID, n_envs=4, seed=0, model=model, max_episode_steps=8))
    real = VecNormalize(make_sb3_env("AimeReal-Walker-v0", n_envs=1, seed=0, max_episode_steps=4), training=False)
    callback = EvalCallback(real, n_eval_episodes=2, eval_freq=4, log_path=str(tmp_path), verbose=0)
    PPO("MlpPolicy", dream, n_steps=8, batch_size=32, n_epochs=1, device="cpu").learn(32, callback)
    assert np.load(tmp_path / "evaluations.npz")["ep_lengths"].tolist() == [[4, 4]] * 2
    np.testing.assert_array_equal(real.obs_rms.mean, callback.training_env.obs_rms.mean)
    assert real.obs_rms.mean.any()


def test_a_native_dream_has_no_single_envs_to_wrap(model):
    with pytest.raises(AimeGymError, match="no single envs to wrap"):
        make_sb3_env(ID, n_envs=2, wrap=lambda env: env, model=model)


def test_needs_same_step(model):
    with pytest.raises(AimeGymError, match="SAME_STEP"):
        DreamVecEnv(DreamVectorEnv("walker", 2, model=model))


def test_an_agent_on_images_learns_in_the_dream_and_acts_in_the_real_env(tmp_path, gl):
    model = write_random_model(tmp_path, setup="visual", standardise=False)
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=2, seed=0, model=model, obs_type="image")
    agent = PPO("CnnPolicy", envs, n_steps=4, batch_size=8, n_epochs=1, seed=0).learn(8)
    comparison = aime_gym.compare({"cnn": agent}, model=model, episodes=2, max_episode_steps=3)
    assert comparison.policies[0].real.lengths.tolist() == [3, 3]


def test_an_agent_is_saved_beside_a_folder_named_gym(model, tmp_path, monkeypatch):
    """Stable-Baselines3 2.9.2 takes such a folder for OpenAI's Gym: findings/sb3_cannot_save_beside_a_folder_gym.sh."""
    (tmp_path / "gym").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    agent = PPO("MlpPolicy", make_sb3_env(ID, model=model), n_steps=4, batch_size=4, device="cpu")
    with pytest.raises(AttributeError, match="__version__"):  # so it is still needed
        agent.save(tmp_path / "theirs.zip")
    assert hasattr(sys.modules.pop("gym"), "__path__")
    assert load_agent(save_sb3_agent(agent, tmp_path / "ours.zip")).action_space == agent.action_space
    assert "gym" not in sys.modules  # as before
