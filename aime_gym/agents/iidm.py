"""IIDM: imitation through an inverse of the dynamics model (a baseline of Zhang et al., NeurIPS 2023).

A forward model of the body says what an action leads to; the policy is trained through it to reproduce what was
observed next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from aime_gym.agents.imitator import TRUE_ACTION
from aime_gym.agents.stacked import BodyImitator
from aime_gym.training.batches import Batch
from aime_gym.training.callbacks import Callback


class IIDM(BodyImitator):
    """A policy whose actions lead, according to a forward model, to the next observation. See `BodyImitator`.

    The forward model is one network for the change of all sensors. The original had one for each sensor, which gave
    the next value itself, and decoded images. See `StackedImitator` for what else differs.
    """

    name = "iidm"
    _forward_model: nn.Module

    def _prepare(self, callback: Callback | Sequence[Callback], folder: Path | None) -> None:
        """Learns the dynamics of the body."""
        size = self._embedding_dim()
        sizes = (self.stack * size + self.model.config.action_dim, size)
        self._forward_model = self._learn_body(*sizes, self._forward_loss, callback, folder)

    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = self._embed(batch)
        stack = embeddings[: self.stack].transpose(0, 1)  # [B, stack, E]
        actions = self._policy(cast(nn.ModuleDict, module)["policy"], stack)
        error = (self._predict_next(self._forward_model, stack, actions) - embeddings[self.stack]).square().mean()
        if TRUE_ACTION not in batch:
            return error, {}
        return error, {"action_mse": (actions.detach() - batch[TRUE_ACTION][self.stack]).square().mean()}

    def _forward_loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = self._embed(batch)
        stack = embeddings[: self.stack].transpose(0, 1)
        guess = self._predict_next(network, stack, batch["pre_action"][self.stack])
        return (guess - embeddings[self.stack]).square().mean(), {}

    @staticmethod
    def _predict_next(network: nn.Module, stack: Tensor, actions: Tensor) -> Tensor:
        """The next embedding [B, E], as a change of the newest one."""
        return stack[:, -1] + network(torch.cat([stack.flatten(1), actions], 1))
