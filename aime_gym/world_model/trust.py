"""How far the returns of a model's dreams may be trusted: measured, kept beside the weights, said where it matters.

A dream is *trusted* at a task if it judges strangers: policies that learned by other means than those that collected
the model's data. `Trust.finding` is the only definition of it. What the model's own kin earn, the agents of its rounds,
is kept beside it and vouches for nothing but them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aime_gym.errors import AimeGymError, warn_caller
from aime_gym.files import read_json, weights_digest, write_json
from aime_gym.world_model.checkpoint import PRETRAINED

TRUST = "trust.json"
FORMAT = "aime_gym.trust/2"
LEAST_SPEARMAN = 0.8
"""Rank correlation of dream and real returns over strangers, from which on a dream deserves trust."""
MOST_ERROR = 0.15
"""Mean error of strangers' dream returns up to which a dream deserves trust, as a share of the range from the return of
random actions to the best one known."""
LEAST_SPAN = 0.5
"""Share of that range which strangers' real returns must span to say anything."""
LEAST_THIRD = 0.25
"""Share of the strangers that must lie in each third of that range."""
LEAST_RUNS = 12
"""Training runs that strangers must come from: stages of one run are much alike."""
LEAST_FAMILIES = 2
"""Families of strangers that have collected nothing of the model's data."""
LEAST_POLICIES = 5
"""Over fewer kin, a rank correlation says nothing."""
_warned: set[tuple[str, str, str]] = set()

Finding = Literal["trusted", "not measured", "inconclusive", "wrong"]


class UntrustworthyDream(UserWarning):
    """The returns of this model's dreams are not known to predict the real ones."""


@dataclass(frozen=True)
class Trust:
    """What has been measured of a model's dreams at one task.

    Attributes:
        kin: `aime_gym.evaluation.returns.dope_metrics` over policies of any origin, as a rule the model's own agents.
        strangers: What `aime_gym.evaluation.strangers.judge` found.
    """

    kin: Mapping[str, Any] | None = None
    strangers: Mapping[str, Any] | None = None

    @property
    def finding(self) -> Finding:
        """Whether the dreams deserve trust, and if not, why: no strangers, inconclusive ones, or large errors."""
        if self.strangers is None:
            return "not measured"
        if self.lacks:
            return "inconclusive"
        right = (self.strangers["spearman"] or 0) >= LEAST_SPEARMAN and self.relative_error <= MOST_ERROR
        return "trusted" if right else "wrong"

    @property
    def lacks(self) -> str:
        """What the strangers lack to be conclusive, in words and numbers; empty if nothing."""
        of = self.strangers or {}
        families = sorted(set(of.get("families", {})) - set(of.get("seen", ())))
        thirds = of.get("thirds", (0.0,))
        found = (
            (of.get("span", 0.0), LEAST_SPAN, "their returns span {:.0%} of the range, of which {:.0%} is needed"),
            (min(thirds), LEAST_THIRD, "a third of the range has {:.0%} of them and needs {:.0%}"),
            (of.get("runs", 0), LEAST_RUNS, "they are of {:.0f} training runs, of {:.0f} needed"),
            (len(families), LEAST_FAMILIES, "they are of {:.0f} unseen families, of {:.0f} needed"),
        )
        return "; ".join(text.format(value, least) for value, least, text in found if value < least)

    @property
    def relative_error(self) -> float:
        """The strangers' mean error as a share of the range of returns; infinite where there is none."""
        low, high = self.strangers["range"] if self.strangers else (0.0, 0.0)
        error = self.strangers["mean_absolute_error"] if self.strangers else None
        return math.inf if error is None or high <= low else error / (high - low)

    @property
    def line(self) -> str:
        """What is known, in one line of numbers; empty where nothing is."""
        if self.strangers is None:
            return "" if self.kin is None else f"Strangers: not measured. Kin: {_of_kin(self.kin)}."
        of = self.strangers
        unseen = ", ".join(sorted(set(of["families"]) - set(of["seen"])))
        seen = ", ".join(sorted(set(of["families"]) & set(of["seen"])))
        return (
            f"Strangers: Spearman {_with_interval(of)} over {of['policies']} policies of {of['runs']} runs; mean error "
            f"{_shown(of['mean_absolute_error'], '.0f')}, {_percent(self.relative_error)} of the range; families "
            f"{unseen}{f' (apart, as the data have seen them: {seen})' if seen else ''}; "
            f"{'not trusted' if self.finding == 'wrong' else self.finding}."
        )

    def warning(self, name: str, task: str) -> str:
        """Why the dreams of the model `name` are not trusted, in one line; empty if they are or nothing is known."""
        if self.finding == "trusted" or self == Trust():
            return ""
        if self.strangers is None:
            reason = f"no stranger was ever tried in them, its own kin alone ({_of_kin(self.kin or {})})"
        elif self.finding == "inconclusive":
            reason = f"the strangers that were tried in them say too little: {self.lacks}"
        else:
            of = self.strangers
            reason = (
                f"of strangers, {of['policies']} policies of {of['runs']} runs, the rank correlation of dream and real "
                f"returns is {_with_interval(of)}, trusted from {LEAST_SPEARMAN} on, and the mean error "
                f"{_shown(of['mean_absolute_error'], '.0f')}, {_percent(self.relative_error)} of the range, trusted up "
                f"to {MOST_ERROR:.0%}"
            )
        return f"Do not trust what agents earn at {task} in dreams of {name}: {reason}."


