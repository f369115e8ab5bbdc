"""Dreams as a Gymnasium vector env: arrays around a `TensorDream`, and infos in Gymnasium's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.bodies.body import check_obs_type
from aime_gym.envs.dream_checks import WeightsInSpec, check_actions, check_mask, doubt_of
from aime_gym.envs.payment import UserFunction
from aime_gym.envs.rendering import DreamPictures, can_be_drawn
from aime_gym.envs.start_bank import DreamState, Transition
from aime_gym.envs.tensor_dream import TensorDream
from aime_gym.errors import AimeGymError, known_keywords, unknown_name
from aime_gym.observations import action_space, observation_space, to_sensors, to_shown
from aime_gym.parallel import one_thread
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.packed import without_autocast

Infos = dict[str, Any]


def add_info(infos: Infos, key: str, values: np.ndarray, mask: NDArray[np.bool_] | None = None) -> None:
    """Adds `values` [N] of the slots in `mask` [N], by default all; a key that no slot has is left out."""
    if mask is None:
        mask = np.ones(len(values), bool)
    if not mask.any():
        return
    infos[key] = np.where(mask, values, np.full_like(values, None if values.dtype == object else 0))
    infos[f"_{key}"] = mask.copy()


def split_final(infos: Infos, ended: NDArray[np.bool_], final_observations: Sequence[Any]) -> Infos:
    """Moves what a step said about slots that ended in it to ``final_info`` and ``final_obs`` (SAME_STEP autoreset).

    Args:
        infos: The infos of the step.
        ended: [N]
        final_observations: The last observations of the slots that ended, in order.

    Returns:
        The infos of the step and the reset together, before the reset adds its own.
    """
    rest: Infos = {}
    final: Infos = {}
    for key in [key for key in infos if f"_{key}" in infos]:
        add_info(final, key, infos[key], infos[f"_{key}"] & ended)
        add_info(rest, key, infos[key], infos[f"_{key}"] & ~ended)
    observations = np.full(len(ended), None, dtype=object)
    for slot, observation in zip(ended.nonzero()[0], final_observations, strict=True):
        observations[slot] = observation
    rest |= {"final_obs": observations, "_final_obs": ended.copy(), "final_info": final, "_final_info": ended.copy()}
    return rest


def _tell_also(infos: Infos, key: str, values: np.ndarray, mask: NDArray[np.bool_]) -> None:
    """Adds the `values` [N] of further slots in `mask` [N] to those that have the key."""
    if key in infos:
        values, mask = np.where(mask, values, infos[key]), mask | infos[f"_{key}"]
    add_info(infos, key, values, mask)


FEW_SLOTS = 8
"""Up to here the products of a step are too small to share between threads."""

Observation = np.ndarray | dict[str, np.ndarray]
Told = tuple[str, np.ndarray, NDArray[np.bool_] | None]
"""What a step says: a key, values [N], and of which slots, [N] bool or None for all."""


def _setting(name: str, doc: str) -> Any:
    """A property of the tensor dream, as one of the env."""
    return property(
        lambda env: getattr(env.tensor_dream, name), lambda env, value: setattr(env.tensor_dream, name, value), doc=doc
    )


class DreamVectorEnv(WeightsInSpec, gymnasium.vector.VectorEnv):
    """N dreams of one world model, side by side: a step is one batched step of the prior.

    Slots never influence each other: what each draws follows from its seed. Episodes are truncated; they terminate only
    where the model has a head that predicts it.

    Examples:
        >>> import gymnasium, aime_gym
        >>> dreams = gymnasium.make_vec("AimeDream-Walker-v0", num_envs=4, task="walk", doubt=True)
        >>> observations, infos = dreams.reset(seed=0)
        >>> observations, rewards, terminations, truncations, infos = dreams.step(dreams.action_space.sample())
        >>> observations.shape, rewards.shape, infos["doubt"].shape
        ((4, 24), (4,), (4,))

    Args:
        embodiment: The body, e.g. ``"walker"``; by default the model's own.
        num_envs: N
        task: The task whose reward it gives; by default the body's first task that the model's heads reward.
        model: A loaded model, a folder, or a bundled name; the body's bundled one by default. Steps are made with
            copies of its weights, which all its dreams share: a model that trains on needs a new dream.
        obs_type: ``"state"``, ``"dict"``, ``"image"`` or ``"latent"``; by default ``"image"`` with a model of images,
            else ``"state"``.
        start: Where episodes begin: ``"reset"`` (first frames of real episodes) or ``"dataset"`` (anywhere in data).
        max_episode_steps: When to truncate; None or -1 for never.
        autoreset_mode: One of Gymnasium's.
        deterministic: Whether latents are means rather than samples; by default as the model's config says.
        doubt: Whether ``info["doubt"]`` says how much each step is to be doubted, and by what: see `TensorDream`.
        disagreement: The old name of ``doubt=True``.
        reward: ``"task"``, ``"formula"``, ``"head"`` or ``"disagreement"``, see `TensorDream`; with the last one the
            task's reward is ``info["reward_model"]``.
        doubt_penalty: Times the doubt, subtracted from the reward, which without it is ``info["reward_model"]``.
        max_doubt: Truncates where the doubt is larger, which ``info["too_doubtful"]`` says.
        reward_fn: ``f(observation, action, next_observation)``, which pays in place of a task: see `TensorDream`.
        termination_fn: The same, which says whether an episode ends: see `TensorDream`.
        render_mode: ``"rgb_array"`` or None.
        width: Width of rendered frames in pixels. Frames that the model dreams itself are a whole number times 64 wide
            and high, as `height` has room for.
        height: Height of rendered frames in pixels.
        precision: ``"32-true"``, ``"bf16"`` or ``"auto"``: bf16 for many slots on CPUs that are fast at it.
        device: Where the model runs.
        weights: The digest that the model's weights must have; by default any. The env's `spec` has it, so that
            ``gymnasium.make_vec(envs.spec)`` gives the same dreams or says that the weights have changed.
        clip_actions: Whether finite actions outside [-1, 1] are clipped to it rather than refused.

    Attributes:
        tensor_dream: What is stepped.
        state: Where its slots are.
        revision: Which weights it dreams with; None for a model that is in no folder, or not as it was loaded.

    Raises:
        AimeGymError: If a name is unknown, the model lacks what is asked for, or its weights are others than `weights`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - Gymnasium's own convention
    _pictures: DreamPictures | None = None  # Gymnasium closes what its constructor refused, too
    _has_begun = False
    max_episode_steps = _setting("max_episode_steps", "When episodes are truncated; None for never.")
    doubt_penalty = _setting("doubt_penalty", "What a step's doubt costs.")
    max_doubt = _setting("max_doubt", "The doubt beyond which episodes are truncated; None for never.")

    @known_keywords("a dream", {"uncertainty_penalty": "doubt_penalty", "max_disagreement": "max_doubt"})
    def __init__(
        self,
        embodiment: str | None = None,
        num_envs: int = 1,
        task: str | None = None,
        model: str | Path | WorldModel | None = None,
        obs_type: str | None = None,
        start: str = "reset",
        max_episode_steps: int | None = 500,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        deterministic: bool | None = None,
        disagreement: bool | None = None,
        doubt: bool | str = False,
        reward: str = "task",
        doubt_penalty: float = 0.0,
        max_doubt: float | None = None,
        reward_fn: UserFunction | None = None,
        termination_fn: UserFunction | None = None,
        render_mode: str | None = None,
        width: int = 320,
        height: int = 240,
        precision: str = "auto",
        device: str | torch.device = "cpu",
        weights: str | None = None,
        clip_actions: bool = False,
    ):
        if render_mode not in (None, "rgb_array"):
            raise AimeGymError(f"render_mode is 'rgb_array' or None; got {render_mode!r}.")
        self.render_mode = render_mode
        dream = self.tensor_dream = TensorDream(
            model,
            task,
            num_envs,
            device,
            precision,
            embodiment=embodiment,
            obs_type=obs_type and check_obs_type(obs_type),
            start=start,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            deterministic=deterministic,
            doubt=doubt_of(doubt, disagreement),
            reward=reward,
            doubt_penalty=doubt_penalty,
            max_doubt=max_doubt,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
            weights=weights,
        )
        self._measures = dict[str, type]()  # what infos say of each step, and at a reset
        if dream.doubt:
            self._measures["doubt"] = np.float32
        if dream.explores or dream.doubt_penalty:
            self._measures["reward_model"] = np.float64
        if dream.max_doubt is not None:
            self._measures["too_doubtful"] = np.bool_
        self.revision = dream.revision
        self.embodiment, self.task, self.model, self.sensors = dream.embodiment, dream.task, dream.model, dream.sensors
        self.num_envs, self.autoreset_mode = dream.num_envs, dream.autoreset_mode
        self.obs_type, self.clip_actions = obs_type or dream.obs_type, clip_actions
        config = self.model.config
        self.single_observation_space = observation_space(self.sensors, self.obs_type, config.feature_dim)
        self.single_action_space = action_space(config.body)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        drawn = width, height, self.tensor_dream.images
        self._pictures = DreamPictures(self.model, self.embodiment, *drawn) if render_mode else None
        modes = self.metadata["render_modes"] if can_be_drawn(self.model) else []
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode, "render_modes": modes}
        if self._pictures:
            self.metadata["render_fps"] = self._pictures.fps
        with torch.inference_mode():
            self.state = dream.blank()
        self._root = np.zeros((num_envs, self._pictures.root_dim if self._pictures else 0))

    @without_autocast()
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins episodes.

        Args:
            seed: Seed of the first slot, from which the others count on; or one a slot. None goes on with what the
                slots draw.
            options: ``"start"``: ``"reset"``, ``"dataset"``, an index of the model's starts or one a slot, or real
                frames ``{"observations": ..., "actions": ...}`` (see `aime_gym.observations.read_frames`), or a state
                to go on from, in every slot, such as `get_state` of a single dream gives: see `TensorDream.begin`.
                ``"reset_mask"``: [N] bool, the slots to reset; all by default.

        Returns:
            Observations of all slots, and infos of those that began: the keys of `step`, whose values are 0 as nothing
            was stepped, and ``"weights"``, the digest of the model's weights, where there is one (see `revision`).

        Raises:
            AimeGymError: If a seed or an option does not fit.
        """
        options = options or {}
        if unknown := set(options) - {"start", "reset_mask"}:
            raise unknown_name("reset option", unknown.pop(), ("start", "reset_mask"))
        mask = check_mask(options.get("reset_mask"), self.num_envs)
        super().reset(seed=int(seed) if isinstance(seed, (int, np.integer)) else None)
        seeds = self._seeds(seed, mask)
        infos: dict[str, Any] = {}
        with one_thread(self.num_envs <= FEW_SLOTS), torch.inference_mode():
            state = self.state
            if seeds:
                state = self.tensor_dream.seed(state, self._tensor(list(seeds)), list(seeds.values()))
            state = self.tensor_dream.begin(state, self._tensor(mask.nonzero()[0]), options.get("start"))
            self._go_on(state, mask, infos)
        return self.shown(), infos

    @without_autocast()
    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One agent step in every slot.

        Args:
            actions: [N, A] in [-1, 1], or N choices; those of slots due for their NEXT_STEP reset are ignored.

        Returns:
            Observations, rewards [N], terminations [N], truncations [N] and infos, with ``"start_index"`` where the
            episode began in the bank of starts, ``"doubt"``, ``"reward_model"`` and ``"too_doubtful"`` as asked for,
            and ``"diverged"`` where the model left the finite numbers (the slot keeps its last finite latent, earns
            nothing and is truncated).

        Raises:
            AimeGymError: If an action does not fit, or a slot needs a reset first; the message says which slot.
        """
        resets = self.check_ready()
        actions = check_actions(actions, self.num_envs, self.embodiment, resets, self.clip_actions)
        with one_thread(self.num_envs <= FEW_SLOTS), torch.inference_mode():
            came, told = self.advance(actions)
            infos: dict[str, Any] = {}
            for key, values, mask in told:
                add_info(infos, key, values, mask if resets is None else ~resets if mask is None else mask & ~resets)
            began = None if came.began is None else came.began.cpu().numpy()
            if came.final_observations is not None and began is not None:
                finals = _array(came.final_observations)
                infos = split_final(infos, began, [self._observation(finals[slot]) for slot in began.nonzero()[0]])
            self._go_on(came.state, began, infos)
        rewards = came.rewards.cpu().numpy().astype(np.float64)
        ends = self._ends(came.terminations), self._ends(came.truncations)
        return self.shown(), rewards, *ends, infos

    def advance(self, actions: np.ndarray) -> tuple[Transition, list[Told]]:
        """What comes of one step under checked actions [N, A], and what there is to say of it; `state` stays."""
        came = self.tensor_dream.transition(self.state, torch.from_numpy(actions).to(self.tensor_dream.device))
        if self._pictures:
            self._root += self._pictures.moved(came.state.latents)
        starts = self.state.starts.cpu().numpy()  # of the episodes that the step belongs to
        told: list[Told] = [("start_index", starts, starts >= 0)]
        if came.diverged is not None and bool(came.diverged.any()):
            told.append(("diverged", came.diverged.cpu().numpy(), None))
        if self._measures:
            most = self.tensor_dream.max_doubt
            doubtful = None if most is None or came.doubt is None else came.doubt > most
            measured = {"doubt": came.doubt, "reward_model": came.task_rewards, "too_doubtful": doubtful}
            for key, dtype in self._measures.items():
                told.append((key, measured[key].cpu().numpy().astype(dtype), None))  # type: ignore[union-attr]
        return came, told

    def go_on(self, state: DreamState, began: Tensor) -> None:
        """Goes on from a state of `tensor_dream`, in which the slots `began` [N] have begun anew."""
        self._go_on(state, began.cpu().numpy(), {})

    def check_ready(self) -> NDArray[np.bool_] | None:
        """The slots [N] that the next step resets, if any.

        Raises:
            AimeGymError: If a slot cannot be stepped.
        """
        state = self.state
        if not self._has_begun:
            slot = int((state.steps < 0).int().argmax())
            raise AimeGymError(f"Slot {slot} has not begun: call reset() first.")
        if state.done is self.tensor_dream.never or not bool(state.done.any()):
            return None
        if self.autoreset_mode is AutoresetMode.DISABLED:
            raise AimeGymError(
                f"Slot {int(state.done.int().argmax())} has ended: reset it first, e.g. "
                "reset(options={'reset_mask': ...})."
            )
        return state.done.cpu().numpy()

    def _seeds(self, seed: Any, mask: NDArray[np.bool_]) -> dict[int, int]:
        """The seeds of those slots in `mask` [N] that get one; slots that never had a seed get one from the env."""
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + slot for slot in range(self.num_envs)]
        elif not isinstance(seed, Sequence | np.ndarray):
            raise AimeGymError(f"A seed is an integer, one a slot, or None; got {seed!r}.")
        else:
            seeds = [None if one is None else int(one) for one in seed]
            if len(seeds) != self.num_envs:
                raise AimeGymError(f"Expected one seed a slot, {self.num_envs}; got {len(seeds)}.")
        chosen, blank = {}, (self.state.steps < 0).tolist()
        for slot in mask.nonzero()[0].tolist():
            own = seeds[slot]
            if own is None and blank[slot]:
                own = int(self.np_random.integers(2**31))
            if own is not None:
                chosen[slot] = own
        return chosen

    def _go_on(self, state: DreamState, began: NDArray[np.bool_] | None, infos: dict[str, Any]) -> None:
        """Takes a new state, and adds to `infos` where the slots that have begun in it began."""
        self.state = state
        if began is None:
            return
        self._has_begun = bool((state.steps >= 0).all())
        starts = state.starts.cpu().numpy()
        if self.revision is not None:
            add_info(infos, "weights", np.full(self.num_envs, self.revision.digest, object), began)
        known = began & (starts >= 0)
        for key, first in (
            ("start_index", starts),
            *((key, np.zeros(self.num_envs, of)) for key, of in self._measures.items()),
        ):
            _tell_also(infos, key, first, known if key == "start_index" else began)
        if self._pictures:
            self._root[began] = 0.0
            physics = self.tensor_dream.need_bank().starts.get("physics") if known.any() else None
            if physics is not None:
                self._root[known] = self._pictures.root(physics[starts[known]])

    @without_autocast()
    def render(self) -> tuple[np.ndarray, ...] | None:
        """A frame [height, width, 3] uint8 of every slot; None without a render_mode."""
        with one_thread(self.num_envs <= FEW_SLOTS):
            return self._pictures.render(self.state.latents, self._root) if self._pictures else None

    def close_extras(self, **kwargs: Any) -> None:
        """Frees the GL context."""
        if self._pictures:
            self._pictures.close()

    @property
    def reward_scale(self) -> float:
        """The size of a step's reward: see `TensorDream.reward_scale`."""
        return self.tensor_dream.reward_scale

    @property
    def starts(self) -> dict[str, np.ndarray]:
        """A copy of the model's bank of real frames; see `aime_gym.world_model.checkpoint.load_starts`."""
        return {name: rows.copy() for name, rows in self.tensor_dream.need_bank().starts.items()}

    @property
    def start_features(self) -> Tensor:
        """The latents of these starts, [M, F] float32."""
        return self.tensor_dream.need_bank().features.clone()

    def start_physics(self, index: int) -> NDArray[np.float64]:
        """The physics state [nq + nv (+ na)] of the start with that index, for the real env's ``options``."""
        return self.tensor_dream.need_bank().physics(index)

    def get_state(self) -> dict[str, Tensor]:
        """A copy of everything that decides what comes next, as plain tensors: a `DreamState`, and where roots are."""
        state = {name: tensor.clone() for name, tensor in self.state._asdict().items()}
        return {**state, "root": torch.from_numpy(self._root.copy())}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state` that `get_state` gave, bit for bit.

        Raises:
            AimeGymError: If it is of another model, number of slots or version.
        """
        if "noise" in state:
            raise AimeGymError("This state is of an older version, whose slots had generators: begin anew and save it.")
        if lacking := {*DreamState._fields, "root"} - set(state):
            raise AimeGymError(f"Expected what get_state() gives; {', '.join(sorted(lacking))} are missing.")
        own = self.state._asdict()
        if wrong := [name for name in (*own, "root") if not isinstance(state[name], Tensor)]:
            raise AimeGymError(f"Expected tensors, as get_state() gives; {', '.join(wrong)} are something else.")
        if any(state[name].shape != tensor.shape or state[name].dtype != tensor.dtype for name, tensor in own.items()):
            raise AimeGymError(
                f"Expected the state of {self.num_envs} slots with latents of {self.state.latents.shape[1]} numbers "
                f"and obs_type {self.obs_type!r}; got latents {tuple(state['latents'].shape)}."
            )
        with torch.inference_mode():
            device = self.tensor_dream.device
            self.state = DreamState(**{name: state[name].to(device, copy=True) for name in own})
        self._has_begun = bool((self.state.steps >= 0).all())
        root = state["root"].cpu().numpy().copy()
        # An env that renders may take the state of one that does not, or the reverse.
        self._root = root if root.shape == self._root.shape else np.zeros_like(self._root)

    def shown(self) -> Observation:
        """A copy of what all slots show."""
        return self._observation(_array(self.state.observations))

    def _observation(self, shown: np.ndarray) -> Observation:
        """[..., D] in the form of the observation space."""
        return to_shown(self.sensors, to_sensors(self.sensors, shown)) if self.obs_type == "dict" else shown

    def _ends(self, ends: Tensor) -> NDArray[np.bool_]:
        return np.zeros(self.num_envs, bool) if ends is self.tensor_dream.never else _array(ends)

    def _tensor(self, slots: Any) -> Tensor:
        return torch.as_tensor(slots, device=self.tensor_dream.device)


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor as an array, copied."""
    return tensor.numpy(force=True).copy()
