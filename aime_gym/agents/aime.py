"""AIME: imitation from observations alone, by maximising the evidence that a world model gives them.

Zhang et al., "Action Inference by Maximising Evidence: Zero-Shot Imitation from Observation with World Models",
NeurIPS 2023, phase 2. The model is frozen. At every step of a demonstration the policy samples an action from the state
before, the model takes a posterior step with it on what was observed, and the policy is trained, through the model, to
make the demonstration likely. The losses of its online form (`aime_gym.agents.online_aime`) are here too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aime_gym.agents.imitator import EMBEDDING, TRUE_ACTION, Imitator
from aime_gym.data.dataset import Batch, TrajectoryDataset, WindowSampler
from aime_gym.errors import AimeGymError, check_positive, check_switch, unknown_name
from aime_gym.training.trainer import Callback
from aime_gym.world_model.cells import Actor
from aime_gym.world_model.config import END, check_observations, policy_config
from aime_gym.world_model.layers import TanhGaussianPolicy
from aime_gym.world_model.model import Observations, WorldModel
from aime_gym.world_model.objective import mean_of_steps, total, with_flags, without_padding

GAMMA, LAMBDA = 0.99, 0.95
"""The discount, and the share of longer returns in the mixture of them."""

ENTROPY = 1e-4
"""The weight of a policy's entropy."""

PENALTY = 10.0
"""The weight of a discriminator's gradient penalty (Gulrajani et al., NeurIPS 2017)."""

ImitationMode = Literal["full", "kl_only", "reconstruction_only"]

Guidance = Literal["posterior", "prior"]


def needs_embeddings_alone(model: WorldModel, mode: ImitationMode) -> bool:
    """Whether a loss asks for nothing of what is observed but its embeddings: the KL alone, unless reweighted."""
    return mode == "kl_only" and model.config.nll_reweight == "none"


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


class Imitation(NamedTuple):
    """What a model says of demonstrations under a policy.

    Attributes:
        loss: A scalar.
        per_step: The loss of each step, without that of the probes, [T, B].
        actions: The inferred actions, [T, B, A].
        entropy: The policy's, see `TanhNormal.entropy`, [T, B, A].
        features: The states, [T, B, F].
        metrics: Parts of the loss, scalars without gradients.
    """

    loss: Tensor
    per_step: Tensor
    actions: Tensor
    entropy: Tensor
    features: Tensor
    metrics: dict[str, Tensor]


def imitation_loss(
    model: WorldModel,
    batch: Observations,
    policy: TanhGaussianPolicy,
    mode: ImitationMode = "full",
    use_idm: bool = False,
    sample: bool = True,
    generator: torch.Generator | None = None,
    guidance: Guidance = "posterior",
    embeddings: Tensor | None = None,
) -> Imitation:
    """The loss of phase 2, AIME: the negative evidence under actions of a policy (Zhang et al., NeurIPS 2023).

    There are no free nats. The KL keeps a model's `kl_rebalance`, which does not change its value but its gradient;
    with models of AIME-v2 nothing is rebalanced, the end of episodes counts where the batch tells of it, and steps
    after it do not. Freeze the model, its `idm` included, before the gradients of this are used.

    Args:
        model: Scores what was observed.
        batch: Observed sensors [T, B, ...]; probed ones, where there, only add to the metrics and the loss' value. With
            ``"is_padding"`` [T, B] bool if some steps do not count, and ``"is_first"`` [T, B, 1] if episodes begin.
        policy: Features [B, F] -> distribution over actions.
        mode: ``"full"``, ``"kl_only"`` (without the reconstruction) or ``"reconstruction_only"`` (without the KL).
        use_idm: Be guided by the inverse dynamics model, of whose actions the policy's have a KL that is added, times
            `kl_scale`.
        sample: Whether actions and latents are sampled or modes and means.
        generator: Draws the noise.
        guidance: With `use_idm`, whose actions are taken: ``"posterior"`` for the inverse dynamics model's, so that the
            policy learns from that KL alone (the rest of the loss does not depend on it); ``"prior"`` for its own.
        embeddings: The observed sensors as the model encodes them, [T, B, E], where that is known. The KL alone needs
            no sensors then, unless it is reweighted, and what it makes of them is not measured.

    Raises:
        AimeGymError: If something is missing or of a wrong shape, or `check_imitation` refuses the arguments.
    """
    check_imitation(model, mode, use_idm)
    v2, batch = model.config.version == 2, with_flags(batch)
    unseen = embeddings is not None and needs_embeddings_alone(model, mode)
    outputs = () if unseen else (*model.observed, *([END] if model.config.use_terminal and END in batch else []))
    names = (*outputs, *(name for name in model.probed if name in batch))
    check_observations(model.config, batch, names)
    targets = model.standardise({name: batch[name] for name in names})
    embeddings = model.embed(targets) if embeddings is None else embeddings
    steps, size = embeddings.shape[:2]
    noise = model.draw_noise(steps, size, sample, generator)
    action_noise = model.draw_noise(steps, size, sample, generator, model.config.action_dim)
    actors, guided = [Actor(policy, action_noise)], use_idm and guidance == "posterior"
    if use_idm:
        assert model.idm is not None
        actors.insert(0 if guided else 1, Actor(model.idm, action_noise, embeddings))
    start = model.initial_state(size)
    unrolled = model.cell.unroll(start, actors, embeddings, noise, steps, batch.get("is_first"))
    features, posterior, actions, policies = unrolled
    counted = model.counted(batch)
    action_kl = without_padding(policies[0].kl(policies[1]).sum(-1), counted.is_padding) if use_idm else None  # [T, B]
    balance = None if v2 else model.config.kl_rebalance
    objective = model.weigh_evidence(
        outputs, targets, features, embeddings, posterior, counted, 0.0, balance, action_kl if v2 else None
    )
    kl, metrics = objective.kl, objective.metrics
    if not v2:
        metrics["model_kl_loss"] = total(kl).detach()
    if action_kl is not None:
        metrics["action_kl_loss"] = total(action_kl).detach()
        kl = kl if v2 else kl + action_kl
    per_step = torch.zeros_like(kl)
    if mode != "kl_only":
        per_step = per_step + objective.reconstruction
    if mode != "reconstruction_only":
        per_step = per_step + model.config.kl_scale * kl
    loss = total(per_step) + (objective.probes if v2 or mode != "kl_only" else 0.0)
    reconstruction = total(objective.reconstruction) + (0.0 if v2 else objective.probes)
    parts = {"reconstruction_loss": reconstruction, "kl_loss": total(kl), "total_loss": loss}
    metrics |= {name: part.detach() for name, part in parts.items()}
    for name in ("rec_term", "elbo", "reconstruction_loss") if unseen else ():
        del metrics[name]
    own = policies[1 if guided else 0]
    return Imitation(loss, per_step, actions, own.entropy, features, metrics)


