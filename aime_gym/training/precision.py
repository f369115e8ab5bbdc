"""Which floating-point precision a training runs in."""

from __future__ import annotations

import torch

from aime_gym.errors import unknown_name
from aime_gym.world_model.precision import bf16_is_fast

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
