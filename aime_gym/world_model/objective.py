"""The evidence as a loss: weights, balance and free nats (Zhang et al., NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_gym.world_model.config import Reweighting
from aime_gym.world_model.layers import Normal, evaluate_together


class Objective(NamedTuple):
    """The parts of a loss.

    Attributes:
        reconstruction: The negative (reweighted) log likelihood of the outputs, a scalar.
        kl: The (reweighted) KL, a scalar.
        probes: The negative log likelihood of the probed sensors, a scalar.
        metrics: Scalars for logs.
    """

    reconstruction: Tensor
    kl: Tensor
    probes: Tensor
    metrics: dict[str, Tensor]


def weigh(
    outputs: Mapping[str, Normal],
    probes: Mapping[str, Normal],
    targets: Mapping[str, Tensor],
    posterior: Normal,
    prior: Normal,
    reweight: Reweighting,
    rebalance: float | None,
    free_nats: float,
    is_padding: Tensor | None = None,
) -> Objective:
    """Sums over time and dims, averages over the batch, and weighs likelihood against KL.

    `reweight` multiplies each dim's log likelihood by its own detached std (the β-NLL of Seitzer et al., ICLR 2022) and
    the KL by the mean of those stds: over all dims (``"dim_wise"``), or over each output's dims and then over the
    outputs (``"modility_wise"``).

    Args:
        outputs: Decoded distributions [T, B, ...].
        probes: Distributions [T - 1, B, D]: the first step is left out.
        targets: What was observed, [T, B, ...].
        posterior: [T, B, S]
        prior: [T, B, S]
        reweight: How to weigh.
        rebalance: Share of the KL's gradient that trains the prior; None splits nothing.
        free_nats: A step's KL below this has no gradient.
        is_padding: Steps that do not count, [T, B] bool; None if all do.
    """
    metrics: dict[str, Tensor] = {}
    reconstruction, evidence = posterior.mean.new_zeros(()), posterior.mean.new_zeros(())
    stds: list[tuple[Tensor, int]] = []  # each output's mean std, broadcastable to [T, B], and number of dims
    for name, output in outputs.items():
        log_prob = output.log_prob(targets[name])  # [T, B, ...]
        term = _total(log_prob, is_padding)
        if reweight == "none":
            reconstruction = reconstruction - term
        else:
            weight = output.std.detach()
            part = -_total(log_prob * weight, is_padding)
            reconstruction = reconstruction + part
            stds.append((_mean_std(weight, log_prob), math.prod(log_prob.shape[2:])))
            metrics[f"{name}_reconstruction_loss"] = part.detach()
        evidence = evidence + term.detach()
        metrics[f"{name}_mse"] = mean_of_steps((output.mean.detach() - targets[name]).square(), is_padding)
        metrics[f"{name}_rec_term"] = term.detach()

    kl = _balanced_kl(posterior, prior, rebalance).sum(-1)  # [T, B]
    kl_term = -_total(kl.detach(), is_padding)
    if free_nats:
        kl = torch.where(kl < free_nats, kl.detach(), kl)
    if reweight == "dim_wise":
        kl = kl * sum(std * dims for std, dims in stds) / sum(dims for _, dims in stds)
    elif reweight == "modility_wise":
        kl = kl * sum(std for std, _ in stds) / len(stds)

    probe_loss = posterior.mean.new_zeros(())
    for name, probe in probes.items():
        part = -_total(probe.log_prob(targets[name][1:]), is_padding)
        probe_loss = probe_loss + part
        error = (probe.mean.detach() - targets[name][1:]).square()
        metrics[f"{name}_probe_mse"] = mean_of_steps(error, is_padding)
        metrics[f"{name}_probe_reconstruction_loss"] = part.detach()
    metrics |= {"rec_term": evidence, "kl_term": kl_term, "elbo": evidence + kl_term}
    return Objective(reconstruction, _total(kl, is_padding), probe_loss, metrics)


def inverse_dynamics_loss(
    idm: nn.Module | None,
    features: Tensor,
    embeddings: Tensor,
    actions: Tensor,
    detach: bool,
    is_padding: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the inverse dynamics model, which infers actions from the state before and the observation after.

    As in the original, this term is summed over the batch and averaged over time. Padding [T, B] does not count.
    """
    if idm is None:
        return features.new_zeros(()), {}
    x = torch.cat([features[:-1], embeddings[1:]], dim=-1)
    x = x.detach() if detach else x
    guess = evaluate_together({"idm": idm}, x)["idm"]
    log_prob, error = guess.log_prob(actions[1:]), (guess.mode - actions[1:]).square()
    if is_padding is None:
        loss = -log_prob.sum((1, 2)).mean()
    else:
        loss = -actions.shape[1] * mean_of_steps(log_prob.sum(-1), is_padding)
    error = mean_of_steps(error, is_padding)
    return loss, {"idm_loss": loss.detach(), "idm_mse": error.detach()}


def embedding_prediction_loss(
    heads: nn.ModuleList, features: Tensor, embeddings: Tensor, actions: Tensor, is_padding: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The ensemble of Plan2Explore (Sekar et al., ICML 2020): the next embedding from state and action.

    Padding [T, B] does not count.
    """
    if not len(heads):
        return features.new_zeros(()), {}
    x = torch.cat([features[:-1], actions[1:]], dim=-1).detach()
    target = embeddings[1:].detach()
    loss = torch.stack([mean_of_steps((head(x) - target).square(), is_padding) for head in heads]).sum()
    return loss, {"emb_prediction_loss": loss.detach()}


def without_padding(values: Tensor, is_padding: Tensor | None) -> Tensor:
    """Values with 0 where a step is padding.

    Args:
        values: One value a step, perhaps without the first ones, [T, B, ...].
        is_padding: Which of all steps are padding, [T', B] bool with T' >= T; None if none is.
    """
    if is_padding is None:
        return values
    is_padding = is_padding[len(is_padding) - len(values) :]
    return values.masked_fill(is_padding.view(*is_padding.shape, *[1] * (values.ndim - 2)), 0.0)


def mean_of_steps(values: Tensor, is_padding: Tensor | None) -> Tensor:
    """The mean over all but padding, 0 if there is nothing else; for arguments see `without_padding`."""
    if is_padding is None:
        return values.mean()
    steps = (~is_padding[len(is_padding) - len(values) :]).sum().clamp(min=1)
    return without_padding(values, is_padding).sum() / (values.shape[2:].numel() * steps)


def _total(values: Tensor, is_padding: Tensor | None) -> Tensor:
    """[T, B, ...] summed over all but the batch, then averaged."""
    return without_padding(values, is_padding).sum() / values.shape[1]


def _mean_std(std: Tensor, values: Tensor) -> Tensor:
    """The mean over dims of a std that broadcasts to `values` [T, B, ...]: of shape [T, B], or a scalar."""
    return std.flatten(2).mean(-1) if std.ndim == values.ndim else std.mean()


def _balanced_kl(posterior: Normal, prior: Normal, rebalance: float | None) -> Tensor:
    """KL(posterior ‖ prior) per dim; `rebalance` of its gradient goes to the prior."""
    if rebalance is None:
        return posterior.kl(prior)
    return rebalance * posterior.detach().kl(prior) + (1 - rebalance) * posterior.kl(prior.detach())
