"""The loss of phase 2, AIME: imitation by maximising the evidence (reference, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.world_model.checks import check_observations
from aime_gym.world_model.distributions import TanhNormal
from aime_gym.world_model.model import Observations, WorldModel
from aime_gym.world_model.objective import without_padding

ImitationMode = Literal["full", "kl_only", "reconstruction_only"]


def check_imitation(model: WorldModel, mode: ImitationMode, use_idm: bool) -> None:
    """Raises an `AimeGymError` for an unknown mode, and for guidance that a model or a mode does not have."""
    if mode not in (modes := get_args(ImitationMode)):
        raise unknown_name("mode", mode, modes)
    if use_idm and model.idm is None:
        raise AimeGymError(
            "use_idm needs a model with an inverse dynamics model, and this one has none (idm_mode: none); "
            "`aime-gym train --idm-mode detach` trains one."
        )
    if use_idm and mode == "reconstruction_only":
        raise AimeGymError(
            "use_idm with mode 'reconstruction_only' leaves nothing to learn: guided by the inverse dynamics model, "
            "the policy learns from the actions' KL alone. Choose mode 'full' or 'kl_only'."
        )


def imitation_loss(
    model: WorldModel,
    batch: Observations,
    policy: Callable[[Tensor], TanhNormal],
    mode: ImitationMode = "full",
    use_idm: bool = False,
    sample: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of phase 2, AIME: the negative evidence under actions of a policy (reference, section 3).

    The KL keeps the model's `kl_rebalance`, which does not change its value but its gradient; there are no free nats.
    Freeze the model, its `idm` included, before the gradients of this are used.

    Args:
        model: Scores what was observed.
        batch: Observed sensors [T, B, ...]; probed ones, where there, only add to the metrics and the loss' value. With
            ``"is_padding"`` [T, B] bool if some steps do not count.
        policy: Features [B, F] -> distribution over actions.
        mode: ``"full"``, ``"kl_only"`` (without the reconstruction) or ``"reconstruction_only"`` (without the KL).
        use_idm: Take actions from the inverse dynamics model and add `kl_scale` times their KL from the policy, which
            then learns from that KL alone: the rest of the loss does not depend on it.
        sample: Whether actions and latents are sampled or modes and means.
        generator: Draws the noise.

    Returns:
        The loss, and its parts: scalars, and the inferred ``actions`` [T, B, A].

    Raises:
        AimeGymError: If something is missing or of a wrong shape, or `check_imitation` refuses the arguments.
    """
    check_imitation(model, mode, use_idm)
    names = (*model.observed, *(name for name in model.probed if name in batch))
    check_observations(model.config, batch, names)
    steps, size = batch[model.observed[0]].shape[:2]
    targets = model.standardise({name: batch[name] for name in names})
    embeddings = model.embed(targets)
    noise = model.draw_noise(steps, size, sample, generator)
    action_noise = model.draw_noise(steps, size, sample, generator, model.config.action_dim)
    actions, action_kl = [], []

    def act(t: int, state: Tensor) -> Tensor:
        distribution = policy(state)
        if use_idm:
            assert model.idm is not None
            guess = model.idm(torch.cat([state, embeddings[t]], dim=-1))
            action_kl.append(guess.kl(distribution))
            distribution = guess
        actions.append(distribution.sample(None if action_noise is None else action_noise[t]))
        return actions[-1]

    features, posterior = model.cell.unroll(model.initial_state(size), act, embeddings, noise, steps)
    is_padding = batch.get("is_padding")
    objective = model.weigh_evidence(model.observed, targets, features, posterior, 0.0, is_padding)
    reconstruction, kl = objective.reconstruction + objective.probes, objective.kl
    metrics = objective.metrics | {"model_kl_loss": kl.detach(), "actions": torch.stack(actions).detach()}
    if use_idm:
        guidance = without_padding(torch.stack(action_kl), is_padding).sum((0, 2)).mean()
        metrics["action_kl_loss"] = guidance.detach()
        kl = kl + guidance
    loss = torch.zeros_like(kl)
    if mode != "kl_only":
        loss = loss + reconstruction
    if mode != "reconstruction_only":
        loss = loss + model.config.kl_scale * kl
    return loss, metrics | {"reconstruction_loss": reconstruction.detach(), "total_loss": loss.detach()}
