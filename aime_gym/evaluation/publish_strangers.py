"""Which strangers are published: few, from all runs, and as many of them weak, middling and strong as there are.

A set says something if its real returns lie in all parts of the range from what random actions earn to what the best
agent does. Runs that learn at once and runs that never do leave few policies in the middle; stages of one run and the
same policy with noise fill it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from aime_gym.agents.numpy_policies import NoisyPolicy, load_plain
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.returns import episode_returns
from aime_gym.evaluation.strangers import COLLECTORS, FORMAT, INDEX, SEED, StrangerSet
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import read_json, write_atomically, write_json
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
        content: What identifies it, under whatever name: its file's digest and its noise.
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


PACKAGES = {"sbx": "sbx-rl", "aime_gym": "aime-gym"}
"""Where a library's package has another name."""

BESIDE = 4
"""Policies of families that have collected data are a part of those that have not: one in so many."""


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        policies: How many.
        runs: Number of training runs that they are of.
        thirds: How many of those of unseen families lie in each third of the range of returns.
        balanced: Whether each third has a quarter of them.
    """

    policies: int
    runs: int
    thirds: tuple[int, int, int]
    balanced: bool


def publish_strangers(
    folder: Path,
    out: Path,
    keep: int = 40,
    best: float | None = None,
    noise: Sequence[float] = (0.3, 0.5),
    episodes: int = 10,
    seed: int = 0,
) -> Published:
    """Chooses policies of a set, measures them and writes them with their list into another folder.

    Each run's best policy, if it is beyond the lowest third, is also tried with noise.

    Args:
        folder: What `aime-gym strangers` has trained.
        out: To write.
        keep: Policies of unseen families, at most; see `select`.
        best: The best real return that anyone has; that of the set's best policy if it is higher or not given.
        noise: Standard deviations of Gaussian noise.
        episodes: Real ones by which each return is measured.
        seed: Seed of the choice.

    Returns:
        How the choice came out.

    Raises:
        AimeGymError: If there is no such set, or `out` is its folder or holds something else.
    """
    strangers = StrangerSet.load(folder)
    index = read_json(folder / INDEX)
    _check_out(out, folder)
    top = max([best or -float("inf"), *(entry["real"]["mean"] for entry in index["policies"].values())])
    low, few = strangers.random_return, min(len(member.returns) for member in strangers.members)
    envs = make_real_envs(strangers.embodiment, min(episodes, 10), task=strangers.task)
    try:
        entries = {name: entry | {"file": name, "noise": 0.0} for name, entry in index["policies"].items()}
        for name, entry in _best_of_runs(entries).items():
            for std in noise if third_of(entry["real"]["mean"], low, top) else ():
                noisy = entry | {"noise": std, "real": {"returns": []}}
                entries[f"{name}+{std:g}"] = _measured(folder, noisy, few, envs)
        chosen: dict[str, dict[str, Any]] = {}
        while True:  # what is measured better may lie in another third, and then others are chosen
            candidates = [_candidate(name, entry) for name, entry in entries.items()]
            unseen = select([one for one in candidates if one.family not in COLLECTORS], keep, low, top, seed)
            beside = select([one for one in candidates if one.family in COLLECTORS], keep // BESIDE, low, top, seed)
            if all(name in chosen for name in (*unseen, *beside)):
                break
            chosen |= {
                name: _measured(folder, entries[name], episodes, envs)
                for name in (*unseen, *beside)
                if name not in chosen
            }
            entries |= chosen
        chosen = {name: chosen[name] for name in (*unseen, *beside)}
    finally:
        envs.close()
    for file in sorted({entry["file"] for entry in chosen.values()}):
        write_atomically(out / f"{file}.safetensors", (folder / f"{file}.safetensors").read_bytes())
    settings = {"rule": RULE, "keep": keep, "seed": seed, "noise": list(noise), "candidates": len(candidates)}
    counts, balanced = _balance(chosen.values(), low, top)
    content = {
        "format": FORMAT,
        "embodiment": strangers.embodiment,
        "task": strangers.task,
        "settings": {} if strangers.learn is None else {"learn": strangers.learn},
        "selection": settings | {"thirds": counts, "balanced": balanced},
        "training_steps": index["training_steps"],
        "episodes": episodes,
        "seed": SEED,
        "best": top,
        "anchors": index["anchors"],
        "runs": _runs(index["policies"]),
        "policies": chosen,
    }
    write_json(out / INDEX, content)
    runs = {entry["run"] for entry in chosen.values()}
    return Published(len(chosen), len(runs), counts, balanced)


def measure_again(folder: Path, episodes: int) -> None:
    """Gives each policy of a set more real episodes; those that it has are kept.

    Args:
        folder: A published set.
        episodes: So many each policy has afterwards, or more if it had them.

    Raises:
        AimeGymError: If there is no such set, or one that is still being trained.
    """
    strangers = StrangerSet.load(folder)
    index = read_json(folder / INDEX)
    if "selection" not in index:
        raise AimeGymError(
            f"{folder} is no published set: `aime-gym strangers ... --publish` makes one, by --episodes."
        )
    envs = make_real_envs(strangers.embodiment, min(episodes, 10), task=strangers.task)
    try:
        for name, entry in index["policies"].items():
            index["policies"][name] = _measured(folder, entry, max(episodes, len(entry["real"]["returns"])), envs)
    finally:
        envs.close()
    index["episodes"] = max(episodes, index["episodes"])
    index["best"] = max([index["best"], *(entry["real"]["mean"] for entry in index["policies"].values())])
    counts, balanced = _balance(index["policies"].values(), strangers.random_return, index["best"])
    index["selection"] |= {"thirds": counts, "balanced": balanced}
    write_json(folder / INDEX, index)


def _balance(entries: Iterable[dict[str, Any]], low: float, high: float) -> tuple[tuple[int, int, int], bool]:
    """How many of unseen families lie in each third of the range, and whether each has its share of them."""
    thirds = [third_of(entry["real"]["mean"], low, high) for entry in entries if entry["family"] not in COLLECTORS]
    counts = (thirds.count(0), thirds.count(1), thirds.count(2))
    return counts, min(counts) >= LEAST_THIRD * sum(counts)


def _check_out(out: Path, folder: Path) -> None:
    if out.resolve() == folder.resolve():
        raise AimeGymError(f"{out} is the folder of the set itself: choose another one to publish to.")
    if others := [path.name for path in out.glob("[!.]*")] if out.exists() else []:
        raise AimeGymError(f"{out} holds something already ({', '.join(sorted(others)[:3])}): choose another folder.")


def _best_of_runs(entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The policy of each run that earns most, by its name."""
    runs: dict[str, str] = {}
    for name, entry in entries.items():
        if entry["run"] not in runs or entry["real"]["mean"] > entries[runs[entry["run"]]]["real"]["mean"]:
            runs[entry["run"]] = name
    return {name: entries[name] for name in runs.values()}


