"""What a GPU does: dreams, SHAC, AIME, phase 1 and images, in less than eight minutes, as one JSON file.

Dreams are stepped without a look at any number on the host, each step as one captured CUDA graph. The share of the
limit is that of a large product of matrices in the same type, measured in the same run. One step in float32 without
TF32 is held against the CPU's.
Run `python -m benchmarks.gpu`; ``--device cpu`` does the same without graphs, to see that it runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

import aime_gym
from aime_gym.envs.dream_checks import check_device, place
from aime_gym.envs.start_bank import DreamState
from aime_gym.envs.tensor_dream import TensorDream
from aime_gym.files import write_atomically
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.model import WorldModel
from benchmarks.update_speed import architectures, random_batch

PRECISIONS = {"32-true": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-4


@dataclass
class Gpu:
    """Measure everything that computes on a GPU."""

    device: str = "cuda"
    """Where."""
    model: str = "walker-state"
    """A folder or a bundled name of a walker model with heads and starts."""
    images: str | None = "walker-pixels"
    """The same of a model of images; None measures none."""
    task: str = "walk"
    """The task whose reward is paid."""
    slots: tuple[int, ...] = (1024, 16384, 65536)
    """Numbers of dreams side by side."""
    image_slots: int = 1024
    """Dreams of images side by side."""
    shac_slots: int = 1024
    """Dreams that SHAC learns in."""
    target: float = 900.0
    """The real return that SHAC is to reach, mean of five episodes."""
    seconds: float = 2.0
    """About how long a speed is measured."""
    shac_seconds: float = 120.0
    """After so long SHAC has failed."""
    batch_size: int = 50
    """Windows of an update of phase 1."""
    horizon: int = 50
    """Steps of these windows."""
    output: Path = Path("benchmarks/results/gpu.json")
    """Where to write the numbers."""

    def run(self) -> None:
        """Measures, prints, and writes `output` after each part, so that a part that fails costs no other.

        Raises:
            AimeGymError: If there is no such device.
        """
        device = check_device(self.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        told: dict[str, Any] = {"device": name, "torch": torch.__version__, "model": self.model}
        parts: dict[str, Callable[[torch.device], Any]] = {
            "float32 agrees with the CPU": self.agreement,
            "products, TFLOP/s": self.products,
            "dream": self.dreams,
            "phase 1, updates a second": self.updates,
            "AIME, updates a second": self.imitation,
            "images a second": self.pictures,
            "SHAC": self.shac,
        }
        for part, measure in parts.items():
            began = time.perf_counter()
            try:
                told[part] = measure(device)
            except Exception as error:  # the other parts are still worth their numbers
                told[part] = f"failed: {error!r:.300}"
            print(f"{part}: {json.dumps(told[part])} ({time.perf_counter() - began:.0f} s)", flush=True)
            write_atomically(self.output, json.dumps(told, indent=2) + "\n")

    def agreement(self, device: torch.device) -> dict[str, Any]:
        """The largest difference of one step's latents, observations and rewards from those of the CPU."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            came = []
            for place_ in (torch.device("cpu"), device):
                dream = TensorDream(self.model, self.task, 256, place_, "32-true")
                actions = torch.rand(256, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
                with torch.no_grad():
                    came.append(dream.advance(dream.reset(0), actions.to(place_)))
            pairs = (
                (came[0].state.latents, came[1].state.latents),
                (came[0].state.observations, came[1].state.observations),
                (came[0].rewards, came[1].rewards),
            )
            most = max(float((one - other.cpu()).abs().max()) for one, other in pairs)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        return {"largest difference": most, "within 1e-4": most < TOLERANCE}

    def products(self, device: torch.device) -> dict[str, float]:
        """What a large product of matrices reaches, TFLOP/s."""
        size, told = 8192 if device.type == "cuda" else 512, {}
        for precision, dtype in PRECISIONS.items():
            square = torch.randn(size, size, device=device).to(dtype)
            told[precision] = 2 * size**3 * rate(partial(torch.mm, square, square), self.seconds, device) / 1e12
        return told

    def dreams(self, device: torch.device) -> dict[str, Any]:
        """Steps a second with state and reward, and the share of the products' limit that they are."""
        limits, told = self.products(device), dict[str, Any]()
        for slots in self.slots:
            for precision in PRECISIONS:
                dream = TensorDream(
                    self.model, self.task, slots, device, precision, max_episode_steps=None, autoreset_mode="Disabled"
                )
                steps = slots * rate(stepping(dream), self.seconds, device)
                share = steps * operations(dream) / 1e12 / limits[precision]
                told[f"{slots} slots, {precision}"] = {"steps a second": steps, "share of the limit": share}
        return told

    def updates(self, device: torch.device) -> dict[str, float]:
        """Updates a second of the architectures of the bundled model and of the original."""
        configs = {"ours": load_pretrained_model(self.model).config, "the original's rssm": architectures()["released"]}
        mixed = device.type == "cuda"
        return {
            name: rate(updating(config, device, mixed, self.horizon, self.batch_size), self.seconds, device)
            for name, config in configs.items()
        }

    def imitation(self, device: torch.device) -> float:
        """Updates a second of AIME's policy, 32 windows of 32 steps."""
        imitator = aime_gym.AIME(self.model, "walker-walk", batch_size=32, horizon=32, device=device, seed=0)
        assert imitator.demonstrations is not None
        batch = imitator._batches(imitator.demonstrations, 32, (0, 0)).sample()
        optimizer = torch.optim.Adam(imitator.module.parameters(), lr=5e-4)

        def update() -> None:
            optimizer.zero_grad(set_to_none=True)
            imitator._loss(imitator.module, batch)[0].backward()
            optimizer.step()

        return rate(update, self.seconds, device)

    def pictures(self, device: torch.device) -> float | None:
        """Images a second of dreams that show images."""
        if self.images is None:
            return None
        dream = TensorDream(
            self.images,
            self.task,
            self.image_slots,
            device,
            obs_type="image",
            max_episode_steps=None,
            autoreset_mode="Disabled",
        )
        return self.image_slots * rate(stepping(dream), self.seconds, device)

    def shac(self, device: torch.device) -> dict[str, Any]:
        """Seconds of learning until an agent earns the target in the world, trials not counted."""
        options: dict[str, Any] = {"task": self.task, "model": self.model, "device": device, "max_episode_steps": 32}
        dreams = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=self.shac_slots, seed=0, **options)
        world = aime_gym.make_sb3_env("AimeReal-Walker-v0", n_envs=1, seed=0, task=self.task)
        agent = aime_gym.SHAC("MlpPolicy", dreams, seed=0, device=device)
        trials = _Trials(world, self.target, self.shac_seconds)
        agent.learn(10**12, callback=trials)
        world.close()
        return {
            "seconds": trials.learned,
            "steps": agent.num_timesteps,
            "real return": trials.real,
            "slots": dreams.num_envs,
        }


