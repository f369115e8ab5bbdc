"""Measures trust in a model's dreams: all strangers of a set at once, from the beginnings of their real episodes.

The real returns are those that the set publishes. They are from resets with
known seeds. Dreams are paired with them: of each such episode the first frames are made anew in the real env, under the
policy's own actions, the model filters them, and the dream is the rest of the episode. That costs a few real steps
where a real episode costs hundreds, and has as little variance as episodes that are run in pairs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from aime_gym.agents.numpy_policies import PlainMLP
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.bodies.sensors import IMAGE_SIZE
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import policies_of_model
from aime_gym.envs.dream_checks import check_same_spaces, choose_task
from aime_gym.envs.start_bank import shared_bank
from aime_gym.envs.wrappers import drawn_as
from aime_gym.errors import AimeGymError, check_positive
from aime_gym.evaluation.compare import Comparison, PolicyReturns, told_of_weights
from aime_gym.evaluation.returns import Episodes, Policy
from aime_gym.evaluation.strangers import COLLECTORS, SEED, Stranger, StrangerSet, acted_in, judge
from aime_gym.evaluation.worlds import make_dream_envs, make_real_envs, obs_type_of_all_sensors, usual_doubt
from aime_gym.files import weights_digest, write_atomically
from aime_gym.observations import to_sensors, to_vectors
from aime_gym.parallel import one_thread
from aime_gym.world_model.checkpoint import load_starts
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import MOST_ERROR, Trust, UntrustworthyDream, load_trust

COLLECTED = "collected some of its data"

FRAMES = 10
"""Real frames that a dream begins with, as many as those of a model's own starts."""

MOST_SLOTS = 500
"""Dreams side by side."""


@dataclass(frozen=True)
class Measurement:
    """How well a model's dreams judge a set of strangers.

    Attributes:
        comparison: Each policy's returns, published ones beside dreamt ones.
        trust: The verdict; its `strangers` are what trust.json keeps.
    """

    comparison: Comparison
    trust: Trust


