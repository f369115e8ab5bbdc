"""Random numbers that leave the global generators alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch  # where it is needed, below: commands read their flags without it


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch draws from the seed inside, on the CPU and on `device`; afterwards its generators are as before."""
    import torch

    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """What draws inside from the generators of Python, NumPy and torch, as SB3's agents do, leaves them as before."""
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
