"""The dream itself: tensors in, tensors out, on one device. All the logic of dreams is here.

A `TensorDream` is what a dream is made of; what changes from step to step is a `DreamState`, which goes in and comes
out. `DreamVectorEnv` puts arrays around it, and `aime_gym.envs.dream.rollout` takes gradients through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from aime_gym.envs.dream_checks import (
    check_abilities,
    check_autoreset_mode,
    check_device,
    check_settings,
    check_weights,
    choose_task,
    load_model_of,
    place,
    shown_obs_type,
)
from aime_gym.envs.payment import Outcomes, Pay, Payment, UserFunction
from aime_gym.envs.start_bank import (
    DreamState,
    SlotNoise,
    StartBank,
    Transition,
    filter_frames,
    shared_bank,
    shared_parts,
    slot_keys,
)
from aime_gym.errors import AimeGymError, check_positive
from aime_gym.observations import read_frames
from aime_gym.world_model.checkpoint import revision_of
from aime_gym.world_model.fast_dynamics import BIG_BATCH, IMAGE_ROWS, FastDynamics, ImageBytes, choose_dtype
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.packed import without_autocast
from aime_gym.world_model.trust import warn_of_distrust

_HINT = " Choices are their vectors here: dream.embodiment.choices.encode."


class TensorDream:
    """N dreams of one world model, side by side, as functions of tensors.

    Gradients lead from observations, rewards and doubt to the actions, through as many steps as there are between two
    resets; under `torch.no_grad` a step is faster. Slots never influence each other: what a slot draws is a hash of its
    seed and of how often it has drawn, so that neither the number of slots nor the device changes its noise. Products
    of matrices are rounded otherwise for another number of rows: by less than 1e-5 a step in float32.

    Examples:
        >>> import torch, aime_gym
        >>> dream = aime_gym.TensorDream("walker-state", task="walk", num_envs=16, doubt=True)
        >>> state = dream.reset(seeds=0)
        >>> gain = torch.zeros(24, 6, requires_grad=True)
        >>> earned = 0.0
        >>> for _ in range(3):
        ...     actions = torch.tanh(state.observations @ gain)
        ...     state, observations, rewards, terminations, truncations, doubt = dream.step(state, actions)
        ...     earned = earned + rewards.mean()
        >>> earned.backward()
        >>> gain.grad.shape
        torch.Size([24, 6])

    Args:
        model: A loaded model, a folder, or a bundled name; the embodiment's bundled one by default. Steps are made with
            copies of its weights, which all dreams share: a model that trains on needs a new dream.
        task: The task whose reward it gives; by default the body's first task that the model's heads reward.
        num_envs: N
        device: Where everything is computed, and where actions are to be.
        precision: ``"32-true"``, ``"bf16"`` or ``"auto"``: bf16 for many slots on CPUs that are fast at it.
        embodiment: The body, e.g. ``"walker"``; by default the model's own.
        obs_type: ``"state"``, ``"image"`` or ``"latent"``; by default ``"image"`` with a model of images, else
            ``"state"``. Images have no gradient. ``"dict"`` is ``"state"``, with dicts for functions of the user's.
        start: Where episodes begin: ``"reset"`` (first frames of real episodes) or ``"dataset"`` (anywhere in the
            data).
        max_episode_steps: When to truncate; None or -1 for never.
        autoreset_mode: One of Gymnasium's. ``"Disabled"`` lets episodes go on until `begin`.
        deterministic: Whether latents are means rather than samples; by default as the model's config says.
        doubt: How much each step is to be doubted: True for the KL of the posterior that sees the frame which the dream
            decodes from the prior (see `WorldModel.doubt`), ``"ensemble"`` for the disagreement of the
            ensemble heads of Plan2Explore (Sekar et al., 2020), False for neither.
        reward: ``"formula"`` is the task's own, of the sensors that the model decodes; ``"head"`` what its reward head
            predicts; ``"task"`` the formula where there is one, else the head; ``"disagreement"`` the doubt, for agents
            that seek what the model does not know; ``"none"`` nothing.
        doubt_penalty: Times the doubt, subtracted from the reward.
        max_doubt: Truncates where the doubt is larger.
        reward_fn: ``f(observation, action, next_observation)``, which gives the rewards [N] of N steps in place of a
            task. It sees all sensors that the model decodes, side by side [N, D], or as a dict with
            ``obs_type="dict"``, and actions [N, A], those of logged data in their units: tensors, with gradients,
            where it takes them, else arrays. It is tried when the dream is made.
        termination_fn: The same, which says [N] bool whether steps end the episode, in place of a head.
        weights: The digest that the model's weights must have; by default any.

    Attributes:
        revision: Which weights it dreams with; None for a model that is in no folder, or not as it was loaded.

    Raises:
        AimeGymError: If a name is unknown, the model lacks what is asked for, or its weights are others than `weights`.
    """

    @without_autocast()
    def __init__(
        self,
        model: str | Path | WorldModel | None = None,
        task: str | None = None,
        num_envs: int = 1,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        *,
        embodiment: str | None = None,
        obs_type: str | None = None,
        start: str = "reset",
        max_episode_steps: int | None = 500,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        deterministic: bool | None = None,
        doubt: bool | str = False,
        reward: str = "task",
        doubt_penalty: float = 0.0,
        max_doubt: float | None = None,
        reward_fn: UserFunction | None = None,
        termination_fn: UserFunction | None = None,
        weights: str | None = None,
    ):
        self.embodiment, loaded = load_model_of(embodiment, model, obs_type == "image")
        self.task = choose_task(self.embodiment, loaded, task)
        self.num_envs = check_positive(num_envs, "num_envs")
        self.max_episode_steps = (
            None if max_episode_steps in (None, -1) else check_positive(max_episode_steps, "max_episode_steps")
        )
        self.autoreset_mode = check_autoreset_mode(autoreset_mode)
        self.obs_type = "state" if obs_type == "dict" else obs_type or shown_obs_type(loaded)
        self.start = start
        self.deterministic = loaded.config.deterministic if deterministic is None else deterministic
        self.doubt_penalty, self.max_doubt = doubt_penalty, max_doubt
        check_settings(self.obs_type, start, deterministic, doubt, reward, doubt_penalty, max_doubt, reward_fn)
        self.explores = reward == "disagreement"
        needed = self.explores or bool(doubt_penalty) or max_doubt is not None
        self.doubt: bool | str = doubt or needed

        self.device = check_device(device)
        self._asynchronous = self.device.type != "cpu"  # to look at a number waits for all that comes before it
        self.model, parts = loaded, shared_parts(loaded)
        check_weights(revision := revision_of(loaded, parts.weights), weights)
        self.revision = revision
        if loaded.cell.initial_state.device != self.device:
            self.model = parts.get(("model", self.device), lambda: place(loaded, self.device))
            parts = shared_parts(self.model)
        config = self.model.config
        self.sensors = tuple(sensor for sensor in config.sensors if sensor.name in self.model.observed)
        asks_head = reward_fn is None and reward != "none"
        check_abilities(self.model, self.task, self.obs_type, self.doubt == "ensemble", not asks_head)
        if asks_head:
            warn_of_distrust(self.model.folder, self.task)
        sees_images = "image" in self.model.observed  # whose doubt is not the fast dynamics' own
        own_doubt = self.doubt if self.doubt == "ensemble" or not sees_images else False
        names = tuple(sensor.name for sensor in self.sensors) if self.obs_type == "state" or own_doubt is True else ()
        functions = reward_fn, termination_fn, obs_type == "dict"
        self._payment = Payment(reward, self.embodiment, self.task, self.model, names, *functions)
        shows_all = self.obs_type == "state" and names == self._payment.names
        pays_by_shown, names = shows_all or not self._payment.needs_before, self._payment.names
        head = None if self.model.heads is None or not self._payment.by_head else self.task
        dtype = choose_dtype(precision, self.num_envs, self.device)
        key = (names, head, self.num_envs < BIG_BATCH, dtype, own_doubt)
        self.dynamics: FastDynamics = parts.get(
            ("dynamics", *key),
            lambda: FastDynamics(self.model, names, head, self.num_envs, dtype, self.device, own_doubt),
        )
        own_functions = reward_fn is not None or self._payment.terminates
        alone = self.num_envs == 1 and dtype == torch.float32 and not self._asynchronous and not own_functions
        paid = self.obs_type, reward, self.embodiment.name, self.task, self.embodiment.action_repeat
        decided = ("outcome", *key, *paid) if alone and own_doubt == self.doubt and self.obs_type != "image" else None
        image_dtype = choose_dtype(precision, IMAGE_ROWS * self.num_envs, self.device)
        make = lambda: ImageBytes(self.model, image_dtype)  # noqa: E731
        self.images: ImageBytes | None = parts.get(("images", image_dtype), make) if self.obs_type == "image" else None
        """What decodes the images that it shows."""
        sizes = self.obs_type, pays_by_shown, bool(self.doubt), self.images, decided
        self._outcomes = Outcomes(self.model, self.dynamics, self._payment, *sizes)
        self._goes_on = config.code_of(self.model.observed).goes_on
        self._bank = bank = shared_bank(self.model)
        if bank is not None:
            self._bank_observations: Tensor = parts.get(
                ("shown", bank, self.obs_type, image_dtype, *key),
                lambda: self._outcomes.show(bank.features, None, self._last(bank.starts)).contiguous(),
            )
        tried = self.blank().latents.repeat(2, 1) if bank is None else bank.features
        drawn = 2 * torch.rand(len(tried), config.action_dim, generator=torch.Generator().manual_seed(0)) - 1
        self._payment.try_on(self.dynamics, tried, drawn.to(self.device))
        self._noise = SlotNoise(config.stochastic_dim, not self._asynchronous)
        self.never = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        """What says that no slot has ended where none can, [N] bool."""

    def blank(self) -> DreamState:
        """The state of slots that have not begun."""
        count, device = self.num_envs, self.device
        latents = torch.zeros(count, self.model.config.feature_dim, device=device)
        zeros = torch.zeros(count, dtype=torch.int64, device=device)
        with torch.no_grad():
            shown = torch.zeros_like(self._outcomes.show(latents[:1], None))
        return DreamState(
            latents,
            shown.expand(count, *shown.shape[1:]).clone(),
            keys=zeros,
            counts=zeros.clone(),
            steps=torch.full_like(zeros, -1),
            done=torch.zeros(count, dtype=torch.bool, device=device),
            starts=torch.full_like(zeros, -1),
        )

    @without_autocast()
    def reset(self, seeds: int | Sequence[int] | Tensor, start: Any = None) -> DreamState:
        """Begins an episode in every slot.

        Args:
            seeds: Seed of the first slot, which the others count on from; or one a slot.
            start: See `begin`.

        Returns:
            The state, with what it looks like in `observations`.

        Raises:
            AimeGymError: If there is not one seed a slot, one is negative, or a start does not fit.
        """
        if isinstance(seeds, (int, np.integer)):
            seeds = range(int(seeds), int(seeds) + self.num_envs)
        elif isinstance(seeds, Tensor):
            seeds = seeds.tolist()
        if len(seeds) != self.num_envs:
            raise AimeGymError(f"Expected one seed a slot, {self.num_envs}; got {len(seeds)}.")
        slots = torch.arange(self.num_envs, device=self.device)
        return self.begin(self.seed(self.blank(), slots, seeds), slots, start)

    def seed(self, state: DreamState, slots: Tensor, seeds: Sequence[int]) -> DreamState:
        """The state with other keys, of `seeds`, for `slots` [B], which have drawn nothing yet.

        Raises:
            AimeGymError: If one is negative.
        """
        keys = slot_keys(seeds, self.device)
        return state._replace(keys=state.keys.index_copy(0, slots, keys), counts=state.counts.index_fill(0, slots, 0))

    def begin(self, state: DreamState, slots: Tensor, start: Any = None) -> DreamState:
        """The state with new episodes in `slots`; the others stay as they are.

        Args:
            state: The state of all slots.
            slots: Which, [B] int64.
            start: ``"reset"``, ``"dataset"``, an index of the model's starts or one a slot [N], or real frames
                ``{"observations": ..., "actions": ...}`` (see `aime_gym.observations.read_frames`), or a state to go on
                from, which all slots share unless it has as many: a `DreamState`, what `DreamEnv.get_state` gives, or
                latents of the model, [F] or [N, F] float32. By default what the dream was made with.

        Raises:
            AimeGymError: If there is no such start, or the model makes no finite latent of it.
        """
        start = self.start if start is None else start
        if isinstance(start, DreamState):
            start = start._asdict()
        if isinstance(start, (Tensor, np.ndarray)) and "float" in str(start.dtype):
            start = {"latents": start}
        if isinstance(start, Mapping) and "latents" in start:
            features, observations = (tensor[slots] for tensor in self._given(**start))
            indices, told = torch.full_like(slots, -1), "these latents."
        elif isinstance(start, Mapping):
            frames, actions = read_frames(start, self.sensors, self.num_envs, self.embodiment.choices)
            features = filter_frames(self.model, frames, actions)[slots]
            with torch.no_grad():
                last = self._last(frames)
                observations = self._outcomes.show(features, None, None if last is None else last[slots])
            indices, told = torch.full_like(slots, -1), "these frames: are they in the sensors' units?"
        else:
            bank = self.need_bank()
            indices = bank.choose(start, slots, self.num_envs, state.keys[slots], state.counts[slots])
            features, observations = bank.features[indices], self._bank_observations[indices]
            told = f"the starts in {self.model.folder}: numbers in starts.npz or its weights are far too large."
        if not bool(features.isfinite().all() & observations.isfinite().all()):
            raise AimeGymError(f"The model makes no finite latent or observation of {told}")
        return DreamState(
            latents=state.latents.index_copy(0, slots, features),
            observations=state.observations.index_copy(0, slots, observations),
            keys=state.keys,
            counts=state.counts.index_add(0, slots, torch.ones_like(slots)),
            steps=state.steps.index_fill(0, slots, 0),
            done=state.done.index_fill(0, slots, False),
            starts=state.starts.index_copy(0, slots, indices),
        )

    def _given(self, latents: Any, observations: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
        """A state that somebody gives, in every slot: latents [N, F], and what they look like [N, ...].

        Args:
            latents: [F], [1, F] or [N, F], of this model.
            observations: What they looked like in the dream that they are of, [1, ...] or [N, ...].

        Raises:
            AimeGymError: If they are of another model or number of slots, or looked like something else.
        """
        dim, latents = self.model.config.feature_dim, torch.as_tensor(latents, device=self.device)
        latents = latents[None] if latents.ndim == 1 else latents
        if latents.dtype != torch.float32 or latents.shape not in ((1, dim), (self.num_envs, dim)):
            raise AimeGymError(
                f"A state to go on from has latents [{dim}] or [{self.num_envs}, {dim}] in float32, one for all slots "
                f"or one each; got {list(latents.shape)} in {latents.dtype}."
            )
        shown = self._outcomes.show(latents, None)
        if observations is not None:
            if observations.shape != shown.shape or observations.dtype != shown.dtype:
                raise AimeGymError("This state is of a dream that shows something else: give its latents alone.")
            shown = observations.to(self.device)
        return latents.expand(self.num_envs, -1), shown.expand(self.num_envs, *shown.shape[1:])

    @without_autocast()
    def step(self, state: DreamState, actions: Tensor) -> tuple[Any, ...]:
        """One agent step in every slot, and the resets of slots that end or have ended.

        Args:
            state: What `reset` or the last step gave.
            actions: [N, A] float32 in [-1, 1], not checked, on the dream's device; choices as `Choices.encode` gives.

        Returns:
            The next state, observations as `DreamState` has them, rewards [N] float32, terminations and truncations
            [N] bool, and if there is a `doubt` that of each step, [N] float32.

        Raises:
            AimeGymError: If the actions are of another shape, type or device.
        """
        if (
            actions.shape != (expected := (self.num_envs, self.model.config.action_dim))
            or actions.dtype != torch.float32
            or actions.device != self.device
        ):
            got = f"{tuple(actions.shape)} in {actions.dtype} ({type(actions).__name__})"
            raise AimeGymError(
                f"Expected a tensor of actions of shape {expected} in float32 on {self.device}; got {got}."
                f"{_HINT if self.embodiment.choices else ''}"
            )
        came = self.transition(state, actions)
        ends = came.terminations.clone(), came.truncations.clone()  # copies, which the caller may change
        return came.state, came.state.observations, came.rewards, *ends, *([] if came.doubt is None else [came.doubt])

    def transition(self, state: DreamState, actions: Tensor) -> Transition:
        """Does what `step` does with `state` and `actions`, and returns everything that is known about it."""
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and bool(state.done.any()):
            came = self.advance(state, actions, ~state.done)
            return came._replace(state=self.begin(came.state, state.done.nonzero()[:, 0]), began=state.done)
        came = self.advance(state, actions)
        ended = came.state.done
        if self.autoreset_mode is AutoresetMode.SAME_STEP and bool(ended.any()):
            begun = self.begin(came.state, ended.nonzero()[:, 0])
            return came._replace(state=begun, began=ended, final_observations=came.state.observations)
        return came

    def advance(
        self, state: DreamState, actions: Tensor, active: Tensor | None = None, pay: Pay | None = None
    ) -> Transition:
        """One agent step without any reset: the one place where a dream goes on.

        Args:
            state: The state of all slots.
            actions: [N, A]
            active: Slots that take the step, [N] bool, by default all. The others draw, earn and end nothing.
            pay: What pays for the task, by default what was chosen; see `pay`.
        """
        noise, counts = (None, state.counts) if self.deterministic else self._noise.draw(state.keys, state.counts)
        begins = state.latents, state.observations, actions, noise
        outcome = self._outcomes(begins, self._asynchronous, pay)
        latents, shown, rewards, doubt, ends, diverged = outcome
        task_rewards, (terminations, logits) = rewards, ends or (self.never, None)
        steps = state.steps + 1
        truncations = self.never if self.max_episode_steps is None else steps >= self.max_episode_steps
        if diverged is not None:
            rewards = task_rewards = rewards.masked_fill(diverged, 0.0)
            truncations = truncations | diverged
        if doubt is not None:
            if self.doubt_penalty or self.explores:
                priced = doubt if diverged is None else doubt.masked_fill(diverged, 0.0)
                rewards = (priced if self.explores else rewards) - self.doubt_penalty * priced
            if diverged is not None:
                doubt = doubt.masked_fill(diverged, torch.inf)
            if self.max_doubt is not None:
                truncations = truncations | (doubt > self.max_doubt)
        if active is not None:
            rewards = rewards.masked_fill(~active, 0.0)
            terminations, truncations = terminations & active, truncations & active
            counts = torch.where(active, counts, state.counts)
        done = terminations | truncations if self.terminates else truncations
        following = DreamState(latents, shown, state.keys, counts, steps, done, state.starts)
        return Transition(following, rewards, terminations, truncations, task_rewards, logits, doubt, diverged)

    def pay(self, owed: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """What the task pays for H steps at once, which takes little longer than for one of them: [H, N].

        Args:
            owed: The arguments of each step's payment, which were noted in place of it.
        """
        if self.explores:
            return torch.zeros(len(owed), self.num_envs, device=self.device)
        return self._payment(*map(torch.cat, zip(*owed, strict=True))).view(len(owed), -1)

    @property
    def terminates(self) -> bool:
        """Whether episodes can terminate: by a function of the user's, or by a head that predicts it."""
        return self._payment.terminates

    @property
    def reward_scale(self) -> float:
        """The size of a step's reward: see `Heads.reward_scale`; 1 for a model without heads, and for doubt."""
        return 1.0 if self.explores else self._payment.scale

    def _last(self, frames: Mapping[str, Any]) -> Tensor | None:
        """The last of frames [K, N, ...] as this dream would show them, where anything goes on from it: [N, D]."""
        if self.obs_type != "state" or not self._goes_on:
            return None
        last = np.concatenate([np.asarray(frames[sensor.name][-1], np.float32) for sensor in self.sensors], -1)
        return torch.from_numpy(last).to(self.device)

    def lack_room(self, state: DreamState, steps: int) -> Tensor:
        """Slots whose episode would, from `state` on, be truncated within so many `steps`, [N] bool."""
        return self.never if self.max_episode_steps is None else state.steps + steps > self.max_episode_steps

    def need_bank(self) -> StartBank:
        """The model's bank of starts, whose arrays all its dreams share.

        Raises:
            AimeGymError: If it has none.
        """
        if self._bank is None:
            raise AimeGymError(
                "This model has no starts.npz to begin dreams from: `aime-gym fit-heads` makes one, or pass real "
                "frames, reset(options={'start': {'observations': ..., 'actions': ...}})."
            )
        return self._bank
