"""Data that were logged elsewhere, without an env of ours: arrays become trajectories, and what they show a body."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from aime_gym.bodies.body import EMBODIMENTS, OWN_TASK, Embodiment
from aime_gym.bodies.lookup import ONLY_SENSOR, Reader, body_of_spaces, from_own_actions, get_embodiment, make_foreign
from aime_gym.data.trajectories import (
    LARGEST,
    ROUNDING,
    Trajectory,
    body_document,
    metadata_to_go_on,
    save_trajectory,
    trajectory_paths,
    write_metadata,
)
from aime_gym.errors import AimeGymError
from aime_gym.parallel import claimed

MOST_PROBLEMS = 20
"""Kinds of problems that one error lists."""


class Source(NamedTuple):
    """Rows as they were logged, of one episode or of several with their ends marked; see `from_arrays`."""

    told: str
    """What errors call it, e.g. ``"episode 3"``; empty where there is one source alone."""
    observations: Any
    actions: Any
    rewards: Any
    terminations: Any = None
    truncations: Any = None
    next_observations: Any = None
    names: Mapping[str, str] = {}
    """What errors call its parts, by the names of the arguments of `from_arrays`; those themselves by default."""


def from_arrays(
    observations: Any,
    actions: Any,
    rewards: Any,
    terminations: Any = None,
    truncations: Any = None,
    next_observations: Any = None,
    *,
    out: str | Path = "datasets/logged",
    name: str | None = None,
    env: str | None = None,
    action_space: gymnasium.Space | None = None,
) -> Path:
    """Writes logged arrays as a data set that `aime_gym.Train` and `aime-gym train` take. No env is needed.

    Either every argument is a list with an entry for each episode, of any lengths L, or every argument is one flat
    array in which `terminations` and `truncations` mark the last row of each episode.

    Row t of `actions` is what was done when row t of `observations` was seen, and row t of `rewards` what came of it.
    An episode of a list can have L + 1 observations, the last one of which is what its last action led to. Otherwise
    `next_observations` tells that. Without either, the last action of an episode is left out, but for one that ended
    the episode by a termination: it then leads to the observation that was seen last, so that its reward is kept.

    Example:
        >>> import numpy as np
        >>> from aime_gym.data import from_arrays
        >>> rng = np.random.default_rng(0)
        >>> lengths = [30, 50, 40]
        >>> folder = from_arrays(
        ...     [{"angles": rng.normal(size=(n + 1, 3)), "speed": rng.normal(size=(n + 1, 1))} for n in lengths],
        ...     [rng.uniform(-30, 30, (n, 2)) for n in lengths],  # torques
        ...     [rng.normal(size=n) for n in lengths],
        ...     out="datasets/robot",
        ... )
        >>> sorted(path.name for path in folder.iterdir() if path.suffix == ".npz")
        ['0.npz', '1.npz', '2.npz']

    Args:
        observations: [L, ...] or [L + 1, ...] numbers, or a dict of such by name; bytes [.., H, W, 3] are pictures.
        actions: [L, ...] numbers of any range.
        rewards: [L] numbers.
        terminations: [L] bool, where the world ended an episode; of an episode of a list also one bool. By default
            nothing ends so.
        truncations: [L] bool, where an episode was cut.
        next_observations: [L, ...], as `observations`.
        out: The folder to write. One that holds the same data already stays as it is.
        name: What the body is called; the name of the folder by default.
        env: The id of the Gymnasium env that the data are of, if there is one: models of them can then be compared with
            it. By default they are known by their data alone.
        action_space: What bounds the actions: models know them as numbers in [-1, 1], to which they are scaled. By
            default from the lowest to the highest in the data, those of `env` where that is given.

    Returns:
        The folder.

    Raises:
        AimeGymError: If something cannot be used. The message lists all problems; nothing is written then.
    """
    given = (observations, actions, rewards, terminations, truncations, next_observations)
    parts = dict(zip(Source._fields[1:-1], given, strict=True))
    problems: list[str] = []
    sources = _episodes(parts, problems) if _are_episodes(actions, rewards) else [Source("", **parts)]
    return write_logged(sources, out, name, env, action_space, problems)


def write_logged(
    sources: Sequence[Source],
    out: str | Path,
    name: str | None = None,
    env: str | None = None,
    action_space: gymnasium.Space | None = None,
    problems: Sequence[str] = (),
) -> Path:
    """Does what `from_arrays` does with sources of any kind; `problems` are those that are known already."""
    out, problems = Path(out), list(problems)
    tables = [table for source in sources if (table := _table(source, problems)) is not None]
    _compare(tables, problems)
    episodes = [episode for table in tables for episode in _cut(table, problems)]
    if not problems and len(episodes) < 2:
        problems.append(
            f"Two episodes or more are needed, some to train on and some to judge by; there is {len(episodes)}. Mark "
            "where episodes end; a long log can be cut anywhere, as by truncations[999::1000] = True."
        )
    body: Embodiment | None = None
    own: Any = None
    if not problems:
        body, reader, own = _body(name or out.resolve().name, env, action_space, tables, problems)
    _refuse(problems)
    assert body is not None
    assert own is not None
    trajectories = [_trajectory(episode, reader, own) for episode in episodes]
    content = _digest(trajectories)
    known = {} if body.logged_range is None else {"body": body_document(body)}
    metadata = {"embodiment": body.name, **known, "task": OWN_TASK, "policy": "logged", "content": content}
    with claimed(out):
        before = metadata_to_go_on(out)
        if before and before != metadata:
            raise AimeGymError(f"{out} holds another data set: choose another folder (out), or delete it.")
        if len(trajectory_paths(out)) < len(trajectories):
            write_metadata(out, metadata)
            for index, trajectory in enumerate(trajectories):
                save_trajectory(out, index, trajectory)
    return out


@dataclass
class _Table:
    """A source as arrays that fit together."""

    told: str
    observations: dict[str, np.ndarray]
    """[L, ...] or [L + 1, ...] each."""
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    ends: np.ndarray
    following: dict[str, np.ndarray] | None


class _Episode(NamedTuple):
    """L steps, and what was seen before each and after the last: [L + 1, ...]."""

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def _are_episodes(actions: Any, rewards: Any) -> bool:
    """Whether arguments are lists of episodes, not flat arrays."""
    if isinstance(actions, np.ndarray) and actions.dtype != object:
        return actions.ndim > 2 and np.ndim(rewards) == 2
    first = next(
        (part[0] for part in (rewards, actions) if isinstance(part, Sequence | np.ndarray) and len(part)), None
    )
    return isinstance(first, Sequence | np.ndarray) and (rewards is not None or np.ndim(first[0]) > 0)


def _episodes(parts: Mapping[str, Any], problems: list[str]) -> list[Source]:
    """A source for each episode of lists, the observations of which may also be a dict of lists."""
    lists: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, Mapping):
            alike = len({len(own) for own in part.values()}) == 1
            columns = [dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=False)]
            lists[name] = columns if alike else None
        elif part is not None:
            lists[name] = part
    counts = {name: len(part) if hasattr(part, "__len__") else None for name, part in lists.items()}
    missing = [name for name in ("observations", "actions", "rewards") if name not in lists]
    problems += [f"{name} is missing." for name in missing]
    if len(set(counts.values())) > 1 or None in counts.values():
        told = ", ".join(f"{name} {'no list' if count is None else count}" for name, count in counts.items())
        problems.append(f"Expected lists of as many episodes each; got {told}.")
    if missing or len(set(counts.values())) > 1 or None in counts.values():
        return []
    rows = zip(*lists.values(), strict=True)
    return [Source(f"episode {i}", **dict(zip(lists, row, strict=True))) for i, row in enumerate(rows)]


def _table(source: Source, problems: list[str]) -> _Table | None:
    """The source as arrays; None where it has problems, all of which are added to `problems`."""
    found = len(problems)

    def tell(problem: str) -> None:
        problems.append(f"{source.told}: {problem}" if source.told else problem)

    def called(name: str) -> str:
        return source.names.get(name, name)

    def column(name: str, of: str, part: Any) -> np.ndarray | None:
        """One part as numbers with a row a step."""
        try:
            array = np.asarray(part)
        except ValueError:
            array = np.array(None)
        if array.dtype.kind not in "fiub" or not array.ndim:
            kind = type(part).__name__ if array.dtype == object else f"{array.dtype} {list(array.shape)}"
            tell(f"{of} should be numbers, with a row a step; got {kind}.")
            return None
        if array.dtype.kind == "f" and (wrong := ~(np.abs(array) <= LARGEST)).any():
            place = np.argwhere(wrong)[0].tolist()
            more = f", and {wrong.sum() - 1} more are" if wrong.sum() > 1 else ""
            said = "" if np.isnan(array[tuple(place)]) else f"; numbers up to {LARGEST:g} are taken"
            tell(f"row {place[0]} of {of} is {array[tuple(place)]}{more}{said}.")
        return array

    def seen(name: str, part: Any) -> dict[str, np.ndarray] | None:
        if part is None:
            return None
        if not isinstance(part, Mapping):
            part = {"": part}
        elif not part or not all(isinstance(key, str) for key in part):
            tell(f"{called(name)} should be an array or a dict of arrays by name; got {list(part)!r:.80}.")
            return None
        columns = {key: column(name, called(name) + (f"[{key!r}]" if key else ""), own) for key, own in part.items()}
        return {key: own for key, own in columns.items() if own is not None}

    missing = [name for name in ("observations", "actions", "rewards") if getattr(source, name) is None]
    for name in missing:
        remedy = " Where a function pays (reward_fn), zeros do." if name == "rewards" else ""
        tell(f"{called(name)} is missing.{remedy}")
    observations = seen("observations", source.observations)
    following = seen("next_observations", source.next_observations)
    actions, rewards = (
        None if getattr(source, name) is None else column(name, called(name), getattr(source, name))
        for name in ("actions", "rewards")
    )
    length = None if actions is None else len(actions)
    if length == 0:
        tell(f"{called('actions')} has no row.")
        return None
    if rewards is not None and rewards.ndim > 1:
        tell(f"{called('rewards')} should be one number a step, shape [{len(rewards)}]; got {list(rewards.shape)}.")
    elif rewards is not None and length not in (None, len(rewards)):
        tell(f"{called('rewards')} has {len(rewards)} rows where {called('actions')} has {length}.")
    ends = {}
    for name in ("terminations", "truncations"):
        part = getattr(source, name)
        flags = np.zeros(length or 0, bool)
        if part is not None:
            given = np.asarray(part)
            if source.told and given.ndim == 0 and length:
                flags[-1] = bool(given)
            elif given.dtype.kind not in "fiub" or not np.isin(given, (0, 1)).all() or given.ndim != 1:
                tell(
                    f"{called(name)} should be true or false, shape [{length}]; got {given.dtype} {list(given.shape)}."
                )
            elif length not in (None, len(given)):
                tell(f"{called(name)} has {len(given)} rows where {called('actions')} has {length}.")
            else:
                flags = given.astype(bool)
        ends[name] = flags
    for name, columns in (("observations", observations), ("next_observations", following)):
        for key, own in (columns or {}).items():
            allowed = (length, length + 1) if length is not None and name == "observations" else (length,)
            if length is not None and len(own) not in allowed:
                of = called(name) + (f"[{key!r}]" if key else "")
                tell(f"{of} has {len(own)} rows where {called('actions')} has {length}; expected as many, or one more.")
    counts = {len(own) for own in (observations or {}).values()}
    if following is not None and observations is not None:
        one, other = ({key: own.shape[1:] for key, own in columns.items()} for columns in (observations, following))
        if one != other:
            tell(f"{called('next_observations')} has rows of {other}, but {called('observations')} of {one}.")
    if len(problems) > found or observations is None or actions is None or rewards is None or length is None:
        return None
    marked = ends["terminations"] | ends["truncations"]
    if len(counts) > 1 or (counts == {length + 1} and (following is not None or marked[:-1].any())):
        tell(
            f"{called('observations')} has one row more than {called('actions')}, which one episode alone can have: "
            "not with next observations, nor with an end before its last row."
        )
        return None
    return _Table(source.told, observations, actions, rewards, ends["terminations"], marked, following)


def _compare(tables: Sequence[_Table], problems: list[str]) -> None:
    """Adds where tables are not of one kind."""

    def kinds(table: _Table) -> dict[str, Any]:
        seen = {f"observations{key and f'[{key!r}]'}": own.shape[1:] for key, own in table.observations.items()}
        return {"actions": table.actions.shape[1:], **seen}

    for table in tables[1:]:
        first, here = kinds(tables[0]), kinds(table)
        for name in dict.fromkeys([*first, *here]):
            one, other = ("missing" if name not in kind else list(kind[name]) for kind in (first, here))
            if one != other:
                problems.append(f"{table.told}: a row of {name} is {other}, in {tables[0].told} it is {one}.")


def _cut(table: _Table, problems: list[str]) -> Iterator[_Episode]:
    """The episodes of a table."""
    length, begin = len(table.actions), 0
    for end in [*(np.flatnonzero(table.ends[:-1]) + 1).tolist(), length]:
        terminated, rows = bool(table.terminations[end - 1]), slice(begin, end)
        steps = end - begin
        seen = {
            key: own[begin : end + 1] if len(own) > length else own[rows] for key, own in table.observations.items()
        }
        if len(next(iter(table.observations.values()))) == length:
            if table.following is not None:
                seen = {key: np.concatenate([own, table.following[key][end - 1 : end]]) for key, own in seen.items()}
            elif terminated:
                seen = {key: np.concatenate([own, own[-1:]]) for key, own in seen.items()}
            else:
                steps -= 1
        if steps:
            taken = slice(begin, begin + steps)
            yield _Episode(seen, table.actions[taken], table.rewards[taken], terminated)
        elif table.ends[end - 1] or length == 1:  # an end that is not marked may cut an episode anywhere
            where = f"{table.told}: " if table.told else f"row {begin}: "
            problems.append(f"{where}an episode of one row, in which no action is seen to lead anywhere. Leave it out.")
        begin = end


def _body(
    name: str, env: str | None, actions: gymnasium.Space | None, tables: Sequence[_Table], problems: list[str]
) -> tuple[Embodiment | None, Reader, spaces.Box]:
    """The body, what reads its observations, and the space of its own actions."""
    shown = _space(tables)
    low = np.min([table.actions.min(0) for table in tables], 0).astype(np.float64)
    high = np.max([table.actions.max(0) for table in tables], 0).astype(np.float64)
    own = spaces.Box(low, high, dtype=np.float64) if actions is None else actions
    steps = max(len(table.actions) for table in tables)
    body = None
    try:
        if env is not None:
            body, world = get_embodiment(env), make_foreign(env)
            theirs, own = world.observation_space, world.action_space if actions is None else actions
            world.close()
            if not body.foreign:
                raise AimeGymError(f"env is the id of an env of Gymnasium's; got the body {env!r}, which has physics.")
            if (ours := _shapes(shown)) != _shapes(theirs):
                raise AimeGymError(f"{env} shows {_shapes(theirs)}; the observations here are {ours}.")
            shown = theirs
        else:
            if not re.fullmatch(r"[\w ./-]{1,100}", name) or name in EMBODIMENTS or name in gymnasium.registry:
                raise AimeGymError(f"name: expected letters, digits, -, _, . and /, and no body or env; got {name!r}.")
            body = body_of_spaces(name, shown, own, steps)
        reader = Reader(name, shown)
    except AimeGymError as error:
        problems.append(str(error))
        _refuse(problems)
    assert body is not None
    if not isinstance(own, spaces.Box) or own.shape != low.shape or not own.is_bounded():
        problems.append(f"action_space: expected a bounded Box of shape {list(low.shape)}; got {own}.")
        return body, reader, own  # type: ignore[return-value]
    slack = ROUNDING * (own.high.astype(np.float64) - own.low)
    for table in tables:
        outside = (table.actions < own.low - slack) | (table.actions > own.high + slack)
        if outside.any():
            place = np.argwhere(outside)[0].tolist()
            where = f"{table.told}: " if table.told else ""
            problems.append(
                f"{where}row {place[0]} of actions, {table.actions[place[0]]!s:.80}, lies outside {own!s:.80}."
            )
    if env is None:
        body = replace(body, logged_range=(tuple(own.low.ravel().tolist()), tuple(own.high.ravel().tolist())))
    return body, reader, own


def _space(tables: Sequence[_Table]) -> spaces.Space:
    """The space of what tables show."""
    parts: dict[str, spaces.Space] = {}
    for key, first in tables[0].observations.items():
        shape, bounds, dtype = first.shape[1:], (-np.inf, np.inf), np.dtype(np.float32)
        if first.dtype == np.uint8 and len(shape) > 1:
            bounds, dtype = (0, 255), first.dtype
        elif len(shape) > 1 and all(0 <= t.observations[key].min() <= t.observations[key].max() <= 1 for t in tables):
            bounds = (0, 1)
        parts[key] = spaces.Box(*bounds, shape, dtype)  # type: ignore[arg-type]
    return parts[""] if [*parts] == [""] else spaces.Dict(parts)


def _shapes(space: spaces.Space) -> Any:
    parts = space.spaces if isinstance(space, spaces.Dict) else {ONLY_SENSOR: space}
    return {key: list(part.shape or ()) for key, part in sorted(parts.items())}


def _trajectory(episode: _Episode, reader: Reader, space: spaces.Box) -> Trajectory:
    """Rows 0 to L of an episode of L steps, as data sets hold them."""
    seen, rows = episode.observations, len(episode.actions) + 1
    shown = (seen[""][t] if [*seen] == [""] else {key: own[t] for key, own in seen.items()} for t in range(rows))
    read = [reader.read(row) for row in shown]
    actions = from_own_actions(episode.actions, space)
    last = np.arange(rows) == rows - 1
    return {
        **{name: np.stack([row[name] for row in read]) for name in read[0]},
        "pre_action": np.concatenate([np.zeros_like(actions[:1]), actions]).astype(np.float32),
        "reward": np.concatenate([[0.0], episode.rewards.astype(np.float64)]).astype(np.float32)[:, None],
        "is_first": np.arange(rows) == 0,
        "is_last": last,
        "is_terminal": last & episode.terminated,
    }


def _digest(trajectories: Sequence[Trajectory]) -> str:
    digest = hashlib.sha256()
    for trajectory in trajectories:
        for key, array in trajectory.items():
            digest.update(f"{key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _refuse(problems: Sequence[str]) -> None:
    """Raises an `AimeGymError` if there are problems, which lists them."""
    if not problems:
        return
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\d+", "", problem), []).append(problem)
    told = [first + (f" {len(rest)} more like it." if rest else "") for first, *rest in kinds.values()]
    if len(told) == 1:
        raise AimeGymError(told[0])
    listed = "".join(f"\n- {problem}" for problem in told[:MOST_PROBLEMS])
    more = f"\nand {len(told) - MOST_PROBLEMS} of other kinds" if len(told) > MOST_PROBLEMS else ""
    raise AimeGymError(f"These data have several problems:{listed}{more}")
