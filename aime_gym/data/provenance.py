"""Whose acting is behind a data set and a model: digests of policies, by which strangers are known to be strangers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aime_gym.data.metadata import read_metadata
from aime_gym.errors import AimeGymError
from aime_gym.files import read_json, write_json

PROVENANCE = "provenance.json"
"""The file in a model's folder: the SHA-256 of each policy's file that acted in any of its data, as far as the data and
the models that it goes on from have told."""
POLICY = "policy_sha256"
"""The name in `dataset.json` of the digest of the policy that acted."""


def policies_of_data(source: str | Path) -> frozenset[str]:
    """Digests of the policies that a folder of trajectories is from, also of what was mixed into it.

    Args:
        source: The folder, or ``"minari:ID"``, which tells nothing.

    Raises:
        AimeGymError: If its `dataset.json` is damaged.
    """
    return frozenset() if str(source).startswith("minari:") else _named(read_metadata(Path(source)))


def policies_of_model(folder: Path | None) -> frozenset[str]:
    """Digests of the policies that acted in a model's data; empty where nothing is known.

    Raises:
        AimeGymError: If the file is damaged.
    """
    if folder is None or not (folder / PROVENANCE).exists():
        return frozenset()
    policies = read_json(folder / PROVENANCE, "digests of policies", "Get or make the model again.").get("policies")
    if not isinstance(policies, list) or not all(isinstance(one, str) for one in policies):
        raise AimeGymError(f"{folder / PROVENANCE} does not hold digests of policies. Get or make the model again.")
    return frozenset(policies)


def write_provenance(folder: Path, datasets: Iterable[str | Path], bases: Iterable[Path | None]) -> None:
    """Writes whose acting is behind a model.

    Args:
        folder: Of the model.
        datasets: What it learned from.
        bases: Folders of the models that it goes on from.
    """
    known = frozenset[str]().union(*map(policies_of_data, datasets), *map(policies_of_model, bases))
    write_json(folder / PROVENANCE, {"policies": sorted(known)})


def _named(metadata: Mapping[str, Any]) -> frozenset[str]:
    own = metadata.get(POLICY)
    return frozenset([own] if isinstance(own, str) else []).union(*map(_named, metadata.get("sources", {}).values()))
