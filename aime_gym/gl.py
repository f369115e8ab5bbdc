"""Which GL backend this process draws by, and imports of MuJoCo and dm_control that start none."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib
import os
import sys
import threading
from importlib.util import find_spec
from typing import Any

from aime_gym.errors import AimeGymError

_MEND = (
    "Install one with `apt-get install libegl1 libegl-mesa0` (MUJOCO_GL=egl) or `apt-get install libosmesa6` "
    "(MUJOCO_GL=osmesa); `aime-gym doctor` tells which work here. Everything but pictures works without."
)

DM_CONTROL = "pip install --no-deps dm_control" if sys.version_info >= (3, 13) else "pip install dm_control"
"""How to install it: it asks for labmaze, which nothing here needs and which has no build for Python 3.13 or newer."""

NO_DM_CONTROL = (
    f"dm_control, whose real envs and pictures these are, is not installed (`{DM_CONTROL}`); dreams need none"
)


def has_dm_control() -> bool:
    """Whether it is installed, without importing it."""
    return find_spec("dm_control") is not None


_choosing = threading.RLock()
"""Held while ``MUJOCO_GL`` is not what the user set, and while it is read."""


def import_without_gl(module: str) -> Any:
    """Imports dm_control (or a part of it) without letting it start a GL backend.

    dm_control and MuJoCo choose and initialise GL while they are imported, which warns or fails on machines without a
    display. `MuJoCoRenderer` chooses at the first picture instead, and so do their own renderers afterwards.

    Raises:
        AimeGymError: If dm_control is not installed.
    """
    with _choosing:
        if module in sys.modules:
            return sys.modules[module]
        known = set(sys.modules)
        before = os.environ.get("MUJOCO_GL")
        os.environ["MUJOCO_GL"] = "disable"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] == "dm_control":
                raise AimeGymError(f"{NO_DM_CONTROL}.") from error
            raise
        finally:
            if before is None:
                del os.environ["MUJOCO_GL"]
            else:
                os.environ["MUJOCO_GL"] = before
            for name, (attribute, make) in _MAKERS.items():
                if name in sys.modules and name not in known:
                    setattr(sys.modules[name], attribute, make)


def _make_mujoco_context(width: int, height: int) -> Any:
    return importlib.import_module(f"mujoco.{choose_backend()}").GLContext(width, height)


def _make_dm_control_context(*args: Any, **kwargs: Any) -> Any:
    backend = choose_backend()
    package = "dm_control._render" if backend == "glfw" else "dm_control._render.pyopengl"
    names = {"egl": "EGLContext", "osmesa": "OSMesaContext", "glfw": "GLFWContext"}
    if backend not in names:
        raise AimeGymError(f"dm_control renders by {', '.join(names)}; got MUJOCO_GL={backend}.")
    return getattr(importlib.import_module(f"{package}.{backend}_renderer"), names[backend])(*args, **kwargs)


_MAKERS = {
    "mujoco.gl_context": ("GLContext", _make_mujoco_context),
    "mujoco.rendering.classic.gl_context": ("GLContext", _make_mujoco_context),
    "dm_control._render": ("Renderer", _make_dm_control_context),
}
"""What MuJoCo's and dm_control's own pictures begin with, and would lack in a process that imported them without GL."""

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}


def what_lacks(backend: str) -> str | None:
    """What this machine lacks for a GL backend, in words; None if nothing is known to be missing."""
    library = _LIBRARIES.get(backend)
    if library and not ctypes.util.find_library(library):
        return f"the library {library} is not installed"
    if backend == "glfw" and sys.platform.startswith("linux"):
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            return "there is no display"
    return None


def choose_backend() -> str:
    """The GL backend for this process: ``MUJOCO_GL`` if set, else the first that is installed.

    Raises:
        AimeGymError: If none is, or rendering is disabled by ``MUJOCO_GL``.
    """
    with _choosing:
        chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen in ("off", "disable", "disabled", "false", "0"):
        raise AimeGymError(f"Rendering is switched off by MUJOCO_GL={chosen}. Unset it, or set egl or osmesa.")
    if chosen:
        return {"glx": "glfw", "wgl": "glfw", "on": "glfw", "enable": "glfw"}.get(chosen, chosen)
    if sys.platform == "darwin":
        return "cgl"
    if sys.platform == "win32":
        return "glfw"
    for backend in (*_LIBRARIES, "glfw"):
        if not what_lacks(backend):
            return backend
    raise AimeGymError(f"No GL library for rendering was found. {_MEND}")


def settle_backend() -> None:
    """Sets ``MUJOCO_GL`` for this process where it is not set and there is no display.

    Envs of other packages render by MuJoCo and dm_control themselves, which take a window's GL unless told otherwise.
    """
    windows = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    with _choosing, contextlib.suppress(AimeGymError):  # nothing but pictures needs it
        if not windows and not os.environ.get("MUJOCO_GL"):
            os.environ["MUJOCO_GL"] = choose_backend()
