"""What comes of a dream's steps: what they look like, what they pay by formulas, heads or functions, which are last."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aime_gym.bodies.body import Embodiment
from aime_gym.envs.start_bank import recover, shared_parts
from aime_gym.errors import AimeGymError, warn_caller
from aime_gym.parallel import one_thread
from aime_gym.world_model.array_code import ArrayFunction, as_arrays
from aime_gym.world_model.fast_dynamics import FastDynamics, ImageBytes
from aime_gym.world_model.formulas import TaskFormula, formula_lacks
from aime_gym.world_model.heads import paid
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
        pays_ends: Whether a head pays for a step that ends an episode, see `paid`.
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
        by_formula = not (pays or self._unpaid or reward == "head" or lack)
        formula = TaskFormula(body.name, task, body.action_repeat) if by_formula else None
        self.formula: StepFunction | TaskFormula | None = pays or formula
        self._functions, self._ends = [each for each in (pays, ends) if each is not None], ends
        needed = [name for each in (self.formula, ends) if each is not None for name in each.sensors]
        self.names = tuple(dict.fromkeys([*shown, *needed]))
        heads = model.heads
        self.terminates = ends is not None or model.termination is not None
        self.scale = 1.0 if heads is None else heads.reward_scale
        self.pays_ends = self.by_head and heads is not None and bool(heads.ends)
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
            step = after[:, -1]
            own = paid(step, after[:, -2], after[:, self._logit]) if self.pays_ends else step
            ends = self.ends(before, after, actions) if self.pays_ends and self._ends else None
            return own if ends is None else torch.where(ends[0], own, step)
        return self.formula(*self._sensed(before, after), actions)

    def ends(self, before: Tensor, after: Tensor, actions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which of N steps, see `__call__`, are last, [N] bool, and the logits of that, [N]; None if none can be."""
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


Pay = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The rewards [N] of N steps; for arguments see `Payment`."""

Begins = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Latents [N, F], what they look like [N, ...], actions [N, A], and standard-normal noise [N, S] or None for means."""


class Outcome(NamedTuple):
    """What comes of one step in N slots, all of it finite.

    Attributes:
        latents: Where it leads, [N, F].
        shown: What that looks like, [N, ...].
        rewards: What it pays, [N].
        doubt: How much it is to be doubted, [N]; None if nobody asks.
        ends: Which slots it ends, [N] bool, and the logits of that, [N]; None where none can end.
        diverged: Slots that were put back as they left the finite numbers, [N] bool; None if there are none.
    """

    latents: Tensor
    shown: Tensor
    rewards: Tensor
    doubt: Tensor | None = None
    ends: tuple[Tensor, Tensor] | None = None
    diverged: Tensor | None = None


