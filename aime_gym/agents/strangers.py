"""Strangers: policies that learn in the real env by means that leave no trace in a world model.

What a dream is worth to agents that it has never met can only be told by such policies. Each family learns by an
algorithm of another library than the one that collects this package's data; each run keeps its policy at several
stages of skill, as plain numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

from aime_gym import DREAM, REAL
from aime_gym.agents.numpy_policies import Array, PlainMLP, PlainPolicy, Rhythm
from aime_gym.agents.plain import LIMIT, StandardisedObservation, observation_statistics
from aime_gym.agents.shac import SHAC
from aime_gym.bodies.body import Choices, Embodiment
from aime_gym.envs.sb3 import make_sb3_env
from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.observations import action_space
from aime_gym.parallel import seeded
from aime_gym.world_model.model import WorldModel

NETWORK = [64, 64]
"""Hidden units of all networks: small enough that hundreds of policies fit into a repository."""
DREAM_STEPS = 200_000
"""A run that learns in a model's dreams takes so many."""
CLONING_UPDATES = 3_000
"""A run that imitates takes so many gradient steps."""
_GAMMA = 0.99
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Family:
    """One way to learn.

    Attributes:
        library: Who wrote the algorithm.
        steps: Agent steps of a run in the real env.
        learn: ``(make_envs, seed, marks)`` yields the steps taken and the policy once each of the `marks` is passed.
        acts: Kinds of actions that it learns, of `KINDS`.
    """

    library: str
    steps: int
    learn: Callable[[Callable[[int], VecEnv], int, Sequence[int]], Iterator[tuple[int, PlainPolicy]]]
    acts: tuple[str, ...] = ("numbers",)


KINDS = ("numbers", "discrete", "multi_discrete", "multi_binary")
"""Kinds of actions: numbers in [-1, 1], and those of `Choices`."""


