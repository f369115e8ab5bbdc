"""Why dreams err: shares that sum to the error, and that move where, and only where, the model was changed."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import aime_gym
from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, Rhythm, load_plain, save_plain
from aime_gym.commands.compare import PICTURE, RESULT, Explain, spread, with_section
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import compare
from aime_gym.evaluation.explain import ErrorChain, explain
from aime_gym.evaluation.explanation import Explanation
from aime_gym.evaluation.returns import episode_returns
from aime_gym.evaluation.strangers import Stranger
from aime_gym.evaluation.worlds import SENSORS, Worlds, make_real_envs
from aime_gym.files import weights_digest
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel
from tests.random_models import write_random_model
from tests.tiny_model import make_tiny_model

SETTINGS = {"task": "swingup", "episodes": 3, "max_episode_steps": 12, "horizons": (2, 5)}


def mlp(inputs: int = 5, actions: int = 1, seed: int = 0) -> PlainMLP:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((inputs, actions)).astype("f4"),)
    return PlainMLP(weights, (np.zeros(actions, "f4"),), np.zeros(inputs, "f4"), np.ones(inputs, "f4"))


def rhythm(actions: int = 1) -> Rhythm:
    return Rhythm(*(np.full(actions, value, "f4") for value in (0.1, 0.8, 0.13, 0.2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("cartpole"), "cartpole")


@pytest.fixture
def model(folder) -> WorldModel:
    return read(folder)


def read(folder: Path) -> WorldModel:
    """A cartpole's, whose head pays about 1 and is nowhere near its limits."""
    model = load_pretrained_model(folder)
    assert model.heads is not None
    model.heads.reward_limits = (-100.0, 100.0)
    model.heads.reward_mean.fill_(1.0)
    model.heads.reward_std.fill_(0.3)
    return model


@pytest.fixture(scope="module")
def before(folder) -> dict[str, float]:
    """The shares of that model as it is."""
    return shares(read(folder))


def shares(model: WorldModel, policy=None) -> dict[str, float]:
    (explained,) = explain(model, {"one": policy or mlp()}, reward="head", **SETTINGS).policies
    return dict(explained.shares)


def last_layer(module: torch.nn.Module) -> torch.nn.Linear:
    return [part for part in module.modules() if isinstance(part, torch.nn.Linear)][-1]


def moved(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - value for name, value in before.items() if abs(after[name] - value) > 1e-5}


def test_shares_sum_to_the_gap_that_compare_finds(model, folder):
    policies = {"mlp": mlp(), "rhythm": rhythm(), "noisy": NoisyPolicy(mlp(seed=1), 0.3), "random": "random"}
    explanation = explain(model, policies, check=2, **SETTINGS)
    found = compare(policies, "cartpole", "swingup", 3, model, max_episode_steps=12)
    for explained, other in zip(explanation.policies, found.policies, strict=True):
        assert sum(explained.shares.values()) == pytest.approx(explained.error, abs=1e-9)
        assert explained.error * explained.steps == pytest.approx(other.gap, abs=1e-4)
        assert explained.real * explained.steps == pytest.approx(other.real.mean, abs=1e-9)
        for share, parts in explained.profile.items():
            assert sum(parts) == pytest.approx(explained.shares[share], abs=1e-9)
        assert explained.check is not None
    blind = explanation.policies[0]
    assert set(blind.shares) == {
        *("posterior", "head", "prior 2", "prior 5", "feedback", "sampling", "beyond", "starts")
    }
    assert abs(blind.shares["starts"]) < 1e-3  # both begin in the same physics state


def test_a_model_whose_dreams_go_on_by_means_has_no_share_of_sampling(folder, before):
    model = read(folder)
    model.config = replace(model.config, deterministic=True)
    explanation = explain(model, {"one": mlp()}, check=2, **SETTINGS)
    (explained,) = explanation.policies
    found = compare({"one": mlp()}, "cartpole", "swingup", 3, model, max_episode_steps=12)
    assert explained.error * explained.steps == pytest.approx(found.policies[0].gap, abs=1e-4)
    assert sum(explained.shares.values()) == pytest.approx(explained.error, abs=1e-9)
    assert explained.shares["sampling"] == pytest.approx(0.0, abs=1e-6)
    assert abs(before["sampling"]) > 1e-4


