"""Whether dreams end when the world does: length of episodes and share of falls, over strangers in both worlds.

Where falling ends an episode, its length decides what a policy earns. Each policy of a set of strangers runs as many
episodes in the dream as in the real env; an episode that ends before the limit of steps has fallen. Lengths are
compared over policies: how dreams rank them, and how far they are off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aime_gym.evaluation.returns import dope_metrics
from aime_gym.evaluation.strangers import StrangerSet
from aime_gym.evaluation.worlds import Worlds
from aime_gym.files import write_json
from aime_gym.flags import check_flags

Ends = dict[str, dict[str, float]]
"""World -> mean ``length``, share of ``falls`` and mean ``return`` of a policy's episodes."""


@dataclass
class EpisodeEnds:
    """Compare how episodes end in the dreams of a model and in the world, over a set of strangers."""

    model: Annotated[str, tyro.conf.Positional]
    """A bundled name or a model folder."""
    strangers: Annotated[Path, tyro.conf.Positional]
    """A set of its body, as `aime-gym strangers` writes them."""
    episodes: int = 10
    """Episodes of each policy in each world."""
    max_episode_steps: int | None = None
    """The limit of steps; the body's own by default."""
    seed: int = 0
    """Seed of starts and episodes."""
    out: Path | None = None
    """Where the numbers go, as JSON."""

    def run(self) -> dict[str, Any]:
        """Measures, prints and returns the summary and the policies' numbers."""
        check_flags(self, 1, "episodes", "max_episode_steps")
        strangers = StrangerSet.load(self.strangers)
        with Worlds(
            strangers.embodiment, strangers.task, self.model, "state", max_episode_steps=self.max_episode_steps
        ) as worlds:
            members = {member.name: member.policy for member in strangers.members}
            watched = track(members.items(), "Episodes of strangers", console=Console(stderr=True))
            policies = {name: ends_of(worlds, policy, self.episodes, self.seed) for name, policy in watched}
        told = {"model": str(self.model), "episodes": self.episodes, **summary(policies), "policies": policies}
        Console().print(_table(strangers.embodiment, told))
        if self.out is not None:
            write_json(self.out, told)
        return told


def ends_of(worlds: Worlds, policy: Any, episodes: int, seed: int = 0) -> Ends:
    """How the episodes of a policy end in both worlds.

    Args:
        worlds: Both.
        policy: See `aime_gym.evaluation.returns.PolicyLike`.
        episodes: In each world.
        seed: Seed of starts and episodes.
    """
    both = zip(("dream", "real"), worlds.evaluate(policy, episodes, seed), strict=True)
    return {
        world: {
            "length": float(ran.lengths.mean()),
            "falls": float((ran.lengths < worlds.max_episode_steps).mean()),
            "return": ran.mean,
        }
        for world, ran in both
    }


def summary(policies: Mapping[str, Ends]) -> dict[str, Any]:
    """Agreement of both worlds over policies, by `aime_gym.evaluation.returns.dope_metrics`.

    Args:
        policies: How the episodes of each policy end.

    Returns:
        That of ``"length"`` and of ``"falls"``; and of ``"length, some fall"``, over those policies that fall in the
        world now and then, as all others' episodes are as long as the limit.
    """

    def agreement(key: str, chosen: Iterable[Ends]) -> Any:
        pairs = [(ends["dream"][key], ends["real"][key]) for ends in chosen]
        return dope_metrics([dream for dream, _ in pairs], [real for _, real in pairs])

    falling = [ends for ends in policies.values() if ends["real"]["falls"] > 0]
    return {
        "length": agreement("length", policies.values()),
        "falls": agreement("falls", policies.values()),
        "length, some fall": agreement("length", falling),
    }


def _table(body: str, told: Mapping[str, Any]) -> Table:
    table = Table("policy", "steps: dream", "real", "falls: dream", "real", title=f"{body}: how episodes end")
    for name, ends in sorted(told["policies"].items(), key=lambda item: item[1]["real"]["length"]):
        lengths = [f"{ends[world]['length']:.0f}" for world in ("dream", "real")]
        table.add_row(name, *lengths, *(f"{ends[world]['falls']:.0%}" for world in ("dream", "real")))
    lines = [
        f"{key}: Spearman {_told(of['spearman'])}, Pearson {_told(of['pearson'])}, mean error "
        f"{_told(of['mean_absolute_error'])}, {of['policies']} policies"
        for key, of in told.items()
        if isinstance(of, dict) and "spearman" in of
    ]
    table.caption = "\n".join(lines)
    return table


def _told(number: float | None) -> str:
    return "none" if number is None else f"{number:.2f}"


if __name__ == "__main__":
    tyro.cli(EpisodeEnds).run()
