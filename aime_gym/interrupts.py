"""Requests to end: Ctrl-C, which Python raises as KeyboardInterrupt, and SIGTERM, which is raised alike here."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""
TERMINATED = 143
"""The exit code after SIGTERM, as shells have it."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM: whoever keeps something at Ctrl-C keeps it now, too."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """The first SIGTERM raises `Terminated` in the main thread, which alone can take signals; a second one ends it all.

    In other threads nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        raise Terminated

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
