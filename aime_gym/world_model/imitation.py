"""The loss of phase 2, AIME: imitation by maximising the evidence (reference, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.world_model.checks import check_observations
from aime_gym.world_model.distributions import TanhNormal
from aime_gym.world_model.model import Observations, WorldModel

ImitationMode = Literal["full", "kl_only", "reconstruction_only"]


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

    Freeze the model (all but its `idm` with `use_idm`) before the gradients of this are used.

    Args:
        model: Scores what was observed.
        batch: Observed sensors [T, B, ...]; probed ones, where there, only add to the metrics and the loss' value.
        policy: Features [B, F] -> distribution over actions.
        mode: ``"full"``, ``"kl_only"`` or ``"reconstruction_only"``.
        use_idm: Take actions from the inverse dynamics model and add their KL from the policy.
        sample: Whether actions and latents are sampled or modes and means.
        generator: Draws the noise.

    Returns:
        The loss, and its parts: scalars, and the inferred ``actions`` [T, B, A].

    Raises:
        AimeGymError: If something is missing or of a wrong shape, or the model has no `idm`.
    """
    if mode not in ("full", "kl_only", "reconstruction_only"):
        raise unknown_name("mode", mode, ("full", "kl_only", "reconstruction_only"))
    if use_idm and model.idm is None:
        raise AimeGymError("use_idm: this model has no inverse dynamics model (idm_mode: none).")
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
    objective = model.weigh_evidence(model.observed, targets, features, posterior, None, 0.0)
    reconstruction = objective.reconstruction + objective.probes
    metrics = objective.metrics | {"model_kl_loss": objective.kl.detach(), "actions": torch.stack(actions).detach()}
    loss = torch.zeros_like(objective.kl)
    if mode != "kl_only":
        loss = loss + reconstruction
    if mode != "reconstruction_only":
        loss = loss + model.config.kl_scale * objective.kl
    if use_idm:
        kl = torch.stack(action_kl).sum((0, 2)).mean()
        metrics["action_kl_loss"] = kl.detach()
        loss = loss + kl
    return loss, metrics | {"reconstruction_loss": reconstruction.detach(), "total_loss": loss.detach()}