def measure_trust(
    model: WorldModel,
    strangers: StrangerSet,
    episodes: int | None = None,
    seen: Iterable[str] = COLLECTORS,
    best: float | None = None,
) -> Measurement:
    """Dreams of all strangers of a set, judged by what they earn in the real env.

    Args:
        model: Any model of the set's body that decodes what the strangers see.
        strangers: The set. Runs that learned in dreams of this very model or collected some of its data are left out;
            the families of the latter count as seen.
        episodes: Episodes of each policy, at most as many as the set has real returns of; all by default.
        seen: Families whose algorithm has collected some of the model's data, which are reported apart.
        best: The best real return that anyone has at the task; what the set says by default.

    Returns:
        The returns and the verdict. Nothing is written.

    Raises:
        AimeGymError: If the model is of another body, has no reward of the task, or does not decode what strangers see.
    """
    body = get_embodiment(strangers.embodiment)
    check_same_spaces(model.config, body)
    task = choose_task(body, model, strangers.task)
    weights = None if model.folder is None else weights_digest(model.folder)
    kin = _kin(model, body, strangers, weights)
    members = tuple(member for member in strangers.members if member.run not in kin)
    if not members:
        raise AimeGymError("All of these strangers are kin of the model: they learned in it, or it from them.")
    count = min(len(member.returns) for member in members)
    if episodes is not None:
        count = min(count, check_positive(episodes, "episodes"))
    dreams: list[Episodes] = []
    a_batch = max(1, MOST_SLOTS // count)
    for first in range(0, len(members), a_batch):
        dreams += _dream(model, body, task, members[first : first + a_batch], count)
    comparison = Comparison(
        body.name,
        task,
        model.folder.name if model.folder else "in memory",
        SEED,
        body.episode_steps,
        tuple(
            PolicyReturns(member.name, dream, Episodes(np.array(member.returns[:count]), dream.lengths))
            for member, dream in zip(members, dreams, strict=True)
        ),
        **told_of_weights(model),
    )
    gone = {member.family for member in strangers.members if kin.get(member.run) == COLLECTED}
    found = judge(comparison, strangers, {*seen, *gone}, best)
    found["returns"] = {
        told.name: {
            "family": member.family,
            "run": member.run,
            "dream": told.dream.mean,
            "real": told.real.mean,
            "doubt": None if told.doubt is None else min(told.doubt, 1e9),
        }
        for member, told in zip(members, comparison.policies, strict=True)
    }
    bank = None if "image" in model.observed else shared_bank(model)
    found["usual_doubt"] = None if bank is None else usual_doubt(model, bank.features)
    found |= {"left_out": kin, "episodes": count, "seed": SEED, "set": strangers.digest, "model": weights}
    found |= {"learn": strangers.learn}
    trust = Trust(strangers=found)
    return Measurement(replace(comparison, trust=trust.line), trust)


def _kin(model: WorldModel, body: Embodiment, strangers: StrangerSet, weights: str | None) -> dict[str, str]:
    """Runs that are no strangers to the model, and why."""
    collectors = policies_of_model(model.folder)
    has_starts = model.folder is not None and (model.folder / "starts.npz").exists()
    starts = load_starts(model) if has_starts else {}
    kin: dict[str, str] = {}
    size = sum(sensor.dim for sensor in body.observed("mdp"))
    for member in strangers.members:
        policy = member.plain
        policy.check_sizes(member.name, size, body.action_dim, body.choices)
        if member.digest in collectors or (isinstance(policy, PlainMLP) and acted_in(policy, body, starts)):
            kin[member.run] = COLLECTED
        elif weights is not None and (member.model or "")[:16] == weights:
            kin[member.run] = "learned in its dreams"
    return kin


def _dream(
    model: WorldModel, body: Embodiment, task: str, members: Sequence[Stranger], episodes: int
) -> list[Episodes]:
    """So many dreams of each policy, all side by side."""
    seeds = [SEED + index for index in range(episodes)]
    begun = _begin_all(model, body, task, members, seeds)
    return _dream_on(model, body, task, [member.policy for member in members], begun, seeds)


def _dream_on(
    model: WorldModel,
    body: Embodiment,
    task: str,
    policies: Sequence[Any],
    begun: Sequence[_Begun],
    seeds: Sequence[int],
    steps: int | None = None,
) -> list[Episodes]:
    """The rest of begun episodes, as many of each policy as there are seeds, dreamt all side by side.

    Args:
        model: What dreams.
        body: Its body.
        task: The task.
        policies: Have the `predict` of `Policy`.
        begun: The beginnings, one a policy.
        seeds: Seeds of the dreams of each policy, E.
        steps: Steps of a whole episode; the body's own by default.
    """
    sensors, episodes = body.observed("mdp"), len(seeds)
    shown = obs_type_of_all_sensors(model, body)
    if shown is None:
        raise AimeGymError(
            f"These policies see {', '.join(sensor.name for sensor in sensors)}; the model decodes "
            f"{', '.join((*model.observed, *model.probed))}. Judge it by agents that see what it does."
        )
    slots = len(policies) * episodes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustworthyDream)  # trust is what is being measured
        envs = make_dream_envs(
            body,
            slots,
            model,
            shown,
            task=task,
            max_episode_steps=max(1, (steps or body.episode_steps) - (len(begun[0].actions))),
            doubt="image" not in model.observed,  # which costs an image a step
        )
    try:
        start = {
            "observations": {
                name: np.concatenate([one.frames[name] for one in begun], axis=1) for name in model.observed
            },
            "actions": np.concatenate([one.actions for one in begun], axis=1),
        }
        every: Any = [*seeds] * len(policies)  # Gymnasium takes lists
        observation, _ = envs.reset(seed=every, options={"start": start})
        states = [one.state for one in begun]
        returns = np.concatenate([one.returns for one in begun])
        lengths = np.concatenate([one.lengths for one in begun])
        alive = np.concatenate([one.alive for one in begun])
        doubt, dreamt, no_start = np.zeros(slots), np.zeros(slots, np.int64), np.zeros(episodes, bool)
        doubts = False
        with one_thread():
            while alive.any():
                actions = np.empty(envs.action_space.shape or slots, envs.action_space.dtype)
                for index, policy in enumerate(policies):
                    rows = slice(index * episodes, (index + 1) * episodes)
                    actions[rows], states[index] = policy.predict(observation[rows], states[index], no_start, True)
                observation, rewards, terminated, truncated, infos = envs.step(actions)
                returns += np.where(alive, rewards, 0.0)
                if "doubt" in infos:
                    doubts = True
                    doubt += np.where(alive, infos["doubt"], 0.0)
                lengths += alive
                dreamt += alive
                alive &= ~(terminated | truncated)
    finally:
        envs.close()
    doubt /= np.maximum(dreamt, 1)
    parts = [slice(index * episodes, (index + 1) * episodes) for index in range(len(policies))]
    return [Episodes(returns[rows], lengths[rows], doubt[rows] if doubts else None) for rows in parts]


