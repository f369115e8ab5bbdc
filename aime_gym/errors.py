"""Errors that a user can fix (what was expected, what came, and what to do), checks that raise them, and signals."""

from __future__ import annotations

import difflib
import inspect
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from numbers import Integral
from types import FrameType
from typing import Any, TypeVar

import numpy as np

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
        constructor = checked_switches(constructor)

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


def checked_switches(function: Function) -> Function:
    """Decorates a function: its arguments that are annotated ``bool`` are True or False, else an `AimeGymError`.

    Python takes any text for true, ``"no"`` as well.
    """
    parameters = inspect.signature(function).parameters.values()
    switches = {parameter.name: place for place, parameter in enumerate(parameters) if parameter.annotation == "bool"}

    @wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name, place in switches.items():
            if name in keywords:
                check_switch(keywords[name], name)
            elif place < len(args):
                check_switch(args[place], name)
        return function(*args, **keywords)

    return checked  # type: ignore[return-value]  # it takes what the function takes


def check_switch(value: Any, name: str) -> None:
    """Raises an `AimeGymError` unless the value is True or False, NumPy's also."""
    if not isinstance(value, bool | np.bool_):
        raise AimeGymError(f"{name} is True or False; got {value!r}.")


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


LARGEST = 1_000_000
"""The largest size: far more than any model has, and too little to take long."""

_LONGEST = 200
"""Letters of a text, or entries of a list."""


class Section:
    """A mapping of a config; a value that is null or absent is the default.

    Args:
        path: Where the section is, for messages; empty at the top.
        content: Keys and values.
        known: The keys that may occur; None allows all.
        required: The keys that must.

    Raises:
        AimeGymError: If `content` is no mapping, or a key is unknown or missing; so do all readers for bad values.
    """

    def __init__(self, path: str, content: Any, known: Iterable[str] | None, required: Iterable[str] = ()):
        if not isinstance(content, Mapping):
            raise AimeGymError(f"{path or 'config'}: expected keys and values, got {content!r:.80}.")
        self.path, self.content = path, {str(key): value for key, value in content.items()}
        for key in self.content:
            if known is not None and key not in known:
                raise unknown_name("key", self._at(key), sorted(known))
        for key in required:
            if self.content.get(key) is None:
                raise AimeGymError(f"The key {self._at(key)} is missing.")

    def is_null(self, key: str) -> bool:
        """Whether the key is there and set to null."""
        return key in self.content and self.content[key] is None

    def integer(self, key: str, default: int | None, low: int = 1, high: int = LARGEST) -> int:
        """An integer from `low` to `high`."""
        value = self._value(key, default)
        good = is_integer(value, low) and value <= high
        return value if good else self._fail(key, f"an integer from {low} to {high}", value)

    def number(self, key: str, default: float, high: float = 1e9) -> float:
        """A number from 0 to `high`."""
        value = self._value(key, default)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if good and 0 <= value <= high else self._fail(key, f"a number from 0 to {high:g}", value)

    def choice(self, key: str, known: tuple[str, ...], default: str | None = None) -> Any:
        """One of `known`."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in known:
            raise unknown_name(self._at(key), value, known)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._value(key, default)
        return value if isinstance(value, bool) else self._fail(key, "true or false", value)

    def text(self, key: str) -> str:
        """A short text, which must be there."""
        return self._text(key, self.content.get(key))

    def texts(self, key: str) -> list[str]:
        """A list of different short texts."""
        values = self._list(key)
        texts = [self._text(key, value) for value in values]
        return texts if len(set(texts)) == len(texts) else self._fail(key, "different names", values)

    def integers(self, key: str, low: int = 0) -> list[int]:
        """A list of integers of at least `low`."""
        values = self._list(key)
        good = all(is_integer(value, low) for value in values)
        return values if good else self._fail(key, f"integers of at least {low}", values)

    def _text(self, key: str, value: Any) -> str:
        good = isinstance(value, str) and 0 < len(value) <= _LONGEST
        return value if good else self._fail(key, "a short text", value)

    def _list(self, key: str) -> list[Any]:
        value = self._value(key, [])
        good = isinstance(value, list) and len(value) <= _LONGEST
        return value if good else self._fail(key, f"a list of at most {_LONGEST}", value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None else value

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _fail(self, key: str, expected: str, value: object) -> Any:
        raise AimeGymError(f"{self._at(key)}: expected {expected}, got {value!r:.80}.")


def is_integer(value: object, low: int) -> bool:
    """Whether a value is an integer of at least `low` and of a sane size."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= LARGEST


INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

TERMINATED = 143
"""The exit code after SIGTERM, as shells have it."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM; what is saved at Ctrl-C is saved now, too."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """The first SIGTERM raises `Terminated` in the main thread, which alone can take signals; a second one ends it all.

    In other threads nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        raise Terminated

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