@pytest.mark.parametrize("policy", [rhythm(), NoisyPolicy(rhythm(), 0.3), "random", "zero"])
def test_blind_policies_have_no_feedback(policy, model, before):
    """Their clocks and their noise go on in windows that begin within an episode."""
    found = shares(model, policy)
    assert abs(found["feedback"]) < 1e-6
    assert abs(found["beyond"]) > 1e-6
    assert abs(before["feedback"]) > 1e-4


def test_a_wrong_head_is_the_heads_share(model, before):
    model.heads.reward_mean += 0.3
    assert moved(before, shares(model)) == {"head": pytest.approx(0.3, abs=1e-5)}


def test_a_wrong_prior_is_not_the_share_of_posterior_or_head(model, before):
    with torch.no_grad():
        for weight in model.cell.prior_net.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    changed = moved(before, shares(model))
    assert {"prior 2", "prior 5"} <= set(changed)
    assert not {"posterior", "head"} & set(changed)


def test_a_wrong_reconstruction_is_the_posteriors_share_and_feedback(model, before):
    """What is decoded wrongly changes what the policy sees, and nothing under the true actions."""
    last_layer(model.decoders["position"]).bias.data += 1.0
    changed = moved(before, shares(model))
    assert {"posterior", "head", "feedback"} <= set(changed)
    assert changed["posterior"] == pytest.approx(-changed["head"], abs=1e-6)  # the head pays what it paid
    assert not {"prior 2", "prior 5"} & set(changed)


def test_without_noise_sampling_has_no_share(model, before):
    model.config, model.cell.min_std = dataclasses.replace(model.config, min_std=0.0), 0.0
    with torch.no_grad():
        last = last_layer(model.cell.prior_net)
        last.weight[model.config.stochastic_dim :] = 0.0
        last.bias[model.config.stochastic_dim :] = -60.0
    assert abs(before["sampling"]) > 1e-5
    assert abs(shares(model)["sampling"]) < 1e-7


def test_short_episodes_have_nothing_beyond_the_longest_window(model):
    (explained,) = explain(model, mlp(), **SETTINGS | {"horizons": (2, 100)}).policies
    assert list(explained.late) == ["2", "12"]
    assert abs(explained.shares["beyond"]) < 1e-6


def test_dreams_that_end_too_early_err_by_what_they_lack(model):
    """Along the true actions the episode goes on; the closed loop ends where the dream does."""
    before = explain(model, mlp(), **SETTINGS).policies[0]
    assert model.heads is not None
    model.heads = copy.copy(model.heads)
    layers = torch.nn.Linear(model.config.feature_dim, 2), torch.nn.Linear(2, 1)
    model.heads.termination = torch.nn.Sequential(*layers)
    layers[1].weight.data.zero_()
    layers[1].bias.data.fill_(1.0)  # each dream ends after its first step
    after = explain(model, mlp(), **SETTINGS).policies[0]
    assert sum(after.shares.values()) == pytest.approx(after.error, abs=1e-9)
    assert after.dream * 12 == pytest.approx(after.estimates["whole episode"] * 12, abs=1e-3)
    assert 0 < after.dream < before.dream / 6
    for share in ("posterior", "head", "prior 2", "prior 5"):
        assert after.shares[share] == pytest.approx(before.shares[share], abs=1e-6)
    assert after.shares["feedback"] < before.shares["feedback"] - 0.1


