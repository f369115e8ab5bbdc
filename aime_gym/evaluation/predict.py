"""The real return of a policy from dreams alone, with an interval that strangers have calibrated.

What dreams promise is corrected by how far they erred about strangers: most by those whose dreams promised as much and
were as doubtful. The strangers of the model itself count most, and those of all bundled models together as much as a
few of them, so that where the own ones say little the interval is wide, and where there are none it follows the promise
at a constant distance, so that agents of one task are told apart. Its ends are weighted quantiles of these errors
(after Tibshirani et al., "Conformal Prediction Under Covariate Shift", NeurIPS 2019, with a kernel for the weights), so
far out that a few strangers suffice. `python -m benchmarks.predicted_returns` measures how often it holds, by families
of strangers that are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aime_gym.bodies.body import Embodiment
from aime_gym.envs.start_bank import shared_bank
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.returns import Episodes, PolicyLike, bootstrap_interval, rounded
from aime_gym.evaluation.worlds import Worlds, usual_doubt
from aime_gym.files import Revision, are_numbers, read_json
from aime_gym.world_model.checkpoint import PRETRAINED
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import Trust, load_trust

LEVEL = 0.9
"""How often the real return shall lie in the interval."""
_TAIL = 0.01
"""What the quantiles leave outside on either side: less than half of what `LEVEL` allows, as there are few errors."""
_NEAR = 0.25
"""How much more or less strangers may have been promised to count as alike, in shares of the range of returns."""
_AS_DOUBTFUL = 1.0
"""How far their doubt may be off to count as alike, in powers of e."""
_OTHERS = 3.0
"""How many strangers of its own those of all other models together count for."""
_SUITE = 0.0, 1000.0
"""What an episode of the control suite can earn."""


@dataclass(frozen=True)
class Prediction:
    """What the real env will pay, as far as dreams tell.

    Attributes:
        mean: The expected mean return.
        interval: In which the mean return lies with a probability of about `LEVEL`.
        reason: What that rests on, in words.
    """

    mean: float
    interval: tuple[float, float]
    reason: str

    def __str__(self) -> str:
        low, high = map(rounded, self.interval)
        return f"{rounded(self.mean)} expected in the real env, between {low} and {high} with {LEVEL:.0%}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Prediction:
        """Reads what `dataclasses.asdict` gave; a LookupError, TypeError or ValueError says what does not fit."""
        (low, high), mean = data["interval"], data["mean"]
        if not are_numbers([low, high, mean]):
            raise TypeError("odd numbers in a prediction")
        return cls(float(mean), (float(low), float(high)), str(data["reason"]))


@dataclass(frozen=True, kw_only=True, repr=False)
class PredictedReturn(Prediction):
    """A `Prediction` about a policy.

    Attributes:
        policy: Its name.
        embodiment: The body.
        task: The task.
        model: The name of the model that dreamt.
        dream: The episodes in the dream.
    """

    policy: str
    embodiment: str
    task: str
    model: str
    dream: Episodes

    def __str__(self) -> str:
        return (
            f"{self.policy} at {self.embodiment} {self.task}: {super().__str__()}; dreamt {rounded(self.dream.mean)} "
            f"in {len(self.dream.returns)} episodes of {self.model}. {self.reason}"
        )

    __repr__ = __str__


@dataclass(frozen=True)
class PolicyReturns:
    """What one policy earns in both worlds; equal episodes have equal starts and seeds."""

    name: str
    dream: Episodes
    world: Episodes | None
    """The episodes in the real env; None if it was not asked."""
    learned_in: Revision | None = None
    """The weights in whose dreams it learned; None if unknown."""
    predicted: Prediction | None = None
    """What the real env should pay; None if it was asked, or nothing is known of how the dreams err."""

    @property
    def told(self) -> Episodes | Prediction | None:
        """What is known of its real return."""
        return self.world or self.predicted

    @property
    def real(self) -> Episodes:
        """The episodes in the real env.

        Raises:
            AimeGymError: If it was not asked.
        """
        if self.world is None:
            raise AimeGymError(
                f"What {self.name} earns in the real env is not known, as that was not asked (real_episodes=0); "
                "`predicted` holds what it should earn."
            )
        return self.world

    @property
    def gap(self) -> float:
        """Mean dream return minus mean real return, over pairs of episodes: what the dream promises too much."""
        dream, real = self._pairs
        return float(dream.mean() - real.mean())

    @property
    def gap_interval(self) -> tuple[float, float]:
        """95% bootstrap interval of the gap, over pairs of episodes."""
        dream, real = self._pairs
        return bootstrap_interval(dream - real)

    @property
    def _pairs(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns in the dream and in the real env, of those episodes that have a twin."""
        count = min(len(self.dream.returns), len(self.real.returns))
        return self.dream.returns[:count], self.real.returns[:count]

    @property
    def doubt(self) -> float | None:
        """Mean doubt of the dream's steps, in nats; None if it was not measured."""
        return None if self.dream.doubt is None else float(self.dream.doubt.mean())


