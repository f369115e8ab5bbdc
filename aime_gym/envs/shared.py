"""What the dreams of one model share in a process: the model itself, copies of its weights, and its bank of starts."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from aime_gym.world_model.checkpoint import load_pretrained_model, model_folder
from aime_gym.world_model.model import WorldModel

_lock = threading.RLock()
_loaded: WeakValueDictionary[Hashable, WorldModel] = WeakValueDictionary()
_as_loaded: WeakKeyDictionary[WorldModel, Hashable] = WeakKeyDictionary()
_parts: WeakKeyDictionary[WorldModel, SharedParts] = WeakKeyDictionary()


class SharedParts:
    """What was made of a model with the weights that it has now, for all dreams of it."""

    def __init__(self, weights: Hashable):
        self.weights = weights
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` makes, without the model itself in it, the first time that somebody asks for the key.

        Args:
            key: All that decides the result but for the model's weights and settings.
            make: Is called without gradients.
        """
        with _lock, torch.inference_mode(False), torch.no_grad():
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


def shared_parts(model: WorldModel) -> SharedParts:
    """The parts of a model: new ones where its weights or settings have changed since somebody asked."""
    weights = fingerprint(model)
    with _lock:
        parts = _parts.get(model)
        if parts is None or parts.weights != weights:
            parts = _parts[model] = SharedParts(weights)
        return parts


def shared_model(name_or_folder: str | Path) -> WorldModel:
    """The model of a name or folder: one object as long as a dream uses it, its files stay, and nobody changes it.

    Raises:
        AimeGymError: As `load_pretrained_model`.
    """
    folder = model_folder(name_or_folder)
    files = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.iterdir()))
    key = (folder, files)
    with _lock:
        model = _loaded.get(key)
        if model is None or fingerprint(model) != _as_loaded[model]:
            model = load_pretrained_model(name_or_folder)
            _loaded[key], _as_loaded[model] = model, fingerprint(model)
        return model


def fingerprint(model: WorldModel) -> Hashable:
    """What tells the weights and settings of a model from others, however they were changed: a checksum a weight."""
    heads = model.heads and repr(model.heads.config)
    sums = tuple(
        (name, tensor.shape, tensor.dtype, str(tensor.device), zlib.crc32(_bytes(tensor)))
        for name, tensor in model.state_dict().items()
    )
    return repr(model.config), heads, model.folder, sums


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
