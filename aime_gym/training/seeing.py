"""Teach a model of states to see: images in and out, with the same dynamics.

A model that was trained on states knows how its world moves. To be looked at it needs three more parts: an encoder of
images, a posterior that corrects the memory by them, and an image decoder. Here they are learned while prior, memory,
sensor decoders and heads stay as they are, so that the visual dream is the dream of states, with its rewards and its
faults, in pictures. The posterior is trained on the evidence of the sensors, which it does not see, and not on that of
the pixels: what a latent stands for stays what it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aime_gym.errors import AimeGymError
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.layers import evaluate_together
from aime_gym.world_model.model import Observations, WorldModel

DECODED = 128
"""Frames of a batch whose image is decoded; all of them are encoded."""
KL_SHARE = 0.1
"""Of the model's own weight of the KL: an image says less than the state, and what it says must be let in."""
_POSTERIOR = "cell.posterior"


def seeing_config(states: ModelConfig, image_width: int) -> ModelConfig:
    """The architecture of a model with the dynamics of a model of states that sees and decodes images.

    Args:
        states: Of the model of states.
        image_width: Channels of the first convolution.

    Raises:
        AimeGymError: If that model sees images already, or cannot tell the sensors.
    """
    if "image" in states.observed:
        raise AimeGymError(f"This model of {states.embodiment} sees images already; give one of states.")
    if not states.has_image and states.body.foreign:
        raise AimeGymError(f"{states.embodiment} has no image.")
    hidden = [sensor.name for sensor in states.sensors if sensor.name not in (*states.observed, *states.probed)]
    if hidden:
        raise AimeGymError(f"This model of {states.embodiment} does not decode {', '.join(hidden)}.")
    image = NetConfig("cnn_ha", width=image_width)
    return replace(
        states,
        setup="visual",
        has_image=True,
        encoders=states.encoders | {"visual": image},
        decoders=states.decoders | {"visual": image},
        probes=states.decoders | {"visual": image},
        idm_mode="none",
        use_reward=False,
        ensemble=None,
        policy=None,
    )


def keep_dynamics(model: WorldModel, states: WorldModel) -> None:
    """Gives a model the dynamics, sensor decoders and scales of a model of states, and freezes them.

    What is left to learn is the image encoder, the posterior and the image decoder.

    Args:
        model: Of `seeing_config`.
        states: The model of states.
    """
    own = model.state_dict()
    kept = {name.replace("decoders.", "probes.", 1): value for name, value in states.state_dict().items()}
    kept = {name: value for name, value in kept.items() if name in own and not name.startswith(_POSTERIOR)}
    model.load_state_dict(kept, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in kept)


def seeing_loss(model: WorldModel, batch: Observations) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative evidence of the sensors under a posterior that sees images, and the error of decoded images.

    Args:
        model: Of `seeing_config`, with kept dynamics.
        batch: ``image`` [T, B, 3, 64, 64], all sensors [T, B, D] and ``pre_action`` [T, B, A].

    Returns:
        The loss, in nats a frame, and its parts, all scalars.
    """
    targets = model.standardise({name: batch[name] for name in ("image", *model.probed)})
    actions = batch["pre_action"].float()
    steps, size = actions.shape[:2]
    noise = model.draw_noise(steps, size, True, None)
    features, posterior = model.cell.unroll(
        model.initial_state(size), actions, model.embed(targets), noise, steps
    )  # [T, B, F]
    sensors = evaluate_together({name: model.probes[name] for name in model.probed}, features)
    evidence = -sum(sensors[name].log_prob(targets[name]).sum() for name in model.probed) / (steps * size)
    prior = model.cell.priors(features[..., : model.config.memory_dim])
    kl = posterior.kl(prior).sum() / (steps * size)

    chosen = torch.randperm(steps * size, device=features.device)[:DECODED]
    image = model.decoders["image"](features.detach().flatten(0, 1)[chosen])
    error = (image.mean - targets["image"].flatten(0, 1)[chosen]).square()  # [N, 3, 64, 64]
    loss = evidence + KL_SHARE * model.config.kl_scale * kl + 0.5 * error.sum() / len(chosen)
    metrics = {f"{name}_mse": (sensors[name].mean - targets[name]).square().mean() for name in model.probed}
    metrics |= {"image_mse": error.mean(), "kl": kl, "total_loss": loss}
    return loss, {name: value.detach() for name, value in metrics.items()}
