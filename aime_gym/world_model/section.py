"""Keys and values of a config, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aime_gym.errors import AimeGymError, unknown_name

LARGEST = 1_000_000
"""Of sizes: far more than any model has, and too little to take long."""
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
