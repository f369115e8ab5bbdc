"""What policies earn in both worlds, as an object that prints, saves and loads."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aime_gym.errors import AimeGymError
from aime_gym.evaluation.metrics import DopeMetrics, bootstrap_interval, dope_metrics, rounded
from aime_gym.evaluation.returns import Episodes
from aime_gym.files import read_json, write_json

FORMAT = "aime_gym.comparison/1"
LONGEST_WORD = 12
"""Characters of a name's word that a table never breaks; those of paths may be longer."""


@dataclass(frozen=True)
class PolicyReturns:
    """What one policy earns in both worlds; equal episodes have equal starts and seeds."""

    name: str
    dream: Episodes
    real: Episodes

    @property
    def gap(self) -> float:
        """Mean dream return minus mean real return: what the dream promises too much."""
        return self.dream.mean - self.real.mean

    @property
    def gap_interval(self) -> tuple[float, float]:
        """95% bootstrap interval of the gap, over pairs of episodes."""
        return bootstrap_interval(self.dream.returns - self.real.returns)

    @property
    def doubt(self) -> float | None:
        """Mean disagreement of posterior and prior in the dream, in nats; None if it was not measured."""
        return None if self.dream.doubt is None else float(self.dream.doubt.mean())


@dataclass(frozen=True)
class Comparison:
    """The returns of policies in both worlds. `print` shows the table."""

    embodiment: str
    task: str
    model: str
    seed: int
    max_episode_steps: int
    policies: tuple[PolicyReturns, ...]
    usual_doubt: float | None = None
    """What the doubt stays below at most real moments, in nats; None if unknown."""
    trust: str = ""
    """What is known of the model's dreams at the task, in one line; empty where nothing is."""
    model_digest: str | None = None
    """Which weights the model had, in 16 hexadecimal digits (`aime_gym.data.content.model_digest`); None if unknown."""

    @property
    def episodes(self) -> int:
        """Episodes of each policy in each world."""
        return len(self.policies[0].real.returns)

    @property
    def metrics(self) -> DopeMetrics:
        """The DOPE metrics over the policies."""
        return dope_metrics([p.dream.mean for p in self.policies], [p.real.mean for p in self.policies])

    @property
    def verdict(self) -> str:
        """One sentence in numbers: about the first policy, or from three policies on about all of them."""
        metrics, first = self.metrics, self.policies[0]
        if len(self.policies) < 3:
            return (
                f"{self.task}: dream {plus_minus(first.dream)}, real {plus_minus(first.real)} "
                f"over {self.episodes} episodes; gap {rounded(first.gap)}"
            )
        best = max(self.policies, key=lambda policy: policy.dream.mean)
        correlations = (
            "all returns alike"
            if metrics["pearson"] is None or metrics["spearman"] is None
            else f"Spearman {metrics['spearman']:.2f}, Pearson {metrics['pearson']:.2f}"
        )
        return (
            f"{self.task}: over {len(self.policies)} policies {correlations}, "
            f"mean error {rounded(metrics['mean_absolute_error'] or 0)}; the dream's favourite: "
            f"dream {plus_minus(best.dream)}, real {plus_minus(best.real)}"
        )

    def is_doubtful(self, policy: PolicyReturns) -> bool:
        """Whether a policy's dream return should not be trusted: the model doubts its steps more than real ones."""
        if policy.doubt is None or self.usual_doubt is None:
            return False
        return not policy.doubt <= self.usual_doubt  # also where a dream left the finite numbers

    def table(self) -> Table:
        """The returns as a rich table; a dream return that should not be trusted has a question mark."""
        doubtful = any(p.doubt is not None for p in self.policies)
        table = Table(
            title=escape(f"{self.embodiment} {self.task}, {self.episodes} episodes, model {self.model}"),
            caption="mean return [95% bootstrap interval]; gap = dream - real"
            + ("; ? = do not trust, the model doubts these dreams" if any(map(self.is_doubtful, self.policies)) else "")
            + (f"\n{self._doubt_line()}" if doubtful else ""),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        words = [word for policy in self.policies for word in policy.name.split() if len(word) <= LONGEST_WORD]
        table.add_column("policy", overflow="fold", min_width=max(map(len, words), default=None))
        for column in ("dream", "real", "gap", *(["doubt"] if doubtful else [])):
            table.add_column(column, justify="right", no_wrap=True)
        for policy in self.policies:
            gap_low, gap_high = policy.gap_interval
            cells = [escape(policy.name), *(with_interval(world) for world in (policy.dream, policy.real))]
            cells[1] += " ?" if self.is_doubtful(policy) else ""
            cells.append(f"{rounded(policy.gap)} [{rounded(gap_low)}, {rounded(gap_high)}]".replace("[", r"\["))
            if doubtful:
                cells.append("" if policy.doubt is None else f"{policy.doubt:.3g}")
            table.add_row(*cells)
        return table

    def _doubt_line(self) -> str:
        """What the column of the doubt says."""
        usual = "" if self.usual_doubt is None else f"; below {self.usual_doubt:.3g} at most real moments"
        return f"doubt = nats by which the model corrects its prediction when it sees what it dreamt{usual}"

    def metrics_line(self) -> str:
        """The DOPE metrics in one line; empty below three policies, where correlations say nothing."""
        if len(self.policies) < 3:
            return ""
        metrics = self.metrics
        shown = {
            "Pearson": (metrics["pearson"], ".2f"),
            "Spearman": (metrics["spearman"], ".2f"),
            "mean absolute error": (metrics["mean_absolute_error"], ".0f"),
            "regret@1": (metrics["regret_at_1"], ".0f"),
        }
        return ", ".join(f"{name} {'-' if v is None else format(v, spec)}" for name, (v, spec) in shown.items())

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=110)
        console.print(self.table())
        if self.metrics_line():
            console.print(self.metrics_line(), highlight=False)
        if self.trust:
            console.print(self.trust, highlight=False, markup=False)
        return text.getvalue().rstrip("\n")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""

        def world(episodes: Episodes) -> dict[str, Any]:
            return {
                "mean": episodes.mean,
                "interval": list(episodes.interval),
                "returns": episodes.returns.tolist(),
                "lengths": episodes.lengths.tolist(),
                "doubt": None if episodes.doubt is None else [_finite(doubt) for doubt in episodes.doubt],
            }

        return {
            "format": FORMAT,
            "embodiment": self.embodiment,
            "task": self.task,
            "model": self.model,
            "model_digest": self.model_digest,
            "seed": self.seed,
            "max_episode_steps": self.max_episode_steps,
            "episodes": self.episodes,
            "usual_doubt": _finite(self.usual_doubt),
            "trust": self.trust,
            "metrics": dict(self.metrics),
            "policies": {
                p.name: {"dream": world(p.dream), "real": world(p.real), "gap": p.gap, "doubt": _finite(p.doubt)}
                for p in self.policies
            },
        }

    def to_json(self, path: str | Path) -> Path:
        """Writes `to_dict` to a file, whole or not at all."""
        return write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> Comparison:
        """Reads what `to_json` wrote.

        Raises:
            AimeGymError: If the file is not such a comparison.
        """
        data = read_json(path, "a comparison written by aime_gym")
        try:
            return cls.from_dict(data)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise AimeGymError(f"{path} does not hold a comparison written by aime_gym ({error!r}).") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Reads what `to_dict` gave; a ValueError, LookupError, TypeError or AttributeError says what does not fit."""

        def world(data: dict[str, Any]) -> Episodes:
            doubts = data["doubt"]
            doubt = None if doubts is None else np.array([math.inf if one is None else one for one in doubts], float)
            return Episodes(np.array(data["returns"], float), np.array(data["lengths"], int), doubt)

        if data["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}; got {data['format']!r}")
        policies = tuple(
            PolicyReturns(name, world(p["dream"]), world(p["real"])) for name, p in data["policies"].items()
        )
        kinds = {"embodiment": str, "task": str, "model": str, "seed": int, "max_episode_steps": int}
        usual, digest = data.get("usual_doubt"), data.get("model_digest")  # which older files lack
        told = {name: data[name] for name in kinds}
        wrong = [name for name, kind in kinds.items() if type(told[name]) is not kind]
        if wrong or (usual is not None and type(usual) not in (int, float)):
            raise TypeError(f"odd {', '.join(wrong) or 'usual_doubt'}")
        if digest is not None and type(digest) is not str:
            raise TypeError("odd model_digest")
        trust = str(data.get("trust", ""))
        return cls(policies=policies, usual_doubt=usual, trust=trust, model_digest=digest, **told)


def plus_minus(episodes: Episodes) -> str:
    """Mean return and half of its interval: ``"390 ± 20"``."""
    low, high = episodes.interval
    return f"{rounded(episodes.mean)} ± {rounded((high - low) / 2)}"


def with_interval(episodes: Episodes) -> str:
    """Mean return and its interval, escaped for rich."""
    low, high = episodes.interval
    return rf"{rounded(episodes.mean)} \[{rounded(low)}, {rounded(high)}]"


def _finite(number: float | None) -> float | None:
    """A number as JSON has it, which knows none that is not finite: a doubt without bounds is null."""
    return None if number is None or not math.isfinite(number) else float(number)
