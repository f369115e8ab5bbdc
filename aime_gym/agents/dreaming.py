"""Training an SB3 agent in a dream: its settings, its trials, and when it has learned something."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from aime_gym.agents.numpy_policies import RandomPolicy
from aime_gym.agents.sb3 import save_sb3_agent
from aime_gym.errors import Terminated, sigterm_raises

SPREADS = 3.0
"""By how many standard deviations of random episodes an agent must exceed random actions."""

FEWEST = 3
"""Episodes on either side, below which nothing is clear."""

ALIKE = 1e-6
"""Random episodes that spread by no more than this share of the largest return differ by rounding alone."""

LEAST_SPREAD = 0.01
"""The share of the largest return that counts as the spread, at least, where random episodes have none."""

ANNEAL = 1 / 3
"""By what the learning rate is multiplied where trials get no better."""

LEAST_GAIN = 0.01
"""The share by which a trial must exceed the best one to be worth more patience."""

ALIKE_TRIALS = 0.02
"""By less than this share of the best real trial a few episodes tell no two agents apart: the later one, which has
learned for longer, is kept. It falls the more rarely."""

Returns = Sequence[float] | NDArray[np.floating]


def beats_clearly(returns: Returns, random: Returns) -> bool:
    """Whether an agent's mean return lies so far above that of random actions that chance and luck explain it no more.

    It lies above by three standard deviations of random episodes, and still does when two standard errors of its own
    are taken off. Where random episodes are all alike, e.g. with a reward that they never find, the standard deviation
    is that of the agent's episodes, or a hundredth of the largest return if that is more. The unit of rewards does not
    matter.

    Args:
        returns: The returns of the agent's episodes.
        random: The returns of episodes of random actions. With fewer than three on either side the answer is no.

    Examples:
        >>> beats_clearly([940.0, 955.0, 962.0], [38.0, 51.0, 29.0])
        True
        >>> beats_clearly([52.0, 61.0, 47.0], [38.0, 51.0, 29.0])
        False
    """
    earned, chance = np.asarray(returns, float), np.asarray(random, float)
    if min(len(earned), len(chance)) < FEWEST:
        return False
    largest, spread = max(np.abs(earned).max(), np.abs(chance).max()), chance.std()
    if spread <= ALIKE * largest:
        spread = max(earned.std(), LEAST_SPREAD * largest)
    return bool(earned.mean() - 2 * standard_error(earned) > chance.mean() + SPREADS * spread)


def standard_error(returns: NDArray[np.float64]) -> float:
    """The standard error of a mean return; 0 for a single episode, whose spread is not known."""
    return float(returns.std(ddof=1) / np.sqrt(len(returns))) if len(returns) > 1 else 0.0


SAVE_EVERY = 60.0
"""Seconds between two saves of the agent while it learns."""

Point = dict[str, Any]
"""A point of a learning curve, as JSON holds it."""


@dataclass(frozen=True)
class Lesson:
    """The outcome of a training."""

    ended: Literal["steps", "learned", "minutes", "interrupted", "terminated"]
    """By its number of steps, by trials that got no better, by its limit of minutes, by Ctrl-C or by SIGTERM."""
    curve: list[Point]
    """How the agent learned: points with ``steps``, ``seconds`` and either ``return`` and ``length``, means over the
    last finished episodes of the training, or a verdict of a trial, see `Judge`."""


def learn(
    agent: BaseAlgorithm,
    path: Path,
    console: Console,
    steps: int,
    minutes: float | None = None,
    trials: Trials | None = None,
    stoppable: bool = True,
    record: Callable[[list[Point]], Any] = lambda curve: None,
) -> Lesson:
    """Trains an agent and saves it.

    Args:
        agent: It has its envs. One that has learned before goes on.
        path: Where the agent is saved, now and then and at the end. With `trials` it is the agent of the best one, and
            the newest agent is saved beside it, see `newest`; without them none is left there, as it would be older.
        console: Shows the progress.
        steps: Env steps, all slots together, after which the training ends.
        minutes: The training is cut short here; None for never. What was learned then depends on the machine.
        trials: Try the agent now and then, and may end the training, or find at once that those before are enough. At
            the end the agent has the weights of the best one.
        stoppable: Whether Ctrl-C and SIGTERM end the training early and keep the agent so far, rather than being
            raised.
        record: Called with the curve so far whenever the newest agent was saved: once a minute and after every trial.

    Returns:
        How it ended, and the learning curve. After a SIGTERM the caller should leave soon.
    """
    last = path if trials is None else newest(path)

    def save() -> list[Point]:
        save_sb3_agent(agent, last)
        if trials is None:
            newest(path).unlink(missing_ok=True)
        curve = sorted(progress.curve + (trials.curve if trials else []), key=lambda point: point["steps"])
        record(curve)
        return curve

    progress = _Progress(console, save, steps, minutes)
    if trials is not None:
        trials.after = save
    ended: Any = "steps"
    rate = agent.learning_rate
    try:
        with sigterm_raises() if stoppable else nullcontext():
            hooks: list[BaseCallback] = [progress] if trials is None else [progress, trials]
            if trials is None or not trials.is_enough:
                agent.learn(steps, callback=hooks, reset_num_timesteps=False)
        if progress.is_cut:
            ended = "minutes"
        elif trials is not None and trials.is_enough:
            ended = "learned"
    except KeyboardInterrupt as stop:
        if not stoppable:
            raise
        ended = "terminated" if isinstance(stop, Terminated) else "interrupted"
    finally:
        progress.bar.stop()
        agent.learning_rate = rate
        agent._setup_lr_schedule()
    if ended == "interrupted":
        console.print("Stopped early; going on with the agent so far. Ctrl-C again ends everything.")
    curve = save()
    if trials is None:
        return Lesson(ended, curve)
    if ended == "interrupted":
        trials.try_agent()
        curve.append(trials.curve[-1])
    if path.exists():
        agent.set_parameters(str(path), device=agent.device)
    else:
        save_sb3_agent(agent, path)
    return Lesson(ended, curve)


def newest(path: Path) -> Path:
    """Where the newest agent is kept beside that of the best trial, ``path``: training goes on from it.

    Where it is missing, ``path`` holds an agent that no trial has chosen.
    """
    return path.with_name(f"newest-{path.name}")


def last_trials(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials with which a curve ends, as far as one judge held them.

    Those of another judge before chose an agent that is no longer kept.
    """
    trials = [point for point in curve if "beats_random" in point]
    return list(itertools.takewhile(lambda trial: ("real" in trial) == ("real" in trials[-1]), reversed(trials)))[::-1]


