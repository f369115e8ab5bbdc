"""BC: behavioural cloning from true actions, the ceiling of imitation from observations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from torch import Tensor, nn

from aime_gym.agents.stacked import StackedImitator
from aime_gym.errors import AimeGymError
from aime_gym.training.batches import Batch
from aime_gym.training.callbacks import Callback


class BC(StackedImitator):
    """Behavioural cloning: the only imitator that reads the demonstrations' actions. See `Imitator`."""

    name = "bc"

    def learn(
        self, total_updates: int, callback: Callback | Sequence[Callback] = (), folder: Path | None = None
    ) -> Self:
        """See `Imitator.learn`.

        Raises:
            AimeGymError: If the demonstrations have no actions.
        """
        if self.demonstrations is not None and self.true_actions is None:
            raise AimeGymError("BC clones true actions, which these demonstrations lack; use aime, bco or iidm.")
        return super().learn(total_updates, callback, folder)

    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._clone(module, batch)
