"""Returns of policies in either world, and statistics of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import ArrayLike, NDArray

from aime_gym.agents.numpy_policies import CallablePolicy, RandomPolicy, ZeroPolicy, load_plain
from aime_gym.agents.sb3 import load_agent
from aime_gym.bodies.body import Choices
from aime_gym.errors import AimeGymError, unknown_name


class DopeMetrics(TypedDict):
    """Agreement of estimated and true returns over policies; None where it is not defined."""

    policies: int
    pearson: float | None
    spearman: float | None
    mean_absolute_error: float | None
    regret_at_1: float | None


def dope_metrics(estimates: ArrayLike, truths: ArrayLike) -> DopeMetrics:
    """Compares the estimated with the true return of each policy.

    Args:
        estimates: [P] returns in the dream. Policies with a return that is not finite are left out.
        truths: [P] returns in the real env.

    Returns:
        Correlations are None for fewer than two policies or where all returns are equal; the others are None
        without any policy. Error and regret are in units of return.
    """
    estimate, truth = np.asarray(estimates, float), np.asarray(truths, float)
    known = np.isfinite(estimate) & np.isfinite(truth)
    estimate, truth = estimate[known], truth[known]
    return {
        "policies": len(truth),
        "pearson": pearson(estimate, truth),
        "spearman": pearson(ranks(estimate), ranks(truth)),
        "mean_absolute_error": float(np.abs(estimate - truth).mean()) if len(truth) else None,
        "regret_at_1": regret_at_1(estimate, truth) if len(truth) else None,
    }


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Linear correlation of two samples [P]; None if it is not defined."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks [P] from 1; equal values share the mean of their ranks."""
    _, group, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def regret_at_1(estimates: ArrayLike, truths: ArrayLike) -> float:
    """True return lost by picking the policy with the highest estimate instead of the best one."""
    truths = np.asarray(truths, float)
    return float(truths.max() - truths[np.argmax(np.asarray(estimates, float))])


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979), the same for the same seed.

    Args:
        values: [E] independent measurements, e.g. one return an episode.
        confidence: Probability that the interval is to cover.
        resamples: Number of resampled means.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end.
    """
    values = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def rounded(number: float) -> str:
    """A return as people read it: whole, or with two digits where rewards are small."""
    return f"{number:.0f}" if abs(number) >= 1 or number == 0 else f"{number:.2g}"


Observation = np.ndarray | dict[str, np.ndarray]


class Policy(Protocol):
    """What acts: Stable-Baselines3's signature, so that every SB3 agent is one."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Returns actions [B, A] and the recurrent state for observations [B, ...].

        Args:
            observation: Batch of observations, an array or a dict of arrays.
            state: What the last call returned; None in the first.
            episode_start: [B] bool, True where an episode begins and the recurrent state is to be cleared.
            deterministic: Whether to return the mode rather than a sample.
        """


PolicyLike = Policy | Callable[[Any], np.ndarray] | str
"""A `Policy`, a callable from observations [B, ...] to actions [B, A] (or an object whose `predict` is one), or
``"random"`` or ``"zero"``."""


@dataclass(frozen=True)
class NormalisingPolicy:
    """An SB3 agent that learned behind a `VecNormalize`, on observations as they come."""

    agent: Policy
    normaliser: Any

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """See `Policy`."""
        return self.agent.predict(self.normaliser.normalize_obs(observation), state, episode_start, deterministic)


def as_policy(policy: PolicyLike, action_space: gym.Space) -> Policy:
    """Makes a `Policy` of anything that can act.

    Args:
        policy: See `PolicyLike`.
        action_space: The action space of one env, for the named policies.

    Raises:
        AimeGymError: If it is neither a policy, a callable nor a known name.
    """
    if isinstance(policy, str):
        named: dict[str, Callable[[], Policy]] = {
            "random": lambda: RandomPolicy(action_space),
            "zero": lambda: ZeroPolicy(action_space),
        }
        if policy not in named:
            raise unknown_name("policy", policy, named)
        return named[policy]()
    if hasattr(policy, "predict"):
        if not _takes_state(policy.predict):
            return CallablePolicy(cast(Any, policy).predict)
        normaliser = getattr(policy, "get_vec_normalize_env", lambda: None)()
        return policy if normaliser is None else NormalisingPolicy(policy, normaliser)
    if callable(policy):
        return CallablePolicy(policy)
    raise AimeGymError(
        f"Expected a policy: an SB3 agent, an object with predict(), a callable or 'random' or 'zero'; "
        f"got {type(policy).__name__}."
    )


def _takes_state(predict: Callable[..., Any]) -> bool:
    """Whether it has the signature of `Policy`; that of other libraries, such as d3rlpy, takes an observation alone."""
    try:
        inspect.signature(predict).bind(None, state=None, episode_start=None, deterministic=True)
    except TypeError:
        return False
    except ValueError:  # it tells of none
        return True
    return True


NAMED_POLICIES = ("random", "zero")


def name_policies(policies: Any) -> dict[str, Any]:
    """Gives every policy a different name: its key, its file, its class, or its own name."""
    if isinstance(policies, Mapping):
        named = {str(name): policy for name, policy in policies.items()}
    else:
        named = {}
        for policy in policies if isinstance(policies, Sequence) and not isinstance(policies, str) else [policies]:
            if isinstance(policy, (str, Path)):
                name = str(policy)
            else:
                name = getattr(policy, "__name__", type(policy).__name__)
            twins = sum(known == name or known.startswith(f"{name} #") for known in named)
            named[f"{name} #{twins + 1}" if twins else name] = policy
    if not named:
        raise AimeGymError("Expected at least one policy to compare; got none.")
    return named


def load_policy(policy: PolicyLike | Path) -> PolicyLike:
    """Loads the policy if `policy` is the path of one; a folder stands for its ``agent.zip``."""
    if isinstance(policy, Path) or (isinstance(policy, str) and policy not in NAMED_POLICIES):
        path = Path(policy)
        if not path.exists():
            raise AimeGymError(
                f"There is no agent {policy}: expected a zip file that an SB3 agent saved, a folder with an agent.zip, "
                f"a plain policy (.safetensors), or one of {', '.join(NAMED_POLICIES)}."
            )
        if path.suffix == ".safetensors":
            return load_plain(path)
        return cast(PolicyLike, load_agent(path / "agent.zip" if path.is_dir() else path))
    return policy


def batch_size(observation: Observation) -> int:
    """Number of slots in a batch of observations."""
    return len(next(iter(observation.values())) if isinstance(observation, Mapping) else observation)


@dataclass(frozen=True)
class Recording:
    """What happened in one episode of L steps."""

    observations: Observation
    """[L, ...], each the one that led to the action of the same row."""
    actions: NDArray[Any]
    """[L, A], or L choices."""
    rewards: NDArray[np.float64]
    """[L]"""


@dataclass(frozen=True)
class Episodes:
    """The outcome of E episodes of one policy in one world."""

    returns: NDArray[np.float64]
    """[E] undiscounted sums of rewards."""
    lengths: NDArray[np.int64]
    """[E] steps."""
    doubt: NDArray[np.float64] | None = None
    """[E] mean of ``info["doubt"]`` over the steps; None where the env gives none."""
    recordings: tuple[Recording, ...] = ()
    """[E] where asked for."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of the mean return."""
        return bootstrap_interval(self.returns)


