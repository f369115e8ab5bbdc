"""How much faster a phase-1 update is than the same computation written step by step, or than in another checkout.

Both train the same `rssm` (mdp Walker, released sizes) on the same batch with the same noise, in turns. The naive one
evaluates every network inside the loop over time, in float32; it uses the model's own networks and loss, so the two
losses must agree. Run `python -m benchmarks.update_speed`; against another checkout of this repository,
`python -m benchmarks.update_speed --against PATH --model FOLDER` measures updates of a model of that folder's
architecture, and the fitting of heads to a few random episodes, in turns.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.collect import Collect
from aime_gym.errors import AimeGymError
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.objective import Normal, TanhNormal, total, weigh
from aime_gym.world_model.packed import bf16_is_fast
from benchmarks.side_by_side import OTHER, Measured, both_checkouts, check_against, measure, report, write

LossFunction = Callable[[WorldModel, dict[str, Tensor], int], Tensor]


@dataclass
class UpdateSpeed:
    """Compare the speed of updates: ours in float32 and bfloat16, and step by step in float32."""

    architecture: str = "released"
    """`released` (rssm, 512 + 128) or `bundled` (rssmo, 256 + 32, standardised)."""
    batch_size: int = 50
    """Windows."""
    horizon: int = 50
    """Steps a window."""
    repeats: int = 7
    """Timed updates of each kind, taken in turns, after one that is not timed."""
    threads: int = 1
    """CPU threads."""
    against: Path | None = None
    """Another checkout, which updates the same `model` in turns with this one."""
    model: str = "walker-state"
    """A folder, whose architecture is updated by both checkouts."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`.

        Raises:
            AimeGymError: If the losses do not agree, or the other checkout is none.
        """
        check_against(self.against, self.model)
        if self.against is not None:
            self.compare(self.against)
            return
        torch.set_num_threads(self.threads)
        config = architectures()[self.architecture]
        batch = random_batch(config, self.horizon, self.batch_size)
        kinds: dict[str, tuple[LossFunction, torch.dtype]] = {
            "step by step, float32": (step_by_step_loss, torch.float32),
            "ours, float32": (our_loss, torch.float32),
            "ours, bfloat16": (our_loss, torch.bfloat16),
        }
        updates = {name: Update(config, batch, *kind) for name, kind in kinds.items()}
        losses = {name: update() for name, update in updates.items()}
        reference = losses["step by step, float32"]
        for name, loss in losses.items():
            tolerance = 1e-4 if name.endswith("32") else 1e-2
            if abs(loss - reference) > tolerance * abs(reference):
                raise AimeGymError(f"Not the same computation: {name} has the loss {loss}, step by step {reference}.")
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(self.repeats):
            for name, update in updates.items():
                start = time.perf_counter()
                update()
                seconds[name].append(time.perf_counter() - start)
        self.report(seconds, losses)

    def compare(self, against: Path) -> None:
        """Measures against the other checkout."""
        place, rows = {"model": str(Path(self.model).resolve())}, dict[str, Measured]()
        sizes = {"horizon": self.horizon, "batch_size": self.batch_size}
        for dtype, bf16 in (("float32", False), *((("bfloat16", True),) if bf16_is_fast() else ())):
            kinds = both_checkouts("update", {**place, **sizes, "bf16": bf16}, against)
            rows[f"phase 1, {dtype}"] = measure(kinds, self.repeats, 0.4, self.threads)
        with tempfile.TemporaryDirectory() as folder:
            Collect("walker", trajectories=4, out=Path(folder) / "data", workers=1).run()
            told = {"data": str(Path(folder) / "data"), "tasks": ["walk", "stand", "run"], "updates": 10}
            rows["heads"] = measure(both_checkouts("heads", {**place, **told}, against), self.repeats, 1, self.threads)
        amounts = {name: 10.0 if name == "heads" else 1.0 for name in rows}
        report(f"{self.model}, threads: {self.threads}", rows, amounts, "updates", OTHER)
        write(self.output, rows, amounts, OTHER, model=self.model, threads=self.threads, **sizes)

    def report(self, seconds: dict[str, list[float]], losses: dict[str, float]) -> None:
        """Prints the table and writes the JSON file."""
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        naive = medians["step by step, float32"]
        print(
            f"{self.architecture}, batch {self.batch_size} x {self.horizon}, threads: {self.threads}; seconds an update"
        )
        for name, values in seconds.items():
            spread = f"{min(values):.3f} to {max(values):.3f}"
            print(f"  {name:24} median {medians[name]:.3f} ({spread})  {naive / medians[name]:.2f}x")
        if self.output:
            result = {
                "architecture": self.architecture,
                "batch_size": self.batch_size,
                "horizon": self.horizon,
                "threads": self.threads,
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "loss": losses,
                "seconds": seconds,
                "median": medians,
                "speedup": {name: naive / median for name, median in medians.items()},
            }
            self.output.write_text(json.dumps(result, indent=2) + "\n")


class Update:
    """One optimisation step of a model of its own: loss, backward, clipping, Adam."""

    def __init__(self, config: ModelConfig, batch: dict[str, Tensor], loss: LossFunction, dtype: torch.dtype):
        torch.manual_seed(0)
        self.model, self.batch, self.loss, self.dtype = WorldModel(config), batch, loss, dtype
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-4)
        self.count = 0

    def __call__(self) -> float:
        """Does it and returns the loss."""
        precision: AbstractContextManager = nullcontext()
        if self.dtype != torch.float32:
            precision = torch.autocast("cpu", self.dtype)
        self.count += 1
        with precision:
            loss = self.loss(self.model, self.batch, self.count)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 100.0)
        self.optimizer.step()
        return loss.item()


def our_loss(model: WorldModel, batch: dict[str, Tensor], seed: int) -> Tensor:
    """The package's."""
    return model.loss(batch, generator=torch.Generator().manual_seed(seed))[0]


