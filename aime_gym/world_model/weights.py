"""Weights from files, strictly: every name, shape and number is checked."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from aime_gym.digests import check_digest
from aime_gym.errors import AimeGymError
from aime_gym.files import check_archive

Weights = dict[str, Tensor]
_LARGEST = 1e18
"""Of a weight: the product of two stays finite. No network holds one that comes near."""


def read_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """Reads a state dict; pickled code is never run.

    Args:
        path: A `.safetensors` file, or one of `torch.save`.

    Returns:
        Name -> float32 tensor, and the file's metadata (empty for `torch.save`).

    Raises:
        AimeGymError: If there is no such file, it is corrupt or not the one that was saved (see `aime_gym.digests`), or
            holds something else than finite tensors by name.
    """
    if not path.is_file():
        raise AimeGymError(f"There is no file {path}.")
    check_digest(path)
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if zipfile.is_zipfile(path):  # PyTorch's own format before 1.6 is none
                    check_archive(path)
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt file makes the readers raise nearly anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise AimeGymError(f"{path} is not a readable file of weights ({reason:.200}). Get it again.") from error
    return checked_weights(path, content), metadata


def checked_weights(path: Path, content: object) -> Weights:
    """What was read as a state dict: finite float32 tensors by name, or an `AimeGymError` that names the file."""
    if not isinstance(content, Mapping):
        raise AimeGymError(f"{path}: expected a state dict, got {type(content).__name__}.")
    return {str(name): _checked(path, str(name), value) for name, value in content.items()}


def _checked(path: Path, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
        got = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise AimeGymError(f"{path}: {name}: expected a dense floating-point tensor, got {got}.")
    value = value.detach().float()
    if not bool(value.isfinite().all()):
        raise AimeGymError(f"{path}: {name} holds numbers that are not finite.")
    if value.numel() and float(value.abs().max()) > _LARGEST:
        raise AimeGymError(f"{path}: {name} holds numbers that are far too large: beyond {_LARGEST:g}.")
    return value


def fit_weights(module: nn.Module, weights: Weights, path: Path, own_names: Mapping[str, str] | None = None) -> None:
    """Gives a module its weights; those of a module on the `meta` device become real.

    Args:
        module: Gets them.
        weights: Exactly those that the module has.
        path: Where they are from, for messages.
        own_names: Name in the file -> name in the module; by default the same.

    Raises:
        AimeGymError: If a weight is missing, left over, or of another shape; names it.
    """
    state = module.state_dict()
    own_names = own_names or {name: name for name in state}
    missing = [name for name in own_names if name not in weights]
    if missing:
        raise AimeGymError(f"{path} lacks weights that config.yaml asks for: {_list(missing)}.")
    extra = [name for name in weights if name not in own_names]
    if extra:
        raise AimeGymError(f"{path} holds weights that config.yaml has no place for: {_list(extra)}.")
    for name, own in own_names.items():
        expected, got = list(state[own].shape), list(weights[name].shape)
        if got != expected:
            raise AimeGymError(f"{path}: {name}: expected shape {expected} by config.yaml, got {got}.")
    module.load_state_dict({own: weights[name] for name, own in own_names.items()}, assign=True)


def _list(names: Sequence[str], at_most: int = 6) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
