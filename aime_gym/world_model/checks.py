"""What users hand to a world model, checked before a network sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from aime_gym.errors import AimeGymError
from aime_gym.world_model.config import ModelConfig


def check_observations(
    config: ModelConfig, observations: Mapping[str, Tensor], names: Iterable[str], finite: bool = False
) -> None:
    """Checks that sensors are there, are float tensors of the right dims, and agree in time and batch.

    Args:
        config: Of the model.
        observations: Name -> [..., D]; images [..., 3, H, W].
        names: Those that are needed.
        finite: Whether to look for NaN and infinities too.

    Raises:
        AimeGymError: If not; names the sensor.
    """
    names = tuple(names)
    if not isinstance(observations, Mapping):
        raise AimeGymError(f"Expected observations by name ({', '.join(names)}), got {type(observations).__name__}.")
    missing = [name for name in names if name not in observations]
    if missing:
        raise AimeGymError(
            f"The {config.setup} model of {config.embodiment} needs {', '.join(missing)}; "
            f"got {', '.join(observations) or 'nothing'}."
        )
    leading = None
    for name in names:
        value = observations[name]
        _check_tensor(name, value)
        expected = "[..., 3, height, width]" if name == "image" else f"[..., {config.dims[name]}]"
        good = value.ndim >= 4 and value.shape[-3] == 3 if name == "image" else value.shape[-1:] == (config.dims[name],)
        if not good:
            raise AimeGymError(f"{name}: expected shape {expected} for {config.embodiment}, got {list(value.shape)}.")
        shape = value.shape[: -3 if name == "image" else -1]
        if leading is not None and shape != leading:
            raise AimeGymError(
                f"{name} has leading shape {list(shape)}, {names[0]} has {list(leading)}; expected the same."
            )
        leading = shape
        if finite:
            _check_finite(name, value)


def check_actions(
    config: ModelConfig, actions: Tensor | None, observations: Mapping[str, Tensor] | None = None, finite: bool = False
) -> tuple[int, int]:
    """Checks that actions are [T, B, A] and fit the observations; returns T and B.

    Raises:
        AimeGymError: If not.
    """
    if actions is None:
        raise AimeGymError("The batch lacks pre_action, the actions that led to the observations.")
    _check_tensor("actions", actions)
    if actions.ndim != 3 or actions.shape[-1] != config.action_dim or not len(actions) or not actions.shape[1]:
        raise AimeGymError(
            f"actions: expected shape [time, batch, {config.action_dim}] for {config.embodiment}, "
            f"got {list(actions.shape)}."
        )
    steps, batch = actions.shape[:2]
    if observations is not None:
        first = config.observed[0]
        leading = observations[first].shape[: -3 if first == "image" else -1]
        if tuple(leading) != (steps, batch):
            raise AimeGymError(
                f"actions are [time {steps}, batch {batch}, ...], {first} is {list(leading)} before its own dims; "
                "expected the same."
            )
    if finite:
        _check_finite("actions", actions)
    return steps, batch


def check_state(config: ModelConfig, state: Tensor, batch: int) -> Tensor:
    """Checks that a state is [B, F] and finite, and returns it.

    Raises:
        AimeGymError: If not.
    """
    _check_tensor("state", state)
    if state.shape != (batch, config.feature_dim):
        raise AimeGymError(f"state: expected shape [{batch}, {config.feature_dim}], got {list(state.shape)}.")
    _check_finite("state", state)
    return state


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise AimeGymError(f"{name}: expected a torch tensor, got {type(value).__name__}; `torch.as_tensor` makes one.")
    if not value.dtype.is_floating_point:
        hint = "; images are channels first and divided by 255" if value.dtype == torch.uint8 else ""
        raise AimeGymError(f"{name}: expected floating-point values, got {value.dtype}{hint}.")


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise AimeGymError(
            f"{name} holds values that are not finite, first at {(~value.isfinite()).nonzero()[0].tolist()}."
        )