@dataclass(frozen=True)
class Calibration:
    """K strangers whose returns are known in both worlds; returns are shares of the range of the task.

    Attributes:
        dream: Mean dream returns, [K].
        real: Mean real returns, [K].
        doubt: Logarithm of the doubt over what is usual for the model, [K]; 0 where a model gives none.
        runs: The training runs that they are of, [K] strings.
        families: Their algorithms, [K] strings.
        range: The returns of 0 and of 1.
    """

    dream: NDArray[np.float64]
    real: NDArray[np.float64]
    doubt: NDArray[np.float64]
    runs: NDArray[np.str_]
    families: NDArray[np.str_]
    range: tuple[float, float]

    @classmethod
    def of(cls, trust: Trust) -> Calibration | None:
        """What is known of strangers at a task; None if nothing is."""
        told = trust.strangers or {}
        low, high = told.get("range", (0.0, 0.0))
        if not told.get("returns") or high <= low:
            return None
        rows: list[Mapping[str, Any]] = list(told["returns"].values())
        usual = told.get("usual_doubt")
        return cls(
            (np.array([row["dream"] for row in rows]) - low) / (high - low),
            (np.array([row["real"] for row in rows]) - low) / (high - low),
            np.array([relative_doubt(row["doubt"], usual) for row in rows]),
            np.array([row["run"] for row in rows]),
            np.array([row["family"] for row in rows]),
            (low, high),
        )

    def without(self, family: str) -> Calibration:
        """The same without a family."""
        kept = self.families != family
        told = self.dream[kept], self.real[kept], self.doubt[kept]
        return Calibration(*told, self.runs[kept], self.families[kept], self.range)


class Predictor:
    """Tells from dreams what the real env will pay, without a real step.

    Args:
        model: What dreams.
        task: One of its tasks.
        max_episode_steps: Agent steps of the dreams; the body's own by default.

    Raises:
        AimeGymError: If the dreams are no whole episodes, or nothing is known of what the task can earn.
    """

    def __init__(self, model: WorldModel, task: str, max_episode_steps: int | None = None):
        body, folder = model.config.body, model.folder
        if max_episode_steps not in (None, body.episode_steps):
            raise AimeGymError(
                f"Real returns are predicted for whole episodes, {body.episode_steps} steps of {body.name}, as those "
                f"of strangers are: leave out max_episode_steps; got {max_episode_steps}."
            )
        self._own = None if folder is None else Calibration.of(load_trust(folder).get(task, Trust()))
        logged = None if self._own is not None else returns_of_data(model)
        if self._own is None and body.foreign and logged is None:
            raise AimeGymError(
                f"Nothing is known of what {task} of {body.name} can earn, nor how these dreams err: measure them by "
                "`aime-gym strangers` and `aime-gym compare --strangers SET --trust`, or ask the real env."
            )
        here = (folder.name if folder else "", task)
        self._others = [each for place, each in bundled_calibrations().items() if place != here]
        self._logged = logged is not None
        self._span = self._own.range if self._own else logged or _SUITE
        self._most = return_bounds(body)
        bank = None if "image" in model.observed else shared_bank(model)  # strangers' doubt is not measured with images
        self._usual_doubt = None if bank is None else usual_doubt(model, bank.features)
        self._reason = _reason(self._own, self._span, self._logged)

    def __call__(self, dream: Episodes) -> Prediction:
        """Predicts what the policy earns whose whole episodes in the dream these are."""
        relative = relative_doubt(None if dream.doubt is None else float(dream.doubt.mean()), self._usual_doubt)
        low, high = self._span
        if self._logged:  # dreams can promise more, or less, than any episode earned; such errors are larger
            low, high = min(low, dream.mean), max(high, dream.mean)
        ends = predict_interval((dream.mean - low) / (high - low), relative, self._own, self._others)
        mean, lower, upper = (float(np.clip(low + share * (high - low), *self._most)) for share in ends)
        return Prediction(mean, (lower, upper), self._reason)


class DreamJudge:
    """Judges the agents of `aime_gym.agents.dreaming.Trials` by what dreams predict, without a real step.

    Args:
        worlds: Where they dream: whole episodes. They are closed with it.
        seed: Seed of the starts, and the first of the episodes' seeds; all agents dream the same.
        episodes: Dreams of a trial.

    Raises:
        AimeGymError: For the same reasons as `Predictor`.
    """

    decides: Literal["real", "low"] = "low"

    def __init__(self, worlds: Worlds, seed: int = 0, episodes: int = 16):
        self._worlds, self._seed, self._episodes = worlds, seed, episodes
        self._predict = Predictor(worlds.model, worlds.task, worlds.max_episode_steps)
        self._random: float | None = None

    def judge(self, agent: PolicyLike) -> dict[str, Any]:
        """A verdict on an agent as it is: the mean real return that is predicted, and the ends of its interval.

        An agent beats random actions if the lower end lies above the mean that is predicted of them.
        """
        if self._random is None:
            self._random = self._predict(self._dream("random")).mean
        dream = self._dream(agent)
        told = self._predict(dream)
        low, high = told.interval
        numbers = {"predicted": told.mean, "low": low, "high": high, "dream": dream.mean}
        return {**numbers, "beats_random": low > self._random}

    def close(self) -> None:
        """Closes the dreams."""
        self._worlds.close()

    def _dream(self, policy: PolicyLike) -> Episodes:
        return self._worlds.dream_episodes(policy, self._episodes, self._seed)


