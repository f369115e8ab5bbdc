"""What sensors are called inside: whatever an env calls them, by names that files, modules and SB3's policies can have.

Sensors name arrays in files of trajectories, beside ``reward`` and ``pre_action``, and modules of networks, which take
no dots and no names of their own methods. A name that is free there stays as it is. Any other gets a prefix, and its
signs other than letters and digits become their code points: ``"joint pos"`` is ``"sensor__joint_20_pos"`` inside, and
``"keys"`` is ``"sensor__keys"``.
"""

from __future__ import annotations

import re
from functools import cache

_PREFIX = "sensor__"
_RESERVED = ("file", "allow_pickle", "image", "physics", "pre_action", "reward", "tabular", "true_action")
"""Other arrays and modules, and arguments of `numpy.savez`."""


@cache
def _names_of_modules() -> frozenset[str]:
    """What networks cannot call their parts. Torch takes seconds to import, which reading flags need not wait."""
    from torch import nn

    return frozenset(dir(nn.ModuleDict()))


def is_free(name: str) -> bool:
    """Whether a sensor can have this name inside."""
    taken = name in _RESERVED or name.startswith(("_", "is_")) or name in _names_of_modules()
    return name.isidentifier() and not taken


def name_inside(own: str) -> str:
    """The name inside of what an env calls `own`; no two names have the same one."""
    if is_free(own) and not own.startswith(_PREFIX):
        return own
    return _PREFIX + re.sub(r"[^A-Za-z0-9]", lambda sign: f"_{ord(sign[0]):x}_", own)


def own_name(inside: str) -> str:
    """What the env calls it: the inverse of `name_inside`."""
    if not inside.startswith(_PREFIX):
        return inside
    return re.sub(r"_([0-9a-f]+)_", lambda code: chr(int(code[1], 16)), inside.removeprefix(_PREFIX))
