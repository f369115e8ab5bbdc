"""Digests of files, kept beside them: what was damaged on the way is refused, not loaded as something else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from aime_gym.errors import AimeGymError
from aime_gym.files import read_json, write_json

DIGESTS = "digests.json"
"""File name -> SHA-256 of the file, in hexadecimal, for files of the same folder."""


def write_digests(folder: Path, names: Iterable[str]) -> None:
    """Enters files into their folder's `digests.json`; those of other names stay.

    Args:
        folder: Where the files are.
        names: Of the files, which have just been written; one that is not there loses its entry.

    Raises:
        AimeGymError: If the disk is full.
    """
    path = folder / DIGESTS
    try:
        digests = read_json(path) if path.exists() else {}
    except AimeGymError:  # what it said of files that are replaced now matters no more
        digests = {}
    for name in names:
        digests.pop(name, None)
        if (folder / name).is_file():
            digests[name] = digest_of(folder / name)
    write_json(path, digests)


def check_digest(path: Path) -> None:
    """Compares a file with what its folder's `digests.json` says of it; without an entry there is nothing to compare.

    Raises:
        AimeGymError: If it is another file than the one that was written.
    """
    beside = path.parent / DIGESTS
    if not beside.is_file() or not path.is_file():
        return
    expected = read_json(beside, "digests of files", "Get the folder again, or delete the file to load what is there.")
    if path.name in expected and expected[path.name] != digest_of(path):
        raise AimeGymError(
            f"{path} is not the file that {DIGESTS} beside it tells of: it was damaged or changed, or writing the "
            f"folder was interrupted. Get or make it again; if you changed it yourself, delete {DIGESTS}."
        )


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """One digest of a model's config and weights: of what `digests.json` says of them, or of the files without it.

    Raises:
        AimeGymError: If `digests.json` is damaged.
    """
    if (folder / DIGESTS).is_file():
        digests = read_json(folder / DIGESTS, "digests of files", "Get the folder again.")
    else:
        files = [path for pattern in ("config.yaml", "*.safetensors", "*.pt") for path in folder.glob(pattern)]
        digests = {path.name: digest_of(path) for path in files}
    text = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()
