"""Envs are the same wherever they are stepped: the mixed precision of a training loop around them is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar

import torch

_DEVICES = ("cpu", "cuda")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast() -> Callable[[_Function], _Function]:
    """A decorator: the function runs without its caller's `torch.autocast`."""

    def decorate(function: _Function) -> _Function:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            mixed = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
            if not mixed:
                return function(*args, **kwargs)
            with ExitStack() as stack:
                for device in mixed:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate
