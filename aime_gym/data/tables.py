"""Rows as they were logged, read from files and checked: all that is wrong with them is told at once."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aime_gym.data.trajectories import LARGEST
from aime_gym.errors import AimeGymError
from aime_gym.files import LARGEST_NPZ, npz_names, read_npz, reason

MOST_PROBLEMS = 20
"""Kinds of problems that one error lists."""

NEEDED: Mapping[str, str] = {
    "observations": "",
    "actions": "",
    "rewards": " Where a function pays (reward_fn), zeros do.",
}
"""Arguments of `from_arrays` that cannot be left out, with the remedy."""


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


@dataclass
class Table:
    """A source as arrays that fit together."""

    told: str
    observations: dict[str, np.ndarray]
    """[L, ...] or [L + 1, ...] each."""
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    ends: np.ndarray
    following: dict[str, np.ndarray] | None


class Episode(NamedTuple):
    """L steps, and what was seen before each and after the last: [L + 1, ...]."""

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def checked_table(source: Source, problems: list[str]) -> Table | None:
    """The source as arrays; None where it has problems, all of which are added to `problems`."""
    found = len(problems)

    def tell(problem: str) -> None:
        problems.append(f"{source.told}: {problem}" if source.told else problem)

    def called(name: str) -> str:
        return source.names.get(name, name)

    def column(name: str, of: str, part: Any) -> np.ndarray | None:
        """One part as numbers with a row a step."""
        try:
            array, why = np.asarray(part), ""
        except Exception as error:  # arrays of other libraries fail in ways of their own
            array, why = np.array(None), f" ({reason(error)})"
        if array.dtype.kind not in "fiub" or not array.ndim:
            kind = f"{array.dtype} {list(array.shape)}" if array.ndim or array.dtype != object else type(part).__name__
            tell(f"{of} should be numbers, with a row a step; got {kind}{why}.")
            return None
        if np.ma.is_masked(part):
            tell(
                f"{of} is masked in row {np.argwhere(np.ma.getmaskarray(part))[0, 0]}: fill it, or leave such rows out."
            )
            return None
        if array.dtype.kind == "f" and (wrong := ~(np.abs(array) <= min(LARGEST, np.finfo(array.dtype).max))).any():
            place = np.argwhere(wrong)[0].tolist()
            more = f", and {wrong.sum() - 1} more are" if wrong.sum() > 1 else ""
            said = "" if np.isnan(array[tuple(place)]) else f"; numbers up to {LARGEST:g} are taken"
            tell(f"row {place[0]} of {of} is {array[tuple(place)]}{more}{said}.")
        elif array.dtype.itemsize > 4 and array.size:
            numbers = array.reshape(len(array), -1)
            lost, spread = np.abs(numbers - numbers.astype(np.float32)).max(0), numbers.std(0)
            if (blurred := np.flatnonzero((lost > 0.01 * spread) & (spread > 1e-6))).size:
                first = blurred[0]
                warnings.warn(
                    f"{of} loses {lost[first]:.3g} in float32, in which models work, where it varies by "
                    f"{spread[first]:.3g}: subtract what it begins with.",
                    stacklevel=2,
                )
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

    for name, remedy in NEEDED.items():
        if getattr(source, name) is None:
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
            if source.told and length and given.shape == () and given.dtype.kind in "fiub" and given in (0, 1):
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
        one, other = (
            {key: list(own.shape[1:]) for key, own in columns.items()} for columns in (observations, following)
        )
        if one != other:
            shown, seen_first = (each[""] if [*each] == [""] else each for each in (other, one))
            tell(f"{called('next_observations')} has rows of {shown}, but {called('observations')} of {seen_first}.")
    if len(problems) > found or observations is None or actions is None or rewards is None or length is None:
        return None
    marked = ends["terminations"] | ends["truncations"]
    if len(counts) > 1 or (counts == {length + 1} and (following is not None or marked[:-1].any())):
        tell(
            f"{called('observations')} has one row more than {called('actions')}, which one episode alone can have: "
            "not with next observations, nor with an end before its last row."
        )
        return None
    return Table(source.told, observations, actions, rewards, ends["terminations"], marked, following)


def compare_tables(tables: Sequence[Table], problems: list[str]) -> None:
    """Adds where tables are not of one kind."""

    def kinds(table: Table) -> dict[str, Any]:
        seen = {f"observations{key and f'[{key!r}]'}": own.shape[1:] for key, own in table.observations.items()}
        return {"actions": table.actions.shape[1:], **seen}

    for table in tables[1:]:
        first, here = kinds(tables[0]), kinds(table)
        for name in dict.fromkeys([*first, *here]):
            one, other = ("missing" if name not in kind else list(kind[name]) for kind in (first, here))
            if one != other:
                problems.append(f"{table.told}: a row of {name} is {other}, in {tables[0].told} it is {one}.")


def cut(table: Table, problems: list[str]) -> Iterator[Episode]:
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
            yield Episode(seen, table.actions[taken], table.rewards[taken], terminated)
        elif table.ends[end - 1] or length == 1:  # an end that is not marked may cut an episode anywhere
            where = ": ".join(filter(None, (table.told, f"row {begin}" * (length > 1))))
            problems.append(
                f"{where}: an episode of one row, in which no action is seen to lead anywhere. Leave it out."
            )
        begin = end


def refuse(problems: Sequence[str]) -> None:
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


USUAL: Mapping[str, tuple[str, ...]] = {
    "observations": ("observations", "observation", "observation.state"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward", "next.reward"),
    "terminations": ("terminations", "terminals"),
    "truncations": ("truncations", "timeouts"),
    "next_observations": ("next_observations",),
    "episodes": ("episode_index",),
}
"""What parts are called unless it is said, among others in files of D4RL and LeRobot."""
HDF5, PARQUET = (".hdf5", ".h5"), (".parquet",)


def read_sources(
    paths: Iterable[Path],
    names: Mapping[str, str | Sequence[str] | None],
    problems: list[str],
    needed: Iterable[str] = tuple(NEEDED),
) -> list[Source]:
    """Reads files of logged arrays, each of one episode or of several with their ends marked. Pickles are never loaded.

    Args:
        paths: npz, HDF5 or Parquet files, or folders of LeRobot's data sets, whose Parquet files are read.
        names: What the arguments of `aime_gym.data.from_arrays` are called in them; several for a dict of observations;
            None for what `USUAL` says, if it is there. ``"episodes"`` is the number of the episode that a row is of.
        problems: What cannot be read is added here.
        needed: Which of the arguments have to be there; the others are None where they are not.

    Raises:
        AimeGymError: If a package is needed and not installed.
    """
    sources = []
    for path in (file for named in paths for file in _files_of(named)):
        try:
            there = names_in(path)
            wanted = {
                part: next((usual for usual in USUAL[part] if usual in there), None) if name is None else name
                for part, name in names.items()
            }
            flat = [one for name in wanted.values() for one in ([name] if isinstance(name, str) else name or ())]
            missing = [repr(name) for name in flat if name not in there]
            missing += [" or ".join(map(repr, USUAL[part])) for part in needed if wanted[part] is None]
            if missing:
                raise AimeGymError(f"{path} lacks {', '.join(missing)}; it has {', '.join(map(repr, there)):.300}.")
            read = _read_hdf5 if path.suffix in HDF5 else _read_parquet if path.suffix in PARQUET else read_npz
            arrays = read(path, flat)
        except AimeGymError as error:
            problems.append(str(error))
            continue
        parts = {
            part: None if not name else arrays[name] if isinstance(name, str) else {one: arrays[one] for one in name}
            for part, name in wanted.items()
        }
        called = {part: repr(name) if isinstance(name, str) else "" for part, name in wanted.items() if name}
        episodes = parts.pop("episodes")
        source = Source(str(path), **parts, names=called)
        sources.append(source if episodes is None else _marked(source, episodes, called["episodes"], problems))
    return sources


def _files_of(path: Path) -> list[Path]:
    """The Parquet files in the folder of a LeRobot data set, in their order; else the path itself."""
    return sorted(path.glob("data/**/*.parquet")) if (path / "meta" / "info.json").is_file() else [path]


def _marked(source: Source, episodes: Any, called: str, problems: list[str]) -> Source:
    """The source with an end after the last row of each episode, given the number [L] of the episode of each row."""
    if episodes.ndim != 1 or episodes.dtype.kind not in "iu":
        problems.append(
            f"{source.told}: {called} should be a whole number a row; got {episodes.dtype} {list(episodes.shape)}."
        )
        return source
    ends = np.append(episodes[1:] != episodes[:-1], True)
    if len(np.unique(episodes)) < ends.sum():
        again = next(i for i in np.flatnonzero(ends) + 1 if episodes[i] in episodes[:i])
        problems.append(
            f"{source.told}: the rows of an episode belong together; row {again} of {called} goes back to an earlier "
            "one."
        )
    given = source.truncations
    return source._replace(truncations=ends if given is None or given.shape != ends.shape else ends | (given == 1))


def names_in(path: Path) -> list[str]:
    """The names of the arrays in a file."""
    if path.is_dir():
        raise AimeGymError(f"{path} is a folder, and not one of LeRobot's data sets (meta/info.json): name files.")
    if not path.is_file():
        raise AimeGymError(f"There is no file {path}.")
    if path.suffix == ".npz":
        return npz_names(path)
    if path.suffix in PARQUET:
        parquet = _import("pyarrow.parquet", "parquet")
        try:
            return list(parquet.read_schema(path).names)
        except Exception as error:  # a damaged file makes Arrow fail in any way
            raise AimeGymError(f"{path} is not a readable Parquet file ({reason(error)}).") from error
    if path.suffix not in HDF5:
        raise AimeGymError(f"{path}: expected an npz, HDF5 or Parquet file (.npz, {', '.join((*HDF5, *PARQUET))}).")
    names: list[str] = []
    h5py = _import("h5py", "hdf5")
    try:
        with h5py.File(path, "r") as file:
            # Links are not followed: those to other files would be read, too.
            file.visititems(lambda name, part: names.append(name) if isinstance(part, h5py.Dataset) else None)
    except Exception as error:  # a damaged file makes HDF5 fail in any way
        raise AimeGymError(f"{path} is not a readable HDF5 file ({reason(error)}).") from error
    return names


def _read_hdf5(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with _import("h5py", "hdf5").File(path, "r") as file:
            parts = {name: file[name] for name in names}
            for name, part in parts.items():
                if part.dtype.kind not in "fiub" or not part.shape:
                    raise AimeGymError(
                        f"{path}: {name!r} is {part.dtype} {list(part.shape or ())}; expected numbers in rows."
                    )
                if part.is_virtual or part.external:
                    raise AimeGymError(f"{path}: {name!r} lies in other files, which are not read.")
            _check_size(path, sum(part.nbytes for part in parts.values()))
            return {name: part[()] for name, part in parts.items()}
    except AimeGymError:
        raise
    except Exception as error:  # see above
        raise AimeGymError(f"{path} is not a readable HDF5 file ({reason(error)}).") from error


def _read_parquet(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of numbers, or of lists of numbers that are of one length in all rows."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    size = rows = 0
    try:
        with _import("pyarrow.parquet", "parquet").ParquetFile(path) as file:
            for batch in file.iter_batches(4096, columns=[*names]):  # a row can be large: none takes much at once
                _check_size(path, size := size + batch.nbytes)
                for name in names:
                    parts[name].append(_numbers(batch.column(name), f"{path}: {name!r}", rows))
                rows += len(batch)
        for name, own in parts.items():
            if len({part.shape[1:] for part in own}) > 1:
                raise AimeGymError(f"{path}: {name!r} has lists of several lengths; expected one.")
        return {name: np.concatenate(own) if own else np.zeros(0) for name, own in parts.items()}
    except AimeGymError:
        raise
    except Exception as error:  # see above
        raise AimeGymError(f"{path} is not a readable Parquet file ({reason(error)}).") from error


def _numbers(column: Any, told: str, first: int) -> np.ndarray:
    """A column of Arrow's, whose row 0 is row `first` of the file."""
    types = _import("pyarrow", "parquet").types
    if column.null_count:
        raise AimeGymError(f"{told} is empty in row {first + int(np.argmax(column.is_null().to_numpy(False)))}.")
    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        lengths = column.value_lengths().to_numpy(False)
        if len(other := np.flatnonzero(lengths != lengths[:1])):
            row = f"row {first + int(other[0])} has {lengths[other[0]]} numbers, others {lengths[0]}"
            raise AimeGymError(f"{told} has lists of several lengths; expected one: {row}.")
        inner = column.flatten()
        if inner.null_count:
            lacking = first + int(np.argmax(inner.is_null().to_numpy(False))) // int(lengths[0])
            raise AimeGymError(f"{told} lacks a number in row {lacking}.")
        own = _numbers(inner, told, 0)
        return own.reshape(len(column), *lengths[:1].astype(int), *own.shape[1:])
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise AimeGymError(f"{told} is {kind!s:.80}; expected numbers, or lists of such.")
    return column.to_numpy(zero_copy_only=False)


def _check_size(path: Path, size: int) -> None:
    if size > LARGEST_NPZ:
        most = f"{size / 1e9:.1f} GB; at most {LARGEST_NPZ / 1e9:.1f} are read"
        raise AimeGymError(f"{path}: its arrays take {most}. Split it.")


def _import(package: str, extra: str) -> Any:
    """A package, or an `AimeGymError` that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise AimeGymError(f"{name} is not installed ({error}): pip install 'aime-gym[{extra}]'.") from error
