"""Dreams with a gradient: a window of steps under a policy, whose rewards can be differentiated by its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.envs.autocast import without_autocast
from aime_gym.envs.dream_vector import DreamVectorEnv


class DreamRollout(NamedTuple):
    """A window of N dreams, with the graph that leads back to the policy that dreamt it.

    Attributes:
        observations: ``"state"`` or ``"latent"``, before each step and after the last: [H + 1, N, D].
        rewards: As `DreamVectorEnv.step` gives them, a penalty included: [H, N].
        continuations: The probability that the episode goes on after each step, [H, N]; None if it always does.
        cuts: Whether the dream is cut after a step because it is doubted more than `max_disagreement`, [H, N] bool;
            None if it never is. What follows in the window does not count.
        finished: Slots whose episode is over with the window, [N]: see `DreamVectorEnv.end_window`.
    """

    observations: Tensor
    rewards: Tensor
    continuations: Tensor | None
    cuts: Tensor | None
    finished: NDArray[np.bool_]

    @property
    def before_end(self) -> Tensor:
        """Whether a step is not behind a termination or cut of its episode, [H, N] bool."""
        goes_on = torch.ones_like(self.rewards, dtype=torch.bool)
        if self.continuations is not None:
            goes_on &= self.continuations >= 0.5
        if self.cuts is not None:
            goes_on &= ~self.cuts
        return torch.cat([torch.ones_like(goes_on[:1]), goes_on[:-1].cumprod(0).bool()])

    @property
    def alive(self) -> Tensor:
        """How much a step counts, [H, N]: what is behind a termination as little as it is likely, behind a cut not."""
        goes_on = torch.ones_like(self.rewards) if self.continuations is None else self.continuations.detach()
        if self.cuts is not None:
            goes_on = goes_on * ~self.cuts
        return torch.cat([torch.ones_like(goes_on[:1]), goes_on[:-1].cumprod(0)]).detach()

    @property
    def finite(self) -> Tensor:
        """Slots that show and earn finite numbers alone, [N] bool."""
        finite = self.observations.isfinite().all(-1).all(0) & self.rewards.isfinite().all(0)
        return finite if self.continuations is None else finite & self.continuations.isfinite().all(0)

    def only(self, slots: Tensor) -> DreamRollout:
        """The window of some slots, [N] bool."""
        return DreamRollout(
            self.observations[:, slots],
            self.rewards[:, slots],
            None if self.continuations is None else self.continuations[:, slots],
            None if self.cuts is None else self.cuts[:, slots],
            self.finished[slots.cpu().numpy()],
        )


@without_autocast()
def rollout(dream: DreamVectorEnv, policy: Callable[[Tensor], Tensor], steps: int) -> DreamRollout:
    """Steps all slots of a dream under a policy and keeps the graph.

    The same dream as that of `step`, with the same noise; no episode is truncated within the window, since those that
    would begin anew before it (see `DreamVectorEnv.begin_window`). One that terminates or is cut goes on to the end of
    the window, and begins anew then; so does one that leaves the finite numbers, through which no gradient goes then.

    Args:
        dream: Was reset; goes on from where the window ends.
        policy: Observations [N, D] -> actions [N, A] in [-1, 1].
        steps: H

    Raises:
        AimeGymError: If an episode is shorter than the window, or the dream was not reset.
    """
    model, dtype = dream.model, dream.dynamics.dtype
    state, first, noise = dream.begin_window(steps)
    autocast = torch.autocast(state.device.type, dtype, enabled=dtype is not torch.float32)
    names = [sensor.name for sensor in dream.sensors]
    seen: list[Tensor] = []
    actions: list[Tensor] = []

    def show(features: Tensor) -> Tensor:
        if dream.obs_type == "latent":
            return features
        with autocast:
            decoded = model.decode(features, names)
        return torch.cat([decoded[name] for name in names], -1)

    def act(t: int, features: Tensor) -> Tensor:
        seen.append(show(features) if t else first)
        actions.append(policy(torch.where(seen[-1].isfinite(), seen[-1], 0.0)))
        if actions[-1].requires_grad:
            actions[-1].register_hook(_finite_only)
        return actions[-1]

    with autocast:
        features, _ = model.cell.unroll(state, act, None, noise, steps)  # [H, N, F]
        if model.heads is None:
            rewards = model.decode(features, ["reward"])["reward"].squeeze(-1)
        else:
            rewards = model.heads.reward(features, dream.task)
        continuations = model.heads.continuation(features) if dream.dynamics.terminates and model.heads else None
    priced, cuts = bool(dream.uncertainty_penalty) or dream.explores, None
    if priced or dream.max_disagreement is not None:
        with torch.set_grad_enabled(priced):
            if dream.asks_ensemble:
                assert model.heads is not None
                before = torch.cat([state[None], features[:-1]])
                doubt = model.heads.disagreement(before, torch.stack(actions))
            else:
                doubt = model.inconsistency(features)
        if priced:
            rewards = (doubt if dream.explores else rewards) - dream.uncertainty_penalty * doubt
        if dream.max_disagreement is not None:
            cuts = doubt.detach() > dream.max_disagreement
    seen.append(show(features[-1]))
    window = DreamRollout(torch.stack(seen), rewards, continuations, cuts, np.zeros(len(state), bool))
    ended = ~window.finite
    for end in (None if continuations is None else continuations < 0.5, cuts):
        ended = ended if end is None else ended | end.any(0)
    finished = dream.end_window(features[-1].detach(), seen[-1].detach(), steps, ended)
    return window._replace(finished=finished)


def _finite_only(gradient: Tensor) -> Tensor:
    """That of actions [N, A] without the slots where it is not finite, which would spoil the policy's for all."""
    return torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0)
