"""Pretrained world models as Gymnasium environments: act, train and imitate inside a learned model of the world.

Importing this package registers the ids `AimeReal-*-v0` and `AimeDream-*-v0` and loads neither torch nor a GL library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aime_gym.registration import register_envs

if TYPE_CHECKING:  # the names of `_MODULES`, for type checkers and editors; a test compares the two
    from aime_gym.agents.aime import AIME as AIME
    from aime_gym.agents.baselines import BC as BC
    from aime_gym.agents.baselines import BCO as BCO
    from aime_gym.agents.baselines import IIDM as IIDM
    from aime_gym.agents.shac import SHAC as SHAC
    from aime_gym.commands.collect import Collect as Collect
    from aime_gym.commands.play import play as play
    from aime_gym.commands.train import Refine as Refine
    from aime_gym.commands.train import Train as Train
    from aime_gym.envs.dream_vector import DreamVectorEnv as DreamVectorEnv
    from aime_gym.envs.real import RealEnv as RealEnv
    from aime_gym.envs.sb3 import make_sb3_env as make_sb3_env
    from aime_gym.envs.tensor_dream import TensorDream as TensorDream
    from aime_gym.envs.wrappers import Evidence as Evidence
    from aime_gym.envs.wrappers import LatentObservation as LatentObservation
    from aime_gym.errors import AimeGymError as AimeGymError
    from aime_gym.evaluation.compare import Comparison as Comparison
    from aime_gym.evaluation.compare import compare as compare
    from aime_gym.evaluation.compare import predict_return as predict_return
    from aime_gym.registration import register_dream as register_dream
    from aime_gym.training.options import HeadsOptions as HeadsOptions
    from aime_gym.world_model.checkpoint import (
        load_pretrained_model as load_pretrained_model,
    )
    from aime_gym.world_model.checkpoint import (
        load_starts as load_starts,
    )
    from aime_gym.world_model.model import WorldModel as WorldModel

__version__ = "0.1.0"

# Every public name and its module, which is imported when the name is first used: most of them need torch or SB3.
_MODULES = {
    "AIME": "aime_gym.agents.aime",
    "AimeGymError": "aime_gym.errors",
    "BC": "aime_gym.agents.baselines",
    "BCO": "aime_gym.agents.baselines",
    "Collect": "aime_gym.commands.collect",
    "Comparison": "aime_gym.evaluation.compare",
    "DreamVectorEnv": "aime_gym.envs.dream_vector",
    "Evidence": "aime_gym.envs.wrappers",
    "HeadsOptions": "aime_gym.training.options",
    "IIDM": "aime_gym.agents.baselines",
    "LatentObservation": "aime_gym.envs.wrappers",
    "RealEnv": "aime_gym.envs.real",
    "Refine": "aime_gym.commands.train",
    "SHAC": "aime_gym.agents.shac",
    "TensorDream": "aime_gym.envs.tensor_dream",
    "Train": "aime_gym.commands.train",
    "WorldModel": "aime_gym.world_model.model",
    "compare": "aime_gym.evaluation.compare",
    "load_pretrained_model": "aime_gym.world_model.checkpoint",
    "load_starts": "aime_gym.world_model.checkpoint",
    "make_sb3_env": "aime_gym.envs.sb3",
    "play": "aime_gym.commands.play",
    "predict_return": "aime_gym.evaluation.compare",
    "register_dream": "aime_gym.registration",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "data":
        return importlib.import_module("aime_gym.data")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


register_envs()
