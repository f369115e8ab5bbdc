"""Functions of tensors as NumPy code: the same numbers as torch's, or none at all."""

import gymnasium
import numpy as np
import pytest
import torch

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.world_model.array_code import MOST_ON_ONE_THREAD, as_arrays
from aime_gym.world_model.fast_dynamics import FastDynamics
from aime_gym.world_model.formulas import _FORMULAS, TaskFormula, _lack
from tests.random_models import CELLS, random_model, write_random_model

FORMULAS = [
    (body, task) for body in _FORMULAS for task in get_embodiment(body).tasks if not _lack(get_embodiment(body), task)
]


def assert_same(function, draw, tolerance=1e-5):
    """The translation exists, and gives on other inputs what torch gives."""
    translated = as_arrays(function, draw())
    assert translated is not None
    for _ in range(3):
        inputs = draw()
        with torch.no_grad():
            expected = function(*inputs)
        before = [tensor.clone() for tensor in inputs]
        for mine, theirs in zip(translated(*(tensor.numpy() for tensor in inputs)), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), theirs, rtol=tolerance, atol=tolerance)
        for tensor, old in zip(inputs, before, strict=True):
            assert torch.equal(tensor, old)


@pytest.mark.parametrize("doubt", [False, True, "ensemble"])
@pytest.mark.parametrize(("cell", "options"), CELLS)
def test_steps_of_one_slot(cell, options, doubt):
    model = random_model(cell, **options)
    fast = FastDynamics(model, [*model.observed], "run", doubt=doubt)
    generator = torch.Generator().manual_seed(0)

    def draw():
        sizes = model.config.feature_dim, model.config.action_dim, model.config.stochastic_dim
        return [torch.randn(1, size, generator=generator) for size in sizes]

    assert_same(fast.compute, draw, 1e-4 if doubt else 1e-5)
    assert_same(fast.compute, lambda: draw()[:2], 1e-4 if doubt else 1e-5)


@pytest.mark.parametrize(("body", "task"), FORMULAS)
def test_every_formula(body, task):
    formula, sensors = TaskFormula(body, task), get_embodiment(body).sensors
    generator = torch.Generator().manual_seed(0)

    def paid(*rows):
        names = [sensor.name for sensor in sensors]
        before, after = (dict(zip(names, some, strict=True)) for some in (rows[: len(names)], rows[len(names) : -1]))
        return (formula(before, after, rows[-1]),)

    def draw():
        dims = [*[sensor.dim for sensor in sensors] * 2, get_embodiment(body).action_dim]
        return [2 * torch.rand(1, dim, generator=generator) for dim in dims]

    assert_same(paid, draw)


def test_large_products_take_one_thread():
    weight = torch.randn(700, 700) / 700**0.5
    assert weight.numel() > MOST_ON_ONE_THREAD
    assert_same(lambda x: (torch.nn.functional.linear(x, weight, weight[0]),), lambda: [torch.randn(1, 700)])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (torch.special.ndtr(x),),  # is not known
        lambda x: (x + x.sum().item(),),  # looks at a number
        lambda x: (torch.zeros(1, 3).copy_(x),),  # writes into a constant
        lambda x: (x, torch.ones(1)),  # gives a constant
    ],
)
def test_what_cannot_be_translated_is_not(function):
    assert as_arrays(function, [torch.ones(1, 3)]) is None


def test_single_dreams_of_one_model_share_their_weights_and_pay_as_many_slots_do(tmp_path):
    write_random_model(tmp_path)
    make = {"model": tmp_path, "task": "walk", "doubt": True}
    alone = [gymnasium.make("AimeDream-Walker-v0", **make) for _ in range(2)]
    many = gymnasium.make_vec("AimeDream-Walker-v0", num_envs=2, **make)
    for slot, env in enumerate(alone):
        env.reset(seed=slot)
    many.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(5):
        actions = rng.uniform(-1, 1, (2, 6)).astype(np.float32)
        observations, rewards, *_, infos = many.step(actions)
        for slot, env in enumerate(alone):
            observation, reward, terminated, truncated, info = env.step(actions[slot])
            np.testing.assert_allclose(observation, observations[slot], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(reward, rewards[slot], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(info["doubt"], infos["doubt"][slot], rtol=1e-3, atol=1e-4)
            assert info["start_index"] == infos["start_index"][slot]
            assert not terminated
            assert not truncated
    steps = {id(env.unwrapped._dream.tensor_dream._outcomes._array_step) for env in alone}
    assert len(steps) == 1
    assert steps != {id(None)}
