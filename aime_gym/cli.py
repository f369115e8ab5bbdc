"""The command line: `aime-gym COMMAND ...`. Every command is a dataclass of `aime_gym.commands`."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from aime_gym import __version__
from aime_gym.bodies.body import EMBODIMENTS
from aime_gym.bodies.lookup import get_embodiment, is_gymnasium_id
from aime_gym.errors import (
    INTERRUPTED,
    TERMINATED,
    AimeGymError,
    Terminated,
    sigterm_raises,
    suggestion,
    unknown_name,
)

RENAMED = MappingProxyType({"--uncertainty-penalty": "--doubt-penalty", "--max-disagreement": "--max-doubt"})
"""Old name of a flag -> its name now; the old ones still work, for one more release."""
_PACKAGE = __name__.partition(".")[0]

_IMPORT = re.compile(
    r"(?P<told>'(?P<env>[^']+)' is named in a file, and files import nothing): `import (?P<package>[\w.]+)` first if "
    r"you trust it, or name the env yourself \(--embodiment, or real= of register_dream\)\."
)
"""The advice of `get_embodiment` to users of Python, which `in_flags` puts into words for the shell."""


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
    """Checks the names of bodies, but not ids of Gymnasium's kind, which only their own package knows.

    Args:
        command: Its name.
        positional: See `positional_of`.
        words: The words after the command.

    Raises:
        AimeGymError: If there is no such body, with the nearest; or where one is named that a flag should name.
    """
    flags = "--embodiment", "--body"
    named = [after for word, after in pairwise(words) if word in flags]
    named += [word.partition("=")[2] for word in words if word.startswith(tuple(f"{flag}=" for flag in flags))]
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
        words: The words after the command.

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
        message: The message of an error.
        command: The command's name.
        flags: The command's flags, positional arguments included.
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


class Command(NamedTuple):
    """Where a command lives, as a string, so that listing commands imports none of them."""

    module: str
    dataclass: str
    summary: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "dream": Command("aime_gym.commands.dream", "Dream", "train an agent in the dream, compare, report"),
        "compare": Command("aime_gym.commands.compare", "Compare", "evaluate agents in the dream and the real env"),
        "play": Command("aime_gym.commands.play", "Play", "act in the dream and the real env at once"),
        "collect": Command("aime_gym.commands.collect", "Collect", "collect trajectories in the real env"),
        "render": Command("aime_gym.commands.data_sets", "Render", "add images to trajectories"),
        "pretrain": Command("aime_gym.commands.pretrain", "Pretrain", "make a world model from nothing, in rounds"),
        "pretrain-small": Command(
            "aime_gym.commands.pretrain", "PretrainSmall", "the same for a body with few joints, in an hour"
        ),
        "train": Command("aime_gym.commands.train", "Train", "train a world model on trajectories, then its heads"),
        "refine": Command("aime_gym.commands.train", "Refine", "correct a model by a few episodes of a policy"),
        "imitate": Command("aime_gym.commands.imitate", "Imitate", "imitate demonstrations that lack actions"),
        "demonstrations": Command(
            "aime_gym.commands.imitate", "Demonstrations", "make demonstrations of files, and ask a model about them"
        ),
        "film": Command("aime_gym.commands.play", "Film", "film a dream of recorded actions beside the truth"),
        "import": Command("aime_gym.commands.data_sets", "Import", "make a data set of npz or HDF5 files"),
        "mix": Command(
            "aime_gym.commands.data_sets", "Mix", "make one data set of several, or demonstrations without actions"
        ),
        "to-minari": Command("aime_gym.commands.data_sets", "ToMinari", "write trajectories as a Minari data set"),
        "fit-heads": Command("aime_gym.commands.train", "FitHeads", "fit reward and other heads for a model"),
        "strangers": Command(
            "aime_gym.commands.strangers", "Strangers", "train policies in the real env that judge dreams"
        ),
        "explain": Command("aime_gym.commands.compare", "Explain", "say why dreams err about policies, share by share"),
        "score": Command("aime_gym.commands.score", "Score", "say what a model's dreams are worth, on one page"),
        "doctor": Command("aime_gym.commands.doctor", "Doctor", "say what is installed, what works, and what to do"),
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and turns what goes wrong into one clear line on stderr.

    Args:
        arguments: The words after the program's name; by default those of the process.

    Returns:
        The exit code: 0, 1 (the machine failed: a file, a missing package), 2 (the input was wrong), 130 (Ctrl-C) or
        143 (SIGTERM).

    Raises:
        SystemExit: From a command's ``--help`` or its parser (code 2), or with a command's own exit code.
    """
    try:
        with sigterm_raises():
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except AimeGymError as error:
        # Several processes that train together refuse the same: the first one on each machine says it.
        return _fail(str(error), 2) if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    except Terminated:
        return _fail("Ended by SIGTERM.", TERMINATED)
    except KeyboardInterrupt:
        return _fail("Interrupted.", INTERRUPTED)
    except BrokenPipeError:
        _settle_stdout()  # the reader left, as in `aime-gym --help | head -1`
        return 1
    except ImportError as error:
        return _fail(f"{error}. `aime-gym doctor` says what is missing and how to install it.", 1)
    except OSError as error:
        _settle_stdout()
        return _fail(describe(error), 1)


