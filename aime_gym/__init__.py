"""Pretrained world models as Gymnasium environments: act, train and imitate inside a learned model of the world.

Importing this package registers the ids `AimeReal-*-v0` and `AimeDream-*-v0` and loads neither torch nor a GL library.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import gymnasium

from aime_gym.bodies.body import EMBODIMENTS
from aime_gym.bodies.lookup import get_embodiment

if TYPE_CHECKING:  # the names of `_MODULES`, for type checkers and editors; a test compares the two
    from aime_gym.agents.aime import AIME as AIME
    from aime_gym.agents.baselines import BC as BC
    from aime_gym.agents.baselines import BCO as BCO
    from aime_gym.agents.baselines import IIDM as IIDM
    from aime_gym.agents.mpc import MPC as MPC
    from aime_gym.agents.online_aime import OnlineAIME as OnlineAIME
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
    from aime_gym.flags import HeadsOptions as HeadsOptions
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
    "HeadsOptions": "aime_gym.flags",
    "IIDM": "aime_gym.agents.baselines",
    "LatentObservation": "aime_gym.envs.wrappers",
    "MPC": "aime_gym.agents.mpc",
    "OnlineAIME": "aime_gym.agents.online_aime",
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
}
__all__ = sorted((*_MODULES, "register_dream"))


def __getattr__(name: str) -> Any:
    if name == "data":
        return importlib.import_module("aime_gym.data")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


REAL = "AimeReal-v0"
"""The real env of any body: ``embodiment=`` is a name of the suite or the id of a Gymnasium env.

``episode_steps=`` is the length of its episodes, which `max_episode_steps` of `gymnasium.make` can only shorten.
"""
DREAM = "AimeDream-v0"
"""The dream of any model: ``model=`` is a folder or a bundled name; ``episode_steps=`` is explained at `REAL`."""


def register_envs() -> None:
    """Registers every id. Entry points are strings, so this imports neither torch nor dm_control."""
    gymnasium.register(REAL, entry_point="aime_gym.envs.real:make_real")
    gymnasium.register(
        DREAM,
        entry_point="aime_gym.envs.dream:make_dream",
        vector_entry_point="aime_gym.envs.dream:make_dreams",
    )
    for body in EMBODIMENTS.values():
        kwargs = {"embodiment": body.name}
        gymnasium.register(
            id=f"AimeReal-{body.title}-v0",
            entry_point="aime_gym.envs.real:RealEnv",
            max_episode_steps=body.episode_steps,
            kwargs=kwargs,
        )
        gymnasium.register(
            id=f"AimeDream-{body.title}-v0",
            entry_point="aime_gym.envs.dream:DreamEnv",
            vector_entry_point="aime_gym.envs.dream:DreamVectorEnv",
            max_episode_steps=body.episode_steps,
            kwargs=kwargs,
        )


def register_dream(env_id: str, model: str | os.PathLike[str], real: str | None = None) -> None:
    """Registers the dream of a model under an id of its own, for `gymnasium.make`, `gymnasium.make_vec` and `compare`.

    Examples:
        >>> import gymnasium, aime_gym
        >>> aime_gym.register_dream("MyDream-v0", model="walker-state")
        >>> gymnasium.make("MyDream-v0", task="run").action_space.shape
        (6,)

    Args:
        env_id: The new id, e.g. ``"MyDream-v0"``.
        model: A model folder or a bundled name; a folder is found again from any other working directory.
        real: The id of the real env that `compare` sets the dream beside; the one that the data came from by default.

    Raises:
        AimeGymError: If the model cannot be read, or its spaces are not those of `real`.
    """
    from aime_gym.envs.dream_checks import check_same_spaces
    from aime_gym.world_model.checkpoint import PRETRAINED, load_config, model_folder

    config, folder = load_config(model), model_folder(model)
    body, name = config.body, folder.name if folder.parent == PRETRAINED else os.path.abspath(model)
    if real is not None:
        check_same_spaces(config, get_embodiment(real))
    elif ":" in body.name:
        get_embodiment(body.name, imports=False)
    gymnasium.register(
        env_id,
        entry_point="aime_gym.envs.dream:DreamEnv",
        vector_entry_point="aime_gym.envs.dream:DreamVectorEnv",
        max_episode_steps=body.episode_steps,
        kwargs={"embodiment": real or body.name, "model": name},
    )


register_envs()
