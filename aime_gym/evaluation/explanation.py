"""Why a dream errs about policies: the shares of its error, as an object that prints, saves and loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from aime_gym.envs.payment import Payment
from aime_gym.errors import AimeGymError
from aime_gym.evaluation import Printed
from aime_gym.evaluation.real_episodes import Moment
from aime_gym.evaluation.returns import bootstrap_interval, checked_actions
from aime_gym.evaluation.worlds import SENSORS, Worlds
from aime_gym.files import read_json, write_json
from aime_gym.observations import to_sensors, to_shown, to_vectors
from aime_gym.world_model.fast_dynamics import BIG_BATCH, FastDynamics, ImageBytes

FORMAT = "aime_gym.explanation/1"

POSTERIOR, HEAD, TOGETHER = "posterior", "head", "posterior and head"

FEEDBACK, SAMPLING, BEYOND, STARTS = "feedback", "sampling", "beyond", "starts"

PARTS = 10
"""An episode's shares are also given for each tenth of it."""


def prior(horizon: int) -> str:
    """The name of a horizon's share."""
    return f"prior {horizon}"


@dataclass(frozen=True)
class PolicyExplanation:
    """The error of a dream about one policy, in reward a step.

    Everything is divided by the mean length of the policy's real episodes, `steps`: times it, numbers are returns.

    Attributes:
        name: Name of the policy.
        steps: Mean length of its real episodes.
        shares: Share -> its part of the error; they sum to `error`. `aime_gym.evaluation.explain.explain` says what
            each of them is.
        intervals: Share -> 95% bootstrap interval over episodes.
        estimates: What the policy earns by each estimator of the chain, from ``"real"`` to ``"dream"``.
        late: Window -> what is earned in the last half of such windows: in the real env, under the true actions, and,
            at the longest, in closed loop, sampled and by means.
        profile: Share -> [PARTS], what each tenth of an episode adds to it.
        kl: KL of the posterior from the prior on the real frames, in nats a step.
        doubt: Mean doubt of the dream's steps, in nats.
        check: Gap of dream and real return a step in other episodes, with its interval; None if there were none.
    """

    name: str
    steps: float
    shares: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    estimates: Mapping[str, float]
    late: Mapping[str, Mapping[str, float]]
    profile: Mapping[str, tuple[float, ...]]
    kl: float
    doubt: float | None = None
    check: tuple[float, float, float] | None = None

    @property
    def real(self) -> float:
        """Reward a step in the real env."""
        return self.estimates["real"]

    @property
    def dream(self) -> float:
        """Return of a dream, divided by `steps`."""
        return self.estimates["dream"]

    @property
    def error(self) -> float:
        """Dream minus real."""
        return self.dream - self.real

    @property
    def largest(self) -> str:
        """The share that is farthest from 0."""
        return max(self.shares, key=lambda name: abs(self.shares[name]))

    @property
    def head_in_dream(self) -> float | None:
        """What the dream pays for its own states beyond the task's formula; None without a formula."""
        formula = self.estimates.get("formula in the dream")
        if formula is None:
            return None
        clock = self.estimates["real"] - self.estimates["formula on true frames"]
        return self.estimates["whole episode"] - formula - clock