def predict_interval(
    dream: float, doubt: float, own: Calibration | None, others: Iterable[Calibration]
) -> tuple[float, float, float]:
    """The expected real return of a policy and the ends of its interval, in shares of the range of returns.

    Args:
        dream: Its mean dream return.
        doubt: Its relative doubt, see `Calibration`.
        own: The strangers of the model that dreamt, if it has met any.
        others: The strangers of other models or tasks.

    Returns:
        The median of what strangers suggest, the lower and the upper end.
    """
    errors, weights = [], []
    if own is not None and len(own.dream):
        counts = np.array([(own.runs == run).sum() for run in own.runs])
        errors.append(own.real - own.dream)
        weights.append(_alike(own, dream, doubt) / np.sqrt(counts))  # stages of one run are much alike
    # Without strangers of its own, promises are not comparable: others count whatever they were promised.
    pooled = [(each.real - each.dream, _alike(each, each.dream if own is None else dream, doubt)) for each in others]
    if pooled:
        rest = np.concatenate([weight for _, weight in pooled])
        errors.append(np.concatenate([error for error, _ in pooled]))
        weights.append(rest / max(rest.sum(), 1e-9) * _OTHERS)
    lower, median, upper = _quantiles(np.concatenate(errors), np.concatenate(weights), (_TAIL, 0.5, 1 - _TAIL))
    return dream + median, dream + lower, dream + upper


def return_bounds(body: Embodiment) -> tuple[float, float]:
    """The least and the most that any policy can earn: 0 and 1000 in the suite; nothing is known of other bodies."""
    return (-math.inf, math.inf) if body.foreign else _SUITE


def bundled_calibrations() -> dict[tuple[str, str], Calibration]:
    """The strangers of all bundled models, by model and task."""
    found = {}
    for folder in sorted(PRETRAINED.iterdir()):
        for task, trust in load_trust(folder).items() if folder.is_dir() else ():
            if calibration := Calibration.of(trust):
                found[folder.name, task] = calibration
    return found


def relative_doubt(doubt: float | None, usual: float | None) -> float:
    """The logarithm of a doubt over the usual one; 0 where there is none, large but finite where it has no bounds."""
    if doubt is None or not usual or usual <= 0:
        return 0.0
    return float(np.clip(math.log(max(doubt, 1e-9) / usual) if math.isfinite(doubt) else math.inf, -10, 10))


def _alike(strangers: Calibration, dream: float | NDArray[np.float64], doubt: float) -> NDArray[np.float64]:
    """How much strangers are like a policy, [K] from 0 to 1."""
    far = ((strangers.dream - dream) / _NEAR) ** 2 + ((strangers.doubt - doubt) / _AS_DOUBTFUL) ** 2
    return np.exp(-0.5 * far)


def _quantiles(values: ArrayLike, weights: NDArray[np.float64], shares: Sequence[float]) -> NDArray[np.float64]:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return np.asarray(values)[order][np.searchsorted(reached, np.asarray(shares) - 1e-9)]


def returns_of_data(model: WorldModel) -> tuple[float, float] | None:
    """The lowest and the highest return of the episodes that a model of logged data learned from; None of others.

    Raises:
        AimeGymError: If the file that tells them is damaged.
    """
    if not model.config.body.logged or model.folder is None or not (model.folder / "scores.json").is_file():
        return None
    ends: Any = read_json(model.folder / "scores.json", "the scores of a model", "Train it again.").get("returns")
    if not are_numbers(ends) or len(ends) != 2 or not ends[0] < ends[1]:
        return None
    return float(ends[0]), float(ends[1])


def _reason(own: Calibration | None, span: tuple[float, float], logged: bool) -> str:
    if own is None and logged:
        return (
            "Nobody was tried in these dreams: the interval is as wide as other models err, in shares of the range of "
            f"what the data's episodes earned, {rounded(span[0])} to {rounded(span[1])}."
        )
    if own is None:
        return "No stranger was tried in these dreams: the interval rests on those of other models alone."
    error = np.abs(own.real - own.dream).mean() * (span[1] - span[0])
    return f"It rests on {len(own.dream)} strangers, about whom these dreams err by {rounded(float(error))}."
