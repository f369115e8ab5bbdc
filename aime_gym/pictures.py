"""How envs show pictures, and the one layout that models take: [64, 64, 3] uint8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from PIL import Image

from aime_gym.errors import AimeGymError

IMAGE_SIZE = 64
"""Pixels of a side, as models take and dream them."""
SHORTEST_SIDE = 8
"""In pixels; of what has smaller sides only red, green and blue as bytes, [H, W, 3], are a picture."""
MOST_NUMBERS = 1000
"""In a table that is no picture; larger ones must be flattened by who means them to be vectors."""

Picture = Callable[[Any], np.ndarray]
"""Turns what an env shows into [64, 64, 3] uint8."""


def picture_in(space: spaces.Box, told: str) -> Picture | None:
    """How a part of an observation is read as a picture; None if it is none.

    Pictures are [H, W, 3], [3, H, W], [H, W, 1], [1, H, W] of integers in [0, 255] or of floats in [0, 1] or [0, 255],
    and [H, W] of integers in [0, 255].

    Args:
        space: Of the part.
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