def step_by_step_loss(model: WorldModel, batch: dict[str, Tensor], seed: int) -> Tensor:
    """The same, with every network evaluated at every step."""
    config, cell = model.config, model.cell
    steps, size = batch["pre_action"].shape[:2]
    noise = torch.randn(steps, size, config.stochastic_dim, generator=torch.Generator().manual_seed(seed))
    targets = model.standardise({name: batch[name] for name in model.observed})
    state = model.initial_state(size)
    posteriors, priors, guesses = [], [], []
    outputs: dict[str, list[Normal]] = {name: [] for name in model.observed}
    for t in range(steps):
        action = batch["pre_action"][t]
        embedding = model.encode({name: batch[name][t] for name in model.observed})
        if t and model.idm is not None:
            seen = torch.cat([state, embedding], dim=-1)
            guesses.append(model.idm(seen.detach() if config.idm_mode == "detach" else seen))
        memory = cell.advance(state, action)
        posteriors.append(cell.posterior(memory, embedding))
        priors.append(cell.prior(memory))
        state = torch.cat([memory, posteriors[-1].sample(noise[t])], dim=-1)
        for name, decoded in outputs.items():
            decoded.append(model.decoders[name](state))
    objective = weigh(
        {name: _stack(decoded) for name, decoded in outputs.items()},
        {},
        targets,
        _stack(posteriors),
        _stack(priors),
        config.nll_reweight,
        config.kl_rebalance,
        config.free_nats,
    )
    loss = total(objective.reconstruction + config.kl_scale * objective.kl)
    if guesses:
        guess = TanhNormal(_stack([guess.base for guess in guesses]))
        loss = loss - guess.log_prob(batch["pre_action"][1:]).sum((1, 2)).mean()
    return loss


def _stack(steps: list[Any]) -> Normal:
    return Normal(
        torch.stack([step.mean for step in steps]), torch.stack([step.std.expand_as(step.mean) for step in steps])
    )


def architectures() -> dict[str, ModelConfig]:
    """The released Walker model, and one like the bundled `walker-state`."""
    walker = get_embodiment("walker")
    dreamer = NetConfig("dmlp", 256, 2, "swish", "ln")
    encoder = NetConfig("mlp", 256, 2, "swish", "ln", have_head=False)
    return {
        "released": ModelConfig.for_embodiment(walker, "mdp", "rssm"),
        "bundled": ModelConfig.for_embodiment(
            walker,
            "mdp",
            "rssmo",
            memory_dim=256,
            stochastic_dim=32,
            hidden_size=256,
            hidden_layers=1,
            encoders={"tabular": encoder},
            decoders={"tabular": dreamer},
            probes={},
            idm_mode="none",
            standardise=True,
        ),
    }


def random_batch(config: ModelConfig, horizon: int, batch_size: int) -> dict[str, Tensor]:
    """Standard-normal sensors and uniform actions, [T, B, D]."""
    generator = torch.Generator().manual_seed(0)
    batch = {s.name: torch.randn(horizon, batch_size, s.dim, generator=generator) for s in config.sensors}
    batch["pre_action"] = torch.rand(horizon, batch_size, config.action_dim, generator=generator) * 2 - 1
    return batch


if __name__ == "__main__":
    tyro.cli(UpdateSpeed).run()
