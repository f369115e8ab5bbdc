"""What bodies sense: names that are safe inside, the scale on which a sensor varies, and pictures.

Sensors name arrays in files of trajectories, beside ``reward`` and ``pre_action``, and modules of networks, which take
no dots and none of torch's own names. So each has a name inside, which is its own where that is free. Pictures come in
many layouts; models take one, ``[64, 64, 3]`` uint8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
from gymnasium import spaces
from PIL import Image

from aime_gym.errors import AimeGymError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor  # whose import takes seconds

    from aime_gym.bodies.body import Sensor

_PREFIX = "sensor__"

_RESERVED = ("file", "allow_pickle", "image", "physics", "pre_action", "reward", "tabular", "true_action")
"""Other arrays and modules, and arguments of `numpy.savez`."""


def renamed(body: str, insides: Iterable[str]) -> str:
    """What to tell of a body's sensors that have other names inside; empty where all have their own."""
    told = [f"{own!r} is {inside}" for inside in insides if (own := own_name(inside)) != inside]
    return f"In data and models of {body}: {', '.join(told)}." if told else ""


@cache
def _names_of_modules() -> frozenset[str]:
    """Names that parts of networks cannot have. Kept here as importing torch takes seconds."""
    from torch import nn

    return frozenset(dir(nn.ModuleDict()))


def is_free(name: str) -> bool:
    """Whether a sensor can have this name in files and networks."""
    taken = name in _RESERVED or name.startswith(("_", "is_")) or name in _names_of_modules()
    return name.isidentifier() and not taken


def name_inside(own: str) -> str:
    """The name inside of what an env calls `own`; no two names have the same one."""
    if is_free(own) and not own.startswith(_PREFIX):
        return own
    return _PREFIX + re.sub(r"[^A-Za-z0-9]", lambda sign: f"_{ord(sign[0]):x}_", own)


def own_name(inside: str) -> str:
    """What the env calls it: the inverse of `name_inside`."""
    if not inside.startswith(_PREFIX):
        return inside
    return re.sub(r"_([0-9a-f]+)_", lambda code: chr(int(code[1], 16)), inside.removeprefix(_PREFIX))


Moments = TypeVar("Moments", "np.ndarray", "Tensor")

ROUNDING = 1e-6
"""Dims that vary by a smaller share of their mean are constant: float32 has hardly more digits."""

NOISE = 1e-12
"""Dims that vary by a smaller share of the largest dim beside them are constant: so does what is 0 but for rounding."""


def varies(mean: Moments, std: Moments) -> Moments:
    """Which dims are not constant.

    Args:
        mean: The mean of each dim over the data, [D].
        std: Standard deviation of each dim, [D].

    Returns:
        [D] bool
    """
    return (std > ROUNDING * abs(mean)) & (std > NOISE * _largest(mean, std))


def scale(mean: Moments, std: Moments) -> Moments:
    """What to divide dims by so that they are of size 1: their standard deviation.

    That of constants is the size of the largest dim beside them, or 1 if all are always 0; for arguments see `varies`.
    """
    largest, divisor = _largest(mean, std), std + 0
    divisor[~varies(mean, std)] = largest if largest > 0 else 1.0
    return divisor


def _largest(mean: Moments, std: Moments) -> Moments:
    return (abs(mean) + std).max()


class Arm(NamedTuple):
    """A planar arm, and a target that stays where it is for an episode."""

    joints: str
    """The sensor of its angles, each against the link before."""
    to_target: str
    """The sensor of the way from its end to the target, along x and y in metres."""
    lengths: tuple[float, ...]
    """Its links, in metres."""


ARMS = MappingProxyType({"reacher": Arm("position", "to_target", (0.12, 0.12))})
"""Bodies -> such arms. The lengths are those of `dm_control`'s reacher.xml."""


