"""Either world of any body, behind the two ids that do not name one."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.wrappers import TimeLimit

from aime_gym.embodiments import Embodiment, get_embodiment
from aime_gym.envs.adapted import AdaptedEnv
from aime_gym.envs.dream import DreamEnv, DreamVectorEnv
from aime_gym.errors import check_positive


def make_real(embodiment: str, episode_steps: int | None = None, **kwargs: Any) -> gymnasium.Env:
    """The real env of a body: that of its own id for one of the suite, an `AdaptedEnv` for a foreign one.

    Args:
        embodiment: A name of the suite or the id of a Gymnasium env.
        episode_steps: When to truncate; after the body's own episode by default. `gymnasium.make` does not hand on its
            `max_episode_steps`, which comes on top and so can only be shorter.
        **kwargs: Of the env.
    """
    body = get_embodiment(embodiment)
    steps = _length(episode_steps, body)
    if body.foreign:
        return TimeLimit(AdaptedEnv(body.name, **kwargs), steps)
    # Gymnasium adds what "human" and "rgb_array_list" need, as it does within a foreign env.
    return gymnasium.make(f"AimeReal-{body.title}-v0", max_episode_steps=steps, disable_env_checker=True, **kwargs)


def make_dream(episode_steps: int | None = None, **kwargs: Any) -> gymnasium.Env:
    """The dream of a model; `episode_steps` as of `make_real`, other arguments as of `DreamEnv`."""
    env = DreamEnv(**kwargs)
    return TimeLimit(env, _length(episode_steps, env.embodiment))


# By an entry point's metadata Gymnasium tells whether it must add what "human" and "rgb_array_list" need.
make_dream.metadata = DreamEnv.metadata  # type: ignore[attr-defined]


def make_dreams(
    num_envs: int = 1, max_episode_steps: int | None = None, episode_steps: int | None = None, **kwargs: Any
) -> DreamVectorEnv:
    """Dreams of a model side by side; `max_episode_steps` and others as of `DreamVectorEnv`.

    Of `episode_steps` and `max_episode_steps`, which mean the same here, the smaller counts if there are both.
    """
    envs = DreamVectorEnv(num_envs=num_envs, max_episode_steps=max_episode_steps, **kwargs)
    if max_episode_steps is None:
        envs.max_episode_steps = _length(episode_steps, envs.embodiment)
    elif episode_steps is not None:
        steps = _length(episode_steps, envs.embodiment)
        envs.max_episode_steps = min(steps, envs.max_episode_steps or steps)
    return envs


def _length(episode_steps: int | None, body: Embodiment) -> int:
    return body.episode_steps if episode_steps is None else check_positive(episode_steps, "episode_steps")
