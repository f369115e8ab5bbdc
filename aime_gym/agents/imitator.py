"""What all imitators share: learning from demonstrations, saving and loading."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from aime_gym.agents.recurrent import RecurrentAgent
from aime_gym.data.dataset import Batch, TrajectoryDataset
from aime_gym.data.demonstrations import find_demonstrations, load_demonstrations, read_true_actions
from aime_gym.data.trajectories import data_digest
from aime_gym.errors import AimeGymError, check_natural, check_positive, unknown_name
from aime_gym.files import read_json, weights_digest, write_atomically, write_digests, write_json
from aime_gym.flags import CONTENT, claim_run
from aime_gym.observations import to_tensors
from aime_gym.parallel import claimed, seeded
from aime_gym.training.callbacks import Checkpoint, Evaluation, TensorBoardLog
from aime_gym.training.trainer import (
    SCHEDULES,
    BatchSource,
    Callback,
    LossFunction,
    Trainer,
    adam,
    check_processes,
    make_fabric,
)
from aime_gym.world_model.checkpoint import fit_weights, load_pretrained_model, read_weights, save_model
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.packed import resolve_precision

MONITOR = "held_out_loss"
"""The score on held-out demonstrations by which the weights to keep are chosen; never a real return."""
TRUE_ACTION = "true_action"
"""The key of true actions in batches, for analysis only."""
EMBEDDING = "embedding"
"""The key of embeddings of frames, which are made once for all updates."""


class Imitator(RecurrentAgent):
    """An agent that imitates demonstrations, and acts as `RecurrentAgent` says.

    Args:
        model: A loaded world model, a folder or a bundled name; it says what is observed and stays as it is.
        demonstrations: A folder of trajectories or a bundled name; None for an agent that only acts.
        batch_size: Windows an update, B.
        horizon: Steps of a window, T.
        lr: Adam's learning rate.
        schedule: How it goes on while `learn` does: ``"constant"``, or ``"cosine"`` down to 0 at the last update.
        held_out: Share of the demonstrations on which the weights to keep are chosen; 0 keeps the last weights and
            learns from all demonstrations.
        grad_clip: The gradient's largest norm; ``math.inf`` clips nothing.
        precision: ``"32-true"``, ``"bf16-mixed"``, or ``"auto"`` for the quicker one: float32 for states on a CPU, as
            products are too small there for bfloat16 to pay, and elsewhere bfloat16 if the hardware is fast at it.
        seed: Seed of everything.
        device: Where it learns and acts, e.g. ``"cuda"``; the model is copied there if it is elsewhere.
        tensorboard_log: Where `learn` makes a folder of the algorithm's name, with a log for TensorBoard.

    Raises:
        AimeGymError: If the model or the demonstrations cannot be read or do not fit together, or there is no such
            device.
    """

    name: ClassVar[str]
    original_settings: ClassVar[dict[str, Any]]
    """Options with which the original implementation ran, where they differ from the defaults; see `original`."""
    _begun = False
    """Whether it has learned from demonstrations, before it was saved or by `OnlineAIME.imitate`."""

    def __init__(
        self,
        model: WorldModel | str | Path,
        demonstrations: str | Path | None = None,
        *,
        batch_size: int = 50,
        horizon: int = 32,
        lr: float = 1e-3,
        schedule: str = "constant",
        held_out: float = 0.2,
        grad_clip: float = 100.0,
        precision: str = "auto",
        seed: int = 0,
        device: str | torch.device = "cpu",
        tensorboard_log: str | Path | None = None,
    ):
        for name, number in (("batch_size", batch_size), ("horizon", horizon)):
            check_positive(number, name)
        check_natural(seed, "seed")
        if not 0 < lr < math.inf:
            raise AimeGymError(f"lr is a finite number above 0; got {lr!r}.")
        if not grad_clip > 0:
            raise AimeGymError(f"grad_clip is a number above 0, or math.inf to clip nothing; got {grad_clip!r}.")
        if not 0 <= held_out < 1:
            raise AimeGymError(f"held_out is a share from 0 to below 1; got {held_out!r}.")
        if schedule not in SCHEDULES:
            raise unknown_name("schedule", schedule, SCHEDULES)
        super().__init__(model, device)
        self.schedule = schedule
        self.batch_size, self.horizon, self.lr, self.held_out, self.seed = batch_size, horizon, lr, held_out, seed
        self.grad_clip, self.tensorboard_log = grad_clip, tensorboard_log
        small = precision == "auto" and self.device.type == "cpu" and "image" not in self.model.observed
        self._precision = "32-true" if small else resolve_precision(precision, self.device.type)
        config = self.model.config
        if config.choices:
            raise AimeGymError(
                f"Imitators infer actions that are numbers in [-1, 1]; {config.embodiment} takes {self.action_space}, "
                "which they cannot learn. SHAC, PPO and DQN learn in its dreams: `aime_gym.make_sb3_env`."
            )
        self.demonstrations: TrajectoryDataset | None = None
        self.true_actions: np.ndarray | None = None
        if demonstrations is not None:
            self._folder = folder = find_demonstrations(demonstrations)
            self.demonstrations = load_demonstrations(folder, config, horizon, least=2 if held_out else 1)
            self.true_actions = read_true_actions(folder, int(self.demonstrations.bounds[-1, 1]), config.action_dim)
        with seeded(seed):
            self.module = self._build().to(self.device)

    @classmethod
    def original(cls, model: WorldModel | str | Path, demonstrations: str | Path | None = None, **options: Any) -> Self:
        """The imitator with the settings of the original implementation in place of the defaults.

        Args:
            model: See the constructor.
            demonstrations: See the constructor.
            **options: Options of the constructor; they come before `original_settings`.

        Returns:
            The imitator, which has learned nothing yet.
        """
        return cls(model, demonstrations, **{**cls.original_settings, **options})

    @abstractmethod
    def _build(self) -> nn.Module:
        """What is trained."""

    @abstractmethod
    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss and its metrics."""

    @abstractmethod
    def _batches(self, part: TrajectoryDataset, batch_size: int, seed: tuple[int, ...]) -> BatchSource:
        """Batches of demonstrations."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Arguments of the constructor that decide what is built, as JSON can hold them."""

    def learn(
        self, total_updates: int, callback: Callback | Sequence[Callback] = (), folder: str | Path | None = None
    ) -> Self:
        """Trains, and takes the weights with the best loss on held-out demonstrations; with none held out, the last.

        Args:
            total_updates: Gradient steps.
            callback: More callbacks of `aime_gym.training.callbacks`.
            folder: For checkpoints; a run that stopped there resumes.

        Returns:
            The agent.

        Raises:
            AimeGymError: If there are no demonstrations, the folder holds a run with other settings or another process
                writes to it, or a loss is not finite.
            KeyboardInterrupt: After Ctrl-C; with a folder the same call resumes.
        """
        self.check_data()
        check_processes(make_fabric(accelerator="cpu", devices=1))
        check_positive(total_updates, "total_updates")
        if folder is None:
            self._learn(total_updates, callback)
            return self
        with claimed(folder) as kept:
            begun = any(kept.rglob("*.pt"))
            claim_run(kept / "flags.json", {"updates": total_updates, **self._flags()}, begun=begun)
            self._learn(total_updates, callback, kept)
        return self

    def _learn(self, total_updates: int, callback: Callback | Sequence[Callback], folder: Path | None = None) -> None:
        self._prepare(callback, folder)
        assert self.demonstrations is not None
        if self.true_actions is not None:
            self.demonstrations.arrays[TRUE_ACTION] = self.true_actions
        train, judge = self.demonstrations, None
        if self.held_out:
            train, held = train.split(self.held_out, self.seed)
            judge = self._batches(held, 2 * self.batch_size, (self.seed, 1)).sample()
        logs = [TensorBoardLog(Path(self.tensorboard_log) / self.name)] if self.tensorboard_log else []
        fit(
            self.module,
            self._loss,
            self._batches(train, self.batch_size, (self.seed, 0)),
            judge,
            total_updates,
            self.lr,
            self.seed,
            self.grad_clip,
            self._precision,
            [*([callback] if isinstance(callback, Callback) else callback), *logs],
            folder,
            self.schedule,
        )

    def check_data(self) -> None:
        """Raises an `AimeGymError` unless there are all data that `learn` needs."""
        if self.demonstrations is None:
            raise AimeGymError(f"{type(self).__name__} has no demonstrations to learn from: pass demonstrations=.")

    def _flags(self) -> dict[str, Any]:
        """All that decides what is learned."""
        assert self.demonstrations is not None
        own = ("batch_size", "horizon", "lr", "schedule", "held_out", "grad_clip", "seed")
        return {
            **{"algo": self.name, "model": self.model.folder, "demonstrations": self._folder},
            **{"trajectories": len(self.demonstrations), **self._settings()},
            **{f"{CONTENT}demonstrations": data_digest(self._folder, "image" in self.model.observed)},
            **({f"{CONTENT}model": weights_digest(self.model.folder)} if self.model.folder else {}),
            **{name: getattr(self, name) for name in own},
        }

    def _prepare(self, callback: Callback | Sequence[Callback], folder: Path | None) -> None:
        """What is learned before the demonstrations are; arguments of `learn`."""

    @torch.no_grad()
    def _embed_rows(
        self, data: TrajectoryDataset, embed: Callable[[dict[str, Tensor]], Tensor], at_once: int = 256
    ) -> None:
        """Gives data, once for all updates, what `embed` makes of what the model observes in them: [rows, E]."""
        seen = {name: data.arrays[name] for name in self.model.observed}
        rows = len(next(iter(seen.values())))
        parts = [
            embed(to_tensors({name: each[begin : begin + at_once] for name, each in seen.items()}, self.device)).cpu()
            for begin in range(0, rows, at_once)
        ]
        data.arrays[EMBEDDING] = torch.cat(parts).numpy()

    def save(self, folder: str | Path) -> Path:
        """Writes the agent and a copy of its world model into a folder.

        Returns:
            The folder.
        """
        folder = Path(folder)
        save_model(self.model, folder / "model")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.module.state_dict().items()}
        write_atomically(folder / "imitator.safetensors", save(weights))
        write_digests(folder, ["imitator.safetensors"])
        write_json(folder / "imitator.json", {"algo": self.name, **self._settings()})
        return folder

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: WorldModel | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Self:
        """Reads what `save` wrote.

        Args:
            folder: The agent's.
            model: To act with in place of the copy in the folder.
            device: Where it acts.
            **options: More options of the constructor, such as ``demonstrations``.

        Returns:
            The agent, which acts as the saved one and can learn on.

        Raises:
            AimeGymError: If something is missing, corrupt, of other sizes or of another algorithm.
        """
        folder = Path(folder)
        path = folder / "imitator.json"
        settings = read_json(path, "the settings of an imitator", f"{folder} is not the folder of a saved imitator.")
        algo = settings.pop("algo", None)
        if algo != cls.name:
            raise AimeGymError(f"{folder} holds an agent of {algo!r}; {cls.__name__}.load reads {cls.name!r}.")
        file = folder / "imitator.safetensors"
        weights, _ = read_weights(file)
        most = max(len(weights), *(max(weight.shape, default=1) for weight in weights.values()), 1)
        large = [name for name, value in settings.items() if isinstance(value, int) and value > most]
        if large:  # refused before memory is taken
            raise AimeGymError(f"{path} holds another {', '.join(large)} than the weights beside it.")
        try:
            agent = cls(model or load_pretrained_model(folder / "model"), **settings, device=device, **options)
        except TypeError as error:
            raise AimeGymError(f"{path} holds settings that {cls.__name__} does not have ({error}).") from error
        fit_weights(agent.module, weights, file)
        agent.module.eval()
        agent._begun = True
        return agent


