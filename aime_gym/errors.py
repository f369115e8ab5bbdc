"""Errors that a user can fix: what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from numbers import Integral
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class AimeGymError(ValueError):
    """A mistake in the input: the message says what was expected, what came, and the remedy.

    The command line prints it without a traceback and exits with code 2.

    Examples:
        >>> import gymnasium, aime_gym
        >>> try:
        ...     gymnasium.make("AimeDream-Walker-v0", task="wlak")
        ... except aime_gym.AimeGymError as error:
        ...     print(error)
        Unknown task of this model's heads 'wlak'. Did you mean 'walk'? Known: walk, stand, run.
    """


def unknown_name(kind: str, name: object, known: Iterable[str]) -> AimeGymError:
    """Builds the error for a name that is not in a table, suggesting the nearest one.

    Args:
        kind: What the name stands for, e.g. ``"embodiment"``.
        name: What the user gave.
        known: The names that would have been accepted.

    Returns:
        The error, to be raised by the caller.
    """
    known = list(known)
    return AimeGymError(f"Unknown {kind} {name!r}.{suggestion(name, known)} Known: {', '.join(known)}.")


def suggestion(name: object, known: Iterable[str]) -> str:
    """`` Did you mean 'this'?``, with the nearest of the known names; empty if none is near."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


PASSED_THROUGH = frozenset({"aime_gym", "gymnasium", "contextlib", "functools", "stable_baselines3", "torch"})
"""Packages that hold no code of the user: this one, and those through which it is called."""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that led here from outside this package and the libraries through which it is called.

    Args:
        message: What to say.
        category: The kind of warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in PASSED_THROUGH and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def known_keywords(kind: str, renamed: Mapping[str, str] | None = None) -> Callable[[Function], Function]:
    """Decorates a constructor: a keyword that it does not know raises an `AimeGymError`, suggesting the nearest one.

    Args:
        kind: What is constructed, e.g. ``"a dream"``.
        renamed: Old name of a keyword -> its name now. The old one still works, with a `DeprecationWarning`.
    """

    def decorate(constructor: Function) -> Function:
        known = list(inspect.signature(constructor).parameters)[1:]

        @wraps(constructor)
        def checked(self: Any, *args: Any, **keywords: Any) -> Any:
            for old, new in (renamed or {}).items():
                if old in keywords:
                    if new in keywords:
                        raise AimeGymError(f"{old}= is an old name of {new}=: give {new}= alone.")
                    told = f"{old}= is now called {new}=; the old name works for one more release."
                    warn_caller(told, DeprecationWarning)
                    keywords[new] = keywords.pop(old)
            for name in keywords:
                if name not in known:
                    raise unknown_name(f"keyword of {kind}", name, known)
            return constructor(self, *args, **keywords)

        return checked  # type: ignore[return-value]  # it takes what the constructor takes

    return decorate


def check_natural(value: Any, name: str) -> int:
    """`value` if it is an integer from 0 on, else an `AimeGymError`."""
    if not isinstance(value, Integral) or value < 0:
        raise AimeGymError(f"{name} is an integer, 0 or more; got {value!r}.")
    return int(value)


def check_positive(value: Any, name: str) -> int:
    """`value` if it is a positive integer, else an `AimeGymError`."""
    if not isinstance(value, Integral) or value < 1:
        raise AimeGymError(f"{name} is a positive integer; got {value!r}.")
    return int(value)