class Outcomes:
    """What comes of the steps of a dream: a function of latents, what was shown, actions and noise.

    Args:
        model: The model.
        dynamics: Its fast dynamics, which decode what `payment` needs, the shown sensors first.
        payment: What pays.
        obs_type: ``"state"``, ``"image"`` or ``"latent"``.
        pays_by_shown: Whether what is shown is all that is paid by.
        doubt: Whether there is a doubt.
        images: What decodes images, if those are shown.
        alone: For one slot on a CPU all that decides the operations of a step besides the model, else None.
    """

    def __init__(
        self,
        model: WorldModel,
        dynamics: FastDynamics,
        payment: Payment,
        obs_type: str,
        pays_by_shown: bool,
        doubt: bool,
        images: ImageBytes | None,
        alone: Hashable | None,
    ):
        self._model, self._dynamics, self._payment, self._doubt = model, dynamics, payment, doubt
        self.obs_type, self._pays_by_shown, self._images, self._alone = obs_type, pays_by_shown, images, alone
        self._code = model.config.code_of(model.observed)
        self._array_step: ArrayFunction | None = None  # which the first step makes

    def __getstate__(self) -> dict[str, Any]:
        """All but code, which cannot be pickled."""
        return {**self.__dict__, "_array_step": None}

    def __call__(self, begins: Begins, asynchronous: bool = False, pay: Pay | None = None) -> Outcome:
        """What comes of one step.

        Args:
            begins: Where it begins.
            asynchronous: Whether to look at no number, for which a GPU would have to wait.
            pay: What pays, by default the payment.
        """
        if self._alone is None or asynchronous or pay or torch.is_grad_enabled():
            return self._by_tensors(begins, asynchronous, pay)
        return self._by_arrays(begins)

    def show(self, latents: Tensor, means: Tensor | None, last: Tensor | None = None) -> Tensor:
        """What latents [N, F] look like, given what the dynamics decoded of them if they did: [N, ...].

        Angles that turn freely, and an arm's target, go on from what was shown last, [N, D].
        """
        if self.obs_type == "latent":
            return latents
        if self._images is not None:
            return self._images(latents)
        shown = (self._dynamics.decode(latents) if means is None else means)[:, : self._code.dim]
        return shown if last is None else self._code.nearest(shown, last)

    def _by_tensors(self, begins: Begins, asynchronous: bool = False, pay: Pay | None = None) -> Outcome:
        latents, shown, actions, noise = begins
        following, means, total, doubt = self._dynamics.step(latents, actions, noise)
        if self._doubt and doubt is None:
            doubt = self._model.doubt(following)
            total = total + doubt.sum()
        before = shown if self._pays_by_shown else self._dynamics.decode(latents)
        diverged = None
        if asynchronous or not math.isfinite(total.item()):
            sensed = before if self._payment.needs_before else None
            following, means, diverged = recover(latents, sensed, following, means)
            if doubt is not None:
                diverged = diverged | ~doubt.isfinite()
        after, means = self._shown_and_sensed(following, means, shown, diverged)
        ends = self._payment.ends(before, means, actions)
        return Outcome(following, after, (pay or self._payment)(before, means, actions), doubt, ends, diverged)

    def _shown_and_sensed(
        self, latents: Tensor, means: Tensor, last: Tensor, diverged: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What latents look like after what was shown last, and by what is paid."""
        shown = self.show(latents, means, last)
        if diverged is not None and self.obs_type == "state":
            shown = torch.where(diverged[:, None], last, shown)
        if self._pays_by_shown and self._code.goes_on and self.obs_type == "state":
            means = torch.cat([shown, means[:, self._code.dim :]], 1)
        return shown, means

    def _by_arrays(self, begins: Begins) -> Outcome:
        """The same of one slot without gradients: as one function of arrays, where all stays finite."""
        tensors = [tensor for tensor in begins if tensor is not None]
        if self._array_step is None:
            key, make = (self._alone, len(tensors)), lambda: as_arrays(self._compute, tensors)
            with one_thread():
                self._array_step = shared_parts(self._model).get(key, make)
            if self._array_step is None:
                self._alone = None
        if self._array_step is not None:
            arrays = [(tensor.detach() if tensor.requires_grad else tensor).numpy() for tensor in tensors]
            total, *results = self._array_step(*arrays)
            if math.isfinite(total):
                latents, after, rewards, *doubt = map(torch.from_numpy, results)
                return Outcome(latents, after, rewards, doubt[0] if doubt else None)
        with one_thread():
            return self._by_tensors(begins)

    def _compute(self, latents: Tensor, shown: Tensor, actions: Tensor, noise: Tensor | None = None) -> Any:
        """The sum of all numbers of a step, then latents, what they look like, rewards and doubt if there is one."""
        following, means, total, *doubt = self._dynamics.compute(latents, actions, noise)
        before = shown if self._pays_by_shown else self._dynamics.decode(latents)
        after, means = self._shown_and_sensed(following, means, shown)
        return total, following, after, self._payment(before, means, actions), *doubt