def save_trust(folder: Path, measured: Mapping[str, Trust]) -> None:
    """Writes what was measured, in place of what was there.

    Args:
        folder: The folder of the model.
        measured: By task.
    """
    tasks = {
        task: {"kin": trust.kin, "strangers": trust.strangers and {**trust.strangers, "finding": trust.finding}}
        for task, trust in measured.items()
    }
    write_json(folder / TRUST, {"format": FORMAT, "tasks": tasks})


def note_trust(
    folder: Path, task: str, kin: Mapping[str, Any] | None = None, strangers: Mapping[str, Any] | None = None
) -> None:
    """Adds a measurement of one kind at one task to what is there, in place of an earlier one.

    Raises:
        AimeGymError: For the same reasons as `load_trust`.
    """
    measured = load_trust(folder)
    before = measured.get(task, Trust())
    after = Trust(before.kin if kin is None else dict(kin), before.strangers if strangers is None else strangers)
    save_trust(folder, {**measured, task: after})


def load_trust(folder: Path) -> dict[str, Trust]:
    """Reads what `save_trust` wrote, by task; empty where nothing was measured.

    A file of version 0.1 has kin alone. Measurements of other weights than those in the folder are left out.

    Raises:
        AimeGymError: If the file is broken.
    """
    path = folder / TRUST
    if not path.exists():
        return {}
    what, remedy = "what a model's dreams are worth, by task", "Delete it to go without."
    content = read_json(path, what, remedy)
    try:
        if "format" not in content:
            return {str(task): Trust(_metrics(of)) for task, of in content.items()}
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r:.40}, expected {FORMAT}")
        tasks = {str(task): (of["kin"], of["strangers"]) for task, of in content["tasks"].items()}
        weights = weights_digest(folder) if any(strangers for _, strangers in tasks.values()) else None
        return {
            task: Trust(None if kin is None else _metrics(kin), _strangers(strangers, weights))
            for task, (kin, strangers) in tasks.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AimeGymError(f"{path} does not hold {what} ({error}). {remedy}") from error


def check_place(folder: Path | None, named: str | None) -> None:
    """Raises an `AimeGymError` unless a measurement may be kept in a model's folder.

    That of a bundled model is written to where its path was given, and not where its name was.

    Args:
        folder: The folder of the model.
        named: How the model was asked for.
    """
    bundled = folder is not None and folder.resolve().parent == PRETRAINED
    if folder is None or (bundled and (named is None or Path(named).resolve() != folder.resolve())):
        raise AimeGymError(
            "What dreams are worth is kept in a model's folder: give --model, the path of a folder of your own."
        )


def check_kin(policies: int, max_episode_steps: int | None) -> None:
    """Raises an `AimeGymError` unless what is to be compared can tell what dreams are worth to kin."""
    if policies < LEAST_POLICIES or max_episode_steps is not None:
        raise AimeGymError(
            f"What dreams are worth is found from whole episodes of {LEAST_POLICIES} policies or more; got {policies} "
            f"policies and --max-episode-steps {max_episode_steps}."
        )


def is_trusted(folder: Path | None, task: str) -> bool:
    """Whether the dreams of a model at a task have been found to judge strangers as the real env does.

    Raises:
        AimeGymError: For the same reasons as `load_trust`.
    """
    return folder is not None and load_trust(folder).get(task, Trust()).finding == "trusted"


def ranks_kin(folder: Path | None, task: str) -> bool:
    """Whether the dreams have been found to rank the agents that they brought up: this is less than trust.

    Raises:
        AimeGymError: For the same reasons as `load_trust`.
    """
    kin = (load_trust(folder).get(task, Trust()).kin if folder is not None else None) or {}
    return (kin.get("spearman") or 0) >= LEAST_SPEARMAN and (kin.get("policies") or 0) >= LEAST_POLICIES


def trust_line(folder: Path | None, task: str) -> str:
    """What is known of a model's dreams at a task, in one line; empty where nothing is.

    Raises:
        AimeGymError: For the same reasons as `load_trust`.
    """
    return "" if folder is None else load_trust(folder).get(task, Trust()).line


def warn_of_distrust(folder: Path | None, task: str) -> None:
    """Warns, once a process for each measurement, if a model was measured and is not trusted."""
    if folder is None or (trust := load_trust(folder).get(task)) is None:
        return
    text, key = trust.warning(folder.name, task), (str(folder), task, repr(trust))
    if text and key not in _warned:
        _warned.add(key)
        warn_caller(f"{text} See {folder / 'README.md'}.", UntrustworthyDream)


def _of_kin(kin: Mapping[str, Any]) -> str:
    return (
        f"Spearman {_shown(kin.get('spearman'), '.2f')} over {kin.get('policies') or 0:.0f} policies, mean error "
        f"{_shown(kin.get('mean_absolute_error'), '.0f')}"
    )


def _with_interval(of: Mapping[str, Any]) -> str:
    interval = of.get("intervals", {}).get("spearman", {}).get("95")
    low_high = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return f"{_shown(of['spearman'], '.2f')}{low_high}"


def _shown(number: float | None, spec: str) -> str:
    return "undefined" if number is None else format(number, spec)


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "an unknown share"


def _metrics(of: Mapping[str, Any]) -> dict[str, float | None]:
    return {str(key): _number(value) for key, value in of.items()}


def _strangers(of: Any, weights: str | None) -> dict[str, Any] | None:
    """What was found of strangers, checked as far as it decides something; None if it is of other weights."""
    if of is None:
        return None
    for group in (of, *of["families"].values()):
        for key in ("spearman", "mean_absolute_error"):
            _number(group[key])
        for key in ("policies", "runs"):
            if type(group[key]) is not int:
                raise ValueError(f"{key} {group[key]!r:.40}")
        for ends in group["intervals"].get("spearman", {}).values():
            _numbers(ends, 2)
    if type(of["span"]) not in (int, float) or not all(isinstance(name, str) for name in of["seen"]):
        raise ValueError(f"span {of['span']!r:.40}, seen {of['seen']!r:.40}")
    for row in of.get("returns", {}).values():  # which older files lack
        _numbers([row["dream"], row["real"], row["doubt"] or 0.0], 3)
        if not (isinstance(row["family"], str) and isinstance(row["run"], str)):
            raise ValueError(f"family {row['family']!r:.40}, run {row['run']!r:.40}")
    _numbers([of.get("usual_doubt") or 0.0], 1)
    _numbers(of["thirds"], 3)
    _numbers(of["range"], 2)
    return of if str(of["model"])[:16] == weights else None  # it was written in 64 digits before


def _numbers(values: Sequence[Any], count: int) -> None:
    if len(values) != count or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{values!r:.40} is not {count} numbers")


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return number