def families_of(body: Embodiment, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """The families that are asked for, by default those of other libraries or algorithms than collect data of a body.

    Raises:
        AimeGymError: If one is unknown, or learns no actions of this body.
    """
    kind = body.choices.kind if body.choices else "numbers"
    able = tuple(name for name, family in FAMILIES.items() if kind in family.acts)
    for name in asked or ():
        if name not in FAMILIES:
            raise unknown_name("family", name, FAMILIES)
        if name not in able:
            raise AimeGymError(f"--families: {name} learns no {action_space(body)}, or collects data; {able} do.")
    return tuple(name for name in able if name != "sac") if asked is None else tuple(asked)


def learn_stranger(
    family: str, embodiment: str, task: str, seed: int, stages: Sequence[float], steps: int | None = None
) -> Iterator[tuple[int, PlainPolicy]]:
    """Trains one run in the real env.

    Args:
        family: A key of `FAMILIES`.
        embodiment: The body.
        task: One of its tasks.
        seed: Seed of the algorithm and the env.
        stages: At which shares of the run its policy is kept, e.g. ``(0.1, 0.3, 1.0)``.
        steps: Agent steps of the run; the family's own by default.

    Yields:
        The steps taken so far, and the policy then.

    Raises:
        AimeGymError: If the family's library is not installed.
    """
    total = steps or FAMILIES[family].steps

    def make_envs(count: int) -> VecEnv:
        return make_sb3_env(REAL, n_envs=count, seed=1000 * (seed + 1), embodiment=embodiment, task=task)

    yield from FAMILIES[family].learn(make_envs, seed, [round(share * total) for share in stages])


def learn_exploiter(
    model: WorldModel, embodiment: str, task: str, seed: int, stages: Sequence[float], steps: int = DREAM_STEPS
) -> Iterator[tuple[int, PlainPolicy]]:
    """Trains SHAC in the dreams of a model, without a real step: its kin, and to other models a policy like any other.

    Args:
        model: A model that sees all sensors of the body.
        embodiment: The body.
        task: One that the model's heads reward.
        seed: Seed of the agent and the dreams.
        stages: At which shares of the run its policy is kept.
        steps: Dream steps of the run.

    Yields:
        The dream steps taken so far, and the policy then.
    """
    options: dict[str, Any] = {"embodiment": embodiment, "task": task, "model": model, "start": "dataset"}
    envs = make_sb3_env(DREAM, n_envs=64, seed=1000 * (seed + 1), max_episode_steps=32, obs_type="state", **options)
    moments = observation_statistics(envs)
    kwargs = {
        "features_extractor_class": StandardisedObservation,
        "features_extractor_kwargs": {"mean": moments.mean.tolist(), "std": moments.std.tolist()},
        "net_arch": NETWORK,
        "activation_fn": nn.Tanh,
        "log_std_init": -0.5,
    }
    agent = SHAC("MlpPolicy", envs, seed=seed, policy_kwargs=kwargs)

    def policy() -> PlainMLP:
        layers = [m for m in agent.policy.mlp_extractor.policy_net if isinstance(m, nn.Linear)]
        layers.append(cast(nn.Linear, agent.policy.action_net))
        mean, std = (np.asarray(each, np.float32) for each in (moments.mean, moments.std))
        return PlainMLP(*_arrays(layers), mean, std, LIMIT, "tanh", choices=Choices.of(envs.action_space))

    yield from _in_stages(agent, [round(share * steps) for share in stages], policy)
    envs.close()


def learn_imitator(
    expert: PlainPolicy, embodiment: str, seed: int, stages: Sequence[float], episodes: int = 5
) -> Iterator[tuple[int, PlainPolicy]]:
    """Clones the behaviour of a policy from a few of its real episodes: what it does, and not how it came to do it.

    Args:
        expert: The policy that is imitated.
        embodiment: The body.
        seed: Seed of the network and the env.
        stages: At which shares of the training its policy is kept.
        episodes: Real episodes of the expert.

    Yields:
        The real steps behind it, which are the expert's, and the policy then.
    """
    envs = make_sb3_env(REAL, n_envs=1, seed=1000 * (seed + 1), embodiment=embodiment)
    seen, acts = [], []
    observation: Any = envs.reset()
    for _ in range(episodes):
        state, done = None, False
        while not done:
            action, state = expert.predict(observation, state)
            seen.append(observation[0])
            acts.append(action[0])
            observation, _, dones, _ = envs.step(action)
            done = bool(dones[0])
    envs.close()
    shown = np.stack(seen).astype(np.float32)
    mean, std = shown.mean(axis=0), shown.std(axis=0) + np.float32(1e-3)
    inputs = torch.as_tensor(np.clip((shown - mean) / std, -LIMIT, LIMIT))
    targets = torch.as_tensor(2 * expert.choices.encode(acts) - 1 if expert.choices else np.stack(acts))
    policies = []
    with seeded(seed):
        sizes = [len(mean), *NETWORK]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise([*sizes, targets.shape[1]])]
        network = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
        marks = [round(share * CLONING_UPDATES) for share in stages]
        for update in range(1, max(marks) + 1):
            rows = torch.randint(len(inputs), (256,))
            loss = (network(inputs[rows]) - targets[rows]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if update in marks:
                policies.append(PlainMLP(*_arrays(layers), mean, std, LIMIT, "tanh", choices=expert.choices))
    for policy in policies:
        yield len(seen), policy


def _off_policy(
    name: str,
) -> Callable[[Callable[[int], VecEnv], int, Sequence[int]], Iterator[tuple[int, PlainPolicy]]]:
    """SBX's SAC, TD3 or TQC, in JAX."""

    def learn(make_envs: Callable[[int], VecEnv], seed: int, marks: Sequence[int]) -> Iterator[tuple[int, PlainPolicy]]:
        try:
            import sbx
        except ImportError as error:
            raise AimeGymError(f"{name} is SBX's: pip install 'aime-gym[strangers]' ({error}).") from error
        envs = make_envs(1)
        agent = getattr(sbx, name)(
            "MlpPolicy",
            envs,
            seed=seed,
            gamma=_GAMMA,
            learning_rate=1e-3,
            learning_starts=1_000,
            policy_kwargs={"net_arch": NETWORK},
        )
        yield from _in_stages(agent, marks, lambda: _from_flax(agent))
        envs.close()

    return learn


def _ppo(make_envs: Callable[[int], VecEnv], seed: int, marks: Sequence[int]) -> Iterator[tuple[int, PlainPolicy]]:
    return _on_policy(PPO, make_envs, seed, marks)


def _trpo(make_envs: Callable[[int], VecEnv], seed: int, marks: Sequence[int]) -> Iterator[tuple[int, PlainPolicy]]:
    try:
        from sb3_contrib import TRPO
    except ImportError as error:
        raise AimeGymError(f"TRPO is sb3-contrib's: pip install 'aime-gym[strangers]' ({error}).") from error
    return _on_policy(TRPO, make_envs, seed, marks)


def _on_policy(
    algorithm: Any, make_envs: Callable[[int], VecEnv], seed: int, marks: Sequence[int]
) -> Iterator[tuple[int, PlainPolicy]]:
    envs = VecNormalize(make_envs(4), gamma=_GAMMA)
    kwargs = {"net_arch": NETWORK, "activation_fn": nn.Tanh, "log_std_init": -0.5}
    agent = algorithm("MlpPolicy", envs, n_steps=512, gamma=_GAMMA, seed=seed, policy_kwargs=kwargs, device="cpu")

    def policy() -> PlainMLP:
        layers = [m for m in agent.policy.mlp_extractor.policy_net if isinstance(m, nn.Linear)]
        layers.append(cast(nn.Linear, agent.policy.action_net))
        return _from_torch(layers, envs, "tanh")

    yield from _in_stages(agent, marks, policy)
    envs.close()


def _dqn(make_envs: Callable[[int], VecEnv], seed: int, marks: Sequence[int]) -> Iterator[tuple[int, PlainPolicy]]:
    envs = VecNormalize(make_envs(1), gamma=_GAMMA, norm_reward=False)
    agent = DQN(
        "MlpPolicy",
        envs,
        learning_rate=2e-3,
        learning_starts=1_000,
        batch_size=64,
        train_freq=256,
        gradient_steps=128,
        target_update_interval=10,
        exploration_fraction=0.2,
        seed=seed,
        policy_kwargs={"net_arch": NETWORK},
        device="cpu",
    )

    def policy() -> PlainMLP:
        return _from_torch([m for m in agent.policy.q_net.q_net if isinstance(m, nn.Linear)], envs, "relu")

    yield from _in_stages(agent, marks, policy)
    envs.close()


def _ars(make_envs: Callable[[int], VecEnv], seed: int, marks: Sequence[int]) -> Iterator[tuple[int, PlainPolicy]]:
    try:
        from sb3_contrib import ARS
    except ImportError as error:
        raise AimeGymError(f"ARS is sb3-contrib's: pip install 'aime-gym[strangers]' ({error}).") from error
    envs = VecNormalize(make_envs(1), norm_reward=False)  # each env runs a whole episode of every candidate
    agent = ARS("LinearPolicy", envs, n_delta=6, n_top=3, delta_std=0.1, learning_rate=0.1, seed=seed, device="cpu")

    def policy() -> PlainMLP:
        return _from_torch([m for m in agent.policy.modules() if isinstance(m, nn.Linear)], envs, "relu")

    yield from _in_stages(agent, marks, policy)
    envs.close()


def _rhythm(make_envs: Callable[[int], VecEnv], seed: int, marks: Sequence[int]) -> Iterator[tuple[int, PlainPolicy]]:
    """Random search among sine waves, then around the best."""
    envs, rng = make_envs(1), np.random.default_rng([seed, 3])
    choices = Choices.of(envs.action_space)
    size = choices.dim if choices else int(np.prod(envs.action_space.shape or ()))
    best: Rhythm | None = None
    highest, taken, tried = -np.inf, 0, 0
    for mark in marks:
        while taken < mark or best is None:
            near = best if tried % 2 else None
            candidate = replace(draw_rhythm(rng, size, near), choices=choices)
            earned, steps = _one_episode(candidate, envs)
            taken, tried = taken + steps, tried + 1
            if earned > highest:
                best, highest = candidate, earned
        yield taken, best
    envs.close()


def draw_rhythm(rng: np.random.Generator, size: int, near: Rhythm | None) -> Rhythm:
    """A random rhythm of so many actions, anywhere or near another one."""
    numbers: dict[str, np.ndarray]
    if near is None:
        common = rng.uniform(0.01, 0.25)  # a gait has one frequency, or twice that
        numbers = {
            "offset": rng.uniform(-0.5, 0.5, size),
            "amplitude": rng.uniform(0, 1.2, size),
            "frequency": common * rng.choice([1.0, 1.0, 2.0], size),
            "phase": rng.uniform(0, 1, size),
        }
    else:
        widths = {"offset": 0.1, "amplitude": 0.1, "frequency": 0.0, "phase": 0.05}
        numbers = {name: value + widths[name] * rng.standard_normal(size) for name, value in near.arrays().items()}
        numbers["frequency"] = near.frequency * rng.normal(1, 0.03)
    waves = {name: value.astype(np.float32) for name, value in numbers.items()}
    return Rhythm(waves["offset"], waves["amplitude"], waves["frequency"], waves["phase"])


def _one_episode(policy: PlainPolicy, envs: VecEnv) -> tuple[float, int]:
    observation, state, earned, steps, done = envs.reset(), None, 0.0, 0, False
    while not done:
        action, state = policy.predict(observation, state)
        observation, rewards, dones, _ = envs.step(action)
        earned, steps, done = earned + float(rewards[0]), steps + 1, bool(dones[0])
    return earned, steps


def _in_stages(agent: Any, marks: Sequence[int], policy: Callable[[], PlainMLP]) -> Iterator[tuple[int, PlainPolicy]]:
    """Trains up to each mark and takes the policy there."""
    for mark in marks:
        if agent.num_timesteps < mark:
            agent.learn(mark - agent.num_timesteps, reset_num_timesteps=False)
        plain = policy()
        _check_same(agent, plain)
        yield agent.num_timesteps, plain


def _check_same(agent: Any, plain: PlainMLP) -> None:
    """Checks that the plain policy acts as the agent does, as the internals of its library may change."""
    rng = np.random.default_rng(0)
    observations = (plain.mean + plain.std * rng.standard_normal((64, len(plain.mean)))).astype(np.float32)
    normaliser = agent.get_vec_normalize_env()
    shown = observations if normaliser is None else normaliser.normalize_obs(observations)
    expected, _ = agent.predict(shown, deterministic=True)
    expected = expected if plain.choices else np.clip(expected, -1, 1)
    error = float(np.abs(expected - plain.predict(observations)[0]).max())
    if not error < _TOLERANCE:
        raise AimeGymError(f"The plain copy of a {type(agent).__name__} policy acts otherwise, by up to {error:.3g}.")


def _from_flax(agent: Any) -> PlainMLP:
    """The actor of an SBX agent: hidden layers, and the first of its heads, which is the mean."""
    params: Mapping[str, Any] = agent.policy.actor_state.params["params"]
    layers = [params[f"Dense_{index}"] for index in range(len(NETWORK) + 1)]
    size = layers[0]["kernel"].shape[0]
    return PlainMLP(
        tuple(np.array(layer["kernel"], np.float32) for layer in layers),
        tuple(np.array(layer["bias"], np.float32) for layer in layers),
        np.zeros(size, np.float32),
        np.ones(size, np.float32),
        limit=1e6,
    )


def _from_torch(layers: Sequence[nn.Linear], envs: VecNormalize, activation: Any) -> PlainMLP:
    """Linear layers behind a `VecNormalize`, whose actions are clipped."""
    moments: Any = envs.obs_rms
    return PlainMLP(
        *_arrays(layers),
        moments.mean.astype(np.float32),
        np.sqrt(moments.var + envs.epsilon).astype(np.float32),
        limit=envs.clip_obs,
        activation=activation,
        squash=False,
        choices=Choices.of(envs.action_space),
    )


def _arrays(layers: Sequence[nn.Linear]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Weights and biases as `PlainMLP` has them."""
    weights = tuple(layer.weight.detach().numpy().T.copy() for layer in layers)
    biases = tuple(
        np.zeros(layer.out_features, np.float32) if layer.bias is None else layer.bias.detach().numpy().copy()
        for layer in layers
    )
    return weights, biases


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "ars": Family("sb3-contrib", 150_000, _ars, ("numbers", "discrete")),
        "ppo": Family("stable-baselines3", 200_000, _ppo),
        "td3": Family("sbx", 30_000, _off_policy("TD3")),
        "tqc": Family("sbx", 30_000, _off_policy("TQC")),
        "sac": Family("sbx", 30_000, _off_policy("SAC")),
        "rhythm": Family("aime_gym", 30_000, _rhythm, KINDS),
        "trpo": Family("sb3-contrib", 100_000, _trpo, KINDS[1:]),
        "dqn": Family("stable-baselines3", 50_000, _dqn, ("discrete",)),
    }
)
"""By name. SAC's kind has collected data of most bodies, so that it is reported beside the families that have not."""
