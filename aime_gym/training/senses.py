"""Give a model of states other senses: images, or sensors without velocities, with the same dynamics.

A model that was trained on all sensors knows how its world moves. To live on less, it needs an encoder of what is seen
and a posterior that corrects the memory by it, and for images a decoder, to be looked at. Here they are learned while
prior, memory, sensor decoders and heads stay as they are, so that its dream is the dream of states, with its rewards
and its faults. The posterior is trained on the evidence of all sensors, which it does not see, and not on that of the
pixels: what a latent stands for stays what it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from aime_gym.bodies.body import Setup
from aime_gym.errors import AimeGymError
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.layers import evaluate_together
from aime_gym.world_model.model import Observations, WorldModel
from aime_gym.world_model.objective import inverse_dynamics_loss, mean_of_steps, without_padding

DECODED = 128
"""Frames of a batch whose image is decoded; all of them are encoded."""
KL_SHARE = 0.1
"""The share that is kept of the model's weight of the KL: less is seen than before, and latents must follow it."""
_LEARNED = ("cell.posterior", "encoders.")


def senses_config(
    states: ModelConfig,
    setup: Setup,
    image_width: int = 32,
    idm_mode: Literal["none", "detach", "end2end"] = "none",
) -> ModelConfig:
    """The architecture of a model with the dynamics of a model of states and the senses of another setup.

    Args:
        states: The config of the model of states.
        setup: ``"visual"``, ``"lpomdp"`` or ``"mdp"``.
        image_width: Channels of the first convolution.
        idm_mode: Whether an inverse dynamics model is learned along.

    Raises:
        AimeGymError: If that model sees images already, cannot tell the sensors, or has nothing to learn.
    """
    if "image" in states.observed:
        raise AimeGymError(f"This model of {states.embodiment} sees images already; give one of states.")
    if setup == states.setup and idm_mode == "none":
        raise AimeGymError(
            f"This model has the senses of setup {setup!r} already; with --idm-mode detach an inverse dynamics model "
            "can be learned for it."
        )
    if setup == "visual" and not states.has_image and states.body.foreign:
        raise AimeGymError(f"{states.embodiment} has no image.")
    hidden = [sensor.name for sensor in states.sensors if sensor.name not in (*states.observed, *states.probed)]
    if hidden:
        raise AimeGymError(f"This model of {states.embodiment} does not decode {', '.join(hidden)}.")
    image = {"visual": NetConfig("cnn_ha", width=image_width)} if setup == "visual" else {}
    return replace(
        states,
        setup=setup,
        has_image=setup == "visual" or states.has_image,
        encoders=states.encoders | image,
        decoders=states.decoders | image,
        probes=states.decoders | image,
        idm_mode=idm_mode,
        use_reward=False,
        ensemble=None,
        policy=None,
    )


def keep_dynamics(model: WorldModel, states: WorldModel) -> None:
    """Gives a model the dynamics, sensor decoders and scales of a model of states, and freezes them.

    What is left to learn is the inverse dynamics model and, for other senses than that model's, encoder, posterior and
    image decoder.

    Args:
        model: A model with the config of `senses_config`.
        states: The model of states.
    """
    own, kept = model.state_dict(), {}
    learned = ("idm.",) if model.observed == states.observed else ("idm.", *_LEARNED)
    for name, value in states.state_dict().items():
        here = name if name in own else name.replace("decoders.", "probes.", 1)
        if here in own and not here.startswith(learned):
            kept[here] = value
    model.load_state_dict(kept, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in kept)


def senses_loss(model: WorldModel, batch: Observations) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative evidence of all sensors under a posterior that sees some, and the error of decoded images.

    Args:
        model: A model with the config of `senses_config`, with kept dynamics.
        batch: All sensors [T, B, D], ``image`` [T, B, 3, 64, 64] if it is seen, and ``pre_action`` [T, B, A]. With
            ``is_padding`` [T, B] bool if some frames do not count.

    Returns:
        The loss, in nats a frame, and its parts, all scalars.
    """
    targets = model.standardise({name: batch[name] for name in (*model.observed, *model.probed)})
    actions = batch["pre_action"].float()
    steps, size = actions.shape[:2]
    is_padding = batch.get("is_padding")
    frames = steps * size if is_padding is None else int((~is_padding).sum())
    noise = model.draw_noise(steps, size, True, None)
    embeddings = model.embed(targets)
    features, posterior = model.cell.unroll(model.initial_state(size), actions, embeddings, noise, steps)  # [T, B, F]
    decoders = {name: model.decoders[name] for name in model.observed if name != "image"}
    sensors = evaluate_together(decoders | {name: model.probes[name] for name in model.probed}, features)
    likelihoods = (sensor.log_prob(targets[name]) for name, sensor in sensors.items())  # [T, B, D] each
    evidence = -sum(without_padding(likelihood, is_padding).sum() for likelihood in likelihoods) / frames
    prior = model.cell.priors(features[..., : model.config.memory_dim])
    kl = without_padding(posterior.kl(prior), is_padding).sum() / frames

    loss = evidence + KL_SHARE * model.config.kl_scale * kl
    metrics = {
        f"{name}_mse": mean_of_steps((sensor.mean - targets[name]).square(), is_padding)
        for name, sensor in sensors.items()
    }
    if "image" in model.observed:
        chosen = torch.randperm(frames, device=features.device)[:DECODED]
        if is_padding is not None:
            chosen = (~is_padding).flatten().nonzero()[:, 0][chosen]
        image = model.decoders["image"](features.detach().flatten(0, 1)[chosen])
        error = (image.mean - targets["image"].flatten(0, 1)[chosen]).square()  # [N, 3, 64, 64]
        loss = loss + 0.5 * error.sum() / len(chosen)
        metrics["image_mse"] = error.mean()
    detached = model.config.idm_mode == "detach"
    inverse, inverse_metrics = inverse_dynamics_loss(model.idm, features, embeddings, actions, detached, is_padding)
    loss = loss + inverse / size
    metrics |= inverse_metrics | {"kl": kl, "total_loss": loss}
    return loss, {name: value.detach() for name, value in metrics.items()}
