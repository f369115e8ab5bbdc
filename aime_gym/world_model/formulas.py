"""Rewards of the suite's tasks as functions of sensors: batched, with a gradient, and as exact as the sensors are.

They are dm_control's own formulas, and those of `aime_gym.bodies.tasks`, written with torch: where a model decodes what
a reward is about, a dream can pay by it instead of by a reward head, which knows only what its data have shown.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aime_gym.bodies import tasks
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.bodies.sensors import AngleCode
from aime_gym.errors import AimeGymError
from aime_gym.files import read_json
from aime_gym.world_model.model import WorldModel

GEOMETRY = Path(__file__).with_name("geometry.json")
"""Sizes and masses in dm_control's models of the bodies whose formulas need them, so that dreams need no dm_control."""

Sensors = Mapping[str, Tensor]
"""Sensor -> [N, D], in its own units."""


_V1_SUMMED = {("walker", "walkbackward-v1"), ("walker", "runbackward-v1")}
"""Tasks of AIME's first release that are paid at every control step as the others are; see `aime_gym.bodies.tasks`."""

_traces: dict[Any, Any] = {}
"""Formulas as TorchScript, by all that decides their operations."""


class TaskFormula:
    """The reward of an agent step at one task, from what is sensed before and after it.

    The real reward is a sum over the control steps of an agent step. What is sensed between is taken to lie on a
    straight line, so that an event within a step counts for about its share of it. Tasks that pay 1 in some states and
    0 in the others have the gradient of a guide: how near the ball is to the cup or the finger to the target, how fast
    the spinner turns, how high the hopper or the pole is. It leads on until the goal is held firmly, and then is 0.

    Examples:
        >>> import torch
        >>> from aime_gym.world_model.formulas import TaskFormula
        >>> formula = TaskFormula("pendulum", "swingup")
        >>> up = {"orientation": torch.tensor([[1.0, 0.0]]), "velocity": torch.zeros(1, 1)}
        >>> formula(up, up, torch.zeros(1, 1)).tolist()  # two control steps
        [2.0]

    Args:
        body: A body of the suite.
        task: One of its tasks whose reward follows from sensors and actions.
        action_repeat: Control steps of an agent step; by default the body's own.

    Attributes:
        sensors: The sensors that it needs.

    Raises:
        AimeGymError: If the body has no such task, or its reward is about what no sensor sees.
    """

    def __init__(self, body: str, task: str, action_repeat: int | None = None):
        embodiment = get_embodiment(body)
        if lack := _lack(embodiment, task):
            raise AimeGymError(f"There is no formula to pay by: {lack}.")
        self.sensors = tuple(sensor.name for sensor in embodiment.sensors)
        self._codes = {sensor.name: AngleCode(sensor) for sensor in embodiment.sensors}
        self._paid_once = task.endswith("-v1") and (body, task) not in _V1_SUMMED
        self._reward = _FORMULAS[body](embodiment, task.removesuffix("-v1") if self._paid_once else task)
        self._repeat = action_repeat or embodiment.action_repeat
        self._shares = _Constants(np.arange(1, self._repeat + 1)[:, None, None] / self._repeat)
        self._key = body, task, self._repeat

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles it by its arguments."""
        return TaskFormula, self._key

    def __call__(self, before: Sensors, after: Sensors, actions: Tensor) -> Tensor:
        """The reward of each step, [N].

        Args:
            before: Sensor -> [N, D], when the step begins.
            after: Sensor -> [N, D], when it ends.
            actions: [N, A], those of the step; some tasks charge for them.
        """
        traced = not torch.is_grad_enabled() and actions.device.type == "cpu"
        return (self._traced if traced else self._paid)(before, after, actions)

    def _traced(self, before: Sensors, after: Sensors, actions: Tensor) -> Tensor:
        """`_paid` as TorchScript: with few slots Python takes longer than the arithmetic."""
        inputs = [*(sensed[name] for sensed in (before, after) for name in self.sensors), actions]
        key = (*self._key, len(actions), actions.dtype, actions.device)
        if key not in _traces:

            def paid(*parts: Tensor) -> Tensor:
                count = len(self.sensors)
                first, then = (dict(zip(self.sensors, some, strict=True)) for some in (parts[:count], parts[count:-1]))
                return self._paid(first, then, parts[-1])

            with warnings.catch_warnings():
                # Deprecated in favour of torch.compile, which needs a C++ compiler on the user's machine; and the
                # tracer tells of constants that become part of a trace.
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                _traces[key] = torch.jit.trace(paid, inputs, check_trace=False)
        return _traces[key](*inputs)

    def _paid(self, before: Sensors, after: Sensors, actions: Tensor) -> Tensor:
        if self._paid_once:
            return self._reward(after, actions)
        count, between = self._repeat, {}
        shares = self._shares.like(actions)
        for name, code in self._codes.items():
            first, last = before[name], code.nearest(after[name], before[name])
            between[name] = torch.lerp(first, last, shares).flatten(0, 1)
        return self._reward(between, actions.repeat(count, 1)).view(count, -1).sum(0)


def formula_lacks(body: Embodiment, task: str, model: WorldModel) -> str | None:
    """Why a task's reward cannot be computed from what a model decodes; None where it can.

    Args:
        body: The body.
        task: One of its tasks.
        model: What decodes.
    """
    if lack := _lack(body, task):
        return lack
    missing = [sensor.name for sensor in body.sensors if sensor.name not in (*model.observed, *model.probed)]
    return f"the model does not decode {', '.join(missing)} of {body.name}" if missing else None


def _lack(body: Embodiment, task: str) -> str | None:
    if body.foreign:
        return f"the reward of {body.name} is known to its env alone"
    body.check_task(task)
    seen = tasks.is_replayable(body, task)
    return None if seen else f"the reward of {body.name} {task} is about things that no sensor sees"


def _step(holds: Tensor, firmly: Tensor, guide: Tensor) -> Tensor:
    """1 where something holds and 0 elsewhere; its gradient is that of a guide, what is nearer, until it holds firmly.

    Args:
        holds: [N]
        firmly: Whether it holds and is not about to end, [N].
        guide: [N]
    """
    return holds.to(guide.dtype) + torch.where(firmly, 0.0, guide - guide.detach())


def _tolerance(
    x: Tensor, low: float, high: float = math.inf, margin: float = 1.0, at_margin: float = 0.1, kind: str = "gaussian"
) -> Tensor:
    """`dm_control.utils.rewards.tolerance`: 1 within the bounds, less outside."""
    far = torch.relu(low - x if high == math.inf else torch.maximum(low - x, x - high)) / margin
    if kind == "gaussian":
        return torch.exp(math.log(at_margin) * far.square())
    if kind == "linear":
        return torch.relu(1 - far * (1 - at_margin))
    assert kind == "quadratic"
    return torch.relu(1 - far.square() * (1 - at_margin))


def _small_control(actions: Tensor) -> Tensor:
    """What tasks that charge for actions leave of a reward, from 0.8 to 1."""
    return (4 + _tolerance(actions.clamp(-1, 1), 0, 0, 1, 0, "quadratic").mean(1)) / 5


Formula = Callable[[Sensors, Tensor], Tensor]
"""The reward of one control step, [N]."""


def _ball_in_cup(body: Embodiment, task: str) -> Formula:
    rooms, offset = (_Constants(np.array(_geometry()[body.name][key])) for key in ("rooms", "offset"))

    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        place = sensors["position"]
        away = (place[:, :2] - place[:, 2:]) + offset.like(place)
        away, room = away.abs(), rooms.like(place)
        return _step((away < room).all(1), (away < room / 2).all(1), torch.exp(-away.norm(dim=1) / 0.1))

    return reward


def _cartpole(body: Embodiment, task: str) -> Formula:
    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        place, cosine = sensors["position"][:, 0], sensors["position"][:, 1]
        centred = (1 + _tolerance(place, 0, 0, 2)) / 2
        slow = (1 + _tolerance(sensors["velocity"][:, 1], 0, 0, 5)) / 2
        return (1 + cosine.clamp(-1, 1)) / 2 * centred * _small_control(actions) * slow

    return reward


def _cheetah(body: Embodiment, task: str) -> Formula:
    chain = _Chain(body.name)

    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        if task.startswith("flip"):
            return _flip(sensors["velocity"][:, 2], task)
        speed = chain.speed(_behind_zero(sensors["position"]), sensors["velocity"])
        return ((-speed if task == "runbackward" else speed) / 10).clamp(0, 1)

    return reward


def _finger(body: Embodiment, task: str) -> Formula:
    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        spin = sensors["velocity"][:, 2]
        push = (1 - spin / 15) / 2
        return _step(spin <= -15, spin <= -20, push) if task == "spin" else push.clamp(0, 1)

    return reward


def _hopper(body: Embodiment, task: str) -> Formula:
    chain = _Chain(body.name)

    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        positions = _behind_zero(sensors["position"])
        height = chain.above("torso", "foot", positions)
        rise = (1 + height / 0.6) / 2
        if task == "rise":
            return rise.clamp(0, 1)
        standing = _step((height >= 0.6) & (height <= 2), height >= 0.7, rise)
        if task == "stand":
            return standing * _small_control(actions)
        return standing * _tolerance(chain.speed(positions, sensors["velocity"]), 2, math.inf, 1, 0.5, "linear")

    return reward


def _humanoid(body: Embodiment, task: str) -> Formula:
    target = {"stand": 0, "walk": 1, "run": 10}[task]

    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        standing = _tolerance(sensors["head_height"][:, 0], 1.4, math.inf, 0.35)
        upright = _tolerance(sensors["torso_vertical"][:, 2], 0.9, math.inf, 1.9, 0, "linear")
        velocity = sensors["com_velocity"][:, :2]
        if task == "stand":
            moving = _tolerance(velocity, 0, 0, 2).mean(1)
        else:
            moving = (5 * _tolerance(velocity.norm(dim=1), target, math.inf, target, 0, "linear") + 1) / 6
        return _small_control(actions) * standing * upright * moving

    return reward


def _pendulum(body: Embodiment, task: str) -> Formula:
    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        orientation = sensors["orientation"]
        cosine = orientation[:, 0] / orientation.norm(dim=1).clamp_min(1e-6)
        lift = (1 + cosine) / 2
        upright, still = (cosine >= math.cos(math.radians(degrees)) for degrees in (8, 4))
        return _step(upright, still, lift) if task == "swingup" else lift

    return reward


def _quadruped(body: Embodiment, task: str) -> Formula:
    target = {"walk": 0.5, "run": 5}[task]

    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        upright = _tolerance(sensors["torso_upright"][:, 0], 1, math.inf, 2, 0, "linear")
        return upright * _tolerance(sensors["torso_velocity"][:, 0], target, math.inf, target, 0.5, "linear")

    return reward


def _reacher(body: Embodiment, task: str) -> Formula:
    radius = {"easy": 0.05, "hard": 0.015}[task] + _geometry()[body.name]["finger"]

    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        far = sensors["to_target"].norm(dim=1)
        return _step(far <= radius, far <= radius / 8, torch.exp(-far / 0.05))

    return reward


def _walker(body: Embodiment, task: str) -> Formula:
    chain = _Chain(body.name)

    def reward(sensors: Sensors, actions: Tensor) -> Tensor:
        height, velocity = sensors["height"][:, 0], sensors["velocity"]
        if task.startswith("flip"):
            return _flip(velocity[:, 2], task)
        if task == "jump":
            return (height / 5).clamp(0, 1)
        torso = sensors["orientations"][:, :2]  # whose x axis points along x as its z axis does along z
        upright = (1 + torso[:, 0] / torso.norm(dim=1).clamp_min(1e-6)) / 2
        standing = (3 * _tolerance(height, 1.2, math.inf, 0.6) + upright) / 4
        if task == "stand":
            return standing
        if task.endswith("-v1"):  # where the vertical speed is taken for the horizontal one
            moving = (-velocity[:, 0] / _SPEEDS[task.removesuffix("-v1")]).clamp(0, 1)
            return standing * (5 * moving + 1) / 6
        speed = chain.speed(_walker_positions(sensors), velocity)
        if task.endswith("backward"):
            moving = (-speed / _SPEEDS[task]).clamp(0, 1)
        else:
            moving = _tolerance(speed, _SPEEDS[task], math.inf, _SPEEDS[task] / 2, 0.5, "linear")
        return standing * (5 * moving + 1) / 6

    return reward


_SPEEDS = {"walk": 1, "run": 8, "walkbackward": 1, "runbackward": 8}
"""Speeds that the walker is asked for, in metres a second."""


def _flip(turning: Tensor, task: str) -> Tensor:
    return ((-turning if task == "flipbackward" else turning) / 5).clamp(0, 1)


def _behind_zero(positions: Tensor) -> Tensor:
    """`qpos` of bodies whose ``position`` lacks the root's way, which comes first: [N, D] -> [N, D + 1]."""
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)


