"""Any env is a body: this package's own by name, and others by what their spaces show."""

from __future__ import annotations

import inspect
import math
import multiprocessing
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator

from aime_gym.bodies.body import (
    EMBODIMENTS,
    EPISODE_CONTROL_STEPS,
    Choices,
    Embodiment,
    Sensor,
    action_range,
    foreign_body,
)
from aime_gym.bodies.sensors import Picture, leaves, name_inside, picture_in
from aime_gym.errors import AimeGymError, check_positive, unknown_name, warn_caller
from aime_gym.files import reason
from aime_gym.gl import settle_backend


def get_embodiment(name: str, imports: bool = True) -> Embodiment:
    """Looks a body up by its name in any spelling: ``"ball_in_cup"``, ``"BallInCup"``, ``"ball-in-cup"``.

    A Gymnasium id such as ``"Pendulum-v1"`` or ``"my_package:MyEnv-v0"`` names a foreign body; its env is made once to
    see its spaces.

    Args:
        name: Name of the body.
        imports: Whether a package that an id names is imported if it is not yet. Not where the name comes from a file:
            whoever made the file would choose what runs here.

    Raises:
        AimeGymError: If there is none; the message suggests the nearest.
    """
    if not isinstance(name, str):
        raise AimeGymError(f"An embodiment is named by a string such as 'walker'; got {name!r}.")
    if is_gymnasium_id(name):
        package = name.rpartition(":")[0]
        if package and not imports and package not in sys.modules:
            raise AimeGymError(
                f"{name!r} is named in a file, and files import nothing: `import {package}` first if you trust it, or "
                "name the env yourself (--embodiment, or real= of register_dream)."
            )
        return describe_env(name)
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("-", "_").lower()
    if snake not in EMBODIMENTS:
        raise unknown_name("embodiment", snake, EMBODIMENTS)
    return EMBODIMENTS[snake]


def is_gymnasium_id(name: str) -> bool:
    """Whether a name is of Gymnasium's kind: of a package, of a version, or registered."""
    return ":" in name or bool(re.search(r"-v\d+$", name)) or name in gymnasium.registry


IMAGE = "image"

ONLY_SENSOR = "observation"
"""The name of the sensor of an env whose observations are one vector."""

_described: dict[str, tuple[EnvSpec, Embodiment]] = {}
"""Bodies that are known already, by id, each with what was registered under that id."""


def describe_env(env_id: str) -> Embodiment:
    """The body in a Gymnasium env: its sensors are the parts of its observations, its one task is its own reward.

    Args:
        env_id: An id for `gymnasium.make`, e.g. ``"Pendulum-v1"`` or ``"my_package:MyEnv-v0"``, whose env is made
            once, and again if it is registered anew; of the ids of this package, and of `register_dream`, it is the
            body that they stand for.

    Raises:
        AimeGymError: If there is no such env, it cannot be made, or its spaces are of another kind.
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
        if multiprocessing.parent_process() is None:  # which has said it before its workers began
            _say_at_first_look(env_id, env, looks=not body.has_image)
    finally:
        env.close()
    _described[env_id] = spec, body
    return body


def _say_at_first_look(name: str, env: gymnasium.Env, looks: bool) -> None:
    """Warns of what no error tells: actions without bounds, and episodes that no seed repeats.

    Args:
        name: The env's id.
        env: The env.
        looks: Whether it may be reset: one that draws needs care of GL, which is not taken here.
    """
    space = env.action_space
    if isinstance(space, spaces.Box) and not has_bounds(space):
        low, high = ends_of(space)
        warn_caller(
            f"The actions of {name} have no bounds, or such beyond {FARTHEST:g}: -1 and 1 stand for "
            f"{low.ravel().tolist()} and {high.ravel().tolist()}. Register it in a RescaleAction for others."
        )
    if not looks:
        return
    try:
        first, again = (np.asarray(spaces.flatten(env.observation_space, env.reset(seed=0)[0])) for _ in range(2))
        repeats = bool(np.array_equal(first, again))
    except Exception:  # an env of others fails in ways of its own; what needs a reset will say how
        return
    if not repeats:
        warn_caller(
            f"{name} ignores reset(seed=...): two resets with one seed differ. Nothing that begins with a seed will "
            "begin alike again in it: data, trials and comparisons."
        )


def has_time_limit(body: Embodiment) -> bool:
    """Whether an env is registered with a limit of steps; one without may end its episodes itself."""
    spec = gymnasium.registry.get(body.name.rsplit(":", 1)[-1])
    return not body.foreign or spec is None or spec.max_episode_steps is not None


def is_own(spec: EnvSpec) -> bool:
    """Whether it is the id of one of this package's envs."""
    return "embodiment" in spec.kwargs and str(spec.entry_point).startswith("aime_gym.")


