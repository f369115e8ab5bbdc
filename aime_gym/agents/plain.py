"""Agents of dreams: how they are made, the scales of what they observe, and plain files that need no pickle."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from safetensors.torch import load, save
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from aime_gym.agents.numpy_policies import same_bytes
from aime_gym.agents.shac import SHAC, TanhPolicy, dream_of
from aime_gym.bodies.body import Choices
from aime_gym.bodies.sensors import AngleCode, scale
from aime_gym.envs.sb3 import learned_in
from aime_gym.errors import AimeGymError, Section
from aime_gym.files import DAMAGED_NPZ, Revision, json_text, parse_json, reason
from aime_gym.world_model.checkpoint import checked_weights, fit_weights
from aime_gym.world_model.config_file import choices_document, read_choices

LIMIT = 10.0
"""Standardised values are clipped here, so that no outlier of one sensor drowns the others."""

_LEAST_STD = 0.02
"""The least scale of a latent: those that hardly vary in the few real frames of a model's starts are not blown up."""


class Statistics(NamedTuple):
    """Mean and standard deviation of observations, [D] each, and which of the D are angles that turn freely."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    rotations: tuple[int, ...] = ()


class StandardisedObservation(BaseFeaturesExtractor):
    """Subtracts a mean from ``"state"`` or ``"latent"`` and divides by a standard deviation, both fixed.

    Angles that turn freely are seen as sine and cosine: to an agent all turns look alike, as they do to the world.
    Unlike `VecNormalize` there is nothing beside the agent to save and nothing that changes during training.

    Args:
        observation_space: A Box of shape [D].
        mean: [D]
        std: [D]
        rotations: Which of the D are such angles; their sines stand in their place, and their cosines at the end.
    """

    def __init__(
        self, observation_space: spaces.Box, mean: Sequence[float], std: Sequence[float], rotations: Sequence[int] = ()
    ):
        super().__init__(observation_space, features_dim=int(np.prod(observation_space.shape)) + len(rotations))
        self.mean: Tensor
        self.std: Tensor
        self.rotations = list(rotations)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, observations: Tensor) -> Tensor:
        """Standardises: [B, D] -> [B, D + number of rotations]."""
        seen = ((observations - self.mean) / self.std).clamp(-LIMIT, LIMIT)
        if not self.rotations:
            return seen
        angles = observations[:, self.rotations]
        places = torch.tensor(self.rotations, device=seen.device)
        return torch.cat([seen.index_copy(1, places, angles.sin()), angles.cos()], 1)


def observation_statistics(envs: VecEnv) -> Statistics:
    """Statistics of what SB3's dreams show, ``"state"`` or ``"latent"``; for errors see `dream_of`."""
    dream = dream_of(envs)
    if dream.obs_type == "latent":
        features = dream.start_features.cpu().numpy()  # [M, F]
        return Statistics(features.mean(0), np.maximum(features.std(0), _LEAST_STD))
    sensors = sensor_statistics(dream.model).values()
    mean, std = (np.concatenate(moments) for moments in zip(*sensors, strict=True))
    return Statistics(mean, std, tuple(AngleCode(*dream.sensors).rotations))


