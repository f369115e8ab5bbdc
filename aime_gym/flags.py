"""A command's flags: numbers are checked before its work begins, and what decides it is kept with what it leaves."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from aime_gym.errors import AimeGymError, check_switch
from aime_gym.files import json_text, read_json, write_json
from aime_gym.parallel import join_cluster

CONTENT = "content of "
"""What the names of digests begin with, which say what a run read; runs of older versions have none."""


class Options:
    """What the dataclasses of commands share, as Python makes them, too: text stands for a path, but not for a switch.

    Raises:
        AimeGymError: If a field that is annotated ``bool`` is neither True nor False.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # those that inherit are dataclasses
            value, kind = getattr(self, field.name), str(field.type)
            if kind == "bool":
                check_switch(value, field.name)
            elif "tuple[Path" in kind:
                setattr(self, field.name, tuple(map(Path, [value] if isinstance(value, str | Path) else value)))
            elif "Path" in kind and isinstance(value, str):
                setattr(self, field.name, Path(value))


def check_flags(options: object, least: float, *names: str, prefix: str = "") -> None:
    """Checks that numbers are not too small; those that are None are not given, and words are choices of their own.

    Args:
        options: A command, or a part of one, whose attributes they are.
        least: The smallest number that is allowed.
        *names: Names of the attributes.
        prefix: What the flags of a part begin with, e.g. ``"heads."``.

    Raises:
        AimeGymError: If one is smaller, or not a number; names its flag.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not isinstance(value, str) and not value >= least:  # nor where it is NaN
            raise AimeGymError(f"--{prefix}{name.replace('_', '-')} starts at {least:g}; got {value}.")


def check_workers(options: Any) -> None:
    """Checks ``workers``: a number from 1 on, or ``"ray"`` where this machine belongs to a Ray cluster that runs.

    Raises:
        AimeGymError: If it is neither, or there is no cluster.
    """
    check_flags(options, 1, "workers")
    if options.workers == "ray":
        join_cluster()


def check_above_zero(options: object, *names: str) -> None:
    """Checks that flags are finite numbers larger than 0, as `check_flags` does for integers."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise AimeGymError(f"--{name.replace('_', '-')} is more than 0; got {value}.")


def command_line(options: Any) -> str:
    """The shell command that does what a command's dataclass says, however that was made; defaults are left out.

    Args:
        options: E.g. a `Train`, whose command is ``aime-gym train``.
    """
    kebab = re.sub(r"(?<!^)(?=[A-Z])", "-", type(options).__name__).lower()
    return shlex.join(["aime-gym", kebab, *_words(options)])


def _words(options: Any, defaults: Any = None, prefix: str = "") -> list[str]:
    """Positional arguments and flags; `defaults` are the options of a part where none of them is given."""
    hints = get_type_hints(type(options), include_extras=True)
    positional: list[str] = []
    flags: list[str] = []
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), field.name.replace("_", "-")
        default = getattr(defaults, field.name) if defaults is not None else _default(field)
        words = [str(each) for each in (value if isinstance(value, tuple) else [value])]
        if tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ()):
            positional += words
        elif dataclasses.is_dataclass(value):
            flags += _words(value, default, f"{prefix}{name}.")
        elif value == default:
            continue
        elif isinstance(value, bool):
            flags.append(f"--{prefix}{name}" if value else f"--{prefix}no-{name}")
        else:
            flags += [f"--{prefix}{name}", *words]
    return positional + flags


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def claim_run(path: Path, flags: Mapping[str, Any], free: Container[str] = (), begun: bool = True) -> None:
    """Writes the flags of a run, or compares them with those of the run that is there, which would be resumed.

    Args:
        path: The JSON file in the run's folder.
        flags: What JSON holds, or has a name as a string, as paths do.
        free: Names of those that may differ.
        begun: Whether the run there has left something. One that has not, as its flags were wrong, is forgotten.

    Raises:
        AimeGymError: If others differ, or the file is damaged.
    """
    flags = json.loads(json_text(flags))
    if path.exists():
        there = read_json(path, "the flags of a run", "Choose another folder.")
        if begun:
            check_same_run(path.parent, there, flags, free)
    write_json(path, flags)


def check_same_run(folder: Path, there: Mapping[str, Any], flags: Mapping[str, Any], free: Container[str] = ()) -> None:
    """Checks that a folder's run has the flags of the one that would go on with it.

    Where the run there has not noted a digest, whose name begins with `CONTENT`, it is unknown and may be any.

    Args:
        folder: For the message.
        there: The flags of the run there, as JSON has them.
        flags: The flags of the run that would go on, as JSON has them.
        free: Names of those that may differ.

    Raises:
        AimeGymError: If others differ.
    """
    known = [name for name in flags if name not in free and (name in there or not name.startswith(CONTENT))]
    pairs = {name: (there.get(name), flags[name]) for name in known}
    changed = [f"{name}: {old!r} there, {new!r} now" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise AimeGymError(
            f"{folder} holds a run with other flags ({'; '.join(changed)}). Resume it with its own, or choose another "
            "folder."
        )
