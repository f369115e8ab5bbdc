"""The world model: estimate the state, predict the future, score what was observed.

Shapes are by the convention in `aime_gym.observations`; the state is the feature, [B, F].

A step exists in three forms, because each use would pay for what another needs. `WorldModel.prior_step` and
`posterior_step` define it, readable and differentiable. `Cell.unroll` trains and filters: many steps whose actions or
frames are known, with what does not recur taken out of the loop; `tests/test_world_model.py` holds it to that.
`FastDynamics` acts in dreams, in as few operations as can be, with copies of the weights; `TestFastDynamics` holds it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.files import Revision
from aime_gym.world_model.cells import RSSM, RSSMO
from aime_gym.world_model.config import ModelConfig, check_actions, check_observations, check_state, policy_config
from aime_gym.world_model.layers import (
    MLP,
    Normal,
    Standardiser,
    TanhGaussianPolicy,
    build_decoder,
    build_encoders,
    evaluate_together,
    resize,
)
from aime_gym.world_model.objective import Objective, embedding_prediction_loss, inverse_dynamics_loss, weigh

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


class EvidenceBound(NamedTuple):
    """The evidence lower bound and its parts; densities are those of sensors as the networks see them.

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
        self.cell = (RSSM if config.cell == "rssm" else RSSMO)(config, embedding_dim)
        self.idm: TanhGaussianPolicy | None = None
        if config.idm_mode != "none":
            net = policy_config(config.hidden_size, config.hidden_layers)
            self.idm = TanhGaussianPolicy(config.feature_dim + embedding_dim, config.action_dim, net)
        number, size, layers = config.ensemble or (0, 0, 0)
        self.emb_prediction_heads = nn.ModuleList(
            MLP(config.feature_dim + config.action_dim, embedding_dim, size, layers) for _ in range(number)
        )
        standardised = [s for s in config.sensors if config.standardise and s.name in (*self.observed, *self.probed)]
        self.normaliser = nn.ModuleDict({sensor.name: Standardiser(codes[sensor.name].size) for sensor in standardised})
        self.codes = {name: code for name, code in codes.items() if code.rotations}

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of what the model sees and reconstructs."""
        return self.config.observed

    @property
    def probed(self) -> tuple[str, ...]:
        """Names of the hidden sensors decoded by probes."""
        return self.config.probed

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

    @torch.no_grad()
    def renew_standardisation(self, mean: Mapping[str, Tensor], std: Mapping[str, Tensor]) -> None:
        """Sets what sensors are standardised by, and rescales weights so that the model predicts what it did before.

        Learnt deviations that a network decodes are left to be learned anew. Encoders that are no network keep what
        they were standardised by.

        Args:
            mean: See `set_standardisation`.
            std: See `set_standardisation`.

        Raises:
            AimeGymError: If the config does not standardise, or values are missing or of another shape.
        """
        units: dict[str, Any] = dict(self.normaliser.items())
        before = {name: (unit.mean.clone(), unit.std.clone()) for name, unit in units.items()}
        self.set_standardisation(mean, std)
        column = 0
        for (name, (old_mean, old_std)), new in zip(before.items(), units.values(), strict=True):
            scale, shift = new.std / old_std, (new.mean - old_mean) / old_std  # old units are scale * new ones + shift
            if name in self.observed:
                shared = self.config.cell == "rssmo"  # one encoder reads all sensors side by side
                encoder: Any = self.encoders["tabular" if shared else name]
                first, begin = encoder.net[0], column if shared else 0
                columns = first.weight[:, begin : begin + len(scale)]
                first.bias += columns @ shift
                columns *= scale
                column += len(scale)
            decoder: Any = self.decoders[name] if name in self.decoders else self.probes[name]
            decoder.rescale(scale, shift)

    def standardise(self, observations: Observations, coded: bool = False) -> dict[str, Tensor]:
        """Sensors as the networks see them: as codes (if `coded` they are already), standardised; images resized."""
        standardised = {}
        for name, value in observations.items():
            value = value if coded or name not in self.codes else self.codes[name].encode(value)
            value = self.normaliser[name](value) if name in self.normaliser else value
            standardised[name] = resize(value.float()) if name == "image" else value.float()
        return standardised

    def initial_state(self, batch: int) -> Tensor:
        """The state before the first observation: zeros, [B, F]."""
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
            observations: Observed sensor -> [T, B, D], images [T, B, 3, H, W] in [0, 1]; others are ignored.
            actions: The actions that led to the observations (`pre_action`), [T, B, A].
            state: The state before the first observation, [B, F]; zeros by default.
            sample: Whether the latents are sampled or means. The noise of all steps is drawn at once.
            generator: Draws the noise.

        Returns:
            Features [T, B, F] and KL(posterior ‖ prior) per latent dim [T, B, S].

        Raises:
            AimeGymError: If something is missing, of a wrong shape, or not finite.
        """
        check_observations(self.config, observations, self.observed, finite=True)
        steps, batch = check_actions(self.config, actions, observations, finite=True)
        state = self._start(state, batch)
        embeddings = self.embed(self.standardise({name: observations[name] for name in self.observed}))
        noise = self.draw_noise(steps, batch, sample, generator)
        features, posterior = self.cell.unroll(state, actions.float(), embeddings, noise, steps)
        return features, posterior.kl(self._prior(features))

    def imagine(
        self,
        state: Tensor,
        actions: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
        names: Iterable[str] | None = None,
    ) -> Rollout:
        """Predicts what a sequence of actions leads to.

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
        features, _ = self.cell.unroll(state, actions.float(), None, noise, steps)
        return Rollout(features, self.decode(features, names))

    def decode(self, features: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """What features look like.

        Args:
            features: [..., F]
            names: Observed or probed sensors, or ``"reward"`` if the model decodes it; by default everything.

        Returns:
            Name -> mean [..., D] in own units, free angles within [-pi, pi]; images [..., 3, 64, 64] in [0, 1].

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
        posterior = self.cell.posterior(memory, self.embed(self.standardise(frame, coded=True)))
        return posterior.kl(self.cell.prior(memory)).sum(-1)

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
            observations: See `observe`; with a ``"reward"`` [T, B, 1] if the model decodes it and it is to count, and
                with ``"is_padding"`` [T, B] bool if some steps are not: their likelihoods and KL are 0.
            actions: [T, B, A]
            state: [B, F]; zeros by default.
            sample: Whether the latents are sampled or means.
            generator: Draws the noise.

        Raises:
            AimeGymError: If something is missing, of a wrong shape, or not finite.
        """
        names = tuple(name for name in self.config.outputs if name != "reward" or name in observations)
        check_observations(self.config, observations, names, finite=True)
        features, kl = self.observe(observations, actions, state, sample, generator)
        targets = self.standardise({name: observations[name] for name in names})
        likelihood = {
            name: self.decoders[name](features).log_prob(targets[name]).flatten(2).sum(-1) for name in names
        }  # [T, B]
        step_kl = kl.sum(-1)  # [T, B]
        if "is_padding" in observations:
            step_kl = step_kl.masked_fill(observations["is_padding"], 0.0)
            likelihood = {
                name: value.masked_fill(observations["is_padding"], 0.0) for name, value in likelihood.items()
            }
        per_step = torch.stack(list(likelihood.values())).sum(0) - step_kl
        return EvidenceBound(per_step.sum(0), per_step, likelihood, step_kl)

    def loss(
        self, batch: Observations, sample: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of phase 1 (Zhang et al., NeurIPS 2023, phase 1).

        Args:
            batch: All sensors, ``"pre_action"``, and ``"reward"`` if the model decodes it: [T, B, ...]; with
                ``"is_padding"`` [T, B] bool if some steps do not count.
            sample: Whether the latents are sampled or means.
            generator: Draws the noise.

        Returns:
            The loss and its parts, all scalars.

        Raises:
            AimeGymError: If something is missing or of a wrong shape.
        """
        names = (*self.config.outputs, *self.probed)
        check_observations(self.config, batch, names)
        actions = batch.get("pre_action")
        steps, size = check_actions(self.config, actions, batch)
        assert actions is not None
        targets = self.standardise({name: batch[name] for name in names})
        embeddings = self.embed(targets)
        noise = self.draw_noise(steps, size, sample, generator)
        actions = actions.float()
        features, posterior = self.cell.unroll(self._start(None, size), actions, embeddings, noise, steps)

        config = self.config
        is_padding = batch.get("is_padding")
        objective = self.weigh_evidence(config.outputs, targets, features, posterior, config.free_nats, is_padding)
        metrics = objective.metrics | {"kl_loss": objective.kl.detach()}
        loss = objective.reconstruction + objective.probes + config.kl_scale * objective.kl
        reconstruction = objective.reconstruction + objective.probes
        for extra, extra_metrics in (
            inverse_dynamics_loss(
                self.idm, features, embeddings, actions, self.config.idm_mode == "detach", is_padding
            ),
            embedding_prediction_loss(self.emb_prediction_heads, features, embeddings, actions, is_padding),
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
        """Standard-normal [T, B, S] (or of another last dim), or None where latents are means."""
        shape = (steps, batch, dim or self.config.stochastic_dim)
        return torch.randn(shape, generator=generator, device=self.cell.initial_state.device) if sample else None

    def _prior(self, features: Tensor) -> Normal:
        return self.cell.priors(features[..., : self.config.memory_dim])

    def weigh_evidence(
        self,
        outputs: Iterable[str],
        targets: Observations,
        features: Tensor,
        posterior: Normal,
        free_nats: float,
        is_padding: Tensor | None = None,
    ) -> Objective:
        """The one evidence that both phases share; probes see detached features, and padding [T, B] does not count."""
        hidden = features.detach()[1:]
        return weigh(
            evaluate_together({name: self.decoders[name] for name in outputs}, features),
            evaluate_together({name: self.probes[name] for name in self.probed if name in targets}, hidden),
            targets,
            posterior,
            self._prior(features),
            self.config.nll_reweight,
            self.config.kl_rebalance,
            free_nats,
            is_padding,
        )
