"""Work whose speed is measured, and the process that does it as often as it is told.

`benchmarks.side_by_side` starts this file with a checkout of this repository as ``PYTHONPATH``, the present one or an
older one: what is used here is what both have. A line on standard input says how often to do the work, and is answered
by the seconds.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

import aime_gym
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.model import WorldModel

Work = Callable[[], object]
ID = "AimeDream-Walker-v0"


def by_hand(model: str, task: str, slots: int) -> Work:
    """One step of the loop that anyone would write, in eager float32."""
    loaded = load_pretrained_model(place(model))
    state = loaded.initial_state(slots)
    generator = torch.Generator().manual_seed(0)
    actions = random_actions(slots, loaded.config.action_dim)

    @torch.no_grad()
    def step() -> object:
        nonlocal state
        noise = torch.randn(slots, loaded.config.stochastic_dim, generator=generator)
        state = loaded.prior_step(state, torch.from_numpy(actions), noise)
        decoded = {name: decoder(state) for name, decoder in loaded.decoders.items()}
        stds = {name: normal.std.expand_as(normal.mean).numpy() for name, normal in decoded.items()}
        means = {
            name: (loaded.normaliser[name].inverse(normal.mean) if name in loaded.normaliser else normal.mean)  # type: ignore[operator]
            for name, normal in decoded.items()
        }
        observation = torch.cat(list(means.values()), 1).numpy()
        assert loaded.heads is not None
        return observation, stds, loaded.heads.reward(state, task).numpy()

    return step


def dream(model: str, task: str, slots: int, **options: Any) -> Work:
    """One step of dreams: of one through `gymnasium.make`, of more through `gymnasium.make_vec`."""
    loaded = load_pretrained_model(place(model))
    if slots == 1:
        return _single(loaded, task=task, **options)
    envs = gymnasium.make_vec(ID, num_envs=slots, model=loaded, task=task, **options)
    actions = random_actions(slots, loaded.config.action_dim)
    envs.reset(seed=0)
    return lambda: envs.step(actions)


def singles(model: str, task: str, count: int, **options: Any) -> Work:
    """One step of each of so many dreams that are envs of their own, each with the model by its folder."""
    steps = [_single(place(model), task=task, **options) for _ in range(count)]
    return lambda: [step() for step in steps]


def shac(model: str, task: str, slots: int, steps: int, windows: int, **options: Any) -> Work:
    """So many windows of so many steps that SHAC learns from, in dreams of 32 steps."""
    loaded = load_pretrained_model(place(model))
    envs = aime_gym.make_sb3_env(ID, n_envs=slots, seed=0, task=task, model=loaded, max_episode_steps=32, **options)
    agent = aime_gym.SHAC("MlpPolicy", envs, seed=0, n_steps=steps)
    agent.learn(slots * steps)
    return lambda: agent.learn(windows * slots * steps, reset_num_timesteps=False)


def update(model: str, horizon: int, batch_size: int, bf16: bool = False) -> Work:
    """One update of phase 1 of a model of that architecture, with new weights."""
    config = load_pretrained_model(place(model)).config
    torch.manual_seed(0)
    trained = WorldModel(config)
    generator = torch.Generator().manual_seed(0)
    batch = {s.name: torch.randn(horizon, batch_size, s.dim, generator=generator) for s in config.sensors}
    batch["pre_action"] = torch.rand(horizon, batch_size, config.action_dim, generator=generator) * 2 - 1
    loss = lambda: trained.loss(batch, generator=generator)[0]  # noqa: E731
    return _learning(loss, list(trained.parameters()), bf16)


def aime(model: str, demonstrations: str, horizon: int, batch_size: int, bf16: bool = False) -> Work:
    """One update of AIME's policy on one batch of demonstrations."""
    imitator = aime_gym.AIME(place(model), demonstrations, batch_size=batch_size, horizon=horizon, seed=0)
    assert imitator.demonstrations is not None
    batch = imitator._batches(imitator.demonstrations, batch_size, (0, 0)).sample()
    loss = lambda: imitator._loss(imitator.module, batch)[0]  # noqa: E731
    return _learning(loss, list(imitator.module.parameters()), bf16)


