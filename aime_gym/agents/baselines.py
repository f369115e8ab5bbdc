"""Imitation's baselines: each a small policy on a stack of the last observations.

- BC: behaviour cloning from true actions, the ceiling of imitation from observations.
- BCO(0): behaviour cloning from observation (Torabi et al., IJCAI 2018), without interaction after the first data. An
  inverse dynamics model of the body says which actions the demonstrations took; the policy clones them.
- IIDM: imitation through an inverse of the dynamics model (a baseline of Zhang et al., NeurIPS 2023). A forward model
  of the body says what an action leads to; the policy is trained through it to reproduce what was observed next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from aime_gym.agents.imitator import EMBEDDING, MONITOR, TRUE_ACTION, Imitator, fit
from aime_gym.data.dataset import Batch, TrajectoryDataset, WindowSampler
from aime_gym.data.trajectories import data_digest
from aime_gym.errors import AimeGymError, check_positive
from aime_gym.flags import CONTENT
from aime_gym.parallel import seeded
from aime_gym.training.callbacks import EarlyStopping, ProgressBar
from aime_gym.training.trainer import Callback, LossFunction
from aime_gym.world_model.layers import MLP
from aime_gym.world_model.model import WorldModel

PATIENCE = 50
"""Evaluations without improvement, one every 100 updates, after which the network about the body is taken."""


class StackedImitator(Imitator):
    """A deterministic policy, two layers of 128, on a stack of embeddings.

    The embedding of an observation is its sensors, standardised where the model standardises, or the model's own for
    images. The original read images by a network of its own that was trained along, split windows at random where
    here whole trajectories are held out, and trained until three epochs brought nothing.

    Args:
        model: Says what is observed; see `Imitator`.
        demonstrations: What to imitate.
        stack: Observations that the policy sees at once; by default 1 where the model's setup is ``"mdp"``, as an
            observation is the state there, and 5 elsewhere.
        **options: Options of `Imitator`. `original` clips no gradients and holds out 30%.
    """

    original_settings: ClassVar[dict[str, Any]] = {"held_out": 0.3, "grad_clip": math.inf, "precision": "32-true"}

    def __init__(
        self,
        model: WorldModel | str | Path,
        demonstrations: str | Path | None = None,
        *,
        stack: int | None = None,
        **options: Any,
    ):
        self._given_stack = None if stack is None else check_positive(stack, "stack")
        super().__init__(model, demonstrations, **options)

    @property
    def stack(self) -> int:
        """Observations that the policy sees at once."""
        return self._given_stack or (1 if self.model.config.setup == "mdp" else 5)

    def _build(self) -> nn.Module:
        size = self.stack * self._embedding_dim()
        return nn.ModuleDict({"policy": small_network(size, self.model.config.action_dim)})

    def _settings(self) -> dict[str, Any]:
        return {"stack": self.stack}

    def _prepare(self, callback: Callback | Sequence[Callback], folder: Path | None) -> None:
        """Embeds the demonstrations once."""
        assert self.demonstrations is not None
        self._embed_rows(self.demonstrations, self._embed)

    def _batches(self, part: TrajectoryDataset, batch_size: int, seed: tuple[int, ...]) -> WindowSampler:
        names = [EMBEDDING, *([TRUE_ACTION] if TRUE_ACTION in part.keys else [])]
        return WindowSampler(part, batch_size, self.stack + 1, seed, names, self.device)

    def _act(self, frames: dict[str, Tensor], state: Any, starts: Tensor, deterministic: bool) -> tuple[Tensor, Any]:
        now = self._embed(frames)[:, None]  # [N, 1, E]
        stack = now.expand(-1, self.stack, -1) if state is None else torch.cat([state[0][:, 1:], now], 1)
        stack = torch.where(starts[:, None, None], now, stack)  # an episode begins as if it had stood still
        return self._policy(cast(nn.ModuleDict, self.module)["policy"], stack), (stack,)

    def _embedding_dim(self) -> int:
        dims = self.model.config.dims
        shapes = {name: (3, 64, 64) if name == "image" else (dims[name],) for name in self.model.observed}
        frames = {name: torch.zeros(1, *shape, device=self.device) for name, shape in shapes.items()}
        return self._embed(frames).shape[-1]

    @torch.no_grad()
    def _embed(self, frames: Batch) -> Tensor:
        """[..., E] of observed sensors [..., D]."""
        if "image" in self.model.observed:
            return self.model.encode(frames)
        standardised = self.model.standardise({name: frames[name] for name in self.model.observed})
        return torch.cat([standardised[name] for name in self.model.observed], -1)

    @staticmethod
    def _policy(network: nn.Module, stack: Tensor) -> Tensor:
        """Actions [B, A] from a stack [B, stack, E], the newest observation last."""
        return network(stack.flatten(1)).tanh()

    def _clone(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error to the actions that followed the stacks."""
        stack = batch[EMBEDDING][: self.stack].transpose(0, 1)  # [B, stack, E]
        actions = self._policy(cast(nn.ModuleDict, module)["policy"], stack)
        error = (actions - batch[TRUE_ACTION][self.stack]).square().mean()
        return error, {"action_mse": error.detach()}


