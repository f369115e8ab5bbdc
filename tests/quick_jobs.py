"""Jobs that other processes import at once."""

import os
import time
from pathlib import Path

import gymnasium
from rich.progress import Progress

LONG = 300.0
"""Seconds; no test waits for the end of them."""


def square(number: int) -> int:
    return number**2


def node(_: object) -> str:
    """On which machine of a Ray cluster this is, after so long that others are there, too."""
    import ray

    time.sleep(2)
    return ray.get_runtime_context().get_node_id()


def pid(_: object) -> int:
    return os.getpid()


def show(number: int) -> int:
    """Shows a progress bar of its own, where there is a terminal for it."""
    with Progress():
        return number


def make(name: str) -> str:
    return type(gymnasium.make(name).unwrapped).__name__


def beat(path: Path) -> None:
    """Writes that it lives."""
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        path.write_text(str(time.monotonic()))
        time.sleep(0.05)


def die(way: int) -> None:
    """Ends its process by a signal; by none, it works on."""
    if way:
        os.kill(os.getpid(), way)
    time.sleep(LONG)


def fail(message: str) -> None:
    """Raises an error; without a message, it works on."""
    if message:
        raise ValueError(message)
    time.sleep(LONG)