def sensor_statistics(model: Any, coded: bool = False) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Mean and standard deviation [D] of every observed sensor, for constants see `scale`.

    They are those of the model's training data where the model keeps them (`config.standardise`), else those of
    the last frames of its `starts.npz`.

    Args:
        model: A `WorldModel`.
        coded: Whether they are those of the sensors' codes, [C], see `ModelConfig.codes`.
    """
    from aime_gym.world_model.checkpoint import load_starts

    codes = {name: code for name, code in model.config.codes.items() if name in model.config.observed}
    if model.config.standardise:
        buffers = dict(model.named_buffers())
        moments = {}
        for name, code in codes.items():
            own = tuple(buffers[f"normaliser.{name}.{kind}"].cpu() for kind in ("mean", "std"))
            moments[name] = tuple(part.numpy() for part in (own if coded else code.moments(*own)))
    else:
        frames = load_starts(model)  # of which the last are no copies of the ones before
        last = {name: code.encode(frames[name][-1]) if coded else frames[name][-1] for name, code in codes.items()}
        moments = {name: (rows.mean(axis=0), rows.std(axis=0)) for name, rows in last.items()}
    return {name: (mean, scale(mean, std)) for name, (mean, std) in moments.items()}


def make_agent(
    algo: str, envs: VecEnv, statistics: Statistics, seed: int, device: str | torch.device = "cpu"
) -> BaseAlgorithm:
    """An SB3 agent with settings that fit a dream of 500 steps with a dense reward.

    Args:
        algo: ``"shac"``, ``"ppo"``, ``"sac"`` or ``"td3"``.
        envs: They show ``"state"`` or ``"latent"``.
        statistics: Mean and spread of observations, by which the agent standardises them.
        seed: Seed of weights and actions.
        device: Where its networks compute; with ``"shac"`` the device of the dreams.
    """
    scaling = {
        "features_extractor_class": StandardisedObservation,
        "features_extractor_kwargs": {name: np.asarray(part).tolist() for name, part in statistics._asdict().items()},
    }
    common: dict[str, Any] = {"policy": "MlpPolicy", "env": envs, "seed": seed, "device": device, "gamma": 0.99}
    if algo in ("sac", "td3") and Choices.of(envs.action_space):
        raise AimeGymError(f"{algo.upper()} takes no {envs.action_space}: --algo shac or ppo do.")
    if algo == "shac":
        return SHAC(
            **common, policy_kwargs=dict(scaling, net_arch=[256, 256], activation_fn=nn.SiLU, log_std_init=-0.5)
        )
    if algo == "ppo":
        rollout = 32 * envs.num_envs
        return PPO(
            **common,
            n_steps=32,
            batch_size=min(1024, rollout),
            n_epochs=5,
            learning_rate=3e-4,
            gae_lambda=0.95,
            ent_coef=0.0,
            policy_kwargs=dict(scaling, net_arch=[256, 256], activation_fn=nn.ELU, log_std_init=-0.5),
        )
    if algo in ("sac", "td3"):
        common |= {
            "buffer_size": 300_000,
            "batch_size": 512,
            "learning_starts": 20 * envs.num_envs,
            "gradient_steps": max(1, envs.num_envs // 8),
            "learning_rate": 5e-4,
            "policy_kwargs": dict(scaling, net_arch=[256, 256]),
        }
        if algo == "sac":
            return SAC(**common)
        size = envs.action_space.shape or ()
        return TD3(**common, action_noise=NormalActionNoise(np.zeros(size), np.full(size, 0.1)))
    raise AimeGymError(f"algo is 'shac', 'ppo', 'sac' or 'td3'; got {algo!r}.")


POLICY = "aime_gym.safetensors"
"""The member of an agent's zip file that holds no pickle."""

_LARGEST = 256 * 1024**2

_POLICIES = {"shac": TanhPolicy, "actor_critic": ActorCriticPolicy, "sac": SACPolicy, "td3": TD3Policy}

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU}

_EXTRACTORS = {"flatten": FlattenExtractor, "standardised": StandardisedObservation}

_BOUNDS = ("observation.low", "observation.high", "action.low", "action.high")
"""The last two only where actions are in a Box."""


