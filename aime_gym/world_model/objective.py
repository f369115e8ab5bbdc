"""What the evidence is made of: distributions, and the loss with its weights, balance and free nats.

Distributions are factorised over the last dimension. The loss is that of Zhang et al., NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aime_gym.errors import AimeGymError
from aime_gym.world_model.config import Reweighting
from aime_gym.world_model.packed import evaluate_together

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)

_ACTION_LIMIT = 0.999
"""`TanhNormal.log_prob` clamps actions to ± this, where the inverse of tanh is still of moderate size."""

_UNIFORM_STD = 0.8742
"""The standard deviation of a normal whose tanh is nearly uniform."""

_EPSILON, _SMALLEST = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


class Normal(NamedTuple):
    """Independent normals.

    Attributes:
        mean: [..., D]
        std: Its shape broadcasts to that of the mean.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor | None) -> Tensor:
        """The reparameterised sample for standard-normal noise [..., D]; the mean for None."""
        return self.mean if noise is None else torch.addcmul(self.mean, self.std, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density per dim: [..., D] -> [..., D]."""
        return self._log_prob(value, -_HALF_LOG_TWO_PI)

    def _log_prob(self, value: Tensor, constant: float) -> Tensor:
        """In few operations, as images are large."""
        errors = (value - self.mean).square()
        return torch.addcdiv(constant - self.std.log(), errors, self.std.square(), value=-0.5)

    def detach(self) -> Normal:
        """The same distribution, without gradients."""
        return Normal(self.mean.detach(), self.std.detach())

    def kl(self, other: Normal) -> Tensor:
        """KL(self ‖ other) per dim, [..., D]."""
        ratio = self.std / other.std
        distance = (self.mean - other.mean) / other.std
        return 0.5 * (ratio.square() + distance.square() - 1) - ratio.log()


class UnscaledNormal(Normal):
    """Independent normals whose log densities lack the constant, as those of AIME-v2's outputs do."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density per dim plus log(2 pi) / 2: [..., D] -> [..., D]."""
        return self._log_prob(value, 0.0)


class TanhNormal(NamedTuple):
    """The tanh of a normal: actions in (-1, 1).

    Attributes:
        base: The normal before the tanh.
    """

    base: Normal

    @property
    def mode(self) -> Tensor:
        """Tanh of the base's mean, [..., D]: what is called the mode of a policy."""
        return self.base.mean.tanh()

    def sample(self, noise: Tensor | None) -> Tensor:
        """The reparameterised sample for standard-normal noise [..., D]; the mode for None."""
        return self.base.sample(noise).tanh()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log density per dim of actions clamped to ±0.999: [..., D] -> [..., D]."""
        value = action.clamp(-_ACTION_LIMIT, _ACTION_LIMIT).atanh()
        log_slope = 2 * (math.log(2) - value - F.softplus(-2 * value))
        return self.base.log_prob(value) - log_slope

    def kl(self, other: TanhNormal) -> Tensor:
        """KL(self ‖ other) per dim, [..., D]: that of the bases."""
        return self.base.kl(other.base)

    @property
    def entropy(self) -> Tensor:
        """How far the base is from what makes actions nearly uniform: minus KL(base ‖ N(0, 0.8742)), [..., D]."""
        return -self.base.kl(Normal(torch.zeros_like(self.base.mean), self.base.std.new_tensor(_UNIFORM_STD)))


class OneHot(NamedTuple):
    """Groups of one-hot vectors side by side (Hafner et al., ICLR 2021).

    Attributes:
        logits: [..., G, C], of C classes in each of G groups.
    """

    logits: Tensor

    def sample(self, noise: Tensor | None) -> Tensor:
        """One-hot vectors side by side, [..., G * C], whose gradient is that of the probabilities.

        Args:
            noise: Standard-normal [..., G * C], which becomes Gumbel noise; None for the most likely classes.
        """
        scores = self.logits
        if noise is not None:
            uniform = torch.special.ndtr(noise.unflatten(-1, scores.shape[-2:])).clamp(_SMALLEST, 1 - _EPSILON / 2)
            scores = scores - (-uniform.log()).log()
        chosen = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
        if self.logits.requires_grad:
            probabilities = self.logits.softmax(-1)
            chosen = chosen + (probabilities - probabilities.detach())
        return chosen.flatten(-2)

    def detach(self) -> OneHot:
        """The same distribution, without gradients."""
        return OneHot(self.logits.detach())

    def kl(self, other: OneHot) -> Tensor:
        """KL(self ‖ other) per group, [..., G]."""
        own, theirs = self.logits.softmax(-1), other.logits.softmax(-1)
        return (own * (_log_of(own) - _log_of(theirs))).sum(-1)


class Latent(Protocol):
    """What a latent is drawn from: a `Normal` or a `OneHot`."""

    def sample(self, noise: Tensor | None) -> Tensor:
        """The latent for standard-normal noise [..., S], or the one without any, [..., S]."""

    def detach(self) -> Latent:
        """The same distribution, without gradients."""

    def kl(self, other: Any) -> Tensor:
        """KL(self ‖ other), [..., S] or [..., G]."""


class Bernoulli(NamedTuple):
    """Independent events.

    Attributes:
        mean: Their probabilities, [..., D].
    """

    mean: Tensor

    @property
    def std(self) -> Tensor:
        """Their standard deviations, [..., D]."""
        return (self.mean * (1 - self.mean)).sqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log likelihood per dim of events that are 0 or 1: [..., D] -> [..., D]."""
        return value * _log_of(self.mean) + (1 - value) * _log_of(1 - self.mean)


def _log_of(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(_EPSILON, 1 - _EPSILON).log()


class EvidenceBound(NamedTuple):
    """The evidence lower bound and its parts; densities are those of sensors as the networks see them.

    Models of AIME-v2 leave the constant of normal densities out, log(2 pi) / 2 a number.

    Attributes:
        elbo: [B], summed over time.
        per_step: [T, B]; the sum of all log likelihoods minus the KL.
        log_likelihood: Output -> log p(o_t | f_t), [T, B].
        kl: KL(posterior ‖ prior), [T, B].
    """

    elbo: Tensor
    per_step: Tensor
    log_likelihood: dict[str, Tensor]
    kl: Tensor


class Objective(NamedTuple):
    """The parts of a loss.

    Attributes:
        reconstruction: The negative (reweighted) log likelihood of the outputs, [T, B].
        kl: The (reweighted) KL, [T, B].
        probes: The negative log likelihood of the probed sensors, a scalar.
        metrics: Scalars for logs.
    """

    reconstruction: Tensor
    kl: Tensor
    probes: Tensor
    metrics: dict[str, Tensor]


class Counted(NamedTuple):
    """What of a batch counts.

    Attributes:
        is_padding: Steps that do not, [T, B] bool; None if all do.
        is_over: Steps after a terminal one, whose likelihood and KL do not, [T, B] bool; None if all do.
        masks: Output -> by what its log likelihoods are multiplied, [T, B] or [T, B, 1].
    """

    is_padding: Tensor | None = None
    is_over: Tensor | None = None
    masks: Mapping[str, Tensor] = MappingProxyType({})

    def kept(self, steps: Tensor) -> Tensor:
        """Values of steps [T, B], 0 where their likelihood and KL do not count."""
        return without_padding(without_padding(steps, self.is_padding), self.is_over)


EVERYTHING = Counted()


def with_flags(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The batch with ``is_first`` and ``is_terminal``, where it has them, as numbers [T, B, 1].

    Raises:
        AimeGymError: If one is no tensor [T, B] or [T, B, 1].
    """
    if not isinstance(batch, Mapping):
        return batch  # which `check_observations` refuses
    flags = {name: batch[name] for name in ("is_first", "is_terminal") if name in batch}
    for name, flag in flags.items():
        if not isinstance(flag, Tensor) or flag.ndim not in (2, 3) or flag.shape[2:].numel() != 1:
            got = list(flag.shape) if isinstance(flag, Tensor) else type(flag).__name__
            raise AimeGymError(f"{name}: expected a tensor of shape [T, B] or [T, B, 1], got {got}.")
    return {**batch, **{name: flag.float().reshape(*flag.shape[:2], 1) for name, flag in flags.items()}}


def over_after(is_terminal: Tensor) -> Tensor:
    """Steps after the first terminal one: events [T, B, 1] -> [T, B] bool."""
    ended = is_terminal[..., 0] > 0.5
    return (ended.cumsum(0) - ended.long()) > 0


def weigh(
    outputs: Mapping[str, Any],
    probes: Mapping[str, Normal],
    targets: Mapping[str, Tensor],
    posterior: Latent,
    prior: Latent,
    reweight: Reweighting,
    rebalance: float | None,
    free_nats: float,
    counted: Counted = EVERYTHING,
    action_kl: Tensor | None = None,
) -> Objective:
    """Weighs likelihood against KL, step by step; metrics are summed over time and averaged over the batch.

    `reweight` multiplies each dim's log likelihood by its own detached std (the β-NLL of Seitzer et al., ICLR 2022) and
    the KL by the mean of those stds: over all dims (``"dim_wise"``), or over each output's dims and then over the
    outputs (``"modility_wise"``).

    Args:
        outputs: Decoded distributions [T, B, ...], each with ``log_prob``, ``mean`` and ``std``.
        probes: Distributions [T - 1, B, D]: the first step is left out.
        targets: What was observed, [T, B, ...].
        posterior: [T, B, S]
        prior: [T, B, S]
        reweight: How to weigh.
        rebalance: Share of the KL's gradient that trains the prior; None splits nothing.
        free_nats: A step's KL below this has no gradient.
        counted: Which steps count.
        action_kl: What a step's actions add to its KL, [T, B], before it is reweighted.
    """
    metrics: dict[str, Tensor] = {}
    is_padding = counted.is_padding
    kl = _balanced_kl(posterior, prior, rebalance).sum(-1)  # [T, B]
    evidence, reconstruction = kl.new_zeros(()), torch.zeros_like(kl)
    stds: list[tuple[Tensor, int]] = []  # each output's mean std, broadcastable to [T, B], and number of dims
    for name, output in outputs.items():
        log_prob = output.log_prob(targets[name])  # [T, B, ...]
        if name in counted.masks:
            log_prob = log_prob * counted.masks[name].reshape(*kl.shape, *[1] * (log_prob.ndim - 2))
        term = total(log_prob.detach(), is_padding)
        if reweight != "none":
            weight = output.std.detach()
            log_prob = log_prob * weight
            stds.append((_mean_std(weight, log_prob), math.prod(log_prob.shape[2:])))
        part = -log_prob.flatten(2).sum(-1)  # [T, B]
        reconstruction = reconstruction + part
        evidence = evidence + term
        metrics[f"{name}_reconstruction_loss"] = total(part.detach(), is_padding)
        metrics[f"{name}_mse"] = _mean_squared_error(output.mean.detach(), targets[name], is_padding)
        metrics[f"{name}_rec_term"] = term

    kl_term = -total(kl.detach(), is_padding)
    if free_nats:
        kl = torch.where(kl < free_nats, kl.detach(), kl)
    if action_kl is not None:
        kl = kl + action_kl
    if reweight == "dim_wise":
        kl = kl * sum(std * dims for std, dims in stds) / sum(dims for _, dims in stds)
    elif reweight == "modility_wise":
        kl = kl * sum(std for std, _ in stds) / len(stds)

    probe_loss = kl.new_zeros(())
    for name, probe in probes.items():
        part = -total(probe.log_prob(targets[name][1:]), is_padding)
        probe_loss = probe_loss + part
        metrics[f"{name}_probe_mse"] = _mean_squared_error(probe.mean.detach(), targets[name][1:], is_padding)
        metrics[f"{name}_probe_reconstruction_loss"] = part.detach()
    metrics |= {"rec_term": evidence, "kl_term": kl_term, "elbo": evidence + kl_term}
    return Objective(counted.kept(reconstruction), counted.kept(kl), probe_loss, metrics)


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
    metrics = {"idm_loss": loss.detach()}
    if actions.shape[-1]:  # a likelihood model infers none
        metrics["idm_mse"] = mean_of_steps(error, is_padding).detach()
    return loss, metrics


def embedding_prediction_loss(
    predict: Callable[[Tensor], Tensor] | None,
    features: Tensor,
    embeddings: Tensor,
    actions: Tensor,
    average: bool,
    is_padding: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The ensemble of Plan2Explore (Sekar et al., ICML 2020): the next embedding from state and action.

    The members' errors are summed, or averaged. Padding [T, B] does not count.
    """
    if predict is None:
        return features.new_zeros(()), {}
    x = torch.cat([features[:-1], actions[1:]], dim=-1).detach()
    errors = (predict(x) - embeddings[1:].detach()).square()  # [K, T - 1, B, E]
    loss = torch.stack([mean_of_steps(error, is_padding) for error in errors]).sum()
    loss = loss / len(errors) if average else loss
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


def total(values: Tensor, is_padding: Tensor | None = None) -> Tensor:
    """[T, B, ...] summed over all but the batch, then averaged, without padding."""
    return without_padding(values, is_padding).sum() / values.shape[1]


def _mean_squared_error(mean: Tensor, target: Tensor, is_padding: Tensor | None) -> Tensor:
    """For arguments see `without_padding`."""
    if is_padding is None:
        return F.mse_loss(mean, target)
    return mean_of_steps((mean - target).square(), is_padding)


def _mean_std(std: Tensor, values: Tensor) -> Tensor:
    """The mean over dims of a std that broadcasts to `values` [T, B, ...]: of shape [T, B], or a scalar."""
    return std.flatten(2).mean(-1) if std.ndim == values.ndim else std.mean()


def _balanced_kl(posterior: Latent, prior: Latent, rebalance: float | None) -> Tensor:
    """KL(posterior ‖ prior) per dim; `rebalance` of its gradient goes to the prior."""
    if rebalance is None:
        return posterior.kl(prior)
    return rebalance * posterior.detach().kl(prior) + (1 - rebalance) * posterior.kl(prior.detach())
