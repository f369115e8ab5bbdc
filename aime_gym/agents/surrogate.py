"""What AIME learns from where it acts: surrogate rewards, imagination, and what both make of policies and values.

The sums are those of AIME-v2 and AIME-NoB (Zhang et al., arXiv 2404.18896). A surrogate reward says how much what is
seen looks like the demonstrations: ``"ail"`` by a discriminator of embeddings (adversarial imitation), ``"viper"`` by
the evidence under a model that has seen nothing but demonstrations (Escontrela et al., NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aime_gym.agents.aime import imitation_loss
from aime_gym.world_model.model import Observations, WorldModel
from aime_gym.world_model.objective import TanhNormal

GAMMA, LAMBDA = 0.99, 0.95
"""The discount, and the share of longer returns in the mixture of them."""

ENTROPY = 1e-4
"""The weight of a policy's entropy."""

PENALTY = 10.0
"""The weight of a discriminator's gradient penalty (Gulrajani et al., NeurIPS 2017)."""


class Imagined(NamedTuple):
    """Futures that a model imagines under a policy.

    Attributes:
        features: From the states where they begin, [H + 1, N, F].
        actions: [H, N, A]
        entropy: The policy's, see `TanhNormal.entropy`, [H, N, A].
        log_prob: The log densities of the actions, [H, N, A].
        rewards: What the model decodes of each state, [H + 1, N]; zeros if it decodes none.
        ends: The probability that the episode has ended there, [H + 1, N]; zeros if the model knows of no end.
    """

    features: Tensor
    actions: Tensor
    entropy: Tensor
    log_prob: Tensor
    rewards: Tensor
    ends: Tensor


class Returns(NamedTuple):
    """What imagined futures are worth.

    Attributes:
        values: Of the states, by the target network, [H + 1, N].
        returns: The lambda-returns of all states but the last, [H, N].
        weights: The probability that the episode has gone on until there, discounted, [H, N].
    """

    values: Tensor
    returns: Tensor
    weights: Tensor


def imagine(
    model: WorldModel,
    policy: Callable[[Tensor], TanhNormal],
    states: Tensor,
    horizon: int,
    sample: bool = True,
    generator: torch.Generator | None = None,
) -> Imagined:
    """Goes on from states as a policy acts, which sees features without gradients.

    Gradients lead back to the policy through its actions, the dynamics, and what is decoded.

    Args:
        model: What imagines.
        policy: Features [N, F] -> distribution over actions.
        states: Where futures begin, [N, F].
        horizon: H
        sample: Whether actions and latents are sampled, or modes and means.
        generator: Draws the noise.
    """
    noise = model.draw_noise(horizon, len(states), sample, generator)
    action_noise = model.draw_noise(horizon, len(states), sample, generator, model.config.action_dim)
    distributions, actions = [], []

    def act(t: int, state: Tensor) -> Tensor:
        distributions.append(policy(state.detach()))
        actions.append(distributions[-1].sample(None if action_noise is None else action_noise[t]))
        return actions[-1]

    following, _ = model.cell.unroll(states, act, None, noise, horizon)
    features = torch.cat([states[None], following])
    zeros = features.new_zeros(features.shape[:2])
    reward = (
        model.decode(features, [model.config.reward])[model.config.reward][..., 0] if model.config.use_reward else zeros
    )
    logits = None if model.termination is None else model.termination(features)[..., 0]
    return Imagined(
        features,
        torch.stack(actions),
        torch.stack([each.entropy for each in distributions]),
        torch.stack([each.log_prob(action) for each, action in zip(distributions, actions, strict=True)]),
        reward,
        zeros if logits is None else logits.sigmoid(),
    )


def judge(imagined: Imagined, target: nn.Module, gamma: float = GAMMA, mixture: float = LAMBDA) -> Returns:
    """The lambda-returns of imagined futures.

    Args:
        imagined: The futures.
        target: Features [..., F] -> values [..., 1].
        gamma: The discount of a step.
        mixture: Lambda.
    """
    values = target(imagined.features)[..., 0]
    discounts = gamma * (1 - imagined.ends)
    returns = [values[-1]]
    for reward, discount, value in zip(
        *(x.flip(0) for x in (imagined.rewards[:-1], discounts[:-1], values[1:])), strict=True
    ):
        returns.append(reward + discount * ((1 - mixture) * value + mixture * returns[-1]))
    weights = torch.cat([torch.ones_like(discounts[:1]), discounts[:-2]]).cumprod(0)
    return Returns(values, torch.stack(returns[:0:-1]), weights)


