"""What a model's dreams are worth to policies that it has never met: sets of strangers, and the verdict over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aime_gym.agents.numpy_policies import NoisyPolicy, PlainPolicy, load_plain
from aime_gym.digests import digest_of
from aime_gym.embodiments import get_embodiment
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.comparison import Comparison
from aime_gym.evaluation.metrics import DopeMetrics, dope_metrics, pearson, ranks
from aime_gym.files import read_json

FORMAT = "aime_gym.strangers/1"
INDEX = "strangers.json"
"""The list in a set's folder: format, body, task, real steps of all training, returns and digests by policy."""
LEAST_SPAN = 0.5
"""Share of the range from a random policy's return to the best known one that a set must span to say anything."""
LEAST_THIRD = 0.25
"""Share of a set's policies in each third of that range that it should have."""
_RESAMPLES = 500


@dataclass(frozen=True)
class Stranger:
    """One policy of a set.

    Attributes:
        name: Its file's, and its noise if it has any.
        run: The training run that it is a stage of.
        family: The algorithm.
        policy: Acts.
    """

    name: str
    run: str
    family: str
    policy: PlainPolicy | NoisyPolicy


@dataclass(frozen=True)
class StrangerSet:
    """Policies of one body and task, as `aime-gym strangers` wrote them.

    Attributes:
        embodiment: The body.
        task: The task.
        random_return: Mean real return of uniform actions.
        members: The policies.
    """

    embodiment: str
    task: str
    random_return: float
    members: tuple[Stranger, ...]

    @classmethod
    def load(cls, folder: Path, noise: Iterable[float] = (0.3,)) -> StrangerSet:
        """Reads a folder; a policy whose file is not the one that was measured is refused.

        Args:
            folder: Of `aime-gym strangers`.
            noise: Every run's last stage is there once more with Gaussian noise of each of these standard deviations.

        Raises:
            AimeGymError: If the list or a policy is missing, damaged or another one.
        """
        index = read_json(folder / INDEX, "a list of strangers", "`aime-gym strangers` makes one.")
        try:
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']!r}")
            random_return = float(index["anchors"]["random"]["mean"])
            entries = {
                str(name): (str(e["run"]), str(e["family"]), e["sha256"]) for name, e in index["policies"].items()
            }
            body, task = str(index["embodiment"]), str(index["task"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AimeGymError(f"{folder / INDEX} is no list of strangers ({error}). Make the set again.") from error
        get_embodiment(body, imports=False)  # named in a file, which imports nothing
        members = []
        for name, (run, family, digest) in entries.items():
            path = folder / f"{Path(name).name}.safetensors"
            policy = load_plain(path)
            if digest_of(path) != digest:
                raise AimeGymError(f"{path} is not the policy that {folder / INDEX} measured. Make the set again.")
            members.append(Stranger(name, run, family, policy))
        last = {member.run: member for member in members}
        noisy = [
            Stranger(f"{m.name}, noise {std:g}", m.run, m.family, NoisyPolicy(m.policy, std))
            for std in noise
            for m in last.values()
        ]
        return cls(body, task, random_return, (*members, *noisy))

    @property
    def policies(self) -> dict[str, PlainPolicy | NoisyPolicy]:
        """What `aime_gym.compare` takes."""
        return {member.name: member.policy for member in self.members}


def judge(
    comparison: Comparison, strangers: StrangerSet, seen: Iterable[str], best: float | None = None
) -> dict[str, Any]:
    """How well dreams rank strangers, over those of families that have collected nothing, and by family.

    Args:
        comparison: Both worlds' returns of the policies of `strangers`.
        strangers: The set.
        seen: Families whose algorithm has collected some of the model's data.
        best: The best real return that anyone has at the task; that of the set's best policy if it is higher, or
            not given.

    Returns:
        ``"unseen"`` and ``"all"``: metrics with an interval of the rank correlation by a bootstrap over training runs;
        ``"families"``: the same of each; ``"span"`` and ``"thirds"``: what share of the range of returns the unseen
        span, and which shares of them lie in each third of it; ``"conclusive"``: whether that is enough to trust it.
    """
    returns = {policy.name: (policy.dream.mean, policy.real.mean) for policy in comparison.policies}
    rows = [(member, *returns[member.name]) for member in strangers.members if member.name in returns]
    seen = set(seen)
    unseen = [row for row in rows if row[0].family not in seen]
    top = max([real for _, _, real in rows] + ([] if best is None else [best]))
    span, thirds = _coverage([real for _, _, real in unseen], strangers.random_return, top)
    families = sorted({row[0].family for row in rows})
    return {
        "unseen": _metrics(unseen),
        "all": _metrics(rows),
        "families": {name: _metrics([row for row in rows if row[0].family == name]) for name in families},
        "seen": sorted(seen & set(families)),
        "span": span,
        "thirds": thirds,
        "conclusive": bool(
            span >= LEAST_SPAN
            and min(thirds) >= LEAST_THIRD
            and len({row[0].run for row in rows}) >= 12
            and len({row[0].family for row in unseen}) >= 2
        ),
    }


def _coverage(real: list[float], low: float, high: float) -> tuple[float, list[float]]:
    if not real or high <= low:
        return 0.0, [0.0, 0.0, 0.0]
    places = np.clip((np.array(real) - low) / (high - low), 0.0, 1.0)
    counts = np.histogram(places, bins=3, range=(0.0, 1.0))[0]
    return float(np.ptp(places)), (counts / len(real)).tolist()


def _metrics(rows: list[tuple[Stranger, float, float]]) -> Mapping[str, Any]:
    dream, real = (np.array([row[i] for row in rows]) for i in (1, 2))
    metrics: DopeMetrics = dope_metrics(dream.tolist(), real.tolist())
    runs = sorted({row[0].run for row in rows})
    groups = [np.array([i for i, row in enumerate(rows) if row[0].run == run], int) for run in runs]
    rng, found = np.random.default_rng(0), []
    for _ in range(_RESAMPLES if len(runs) > 1 else 0):
        chosen = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        value = pearson(ranks(dream[chosen]), ranks(real[chosen]))
        found += [] if value is None else [value]
    interval = [float(x) for x in np.quantile(found, [0.025, 0.975])] if found else None
    bias = float((dream - real).mean()) if rows else None
    return {**metrics, "runs": len(runs), "spearman_interval": interval, "bias": bias}
