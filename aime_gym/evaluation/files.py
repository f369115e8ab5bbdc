"""Results on disk: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Writes a file by renaming a finished temporary one, making its folder first.

    Args:
        path: The file; one that exists is replaced.
        content: Text (UTF-8) or bytes.

    Returns:
        The path.

    Raises:
        OSError: If it cannot be written; an existing file is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
