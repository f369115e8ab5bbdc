"""How long a dream under feedback stays close to the world, how exact its rewards are, and how it ranks policies.

After arXiv 2606.15032.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, Rhythm
from aime_gym.agents.strangers import draw_rhythm
from aime_gym.data.dataset import BURN_IN
from aime_gym.envs.sb3 import learned_in
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison, PolicyReturns, told_of_weights
from aime_gym.evaluation.explanation import Windows
from aime_gym.evaluation.measure_trust import measure_trust
from aime_gym.evaluation.real_episodes import Watched, begin_dreams, compared, filter_episode, observation_scale
from aime_gym.evaluation.returns import PolicyLike, as_policy
from aime_gym.evaluation.strangers import StrangerSet
from aime_gym.evaluation.worlds import Worlds

Array = NDArray[np.float64]

SHARE = 0.5
"""A dream has parted from the world when its squared error passes this share of that of two unrelated episodes."""

RETURN_SHARE = 0.1
"""Or when the rewards so far differ by more than this share of the range of the episodes' returns."""

DREAMS = 4
"""Dreams of each real episode, which differ by what they sample."""


@dataclass(frozen=True)
class Validity:
    """For how many steps dreams stay close to the world.

    Attributes:
        length: Steps that are compared, at most.
        spread: Mean squared distance of two unrelated real episodes at the same step, in variances.
        sensors: Policy -> median steps until sensors are off.
        rewards: Policy -> median steps until its rewards are off.
    """

    length: int
    spread: float
    sensors: Mapping[str, float]
    rewards: Mapping[str, float]

    def summary(self) -> dict[str, Any]:
        """The numbers that are shown: medians over policies."""
        return {
            "length": self.length,
            "sensors": float(np.median(list(self.sensors.values()))),
            "rewards": float(np.median(list(self.rewards.values()))),
        }

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain JSON values."""
        return {
            "length": self.length,
            "spread": self.spread,
            "sensors": dict(self.sensors),
            "rewards": dict(self.rewards),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Validity:
        """Reads what `to_dict` gave; a ValueError or a LookupError says what does not fit."""
        steps = {
            name: {str(policy): float(value) for policy, value in data[name].items()} for name in ("sensors", "rewards")
        }
        return cls(int(data["length"]), float(data["spread"]), **steps)


class ClosedLoop(NamedTuple):
    """What N dreams under a policy's feedback show and pay after each of T steps; NaN after the end of an episode."""

    observations: NDArray
    """[T, N, D]"""
    rewards: Array
    """[T, N]"""


def steps_within(errors: NDArray, limit: float) -> int:
    """How many of the steps [T] come before the first one whose error is not within the limit; T if there is none."""
    beyond = np.flatnonzero(~(np.asarray(errors) <= limit))  # NaN is beyond
    return int(beyond[0]) if len(beyond) else len(errors)


def return_limit(returns: Sequence[float], step: float) -> float:
    """By how much rewards so far may differ: `RETURN_SHARE` of the range of returns, or of a step's reward if larger.

    Where no policy earns anything the returns have no range.
    """
    return RETURN_SHARE * max(float(np.ptp(returns)), step)


def spread_of(episodes: Sequence[NDArray], scale: NDArray) -> float:
    """The mean squared distance of two different episodes [L, D] at the same step, in squares of `scale` [D]."""
    longest = max(map(len, episodes))
    stacked = np.full((len(episodes), longest, len(scale)), np.nan)
    for row, episode in zip(stacked, episodes, strict=True):
        row[: len(episode)] = episode / scale
    both = np.isfinite(stacked[:, :, 0]).sum(0) > 1  # steps that two of them reach
    return float(2 * np.nanvar(stacked[:, both], axis=0, ddof=1).mean())


