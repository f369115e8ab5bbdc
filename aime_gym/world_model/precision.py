"""Whether bfloat16 pays on this machine's CPU: asked of the processor, never timed, so that runs are reproducible."""

from __future__ import annotations

from functools import cache
from pathlib import Path

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