@dataclass(frozen=True, repr=False)
class Explanation(Printed):
    """The errors of a model's dreams about several policies. `print` shows the table.

    Attributes:
        embodiment: The body.
        task: The task.
        model: Name of the model's folder.
        digest: Digest of its weights, if it has a folder.
        seed: Seed of starts and episodes.
        episodes: Episodes of each policy in each world.
        lacks: Why there is no formula of the reward, in words; None where there is one.
        policies: One of each policy.
    """

    embodiment: str
    task: str
    model: str
    digest: str | None
    seed: int
    episodes: int
    lacks: str | None
    policies: tuple[PolicyExplanation, ...]

    _width = 180

    def mean_shares(self) -> dict[str, float]:
        """Share -> mean of its absolute value over the policies, in reward a step: what to fix first."""
        return {
            name: float(np.mean([abs(policy.shares.get(name, 0.0)) for policy in self.policies]))
            for name in _in_order(policy.shares for policy in self.policies)
        }

    def table(self) -> Table:
        """The shares of each policy as a rich table."""
        names = list(self.mean_shares())
        caption = "reward a step; shares sum to dream - real; KL on real frames, in nats"
        table = Table(title=self._title(), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("policy", overflow="fold")
        checked = any(p.check for p in self.policies)
        for column in ("real", "dream", "error", *names, "KL", *(["error elsewhere"] if checked else [])):
            table.add_column(column, justify="right")
        for p in self.policies:
            shares = [_signed(p.shares[name]) if name in p.shares else "" for name in names]
            numbers = [f"{p.real:.2f}", f"{p.dream:.2f}", _signed(p.error), *shares, f"{p.kl:.1f}"]
            table.add_row(escape(p.name), *numbers, *([escape(_interval(p.check))] if p.check else []))
        means = [f"{value:.2f}" for value in self.mean_shares().values()]
        table.add_row("mean of sizes", "", "", f"{self._mean_error():.2f}", *means, "", style="bold")
        return table

    def windows(self) -> Table:
        """What policies earn in the last half of windows of several lengths, as a rich table."""
        caption = "reward a step in the last half of windows; (real there)"
        table = Table(title="The same in windows", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("policy", "real", "paid on posterior", "true actions", "closed loop; by means"):
            table.add_column(column, justify="left" if column == "policy" else "right")
        for p in self.policies:
            open_loop, there = (
                " / ".join(_late(w, name) for w in p.late.values()) for name in ("true actions", "real")
            )
            last = list(p.late.values())[-1]
            table.add_row(
                escape(p.name),
                f"{p.real:.2f}",
                f"{p.estimates['paid on posterior']:.2f}",
                f"{' / '.join(p.late)}: {open_loop} ({there})",
                f"{_late(last, 'closed loop')}; {_late(last, 'closed loop, means')}",
            )
        return table

    def _parts(self) -> Iterable[RenderableType]:
        yield self.table()
        yield self.windows()
        if self.lacks:
            yield Text(f"Posterior and head are told together: {self.lacks}.")

    def to_markdown(self) -> str:
        """The shares as a table for a model's card."""
        names = list(self.mean_shares())
        header = ["policy", "real", "dream", "error", *names, "head in the dream", "KL"]
        rows = [header, ["---"] * len(header)]
        for p in self.policies:
            own = "" if p.head_in_dream is None else _signed(p.head_in_dream)
            shares = [_signed(p.shares[name]) if name in p.shares else "" for name in names]
            rows.append([p.name, f"{p.real:.2f}", f"{p.dream:.2f}", _signed(p.error), *shares, own, f"{p.kl:.1f}"])
        means = [f"{value:.2f}" for value in self.mean_shares().values()]
        rows.append(["mean of sizes", "", "", f"{self._mean_error():.2f}", *means, "", ""])
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _TOLD},
            "mean_shares": self.mean_shares(),
            "policies": {
                p.name: {
                    **{name: getattr(p, name) for name in _NUMBERS},
                    "real": p.real,
                    "dream": p.dream,
                    "error": p.error,
                    "head_in_dream": p.head_in_dream,
                }
                for p in self.policies
            },
        }

    def to_json(self, path: str | Path) -> Path:
        """Writes `to_dict` to a file, whole or not at all."""
        return write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> Explanation:
        """Reads what `to_json` wrote.

        Raises:
            AimeGymError: If the file is not such an explanation.
        """
        data = read_json(path, "an explanation written by aime_gym")
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            policies = tuple(_policy(name, numbers) for name, numbers in data["policies"].items())
            return cls(**{name: data[name] for name in _TOLD}, policies=policies)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise AimeGymError(f"{path} does not hold an explanation written by aime_gym ({error!r}).") from error

    def _mean_error(self) -> float:
        return float(np.mean([abs(policy.error) for policy in self.policies]))

    def _title(self) -> str:
        told = f"Why dreams of {self.model} err: {self.embodiment} {self.task}, {self.episodes} episodes"
        return escape(told)


