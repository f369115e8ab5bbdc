"""Where agents and dreams compute: every tensor is made on the device that was asked for, which needs no GPU to see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import aime_gym
from aime_gym.agents.plain import make_agent, observation_statistics
from aime_gym.commands.dream import Dream
from aime_gym.envs.dream_checks import place
from aime_gym.envs.start_bank import SlotNoise
from aime_gym.errors import AimeGymError
from tests.random_data import record_random
from tests.random_models import random_model, write_random_model

FACTORIES = (torch.zeros, torch.ones, torch.full, torch.empty, torch.randn, torch.rand)


class Nowhere(TorchFunctionMode):
    """Refuses to make a tensor without a word of its device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in FACTORIES or kwargs.get("device") is not None, f"{func.__name__} without a device"
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return record_random(tmp_path_factory.mktemp("data"), episodes=4, steps=40)


@pytest.mark.parametrize("name", ["AIME", "BC", "BCO", "IIDM"])
def test_imitators_compute_where_they_are_told(name, data):
    options = {"body_data": data, "body_updates": 1} if name in ("BCO", "IIDM") else {}
    agent = getattr(aime_gym, name)(random_model(), data, batch_size=2, horizon=8, device="cpu", **options)
    assert agent.device == torch.device("cpu")
    agent.learn(1)
    batch = agent._batches(agent.demonstrations, 2, (0,)).sample()
    with Nowhere():
        agent._loss(agent.module, batch)
        action, state = agent.predict(np.zeros((3, 24), np.float32), deterministic=False)
        agent.predict(np.zeros((3, 24), np.float32), state, np.array([True, False, False]), deterministic=False)
    assert action.shape == (3, 6)


def test_a_device_that_is_not_there_is_refused_before_anything_is_read():
    with pytest.raises(AimeGymError, match="'cpu' always can"):
        aime_gym.AIME("no-such-model", "no-such-demonstrations", device="no-such-device")


def test_a_model_on_another_card_is_copied():
    class Model:
        def __init__(self):
            self.cell = SimpleNamespace(initial_state=SimpleNamespace(device=torch.device("cuda:1")))

        def to(self, device):
            self.cell.initial_state.device = device
            return self

    model = Model()
    assert place(model, torch.device("cuda:1")) is model
    placed = place(model, torch.device("cuda:0"))
    assert placed.cell.initial_state.device == torch.device("cuda:0")
    assert model.cell.initial_state.device == torch.device("cuda:1")


def test_dreams_and_agents_of_the_command_compute_where_they_are_told(tmp_path):
    write_random_model(tmp_path / "model")
    job = Dream(model=str(tmp_path / "model"), device="no-such-device", out=tmp_path / "out")
    with pytest.raises(AimeGymError, match="'cpu' always can"):
        job.run()
    assert not (tmp_path / "out").exists()
    envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", 2, model=tmp_path / "model", device="cpu")
    assert make_agent("ppo", envs, observation_statistics(envs), 0, "cpu:0").device == torch.device("cpu:0")


class Looks(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: numbers that are looked at, and shapes that depend on them."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal.default", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(part in str(func) for part in self.WAITS) and "nan_to_num" not in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"reward": "head", "obs_type": "latent"},
    {"doubt": True, "doubt_penalty": 0.1, "max_doubt": 5.0},
    {"doubt": "ensemble", "reward": "disagreement"},
    {"model": "reacher-state", "embodiment": "reacher", "task": "easy"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_on_a_gpu_looks_at_no_number(options):
    """A look makes the host wait, and a CUDA graph cannot hold it; a slot that is lost is put back all the same."""
    options = {"model": "walker-state", "num_envs": 4, "precision": "32-true", **options}
    dream = aime_gym.TensorDream(**options)
    state = dream.reset(0)
    actions = torch.zeros(4, dream.model.config.action_dim, requires_grad=True)  # nothing is traced, as on a GPU
    expected = dream.advance(state, actions)
    with Looks() as careful:
        dream.advance(state, actions)
    assert careful.seen  # as on a CPU, where a look costs nothing
    dream._asynchronous, dream._noise = True, SlotNoise(dream.model.config.stochastic_dim, ahead=False)
    with Looks() as looks:
        came = dream.advance(state, actions)
    assert looks.seen == []
    for one, other in zip(came.state, expected.state, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(came.rewards, expected.rewards)

    came = dream.advance(state._replace(latents=state.latents.index_fill(0, torch.tensor([1]), 3e38)), actions)
    assert came.diverged is not None
    assert came.diverged.nonzero().flatten().tolist() == [1]
    assert came.truncations[1]
    assert came.rewards[1] == 0
    assert came.state.observations[0].isfinite().all()
    assert torch.equal(came.state.latents[0], expected.state.latents[0])
