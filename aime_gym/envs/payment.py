"""What a dream pays for its steps, and which of them end an episode: formulas, heads, and functions of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aime_gym.bodies.body import Embodiment
from aime_gym.errors import AimeGymError, warn_caller
from aime_gym.world_model.fast_dynamics import FastDynamics
from aime_gym.world_model.formulas import TaskFormula, formula_lacks
from aime_gym.world_model.model import WorldModel

UserFunction = Callable[[Any, Any, Any], Any]
"""``f(observation, action, next_observation)`` about N steps at once, see `StepFunction`."""


class StepFunction:
    """A function of the user's about steps: what they pay, or whether they end the episode.

    It is called with the sensors before N steps, their actions and the sensors after them: tensors where it takes
    them, else arrays.

    Args:
        function: The function.
        told: What errors call it, ``"reward_fn"`` or ``"termination_fn"``.
        model: Says which sensors there are: all that it decodes, in the order of its body.
        by_name: Whether observations are dicts of sensors [N, D] rather than all of them side by side.

    Attributes:
        sensors: Their names.

    Raises:
        AimeGymError: If it cannot be called, or the model decodes no sensor.
    """

    def __init__(self, function: UserFunction, told: str, model: WorldModel, by_name: bool = False):
        if not callable(function):
            raise AimeGymError(
                f"{told} is a function of (observation, action, next_observation); got {function!r:.80}."
            )
        config = model.config
        sensors = [sensor for sensor in config.sensors if sensor.name in (*model.observed, *model.probed)]
        if not sensors:
            raise AimeGymError(f"{told} is about sensors, and this model decodes none: it shows images alone.")
        self.sensors = tuple(sensor.name for sensor in sensors)
        self._function, self._told, self._by_name = function, told, by_name
        self._codes = {name: config.codes[name] for name in self.sensors}
        scaled = config.logged_range is not None and config.choices is None
        self._range = torch.tensor(config.logged_range) if scaled else None
        ends = [*accumulate(sensor.dim for sensor in sensors)]
        columns = (f"{s.name} is [:, {end - s.dim}:{end}]" for s, end in zip(sensors, ends, strict=True))
        self._shown = (
            f"a dict of {', '.join(f'{sensor.name} [N, {sensor.dim}]' for sensor in sensors)}"
            if by_name
            else f"[N, {ends[-1]}], in which {', '.join(columns)} (a dict of them with obs_type='dict')"
        )
        self._takes_tensors: bool | None = None  # which its first call finds out
        self._warned = False

    def __call__(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], actions: Tensor) -> Tensor:
        """What it gives for N steps: [N] float32, or [N] bool if they end.

        Args:
            before: Sensor -> [N, D], where they begin.
            after: Sensor -> [N, D], where they end; angles that turn freely are given at the nearest turn.
            actions: [N, A] in [-1, 1]; those of logged data are given in the units of the data.

        Raises:
            AimeGymError: If it raises anything, or gives something else than N finite numbers.
        """
        if self._takes_tensors is None:
            self.try_on(before, after, actions)
        parts = self._parts(before, after, actions)
        try:
            given = self._ask(parts, bool(self._takes_tensors))
        except Exception as error:  # a function from outside fails in ways of its own
            raise AimeGymError(f"{self._told} failed: {error!r:.300}. {self._expected(len(actions))}") from error
        values = self._checked(given, actions)
        if (
            actions.requires_grad
            and torch.is_grad_enabled()
            and self._told == "reward_fn"
            and not values.requires_grad
            and not self._warned
        ):
            self._warned = True
            warn_caller(
                "reward_fn has no gradient, so that agents that learn by gradients (SHAC) see rewards through their "
                "critic alone: write it with torch, without .detach(), or take PPO or SAC."
            )
        return values

    def try_on(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], actions: Tensor) -> float:
        """Finds out what it takes, checks what it gives for N steps, and says how large that is.

        Raises:
            AimeGymError: If it takes neither tensors nor arrays, or gives something else than N finite numbers.
        """
        reasons: list[BaseException] = []
        with torch.inference_mode(False), torch.enable_grad():
            asked = [{name: rows.detach().clone() for name, rows in of.items()} for of in (before, after)]
            done = actions.detach().clone().requires_grad_()
            for of in asked:
                for rows in of.values():
                    rows.requires_grad_()
            for tensors in (True, False):
                parts = self._parts(asked[0], asked[1], done)  # anew: a function may change what it is given
                try:
                    given = self._ask(parts, tensors)
                except Exception as error:  # as above
                    reasons.append(error)
                    continue
                self._takes_tensors = tensors
                if isinstance(given, Tensor) == tensors:
                    break
        if len(reasons) == 2:
            by_tensors, by_arrays = (f"{reason!r:.200}" for reason in reasons)
            raise AimeGymError(
                f"{self._told} failed: {by_tensors}. {self._expected(len(actions))}"
                if by_tensors == by_arrays
                else f"{self._told} takes neither tensors ({by_tensors}) nor arrays ({by_arrays}). "
                f"{self._expected(len(actions))}"
            ) from reasons[1]
        return float(self._checked(given, actions).detach().float().abs().max()) or 1.0

    def _parts(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], actions: Tensor) -> list[Any]:
        """What the function gets: copies, which it may change."""
        ends = {name: code.nearest(after[name], before[name]) for name, code in self._codes.items()}
        if self._range is not None:
            low, high = self._range.to(actions)
            actions = low + (actions + 1) / 2 * (high - low)
        else:
            actions = actions.clone()
        if self._by_name:
            copies = [{name: of[name].clone() for name in self.sensors} for of in (before, ends)]
            return [copies[0], actions, copies[1]]
        first, last = (torch.cat([of[name] for name in self.sensors], 1) for of in (before, ends))
        return [first, actions, last]

    def _ask(self, parts: list[Any], tensors: bool) -> Any:
        if tensors:
            return self._function(*parts)
        arrays = (
            {k: v.numpy(force=True) for k, v in part.items()} if isinstance(part, dict) else part.numpy(force=True)
            for part in parts
        )
        return self._function(*arrays)

    def _checked(self, given: Any, actions: Tensor) -> Tensor:
        """What was given as a tensor [N]."""
        count = len(actions)
        if not isinstance(given, Tensor):
            try:
                array = np.asarray(given)
            except ValueError:
                array = np.array(None)
            if array.dtype.kind not in "fiub":
                raise AimeGymError(f"{self._told} gave {type(given).__name__}. {self._expected(count)}")
            given = torch.from_numpy(np.array(array))
        if given.is_complex():
            raise AimeGymError(f"{self._told} gave complex numbers. {self._expected(count)}")
        if given.shape != (count,):
            remedy = " Take [:, 0] of it." if given.shape == (count, 1) else ""
            raise AimeGymError(f"{self._told} gave shape {list(given.shape)}. {self._expected(count)}{remedy}")
        values = given.to(actions.device, torch.float32)
        if not bool(values.isfinite().all()):
            slot = int((~values.isfinite()).int().argmax())
            raise AimeGymError(f"{self._told} gave {values[slot].item()} in slot {slot}. {self._expected(count)}")
        if self._told == "reward_fn":
            return values
        if not bool(((values == 0) | (values == 1)).all()):
            raise AimeGymError(
                f"{self._told} gave {values[(values != 0) & (values != 1)][0].item()}. {self._expected(count)}"
            )
        return values.bool()

    def _expected(self, count: int) -> str:
        kind = "finite numbers" if self._told == "reward_fn" else "true or false"
        return (
            f"Expected {self._told}(observation, action, next_observation) -> {kind} of shape [{count}], one a slot: "
            f"it is asked about {count} at once; an observation is {self._shown}."
        )


class Payment:
    """What a dream pays for its steps, and which of them end an episode.

    The task's formula pays, a function of the user's, or the reward head; a function or a head ends episodes.

    Args:
        reward: ``"head"``, ``"formula"`` or ``"none"``; with others the formula where it can be computed, else the
            head.
        body: The body.
        task: One of its tasks.
        model: What decodes.
        shown: Sensors that are decoded anyway.
        reward_fn: Pays in place of the task, see `StepFunction`.
        termination_fn: Ends episodes in place of the head, see `StepFunction`.
        by_name: Whether these functions get dicts of sensors.

    Attributes:
        formula: The formula, or the function of the user's; None where the head pays.
        terminates: Whether episodes can end.
        scale: The size of a step's reward, see `Heads.reward_scale`; 1 for a model without heads.
        names: All sensors that are to be decoded, in this order: the shown ones first.

    Raises:
        AimeGymError: If a formula is asked for and cannot be computed.
    """

    def __init__(
        self,
        reward: str,
        body: Embodiment,
        task: str,
        model: WorldModel,
        shown: Sequence[str] = (),
        reward_fn: UserFunction | None = None,
        termination_fn: UserFunction | None = None,
        by_name: bool = False,
    ):
        pays = None if reward_fn is None else StepFunction(reward_fn, "reward_fn", model, by_name)
        ends = None if termination_fn is None else StepFunction(termination_fn, "termination_fn", model, by_name)
        lack = "" if reward == "head" or pays else formula_lacks(body, task, model)
        if reward == "formula" and lack:
            raise AimeGymError(f"reward='formula' cannot be: {lack}. reward='head' pays what the model predicts.")
        self._unpaid = reward == "none"
        formula = (
            None
            if pays or self._unpaid or reward == "head" or lack
            else TaskFormula(body.name, task, body.action_repeat)
        )
        self.formula: StepFunction | TaskFormula | None = pays or formula
        self._functions, self._ends = [each for each in (pays, ends) if each is not None], ends
        needed = [name for each in (self.formula, ends) if each is not None for name in each.sensors]
        self.names = tuple(dict.fromkeys([*shown, *needed]))
        heads = model.heads
        self.terminates = ends is not None or model.termination is not None
        self.scale = 1.0 if heads is None else heads.reward_scale
        dims = [model.config.dims[name] for name in self.names]
        self._logit = sum(dims)  # what comes after the sensors
        places = zip(self.names, dims, accumulate(dims), strict=True)
        self._columns = {name: slice(end - dim, end) for name, dim, end in places}

    def __call__(self, before: Tensor, after: Tensor, actions: Tensor) -> Tensor:
        """The rewards of N steps, [N].

        Args:
            before: What `FastDynamics` decodes where they begin, [N, D or more]; anything where the head pays.
            after: What it decodes where they end, [N, D or more], where a head pays its prediction last.
            actions: [N, A]
        """
        if self._unpaid:
            return after.new_zeros(len(after))
        if self.formula is None:
            return after[:, -1]
        return self.formula(*self._sensed(before, after), actions)

    def ends(self, before: Tensor, after: Tensor, actions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which of N steps end the episode, [N] bool, and the logits of that, [N]; None if none can.

        For arguments see `__call__`.
        """
        if not self.terminates:
            return None
        if self._ends is None:
            return after[:, self._logit] > 0, after[:, self._logit]
        over = self._ends(*self._sensed(before, after), actions)
        return over, torch.where(over, torch.inf, -torch.inf)

    @property
    def by_head(self) -> bool:
        """Whether what the model predicts is paid."""
        return self.formula is None and not self._unpaid

    @property
    def needs_before(self) -> bool:
        """Whether it must be told what is sensed where steps begin."""
        return self.formula is not None or self._ends is not None

    @torch.no_grad()
    def try_on(self, dynamics: FastDynamics, latents: Tensor, actions: Tensor) -> None:
        """Tries the user's functions on steps from `latents` [N, F] under `actions` [N, A].

        Raises:
            AimeGymError: For the same reasons as `StepFunction`.
        """
        if not self._functions:
            return
        seen = self._sensed(dynamics.decode(latents), dynamics.decode(dynamics.advance(latents, actions)))
        for function in self._functions:
            scale = function.try_on(*seen, actions)
            if function is self.formula:
                self.scale = scale

    def _sensed(self, before: Tensor, after: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sensor -> [N, D] of what was decoded before and after, [N, D or more]."""
        first, last = ({name: rows[:, place] for name, place in self._columns.items()} for rows in (before, after))
        return first, last