def closed_loop(
    policy: PolicyLike,
    dreams: Any,
    observations: NDArray,
    actions: NDArray[np.float32],
    seeds: Sequence[int],
    dream_seeds: Sequence[int],
    steps: int,
) -> ClosedLoop:
    """Shows a policy the first frames of real episodes, then dreams that go on from there under its feedback.

    Args:
        policy: What acts; it sees the real frames first, so that its own state is that of the real episode.
        dreams: N slots.
        observations: Real frames, [K, N, D].
        actions: The actions taken at them, [K, N, A].
        seeds: Seeds of the episodes, by which a policy's own noise is that of the real one, [N].
        dream_seeds: Seeds of what the dreams sample, [N].
        steps: T
    """
    acting = as_policy(policy, dreams.single_action_space)
    if hasattr(acting, "begin"):
        acting.begin(list(seeds))
    state: Any = None
    begins = np.ones(len(seeds), bool)
    for frame in observations[:-1]:
        _, state = acting.predict(frame, state=state, episode_start=begins, deterministic=True)
        begins = np.zeros(len(seeds), bool)
    led = np.concatenate([np.zeros_like(actions[:1]), actions[:-1]])
    frame = begin_dreams(dreams, observations, led, dream_seeds)
    frames, rewards, alive = [], [], np.ones(len(seeds), bool)
    space = dreams.single_action_space
    for _ in range(steps):
        chosen, state = acting.predict(frame, state=state, episode_start=begins, deterministic=True)
        begins = np.zeros(len(seeds), bool)
        frame, reward, terminated, truncated, _ = dreams.step(np.clip(chosen, space.low, space.high))
        frames.append(np.where(alive[:, None], frame, np.nan))
        rewards.append(np.where(alive, reward, np.nan))
        alive = alive & ~(terminated | truncated)
    return ClosedLoop(np.stack(frames), np.stack(rewards))


