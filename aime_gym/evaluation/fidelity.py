"""Counterfactual fidelity: from one real state, what do other actions lead to, in the world and in the dream?

A model that has learned what usually follows may foretell the actions of its data well and others badly, and an agent
that learns in its dreams takes others. The measure is that of the protocol of arXiv 2606.15032.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aime_gym.data.dataset import BURN_IN
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison
from aime_gym.evaluation.real_episodes import Watched, begin_dreams, compared, observation_scale
from aime_gym.evaluation.returns import pearson, ranks
from aime_gym.evaluation.worlds import Worlds

Array = NDArray[np.float64]

HORIZONS = (1, 5, 20)
"""Steps after the common state at which dream and world are compared."""

KINDS = ("policy", "near", "uniform", "saturated", "held", "opposite")
"""What is done from a state: see `counterfactuals`."""

LATEST = 40
"""A state is reached within so many steps, which each of its futures has to repeat."""

NEAR = 0.3
"""Standard deviation of the noise of actions that are near the policy's, in units of the action's half range."""

BINS = 3


@dataclass(frozen=True)
class Fidelity:
    """How far dreams are from the world, by how far the actions are from what the policy would do.

    Attributes:
        horizons: [H] steps after the common state.
        kinds: [N] what each sequence of actions is, one of `KINDS`.
        distance: [N, H] root mean square of the difference to the policy's own actions up to each horizon, in units of
            the action's half range: 0 for the policy's own, at most 2.
        error: [N, H] squared error of sensors (see `compared`), in their variances, mean over dims; NaN after the
            episode's end.
        reward_error: [N, H] absolute error of a step's reward, mean over the steps up to each horizon.
        doubt: [N, H] of the dream's step there, in nats.
    """

    horizons: tuple[int, ...]
    kinds: tuple[str, ...]
    distance: Array
    error: Array
    reward_error: Array
    doubt: Array

    @property
    def correlation(self) -> list[float | None]:
        """[H] rank correlation of distance and error."""
        return [rank_correlation(*pair) for pair in zip(self.distance.T, self.error.T, strict=True)]

    def binned(self, values: Array) -> list[list[float | None]]:
        """Means of some of the [N, H] by thirds of the distance, [`BINS`, H]; the first third is nearest."""
        columns = [by_distance(*pair) for pair in zip(self.distance.T, values.T, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def summary(self) -> dict[str, Any]:
        """The numbers that are shown."""
        return {
            "steps": list(self.horizons),
            "nmse": self.binned(self.error),
            "reward_error": self.binned(self.reward_error),
            "correlation": self.correlation,
        }

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain JSON values."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return {"horizons": list(self.horizons), "kinds": list(self.kinds), **arrays}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fidelity:
        """Reads what `to_dict` gave; a ValueError or a LookupError says what does not fit."""
        horizons, kinds = tuple(int(one) for one in data["horizons"]), tuple(str(one) for one in data["kinds"])
        arrays = {name: np.array(data[name], float).reshape(len(kinds), len(horizons)) for name in _ARRAYS}
        return cls(horizons, kinds, **arrays)


_ARRAYS = ("distance", "error", "reward_error", "doubt")


def counterfactuals(actions: NDArray[np.float32], rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """What may be done from a state, beside what a policy does.

    Args:
        actions: The policy's own, [T, A] in [-1, 1].
        rng: Draws.

    Returns:
        One sequence [T, A] of each of `KINDS`: the policy's own; the same with noise of `NEAR`; uniform; at the bounds,
        drawn anew at each step; at bounds drawn once and held; the opposite of the policy's.
    """
    sequences = {
        "policy": actions,
        "near": np.clip(actions + NEAR * rng.standard_normal(actions.shape), -1, 1),
        "uniform": rng.uniform(-1, 1, actions.shape),
        "saturated": rng.choice([-1.0, 1.0], actions.shape),
        "held": np.broadcast_to(rng.choice([-1.0, 1.0], actions.shape[1:]), actions.shape),
        "opposite": -actions,
    }
    return {kind: np.ascontiguousarray(sequences[kind], np.float32) for kind in KINDS}


def action_distance(actions: NDArray, reference: NDArray) -> Array:
    """Root mean square of the difference of actions [T, ..., A] up to each step, over steps and dims: [T, ...]."""
    squares = ((np.asarray(actions, float) - reference) ** 2).mean(-1)
    return np.sqrt(running_mean(squares))


def running_mean(values: NDArray) -> Array:
    """The mean of the first rows of [T, ...] up to each: [T, ...]."""
    counts = np.arange(1, len(values) + 1).reshape(-1, *[1] * (values.ndim - 1))
    return np.cumsum(values, axis=0) / counts


def rank_correlation(x: NDArray, y: NDArray) -> float | None:
    """Spearman's, of pairs [N] of which those that are not finite are left out; None where it is not defined."""
    known = np.isfinite(x) & np.isfinite(y)
    return pearson(ranks(x[known]), ranks(y[known]))


