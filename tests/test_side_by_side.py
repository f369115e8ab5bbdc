"""Objects of every kind in one process, made, stepped and closed in any order: each is as if it were alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import aime_gym
from aime_gym.agents.aime import AIME
from aime_gym.agents.shac import SHAC
from aime_gym.envs.dream import rollout
from aime_gym.envs.wrappers import Evidence, LatentObservation
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.fast_dynamics import BIG_BATCH
from tests.random_data import record_random
from tests.random_models import write_random_model

STEPS = 4


class Stepped:
    """An env, of one slot or many, under actions of its own."""

    def __init__(self, env: Any):
        self.env, self.rng = env, np.random.default_rng(5)
        self.shape = env.action_space.shape

    def begin(self) -> Any:
        return self.env.reset(seed=3)

    def step(self) -> Any:
        shown = self.env.step(self.rng.uniform(-1, 1, self.shape).astype(np.float32))
        return (*shown, self.env.render()) if self.env.render_mode else shown

    def close(self) -> None:
        self.env.close()


class OfSB3(Stepped):
    """An env of SB3's kind."""

    def __init__(self, env: Any):
        super().__init__(env)
        self.shape = (env.num_envs, *env.action_space.shape)

    def begin(self) -> Any:
        return self.env.reset()

    def step(self) -> Any:
        observations, rewards, dones, _ = self.env.step(self.rng.uniform(-1, 1, self.shape).astype(np.float32))
        return observations, rewards, dones


class Differentiated(Stepped):
    """Windows of a dream, and the gradient of their rewards by a policy."""

    def step(self) -> Any:
        weight = torch.full((sum(sensor.dim for sensor in self.env.sensors), 6), 0.01, requires_grad=True)
        window = rollout(self.env, lambda seen: torch.tanh(seen @ weight), 2)
        with torch.autocast("cpu", enabled=False):  # the caller's own backward pass is the caller's
            window.rewards.sum().backward()
        return window.observations.detach().numpy(), window.rewards.detach().numpy(), weight.grad.numpy()


class Acting(Stepped):
    """An agent that acts in a dream and, if it learns, does so between its steps."""

    def __init__(self, env: Any, agent: Any, learns: bool = False):
        super().__init__(env)
        self.agent, self.learns, self.memory = agent, learns, None

    def begin(self) -> Any:
        self.observations, _ = self.env.reset(seed=3)
        return self.observations

    def step(self) -> Any:
        if self.learns:
            self.agent.learn(self.agent.n_steps * self.agent.n_envs)
        actions, self.memory = self.agent.predict(self.observations, self.memory, deterministic=True)
        self.observations, *shown = self.env.step(actions)
        return actions, self.observations, shown


def kinds(folder: Path, pictures: bool) -> Mapping[str, Callable[[], Stepped]]:
    """What can be made in a process.

    Args:
        folder: Holds the models "a", "b", "other" and "pixels", and the agents "aime" and "shac.zip".
        pictures: Whether GL works.
    """

    def real(body: str = "Walker", wrap: Callable[[Any], Any] = lambda env: env, **options: Any) -> Stepped:
        return Stepped(wrap(gym.make(f"AimeReal-{body}-v0", **options)))

    def dreams(model: str = "a", num_envs: int = 2, **options: Any) -> Any:
        return gym.make_vec("AimeDream-v0", model=models[model], num_envs=num_envs, **options)

    def shac(learns: bool) -> Stepped:
        envs = aime_gym.make_sb3_env("AimeDream-v0", n_envs=2, seed=0, model=a)
        return Acting(dreams(), SHAC.load(folder / "shac.zip", env=envs), learns)

    models = {name: load_pretrained_model(folder / name) for name in ("a", "b", "other", "pixels")}
    a = models["a"]  # whose weights all objects of it share
    found = {
        "real": real,
        "real, of another body": lambda: real("Cheetah"),
        "real, of another task": lambda: real(task="run"),
        "real, without velocities": lambda: real(setup="lpomdp", obs_type="dict"),
        "real, foreign": lambda: Stepped(gym.make("AimeReal-v0", embodiment="Pendulum-v1")),
        "estimate": lambda: real(wrap=lambda env: LatentObservation(env, a)),
        "estimate, sampled": lambda: real(wrap=lambda env: LatentObservation(env, a, deterministic=False)),
        "evidence": lambda: real(wrap=lambda env: Evidence(env, a, threshold=0.0)),
        "one dream": lambda: Stepped(gym.make("AimeDream-v0", model=a)),
        "one dream, of means": lambda: Stepped(gym.make("AimeDream-v0", model=a, deterministic=True)),
        "two dreams": lambda: Stepped(dreams()),
        "two dreams in bfloat16": lambda: Stepped(dreams(precision="bf16")),
        "two dreams, of other weights": lambda: Stepped(dreams("b")),
        "two dreams, of another cell": lambda: Stepped(dreams("other")),
        "two dreams, of another task": lambda: Stepped(dreams(task="run")),
        "two dreams, with doubt": lambda: Stepped(dreams(doubt=True)),
        "two dreams, with the ensemble's doubt": lambda: Stepped(dreams(doubt="ensemble")),
        "two dreams, with a price": lambda: Stepped(dreams(doubt_penalty=0.1, max_doubt=1e3)),
        "two dreams, of latents": lambda: Stepped(dreams(obs_type="latent")),
        "two dreams, of images": lambda: Stepped(dreams("pixels", obs_type="image", render_mode="rgb_array")),
        "many dreams": lambda: Stepped(dreams(num_envs=65)),
        "many dreams in bfloat16": lambda: Stepped(dreams(num_envs=65, precision="bf16")),
        "dreams for SB3": lambda: OfSB3(aime_gym.make_sb3_env("AimeDream-v0", n_envs=2, seed=3, model=a)),
        "dreams with a gradient": lambda: Differentiated(dreams(doubt_penalty=0.1).unwrapped),
        "AIME": lambda: Acting(dreams(), AIME.load(folder / "aime", model=a)),
        "SHAC": lambda: shac(learns=False),
        "SHAC that learns": lambda: shac(learns=True),
    }
    if pictures:
        found |= {
            "real, of images": lambda: real(obs_type="image"),
            "real, rendered": lambda: real(render_mode="rgb_array", width=48, height=32),
            "one dream, rendered": lambda: Stepped(gym.make("AimeDream-v0", model=a, render_mode="rgb_array")),
        }
    return found


