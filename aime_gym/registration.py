"""The table of ids: `AimeReal-{Body}-v0` and `AimeDream-{Body}-v0` for the ten bodies."""

from __future__ import annotations

import gymnasium

from aime_gym.embodiments import EMBODIMENTS


def register_envs() -> None:
    """Registers every id. Entry points are strings, so this imports neither torch nor dm_control."""
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
