"""The HTML report, and the verdict on a training: learned, not learned yet, or rewarded in the dream alone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Literal

from aime_gym.agents.dreaming import beats_clearly, last_trials
from aime_gym.errors import AimeGymError
from aime_gym.evaluation import charts
from aime_gym.evaluation.both_worlds import PARTING_ERROR, Replay, replay, side_by_side, what_the_film_shows
from aime_gym.evaluation.compare import UNKNOWN, Comparison, PolicyReturns
from aime_gym.evaluation.predict import LEVEL
from aime_gym.evaluation.returns import DopeMetrics, PolicyLike, bootstrap_interval, plus_minus, rounded
from aime_gym.evaluation.worlds import Worlds
from aime_gym.files import write_atomically

FAIR_SHARE = 0.5
"""The share, at least, of what the dream promises beyond random actions that the world should pay."""


_OF_STARTS = {True: "from the same states and seeds", False: "each world's from its own starts"}


@dataclass(frozen=True)
class Verdict:
    """The verdict on an agent from a dream."""

    outcome: Literal["learned", "not learned", "dream pays"]
    """Whether the agent clearly beats random actions in the world, does not, or earns in the dream what the world pays
    less than half of."""
    text: str
    """The same in a sentence with both returns and that of random actions."""


def judge(comparison: Comparison) -> Verdict:
    """Judges the first policy of a comparison by the one that is called ``"random"``.

    Args:
        comparison: A comparison of an agent and random actions, from the same starts.
    """
    agent = comparison.policies[0]
    random = next(policy for policy in comparison.policies if policy.name == "random")
    if not comparison.real_episodes:
        known = agent.predicted is not None and random.predicted is not None
        learned = known and agent.predicted.interval[0] > random.predicted.mean  # type: ignore[union-attr]
        dreamt, chance = plus_minus(agent.dream), plus_minus(random.dream)
        told = f"{comparison.verdict}; its dreams earn {dreamt}, those of random actions {chance}."
        return Verdict("learned" if learned else "not learned", told)
    promised = agent.dream.mean - random.dream.mean
    paid = agent.real.mean - random.real.mean
    dreamt, earned = plus_minus(agent.dream), f"{plus_minus(agent.real)} in the real env"
    if beats_clearly(agent.dream.returns, random.dream.returns) and paid < FAIR_SHARE * promised:
        return Verdict(
            "dream pays",
            f"The dream pays for what the world does not: {dreamt} dreamt, {earned}, {_beside(agent, random)}.",
        )
    if beats_clearly(agent.real.returns, random.real.returns):
        return Verdict(
            "learned",
            f"Learned: {earned}, where random actions earn {rounded(random.real.mean)}; the dream said {dreamt}.",
        )
    return Verdict("not learned", f"Not learned yet: {earned}, {_beside(agent, random)}; the dream said {dreamt}.")


def _beside(agent: PolicyReturns, random: PolicyReturns) -> str:
    """How the agent's real return compares with that of random actions from the same starts."""
    chance = f"random actions ({rounded(random.real.mean)})"
    low, high = bootstrap_interval(agent.real.returns - random.real.returns)
    if high < 0:
        return f"worse than {chance}"
    return f"more than {chance}" if low > 0 else f"no better than {chance}"