def to_own_action(action: np.ndarray, space: spaces.Space) -> np.ndarray:
    """What a vector [A] in [-1, 1] stands for.

    Args:
        action: [A], stretched to the bounds of a Box, both of which it reaches, with integers rounded to; or the vector
            of `Choices`.
        space: The space of the env's own actions.

    Returns:
        An element of the space.
    """
    if choices := Choices.of(space):
        return (choices.decode(action).reshape(space.shape) + getattr(space, "start", 0)).astype(space.dtype)[()]
    assert isinstance(space, spaces.Box)
    middle, reach = _middle_and_reach(space)
    own = middle + reach * np.clip(np.asarray(action, np.float64), -1, 1).reshape(space.shape)
    own = np.rint(own) if np.issubdtype(space.dtype, np.integer) else own
    below, above = own <= space.low.astype(np.float64), own >= space.high.astype(np.float64)  # of no bounds, never
    between = np.where(below | above, 0, own).astype(space.dtype)  # a bound of int64 is no float64
    return np.where(above, space.high, np.where(below, space.low, between))


def from_own_actions(actions: np.ndarray, space: spaces.Space) -> np.ndarray:
    """The vectors that `to_own_action` takes to these, [T, ...] -> [T, A] in [-1, 1]; 0 where there is no choice."""
    if choices := Choices.of(space):
        actions = np.asarray(actions) - getattr(space, "start", 0)
        return choices.encode(actions.reshape(len(actions), *choices.shape))
    assert isinstance(space, spaces.Box)
    middle, reach = _middle_and_reach(space)
    away = np.asarray(actions, np.float64) - middle
    return np.clip(np.divide(away, reach, out=np.zeros_like(away), where=reach > 0), -1, 1).reshape(len(away), -1)


FARTHEST = 1e6
"""Bounds of floats beyond it are none: nobody means an action of half of them."""


def has_bounds(space: spaces.Box) -> bool:
    """Whether all bounds of a Box of actions are such that -1 and 1 can stand for them."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return np.dtype(space.dtype).kind != "f" or bool((np.maximum(-low, high) <= FARTHEST).all())


def ends_of(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """What -1 and 1 stand for in a Box of actions, in float64: its bounds, and themselves where there are none.

    Where one side alone has a bound, the other is 2 away from it.
    """
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if has_bounds(space):
        return low, high
    no_low, no_high = low < -FARTHEST, high > FARTHEST
    begin = np.where(no_low, np.where(no_high, -1.0, high - 2), low)
    return begin, np.where(no_high, begin + 2, high)


def _middle_and_reach(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Half the sum and half the difference of the bounds, in float64: in their own dtype they may overflow."""
    low, high = (end / 2 for end in ends_of(space))
    return high + low, high - low


def body_of_spaces(
    name: str, observations: spaces.Space, actions: spaces.Space, episode_steps: int | None = None
) -> Embodiment:
    """The body that has these spaces.

    Args:
        name: Name of the body.
        observations: A Box, `Choices`, or a Dict or Tuple of such parts; one of them may be an image.
        actions: A Box, or `Choices`.
        episode_steps: Steps of an episode; 1000 if it has no limit.

    Raises:
        AimeGymError: If a space is of another kind.
    """
    reader = Reader(name, observations)
    choices, size = Choices.of(actions), 0 if actions.shape is None else math.prod(actions.shape)
    if choices is None and not (isinstance(actions, spaces.Box) and size):
        raise AimeGymError(
            f"Expected actions in a Box of one number or more; {name} has {actions}. Discrete, MultiDiscrete "
            "and MultiBinary ones are taken, too: wrap it into such an env."
        )
    steps = episode_steps or EPISODE_CONTROL_STEPS
    return foreign_body(name, reader.sensors, choices.dim if choices else size, steps, reader.has_image, choices)


