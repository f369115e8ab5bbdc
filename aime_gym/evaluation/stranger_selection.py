"""Which strangers are published: few, from all runs, and as many of them weak, middling and strong as there are.

A set says something if its real returns lie in all parts of the range from what random actions earn to what the best
agent does. Runs that learn at once and runs that never do leave few policies in the middle; stages of one run and the
same policy with noise fill it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from aime_gym.world_model.trust import LEAST_RUNS, LEAST_THIRD

RULE = (
    "Of policies with equal files and noise the first. As many as are asked for, or the most of which each third of "
    "the range from random to best can have a quarter. Runs that lie in one third alone and are more than leave the "
    "others a quarter are left out, down to twelve, of the family with most runs. Thirds get equal quotas; what one "
    "lacks goes to the others. First every run, those with the fewest policies before others, gives one to the third "
    "that lacks most. Then the third that lacks most takes the policy whose run, then whose family, has the fewest, "
    "whose return is farthest from those taken there, without noise before with; a seed decides what is left."
)
"""What `select` does, for the list of a published set."""


@dataclass(frozen=True)
class Candidate:
    """A policy that may be published.

    Attributes:
        name: Unlike any other's.
        run: The training run that it is a stage of.
        family: The algorithm.
        content: What tells it from policies of other names: its file's digest and its noise.
        real: Its mean real return.
        noisy: Whether it acts with noise.
    """

    name: str
    run: str
    family: str
    content: str
    real: float
    noisy: bool


def third_of(real: float, low: float, high: float) -> int:
    """In which third of a range a return lies, 0 to 2; what lies outside belongs to the nearest."""
    return int(np.clip(3 * (real - low) / (high - low), 0, 2)) if high > low else 0


def select(candidates: Sequence[Candidate], keep: int, low: float, high: float, seed: int = 0) -> tuple[str, ...]:
    """Chooses by `RULE`.

    Args:
        candidates: Policies of any number of runs.
        keep: How many are chosen at most, but for one of each of twelve runs, which stay in any case.
        low: The return of random actions.
        high: The best return known.
        seed: Decides between equals.

    Returns:
        Their names, in the order of the candidates; the same ones whatever that order is.
    """
    order = np.random.default_rng(seed).permutation(len(candidates))
    known = dict(zip((one.name for one in sorted(candidates, key=lambda one: one.name)), order, strict=True))
    first: dict[str, Candidate] = {}
    for one in sorted(candidates, key=lambda one: one.name):
        first.setdefault(one.content, one)
    there = Counter(third_of(one.real, low, high) for one in first.values())
    total, balanced = min(keep, len(first)), int(min(there[t] for t in range(3)) / LEAST_THIRD)
    if balanced >= min(LEAST_RUNS, len({one.run for one in candidates})):
        total = min(total, balanced)
    left_out = _left_out(list(first.values()), total, low, high)
    left = [
        sorted(
            (c for c in first.values() if third_of(c.real, low, high) == t and c.run not in left_out),
            key=lambda c: known[c.name],
        )
        for t in range(3)
    ]
    runs = Counter(one.run for third in left for one in third)
    quotas = _quotas([len(third) for third in left], max(total, len(runs)), [len(o) for o in _runs_in_one(left)])
    taken: list[list[Candidate]] = [[], [], []]

    def take(third: int, one: Candidate) -> None:
        left[third].remove(one)
        taken[third].append(one)

    for run in sorted(runs, key=lambda run: (runs[run], run)):
        own = [(third, one) for third in range(3) for one in left[third] if one.run == run]
        take(
            *max(own, key=lambda pair: (quotas[pair[0]] - len(taken[pair[0]]), not pair[1].noisy, -known[pair[1].name]))
        )
    while any(lacking := [left[t] and quotas[t] - len(taken[t]) > 0 for t in range(3)]):
        third = max((t for t in range(3) if lacking[t]), key=lambda t: quotas[t] - len(taken[t]))
        take(third, _next(left[third], taken, third))
    chosen = {one.name for part in taken for one in part}
    return tuple(one.name for one in candidates if one.name in chosen)


def _next(left: Sequence[Candidate], taken: Sequence[Sequence[Candidate]], third: int) -> Candidate:
    """The one that adds most to those that are taken."""
    everyone = [one for part in taken for one in part]
    runs, families = Counter(one.run for one in everyone), Counter(one.family for one in everyone)

    def adds(one: Candidate) -> tuple[float, ...]:
        distance = min((abs(one.real - other.real) for other in taken[third]), default=np.inf)
        return -runs[one.run], -families[one.family], distance, not one.noisy

    return max(left, key=adds)


def _runs_in_one(thirds: Sequence[Sequence[Candidate]]) -> list[set[str]]:
    """The runs of each third that have no policy in another."""
    runs = [{one.run for one in third} for third in thirds]
    return [runs[t] - runs[t - 1] - runs[t - 2] for t in range(3)]


def _left_out(candidates: Sequence[Candidate], total: int, low: float, high: float) -> set[str]:
    """Runs without which each third can have its share of the total."""
    thirds = [[one for one in candidates if third_of(one.real, low, high) == t] for t in range(3)]
    if not all(thirds):
        return set()
    families = {one.run: one.family for one in candidates}
    room = total - 2 * ceil(total * LEAST_THIRD)
    out: set[str] = set()
    for only in _runs_in_one(thirds):
        while len(only) > room and len(families) > LEAST_RUNS:
            size = Counter(families.values())
            run = max(only, key=lambda run: (size[families[run]], run))
            out.add(run)
            only.remove(run)
            del families[run]
    return out


def _quotas(there: Sequence[int], total: int, least: Sequence[int]) -> list[int]:
    """How many of each third: as equal as may be, with a place for each run that has no policy elsewhere."""
    total = min(total, sum(there))
    quotas = [max(fewest, min(count, total // 3)) for count, fewest in zip(there, least, strict=True)]
    while sum(quotas) > total and (above := [third for third in range(3) if quotas[third] > least[third]]):
        quotas[max(above, key=lambda third: (quotas[third], third))] -= 1
    while sum(quotas) < total:
        room = [third for third in range(3) if quotas[third] < there[third]]
        quotas[min(room, key=lambda third: (quotas[third], third))] += 1
    return quotas
