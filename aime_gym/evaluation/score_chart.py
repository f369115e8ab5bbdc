"""The picture of a score: seven small panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aime_gym.evaluation.calibration import SHARES
from aime_gym.evaluation.score import Score

DREAM, REAL, GREY = "#7c6cf0", "#e8833a", "#8a8f98"
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}


def draw_score(score: Score, path: Path) -> Path:
    """Draws the seven measures, each in a panel; one that was not measured has an empty one that says so."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 6), layout="constrained")
        panels = figure.subplots(2, 4).ravel()
        measures = score.measures
        for axes, (title, name, draw) in zip(panels, _PANELS, strict=False):
            axes.set_title(title)
            if name in measures:
                draw(axes, score, measures[name])
            else:
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=GREY)
        panels[-1].set_visible(False)
        figure.suptitle(f"{score.embodiment} {score.task}, model {score.model}", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    return path


def _fidelity(axes: Axes, score: Score, of: Mapping[str, Any]) -> None:
    assert score.fidelity is not None
    for column, steps in enumerate(score.fidelity.horizons):
        error = score.fidelity.error[:, column]
        known = np.isfinite(error) & (error > 0)
        axes.scatter(score.fidelity.distance[known, column], error[known], s=8, alpha=0.6, label=f"after {steps}")
    axes.set_yscale("log")
    axes.set_xlabel("distance from the policy's actions")
    axes.set_ylabel("NMSE")
    axes.legend()


def _validity(axes: Axes, score: Score, of: Mapping[str, Any]) -> None:
    assert score.validity is not None
    for values, colour, label in (
        (score.validity.sensors, DREAM, "sensors"),
        (score.validity.rewards, REAL, "rewards so far"),
    ):
        ordered = np.sort(list(values.values()))
        axes.step(ordered, 1 - np.arange(len(ordered)) / len(ordered), where="pre", color=colour, label=label)
    axes.set_xlim(0, of["length"])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("steps under feedback")
    axes.set_ylabel("share of policies still as the world")
    axes.legend()


def _reward(axes: Axes, score: Score, of: Mapping[str, Any]) -> None:
    assert score.reward is not None
    _against(axes, list(score.reward.by_policy.values()), DREAM, "real reward a step", "told on filtered frames")


def _ranking(axes: Axes, score: Score, of: Mapping[str, Any]) -> None:
    told = [
        (score.ranking.comparison if score.ranking else None, DREAM, "strangers" if of["strangers"] else "made"),
        (score.agents, REAL, "kin"),
    ]
    for comparison, colour, label in told:
        if comparison is not None:
            pairs = [(policy.real.mean, policy.dream.mean) for policy in comparison.policies]
            _against(axes, pairs, colour, "real return", "dream return", label)
    axes.legend()


def _lift(axes: Axes, score: Score, of: Mapping[str, Any]) -> None:
    names = ("zero", "random", "untrained", "agent")
    axes.bar(names, [of[name] for name in names], color=[GREY, GREY, GREY, REAL])
    low, high = of["interval"]
    axes.errorbar(["agent"], [of["agent"]], [[max(0, of["agent"] - low)], [max(0, high - of["agent"])]], color="black")
    axes.set_ylabel("real return")


def _exploitability(axes: Axes, score: Score, of: Mapping[str, Any]) -> None:
    steps = np.array(of["steps"]) / 1000
    axes.plot(steps, of["dream"], "o-", color=DREAM, label="dream")
    axes.plot(steps, of["real"], "o-", color=REAL, label="real")
    axes.set_xlabel("thousand steps of optimising")
    axes.set_ylabel("return")
    axes.legend()


def _calibration(axes: Axes, score: Score, of: Mapping[str, Any]) -> None:
    steps = score.fidelity.horizons if score.fidelity else ()
    for after, curve in zip(steps, of["coverage"], strict=False):
        if curve and curve[-1]:
            axes.plot(SHARES, np.array(curve, float) / curve[-1], "o-", markersize=3, label=f"after {after}")
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of steps, the least doubted first")
    axes.set_ylabel("NMSE / NMSE of all")
    axes.legend()


def _against(
    axes: Axes, pairs: list[tuple[float, float]], colour: str, x: str, y: str, label: str | None = None
) -> None:
    """Points of pairs, and the diagonal."""
    if pairs:
        numbers = np.array(pairs, float)
        axes.scatter(numbers[:, 0], numbers[:, 1], s=12, color=colour, alpha=0.8, label=label)
        ends = [numbers.min(), numbers.max()]
        axes.plot(ends, ends, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


_PANELS: tuple[tuple[str, str, Callable[[Axes, Score, Mapping[str, Any]], None]], ...] = (
    ("1 counterfactual fidelity", "fidelity", _fidelity),
    ("2 closed-loop validity", "validity", _validity),
    ("3 reward accuracy", "reward", _reward),
    ("4 policy ranking", "ranking", _ranking),
    ("5 optimisation lift", "lift", _lift),
    ("6 exploitability", "exploitability", _exploitability),
    ("7 calibration of the doubt", "calibration", _calibration),
)