def make_foreign(env_id: str, **kwargs: Any) -> gymnasium.Env:
    """Makes an env without a time limit, whose pictures need no display.

    Raises:
        AimeGymError: If Gymnasium cannot; with its own reason.
    """
    settle_backend()
    try:
        return gymnasium.make(env_id, max_episode_steps=-1, disable_env_checker=True, **kwargs)
    except Exception as error:  # an env of others fails in ways of its own
        reason = str(error) or type(error).__name__
        raise AimeGymError(
            f"{env_id!r} is neither a body of the suite nor an env that Gymnasium can make ({reason}). Is the package "
            "installed that registers it? 'package:Id-v0' imports the package first."
        ) from error


def check_render_mode(env_id: str, render_mode: str) -> None:
    """Raises an `AimeGymError` if an env, which is registered, says that it cannot be rendered so, or takes no mode."""
    creator: Any = gymnasium.registry[env_id.rsplit(":", 1)[-1]].entry_point
    creator = load_env_creator(creator) if isinstance(creator, str) else creator
    metadata: dict[str, Any] = getattr(creator, "metadata", gymnasium.Env.metadata)
    says = metadata is not gymnasium.Env.metadata and "render_modes" in metadata
    if not says and _takes_render_mode(creator):
        return
    modes = metadata["render_modes"] if says else []
    by_wrapper = ["human", "rgb_array_list"] if "rgb_array" in modes else []
    if render_mode not in (*modes, *by_wrapper):
        known = f"but {', '.join(map(repr, modes))}" if modes else "at all"
        raise AimeGymError(f"{env_id} cannot be rendered with render_mode={render_mode!r}: it knows none {known}.")


def _takes_render_mode(creator: Any) -> bool:
    parameters = inspect.signature(creator).parameters.values()
    return any(one.name == "render_mode" or one.kind is one.VAR_KEYWORD for one in parameters)


def seconds_of_step(env: gymnasium.Env) -> float | None:
    """The duration of a step by an env's own clock; None where it has none.

    Gymnasium's envs keep it as ``dt`` or ``tau``, dm_control's as ``control_timestep()``.
    """
    inner = env.unwrapped
    for holder in (inner, getattr(inner, "_env", None)):
        for name in ("dt", "tau", "control_timestep"):
            value = getattr(holder, name, None)
            value = value() if callable(value) else value
            if isinstance(value, (int, float)) and value > 0:
                return float(value)
    return None


def _is_key(key: Any) -> bool:
    return isinstance(key, str | int)


class Reader:
    """Reads the observations of a foreign env as sensors of a body.

    Args:
        name: Name of the env, for errors.
        space: The space of its observations: a Box, `Choices`, or a Dict or Tuple of such parts, of any depth. Parts of
            parts are called by their path, e.g. ``"arm/0"``.

    Attributes:
        sensors: The tabular ones, in the order of `leaves`, with the names of `aime_gym.bodies.sensors`.
        has_image: Whether one part is a picture, in one of the layouts of `aime_gym.bodies.sensors`.

    Raises:
        AimeGymError: If the space is of another kind, or there is more than one image.
    """

    def __init__(self, name: str, space: spaces.Space):
        parts = list(leaves(space))
        pictures: dict[str, Picture] = {}
        vectors: dict[str, Sensor] = {}
        for path, part in parts:
            own = "/".join(map(str, path)) if path else ONLY_SENSOR
            if [*vectors, *pictures].count(own):
                raise AimeGymError(f"Two parts of the observations of {name} are called {own!r}: rename one.")
            if choices := Choices.of(part):
                vectors[own] = Sensor(name_inside(own), choices.dim, choices=choices)
                continue
            if not isinstance(part, spaces.Box) or part.dtype is None or not all(map(_is_key, path)):
                raise AimeGymError(
                    "Expected observations that are a Box, Discrete, MultiDiscrete or MultiBinary, or a Dict or Tuple "
                    f"of such parts, by names; {name} has {own!r}: {part}. gymnasium.wrappers.TransformObservation "
                    "makes one of these of it."
                )
            picture = picture_in(part, f"{own!r} of {name}" if path else f"The observation of {name}")
            if picture is not None:
                pictures[own] = picture
            elif np.prod(part.shape):
                vectors[own] = Sensor(name_inside(own), int(np.prod(part.shape)))
        if len(pictures) > 1:
            raise AimeGymError(
                f"Expected one image in the observations; {name} has {', '.join(map(repr, pictures))}. "
                "gymnasium.wrappers.FilterObservation leaves the others out."
            )
        if not (vectors or pictures):
            raise AimeGymError(f"Expected observations of one number or more; {name} has {space}.")
        self._paths = {"/".join(map(str, path)) if path else ONLY_SENSOR: (path, part) for path, part in parts}
        self._name, self._vectors = name, vectors
        self._picture = next(iter(pictures.items()), None)
        self.sensors, self.has_image = tuple(vectors.values()), bool(pictures)

    def read(self, observation: Any) -> dict[str, np.ndarray]:
        """Sensor -> [dim] float32, and the ``image`` [64, 64, 3] uint8 if there is one.

        Raises:
            AimeGymError: If a part is missing, or is not of its space.
        """
        shown = {}
        for own, sensor in self._vectors.items():
            path, space = self._paths[own]
            value: Any = "nothing"
            try:
                value = reduce(getitem, path, observation)
                row = np.array(spaces.flatten(space, value) if sensor.choices else value, np.float32).reshape(-1)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise AimeGymError(self._differs(own, value)) from error
            if row.size != sensor.dim:
                raise AimeGymError(self._differs(own, value))
            shown[sensor.name] = row
        if self._picture is not None:
            own, picture = self._picture
            shown[IMAGE] = picture(reduce(getitem, self._paths[own][0], observation))
        return shown

    def _differs(self, own: str, value: Any) -> str:
        return (
            f"{self._name} says that it shows {own!r} in {self._paths[own][1]}, and shows {value!s:.80}: its "
            "observation_space or its observations are wrong (gymnasium.utils.env_checker.check_env tells more)."
        )


