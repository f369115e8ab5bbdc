"""How well a model's dreams judge policies that it has never met: sets of strangers, and the verdict over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, PlainPolicy, load_plain
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison
from aime_gym.evaluation.returns import dope_metrics, pearson, ranks
from aime_gym.files import digest_of, read_json

FORMAT = "aime_gym.strangers/1"

SEED = 500_000
"""Seed of each policy's first real episode; the others have the seeds that follow. No training resets with them."""

INDEX = "strangers.json"
"""The list in a set's folder: format, body, task, real steps of all training, returns and digests by policy."""

COLLECTORS = ("sac", "exploiter")
"""Families whose algorithm collects data for `aime-gym pretrain`: SAC its buffers, and SHAC, by which exploiters learn,
its rounds."""

_RESAMPLES = 500

_BOOTSTRAPPED = ("spearman", "pearson", "mean_absolute_error", "bias")


@dataclass(frozen=True)
class Stranger:
    """One policy of a set.

    Attributes:
        name: In the list.
        run: The training run that it is a stage of.
        family: The algorithm.
        policy: Acts.
        returns: What its real episodes earned, from resets with the set's seeds in turn.
        digest: Digest of its file.
        model: The digest of the model in whose dreams it learned, if it did.
    """

    name: str
    run: str
    family: str
    policy: PlainPolicy | NoisyPolicy
    returns: tuple[float, ...] = ()
    digest: str = ""
    model: str | None = None

    @property
    def plain(self) -> PlainPolicy:
        """What acts, without its noise."""
        return self.policy.policy if isinstance(self.policy, NoisyPolicy) else self.policy


@dataclass(frozen=True)
class StrangerSet:
    """Policies of one body and task, as `aime-gym strangers` wrote them.

    Attributes:
        embodiment: The body.
        task: The task at which they are judged.
        random_return: Mean real return of uniform actions.
        members: The policies.
        best: The best real return that anyone is known to have; None if the set does not say.
        digest: Digest of the list, and so of all that it tells.
        learn: The task whose reward they learned from, if it is another one.
    """

    embodiment: str
    task: str
    random_return: float
    members: tuple[Stranger, ...]
    best: float | None = None
    digest: str = ""
    learn: str | None = None

    @classmethod
    def load(cls, folder: str | Path) -> StrangerSet:
        """Reads a folder; a policy whose file is not the one that was measured is refused.

        Args:
            folder: A folder that `aime-gym strangers` wrote.

        Raises:
            AimeGymError: If the list or a policy is missing, damaged or another one.
        """
        folder = Path(folder)
        path = folder / INDEX
        index = read_json(path, "a list of strangers", "`aime-gym strangers` makes one.")
        try:
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']!r}")
            body, task = str(index["embodiment"]), str(index["task"])
            random_return = float(index["anchors"]["random"]["mean"])
            best = float(index["best"]) if "best" in index else None
            learn = index.get("settings", {}).get("learn")
            entries = {str(name): _Entry.read(str(name), of) for name, of in index["policies"].items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise AimeGymError(f"{path} is no list of strangers ({error}). Make the set again.") from error
        get_embodiment(body, imports=False)  # named in a file, which imports nothing
        files = {}
        for entry in entries.values():
            file = folder / f"{entry.file}.safetensors"
            if entry.file not in files:
                files[entry.file] = load_plain(file), digest_of(file)
            if files[entry.file][1] != entry.digest:
                raise AimeGymError(f"{file} is not the policy that {path} measured. Make the set again.")
        members = tuple(entry.stranger(name, files[entry.file][0]) for name, entry in entries.items())
        return cls(body, task, random_return, members, best, digest_of(path), learn and str(learn))


@dataclass(frozen=True)
class _Entry:
    """What the list says of a policy."""

    run: str
    family: str
    file: str
    digest: str
    noise: float
    returns: tuple[float, ...]
    model: str | None

    @classmethod
    def read(cls, name: str, of: Mapping[str, Any]) -> _Entry:
        """Takes what is needed; a LookupError, TypeError or ValueError says what is odd."""
        returns = tuple(float(value) for value in of["real"]["returns"])
        noise = float(of.get("noise", 0.0))
        if not returns or not 0 <= noise < 10:
            raise ValueError(f"{name} has noise {noise} and {len(returns)} real returns")
        file = Path(str(of.get("file", name))).name  # never of another folder
        model = of.get("model")
        return cls(str(of["run"]), str(of["family"]), file, str(of["sha256"]), noise, returns, model and str(model))

    def stranger(self, name: str, policy: PlainPolicy) -> Stranger:
        """The policy with its noise."""
        acts = NoisyPolicy(policy, self.noise) if self.noise else policy
        return Stranger(name, self.run, self.family, acts, self.returns, self.digest, self.model)


def judge(
    comparison: Comparison, strangers: StrangerSet, seen: Iterable[str] = COLLECTORS, best: float | None = None
) -> dict[str, Any]:
    """How well dreams rank strangers, over those of families that have collected nothing, and by family.

    Args:
        comparison: Both worlds' returns of the policies of `strangers`.
        strangers: The set.
        seen: Families whose algorithm has collected some of the model's data.
        best: The best real return that anyone has at the task; the set's own knowledge of it by default.

    Returns:
        What `aime_gym.world_model.trust.Trust` holds of strangers. Of those of unseen families: the metrics of
        `dope_metrics`, the ``"bias"`` of dream returns, the number of ``"runs"``, and ``"intervals"`` by metric and
        percent, by a bootstrap over training runs. ``"families"``: the same of each family; ``"seen"``: which of them
        are apart. ``"range"``: the returns of random actions and of the best; ``"span"`` and ``"thirds"``: what share
        of it the unseen span, and which shares of them lie in each third.
    """
    returns = {policy.name: (policy.dream.mean, policy.real.mean) for policy in comparison.policies}
    rows = [(member, *returns[member.name]) for member in strangers.members if member.name in returns]
    families = sorted({row[0].family for row in rows})
    apart = sorted(set(seen) & set(families))
    unseen = [row for row in rows if row[0].family not in apart]
    known = [real for _, _, real in rows] + [value for value in (best, strangers.best) if value is not None]
    top = max(known, default=strangers.random_return)
    span, thirds = _coverage([real for _, _, real in unseen], strangers.random_return, top)
    return {
        **_metrics(unseen),
        "families": {name: _metrics([row for row in rows if row[0].family == name]) for name in families},
        "seen": apart,
        "range": [strangers.random_return, top],
        "span": span,
        "thirds": thirds,
    }


def _coverage(real: list[float], low: float, high: float) -> tuple[float, list[float]]:
    if not real or high <= low:
        return 0.0, [0.0, 0.0, 0.0]
    places = np.clip((np.array(real) - low) / (high - low), 0.0, 1.0)
    counts = np.histogram(places, bins=3, range=(0.0, 1.0))[0]
    return float(np.ptp(places)), (counts / len(real)).tolist()


def _metrics(rows: list[tuple[Stranger, float, float]]) -> dict[str, Any]:
    dream, real = (np.array([row[i] for row in rows]) for i in (1, 2))
    runs = sorted({row[0].run for row in rows})
    groups = [np.array([i for i, row in enumerate(rows) if row[0].run == run], int) for run in runs]
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in _BOOTSTRAPPED}
    for _ in range(_RESAMPLES if len(runs) > 1 else 0):
        chosen = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        for name, value in _point(dream[chosen], real[chosen]).items():
            found[name] += [] if value is None else [value]
    intervals = {
        name: {
            f"{percent:g}": np.quantile(values, [0.5 - percent / 200, 0.5 + percent / 200]).tolist()
            for percent in (95, 90)
        }
        for name, values in found.items()
        if values
    }
    return {**dope_metrics(dream, real), **_point(dream, real), "runs": len(runs), "intervals": intervals}