def closed_loop_validity(
    worlds: Worlds,
    watched: Sequence[Watched],
    seed: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Validity:
    """Dreams on from the first frames of real episodes under the policies that acted there.

    Args:
        worlds: Both.
        watched: Real episodes of policies.
        seed: Seed of what the dreams sample.
        track: Goes through the policies and shows how far it is.

    Raises:
        AimeGymError: If no episode goes on after the frames that a dream is shown.
    """
    scale = observation_scale(worlds)
    everyone = [recording for each in watched for recording in each.recordings]
    spread = spread_of([compared(worlds, np.asarray(recording.observations)) for recording in everyone], scale)
    step = 0.0 if worlds.model.heads is None else worlds.model.heads.reward_scale
    limit = return_limit([recording.rewards.sum() for recording in everyone], step)
    sensors, rewards, longest = {}, {}, 0
    for each in track(watched):
        usable = [i for i, recording in enumerate(each.recordings) if len(recording.actions) > BURN_IN]
        if not usable:
            continue
        recordings = [each.recordings[i] for i in usable for _ in range(DREAMS)]
        seeds = [each.seeds[i] for i in usable for _ in range(DREAMS)]
        steps = max(len(recording.actions) for recording in recordings) - BURN_IN
        longest = max(longest, steps)
        dreams = worlds.dream_envs(len(recordings), max_episode_steps=steps + 1, doubt=False)
        try:
            ran = closed_loop(
                each.policy,
                dreams,
                np.stack([np.asarray(recording.observations)[:BURN_IN] for recording in recordings], 1),
                np.stack([recording.actions[:BURN_IN] for recording in recordings], 1),
                seeds,
                [seed + slot for slot in range(len(recordings))],
                steps,
            )
        finally:
            dreams.close()
        horizons = []
        for slot, recording in enumerate(recordings):
            own = len(recording.actions) - BURN_IN
            dreamt, truth = ran.observations[:own, slot], np.asarray(recording.observations)[BURN_IN:]
            error = (((compared(worlds, dreamt) - compared(worlds, truth)) / scale) ** 2).mean(-1)
            gap = np.abs(np.cumsum(ran.rewards[:own, slot] - recording.rewards[BURN_IN - 1 : -1]))
            horizons.append((steps_within(error, SHARE * spread), steps_within(gap, limit)))
        sensors[each.name], rewards[each.name] = (float(np.median(column)) for column in zip(*horizons, strict=True))
    if not sensors:
        raise AimeGymError(f"No real episode goes on after the {BURN_IN} frames that a dream is shown first.")
    return Validity(longest, spread, sensors, rewards)


PRIOR_STEPS = 20
"""Steps that the prior is rolled out under the real actions."""


@dataclass(frozen=True)
class Accuracy:
    """How accurately rewards are predicted.

    Attributes:
        r2: Share of the variance of the true rewards that is explained; None where they are all alike.
        error: Mean absolute error a step.
        bias: Mean error a step: what is promised too much.
    """

    r2: float | None
    error: float
    bias: float


@dataclass(frozen=True)
class RewardAccuracy:
    """How accurately rewards are predicted on real frames, and on prior rollouts of up to `steps` steps.

    Attributes:
        filtered: On the latents of real frames.
        prior: On the latents of the prior under the real actions.
        steps: Steps of the rollouts, at most.
        by_policy: Policy -> mean real reward a step, and the one predicted from its filtered frames.
    """

    filtered: Accuracy
    prior: Accuracy | None
    steps: int
    by_policy: Mapping[str, tuple[float, float]]

    def summary(self) -> dict[str, Any]:
        """The numbers that are shown."""
        return {
            "filtered": asdict(self.filtered),
            "prior": None if self.prior is None else asdict(self.prior),
            "steps": self.steps,
        }

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain JSON values."""
        return self.summary() | {"by_policy": {name: list(pair) for name, pair in self.by_policy.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RewardAccuracy:
        """Reads what `to_dict` gave; a ValueError, a TypeError or a LookupError says what does not fit."""
        policies = {str(name): (float(real), float(told)) for name, (real, told) in data["by_policy"].items()}
        prior = None if data["prior"] is None else Accuracy(**data["prior"])
        return cls(Accuracy(**data["filtered"]), prior, int(data["steps"]), policies)


def accuracy(told: NDArray, true: NDArray) -> Accuracy:
    """Compares rewards [N] with true ones [N]."""
    error, variance = np.asarray(told, float) - true, float(np.var(true))
    r2 = None if variance == 0 else float(1 - (error**2).mean() / variance)
    return Accuracy(r2, float(np.abs(error).mean()), float(error.mean()))


@torch.inference_mode()
def reward_accuracy(
    worlds: Worlds, watched: Sequence[Watched], track: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> RewardAccuracy:
    """Filters real episodes, and rolls the prior out along them, by means; rewards are what the dream pays.

    Args:
        worlds: Both.
        watched: Real episodes of policies.
        track: Goes through the policies and shows how far it is.

    Raises:
        AimeGymError: If all episodes are over before an estimate is good.
    """
    paying = Windows(worlds, 1)
    told: list[NDArray] = []
    true: list[NDArray] = []
    told_prior: list[NDArray] = []
    true_prior: list[NDArray] = []
    by_policy = {}
    for each in track(watched):
        first = len(true)
        for recording in each.recordings:
            observations, actions = np.asarray(recording.observations), recording.actions
            features = filter_episode(worlds, observations, actions)  # [L, F]
            begin = min(BURN_IN, len(actions)) - 1  # the last of the frames that make an estimate good
            real = recording.rewards[begin:-1]
            states, taken = features[begin:, None], actions[begin:-1, None]  # [L, 1, F], [L - 1, 1, A]
            told.append(paying.rewards(states, taken)[:, 0])
            true.append(real)
            if whole := len(real) // PRIOR_STEPS * PRIOR_STEPS:
                told_prior.append(paying.under_actions(states[: whole + 1], taken[:whole], PRIOR_STEPS)[:, 0])
                true_prior.append(real[:whole])
        own = [np.concatenate(rows[first:]) for rows in (true, told)]
        if len(own[0]):
            by_policy[each.name] = (float(own[0].mean()), float(own[1].mean()))
    if not sum(map(len, true)):
        raise AimeGymError(f"No real episode goes on after the {BURN_IN} frames that make an estimate good.")
    prior = accuracy(np.concatenate(told_prior), np.concatenate(true_prior)) if told_prior else None
    return RewardAccuracy(accuracy(np.concatenate(told), np.concatenate(true)), prior, PRIOR_STEPS, by_policy)


RHYTHMS = 8
"""Blind sine waves that are made where no strangers are given."""

NOISE = 0.3


@dataclass(frozen=True)
class Ranking:
    """How well dreams rank policies.

    Attributes:
        comparison: Both worlds' returns of each.
        verdict: The metrics of `aime_gym.evaluation.returns.dope_metrics`; of a set of strangers what
            `aime_gym.world_model.trust.Trust` holds of them, and its ``"finding"``.
    """

    comparison: Comparison
    verdict: Mapping[str, Any]

    @property
    def are_strangers(self) -> bool:
        """Whether these are strangers of a set, and not what was made on the spot."""
        return "families" in self.verdict

    def to_dict(self) -> dict[str, Any]:
        """The measures as plain JSON values."""
        return {"verdict": dict(self.verdict), "comparison": self.comparison.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ranking:
        """Reads what `to_dict` gave; for errors see `Comparison.from_dict`."""
        return cls(Comparison.from_dict(data["comparison"]), dict(data["verdict"]))


def compare_in(
    worlds: Worlds,
    policies: Mapping[str, PolicyLike],
    episodes: int,
    seed: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Comparison:
    """Evaluates policies, which see what `worlds` shows, in both worlds; see `aime_gym.compare`."""
    results = [
        PolicyReturns(name, *worlds.evaluate(policy, episodes, seed), learned_in(policy))
        for name, policy in track(policies.items())
    ]
    return Comparison(
        worlds.embodiment.name,
        worlds.task,
        worlds.model_name,
        seed,
        worlds.max_episode_steps,
        tuple(results),
        worlds.usual_doubt,
        **told_of_weights(worlds.model),
    )


def rank_strangers(worlds: Worlds, strangers: StrangerSet, seen: Iterable[str], episodes: int) -> Ranking:
    """Dreams of strangers beside the real returns that their set publishes; see `measure_trust`.

    Args:
        worlds: Both worlds of the model.
        strangers: A set of the same body and task.
        seen: Families whose algorithm has collected some of the model's data, which do not count.
        episodes: Episodes of each, at most as many as the set has.

    Raises:
        AimeGymError: If the model does not decode what they see, or is one in whose dreams some of them have learned.
    """
    found = measure_trust(worlds.model, strangers, episodes, seen)
    return Ranking(found.comparison, {**(found.trust.strangers or {}), "finding": found.trust.finding})


def rank_made(
    worlds: Worlds,
    policies: Mapping[str, PolicyLike],
    episodes: int,
    seed: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Ranking:
    """Evaluates policies that belong to no set in both worlds, see `compare_in`."""
    comparison = compare_in(worlds, policies, episodes, seed, track)
    return Ranking(comparison, dict(comparison.metrics))


def fitting(worlds: Worlds, policies: Mapping[str, Any]) -> dict[str, Any]:
    """The plain policies that can act on what `worlds` shows: blind ones always."""

    def fits(policy: Any) -> bool:
        inner = policy.policy if isinstance(policy, NoisyPolicy) else policy
        return not isinstance(inner, PlainMLP) or inner.mean.shape == worlds.observation_space.shape

    return {name: policy for name, policy in policies.items() if fits(policy)}


def made_policies(worlds: Worlds, seed: int = 0) -> dict[str, PolicyLike]:
    """Policies that no model was trained with: random and zero actions, and rhythms, half of them with noise."""
    rng = np.random.default_rng([seed, 5])
    size = int(np.prod(worlds.action_space.shape or ()))
    rhythms: list[Rhythm] = [draw_rhythm(rng, size, None) for _ in range(RHYTHMS)]
    made: dict[str, PolicyLike] = {"random": "random", "zero": "zero"}
    for number, rhythm in enumerate(rhythms):
        noisy = bool(number % 2)
        made[f"rhythm-{number}{f', noise {NOISE:g}' if noisy else ''}"] = (
            NoisyPolicy(rhythm, NOISE) if noisy else rhythm
        )
    return made
