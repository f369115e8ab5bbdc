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
from aime_gym.envs.tensor_dream import DreamState
from aime_gym.errors import AimeGymError


class DreamRollout(NamedTuple):
    """A window of N dreams, with the graph that leads back to the policy that dreamt it.

    Attributes:
        observations: ``"state"`` or ``"latent"``, before each step and after the last: [H + 1, N, D].
        rewards: As `DreamVectorEnv.step` gives them, a penalty included: [H, N].
        continuations: The probability that the episode goes on after each step, [H, N]; None if it always does.
        cuts: Whether the dream is cut after a step because it is doubted more than `max_disagreement`, [H, N] bool;
            None if it never is. What follows in the window does not count.
        finished: Slots whose episode is over with the window, [N]: those that begin anew, and those without room for
            another such window.
        diverged: Slots that left the finite numbers within the window and stayed where they were, [N] bool; None if
            that is to be seen from observations and rewards alone.
    """

    observations: Tensor
    rewards: Tensor
    continuations: Tensor | None
    cuts: Tensor | None
    finished: NDArray[np.bool_]
    diverged: Tensor | None = None

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
        for diverged in (self.diverged, None if self.continuations is None else ~self.continuations.isfinite().all(0)):
            finite = finite if diverged is None else finite & ~diverged
        return finite

    def only(self, slots: Tensor) -> DreamRollout:
        """The window of some slots, [N] bool."""
        return DreamRollout(
            self.observations[:, slots],
            self.rewards[:, slots],
            None if self.continuations is None else self.continuations[:, slots],
            None if self.cuts is None else self.cuts[:, slots],
            self.finished[slots.cpu().numpy()],
            None if self.diverged is None else self.diverged[slots],
        )


@without_autocast()
def rollout(dream: DreamVectorEnv, policy: Callable[[Tensor], Tensor], steps: int) -> DreamRollout:
    """Steps all slots of a dream under a policy and keeps the graph.

    The steps are those of `DreamVectorEnv.step`, with the same noise, but no slot begins anew within the window. Those
    whose episode would be truncated within it begin anew before it. One that terminates, is cut or leaves the finite
    numbers goes on to the end of the window, and begins anew then.

    Args:
        dream: Was reset; goes on from where the window ends.
        policy: Observations [N, D] -> actions [N, A] in [-1, 1].
        steps: H

    Raises:
        AimeGymError: If an episode is shorter than the window, or the dream was not reset.
    """
    tensors = dream.tensor_dream
    if (longest := tensors.max_episode_steps) is not None and steps > longest:
        raise AimeGymError(
            f"Windows of {steps} steps do not fit into episodes of {longest}: lengthen the episodes (a horizon of the "
            "dream), or shorten the windows (n_steps of SHAC)."
        )
    dream.check_ready()
    _begin_anew(dream, dream.state.done | tensors.lack_room(dream.state, steps))
    state = DreamState(*(tensor.clone() for tensor in dream.state))  # through which gradients may go
    seen, came = [state.observations], []
    for _ in range(steps):
        actions = policy(seen[-1])
        if actions.requires_grad:
            actions.register_hook(_finite_only)
        came.append(tensors.advance(state, actions))
        state = came[-1].state
        seen.append(state.observations)

    cuts = ends = None
    if tensors.max_disagreement is not None:
        cuts = torch.stack([one.doubt.detach() > tensors.max_disagreement for one in came])  # type: ignore[union-attr]
    if tensors.dynamics.terminates:
        ends = torch.stack([one.termination_logits for one in came])  # type: ignore[misc]
    diverged = torch.stack(
        [state.done.new_zeros(()).expand_as(state.done) if one.diverged is None else one.diverged for one in came]
    ).any(0)
    over = torch.stack([one.terminations for one in came]).any(0) | diverged
    if cuts is not None:
        over = over | cuts.any(0)
    dream.go_on(DreamState(*(tensor.detach() for tensor in state)), torch.zeros_like(over))
    finished = over | tensors.lack_room(state, steps)
    _begin_anew(dream, over)
    return DreamRollout(
        torch.stack(seen),
        torch.stack([one.rewards for one in came]),
        None if ends is None else torch.sigmoid(-ends),
        cuts,
        finished.cpu().numpy(),
        diverged,
    )


def _begin_anew(dream: DreamVectorEnv, slots: Tensor) -> None:
    """New episodes in those of `slots` [N]."""
    if bool(slots.any()):
        with torch.inference_mode():
            dream.go_on(dream.tensor_dream.begin(dream.state, slots.nonzero()[:, 0]), slots)


def _finite_only(gradient: Tensor) -> Tensor:
    """That of actions [N, A] without the slots where it is not finite, which would spoil the policy's for all."""
    return torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0)
