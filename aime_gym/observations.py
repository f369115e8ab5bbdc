"""The spaces that dreams and the world share, and what arrays of observations become as tensors.

Shapes, in the whole package: time first, then the batch, then the dims, `[T, B, ...]`; a letter that is not here is
explained where it is used.

    T  time steps of a sequence               F = M + S  feature, the state of the model: concat(h, s)
    B  sequences of a batch                   M, S       memory h and latent s
    N  slots: dreams or envs side by side     E          embedding of what is observed
    H  steps that are dreamt (a horizon)      D, A       dims of a sensor (or of all, side by side), and of actions
    K  frames before a dream, or members      In `aime_gym.evaluation`, E is episodes.

Images are `[..., 3, 64, 64]` float32 in [0, 1] as tensors and `[..., 64, 64, 3]` uint8 as arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from aime_gym.bodies.body import Choices, Embodiment, Sensor, check_obs_type
from aime_gym.bodies.sensors import IMAGE_SIZE
from aime_gym.errors import AimeGymError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def action_space(body: Embodiment) -> spaces.Space:
    """The actions of a body: `[A]` float32 in [-1, 1], or where they are choices the env's own space of them."""
    return body.choices.space if body.choices else spaces.Box(-1.0, 1.0, (body.action_dim,), np.float32)


def observation_space(sensors: Sequence[Sensor], obs_type: str, feature_dim: int | None = None) -> spaces.Space:
    """The observation space of one env.

    Args:
        sensors: The tabular sensors that the setup shows, in order.
        obs_type: ``"state"`` (all of them in one `[D]` float32 Box), ``"dict"`` (a `[dim]` Box each; choices from 0
            on), ``"image"`` (64x64x3 uint8) or ``"latent"`` (`[feature_dim]` float32).
        feature_dim: Size of the model's feature, for ``"latent"``.

    Raises:
        AimeGymError: If the obs_type is unknown or does not fit the arguments.
    """
    check_obs_type(obs_type)
    if obs_type == "image":
        return spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    if obs_type == "latent":
        if feature_dim is None:
            raise AimeGymError("obs_type='latent' needs a world model, whose features it shows: pass model=.")
        return _vector(feature_dim)
    if not sensors:
        raise AimeGymError(f"obs_type={obs_type!r} needs tabular sensors; this setup has images only: use 'image'.")
    if obs_type == "dict":
        parts = {s.name: s.choices.space if s.choices else _vector(s.dim) for s in sensors}
        return spaces.Dict(parts)  # type: ignore[arg-type]  # spaces of several kinds
    return _vector(sum(sensor.dim for sensor in sensors))


def real_observation_space(sensors: Sequence[Sensor], obs_type: str) -> spaces.Space:
    """The observation space of a real env, which has no ``"latent"``; see `observation_space`."""
    if obs_type == "latent":
        raise AimeGymError(
            "The real env has no latents of its own: wrap it, LatentObservation(gymnasium.make(...), model)."
        )
    return observation_space(sensors, obs_type)


def to_vector(action: Any, body: Embodiment, clip: bool = False) -> np.ndarray:
    """An action of a body's `action_space` as the vector `[A]` that models and data know.

    Args:
        action: The action.
        body: The body that acts.
        clip: Whether finite numbers outside [-1, 1] become -1 or 1.

    Raises:
        AimeGymError: If it has another shape, is not finite or is not in the space.
    """
    action, dim = np.asarray(action), body.action_dim
    if body.choices:
        if action.shape != body.choices.shape:
            raise AimeGymError(f"An action is an element of {body.choices.space}; got {action!s:.80}.")
        return body.choices.encode(action)
    if clip and np.isfinite(action).all():
        action = np.clip(action, -1, 1)
    if action.shape != (dim,) or not (np.abs(action) <= 1 + 1e-6).all():
        raise AimeGymError(f"An action is {dim} numbers in [-1, 1]; got {action}.{CLIP_HINT}")
    return action


CLIP_HINT = " Make the env with clip_actions=True to have finite ones clipped."


def to_vectors(actions: np.ndarray, body: Embodiment) -> np.ndarray:
    """Actions of a body's `action_space`, `[..., A]` or choices, as the vectors `[..., A]` that models know."""
    return body.choices.encode(actions) if body.choices else actions


