"""What a model can be taught later: to judge a policy that it misjudges, without forgetting the rest, and to see.

Trained on five episodes alone, a model forgets all else within a minute. So half of each batch, by default, is of what
it knew: the user's own data of the model, or, where there are none left, dreams of the model itself (pseudo-rehearsal,
Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal", Connection Science 1995). These begin with the real
frames of its bank of starts and go on under actions that were really taken elsewhere in the bank. They take the means
of latents: dreams that sample teach the model its own noise once more, and others are then misjudged more than before.

A model of states can also be given other senses: images, or sensors without velocities, with the same dynamics. To live
on less than all sensors, it needs an encoder of what is seen and a posterior that corrects the memory by it, and for
images a decoder, to be looked at. These are learned while prior, memory, sensor decoders and heads stay as they are, so
that its dream is the dream of states, with its rewards and its faults. The posterior is trained on the evidence of all
sensors, which it does not see, and not on that of the pixels: what a latent stands for stays what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aime_gym.bodies.body import Setup
from aime_gym.data.dataset import TrajectoryDataset, WindowSampler
from aime_gym.data.trajectories import Trajectory
from aime_gym.errors import AimeGymError
from aime_gym.flags import HeadsOptions
from aime_gym.observations import to_tensors
from aime_gym.parallel import seeded
from aime_gym.training import callbacks
from aime_gym.training.fit_heads import REWARD, check_labels, fit_heads, with_rewards
from aime_gym.training.trainer import Callback, Trainer, adam, make_fabric
from aime_gym.world_model.checkpoint import load_starts
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import Observations, WorldModel
from aime_gym.world_model.objective import inverse_dynamics_loss, mean_of_steps, without_padding
from aime_gym.world_model.packed import evaluate_together, resolve_precision

ROWS = 64
"""Rows of a rehearsed dream, its real frames among them."""
HORIZON = 32
"""Rows of a window."""


def refine(
    model: WorldModel,
    data: TrajectoryDataset,
    rehearsed: TrajectoryDataset,
    updates: int,
    head_updates: int,
    share: float = 0.5,
    lr: float = 3e-4,
    batch_size: int = 32,
    seed: int = 0,
    hooks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
) -> WorldModel:
    """Trains a copy of a model on with new episodes and rehearsed ones, then its heads on its new features.

    Args:
        model: A model of sensors; it stays as it is.
        data: The new episodes, see `labelled`.
        rehearsed: What it shall not forget: see `dreams_of`, or own data, see `labelled`.
        updates: Gradient steps of the model.
        head_updates: Gradient steps of its heads, if it has some.
        share: Share of the windows that are of the new episodes, on average.
        lr: Adam's learning rate, with cosine decay.
        batch_size: Windows an update.
        seed: Draws windows and noise.
        hooks: Callbacks of the training beside its progress bar.
        checkpoint: A file of `Trainer.save` to go on from, if it is there.

    Returns:
        The corrected model, in eval mode.

    Raises:
        AimeGymError: If a loss is not finite, or the checkpoint is of something else.
        KeyboardInterrupt: After Ctrl-C, when the callbacks have saved.
    """
    both = mixture(data, rehearsed, share)
    refined = copy.deepcopy(model)
    heads, refined.heads = refined.heads, None
    refined.folder = refined.revision = None
    refined.train().requires_grad_(True)
    names = [*refined.config.outputs, *refined.probed, "pre_action"]
    with seeded(seed):
        trainer = Trainer(
            refined,
            adam(refined.parameters(), lr),
            WindowSampler(both, batch_size, min(HORIZON, both.longest), (seed,), names, least=2),
            lambda module, batch: module.loss(batch),
            updates,
            fabric=make_fabric(accelerator="cpu", devices=1, precision=resolve_precision("auto", "cpu")),  # type: ignore[arg-type]
            schedule="cosine",
            callbacks=[*hooks, callbacks.ProgressBar("Refining")],
        )
        if checkpoint is not None and checkpoint.exists():
            trainer.load(checkpoint)
            print(f"Resuming at update {trainer.update} of {updates}.")
        trainer.train()
    refined.eval().requires_grad_(False)
    if heads is not None:
        sizes = {name: heads.config[name] for name in ("hidden_size", "ensemble_hidden_size")}
        sizes["ensemble"] = max(1, heads.config["ensemble"])
        options = HeadsOptions(heads.tasks, head_updates, batch_size, lr, **sizes)
        refined.heads = fit_heads(refined, both, options, seed, initial=heads) if head_updates else heads
    return refined


def labelled(model: WorldModel, data: TrajectoryDataset) -> TrajectoryDataset:
    """Real episodes with all that a model and its heads learn from.

    Args:
        model: The model.
        data: Episodes of its body.

    Raises:
        AimeGymError: If they lack something.
    """
    if model.heads is None:
        return data
    check_labels(model.config.body, data)
    return with_rewards(data, model.config.body, model.heads.tasks)


@torch.no_grad()
def dreams_of(model: WorldModel, rows: int = ROWS, copies: int = 2, seed: int = 0) -> TrajectoryDataset:
    """What a model knows, as data: dreams from each of its starts, with the rewards and the physics of its heads.

    Args:
        model: A model of sensors that was loaded from a folder with `starts.npz`.
        rows: Rows of a dream, with the K real frames of its start.
        copies: Dreams from each start.
        seed: Draws the actions, which are those between the frames of other starts, one start after the other.

    Returns:
        So many trajectories for each start; they end where the dream terminates.

    Raises:
        AimeGymError: If the model has no starts.
    """
    starts = {
        name: np.concatenate([array] * copies, axis=int(name not in ("physics", "is_reset")))
        for name, array in load_starts(model).items()
    }
    led = starts["pre_action"]  # [K, M, A]
    frames, count = led.shape[:2]
    rng = np.random.default_rng(seed)
    if frames > 1:
        others = rng.integers(count, size=(-(-rows // (frames - 1)), count))
        elsewhere = np.concatenate([led[1:, each] for each in others])[: max(0, rows - frames)]
    else:
        size, choices = (max(0, rows - frames), count), model.config.choices
        drawn = rng.uniform(-1, 1, (*size, led.shape[2])) if choices is None else choices.draw(rng, size)
        elsewhere = drawn if choices is None else choices.encode(drawn)
    actions = np.concatenate([led, elsewhere]).astype(np.float32)  # [T, M, A]
    seen = to_tensors({name: starts[name] for name in model.observed})
    taken = torch.as_tensor(actions)
    features, _ = model.observe(seen, taken[:frames], sample=False)
    future = model.imagine(features[-1], taken[frames:], sample=False, names=()).features
    arrays = {name: value.numpy() for name, value in model.decode(torch.cat([features, future])).items()}
    for name in model.observed:
        arrays[name][:frames] = starts[name]
    ends = np.full(count, len(actions))
    if model.heads is not None:  # what they say on having seen the dream, as what is refined will see it
        seen = to_tensors({name: arrays[name] for name in model.observed})
        arrays |= _told_by(model.heads, model.observe(seen, taken, sample=False)[0], starts.get("physics"))
        if "is_terminal" in arrays:
            over = arrays["is_terminal"]
            ends = np.where(over.any(0), over.argmax(0) + 1, len(over))
    arrays["pre_action"] = actions
    return TrajectoryDataset([{key: value[: ends[i], i] for key, value in arrays.items()} for i in range(count)])


def _told_by(heads: Heads, features: torch.Tensor, physics: np.ndarray | None) -> dict[str, np.ndarray]:
    """What heads say of features [T, M, F], under the names of labelled data."""
    told = {REWARD.format(task): heads.reward(features, task)[..., None].numpy() for task in heads.tasks}
    if heads.state is None:
        return told | {"is_terminal": heads.continuation(features).numpy() < 0.5}
    state = heads.physics(features).double().numpy()
    unseen = 0 if physics is None else physics.shape[-1] - state.shape[-1]  # activations of muscles
    return told | {"physics": np.pad(state, ((0, 0), (0, 0), (0, unseen)))}


def mixture(data: TrajectoryDataset, rehearsed: TrajectoryDataset, share: float) -> TrajectoryDataset:
    """Both data sets in one, the new one as often in it as its share of the rows asks for.

    Raises:
        AimeGymError: If they have nothing in common to learn from.
    """
    keys = [key for key in data.keys if key in rehearsed.keys]
    if "pre_action" not in keys:
        raise AimeGymError("Expected trajectories with actions (`pre_action`).")
    rows: list[Trajectory] = [part[i] for part in (data, rehearsed) for i in range(len(part))]
    both = TrajectoryDataset([{key: row[key] for key in keys} for row in rows])
    lengths = both.bounds[:, 1] - both.bounds[:, 0]
    new, old = lengths[: len(data)].sum(), lengths[len(data) :].sum()
    times = max(1, round(share / (1 - share) * old / new))
    weighed = np.concatenate([np.tile(np.arange(len(data)), times), np.arange(len(data), len(both))])
    return both.subset(weighed)


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


def senses_loss(model: WorldModel, states: WorldModel, batch: Observations) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative evidence of all sensors under a posterior that sees some, and the error of decoded images.

    Images are decoded from the latents of the model of states, which knows where every limb is, as a dream does: from
    those that are estimated from images, the decoder would learn to blur what they hardly show.

    Args:
        model: A model with the config of `senses_config`, with kept dynamics.
        states: The model whose dynamics they are.
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
    features, posterior, *_ = model.cell.unroll(
        model.initial_state(size), actions, embeddings, noise, steps
    )  # [T, B, F]
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
        with torch.no_grad():
            sensed = states.embed(states.standardise({name: batch[name] for name in states.observed}))
            known, *_ = states.cell.unroll(states.initial_state(size), actions, sensed, noise, steps)
        image = model.decoders["image"](known.flatten(0, 1)[chosen])
        error = (image.mean - targets["image"].flatten(0, 1)[chosen]).square()  # [N, 3, 64, 64]
        loss = loss + 0.5 * error.sum() / len(chosen)
        metrics["image_mse"] = error.mean()
    detached = model.config.idm_mode == "detach"
    inverse, inverse_metrics = inverse_dynamics_loss(model.idm, features, embeddings, actions, detached, is_padding)
    loss = loss + inverse / size
    metrics |= inverse_metrics | {"kl": kl, "total_loss": loss}
    return loss, {name: value.detach() for name, value in metrics.items()}
