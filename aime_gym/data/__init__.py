"""Trajectories on disk and how they are made; `from_arrays` makes them of logged arrays."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "from_arrays":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aime_gym.data.logged import from_arrays

    return from_arrays