def _walker_positions(sensors: Sensors) -> Tensor:
    """`qpos` but for its slides, which are 0: joints are differences of directions."""
    directions = sensors["orientations"].unflatten(1, (7, 2))
    angles = torch.atan2(directions[..., 1], directions[..., 0])  # [N, 7]
    return angles @ _WALKER_JOINTS.like(angles)


_FORMULAS: Mapping[str, Callable[[Embodiment, str], Formula]] = {
    "ball_in_cup": _ball_in_cup,
    "cartpole": _cartpole,
    "cheetah": _cheetah,
    "finger": _finger,
    "hopper": _hopper,
    "humanoid": _humanoid,
    "pendulum": _pendulum,
    "quadruped": _quadruped,
    "reacher": _reacher,
    "walker": _walker,
}


@cache
def _geometry() -> dict[str, Any]:
    return read_json(GEOMETRY)


class _Constants:
    """Numbers of a formula, as tensors of the types and on the devices that were asked for."""

    def __init__(self, numbers: np.ndarray):
        self._numbers = numbers
        self._made: dict[Any, Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """These numbers in the type and on the device of a tensor."""
        key = tensor.dtype, tensor.device
        if key not in self._made:
            with torch.inference_mode(False):  # as gradients may be taken with what was made without
                self._made[key] = torch.as_tensor(self._numbers, dtype=tensor.dtype, device=tensor.device)
        return self._made[key]


def _walker_joints() -> _Constants:
    """What turns directions of torso, then thigh, leg and foot of either side into `qpos`, [7, 9]."""
    joints = np.zeros((7, 9))
    joints[0, 2] = 1
    for part, parent in enumerate((0, 1, 2, 0, 4, 5), 1):
        joints[parent, 2 + part], joints[part, 2 + part] = 1, -1
    return _Constants(joints)


_WALKER_JOINTS = _walker_joints()


class _Chain:
    """The kinematics of a body that moves in a plane: how far its parts are up, and how fast it goes as a whole.

    A point of it lies where the root has slid to, plus for each part a vector that turns with that part. So does the
    centre of mass, with vectors that are means over all masses.

    Args:
        body: Its name; its root slides along x and z, and all other joints turn about y.
    """

    def __init__(self, body: str):
        parts = _geometry()[body]
        joints = [joint for part in parts for joint in part["joints"]]  # in the order of `qpos`
        count, entry = len(parts), 0
        turns, slides = np.zeros((len(joints), count)), dict[str, int]()
        origins = np.zeros((count, count, 2))  # vectors that turn with each part, whose sum is the origin
        for index, part in enumerate(parts[1:], 1):
            parent = part["parent"]
            turns[:, index] = turns[:, parent]
            origins[index] = origins[parent]
            origins[index, parent] += part["position"]
            for joint in part["joints"]:
                if "slides" in joint:
                    slides[joint["slides"]] = entry
                else:
                    turns[entry, index] += joint["turns"]
                    origins[index, parent] += joint["anchor"]
                    origins[index, index] -= joint["anchor"]
                entry += 1
        centres = origins.copy()
        centres[np.arange(count), np.arange(count)] += [part["centre"] for part in parts]
        masses = np.array([part["mass"] for part in parts])
        self._slides = slides
        self._turns, self._zero = _Constants(turns), _Constants(np.array([joint["zero"] for joint in joints]) @ turns)
        names = {part["name"]: centre for part, centre in zip(parts, centres, strict=True)}
        self._between = {
            (upper, lower): _Constants((names[upper] - names[lower]).T) for upper in names for lower in names
        }
        self._whole = _Constants((np.tensordot(masses, centres, 1) / masses.sum()).T)

    def speed(self, positions: Tensor, velocities: Tensor) -> Tensor:
        """How fast the body's centre of mass goes along x, at `qpos` and `qvel` [N, Q]: [N]."""
        turns, (x, z) = self._turns.like(positions), self._whole.like(positions)
        angles, rates = positions @ turns - self._zero.like(positions), velocities @ turns
        return velocities[:, self._slides["x"]] + (rates * (angles.cos() * z - angles.sin() * x)).sum(1)

    def above(self, upper: str, lower: str, positions: Tensor) -> Tensor:
        """How far the centre of one part is above that of another at `qpos` [N, Q]: [N]."""
        x, z = self._between[upper, lower].like(positions)
        angles = positions @ self._turns.like(positions) - self._zero.like(positions)
        return angles.cos() @ z - angles.sin() @ x