class BodyImitator(StackedImitator):
    """A baseline that learns what actions do from data of the body, before it sees demonstrations.

    Args:
        model: Says what is observed; see `Imitator`.
        demonstrations: What to imitate; their actions are not read.
        body_data: Folders of trajectories of the same body, with actions.
        body_updates: Gradient steps with them, at most, while the learning rate falls to 0.
        body_batch_size: Windows of them an update; `original` has 50, as many as of demonstrations.
        **options: Options of `StackedImitator`.
    """

    original_settings: ClassVar[dict[str, Any]] = {**StackedImitator.original_settings, "body_batch_size": 50}

    def __init__(
        self,
        model: WorldModel | str | Path,
        demonstrations: str | Path | None = None,
        body_data: str | Path | Sequence[str | Path] = (),
        body_updates: int = 30_000,
        body_batch_size: int = 500,
        **options: Any,
    ):
        super().__init__(model, demonstrations, **options)
        check_positive(body_batch_size, "body_batch_size")
        self.body_data = (body_data,) if isinstance(body_data, str | Path) else tuple(body_data)
        self.body_updates, self.body_batch_size = body_updates, body_batch_size

    def check_data(self) -> None:
        """Raises an `AimeGymError` as `Imitator.check_data` does, and where there are no data of the body."""
        super().check_data()
        if not self.body_data:
            raise AimeGymError(f"{type(self).__name__} learns what actions do from data of the body: pass body_data=.")

    def _flags(self) -> dict[str, Any]:
        images = "image" in self.model.observed
        content = {f"{CONTENT}{source}": data_digest(source, images) for source in self.body_data}
        own = {name: getattr(self, name) for name in ("body_data", "body_updates", "body_batch_size")}
        return {**super()._flags(), **content, **own}

    def _learn_body(
        self,
        in_dim: int,
        out_dim: int,
        loss: LossFunction,
        callback: Callback | Sequence[Callback],
        folder: Path | None,
    ) -> nn.Module:
        """A small network, learned from data of the body until held-out ones (30%) no longer improve.

        Args:
            in_dim: Size of the network's input.
            out_dim: Size of the network's output.
            loss: The loss of windows of `stack` + 1 rows with ``pre_action``.
            callback: See `Imitator.learn`; if there is a progress bar, there is one here too.
            folder: See `Imitator.learn`; the checkpoints here are in its ``body``.

        Raises:
            AimeGymError: If the data of the body cannot be read or do not fit.
        """
        config = self.model.config
        needed = [*config.observed, "pre_action"]
        dataset = TrajectoryDataset(list(self.body_data), needed, "image" in config.observed)
        if dataset.embodiment not in (None, config.embodiment):
            raise AimeGymError(f"The data of the body show {dataset.embodiment}; the model is of {config.embodiment}.")
        self._embed_rows(dataset, self._embed)
        names = [EMBEDDING, "pre_action"]
        train, held = dataset.split(0.3, self.seed)
        given = [callback] if isinstance(callback, Callback) else callback
        bars = [ProgressBar("Learning what actions do", MONITOR) for each in given if isinstance(each, ProgressBar)]
        with seeded(self.seed):
            network = small_network(in_dim, out_dim).to(self.device)
        fit(
            network,
            loss,
            WindowSampler(train, self.body_batch_size, self.stack + 1, (self.seed, 2), names, self.device),
            WindowSampler(held, 2000, self.stack + 1, (self.seed, 3), names, self.device).sample(),
            self.body_updates,
            self.lr,
            self.seed,
            self.grad_clip,
            callbacks=[EarlyStopping(PATIENCE, MONITOR), *bars],
            folder=folder and folder / "body",
            schedule="cosine",
        )
        return network.requires_grad_(False)


