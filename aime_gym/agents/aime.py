"""AIME: imitation from observations alone, by maximising the evidence that a world model gives them.

Zhang et al., "Action Inference by Maximising Evidence: Zero-Shot Imitation from Observation with World Models",
NeurIPS 2023, phase 2. The model is frozen. At every step of a demonstration the policy samples an action from the state
before, the model takes a posterior step with it on what was observed, and the policy is trained, through the model, to
make the demonstration likely.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from aime_gym.agents.imitator import TRUE_ACTION, Imitator
from aime_gym.data.trajectories import TrajectoryDataset
from aime_gym.errors import check_positive
from aime_gym.training.batches import Batch, WindowSampler
from aime_gym.world_model.config import policy_config
from aime_gym.world_model.imitation import ImitationMode, check_imitation, imitation_loss
from aime_gym.world_model.layers import TanhGaussianPolicy
from aime_gym.world_model.model import WorldModel

AT_START = 0.2
"""Share of windows that begin with a demonstration: an agent that cannot begin never comes to what follows."""


class AIME(Imitator):
    """Action Inference by Maximising Evidence.

    Args:
        model: A loaded world model, a folder or a bundled name, of any setup; its weights stay as they are.
        demonstrations: A folder of trajectories or a bundled name; their actions are not read for learning.
        mode: ``"full"`` for the whole evidence, ``"kl_only"`` or ``"reconstruction_only"`` for one of its parts.
        use_idm: Take actions from the model's inverse dynamics model, which stays as it is, and pull the policy towards
            them; the policy learns from that pull alone.
        hidden_size: Of the policy.
        hidden_layers: Of the policy.
        batch_size: Windows an update, B.
        lr: Adam's learning rate.
        **options: Of `Imitator`: ``horizon``, ``held_out``, ``precision``, ``seed``.

    Raises:
        AimeGymError: If the model or the demonstrations do not fit, or `use_idm` is asked of a model without one or
            together with ``"reconstruction_only"``, where nothing would be learned.
    """

    name = "aime"

    def __init__(
        self,
        model: WorldModel | str | Path,
        demonstrations: str | Path | None = None,
        *,
        mode: ImitationMode = "full",
        use_idm: bool = False,
        hidden_size: int = 128,
        hidden_layers: int = 2,
        batch_size: int = 32,
        lr: float = 5e-4,
        **options: Any,
    ):
        check_positive(hidden_size, "hidden_size")
        self.mode, self.use_idm = mode, use_idm
        self._sizes = hidden_size, hidden_layers
        super().__init__(model, demonstrations, batch_size=batch_size, lr=lr, **options)

    def _build(self) -> nn.Module:
        check_imitation(self.model, self.mode, self.use_idm)
        config = self.model.config
        # A copy: the model itself is shared with others, who may train it.
        self._frozen = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._frozen.heads = None
        policy = TanhGaussianPolicy(config.feature_dim, config.action_dim, policy_config(*self._sizes))
        return nn.ModuleDict({"policy": policy})

    def _settings(self) -> dict[str, Any]:
        size, layers = self._sizes
        return {"mode": self.mode, "use_idm": self.use_idm, "hidden_size": size, "hidden_layers": layers}

    def _batches(self, part: TrajectoryDataset, batch_size: int, seed: tuple[int, ...]) -> WindowSampler:
        names = [*self.model.observed, *([TRUE_ACTION] if TRUE_ACTION in part.keys else [])]
        return WindowSampler(part, batch_size, self.horizon, seed, names, at_start=AT_START)

    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = cast(nn.ModuleDict, module)["policy"]
        truth = batch.get(TRUE_ACTION)
        observed = {name: batch[name] for name in self.model.observed}
        loss, metrics = imitation_loss(self._frozen, observed, policy, self.mode, self.use_idm)
        inferred = metrics.pop("actions")  # [T, B, A]
        if truth is not None:
            metrics["action_mse"] = (inferred[1:] - truth[1:]).square().mean()
        return loss, metrics

    def infer_actions(self, observations: dict[str, Tensor]) -> Tensor:
        """The actions behind a sequence of observations [T, B, ...] according to the policy: [T, B, A]."""
        policy = cast(nn.ModuleDict, self.module)["policy"]
        with torch.no_grad():
            metrics = imitation_loss(self._frozen, observations, policy, self.mode, self.use_idm, sample=False)[1]
        return metrics["actions"]

    def _act(
        self, frames: dict[str, Tensor], state: Any, starts: Tensor, deterministic: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config, size = self.model.config, len(starts)
        if state is None:
            latent, action = self.model.initial_state(size), torch.zeros(size, config.action_dim)
        else:
            latent, action = state
        latent = torch.where(starts[:, None], self.model.initial_state(size), latent)
        action = torch.where(starts[:, None], 0.0, action)  # [N, A], the one that led here
        noise = None if deterministic else torch.randn(size, config.stochastic_dim)
        latent = self.model.posterior_step(latent, action, self.model.encode(frames), noise)  # [N, F]
        distribution = cast(nn.ModuleDict, self.module)["policy"](latent)
        action = distribution.sample(None if deterministic else torch.randn(size, config.action_dim))
        return action, (latent, action)
