"""Pictures of MuJoCo physics. GL is touched at the first picture and never at an import."""

from __future__ import annotations

import atexit
import contextlib
import ctypes.util
import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from numbers import Integral
from queue import SimpleQueue
from typing import Any

import numpy as np

from aime_gym.errors import AimeGymError, check_positive

_MEND = (
    "Install one with `apt-get install libegl1 libegl-mesa0` (MUJOCO_GL=egl) or `apt-get install libosmesa6` "
    "(MUJOCO_GL=osmesa); `aime-gym doctor` tells which work here. Everything but pictures works without."
)

_choosing = threading.RLock()
"""Held while ``MUJOCO_GL`` is not what the user set, and by whoever reads it."""


def import_without_gl(module: str) -> Any:
    """Imports dm_control (or a part of it) without letting it start a GL backend.

    dm_control and MuJoCo choose and initialise GL while they are imported, which warns or fails on machines without a
    display. `MuJoCoRenderer` chooses at the first picture instead, and so do their own renderers afterwards.
    """
    with _choosing:
        if module in sys.modules:
            return sys.modules[module]
        known = set(sys.modules)
        before = os.environ.get("MUJOCO_GL")
        os.environ["MUJOCO_GL"] = "disable"
        try:
            return importlib.import_module(module)
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
    """What this machine lacks for a GL backend, in words; None if it lacks nothing that could be told beforehand."""
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


def forget_current_context() -> None:
    """Makes dm_control's own pictures look anew for the GL context that is current in this thread.

    dm_control remembers which of its contexts it made current last. Where others, such as Gymnasium's MuJoCo envs,
    have made theirs current since, it would draw into those, or free what is in them.
    """
    if module := sys.modules.get("dm_control._render.base"):
        context = module._CURRENT_CONTEXT_FOR_THREAD.pop(threading.current_thread(), None)
        module._CURRENT_THREAD_FOR_CONTEXT.pop(context, None)


