"""What a dream accepts: keywords, models, masks and actions, with errors that say what to do."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from numbers import Real
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from aime_gym.bodies.body import Choices, Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.envs.start_bank import MODES, shared_model
from aime_gym.errors import AimeGymError, check_switch, unknown_name, warn_caller
from aime_gym.files import Revision
from aime_gym.observations import CLIP_HINT
from aime_gym.world_model.checkpoint import bundled_models
from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.model import WorldModel

OBS_TYPES = ("state", "image", "latent")
REWARDS = ("task", "formula", "head", "disagreement", "none")
ACTION_LIMIT = 1 + 1e-6


def load_model_of(
    embodiment: str | None, model: str | Path | WorldModel | None, images: bool = False
) -> tuple[Embodiment, WorldModel]:
    """A body and the model that dreams of it.

    Args:
        embodiment: The body, or the id of its real env or dream; by default the model's own.
        model: A loaded model, a folder, a bundled name, or None for that of the dream's id or the body's bundled one.
        images: Whether the bundled one is to be that of images.

    Returns:
        The body and the model. The env of a foreign body is made only if its name is not the model's own.

    Raises:
        AimeGymError: If there is none, it cannot be read, or it is of another body.
    """
    if embodiment in gymnasium.registry:
        model = model or gymnasium.registry[embodiment].kwargs.get("model")
    if model is None:
        model = _bundled_model(None if embodiment is None else get_embodiment(embodiment).slug, images)
    loaded = model if isinstance(model, WorldModel) else shared_model(model)
    if embodiment in (None, loaded.config.embodiment):
        return loaded.config.body, loaded
    body = get_embodiment(embodiment)
    check_same_spaces(loaded.config, body)
    return body, loaded


def choose_task(body: Embodiment, model: WorldModel, task: str | None) -> str:
    """The task of a dream: by default the body's first one that the model's heads reward.

    Raises:
        AimeGymError: If the heads reward no such task; suggests the nearest that they do.
    """
    if model.heads is None:
        return body.check_task(task or body.tasks[0])
    known = model.heads.tasks
    if task is None:
        return next((each for each in (*body.tasks, *known) if each in known), body.tasks[0])
    if task not in known:
        raise unknown_name("task of this model's heads", task, known)
    return task


def _bundled_model(body: str | None, images: bool) -> str:
    known = bundled_models()
    wanted = [f"{body}-pixels"] * images + [f"{body}-state"]
    found = next((name for name in wanted if name in known), None)
    if found is None:
        raise AimeGymError(
            f"No model of {body or 'an unnamed body'} is bundled: pass model=, one of {', '.join(known)}, a folder "
            "written by `aime-gym pretrain` or `aime-gym train`, or a released one."
        )
    return found


def shown_obs_type(model: WorldModel) -> str:
    """What a dream shows by default: what the model observes."""
    return "image" if model.observed == ("image",) else "state"


def usual_obs_type(model: WorldModel) -> str:
    """What agents learn from by default: latents where decoding images would cost the most."""
    return "latent" if "image" in model.observed else "state"


def check_same_spaces(config: ModelConfig, body: Embodiment) -> None:
    """Raises an `AimeGymError` if a model cannot dream of a body.

    Args:
        config: The config of the model.
        body: One of the suite must be the model's own; a foreign one must have its sensors and actions.
    """
    if config.body.logged:
        raise AimeGymError(
            f"A model of logged data ({config.embodiment}) knows actions by their range in the data, not by that of "
            f"{body.name}: give from_arrays env={body.name!r}, and train anew."
        )
    if not body.foreign or not config.body.foreign:
        if body.name != config.embodiment:
            raise AimeGymError(f"Expected a model of {body.name}; got one of {config.embodiment}.")
        return
    theirs = {sensor.name: sensor.dim for sensor in config.sensors} | {"pre_action": config.action_dim}
    ours = {sensor.name: sensor.dim for sensor in body.sensors} | {"pre_action": body.action_dim}
    if theirs != ours:
        raise AimeGymError(f"A model of {config.embodiment} has {theirs}, but {body.name} has {ours}.")
    chosen = [{s.name: s.choices for s in each.sensors} | {"pre_action": each.choices} for each in (config, body)]
    if chosen[0] != chosen[1]:
        raise AimeGymError(f"A model of {config.embodiment} has {chosen[0]}, but {body.name} has {chosen[1]}.")


def check_settings(
    obs_type: str,
    start: Any,
    deterministic: Any,
    doubt: Any,
    reward: str,
    doubt_penalty: Any,
    max_doubt: Any,
    reward_fn: Any,
) -> None:
    """Raises an `AimeGymError` if a keyword of a dream is none of those that there are; suggests the nearest."""
    if obs_type not in OBS_TYPES:
        raise unknown_name("obs_type", obs_type, OBS_TYPES)
    if not isinstance(start, str) or start not in MODES:
        raise unknown_name("start", start, MODES)
    if deterministic is not None:
        check_switch(deterministic, "deterministic")
    check_number(doubt_penalty, "doubt_penalty")
    if max_doubt is not None:
        check_number(max_doubt, "max_doubt")
    if doubt not in (False, True, "ensemble"):
        raise unknown_name("doubt", doubt, ("ensemble", "True", "False"))
    if reward not in REWARDS:
        raise unknown_name("reward", reward, REWARDS)
    if reward_fn is not None and reward != "task":
        raise AimeGymError(f"Either a function pays (reward_fn) or reward={reward!r}: give one of them.")


def place(model: WorldModel, device: torch.device) -> WorldModel:
    """The model itself if it is on the device, else a copy there."""
    return model if model.cell.initial_state.device == device else copy.deepcopy(model).to(device)


def check_abilities(model: WorldModel, task: str, obs_type: str, doubts: bool, paid: bool) -> None:
    """Raises an `AimeGymError` if the model lacks what is asked for.

    Args:
        model: The model.
        task: The task whose reward is needed.
        obs_type: What is shown.
        doubts: Whether the disagreement of the ensemble is needed.
        paid: Whether a function of the user's pays, or nothing does.
    """
    model.config.check_acts()
    remedy = "Fit heads for it with `aime-gym fit-heads MODEL DATASET`."
    if obs_type == "state" and model.observed == ("image",):
        raise AimeGymError("obs_type='state' needs tabular sensors; this model observes images only: use 'image'.")
    if obs_type == "image" and "image" not in model.observed:
        raise AimeGymError(f"obs_type='image' needs a model that decodes images; this one decodes {model.observed}.")
    if model.heads is None and not model.config.use_reward and not paid:
        raise AimeGymError(
            f"This model predicts no reward of {task!r}. {remedy} Or pay by a function, reward_fn, or with "
            "reward='none' nothing."
        )
    if doubts and (model.heads is None or model.heads.ensemble is None):
        raise AimeGymError(f"This model has no ensemble: take doubt=True, or fit one. {remedy}")


class Uncopied:
    """A function that stays the same one where Gymnasium copies specs: what it is bound to may be large, or no copy.

    Args:
        function: The function.
    """

    def __init__(self, function: Any):
        self.function = function

    @classmethod
    def of(cls, function: Any) -> Any:
        """The function so; None and what is so already stay."""
        return function if function is None or isinstance(function, cls) else cls(function)

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        return self.function(*args)

    def __deepcopy__(self, memo: Any) -> Uncopied:
        return self


class UnwritableSpec(EnvSpec):
    """The spec of a dream with a keyword that JSON cannot hold: it says which, and what to do."""

    def to_json(self) -> str:
        """Nothing.

        Raises:
            AimeGymError: In any case.
        """
        name, given = next((name, given) for name, given in self.kwargs.items() if not _is_written(given))
        kind = type(given.function if isinstance(given, Uncopied) else given).__name__
        raise AimeGymError(
            f"A spec as JSON holds text and numbers; {name}= is a {kind}. Make the env again from the spec itself "
            "(gymnasium.make(env.spec)), or give a model by its folder or name."
        )


def _is_written(given: object) -> bool:
    try:
        json.dumps(given)
    except (TypeError, ValueError):
        return False
    return True


class WeightsInSpec:
    """An env whose spec asks for the weights that it has been made with."""

    revision: Revision | None
    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """How Gymnasium made it, with the digest of the weights among the keywords; None if it was made directly."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(EnvSpec) if field.init}
            functions = {name: Uncopied.of(given) for name, given in spec.kwargs.items() if name.endswith("_fn")}
            paths = {name: str(given) for name, given in spec.kwargs.items() if isinstance(given, Path)}
            weights = {} if self.revision is None else {"weights": self.revision.digest}
            kwargs = {**spec.kwargs, **functions, **paths, **weights}
            kind = EnvSpec if all(map(_is_written, kwargs.values())) else UnwritableSpec
            spec = kind(**{**fields, "kwargs": kwargs})
        self._spec = spec