_TOLD = ("embodiment", "task", "model", "digest", "seed", "episodes", "lacks")

_NUMBERS = ("steps", "shares", "intervals", "estimates", "late", "profile", "kl", "doubt", "check")


def interval_of(values: NDArray[np.float64]) -> tuple[float, float]:
    """95% bootstrap interval of the mean of values [E]."""
    return bootstrap_interval(values, resamples=2000)


def _policy(name: str, numbers: Mapping[str, Any]) -> PolicyExplanation:
    def floats(content: Mapping[str, Any]) -> dict[str, float]:
        return {str(key): float(value) for key, value in content.items()}

    check = numbers["check"]
    return PolicyExplanation(
        name,
        float(numbers["steps"]),
        floats(numbers["shares"]),
        {key: (float(low), float(high)) for key, (low, high) in numbers["intervals"].items()},
        floats(numbers["estimates"]),
        {window: floats(content) for window, content in numbers["late"].items()},
        {key: tuple(map(float, values)) for key, values in numbers["profile"].items()},
        float(numbers["kl"]),
        None if numbers["doubt"] is None else float(numbers["doubt"]),
        None if check is None else (float(check[0]), float(check[1]), float(check[2])),
    )


def _in_order(names: Iterable[Iterable[str]]) -> list[str]:
    """Every name once, in the order in which they first come."""
    return list(dict.fromkeys(name for some in names for name in some))


def _interval(check: tuple[float, float, float]) -> str:
    return "{} [{}, {}]".format(*map(_signed, check))


def _late(window: Mapping[str, float], name: str) -> str:
    """A number of `PolicyExplanation.late`; a dash where no episode lasted into a window's last half."""
    return f"{window[name]:.2f}" if name in window else "-"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