def describe(error: OSError) -> str:
    """What a failed file operation means to a user: the path, the reason, and the remedy where one is known."""
    where = f"{error.filename}: " if error.filename is not None else ""
    remedy = {
        errno.ENOSPC: " Free some space, or choose a folder on another disk with --out.",
        errno.EDQUOT: " Free some space, or choose a folder on another disk with --out.",
        errno.EFBIG: " `ulimit -f` says how large a file may grow: raise it.",
        errno.EACCES: " Check the permissions, or choose another folder with --out.",
        errno.EPERM: " Check the permissions, or choose another folder with --out.",
        errno.EROFS: " Choose a folder that can be written with --out.",
    }.get(error.errno or 0, "")
    return f"{where}{str(error.strerror or error).rstrip('.')}.{remedy}"


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"aime-gym {__version__}: pretrained world models as Gymnasium environments.",
            "",
            "usage: aime-gym COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "`aime-gym COMMAND --help` lists a command's options. `aime-gym --version` prints the version.",
        ]
    )


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, *options = map(_by_new_name, words)
    if name == "--version":
        print(__version__)
        return 0
    if name.startswith("-"):
        raise unknown_name("option", name, ("--help", "--version"))
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    command = COMMANDS[name]
    flags = flags_of(command.module, command.dataclass)
    positional = positional_of(command.module, command.dataclass)
    if "-h" not in options and "--help" not in options:
        check_flag_names(name, flags, options)
        check_bodies(name, positional, options)
    if "" not in sys.path:  # the current folder, where envs of one's own may be: a console script does not look there
        sys.path.append("")
    # Only the chosen command is imported: the list is quick, and the doctor runs where torch does not.
    import tyro

    job: Any = getattr(importlib.import_module(command.module), command.dataclass)
    try:
        with _unindented_descriptions():
            chosen = tyro.cli(job, prog=f"aime-gym {name}", args=options)
        chosen.run()
    except AimeGymError as error:
        raise AimeGymError(in_flags(str(error), name, {*flags, f"--{positional}"})) from error
    return 0


@contextmanager
def _unindented_descriptions() -> Iterator[None]:
    """The lines of an option's description are indented, as they stand in a class: tyro would break sentences there."""
    import docstring_parser

    parse: Any = docstring_parser.parse_from_object

    def parse_unindented(component: Any, *rest: Any, **keywords: Any) -> Any:
        told = parse(component, *rest, **keywords)
        for option in told.params:
            option.description = option.description and inspect.cleandoc(option.description)
        return told

    docstring_parser.parse_from_object = parse_unindented  # type: ignore[assignment]  # it takes what the other takes
    try:
        yield
    finally:
        docstring_parser.parse_from_object = parse


def _by_new_name(word: str) -> str:
    """The word of a command line, with a renamed flag under its new name."""
    flag, equals, value = word.partition("=")
    old = flag.replace("_", "-")
    if old not in RENAMED:
        return word
    print(f"aime-gym: {old} is now called {RENAMED[old]}; the old name works for one more release.", file=sys.stderr)
    return RENAMED[old] + equals + value


def _fail(message: str, code: int) -> int:
    print(f"aime-gym: {message}", file=sys.stderr)
    return code


def _settle_stdout() -> None:
    """Writes what is buffered, or gives it up, so that the interpreter's own flush at exit does not fail once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
