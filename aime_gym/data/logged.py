"""Data that were logged elsewhere, without an env of ours: arrays become trajectories, and what they show a body."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from aime_gym.bodies.body import EMBODIMENTS, OWN_TASK, Choices, Embodiment
from aime_gym.bodies.lookup import (
    ONLY_SENSOR,
    Reader,
    body_document,
    body_of_spaces,
    from_own_actions,
    get_embodiment,
    make_foreign,
    range_of,
)
from aime_gym.bodies.sensors import leaves, renamed
from aime_gym.data.tables import NEEDED, Episode, Source, Table, checked_table, compare_tables, cut, refuse
from aime_gym.data.trajectories import (
    ROUNDING,
    Trajectory,
    metadata_to_go_on,
    save_trajectory,
    trajectory_paths,
    write_metadata,
)
from aime_gym.errors import AimeGymError, warn_caller
from aime_gym.parallel import claimed


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
    observation_space: gymnasium.Space | None = None,
) -> Path:
    """Writes logged arrays as a data set that `aime_gym.Train` and `aime-gym train` take. No env is needed.

    Either every argument is a list with an entry for each episode, of any lengths L, or every argument is one flat
    array in which `terminations` and `truncations` mark the last row of each episode.

    Row t of `actions` is what was done when row t of `observations` was seen, and row t of `rewards` what came of it.
    An episode of a list can have L + 1 observations, the last one of which is what its last action led to. Otherwise
    `next_observations` tells that. Without either, the last action of an episode is left out, but for one that ended
    the episode by a termination: it then leads to the observation that was seen last, so that its reward is kept.

    Examples:
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
        observations: [L, ...] or [L + 1, ...] numbers, or a dict of such by name (names that are none of Python's, such
            as ``"arm.angle"``, become such in data and models, with a warning that says which); bytes [.., H, W, 3] are
            pictures.
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
            default from the lowest to the highest in the data, those of `env` where that is given. Whole numbers that
            are choices are a Discrete, MultiDiscrete or MultiBinary.
        observation_space: The space of what was seen, where whole numbers are choices; of a dict a
            `gymnasium.spaces.Dict` of those parts that are, as ``Dict(gear=Discrete(5))``. The rest are numbers.

    Returns:
        The folder.

    Raises:
        AimeGymError: If something cannot be used. The message lists all problems; nothing is written then.
    """
    given = (observations, actions, rewards, terminations, truncations, next_observations)
    parts = dict(zip(Source._fields[1:-1], given, strict=True))
    problems: list[str] = []
    sources = _episodes(parts, problems) if _are_episodes(actions, rewards) else [Source("", **parts)]
    return write_logged(sources, out, name, env, action_space, observation_space, problems)


def write_logged(
    sources: Sequence[Source],
    out: str | Path,
    name: str | None = None,
    env: str | None = None,
    action_space: gymnasium.Space | None = None,
    observation_space: gymnasium.Space | None = None,
    problems: Sequence[str] = (),
) -> Path:
    """Does what `from_arrays` does with sources of any kind; `problems` are those that are known already."""
    out, problems = Path(out), list(problems)
    tables = [table for source in sources if (table := checked_table(source, problems)) is not None]
    compare_tables(tables, problems)
    episodes = [episode for table in tables for episode in cut(table, problems)]
    if not problems and len(episodes) < 2:
        problems.append(
            f"Two episodes or more are needed, some to train on and some to judge by; there is {len(episodes)}. Mark "
            "where episodes end; a long log can be cut anywhere, as by truncations[999::1000] = True."
        )
    body: Embodiment | None = None
    own: Any = None
    if not problems:
        spaces_told = (action_space, observation_space)
        body, shown, own = _body(name or out.resolve().name, env, *spaces_told, tables, episodes, problems)
    refuse(problems)
    assert body is not None
    assert own is not None
    reader = Reader(body.name, _whole(shown))
    trajectories = [_trajectory(episode, reader, shown, own) for episode in episodes]
    write_set(out, body, {"task": OWN_TASK, "policy": "logged"}, trajectories)
    if told := renamed(body.name, (sensor.name for sensor in body.sensors)):
        warn_caller(told)
    return out


def write_set(out: Path, body: Embodiment, told: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
    """Writes a whole data set; one that holds the same already stays as it is, and one that was begun is completed.

    Args:
        out: The folder.
        body: The body that the data are of.
        told: What else `dataset.json` says.
        trajectories: All of them.

    Raises:
        AimeGymError: If the folder holds another data set.
    """
    known = {} if body.logged_range is None else {"body": body_document(body)}
    metadata = {"embodiment": body.name, **known, **told, "content": _digest(trajectories)}
    with claimed(out):
        before = metadata_to_go_on(out)
        if before and before != metadata:
            raise AimeGymError(f"{out} holds another data set: choose another folder (out), or delete it.")
        if len(trajectory_paths(out)) < len(trajectories):
            write_metadata(out, metadata)
            for index, trajectory in enumerate(trajectories):
                save_trajectory(out, index, trajectory)


def choices_in(
    words: Sequence[str], sources: Sequence[Source], problems: list[str]
) -> tuple[spaces.Space | None, spaces.Space | None]:
    """The spaces of actions and of observations of which some arrays hold choices; None where none does.

    Args:
        words: ``"NAME=4"`` for one choice among 0 to 3 in each number of a row, ``"NAME=3,2"`` for one of 0 to 2 and
            one of 0 and 1, ``"NAME=binary"`` for numbers that are on or off each, and ``"NAME"`` for as many options as
            the data show, or for on and off where they are booleans.
        sources: What was read.
        problems: Words that make no sense are added here.
    """
    action: spaces.Space | None = None
    seen: dict[str, spaces.Space] = {}
    for word in words if sources else ():
        name, _, told = word.partition("=")
        parts = [(key, own) for source in sources for key, called, own in _named(source) if called == name]
        if not re.fullmatch(r"[^=]+(=(\d{1,9}(,\d{1,9})*|binary))?", word):
            problems.append(f"--choices: expected NAME, NAME=4, NAME=3,2 or NAME=binary; got {word!r}.")
        elif not parts:
            names = ", ".join(sorted({repr(called) for source in sources for _, called, _ in _named(source)}))
            problems.append(f"--choices: {name!r} is no action or observation; those are {names}.")
        elif (space := _choices([own for _, own in parts], told)) is None:
            shape = list(parts[0][1].shape[1:])
            problems.append(f"--choices {word}: expected whole numbers from 0 on, a row of shape {shape} of them.")
        elif parts[0][0] is None:
            action = space
        else:
            seen[parts[0][0]] = space
    return action, seen.get("") or (spaces.Dict(seen) if seen else None)


def _named(source: Source) -> list[tuple[str | None, str, np.ndarray]]:
    """Actions (None) and observations by their names: here, and what the file calls them."""
    observed = source.observations
    called = source.names["observations"][1:-1]
    parts = {key: (key, own) for key, own in observed.items()} if called == "" else {"": (called, observed)}
    return [(None, source.names["actions"][1:-1], source.actions), *((key, *own) for key, own in parts.items())]


def _choices(columns: Sequence[np.ndarray], told: str) -> spaces.Space | None:
    """The space of choices in rows of arrays, see `choices_in`; None if that makes no sense."""
    shape = columns[0].shape[1:]
    binary = told == "binary" or (not told and columns[0].dtype == bool)
    counts = np.array([*map(int, told.split(","))]) if told and not binary else np.full(shape, 2)
    if not told and not binary:
        if any(own.shape[1:] != shape or not len(own) or not np.isfinite(own).all() for own in columns):
            return None
        counts = np.max([own.max(0) for own in columns], 0).astype(np.int64) + 1
    if counts.shape not in (shape, (1,)) or counts.min(initial=1) < 1:
        return None
    if not shape:
        return spaces.Discrete(int(counts.max()))
    return spaces.MultiBinary(list(shape)) if binary else spaces.MultiDiscrete(np.broadcast_to(counts, shape).copy())


def _are_episodes(actions: Any, rewards: Any) -> bool:
    """Whether arguments are lists of episodes, not flat arrays."""
    if hasattr(actions, "ndim") and not (isinstance(actions, np.ndarray) and actions.dtype == object):
        choices = np.shape(rewards) == actions.shape != (len(actions), 1)  # [E, L], not [L, 1]
        return np.ndim(rewards) == 2 and (actions.ndim > 2 or choices)
    first: Any = next(
        (part[0] for part in (rewards, actions) if isinstance(part, Sequence | np.ndarray) and len(part)), None
    )
    listed = first.ndim > 0 if hasattr(first, "ndim") else isinstance(first, Sequence)  # also tensors
    return listed and (rewards is not None or (len(first) > 0 and np.ndim(first[0]) > 0))


def _episodes(parts: Mapping[str, Any], problems: list[str]) -> list[Source]:
    """A source for each episode of lists, the observations of which may also be a dict of lists."""
    lists: dict[str, Any] = {}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            lists |= {} if part is None else {name: part}
        elif len({len(own) if hasattr(own, "__len__") else -1 for own in part.values()} | {-1}) == 2:
            lists[name] = [dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True)]
        else:
            lists |= {f"{name}[{key!r}]": own for key, own in part.items()}
    counts = {name: len(part) if hasattr(part, "__len__") else None for name, part in lists.items()}
    missing = [name for name in NEEDED if parts[name] is None]
    problems += [f"{name} is missing.{NEEDED[name]}" for name in missing]
    if len(set(counts.values())) > 1 or None in counts.values():
        told = ", ".join(f"{name} {'no list' if count is None else count}" for name, count in counts.items())
        problems.append(f"Expected lists of as many episodes each; got {told}.")
    if missing or len(set(counts.values())) > 1 or None in counts.values():
        return []
    rows = zip(*lists.values(), strict=True)
    return [Source(f"episode {i}", **dict(zip(lists, row, strict=True))) for i, row in enumerate(rows)]


def _body(
    name: str,
    env: str | None,
    actions: gymnasium.Space | None,
    seen: gymnasium.Space | None,
    tables: Sequence[Table],
    episodes: Sequence[Episode],
    problems: list[str],
) -> tuple[Embodiment, dict[str, spaces.Space], spaces.Space]:
    """The body, the spaces of its observations by name, and that of its own actions."""
    shown = _space(tables)
    low = np.min([table.actions.min(0) for table in tables], 0).astype(np.float64)
    high = np.max([table.actions.max(0) for table in tables], 0).astype(np.float64)
    own: spaces.Space = spaces.Box(low, high, low.shape, np.float64) if actions is None else actions
    if actions is None and env is None and tables[0].actions.dtype.kind in "iub":
        problems.append(
            "actions are whole numbers: give action_space, e.g. gymnasium.spaces.Discrete(n) if they are choices "
            "(--choices of aime-gym import), or make them floats."
        )
    steps = max(len(episode.actions) for episode in episodes)
    body = None
    try:
        if seen is not None and (env is not None or not isinstance(seen, spaces.Space)):
            wanted = "none beside env, which has one" if env is not None else "one of gymnasium.spaces"
            raise AimeGymError(f"observation_space: expected {wanted}; got {seen!r:.80}.")
        if not isinstance(own, spaces.Space):
            raise AimeGymError(f"action_space: expected one of gymnasium.spaces, e.g. Box(low, high); got {own!r:.80}.")
        if env is not None:
            body, world = get_embodiment(env), make_foreign(env)
            theirs, own = world.observation_space, world.action_space if actions is None else actions
            world.close()
            if not body.foreign:
                raise AimeGymError(f"env is the id of an env of Gymnasium's; got the body {env!r}, which has physics.")
            parts: dict[str, spaces.Space] = {"/".join(map(str, path)): part for path, part in leaves(theirs)}
            if (ours := _shapes(shown)) != _shapes(parts):
                raise AimeGymError(f"{env} shows {_shapes(parts)}; the observations here are {ours}.")
            shown = parts
        else:
            shown |= _told(shown, seen, problems)
            fine = isinstance(name, str) and re.fullmatch(r"(?=.*\w)[\w ./-]{1,100}", name)
            if not fine or name in EMBODIMENTS or name in gymnasium.registry:
                raise AimeGymError(
                    f"name: expected letters, digits, spaces, -, _, . and /, and no body or env; got {name!r}."
                )
            body = body_of_spaces(name, _whole(shown), own, steps)
        Reader(name, _whole(shown))  # it says what it cannot read
        _check_choices(tables, shown, problems)
    except AimeGymError as error:
        problems.append(str(error))
        refuse(problems)
    assert body is not None
    if own.shape != low.shape:
        problems.append(
            f"action_space: {own} has elements of shape {list(own.shape or ())}, but actions have rows of shape "
            f"{list(low.shape)}."
        )
        return body, shown, own
    if env is None and isinstance(own, spaces.Box) and not own.is_bounded():
        problems.append(f"action_space: expected a bounded Box; got {own}.")
        return body, shown, own
    ends, bounds = range_of(own) if actions is not None or env is not None else (low.ravel(), high.ravel()), own
    if isinstance(own, spaces.Box):  # in float64, and with what stands in for bounds that it lacks
        low, high = (np.reshape(np.asarray(end, np.float64), low.shape) for end in ends)
        bounds = spaces.Box(low, high, dtype=np.float64)
    for table in tables:
        if len(rows := np.flatnonzero(_outside(table.actions, bounds))):
            where, shown_there = f"{table.told}: " if table.told else "", f"{table.actions[rows[0]]!s:.80}"
            problems.append(f"{where}row {rows[0]} of actions, {shown_there}, lies outside {bounds!s:.80}.")
    told = tuple(map(float, ends[0])), tuple(map(float, ends[1]))
    return body if env is not None else replace(body, logged_range=told), shown, bounds


def _outside(rows: np.ndarray, space: spaces.Space) -> np.ndarray:
    """Which of [L, ...] are not in a space, a Box or `Choices`, [L] bool."""
    if choices := Choices.of(space):
        first = np.asarray(getattr(space, "start", 0), np.float64).reshape(-1)
        away = rows.reshape(len(rows), -1).astype(np.float64) - first
        return ((away % 1 != 0) | (away < 0) | (away >= np.array(choices.counts))).any(1)
    assert isinstance(space, spaces.Box)
    slack = ROUNDING * (space.high - space.low)
    return np.any((rows < space.low - slack) | (rows > space.high + slack), tuple(range(1, rows.ndim)))


def _vectors(actions: np.ndarray, space: spaces.Space) -> np.ndarray:
    """Actions [L, ...] as models know them, [L, A]: a Box becomes [-1, 1], and 0 where it has one number alone."""
    if not isinstance(space, spaces.Box):
        return from_own_actions(actions.astype(np.int64), space)
    away, reach = actions - (space.low / 2 + space.high / 2), space.high / 2 - space.low / 2
    return np.clip(np.divide(away, reach, out=np.zeros_like(away), where=reach > 0), -1, 1).reshape(len(actions), -1)


def _space(tables: Sequence[Table]) -> dict[str, spaces.Space]:
    """The spaces of what tables show, by name: Boxes."""
    parts: dict[str, spaces.Space] = {}
    for key, first in tables[0].observations.items():
        shape, bounds, dtype = first.shape[1:], (-np.inf, np.inf), np.dtype(np.float32)
        if first.dtype == np.uint8 and len(shape) > 1:
            bounds, dtype = (0, 255), first.dtype
        elif len(shape) > 1 and all(0 <= t.observations[key].min() <= t.observations[key].max() <= 1 for t in tables):
            bounds = (0, 1)
        parts[key] = spaces.Box(*bounds, shape, dtype)  # type: ignore[arg-type]
    return parts


def _told(shown: Mapping[str, spaces.Space], seen: spaces.Space | None, problems: list[str]) -> dict[str, spaces.Space]:
    """The spaces that are given for parts of what is shown."""
    if seen is None:
        return {}
    parts = dict(seen.spaces) if isinstance(seen, spaces.Dict) else {"": seen}
    if unknown := [key for key in parts if key not in shown]:
        there = list(shown) if [*shown] != [""] else "one array"
        problems.append(f"observation_space has {unknown!r:.80}; observations are {there!s:.200}.")
    elif (ours := _shapes({key: shown[key] for key in parts})) != _shapes(parts):
        problems.append(f"observation_space has elements of shapes {_shapes(parts)}; observations have {ours}.")
    return parts


def _check_choices(tables: Sequence[Table], shown: Mapping[str, spaces.Space], problems: list[str]) -> None:
    """Adds where choices that are seen are not in their space."""
    for key, table in ((key, table) for key, space in shown.items() if Choices.of(space) for table in tables):
        for name, columns in (("observations", table.observations), ("next_observations", table.following or {})):
            column, space = columns.get(key), shown[key]
            if column is None or column.shape[1:] != space.shape:
                continue  # which has been told
            if len(rows := np.flatnonzero(_outside(column, space))):
                of = f"{table.told}: " * bool(table.told) + f"row {rows[0]} of {name}" + f"[{key!r}]" * bool(key)
                problems.append(f"{of}, {column[rows[0]]!s:.80}, lies outside {space!s:.80}.")


def _whole(parts: Mapping[str, spaces.Space]) -> spaces.Space:
    return parts[""] if [*parts] == [""] else spaces.Dict(parts)  # type: ignore[arg-type]


def _shapes(parts: Mapping[str, spaces.Space]) -> Any:
    return {key or ONLY_SENSOR: list(part.shape or ()) for key, part in sorted(parts.items())}


def _trajectory(
    episode: Episode, reader: Reader, spaces_seen: Mapping[str, spaces.Space], space: spaces.Space
) -> Trajectory:
    """Rows 0 to L of an episode of L steps, as data sets hold them."""
    rows = len(episode.actions) + 1
    seen = {
        key: own.astype(spaces_seen[key].dtype) if Choices.of(spaces_seen[key]) else own
        for key, own in episode.observations.items()
    }
    shown = (seen[""][t] if [*seen] == [""] else {key: own[t] for key, own in seen.items()} for t in range(rows))
    read = [reader.read(row) for row in shown]
    actions = _vectors(episode.actions, space)
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
