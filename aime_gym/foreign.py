"""Foreign bodies: what any Gymnasium env with a Box of actions looks like as an `Embodiment`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from aime_gym.embodiments import EPISODE_CONTROL_STEPS, Embodiment, Sensor, foreign_body, get_embodiment
from aime_gym.errors import AimeGymError

IMAGE = "image"
ONLY_SENSOR = "observation"
"""The name of the sensor of an env whose observations are one vector."""

_described: dict[str, tuple[EnvSpec, Embodiment]] = {}
"""The bodies that were looked at, by id, each with what was registered under it then."""


def describe_env(env_id: str) -> Embodiment:
    """The body in a Gymnasium env: its sensors are the parts of its observations, its one task is its own reward.

    Args:
        env_id: As `gymnasium.make` takes it, e.g. ``"Pendulum-v1"`` or ``"my_package:MyEnv-v0"``, whose env is made
            once, and again if it is registered anew; of the ids of this package, and of `register_dream`, it is the
            body that they stand for.

    Raises:
        AimeGymError: If there is no such env, it cannot be made, or its spaces are not Boxes.
    """
    name = env_id.rsplit(":", 1)[-1]
    spec = gymnasium.registry.get(name)
    if spec is not None and is_own(spec):
        return get_embodiment(spec.kwargs["embodiment"])
    if env_id in _described and _described[env_id][0] is spec:
        return _described[env_id][1]
    env = make_foreign(env_id)
    try:
        spec = gymnasium.spec(name)  # of a package that may have been imported just now
        body = body_of_spaces(env_id, env.observation_space, env.action_space, spec.max_episode_steps)
    finally:
        env.close()
    _described[env_id] = spec, body
    return body


def is_own(spec: EnvSpec) -> bool:
    """Whether it is of an env of this package that stands for a body."""
    return "embodiment" in spec.kwargs and str(spec.entry_point).startswith("aime_gym.")


def middle_and_reach(actions: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """What takes actions in [-1, 1] to the bounds of a space: ``middle + reach * action``."""
    return (actions.high + actions.low) / 2, (actions.high - actions.low) / 2


def body_of_spaces(
    name: str, observations: spaces.Space, actions: spaces.Space, episode_steps: int | None = None
) -> Embodiment:
    """The body that has these spaces.

    Args:
        name: Of the body.
        observations: A Box, or a Dict of them; one of them may be an image.
        actions: A bounded Box.
        episode_steps: Steps of an episode; 1000 if it has no limit.

    Raises:
        AimeGymError: If a space is of another kind.
    """
    sensors, has_image = _sensors(name, observations)
    if not isinstance(actions, spaces.Box) or not actions.is_bounded():
        raise AimeGymError(f"Expected actions in a bounded Box; {name} has {actions}. Wrap it into such an env.")
    steps = episode_steps or EPISODE_CONTROL_STEPS
    return foreign_body(name, sensors, int(np.prod(actions.shape)), steps, has_image)


def make_foreign(env_id: str, **kwargs: Any) -> gymnasium.Env:
    """Makes an env without a time limit.

    Raises:
        AimeGymError: If Gymnasium cannot; with its own reason.
    """
    try:
        return gymnasium.make(env_id, max_episode_steps=-1, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise AimeGymError(
            f"{env_id!r} is neither a body of the suite nor an env that Gymnasium can make ({error}). Is the package "
            "installed that registers it? 'package:Id-v0' imports the package first."
        ) from error


def readings(observation: Any) -> dict[str, np.ndarray]:
    """The sensors of an observation of a foreign env: name -> [dim] float32, and an image as uint8."""
    parts = observation if isinstance(observation, Mapping) else {ONLY_SENSOR: observation}
    sensors = {}
    for name, part in parts.items():
        part = np.asarray(part)
        if _is_image(part.dtype, part.shape):
            sensors[IMAGE] = part
        else:
            sensors[name] = part.astype(np.float32).reshape(-1)
    return sensors


def _sensors(env_id: str, space: spaces.Space) -> tuple[tuple[Sensor, ...], bool]:
    parts: Mapping[str, spaces.Space] = space.spaces if isinstance(space, spaces.Dict) else {ONLY_SENSOR: space}
    sensors, images = [], 0
    for name, part in parts.items():
        if not isinstance(part, spaces.Box) or part.dtype is None:
            raise AimeGymError(
                f"Expected observations that are a Box or a Dict of them; {env_id} has {name}: {part}. "
                "gymnasium.wrappers.FlattenObservation makes a Box of others."
            )
        if _is_image(part.dtype, part.shape):
            images += 1
        else:
            sensors.append(Sensor(name, int(np.prod(part.shape))))
    if images > 1:
        raise AimeGymError(f"Expected one image in the observations; {env_id} has {images}.")
    return tuple(sensors), bool(images)


def _is_image(dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    return dtype == np.uint8 and len(shape) == 3 and shape[-1] == 3