def to_state(sensors: Sequence[Sensor], observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """Concatenates sensors `[..., dim]` in their order to the ``"state"`` observation `[..., D]`."""
    return np.concatenate([observation[sensor.name] for sensor in sensors], axis=-1)


def to_shown(sensors: Sequence[Sensor], readings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sensors `[..., dim]` as ``"dict"`` shows them: the vectors of choices become those that have the most."""
    return {s.name: s.choices.decode(readings[s.name]) if s.choices else readings[s.name] for s in sensors}


def from_shown(sensors: Sequence[Sensor], shown: Mapping[str, Any]) -> dict[str, Any]:
    """What ``"dict"`` shows as sensors `[..., dim]`: choices, which are whole numbers, become vectors; floats stay."""
    choices = {sensor.name: sensor.choices for sensor in sensors if sensor.choices}
    coded = {
        name: own.encode(shown[name])
        for name, own in choices.items()
        if np.asarray(shown.get(name, 0.0)).dtype.kind in "iub"
    }
    return {**shown, **coded}


def to_sensors(sensors: Sequence[Sensor], state: np.ndarray) -> dict[str, np.ndarray]:
    """Splits a ``"state"`` observation `[..., D]` into its sensors `[..., dim]`."""
    ends = np.cumsum([sensor.dim for sensor in sensors])
    if not state.ndim or state.shape[-1] != ends[-1]:
        raise AimeGymError(f"A state of these sensors has {ends[-1]} values; got shape {state.shape}.")
    parts = np.split(state, ends[:-1], axis=-1)
    return {sensor.name: part for sensor, part in zip(sensors, parts, strict=True)}


def _vector(dim: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (dim,), np.float32)


def to_tensors(
    arrays: Mapping[str, np.ndarray] | Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Turns arrays into float32 tensors; an uint8 ``image`` `[..., H, W, C]` becomes `[..., C, H, W]` in [0, 1]."""
    import torch  # imported late: it takes seconds

    tensors = {}
    for name, array in arrays.items():
        if not isinstance(array, torch.Tensor):
            array = np.require(array, requirements="W")  # torch warns of others
        tensor = torch.as_tensor(array).to(device)
        if name == "image" and tensor.dtype == torch.uint8:
            tensor = tensor.movedim(-1, -3).float() / 255
        tensors[name] = tensor.float()
    return tensors


def read_frames(
    start: Mapping[str, Any], sensors: Sequence[Sensor], num_slots: int, choices: Choices | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Brings a user's own frames to one window for each slot.

    Args:
        start: ``observations``: a mapping of sensors, or an array as ``"state"`` or ``"image"`` show, [K, ...] for all
            slots alike or [K, N, ...]; ``actions``: those that led to the frames, [K, (N,) A], or without the first.
        sensors: The tabular sensors that a ``"state"`` is made of.
        num_slots: N
        choices: What actions are chosen from; the env's own are whole numbers, the model's vectors of floats.

    Returns:
        Sensors [K, N, ...] and actions [K, N, A].

    Raises:
        AimeGymError: If a part is missing or does not fit the others.
    """
    unknown = set(start) - {"observations", "actions"}
    if unknown or len(start) != 2:
        raise AimeGymError(f"A start from frames has 'observations' and 'actions'; got {', '.join(map(repr, start))}.")
    observations, actions = start["observations"], np.asarray(start["actions"])
    actions = choices.encode(actions) if choices and actions.dtype.kind in "iub" else actions.astype(np.float32)
    if (np.abs(actions) > 1).any():  # nan is found with the frames
        raise AimeGymError(f"Actions of a start are in [-1, 1], as those of `step`; got {np.abs(actions).max():g}.")
    if not isinstance(observations, Mapping):
        observations = by_name(sensors, observations)
    frames = {name: np.asarray(value) for name, value in from_shown(sensors, observations).items()}
    if actions.ndim == 2:
        actions = np.repeat(actions[:, None], num_slots, 1)
        frames = {name: np.repeat(value[:, None], num_slots, 1) for name, value in frames.items()}
    lengths = {len(value) for value in frames.values()}
    if lengths == {len(actions) + 1}:
        actions = np.concatenate([np.zeros((1, *actions.shape[1:]), np.float32), actions])
    if actions.ndim != 3 or lengths != {len(actions)} or any(v.shape[1] != num_slots for v in frames.values()):
        shapes = {name: value.shape for name, value in frames.items()}
        raise AimeGymError(
            f"Frames are [K, {num_slots}, ...] and actions [K, {num_slots}, A], or all without the slots; "
            f"got {shapes} and actions {actions.shape}."
        )
    return frames, actions


def by_name(sensors: Sequence[Sensor], observation: Any) -> dict[str, np.ndarray]:
    """An array as ``"state"`` or ``"image"`` show, by the names of what the model observes."""
    array = np.asarray(observation)
    if array.dtype.kind not in "fiub":
        raise AimeGymError(f"Expected an observation of numbers; got {observation!r:.80}.")
    return {"image": array} if array.dtype == np.uint8 or not sensors else to_sensors(sensors, array)
