"""States of a run on disk."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from aime_gym.errors import AimeGymError
from aime_gym.files import write_atomically


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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise AimeGymError(f"There is no checkpoint {path}.") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise AimeGymError(f"The checkpoint {path} cannot be read ({error}). Delete it to start anew.") from error
    if not isinstance(state, dict):
        raise AimeGymError(
            f"The checkpoint {path} holds a {type(state).__name__}; expected a dict. Delete it to start anew."
        )
    return state