def fit(
    module: nn.Module,
    loss: LossFunction,
    batches: BatchSource,
    judge: Batch | None,
    updates: int,
    lr: float,
    seed: int,
    grad_clip: float = 100.0,
    precision: str = "32-true",
    callbacks: Sequence[Callback] = (),
    folder: Path | None = None,
    schedule: str = "constant",
) -> None:
    """Trains a module and leaves it with the weights that were best on a held-out batch, or else the last ones.

    Args:
        module: What is trained, on its device; in eval mode afterwards.
        loss: `(module, batch) -> (loss, metrics)`.
        batches: Batches of the training data.
        judge: The held-out batch; None for no evaluation.
        updates: Gradient steps.
        lr: Adam's learning rate.
        seed: Seed of the noise in the loss.
        grad_clip: The gradient's largest norm.
        precision: Fabric's.
        callbacks: More of them.
        folder: For checkpoints; a run that stopped there resumes.
        schedule: How the learning rate goes on, see `Trainer`.
    """

    def score(module: nn.Module) -> dict[str, float]:
        assert judge is not None
        with seeded(seed, device):
            held_out, metrics = loss(module, judge)
        scores = {MONITOR: float(held_out)}
        if "action_mse" in metrics:
            scores["held_out_action_mse"] = float(metrics["action_mse"])
        return scores

    device = next(module.parameters()).device
    best = _KeepBest(module)
    judges = [] if judge is None else [Evaluation(score, max(1, min(100, updates // 10))), best]
    hooks: list[Callback] = [*judges, *callbacks]
    hooks += [Checkpoint(folder, every_updates=500, monitor=MONITOR)] if folder else []
    trainer = Trainer(
        module,
        adam(module.parameters(), lr),
        batches,
        loss,
        updates,
        fabric=make_fabric(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=precision,  # type: ignore[arg-type]
        ),
        schedule=schedule,
        grad_clip=grad_clip,
        callbacks=hooks,
    )
    with seeded(seed, device):
        if folder and (folder / "last.pt").exists():
            trainer.load(folder / "last.pt")
        module.train()
        trainer.train()
    if best.weights:
        module.load_state_dict(best.weights)
    module.eval()


class _KeepBest(Callback):
    """Remembers the weights with the lowest held-out loss, also over a resumed run."""

    def __init__(self, module: nn.Module):
        self._module = module
        self.best = float("inf")
        self.weights: Mapping[str, Tensor] = {}

    def _on_evaluation(self, scores: Mapping[str, float]) -> bool:
        if scores[MONITOR] < self.best:
            self.best, self.weights = scores[MONITOR], copy.deepcopy(self._module.state_dict())
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best loss and its weights."""
        return {"best": self.best, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict`."""
        self.best, self.weights = state["best"], state["weights"]