def dream_recorded(
    model: WorldModel, policy: Policy, data: TrajectoryDataset, task: str, copies: int = 4
) -> tuple[Episodes, NDArray[np.float64]]:
    """Dreams of a policy from the first frames of its own recorded episodes.

    Args:
        model: A model of sensors.
        policy: Acted in the data, on all sensors of the body.
        data: The episodes, E, with the ``reward`` of the task.
        task: The task.
        copies: Dreams of each episode.

    Returns:
        The dreams, E · `copies`, and what the recorded episodes earned, [E].

    Raises:
        AimeGymError: If the episodes have no more than one frame, or the model does not decode what the policy sees.
    """
    body = model.config.body
    shortest = int((data.bounds[:, 1] - data.bounds[:, 0]).min())
    if shortest < 2:
        raise AimeGymError(f"A dream needs episodes of two frames or more; got one of {shortest}.")
    frames, count = min(FRAMES, shortest - 1), len(data) * copies
    episodes = [data[index] for index in range(len(data)) for _ in range(copies)]
    stacked = {
        name: np.stack([episode[name][:frames] for episode in episodes], 1)
        for name in dict.fromkeys([*model.observed, "pre_action", "reward", *(s.name for s in body.observed("mdp"))])
    }
    seeds, state = [SEED + index for index in range(count)], None
    if hasattr(policy, "begin"):
        policy.begin(seeds)
    for step in range(frames - 1):
        seen = np.concatenate([stacked[sensor.name][step] for sensor in body.observed("mdp")], -1)
        _, state = policy.predict(seen, state, np.full(count, not step), True)
    begun = _Begun(
        {name: stacked[name] for name in model.observed},
        stacked["pre_action"][1:].astype(np.float32),
        state,
        stacked["reward"][1:].reshape(frames - 1, count).sum(0, dtype=np.float64),
        np.full(count, frames - 1),
        np.ones(count, bool),
    )
    (dream,) = _dream_on(model, body, task, [policy], [begun], seeds, data.longest - 1)
    return dream, np.array([data[index]["reward"].sum(dtype=np.float64) for index in range(len(data))])


@dataclass
class _Begun:
    """The first moments of E real episodes of one policy."""

    frames: dict[str, np.ndarray]
    """What the model observes: sensor -> [FRAMES, E, ...]."""
    actions: NDArray[np.float32]
    """The actions between the frames, [FRAMES - 1, E, A]."""
    state: Any
    """The policy's own state."""
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    alive: NDArray[np.bool_]


def _begin_all(
    model: WorldModel, body: Embodiment, task: str, members: Sequence[Stranger], seeds: list[int]
) -> list[_Begun]:
    """The first moments of real episodes with these seeds, of each policy."""
    images: dict[str, Any] = {"render_mode": "rgb_array", "width": IMAGE_SIZE, "height": IMAGE_SIZE, **drawn_as(model)}
    envs = make_real_envs(body.name, len(seeds), task=task, **images if "image" in model.observed else {})
    try:
        return [_begin(model, body, member, envs, seeds) for member in members]
    finally:
        envs.close()


def _begin(model: WorldModel, body: Embodiment, member: Stranger, envs: VectorEnv, seeds: list[int]) -> _Begun:
    """Acts in the real env until the model has seen enough."""
    count, looks = len(seeds), "image" in model.observed
    returns, lengths, alive = np.zeros(count), np.zeros(count, np.int64), np.ones(count, bool)
    observation, _ = envs.reset(seed=seeds)  # type: ignore[arg-type]  # Gymnasium takes lists
    if hasattr(member.policy, "begin"):
        member.policy.begin(seeds)
    state, acts, seen, images = None, [], [np.array(observation)], [_images(envs)] if looks else []
    for step in range(FRAMES - 1):
        actions, state = member.policy.predict(observation, state, np.full(count, not step), True)
        observation, rewards, terminated, truncated, _ = envs.step(actions)
        returns += np.where(alive, rewards, 0.0)
        lengths += alive
        alive &= ~(terminated | truncated)
        acts.append(to_vectors(np.array(actions), body).astype(np.float32))
        seen.append(np.array(observation))
        images += [_images(envs)] if looks else []
    readings = to_sensors(body.observed("mdp"), np.stack(seen))
    frames = {name: np.stack(images) if name == "image" else readings[name] for name in model.observed}
    return _Begun(frames, np.stack(acts), state, returns, lengths, alive)