def plain_policy(agent: Any) -> bytes | None:
    """The member `POLICY` of an agent's file; None for an agent of other parts than `make_agent` knows."""
    policy = agent.policy
    kind = _name_of(_POLICIES, type(policy))
    activation = _name_of(_ACTIVATIONS, getattr(policy, "activation_fn", None))
    extractor = _name_of(_EXTRACTORS, getattr(policy, "features_extractor_class", None))
    choices = Choices.of(policy.action_space)
    boxes = [policy.observation_space] if choices else [policy.observation_space, policy.action_space]
    if None in (kind, activation, extractor) or agent.use_sde or agent.get_vec_normalize_env() is not None:
        return None
    if not all(isinstance(box, spaces.Box) and box.dtype == np.float32 and len(box.shape) == 1 for box in boxes):
        return None
    layers = policy.net_arch if isinstance(policy.net_arch, dict) else {"both": policy.net_arch}
    rotations = [*(policy.features_extractor_kwargs or {}).get("rotations", ())]
    made_of: dict[str, Any] = {"policy": kind, "activation": activation, "extractor": extractor, "layers": layers}
    made_of |= {"rotations": rotations} if rotations else {}
    made_of |= {"choices": choices_document(choices)} if choices else {}
    bounds = [torch.as_tensor(bound) for box in boxes for bound in (box.low, box.high)]
    weights = {name: value.detach().cpu().clone() for name, value in policy.state_dict().items()}
    count = sum(value.numel() for value in weights.values())
    again = _build(made_of, count, *(bound.numpy() for bound in bounds)).state_dict()
    if {name: value.shape for name, value in again.items()} != {name: value.shape for name, value in weights.items()}:
        return None  # e.g. of DDPG, which has one critic
    dream = learned_in(agent)
    metadata = {"agent": json_text(made_of)} | ({} if dream is None else {"dream_weights": json_text(dream._asdict())})
    return same_bytes(save(weights | dict(zip(_BOUNDS, bounds, strict=False)), metadata))


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
        path: A file that `save_sb3_agent` wrote.

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
        dream = parse_json(header["__metadata__"].get("dream_weights", "null"))
        tensors = load(content)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise AimeGymError(f"{path} is not a readable file of an agent ({reason(error)}).") from error
    try:
        bounds = [tensors.pop(name).numpy() for name in _BOUNDS if name in tensors]
        policy = _build(made_of, sum(tensor.numel() for tensor in tensors.values()), *bounds)
        vars(policy)["dream_weights"] = dream and Revision.from_dict(dream)._asdict()
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise AimeGymError(f"{path} does not describe an agent ({reason(error)}).") from error
    fit_weights(policy, checked_weights(path, tensors), path)
    policy.set_training_mode(False)
    return policy.requires_grad_(False)


def _build(made_of: Any, count: int, *bounds: np.ndarray) -> BasePolicy:
    """A policy of random weights, which are not more than a few times `count`, those of the file."""
    section = Section("agent", made_of, ("policy", "activation", "extractor", "layers", "choices", "rotations"))
    choices = read_choices(section)
    if len(bounds) != (2 if choices else 4):
        raise ValueError("no bounds of observations or actions")
    kind = section.choice("policy", tuple(_POLICIES))
    activation = section.choice("activation", tuple(_ACTIVATIONS))
    extractor = section.choice("extractor", tuple(_EXTRACTORS))
    layers = Section("agent.layers", section.content.get("layers"), ("both", "pi", "vf", "qf"))
    sizes = {name: layers.integers(name, low=1) for name in layers.content}
    for low, high in zip(bounds[::2], bounds[1::2], strict=True):
        if not (low.ndim == 1 and low.shape == high.shape and (low < high).all()):
            raise ValueError("bounds of observations or actions")
    widths = [[len(bounds[0]), *own] for own in sizes.values()]
    if sum(before * after for own in widths for before, after in itertools.pairwise(own)) > count:
        raise ValueError(f"layers {sizes} of {count} weights")
    options: dict[str, Any] = {"features_extractor_class": _EXTRACTORS[extractor]}
    if extractor == "standardised":
        ones = np.ones(len(bounds[0])).tolist()
        rotations = section.integers("rotations", low=0) if "rotations" in section.content else []
        if not all(before < after for before, after in itertools.pairwise((-1, *rotations, len(ones)))):
            raise ValueError(f"rotations {rotations} of {len(ones)} numbers")
        options["features_extractor_kwargs"] = {"mean": ones, "std": ones, "rotations": rotations}
    with torch.random.fork_rng(devices=[]):  # the initial weights do not disturb the caller's random state
        return _POLICIES[kind](
            spaces.Box(bounds[0], bounds[1]),
            choices.space if choices else spaces.Box(bounds[2], bounds[3]),  # type: ignore[arg-type]  # any of SB3's
            lambda _: 0.0,
            net_arch=sizes.get("both", sizes),
            activation_fn=_ACTIVATIONS[activation],
            **options,
        )


def _name_of(table: dict[str, Any], value: Any) -> str | None:
    return next((name for name, known in table.items() if known is value), None)
