"""An SB3 agent that learns inside the dream, with settings that fit it, progress, a time limit and regular saves."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from aime_gym.agents.sb3 import save_sb3_agent
from aime_gym.agents.shac import SHAC
from aime_gym.agents.standardised import StandardisedObservation, Statistics
from aime_gym.errors import AimeGymError

SAVE_EVERY = 60.0
"""Seconds between two saves of the agent while it learns."""
LONG_TRIAL = 20.0
"""Seconds of a trial in the real world from which on trials become rarer."""


def make_agent(algo: str, envs: VecEnv, statistics: Statistics, seed: int) -> BaseAlgorithm:
    """An SB3 agent with settings that fit a dream of 500 steps with a dense reward.

    Args:
        algo: ``"shac"``, ``"ppo"``, ``"sac"`` or ``"td3"``.
        envs: They show ``"state"`` or ``"latent"``.
        statistics: Of observations, by which the agent standardises them.
        seed: Of weights and actions.
    """
    scaling = {
        "features_extractor_class": StandardisedObservation,
        "features_extractor_kwargs": {"mean": statistics.mean.tolist(), "std": statistics.std.tolist()},
    }
    common: dict[str, Any] = {"policy": "MlpPolicy", "env": envs, "seed": seed, "device": "cpu", "gamma": 0.99}
    if algo == "shac":
        return SHAC(
            **common, policy_kwargs=dict(scaling, net_arch=[256, 256], activation_fn=nn.SiLU, log_std_init=-0.5)
        )
    if algo == "ppo":
        rollout = 32 * envs.num_envs
        return PPO(
            **common,
            n_steps=32,
            batch_size=min(1024, rollout),
            n_epochs=5,
            learning_rate=3e-4,
            gae_lambda=0.95,
            ent_coef=0.0,
            policy_kwargs=dict(scaling, net_arch=[256, 256], activation_fn=nn.ELU, log_std_init=-0.5),
        )
    if algo in ("sac", "td3"):
        common |= {
            "buffer_size": 300_000,
            "batch_size": 512,
            "learning_starts": 20 * envs.num_envs,
            "gradient_steps": max(1, envs.num_envs // 8),
            "learning_rate": 5e-4,
            "policy_kwargs": dict(scaling, net_arch=[256, 256]),
        }
        if algo == "sac":
            return SAC(**common)
        size = envs.action_space.shape or ()
        return TD3(**common, action_noise=NormalActionNoise(np.zeros(size), np.full(size, 0.1)))
    raise AimeGymError(f"algo is 'shac', 'ppo', 'sac' or 'td3'; got {algo!r}.")


def learn(
    agent: BaseAlgorithm,
    path: Path,
    console: Console,
    steps: int,
    minutes: float,
    horizon: int,
    episode_steps: int,
    world: VecEnv | None = None,
    patience: int | None = None,
    stoppable: bool = True,
) -> list[dict[str, float]]:
    """Trains an agent and saves it.

    Args:
        agent: It has its envs. One that has learned before goes on.
        path: Where it is saved, now and then and at the end.
        console: Shows the progress.
        steps: Env steps, all slots together.
        minutes: Training stops here, even with fewer steps.
        horizon: Steps of a training episode.
        episode_steps: Steps of an evaluation episode, to whose length the curve's returns are scaled.
        world: Real envs. With them the agent is tried there once a minute, one episode an env, and at the end it has
            the weights of its best trial.
        patience: Training stops after so many trials in a row without a better one; None for never.
        stoppable: Whether Ctrl-C ends the training early and keeps the agent so far, rather than being raised.

    Returns:
        The learning curve: points with ``steps``, ``seconds``, ``return`` and, after trials, ``real``.
    """
    progress = _Progress(console, None if world else path, steps, minutes, horizon, episode_steps)
    trials = None if world is None else KeepBest(world, path, patience=patience)
    try:
        hooks: list[BaseCallback] = [progress] if trials is None else [progress, trials]
        agent.learn(steps, callback=hooks, reset_num_timesteps=False)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        console.print("Stopped early; going on with the agent so far. Ctrl-C again ends everything.")
    finally:
        progress.bar.stop()
    if trials is None or not trials.curve:
        save_sb3_agent(agent, path)
        return progress.curve
    agent.set_parameters(str(path), device="cpu")
    return sorted(progress.curve + trials.curve, key=lambda point: point["seconds"])


class KeepBest(BaseCallback):
    """Tries the agent in the real world now and then, and saves it whenever it does better than before.

    Later in its training an agent may earn ever more in the dream and less in the world; this keeps the one between.

    Args:
        world: Real envs; a trial is one episode in each, with the mode of the policy.
        path: Where the best agent is saved.
        every: Seconds of training between trials, beside one at the end; longer in proportion where a trial itself
            takes more than `LONG_TRIAL`, as with rendered images.
        patience: Stops the training after so many trials in a row without a better one; None for never.
    """

    def __init__(self, world: VecEnv, path: Path, every: float = 60.0, patience: int | None = None):
        super().__init__()
        self.curve: list[dict[str, float]] = []
        self._world, self._path, self._every, self._patience = world, path, every, patience
        self._best, self._worse, self._pause = -math.inf, 0, every

    def _on_training_start(self) -> None:
        self._began = self._tried = time.monotonic()

    def _on_step(self) -> bool:
        if time.monotonic() - self._tried > self._pause:
            self._try()
        return self._patience is None or self._worse < self._patience

    def _on_training_end(self) -> None:
        self._try()

    def _try(self) -> None:
        start = time.monotonic()
        returns = evaluate_policy(
            self.model, self._world, self._world.num_envs, return_episode_rewards=True, warn=False
        )[0]
        mean = float(np.mean(returns))
        self._worse += 1
        if mean > self._best:
            self._best, self._worse = mean, 0
            save_sb3_agent(self.model, self._path)
        self._tried = time.monotonic()
        self._pause = self._every * max(1.0, (self._tried - start) / LONG_TRIAL)
        seconds = round(self._tried - self._began, 2)
        self.curve.append({"steps": self.num_timesteps, "seconds": seconds, "real": mean})


class _Progress(BaseCallback):
    """Shows the training, records the learning curve, saves the agent (if to a path), and stops at the time limit."""

    def __init__(
        self, console: Console, path: Path | None, steps: int, minutes: float, horizon: int, episode_steps: int
    ):
        super().__init__()
        self.curve: list[dict[str, float]] = []
        self.bar = Progress(
            BarColumn(), TextColumn("{task.percentage:3.0f}%  {task.description}"), console=console, transient=False
        )
        self._task = self.bar.add_task("", total=1.0)
        self._steps, self._seconds, self._episode_steps, self._path = steps, 60 * minutes, episode_steps, path
        self._rewards: deque[float] = deque(maxlen=horizon)  # of each slot's last episode, whatever its phase

    def _on_training_start(self) -> None:
        self._began = self._saved = self._shown = time.monotonic()
        self._first = self.num_timesteps
        self._point = max(1, self._steps // 200)
        self.bar.start()

    def _on_step(self) -> bool:
        now = time.monotonic()
        self._rewards.append(float(np.mean(self.locals["rewards"])))
        whole = len(self._rewards) == self._rewards.maxlen
        if whole and self.num_timesteps - (self.curve[-1]["steps"] if self.curve else 0) >= self._point:
            self._add_point(now)
        if now - self._shown > 0.5:
            self._show(now)
        if self._path and now - self._saved > SAVE_EVERY:
            self._saved = now
            save_sb3_agent(self.model, self._path)
        return now - self._began < self._seconds

    def _on_training_end(self) -> None:
        now = time.monotonic()
        if self._rewards:
            self._add_point(now)
        self._show(now)

    def _add_point(self, now: float) -> None:
        mean = float(np.mean(self._rewards)) * self._episode_steps
        self.curve.append({"steps": self.num_timesteps, "seconds": round(now - self._began, 2), "return": mean})

    def _show(self, now: float) -> None:
        self._shown, elapsed = now, now - self._began
        taken = self.num_timesteps - self._first
        speed = taken / max(elapsed, 1e-6)
        left = min((self._steps - taken) / max(speed, 1e-6), self._seconds - elapsed)
        done = max(taken / self._steps, elapsed / self._seconds)
        returns = f"return {self.curve[-1]['return']:.0f}" if self.curve else ""
        minutes, seconds = divmod(max(0, int(left)), 60)
        self.bar.update(
            self._task,
            completed=min(1.0, done),
            description=f"{taken:,} steps  {speed:,.0f}/s  {returns}  {minutes}:{seconds:02d} left",
        )
