"""BC: behavioural cloning from true actions, the ceiling of imitation from observations."""

from __future__ import annotations

from torch import Tensor, nn

from aime_gym.agents.stacked import StackedImitator
from aime_gym.errors import AimeGymError
from aime_gym.training.batches import Batch


class BC(StackedImitator):
    """Behavioural cloning: the only imitator that reads the demonstrations' actions. See `Imitator`."""

    name = "bc"

    def check_data(self) -> None:
        """See `Imitator.check_data`; demonstrations without actions are none."""
        super().check_data()
        if self.true_actions is None:
            raise AimeGymError("BC clones true actions, which these demonstrations lack; use aime, bco or iidm.")

    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._clone(module, batch)