def by_distance(distance: NDArray, values: NDArray, bins: int = BINS) -> list[float | None]:
    """Means of values [N] in bins of as many pairs each, from the smallest distance on; None of an empty bin."""
    known = np.flatnonzero(np.isfinite(distance) & np.isfinite(values))
    order = known[np.argsort(distance[known], kind="stable")]
    return [float(values[rows].mean()) if len(rows) else None for rows in np.array_split(order, bins)]


def counterfactual_fidelity(
    worlds: Worlds,
    watched: Sequence[Watched],
    states: int = 16,
    seed: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Fidelity:
    """Takes other actions from states of real episodes, in the world and in dreams by means.

    A state is reached again by the actions that led to it, which needs no knowledge of the physics; each future's dream
    begins with the frames of its own world, also where that does not repeat itself exactly.

    Args:
        worlds: Both.
        watched: Real episodes of policies.
        states: How many, each of another episode while there are such.
        seed: Draws states and actions.
        track: Goes through the states and shows how far it is.

    Raises:
        AimeGymError: If all episodes are over before a dream could begin.
    """
    rng = np.random.default_rng([seed, 4])
    episodes = [(each, i) for i in range(len(watched[0].recordings)) for each in watched]
    longest = max(len(each.recordings[i].actions) for each, i in episodes) - BURN_IN
    horizons = tuple(step for step in HORIZONS if step <= longest)
    if not horizons:
        raise AimeGymError(f"A dream begins after {BURN_IN} frames; the longest episode has {longest + BURN_IN}.")
    steps = max(horizons)
    usable = [(each, i) for each, i in episodes if len(each.recordings[i].actions) >= BURN_IN + steps]
    frames, before, taken, seen, earned = [], [], [], [], []
    envs = worlds.real_envs(len(KINDS))
    try:
        for number in track(range(states)):
            each, i = usable[number % len(usable)]
            actions = each.recordings[i].actions
            begin = int(rng.integers(BURN_IN, min(LATEST, len(actions) - steps) + 1))  # frames before it, this included
            own = actions[begin - 1 : begin - 1 + steps]
            sequences = np.stack(list(counterfactuals(own, rng).values()), 1)  # [T, K, A]
            everything = np.concatenate([np.repeat(actions[: begin - 1, None], len(KINDS), 1), sequences])
            shown, rewards = _play(envs, everything, each, i, worlds)
            rows = slice(begin - BURN_IN, begin)
            led = np.concatenate([np.zeros_like(everything[:1]), everything])
            taken.append(sequences)
            frames.append(shown[rows])
            before.append(led[rows])
            seen.append(shown[begin:])
            earned.append(rewards[begin - 1 :])
    finally:
        envs.close()
    sequences, truth, rewards = (np.concatenate(parts, 1) for parts in (taken, seen, earned))  # [T, N, ...]
    dreams = worlds.dream_envs(sequences.shape[1], max_episode_steps=steps + 1, deterministic=True)
    try:
        seeds = [seed + slot for slot in range(dreams.num_envs)]
        begin_dreams(dreams, np.concatenate(frames, 1), np.concatenate(before, 1), seeds)
        dreamt, dream_rewards, doubt = _follow(dreams, sequences)
    finally:
        dreams.close()
    gap = compared(worlds, dreamt) - compared(worlds, truth)
    error = ((gap / observation_scale(worlds)) ** 2).mean(-1)  # [T, N]
    reference = np.repeat(sequences[:, :: len(KINDS)], len(KINDS), 1)  # the policy's own, which is the first kind
    at = [step - 1 for step in horizons]
    return Fidelity(
        horizons,
        KINDS * states,
        action_distance(sequences, reference)[at].T,
        error[at].T,
        running_mean(np.abs(dream_rewards - rewards))[at].T,
        doubt[at].T,
    )


def _play(
    envs: Any, actions: NDArray[np.float32], watched: Watched, episode: int, worlds: Worlds
) -> tuple[NDArray, Array]:
    """Actions [T, K, A] in the world from the start of an episode: frames [T + 1, K, D] and rewards [T, K].

    They are NaN after the end of an episode.
    """
    slots = actions.shape[1]
    starts = np.repeat(watched.starts[episode], slots)
    frame, _ = envs.reset(seed=[watched.seeds[episode]] * slots, options=worlds.real_starts(starts))
    frames, rewards, alive = [frame.copy()], [], np.ones(slots, bool)
    for action in actions:
        frame, reward, terminated, truncated, _ = envs.step(action)
        frames.append(np.where(alive[:, None], frame, np.nan))
        rewards.append(np.where(alive, reward, np.nan))
        alive = alive & ~(terminated | truncated)
    return np.stack(frames), np.stack(rewards)


def _follow(dreams: Any, actions: NDArray[np.float32]) -> tuple[NDArray, Array, Array]:
    """Actions [T, N, A] in dreams that have begun: frames [T, N, D], rewards [T, N] and doubt [T, N].

    They are NaN after the end of an episode.
    """
    frames, rewards, doubts, alive = [], [], [], np.ones(dreams.num_envs, bool)
    for action in actions:
        frame, reward, terminated, truncated, infos = dreams.step(action)
        frames.append(np.where(alive[:, None], frame, np.nan))
        rewards.append(np.where(alive, reward, np.nan))
        doubts.append(np.where(alive, infos["doubt"], np.nan))
        alive = alive & ~(terminated | truncated)
    return np.stack(frames), np.stack(rewards), np.stack(doubts)


SHARES = tuple(share / 10 for share in range(1, 11))
"""Shares of the steps, the least doubted first, at which the coverage curve is computed."""


def calibration(fidelity: Fidelity | None, comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """How well the doubt predicts errors.

    Args:
        fidelity: Doubt and errors of steps; None if they were not measured.
        comparisons: Doubt and errors of policies.

    Returns:
        ``"policies"``: rank correlation of a policy's doubt with the absolute error of its return, ``"count"`` of them;
        ``"steps"``: of a step's doubt with its error, the mean over horizons, as both grow with the horizon;
        ``"low"`` and ``"high"``: mean error of the halves with the lowest and the highest doubt; ``"coverage"``: mean
        error of each of `SHARES` that is doubted least. What is not known is None.
    """
    pairs = {p.name: (p.doubt, abs(p.gap)) for comparison in comparisons for p in comparison.policies}
    doubted = np.array([pair for pair in pairs.values() if pair[0] is not None], float).reshape(-1, 2)
    policies = rank_correlation(doubted[:, 0], doubted[:, 1])
    over_policies = {"policies": policies, "count": len(doubted)}
    if fidelity is None:
        return over_policies | {"steps": None, "low": None, "high": None, "coverage": []}
    columns = list(zip(fidelity.doubt.T, fidelity.error.T, strict=True))
    correlations = [value for pair in columns if (value := rank_correlation(*pair)) is not None]
    halves = [(covered(*pair, 0.5), uncovered(*pair, 0.5)) for pair in columns]
    return over_policies | {
        "steps": float(np.mean(correlations)) if correlations else None,
        "low": [low for low, _ in halves],
        "high": [high for _, high in halves],
        "coverage": [[covered(*pair, share) for share in SHARES] for pair in columns],
    }


def covered(doubt: NDArray, error: NDArray, share: float) -> float | None:
    """Mean error of the share of pairs [N] that is doubted least; None without any."""
    rows = _by_doubt(doubt, error)
    return float(error[rows[: max(1, round(share * len(rows)))]].mean()) if len(rows) else None


def uncovered(doubt: NDArray, error: NDArray, share: float) -> float | None:
    """Mean error of the pairs [N] that `covered` leaves out; None without any."""
    rows = _by_doubt(doubt, error)
    rest = rows[max(1, round(share * len(rows))) :]
    return float(error[rest].mean()) if len(rest) else None


def _by_doubt(doubt: NDArray, error: NDArray) -> NDArray[np.int64]:
    """The pairs that are known, the least doubted first; a doubt without bounds comes last."""
    known = np.flatnonzero(~np.isnan(doubt) & np.isfinite(error))
    return known[np.argsort(doubt[known], kind="stable")]