class Dreamt(NamedTuple):
    """The results of E dreams of T steps.

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
        worlds: Both worlds of the model and the task.
        slots: E, dreams side by side where a policy acts.
        deterministic: Whether policies give their mode.
    """

    def __init__(self, worlds: Worlds, slots: int, deterministic: bool = True):
        model = worlds.model
        self._worlds, self._deterministic, self._space = worlds, deterministic, worlds.action_space
        self._sensors = worlds.embodiment.observed(worlds.setup)
        shows = worlds.obs_type in ("state", "dict", SENSORS)
        names = [sensor.name for sensor in self._sensors] if shows else []
        self._code = model.config.code_of(names)
        task = None if model.heads is None else worlds.task
        told = worlds.reward, worlds.embodiment, worlds.task, model
        self.payment, self._pay = Payment(*told), Payment(*told, names)
        self._paying = FastDynamics(model, self.payment.names, task, BIG_BATCH)
        self._paid_code = model.config.code_of(self.payment.names)
        self._seen = FastDynamics(model, self._pay.names, task, slots)
        self._images = ImageBytes(model) if worlds.obs_type == "image" else None

    @torch.inference_mode()
    def rewards(self, features: Tensor, actions: NDArray[np.float32]) -> NDArray[np.float64]:
        """What the dream pays for steps between given latents.

        Args:
            features: [T + 1, E, F], of the frames before each step and after the last.
            actions: [T, E, A]

        Returns:
            [T, E]
        """
        means = self._paying.decode(features.flatten(0, 1))
        slots = features.shape[1]
        paid = self._along(means[:-slots], means[slots:], torch.from_numpy(actions).flatten(0, 1))
        return _once(*(one.unflatten(0, actions.shape[:2]).double().cpu().numpy() for one in paid))

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
        means = self._paying.decode(state)
        rewards = np.zeros((3, len(begins), window, episodes))
        for step in range(min(window, length)):
            rows = np.minimum(begins + step, length - 1)  # behind the end of the last window nothing counts
            done = torch.from_numpy(actions[rows]).flatten(0, 1)
            drawn = None if noise is None else noise[rows].flatten(0, 1)
            state, before = self._paying.advance(state, done, drawn), means
            means = self._paid_code.nearest(self._paying.decode(state), before)
            paid = torch.stack(self._along(before, means, done))
            rewards[:, :, step] = paid.unflatten(1, (len(begins), episodes)).cpu().numpy()
        return _once(*np.nan_to_num(rewards.reshape(3, -1, episodes)[:, :length]))

    def _along(self, before: Tensor, means: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What N steps pay, what they pay if none of them ends its episode, and which do, as numbers, [N] each."""
        paid, ends = self.payment(before, means, actions), self.payment.ends(before, means, actions)
        if ends is None or not self.payment.pays_ends:
            return paid, paid, torch.zeros_like(paid)
        return paid, means[:, -1], ends[0].to(paid)

    @torch.inference_mode()
    def under_policy(
        self,
        moment: Moment,
        latents: Tensor,
        steps: int,
        noise: Tensor | None = None,
        frames: Mapping[str, NDArray[Any]] | None = None,
    ) -> Dreamt:
        """Closed loop: the policy, as it was at some moment, sees what the dream decodes and acts.

        Args:
            moment: The policy.
            latents: Where the dreams begin, [E, F].
            steps: T
            noise: [T, E, S] for sampled latents; None for means.
            frames: Sensor -> [E, D], what was real there: angles go on from its turns.
        """
        policy, memory = moment.own()
        slots = len(latents)
        state, means = latents, self._seen.decode(latents)
        seen = means[:, : self._code.dim]
        if self._code.goes_on and frames is not None:
            real = np.concatenate([frames[sensor.name] for sensor in self._sensors], -1)
            seen = self._code.nearest(seen, torch.from_numpy(real).to(seen))
        goes_on = np.ones(slots, bool)
        rewards = np.zeros((steps, slots))
        features, actions = [], []
        for step in range(steps):
            begins = np.full(slots, moment.step + step == 0)
            shown = self._shown(state, seen)
            acted, memory = policy.predict(shown, memory, begins, deterministic=self._deterministic)
            actions.append(to_vectors(checked_actions(acted, self._space, slots), self._worlds.embodiment))
            done, before = torch.from_numpy(actions[-1]), means
            following, means, *_ = self._seen.step(state, done, None if noise is None else noise[step])
            finite = following.isfinite().all(1) & means.isfinite().all(1)
            state = torch.where(finite[:, None], following, state)
            means = torch.where(finite[:, None], means, 0.0)
            means = self._code.nearest(means, seen)
            seen = means[:, : self._code.dim]
            goes_on &= finite.cpu().numpy()
            rewards[step] = np.where(goes_on, self._pay(before, means, done).cpu().numpy(), 0.0)
            if (ends := self._pay.ends(before, means, done)) is not None:
                goes_on &= ~ends[0].cpu().numpy()
            features.append(state)
        return Dreamt(rewards, torch.stack(features), np.stack(actions))

    def _shown(self, state: Tensor, seen: Tensor) -> Any:
        """What a policy sees of latents [E, F] that look like sensors [E, D], as in `DreamVectorEnv`."""
        if self._worlds.obs_type == "latent":
            return state.cpu().numpy().copy()
        if self._images is not None:
            return self._images(state).numpy()
        sensors = seen.cpu().numpy().copy()
        shows_parts = self._worlds.obs_type == "dict"
        return to_shown(self._sensors, to_sensors(self._sensors, sensors)) if shows_parts else sensors


def _once(paid: NDArray[Any], unended: NDArray[Any], over: NDArray[Any]) -> NDArray[np.float64]:
    """Rewards [T, E] of which an end is paid once: along true actions an episode goes on that a dream would end."""
    return np.where(over.cumsum(0) > 1, unended, paid)
