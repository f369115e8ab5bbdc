"""The table of ids: `AimeReal-{Body}-v0` and `AimeDream-{Body}-v0` for the ten bodies, and two ids for any body."""

from __future__ import annotations

import os

import gymnasium

from aime_gym.bodies.body import EMBODIMENTS
from aime_gym.bodies.lookup import get_embodiment

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
