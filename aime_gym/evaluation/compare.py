"""Returns of policies in the dream and in the world, paired, as a table, and how far the dream can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from aime_gym.envs.dream_checks import choose_task, load_model_of
from aime_gym.envs.payment import UserFunction
from aime_gym.envs.sb3 import learned_in, stray_note
from aime_gym.errors import AimeGymError, check_natural, check_positive, checked_switches
from aime_gym.evaluation import Printed
from aime_gym.evaluation.predict import LEVEL, PolicyReturns, PredictedReturn, Prediction, Predictor
from aime_gym.evaluation.returns import (
    DopeMetrics,
    Episodes,
    PolicyLike,
    dope_metrics,
    load_policy,
    name_policies,
    plus_minus,
    rounded,
    with_interval,
)
from aime_gym.evaluation.worlds import NO_WORLD, Worlds, check_spaces, find_subject, fitting_obs_type, model_for
from aime_gym.files import Revision, read_json, write_json
from aime_gym.world_model.checkpoint import revision_of
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import trust_line

FORMAT = "aime_gym.comparison/1"

LONGEST_WORD = 12
"""Characters of a name's word that a table never breaks; those of paths may be longer."""


UNKNOWN = "Nothing is known of how these dreams err: their returns stand alone."
_KINDS = ({(False, True)}, {(True, False)}, {(True, True)})
"""Whether all policies lack real returns, and whether they lack predicted ones."""


