"""Digests of data sets and models: whether something is still what a run began with."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aime_gym.data.trajectories import trajectory_paths
from aime_gym.errors import AimeGymError
from aime_gym.files import DAMAGED_NPZ, reason

_MODEL_FILES = ("*.safetensors", "*.pt", "config.yaml")


def data_digest(source: str | Path, images: bool = True) -> str:
    """Says what a data set holds, in 16 hexadecimal digits.

    Of npz files only the directories are read, see `trajectories_digest`.

    Args:
        source: A folder of trajectories, or ``"minari:ID"``, whose files are read as a whole.
        images: Whether ``image`` counts, which may have been rendered later.

    Raises:
        AimeGymError: If there is no such folder, or a file is damaged.
    """
    if str(source).startswith("minari:"):
        from minari.storage.datasets_root_dir import get_dataset_path

        files = Path(get_dataset_path(str(source).removeprefix("minari:"))).rglob("*")
        return _files_digest(sorted(path for path in files if path.is_file()))
    return trajectories_digest(trajectory_paths(Path(source)), images)


def trajectories_digest(paths: Iterable[Path], images: bool = True) -> str:
    """Says what npz files hold, from the size and the checksum of each array in their directories, however large.

    Args:
        paths: The files.
        images: Whether ``image`` counts.

    Raises:
        AimeGymError: If a file is damaged.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = sorted((info.filename, info.file_size, info.CRC) for info in archive.infolist())
        except DAMAGED_NPZ as error:
            raise AimeGymError(f"{path} is not a readable npz file ({reason(error)}).") from error
        digest.update(repr((path.name, [array for array in arrays if images or array[0] != "image.npy"])).encode())
    return digest.hexdigest()[:16]


def model_digest(folder: str | Path) -> str:
    """Says which weights and which config a model's folder holds, in 16 hexadecimal digits."""
    return _files_digest(sorted(path for pattern in _MODEL_FILES for path in Path(folder).glob(pattern)))


def file_digest(path: str | Path) -> str:
    """Says what a file holds, in 16 hexadecimal digits."""
    return _files_digest([Path(path)])


def _files_digest(paths: list[Path]) -> str:
    digest: Any = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
