"""The training loop of this package, on Lightning Fabric, the base of its callbacks, and its snapshots."""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from aime_gym.errors import AimeGymError, Terminated, unknown_name
from aime_gym.files import check_archive, reason, write_atomically
from aime_gym.world_model.checkpoint import checked_weights, fit_weights


class BatchSource(Protocol):
    """Where a `Trainer` gets its batches, with a state that a checkpoint can hold."""

    def sample(self) -> Any:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides the batches to come."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`."""

    def reseed(self, number: int) -> None:
        """Begins another stream of batches: the one with this number, of the same seed."""


def save_snapshot(path: Path, state: dict[str, Any]) -> None:
    """Saves a state of tensors and plain values with `torch.save`, whole or not at all.

    Raises:
        OSError: If the disk is full; a file that was there stays.
    """
    buffer = io.BytesIO()  # a full disk must surface as an OSError of one write
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def load_snapshot(path: Path) -> dict[str, Any]:
    """Loads what `save_snapshot` wrote, without running any code that the file may hold.

    Raises:
        AimeGymError: If the file is missing or corrupt, or holds something else.
    """
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise AimeGymError(f"There is no checkpoint {path}.") from error
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise AimeGymError(
            f"The checkpoint {path} cannot be read ({reason(error)}). Delete it to start anew."
        ) from error
    if not isinstance(state, dict):
        raise AimeGymError(
            f"The checkpoint {path} holds a {type(state).__name__}; expected a dict. Delete it to start anew."
        )
    return state


def load_module(path: Path, module: nn.Module) -> None:
    """Gives a module the weights in a run's checkpoint.

    Raises:
        AimeGymError: For the same reasons as `load_snapshot`, or if they are those of another module or not finite.
    """
    state = load_snapshot(path).get("module")
    if not isinstance(state, dict):
        raise AimeGymError(f"The checkpoint {path} holds no weights. Delete it to start anew.")
    fit_weights(module, checked_weights(path, state), path)


class Callback:
    """Base of all callbacks; override the hooks that begin with an underscore.

    Attributes:
        trainer: The trainer, from `on_training_start` on.
    """

    trainer: Trainer

    def on_training_start(self, trainer: Trainer) -> None:
        """Called once before the first update of this call of `train`."""
        self.trainer = trainer
        self._on_training_start()

    def on_update_end(self) -> bool:
        """Called after every update; False stops the training."""
        return self._on_update_end()

    def on_evaluation(self, scores: Mapping[str, float]) -> bool:
        """Called with every set of held-out scores; False stops the training."""
        return self._on_evaluation(scores)

    def on_training_end(self) -> None:
        """Called once, however training ended: `trainer.status` says how."""
        self._on_training_end()

    def last_good(self) -> str:
        """A sentence that says where a good state of a broken run is; empty if this callback keeps none."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict`."""

    def _on_training_start(self) -> None:
        pass

    def _on_update_end(self) -> bool:
        return True

    def _on_evaluation(self, scores: Mapping[str, float]) -> bool:
        return True

    def _on_training_end(self) -> None:
        pass


def make_fabric(**options: Any) -> Fabric:
    """Lightning's Fabric, which says nothing of the precision that it was asked for."""
    log = logging.getLogger("lightning_fabric.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        return Fabric(**options)
    finally:
        log.setLevel(level)


def check_processes(fabric: Fabric) -> None:
    """Raises an `AimeGymError` if this is one of several processes that something else started, unknown to Fabric.

    Each of them would train by itself, and write to the same folder.
    """
    told = os.environ.get("WORLD_SIZE", "")
    if told.isdigit() and int(told) != fabric.world_size:
        raise AimeGymError(
            f"This is one of {told} processes (WORLD_SIZE, as torchrun sets it), but the training is one of "
            f"{fabric.world_size}. Start it without torchrun, or let them train together: `aime-gym train` with "
            f"--devices DEVICES --num-nodes NODES --strategy ddp, which make {told} of them."
        )


LossFunction = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]

Status = Literal["ready", "running", "finished", "interrupted", "failed"]

