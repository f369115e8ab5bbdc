"""The heads on frozen features: shapes, the physics code, the ensemble, and fitting them to the truth."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from aime_gym.bodies.body import EMBODIMENTS
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.errors import AimeGymError
from aime_gym.training import fit_heads
from aime_gym.training.fit_heads import _physics_layout, check_tasks, with_rewards
from aime_gym.training.model_folder import make_starts
from aime_gym.world_model.heads import Heads, PhysicsCode
from tests import quick_relabel


def make_heads(**changes):
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"feature_dim": 12, "action_dim": 6, "tasks": ("walk", "run"), "embodiment": "walker"}
    arguments |= {"target_dim": 24, "nq": 9, "nv": 9, "hidden_size": 16, "ensemble_hidden_size": 16, "ensemble": 3}
    return Heads(**(arguments | changes))


def test_heads_are_rebuilt_from_their_config_and_state():
    heads = make_heads()
    heads.standardise_by(torch.rand(50, 2), torch.randn(50, 24), torch.randn(50, heads.code.dim))
    twin = Heads(**heads.config)
    twin.load_state_dict(heads.state_dict())
    features, actions = torch.randn(4, 5, 12), torch.randn(4, 5, 6)
    assert torch.equal(twin.reward(features, "run"), heads.reward(features, "run"))
    assert torch.equal(twin.disagreement(features, actions), heads.disagreement(features, actions))
    assert torch.equal(twin.physics(features), heads.physics(features))


def test_heads_that_have_learned_say_the_same_in_new_scales():
    heads = make_heads().double()
    heads.standardise_by(torch.rand(50, 2), torch.randn(50, 24), torch.randn(50, heads.code.dim))
    features, actions = torch.randn(5, 12).double(), torch.randn(5, 6).double()

    def told():
        members = heads.ensemble(torch.cat([features, actions], -1)) * heads.target_std + heads.target_mean
        raw = [heads.rewards[task](features)[:, 0] * heads.reward_std[i] for i, task in enumerate(heads.tasks)]
        return [raw[0] + heads.reward_mean[0], raw[1] + heads.reward_mean[1], heads.physics(features), members]

    before, scale = told(), heads.reward_std.clone()
    data = 3 * torch.randn(50, 2) + 1, 5 * torch.randn(50, 24), torch.randn(50, heads.code.dim) - 2
    heads.standardise_by(*data, keep_outputs=True)
    assert (heads.reward_std > 5 * scale).all()
    for old, new in zip(before, told(), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_leading_shapes_are_kept(batch):
    heads = make_heads()
    features, actions = torch.randn(*batch, 12), torch.randn(*batch, 6)
    assert heads.reward(features, "walk").shape == batch
    assert heads.disagreement(features, actions).shape == batch
    assert heads.physics(features).shape == (*batch, 18)


def test_the_ensemble_in_one_product_equals_its_members_one_by_one():
    heads = make_heads()
    features, actions = torch.randn(7, 12), torch.randn(7, 6)
    inputs = torch.cat([features, actions], -1)
    outputs = []
    for k in range(3):
        hidden = inputs
        for i, (weight, bias) in enumerate(zip(heads.ensemble.weights, heads.ensemble.biases, strict=True)):
            hidden = hidden @ weight[k] + bias[k]
            if i < 2:
                hidden = torch.nn.functional.silu(torch.nn.functional.layer_norm(hidden, (16,)))
        outputs.append(hidden)
    spread = torch.stack(outputs).std(0, correction=0).mean(-1)
    torch.testing.assert_close(heads.disagreement(features, actions), spread)


def test_rewards_are_in_their_units_and_range():
    heads = make_heads()
    heads.reward_mean.copy_(torch.tensor([0.5, 1.5]))
    heads.reward_std.copy_(torch.tensor([0.1, 9.0]))
    features = torch.randn(200, 12)
    raw = heads.rewards["walk"](features)[:, 0] * 0.1 + 0.5
    torch.testing.assert_close(heads.reward(features, "walk"), raw)
    run = heads.reward(features, "run")
    assert run.min() == 0.0
    assert run.max() == 2.0  # the action repeat
    with pytest.raises(AimeGymError, match=r"'rum'.*'run'"):
        heads.reward(features, "rum")


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_physics_survives_its_code(name):
    """All but unseen translations come back; rotations modulo a full turn; quaternions normalised."""
    body = get_embodiment(name)
    nq, nv, quaternions = _physics_layout(body)
    code = PhysicsCode(nq, nv, body.rotations, tuple(body.translations), quaternions)
    physics = torch.randn(5, nq + nv, dtype=torch.float64) * 4
    for begin in quaternions:
        physics[:, begin : begin + 4] /= physics[:, begin : begin + 4].norm(dim=-1, keepdim=True)
    decoded = code.decode(code.encode(torch.cat([physics, torch.ones(5, 2)], -1)))  # activations are left out
    expected = physics.clone()
    expected[:, list(body.translations)] = 0
    difference = decoded - expected
    difference[:, list(body.rotations)] = torch.sin(difference[:, list(body.rotations)] / 2)
    torch.testing.assert_close(difference, torch.zeros_like(difference))
    scaled = code.decode(3 * code.encode(physics))
    for begin in quaternions:
        torch.testing.assert_close(scaled[:, begin : begin + 4], expected[:, begin : begin + 4])
    assert (len(quaternions) > 0) == (name in {"humanoid", "quadruped"})


def test_the_default_tasks_are_those_that_follow_from_the_state():
    assert check_tasks(get_embodiment("walker"), ()) == ("walk", "stand", "run")
    assert check_tasks(get_embodiment("finger"), ()) == ("spin",)
    assert check_tasks(get_embodiment("walker"), ("flip",)) == ("flip",)
    assert check_tasks(get_embodiment("reacher"), ()) == ("easy", "hard")
    with pytest.raises(AimeGymError, match="target"):
        check_tasks(get_embodiment("finger"), ("turn_easy",))


@pytest.mark.parametrize(("body", "lacking"), [("walker", "physics"), ("Pendulum-v1", "reward and is_terminal")])
def test_data_that_heads_cannot_be_fitted_to_are_refused(body, lacking):
    dataset = TrajectoryDataset([{"pre_action": np.zeros((5, 1), np.float32)}])
    with pytest.raises(
        AimeGymError, match=rf"Heads of {body} need {lacking}, which these data lack\. `aime-gym collect`"
    ):
        with_rewards(dataset, get_embodiment(body), ("walk",))


def test_rewards_are_computed_in_processes_that_do_not_run_the_users_script(monkeypatch, tmp_path):
    script = tmp_path / "script.py"  # one without `if __name__ == "__main__"`
    script.write_text("raise SystemExit('It runs again.')")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(fit_heads, "_relabel", quick_relabel.relabel)
    monkeypatch.setattr(fit_heads, "available_cores", lambda: 2)
    trajectory = {"pre_action": np.random.default_rng(0).random((101, 6), np.float32), "physics": np.zeros((101, 18))}
    labelled = with_rewards(TrajectoryDataset([trajectory] * 16), get_embodiment("walker"), ("walk",))
    np.testing.assert_array_equal(labelled.arrays["reward of walk"][:101], trajectory["pre_action"][:, :1])
    assert sys.modules["__main__"] is main


def test_starts_hold_first_frames_then_any_frames():
    episodes = []
    for episode in range(4):
        steps = np.arange(20.0) + 100 * episode
        episodes.append(
            {
                "position": steps[:, None].astype(np.float32),
                "pre_action": steps[:, None].astype(np.float32),
                "physics": np.stack([steps, -steps], 1),
            }
        )
    dataset = TrajectoryDataset(episodes)
    starts = make_starts(dataset, ["position"], n_reset=3, n_dataset=5, frames=10, seed=1)
    assert starts["position"].shape == starts["pre_action"].shape == (10, 8, 1)
    assert starts["position"].dtype == np.float32
    assert starts["physics"].dtype == np.float64
    np.testing.assert_array_equal(starts["is_reset"], [True] * 3 + [False] * 5)
    first = starts["position"][0, :3, 0]
    assert len(set(first)) == 3
    assert set(first) <= {0.0, 100.0, 200.0, 300.0}
    np.testing.assert_array_equal(np.diff(starts["position"], axis=0), 1)
    np.testing.assert_array_equal(starts["physics"][:, 0], starts["position"][-1, :, 0])
    again = make_starts(dataset, ["position"], n_reset=3, n_dataset=5, frames=10, seed=1)
    np.testing.assert_array_equal(again["position"], starts["position"])
    assert make_starts(dataset, ["position"], n_reset=99, n_dataset=1)["is_reset"].sum() == 4
