"""One dream as a Gymnasium env, the dreams of any body, and rollouts of many as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.envs.dream_checks import WeightsInSpec, check_actions
from aime_gym.envs.dream_vector import DreamVectorEnv, Observation
from aime_gym.envs.real import episode_length
from aime_gym.envs.start_bank import DreamState
from aime_gym.errors import AimeGymError
from aime_gym.parallel import one_thread
from aime_gym.world_model.packed import without_autocast

__all__ = ["DreamEnv", "DreamVectorEnv"]


class DreamEnv(WeightsInSpec, gymnasium.Env):
    """One dream: a `DreamVectorEnv` with one slot and no time limit of its own (`gymnasium.make` adds one).

    Args:
        embodiment: The body, e.g. ``"walker"``; by default the model's own.
        **kwargs: Keywords of `DreamVectorEnv`, without `num_envs`, `max_episode_steps` and `autoreset_mode`.
    """

    metadata = DreamVectorEnv.metadata

    def __init__(self, embodiment: str | None = None, **kwargs: Any):
        with one_thread():
            self._dream = DreamVectorEnv(
                embodiment, num_envs=1, max_episode_steps=None, autoreset_mode=AutoresetMode.DISABLED, **kwargs
            )
        self.render_mode = self._dream.render_mode
        self.observation_space = self._dream.single_observation_space
        self.action_space = self._dream.single_action_space
        self.embodiment, self.task, self.model = self._dream.embodiment, self._dream.task, self._dream.model
        self.revision = self._dream.revision
        self.metadata = {key: value for key, value in self._dream.metadata.items() if key != "autoreset_mode"}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins an episode; see `DreamVectorEnv.reset`. A seed gives what it gives to a slot there."""
        super().reset(seed=seed)
        observations, infos = self._dream.reset(seed=seed, options=options)
        return _first(observations), {key: infos[key][0] for key in infos if f"_{key}" in infos and infos[f"_{key}"][0]}

    @without_autocast()
    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One agent step with `action` [A] in [-1, 1]; see `DreamVectorEnv.step`."""
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise AimeGymError(f"Expected an action of shape {self.action_space.shape}; got {action.shape}.")
        dream, tensors = self._dream, self._dream.tensor_dream
        dream.check_ready()
        actions = check_actions(action[None], 1, self.embodiment, None, dream.clip_actions)
        with one_thread(), torch.inference_mode():
            came, told = dream.advance(actions)
            dream.state = came.state
            info = {key: values[0] for key, values, mask in told if mask is None or mask[0]}
        ended, cut = (ends is not tensors.never and bool(ends) for ends in (came.terminations, came.truncations))
        return _first(dream.shown()), float(came.rewards), ended, cut, info

    def render(self) -> np.ndarray | None:
        """The present latent as [height, width, 3] uint8."""
        frames = self._dream.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Frees the GL context."""
        self._dream.close()

    @property
    def starts(self) -> dict[str, np.ndarray]:
        """See `DreamVectorEnv.starts`."""
        return self._dream.starts

    def start_physics(self, index: int) -> NDArray[np.float64]:
        """See `DreamVectorEnv.start_physics`."""
        return self._dream.start_physics(index)

    def get_state(self) -> dict[str, Any]:
        """A copy of everything that decides what comes next; wrappers such as TimeLimit keep their own."""
        return self._dream.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `get_state` gave, bit for bit."""
        self._dream.set_state(state)


def _first(observations: Observation) -> Observation:
    if isinstance(observations, dict):
        return {name: values[0] for name, values in observations.items()}
    return observations[0]


def make_dream(episode_steps: int | None = None, **kwargs: Any) -> gymnasium.Env:
    """The dream of a model; for `episode_steps` see `make_real`, for other arguments `DreamEnv`."""
    env = DreamEnv(**kwargs)
    return TimeLimit(env, episode_length(episode_steps, env.embodiment))


# By an entry point's metadata Gymnasium tells whether it must add what "human" and "rgb_array_list" need.
make_dream.metadata = DreamEnv.metadata  # type: ignore[attr-defined]


def make_dreams(
    num_envs: int = 1, max_episode_steps: int | None = None, episode_steps: int | None = None, **kwargs: Any
) -> DreamVectorEnv:
    """Dreams of a model side by side; for `max_episode_steps` and other arguments see `DreamVectorEnv`.

    Of `episode_steps` and `max_episode_steps`, which mean the same here, the smaller counts if there are both.
    """
    envs = DreamVectorEnv(num_envs=num_envs, max_episode_steps=max_episode_steps, **kwargs)
    if max_episode_steps is None:
        envs.max_episode_steps = episode_length(episode_steps, envs.embodiment)
    elif episode_steps is not None:
        steps = episode_length(episode_steps, envs.embodiment)
        envs.max_episode_steps = min(steps, envs.max_episode_steps or steps)
    return envs


class DreamRollout(NamedTuple):
    """A window of N dreams, with the graph that leads back to the policy that dreamt it.

    Attributes:
        observations: ``"state"`` or ``"latent"``, before each step and after the last: [H + 1, N, D].
        rewards: What `DreamVectorEnv.step` gives, a penalty included, [H, N].
        continuations: The probability that the episode goes on after each step, [H, N]; None if it always does.
        cuts: Whether the dream is cut after a step because it is doubted more than `max_doubt`, [H, N] bool;
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
        """Slots whose observations and rewards are all finite, [N] bool."""
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

    Returns:
        The window, through which gradients lead back to the policy.

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
    seen, came, owed = [state.observations], [], list[Any]()
    unpaid = torch.zeros_like(state.latents[:, 0])

    def owe(*step: Tensor) -> Tensor:
        owed.append(step)
        return unpaid

    for _ in range(steps):
        actions = policy(seen[-1])
        if actions.requires_grad:
            actions.register_hook(_finite_only)
        came.append(tensors.advance(state, actions, pay=owe))
        state = came[-1].state
        seen.append(state.observations)

    cuts = ends = None
    if tensors.max_doubt is not None:
        cuts = torch.stack([one.doubt.detach() > tensors.max_doubt for one in came])  # type: ignore[union-attr]
    if tensors.terminates:
        ends = torch.stack([one.termination_logits for one in came])  # type: ignore[misc]
    lost = torch.stack(
        [state.done.new_zeros(()).expand_as(state.done) if one.diverged is None else one.diverged for one in came]
    )
    diverged = lost.any(0)
    over = torch.stack([one.terminations for one in came]).any(0) | diverged
    if cuts is not None:
        over = over | cuts.any(0)
    dream.go_on(DreamState(*(tensor.detach() for tensor in state)), torch.zeros_like(over))
    finished = over | tensors.lack_room(state, steps)
    _begin_anew(dream, over)
    return DreamRollout(
        torch.stack(seen),
        torch.stack([one.rewards for one in came]) + tensors.pay(owed).masked_fill(lost, 0.0),
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
    """The gradient of actions [N, A], with 0 in slots where it is not finite, which would spoil that of the policy."""
    return torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0)