def plus_minus(episodes: Episodes) -> str:
    """Mean return and half of its interval: ``"390 ± 20"``."""
    low, high = episodes.interval
    return f"{rounded(episodes.mean)} ± {rounded((high - low) / 2)}"


def with_interval(mean: float, interval: tuple[float, float]) -> str:
    """A mean and its interval: ``"390 [370, 410]"``."""
    low, high = interval
    return f"{rounded(mean)} [{rounded(low)}, {rounded(high)}]"


def episode_returns(
    policy: PolicyLike,
    envs: VectorEnv,
    episodes: int | None = None,
    seed: int | Sequence[int] = 0,
    starts: Mapping[str, Any] | None = None,
    deterministic: bool = True,
    record: bool = False,
    watch: Callable[[NDArray[np.float64]], None] | None = None,
) -> Episodes:
    """Runs whole episodes, as many side by side as there are slots, each from its own seed and start.

    Every episode begins with a reset that it alone decides (its seed, its start), so its return does not depend
    on the number of slots, but for the rounding of a policy that computes in batches.

    Args:
        policy: See `PolicyLike`.
        envs: Any Gymnasium vector env with actions in a `Box` or choices whose `reset` takes one seed a slot.
        episodes: E; the number of seeds or of slots if not given.
        seed: One seed an episode, or the first of E consecutive ones.
        starts: Options for `reset`, each an array [E, ...] with one row an episode: ``{"start": indices}`` for
            the dream, ``{"physics": vectors}`` for the real envs of `aime_gym.evaluation.worlds`.
        deterministic: Whether the policy gives its mode.
        record: Whether to keep observations, actions and rewards.
        watch: Called before each step with the returns so far [B], e.g. to render.

    Raises:
        AimeGymError: If the policy gives actions of another shape, or none that are finite.
    """
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Box) and Choices.of(space) is None:
        raise AimeGymError(f"Expected an env with a Box, Discrete, MultiDiscrete or MultiBinary actions; got {space}.")
    if isinstance(seed, (int, np.integer)):
        count = envs.num_envs if episodes is None else episodes
        seeds = [int(seed) + i for i in range(count)]
    else:
        seeds = [int(s) for s in seed]
        if episodes is not None and episodes != len(seeds):
            raise AimeGymError(f"Expected one seed an episode: {episodes} episodes; got {len(seeds)} seeds.")
    if not seeds:
        raise AimeGymError("Expected at least one episode; got none.")
    for name, rows in (starts or {}).items():
        if len(rows) != len(seeds):
            raise AimeGymError(f"Expected one {name!r} an episode: {len(seeds)}; got {len(rows)}.")
    policy = as_policy(policy, space)

    with _torch_for_evaluation(None if deterministic else seeds[0]):
        return _run(policy, envs, seeds, starts or {}, deterministic, record, watch)


