"""Pictures: MuJoCo's, of the physics of a world, and those of dreams, from physics that a model decodes."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from numbers import Integral
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aime_gym.bodies import tasks
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.sensors import IMAGE_SIZE, Rendering, check_rendering
from aime_gym.errors import AimeGymError, check_positive
from aime_gym.gl import _MEND, choose_backend, import_without_gl, what_lacks
from aime_gym.world_model.fast_dynamics import ImageBytes
from aime_gym.world_model.model import WorldModel


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
        rendering: ``"full"``, as dm_control draws, or ``"fast"``: three times as many frames, which differ by some
            0.1 of 255 on average.

    Raises:
        AimeGymError: If there is no such camera or rendering, or no GL backend works; the message names the package to
            install.
    """

    def __init__(self, physics: Any, width: int, height: int, camera: int | str = 0, rendering: Rendering = "full"):
        check_rendering(rendering)
        mujoco = import_without_gl("mujoco")
        self._mujoco, self._arguments = mujoco, (physics, width, height, camera, rendering)
        self._model, self._data = physics.model.ptr, physics.data.ptr
        self._width, self._height = check_positive(width, "width"), check_positive(height, "height")
        self._camera = self._find_camera(camera)
        # Models bound the off-screen buffer; ours decides its size.
        self._model.vis.global_.offwidth = max(width, self._model.vis.global_.offwidth)
        self._model.vis.global_.offheight = max(height, self._model.vis.global_.offheight)
        with _of_quality(self._model, _FAST if rendering == "fast" else {}):
            self._canvas = _Canvas(choose_backend(), self._model, width, height)
        self._scene = mujoco.MjvScene(self._model, maxgeom=1000)
        self._option = mujoco.MjvOption()

    def __reduce__(self) -> tuple[type[MuJoCoRenderer], tuple[Any, int, int, int | str, Rendering]]:
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
        """Frees the GL context; it may be called more than once."""
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


_FAST = {"shadowsize": 512, "numstacks": 6}
"""Pixels of a side of the shadow map, in place of 2048, and rings of a sphere's or a capsule's mesh, in place of 16.

On a CPU a frame of 64x64 is mostly vertices, each of which is seen four times: by the light, in its shadow, in its
shine and in the floor's mirror. What multisampling or reflections cost cannot be saved unseen."""


@contextlib.contextmanager
def _of_quality(model: Any, quality: Mapping[str, int]) -> Iterator[None]:
    """MuJoCo's model with another quality while a context is made of it, where alone it is read."""
    before = {name: getattr(model.vis.quality, name) for name in quality}
    try:
        for name, value in quality.items():
            setattr(model.vis.quality, name, min(value, before[name]))
        yield
    finally:
        for name, value in before.items():
            setattr(model.vis.quality, name, value)


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
        # Garbage collection, which can run anywhere, must not wait for the thread.
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
        """Frees the context and ends the thread; it may be called more than once."""
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


class NotDrawnError(AimeGymError, TypeError):
    """Dreams of a model cannot be drawn.

    It is a TypeError, too, as of an env that takes no ``render_mode``: Stable-Baselines3, which asks every env that it
    makes by its id to draw, then makes the env without.
    """


def can_be_drawn(model: WorldModel) -> bool:
    """Whether dreams of a model have pictures: those that it decodes, or those of a physics state."""
    return model.decodes_images or (model.heads is not None and model.heads.state is not None)


class DreamPictures:
    """Renders latents; bodies are drawn fast, as nobody learns from these pictures.

    GL is touched at the first picture of a model without images.

    Args:
        model: Decodes an ``"image"``, or has heads that predict the physics state.
        embodiment: Its body.
        width: Width of the frames in pixels; decoded images are enlarged by a whole number.
        height: Height of the frames in pixels.
        images: What decodes images; by default one in float32.

    Raises:
        AimeGymError: If the model has neither.
    """

    def __init__(
        self,
        model: WorldModel,
        embodiment: Embodiment,
        width: int = 320,
        height: int = 240,
        images: ImageBytes | None = None,
    ):
        self._model, self._size = model, (check_positive(width, "width"), check_positive(height, "height"))
        self._images = images or (ImageBytes(model) if model.decodes_images else None)
        if not can_be_drawn(model):
            remedy = "train one on images" if embodiment.foreign else "`aime-gym fit-heads MODEL DATASET` fits one"
            raise NotDrawnError(
                "This model decodes no images and has no head for the physics state, so its dreams cannot be "
                f"rendered: leave render_mode out, or {remedy}."
            )
        self._renderer: MuJoCoRenderer | None = None
        self._positions: list[int] = []
        self.fps = 30
        if embodiment.foreign:
            return
        world = tasks.load(embodiment, embodiment.tasks[0])
        self._physics = world.physics
        self._seconds = world.control_timestep() * embodiment.action_repeat
        self.fps = round(1 / self._seconds)
        self._positions = list(embodiment.translations)
        self._velocities = [self._physics.model.nq + i for i in embodiment.translations.values()]

    @property
    def root_dim(self) -> int:
        """R: coordinates of the root that no sensor sees."""
        return len(self._positions) if self._images is None else 0

    def root(self, physics: np.ndarray) -> np.ndarray:
        """Where the root is in physics states [N, nq + nv (+ na)]: [N, R] float64."""
        return np.asarray(physics, np.float64)[:, self._positions[: self.root_dim]]

    def moved(self, features: Tensor) -> np.ndarray:
        """How far the root moves in one step by the predicted velocities: [N, F] -> [N, R] float64."""
        if not self.root_dim:
            return np.zeros((len(features), 0))
        assert self._model.heads is not None
        physics = self._model.heads.physics(features).cpu().numpy()
        return physics[:, self._velocities].astype(np.float64) * self._seconds

    @torch.inference_mode()
    def render(self, features: Tensor, root: np.ndarray) -> tuple[np.ndarray, ...]:
        """One frame a latent.

        Args:
            features: [N, F]
            root: Where the roots of the bodies are, [N, R]; no sensor shows it, so that it is not in the latents.

        Returns:
            N frames [height, width, 3] uint8.

        Raises:
            AimeGymError: If no GL library works; the message names the package to install.
        """
        if self._images is not None:
            scale = max(1, self._size[1] // IMAGE_SIZE)
            frames = self._images(features).cpu().numpy()
            return tuple(frame.repeat(scale, 0).repeat(scale, 1) for frame in frames)
        assert self._model.heads is not None
        states = self._model.heads.physics(features).cpu().numpy().astype(np.float64)
        states[:, self._positions] = root
        rest = self._physics.get_state()[states.shape[1] :]  # muscle activations are not predicted
        return self.pose(np.concatenate([states, np.zeros((len(states), len(rest)))], axis=1))

    def pose(self, states: np.ndarray) -> tuple[np.ndarray, ...]:
        """One frame a physics state: [N, nq + nv (+ na)] -> N frames [height, width, 3] uint8.

        Raises:
            AimeGymError: For the same reasons as `render`, or if the states are not of this body.
        """
        if self._renderer is None:
            self._renderer = MuJoCoRenderer(self._physics, *self._size, rendering="fast")
        frames = []
        for state in states:
            tasks.set_physics_state(self._physics, state)
            frames.append(self._renderer.render())
        return tuple(frames)

    def close(self) -> None:
        """Frees the GL context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
