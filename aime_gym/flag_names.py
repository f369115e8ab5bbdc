"""The flags of a command, read from its source: a misspelt one is told before torch and others are imported for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from aime_gym.embodiments import EMBODIMENTS, get_embodiment, is_gymnasium_id
from aime_gym.errors import AimeGymError, suggestion

_PACKAGE = __name__.partition(".")[0]
_IMPORT = re.compile(
    r"(?P<told>'(?P<env>[^']+)' is named in a file, and files import nothing): `import (?P<package>[\w.]+)` first if "
    r"you trust it, or name the env yourself \(--embodiment, or real= of register_dream\)\."
)
"""The advice of `get_embodiment` to whoever writes Python."""


def flags_of(module: str, dataclass: str) -> dict[str, bool]:
    """The flags that tyro makes of a dataclass, without importing its module.

    Args:
        module: Where the dataclass is.
        dataclass: Its name; those that it inherits from, and those of its fields, are read as well.

    Returns:
        Flag, such as ``"--train.setup"``, and whether it is a switch, which has a ``"--no-..."`` beside it.
    """
    tree = _parse(module)
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == dataclass)
    flags: dict[str, bool] = {}
    for base in found.bases:
        if place := _place_of_class(module, tree, base):
            flags |= flags_of(*place)
    for field in found.body:
        if not isinstance(field, ast.AnnAssign) or "Positional" in ast.unparse(field.annotation):
            continue
        flag = f"--{field.target.id.replace('_', '-')}"  # type: ignore[union-attr]
        if part := _place_of_class(module, tree, field.annotation):
            flags |= {f"{flag}.{name[2:]}": switch for name, switch in flags_of(*part).items()}
        else:
            flags[flag] = ast.unparse(field.annotation) == "bool"
    return flags


def positional_of(module: str, dataclass: str) -> str | None:
    """The field of a dataclass that takes the first word of a command line, or its words, if there is one."""
    tree = _parse(module)
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == dataclass)
    for field in found.body:
        if isinstance(field, ast.AnnAssign) and "Positional" in ast.unparse(field.annotation):
            return ast.unparse(field.target)
    places = (_place_of_class(module, tree, base) for base in found.bases)
    return next((name for place in places if place and (name := positional_of(*place))), None)


def check_bodies(command: str, positional: str | None, words: Sequence[str]) -> None:
    """Checks the names of bodies, but for ids of Gymnasium's kind, which only the package that they are of knows.

    Args:
        command: Its name.
        positional: See `positional_of`.
        words: Those after the command.

    Raises:
        AimeGymError: If there is no such body, with the nearest; or where one is named that a flag should name.
    """
    named = [after for word, after in pairwise(words) if word == "--embodiment"]
    named += [word.partition("=")[2] for word in words if word.startswith("--embodiment=")]
    first = [word for word in words[:1] if not word.startswith("-")]
    if positional == "embodiment":
        named += first
    elif positional is None and first and first[0] in EMBODIMENTS:
        raise AimeGymError(f"`aime-gym {command}` names the body by a flag: --embodiment {first[0]}.")
    for name in named:
        if not is_gymnasium_id(name):
            get_embodiment(name)


def check_flag_names(command: str, flags: Mapping[str, bool], words: Sequence[str]) -> None:
    """Checks the names of flags, and that switches have no value, which tyro would take for true whatever it says.

    Args:
        command: Its name.
        flags: See `flags_of`.
        words: Those after the command.

    Raises:
        AimeGymError: If one is unknown, with the nearest that is known, or a switch has a value.
    """
    switches = {each: name for name, switch in flags.items() if switch for each in (name, negated(name))}
    known = {*flags, *switches}
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if not name.startswith("--") or name == "--" or name.startswith("--tyro-"):
            continue
        if name not in known:
            raise AimeGymError(
                f"`aime-gym {command}` has no flag {name}.{suggestion(name, known)} `aime-gym {command} --help` lists "
                "all of them."
            )
        if name in switches and (equals or following.lower() in ("true", "false")):
            switch = switches[name]
            raise AimeGymError(f"{switch} is a switch: write {switch} or {negated(switch)}; got {value or following}.")


def in_flags(message: str, command: str, flags: Collection[str]) -> str:
    """A message of the library in the words of a command line: ``model=`` becomes ``--model`` where there is one.

    Args:
        message: Of an error.
        command: The command's name.
        flags: Those that it has, positional arguments included.
    """

    def name_it(found: re.Match[str]) -> str:
        if "--embodiment" in flags:
            return f"{found['told']}: if you trust it, name it yourself as the embodiment: {found['env']}."
        return (
            f"{found['told']}: if you trust it, `python -c 'import {found['package']}, aime_gym.cli; "
            f"aime_gym.cli.main()' {command} ...` imports it first."
        )

    def flag(found: re.Match[str]) -> str:
        name = f"--{found[1].replace('_', '-')}"
        return found[0] if name not in flags else f"{name} " if found[2] else name

    message = _IMPORT.sub(name_it, message)
    message = re.sub(r"(?<![\w./-])([a-z_]+)=(?=(['\"\d])?)", flag, message)
    return re.sub(r"^([a-z_]+)()(?= is a)", flag, message)


def negated(flag: str) -> str:
    """``"--train.no-warm"`` of ``"--train.warm"``."""
    parts = flag[2:].split(".")
    return "--" + ".".join([*parts[:-1], f"no-{parts[-1]}"])


@cache
def _parse(module: str) -> ast.Module:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _place_of_class(module: str, tree: ast.Module, annotation: ast.expr) -> tuple[str, str] | None:
    """The module and name of the class of this package that an annotation names, if it is one."""
    if not isinstance(annotation, ast.Name):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == annotation.id:
            return module, node.name
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_PACKAGE}."):
            for name in node.names:
                if annotation.id == (name.asname or name.name):
                    assert node.module is not None
                    other = _parse(node.module)
                    return _place_of_class(node.module, other, ast.Name(name.name))
    return None
