"""What a dream is worth, on one page: seven measures of a model at a task, as an object that prints, saves and loads.

After the protocol of arXiv 2606.15032: counterfactual fidelity, closed-loop validity, reward accuracy, policy ranking,
optimisation lift, exploitability and calibration of the doubt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from aime_gym.errors import AimeGymError
from aime_gym.evaluation import Printed
from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.fidelity import Fidelity, calibration
from aime_gym.evaluation.returns import rounded
from aime_gym.evaluation.validity import RETURN_SHARE, Ranking, RewardAccuracy, Validity
from aime_gym.files import read_json, write_atomically, write_json

FORMAT = "aime_gym.score/1"
PARTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "fidelity": Fidelity.from_dict,
    "validity": Validity.from_dict,
    "reward": RewardAccuracy.from_dict,
    "ranking": Ranking.from_dict,
    "agents": Comparison.from_dict,
}
"""What is measured and stored; the measures of optimising and of doubt follow from these."""
_TITLES = {
    "fidelity": "1 counterfactual fidelity",
    "validity": "2 closed-loop validity",
    "reward": "3 accuracy of rewards",
    "ranking": "4 policy ranking",
    "lift": "5 optimisation lift",
    "exploitability": "6 exploitability",
    "calibration": "7 calibration of the doubt",
}
_NEEDS = {"lift": "agents", "exploitability": "agents"}


STEPS = (40_000, 200_000, 600_000)
"""Dream steps of optimising at which the agent is judged: 1, 5 and 15 minutes at 40,000 steps a minute, as one core has
taken them; counted, so that a busy machine finds the same agents."""

UNTRAINED = "untrained"

ANCHORS = ("random", "zero")
"""Policies that need no training, by which returns are measured."""


@dataclass(frozen=True, repr=False)
class Score(Printed):
    """Seven measures of what a model's dreams at a task are worth. `print` shows the page.

    Attributes:
        embodiment: The body.
        task: The task.
        model: What the model is called.
        digest: Digest of its config and weights.
        sees: What the policies and errors are about: ``"state"`` or ``"latent"``.
        seed: Seed of everything.
        steps: Steps of optimising, at which agents were kept.
        fidelity: What other actions lead to; None if it was not measured yet, as with the following.
        validity: How long dreams under feedback stay as the world.
        reward: How accurately rewards are predicted.
        ranking: How well strangers are ranked.
        agents: Both worlds' returns of agents that learned in the dream alone, and of random and zero actions.
        lacking: Part -> why it cannot be measured.
        notes: What else has to be said.
    """

    embodiment: str
    task: str
    model: str
    digest: str
    sees: str
    seed: int
    steps: tuple[int, ...]
    fidelity: Fidelity | None = None
    validity: Validity | None = None
    reward: RewardAccuracy | None = None
    ranking: Ranking | None = None
    agents: Comparison | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def measures(self) -> dict[str, dict[str, Any]]:
        """The numbers of the seven measures by name, without those that are not measured."""
        found: dict[str, dict[str, Any]] = {}
        for name in ("fidelity", "validity", "reward"):
            if (part := getattr(self, name)) is not None:
                found[name] = part.summary()
        if self.ranking is not None or self.agents is not None:
            found["ranking"] = {
                "strangers": dict(self.ranking.verdict) if self.ranking and self.ranking.are_strangers else None,
                "made": dict(self.ranking.verdict) if self.ranking and not self.ranking.are_strangers else None,
                "kin": dict(self.agents.metrics) if self.agents else None,
            }
        if self.agents is not None:
            others = self.ranking.comparison.policies if self.ranking else ()
            best = max((policy.real.mean for policy in (*others, *self.agents.policies)), default=None)
            knows = self.ranking is not None and self.ranking.are_strangers  # what can be earned here
            found["lift"] = lift(self.agents, self.steps, best if knows else None)
            found["exploitability"] = exploitability(self.agents, self.steps)
        comparisons = [each for each in (self.ranking and self.ranking.comparison, self.agents) if each]
        if self.fidelity is not None or comparisons:
            found["calibration"] = calibration(self.fidelity, comparisons)
        return found

    @property
    def is_complete(self) -> bool:
        """Whether everything was measured that can be."""
        return all(getattr(self, name) is not None or name in self.lacking for name in PARTS)

    def rows(self) -> list[tuple[str, str, str]]:
        """The page as lines: which measure, of what, and the numbers."""
        measures, rows = self.measures, []
        for name, title in _TITLES.items():
            told = _LINES[name](measures[name]) if name in measures else []
            why = self.lacking.get(_NEEDS.get(name, name))
            if why is not None:
                told = [*told, ("cannot be measured", why)]
            for what, numbers in told or [("not measured yet", "")]:
                rows.append((title, what, numbers))
                title = ""
        return rows

    def table(self) -> Table:
        """The page as a rich table."""
        table = Table(
            title=escape(f"What a dream is worth: {self.embodiment} {self.task}, model {self.model}"),
            caption=escape("\n".join(self.notes)) if self.notes else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("measure", overflow="fold")
        table.add_column("", overflow="fold")
        for title, what, numbers in self.rows():
            if title:
                table.add_row(f"[bold]{escape(title)}", "")
            table.add_row(f"  {escape(what)}", escape(numbers))
        return table

    def _parts(self) -> Iterable[RenderableType]:
        yield self.table()

    def to_markdown(self) -> str:
        """The page for a model's card."""
        lines = [f"## Seven measures of its dreams at {self.task}", ""]
        lines += ["| measure | of | |", "| --- | --- | --- |"]
        lines += [f"| {title} | {what} | {numbers} |".replace("|  |", "| |") for title, what, numbers in self.rows()]
        lines += ["", *(f"{note}  " for note in self.notes)]
        lines += [f"Measured by `aime-gym score` on weights {self.digest}, seed {self.seed}; after arXiv 2606.15032."]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values: what was measured, and the numbers that are shown."""
        parts = {name: None if (part := getattr(self, name)) is None else part.to_dict() for name in PARTS}
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _TEXTS},
            "seed": self.seed,
            "steps": list(self.steps),
            "lacking": dict(self.lacking),
            "notes": list(self.notes),
            "measures": self.measures,
            "parts": parts,
        }

    def to_json(self, path: str | Path) -> Path:
        """Writes `to_dict` to a file, whole or not at all."""
        return write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> Score:
        """Reads what `to_json` wrote; the numbers that are shown are computed again.

        Raises:
            AimeGymError: If the file is not such a score.
        """
        data = read_json(path, "a score written by aime_gym")
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT}; got {data['format']!r}")
            texts: dict[str, Any] = {name: data[name] for name in _TEXTS}
            if not all(isinstance(text, str) for text in (*texts.values(), *data["notes"], *data["lacking"].values())):
                raise TypeError(f"odd {', '.join(_TEXTS)}, notes or lacking")
            kept = data["parts"]
            parts: dict[str, Any] = {
                name: None if kept[name] is None else read(kept[name]) for name, read in PARTS.items()
            }
            steps = tuple(int(one) for one in data["steps"])
            score = cls(
                **texts,
                seed=int(data["seed"]),
                steps=steps,
                **parts,
                lacking=dict(data["lacking"]),
                notes=tuple(data["notes"]),
            )
            score.rows()
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise AimeGymError(f"{path} does not hold a score written by aime_gym ({error!r:.200}).") from error
        return score


_TEXTS = ("embodiment", "task", "model", "digest", "sees")


def write_card(folder: Path, score: Score) -> Path:
    """Writes the page into the README.md of a model's folder, in place of an earlier one at the task.

    Args:
        folder: The folder of the model.
        score: The page.

    Returns:
        The path of the card.
    """
    path = folder / "README.md"
    begin, end = (f"<!-- {word} of `aime-gym score` at {score.task} -->" for word in ("begin", "end"))
    section = f"{begin}\n{score.to_markdown()}\n{end}"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {folder.name}\n"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    found = pattern.search(text)
    text = text[: found.start()] + section + text[found.end() :] if found else f"{text.rstrip()}\n\n{section}\n"
    return write_atomically(path, text)


Lines = list[tuple[str, str]]


def _fidelity(of: Mapping[str, Any]) -> Lines:
    after = "/".join(map(str, of["steps"]))
    return [
        (f"NMSE after {after} steps, actions near the policy's", _listed(of["nmse"][0])),
        ("actions between", _listed(of["nmse"][1])),
        ("actions far from them", _listed(of["nmse"][2])),
        ("error of a step's reward, near", _listed(of["reward_error"][0])),
        ("far", _listed(of["reward_error"][2])),
        ("rank correlation of distance and NMSE", _listed(of["correlation"], ".2f")),
    ]


def _validity(of: Mapping[str, Any]) -> Lines:
    return [
        ("steps until sensors are off, median", f"{of['sensors']:.0f} of {of['length']}"),
        (f"until rewards are, by {RETURN_SHARE:.0%} of the range", f"{of['rewards']:.0f} of {of['length']}"),
    ]


def _reward(of: Mapping[str, Any]) -> Lines:
    lines = [("R², error, bias a step: filtered frames", _accuracy(of["filtered"]))]
    if of["prior"] is not None:
        lines.append((f"prior rollouts of {of['steps']} steps", _accuracy(of["prior"])))
    return lines


def _accuracy(of: Mapping[str, Any]) -> str:
    return f"{_number(of['r2'], '.3f')}, {_number(of['error'])}, {_number(of['bias'], '+.2g')}"


def _ranking(of: Mapping[str, Any]) -> Lines:
    lines = []
    for key, name in (
        ("strangers", "strangers"),
        ("made", "made on the spot"),
        ("kin", "kin, from this dream"),
    ):
        if (found := of[key]) is None:
            continue
        interval = found.get("intervals", {}).get("spearman", {}).get("95")
        within = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        said = {"wrong": "; not trusted", None: ""}.get(found.get("finding"), f"; {found.get('finding')}")
        numbers = f"{_number(found['spearman'], '.2f')}{within}, {_number(found['mean_absolute_error'], '.0f')}{said}"
        lines.append((f"Spearman, mean error: {found['policies']} {name}", numbers))
        for family, own in found.get("families", {}).items():
            apart = " (seen, apart)" if family in found.get("seen", ()) else ""
            told = f"{_number(own['spearman'], '.2f')}, {_number(own['mean_absolute_error'], '.0f')}"
            lines.append((f"{own['policies']} of {family}{apart}", told))
    return lines


def _lift(of: Mapping[str, Any]) -> Lines:
    low, high = of["interval"]
    lines = [
        (
            f"real return after {of['steps']:,} dream steps",
            f"{rounded(of['agent'])} [{rounded(low)}, {rounded(high)}]",
        ),
        (
            "untrained / random / zero actions",
            " / ".join(rounded(of[name]) for name in ("untrained", "random", "zero")),
        ),
    ]
    if of["share"] is not None:
        lines.append(("of the way from random to the best known", f"{of['share']:.0%}"))
    return lines


def _exploitability(of: Mapping[str, Any]) -> Lines:
    rows = zip(of["steps"], of["dream"], of["real"], of["gap"], of["interval"], strict=True)
    return [
        (
            f"dream - real after {steps:,} steps",
            f"{rounded(dream)} - {rounded(real)} = {rounded(gap)} [{rounded(low)}, {rounded(high)}]",
        )
        for steps, dream, real, gap, (low, high) in rows
    ]


def _calibration(of: Mapping[str, Any]) -> Lines:
    lines = [(f"rank correlation with error, {of['count']} policies", _number(of["policies"], ".2f"))]
    if of["coverage"]:
        lines += [
            ("of steps", _number(of["steps"], ".2f")),
            ("NMSE of the half with low doubt", _listed(of["low"])),
            ("with high doubt", _listed(of["high"])),
        ]
    return lines


_LINES: Mapping[str, Callable[[Mapping[str, Any]], Lines]] = {
    "fidelity": _fidelity,
    "validity": _validity,
    "reward": _reward,
    "ranking": _ranking,
    "lift": _lift,
    "exploitability": _exploitability,
    "calibration": _calibration,
}


def _listed(numbers: list[float | None], spec: str = ".2g") -> str:
    return " / ".join(_number(number, spec) for number in numbers)


def _number(number: float | None, spec: str = ".2g") -> str:
    return "-" if number is None else format(number, spec)


def agent_name(steps: int) -> str:
    """What an agent is called by its steps of optimising."""
    return f"after {steps:,} steps" if steps else UNTRAINED


def lift(agents: Comparison, steps: Sequence[int], best: float | None = None) -> dict[str, Any]:
    """What the last agent earns in the world beyond its start.

    Args:
        agents: Both worlds' returns of the agents and of `ANCHORS`.
        steps: Steps of optimising.
        best: The best real return that is known, for the share that the lift is of the way from random actions to it.

    Returns:
        Mean real returns: ``"agent"`` with its ``"interval"``, ``"untrained"``, ``"random"``, ``"zero"``; the
        ``"lift"`` over the best of these three; ``"share"``, None without a `best` above random actions.
    """
    by_name = {policy.name: policy for policy in agents.policies}
    agent = by_name[agent_name(steps[-1])].real
    begun = {name: by_name[name].real.mean for name in (UNTRAINED, *ANCHORS)}
    way = None if best is None else best - begun["random"]
    return {
        "steps": steps[-1],
        "agent": agent.mean,
        "interval": list(agent.interval),
        **begun,
        "lift": agent.mean - max(begun.values()),
        "share": (agent.mean - begun["random"]) / way if way is not None and way > 0 else None,
    }


def exploitability(agents: Comparison, steps: Sequence[int]) -> dict[str, Any]:
    """By how much the dream overestimates the agent that optimises in it, after each number of steps.

    Args:
        agents: Both worlds' returns of the agents.
        steps: Steps of optimising after which agents were kept.

    Returns:
        ``"steps"``, and for each the mean return in the ``"dream"``, in the ``"real"`` env, their ``"gap"`` and its
        ``"interval"``.
    """
    by_name: Mapping[str, PolicyReturns] = {policy.name: policy for policy in agents.policies}
    chosen = [by_name[agent_name(taken)] for taken in steps]
    return {
        "steps": list(steps),
        "dream": [policy.dream.mean for policy in chosen],
        "real": [policy.real.mean for policy in chosen],
        "gap": [policy.gap for policy in chosen],
        "interval": [list(policy.gap_interval) for policy in chosen],
    }
