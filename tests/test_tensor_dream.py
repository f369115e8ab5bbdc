"""Dreams as functions of tensors: their noise, what they share in a process, and that the envs are the same dreams."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy import stats

import aime_gym
from aime_gym.envs import start_bank
from aime_gym.envs.dream_vector import DreamVectorEnv
from aime_gym.envs.start_bank import (
    AHEAD,
    DreamState,
    SlotNoise,
    fingerprint,
    integers,
    shared_model,
    slot_keys,
    standard_normal,
)
from aime_gym.envs.tensor_dream import TensorDream
from aime_gym.errors import AimeGymError
from tests.random_models import RESETS, STARTS, write_random_model
from tests.test_devices import Nowhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tabular"
    write_random_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return aime_gym.load_pretrained_model(folder)


def actions_of(num_envs: int, steps: int, seed: int = 0) -> torch.Tensor:
    """Uniform, [T, N, A]."""
    return torch.rand(steps, num_envs, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestNoise:
    def test_is_standard_normal(self):
        drawn = standard_normal(slot_keys(range(200)), torch.arange(50)[:, None], 32).double().numpy()  # [50, 200, 32]
        numbers = drawn.ravel()
        assert abs(numbers.mean()) < 4 / len(numbers) ** 0.5
        assert abs(numbers.var() - 1) < 4 * (2 / len(numbers)) ** 0.5
        assert abs(stats.skew(numbers)) < 4 * (6 / len(numbers)) ** 0.5
        assert abs(stats.kurtosis(numbers)) < 4 * (24 / len(numbers)) ** 0.5
        assert stats.kstest(numbers, "norm").pvalue > 0.001
        tails = np.abs(numbers[np.abs(numbers) > 2])
        assert stats.kstest(tails, lambda x: 1 - stats.norm.sf(x) / stats.norm.sf(2)).pvalue > 0.001

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["steps", "slots", "numbers"])
    def test_neighbours_have_nothing_in_common(self, axis):
        drawn = standard_normal(slot_keys(range(200)), torch.arange(50)[:, None], 32).double().numpy()
        for of in (drawn, drawn**2):
            for lag in (1, 2, 16):
                ahead, behind = (np.moveaxis(of, axis, 0)[part].ravel() for part in (slice(lag, None), slice(-lag)))
                assert abs(np.corrcoef(ahead, behind)[0, 1]) < 4.5 / len(ahead) ** 0.5

    def test_bits_are_known(self):
        """The same on every machine and device: SplitMix64 as its authors publish it."""
        key = slot_keys([0])
        assert key.tolist() == [-2152535657050944081]  # 0xE220A8397B1DCDAF, the first number of seed 0
        assert integers(slot_keys([0, 1, 2]), torch.zeros(3, dtype=torch.int64), 1000).tolist() == [171, 122, 147]

    def test_depends_on_key_and_count_alone(self):
        keys, counts = slot_keys(range(1024)), torch.arange(1024) * 7
        many = standard_normal(keys, counts, 30)
        for size in (1, 3, 7, 100):
            assert torch.equal(standard_normal(keys[:size], counts[:size], 30), many[:size])
        assert torch.equal(standard_normal(keys[5:6], counts[5:6], 30), many[5:6])
        assert torch.equal(standard_normal(keys, counts, 29), many[:, :29])

    @pytest.mark.parametrize("slots", [1, 3, 100, 2000])
    def test_looking_ahead_changes_nothing(self, slots):
        noise, rng = SlotNoise(5), np.random.default_rng(0)
        keys, counts = slot_keys(range(slots)), torch.zeros(slots, dtype=torch.int64)
        for step in range(2 * AHEAD + 5):
            drawn, following = noise.draw(keys, counts)
            assert torch.equal(drawn, standard_normal(keys, counts, 5))
            assert torch.equal(following, counts + 1)
            if step % 50 == 20:
                following = following + torch.from_numpy(rng.integers(-3, 90, slots))
            if step % 50 == 40:
                keys = slot_keys(rng.integers(2**40, size=slots).tolist())
            counts = following

    def test_seeds_of_any_size(self):
        seeds = [0, 1, 2**31, 2**63, 2**64, 2**64 + 1, 2**200, 2**200 + 1, 3 * 2**64]
        assert len(set(slot_keys(seeds).tolist())) == len(seeds)
        with pytest.raises(AimeGymError, match="0 or more; got -1"):
            slot_keys([3, -1])

    def test_integers_are_uniform(self):
        drawn = integers(slot_keys(range(700)), torch.arange(20)[:, None], 7).flatten()
        assert stats.chisquare(torch.bincount(drawn, minlength=7).numpy()).pvalue > 0.001


class TestSteps:
    def test_the_number_of_slots_changes_roundings_alone(self, model):
        """Noise and starts are equal to the bit; BLAS adds the terms of a product in another order for other shapes."""
        actions, shown = actions_of(1024, 40), {}
        for slots in (1024, 7, 1):
            dream = TensorDream(model, "walk", slots, precision="32-true", max_episode_steps=13, doubt=True)
            with torch.no_grad():
                state = dream.reset(3)
                shown[slots] = [state.starts[:1]]
                for action in actions[:, :slots]:
                    state, *told = dream.step(state, action)
                    shown[slots] += [state.starts[:1], state.counts[:1], *(each[:1] for each in told)]
        for slots in (7, 1):
            for mine, theirs in zip(shown[slots], shown[1024], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
                assert mine.is_floating_point() or torch.equal(mine, theirs)

    @pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
    def test_are_those_of_the_env(self, model, mode):
        options = {"task": "walk", "max_episode_steps": 4, "autoreset_mode": mode, "doubt_penalty": 0.1}
        dream, envs = TensorDream(model, num_envs=3, **options), DreamVectorEnv("walker", 3, model=model, **options)
        state = dream.reset([4, 9, 0])
        observations, _ = envs.reset(seed=[4, 9, 0])
        np.testing.assert_array_equal(state.observations, observations)
        ended = np.zeros(3, bool)
        for action in actions_of(3, 4 if mode == "Disabled" else 11):
            before = ended
            with torch.no_grad():
                state, *told = dream.step(state, action)
            *expected, infos = envs.step(action.numpy())
            for mine, theirs in zip(told, expected, strict=False):
                np.testing.assert_allclose(mine.double(), theirs, rtol=1e-6)
            ended = expected[2] | expected[3]
            begins = {"NextStep": before, "SameStep": ended, "Disabled": np.zeros(3, bool)}[mode]
            np.testing.assert_array_equal(infos["doubt"], np.where(begins, 0, told[-1]))
            if mode == "SameStep" and ended.any():
                np.testing.assert_array_equal(infos["final_info"]["doubt"][ended], told[-1][ended])
        assert torch.equal(state.latents, envs.state.latents)

    def test_gradients_lead_to_actions_up_to_a_reset(self, model):
        dream = TensorDream(model, num_envs=2, max_episode_steps=2, autoreset_mode="SameStep")
        actions = actions_of(2, 3).requires_grad_()
        state = dream.reset(0)
        for action in actions:
            state, _, rewards, *_ = dream.step(state, action)
        (gradient,) = torch.autograd.grad(rewards.sum(), actions)
        assert gradient[2].abs().min() > 0
        assert not gradient[:2].any()

    def test_with_and_without_gradients_they_are_the_same(self, model):
        dream = TensorDream(model, num_envs=5, doubt=True)
        ways = []
        for gradients in (False, True):
            state, shown = dream.reset(1), []
            with torch.set_grad_enabled(gradients):
                for action in actions_of(5, 6):
                    state, *told = dream.step(state, action)
                    shown += told
            ways.append(shown)
        for one, other in zip(*ways, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    def test_a_state_is_never_changed(self, model):
        dream = TensorDream(model, num_envs=3, max_episode_steps=2)
        state = dream.reset(0)
        kept, ends = [tensor.clone() for tensor in state], []
        with torch.no_grad():
            for _ in range(2):
                following, first = state, []
                for action in actions_of(3, 5):
                    following, _, _, terminations, truncations = dream.step(following, action)
                    first.append(truncations.clone())
                    terminations |= True  # what a step gives is the caller's own
                    truncations |= True
                ends.append(torch.stack(first))
        assert all(torch.equal(*pair) for pair in zip(kept, state, strict=True))
        assert torch.equal(*ends)

    def test_every_tensor_is_made_where_the_dream_is(self, model):
        dream, actions = TensorDream(model, num_envs=3, max_episode_steps=2, doubt=True, device="cpu"), actions_of(3, 5)
        with Nowhere():
            state = dream.reset(0)
            for action in actions.unbind():
                state, *_ = dream.step(state, action)

    def test_seeds_and_starts(self, model):
        dream = TensorDream(model, num_envs=3)
        first = dream.reset(7)
        for seeds in ([7, 8, 9], torch.tensor([7, 8, 9]), np.arange(7, 10), np.int64(7)):
            assert torch.equal(dream.reset(seeds).latents, first.latents)
        assert dream.reset(7, start=[0, 5, 11]).starts.tolist() == [0, 5, 11]
        begun = dream.begin(first, torch.tensor([1]), start=STARTS - 1)
        assert begun.starts.tolist() == [first.starts[0], STARTS - 1, first.starts[2]]
        assert (TensorDream(model, num_envs=40, start="dataset").reset(0).starts >= RESETS).all()

    @pytest.mark.parametrize(
        ("act", "message"),
        [
            (
                lambda dream: dream.step(dream.reset(0), torch.zeros(2, 6)),
                r"shape \(3, 6\) in float32 on cpu; got \(2, 6\)",
            ),
            (lambda dream: dream.step(dream.reset(0), torch.zeros(3, 6, dtype=torch.float64)), "float64"),
            (lambda dream: dream.reset([1, 2]), "one seed a slot, 3; got 2"),
            (lambda dream: dream.reset(-1), "0 or more"),
            (lambda dream: dream.reset(0, start="rest"), "Did you mean 'reset'"),
            (lambda dream: dream.reset(0, start=torch.zeros(3, 7)), r"latents \[20\] or \[3, 20\]"),
            (lambda dream: dream.reset(0, start=torch.zeros(2, 20)), r"got \[2, 20\] in torch.float32"),
            (lambda dream: dream.reset(0, start=np.zeros(20)), "float64"),
            (lambda dream: dream.reset(0, start=torch.full((20,), torch.nan)), "finite latent"),
            (
                lambda dream: dream.reset(0, start=TensorDream(dream.model, obs_type="latent").reset(0)),
                "shows something else",
            ),
            (lambda dream: TensorDream(dream.model, obs_type="sensors"), "obs_type"),
            (lambda dream: TensorDream(dream.model, doubt="ensembel"), "Did you mean 'ensemble'"),
            (lambda dream: TensorDream(dream.model, num_envs=0), "num_envs"),
            (lambda dream: TensorDream("no-such-model"), "no-such-model"),
        ],
    )
    def test_mistakes(self, model, act, message):
        with pytest.raises(AimeGymError, match=message):
            act(TensorDream(model, num_envs=3))

    def test_the_keywords_of_before_still_say_what_they_said(self, model):
        with pytest.warns(DeprecationWarning, match="doubt=True"):
            assert DreamVectorEnv("walker", 1, model=model, disagreement=True).tensor_dream.doubt is True
        with pytest.warns(DeprecationWarning, match="doubt=True") as told:
            envs = DreamVectorEnv("walker", 1, model=model, disagreement=True, doubt="ensemble")
        assert [one.filename for one in told] == [__file__], "Python shows those of one's own lines alone"
        assert envs.tensor_dream.doubt == "ensemble"
        with pytest.warns(DeprecationWarning, match="doubt=True"):
            assert DreamVectorEnv("walker", 1, model=model, doubt="posterior").tensor_dream.doubt is False
        with pytest.warns(DeprecationWarning, match="max_disagreement= is now called max_doubt="):
            assert DreamVectorEnv("walker", 1, model=model, max_disagreement=3.0).max_doubt == 3.0
        with pytest.warns(DeprecationWarning, match="uncertainty_penalty= is now called doubt_penalty="):
            single = gym.make("AimeDream-Walker-v0", model=model, uncertainty_penalty=0.5)
        assert "doubt" in (single.reset(seed=0) and single.step(single.action_space.sample())[-1])
        with pytest.raises(AimeGymError, match="give max_doubt= alone"):
            DreamVectorEnv("walker", 1, model=model, max_disagreement=3.0, max_doubt=3.0)


def test_a_model_says_whether_its_dreams_go_on_by_means(model, tmp_path):
    by_means = write_random_model(tmp_path / "means", deterministic=True)
    assert by_means.config.deterministic
    assert not model.config.deterministic
    latents = torch.zeros(model.config.feature_dim)

    def ends(loaded, **options):
        """Where three slots of different seeds are after two steps from one state: whether in the same place."""
        dream = TensorDream(loaded, num_envs=3, **options)
        state = dream.reset(0, start=latents)
        with torch.no_grad():
            for action in actions_of(1, 2):
                state, *_ = dream.step(state, action.repeat(3, 1))
        return torch.equal(state.latents[0], state.latents[1])

    assert ends(by_means)
    assert not ends(model)
    assert not ends(by_means, deterministic=False)
    assert ends(model, deterministic=True)
    with pytest.raises(AimeGymError, match="deterministic"):
        TensorDream(model, deterministic="no")


class TestOneStateInAllSlots:
    """What planners do: many plans from one state."""

    @pytest.fixture(scope="class")
    def reached(self, model):
        """A single dream after three steps, the state it is in, and what it shows in the next two."""
        single = gym.make("AimeDream-Walker-v0", model=model, deterministic=True).unwrapped
        single.reset(seed=4)
        for action in actions_of(1, 3)[:, 0]:
            single.step(action.numpy())
        state = single.get_state()
        return state, [single.step(action.numpy())[:2] for action in actions_of(1, 2, seed=1)[:, 0]]

    @pytest.mark.parametrize("give", ["state", "mapping", "latents", "array"])
    def test_every_slot_goes_on_from_it(self, model, reached, give):
        state, expected = reached
        latents = state["latents"][0]
        given = {"state": DreamState(**{name: state[name] for name in DreamState._fields}), "mapping": state}
        given |= {"latents": latents, "array": latents.numpy()}
        dream = TensorDream(model, num_envs=3, deterministic=True, max_episode_steps=2)
        following = dream.reset(7, start=given[give])
        assert following.starts.tolist() == [-1] * 3
        torch.testing.assert_close(following.observations, state["observations"].expand(3, -1))
        with torch.no_grad():
            for action, (shown, reward) in zip(actions_of(1, 2, seed=1), expected, strict=True):
                following, observations, rewards, *_, truncations = dream.step(following, action.repeat(3, 1))
                torch.testing.assert_close(observations, torch.from_numpy(shown).expand(3, -1), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(rewards, torch.full((3,), reward), rtol=1e-5, atol=1e-5)
        assert truncations.all(), "an episode begins with it"

    def test_envs_take_it_as_an_option(self, model, reached):
        state, expected = reached
        envs = DreamVectorEnv("walker", 3, model=model, deterministic=True)
        observations, infos = envs.reset(seed=0, options={"start": state})
        np.testing.assert_array_equal(observations, state["observations"].expand(3, -1))
        assert "start_index" not in infos
        shown, *_ = envs.step(actions_of(1, 2, seed=1)[0].repeat(3, 1).numpy())
        np.testing.assert_allclose(shown, np.broadcast_to(expected[0][0], shown.shape), rtol=1e-4, atol=1e-5)

    def test_slots_draw_by_their_own_seeds_and_each_may_have_its_own_state(self, model, reached):
        dream = TensorDream(model, num_envs=3)
        same = dream.reset(0, start=reached[0])
        with torch.no_grad():
            shown = dream.step(same, torch.zeros(3, 6))[1]
        assert not torch.equal(shown[0], shown[1])
        other = dream.reset(5)
        assert torch.equal(dream.reset(0, start=other).latents, other.latents)
        begun = dream.begin(same, torch.tensor([1]), start=other)
        assert torch.equal(begun.latents, torch.stack([same.latents[0], other.latents[1], same.latents[2]]))

    def test_gradients_reach_the_plans(self, model, reached):
        dream = TensorDream(model, num_envs=3, deterministic=True)
        plans = torch.zeros(2, 3, 6, requires_grad=True)
        state = dream.reset(0, start=reached[0])
        for actions in plans:
            state, _, rewards, *_ = dream.step(state, actions)
        rewards.sum().backward()
        assert (plans.grad[0].abs().sum(1) > 0).all()


class TestState:
    def test_is_plain_tensors(self, model):
        envs = DreamVectorEnv("walker", 2, model=model)
        envs.reset(seed=0)
        state = envs.get_state()
        assert {type(value) for value in state.values()} == {torch.Tensor}
        assert set(DreamState._fields) < set(state)

    def test_of_an_older_version_is_refused(self, model):
        envs = DreamVectorEnv("walker", 2, model=model)
        envs.reset(seed=0)
        before = envs.get_state()
        older = {"latents": before["latents"], "noise": {"generators": torch.zeros(2, 8)}, "np_random": None}
        with pytest.raises(AimeGymError, match=r"^This state is of an older version, .* begin anew and save it\.$"):
            envs.set_state(older)
        with pytest.raises(AimeGymError, match="observations are something else"):
            envs.set_state(before | {"observations": before["observations"].numpy()})
        assert torch.equal(envs.get_state()["latents"], before["latents"])


class TestSharing:
    def test_dreams_of_one_model_share_its_weights_and_its_bank(self, folder, monkeypatch):
        filtered = []
        own = start_bank.filter_frames
        monkeypatch.setattr(start_bank, "filter_frames", lambda *of: filtered.append(0) or own(*of))
        envs = [gym.make("AimeDream-Walker-v0", model=folder).unwrapped._dream for _ in range(4)]
        envs.append(DreamVectorEnv("walker", 40, model=folder))
        assert len({id(env.model) for env in envs}) == 1
        assert len({id(env.tensor_dream.dynamics) for env in envs}) == 1
        assert len(filtered) == 1
        bf16 = DreamVectorEnv("walker", model=folder, precision="bf16")
        by_head = DreamVectorEnv("walker", model=folder, task="run", reward="head")
        assert len({id(env.tensor_dream.dynamics) for env in (envs[0], bf16, by_head)}) == 3
        by_formula = DreamVectorEnv("walker", model=folder, task="run")
        assert by_formula.tensor_dream.dynamics is envs[0].tensor_dream.dynamics  # no head is evaluated for nothing
        assert len(filtered) == 1
        envs[0].starts["pre_action"][:] = 7  # a copy
        assert not (envs[1].starts["pre_action"] == 7).any()

    def test_a_pickled_dream_goes_on_alike(self, model):
        dream = TensorDream(model, num_envs=2)
        twin = pickle.loads(pickle.dumps(dream))
        action = actions_of(2, 1)[0]
        with torch.no_grad():
            assert torch.equal(*(each.step(each.reset(0), action)[1] for each in (dream, twin)))

    @pytest.mark.parametrize("way", ["in place", "by data", "by name"])
    def test_a_model_that_changes_needs_a_new_dream(self, tmp_path, way):
        model = write_random_model(tmp_path)
        action = actions_of(2, 1)[0]

        def step(dream):
            with torch.no_grad():
                return dream.step(dream.reset(0), action)

        dream = TensorDream(model, num_envs=2, reward="head")
        before = step(dream)
        twin = dict(model.named_parameters())
        weight = twin["cell.memory_cell.weight_hh"]
        if way == "in place":
            with torch.no_grad():
                weight.mul_(0.5)
        elif way == "by data":
            weight.data.mul_(0.5)  # which no counter of versions sees
        else:
            model.heads.reward_mean = model.heads.reward_mean + 0.1
        assert torch.equal(step(dream)[1], before[1])
        assert torch.equal(step(dream)[2], before[2])
        after = step(TensorDream(model, num_envs=2, reward="head"))
        assert not torch.equal(after[2], before[2])
        assert torch.equal(step(TensorDream(model, num_envs=2, reward="head"))[2], after[2])

    def test_a_loaded_model_is_its_folders_as_long_as_nobody_changes_either(self, tmp_path):
        write_random_model(tmp_path)
        model = shared_model(tmp_path)
        assert shared_model(tmp_path) is model
        model.heads.reward_mean.add_(1.0)
        fresh = shared_model(tmp_path)
        assert fresh is not model
        assert shared_model(tmp_path) is fresh
        write_random_model(tmp_path, seed=1)
        assert fingerprint(shared_model(tmp_path)) != fingerprint(fresh)

    def test_a_bank_that_was_written_anew_is_read_anew(self, tmp_path):
        model = write_random_model(tmp_path)
        before = TensorDream(model).reset(0, start=0)
        bank = dict(np.load(tmp_path / "starts.npz"))
        turned = {name: rows[::-1] if name in ("physics", "is_reset") else rows[:, ::-1] for name, rows in bank.items()}
        np.savez(tmp_path / "starts.npz", **turned)
        os.utime(tmp_path / "starts.npz", ns=(1, 1))
        after = TensorDream(model).reset(0, start=STARTS - 1)
        torch.testing.assert_close(after.latents, before.latents, rtol=1e-5, atol=1e-5)

    def test_nothing_outlives_the_model(self, tmp_path):
        from aime_gym.envs import start_bank

        write_random_model(tmp_path)
        gc.collect()
        models = len(start_bank._parts)
        envs = gym.make("AimeDream-Walker-v0", model=tmp_path)
        envs.reset(seed=0)
        assert len(start_bank._parts) == models + 1
        del envs
        gc.collect()
        assert len(start_bank._parts) == models
        assert not [key for key in start_bank._loaded if key[0] == tmp_path]


MEMORY = """
import gymnasium, aime_gym
def resident():
    return int(open("/proc/self/statm").read().split()[1])
dreams = []
for count in (1, 32):
    while len(dreams) < count:
        dreams.append(gymnasium.make("AimeDream-Walker-v0"))
        dreams[-1].reset(seed=0)
        dreams[-1].step(dreams[-1].action_space.sample())
    print(resident())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_thirty_two_dreams_take_hardly_more_memory_than_one():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, check=True)
    one, many = map(int, run.stdout.split())
    assert many < 1.1 * one
