"""What a body is: its sensors and their order, its actions, its clock and its tasks.

The tables follow AIME (Zhang et al., NeurIPS 2023); dims are those of dm_control. Any other Gymnasium env
is a body too, see `aime_gym.bodies.lookup`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np
from gymnasium import spaces

from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.gl import NO_DM_CONTROL, has_dm_control

Order = Literal["first", "second"]

Setup = Literal["mdp", "lpomdp", "visual"]

ObsType = Literal["state", "dict", "image", "latent"]

SETUPS: tuple[str, ...] = get_args(Setup)

OBS_TYPES: tuple[str, ...] = get_args(ObsType)

EPISODE_CONTROL_STEPS = 1000
"""Physics control steps in an episode of every body of the suite; divide by the action repeat for agent steps."""

OWN_TASK = "own"
"""The one task of a foreign body: the reward that its env itself gives."""


ChoiceKind = Literal["discrete", "multi_discrete", "multi_binary"]

MOST_OPTIONS = 10_000
"""The largest size of the vector that choices become."""


@dataclass(frozen=True)
class Choices:
    """Whole numbers that are chosen among a few from 0 on: Gymnasium's `Discrete`, `MultiDiscrete` or `MultiBinary`.

    Inside models and data they are a vector [D] of 0 and 1, that of `gymnasium.spaces.flatten`: one number for each
    option of each choice (one-hot), and one for each binary. Spaces that begin at other numbers or have several axes
    become those from 0 on with one axis, which is all that Stable-Baselines3 acts in.

    Raises:
        AimeGymError: If there are no options or too many, or numbers do not fit together.
    """

    kind: ChoiceKind
    counts: tuple[int, ...]
    """Options of each choice; 2 of each binary."""

    def __post_init__(self):
        fits = {"discrete": len(self.counts) == 1, "multi_discrete": True, "multi_binary": set(self.counts) <= {2}}
        good = fits.get(self.kind, False) and self.counts and min(self.counts) > 0 and self.dim <= MOST_OPTIONS
        if not good:
            raise AimeGymError(
                f"Expected choices with 1 to {MOST_OPTIONS} options in all; got {self.kind!r} with "
                f"{list(self.counts)!s:.80} options."
            )

    @classmethod
    def of(cls, space: Any) -> Choices | None:
        """The choices that a Gymnasium space consists of; None if it is of another kind."""
        if isinstance(space, spaces.Discrete):
            return cls("discrete", (int(space.n),))
        if isinstance(space, spaces.MultiDiscrete):
            return cls("multi_discrete", tuple(map(int, space.nvec.ravel())))
        if isinstance(space, spaces.MultiBinary):
            return cls("multi_binary", (2,) * math.prod(space.shape))
        return None

    @property
    def document(self) -> list[Any]:
        """What `dataset.json` says of them."""
        return [self.kind, list(self.counts)]

    @property
    def dim(self) -> int:
        """D, the size of the vector."""
        return len(self.counts) if self.kind == "multi_binary" else sum(self.counts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an element: that of a number for the one choice of `Discrete`."""
        return () if self.kind == "discrete" else (len(self.counts),)

    @property
    def space(self) -> spaces.Space:
        """The Gymnasium space."""
        if self.kind == "discrete":
            return spaces.Discrete(self.counts[0])
        if self.kind == "multi_binary":
            return spaces.MultiBinary(len(self.counts))
        return spaces.MultiDiscrete([*self.counts])

    def same_space(self, space: spaces.Space) -> bool:
        """Whether a Gymnasium space has the elements of `space`: of `MultiBinary(n)` and `MultiBinary((n,))` both do.

        Gymnasium calls these two different.
        """
        binaries = isinstance(space, spaces.MultiBinary) and self.kind == "multi_binary"
        return space.shape == self.shape if binaries else space == self.space

    def encode(self, values: Any) -> np.ndarray:
        """Elements of the space [..., *shape] as vectors [..., D] float32.

        Raises:
            AimeGymError: If they are none.
        """
        values = np.asarray(values)
        leading = values.shape[: values.ndim - len(self.shape)]
        whole = values.dtype.kind in "iub" or (values.dtype.kind == "f" and (values == np.rint(values)).all())
        if values.shape != (*leading, *self.shape) or not whole:  # SB3 gives binaries as floats
            shape = f"{[..., *self.shape]}".replace("Ellipsis", "...")
            given = f"{values!s:.80}, {values.dtype} {list(values.shape)}"
            raise AimeGymError(f"Expected elements of {self.space}, whole numbers of shape {shape}; got {given}.")
        chosen = values.reshape(*leading, len(self.counts)).astype(np.int64)
        if ((chosen < 0) | (chosen >= np.array(self.counts))).any():
            raise AimeGymError(f"Expected elements of {self.space}; got {values!s:.80}.")
        if self.kind == "multi_binary":
            return chosen.astype(np.float32)
        vectors = np.zeros((*leading, self.dim), np.float32)
        begins = np.cumsum(self.counts) - self.counts
        np.put_along_axis(vectors, chosen + begins, 1.0, -1)
        return vectors

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """The elements [..., *shape] nearest to vectors [..., D]: the first of those options that have the most."""
        vectors = np.asarray(vectors)
        if self.kind == "multi_binary":
            return (vectors > 0.5).astype(np.int8)
        parts = np.split(vectors, np.cumsum(self.counts)[:-1], -1)
        chosen = np.stack([part.argmax(-1) for part in parts], -1)
        return chosen[..., 0] if self.kind == "discrete" else chosen

    def draw(self, rng: np.random.Generator, size: tuple[int, ...] = ()) -> np.ndarray:
        """Random elements [*size, *shape]; every option is as likely."""
        return rng.integers(self.counts, size=(*size, len(self.counts))).reshape((*size, *self.shape))[()]

    def stray(self, values: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
        """Elements [*shape] of which each choice is, with a probability of `share`, another one."""
        counts, chosen = np.array(self.counts), np.asarray(values).reshape(-1)
        others, strays = rng.integers(1, np.maximum(counts, 2)), rng.random(len(counts)) < share
        return np.where(strays & (counts > 1), (chosen + others) % counts, chosen).reshape(self.shape)[()]


@dataclass(frozen=True)
class Sensor:
    """One tabular sensor: `dim` float32 values; `second` order means velocities."""

    name: str
    dim: int
    order: Order = "first"
    rotations: tuple[int, ...] = ()
    """Entries that are angles of hinges without limits, in ascending order; models read and decode their sines and
    cosines."""
    choices: Choices | None = None
    """What the values stand for, if they are the vector of choices."""


@dataclass(frozen=True)
class Embodiment:
    """A body of the DeepMind Control Suite as AIME uses it, or (`foreign`) the one in some other Gymnasium env."""

    name: str
    """dm_control's domain, e.g. ``"ball_in_cup"``; the env's id for a foreign body, e.g. ``"Pendulum-v1"``."""
    sensors: tuple[Sensor, ...]
    """Tabular sensors in the order in which `obs_type="state"` concatenates them."""
    action_dim: int
    action_repeat: int
    """Control steps per agent step."""
    tasks: tuple[str, ...]
    """The first one is the default."""
    custom_tasks: tuple[str, ...] = ()
    """Tasks that dm_control lacks; each also exists as ``"<task>-v1"`` with the formula of AIME's first release."""
    guiding_tasks: tuple[str, ...] = ()
    """Dense tasks that lead to the rewards of a sparse one of dm_control's; `aime-gym pretrain` learns them, too."""
    rotations: tuple[int, ...] = ()
    """Indices into `qpos` of hinges without limits, of which only sine and cosine matter."""
    translations: Mapping[int, int] = field(default_factory=dict)
    """`qpos` index -> `qvel` index of root coordinates that no sensor sees; they are integrated for pictures."""
    episode_control_steps: int = EPISODE_CONTROL_STEPS
    """Control steps in an episode."""
    foreign: bool = False
    """Whether it lives in an env outside the suite."""
    has_image: bool = False
    """Whether a foreign body's observations include an image; those of the suite are rendered at will."""
    logged_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """What -1 and 1 stand for in the actions of logged data, in their own units (choices: 0 and 1); None for a body
    with an env."""
    choices: Choices | None = None
    """What actions are chosen from; None for numbers in [-1, 1]."""

    @property
    def title(self) -> str:
        """The name inside Gymnasium ids: ``"BallInCup"`` for ``"ball_in_cup"``."""
        return "".join(part.capitalize() for part in self.name.split("_"))

    @property
    def episode_steps(self) -> int:
        """Agent steps in one episode."""
        return self.episode_control_steps // self.action_repeat

    @property
    def slug(self) -> str:
        """The name as files can have it."""
        return re.sub(r"[^\w.-]", "-", self.name)

    @property
    def logged(self) -> bool:
        """Whether it is known by logged data alone, so that there is no real env of it."""
        return self.logged_range is not None

    @property
    def env_lack(self) -> str:
        """Why no real env of it can be made here; empty where one can."""
        if self.logged:
            return f"{self.name} is known by logged data alone, so that there is no real env of it"
        return "" if self.foreign or has_dm_control() else NO_DM_CONTROL

    def check_env(self, remedy: str) -> None:
        """Raises an `AimeGymError`, which ends with a remedy, if no real env of this body can be made here."""
        if self.env_lack:
            raise AimeGymError(f"{self.env_lack}: {remedy}")

    def observed(self, setup: str) -> tuple[Sensor, ...]:
        """The tabular sensors that `setup` shows to an agent, as in Zhang et al. (NeurIPS 2023).

        Args:
            setup: ``"mdp"`` (all), ``"lpomdp"`` (no velocities) or ``"visual"`` (none: images only).

        Raises:
            AimeGymError: If the setup is unknown.
        """
        setup = canonical_setup(setup)
        if setup == "visual":
            return ()
        return tuple(s for s in self.sensors if setup == "mdp" or s.order == "first")

    def check_task(self, task: str) -> str:
        """Returns `task` if this body has it, else raises an `AimeGymError` that suggests the nearest."""
        older = tuple(f"{custom}-v1" for custom in self.custom_tasks)
        known = self.tasks + self.custom_tasks + self.guiding_tasks + older
        if task not in known:
            raise unknown_name(f"task of {self.name}", task, known)
        return task


def action_range(ends: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The lowest and the highest actions, as a file tells them in two lists of one length; None stays None.

    Raises:
        AimeGymError: If they are something else.
    """
    if ends is None:
        return None
    good = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, list) and end for end in ends)
    good = good and len(ends[0]) == len(ends[1])
    good = good and all(type(one) in (int, float) and math.isfinite(one) for end in ends for one in end)
    if not good or any(low > high for low, high in zip(*ends, strict=True)):
        raise AimeGymError(f"logged_range: expected the lowest and the highest actions, two lists; got {ends!r:.80}.")
    low, high = (tuple(map(float, end)) for end in ends)
    return low, high


def canonical_setup(setup: str) -> Setup:
    """Maps the alias ``"pomdp"`` to ``"lpomdp"`` and rejects unknown setups."""
    setup = "lpomdp" if setup == "pomdp" else setup
    if setup not in SETUPS:
        raise unknown_name("setup", setup, SETUPS)
    return cast(Setup, setup)


def check_obs_type(obs_type: str) -> str:
    """Returns `obs_type` if it is known, else raises an `AimeGymError` that suggests the nearest."""
    if obs_type not in OBS_TYPES:
        raise unknown_name("obs_type", obs_type, OBS_TYPES)
    return obs_type


def foreign_body(
    name: str,
    sensors: tuple[Sensor, ...],
    action_dim: int,
    episode_steps: int,
    has_image: bool = False,
    choices: Choices | None = None,
) -> Embodiment:
    """A body outside the suite, by what is known of it."""
    return Embodiment(
        name,
        sensors,
        action_dim,
        action_repeat=1,
        tasks=(OWN_TASK,),
        episode_control_steps=episode_steps,
        foreign=True,
        has_image=has_image,
        choices=choices,
    )


def _table(*bodies: Embodiment) -> Mapping[str, Embodiment]:
    return MappingProxyType({body.name: body for body in bodies})


EMBODIMENTS: Mapping[str, Embodiment] = _table(
    Embodiment(
        "ball_in_cup",
        (Sensor("position", 4), Sensor("velocity", 4, "second")),
        action_dim=2,
        action_repeat=4,
        tasks=("catch",),
    ),
    Embodiment(
        "cartpole",
        (Sensor("position", 3), Sensor("velocity", 2, "second")),
        action_dim=1,
        action_repeat=8,
        tasks=("swingup", "balance"),
        rotations=(1,),
    ),
    Embodiment(
        "cheetah",
        (Sensor("position", 8, rotations=(1,)), Sensor("velocity", 9, "second")),
        action_dim=6,
        action_repeat=2,
        tasks=("run",),
        custom_tasks=("runbackward", "flip", "flipbackward"),
        rotations=(2,),
        translations={0: 0},
    ),
    Embodiment(
        "finger",
        (Sensor("position", 4), Sensor("touch", 2), Sensor("velocity", 3, "second")),
        action_dim=2,
        action_repeat=2,
        tasks=("spin", "turn_easy", "turn_hard"),
        guiding_tasks=("push",),
        rotations=(2,),
    ),
    Embodiment(
        "hopper",
        (Sensor("position", 6, rotations=(1,)), Sensor("touch", 2), Sensor("velocity", 7, "second")),
        action_dim=4,
        action_repeat=2,
        tasks=("stand", "hop"),
        guiding_tasks=("rise",),
        rotations=(2,),
        translations={0: 0},
    ),
    Embodiment(
        "humanoid",
        (
            Sensor("joint_angles", 21),
            Sensor("head_height", 1),
            Sensor("extremities", 12),
            Sensor("torso_vertical", 3),
            Sensor("com_velocity", 3, "second"),
            Sensor("velocity", 27, "second"),
        ),
        action_dim=21,
        action_repeat=2,
        tasks=("stand", "walk", "run"),
        translations={0: 0, 1: 1},
    ),
    Embodiment(
        "pendulum",
        (Sensor("orientation", 2), Sensor("velocity", 1, "second")),
        action_dim=1,
        action_repeat=2,
        tasks=("swingup",),
        guiding_tasks=("lift",),
        rotations=(0,),
    ),
    Embodiment(
        "quadruped",
        (
            Sensor("egocentric_state", 44),
            Sensor("torso_velocity", 3, "second"),
            Sensor("torso_upright", 1),
            Sensor("imu", 6),
            Sensor("force_torque", 24),
        ),
        action_dim=12,
        action_repeat=2,
        tasks=("walk", "run", "escape", "fetch"),
        translations={0: 0, 1: 1},
    ),
    Embodiment(
        "reacher",
        (Sensor("position", 2, rotations=(0,)), Sensor("to_target", 2), Sensor("velocity", 2, "second")),
        action_dim=2,
        action_repeat=4,
        tasks=("easy", "hard"),
        rotations=(0,),
    ),
    Embodiment(
        "walker",
        (Sensor("orientations", 14), Sensor("height", 1), Sensor("velocity", 9, "second")),
        action_dim=6,
        action_repeat=2,
        tasks=("walk", "stand", "run"),
        custom_tasks=("walkbackward", "runbackward", "flip", "flipbackward", "jump"),
        rotations=(2,),
        translations={1: 1},
    ),
)
"""The ten bodies by name."""
