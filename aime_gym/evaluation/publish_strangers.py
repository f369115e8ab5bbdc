"""A small set of strangers for everybody, out of the many that training has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from aime_gym.agents.numpy_policies import NoisyPolicy, load_plain
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.returns import episode_returns
from aime_gym.evaluation.stranger_selection import RULE, Candidate, select, third_of
from aime_gym.evaluation.strangers import COLLECTORS, FORMAT, INDEX, SEED, StrangerSet
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import read_json, write_atomically, write_json
from aime_gym.world_model.trust import LEAST_THIRD

PACKAGES = {"sbx": "sbx-rl", "aime_gym": "aime-gym"}
"""Where a library's package has another name."""
BESIDE = 4
"""Policies of families that have collected data are a part of those that have not: one in so many."""


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        policies: How many.
        runs: Of how many training runs.
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
        seed: Of the choice.

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
    thirds = [third_of(chosen[name]["real"]["mean"], low, top) for name in unseen]
    counts = (thirds.count(0), thirds.count(1), thirds.count(2))
    balanced = min(counts) >= LEAST_THIRD * sum(counts)
    content = {
        "format": FORMAT,
        "embodiment": strangers.embodiment,
        "task": strangers.task,
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
