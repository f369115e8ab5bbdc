"""The real return of a policy from dreams alone, with an interval that strangers have calibrated.

What dreams promise is corrected by how far they erred about strangers: most by those whose dreams promised as much and
were as doubtful. The strangers of the model itself count most, and those of all bundled models together as much as a
few of them, so that where the own ones say little the interval is wide. Its ends are weighted quantiles of these errors
(after Tibshirani et al., "Conformal Prediction Under Covariate Shift", NeurIPS 2019, with a kernel for the weights), so
far out that a few strangers suffice. `python -m benchmarks.predicted_returns` measures how often it holds, by families
of strangers that are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aime_gym.errors import AimeGymError, check_natural, check_positive
from aime_gym.evaluation.returns import Episodes, PolicyLike, episode_returns, load_policy, name_policies, rounded
from aime_gym.evaluation.worlds import Worlds, check_spaces, fitting_obs_type, model_for
from aime_gym.world_model.checkpoint import PRETRAINED
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
class PredictedReturn:
    """What a policy will earn in the real env, as far as its dreams tell.

    Attributes:
        policy: Its name.
        embodiment: The body.
        task: The task.
        model: The name of the model that dreamt.
        mean: The expected mean return in the real env.
        interval: In which that mean lies with a probability of about `LEVEL`.
        dream: The episodes in the dream.
        reason: What the interval rests on, in words.
    """

    policy: str
    embodiment: str
    task: str
    model: str
    mean: float
    interval: tuple[float, float]
    dream: Episodes
    reason: str

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.policy} at {self.embodiment} {self.task}: {rounded(self.mean)} expected in the real env, between "
            f"{rounded(low)} and {rounded(high)} with {LEVEL:.0%}; dreamt {rounded(self.dream.mean)} in "
            f"{len(self.dream.returns)} episodes of {self.model}. {self.reason}"
        )


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


def predict_return(
    policy: PolicyLike,
    embodiment: str = "Walker",
    task: str | None = None,
    model: Any = None,
    episodes: int = 20,
    seed: int = 0,
    deterministic: bool = True,
) -> PredictedReturn:
    """Predicts what a policy earns in the real env, without one real step.

    Example:
        >>> import aime_gym
        >>> told = aime_gym.predict_return("zero", "Cartpole", task="swingup", episodes=4)
        >>> told.interval[0] <= told.mean <= told.interval[1]
        True

    Args:
        policy: One of those that `compare` takes.
        embodiment: The body, or the id of a Gymnasium env or of a registered dream.
        task: One of its tasks; its first one by default.
        model: A loaded world model, a folder or a bundled name; the body's bundled one by default.
        episodes: Dreams that are run.
        seed: Seed of starts and episodes.
        deterministic: Whether the policy gives its mode.

    Raises:
        AimeGymError: If a name, a number, a file or the policy's spaces do not fit, or nothing is known of what the
            task can earn.
    """
    check_positive(episodes, "episodes")
    check_natural(seed, "seed")
    ((name, given),) = name_policies([policy]).items()
    loaded = load_policy(given)
    model = model_for([loaded], embodiment, model)
    with Worlds(embodiment, task, model, fitting_obs_type(loaded, model)) as worlds:
        check_spaces(name, loaded, worlds)
        body, folder = worlds.embodiment, worlds.model.folder
        own = None if folder is None else Calibration.of(load_trust(folder).get(worlds.task, Trust()))
        if own is None and body.foreign:
            raise AimeGymError(
                f"Nothing is known of what {worlds.task} of {body.name} can earn, nor how these dreams err: measure "
                "them by `aime-gym strangers` and `aime-gym compare --strangers SET --trust`."
            )
        envs = worlds.dream_envs(episodes)
        try:
            seeds, starts = [seed + index for index in range(episodes)], worlds.draw_starts(episodes, seed)
            dream = episode_returns(loaded, envs, None, seeds, {"start": starts}, deterministic)
        finally:
            envs.close()
        sees_images = "image" in worlds.model.observed  # whose strangers' doubt is not measured
        doubt = None if dream.doubt is None or sees_images else float(dream.doubt.mean())
        relative = relative_doubt(doubt, None if doubt is None else worlds.usual_doubt)
        low, high = span = own.range if own is not None else _SUITE
        others = [each for place, each in bundled_calibrations().items() if place != (worlds.model_name, worlds.task)]
        ends = predict_interval((dream.mean - low) / (high - low), relative, own, others)
        most = (-math.inf, math.inf) if body.foreign else _SUITE
        mean, lower, upper = (float(np.clip(low + share * (high - low), *most)) for share in ends)
        return PredictedReturn(
            name, body.name, worlds.task, worlds.model_name, mean, (lower, upper), dream, _reason(own, span, relative)
        )


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
    pooled = [(each.real - each.dream, _alike(each, dream, doubt)) for each in others]
    if pooled:
        rest = np.concatenate([weight for _, weight in pooled])
        errors.append(np.concatenate([error for error, _ in pooled]))
        weights.append(rest / max(rest.sum(), 1e-9) * _OTHERS)
    lower, median, upper = _quantiles(np.concatenate(errors), np.concatenate(weights), (_TAIL, 0.5, 1 - _TAIL))
    return dream + median, dream + lower, dream + upper


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


def _alike(strangers: Calibration, dream: float, doubt: float) -> NDArray[np.float64]:
    """How much strangers are like a policy, [K] from 0 to 1."""
    far = ((strangers.dream - dream) / _NEAR) ** 2 + ((strangers.doubt - doubt) / _AS_DOUBTFUL) ** 2
    return np.exp(-0.5 * far)


def _quantiles(values: ArrayLike, weights: NDArray[np.float64], shares: Sequence[float]) -> NDArray[np.float64]:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return np.asarray(values)[order][np.searchsorted(reached, np.asarray(shares) - 1e-9)]


def _reason(own: Calibration | None, span: tuple[float, float], doubt: float) -> str:
    if own is None:
        text = "No stranger was tried in these dreams: the interval rests on those of other models alone"
    else:
        error = np.abs(own.real - own.dream).mean() * (span[1] - span[0])
        text = f"It rests on {len(own.dream)} strangers, about whom these dreams err by {rounded(float(error))}"
    return f"{text}{'; the dreams are more doubtful than usual' if doubt > 0 else ''}."
