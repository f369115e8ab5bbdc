"""Agents as plain data: what acts of an SB3 agent, without a pickle, so that opening its file runs nothing of it.

SB3's own files are pickles in parts, which are code. `save_sb3_agent` adds one member to them, `POLICY`: the weights of
the policy and, as JSON, what it is made of. SB3 reads such a file as any other of its own.
"""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors.torch import load, save
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from aime_gym.agents.shac import TanhPolicy
from aime_gym.agents.standardised import StandardisedObservation
from aime_gym.errors import AimeGymError
from aime_gym.files import DAMAGED_NPZ, json_text, parse_json, reason
from aime_gym.world_model.section import Section
from aime_gym.world_model.weights import checked_weights, fit_weights

POLICY = "aime_gym.safetensors"
"""The member of an agent's zip file that holds no pickle."""
_LARGEST = 256 * 1024**2
_POLICIES = {"shac": TanhPolicy, "actor_critic": ActorCriticPolicy, "sac": SACPolicy, "td3": TD3Policy}
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU}
_EXTRACTORS = {"flatten": FlattenExtractor, "standardised": StandardisedObservation}
_BOUNDS = ("observation.low", "observation.high", "action.low", "action.high")


def plain_policy(agent: Any) -> bytes | None:
    """The member `POLICY` of an agent's file; None for an agent of other parts than `make_agent` knows."""
    policy = agent.policy
    kind = _name_of(_POLICIES, type(policy))
    activation = _name_of(_ACTIVATIONS, getattr(policy, "activation_fn", None))
    extractor = _name_of(_EXTRACTORS, getattr(policy, "features_extractor_class", None))
    boxes = (policy.observation_space, policy.action_space)
    if None in (kind, activation, extractor) or agent.use_sde or agent.get_vec_normalize_env() is not None:
        return None
    if not all(isinstance(box, spaces.Box) and box.dtype == np.float32 and len(box.shape) == 1 for box in boxes):
        return None
    layers = policy.net_arch if isinstance(policy.net_arch, dict) else {"both": policy.net_arch}
    made_of = {"policy": kind, "activation": activation, "extractor": extractor, "layers": layers}
    bounds = [torch.as_tensor(bound) for box in boxes for bound in (box.low, box.high)]
    weights = {name: value.detach().cpu().clone() for name, value in policy.state_dict().items()}
    count = sum(value.numel() for value in weights.values())
    again = _build(made_of, count, *(bound.numpy() for bound in bounds)).state_dict()
    if {name: value.shape for name, value in again.items()} != {name: value.shape for name, value in weights.items()}:
        return None  # e.g. of DDPG, which has one critic
    return save(weights | dict(zip(_BOUNDS, bounds, strict=True)), {"agent": json_text(made_of)})


def is_plain(path: Path) -> bool:
    """Whether an agent's file can be used without opening a pickle.

    Raises:
        AimeGymError: If it is no file of an agent.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return POLICY in archive.namelist()
    except FileNotFoundError as error:
        raise AimeGymError(f"There is no agent {path}.") from error
    except DAMAGED_NPZ as error:
        raise AimeGymError(f"{path} is not an agent saved by Stable-Baselines3 ({reason(error)}).") from error


def load_plain_agent(path: Path) -> BasePolicy:
    """Loads what acts of an agent, without opening a pickle.

    Args:
        path: Of a file that `save_sb3_agent` wrote.

    Returns:
        The agent's policy, with its `predict`, `observation_space` and `action_space`.

    Raises:
        AimeGymError: If the file is damaged, or holds pickles alone.
    """
    if not is_plain(path):
        raise AimeGymError(
            f"{path} holds pickles alone, which are code: it was not saved by this version of aime_gym. Name the agent "
            "itself to the command if you trust it."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(POLICY).file_size
            if size > _LARGEST:
                raise ValueError(f"{size / 1e6:.0f} MB of weights")
            content = archive.read(POLICY)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")].decode())
        made_of = parse_json(header["__metadata__"]["agent"])
        tensors = load(content)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise AimeGymError(f"{path} is not a readable file of an agent ({reason(error)}).") from error
    try:
        bounds = [tensors.pop(name).numpy() for name in _BOUNDS]
        policy = _build(made_of, sum(tensor.numel() for tensor in tensors.values()), *bounds)
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise AimeGymError(f"{path} does not describe an agent ({reason(error)}).") from error
    fit_weights(policy, checked_weights(path, tensors), path)
    policy.set_training_mode(False)
    return policy.requires_grad_(False)


def _build(made_of: Any, count: int, *bounds: np.ndarray) -> BasePolicy:
    """A policy of random weights, which are not more than a few times `count`, those of the file."""
    section = Section("agent", made_of, ("policy", "activation", "extractor", "layers"))
    kind = section.choice("policy", tuple(_POLICIES))
    activation = section.choice("activation", tuple(_ACTIVATIONS))
    extractor = section.choice("extractor", tuple(_EXTRACTORS))
    layers = Section("agent.layers", section.content.get("layers"), ("both", "pi", "vf", "qf"))
    sizes = {name: layers.integers(name, low=1) for name in layers.content}
    for low, high in (bounds[:2], bounds[2:]):
        if not (low.ndim == 1 and low.shape == high.shape and (low < high).all()):
            raise ValueError("bounds of observations or actions")
    widths = [[len(bounds[0]), *own] for own in sizes.values()]
    if sum(before * after for own in widths for before, after in itertools.pairwise(own)) > count:
        raise ValueError(f"layers {sizes} of {count} weights")
    options: dict[str, Any] = {"features_extractor_class": _EXTRACTORS[extractor]}
    if extractor == "standardised":
        options["features_extractor_kwargs"] = {name: np.ones(len(bounds[0])).tolist() for name in ("mean", "std")}
    with torch.random.fork_rng(devices=[]):  # its initial weights are nobody's business
        return _POLICIES[kind](
            spaces.Box(bounds[0], bounds[1]),
            spaces.Box(bounds[2], bounds[3]),
            lambda _: 0.0,
            net_arch=sizes.get("both", sizes),
            activation_fn=_ACTIVATIONS[activation],
            **options,
        )


def _name_of(table: dict[str, Any], value: Any) -> str | None:
    return next((name for name, known in table.items() if known is value), None)