@contextmanager
def _torch_for_evaluation(seed: int | None) -> Iterator[None]:
    """One thread, as a few slots are too small to share, and a seeded global generator, from which SB3 samples.

    Both are as before afterwards.
    """
    import torch

    from aime_gym.parallel import one_thread

    with one_thread(), torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _run(
    policy: Policy,
    envs: VectorEnv,
    seeds: list[int],
    starts: Mapping[str, Any],
    deterministic: bool,
    record: bool,
    watch: Callable[[NDArray[np.float64]], None] | None,
) -> Episodes:
    """Waves of episodes, one a slot, until each seed had its own."""
    waves = []
    for first in range(0, len(seeds), envs.num_envs):
        wave = np.arange(first, min(first + envs.num_envs, len(seeds)))
        slots = np.concatenate([wave, np.full(envs.num_envs - len(wave), wave[-1])])  # idle slots repeat the last
        options = {name: np.asarray(rows)[slots] for name, rows in starts.items()}
        ran = _run_wave(policy, envs, [seeds[i] for i in slots], options or None, deterministic, record, watch)
        waves.append((ran, len(wave)))
    doubts = [ran.doubt[:used] for ran, used in waves if ran.doubt is not None]
    return Episodes(
        np.concatenate([ran.returns[:used] for ran, used in waves]),
        np.concatenate([ran.lengths[:used] for ran, used in waves]),
        np.concatenate(doubts) if doubts else None,
        tuple(recording for ran, used in waves for recording in ran.recordings[:used]),
    )


def _run_wave(
    policy: Policy,
    envs: VectorEnv,
    seeds: list[int],
    options: dict | None,
    deterministic: bool,
    record: bool,
    watch: Callable[[NDArray[np.float64]], None] | None,
) -> Episodes:
    """One episode in each slot, until the last one ends."""
    slots, space = envs.num_envs, envs.single_action_space
    observation, _ = envs.reset(seed=seeds, options=options)  # type: ignore[arg-type]  # Gymnasium takes lists
    if hasattr(policy, "begin"):
        policy.begin(seeds)
    returns, doubt, lengths = np.zeros(slots), np.zeros(slots), np.zeros(slots, np.int64)
    alive, doubtful, state = np.ones(slots, bool), False, None
    steps: list[tuple[Observation, np.ndarray, np.ndarray]] = []
    while alive.any():
        if watch is not None:
            watch(returns)
        start = np.full(slots, not lengths.any())
        actions, state = policy.predict(observation, state=state, episode_start=start, deterministic=deterministic)
        actions = checked_actions(actions, space, slots)
        before = observation
        observation, rewards, terminated, truncated, infos = envs.step(actions)
        if record:
            steps.append((_copy(before), actions.copy(), np.array(rewards, float)))
        returns += np.where(alive, rewards, 0.0)
        if "doubt" in infos:
            doubtful = True
            doubt += np.where(alive, infos["doubt"], 0.0)
        lengths += alive
        alive &= ~(np.asarray(terminated) | np.asarray(truncated))
    recordings = tuple(_recording(steps, slot, int(length)) for slot, length in enumerate(lengths)) if record else ()
    return Episodes(returns, lengths, doubt / lengths if doubtful else None, recordings)


def checked_actions(actions: Any, space: gym.Space, slots: int) -> np.ndarray:
    """What a policy gave, clipped to the box, as SB3 does for agents whose Gaussians know no bounds.

    Args:
        actions: An array or a tensor.
        space: The space of one env's actions.
        slots: B

    Returns:
        [B, A] in the space's dtype.

    Raises:
        AimeGymError: If they have another shape, or are not finite.
    """
    if hasattr(actions, "detach"):  # a tensor
        actions = actions.detach().cpu()
    actions = np.asarray(actions)
    expected = (slots, *(space.shape or ()))
    if actions.shape != expected:
        raise AimeGymError(
            f"Expected actions of shape {expected}: one row for each row of observations; got {actions.shape}. "
            "A callable policy maps a batch to a batch."
        )
    if not np.isfinite(actions).all():
        slot = int(np.argmin(np.isfinite(actions).reshape(len(actions), -1).all(axis=1)))
        raise AimeGymError(f"Expected finite actions; the policy gave {actions[slot]} in slot {slot}.")
    if choices := Choices.of(space):
        choices.encode(actions)  # which refuses what is none
        return actions
    assert isinstance(space, gym.spaces.Box)
    return np.clip(actions, space.low, space.high).astype(space.dtype)


def _copy(observation: Observation) -> Observation:
    if isinstance(observation, Mapping):
        return {name: np.array(value) for name, value in observation.items()}
    return np.array(observation)


def _recording(steps: list[tuple[Observation, np.ndarray, np.ndarray]], slot: int, length: int) -> Recording:
    observations, actions, rewards = zip(*steps[:length], strict=True)
    if isinstance(observations[0], Mapping):
        stacked: Observation = {name: np.stack([row[name][slot] for row in observations]) for name in observations[0]}
    else:
        stacked = np.stack([row[slot] for row in observations])
    return Recording(stacked, np.stack(actions)[:, slot], np.stack(rewards)[:, slot])