def digest(shown: Any) -> str:
    """What an object has shown, to the bit."""

    def parts(value: Any) -> Iterator[bytes]:
        if isinstance(value, Mapping):
            for key in sorted(value):
                yield repr(key).encode()
                yield from parts(value[key])
        elif isinstance(value, (tuple, list)):
            for each in value:
                yield from parts(each)
        elif isinstance(value, np.ndarray) and value.dtype == object:  # its bytes are addresses
            yield from parts(value.tolist())
        elif isinstance(value, (np.ndarray, np.generic)):
            yield repr((value.dtype, value.shape)).encode() + value.tobytes()
        else:
            yield repr(value).encode()

    return hashlib.sha256(b"".join(parts(shown))).hexdigest()


def run_alone(made: Stepped) -> str:
    shown = [made.begin(), *(made.step() for _ in range(STEPS))]
    made.close()
    return digest(shown)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("side_by_side")
    write_random_model(folder / "a")
    write_random_model(folder / "b", seed=1)
    write_random_model(folder / "other", cell="rssm")
    write_random_model(folder / "pixels", setup="visual")
    data = record_random(folder / "data", 2, 12)
    AIME(folder / "a", data, hidden_size=16, hidden_layers=1, batch_size=2, horizon=4).learn(1).save(folder / "aime")
    envs = aime_gym.make_sb3_env("AimeDream-v0", n_envs=2, seed=0, model=folder / "a")
    SHAC("MlpPolicy", envs, n_steps=4, seed=0).save(folder / "shac.zip")
    envs.close()
    return folder


@pytest.fixture(scope="module")
def pictures() -> bool:
    from aime_gym.bodies import tasks
    from aime_gym.bodies.lookup import get_embodiment
    from aime_gym.envs.rendering import MuJoCoRenderer

    try:
        MuJoCoRenderer(tasks.load(get_embodiment("walker"), "walk").physics, 8, 8).close()
    except aime_gym.AimeGymError:
        return False
    return True


def test_each_is_as_if_alone(folder, pictures):
    made = kinds(folder, pictures)
    alone = {name: run_alone(make()) for name, make in made.items()}
    assert len({*alone.values()}) > 0.8 * len(alone), "kinds differ"

    kept = {name: made[name]() for name in reversed(made)}
    closed = [make() for make in made.values()]  # twins of them, which end while they go on
    shown = {name: [each.begin()] for name, each in kept.items()}
    for each in closed:
        each.begin()
    for step in range(STEPS):
        for each, (name, other) in zip(closed or [None] * len(kept), kept.items(), strict=True):
            shown[name].append(other.step())
            if each is not None:
                each.step() if step == 0 else each.close()
        closed = [] if step else closed
    assert [name for name in made if digest(shown[name]) != alone[name]] == [], "side by side"
    for each in kept.values():
        each.close()


def test_each_is_as_if_alone_in_threads_of_python(folder, pictures):
    made = {name: make for name, make in kinds(folder, pictures).items() if "SHAC" not in name}  # SB3 draws globally
    chosen = [name for name in made if name.startswith(("one", "two dreams,", "estimate", "real, of i", "real, r"))]
    alone = [run_alone(made[name]()) for name in chosen]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda name: run_alone(made[name]()), chosen))
    assert [name for name, *pair in zip(chosen, alone, together, strict=True) if pair[0] != pair[1]] == []


@pytest.mark.parametrize(
    "kind", ["one dream", "two dreams, with doubt", "estimate", "evidence", "dreams with a gradient"]
)
def test_a_training_loop_in_mixed_precision_changes_no_env(folder, kind):
    make = kinds(folder, False)[kind]
    alone = run_alone(make())
    with torch.autocast("cpu", torch.bfloat16):
        assert run_alone(make()) == alone
    assert run_alone(make()) == alone


def test_a_step_traced_in_mixed_precision_is_no_other(tmp_path):
    """The first step of an architecture is traced, and what it was traced in would be part of it for ever."""
    model = write_random_model(tmp_path / "unseen", hidden_size=24)
    with torch.autocast("cpu", torch.bfloat16):
        run_alone(Stepped(gym.make("AimeDream-v0", model=model)))
    one, many = (gym.make_vec("AimeDream-v0", model=model, num_envs=n, precision="32-true") for n in (1, BIG_BATCH))
    one.reset(seed=3), many.reset(seed=3)
    action = np.full((1, 6), 0.5, np.float32)
    untraced = many.step(np.tile(action, (BIG_BATCH, 1)))[0][:1]
    np.testing.assert_allclose(one.step(action)[0], untraced, rtol=1e-4, atol=1e-4)