def test_along_true_actions_an_end_is_paid_once(model):
    """The episode goes on there, and the model may believe for many steps that it has ended."""
    settings = {**SETTINGS, "reward": "head"}
    assert model.heads is not None
    heads = Heads(**{**model.heads.config, "terminates": True, "pays_ends": True}).eval()
    heads.load_state_dict(model.heads.state_dict(), strict=False)
    heads.reward_limits = model.heads.reward_limits
    for network, bias in ((heads.termination, 1.0), (heads.ends["swingup"], -50.0)):  # every step ends, and pays -50
        last_layer(network).weight.data.zero_()
        last_layer(network).bias.data.fill_(bias)
    before = explain(model, mlp(), **settings).policies[0]
    model.heads = heads
    after = explain(model, mlp(), **settings).policies[0]
    for link in ("paid on posterior", "true actions 2", "true actions 5"):
        assert (after.estimates[link] - before.estimates[link]) * 12 == pytest.approx(-51, abs=1)  # and not 12 times
    assert after.dream * 12 == pytest.approx(-50, abs=1e-3)


KNEELING = Path(__file__).parent / "kneeling_walker.safetensors"
"""A small copy of what SHAC had learned after 40,000 steps in dreams of walking: it kneels and kicks."""

PAY_FOR_KNEELING = "c7ee8716b3d08af8004dc836e8b950ebbfd8314c1b84554e842852c3cf2212da"
"""Digest of weights whose dreams pay it up to twice what the world does, with little doubt."""


def test_what_the_dream_pays_a_kneeling_walker_too_much_is_the_heads():
    """Its dreamt states are as the real ones: the task's formula is far below the head on them, and dreams pay it."""
    model = load_pretrained_model("walker-state")
    options = {"episodes": 4, "max_episode_steps": 300, "horizons": (20,)}
    found, paid = (
        explain(model, {"kneeling": load_plain(KNEELING)}, "walk", reward=reward, **options).policies[0]
        for reward in ("head", "task")
    )
    assert model.folder is not None
    if weights_digest(model.folder) == PAY_FOR_KNEELING:
        assert found.error > 0.2
        assert found.doubt < 5
    assert found.head_in_dream is not None
    assert found.error < 0.1 or found.head_in_dream > 0.6 * found.error
    assert abs(found.estimates["formula in the dream"] - found.real) < 0.15
    assert abs(paid.error) < min(0.15, found.error)


@pytest.mark.parametrize("setup", ["visual", "lpomdp"])
def test_policies_on_all_sensors_act_where_the_model_sees_others(setup, tmp_path):
    """The real env shows them its own sensors, and the dream those that the model decodes."""
    model = write_random_model(tmp_path / "model", setup=setup, standardise=setup != "visual")
    seeing, walk = mlp(24, 6), {"task": "walk", "max_episode_steps": 6}
    explanation = explain(model, {"seeing": seeing, "blind": rhythm(6)}, episodes=2, horizons=(2, 4), check=1, **walk)
    found = compare({"seeing": seeing}, "walker", "walk", 2, model, max_episode_steps=6).policies[0]
    for explained in explanation.policies:
        assert sum(explained.shares.values()) == pytest.approx(explained.error, abs=1e-9)
        assert abs(explained.shares["starts"]) < 5e-3  # windows show what the dream shows
    explained = explanation.policies[0]
    assert explained.error * explained.steps == pytest.approx(found.gap, abs=1e-4)
    assert abs(explained.shares["feedback"]) > 1e-6
    with Worlds("walker", "walk", model, SENSORS, 6) as worlds:
        starts = worlds.real_starts(worlds.draw_starts(2))
        envs = make_real_envs("walker", 2, task="walk", setup="mdp", max_episode_steps=6)
        real = episode_returns(seeing, envs, None, [0, 1], starts)
        envs.close()
    np.testing.assert_allclose(found.real.returns, real.returns)
    with pytest.raises(AimeGymError, match=r"image|trained for another body"):
        explain(model, {"one": mlp(7, 6)}, episodes=1, **walk)


