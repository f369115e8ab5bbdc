"""Which floating-point precision pays on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from aime_gym.errors import unknown_name

PRECISIONS = ("auto", "32-true", "bf16-mixed")


def fast_bf16(accelerator: str = "cpu") -> bool:
    """Whether bfloat16 matrix products have instructions of their own here (AMX or AVX-512 BF16; on a GPU, its own).

    Args:
        accelerator: ``"cpu"``, or anything else for the GPU that torch sees.
    """
    if accelerator != "cpu":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = next((line.split() for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), [])
    return bool({"amx_bf16", "avx512_bf16"} & set(flags))


def resolve_precision(precision: str, accelerator: str) -> str:
    """Turns ``"auto"`` into Fabric's ``"bf16-mixed"`` where that is fast and ``"32-true"`` elsewhere.

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
    return "bf16-mixed" if fast_bf16(accelerator) else "32-true"
