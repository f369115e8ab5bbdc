"""What happens around a training loop: progress, evaluation, checkpoints, early stop and logs.

As in Stable-Baselines3, the trainer calls a public hook, and callbacks override the private one.
"""

from __future__ import annotations

import json
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from aime_gym.errors import unknown_name
from aime_gym.files import json_text, write_atomically
from aime_gym.parallel import make_console
from aime_gym.training.trainer import Callback

if TYPE_CHECKING:
    pass


def watched(scores: Mapping[str, float], monitor: str | None) -> float:
    """The score of that name; by default the first, which is the main one.

    Raises:
        AimeGymError: If there is none of that name.
    """
    if monitor is None:
        return next(iter(scores.values()))
    if monitor not in scores:
        raise unknown_name("score", monitor, scores)
    return scores[monitor]


class Evaluation(Callback):
    """Scores the module on held-out data every few updates and once at the end.

    Args:
        score: `module -> scores by name`; must leave the global random generators alone.
        every: Updates between evaluations.
    """

    def __init__(self, score: Callable[[Any], Mapping[str, float]], every: int):
        self.score, self.every = score, every
        self._evaluated_at = -1

    def _on_update_end(self) -> bool:
        return self._evaluate() if self.trainer.update % self.every == 0 else True

    def _on_training_end(self) -> None:
        if self.trainer.status == "finished" and self._evaluated_at != self.trainer.update:
            self._evaluate()

    def _evaluate(self) -> bool:
        module: nn.Module = self.trainer.module
        was_training = module.training
        module.eval()
        with torch.no_grad():
            scores = self.score(module)
        module.train(was_training)
        self._evaluated_at = self.trainer.update
        return self.trainer.report(scores)

    def state_dict(self) -> dict[str, Any]:
        """When it last evaluated."""
        return {"evaluated_at": self._evaluated_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict`."""
        self._evaluated_at = state["evaluated_at"]


class Checkpoint(Callback):
    """Keeps the newest state in ``last.pt`` and the one with the best held-out score in ``best.pt``.

    Args:
        folder: Where the files go.
        every_updates: Updates between saves of the newest.
        every_minutes: Minutes between saves of the newest, whichever comes first.
        monitor: The score that decides, the lower the better; the first of the scores by default.
    """

    def __init__(
        self, folder: str | Path, every_updates: int = 1000, every_minutes: float = 5.0, monitor: str | None = None
    ):
        self.last, self.best = Path(folder) / "last.pt", Path(folder) / "best.pt"
        self.every_updates, self.every_minutes, self.monitor = every_updates, every_minutes, monitor
        self.best_score = math.inf
        self._saved_time = 0.0

    def _on_training_start(self) -> None:
        self._saved_time = time.monotonic()

    def _on_update_end(self) -> bool:
        due = time.monotonic() - self._saved_time >= 60 * self.every_minutes
        if due or self.trainer.update % self.every_updates == 0:
            self._save()
        return True

    def _on_evaluation(self, scores: Mapping[str, float]) -> bool:
        score = watched(scores, self.monitor)
        if score < self.best_score:
            self.best_score = score
            self.trainer.save(self.best)
        return True

    def _on_training_end(self) -> None:
        if self.trainer.status != "failed":
            self._save()

    def last_good(self) -> str:
        """Names the newest checkpoint."""
        if self.last.exists():
            return f"The last good checkpoint is {self.last}."
        return f"The best checkpoint is {self.best}." if self.best.exists() else "There was no checkpoint yet."

    def state_dict(self) -> dict[str, Any]:
        """The score to beat."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict`."""
        self.best_score = state["best_score"]

    def _save(self) -> None:
        self.trainer.save(self.last)
        self._saved_time = time.monotonic()


class EarlyStopping(Callback):
    """Stops when a held-out score has not improved for a while.

    Args:
        patience: Evaluations without improvement that are borne.
        monitor: The score, the lower the better; the first of the scores by default.
    """

    def __init__(self, patience: int, monitor: str | None = None):
        self.patience, self.monitor = patience, monitor
        self.best_score = math.inf
        self.waited = 0

    def _on_evaluation(self, scores: Mapping[str, float]) -> bool:
        score = watched(scores, self.monitor)
        improved = score < self.best_score
        self.best_score = min(self.best_score, score)
        self.waited = 0 if improved else self.waited + 1
        return self.waited < self.patience

    def state_dict(self) -> dict[str, Any]:
        """The score to beat and how long it has stood."""
        return {"best_score": self.best_score, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict`."""
        self.best_score, self.waited = state["best_score"], state["waited"]


class ProgressBar(Callback):
    """Shows updates a second, time left, loss and held-out score; plain lines where there is no terminal.

    Args:
        title: What is being trained.
        monitor: The score to show; the first by default.
        line_every: Seconds between plain lines.
    """

    def __init__(self, title: str, monitor: str | None = None, line_every: float = 60.0):
        self.title, self.monitor, self.line_every = title, monitor, line_every
        self._score = ""

    def _on_training_start(self) -> None:
        self._console = make_console()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not (self.trainer.is_main and self._console.is_terminal),
        )
        self._task = self._progress.add_task(
            self.title, total=self.trainer.max_updates, completed=self.trainer.update, speed="", numbers=""
        )
        self._first = self.trainer.update
        self._start = self._line = time.monotonic()
        self._progress.start()

    def _on_update_end(self) -> bool:
        now = time.monotonic()
        speed = (self.trainer.update - self._first) / max(now - self._start, 1e-9)
        rate = f"{speed:.2f} updates/s"
        numbers = f"loss {self.trainer.loss:.2f}{self._score}"
        self._progress.update(self._task, completed=self.trainer.update, speed=rate, numbers=numbers)
        if self.trainer.is_main and not self._console.is_terminal and now - self._line >= self.line_every:
            self._line = now
            done = f"{self.trainer.update}/{self.trainer.max_updates}"
            left = (self.trainer.max_updates - self.trainer.update) / speed / 60
            print(f"{self.title} {done}  {rate}  {left:.1f} min left  {numbers}", flush=True)
        return True

    def _on_evaluation(self, scores: Mapping[str, float]) -> bool:
        self._score = f"  {self.monitor or next(iter(scores))} {watched(scores, self.monitor):.4f}"
        return True

    def _on_training_end(self) -> None:
        self._progress.stop()


