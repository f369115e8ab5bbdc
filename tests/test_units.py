"""What a model is worth does not depend on the units of what it sees, nor on how its numbers are stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from aime_gym.agents.plain import sensor_statistics
from aime_gym.bodies.body import Sensor, foreign_body
from aime_gym.bodies.sensors import scale, varies
from aime_gym.data.dataset import TrajectoryDataset, WindowSampler
from aime_gym.data.trajectories import load_trajectory, save_trajectory
from aime_gym.errors import AimeGymError
from aime_gym.observations import to_tensors
from aime_gym.training.fit_heads import HeadsOptions, fit_heads, score_heads, with_rewards
from aime_gym.training.model_folder import make_starts, prediction_error
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.layers import Standardiser
from aime_gym.world_model.model import WorldModel

BODY = foreign_body("Springs-v0", (Sensor("springs", 3), Sensor("offset", 2)), 1, 60)


def springs(episodes: int = 24, rows: int = 60, unit: float = 1.0, reward_unit: float = 1.0) -> TrajectoryDataset:
    """Three masses on springs that an action pushes, one constant, and the first mass once more, far off zero."""
    rng = np.random.default_rng(0)
    trajectories = []
    for _ in range(episodes):
        actions = rng.uniform(-1, 1, (rows, 1))
        actions[0] = 0
        place, speed = rng.normal(size=3), np.zeros(3)
        seen = []
        for action in actions:
            speed = 0.95 * speed + 0.2 * (action - place * [0.2, 0.5, 1.0])
            place = place + speed
            seen.append(place)
        places = np.stack(seen)
        trajectories.append(
            {
                "springs": (unit * places).astype(np.float32),
                "offset": (unit * np.stack([np.full(rows, 7.3), 20 + places[:, 0]], 1)).astype(np.float32),
                "pre_action": actions.astype(np.float32),
                "reward": (reward_unit * (1 - np.abs(places[:, :1]))).astype(np.float32),
                "is_terminal": np.zeros(rows, bool),
            }
        )
    return TrajectoryDataset(trajectories)


def tiny_config() -> ModelConfig:
    net = NetConfig("dmlp", 32, 1, "swish", "ln")
    return ModelConfig.for_embodiment(
        BODY,
        "mdp",
        "rssmo",
        **{"memory_dim": 32, "stochastic_dim": 8, "hidden_size": 32, "norm": "ln", "standardise": True},
        **{"encoders": {"tabular": NetConfig("mlp", 32, 1, "swish", "ln", have_head=False)}},
        **{"decoders": {"tabular": net}, "probes": {}, "episode_steps": 60, "idm_mode": "none"},
    )


def learned(dataset: TrajectoryDataset, updates: int = 40) -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(tiny_config())
    mean, std = dataset.statistics(["springs", "offset"])
    model.set_standardisation(to_tensors(mean), to_tensors(std))
    batches = WindowSampler(dataset, 16, 20, (0,), ["springs", "offset", "pre_action"])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        model.loss(batches.sample())[0].backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def worth() -> dict[str, float]:
    """The errors of the model in units of 1."""
    return prediction_error(learned(springs()), springs(8), windows=50)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_the_error_is_the_same_in_all_units(unit, worth):
    assert worth["nmse_1"] < 0.3  # it has learned something
    scores = prediction_error(learned(springs(unit=unit)), springs(8, unit=unit), windows=50)
    assert set(scores) == set(worth)
    for name, score in scores.items():
        assert score == pytest.approx(worth[name], rel=0.05), name


def test_rewards_are_learned_in_all_units():
    model, scores = learned(springs(), 5), []
    options = HeadsOptions(updates=10, batch_size=4, hidden_size=16, ensemble_hidden_size=8, ensemble=2, lr=1e-2)
    for unit in (1.0, 1e-8, 1e4):
        dataset = with_rewards(springs(reward_unit=unit), BODY, ("own",))
        heads = fit_heads(model, dataset, options, callbacks=[])
        assert heads.reward_limits[1] == pytest.approx(unit, rel=0.01)
        scores.append(score_heads(model, heads, dataset, windows=5))
    assert scores[0]["reward_own"] < 0.95  # so that these are not all perfect
    for score in scores[1:]:
        assert score == pytest.approx(scores[0], rel=0.05)


def test_constants_are_told_from_what_is_small():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1000)
    columns = {
        "small": (1e-6 * noise, True),
        "far off": (1000 + 0.1 * noise, True),
        "large": (1e4 * noise, True),
        "zero": (0 * noise, False),
        "one number": (0 * noise + 0.1, False),
        "rounding of one number": (0.1 * (1 + 1e-7 * noise), False),
        "rounding of zero": (1e-14 * noise, False),
    }
    values = np.stack([column for column, _ in columns.values()], 1).astype(np.float32).astype(np.float64)
    expected = [varying for _, varying in columns.values()]
    for unit in (1.0, 1e-4, 1e4):
        mean, std = unit * values.mean(0), unit * values.std(0)
        np.testing.assert_array_equal(varies(mean, std), expected)
        np.testing.assert_array_equal(varies(torch.as_tensor(mean), torch.as_tensor(std)).numpy(), expected)
        divisor = scale(mean, std)
        np.testing.assert_array_equal(divisor[expected], std[expected])
        np.testing.assert_allclose(divisor[~np.array(expected)], 1e4 * unit, rtol=0.2)
    assert scale(np.zeros(2), np.zeros(2)).tolist() == [1, 1]


def test_what_is_constant_stays_where_it_is():
    standardiser = Standardiser(2)
    standardiser.set(torch.tensor([0.0, 5e-5]), torch.tensor([1e-5, 0.0]))
    frames = torch.tensor([[1e-5, 5e-5], [-2e-5, 5e-5]])
    torch.testing.assert_close(standardiser(frames), torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    torch.testing.assert_close(standardiser.inverse(standardiser(frames)), frames)


@pytest.mark.parametrize("standardise", [True, False])
def test_agents_see_observations_of_size_one_in_all_units(standardise, tmp_path):
    for unit in (1.0, 1e-4, 1e4):
        dataset = springs(8, unit=unit)
        model = WorldModel(replace(tiny_config(), standardise=standardise))
        if standardise:
            model.set_standardisation(*map(to_tensors, dataset.statistics(["springs", "offset"])))
        else:
            model.folder = tmp_path
            starts = make_starts(dataset, model.observed, 8, 100)
            np.savez(tmp_path / "starts.npz", **starts)  # type: ignore[arg-type]
        moments = sensor_statistics(model)
        for name, (mean, std) in moments.items():
            seen = (dataset.arrays[name] - mean) / std
            np.testing.assert_allclose(seen.std(0), [1, 1, 1] if name == "springs" else [0, 1], atol=0.4)


NUMBERS = ("i1", "i8", "u1", "u2", "f2", "f8", "?")


@pytest.mark.parametrize("kind", NUMBERS)
def test_sensors_of_any_number_kind_are_those_of_float32(kind, tmp_path):
    """Data, starts and a step of training, of files whose sensor, actions and rewards are of that kind."""
    results = []
    for own in ("f4", kind):
        for i in range(4):
            trajectory = springs(4)[i]
            whole = np.clip(np.round(3 * trajectory["springs"]), 0, 1 if kind == "?" else 100)
            actions = np.clip(np.round(trajectory["pre_action"]), 0, 1)
            changed = {"springs": whole.astype(own), "pre_action": actions.astype(own), "reward": actions.astype(own)}
            save_trajectory(tmp_path / own, i, {**trajectory, **changed})
        assert load_trajectory(tmp_path / own / "0.npz")["springs"].dtype == own
        dataset = TrajectoryDataset(tmp_path / own)
        model = learned(dataset, 3)
        film = to_tensors({"springs": load_trajectory(tmp_path / own / "0.npz")["springs"]})["springs"]
        starts = make_starts(dataset, model.observed, 4, 10)
        heads = fit_heads(
            model, with_rewards(dataset, BODY, ("own",)), HeadsOptions(updates=1, batch_size=2), callbacks=[]
        )
        assert all(starts[name].dtype == np.float32 for name in (*model.observed, "pre_action"))
        scores = prediction_error(model, dataset, windows=5)
        results.append((dataset.arrays, starts, scores, heads.state_dict(), film))
    (arrays, starts, scores, heads, film), (others, same_starts, same_scores, same_heads, same_film) = results
    for ours, theirs in ((arrays, others), (starts, same_starts)):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
    assert scores == same_scores
    assert all(torch.equal(weight, same_heads[name]) for name, weight in heads.items())
    assert torch.equal(film, same_film)


def test_numbers_too_large_for_float32_are_refused(tmp_path):
    trajectory = springs(1)[0]
    save_trajectory(tmp_path, 0, {**trajectory, "springs": trajectory["springs"].astype(np.float64) * 1e300})
    with pytest.raises(AimeGymError, match=r"0\.npz: 'springs' has a value that is too large for float32"):
        TrajectoryDataset(tmp_path)