SCHEDULES = ("constant", "cosine")


def adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Adam as one operation on all parameters, in place of some on each."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


class Trainer:
    """Minimises a loss by gradient descent and tells its callbacks about it.

    Several processes average their gradients by Fabric's data-parallel strategies; call `fabric.launch()` before.

    Args:
        module: What is trained.
        optimizer: Over the module's parameters; its learning rate is the one at the start.
        batches: Where batches come from; each process has its own.
        loss_function: `(module, batch) -> (scalar loss, metrics)`, metrics being scalars by name.
        max_updates: Where training ends.
        fabric: Device, precision and processes; by default one CPU process in float32.
        schedule: Schedule of the learning rate: ``"constant"``, or ``"cosine"`` down to 0 at `max_updates`.
        grad_clip: The gradient's largest norm.
        callbacks: Called in this order: whatever evaluates comes before what acts on scores.

    Attributes:
        module: What is trained, unwrapped.
        update: Updates done.
        seconds: Time spent in `train`, over all its resumed parts.
        loss: The last loss.
        metrics: The last metrics.
        status: ``"running"``, or how training ended.

    Raises:
        AimeGymError: If the schedule is unknown.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: BatchSource,
        loss_function: LossFunction,
        max_updates: int,
        *,
        fabric: Fabric | None = None,
        schedule: str = "constant",
        grad_clip: float = 100.0,
        callbacks: Sequence[Callback] = (),
    ):
        self.fabric = fabric or make_fabric(accelerator="cpu", devices=1)
        self.module, self.optimizer, self.batches = module, optimizer, batches
        self.max_updates, self.grad_clip, self.callbacks = max_updates, grad_clip, tuple(callbacks)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _decay(schedule, max_updates))
        self._objective, self._fabric_optimizer = self.fabric.setup(_Objective(module, loss_function), optimizer)
        self.update = 0
        self.seconds = 0.0
        self.loss = math.nan
        self.metrics: dict[str, Tensor] = {}
        self.status: Status = "ready"

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.fabric.is_global_zero

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def train(self) -> None:
        """Trains up to `max_updates`, or until a callback says to stop; a finished run that was loaded stays finished.

        The first Ctrl-C (or SIGTERM) lets the update, or the last evaluation, end and the callbacks save; the second
        one is immediate.

        Raises:
            AimeGymError: If a loss or gradient is not finite; the module keeps its weights from before that update.
            KeyboardInterrupt: After Ctrl-C, or as `Terminated` after SIGTERM, when the callbacks have saved.
        """
        if self.status == "finished":
            return
        self.status = "running"
        before, start = self.seconds, time.monotonic()
        with _deferred_interrupts() as interrupts, ExitStack() as stack:
            started: list[Callback] = []
            try:
                for callback in self.callbacks:
                    callback.on_training_start(self)
                    started.append(callback)
                while self.update < self.max_updates:
                    self._update()
                    self.seconds = before + time.monotonic() - start
                    answers = [callback.on_update_end() for callback in self.callbacks]
                    if self._any_process(bool(interrupts)):
                        self.status = "interrupted"
                    if self._any_process(self.status == "interrupted" or not all(answers)):
                        break
                if self.status == "running":
                    self.status = "finished"
            finally:
                if self.status == "running":
                    self.status = "failed"
                for callback in reversed(started):  # all of them end, in their order, whatever one of them raises
                    stack.callback(self._end, callback)
        if self._any_process(self.status == "interrupted" or bool(interrupts)):  # the latter in the last evaluation
            raise Terminated if signal.SIGTERM in interrupts else KeyboardInterrupt

    def report(self, scores: Mapping[str, float]) -> bool:
        """Hands held-out scores to all callbacks; returns whether all of them want to go on."""
        answers = [callback.on_evaluation(scores) for callback in self.callbacks]
        return all(answers)

    def save(self, path: Path) -> None:
        """Saves all that decides the updates to come, atomically, from the main process.

        Raises:
            OSError: If the disk is full; a file that was there stays.
        """
        if not self.is_main:
            return
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "batches": self.batches.state_dict(),
            "callbacks": {name: state for name, hook in self._named_callbacks() if (state := hook.state_dict())},
            "torch_rng": torch.get_rng_state(),
            "update": self.update,
            "seconds": self.seconds,
            "finished": self.status == "finished",
        }
        if self.fabric.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.fabric.device)
        save_snapshot(path, state)

    def load(self, path: Path) -> None:
        """Continues from a saved file: bit for bit on one CPU process.

        The file holds the main process' random numbers; others begin new streams.

        Raises:
            AimeGymError: If the file is missing, corrupt, or of another module.
        """
        state = load_snapshot(path)
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._scheduler.load_state_dict(state["scheduler"])
            for name, callback in self._named_callbacks():  # a resumed run may have other ones
                if name in state["callbacks"]:
                    callback.load_state_dict(state["callbacks"][name])
            self.update, self.seconds = state["update"], state["seconds"]
            self.status = "finished" if state["finished"] else "ready"
            if self.is_main:
                self.batches.load_state_dict(state["batches"])
                torch.set_rng_state(state["torch_rng"])
                if "cuda_rng" in state and self.fabric.device.type == "cuda":
                    torch.cuda.set_rng_state(state["cuda_rng"], self.fabric.device)
            else:
                self.batches.reseed(self.update)
                torch.manual_seed(torch.initial_seed() + self.update)
        except Exception as error:  # a file that is not of this run makes its readers raise nearly anything
            raise AimeGymError(f"The checkpoint {path} is not of this run: {reason(error)}.") from error

    def _end(self, callback: Callback) -> None:
        """Tells a callback that training has ended; if that fails, a state saved afterwards can still be resumed."""
        try:
            callback.on_training_end()
        except Exception:
            if self.status == "finished":
                self.status = "interrupted"
            raise

    def _update(self) -> None:
        loss, metrics = self._objective(self.batches.sample())
        self._fabric_optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self._objective, self._fabric_optimizer, max_norm=self.grad_clip, error_if_nonfinite=False
        )
        assert norm is not None
        self.loss, gradient = torch.stack([loss.detach().float(), norm.detach().float()]).tolist()
        if self._any_process(not math.isfinite(self.loss) or not math.isfinite(gradient)):
            self.status = "failed"
            raise AimeGymError(
                f"Update {self.update + 1} gave a loss of {self.loss} with a gradient of norm {gradient}; expected "
                f"finite numbers.{self._whereabouts()} Check the data for outliers, or lower the learning rate."
            )
        self._fabric_optimizer.step()
        self._scheduler.step()
        self.metrics = {"loss": loss.detach(), "grad_norm": norm.detach(), **metrics}
        self.update += 1

    def _named_callbacks(self) -> Iterator[tuple[str, Callback]]:
        """Callbacks by their class and how many of it came before."""
        seen: Counter[str] = Counter()
        for callback in self.callbacks:
            name = type(callback).__name__
            yield f"{name}-{seen[name]}", callback
            seen[name] += 1

    def _whereabouts(self) -> str:
        notes = (callback.last_good() for callback in self.callbacks)
        return "".join(f" {note}" for note in notes if note)

    def _any_process(self, flag: bool) -> bool:
        if self.fabric.world_size == 1:
            return flag
        count = torch.tensor(float(flag), device=self.fabric.device)
        total = self.fabric.all_reduce(count, reduce_op="sum")
        assert isinstance(total, Tensor)
        return bool(total > 0)


class _Objective(nn.Module):
    """The loss as a module's `forward`, where Fabric's strategies and precisions hook in."""

    def __init__(self, module: nn.Module, loss_function: LossFunction):
        super().__init__()
        self.module, self.loss_function = module, loss_function

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_function(self.module, batch)


def _decay(schedule: str, max_updates: int) -> Callable[[int], float]:
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return lambda update: 1.0
    return lambda update: 0.5 * (1 + math.cos(math.pi * min(update / max_updates, 1)))


@contextmanager
def _deferred_interrupts() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM in a list in place of raising; signals reach the main thread only."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
