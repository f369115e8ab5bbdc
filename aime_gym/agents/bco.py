"""BCO(0): behavioural cloning from observation (Torabi et al., IJCAI 2018), without interaction after the first data.

An inverse dynamics model of the body says which actions the demonstrations took; the policy clones them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from aime_gym.agents.imitator import TRUE_ACTION
from aime_gym.agents.stacked import BodyImitator
from aime_gym.data.trajectories import TrajectoryDataset
from aime_gym.training.batches import Batch, WindowSampler, to_tensors
from aime_gym.training.callbacks import Callback


class BCO(BodyImitator):
    """Behavioural cloning of the actions that an inverse dynamics model infers. See `BodyImitator`.

    The original trained both networks until three epochs brought nothing; here the inverse dynamics model stops by
    itself, and the policy has the updates that `learn` is told. See `StackedImitator` for what else differs.
    """

    name = "bco"

    def _prepare(self, callback: Callback | Sequence[Callback], folder: Path | None) -> None:
        """Learns the inverse dynamics of the body and labels the demonstrations."""
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
        guess = network(self._embed(batch).transpose(0, 1).flatten(1)).tanh()  # [B, A], between the last two
        return (guess - batch["pre_action"][self.stack]).square().mean(), {}

    @torch.no_grad()
    def _label(self, inverse: nn.Module) -> np.ndarray:
        """The actions behind all demonstrations, [R, A] for their R rows; zeros before the first full stack of each."""
        assert self.demonstrations is not None
        labels = np.zeros((int(self.demonstrations.bounds[-1, 1]), self.model.config.action_dim), np.float32)
        for begin, end in self.demonstrations.bounds:
            if end - begin <= self.stack:
                continue  # no window of training fits in
            rows = {name: self.demonstrations.arrays[name][begin:end] for name in self.model.observed}
            embeddings = self._embed(to_tensors(rows, self.device))  # [R, E]
            windows = embeddings.unfold(0, self.stack + 1, 1).transpose(1, 2)  # [R - stack, stack + 1, E]
            labels[begin + self.stack : end] = inverse(windows.flatten(1)).tanh().cpu().numpy()
        return labels