class MetricLog(Callback):
    """Base of the logs: averages the metrics over some updates and writes them, and all scores.

    Args:
        every: Updates between entries.
    """

    def __init__(self, every: int = 50):
        self.every = every
        self._sums: dict[str, Any] = {}
        self._count = 0

    def _on_update_end(self) -> bool:
        for name, value in self.trainer.metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._count += 1
        if self.trainer.update % self.every == 0 and self.trainer.is_main:
            means = {name: float(total) / self._count for name, total in self._sums.items()}
            means |= {"learning_rate": self.trainer.learning_rate, "seconds": self.trainer.seconds}
            self._write(means)
        if self.trainer.update % self.every == 0:
            self._sums, self._count = {}, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """The metrics that the next entry averages."""
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict`."""
        self._sums, self._count = dict(state["sums"]), state["count"]

    def _on_evaluation(self, scores: Mapping[str, float]) -> bool:
        if self.trainer.is_main:
            self._write({f"held_out/{name}": value for name, value in scores.items()})
        return True

    @abstractmethod
    def _write(self, values: Mapping[str, float]) -> None:
        """Writes values that belong to the present update."""


class JsonLog(MetricLog):
    """Appends one JSON object a line; a resumed run first drops the lines after its checkpoint.

    Args:
        path: The file.
        every: Updates between entries.
    """

    def __init__(self, path: str | Path, every: int = 50):
        super().__init__(every)
        self.path = Path(path)

    def _on_training_start(self) -> None:
        if not self.trainer.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [
                line for line in lines if line.endswith("}\n") and json.loads(line)["update"] <= self.trainer.update
            ]
        write_atomically(self.path, "".join(kept))

    def _write(self, values: Mapping[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json_text({"update": self.trainer.update, **values}, indent=None) + "\n")


class TensorBoardLog(MetricLog):
    """Writes the same as `JsonLog` for TensorBoard.

    Args:
        folder: TensorBoard's `--logdir`.
        every: Updates between entries.
    """

    def __init__(self, folder: str | Path, every: int = 50):
        super().__init__(every)
        self.folder = Path(folder)

    def _on_training_start(self) -> None:
        if self.trainer.is_main:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._writer = SummaryWriter(str(self.folder), purge_step=self.trainer.update + 1)

    def _write(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, self.trainer.update)

    def _on_training_end(self) -> None:
        if self.trainer.is_main:
            self._writer.close()
