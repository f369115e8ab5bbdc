"""Either world of any body, behind the two ids that do not name one."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.wrappers import TimeLimit

from aime_gym.embodiments import get_embodiment
from aime_gym.envs.dream import DreamEnv, DreamVectorEnv


def make_real(embodiment: str, episode_steps: int | None = None, **kwargs: Any) -> gymnasium.Env:
    """The real env of a body: a `RealEnv` for one of the suite, an `AdaptedEnv` for a foreign one.

    Args:
        embodiment: A name of the suite or the id of a Gymnasium env.
        episode_steps: When to truncate; after the body's own episode by default. What `gymnasium.make` makes of
            `max_episode_steps` comes on top, and so can only be shorter.
        **kwargs: Of the env.
    """
    body = get_embodiment(embodiment)
    if body.foreign:
        from aime_gym.envs.adapted import AdaptedEnv as Real
    else:
        from aime_gym.envs.real import RealEnv as Real  # type: ignore[assignment]
    return TimeLimit(Real(body.name, **kwargs), episode_steps or body.episode_steps)


def make_dream(episode_steps: int | None = None, **kwargs: Any) -> gymnasium.Env:
    """The dream of a model; `episode_steps` as of `make_real`, other arguments as of `DreamEnv`."""
    env = DreamEnv(**kwargs)
    return TimeLimit(env, episode_steps or env.embodiment.episode_steps)


def make_dreams(num_envs: int = 1, max_episode_steps: int | None = None, **kwargs: Any) -> DreamVectorEnv:
    """Dreams of a model side by side; arguments are those of `DreamVectorEnv`, which says what -1 steps are."""
    envs = DreamVectorEnv(num_envs=num_envs, max_episode_steps=max_episode_steps, **kwargs)
    if max_episode_steps is None:
        envs.max_episode_steps = envs.embodiment.episode_steps
    return envs
