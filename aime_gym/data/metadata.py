"""`dataset.json`: what was collected into a folder of trajectories, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aime_gym.errors import AimeGymError
from aime_gym.files import read_json, write_json

METADATA = "dataset.json"
_METADATA_KINDS: dict[str, tuple[Any, str]] = {
    "embodiment": (str, "a string"),
    "task": (str, "a string"),
    "expert_return": ((int, float), "a number"),
    "sources": (dict, "an object"),
}


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Writes `dataset.json` whole or not at all."""
    write_json(folder / METADATA, metadata)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Reads `dataset.json`; empty where there is none, as in released data sets.

    Raises:
        AimeGymError: If the file is not a JSON object, or one of its values is of another kind than it should be.
    """
    path = Path(folder) / METADATA
    if not path.exists():
        return {}
    metadata = read_json(path)
    _check_metadata(path, metadata)
    return metadata


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise AimeGymError(f"{path} holds {metadata!r:.80} where an object is expected.")
    for key, (kind, told) in _METADATA_KINDS.items():
        if key in metadata and not isinstance(metadata[key], kind):
            raise AimeGymError(f"{path}: {key!r} is {told}; got {metadata[key]!r:.80}.")
    for source in metadata.get("sources", {}).values():
        _check_metadata(path, source)


def recorded_tasks(metadata: Mapping[str, Any]) -> set[str]:
    """The task of a collected data set, those of the sources of a mixed one."""
    own = {metadata["task"]} if "task" in metadata else set()
    return own.union(*map(recorded_tasks, metadata.get("sources", {}).values()))