@dataclass(frozen=True, repr=False)
class Comparison(Printed):
    """The returns of policies in both worlds. `print` shows the table, and so does the cell of a notebook.

    Examples:
        >>> import aime_gym
        >>> told = aime_gym.compare("zero", "Cartpole", episodes=3, max_episode_steps=10)
        >>> aime_gym.Comparison.from_json(told.to_json("returns.json")).counts
        '3 episodes'
    """

    embodiment: str
    """The body."""
    task: str
    model: str
    """Its name, or that of its folder."""
    seed: int
    """Seed of starts and of the dreams."""
    max_episode_steps: int
    """Agent steps of an episode, at most."""
    policies: tuple[PolicyReturns, ...]
    """The returns of each."""
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
        """Episodes of each policy in the dream."""
        return len(self.policies[0].dream.returns)

    @property
    def real_episodes(self) -> int:
        """Episodes of each policy in the real env; 0 if it was not asked."""
        world = self.policies[0].world
        return 0 if world is None else len(world.returns)

    @property
    def counts(self) -> str:
        """How many episodes there are in either world, in words."""
        if self.real_episodes == self.episodes:
            return f"{self.episodes} episodes"
        return f"{self.episodes} dreams, {self.real_episodes or 'no'} real episode{'s' * (self.real_episodes > 1)}"

    @property
    def metrics(self) -> DopeMetrics:
        """The DOPE metrics over the policies.

        Raises:
            AimeGymError: If the real env was not asked.
        """
        return dope_metrics([p.dream.mean for p in self.policies], [p.real.mean for p in self.policies])

    @property
    def verdict(self) -> str:
        """One sentence in numbers: about the first policy, or from three policies on about all of them."""
        first = self.policies[0]
        if not self.real_episodes:
            told = {p.name: p.predicted for p in self.policies if p.predicted is not None}
            if not told:
                return f"{self.task}, in the dream alone: {first.name} earns {plus_minus(first.dream)}. {UNKNOWN}"
            best = max(told, key=lambda name: told[name].interval[0]) if len(told) >= 3 else first.name
            return f"{self.task}, where the real env was not asked: {best}, {told[best]}"
        if len(self.policies) < 3:
            return (
                f"{self.task}: dream {plus_minus(first.dream)}, real {plus_minus(first.real)} "
                f"over {self.counts}; gap {rounded(first.gap)}"
            )
        metrics = self.metrics
        favourite = max(self.policies, key=lambda policy: policy.dream.mean)
        correlations = (
            "all returns alike"
            if metrics["pearson"] is None or metrics["spearman"] is None
            else f"Spearman {metrics['spearman']:.2f}, Pearson {metrics['pearson']:.2f}"
        )
        return (
            f"{self.task}: over {len(self.policies)} policies {correlations}, "
            f"mean error {rounded(metrics['mean_absolute_error'] or 0)}; the dream's favourite: "
            f"dream {plus_minus(favourite.dream)}, real {plus_minus(favourite.real)}"
        )

    def is_doubtful(self, policy: PolicyReturns) -> bool:
        """Whether a policy's dream return should not be trusted: the model doubts its steps more than real ones."""
        if policy.doubt is None or self.usual_doubt is None:
            return False
        return not policy.doubt <= self.usual_doubt  # also where a dream left the finite numbers

    def table(self) -> Table:
        """The returns as a rich table; a dream return that should not be trusted has a question mark."""
        doubtful = any(p.doubt is not None for p in self.policies)
        asked, first = self.real_episodes > 0, self.policies[0].predicted
        over = "" if self.real_episodes == self.episodes else ", over pairs"
        foretold = (
            f"\n{UNKNOWN}"
            if first is None
            else f"; predicted [{LEVEL:.0%} interval], without a real step\n{first.reason}"
        )
        table = Table(
            title=escape(f"{self.embodiment} {self.task}, {self.counts}, model {self.weights or self.model}"),
            caption="mean return [95% bootstrap interval]"
            + (f"; gap = dream - real{over}" if asked else foretold)
            + ("; ? = do not trust, the model doubts these dreams" if any(map(self.is_doubtful, self.policies)) else "")
            + (f"\n{self._doubt_line()}" if doubtful else "")
            + escape("".join(f"\n{note}" for note in self.strays)),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        words = [word for policy in self.policies for word in policy.name.split() if len(word) <= LONGEST_WORD]
        table.add_column("policy", overflow="fold", min_width=max(map(len, words), default=None))
        for column in (
            "dream",
            *(("real", "gap") if asked else ("predicted",) if first else ()),
            *["doubt"] * doubtful,
        ):
            table.add_column(column, justify="right", no_wrap=True)
        for policy in self.policies:
            known: list[Any] = [each for each in (policy.dream, policy.told) if each is not None]
            cells = [policy.name, *(with_interval(each.mean, each.interval) for each in known)]
            cells[1] += " ?" if self.is_doubtful(policy) else ""
            cells += [with_interval(policy.gap, policy.gap_interval)] if asked else []
            if doubtful:
                cells.append("" if policy.doubt is None else f"{policy.doubt:.3g}")
            table.add_row(*map(escape, cells))
        return table

    def _doubt_line(self) -> str:
        """What the column of the doubt says."""
        usual = "" if self.usual_doubt is None else f"; below {self.usual_doubt:.3g} at most real moments"
        return f"doubt = nats by which the model corrects its prediction when it sees what it dreamt{usual}"

    def metrics_line(self) -> str:
        """The DOPE metrics in one line; empty without real returns, or below three policies, where they say nothing."""
        if len(self.policies) < 3 or not self.real_episodes:
            return ""
        metrics = self.metrics
        shown = {
            "Pearson": (metrics["pearson"], ".2f"),
            "Spearman": (metrics["spearman"], ".2f"),
            "mean absolute error": (metrics["mean_absolute_error"], ".0f"),
            "regret@1": (metrics["regret_at_1"], ".0f"),
        }
        return ", ".join(f"{name} {'-' if v is None else format(v, spec)}" for name, (v, spec) in shown.items())

    def _parts(self) -> Iterable[RenderableType]:
        yield self.table()
        yield from map(Text, filter(None, (self.metrics_line(), self.trust)))

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
            "real_episodes": self.real_episodes,
            "usual_doubt": _finite(self.usual_doubt),
            "trust": self.trust,
            "metrics": dict(self.metrics) if self.real_episodes else None,
            "policies": {
                p.name: {
                    "dream": world(p.dream),
                    "real": None if p.world is None else world(p.world),
                    "gap": None if p.world is None else p.gap,
                    "predicted": None if p.predicted is None else asdict(p.predicted),
                    "doubt": _finite(p.doubt),
                    "learned_in": p.learned_in and p.learned_in._asdict(),
                }
                for p in self.policies
            },
        }

    def to_json(self, path: str | Path) -> Path:
        """Writes `to_dict` to the file `path`, whole or not at all; returns the path."""
        return write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> Comparison:
        """Reads from the file `path` what `to_json` wrote.

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
        """Reads `data` of `to_dict`; a ValueError, LookupError, TypeError or AttributeError says what does not fit."""

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
                None if p["real"] is None else world(p["real"]),
                None if p.get("learned_in") is None else Revision.from_dict(p["learned_in"]),
                None if p.get("predicted") is None else Prediction.from_dict(p["predicted"]),
            )
            for name, p in data["policies"].items()
        )
        if {(p.world is None, p.predicted is None) for p in policies} not in _KINDS:
            raise ValueError("expected real returns of all policies, predicted ones of all, or none")
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


def _finite(number: float | None) -> float | None:
    """A number as JSON has it, which knows none that is not finite: a doubt without bounds is null."""
    return None if number is None or not math.isfinite(number) else float(number)


@checked_switches
def compare(
    policies: PolicyLike | Path | Sequence[Any] | Mapping[str, Any],
    embodiment: str | None = None,
    task: str | None = None,
    episodes: int = 20,
    model: Any = None,
    seed: int = 0,
    obs_type: str | None = None,
    max_episode_steps: int | None = None,
    deterministic: bool = True,
    real_episodes: int | None = None,
    reward_fn: UserFunction | None = None,
    termination_fn: UserFunction | None = None,
) -> Comparison:
    """Evaluates policies in the dream and in the real env, from the same start states and seeds.

    Examples:
        >>> import aime_gym
        >>> told = aime_gym.compare(["zero", "random"], "Cartpole", episodes=3, max_episode_steps=10)
        >>> [(policy.name, len(policy.dream.returns), len(policy.real.returns)) for policy in told.policies]
        [('zero', 3, 3), ('random', 3, 3)]

    Args:
        policies: One, a list or a dict by name, of: SB3 agents, objects with their `predict`, callables from a batch
            of observations to a batch of actions, paths of plain policies, and of saved SB3 agents (name only files
            that you trust: but for those that `aime-gym dream` saves, they are code, as is a ``vecnormalize.pkl``
            beside them, whose statistics are taken), and ``"random"`` and ``"zero"``. A loaded agent that learned
            behind a `VecNormalize` must have it, as in ``PPO.load(path, env=VecNormalize.load(...))``.
        embodiment: The body, or the id of a Gymnasium env or of a registered dream; by default that of the model, or
            the walker.
        task: One of its tasks; its first one by default.
        episodes: Episodes of each policy in the dream.
        model: A loaded world model, a folder or a bundled name; the body's bundled one by default, that of images for
            agents on images.
        seed: Seed of starts and episodes.
        obs_type: What policies see; by default what fits each SB3 agent, and for the others that of `Worlds`.
        max_episode_steps: Agent steps of an episode; the body's own by default.
        deterministic: Whether policies give their mode.
        real_episodes: Episodes of each policy in the real env, twins of the first dreams; `episodes` by default. With
            0 no real env is made: returns in it are predicted, as by `predict_return`.
        reward_fn: Pays in both worlds in place of the task, see `aime_gym.TensorDream`. Nothing is predicted then.
        termination_fn: Ends episodes in both worlds, see `aime_gym.TensorDream`.

    Returns:
        The comparison.

    Raises:
        AimeGymError: If a name, a number, a file or a policy's spaces do not fit, or returns cannot be predicted.
    """
    check_positive(episodes, "episodes")
    check_natural(seed, "seed")
    asked = episodes if real_episodes is None else check_natural(real_episodes, "real_episodes")
    embodiment, _ = find_subject(embodiment, model)
    loaded = {name: load_policy(policy) for name, policy in name_policies(policies).items()}
    model = model_for(loaded.values(), embodiment, model, obs_type)
    if asked:
        load_model_of(embodiment, model)[0].check_env(NO_WORLD)
    functions: dict[str, Any] = {"reward_fn": reward_fn, "termination_fn": termination_fn}
    predict = (
        None
        if asked or any(functions.values())
        else Predictor(model, choose_task(model.config.body, model, task), max_episode_steps)
    )
    worlds: dict[str, Worlds] = {}
    results = []
    try:
        for name, policy in loaded.items():
            kind = obs_type or fitting_obs_type(policy, model)
            if kind not in worlds:
                worlds[kind] = Worlds(embodiment, task, model, kind, max_episode_steps, **functions)
            check_spaces(name, policy, here := worlds[kind])
            dream = here.dream_episodes(policy, episodes, seed, deterministic)
            real = here.real_episodes(policy, asked, seed, deterministic) if asked else None
            results.append(PolicyReturns(name, dream, real, learned_in(policy), predict(dream) if predict else None))
        first = next(iter(worlds.values()))
        return Comparison(
            first.embodiment.name,
            first.paid_by,
            first.model_name,
            seed,
            first.max_episode_steps,
            tuple(results),
            first.usual_doubt,
            "" if reward_fn else trust_line(first.model.folder, first.task),
            **told_of_weights(first.model),
        )
    finally:
        for pair in worlds.values():
            pair.close()


@checked_switches
def predict_return(
    policy: PolicyLike | Path,
    embodiment: str | None = None,
    task: str | None = None,
    model: Any = None,
    episodes: int = 20,
    seed: int = 0,
    deterministic: bool = True,
) -> PredictedReturn:
    """Predicts what a policy earns in the real env, without one real step; arguments and errors are those of `compare`.

    Examples:
        >>> import aime_gym
        >>> told = aime_gym.predict_return("zero", "Cartpole", task="swingup", episodes=4)
        >>> told.interval[0] <= told.mean <= told.interval[1]
        True
    """
    told = compare([policy], embodiment, task, episodes, model, seed, deterministic=deterministic, real_episodes=0)
    (only,) = told.policies
    assert only.predicted is not None
    reason = only.predicted.reason + (" These dreams are more doubtful than usual." if told.is_doubtful(only) else "")
    return PredictedReturn(
        only.predicted.mean,
        only.predicted.interval,
        reason,
        policy=only.name,
        embodiment=told.embodiment,
        task=told.task,
        model=told.model,
        dream=only.dream,
    )
