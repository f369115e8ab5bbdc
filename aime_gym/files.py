"""Files on disk: whole or not at all."""

from __future__ import annotations

import errno
import os
import tokenize
import zipfile
import zlib
from pathlib import Path

from aime_gym.errors import AimeGymError

DAMAGED_NPZ = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError),
    *(ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, tokenize.TokenError),
)
"""What reading a damaged npz file, or another zip archive, raises: RuntimeError where a bit says that it is encrypted,
MemoryError where an array's header says that it is huge, and the second line where that header makes no sense."""


def write_atomically(path: str | Path, content: str | bytes | memoryview) -> Path:
    """Writes a file so that a reader, whenever the writer dies, finds the old content or the new one.

    Args:
        path: The file; its folder is made when missing.
        content: All of it; text becomes UTF-8.

    Returns:
        The path.

    Raises:
        AimeGymError: If the disk is full; the old file stays as it was.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        before = "The file that was there is intact." if path.exists() else "Nothing was written."
        raise AimeGymError(f"No space left for {path} ({len(data) / 1e6:.1f} MB). {before} Free some space.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
