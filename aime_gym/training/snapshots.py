"""States of a run on disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aime_gym.errors import AimeGymError
from aime_gym.files import check_archive, reason, write_atomically
from aime_gym.world_model.weights import checked_weights, fit_weights


def save_snapshot(path: Path, state: dict[str, Any]) -> None:
    """Saves a state of tensors and plain values with `torch.save`, whole or not at all.

    Raises:
        AimeGymError: If the disk is full; a file that was there stays.
    """
    buffer = io.BytesIO()  # a full disk must surface as an OSError of one write
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def load_snapshot(path: Path) -> dict[str, Any]:
    """Loads what `save_snapshot` wrote, without running any code that the file may hold.

    Raises:
        AimeGymError: If the file is missing or corrupt, or holds something else.
    """
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise AimeGymError(f"There is no checkpoint {path}.") from error
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise AimeGymError(
            f"The checkpoint {path} cannot be read ({reason(error)}). Delete it to start anew."
        ) from error
    if not isinstance(state, dict):
        raise AimeGymError(
            f"The checkpoint {path} holds a {type(state).__name__}; expected a dict. Delete it to start anew."
        )
    return state


def load_module(path: Path, module: nn.Module) -> None:
    """Gives a module the weights in a run's checkpoint.

    Raises:
        AimeGymError: As `load_snapshot`, or if they are those of another module or not finite.
    """
    state = load_snapshot(path).get("module")
    if not isinstance(state, dict):
        raise AimeGymError(f"The checkpoint {path} holds no weights. Delete it to start anew.")
    fit_weights(module, checked_weights(path, state), path)