def small_network(in_dim: int, out_dim: int) -> MLP:
    """Two layers of 128, as in the original implementation."""
    return MLP(in_dim, out_dim, 128, 2)


class BC(StackedImitator):
    """Behavioural cloning: the only imitator that reads the demonstrations' actions. See `Imitator`.

    Examples:
        >>> from pathlib import Path
        >>> import aime_gym
        >>> aime_gym.Collect("pendulum", trajectories=2, out=Path("shown"), workers=1).run()
        Collecting shown...
        >>> clone = aime_gym.BC("pendulum-state", demonstrations="shown").learn(2)
        >>> clone.predict(clone.observation_space.sample())[0].shape
        (1,)

    Args:
        model: A world model, which says what is observed: an object, a folder or a bundled name.
        demonstrations: A folder of trajectories, or the name of a data set; not needed to act.
        stack: Observations that the policy sees at once; by default 1 where the model's setup is ``"mdp"``, else 5.
        **options: What all imitators take, see `Imitator`: ``task``, ``batch_size``, ``lr``, ``seed``, ``device``, ...

    Raises:
        AimeGymError: If the data lack what the model observes, or an option is unknown.
    """

    name = "bc"

    def check_data(self) -> None:
        """Raises an `AimeGymError` as `Imitator.check_data` does, and for demonstrations without actions."""
        super().check_data()
        if self.true_actions is None:
            raise AimeGymError("BC clones true actions, which these demonstrations lack; use aime, bco or iidm.")

    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._clone(module, batch)


class BCO(BodyImitator):
    """Behavioural cloning of the actions that an inverse dynamics model infers. See `BodyImitator`.

    The original trained both networks until three epochs brought nothing; here the inverse dynamics model stops by
    itself, and the policy has the updates that `learn` is told. See `StackedImitator` for what else differs.

    Examples:
        >>> from pathlib import Path
        >>> import aime_gym
        >>> aime_gym.Collect("pendulum", trajectories=2, out=Path("body"), workers=1).run()
        Collecting body...
        >>> imitator = aime_gym.BCO("pendulum-state", demonstrations="body", body_data="body", body_updates=2).learn(2)
        >>> imitator.predict(imitator.observation_space.sample())[0].shape
        (1,)

    Args:
        model: A world model, which says what is observed: an object, a folder or a bundled name.
        demonstrations: A folder of trajectories, or the name of a data set; their actions are not read.
        body_data: Folders of trajectories of the same body, with actions.
        body_updates: Gradient steps with them, at most, while the learning rate falls to 0.
        body_batch_size: Windows of them an update; `original` has 50.
        **options: ``stack`` of `StackedImitator`, and what all imitators take, see `Imitator`.

    Raises:
        AimeGymError: If the data lack what the model observes, or an option is unknown.
    """

    name = "bco"

    def _prepare(self, callback: Callback | Sequence[Callback], folder: Path | None) -> None:
        """Learns the inverse dynamics of the body and labels the demonstrations."""
        super()._prepare(callback, folder)
        assert self.demonstrations is not None
        size = (self.stack + 1) * self._embedding_dim()
        inverse = self._learn_body(size, self.model.config.action_dim, self._inverse_loss, callback, folder)
        self.demonstrations.arrays["label"] = self._label(inverse)

    def _batches(self, part: TrajectoryDataset, batch_size: int, seed: tuple[int, ...]) -> WindowSampler:
        sampler = super()._batches(part, batch_size, seed)
        return WindowSampler(part, batch_size, self.stack + 1, seed, [*sampler.names, "label"], self.device)

    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        error, _ = self._clone(module, {**batch, TRUE_ACTION: batch["label"]})
        if TRUE_ACTION not in batch:
            return error, {}
        return error, {"action_mse": (batch["label"][self.stack] - batch[TRUE_ACTION][self.stack]).square().mean()}

    def _inverse_loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        guess = network(batch[EMBEDDING].transpose(0, 1).flatten(1)).tanh()  # [B, A], between the last two
        return (guess - batch["pre_action"][self.stack]).square().mean(), {}

    @torch.no_grad()
    def _label(self, inverse: nn.Module) -> np.ndarray:
        """The actions behind all demonstrations, [R, A] for their R rows; zeros before the first full stack of each."""
        assert self.demonstrations is not None
        labels = np.zeros((int(self.demonstrations.bounds[-1, 1]), self.model.config.action_dim), np.float32)
        for begin, end in self.demonstrations.bounds:
            if end - begin <= self.stack:
                continue  # no window of training fits in
            rows = torch.from_numpy(self.demonstrations.arrays[EMBEDDING][begin:end]).to(self.device)  # [R, E]
            windows = rows.unfold(0, self.stack + 1, 1).transpose(1, 2)  # [R - stack, stack + 1, E]
            labels[begin + self.stack : end] = inverse(windows.flatten(1)).tanh().cpu().numpy()
        return labels


