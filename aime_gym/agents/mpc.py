"""Model-predictive control: an agent that learned nothing, and plans in the dream whenever it acts.

Plans are found by the cross-entropy method with what Pinneri et al. added to it ("Sample-efficient Cross-Entropy Method
for Real-time Planning", CoRL 2020): noise that is correlated over time, plans of the round before that are kept, and a
beginning at the last plan, a step later. The mean moves to the best plans weighted by their returns, as in MPPI
(Williams et al., "Information Theoretic MPC for Model-Based Reinforcement Learning", ICRA 2017).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aime_gym.agents.recurrent import RecurrentAgent
from aime_gym.envs.payment import UserFunction
from aime_gym.envs.tensor_dream import TensorDream
from aime_gym.errors import AimeGymError, check_natural, check_positive
from aime_gym.world_model.model import WorldModel

FIRST_ROUNDS = 4
"""More rounds where an episode begins, as there is no plan to go on from."""
BEST = 0.1
"""Share of the plans that the mean moves to."""
SHARPNESS = 10.0
"""How much a plan's weight grows with its return, in `TensorDream.reward_scale`s."""
LEAST_SPREAD = 0.05
"""Standard deviation of actions between plans, at least, however much the best of them agree."""
CORRELATION = 0.7
"""Between the noise of a plan's step and that of the next."""
SEEDS_APART = 1_000_003
"""Between the seeds of the draws of a step and of the next."""


