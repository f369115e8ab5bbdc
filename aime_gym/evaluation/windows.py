"""Dreams that begin at the latents of real episodes: under the true actions, or with the policy in the loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.envs.dream_pictures import decode_images
from aime_gym.envs.spaces import to_sensors
from aime_gym.evaluation.real_episodes import Moment
from aime_gym.evaluation.returns import checked_actions
from aime_gym.evaluation.worlds import Worlds
from aime_gym.world_model.fast_dynamics import BIG_BATCH, FastDynamics


class Dreamt(NamedTuple):
    """What came of E dreams of T steps.

    Attributes:
        rewards: [T, E], 0 behind an end.
        features: The latents after each step, [T, E, F].
        actions: [T, E, A]
    """

    rewards: NDArray[np.float64]
    features: Tensor
    actions: NDArray[np.float32]


class Windows:
    """The steps of a dream, from any latents.

    Args:
        worlds: Of the model and the task.
        slots: E, dreams side by side where a policy acts.
        deterministic: Whether policies give their mode.
    """

    def __init__(self, worlds: Worlds, slots: int, deterministic: bool = True):
        model = worlds.model
        assert isinstance(worlds.action_space, gym.spaces.Box)
        self._worlds, self._deterministic, self._space = worlds, deterministic, worlds.action_space
        self._sensors = worlds.embodiment.observed(worlds.setup)
        names = [sensor.name for sensor in self._sensors] if worlds.obs_type in ("state", "dict") else []
        task = None if model.heads is None else worlds.task
        self._seen = FastDynamics(model, names, task, slots)
        self._rewards = FastDynamics(model, [], task, BIG_BATCH)

    @torch.inference_mode()
    def rewards(self, features: Tensor) -> NDArray[np.float64]:
        """What the model's head pays at latents [T, E, F]: [T, E]."""
        paid = self._rewards.decode(features.flatten(0, 1))[:, -1]
        return paid.unflatten(0, features.shape[:2]).double().cpu().numpy()

    @torch.inference_mode()
    def under_actions(
        self, features: Tensor, actions: NDArray[np.float32], window: int, noise: Tensor | None = None
    ) -> NDArray[np.float64]:
        """Open loop: windows that cover the episodes, each from the latents of its first step, under given actions.

        Args:
            features: [T + 1, E, F], of the frames before each step and after the last.
            actions: [T, E, A]
            window: Steps.
            noise: [T, E, S] for sampled latents; None for means.

        Returns:
            Rewards [T, E].
        """
        length, episodes = actions.shape[:2]
        begins = np.arange(0, length, window)
        state = features[begins].flatten(0, 1)  # [N E, F] of N windows
        rewards = np.zeros((len(begins), window, episodes))
        for step in range(min(window, length)):
            rows = np.minimum(begins + step, length - 1)  # behind the end of the last window nothing counts
            done = torch.from_numpy(actions[rows]).flatten(0, 1)
            drawn = None if noise is None else noise[rows].flatten(0, 1)
            state = self._rewards.advance(state, done, drawn)
            paid = self._rewards.decode(state)[:, -1]
            rewards[:, step] = paid.unflatten(0, (len(begins), episodes)).cpu().numpy()
        return np.nan_to_num(rewards.reshape(-1, episodes)[:length])

    @torch.inference_mode()
    def under_policy(self, moment: Moment, latents: Tensor, steps: int, noise: Tensor | None = None) -> Dreamt:
        """Closed loop: the policy, as it was at some moment, sees what the dream decodes and acts.

        Args:
            moment: The policy.
            latents: Where the dreams begin, [E, F].
            steps: T
            noise: [T, E, S] for sampled latents; None for means.
        """
        policy, memory = moment.own()
        slots = len(latents)
        state, means = latents, self._seen.decode(latents)
        goes_on = np.ones(slots, bool)
        rewards = np.zeros((steps, slots))
        features, actions = [], []
        for step in range(steps):
            begins = np.full(slots, moment.step + step == 0)
            shown = self._shown(state, means)
            acted, memory = policy.predict(shown, memory, begins, deterministic=self._deterministic)
            actions.append(checked_actions(acted, self._space, slots))
            following, means, *_ = self._seen.step(
                state, torch.from_numpy(actions[-1]), None if noise is None else noise[step]
            )
            finite = following.isfinite().all(1) & means.isfinite().all(1)
            state = torch.where(finite[:, None], following, state)
            means = torch.where(finite[:, None], means, 0.0)
            goes_on &= finite.cpu().numpy()
            rewards[step] = np.where(goes_on, means[:, -1].cpu().numpy(), 0.0)
            if self._seen.terminates:
                goes_on &= means[:, -2].cpu().numpy() <= 0
            features.append(state)
        return Dreamt(rewards, torch.stack(features), np.stack(actions))

    def _shown(self, state: Tensor, means: Tensor) -> Any:
        """What a policy sees of latents [E, F], as in `DreamVectorEnv`."""
        if self._worlds.obs_type == "latent":
            return state.cpu().numpy().copy()
        if self._worlds.obs_type == "image":
            return decode_images(self._worlds.model, state)
        seen = means[:, : -2 if self._seen.terminates else -1].cpu().numpy().copy()
        return to_sensors(self._sensors, seen) if self._worlds.obs_type == "dict" else seen