class MuJoCoRenderer:
    """Renders dm_control physics off screen, from any thread.

    Args:
        physics: dm_control's `Physics`.
        width: In pixels.
        height: In pixels.
        camera: Its id or its name; 0 follows the body in every suite domain that has such a camera, and -1 looks at
            the whole scene.

    Raises:
        AimeGymError: If there is no such camera, or no GL backend works; the message names the package to install.
    """

    def __init__(self, physics: Any, width: int, height: int, camera: int | str = 0):
        mujoco = import_without_gl("mujoco")
        self._mujoco, self._arguments = mujoco, (physics, width, height, camera)
        self._model, self._data = physics.model.ptr, physics.data.ptr
        self._width, self._height = check_positive(width, "width"), check_positive(height, "height")
        self._camera = self._find_camera(camera)
        # Models bound the off-screen buffer; ours decides its size.
        self._model.vis.global_.offwidth = max(width, self._model.vis.global_.offwidth)
        self._model.vis.global_.offheight = max(height, self._model.vis.global_.offheight)
        self._canvas = _Canvas(choose_backend(), self._model, width, height)
        self._scene = mujoco.MjvScene(self._model, maxgeom=1000)
        self._option = mujoco.MjvOption()

    def __reduce__(self) -> tuple[type[MuJoCoRenderer], tuple[Any, int, int, int | str]]:
        """A copy draws the copy of the physics, in a context of its own."""
        return type(self), self._arguments

    def render(self) -> np.ndarray:
        """The present state of the physics as `[height, width, 3]` uint8.

        Raises:
            AimeGymError: If it was closed, or belongs to a process that this one was forked from.
        """
        return self._canvas.draw(self._draw)

    def _draw(self, context: Any) -> np.ndarray:
        mujoco, viewport = self._mujoco, self._mujoco.MjrRect(0, 0, self._width, self._height)
        mujoco.mjv_updateScene(
            self._model,
            self._data,
            self._option,
            mujoco.MjvPerturb(),
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        for terrain in range(self._model.nhfield):  # may have changed at a reset
            mujoco.mjr_uploadHField(self._model, context, terrain)
        frame = np.empty((self._height, self._width, 3), np.uint8)
        mujoco.mjr_render(viewport, self._scene, context)
        mujoco.mjr_readPixels(frame, None, viewport, context)
        return np.flipud(frame).copy()

    def close(self) -> None:
        """Frees the GL context; more than once is no harm."""
        self._canvas.close()

    def _find_camera(self, camera: int | str) -> Any:
        """The model's camera of that id or name."""
        names = [self._model.camera(i).name for i in range(self._model.ncam)]
        index = names.index(camera) if camera in names else camera
        # MuJoCo ends the process where it is asked for a camera that the model lacks.
        if not isinstance(index, Integral) or not -1 <= index < len(names):
            raise AimeGymError(
                f"camera is one of {', '.join(map(repr, names))}, its id from 0 to {len(names) - 1}, or -1 for the "
                f"whole scene; got {camera!r}."
            )
        found = self._mujoco.MjvCamera()
        if index == -1:
            self._mujoco.mjv_defaultFreeCamera(self._model, found)
        else:
            found.type, found.fixedcamid = self._mujoco.mjtCamera.mjCAMERA_FIXED, index
        return found


class _Canvas:
    """A GL context, and the thread that it lives and dies in.

    GL draws into, and frees, whatever is current in the thread that asks. Who shares a thread shares that with every
    other renderer, with the window of a game, with dm_control's own pictures, and with what garbage collection frees.
    Here nobody shares.

    Args:
        backend: See `choose_backend`.
        model: MuJoCo's, to make textures and meshes of.
        width: In pixels.
        height: In pixels.

    Raises:
        AimeGymError: If the backend does not work, or this process was forked from one that has rendered.
    """

    def __init__(self, backend: str, model: Any, width: int, height: int):
        _check_not_forked()
        self._jobs = SimpleQueue[_Job | None]()
        begun = Future[None]()
        arguments = (backend, model, width, height, begun, self._jobs)
        self._thread = threading.Thread(target=_serve, args=arguments, name=f"GL {backend}", daemon=True)
        self._thread.start()
        try:
            begun.result()
        except Exception as error:  # GL libraries fail in their own ways: ImportError, AttributeError, GLError, ...
            reason = what_lacks(backend) or error
            raise AimeGymError(f"The GL backend {backend!r} does not work here ({reason}). {_MEND}") from error
        # Nobody waits for the thread where garbage is collected: that can be in the midst of anything.
        self._end = weakref.finalize(self, self._jobs.put, None)
        self._end.atexit = False
        _open.add(self)

    def draw(self, job: Callable[[Any], np.ndarray]) -> np.ndarray:
        """What `job` makes of MuJoCo's rendering context, in the thread."""
        _check_not_forked()
        if not self._end.alive:
            raise AimeGymError("This renderer was closed.")
        done = Future[np.ndarray]()
        self._jobs.put((done, job))
        return done.result()

    def close(self) -> None:
        """Frees the context and ends the thread; more than once is no harm."""
        if self._end.detach():  # a call would do nothing while the interpreter ends
            self._jobs.put(None)
        self._thread.join()  # after a fork it has ended for Python


_Job = tuple[Future[np.ndarray], Callable[[Any], np.ndarray]]
_open: weakref.WeakSet[_Canvas] = weakref.WeakSet()
_process: int | None = None
"""That which has rendered: after a fork, which copies this, not the present one."""
_beginning = threading.Lock()


def _serve(
    backend: str, model: Any, width: int, height: int, begun: Future[None], jobs: SimpleQueue[_Job | None]
) -> None:
    """Makes a GL context, draws until None comes, and frees it."""
    global _process
    mujoco = import_without_gl("mujoco")
    try:
        with _beginning:
            gl = importlib.import_module(f"mujoco.{backend}").GLContext(width, height)
            gl.make_current()
            context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
            # MuJoCo and dm_control end the display, which is one, at exit, as each registered with its own first
            # context: what is registered after that runs before.
            atexit.unregister(_close_all)
            atexit.register(_close_all)
            _process = os.getpid()
    except Exception as error:
        begun.set_exception(error)
        return
    begun.set_result(None)
    while (job := jobs.get()) is not None:
        done, draw = job
        try:
            done.set_result(draw(context))
        except Exception as error:
            done.set_exception(error)
        del job, done, draw  # or the renderer would live on in them until the next job
    context.free()
    gl.free()


def _check_not_forked() -> None:
    if _process not in (None, os.getpid()):
        raise AimeGymError(
            "This process was forked from one that has rendered, and GL does not survive that: start processes with "
            "the context 'spawn', as in AsyncVectorEnv(..., context='spawn')."
        )


def _close_all() -> None:
    for canvas in list(_open):
        canvas.close()
