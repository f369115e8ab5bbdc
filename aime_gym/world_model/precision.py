"""Floating-point precision: what pays on this machine, what a training runs in, and envs that stay outside autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from aime_gym.errors import unknown_name

CPUINFO = Path("/proc/cpuinfo")

BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
"""Instructions that multiply bfloat16 matrices; without them oneDNN emulates, which is slower than float32."""


@cache
def bf16_is_fast() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX or AVX-512 BF16).

    Returns:
        False also where the processor's flags cannot be read, i.e. anywhere but on Linux.
    """
    return bool(BF16_FLAGS & cpu_flags(CPUINFO))


def cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """The instruction-set flags in a file like ``/proc/cpuinfo``; none if it does not exist or lists none."""
    if not cpuinfo.exists():
        return frozenset()
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines())
    return next((frozenset(value.split()) for key, _, value in lines if key.strip() == "flags"), frozenset())


PRECISIONS = ("auto", "32-true", "bf16-mixed")


def resolve_precision(precision: str, accelerator: str) -> str:
    """Turns ``"auto"`` into Fabric's ``"bf16-mixed"`` where the hardware has it and ``"32-true"`` elsewhere.

    Args:
        precision: One of `PRECISIONS`.
        accelerator: The kind of device, ``"cpu"`` or ``"cuda"``.

    Raises:
        AimeGymError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    fast = bf16_is_fast() if accelerator == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if fast else "32-true"


_DEVICES = ("cpu", "cuda")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast() -> Callable[[_Function], _Function]:
    """A decorator: the function runs without its caller's `torch.autocast`."""

    def decorate(function: _Function) -> _Function:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            mixed = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
            if not mixed:
                return function(*args, **kwargs)
            with ExitStack() as stack:
                for device in mixed:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate
