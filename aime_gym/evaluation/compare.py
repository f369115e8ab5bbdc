"""Returns of policies in the dream and in the world, paired, as a table, and how far the dream can be trusted."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aime_gym.envs.sb3 import learned_in
from aime_gym.errors import AimeGymError, check_natural, check_positive
from aime_gym.evaluation.returns import (
    DopeMetrics,
    Episodes,
    PolicyLike,
    bootstrap_interval,
    dope_metrics,
    load_policy,
    name_policies,
    plus_minus,
    rounded,
    with_interval,
)
from aime_gym.evaluation.worlds import Worlds, check_spaces, fitting_obs_type, model_for
from aime_gym.files import Revision, read_json, write_json
from aime_gym.world_model.checkpoint import revision_of
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import trust_line

FORMAT = "aime_gym.comparison/1"

LONGEST_WORD = 12
"""Characters of a name's word that a table never breaks; those of paths may be longer."""


@dataclass(frozen=True)
class PolicyReturns:
    """What one policy earns in both worlds; equal episodes have equal starts and seeds."""

    name: str
    dream: Episodes
    real: Episodes
    learned_in: Revision | None = None
    """The weights in whose dreams it learned; None if unknown."""

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
        """Mean doubt of the dream's steps, in nats; None if it was not measured."""
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
    """The doubt, in nats, below which 95 of 100 real moments lie; None if unknown."""
    trust: str = ""
    """What is known of the model's dreams at the task, in one line; empty where nothing is."""
    model_digest: str | None = None
    """Which weights the model had, in 16 hexadecimal digits (see `weights_digest`); None if unknown."""
    revision: int | None = None
    """Their number (see `aime_gym.files.Revision`); None if unknown."""

    @property
    def weights(self) -> Revision | None:
        """Which weights the model had; None if unknown."""
        return None if self.model_digest is None else Revision(self.model, self.revision, self.model_digest)

    @property
    def strays(self) -> list[str]:
        """A sentence about each policy that learned in the dreams of other weights than these."""
        return [note for p in self.policies if (note := stray_note(p.name, p.learned_in, self.weights))]

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
            title=escape(
                f"{self.embodiment} {self.task}, {self.episodes} episodes, model {self.weights or self.model}"
            ),
            caption="mean return [95% bootstrap interval]; gap = dream - real"
            + ("; ? = do not trust, the model doubts these dreams" if any(map(self.is_doubtful, self.policies)) else "")
            + (f"\n{self._doubt_line()}" if doubtful else "")
            + escape("".join(f"\n{note}" for note in self.strays)),
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
            "revision": self.revision,
            "seed": self.seed,
            "max_episode_steps": self.max_episode_steps,
            "episodes": self.episodes,
            "usual_doubt": _finite(self.usual_doubt),
            "trust": self.trust,
            "metrics": dict(self.metrics),
            "policies": {
                p.name: {
                    **{"dream": world(p.dream), "real": world(p.real), "gap": p.gap, "doubt": _finite(p.doubt)},
                    "learned_in": p.learned_in and p.learned_in._asdict(),
                }
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
            PolicyReturns(
                name,
                world(p["dream"]),
                world(p["real"]),
                None if p.get("learned_in") is None else Revision.from_dict(p["learned_in"]),
            )
            for name, p in data["policies"].items()
        )
        kinds = {"embodiment": str, "task": str, "model": str, "seed": int, "max_episode_steps": int}
        usual, digest = data.get("usual_doubt"), data.get("model_digest")  # which older files lack
        told = {name: data[name] for name in kinds}
        wrong = [name for name, kind in kinds.items() if type(told[name]) is not kind]
        if wrong or (usual is not None and type(usual) not in (int, float)):
            raise TypeError(f"odd {', '.join(wrong) or 'usual_doubt'}")
        if digest is not None and type(digest) is not str:
            raise TypeError("odd model_digest")
        number, trust = data.get("revision"), str(data.get("trust", ""))
        if number is not None and type(number) is not int:
            raise TypeError("odd revision")
        return cls(policies=policies, usual_doubt=usual, trust=trust, model_digest=digest, revision=number, **told)


def told_of_weights(model: WorldModel) -> dict[str, Any]:
    """The fields of a `Comparison` that say which weights a model has."""
    revision = revision_of(model)
    return {} if revision is None else {"model_digest": revision.digest, "revision": revision.number}


def stray_note(name: str, learned: Revision | None, weights: Revision | None) -> str:
    """Says that a policy learned in the dreams of other weights; empty if it did not or nothing is known.

    Args:
        name: The name of the policy.
        learned: The weights in whose dreams it learned.
        weights: The weights that dream now.
    """
    if learned is None or weights is None or learned.digest == weights.digest:
        return ""
    kind = "another revision of this dream" if learned.model == weights.model else "the dreams of another model"
    return f"{name} learned in {kind}: {learned}"


def _finite(number: float | None) -> float | None:
    """A number as JSON has it, which knows none that is not finite: a doubt without bounds is null."""
    return None if number is None or not math.isfinite(number) else float(number)


def compare(
    policies: PolicyLike | Path | Sequence[Any] | Mapping[str, Any],
    embodiment: str = "Walker",
    task: str | None = None,
    episodes: int = 20,
    model: Any = None,
    seed: int = 0,
    obs_type: str | None = None,
    max_episode_steps: int | None = None,
    deterministic: bool = True,
) -> Comparison:
    """Evaluates policies in the dream and in the real env, from the same start states and seeds.

    Args:
        policies: One, a list or a dict by name, of: SB3 agents, objects with their `predict`, callables from a batch
            of observations to a batch of actions, paths of plain policies, and of saved SB3 agents (name only files
            that you trust: but for those that `aime-gym dream` saves, they are code, as is a ``vecnormalize.pkl``
            beside them, whose statistics are taken), and ``"random"`` and ``"zero"``. A loaded agent that learned
            behind a `VecNormalize` must have it, as in ``PPO.load(path, env=VecNormalize.load(...))``.
        embodiment: The body, or the id of a Gymnasium env or of a registered dream.
        task: One of its tasks; its first one by default.
        episodes: Episodes of each policy in each world.
        model: A loaded world model, a folder or a bundled name; the body's bundled one by default, that of images for
            agents on images.
        seed: Seed of starts and episodes.
        obs_type: What policies see; by default what fits each SB3 agent, and for the others that of `Worlds`.
        max_episode_steps: Agent steps of an episode; the body's own by default.
        deterministic: Whether policies give their mode.

    Returns:
        The comparison.

    Raises:
        AimeGymError: If a name, a number, a file or a policy's spaces do not fit.
    """
    check_positive(episodes, "episodes")
    check_natural(seed, "seed")
    loaded = {name: load_policy(policy) for name, policy in name_policies(policies).items()}
    model = model_for(loaded.values(), embodiment, model, obs_type)
    worlds: dict[str, Worlds] = {}
    results = []
    try:
        for name, policy in loaded.items():
            kind = obs_type or fitting_obs_type(policy, model)
            if kind not in worlds:
                worlds[kind] = Worlds(embodiment, task, model, kind, max_episode_steps)
            check_spaces(name, policy, worlds[kind])
            returns = worlds[kind].evaluate(policy, episodes, seed, deterministic)
            results.append(PolicyReturns(name, *returns, learned_in(policy)))
        first = next(iter(worlds.values()))
        return Comparison(
            first.embodiment.name,
            first.task,
            first.model_name,
            seed,
            first.max_episode_steps,
            tuple(results),
            first.usual_doubt,
            trust_line(first.model.folder, first.task),
            **told_of_weights(first.model),
        )
    finally:
        for pair in worlds.values():
            pair.close()
