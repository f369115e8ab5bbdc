"""Stable-Baselines3 agents on disk, whatever their algorithm."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from aime_gym.errors import AimeGymError
from aime_gym.files import DAMAGED_NPZ, write_atomically


def save_sb3_agent(agent: Any, path: str | Path) -> Path:
    """Saves an agent as `agent.save(path)` does, whole or not at all."""
    buffer = io.BytesIO()
    agent.save(buffer)
    return write_atomically(path, buffer.getbuffer())


def sees_images(policy: Any) -> bool:
    """Whether what an agent observes is one image."""
    return len(getattr(getattr(policy, "observation_space", None), "shape", None) or ()) == 3


def shapes_of(space: Any) -> Any:
    """Shapes of a space up to the order of axes, by which agents fit envs: SB3 puts the channels of images first."""
    if hasattr(space, "spaces"):
        return {key: part.shape for key, part in space.spaces.items()}
    return sorted(space.shape or ())


def load_sb3_agent(path: str | Path, device: str = "cpu") -> Any:
    """Loads an agent that SB3 saved, finding its algorithm in the file.

    Only load agents you trust: SB3 stores parts of an agent as pickles.

    Args:
        path: A zip file as `agent.save(path)` writes it.
        device: Where to.

    Returns:
        The agent: SHAC, PPO, A2C, SAC, TD3 or DDPG.

    Raises:
        AimeGymError: If the file is not such an agent.
    """
    import stable_baselines3 as sb3

    from aime_gym.agents.shac import SHAC

    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            data = dict(json.loads(archive.read("data")))
    except FileNotFoundError as error:
        raise AimeGymError(f"There is no agent {path}.") from error
    except DAMAGED_NPZ as error:
        raise AimeGymError(f"{path} is not an agent saved by Stable-Baselines3 ({error}).") from error
    # Off-policy agents of one family share most fields; these tell them apart.
    if "critic_epochs" in data:
        algorithm: Any = SHAC
    elif "clip_range" in data:
        algorithm = sb3.PPO
    elif "ent_coef" in data and "target_entropy" in data:
        algorithm = sb3.SAC
    elif "policy_delay" in data:
        algorithm = sb3.TD3
    elif "gae_lambda" in data:
        algorithm = sb3.A2C
    else:
        raise AimeGymError(f"{path} holds an agent of an unknown algorithm; known: SHAC, PPO, A2C, SAC, TD3, DDPG.")
    try:
        return algorithm.load(path, device=device)
    except Exception as error:  # a file from outside can fail in any way inside SB3
        raise AimeGymError(f"{path} cannot be loaded as a {algorithm.__name__} agent ({error}).") from error