def range_of(actions: spaces.Space) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What -1 and 1 stand for in vectors of actions of a space; 0 and 1 of choices."""
    if choices := Choices.of(actions):
        return (0.0,) * choices.dim, (1.0,) * choices.dim
    assert isinstance(actions, spaces.Box)
    low, high = ends_of(actions)
    return tuple(low.ravel().tolist()), tuple(high.ravel().tolist())


def body_document(body: Embodiment) -> dict[str, Any]:
    """What `dataset.json` says of the body of logged data, under ``"body"``."""
    return {
        "sensors": {sensor.name: sensor.dim for sensor in body.sensors},
        **({"sensor_choices": own} if (own := {s.name: s.choices.document for s in body.sensors if s.choices}) else {}),
        "has_image": body.has_image,
        "episode_steps": body.episode_steps,
        "logged_range": body.logged_range and [list(end) for end in body.logged_range],
        **({"choices": body.choices.document} if body.choices else {}),
    }


def _choices(told: Any) -> Choices:
    kind, counts = told
    return Choices(kind, tuple(check_positive(count, "choices") for count in counts))


def logged_body(metadata: Mapping[str, Any]) -> Embodiment | None:
    """The body of a data set that was logged, without an env; None of others.

    Raises:
        AimeGymError: If what is said of it makes no sense.
    """
    told = metadata.get("body")
    if told is None:
        return None
    try:
        chosen = {name: _choices(own) for name, own in told.get("sensor_choices", {}).items()}
        dims = {str(name): check_positive(dim, name) for name, dim in told["sensors"].items()}
        sensors = tuple(Sensor(name, dim, choices=chosen.get(name)) for name, dim in dims.items())
        steps, ends = check_positive(told["episode_steps"], "episode_steps"), action_range(told["logged_range"])
        if ends is None or not isinstance(told["has_image"], bool):
            raise ValueError("the range of actions, or whether there are images, is missing")
        choices = _choices(told["choices"]) if "choices" in told else None
        if any(own.dim != dims.get(name) for name, own in chosen.items()):
            raise ValueError("the choices among the sensors are not of their dims")
        if choices and choices.dim != len(ends[0]):
            raise ValueError("the choices are not of the range of actions")
        body = foreign_body(metadata["embodiment"], sensors, len(ends[0]), steps, told["has_image"], choices)
        return replace(body, logged_range=ends)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise AimeGymError(f"dataset.json tells of a body that makes no sense ({reason(error)}).") from error


def one_body(bodies: Sequence[Embodiment]) -> Embodiment:
    """The body of several logged data sets: its episodes are as long as the longest.

    Raises:
        AimeGymError: If they differ in more than that.
    """
    first = max(bodies, key=lambda body: body.episode_steps)
    for other in bodies:
        if replace(other, episode_control_steps=first.episode_control_steps) != first:
            what = "sensors" if other.sensors != first.sensors else "what -1 and 1 stand for in their actions"
            raise AimeGymError(
                f"These data sets of {first.name} differ in {what}: log them alike, and give from_arrays the same "
                "action_space for both."
            )
    return first
