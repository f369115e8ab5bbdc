"""What agents and dreams are worth: returns in both worlds, trust, scores, reports, and how results are shown."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from typing import ClassVar

from rich.console import Console, RenderableType


class Printed:
    """A result that is read as tables: by `print`, in a Python prompt, and as the value of a notebook's cell."""

    _width: ClassVar[int] = 110
    """Characters of a line."""

    def _parts(self) -> Iterable[RenderableType]:
        """What is printed, one below the other."""
        raise NotImplementedError

    def __str__(self) -> str:
        text = io.StringIO()
        # A console in a notebook would show tables there, and give no text.
        console = Console(file=text, width=self._width, force_jupyter=False, force_terminal=False)
        for part in self._parts():
            console.print(part)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip("\n")

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f'<pre style="line-height: 1.2">{html.escape(str(self))}</pre>'