def policy_loss(
    model: WorldModel,
    policy: Callable[[Tensor], TanhNormal],
    target: nn.Module,
    demonstrations: Observations,
    states: Tensor,
    horizon: int,
    gain: float,
    entropy: float = ENTROPY,
    sample: bool = True,
) -> tuple[Tensor, Imagined, Returns, dict[str, Tensor]]:
    """AIME's loss of demonstrations, and what the policy is to gain where the model imagines that it acts.

    Args:
        model: Scores, and imagines.
        policy: Features [N, F] -> distribution over actions.
        target: Features [..., F] -> values [..., 1].
        demonstrations: See `imitation_loss`.
        states: Where imagined futures begin, [N, F].
        horizon: Their steps, H.
        gain: The weight of what is to be gained.
        entropy: The weight of a policy's entropy in either.
        sample: Whether actions and latents are sampled, or modes and means.

    Returns:
        The loss, the futures and what they are worth, and parts of the loss.
    """
    imitation = imitation_loss(model, demonstrations, policy, sample=sample)
    imagined = imagine(model, policy, states, horizon, sample)
    judged = judge(imagined, target)
    gained = -(judged.weights[:-1] * judged.returns[1:]).mean()  # of all states that its actions lead to
    narrow, narrow_dreams = (-entropy * each.entropy.sum(-1).mean() for each in (imitation, imagined))
    loss = imitation.loss + narrow + gain * (gained + narrow_dreams)
    parts = {
        "aime_action_entropy_loss": narrow,
        "value_gradient_policy_loss": gained,
        "value_gradient_policy_entropy_loss": narrow_dreams,
    }
    return loss, imagined, judged, imitation.metrics | {name: part.detach() for name, part in parts.items()}


def value_loss(imagined: Imagined, judged: Returns, value: nn.Module) -> Tensor:
    """The weighted squared error of a value network, which sees features without gradients."""
    errors = judged.returns.detach() - value(imagined.features[:-1].detach())[..., 0]
    return 0.5 * (judged.weights.detach() * errors.square()).mean()


def discriminator_loss(
    discriminator: nn.Module, demonstrated: Tensor, seen: Tensor, between: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a network that tells demonstrations from what was seen otherwise.

    Args:
        discriminator: Embeddings [..., E] -> logits [..., 1], high for demonstrations.
        demonstrated: Embeddings of demonstrations, [T, B, E], without gradients.
        seen: Embeddings of what the agent and others have seen, [T, B, E], without gradients.
        between: Where between the two the gradient is to be of norm 1, [T, B, 1] in [0, 1].
    """
    good, bad = discriminator(demonstrated), discriminator(seen)
    told = F.binary_cross_entropy_with_logits(good, torch.ones_like(good))
    told = told + F.binary_cross_entropy_with_logits(bad, torch.zeros_like(bad))
    mixed = (between * demonstrated + (1 - between) * seen).requires_grad_(True)
    (slopes,) = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)
    penalty = (slopes.norm(dim=-1) - 1).square().mean()
    scores = {"demonstration_score": good, "embodiment_score": bad}
    metrics = {name: logits.detach().sigmoid().mean() for name, logits in scores.items()}
    penalty = PENALTY * penalty
    return told + penalty, metrics | {"loss": told.detach(), "grad_penalty": penalty.detach()}


@torch.no_grad()
def viper_rewards(likelihood_model: WorldModel, observations: Observations) -> tuple[Tensor, Tensor]:
    """How likely each step of whole episodes is under a model of demonstrations that knows no actions.

    Args:
        likelihood_model: The model of demonstrations.
        observations: What it observes, from the first frame of episodes, [T, B, ...].

    Returns:
        The rewards, symlog of the evidence of each step, and that evidence, [T, B] each; 0 for the first frame.
    """
    actions = next(iter(observations.values())).new_zeros(*next(iter(observations.values())).shape[:2], 0)
    evidence = likelihood_model.evidence(observations, actions, sample=False).per_step.clone()
    evidence[0] = 0.0
    return evidence.sign() * evidence.abs().log1p(), evidence
