"""The world model: estimate the state, predict the future, score what was observed.

Shapes are by the convention in `aime_gym.observations`; the state is the feature, [B, F].

A step exists in three forms, because each use would pay for what another needs. `WorldModel.prior_step` and
`posterior_step` define it, readable and differentiable. `Cell.unroll` trains and filters: many steps whose actions or
frames are known, with what does not recur taken out of the loop; `tests/test_world_model.py` holds it to that.
`FastDynamics` acts in dreams, in as few operations as can be, with copies of the weights; `TestFastDynamics` holds it.
With one slot its operations are translated to NumPy's, whose calls cost less (`aime_gym.world_model.array_code`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from aime_gym.errors import AimeGymError, check_switch, unknown_name
from aime_gym.files import Revision
from aime_gym.world_model.cells import RSSM, RSSMO
from aime_gym.world_model.config import END, ModelConfig, check_actions, check_observations, check_state, policy_config
from aime_gym.world_model.heads import BatchedMLPs, MLPs
from aime_gym.world_model.layers import MLP, Standardiser, TanhGaussianPolicy, build_decoder, build_encoders, resize
from aime_gym.world_model.objective import (
    Counted,
    EvidenceBound,
    Latent,
    Objective,
    embedding_prediction_loss,
    inverse_dynamics_loss,
    over_after,
    total,
    weigh,
    with_flags,
)
from aime_gym.world_model.packed import evaluate_together

if TYPE_CHECKING:
    from aime_gym.world_model.heads import Heads

Observations = Mapping[str, Tensor]


class Rollout(NamedTuple):
    """A predicted future.

    Attributes:
        features: [T, B, F]
        observations: Name -> decoded mean [T, B, ...], see `WorldModel.decode`.
    """

    features: Tensor
    observations: dict[str, Tensor]


class WorldModel(nn.Module):
    """A recurrent state-space model with its encoders, decoders and probes.

    Examples:
        >>> import torch, aime_gym
        >>> model = aime_gym.load_pretrained_model("walker-state")
        >>> model.imagine(model.initial_state(2), torch.zeros(5, 2, 6)).features.shape  # five steps: [T, B, F]
        torch.Size([5, 2, 288])

    Args:
        config: What to build; weights are random.

    Attributes:
        config: The architecture and loss.
        heads: What was fitted on frozen features: rewards, disagreement, physics. None if nothing was.
        codes: Sensors with angles that turn freely -> how networks see them.
        folder: Where the model was loaded from, if it was.
        revision: Which weights were loaded there; `checkpoint.revision_of` says whether they have changed since.
        as_loaded: The fingerprint of what was loaded.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, codes = config, config.codes
        self.heads: Heads | None = None
        self.folder: Path | None = None
        self.revision: Revision | None = None
        self.as_loaded: tuple[Hashable, ...] = ()
        self.encoders, embedding_dim = build_encoders(config)
        self.decoders = nn.ModuleDict({name: build_decoder(name, config, "decoders") for name in config.outputs})
        self.probes = nn.ModuleDict({name: build_decoder(name, config, "probes") for name in config.probed})
        baselines = config.probed if config.version == 2 else ()
        self.baseline_probes = nn.ModuleDict({n: build_decoder(n, config, "probes", embedding_dim) for n in baselines})
        self.cell = (RSSM if config.cell == "rssm" else RSSMO)(config, embedding_dim)
        self.idm: TanhGaussianPolicy | None = None
        if config.idm_mode != "none":
            net = policy_config(config.hidden_size, config.hidden_layers)
            self.idm = TanhGaussianPolicy(config.feature_dim + embedding_dim, config.action_dim, net)
        self.emb_prediction_heads: MLPs | BatchedMLPs | None = None
        if config.ensemble is not None:
            (number, size, layers), inputs = config.ensemble, config.feature_dim + config.action_dim
            members = [MLP(inputs, embedding_dim, size, layers) for _ in range(number if config.version == 1 else 0)]
            batched = None if members else BatchedMLPs(number, inputs, embedding_dim, size, layers)
            self.emb_prediction_heads = batched or MLPs(members)
        standardised = [s for s in config.sensors if config.standardise and s.name in (*self.observed, *self.probed)]
        self.normaliser = nn.ModuleDict({sensor.name: Standardiser(codes[sensor.name].size) for sensor in standardised})
        self.codes = {name: code for name, code in codes.items() if code.rotations}

    @property
    def observed(self) -> tuple[str, ...]:
        """What the model sees and reconstructs."""
        return self.config.observed

    @property
    def probed(self) -> tuple[str, ...]:
        """Names of the hidden sensors decoded by probes."""
        return self.config.probed

    @property
    def termination(self) -> nn.Sequential | None:
        """What gives the logit that an episode has ended, [..., F] -> [..., 1]: a head, or the model's own decoder."""
        if self.heads is not None and self.heads.termination is not None:
            return self.heads.termination
        own: Any = self.decoders[END] if self.config.use_terminal else None
        return None if own is None else own.prob_net.net

    @property
    def decodes_images(self) -> bool:
        """Whether it observes or predicts images. Released models of sensors have an image in their config alone."""
        return "image" in (*self.observed, *self.probed)

    def set_standardisation(self, mean: Mapping[str, Tensor], std: Mapping[str, Tensor]) -> None:
        """Sets what standardised sensors are standardised by.

        Args:
            mean: Sensor -> [C] (arrays or tensors), of its code: see `ModelConfig.codes`.
            std: Sensor -> [C]; dims that hardly vary are left at their scale.

        Raises:
            AimeGymError: If the config does not standardise, or values are missing or of another shape.
        """
        if not self.config.standardise:
            raise AimeGymError("This model does not standardise: build it with `standardise=True` in its config.")
        for name, module in self.normaliser.items():
            assert isinstance(module, Standardiser)
            if name not in mean or name not in std:
                raise AimeGymError(f"Standardising lacks the mean or std of {name}.")
            module.set(torch.as_tensor(mean[name]), torch.as_tensor(std[name]))

    def standardise(self, observations: Observations, coded: bool = False) -> dict[str, Tensor]:
        """`observations` as networks see them: as codes (if `coded` they are already), standardised; images resized."""
        standardised = {}
        for name, value in observations.items():
            value = value if coded or name not in self.codes else self.codes[name].encode(value)
            value = self.normaliser[name](value) if name in self.normaliser else value
            standardised[name] = resize(value.float()) if name == "image" else value.float()
        return standardised

    def initial_state(self, batch: int) -> Tensor:
        """The state of a `batch` of B before the first observation: zeros, [B, F]."""
        return torch.cat([self.cell.initial_memory, self.cell.initial_state], dim=-1).expand(batch, -1)

    def encode(self, observations: Observations) -> Tensor:
        """The embedding of observations in their own units: name -> [..., D] gives [..., E].

        Raises:
            AimeGymError: If a sensor is missing or of another dim.
        """
        check_observations(self.config, observations, self.observed)
        return self.embed(self.standardise({name: observations[name] for name in self.observed}))

    def posterior_step(self, state: Tensor, action: Tensor, embedding: Tensor, noise: Tensor | None) -> Tensor:
        """One step of the state estimate; with `prior_step` the definition of a step, see the top of this module.

        Args:
            state: [B, F]
            action: The action that led to what is observed, [B, A].
            embedding: The embedding of what is observed, [B, E].
            noise: Standard-normal [B, S], or None for the mean.

        Returns:
            The next state, [B, F].
        """
        memory = self.cell.advance(state, action)
        return torch.cat([memory, self.cell.posterior(memory, embedding).sample(noise)], dim=-1)

    def prior_step(self, state: Tensor, action: Tensor, noise: Tensor | None) -> Tensor:
        """One step of prediction: as `posterior_step`, without an observation."""
        memory = self.cell.advance(state, action)
        return torch.cat([memory, self.cell.prior(memory).sample(noise)], dim=-1)

    def observe(
        self,
        observations: Observations,
        actions: Tensor,
        state: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Estimates the state from what was observed and done.

        Args:
            observations: Observed sensor -> [T, B, D], images [T, B, 3, H, W] in [0, 1]; with ``"is_first"`` [T, B] or
                [T, B, 1] if episodes begin, before which the state is zeros; others are ignored.
            actions: The actions that led to the observations (`pre_action`), [T, B, A].
            state: The state before the first observation, [B, F]; zeros by default.
            sample: Whether the latents are sampled or means. The noise of all steps is drawn at once.
            generator: Draws the noise.

        Returns:
            Features [T, B, F] and KL(posterior ‖ prior) per latent dim [T, B, S], or per one-hot group [T, B, G].

        Raises:
            AimeGymError: If something is missing, of a wrong shape, or not finite.
        """
        check_observations(self.config, observations, self.observed, finite=True)
        steps, batch = check_actions(self.config, actions, observations, finite=True)
        state = self._start(state, batch)
        embeddings = self.embed(self.standardise({name: observations[name] for name in self.observed}))
        noise = self.draw_noise(steps, batch, sample, generator)
        is_first = with_flags(observations).get("is_first")
        features, posterior, *_ = self.cell.unroll(state, actions.float(), embeddings, noise, steps, is_first)
        prior: Any = self._prior(features)
        return features, posterior.kl(prior)

    def imagine(
        self,
        state: Tensor,
        actions: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
        names: Iterable[str] | None = None,
    ) -> Rollout:
        """What a sequence of actions leads to: features [T, B, F] after each, and what is decoded of them.

        Args:
            state: [B, F]
            actions: [T, B, A]
            sample: Whether the latents are sampled or means. The noise of all steps is drawn at once.
            generator: Draws the noise.
            names: What to decode; by default everything.

        Raises:
            AimeGymError: If something is of a wrong shape or not finite, or a name unknown.
        """
        steps, batch = check_actions(self.config, actions, finite=True)
        state = self._start(state, batch)
        noise = self.draw_noise(steps, batch, sample, generator)
        features, *_ = self.cell.unroll(state, actions.float(), None, noise, steps)
        return Rollout(features, self.decode(features, names))

    def decode(self, features: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """What features look like.

        Args:
            features: [..., F]
            names: Observed or probed sensors, and reward or ``"is_terminal"`` if the model decodes them; by default
                everything.

        Returns:
            Name -> mean [..., D] in own units, free angles within [-pi, pi], events' probabilities; images
            [..., 3, 64, 64], in [0, 1] where a sigmoid ends their decoder.

        Raises:
            AimeGymError: If a name is unknown.
        """
        known = (*self.config.outputs, *self.probed)
        decoded = {}
        for name in known if names is None else names:
            if name not in known:
                raise unknown_name("decoded sensor", name, known)
            code = self._decode(features, name)
            decoded[name] = self.codes[name].decode(code) if name in self.codes else code
        return decoded

    def _decode(self, features: Tensor, name: str) -> Tensor:
        """The mean of one output or probe in its own units, as a code."""
        module: Any = (self.decoders if name in self.decoders else self.probes)[name]
        code = module.mean(features).float()
        return self.normaliser[name].inverse(code) if name in self.normaliser else code  # type: ignore[operator]

    def doubt(self, features: Tensor) -> Tensor:
        """How much the model is to be doubted at a step: by how far it corrects itself on seeing what it dreams.

        Where a dream is true to the data, the frame that is decoded from a latent tells the model nothing new. Where it
        has left the data, the posterior that has seen this frame and the prior part. Needs no heads.

        Args:
            features: [..., F]

        Returns:
            KL of that posterior from the prior, [...] nats.
        """
        frame = {name: self._decode(features, name) for name in self.observed}
        memory = features[..., : self.config.memory_dim]
        prior: Any = self.cell.prior(memory)
        return self.cell.posterior(memory, self.embed(self.standardise(frame, coded=True))).kl(prior).sum(-1)

    def evidence(
        self,
        observations: Observations,
        actions: Tensor,
        state: Tensor | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> EvidenceBound:
        """A lower bound on the log likelihood of a sequence (Zhang et al., NeurIPS 2023, phase 1).

        Args:
            observations: See `observe`; with a ``"reward"`` [T, B, 1] or ``"is_terminal"`` if the model decodes it and
                it is to count, and with ``"is_padding"`` [T, B] bool if some steps are not: their likelihoods and KL
                are 0, as are AIME-v2's after the first terminal step.
            actions: [T, B, A]
            state: [B, F]; zeros by default.
            sample: Whether the latents are sampled or means.
            generator: Draws the noise.

        Raises:
            AimeGymError: If something is missing, of a wrong shape, or not finite.
        """
        observations = with_flags(observations)
        names = self.outputs_in(observations)
        check_observations(self.config, observations, names, finite=True)
        features, kl = self.observe(observations, actions, state, sample, generator)
        targets = self.standardise({name: observations[name] for name in names})
        counted = self.counted(observations)
        outputs = {name: self.decoders[name](features).log_prob(targets[name]).flatten(2) for name in names}
        likelihood = {name: counted.kept(output.sum(-1)) for name, output in outputs.items()}  # [T, B]
        step_kl = counted.kept(kl.sum(-1))  # [T, B]
        per_step = torch.stack(list(likelihood.values())).sum(0) - step_kl
        return EvidenceBound(per_step.sum(0), per_step, likelihood, step_kl)

    def loss(
        self, batch: Observations, sample: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of phase 1 (Zhang et al., NeurIPS 2023, phase 1).

        Args:
            batch: All sensors, ``"pre_action"``, and reward and end if the model decodes them, which AIME-v2's skip
                where they are missing: [T, B, ...]; see `evidence`. Its log likelihoods of an output are multiplied by
                ``"{output}_mask"`` [T, B, 1] where that is there.
            sample: Whether the latents are sampled or means.
            generator: Draws the noise.

        Returns:
            The loss and its parts, all scalars.

        Raises:
            AimeGymError: If something is missing or of a wrong shape.
        """
        batch = with_flags(batch)
        outputs = self.config.outputs if self.config.version == 1 else self.outputs_in(batch)
        names = (*outputs, *self.probed)
        check_observations(self.config, batch, names)
        actions = batch.get("pre_action")
        steps, size = check_actions(self.config, actions, batch)
        assert actions is not None
        targets = self.standardise({name: batch[name] for name in names})
        embeddings = self.embed(targets)
        noise = self.draw_noise(steps, size, sample, generator)
        actions = actions.float()
        state, is_first = self._start(None, size), batch.get("is_first")
        features, posterior, *_ = self.cell.unroll(state, actions, embeddings, noise, steps, is_first)

        config, counted = self.config, self.counted(batch)
        objective = self.weigh_evidence(
            outputs, targets, features, embeddings, posterior, counted, config.free_nats, config.kl_rebalance
        )
        kl, reconstruction = total(objective.kl), total(objective.reconstruction) + objective.probes
        metrics = objective.metrics | {"kl_loss": kl.detach()}
        loss = reconstruction + config.kl_scale * kl
        rows = features, embeddings, actions
        for extra, extra_metrics in (
            inverse_dynamics_loss(self.idm, *rows, config.idm_mode == "detach", counted.is_padding),
            embedding_prediction_loss(self.emb_prediction_heads, *rows, config.version == 2, counted.is_padding),
        ):
            loss = loss + extra
            metrics |= extra_metrics
        metrics |= {"reconstruction_loss": reconstruction.detach(), "total_loss": loss.detach()}
        return loss, metrics

    def embed(self, standardised: Observations) -> Tensor:
        """Embeddings [T, B, E] of observed sensors in standardised units."""
        if self.config.cell == "rssm":
            parts = [self.encoders[name](standardised[name]) for name in self.observed]
        else:
            parts = [encoder(standardised[name]) for name, encoder in self.encoders.items() if name != "tabular"]
            tabular = [standardised[name] for name in self.observed if name != "image"]
            parts += [self.encoders["tabular"](torch.cat(tabular, dim=-1))] if tabular else []
        return torch.cat(parts, dim=-1)

    def _start(self, state: Tensor | None, batch: int) -> Tensor:
        if state is None:
            return self.initial_state(batch)
        return check_state(self.config, state, batch)

    def draw_noise(
        self, steps: int, batch: int, sample: bool, generator: torch.Generator | None, dim: int | None = None
    ) -> Tensor | None:
        """Standard-normal [steps, batch, S] (or `dim`) of the `generator`; None unless latents are to `sample`."""
        check_switch(sample, "sample")
        shape = (steps, batch, dim or self.config.stochastic_dim)
        return torch.randn(shape, generator=generator, device=self.cell.initial_state.device) if sample else None

    def _prior(self, features: Tensor) -> Latent:
        return self.cell.priors(features[..., : self.config.memory_dim])

    def outputs_in(self, batch: Observations) -> tuple[str, ...]:
        """The outputs that a batch is to tell of: everything observed, and reward and end if it does."""
        return tuple(name for name in self.config.outputs if name in self.observed or name in batch)

    def counted(self, batch: Observations) -> Counted:
        """What of a batch counts; its flags are as `with_flags` gives them."""
        over = over_after(batch[END]) if self.config.version == 2 and END in batch else None
        masks = {name: batch[f"{name}_mask"] for name in self.config.outputs if f"{name}_mask" in batch}
        return Counted(batch.get("is_padding"), over, masks)

    def weigh_evidence(
        self,
        outputs: Iterable[str],
        targets: Observations,
        features: Tensor,
        embeddings: Tensor,
        posterior: Latent,
        counted: Counted,
        free_nats: float,
        rebalance: float | None,
        action_kl: Tensor | None = None,
    ) -> Objective:
        """The one evidence that both phases share, as `weigh` has it; probes see detached features and embeddings."""
        hidden = {
            "": (self.probes, features.detach()[1:]),
            "_baseline": (self.baseline_probes, embeddings.detach()[1:]),
        }
        probes: dict[str, Any] = {}
        targets = dict(targets)
        for suffix, (modules, inputs) in hidden.items():
            own = {f"{name}{suffix}": module for name, module in modules.items() if name in targets}
            probes |= evaluate_together(own, inputs)
            targets |= {f"{name}{suffix}": targets[name] for name in modules if name in targets}
        return weigh(
            evaluate_together({name: self.decoders[name] for name in outputs}, features),
            probes,
            targets,
            posterior,
            self._prior(features),
            self.config.nll_reweight,
            rebalance,
            free_nats,
            counted,
            action_kl,
        )
