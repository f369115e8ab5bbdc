"""The command line: `aime-gym COMMAND ...`. Every command is a dataclass in the module that does the work."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from aime_gym import __version__
from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.flag_names import check_bodies, check_flag_names, flags_of, in_flags, positional_of
from aime_gym.interrupts import INTERRUPTED, TERMINATED, Terminated, sigterm_raises


class Command(NamedTuple):
    """Where a command lives, as a string, so that listing commands imports none of them."""

    module: str
    dataclass: str
    summary: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "dream": Command("aime_gym.evaluation.dream_job", "Dream", "train an agent in the dream, compare, report"),
        "compare": Command(
            "aime_gym.evaluation.compare_job", "Compare", "evaluate agents in the dream and the real env"
        ),
        "play": Command("aime_gym.evaluation.play", "Play", "act in the dream and the real env at once"),
        "collect": Command("aime_gym.data.collect", "Collect", "collect trajectories in the real env"),
        "render": Command("aime_gym.data.render", "Render", "add images to trajectories"),
        "pretrain": Command("aime_gym.pretraining", "Pretrain", "make a world model from nothing, in rounds"),
        "pretrain-small": Command(
            "aime_gym.pretraining", "PretrainSmall", "the same for a body with few joints, in half an hour"
        ),
        "train": Command("aime_gym.training.train_job", "Train", "train a world model on trajectories, then its heads"),
        "imitate": Command("aime_gym.evaluation.imitate_job", "Imitate", "imitate demonstrations that lack actions"),
        "film": Command("aime_gym.evaluation.film", "Film", "film a dream of recorded actions beside the truth"),
        "mix": Command("aime_gym.data.mix", "Mix", "make one data set of several, or demonstrations without actions"),
        "to-minari": Command("aime_gym.data.minari_sets", "ToMinari", "write trajectories as a Minari data set"),
        "fit-heads": Command("aime_gym.training.fit_heads_job", "FitHeads", "fit reward and other heads for a model"),
        "strangers": Command(
            "aime_gym.evaluation.strangers_job", "Strangers", "train policies in the real env that judge dreams"
        ),
        "explain": Command(
            "aime_gym.evaluation.explain_job", "Explain", "say why dreams err about policies, share by share"
        ),
        "score": Command("aime_gym.evaluation.score_job", "Score", "say what a model's dreams are worth, on one page"),
        "doctor": Command("aime_gym.doctor", "Doctor", "say what is installed, what works, and what to do"),
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
        return _fail(str(error), 2)
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
    """What a failed file operation means to a user: the path, the reason, and the mend where one is known."""
    where = f"{error.filename}: " if error.filename is not None else ""
    mend = {
        errno.ENOSPC: " Free some space, or choose a folder on another disk with --out.",
        errno.EDQUOT: " Free some space, or choose a folder on another disk with --out.",
        errno.EACCES: " Check the permissions, or choose another folder with --out.",
        errno.EPERM: " Check the permissions, or choose another folder with --out.",
        errno.EROFS: " Choose a folder that can be written with --out.",
    }.get(error.errno or 0, "")
    return f"{where}{str(error.strerror or error).rstrip('.')}.{mend}"


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
    name, *options = words
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
        tyro.cli(job, prog=f"aime-gym {name}", args=options).run()
    except AimeGymError as error:
        raise AimeGymError(in_flags(str(error), name, {*flags, f"--{positional}"})) from error
    return 0


def _fail(message: str, code: int) -> int:
    print(f"aime-gym: {message}", file=sys.stderr)
    return code


def _settle_stdout() -> None:
    """Writes what is buffered, or gives it up, so that the interpreter's own flush at exit does not fail once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