def heads(model: str, data: str, tasks: list[str], updates: int) -> Work:
    """Fitting heads to a folder of episodes with so many updates."""
    from aime_gym.training import fit_heads

    loaded = load_pretrained_model(place(model))
    dataset = _dataset(data)
    labelled = fit_heads.with_rewards(dataset, _body(loaded), tasks)
    options = fit_heads.HeadsOptions(tasks=tuple(tasks), updates=updates)
    return lambda: fit_heads.fit_heads(loaded, labelled, options, callbacks=())


def compare(model: str, task: str, episodes: int, steps: int) -> Work:
    """`aime_gym.compare` of an agent of SHAC that has learned nothing."""
    loaded = load_pretrained_model(place(model))
    envs = aime_gym.make_sb3_env(ID, n_envs=1, task=task, model=loaded)
    agent = aime_gym.SHAC("MlpPolicy", envs, seed=0)
    return lambda: aime_gym.compare(agent, "Walker", task, episodes, model=loaded, max_episode_steps=steps)


def _single(model: Any, **options: Any) -> Work:
    env = gymnasium.make(ID, model=model, **options)
    action = np.random.default_rng(0).uniform(-1, 1, env.action_space.shape).astype(np.float32)
    env.reset(seed=0)

    def step() -> object:
        result = env.step(action)
        if result[2] or result[3]:
            env.reset()
        return result

    return step


def _learning(loss: Callable[[], Any], parameters: list[torch.nn.Parameter], bf16: bool) -> Work:
    """One gradient step: loss, backward, clipping and Adam."""
    trainer = importlib.import_module("aime_gym.training.trainer")
    optimizer = getattr(trainer, "adam", torch.optim.Adam)(parameters, lr=3e-4)  # as the checkout trains

    def learn() -> float:
        precision: AbstractContextManager = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with precision:
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 100.0)
        optimizer.step()
        return value.item()

    return learn


def place(model: str) -> Any:
    """A folder as a path, where there is one, else a bundled name."""
    return Path(model) if Path(model).is_dir() else model


def random_actions(slots: int, dim: int) -> np.ndarray:
    """Uniform, [N, A]."""
    return np.random.default_rng(0).uniform(-1, 1, (slots, dim)).astype(np.float32)


def _body(model: WorldModel) -> Any:
    return _either("aime_gym.bodies.lookup", "aime_gym.embodiments").get_embodiment(model.config.embodiment)


def _dataset(folder: str) -> Any:
    return _either("aime_gym.data.dataset", "aime_gym.data.trajectories").TrajectoryDataset(Path(folder))


def _either(present: str, older: str) -> Any:
    """A module by its present name, or by that of older checkouts: one that is installed as well is no part of them."""
    place = Path(aime_gym.__file__).parent.joinpath(*present.split(".")[1:])
    return importlib.import_module(present if place.with_suffix(".py").exists() else older)


WORK = {function.__name__: function for function in (by_hand, dream, singles, shac, update, aime, heads, compare)}


def find(name: str) -> Callable[..., Work]:
    """What makes some work, by its name here, or as ``module:function``."""
    module, _, function = name.rpartition(":")
    return getattr(importlib.import_module(module), function) if module else WORK[name]


def serve(name: str, threads: int, options: dict[str, Any]) -> None:
    """Does what each line asks for; on one thread the seconds are those of the CPU, so that others hardly matter."""
    torch.set_num_threads(threads)
    work = find(name)(**options)
    clock = time.process_time if threads == 1 else time.perf_counter
    work()
    print("ready", file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        start = clock()
        for _ in range(int(line)):
            work()
        print(clock() - start, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    sys.stdout = sys.stderr
    serve(**asked)
