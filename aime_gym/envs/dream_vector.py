"""The dream: a world model as a vector env, where all the logic of dreams is."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.envs.autocast import without_autocast
from aime_gym.envs.dream_checks import (
    check_abilities,
    check_actions,
    check_autoreset_mode,
    check_device,
    check_mask,
    check_number,
    choose_task,
    load_model_of,
    place,
    shown_obs_type,
)
from aime_gym.envs.dream_pictures import DreamPictures, decode_images
from aime_gym.envs.infos import add_info, split_final
from aime_gym.envs.noise import SlotNoise
from aime_gym.envs.spaces import action_space, observation_space, to_sensors
from aime_gym.envs.starts import MODES, StartBank, filter_frames, read_frames
from aime_gym.envs.threads import one_thread
from aime_gym.errors import AimeGymError, check_positive, known_keywords, unknown_name
from aime_gym.world_model.checkpoint import load_starts
from aime_gym.world_model.fast_dynamics import FastDynamics, choose_dtype
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import warn_of_distrust

FEW_SLOTS = 8
"""Up to here the products of a step are too small to share between threads."""
DOUBTS = ("posterior", "ensemble")
REWARDS = ("task", "disagreement")
Observation = np.ndarray | dict[str, np.ndarray]


class DreamVectorEnv(gymnasium.vector.VectorEnv):
    """N dreams of one world model, side by side: a step is one batched step of the prior.

    Slots never influence each other: each draws from its own generator, seeded at reset. Episodes are truncated; they
    terminate only where the model has a head that predicts it.

    Args:
        embodiment: The body, e.g. ``"walker"``; by default the model's own.
        num_envs: N
        task: Whose reward; by default the body's first task that the model's heads reward.
        model: A loaded model, a folder, or a bundled name; the body's bundled one by default. Steps are made with a
            copy of its weights: a model that trains on needs a new dream.
        obs_type: ``"state"``, ``"dict"``, ``"image"`` or ``"latent"``; by default ``"image"`` with a model of images,
            else ``"state"``.
        start: Where episodes begin: ``"reset"`` (first frames of real episodes) or ``"dataset"`` (anywhere in the
            data).
        max_episode_steps: When to truncate; None or -1 for never.
        autoreset_mode: One of Gymnasium's.
        deterministic: Whether latents are means rather than samples.
        disagreement: Whether ``info["disagreement"]`` says how much each step is to be doubted.
        doubt: What the disagreement is between: ``"posterior"``, of the frame that the dream itself decodes, and prior
            (see `WorldModel.inconsistency`), or the ``"ensemble"`` heads of Plan2Explore (Sekar et al., 2020).
        reward: ``"task"``, or ``"disagreement"``: an agent that earns it seeks what the model does not know; the task's
            reward is ``info["reward_model"]`` then.
        uncertainty_penalty: Times the disagreement, subtracted from the reward; the reward without it is
            ``info["reward_model"]``.
        max_disagreement: Truncates where the disagreement is larger, which ``info["too_uncertain"]`` says.
        render_mode: ``"rgb_array"`` or None.
        width: Of rendered frames, in pixels. Frames that the model dreams itself are 64 times a whole number wide and
            high, as `height` has room for.
        height: Of rendered frames, in pixels.
        precision: ``"32-true"``, ``"bf16"`` or ``"auto"``: bf16 for many slots on CPUs that are fast at it.
        device: Where the model runs.

    Raises:
        AimeGymError: If a name is unknown, or the model lacks what is asked for.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - Gymnasium's own convention
    _pictures: DreamPictures | None = None  # Gymnasium closes what its constructor refused, too

    @known_keywords("a dream")
    @without_autocast()
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
        deterministic: bool = False,
        disagreement: bool = False,
        doubt: str = "posterior",
        reward: str = "task",
        uncertainty_penalty: float = 0.0,
        max_disagreement: float | None = None,
        render_mode: str | None = None,
        width: int = 320,
        height: int = 240,
        precision: str = "auto",
        device: str | torch.device = "cpu",
    ):
        self.embodiment, loaded = load_model_of(embodiment, model, obs_type == "image")
        self.task = choose_task(self.embodiment, loaded, task)
        self.num_envs = check_positive(num_envs, "num_envs")
        self.max_episode_steps = (
            None if max_episode_steps in (None, -1) else check_positive(max_episode_steps, "max_episode_steps")
        )
        self.autoreset_mode = check_autoreset_mode(autoreset_mode)
        self.obs_type = obs_type = obs_type or shown_obs_type(loaded)
        self._start, self._deterministic = start, deterministic
        self.uncertainty_penalty, self.max_disagreement = uncertainty_penalty, max_disagreement
        if not isinstance(start, str) or start not in MODES:
            raise unknown_name("start", start, MODES)
        check_number(uncertainty_penalty, "uncertainty_penalty")
        if max_disagreement is not None:
            check_number(max_disagreement, "max_disagreement")
        if doubt not in DOUBTS:
            raise unknown_name("doubt", doubt, DOUBTS)
        if reward not in REWARDS:
            raise unknown_name("reward", reward, REWARDS)
        self.explores = reward == "disagreement"
        self._doubts = disagreement or self.explores or bool(uncertainty_penalty) or max_disagreement is not None
        if render_mode not in (None, "rgb_array"):
            raise AimeGymError(f"render_mode is 'rgb_array' or None; got {render_mode!r}.")
        self.render_mode = render_mode

        self._device = check_device(device)
        self.model = place(loaded, self._device)
        config = self.model.config
        self.sensors = tuple(sensor for sensor in config.sensors if sensor.name in self.model.observed)
        self.single_observation_space = observation_space(self.sensors, obs_type, config.feature_dim)
        self.single_action_space = action_space(config.action_dim)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self.asks_ensemble = doubt == "ensemble"
        check_abilities(self.model, self.task, obs_type, self._doubts and self.asks_ensemble)
        warn_of_distrust(self.model.folder, self.task)

        self.dynamics = FastDynamics(
            self.model,
            [sensor.name for sensor in self.sensors] if obs_type in ("state", "dict") else [],
            None if self.model.heads is None else self.task,
            num_envs,
            choose_dtype(precision, num_envs, self._device),
            self._device,
        )
        self._bank = self._load_bank()
        self._pictures = DreamPictures(self.model, self.embodiment, width, height) if render_mode else None
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        if self._pictures:
            self.metadata["render_fps"] = self._pictures.fps

        self._noise = SlotNoise(num_envs, config.stochastic_dim)
        self._state = torch.zeros(num_envs, config.feature_dim, device=self._device)
        with torch.inference_mode():
            shown = self._show(self._state[:1])
            self._bank_observations = shown if self._bank is None else self._show(self._bank.features)
        self._observations = np.zeros((num_envs, *shown.shape[1:]), shown.dtype)
        self._steps = np.zeros(num_envs, np.int64)
        self._done = np.zeros(num_envs, bool)
        self._begun = np.zeros(num_envs, bool)
        self._root = np.zeros((num_envs, self._pictures.root_dim if self._pictures else 0))

    @without_autocast()
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins episodes.

        Args:
            seed: Of the first slot, the others follow; or one a slot. None goes on with the slots' generators.
            options: ``"start"``: ``"reset"``, ``"dataset"``, an index of the model's starts or one a slot, or real
                frames ``{"observations": ..., "actions": ...}`` (see `aime_gym.envs.starts.read_frames`).
                ``"reset_mask"``: [N] bool, the slots to reset; all by default.

        Returns:
            Observations of all slots, and ``info["start_index"]`` of those that began in the bank of starts.

        Raises:
            AimeGymError: If a seed or an option does not fit.
        """
        options = options or {}
        if unknown := set(options) - {"start", "reset_mask"}:
            raise unknown_name("reset option", unknown.pop(), ("start", "reset_mask"))
        slots = check_mask(options.get("reset_mask"), self.num_envs).nonzero()[0]
        super().reset(seed=int(seed) if isinstance(seed, (int, np.integer)) else None)
        self._noise.seed(seed, slots, self.np_random)
        infos: dict[str, Any] = {}
        with one_thread(self.num_envs <= FEW_SLOTS), torch.inference_mode():
            self._begin(slots, options.get("start", self._start), infos)
        return self._observation(self._observations.copy()), infos

    @without_autocast()
    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One agent step in every slot.

        Args:
            actions: [N, A] in [-1, 1]; those of slots that are due for their NEXT_STEP reset are ignored.

        Returns:
            Observations, rewards [N], terminations [N], truncations [N] and infos, with ``"disagreement"``,
            ``"reward_model"`` and ``"too_uncertain"`` as asked for, and ``"diverged"`` where the model left the
            finite numbers (the slot keeps its last finite latent, earns nothing and is truncated).

        Raises:
            AimeGymError: If an action does not fit, or a slot needs a reset first; the message says which slot.
        """
        resets = self._check_ready()
        actions = check_actions(actions, (self.num_envs, self.model.config.action_dim), resets)
        active = None if resets is None else ~resets
        infos: dict[str, Any] = {}
        with one_thread(self.num_envs <= FEW_SLOTS), torch.inference_mode():
            rewards, terminations, truncations = self._advance(
                torch.from_numpy(actions).to(self._device), active, infos
            )
            if resets is not None:
                rewards[resets] = 0.0
                terminations[resets] = truncations[resets] = False
                self._begin(resets.nonzero()[0], self._start, infos)
            self._done = terminations | truncations
            if self.autoreset_mode is AutoresetMode.SAME_STEP and self._done.any():
                done = self._done.copy()
                ended = done.nonzero()[0]
                finals = [self._observation(self._observations[slot].copy()) for slot in ended]
                infos = split_final(infos, done, finals)
                self._begin(ended, self._start, infos)
        return self._observation(self._observations.copy()), rewards, terminations, truncations, infos

    @without_autocast()
    def begin_window(self, steps: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a window of steps without an end begins with: slots whose episode would end within it begin anew.

        Args:
            steps: H

        Returns:
            Latents [N, F], what they look like [N, D], and the noise of the window's steps [H, N, S], None if
            `deterministic`.

        Raises:
            AimeGymError: If an episode is shorter than the window, or the env needs a reset first.
        """
        if self._check_ready() is not None:
            self._begin_anew(self._done.nonzero()[0])
        if self.max_episode_steps is not None:
            if steps > self.max_episode_steps:
                raise AimeGymError(
                    f"Windows of {steps} steps do not fit into episodes of {self.max_episode_steps}: lengthen the "
                    "episodes (a horizon of the dream), or shorten the windows (n_steps of SHAC)."
                )
            self._begin_anew(self._lack_room(steps).nonzero()[0])
        state, seen = self._state.clone(), torch.from_numpy(self._observations.copy()).to(self._device)
        if self._deterministic:
            return state, seen, None
        return state, seen, torch.stack([self._noise.draw() for _ in range(steps)]).to(self._device)

    @without_autocast()
    @torch.inference_mode()
    def end_window(self, state: Tensor, seen: Tensor, steps: int, ended: Tensor | None = None) -> NDArray[np.bool_]:
        """Goes on from the latents at the end of a window; slots that left the finite numbers begin anew.

        Args:
            state: [N, F]
            seen: What they look like, [N, D].
            steps: H
            ended: [N] bool, slots whose episode ended within the window: they begin anew, too.

        Returns:
            The slots whose episode is over, [N]: those that begin anew, and those without room for another such window.
        """
        self._state = state.clone()
        self._steps += steps
        self._observations = seen.cpu().numpy().copy()
        over = ~(self._state.isfinite().all(1) & seen.isfinite().all(1))
        if ended is not None:
            over |= ended
        ends = over.cpu().numpy()
        finished = ends | self._lack_room(steps)
        self._begin_anew(ends.nonzero()[0])
        return finished

    def _lack_room(self, steps: int) -> NDArray[np.bool_]:
        """Slots whose episode would be truncated within so many steps, [N]."""
        limit = math.inf if self.max_episode_steps is None else self.max_episode_steps
        return self._steps + steps > limit

    @torch.inference_mode()
    def _begin_anew(self, slots: NDArray[np.int64]) -> None:
        if slots.size:
            self._begin(slots, self._start, {})

    def _advance(
        self, actions: Tensor, active: NDArray[np.bool_] | None, infos: dict[str, Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Steps the prior, decodes, and says who is rewarded and who ends: rewards, terminations, truncations [N]."""
        noise = None if self._deterministic else self._noise.draw(active).to(self._device)
        before, doubt = self._state, None
        self._state, means = self.dynamics.step(before, actions, noise)
        decoded, diverged = means.cpu().numpy(), None
        if not math.isfinite(decoded.sum() + self._state.sum().item()):
            diverged = self._recover(before, means)
            decoded = means.cpu().numpy()
        if self._doubts and self.asks_ensemble:
            doubt = self.dynamics.disagreement(before, actions).cpu().numpy()
        elif self._doubts:
            doubt = self.model.inconsistency(self._state).cpu().numpy()
        if doubt is not None and not np.isfinite(doubt).all():
            diverged = ~np.isfinite(doubt) | (False if diverged is None else diverged)
        self._observations = self._show(self._state, decoded)
        if self._pictures:
            self._root += self._pictures.moved(self._state)
        self._steps += 1 if active is None else active

        rewards = decoded[:, -1].astype(np.float64)
        terminations = decoded[:, -2] > 0 if self.dynamics.terminates else np.zeros(self.num_envs, bool)
        truncations = np.zeros(self.num_envs, bool)
        if self.max_episode_steps is not None:
            truncations |= self._steps >= self.max_episode_steps
        if diverged is not None:
            rewards[diverged] = 0.0
            truncations |= diverged
            add_info(infos, "diverged", diverged, active)
        if doubt is not None:
            priced = doubt.astype(np.float64)
            if diverged is not None:
                priced[diverged], doubt[diverged] = 0.0, np.inf
            add_info(infos, "disagreement", doubt, active)
            if self.uncertainty_penalty or self.explores:
                add_info(infos, "reward_model", rewards, active)
                rewards = (priced if self.explores else rewards) - self.uncertainty_penalty * priced
            if self.max_disagreement is not None:
                too_uncertain = doubt > self.max_disagreement
                truncations |= too_uncertain
                add_info(infos, "too_uncertain", too_uncertain, active)
        return rewards, terminations, truncations

    def _recover(self, before: Tensor, means: Tensor) -> NDArray[np.bool_]:
        """Puts slots whose latent or decoding is not finite back to `before` [N, F]; returns which, [N]."""
        bad = ~(self._state.isfinite().all(1) & means.isfinite().all(1))
        self._state[bad] = before[bad]
        means[bad] = self.dynamics.decode(before)[bad].nan_to_num()
        return bad.cpu().numpy()

    def _begin(self, slots: NDArray[np.int64], start: Any, infos: dict[str, Any]) -> None:
        """Puts `slots` at the start of a dream."""
        roots: Any = 0.0
        if isinstance(start, Mapping):
            frames, actions = read_frames(start, self.sensors, self.num_envs)
            features = filter_frames(self.model, frames, actions)[slots]
            observations, told = self._show(features), "these frames: are they in the sensors' units?"
        else:
            bank = self._need_bank()
            indices = bank.choose(start, slots, self._noise)
            features, observations = bank.features[indices], self._bank_observations[indices]
            told = f"the starts in {self.model.folder}: numbers in starts.npz or its weights are far too large."
            if self._pictures and "physics" in bank.starts:
                roots = self._pictures.root(bank.starts["physics"][indices])
            started = np.zeros(self.num_envs, np.int64)
            started[slots] = indices
            mask = np.zeros(self.num_envs, bool)
            mask[slots] = True
            add_info(infos, "start_index", started, mask)
        if not (bool(features.isfinite().all()) and np.isfinite(observations).all()):
            raise AimeGymError(f"The model makes no finite latent or observation of {told}")
        self._state[slots] = features
        self._observations[slots] = observations
        self._steps[slots] = 0
        self._root[slots] = roots
        self._done[slots], self._begun[slots] = False, True

    @without_autocast()
    def render(self) -> tuple[np.ndarray, ...] | None:
        """A frame [height, width, 3] uint8 of every slot; None without a render_mode."""
        with one_thread(self.num_envs <= FEW_SLOTS):
            return self._pictures.render(self._state, self._root) if self._pictures else None

    def close_extras(self, **kwargs: Any) -> None:
        """Frees the GL context."""
        if self._pictures:
            self._pictures.close()

    @property
    def reward_scale(self) -> float:
        """The size of a step's reward: see `Heads.reward_scale`; 1 for a model without heads, and for doubt."""
        return 1.0 if self.explores or self.model.heads is None else self.model.heads.reward_scale

    @property
    def starts(self) -> dict[str, np.ndarray]:
        """The model's bank of real frames; see `aime_gym.world_model.checkpoint.load_starts`."""
        return self._need_bank().starts

    @property
    def start_features(self) -> Tensor:
        """The latents of these starts, [M, F] float32."""
        return self._need_bank().features.clone()  # which gradients may go through

    def start_physics(self, index: int) -> NDArray[np.float64]:
        """The physics state [nq + nv (+ na)] of the start with that index, for the real env's ``options``."""
        return self._need_bank().physics(index)

    def get_state(self) -> dict[str, Any]:
        """A copy of everything that decides what comes next: latents, generators, noise, counters."""
        return {
            "latents": self._state.clone(),
            "observations": self._observations.copy(),
            "noise": self._noise.get_state(),
            "np_random": copy.deepcopy(self.np_random),
            **{name: getattr(self, f"_{name}").copy() for name in _COUNTERS},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `get_state` gave, bit for bit.

        Raises:
            AimeGymError: If it is of another model or number of slots.
        """
        if lacking := {"latents", "observations", "noise", "np_random", *_COUNTERS} - set(state):
            raise AimeGymError(f"Expected what get_state() gives; {', '.join(sorted(lacking))} are missing.")
        if state["latents"].shape != self._state.shape or state["observations"].shape != self._observations.shape:
            raise AimeGymError(
                f"Expected the state of {self.num_envs} slots with latents of {self._state.shape[1]} numbers and "
                f"obs_type {self.obs_type!r}; got latents {tuple(state['latents'].shape)}."
            )
        with torch.inference_mode():
            self._state = state["latents"].to(self._device, copy=True)
        self._observations = state["observations"].copy()
        self._noise.set_state(state["noise"])
        self.np_random = copy.deepcopy(state["np_random"])
        unmoved = np.zeros_like(self._root)
        for name in _COUNTERS:
            setattr(self, f"_{name}", state[name].copy())
        if self._root.shape != unmoved.shape:  # of an env that renders what this one does not, or the reverse
            self._root = unmoved

    def _load_bank(self) -> StartBank | None:
        folder = self.model.folder
        if folder is None or not (folder / "starts.npz").exists():
            return None
        return StartBank(self.model, load_starts(self.model))

    def _need_bank(self) -> StartBank:
        if self._bank is None:
            raise AimeGymError(
                "This model has no starts.npz to begin dreams from: `aime-gym fit-heads` makes one, or pass real "
                "frames, reset(options={'start': {'observations': ..., 'actions': ...}})."
            )
        return self._bank

    def _show(self, features: Tensor, decoded: np.ndarray | None = None) -> np.ndarray:
        """What latents [N, F] look like, sensors side by side: [N, ...]."""
        if self.obs_type == "latent":
            return features.cpu().numpy().copy()
        if self.obs_type == "image":
            return decode_images(self.model, features, self.dynamics.dtype)
        decoded = self.dynamics.decode(features).cpu().numpy() if decoded is None else decoded
        return decoded[:, : -2 if self.dynamics.terminates else -1]

    def _observation(self, shown: np.ndarray) -> Observation:
        """[..., D] in the form of the observation space."""
        return to_sensors(self.sensors, shown) if self.obs_type == "dict" else shown

    def _check_ready(self) -> NDArray[np.bool_] | None:
        """The slots [N] that this step resets, if any; an `AimeGymError` if a slot cannot be stepped."""
        if not self._begun.all():
            raise AimeGymError(f"Slot {int(self._begun.argmin())} has not begun: call reset() first.")
        if not self._done.any():
            return None
        if self.autoreset_mode is AutoresetMode.DISABLED:
            raise AimeGymError(
                f"Slot {int(self._done.argmax())} has ended: reset it first, e.g. reset(options={{'reset_mask': ...}})."
            )
        return self._done


_COUNTERS = ("steps", "done", "begun", "root")