def test_foreign_bodies_have_no_formula(tmp_path):
    model = load_pretrained_model(make_tiny_model(tmp_path / "model", "Pendulum-v1"))
    explanation = explain(model, {"one": mlp(3), "random": "random"}, episodes=2, max_episode_steps=9, horizons=(2, 4))
    assert "known to its env alone" in str(explanation)
    for explained in explanation.policies:
        assert "posterior and head" in explained.shares
        assert not {"posterior", "head"} & set(explained.shares)
        assert explained.head_in_dream is None
        assert sum(explained.shares.values()) == pytest.approx(explained.error, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": {"one": mlp(7)}}, "trained for another body"),
        ({"policies": {"one": rhythm(2)}}, "trained for another body"),
        ({"task": "walk"}, "task of this model's heads"),
        ({"episodes": 0}, "episodes"),
        ({"horizons": (5, 5)}, "ascending"),
        ({"embodiment": "walker"}, "Expected a model of walker"),
    ],
)
def test_what_does_not_fit_is_refused_before_an_episode(options, message, model, monkeypatch):
    monkeypatch.setattr(ErrorChain, "explain", None)
    settings = {"policies": "random", **SETTINGS, **options}
    with pytest.raises(AimeGymError, match=message):
        explain(model, **settings)


def test_the_command_writes_what_it_found(folder, tmp_path, capsys):
    policy = save_plain(mlp(), tmp_path / "mlp.safetensors")
    (folder / "README.md").write_text("# cartpole\n\nA card.\n")
    options = {"episodes": 2, "max_episode_steps": 12, "out": tmp_path / "out", "card": True}
    for _ in range(2):
        Explain(str(folder), (str(policy), "random"), **options).run()
    explanation = Explanation.from_json(tmp_path / "out" / RESULT)
    told = capsys.readouterr().out
    assert "prior 12" in told
    assert str(explanation) in told
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert card.startswith("# cartpole\n\nA card.\n")
    assert card.count("## Why its dreams err: swingup") == 1
    assert all(line in card for line in explanation.to_markdown().splitlines())
    (tmp_path / "out" / "other").touch()
    with pytest.raises(AimeGymError, match="something else"):
        Explain(str(folder), ("random",), **options).run()


def test_an_interrupt_keeps_what_was_explained(folder, tmp_path, monkeypatch):
    real = ErrorChain.explain

    def stop_at_second(self, name, policy):
        if name == "zero":
            raise KeyboardInterrupt
        return real(self, name, policy)

    monkeypatch.setattr(ErrorChain, "explain", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        Explain(str(folder), ("random", "zero"), episodes=2, max_episode_steps=12, out=tmp_path / "out").run()
    explanation = Explanation.from_json(tmp_path / "out" / RESULT)
    assert [policy.name for policy in explanation.policies] == ["random"]
    assert (tmp_path / "out" / PICTURE).exists()


@pytest.mark.parametrize("content", ["{}", '{"format": "aime_gym.explanation/1", "policies": {"one": {}}}'])
def test_other_files_are_no_explanation(content, tmp_path):
    (tmp_path / RESULT).write_text(content)
    with pytest.raises(AimeGymError, match="does not hold an explanation"):
        Explanation.from_json(tmp_path / RESULT)


def test_strangers_are_spread_over_families_and_stages():
    members = [
        Stranger(f"{family}-{stage}", family, family, rhythm()) for family in ("ars", "ppo") for stage in range(8)
    ] + [Stranger("td3-0", "td3", "td3", rhythm())]
    names = [member.name for member in spread(members, 6)]
    assert names == ["ars-0", "ars-4", "ars-7", "ppo-0", "ppo-7", "td3-0"]
    earning = [dataclasses.replace(member, returns=(100.0 - i,)) for i, member in enumerate(members)]
    assert {member.name for member in spread(earning, 3)} == {"ars-0", "ppo-0", "td3-0"}  # the best of each
    assert spread(members, 0) == members == spread(members, 99)


def test_a_card_has_one_section_a_task(model):
    explanation = explain(model, "random", **SETTINGS)
    once = with_section("# Card\n", explanation, "first command")
    again = with_section(once, explanation, "second command")
    assert "second command" in again
    assert "first command" not in again
    assert again.count("Why its dreams err") == 1


def test_plain_files_can_be_compared(model, tmp_path):
    path = save_plain(mlp(), tmp_path / "mlp.safetensors")
    assert aime_gym.compare(path, "cartpole", "swingup", 1, model, max_episode_steps=5).policies[0].real.lengths == [5]
