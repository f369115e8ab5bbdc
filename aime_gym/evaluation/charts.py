"""The report's charts: matplotlib figures as SVG in the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aime_gym.evaluation.both_worlds import PARTING_ERROR, Replay
from aime_gym.evaluation.compare import Comparison
from aime_gym.evaluation.explanation import Explanation
from aime_gym.evaluation.fidelity import SHARES
from aime_gym.evaluation.returns import Episodes
from aime_gym.evaluation.score import Score

DREAM, REAL = "#7c6cf0", "#e8833a"

_SENSORS = ("#7c6cf0", "#1fa187", "#d6477f", "#c9a227", "#3b8fd6", "#8a8f98")

_INK = "#123456"  # replaced by the page's own colour, light or dark

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _INK),
}

MOST_PANELS = 12
"""Dims shown of one sensor, at most: those that move most."""


def returns_chart(comparison: Comparison) -> str:
    """Mean returns with intervals, and every episode as a dot; predicted ones where the real env was not asked."""
    policies = comparison.policies
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.9 + 0.75 * len(policies)), layout="constrained")
        axes = figure.subplots()
        for row, policy in enumerate(policies):
            for offset, told, colour in ((-0.17, policy.dream, DREAM), (0.17, policy.told, REAL)):
                if told is None:
                    continue
                height = row + offset
                returns = told.returns if isinstance(told, Episodes) else np.zeros(0)
                jitter = np.linspace(-0.09, 0.09, len(returns))
                axes.scatter(returns, height + jitter, s=14, color=colour, alpha=0.35, linewidths=0)
                axes.plot(told.interval, [height, height], color=colour, linewidth=5, solid_capstyle="round")
                axes.plot(
                    told.mean, height, "o", color="white", markersize=5, markeredgecolor=colour, markeredgewidth=1.5
                )
        axes.set_yticks(range(len(policies)), [_short(policy.name) for policy in policies])
        axes.set_ylim(len(policies) - 0.5, -0.5)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("return of an episode")
        return to_svg(figure, "returns")


def agreement_chart(comparison: Comparison) -> str:
    """Dream return against real return, one point a policy; the diagonal is a dream without error."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5, 4.6), layout="constrained")
        axes = figure.subplots()
        for policy in comparison.policies:
            x, y = policy.real, policy.dream
            axes.plot(x.interval, [y.mean] * 2, color=REAL, alpha=0.6)
            axes.plot([x.mean] * 2, y.interval, color=DREAM, alpha=0.6)
            axes.plot(x.mean, y.mean, "o", color=_INK, markersize=4)
            axes.annotate(_short(policy.name), (x.mean, y.mean), (5, 4), textcoords="offset points", fontsize=8)
        top = max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([0, top], [0, top], color=_INK, linewidth=0.7, linestyle=":")
        axes.set_xlabel("real return")
        axes.set_ylabel("dream return")
        return to_svg(figure, "agreement")


def learning_chart(curve: Sequence[Mapping[str, Any]]) -> str:
    """Returns of training episodes in the dream over steps and, where there were any, of trials, real or predicted.

    They have axes of their own, as their episodes are of other lengths.
    """
    panels = [
        (title, points, colour, marker)
        for key, title, colour, marker in (
            ("return", "training episodes in the dream", DREAM, ""),
            ("real", "trials in the real env", REAL, "o"),
            ("low", "predicted real return at trials, lower end", REAL, "o"),
        )
        if (points := [(point["steps"], point[key]) for point in curve if key in point])
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.6 + 2.2 * max(1, len(panels))), layout="constrained")
        rows = figure.subplots(max(1, len(panels)), sharex=True, squeeze=False)[:, 0]
        for axes, (title, points, colour, marker) in zip(rows, panels, strict=False):
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4)
            axes.set_title(title)
            axes.set_ylabel("return")
        rows[-1].set_xlabel("steps in the dream")
        rows[-1].xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
        return to_svg(figure, "learning")