def check_weights(revision: Revision | None, asked: str | None) -> None:
    """Raises an `AimeGymError` if a dream was asked for with other weights than the model has.

    Args:
        revision: Which weights it has; None if they are in no folder.
        asked: The digest asked for; None for any.
    """
    if asked is not None and (revision is None or revision.digest != asked):
        there = "this model is in no folder, or was changed since it was loaded" if revision is None else revision
        raise AimeGymError(
            f"Expected a model with the weights {asked!r}; got {there}. The weights have changed since: pass "
            "weights=None to dream with those that there are, or model=, the folder of the others."
        )


def check_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """The mode, also by its value, e.g. ``"SameStep"``; else an `AimeGymError`."""
    try:
        return AutoresetMode(mode)
    except ValueError:
        raise unknown_name("autoreset_mode", mode, [known.value for known in AutoresetMode]) from None


def check_device(device: Any) -> torch.device:
    """The device; an `AimeGymError` if there is none of that name here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise AimeGymError(f"device={device!r} cannot be used here ({error}). 'cpu' always can.") from error


def check_number(value: Any, name: str) -> None:
    """Raises an `AimeGymError` unless the value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise AimeGymError(f"{name} is a finite number; got {value!r}.")


def check_mask(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    """A `reset_mask` as bools [N], by default all True; an `AimeGymError` if it is something else or empty."""
    if mask is None:
        return np.ones(num_envs, bool)
    mask = np.asarray(mask)
    if mask.shape != (num_envs,) or mask.dtype != bool or not mask.any():
        raise AimeGymError(f"reset_mask is bools [{num_envs}] with at least one True; got {mask.dtype} {mask.shape}.")
    return mask


def check_actions(
    actions: Any, slots: int, body: Embodiment, ignored: NDArray[np.bool_] | None = None, clip: bool = False
) -> np.ndarray:
    """Actions as vectors [N, A], a float32 copy.

    Args:
        actions: [N, A] in [-1, 1], or where the body has choices those of each slot.
        slots: N
        body: The body that acts.
        ignored: Slots [N] whose actions do not matter.
        clip: Whether finite numbers outside [-1, 1] become -1 or 1.

    Raises:
        AimeGymError: If the shape differs, or an action is not finite or not in the space; the message says which slot.
    """
    if body.choices:
        return _check_choices(actions, slots, body.choices, ignored)
    shape = (slots, body.action_dim)
    try:
        actions = np.array(actions, np.float32)
    except (TypeError, ValueError) as error:
        raise AimeGymError(f"Expected actions of shape {shape}; got {actions!r}.") from error
    if actions.shape != shape:
        raise AimeGymError(f"Expected actions of shape {shape}; got {actions.shape}.")
    if ignored is not None:
        actions[ignored] = 0.0
    if clip and np.isfinite(actions).all():
        actions = actions.clip(-1, 1)
    if not np.abs(actions).max() <= ACTION_LIMIT:  # also where it is NaN
        slot = int((np.abs(actions) <= ACTION_LIMIT).all(1).argmin())
        raise AimeGymError(f"Actions are finite and in [-1, 1]; slot {slot} got {actions[slot].tolist()}.{CLIP_HINT}")
    return actions


def _check_choices(actions: Any, slots: int, choices: Choices, ignored: NDArray[np.bool_] | None) -> np.ndarray:
    try:
        chosen = np.array(actions)
    except ValueError as error:
        raise AimeGymError(f"Expected {slots} elements of {choices.space}; got {actions!s:.80}.") from error
    if chosen.shape != (slots, *choices.shape):
        raise AimeGymError(
            f"Expected {slots} elements of {choices.space}, shape {(slots, *choices.shape)}; got {chosen.shape}."
        )
    if ignored is not None:
        chosen[ignored] = 0
    try:
        return choices.encode(chosen)
    except AimeGymError as error:
        if chosen.dtype.kind not in "fiub":
            raise
        fits = (chosen >= 0) & (chosen < np.array(choices.counts).reshape(choices.shape)) & (chosen == np.rint(chosen))
        raise AimeGymError(f"{error} Slot {int(fits.reshape(slots, -1).all(1).argmin())} is the first.") from None


def doubt_of(doubt: bool | str, disagreement: bool | None) -> bool | str:
    """The doubt that is asked for, also by the keywords of version 0.1."""
    if disagreement is None and doubt != "posterior":
        return doubt
    warn_caller(
        "disagreement= and doubt='posterior' will go: doubt=True or doubt='ensemble' say all that is needed.",
        DeprecationWarning,
    )
    if doubt == "posterior":
        return bool(disagreement)
    return doubt or bool(disagreement)
