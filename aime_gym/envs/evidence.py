"""A wrapper that says how well a world model explains what a real env does."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils import RecordConstructorArgs

from aime_gym.envs.autocast import without_autocast
from aime_gym.envs.starts import to_frames
from aime_gym.envs.threads import one_thread
from aime_gym.envs.wrappers import check_shown
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_pretrained_model, load_starts
from aime_gym.world_model.model import WorldModel

SETTLING = 5
"""Frames after which the estimate of the state is trusted: the model's first state is made of zeros."""


class Evidence(gymnasium.Wrapper, RecordConstructorArgs):
    """Reports, for each real step, the log evidence that the model gives the observation.

    ``info["evidence"]`` is a lower bound on log p(o_t | o_<t, a_<=t) in nats (the ELBO of one step, with posterior
    means), and ``info["unexplained"]`` whether it is below `threshold`: another body, another world, a broken sensor.

    Args:
        env: A real env of the model's body with observations of ``"state"``, ``"dict"`` or ``"image"``.
        model: A loaded model, a folder or a bundled name.
        threshold: In nats; by default what 99 of 100 real frames of the model's own ``starts.npz`` exceed.

    Raises:
        AimeGymError: If the env does not show what the model observes, or the model has no frames to calibrate with.
    """

    @one_thread()
    def __init__(self, env: gymnasium.Env, model: str | WorldModel, threshold: float | None = None):
        RecordConstructorArgs.__init__(self, model=model, threshold=threshold)
        super().__init__(env)
        self.model = model if isinstance(model, WorldModel) else load_pretrained_model(model)
        check_shown(self.model, env)
        self.threshold = calibrate(self.model) if threshold is None else threshold
        self._state = self.model.initial_state(1)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the env; the estimate begins at zeros."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._state, self._steps = self.model.initial_state(1), 0
        return observation, info | self._score(np.zeros(self.model.config.action_dim, np.float32), observation)

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps the env and scores what it shows."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, info | self._score(action, observation)

    @one_thread()
    @without_autocast()
    @torch.no_grad()
    def _score(self, action: np.ndarray, observation: Any) -> dict[str, Any]:
        frames, _ = to_frames(self.model, observation)
        window = {name: frame[None] for name, frame in frames.items()}  # [1, 1, ...]
        done = torch.tensor(np.asarray(action, np.float32), device=self._state.device)[None, None]  # [1, 1, A]
        evidence = float(self.model.evidence(window, done, self._state, sample=False).elbo)
        self._state = self.model.observe(window, done, self._state, sample=False)[0][-1]
        self._steps += 1
        return {"evidence": evidence, "unexplained": self._steps > SETTLING and evidence < self.threshold}


@without_autocast()
@torch.no_grad()
def calibrate(model: WorldModel, quantile: float = 0.01) -> float:
    """The evidence of one step, in nats, that all but `quantile` of the model's own real frames exceed.

    Args:
        model: With a ``starts.npz``.
        quantile: Share of real frames that will be flagged.

    Raises:
        AimeGymError: If there are no such frames, or too few in a row.
    """
    starts = load_starts(model)
    if (frames_of_each := len(starts["pre_action"])) <= SETTLING:
        raise AimeGymError(
            f"The model's starts.npz has {frames_of_each} frames in a row, and its evidence is trusted after "
            f"{SETTLING}: give a threshold= in nats."
        )
    whole = (starts["pre_action"][1] != 0).any(-1)  # [M], not those that begin with copies of a first frame
    if whole.any():
        starts = {name: rows[:, whole] for name, rows in starts.items() if name in (*model.observed, "pre_action")}
    frames = {name: torch.as_tensor(starts[name]) for name in model.observed}  # [K, M, ...]
    if "image" in frames:
        frames["image"] = frames["image"].movedim(-1, -3).float() / 255
    actions = torch.as_tensor(starts["pre_action"]).float()
    per_step = model.evidence({name: frame.float() for name, frame in frames.items()}, actions, sample=False).per_step
    return float(per_step[SETTLING:].flatten().quantile(quantile))