def rewards_chart(replay: Replay) -> str:
    """Reward over time: the real episode, and the dreams of its actions (mean, and 10% to 90% of them)."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.subplots()
        _band(axes, replay.dream_rewards)
        axes.plot(replay.real_rewards, color=REAL)
        axes.set_ylabel("reward")
        axes.set_xlabel("step")
        return to_svg(figure, "rewards")


def errors_chart(replay: Replay) -> str:
    """The error of each sensor over time, and where it passes the threshold."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        axes = figure.subplots()
        for colour, (name, error) in zip(_SENSORS, replay.errors.items(), strict=False):
            axes.plot(error, color=colour, label=name)
            parting = replay.parting(name)
            if parting is not None:
                axes.plot(parting, error[parting], "o", color=colour, markersize=5)
        axes.axhline(PARTING_ERROR, color=_INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(0, None)
        axes.set_ylabel("error / standard deviation")
        axes.set_xlabel("step")
        axes.legend(ncols=len(_SENSORS), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        return to_svg(figure, "errors")


def sensor_chart(replay: Replay, name: str, steps: int) -> tuple[str, int]:
    """One small panel a dim of a sensor: the real episode, and the dreams of its actions.

    Returns:
        The chart, and how many dims it shows.
    """
    real, dream = replay.real[name][:steps], replay.dream[name][:steps]
    dims = np.sort(np.argsort(-(real / replay.scale[name]).std(axis=0))[:MOST_PANELS])
    columns = min(4, len(dims))
    rows = -(-len(dims) // columns)
    with matplotlib.rc_context(_STYLE | {"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(9 if columns > 1 else 4.5, 1.35 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for panel, dim in zip(panels, dims, strict=False):
            _band(panel, dream[:, :, dim])
            panel.plot(real[:, dim], color=REAL)
            panel.set_title(f"{name}[{dim}]" if real.shape[1] > 1 else name)
            parting = replay.parting(name)
            if parting is not None and parting < steps:
                panel.axvline(parting, color=_INK, linewidth=0.8, linestyle=":")
        for panel in panels[len(dims) :]:
            panel.set_visible(False)
        return to_svg(figure, f"sensor-{name}"), len(dims)


def shares_picture(explanation: Explanation) -> bytes:
    """A stacked bar a policy: the shares of the dream's error, left of 0 what it lacks, and a dot where they sum to.

    Returns:
        A PNG.
    """
    names, policies = list(explanation.mean_shares()), explanation.policies
    colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    rows = np.arange(len(policies))
    with matplotlib.rc_context({name: value for name, value in _STYLE.items() if value != _INK}):
        figure = Figure(figsize=(9, 1.6 + 0.36 * len(policies)), layout="constrained")
        axes = figure.subplots()
        ends = {sign: np.zeros(len(policies)) for sign in (-1, 1)}
        for colour, name in zip(colours, names, strict=False):
            values = np.array([policy.shares.get(name, 0.0) for policy in policies])
            lefts = np.where(values < 0, ends[-1], ends[1])
            axes.barh(rows, values, 0.7, lefts, color=colour, label=name)
            for sign in ends:
                ends[sign] += np.where(np.sign(values) == sign, values, 0.0)
        axes.plot([policy.error for policy in policies], rows, "D", color="black", markersize=5, label="dream - real")
        axes.axvline(0, color="black", linewidth=0.7)
        told = [f"{_short(policy.name)}  ({policy.real:.2f} real)" for policy in policies]
        axes.set_yticks(rows, told)
        axes.set_ylim(len(policies) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"reward a step; {explanation.model}, {explanation.task}")
        figure.legend(loc="outside upper center", ncols=6)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _band(axes: Axes, samples: np.ndarray) -> None:
    """Mean and central 80% of samples [L, N]."""
    low, high = np.quantile(samples, [0.1, 0.9], axis=1)
    axes.fill_between(np.arange(len(samples)), low, high, color=DREAM, alpha=0.25, linewidth=0)
    axes.plot(samples.mean(axis=1), color=DREAM)


def _short(name: str, length: int = 32) -> str:
    return name if len(name) <= length else "…" + name[-length + 1 :]


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an SVG element for an HTML page: no prologue, no metadata, ids of its own, the page's ink."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace(_INK, "currentColor")


DREAM, REAL, GREY = "#7c6cf0", "#e8833a", "#8a8f98"

_SCORE_STYLE: dict[Any, Any] = {
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
    with matplotlib.rc_context(_SCORE_STYLE):
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
    ("3 accuracy of rewards", "reward", _reward),
    ("4 policy ranking", "ranking", _ranking),
    ("5 optimisation lift", "lift", _lift),
    ("6 exploitability", "exploitability", _exploitability),
    ("7 calibration of the doubt", "calibration", _calibration),
)
