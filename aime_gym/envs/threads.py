"""Torch's number of threads, which is the whole process's: set for a while, and then as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_mine = threading.local()
_inside, _usual = 0, 1  # how many Python threads are inside, and the torch threads there were before the first


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Runs what is inside on one torch thread, if `wanted`; also decorates functions. Afterwards all is as before.

    It is faster with few slots, and safe where Gymnasium's `AsyncVectorEnv` makes an env and then forks: OpenMP's
    threads do not survive a fork, and who waits for them in the child waits for ever. Where several Python threads are
    inside, the number that torch gives to new threads is 1 until the next of them leaves.
    """
    global _inside, _usual
    if not wanted or getattr(_mine, "inside", False):
        yield
        return
    with _lock:
        if not _inside:
            _usual = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    _mine.inside = True
    try:
        yield
    finally:
        _mine.inside = False
        with _lock:
            _inside -= 1
            torch.set_num_threads(_usual)


@contextmanager
def so_many_threads(count: int | None) -> Iterator[None]:
    """Runs what is inside on so many torch threads, or on the caller's where None or 0; afterwards all is as before."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