class AngleCode:
    """Numbers of which some are angles that turn freely, as numbers that a network can learn.

    Such an angle becomes its sine and its cosine, so that nothing jumps where a turn is complete and all turns look
    alike. In the code of each part the other numbers come first, then the sines, then the cosines. Gradients lead
    through both directions.

    Args:
        *parts: What lies side by side, as sensors.
        arm: What else of them goes on from before, see `nearest`, where both of its sensors are there.

    Attributes:
        parts: The same.
        dim: D, numbers of all parts together.
        size: C, numbers of their code.
        rotations: Which of the D are such angles.
        goes_on: Whether `nearest` does anything.
    """

    def __init__(self, *parts: Sensor, arm: Arm | None = None):
        self.parts = parts
        self.dim = self.size = 0
        self.rotations: list[int] = []
        self._runs: list[tuple[int, int, int, int | None]] = []
        """Columns `begin` to `end` of the numbers, where in the code they begin, and where the cosine of an angle is"""
        for part in parts:
            dim, rotations = part.dim, part.rotations
            plain, sine = self.size, self.size + dim - len(rotations)
            begin, end = self.dim, self.dim + dim
            for i, angle in enumerate(rotations):
                column = self.dim + angle
                self._runs += [(begin, column, plain, None)] if column > begin else []
                self._runs.append((column, column + 1, sine + i, sine + len(rotations) + i))
                self.rotations.append(column)
                plain, begin = plain + column - begin, column + 1
            self._runs += [(begin, end, plain, None)] if end > begin else []
            self.dim, self.size = end, self.size + dim + len(rotations)
        places = {
            part.name: slice(end - part.dim, end)
            for part, end in zip(parts, accumulate(p.dim for p in parts), strict=True)
        }
        self._arm = arm if arm is not None and {arm.joints, arm.to_target} <= {*places} else None
        if self._arm:
            self._joints, self._to_target = places[self._arm.joints], places[self._arm.to_target]
        self.goes_on = bool(self.rotations) or self._arm is not None

    def encode(self, values: Moments) -> Moments:
        """`[..., D]` -> `[..., C]`, of arrays or tensors."""
        if not self.rotations:
            return values
        import torch  # imported late: it takes seconds

        if isinstance(values, np.ndarray):
            return self.encode(torch.tensor(values)).numpy()
        parts = {}
        for begin, end, place, cosine in self._runs:
            part = values[..., begin:end]
            parts[place] = part if cosine is None else part.sin()
            if cosine is not None:
                parts[cosine] = part.cos()
        return torch.cat([parts[place] for place in sorted(parts)], -1)

    def decode(self, code: Tensor) -> Tensor:
        """`[..., C]` -> `[..., D]` with angles within [-pi, pi]; what is behind the code stays behind the numbers."""
        if not self.rotations:
            return code
        import torch

        parts = [
            code[..., place : place + end - begin]
            if cosine is None
            else torch.atan2(code[..., place : place + 1], code[..., cosine : cosine + 1])
            for begin, end, place, cosine in self._runs
        ]
        return torch.cat([*parts, code[..., self.size :]], -1)

    def nearest(self, values: Moments, others: Moments) -> Moments:
        """Values as they follow on others, those before: `[..., D]`, arrays or tensors.

        Each angle is at the turn that is nearest to the same one of others. The target of an arm lies where it lay:
        a memory loses it within some hundred steps, and a world keeps it. What is behind the D numbers stays.
        """
        if not self.goes_on:
            return values
        import torch

        if isinstance(values, np.ndarray):
            return self.nearest(torch.tensor(values), torch.tensor(others)).numpy()
        parts: list[Tensor] = []
        begin = 0
        for column in self.rotations:
            angle = values[..., column : column + 1]
            turns = (others[..., column : column + 1] - angle).detach().div_(math.tau).round_()
            parts += [values[..., begin:column], angle.add(turns, alpha=math.tau)]
            begin = column + 1
        following = torch.cat([*parts, values[..., begin:]], -1)
        if self._arm is None:
            return following
        target = others[..., self._to_target] + self._end_of_arm(others)
        way = target - self._end_of_arm(following)
        return torch.cat([following[..., : self._to_target.start], way, following[..., self._to_target.stop :]], -1)

    def _end_of_arm(self, values: Tensor) -> Tensor:
        """Where the end of the arm is: `[..., D]` -> `[..., 2]`."""
        import torch

        assert self._arm is not None
        directions = values[..., self._joints].cumsum(-1)
        lengths = values.new_tensor(self._arm.lengths)
        return torch.stack([(lengths * directions.cos()).sum(-1), (lengths * directions.sin()).sum(-1)], -1)

    def moments(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[D]` of numbers whose code has these `[C]`.

        Those of angles are the circular ones (Mardia, Statistics of Directional Data, 1972).
        """
        if not self.rotations:
            return mean, std
        own_mean, own_std = self.decode(mean), self.decode(std)
        for begin, _, sine, cosine in self._runs:
            if cosine is not None:
                length = (mean[sine].square() + mean[cosine].square()).sqrt().clamp(1e-6, 1.0)
                own_std[begin] = (-2 * length.log()).sqrt()
        return own_mean, own_std


IMAGE_SIZE = 64
"""Pixels of a side, as models take and dream them."""

Rendering = Literal["full", "fast"]
"""How MuJoCo draws bodies of the suite: as dm_control does, or with a smaller shadow map and coarser meshes."""


def check_rendering(rendering: str) -> Rendering:
    """Returns the rendering; an `AimeGymError` for an unknown one."""
    if rendering not in (known := get_args(Rendering)):
        raise unknown_name("rendering", rendering, known)
    return cast(Rendering, rendering)


SHORTEST_SIDE = 8
"""In pixels; of what has smaller sides only red, green and blue as bytes, [H, W, 3], are a picture."""

MOST_NUMBERS = 1000
"""In a table that is no picture; larger ones must be flattened by who means them to be vectors."""

Picture = Callable[[Any], np.ndarray]
"""Turns what an env shows into [64, 64, 3] uint8."""


def leaves(space: spaces.Space, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], spaces.Space]]:
    """The parts of nested Dicts and Tuples, with the keys and indices that lead to them; of a Dict by their names.

    Gymnasium keeps the order of ``Dict(b=..., a=...)`` and not that of ``Dict({"b": ..., "a": ...})``, and calls both
    equal: an env that is spelled otherwise one day shows the same state as before.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts: Any = enumerate(space.spaces)
        if isinstance(space, spaces.Dict):
            parts = sorted(space.spaces.items(), key=_by_name)
        for key, part in parts:
            yield from leaves(part, (*path, key))
    else:
        yield path, space


def _by_name(part: tuple[Any, spaces.Space]) -> str:
    return str(part[0])


def picture_in(space: spaces.Box, told: str) -> Picture | None:
    """How a part of an observation is read as a picture; None if it is none.

    Pictures are [H, W, 3], [3, H, W], [H, W, 1], [1, H, W] of integers in [0, 255] or of floats in [0, 1] or [0, 255],
    and [H, W] of integers in [0, 255].

    Args:
        space: The space of the part.
        told: What the part is called in errors.

    Raises:
        AimeGymError: If it is a large table, but none of these: several frames in one, or floats without bounds.
    """
    shape, dtype = space.shape, np.dtype(space.dtype)
    scale = _scale(space)
    if len(shape) == 3 and shape[-1] == 3 and dtype == np.uint8:
        return lambda shown: to_model_size(np.asarray(shown))
    if scale is not None and len(shape) in (2, 3):
        channels = _channel_axis(shape) if len(shape) == 3 else None
        height_width = [side for axis, side in enumerate(shape) if axis != channels]
        is_picture = len(height_width) == 2 and min(height_width) >= SHORTEST_SIDE
        if is_picture and (len(shape) == 3 or dtype.kind in "ui"):
            return lambda shown: to_model_size(_to_bytes(shown, channels, scale))
    if len(shape) > 1 and np.prod(shape) > MOST_NUMBERS:
        raise AimeGymError(
            f"{told} is {dtype} {list(shape)} in [{space.low.min():g}, {space.high.max():g}]: a picture in a layout "
            "that is not known, or a large table. A picture is one frame (the model itself remembers those before: no "
            "frame stack), [H, W, 3] or [3, H, W], or [H, W, 1] if it is gray, of uint8 or of floats in [0, 1]: "
            "gymnasium.wrappers.TransformObservation makes it so. A vector has one axis: "
            "gymnasium.wrappers.FlattenObservation."
        )
    return None


def to_model_size(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [64, 64, 3], of means where it shrinks."""
    if image.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    return np.array(Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def to_model_sizes(images: np.ndarray) -> np.ndarray:
    """`to_model_size` of each: [T, H, W, 3] uint8 -> [T, 64, 64, 3]."""
    if images.shape[1:3] == (IMAGE_SIZE, IMAGE_SIZE):
        return images
    return np.stack([to_model_size(image) for image in images])


def _scale(space: spaces.Box) -> float | None:
    """What takes the numbers of a space to [0, 255]; None if they are not those of a picture."""
    low, high = float(space.low.min(initial=0)), float(space.high.max(initial=0))
    if (low, high) == (0, 255):
        return 1.0
    return 255.0 if (low, high) == (0, 1) and np.dtype(space.dtype).kind == "f" else None


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """The axis of one or three channels; the last one, if it can be both."""
    return next((axis for axis in (2, 0) if shape[axis] in (1, 3)), None)


def _to_bytes(shown: Any, channels: int | None, scale: float) -> np.ndarray:
    """[H, W, 3] uint8 of a picture in any layout."""
    picture = np.asarray(shown)
    picture = picture[..., None] if channels is None else np.moveaxis(picture, channels, -1)
    picture = np.rint(np.clip(picture * scale, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