def _point(dream: np.ndarray, real: np.ndarray) -> dict[str, float | None]:
    finite = np.isfinite(dream)
    gaps = (dream - real)[finite]
    return {
        "spearman": pearson(ranks(dream[finite]), ranks(real[finite])),
        "pearson": pearson(dream[finite], real[finite]),
        "mean_absolute_error": float(np.abs(gaps).mean()) if len(gaps) else None,
        "bias": float(gaps.mean()) if len(gaps) else None,
    }


TOLERANCE = 1e-3
"""Tolerance of actions, which were computed in batches of another size or by another library."""

SATURATED = 0.999
"""Actions from this size on say nothing about the policy."""

LEAST_STEPS = 3
"""Steps in a row, none saturated in all actions and each another action, that two policies do not share by chance."""


def acted_in(policy: PlainMLP, body: Embodiment, starts: Mapping[str, np.ndarray]) -> bool:
    """Whether some window holds the steps that the policy itself would have taken.

    Args:
        policy: Acts on all sensors of the body, side by side.
        body: The body.
        starts: Sensors and ``pre_action``, each [K, M, ...], see `make_starts` of `training.model_folder`.
            Without one of the sensors, as in a model of images, nothing is found, and where actions are choices
            neither: a few of them are the same by chance.
    """
    names = [sensor.name for sensor in body.observed("mdp")]
    if body.choices or not set(names) <= set(starts):
        return False
    frames = np.concatenate([starts[name] for name in names], axis=-1)[:-1]  # [K - 1, M, D]
    taken = starts["pre_action"][1:]
    would = policy.predict(frames.reshape(-1, frames.shape[-1]))[0].reshape(taken.shape)
    same = (np.abs(would - taken) < TOLERANCE).all(-1)
    telling = (np.abs(would) < SATURATED).any(-1)
    new = np.ones_like(telling)  # held actions fit a policy that hardly moves at one step as at all of them
    new[1:] = (np.abs(np.diff(would, axis=0)) > 2 * TOLERANCE).any(-1)
    steps = np.where(telling, np.where(same, new, -len(same)), 0).sum(0)  # one that differs outweighs all others
    return bool((steps >= LEAST_STEPS).any())