def stepping(dream: TensorDream) -> Callable[[], object]:
    """One step of a dream under actions that stay, which goes on from the step before; on CUDA a captured graph."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(dream.num_envs, dream.model.config.action_dim, generator=generator) * 2 - 1
    actions = drawn.to(dream.device)
    with torch.no_grad():
        state = DreamState(*(tensor.clone() for tensor in dream.reset(0)))

    @torch.no_grad()
    def step() -> Tensor:
        came = dream.advance(state, actions)
        for tensor, following in zip(state, came.state, strict=True):
            tensor.copy_(following)
        return came.rewards

    if dream.device.type != "cuda":
        return step
    side = torch.cuda.Stream(dream.device)
    side.wait_stream(torch.cuda.current_stream(dream.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(dream.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def operations(dream: TensorDream) -> int:
    """Multiplications and additions of a slot's step in products of matrices."""
    weights = (buffer for buffer in dream.dynamics.buffers() if buffer.ndim >= 2 and buffer.is_floating_point())
    return 2 * sum(weight.numel() for weight in weights)


def updating(
    config: ModelConfig, device: torch.device, mixed: bool, horizon: int, batch_size: int
) -> Callable[[], object]:
    """One update of phase 1 of a model of its own, under bf16 autocast if it is mixed."""
    torch.manual_seed(0)
    model = place(WorldModel(config), device)
    batch = {name: rows.to(device) for name, rows in random_batch(config, horizon, batch_size).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    def update() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = model.loss(batch)[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()

    return update


def rate(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """How often a second work is done, after it was done twice."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        work()
    wait()
    start, done, calls = time.perf_counter(), 0, 1
    while (passed := time.perf_counter() - start) < seconds:
        for _ in range(calls):
            work()
        wait()
        done, calls = done + calls, min(2 * calls, 1024)
        passed = time.perf_counter() - start
    return done / passed


class _Trials(BaseCallback):
    """Real episodes now and then; learning ends at the target, or when the seconds are over."""

    def __init__(self, world: VecEnv, target: float, seconds: float):
        super().__init__()
        self._world, self._target, self._seconds = world, target, seconds
        self.learned, self.real, self._tried, self._next = 0.0, float("nan"), 0.0, 2.0

    def _on_training_start(self) -> None:
        self._began = time.perf_counter()

    def _on_step(self) -> bool:
        return self.learned < self._seconds and not self.real >= self._target

    def _on_rollout_start(self) -> None:
        self.learned = time.perf_counter() - self._began - self._tried
        if self.learned < self._next:
            return
        start = time.perf_counter()
        returns, _ = evaluate_policy(self.model, self._world, 5, return_episode_rewards=True)
        self.real, self._next = float(np.mean(returns)), self.learned + 2.0
        self._tried += time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(Gpu).run()