class MPC(RecurrentAgent):
    """A planner as an agent: it needs a model and a reward, and no training.

    Each call estimates the state from what is observed, tries plans in the dream from there, and takes the first action
    of the best. A plan sees no reward beyond its horizon. What is drawn is of the seed and of the steps since the start
    of the episode, so that actions are a function of what was observed since then, whoever else is asked along.

    Examples:
        >>> import gymnasium, aime_gym
        >>> world = gymnasium.make("AimeReal-Reacher-v0", task="easy")
        >>> planner = aime_gym.MPC("reacher-state", task="easy")
        >>> observation, info = world.reset(seed=0)
        >>> action, state = planner.predict(observation)
        >>> observation, reward, terminated, truncated, info = world.step(action)
        >>> action, state = planner.predict(observation, state)
        >>> action.shape
        (2,)

    Args:
        model: A loaded world model, a folder or a bundled name.
        task: The task whose reward plans are for; by default the first one that the model's heads reward.
        plans: How many plans are tried a round.
        horizon: Agent steps of a plan.
        rounds: How often plans are drawn around a better mean; a few more where an episode begins.
        spread: Standard deviation of the first round's noise, in halves of the range of actions.
        seed: Seed of the draws.
        device: Where the dream is.
        precision: See `aime_gym.TensorDream`, as are the next three.
        doubt_penalty: Times the doubt, subtracted from what a plan earns at each step.
        reward_fn: Pays in place of the task.
        termination_fn: Says where a plan ends, in place of the model's head.

    Raises:
        AimeGymError: If the dream cannot be made, a number is out of range, or the actions are choices.
    """

    def __init__(
        self,
        model: WorldModel | str | Path,
        task: str | None = None,
        *,
        plans: int = 64,
        horizon: int = 20,
        rounds: int = 3,
        spread: float = 0.6,
        seed: int = 0,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        doubt_penalty: float = 0.0,
        reward_fn: UserFunction | None = None,
        termination_fn: UserFunction | None = None,
    ):
        for name, number in (("plans", plans), ("horizon", horizon), ("rounds", rounds)):
            check_positive(number, name)
        check_natural(seed, "seed")
        if not 0 < spread < math.inf:
            raise AimeGymError(f"spread is a finite number above 0; got {spread!r}.")
        super().__init__(model, device)
        config = self.model.config
        if config.choices:
            raise AimeGymError(
                f"MPC plans actions that are numbers in [-1, 1]; {config.embodiment} takes {self.action_space}. "
                "SHAC, PPO and DQN learn in its dreams: `aime_gym.make_sb3_env`."
            )
        self.plans, self.horizon, self.rounds, self.spread = plans, horizon, rounds, spread
        self._make_dream = partial(
            TensorDream,
            self.model,
            device=self.device,
            precision=precision,
            obs_type="latent",
            max_episode_steps=None,
            autoreset_mode="Disabled",
            deterministic=True,
            doubt_penalty=doubt_penalty,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
        )
        self._dreams = {1: self._make_dream(task, plans)}
        self.task = self._dreams[1].task
        self._seed = seed

    def _act(
        self, frames: dict[str, Tensor], state: Any, starts: Tensor, deterministic: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        latents = self._estimate(frames, None if state is None else state[:2], starts, sample=not deterministic)
        plan = latents.new_zeros(len(starts), self.horizon, self.model.config.action_dim)  # [N, H, A]
        steps = torch.zeros(len(starts), dtype=torch.int64)  # taken since the episode's start
        if state is not None:
            plan = torch.where(starts[:, None, None], plan, state[2])
            steps = torch.where(starts.cpu(), steps, state[3])
        draws = self._draw(steps)
        if starts.any():
            plan[starts] = self._improve(plan[starts], latents[starts], draws[:FIRST_ROUNDS, starts])
        plan = self._improve(plan, latents, draws[FIRST_ROUNDS:])
        actions = plan[:, 0]
        return actions, (latents, actions, torch.cat([plan[:, 1:], plan[:, -1:]], 1), steps + 1)

    def _draw(self, steps: Tensor) -> Tensor:
        """The noise of all rounds for N envs that have taken so many steps [N]: [R, N, P, H, A]."""
        sizes = FIRST_ROUNDS + self.rounds, self.plans, self.horizon, self.model.config.action_dim
        different, which = steps.unique(return_inverse=True)
        generators = [torch.Generator().manual_seed(self._seed + SEEDS_APART * int(step)) for step in different]
        drawn = torch.stack([torch.randn(sizes, generator=generator) for generator in generators], 1)
        for step in range(1, self.horizon):
            before, fresh = drawn[..., step - 1, :], drawn[..., step, :]
            drawn[..., step, :] = CORRELATION * before + math.sqrt(1 - CORRELATION**2) * fresh
        return drawn[:, which].to(self.device)

    def _improve(self, mean: Tensor, latents: Tensor, draws: Tensor) -> Tensor:
        """Better plans from where N envs stand.

        Args:
            mean: A plan each, [N, H, A].
            latents: Where they stand, [N, F].
            draws: Noise of each round, [R, N, P, H, A].

        Returns:
            A plan each, [N, H, A].
        """
        spread, kept = torch.full_like(mean, self.spread), mean[:, None]
        for noise in draws:
            plans = (mean[:, None] + spread[:, None] * noise).clamp(-1, 1)
            plans = torch.cat([mean[:, None], kept, plans], 1)[:, : self.plans]  # [N, P, H, A]
            earned = self._earned(plans, latents)
            best, which = earned.topk(max(1, round(BEST * self.plans)), 1)
            kept = plans.take_along_dim(which[:, :, None, None], 1)
            weights = torch.softmax(SHARPNESS * best / self._dreams[1].reward_scale, 1)[:, :, None, None]
            mean = (weights * kept).sum(1)
            spread = (weights * (kept - mean[:, None]).square()).sum(1).sqrt().clamp_min(LEAST_SPREAD)
        return mean

    def _earned(self, plans: Tensor, latents: Tensor) -> Tensor:
        """What plans [N, P, H, A] earn in the dream from where N envs stand, [N, F]: [N, P]."""
        count = len(latents)
        if count not in self._dreams:
            self._dreams[count] = self._make_dream(self.task, count * self.plans)
        dream = self._dreams[count]
        state = dream.reset(seeds=0, start=latents.repeat_interleave(self.plans, 0))
        earned, goes_on = latents.new_zeros(dream.num_envs), ~dream.never
        for actions in plans.flatten(0, 1).unbind(1):
            state, _, rewards, terminations, truncations, *_ = dream.step(state, actions.contiguous())
            earned = earned + rewards * goes_on
            goes_on = goes_on & ~(terminations | truncations)
        return earned.view(count, self.plans)
