"""Agents that estimate the state by a world model as they go, and act as SB3's recurrent policies do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from aime_gym.envs.dream_checks import check_device, place
from aime_gym.envs.start_bank import to_frames
from aime_gym.errors import AimeGymError, checked_switches
from aime_gym.observations import action_space, observation_space
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.model import WorldModel


class RecurrentAgent(ABC):
    """What acts on what a world model's body shows, for one env or for many.

    `predict` follows Stable-Baselines3's protocol for recurrent policies, so that its `evaluate_policy` and
    `aime_gym.compare` take such an agent unchanged.

    Args:
        model: A loaded world model, a folder or a bundled name; it says what is observed and stays as it is.
        device: Where the agent acts, e.g. ``"cuda"``; the model is copied there if it is elsewhere.

    Raises:
        AimeGymError: If the model cannot be read, says nothing of actions, or there is no such device.
    """

    def __init__(self, model: WorldModel | str | Path, device: str | torch.device = "cpu"):
        self.device = check_device(device)
        loaded = model if isinstance(model, WorldModel) else load_pretrained_model(model)
        loaded.config.check_acts()
        self.model = place(loaded, self.device)
        config = self.model.config
        self._sensors = tuple(sensor for sensor in config.sensors if sensor.name in self.model.observed)
        self.observation_space: gymnasium.Space = observation_space(
            self._sensors, "image" if config.setup == "visual" else "state"
        )
        self.action_space: gymnasium.Space = action_space(config.body)

    @abstractmethod
    def _act(self, frames: dict[str, Tensor], state: Any, starts: Tensor, deterministic: bool) -> tuple[Tensor, Any]:
        """Actions [N, A] and the next state, from frames [N, ...]; state is None at the very first call.

        The state is a tuple of tensors [N, ...].
        """

    def _estimate(
        self, frames: dict[str, Tensor], before: tuple[Tensor, Tensor] | None, starts: Tensor, sample: bool = False
    ) -> Tensor:
        """The model's estimate of the state: latents [N, F].

        Args:
            frames: What is observed now, name -> [N, ...].
            before: The latents before, [N, F], and the actions that led here, [N, A]; None at the very first call.
            starts: Where episodes begin, [N] bool: what was before is forgotten there.
            sample: Whether to draw the stochastic latent, from the posterior, rather than take its mean.
        """
        config, size = self.model.config, len(starts)
        begun = self.model.initial_state(size)
        latents, actions = (begun, begun.new_zeros(size, config.action_dim)) if before is None else before
        latents = torch.where(starts[:, None], begun, latents)
        actions = torch.where(starts[:, None], 0.0, actions)
        noise = torch.randn(size, config.stochastic_dim, device=self.device) if sample else None
        return self.model.posterior_step(latents, actions, self.model.encode(frames), noise)

    @checked_switches
    @torch.no_grad()
    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Acts in one env or in N.

        Args:
            observation: ``"state"``, ``"dict"`` or ``"image"``, of one env or [N, ...].
            state: What the last call gave; None at the beginning.
            episode_start: [N] bool, where episodes begin and what was before is forgotten. Without it, they begin
                where `state` is None.
            deterministic: Whether latents are means and actions modes, rather than samples.

        Returns:
            Actions, [A] or [N, A] float32 in [-1, 1], and the state for the next call.

        Raises:
            AimeGymError: If the observation or the state does not fit.
        """
        frames, single = to_frames(self.model, observation)
        size = len(next(iter(frames.values())))
        starts = np.full(size, state is None) if episode_start is None else np.atleast_1d(episode_start).astype(bool)
        if starts.shape != (size,):
            raise AimeGymError(f"episode_start is [{size}] for these observations; got shape {starts.shape}.")
        if state is not None and any(len(part) != size for part in state):
            raise AimeGymError(f"This state is of {len(state[0])} envs; the observations are of {size}.")
        actions, state = self._act(frames, state, torch.from_numpy(starts).to(self.device), deterministic)
        chosen = actions.clamp(-1, 1).cpu().numpy().astype(np.float32)
        if not np.isfinite(chosen).all():
            raise AimeGymError(
                "The agent's actions are not finite: numbers in its weights or observations are too large."
            )
        return (chosen[0] if single else chosen), state
