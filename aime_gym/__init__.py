"""Pretrained world models as Gymnasium environments: act, train and imitate inside a learned model of the world.

Importing this package registers the ids `AimeReal-*-v0` and `AimeDream-*-v0` and loads neither torch nor a GL library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aime_gym.errors import AimeGymError
from aime_gym.registration import register_dream, register_envs

if TYPE_CHECKING:
    from aime_gym.agents.aime import AIME
    from aime_gym.agents.baselines import BC, BCO, IIDM
    from aime_gym.agents.shac import SHAC
    from aime_gym.commands.play import play
    from aime_gym.envs.sb3 import make_sb3_env
    from aime_gym.envs.tensor_dream import TensorDream
    from aime_gym.envs.wrappers import Evidence, LatentObservation
    from aime_gym.evaluation.compare import compare
    from aime_gym.world_model.checkpoint import load_pretrained_model

__version__ = "0.1.0"
__all__ = [
    "AIME",
    "BC",
    "BCO",
    "IIDM",
    "SHAC",
    "AimeGymError",
    "Evidence",
    "LatentObservation",
    "TensorDream",
    "compare",
    "load_pretrained_model",
    "make_sb3_env",
    "play",
    "register_dream",
]

# Public names whose modules need torch or SB3: imported at first use.
_LAZY = {
    "AIME": "aime_gym.agents.aime",
    "BC": "aime_gym.agents.baselines",
    "BCO": "aime_gym.agents.baselines",
    "Evidence": "aime_gym.envs.wrappers",
    "IIDM": "aime_gym.agents.baselines",
    "LatentObservation": "aime_gym.envs.wrappers",
    "SHAC": "aime_gym.agents.shac",
    "TensorDream": "aime_gym.envs.tensor_dream",
    "compare": "aime_gym.evaluation.compare",
    "load_pretrained_model": "aime_gym.world_model.checkpoint",
    "make_sb3_env": "aime_gym.envs.sb3",
    "play": "aime_gym.commands.play",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


register_envs()
