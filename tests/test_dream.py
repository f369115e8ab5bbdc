"""The dream against loops written by hand, Gymnasium's own vector env, and Gymnasium's and SB3's checkers."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as check_sb3_env

import aime_gym
from aime_gym.envs.dream import DreamEnv, DreamVectorEnv
from aime_gym.envs.start_bank import AHEAD, integers, slot_keys, standard_normal
from aime_gym.envs.wrappers import LatentObservation
from aime_gym.errors import AimeGymError
from aime_gym.world_model import fast_dynamics
from aime_gym.world_model.checkpoint import revision_of, save_model
from aime_gym.world_model.fast_dynamics import FastDynamics, choose_dtype
from tests.random_models import CELLS, FRAMES, RESETS, STARTS, random_model, write_random_model

ID = "AimeDream-Walker-v0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tabular"
    write_random_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return aime_gym.load_pretrained_model(folder)


@pytest.fixture(scope="module")
def visual_model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("models") / "visual", setup="visual", standardise=False)


def actions_of(envs: DreamVectorEnv, steps: int, seed: int = 0) -> np.ndarray:
    """Uniform, [T, N, A]."""
    shape = (steps, envs.num_envs, envs.single_action_space.shape[0])
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def run(envs: DreamVectorEnv, actions: np.ndarray) -> list[tuple]:
    return [envs.step(action) for action in actions]


class TestFastDynamics:
    @pytest.mark.parametrize("batch", [1, 128])
    @pytest.mark.parametrize(("cell", "options"), CELLS)
    def test_equals_the_model(self, cell, options, batch):
        model = random_model(cell, **options)
        names = [*model.observed, *model.probed][::-1]
        fast = FastDynamics(model, names, "run", batch)
        torch.manual_seed(1)
        state, actions, noise = torch.randn(5, 20), torch.rand(5, 6) * 2 - 1, torch.randn(5, 4)
        with torch.inference_mode():
            for used in (noise, None):
                torch.testing.assert_close(
                    fast.advance(state, actions, used), model.prior_step(state, actions, used), rtol=1e-5, atol=1e-5
                )
            means = model.decode(state, names)
            expected = torch.cat([*(means[name] for name in names), model.heads.reward(state, "run")[:, None]], 1)
            torch.testing.assert_close(fast.decode(state), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("batch", [1, 128])
    @pytest.mark.parametrize(
        ("cell", "options"), [("rssmo", {}), ("rssm", {}), ("rssmo", {"setup": "lpomdp", "norm": None})]
    )
    def test_doubt_is_that_of_the_model(self, cell, options, batch):
        model = random_model(cell, **options)
        torch.manual_seed(1)
        state, actions, noise = torch.randn(5, 20), torch.rand(5, 6) * 2 - 1, torch.randn(5, 4)
        posterior, ensemble = (FastDynamics(model, model.observed, "run", batch, doubt=of) for of in (True, "ensemble"))
        with torch.inference_mode():
            expected = model.doubt(model.prior_step(state, actions, noise))
            torch.testing.assert_close(posterior.step(state, actions, noise)[-1], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(posterior.doubt(state), model.doubt(state), rtol=1e-4, atol=1e-5)
            expected = model.heads.disagreement(state, actions)
            torch.testing.assert_close(ensemble.step(state, actions, noise)[-1], expected)

    def test_gradients_are_those_of_the_model(self):
        model = random_model()
        torch.manual_seed(1)
        state, actions, noise = torch.randn(5, 20), torch.rand(5, 6) * 2 - 1, torch.randn(5, 4)
        for of in (state, actions):
            of.requires_grad_()
        following, means, _, doubt = FastDynamics(model, model.observed, "run", doubt=True).step(state, actions, noise)
        got = torch.autograd.grad(following.sum() + means.sum() + doubt.sum(), (state, actions))
        following = model.prior_step(state, actions, noise)
        decoded = sum(mean.sum() for mean in model.decode(following, model.observed).values())
        told = decoded + model.heads.reward(following, "run").sum() + model.doubt(following).sum()
        for mine, theirs in zip(got, torch.autograd.grad(following.sum() + told, (state, actions)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    def test_bf16_rounds_and_keeps_the_units(self):
        model = random_model()
        exact, rounded = (FastDynamics(model, model.observed, "walk", 128, t) for t in (torch.float32, torch.bfloat16))
        with torch.inference_mode():
            state, actions = torch.randn(128, 20), torch.zeros(128, 6)
            assert rounded.advance(state, actions).dtype == torch.float32
            torch.testing.assert_close(
                rounded.advance(state, actions), exact.advance(state, actions), rtol=0, atol=0.05
            )
            torch.testing.assert_close(rounded.decode(state), exact.decode(state), rtol=0, atol=0.05)
            assert not torch.equal(rounded.decode(state), exact.decode(state))

    def test_own_reward_decoder(self):
        model = random_model(heads=False, use_reward=True)
        state = torch.randn(3, 20)
        fast = FastDynamics(model, ["height"], None)
        torch.testing.assert_close(fast.decode(state)[:, 1:], model.decode(state, ["reward"])["reward"])

    def test_dreams_of_one_architecture_share_what_is_traced(self):
        models = [random_model(seed=seed) for seed in range(3)]
        state, actions = torch.randn(2, 20), torch.rand(2, 6) * 2 - 1
        traced = []
        with torch.inference_mode():
            for model in models:
                fast = FastDynamics(model, model.observed, "run")
                following, decoded, *_ = fast.step(state, actions)
                traced.append(len(fast_dynamics._traces))
                torch.testing.assert_close(following, model.prior_step(state, actions, None), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(decoded, fast.decode(following))
        assert traced == [traced[0]] * 3  # PyTorch never frees one

    def test_precision_names(self):
        assert choose_dtype("32-true", 1024) == torch.float32
        assert choose_dtype("bf16", 1) == torch.bfloat16
        assert choose_dtype("auto", 1) == torch.float32
        with pytest.raises(AimeGymError, match="32-true"):
            choose_dtype("32", 1)


class TestSpaces:
    @pytest.mark.parametrize("obs_type", ["state", "dict", "latent"])
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_checkers_pass(self, folder, obs_type):
        env = gym.make(ID, model=str(folder), obs_type=obs_type)
        check_env(env.unwrapped)
        check_sb3_env(env.unwrapped)
        assert gym.make(EnvSpec.from_json(env.spec.to_json())).spec == env.spec
        assert env.spec.max_episode_steps == 500

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_checkers_pass_on_images(self, visual_model):
        env = DreamEnv("walker", model=visual_model, obs_type="image", render_mode="rgb_array", height=130)
        check_env(env)
        check_sb3_env(env)
        observation, _ = env.reset(seed=0)
        np.testing.assert_array_equal(env.render(), observation.repeat(2, 0).repeat(2, 1))

    def test_the_same_spaces_as_the_real_world(self, model):
        for obs_type in ("state", "dict"):
            dream, real = (
                gym.make(ID, model=model, obs_type=obs_type),
                gym.make("AimeReal-Walker-v0", obs_type=obs_type),
            )
            assert dream.observation_space == real.observation_space
            assert dream.action_space == real.action_space
            assert dream.metadata["render_fps"] == real.metadata["render_fps"]

    def test_lpomdp_shows_no_velocities(self, tmp_path):
        envs = DreamVectorEnv("walker", 2, model=write_random_model(tmp_path, setup="lpomdp"), obs_type="dict")
        observations, _ = envs.reset(seed=0)
        assert {name: value.shape for name, value in observations.items()} == {
            "orientations": (2, 14),
            "height": (2, 1),
        }

    def test_obs_types_show_one_dream(self, model):
        envs = {name: DreamVectorEnv("walker", 2, model=model, obs_type=name) for name in ("state", "dict", "latent")}
        seen = {}
        for name, env in envs.items():
            env.reset(seed=3)
            seen[name] = env.step(actions_of(env, 1)[0])[0]
        np.testing.assert_array_equal(np.concatenate(list(seen["dict"].values()), 1), seen["state"])
        decoded = model.decode(torch.from_numpy(seen["latent"]))
        np.testing.assert_allclose(torch.cat([decoded[n] for n in model.observed], 1), seen["state"], atol=1e-5)


class TestDynamics:
    @pytest.mark.parametrize("cell", ["rssm", "rssmo"])
    def test_latents_equal_a_hand_rolled_loop(self, tmp_path, cell):
        model = write_random_model(tmp_path, cell=cell)
        envs = DreamVectorEnv("walker", 3, task="run", model=model, obs_type="latent", reward="head")
        first, infos = envs.reset(seed=[5, 9, 0])
        keys = slot_keys([5, 9, 0])
        resets = integers(keys, torch.zeros(3, dtype=torch.int64), RESETS).tolist()
        assert infos["start_index"].tolist() == resets

        state = model.initial_state(3)
        starts = envs.starts
        for t in range(FRAMES):
            frame = {name: torch.from_numpy(starts[name][t, resets]) for name in model.observed}
            action = torch.from_numpy(starts["pre_action"][t, resets])
            state = model.posterior_step(state, action, model.encode(frame), None)
        np.testing.assert_allclose(first, state, atol=1e-5)
        for count, action in enumerate(actions_of(envs, AHEAD + 3), 1):
            noise = standard_normal(keys, torch.full((3,), count), 4)
            state = model.prior_step(state, torch.from_numpy(action), noise)
            latents, rewards, *_ = envs.step(action)
            np.testing.assert_allclose(latents, state, atol=1e-5)
            np.testing.assert_allclose(rewards, model.heads.reward(state, "run"), atol=1e-5)

    def test_means(self, model):
        envs = DreamVectorEnv("walker", 2, model=model, obs_type="latent", deterministic=True)
        state = torch.from_numpy(envs.reset(seed=0, options={"start": 7})[0])
        np.testing.assert_array_equal(state[0], state[1])
        for action in actions_of(envs, 3):
            state = model.prior_step(state, torch.from_numpy(action), None)
            np.testing.assert_allclose(envs.step(action)[0], state, atol=1e-5)

    @pytest.mark.parametrize("num_envs", [4, 96])
    def test_reproducible_and_seeded_by_slot(self, model, num_envs):
        first, second = (DreamVectorEnv("walker", num_envs, model=model, max_episode_steps=5) for _ in range(2))
        first.reset(seed=11)
        second.reset(seed=[11 + slot for slot in range(num_envs)])
        actions = actions_of(first, 14)
        for ours, theirs in zip(run(first, actions), run(second, actions), strict=True):
            for a, b in zip(ours[:4], theirs[:4], strict=True):
                np.testing.assert_array_equal(a, b)
        single = DreamEnv("walker", model=model)
        first.reset(seed=2)
        single.reset(seed=3)
        got, expected = single.step(actions[0, 1])[0], first.step(actions[0])[0][1]
        np.testing.assert_allclose(got, expected, atol=0.05 if num_envs > 4 else 1e-5)  # big batches run in bfloat16

    def test_seed_zero_is_a_seed_and_none_goes_on(self, model):
        envs = DreamVectorEnv("walker", 2, model=model, obs_type="latent")
        action = actions_of(envs, 1)[0]

        def step(seed):
            envs.reset(seed=seed, options={"start": 0})
            return envs.step(action)[0]

        zero, later = step(0), step(None)
        np.testing.assert_array_equal(zero, step(0))
        np.testing.assert_array_equal(later, step(None))
        assert not np.array_equal(zero, later)
        assert not np.array_equal(zero[0], zero[1])

    def test_nothing_reads_the_global_generators(self, folder):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
        envs = DreamVectorEnv("walker", 2, model=folder)
        envs.reset()
        run(envs, actions_of(envs, 3))
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


class TestIndependence:
    @pytest.mark.parametrize("mode", list(AutoresetMode))
    def test_infos_have_the_same_keys_at_a_reset_and_at_every_step(self, model, mode):
        """Libraries such as TorchRL make a table of them."""
        options = {"doubt_penalty": 0.1, "max_doubt": 1e9, "max_episode_steps": 3, "autoreset_mode": mode}
        envs = DreamVectorEnv("walker", 3, model=model, **options)
        keys = {"start_index", "doubt", "reward_model", "too_doubtful"}
        _, infos = envs.reset(seed=0)
        starts = infos["start_index"]
        assert {key for key in infos if not key.startswith("_")} == keys | {"weights"}
        for count, action in enumerate(actions_of(envs, 7)):
            if mode is AutoresetMode.DISABLED and count in (3, 6):
                infos = envs.reset(options={"reset_mask": np.ones(3, bool)})[1]
                starts = infos["start_index"]
            *_, infos = envs.step(action)
            assert keys <= set(infos)
            assert all(infos[f"_{key}"].all() for key in keys)
            if "final_info" in infos:
                np.testing.assert_array_equal(infos["final_info"]["start_index"], starts)
                assert all(infos["final_info"][f"_{key}"].all() for key in keys)
            if "weights" in infos:  # where an episode begins
                starts = infos["start_index"]
                assert not infos["doubt"].any()
            np.testing.assert_array_equal(infos["start_index"], starts)

    @pytest.mark.parametrize("mode", list(AutoresetMode))
    @pytest.mark.parametrize("num_envs", [3, 80])
    def test_slots_never_influence_each_other(self, model, mode, num_envs):
        calm, troubled = (
            DreamVectorEnv("walker", num_envs, model=model, max_episode_steps=None, autoreset_mode=mode)
            for _ in range(2)
        )
        calm.reset(seed=4)
        troubled.reset(seed=4)
        actions, others = actions_of(calm, AHEAD + 6), actions_of(calm, AHEAD + 6, seed=1)
        watched = np.arange(num_envs) >= 2
        for t, (action, other) in enumerate(zip(actions, others, strict=True)):
            if t % 7 == 3:
                mask = ~watched & (np.arange(num_envs) == t % 2)
                troubled.reset(seed=t if t % 3 else None, options={"reset_mask": mask, "start": "dataset"})
            expected, got = calm.step(action), troubled.step(np.where(watched[:, None], action, other))
            np.testing.assert_array_equal(expected[0][watched], got[0][watched])
            np.testing.assert_array_equal(expected[1][watched], got[1][watched])
            assert not np.array_equal(expected[0][0], got[0][0])

    @pytest.mark.parametrize("doubt", [True, "ensemble"])
    @pytest.mark.parametrize("reward", ["task", "disagreement"])
    def test_a_slot_that_leaves_the_finite_numbers_is_doubted_and_earns_nothing(self, model, doubt, reward):
        envs = DreamVectorEnv("walker", 2, model=model, doubt=doubt, reward=reward, doubt_penalty=0.5)
        envs.reset(seed=0)
        state = envs.get_state()
        state["latents"][1] = 3e38
        envs.set_state(state)
        _, rewards, _, _, infos = envs.step(np.zeros((2, 6), np.float32))
        assert infos["diverged"].tolist() == [False, True]
        assert np.isfinite(rewards[0])
        assert rewards[1] == 0
        assert np.isposinf(infos["doubt"]).tolist() == [False, True]

    def test_a_doubt_that_is_no_number_is_the_largest(self, model, monkeypatch):
        envs = DreamVectorEnv("walker", 2, model=model, doubt_penalty=0.5, max_doubt=1e9)
        envs.reset(seed=0)
        dynamics = envs.tensor_dream.dynamics
        step = dynamics.step
        monkeypatch.setattr(
            dynamics, "step", lambda *of: (*step(*of)[:2], torch.tensor(torch.nan), torch.tensor([0.5, torch.nan]))
        )
        _, rewards, _, truncations, infos = envs.step(np.zeros((2, 6), np.float32))
        assert np.isfinite(rewards[0])
        assert rewards[1] == 0
        assert truncations.tolist() == infos["diverged"].tolist() == [False, True]
        assert infos["doubt"].tolist() == [0.5, np.inf]

    def test_a_slot_that_leaves_the_finite_numbers_ends_alone(self, model):
        envs = DreamVectorEnv("walker", 3, model=model)
        envs.reset(seed=0)
        state = envs.get_state()
        actions = actions_of(envs, 3)
        expected = envs.step(actions[0])
        state["latents"][1] = 3e38
        envs.set_state(state)
        observations, rewards, _, truncations, infos = envs.step(actions[0])
        assert np.isfinite(observations).all()
        assert truncations.tolist() == infos["diverged"].tolist() == [False, True, False]
        assert rewards[1] == 0
        np.testing.assert_array_equal(observations[[0, 2]], expected[0][[0, 2]])
        assert np.isfinite(envs.step(actions[1])[0]).all()  # the slot begins anew
        assert not envs.step(actions[2])[3].any()


class TestEpisodes:
    def reference(self, model, steps):
        """The same dream without a time limit, from the same seeds."""
        envs = DreamVectorEnv("walker", 3, model=model, max_episode_steps=None, autoreset_mode="Disabled")
        first, _ = envs.reset(seed=8)
        return envs, first, [envs.step(action) for action in actions_of(envs, steps)]

    def test_same_step(self, model):
        reference, _, steps = self.reference(model, 4)
        envs = DreamVectorEnv("walker", 3, model=model, max_episode_steps=4, autoreset_mode="SameStep", doubt=True)
        envs.reset(seed=8)
        *_, last = run(envs, actions_of(envs, 4))
        observations, rewards, terminations, truncations, infos = last
        assert truncations.all()
        assert not terminations.any()
        assert infos["_final_obs"].all()
        assert infos["_final_info"].all()
        np.testing.assert_array_equal(np.stack(infos["final_obs"]), steps[-1][0])
        np.testing.assert_array_equal(rewards, steps[-1][1])
        begun, begun_infos = reference.reset()
        np.testing.assert_array_equal(observations, begun)
        np.testing.assert_array_equal(infos["start_index"], begun_infos["start_index"])
        assert infos["_doubt"].all()
        assert not infos["doubt"].any()  # of the step that led to the first moment there is none
        assert infos["final_info"]["_doubt"].all()
        assert (infos["final_info"]["doubt"] > 0).all()

    def test_next_step(self, model):
        reference, _, steps = self.reference(model, 4)
        envs = DreamVectorEnv("walker", 3, model=model, max_episode_steps=4)
        assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        assert "autoreset_mode" not in DreamVectorEnv.metadata
        envs.reset(seed=8)
        *_, last = run(envs, actions_of(envs, 4))
        np.testing.assert_array_equal(last[0], steps[-1][0])
        assert last[3].all()
        observations, rewards, _, truncations, infos = envs.step(np.full((3, 6), np.nan))  # ignored
        np.testing.assert_array_equal(observations, reference.reset()[0])
        assert not rewards.any()
        assert not truncations.any()
        assert infos["_start_index"].all()
        action = actions_of(envs, 1, seed=3)[0]
        np.testing.assert_array_equal(envs.step(action)[0], reference.step(action)[0])

    def test_disabled(self, model):
        _, _, steps = self.reference(model, 4)
        envs = DreamVectorEnv("walker", 3, model=model, max_episode_steps=4, autoreset_mode=AutoresetMode.DISABLED)
        envs.reset(seed=8)
        actions = actions_of(envs, 4)
        *_, last = run(envs, actions)
        np.testing.assert_array_equal(last[0], steps[-1][0])
        with pytest.raises(AimeGymError, match="Slot 0 has ended"):
            envs.step(actions[0])
        kept, infos = envs.reset(options={"reset_mask": np.array([True, False, False])})
        np.testing.assert_array_equal(kept[1:], last[0][1:])
        assert not np.array_equal(kept[0], last[0][0])
        assert infos["_start_index"].tolist() == [True, False, False]
        with pytest.raises(AimeGymError, match="Slot 1 has ended"):
            envs.step(actions[0])

    @pytest.mark.parametrize("mode", list(AutoresetMode))
    def test_each_slot_has_its_own_clock(self, model, mode):
        envs = DreamVectorEnv("walker", 3, model=model, max_episode_steps=6, autoreset_mode=mode)
        envs.reset(seed=0)
        ends: list[list[int]] = [[], [], []]
        masks = {2: np.array([False, True, False]), 4: np.array([False, False, True])}
        for t, action in enumerate(actions_of(envs, 16)):
            if t in masks:
                envs.reset(options={"reset_mask": masks[t]})
            truncations = envs.step(action)[3]
            for slot in truncations.nonzero()[0]:
                ends[slot].append(t)
            if mode is AutoresetMode.DISABLED and truncations.any():
                envs.reset(options={"reset_mask": truncations})
        again = 7 if mode is AutoresetMode.NEXT_STEP else 6  # NEXT_STEP spends a step on the reset
        assert ends == [[t for t in (first, first + again) if t < 16] for first in (5, 7, 9)]

    @pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
    def test_infos_and_arrays_are_those_of_gymnasium(self, model, mode):
        """A SyncVectorEnv of single dreams gives the same keys, shapes, types and masks."""
        options = {"model": model, "max_episode_steps": 3, "doubt": True, "doubt_penalty": 0.5}
        ours = gym.make_vec(ID, num_envs=2, autoreset_mode=mode, **options)
        theirs = SyncVectorEnv([lambda: gym.make(ID, **options)] * 2, autoreset_mode=mode)
        results = [(ours.reset(seed=1), theirs.reset(seed=1))]
        results += [(ours.step(a), theirs.step(a)) for a in actions_of(ours.unwrapped, 7)]

        def compare(a, b):
            assert type(a) is type(b)
            if isinstance(a, dict):
                assert a.keys() == b.keys()
                for key in a:
                    compare(a[key], b[key])
            elif a.dtype == object:
                for one, other in zip(a, b, strict=True):
                    assert (one is None) == (other is None)
                    if isinstance(one, str):
                        assert one == other
                    elif one is not None:
                        np.testing.assert_allclose(one, other, atol=1e-5)
            else:
                assert a.dtype.kind == b.dtype.kind
                np.testing.assert_allclose(a, b, atol=1e-5)

        for mine, other in results:
            for a, b in zip(mine, other, strict=True):
                compare(a, b)

    def test_observations_are_fresh(self, model):
        envs = DreamVectorEnv("walker", 2, model=model)
        first, _ = envs.reset(seed=0)
        action = actions_of(envs, 1)[0]
        second = envs.step(action)[0]
        kept = second.copy()
        first[:], second[:] = 0, 0
        assert not np.shares_memory(first, second)
        np.testing.assert_array_equal(envs.reset(options={"reset_mask": np.array([True, False])})[0][1], kept[1])


class TestDoubt:
    def test_an_explorer_earns_the_disagreement(self, model):
        task = DreamVectorEnv("walker", 4, model=model, doubt=True)
        explorer = DreamVectorEnv("walker", 4, model=model, reward="disagreement")
        action = actions_of(task, 1)[0]
        for envs in (task, explorer):
            envs.reset(seed=0)
        _, rewards, _, _, infos = task.step(action)
        _, doubts, _, _, explored = explorer.step(action)
        np.testing.assert_array_equal(doubts, infos["doubt"])
        np.testing.assert_array_equal(explored["reward_model"], rewards)
        assert doubts.dtype == np.float64
        with pytest.raises(AimeGymError, match="Did you mean 'disagreement'"):
            DreamVectorEnv("walker", model=model, reward="disagrement")

    def test_doubt_is_what_the_posterior_adds_to_the_prior(self, model):
        envs = DreamVectorEnv("walker", 4, model=model, obs_type="latent", doubt=True)
        envs.reset(seed=0)
        latents, _, _, _, infos = envs.step(actions_of(envs, 1)[0])
        features = torch.from_numpy(latents)
        memory = features[:, : model.config.memory_dim]
        posterior = model.cell.posterior(memory, model.encode(model.decode(features, model.observed)))
        kl = torch.distributions.kl_divergence(
            *(torch.distributions.Normal(n.mean, n.std) for n in (posterior, model.cell.prior(memory)))
        ).sum(1)
        np.testing.assert_allclose(infos["doubt"], kl.detach().numpy(), rtol=1e-4)

    def test_disagreement_penalty_and_limit(self, model):
        plain, penalised = (
            DreamVectorEnv("walker", 4, model=model, doubt="ensemble", doubt_penalty=penalty) for penalty in (0.0, 2.0)
        )
        latents = DreamVectorEnv("walker", 4, model=model, obs_type="latent")
        before, _ = latents.reset(seed=0)
        action = actions_of(plain, 1)[0]
        expected = model.heads.disagreement(torch.from_numpy(before), torch.from_numpy(action)).numpy()
        plain.reset(seed=0)
        penalised.reset(seed=0)
        _, rewards, _, _, infos = plain.step(action)
        np.testing.assert_allclose(infos["doubt"], expected, atol=1e-5)
        assert "reward_model" not in infos
        _, less, _, _, infos = penalised.step(action)
        np.testing.assert_array_equal(infos["reward_model"], rewards)
        np.testing.assert_allclose(less, rewards - 2 * expected, atol=1e-5)

        limit = float(np.median(expected))
        limited = DreamVectorEnv("walker", 4, model=model, doubt="ensemble", max_doubt=limit)
        limited.reset(seed=0)
        _, same, terminations, truncations, infos = limited.step(action)
        np.testing.assert_array_equal(truncations, expected > limit)
        np.testing.assert_array_equal(infos["too_doubtful"], expected > limit)
        np.testing.assert_array_equal(same, rewards)
        assert not terminations.any()

    def test_by_default_infos_say_of_no_doubt(self, model):
        envs = DreamVectorEnv("walker", 2, model=model)
        envs.reset(seed=0)
        assert set(envs.step(actions_of(envs, 1)[0])[4]) == {"start_index", "_start_index"}


class TestState:
    @pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
    @pytest.mark.parametrize("taken", [3, AHEAD, AHEAD + 5])
    def test_restores_bit_for_bit(self, model, taken, mode):
        envs, fresh = (
            DreamVectorEnv("walker", 3, model=model, max_episode_steps=9, autoreset_mode=mode) for _ in range(2)
        )
        envs.reset(seed=1)
        actions = actions_of(envs, taken + AHEAD + 10)
        run(envs, actions[:4])
        envs.reset(options={"reset_mask": np.array([False, True, False])})
        run(envs, actions[4:taken])
        saved = pickle.dumps(envs.get_state())
        expected = run(envs, actions[taken:])
        for other in (envs, fresh):
            other.set_state(pickle.loads(saved))
            for a, b in zip(expected, run(other, actions[taken:]), strict=True):
                for one, two in zip(a[:4], b[:4], strict=True):
                    np.testing.assert_array_equal(one, two)

    def test_is_a_copy(self, model):
        env = DreamEnv("walker", model=model)
        env.reset(seed=1)
        state = env.get_state()
        action = np.zeros(6, np.float32)
        expected = [env.step(action)[0] for _ in range(3)]
        for _ in range(2):
            env.set_state(state)
            np.testing.assert_array_equal([env.step(action)[0] for _ in range(3)], expected)

    def test_of_another_size(self, model):
        state = DreamVectorEnv("walker", 2, model=model).get_state()
        with pytest.raises(AimeGymError, match="3 slots"):
            DreamVectorEnv("walker", 3, model=model).set_state(state)
        with pytest.raises(AimeGymError, match="keys, latents"):
            DreamVectorEnv("walker", 2, model=model).set_state({"steps": state["steps"]})

    def test_is_that_of_an_env_that_renders_too(self, model, gl):
        plain, rendering = (DreamEnv("walker", model=model, render_mode=mode) for mode in (None, "rgb_array"))
        for env, other in ((plain, rendering), (rendering, plain)):
            env.reset(seed=3)
            other.set_state(env.get_state())
            action = np.ones(6, np.float32)
            np.testing.assert_array_equal(env.step(action)[0], other.step(action)[0])
        assert rendering.render().shape == (240, 320, 3)

    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
    def test_copies_go_on_alike(self, model, copy_of):
        env = gym.make("AimeDream-Walker-v0", model=model)
        env.reset(seed=0)
        env.step(np.zeros(6, np.float32))  # with which the dynamics are traced
        twin = copy_of(env)
        for _ in range(5):
            action = env.action_space.sample()
            for mine, other in zip(env.step(action), twin.step(action), strict=True):
                np.testing.assert_array_equal(mine, other)


class TestStarts:
    def test_kinds(self, model):
        envs = DreamVectorEnv("walker", 40, model=model)
        assert set(envs.reset(seed=0)[1]["start_index"]) == set(range(RESETS))
        _, infos = envs.reset(options={"start": "dataset"})
        assert set(infos["start_index"]) <= set(range(RESETS, STARTS))
        chosen = np.arange(40) % STARTS
        assert envs.reset(options={"start": chosen})[1]["start_index"].tolist() == chosen.tolist()
        envs = DreamVectorEnv("walker", 2, model=model, start="dataset", max_episode_steps=1, autoreset_mode="SameStep")
        envs.reset(seed=0)
        for action in actions_of(envs, 5):
            assert (envs.step(action)[4]["start_index"] >= RESETS).all()

    def test_gradients_lead_through_the_features_of_starts(self, model):
        envs = DreamVectorEnv("walker", 2, model=model)
        actions = torch.zeros(3, 2, 6, requires_grad=True)
        envs.model.imagine(envs.start_features[:2], actions).features.sum().backward()
        assert actions.grad.abs().sum() > 0

    def test_own_frames(self, model):
        envs = DreamVectorEnv("walker", 2, model=model, obs_type="dict")
        bank = envs.starts
        expected, _ = envs.reset(options={"start": np.array([3, 8])})
        two = {name: bank[name][:, [3, 8]] for name in model.observed}
        actions = bank["pre_action"][:, [3, 8]]
        got, infos = envs.reset(options={"start": {"observations": two, "actions": actions}})
        assert "start_index" not in infos
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-5)

        state = np.concatenate([bank[name][:, 3] for name in model.observed], -1)  # [K, D]: one window for all
        bank["pre_action"][0, 3] = 0
        zero, _ = envs.reset(options={"start": {"observations": state, "actions": bank["pre_action"][:, 3]}})
        short, _ = envs.reset(options={"start": {"observations": state, "actions": bank["pre_action"][1:, 3]}})
        np.testing.assert_array_equal(zero["height"], short["height"])
        np.testing.assert_array_equal(short["height"][0], short["height"][1])
        one, _ = envs.reset(options={"start": {"observations": state[-1:], "actions": np.zeros((0, 6))}})
        assert not np.array_equal(one["height"], short["height"])

    def test_own_images(self, visual_model):
        envs = DreamVectorEnv("walker", 2, model=visual_model, obs_type="latent")
        images, actions = (envs.starts[name][:, 3] for name in ("image", "pre_action"))
        shown = [
            envs.reset(options={"start": {"observations": frames, "actions": actions}})[0]
            for frames in (images, {"image": images})
        ]
        np.testing.assert_array_equal(*shown)

    def test_images_of_two_precisions_leave_each_other(self, visual_model):
        make = lambda precision: DreamVectorEnv("walker", 2, model=visual_model, obs_type="image", precision=precision)  # noqa: E731
        coarse, fine = make("bf16"), make("32-true")
        shown, expected = {}, {}
        for name, envs in (("bf16", coarse), ("32-true", fine)):
            shown[name], infos = envs.reset(seed=3)
            decoded = visual_model.decode(envs.start_features[infos["start_index"]], ["image"])["image"]
            expected[name] = 255 * decoded.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(shown["32-true"], expected["32-true"], atol=0.51)
        assert np.abs(shown["bf16"] - expected["bf16"]).max() > 0.51
        np.testing.assert_allclose(shown["bf16"], expected["bf16"], atol=3)

    def test_physics_begins_the_real_twin(self, model):
        dream = gym.make(ID, model=model)
        _, info = dream.reset(seed=2)
        physics = dream.unwrapped.start_physics(info["start_index"])
        real = gym.make("AimeReal-Walker-v0")
        real.reset(options={"physics": physics})
        np.testing.assert_array_equal(real.unwrapped.physics_state, physics)

    @pytest.mark.parametrize(
        ("start", "message"),
        [
            ("resets", "Did you mean 'reset'"),
            (STARTS, f"starts 0 to {STARTS - 1}"),
            ([0, 1, 2], "one index a slot"),
            (0.5, "one index a slot"),
            ({"observations": {}}, "'observations' and 'actions'"),
            ({"observations": {"height": np.zeros((4, 3, 1))}, "actions": np.zeros((4, 3, 6))}, r"\[K, 2"),
            ({"observations": {"height": np.zeros((4, 1))}, "actions": np.zeros((4, 6))}, "orientations"),
            ({"observations": np.zeros((4, 7)), "actions": np.zeros((4, 6))}, "24 values"),
            ({"observations": np.full((4, 24), np.nan), "actions": np.zeros((4, 6))}, "orientations"),
        ],
    )
    def test_mistakes(self, model, start, message):
        envs = DreamVectorEnv("walker", 2, model=model)
        with pytest.raises(AimeGymError, match=message):
            envs.reset(options={"start": start})

    def test_without_a_bank(self, tmp_path):
        model = write_random_model(tmp_path, starts=False)
        envs = DreamVectorEnv("walker", 1, model=model)
        with pytest.raises(AimeGymError, match=r"no starts\.npz"):
            envs.reset()
        frames = {"observations": np.zeros((3, 24)), "actions": np.zeros((3, 6))}
        assert np.isfinite(envs.reset(options={"start": frames})[0]).all()


class TestMistakes:
    @pytest.mark.parametrize(
        ("action", "message"),
        [
            (np.zeros((2, 6)), r"shape \(3, 6\)"),
            (np.zeros((3, 5)), r"shape \(3, 6\)"),
            ([[0.0] * 6, [0.0] * 6, [0.0] * 5], r"shape \(3, 6\)"),
            ("walk", r"shape \(3, 6\)"),
            (np.array([[0.0] * 6, [0.0] * 6, [0, 0, 0, 0, 0, 1.01]]), "slot 2"),
            (np.array([[0.0] * 6, [0, np.nan, 0, 0, 0, 0], [0.0] * 6]), "slot 1"),
            (np.array([[0, 0, 0, 0, -np.inf, 0], [0.0] * 6, [0.0] * 6]), "slot 0"),
        ],
    )
    def test_actions(self, model, action, message):
        envs = DreamVectorEnv("walker", 3, model=model)
        envs.reset(seed=0)
        state = envs.get_state()
        with pytest.raises(AimeGymError, match=message):
            envs.step(action)
        assert torch.equal(envs.get_state()["latents"], state["latents"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"task": "wolk"}, "Did you mean 'walk'"),
            ({"task": "flip"}, "Known: walk, run"),
            ({"obs_type": "stat"}, "Did you mean 'state'"),
            ({"obs_type": "image"}, "decodes images"),
            ({"start": "rest"}, "Did you mean 'reset'"),
            ({"start": 0.5}, "Known: reset, dataset"),
            ({"max_doubt": np.nan}, "max_doubt is a finite number"),
            ({"doubt_penalty": "0.1"}, "doubt_penalty is a finite number"),
            ({"device": "abacus"}, "'cpu' always can"),
            ({"render_mode": "rgb_array", "width": 0}, "width is a positive integer"),
            ({"num_envs": 0}, "num_envs is a positive integer"),
            ({"max_episode_steps": 0}, "max_episode_steps is a positive integer"),
            ({"autoreset_mode": "SameSteps"}, "Did you mean 'SameStep'"),
            ({"render_mode": "human"}, "rgb_array"),
            ({"precision": "bf32"}, "Did you mean 'bf16'"),
            ({"episode_steps": 9}, "Unknown keyword of a dream 'episode_steps'. Did you mean 'max_episode_steps'"),
        ],
    )
    def test_keywords(self, model, options, message):
        with pytest.raises(AimeGymError, match=message):
            DreamVectorEnv("walker", **({"model": model} | options)).reset()

    def test_keywords_that_no_dream_knows(self, model):
        with pytest.raises(
            AimeGymError, match=r"Unknown keyword of a dream 'tusk'. Did you mean 'task'.*doubt_penalty"
        ):
            gym.make("AimeDream-Walker-v0", model=model, tusk="walk")
        with pytest.raises(AimeGymError, match=r"Did you mean 'max_episode_steps'"):
            gym.make_vec("AimeDream-v0", model=model, epsode_steps=9)

    def test_models(self, model, folder):
        with pytest.raises(AimeGymError, match="pass model="):
            gym.make("AimeDream-Humanoid-v0")
        with pytest.raises(AimeGymError, match="model of humanoid; got one of walker"):
            gym.make("AimeDream-Humanoid-v0", model=folder)
        with pytest.raises(AimeGymError, match="aime-gym fit-heads"):
            DreamEnv("walker", model=random_model(heads=False))
        with pytest.raises(AimeGymError, match="aime-gym fit-heads"):
            DreamEnv("walker", model=random_model(heads=False, use_reward=True), doubt="ensemble")
        with pytest.raises(AimeGymError):
            DreamEnv("walker", model=folder / "nowhere")

    def test_resets(self, model):
        envs = DreamVectorEnv("walker", 2, model=model)
        with pytest.raises(AimeGymError, match="Slot 0 has not begun"):
            envs.step(np.zeros((2, 6)))
        for mask in ([True], np.array([0, 1]), np.zeros(2, bool)):
            with pytest.raises(AimeGymError, match="reset_mask"):
                envs.reset(options={"reset_mask": mask})
        with pytest.raises(AimeGymError, match="one seed a slot"):
            envs.reset(seed=[1, 2, 3])
        with pytest.raises(AimeGymError, match="A seed is an integer"):
            envs.reset(seed=1.0)
        alone = gym.make(ID, model=model)
        alone.reset(seed=0)
        with pytest.raises(AimeGymError, match=r"shape \(6,\); got \(5,\)"):
            alone.step(np.zeros(5, np.float32))
        with pytest.raises(AimeGymError, match="Did you mean 'start'"):
            envs.reset(options={"starts": 0})
        options = {"reset_mask": np.array([True, False])}
        envs.reset(seed=0, options=options)
        assert list(options) == ["reset_mask"]
        with pytest.raises(AimeGymError, match="Slot 1 has not begun"):
            envs.step(np.zeros((2, 6)))


class TestPictures:
    def test_poses_the_physics_that_the_model_believes(self, model):
        envs = DreamVectorEnv("walker", 2, model=model, render_mode="rgb_array", width=64, height=48)
        envs.reset(seed=0)
        try:
            frames = envs.render()
        except AimeGymError as error:
            assert "MUJOCO_GL" in str(error)  # noqa: PT017
            pytest.skip("no GL library here")
        assert [frame.shape for frame in frames] == [(48, 64, 3)] * 2
        assert frames[0].dtype == np.uint8
        assert not np.array_equal(frames[0], frames[1])
        again = envs.render()
        np.testing.assert_array_equal(again, frames)
        envs.close()

    def test_a_missing_gl_library_is_named_at_the_first_picture(self, model, monkeypatch):
        monkeypatch.setenv("MUJOCO_GL", "off")
        envs = DreamVectorEnv("walker", 1, model=model, render_mode="rgb_array")
        envs.reset(seed=0)
        envs.step(actions_of(envs, 1)[0])
        with pytest.raises(AimeGymError, match="MUJOCO_GL"):
            envs.render()

    def test_the_root_moves_with_the_predicted_velocity(self, model):
        envs = DreamVectorEnv("walker", 2, model=model, render_mode="rgb_array", obs_type="latent")
        envs.reset(seed=0)
        begun = envs.get_state()["root"].numpy()  # where the real frames left the body
        moved = begun.copy()
        for action in actions_of(envs, 4):
            latents = torch.from_numpy(envs.step(action)[0])
            moved[:, 0] += model.heads.physics(latents)[:, 9 + 1].numpy() * 0.05
        np.testing.assert_allclose(envs.get_state()["root"], moved, atol=1e-6)
        assert np.abs(moved - begun).min() > 0

    def test_none_without_a_render_mode(self, model):
        assert DreamEnv("walker", model=model).render() is None


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_actions_a_little_outside_are_clipped_if_asked_for(make, tmp_path):
    write_random_model(tmp_path / "model")
    kinds = [("AimeDream-Walker-v0", {"model": tmp_path / "model", "task": "walk"})]
    kinds += [("AimeReal-v0", {"embodiment": name}) for name in ("walker", "Pendulum-v1")] if make is gym.make else []
    for env_id, options in kinds:
        strict, lenient = make(env_id, **options), make(env_id, clip_actions=True, **options)
        seen = [env.reset(seed=0)[0] for env in (strict, lenient)]
        outside = np.full(strict.action_space.shape, 1.2, np.float32)
        with pytest.raises(aime_gym.AimeGymError, match="clip_actions=True"):
            strict.step(outside)
        seen = strict.step(np.ones_like(outside))[0], lenient.step(outside)[0]
        np.testing.assert_array_equal(*seen)
        with pytest.raises(aime_gym.AimeGymError, match="in \\[-1, 1\\]"):
            lenient.step(outside * np.nan)


class TestLatentObservation:
    @pytest.mark.parametrize("obs_type", ["state", "dict"])
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_filters_online(self, folder, model, obs_type):
        env = LatentObservation(gym.make("AimeReal-Walker-v0", obs_type=obs_type), str(folder))
        assert env.observation_space == DreamEnv("walker", model=model, obs_type="latent").observation_space
        check_env(env, skip_render_check=True)
        bare = gym.make("AimeReal-Walker-v0", obs_type="dict")
        bare.action_space.seed(0)
        observations, actions = [bare.reset(seed=1)[0]], [np.zeros(6, np.float32)]
        latents = [env.reset(seed=1)[0]]
        for _ in range(4):
            actions.append(bare.action_space.sample())
            observations.append(bare.step(actions[-1])[0])
            latents.append(env.step(actions[-1])[0])
        frames = {name: torch.from_numpy(np.stack([o[name] for o in observations]))[:, None] for name in model.observed}
        expected, _ = model.observe(frames, torch.from_numpy(np.stack(actions))[:, None], sample=False)
        np.testing.assert_allclose(np.stack(latents), expected[:, 0], atol=1e-5)

    def test_samples_by_seed(self, model):
        env = LatentObservation(gym.make("AimeReal-Walker-v0"), model, deterministic=False)
        first, again, other = (env.reset(seed=seed)[0] for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
        physics = env.unwrapped.physics_state
        unseeded = [LatentObservation(gym.make("AimeReal-Walker-v0"), model, deterministic=False) for _ in range(2)]
        assert not np.array_equal(*(each.reset(options={"physics": physics})[0] for each in unseeded))

    def test_mistakes(self, model):
        with pytest.raises(AimeGymError, match="the env shows"):
            LatentObservation(gym.make("AimeReal-Walker-v0", setup="lpomdp"), model)
        with pytest.raises(AimeGymError, match="actions of shape"):
            LatentObservation(gym.make("AimeReal-Hopper-v0"), model)


def test_the_first_task_is_one_that_the_model_rewards(tmp_path):
    model = write_random_model(tmp_path / "model")
    assert gym.make("AimeDream-v0", model=model).unwrapped.task == "walk"
    assert model.heads.tasks == ("walk", "run")
    del model.heads.rewards["walk"]
    model.heads.tasks = ("run",)
    model.heads.reward_mean, model.heads.reward_std = model.heads.reward_mean[1:], model.heads.reward_std[1:]
    assert gym.make("AimeDream-v0", model=model).unwrapped.task == "run"


def test_a_dream_that_was_refused_can_be_closed():
    """Gymnasium closes a vector env when it is collected, whatever its constructor came to."""
    refused = DreamVectorEnv.__new__(DreamVectorEnv)
    with pytest.raises(aime_gym.AimeGymError, match="precision"):
        refused.__init__("walker", 2, precision="16")
    refused.close()


class TestWeights:
    def other(self, folder):
        save_model(random_model(seed=7), folder)

    @pytest.mark.parametrize("dream_id", [ID, "AimeDream-v0"])
    def test_a_spec_gives_the_same_dream_or_says_that_the_weights_have_changed(self, dream_id, tmp_path):
        revision = write_random_model(tmp_path).revision
        with gym.make(dream_id, model=str(tmp_path), task="run", max_episode_steps=9) as dream:
            spec, (observation, info) = EnvSpec.from_json(dream.spec.to_json()), dream.reset(seed=3)
        assert info["weights"] == spec.kwargs["weights"] == revision.digest
        with gym.make(spec) as again, gym.make(dream.spec) as once_more:
            np.testing.assert_array_equal(again.reset(seed=3)[0], observation)
            np.testing.assert_array_equal(once_more.reset(seed=3)[0], observation)
            assert again.spec == spec
        self.other(tmp_path)
        with pytest.raises(AimeGymError, match=rf"'{revision.digest}'.*revision 2 .*weights=None"):
            gym.make(spec)
        with gym.make(spec, weights=None) as changed:
            assert changed.reset(seed=3)[1]["weights"] == changed.spec.kwargs["weights"] != revision.digest

    def test_the_specs_of_vector_envs_do_as_well(self, tmp_path):
        digest = write_random_model(tmp_path).revision.digest
        dreams = gym.make_vec(ID, num_envs=3, model=str(tmp_path), task="run")
        observations, infos = dreams.reset(seed=3)
        assert infos["weights"].tolist() == [digest] * 3
        assert infos["_weights"].all()
        spec = EnvSpec.from_json(dreams.spec.to_json())
        np.testing.assert_array_equal(gym.make_vec(spec).reset(seed=3)[0], observations)
        assert aime_gym.make_sb3_env(ID, 2, model=str(tmp_path), task="run").unwrapped.spec.kwargs["weights"] == digest
        self.other(tmp_path)
        with pytest.raises(AimeGymError, match=digest):
            gym.make_vec(spec)
        with pytest.raises(AimeGymError, match=digest):
            aime_gym.TensorDream(tmp_path, weights=digest)

    def test_weights_of_no_folder_have_no_name(self, tmp_path):
        model = write_random_model(tmp_path)
        dream = gym.make(ID, model=model, task="run", disable_env_checker=True)
        assert dream.reset(seed=0)[1]["weights"] == model.revision.digest
        with torch.no_grad():
            model.cell.initial_state += 1.0  # as training on does
        assert revision_of(model) is revision_of(random_model()) is None
        dream = DreamEnv(model=model, task="run")
        dream.spec = gym.spec(ID)
        assert "weights" not in {**dream.reset(seed=0)[1], **dream.spec.kwargs}
        with pytest.raises(AimeGymError, match="in no folder"):
            DreamEnv(model=model, task="run", weights=model.revision.digest)


def test_the_info_of_a_single_dream_holds_numpy_scalars(model):
    env = gym.make(ID, model=model, doubt=True, max_episode_steps=3)
    _, info = env.reset(seed=0)
    assert isinstance(info.pop("weights"), str)
    *_, stepped = env.step(env.action_space.sample())
    assert set(info) == set(stepped) == {"start_index", "doubt"}
    assert info["start_index"] == stepped["start_index"]
    assert info["doubt"] == 0 < stepped["doubt"]
    assert all(isinstance(value, np.generic) for value in (*info.values(), *stepped.values()))