def _measured(folder: Path, entry: dict[str, Any], episodes: int, envs: VectorEnv) -> dict[str, Any]:
    """The entry with so many real returns; those that it has are kept."""
    returns = [float(value) for value in entry["real"]["returns"]][:episodes]
    if len(returns) < episodes:
        policy: Any = load_plain(folder / f"{entry['file']}.safetensors")
        acts = NoisyPolicy(policy, entry["noise"]) if entry["noise"] else policy
        more = episode_returns(acts, envs, episodes - len(returns), seed=SEED + len(returns))
        returns += [round(float(value), 3) for value in more.returns]
    return entry | {"real": {"mean": sum(returns) / len(returns), "returns": returns}}


def _candidate(name: str, entry: dict[str, Any]) -> Candidate:
    content = f"{entry['sha256']} {entry['noise']}"
    return Candidate(name, entry["run"], entry["family"], content, entry["real"]["mean"], bool(entry["noise"]))


def _runs(policies: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Who trained what, with which version and for how long.

    The version of a run that did not note it is that which is installed here.
    """
    runs: dict[str, dict[str, Any]] = {}
    for entry in policies.values():
        run = runs.setdefault(
            entry["run"],
            {
                "family": entry["family"],
                "library": entry["library"],
                "version": entry.get("version") or version_of(entry["library"]),
                "steps": 0,
            },
        )
        run["steps"] = max(run["steps"], entry["steps"])
    return runs


def version_of(library: str) -> str | None:
    """The version of a library that is installed here; None if it is not."""
    try:
        return version(PACKAGES.get(library, library))
    except PackageNotFoundError:
        return None