def _images(envs: VectorEnv) -> np.ndarray:
    """What the real envs look like, [E, 64, 64, 3] uint8."""
    pictures: Any = envs.render()
    return np.stack(pictures)


CARD = "README.md"

SECTION = "## What its dreams are worth"

BEGIN, END = "<!-- strangers: written by aime-gym compare --strangers -->", "<!-- strangers: end -->"


def write_card(folder: Path) -> Path:
    """Writes what trust.json tells of strangers between its marks in a model's card; the rest of it stays.

    Without the marks they are put at the beginning of the section `SECTION`, which is appended where there is none.

    Args:
        folder: The folder of the model.

    Returns:
        The path of the card.

    Raises:
        AimeGymError: If trust.json is broken or the disk full.
    """
    measured = {task: trust for task, trust in load_trust(folder).items() if trust.strangers is not None}
    path = folder / CARD
    card = path.read_text() if path.exists() else f"# {folder.name}\n"
    lines = [BEGIN, "", "### To strangers", "", _INTRODUCTION]
    for task, trust in measured.items():
        lines += ["", _of_task(task, trust)]
    lines += ["", "### To its kin", ""] if any(trust.kin for trust in measured.values()) else [""]
    block = "\n".join([*lines, END])
    if BEGIN in card and END in card:
        begin, end = card.index(BEGIN), card.index(END) + len(END)
        card = card[:begin] + block + card[end:]
    elif re.search(rf"^{SECTION}$", card, re.MULTILINE):
        card = re.sub(rf"^{SECTION}$", lambda found: f"{found[0]}\n\n{block}", card, count=1, flags=re.MULTILINE)
    else:
        card = f"{card.rstrip()}\n\n{SECTION}\n\n{block}\n"
    return write_atomically(path, card)


_INTRODUCTION = (
    "Policies that learned by means that have collected none of the model's data. Each dream begins with the first\n"
    "moments of the real episode that it is compared with. 95% intervals are by a bootstrap over runs, errors\n"
    "in units of return, and bias is dream minus real."
)


def _of_task(task: str, trust: Trust) -> str:
    of = trust.strangers or {}
    low, high = of["range"]
    verdict = {
        "trusted": "Its dreams are trusted",
        "wrong": "Its dreams are not trusted",
        "inconclusive": f"Nothing follows from it, as they say too little ({trust.lacks})",
    }[trust.finding]
    unseen = {name: group for name, group in of["families"].items() if name not in of["seen"]}
    apart = {f"{name} (seen)": of["families"][name] for name in of["seen"]}
    rows = [_row(name, group) for name, group in {"**all unseen**": of, **unseen, **apart}.items()]
    return "\n".join(
        [
            f"**{task}**: {of['policies']} policies of {of['runs']} runs, {of['episodes']} episodes each"
            f"{f', which learned from the reward of {learn}' if (learn := of.get('learn')) else ''}. {verdict}.",
            f"The mean error is {trust.relative_error:.0%} of the range from the return of random actions, {low:.0f}, "
            f"to the best known, {high:.0f}",
            f"(trusted up to {MOST_ERROR:.0%}). Real returns span {of['span']:.0%} of it, and "
            f"{', '.join(f'{third:.0%}' for third in of['thirds'])} of the policies are in its thirds.",
            f"Set `{of['set'][:16]}`, weights `{str(of['model'])[:16]}`."
            + "".join(f" Left out: {run}, which {why}." for run, why in of.get("left_out", {}).items()),
            "",
            "| strangers | policies | runs | Spearman | Pearson | mean error | bias |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _row(name: str, of: Mapping[str, Any]) -> str:
    cells = [
        _cell(of, key, spec)
        for key, spec in (("spearman", ".2f"), ("pearson", ".2f"), ("mean_absolute_error", ".0f"), ("bias", "+.0f"))
    ]
    return "| " + " | ".join([name, str(of["policies"]), str(of["runs"]), *cells]) + " |"


def _cell(of: Mapping[str, Any], key: str, spec: str) -> str:
    ends = of["intervals"].get(key, {}).get("95")
    interval = f" [{ends[0]:{spec}}, {ends[1]:{spec}}]" if ends else ""
    return "-" if of[key] is None else f"{of[key]:{spec}}{interval}"
