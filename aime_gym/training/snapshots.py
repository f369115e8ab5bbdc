"""Files that are whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from aime_gym.errors import AimeGymError


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that a reader, whenever the writer dies, finds the old content or the new one.

    Args:
        path: The file; its folder is made when missing.
        content: All of its bytes.

    Raises:
        AimeGymError: If the disk is full; the old file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        before = "The file that was there is intact." if path.exists() else "Nothing was written."
        raise AimeGymError(
            f"No space left for {path} ({len(content) / 1e6:.1f} MB). {before} Free some space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_snapshot(path: Path, state: dict[str, Any]) -> None:
    """Saves a state of tensors and plain values with `torch.save`, atomically.

    Raises:
        AimeGymError: If the disk is full.
    """
    buffer = io.BytesIO()  # a full disk must surface as an OSError of one write
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def load_snapshot(path: Path) -> dict[str, Any]:
    """Loads what `save_snapshot` wrote, without running any code that the file may hold.

    Raises:
        AimeGymError: If the file is missing or corrupt.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise AimeGymError(f"There is no checkpoint {path}.") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise AimeGymError(f"The checkpoint {path} cannot be read ({error}). Delete it to start anew.") from error
