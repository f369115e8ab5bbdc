"""Folders that one process at a time writes to."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from aime_gym.errors import AimeGymError
from aime_gym.files import TEMPORARY

LOCK = ".aime_gym.lock"
"""The file in a folder that says who writes to it."""
_STALE = 3600.0
"""Seconds after which a temporary file is what a killed process has left; to write one takes seconds."""


@contextmanager
def claimed(folder: str | Path) -> Iterator[Path]:
    """Keeps a folder for this process until it is left, and clears it of what killed processes have left there.

    The lock is the operating system's: it ends with its process, however that ends.

    Args:
        folder: Made when missing; it is gone again afterwards if nothing was written to it.

    Yields:
        The folder.

    Raises:
        AimeGymError: If another process holds it, or there is a file in its place.
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _lock(folder)
    try:
        _remove_stale(folder)
        yield folder
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: whoever comes next makes a new one
        lock.release()
        for path in new:
            with suppress(OSError):  # something was written to it
                path.rmdir()


@contextmanager
def all_claimed(*folders: Path) -> Iterator[list[Path]]:
    """Keeps several folders, as `claimed` keeps one; a folder that has several names, e.g. a link, is claimed once.

    Args:
        *folders: As there.

    Yields:
        Each folder once, by the first of its names.

    Raises:
        AimeGymError: As there.
    """
    named: dict[Path, Path] = {}
    for folder in folders:
        named.setdefault(folder.resolve(), folder)
    with ExitStack() as stack:
        yield [stack.enter_context(claimed(folder)) for folder in named.values()]


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise AimeGymError(
            f"{folder} is being written to by another call{_holder(folder)}: wait for it, or choose another folder."
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        file = next((path for path in (folder, *folder.parents) if path.is_file()), folder)
        raise AimeGymError(f"Expected a folder to write to; {file} is a file.") from error
    (folder / LOCK).write_text(f"{os.getpid()} on {platform.node()}")
    return lock


def _holder(folder: Path) -> str:
    """Which process that is, as far as it has said so."""
    with suppress(OSError):
        if said := (folder / LOCK).read_text():
            return f" (process {said})"
    return ""


def _remove_stale(folder: Path) -> None:
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