def write_report(
    path: str | Path,
    comparison: Comparison,
    policy: PolicyLike | None = None,
    name: str = "",
    worlds: Worlds | None = None,
    curve: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    video_steps: int | None = None,
    headline: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes the report, whole or not at all.

    Args:
        path: The HTML file.
        comparison: Returns in both worlds.
        policy: The one whose episode is shown step by step and on film; without it, or where the real env was not asked
            by the comparison, there are only returns.
        name: What to call it.
        worlds: Where it acts; needed with `policy`. Only policies on sensors are shown step by step.
        curve: How the agent learned, see `aime_gym.agents.dreaming.Lesson`.
        settings: How the agent was made, as names and values.
        video_steps: Agent steps on film: 0 for no film; the whole episode by default.
        headline: The result in a sentence; the comparison's verdict by default.
        notes: What else there is to say of it, a paragraph each.

    Returns:
        The path.
    """
    paired = worlds is None or not worlds.embodiment.foreign
    sections = [_returns_section(comparison, paired)]
    if curve:
        sections.append(_learning_section(curve))
    if policy is not None and worlds is not None and comparison.real_episodes:
        if video_steps != 0:
            sections.append(_video_section(policy, name, worlds, comparison.seed, video_steps))
        if worlds.obs_type in ("state", "dict"):
            sections.append(_replay_section(policy, name, worlds, comparison.seed))
    if settings:
        sections.append(f"<h2>Settings</h2>{_definitions(settings, 'settings')}")
    page = Template(files(__package__).joinpath("report_template.html").read_text(encoding="utf-8"))
    content = page.substitute(
        title=_text(f"{comparison.embodiment} {comparison.task}: dream and real"),
        kind=_text(
            f"aime_gym · {comparison.embodiment} {comparison.task} · model {comparison.weights or comparison.model}"
        ),
        headline=_text(headline or comparison.verdict),
        subtitle=_text(
            f"{comparison.counts} of {comparison.max_episode_steps} steps, "
            + (_OF_STARTS[paired] if comparison.real_episodes else "the real env was not asked")
            + f" (seed {comparison.seed})"
        ),
        notes="".join(f"<p>{_text(note)}</p>" for note in (*notes, *comparison.strays)),
        sections="\n".join(f"<section>{section}</section>" for section in sections),
    )
    return write_atomically(path, content)


def _returns_section(comparison: Comparison, paired: bool) -> str:
    caption = "Each faint dot is an episode; bars are 95% bootstrap intervals of the mean, the white dot."
    if comparison.policies[0].predicted is not None:
        caption += f" Below each: the predicted real return and its {LEVEL:.0%} interval."
    parts = [
        "<h2>Returns in both worlds</h2>",
        _figure(charts.returns_chart(comparison), caption),
        _table(comparison, paired),
    ]
    if len(comparison.policies) >= 3 and comparison.real_episodes:
        parts += [
            "<h2>Does the dream rank policies as the world does?</h2>",
            _definitions(_metrics(comparison.metrics)),
            _figure(charts.agreement_chart(comparison), "On the dotted line the dream tells the truth.", "narrow"),
        ]
    return "".join(parts)


def _table(comparison: Comparison, paired: bool) -> str:
    def cell(mean: float, interval: tuple[float, float]) -> str:
        low, high = interval
        return f"<td>{rounded(mean)} <small>[{rounded(low)}, {rounded(high)}]</small></td>"

    asked, first = comparison.real_episodes > 0, comparison.policies[0].predicted
    doubtful = any(policy.doubt is not None for policy in comparison.policies)
    rows = []
    for policy in comparison.policies:
        known: list[Any] = [each for each in (policy.dream, policy.told) if each is not None]
        gap = cell(policy.gap, policy.gap_interval) if asked else ""
        mark = " ?" if comparison.is_doubtful(policy) else ""
        doubt = f"<td>{'' if policy.doubt is None else f'{policy.doubt:.3g}{mark}'}</td>" if doubtful else ""
        cells = "".join(cell(each.mean, each.interval) for each in known)
        rows.append(f"<tr><td>{_text(policy.name)}</td>{cells}{gap}{doubt}</tr>")
    columns = (
        "policy",
        "dream",
        *(("real", "gap") if asked else ("predicted",) if first else ()),
        *["doubt"] * doubtful,
    )
    head = "".join(f"<th>{column}</th>" for column in columns)
    note = "Gap: dream minus real" + (", over pairs of episodes with the same start." if paired else ".")
    if not asked:
        note = UNKNOWN
    if first is not None:
        note = f"Predicted: the mean return in the real env and its {LEVEL:.0%} interval, without a real step. "
        note += _text(first.reason)
    if doubtful:
        note += (
            " Doubt: how far the model corrects itself on seeing the frames that it dreams, in nats; with a question "
        )
        note += "mark it is more than at real moments, and the dream return should not be trusted."
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="soft small">{note}</p>'
    )


def _metrics(metrics: DopeMetrics) -> dict[str, str]:
    def shown(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    return {
        "Spearman": shown(metrics["spearman"], ".2f"),
        "Pearson": shown(metrics["pearson"], ".2f"),
        "mean absolute error": shown(metrics["mean_absolute_error"], ".0f"),
        "regret@1": shown(metrics["regret_at_1"], ".0f"),
    }


def _learning_section(curve: Sequence[Mapping[str, Any]]) -> str:
    last = curve[-1]
    lengths = [point["length"] for point in curve if "length" in point]
    caption = "Above: mean return of the last episodes that ended in the dream while the agent learned"
    if lengths:
        shortest, longest = round(min(lengths)), round(max(lengths))
        caption += f", {longest}" if shortest == longest else f", {shortest} to {longest}"
        caption += " steps long on average"
    tried = sum(point["episodes"] for point in curve if "real" in point)
    if tried:
        caption += f". Below: trials in the real env, {tried} episodes in all"
    trials = last_trials(curve)
    if trials and "low" in trials[-1]:
        caption += (
            ". Last: the lower end of the 90% interval of the real return that the dream predicted at trials, which "
            "chose the agent: no real episode did"
        )
    elif tried:
        caption += ", which chose the agent"
    return (
        "<h2>How the agent learned</h2>"
        f"<p>{last['steps']:,.0f} steps in the dream"
        + (f" in {last['seconds'] / 60:.1f} minutes" if "seconds" in last else "")
        + ".</p>"
        + _figure(charts.learning_chart(curve), f"{caption}.")
    )


def _video_section(policy: PolicyLike, name: str, worlds: Worlds, seed: int, steps: int | None) -> str:
    title = "<h2>One episode, side by side</h2>"
    try:
        film = base64.b64encode(side_by_side(policy, worlds, seed, steps)).decode()
    except Exception as error:  # an env or a GL library from outside fails in its own way, after all the work
        return f"{title}<p class='soft'>No video: {_text(str(error))}</p>"
    return (
        f"{title}<figure><video controls loop muted playsinline src='data:video/mp4;base64,{film}'></video>"
        f"<figcaption>{_text(name)} acts in each world: the dream on the left, the real env on the right. "
        f"{_text(what_the_film_shows(worlds))}</figcaption></figure>"
    )


def _replay_section(policy: PolicyLike, name: str, worlds: Worlds, seed: int) -> str:
    try:
        replayed: Replay = replay(policy, worlds, seed)
    except AimeGymError as error:
        return f"<h2>The same actions in both worlds</h2><p class='soft'>{_text(str(error))}</p>"
    length, dreams = replayed.dream_rewards.shape
    partings = [step for sensor in replayed.real if (step := replayed.parting(sensor)) is not None]
    shown = min(length, max(60, 4 * max(partings, default=length)))
    parts = [
        "<h2>The same actions in both worlds</h2>",
        f"<p>{_text(replayed.verdict)}</p>",
        f"<p class='soft small'>{_text(name)} acts in the real env; {dreams} dreams of the very same actions begin at "
        "the same state and never look at the world again. Lines and bands: their mean, and 80% of them. "
        f"The real episode is worth {rounded(replayed.real_rewards.sum())}, "
        f"its dreams {rounded(replayed.dream_rewards.sum(axis=0).mean())}.</p>",
        _figure(charts.rewards_chart(replayed), "Reward of each step."),
        _figure(
            charts.errors_chart(replayed),
            f"Error of each sensor in its standard deviations; dots: where it first exceeds {PARTING_ERROR:g}.",
        ),
        f"<details open><summary>The sensors, first {shown} steps</summary>",
    ]
    for sensor, values in replayed.real.items():
        chart, dims = charts.sensor_chart(replayed, sensor, shown)
        which = "" if dims == values.shape[1] else f", the {dims} of {values.shape[1]} values that move most"
        caption = f"{_text(sensor)}{which}; dotted: where it parts."
        parts.append(_figure(chart, caption, "narrow" if dims == 1 else ""))
    return "".join([*parts, "</details>"])


def _figure(svg: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{svg}<figcaption>{caption}</figcaption></figure>'


def _definitions(values: Mapping[str, Any], kind: str = "") -> str:
    items = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(str(v))}</dd></div>" for k, v in values.items())
    return f'<dl class="{kind}">{items}</dl>'


def _text(text: str) -> str:
    return html.escape(text)