class IIDM(BodyImitator):
    """A policy whose actions lead, according to a forward model, to the next observation. See `BodyImitator`.

    The forward model is one network for the change of all sensors. The original had one for each sensor, which gave
    the next value itself, and decoded images. See `StackedImitator` for what else differs.

    Examples:
        >>> from pathlib import Path
        >>> import aime_gym
        >>> aime_gym.Collect("pendulum", trajectories=2, out=Path("body"), workers=1).run()
        Collecting body...
        >>> imitator = aime_gym.IIDM("pendulum-state", demonstrations="body", body_data="body", body_updates=2).learn(2)
        >>> imitator.predict(imitator.observation_space.sample())[0].shape
        (1,)

    Args:
        model: A world model, which says what is observed: an object, a folder or a bundled name.
        demonstrations: A folder of trajectories, or the name of a data set; their actions are not read.
        body_data: Folders of trajectories of the same body, with actions.
        body_updates: Gradient steps with them, at most, while the learning rate falls to 0.
        body_batch_size: Windows of them an update; `original` has 50.
        **options: ``stack`` of `StackedImitator`, and what all imitators take, see `Imitator`.

    Raises:
        AimeGymError: If the data lack what the model observes, or an option is unknown.
    """

    name = "iidm"
    _forward_model: nn.Module

    def _prepare(self, callback: Callback | Sequence[Callback], folder: Path | None) -> None:
        """Learns the dynamics of the body."""
        super()._prepare(callback, folder)
        size = self._embedding_dim()
        sizes = (self.stack * size + self.model.config.action_dim, size)
        self._forward_model = self._learn_body(*sizes, self._forward_loss, callback, folder)

    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = batch[EMBEDDING]
        stack = embeddings[: self.stack].transpose(0, 1)  # [B, stack, E]
        actions = self._policy(cast(nn.ModuleDict, module)["policy"], stack)
        error = (self._predict_next(self._forward_model, stack, actions) - embeddings[self.stack]).square().mean()
        if TRUE_ACTION not in batch:
            return error, {}
        return error, {"action_mse": (actions.detach() - batch[TRUE_ACTION][self.stack]).square().mean()}

    def _forward_loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = batch[EMBEDDING]
        stack = embeddings[: self.stack].transpose(0, 1)
        guess = self._predict_next(network, stack, batch["pre_action"][self.stack])
        return (guess - embeddings[self.stack]).square().mean(), {}

    @staticmethod
    def _predict_next(network: nn.Module, stack: Tensor, actions: Tensor) -> Tensor:
        """The next embedding [B, E], as a change of the newest one."""
        return stack[:, -1] + network(torch.cat([stack.flatten(1), actions], 1))
