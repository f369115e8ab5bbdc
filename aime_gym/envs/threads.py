"""One torch thread where products are too small to share between several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Runs what is inside on one torch thread, if `wanted`; also decorates functions. Afterwards all is as before.

    It is faster with few slots, and safe where Gymnasium's `AsyncVectorEnv` makes an env and then forks: OpenMP's
    threads do not survive a fork, and who waits for them in the child waits for ever.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