class Imagined(NamedTuple):
    """Futures that a model imagines under a policy.

    Attributes:
        features: The states, the first of which are those where they begin, [H + 1, N, F].
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
        values: What the target network says of the states, [H + 1, N].
        returns: The lambda-returns of all states but the last, [H, N].
        weights: The probability that the episode has gone on until there, discounted, [H, N].
    """

    values: Tensor
    returns: Tensor
    weights: Tensor


def imagine(
    model: WorldModel,
    policy: TanhGaussianPolicy,
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
    actors = [Actor(policy, action_noise, detached=True)]
    following, _, taken, (acted,) = model.cell.unroll(states, actors, None, noise, horizon)
    features = torch.cat([states[None], following])
    zeros, name = features.new_zeros(features.shape[:2]), model.config.reward
    reward = model.decode(features, [name])[name][..., 0] if model.config.use_reward else zeros
    logits = None if model.termination is None else model.termination(features)[..., 0]
    ends = zeros if logits is None else logits.sigmoid()
    return Imagined(features, taken, acted.entropy, acted.log_prob(taken), reward, ends)


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
    policy: TanhGaussianPolicy,
    target: nn.Module,
    demonstrations: Observations,
    states: Tensor,
    horizon: int,
    gain: float,
    entropy: float = ENTROPY,
    sample: bool = True,
    demonstrated: int = 0,
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
        demonstrated: How many more futures begin where the model sees the demonstrations.

    Returns:
        The loss, the futures and what they are worth, and parts of the loss.
    """
    imitation = imitation_loss(model, demonstrations, policy, sample=sample)
    if demonstrated:
        shown = imitation.features.detach().flatten(0, 1)
        states = torch.cat([states, shown[torch.randperm(len(shown), device=shown.device)[:demonstrated]]])
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


class AIME(Imitator):
    """Action Inference by Maximising Evidence.

    Loss and gradient are the original's, and the defaults are quicker: some thousand updates of 32 windows of 32 steps
    at a learning rate that falls from 1e-3 to 0. A fifth of the windows begin with a demonstration, as an agent that
    cannot begin never reaches what follows. The weights are those that were best on a fifth of the demonstrations.
    The original had 50,000 updates of 50 windows of 50 steps from anywhere, a learning rate of 3e-4 and all
    demonstrations, and took the last weights: ``AIME.original(model, demonstrations).learn(50_000)``.

    What stays different: architecture and loss are read from the model's folder and not from a config of the run, the
    value of the loss counts no probes, `action_mse` leaves out the first step of a window, and `predict` estimates the
    state by the posterior's mean unless it is told to sample.

    Examples:
        >>> import gymnasium, aime_gym
        >>> imitator = aime_gym.AIME("walker-state", demonstrations="walker-walk", batch_size=4, horizon=8).learn(1)
        >>> world = gymnasium.make("AimeReal-Walker-v0", task="walk")
        >>> observation, _ = world.reset(seed=0)
        >>> action, state = imitator.predict(observation)  # the state of the estimate goes into the next call
        >>> action, state = imitator.predict(world.step(action)[0], state=state)
        >>> action.shape
        (6,)

    Args:
        model: A loaded world model, a folder or a bundled name, of any setup; its weights stay as they are.
        demonstrations: A folder of trajectories or a bundled name; their actions are not read for learning.
        mode: ``"full"`` for the whole evidence, ``"kl_only"`` or ``"reconstruction_only"`` for one of its parts.
        use_idm: Take actions from the model's inverse dynamics model, which stays as it is, and pull the policy towards
            them; the policy learns from that pull alone.
        hidden_size: Units in each hidden layer of the policy.
        hidden_layers: Number of hidden layers of the policy.
        batch_size: Windows an update, B.
        lr: Adam's learning rate; `schedule` says how it goes on, see `Imitator`.
        schedule: By default it falls to 0 at the last update.
        at_start: Share of windows that begin with a demonstration, from 0 to 1.
        **options: Options of `Imitator`: ``horizon``, ``held_out``, ``grad_clip``, ``precision``, ``seed``, ``device``.

    Raises:
        AimeGymError: If the model or the demonstrations do not fit, or `use_idm` is asked of a model without one or
            together with ``"reconstruction_only"``, where nothing would be learned.
    """

    name = "aime"
    original_settings: ClassVar[dict[str, Any]] = {
        **{"batch_size": 50, "horizon": 50, "lr": 3e-4, "schedule": "constant", "at_start": 0.0},
        **{"held_out": 0.0, "grad_clip": 100.0, "precision": "32-true"},
    }

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
        lr: float = 1e-3,
        schedule: str = "cosine",
        at_start: float = 0.2,
        **options: Any,
    ):
        check_positive(hidden_size, "hidden_size")
        check_switch(use_idm, "use_idm")
        if not 0 <= at_start <= 1:
            raise AimeGymError(f"at_start is a share from 0 to 1; got {at_start!r}.")
        self.mode, self.use_idm, self.at_start = mode, use_idm, at_start
        self._sizes = hidden_size, hidden_layers
        super().__init__(model, demonstrations, batch_size=batch_size, lr=lr, schedule=schedule, **options)

    def _build(self) -> nn.Module:
        check_imitation(self.model, self.mode, self.use_idm)
        config = self.model.config
        self._frozen = copy.deepcopy(self.model).eval().requires_grad_(False)  # others may train the model itself
        self._frozen.heads = None
        policy = TanhGaussianPolicy(config.feature_dim, config.action_dim, policy_config(*self._sizes))
        return nn.ModuleDict({"policy": policy})

    def _settings(self) -> dict[str, Any]:
        size, layers = self._sizes
        return {"mode": self.mode, "use_idm": self.use_idm, "hidden_size": size, "hidden_layers": layers}

    def _flags(self) -> dict[str, Any]:
        return {**super()._flags(), "at_start": self.at_start}

    def _prepare(self, callback: Callback | Sequence[Callback], folder: Path | None) -> None:
        assert self.demonstrations is not None
        if "image" in self.model.observed:  # which take longer to encode, again and again, than all else
            self._embed_rows(self.demonstrations, self._frozen.encode)

    def _batches(self, part: TrajectoryDataset, batch_size: int, seed: tuple[int, ...]) -> WindowSampler:
        unseen = EMBEDDING in part.keys and needs_embeddings_alone(self.model, self.mode)
        more = (key for key in (END, TRUE_ACTION, EMBEDDING) if key in part.keys)
        names = [*(() if unseen else self.model.observed), *more]
        return WindowSampler(part, batch_size, self.horizon, seed, names, self.device, at_start=self.at_start, least=2)

    def _loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = cast(TanhGaussianPolicy, cast(nn.ModuleDict, module)["policy"])
        observed = dict(batch)
        truth, embeddings = observed.pop(TRUE_ACTION, None), observed.pop(EMBEDDING, None)
        imitation = imitation_loss(self._frozen, observed, policy, self.mode, self.use_idm, embeddings=embeddings)
        loss, metrics = imitation.loss, imitation.metrics
        if truth is not None:
            errors = (imitation.actions.detach()[1:] - truth[1:]).square()
            metrics["action_mse"] = mean_of_steps(errors, batch.get("is_padding"))
        return loss, metrics

    def infer_actions(self, observations: dict[str, Tensor]) -> Tensor:
        """The actions behind a sequence of observations [T, B, ...] according to the policy: [T, B, A]."""
        policy = self._acting(deterministic=True)
        with torch.no_grad():
            imitation = imitation_loss(self._frozen, observations, policy, self.mode, self.use_idm, sample=False)
        return imitation.actions

    def _acting(self, deterministic: bool) -> TanhGaussianPolicy:
        return cast(Any, self.module)["policy"]

    def _act(
        self, frames: dict[str, Tensor], state: Any, starts: Tensor, deterministic: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        latents = self._estimate(frames, state, starts, sample=not deterministic)
        noise = None if deterministic else torch.randn(len(starts), self.model.config.action_dim, device=self.device)
        actions = self._acting(deterministic)(latents).sample(noise)
        return actions, (latents, actions)