def score(trial: Mapping[str, Any]) -> tuple[float, ...]:
    """By what trials are compared: real return, or predicted return, by its lower end and then by its mean."""
    return (trial["real"],) if "real" in trial else (trial["low"], trial["predicted"])


def kept(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The trial whose agent is kept of those of one judge: the best; of real ones the last that is about as good."""
    best = max(trials, key=score)
    if "real" not in best:
        return best
    least = best["real"] - ALIKE_TRIALS * abs(best["real"])
    return [trial for trial in trials if trial["real"] >= least][-1]


class Judge(Protocol):
    """What judges agents in trials.

    Attributes:
        decides: The number of its verdicts by which agents are chosen, see `score`: ``"real"`` or ``"low"``.
    """

    decides: Literal["real", "low"]

    def judge(self, agent: BaseAlgorithm) -> Point:
        """A verdict on an agent as it is: numbers, among them `decides`, and ``"beats_random"``."""

    def close(self) -> None:
        """Closes its envs."""


class RealJudge:
    """Judges by the returns of real episodes, one in each env, with the mode of the policy.

    Args:
        world: Real envs.
        random: Real returns of random actions, if they are known; where they are fewer than the envs, as by default,
            one episode more is measured in each env before the first trial.
    """

    decides: Literal["real", "low"] = "real"

    def __init__(self, world: VecEnv, random: Sequence[float] = ()):
        self.random, self._world = list(random), world

    def judge(self, agent: BaseAlgorithm) -> Point:
        """See `Judge`; ``"real"`` is the mean of so many ``"episodes"``."""
        if len(self.random) < self._world.num_envs:
            chance = RandomPolicy(self._world.action_space)
            chance.begin([(agent.seed or 0) + slot for slot in range(self._world.num_envs)])
            self.random += self._returns(chance)
        returns = self._returns(agent)
        beats = beats_clearly(returns, self.random)
        return {"real": float(np.mean(returns)), "episodes": len(returns), "beats_random": beats}

    def close(self) -> None:
        """Closes the real envs."""
        self._world.close()

    def _returns(self, policy: Any) -> list[float]:
        """Returns of one episode in each real env."""
        episodes = self._world.num_envs
        return list(evaluate_policy(policy, self._world, episodes, return_episode_rewards=True, warn=False)[0])  # type: ignore[arg-type]


class Trials(BaseCallback):
    """Has the agent judged now and then, and saves it whenever it is the one to be kept, see `kept`.

    Later in its training an agent may earn ever more in the dream and less in the world; this keeps the one between.
    When the agent clearly beats random actions and trials have stopped getting better, it goes back to the best one and
    learns on in smaller steps; after the last of these refinements the training ends.

    Args:
        judge: By the real world, or by what the dream predicts of it (`aime_gym.evaluation.predict.DreamJudge`).
        path: Where the kept agent is saved.
        every: Agent steps in the dream between trials, beside one at the end unless the last was just before.
        patience: Trials in a row without a better one after which an agent that beats random actions is refined, or
            the training ends; None to go on.
        refinements: How many times the agent learns on from the best one, each time at a third of the learning rate.
        earlier: The curve of the training that goes on. Trials of another judge do not count.
    """

    def __init__(
        self,
        judge: Judge,
        path: Path,
        every: int,
        patience: int | None = None,
        refinements: int = 0,
        earlier: Sequence[Point] = (),
    ):
        super().__init__()
        self.curve: list[Point] = []
        self.after: Callable[[], Any] = lambda: None
        """Called after every trial, to save its results."""
        self._earlier = [trial for trial in last_trials(earlier) if judge.decides in trial]
        self._judge, self._path, self._every = judge, path, every
        self._patience, self._refinements = patience, refinements
        self._began, self._tried, self._refined = time.monotonic(), -1, 0

    @property
    def is_enough(self) -> bool:
        """Whether the agent has learned what it will: it beat random actions, and trials have got no better since."""
        return self._plateaus() > self._refinements

    def _plateaus(self, last: int | None = None) -> int:
        """How many times trials have stopped getting better, with as much patience after each; up to one of them."""
        best: tuple[float, ...] = (-math.inf,)
        waited, plateaus, beats = 0, 0, False
        for trial in self._all[:last]:
            beats = beats or trial["beats_random"]
            if _gains(score(trial), best):
                best, waited = score(trial), 0
            else:
                waited += 1
            if self._patience is not None and beats and waited >= self._patience:
                plateaus, waited = plateaus + 1, 0
        return min(plateaus, self._refinements + 1)

    def _slow_down(self, plateaus: int) -> None:
        """Has the agent learn in steps as small as after so many plateaus."""
        self.model.learning_rate *= ANNEAL ** (plateaus - self._refined)  # type: ignore[operator]  # see make_agent
        self.model._setup_lr_schedule()
        self._refined = plateaus

    def try_agent(self) -> None:
        """One trial of the agent as it is."""
        verdict = self._judge.judge(self.model)
        if kept([*self._all, verdict]) is verdict or not self._path.exists():
            save_sb3_agent(self.model, self._path)
        self._tried = self.num_timesteps
        seconds = round(time.monotonic() - self._began, 2)
        self.curve.append({"steps": self.num_timesteps, "seconds": seconds, **verdict})
        self.after()

    @property
    def _all(self) -> list[Mapping[str, Any]]:
        return [*self._earlier, *self.curve]

    def _on_training_start(self) -> None:
        self._began, self._tried = time.monotonic(), self.num_timesteps
        self._slow_down(self._plateaus(last=-1))

    def _on_rollout_start(self) -> None:
        if (plateaus := self._plateaus()) > self._refined:
            self.model.set_parameters(str(self._path), device=self.model.device)
            self._slow_down(plateaus)

    def _on_step(self) -> bool:
        if self.num_timesteps - self._tried >= self._every:
            self.try_agent()
        return not self.is_enough

    def _on_training_end(self) -> None:
        untried = self.num_timesteps - self._tried
        if not self._all or untried > (self._every / 10 if self.curve else 0):
            self.try_agent()


def _gains(new: tuple[float, ...], best: tuple[float, ...]) -> bool:
    """Whether scores are better than the best ones by `LEAST_GAIN`; the first that differ by so much decide."""
    for mine, before in zip(new, best, strict=False):
        if not math.isfinite(before) or abs(mine - before) > LEAST_GAIN * abs(before):
            return mine > before
    return False


class _Progress(BaseCallback):
    """Shows the training, records the learning curve, saves now and then, and cuts at the limit of minutes."""

    def __init__(self, console: Console, save: Callable[[], Any], steps: int, minutes: float | None):
        super().__init__()
        self.curve: list[Point] = []
        self.is_cut = False
        self.bar = Progress(
            BarColumn(), TextColumn("{task.percentage:3.0f}%  {task.description}"), console=console, transient=False
        )
        self._task = self.bar.add_task("", total=1.0)
        self._steps, self._save = max(1, steps), save
        self._seconds = np.inf if minutes is None else 60 * minutes

    def _on_training_start(self) -> None:
        self._began = self._saved = self._shown = time.monotonic()
        self._first = self.num_timesteps
        self._point = -(-self._steps // 200)
        self.bar.start()

    def _on_step(self) -> bool:
        now = time.monotonic()
        if self.num_timesteps - (self.curve[-1]["steps"] if self.curve else self._first) >= self._point:
            self._add_point(now)
        if now - self._shown > 0.5:
            self._show(now)
        if now - self._saved > SAVE_EVERY:
            self._saved = now
            self._save()
        self.is_cut = now - self._began >= self._seconds
        return not self.is_cut

    def _on_training_end(self) -> None:
        now = time.monotonic()
        self._add_point(now)
        self._show(now)

    def _add_point(self, now: float) -> None:
        episodes = self.model.ep_info_buffer
        if episodes:
            means = {name: float(np.mean([episode[key] for episode in episodes])) for name, key in _OF_EPISODES}
            self.curve.append({"steps": self.num_timesteps, "seconds": round(now - self._began, 2), **means})

    def _show(self, now: float) -> None:
        self._shown, elapsed = now, now - self._began
        taken = self.num_timesteps - self._first
        speed = taken / max(elapsed, 1e-6)
        left = min((self._steps - taken) / max(speed, 1e-6), self._seconds - elapsed)
        done = max(taken / self._steps, elapsed / self._seconds)
        returns = "return {return:.0f} in {length:.0f} steps".format(**self.curve[-1]) if self.curve else ""
        minutes, seconds = divmod(max(0, int(left)), 60)
        self.bar.update(
            self._task,
            completed=min(1.0, done),
            description=f"{taken:,} steps  {speed:,.0f}/s  {returns}  at most {minutes}:{seconds:02d} left",
        )


_OF_EPISODES = (("return", "r"), ("length", "l"))
