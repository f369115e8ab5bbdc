"""The chain of estimators between a policy's real return and its dream's, whose differences are the shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.envs.dream_checks import load_model_of
from aime_gym.envs.start_bank import slot_keys, standard_normal
from aime_gym.errors import AimeGymError, check_natural, check_positive, checked_switches
from aime_gym.evaluation.explanation import (
    BEYOND,
    FEEDBACK,
    HEAD,
    PARTS,
    POSTERIOR,
    SAMPLING,
    STARTS,
    TOGETHER,
    Dreamt,
    Explanation,
    PolicyExplanation,
    Windows,
    interval_of,
    prior,
)
from aime_gym.evaluation.real_episodes import RealEpisodes, RealRecorder, filter_episodes
from aime_gym.evaluation.returns import PolicyLike, episode_returns, load_policy, name_policies
from aime_gym.evaluation.worlds import Worlds, check_spaces, fitting_obs_type
from aime_gym.files import weights_digest
from aime_gym.observations import to_tensors
from aime_gym.parallel import one_thread
from aime_gym.world_model.formulas import TaskFormula, formula_lacks
from aime_gym.world_model.model import WorldModel

CHECK_SEED = 1_000_000
"""How far the seeds of the episodes of a check are from those that are explained."""

Rewards = NDArray[np.float64]
"""What an estimator gives each step of each episode, [T, E]."""


class ErrorChain:
    """Explains the errors of one model's dreams at one task, a policy at a time.

    Args:
        worlds: Both worlds of the model and the task.
        formula: The formula of the task's reward; None where it has none.
        episodes: E, of each policy.
        seed: Seed of starts and episodes.
        horizons: Lengths of windows, ascending; those that are no shorter than an episode become its length.
        check: Other episodes of each policy, whose gap is shown beside the shares.
        deterministic: Whether policies give their mode.
    """

    def __init__(
        self,
        worlds: Worlds,
        formula: TaskFormula | None,
        episodes: int,
        seed: int,
        horizons: Sequence[int],
        check: int,
        deterministic: bool,
    ):
        self._worlds, self._formula, self._check, self._deterministic = worlds, formula, check, deterministic
        self._steps = worlds.max_episode_steps
        self._horizons = sorted({min(horizon, self._steps) for horizon in horizons})
        self._seed, self._seeds = seed, [seed + i for i in range(episodes)]
        self._starts = worlds.draw_starts(episodes, seed)
        self._recorder = RealRecorder(worlds, episodes, self._horizons[-1])
        self._dreams = worlds.dream_envs(episodes)
        self._windows = Windows(worlds, episodes, deterministic)
        self._noise = _noise_of_dreams(worlds.model, self._seeds, self._steps)

    def close(self) -> None:
        """Frees the envs."""
        self._recorder.close()
        self._dreams.close()

    def explain(self, name: str, policy: PolicyLike) -> PolicyExplanation:
        """The shares of the error about one policy; see `aime_gym.evaluation.explain.explain`."""
        worlds = self._worlds
        real = self._recorder.record(policy, self._starts, self._seeds, self._deterministic)
        features, kl = filter_episodes(worlds.model, real, None if worlds.embodiment.foreign else self._starts)
        links = {"real": real.rewards, **_window_links(self._windows, real, features, self._noise, self._horizons)}
        links = {link: np.where(real.lasts, rewards, 0.0) for link, rewards in links.items()}
        whole = self._windows.under_policy(real.moments[0], features[0], self._steps, self._noise, _frames(real, 0))
        links["whole episode"] = whole.rewards
        starts = {"start": self._starts}
        dream = episode_returns(policy, self._dreams, None, self._seeds, starts, self._deterministic, record=True)
        links["dream"] = np.stack([_padded(each.rewards, self._steps) for each in dream.recordings], 1)
        if self._formula is not None:
            links |= _formula_links(self._formula, worlds.model, real, features, whole)
        links = {link: _padded(rewards, self._steps) for link, rewards in links.items()}

        steps = float(real.lengths.mean())
        shares = {share: change / steps for share, change in _shares(links, self._horizons).items()}
        return PolicyExplanation(
            name,
            steps,
            {share: float(change.sum(0).mean()) for share, change in shares.items()},
            {share: interval_of(change.sum(0)) for share, change in shares.items()},
            {link: float(rewards.sum(0).mean() / steps) for link, rewards in links.items()},
            _late(links, _padded(real.lasts, self._steps), self._horizons),
            {share: _by_part(change) for share, change in shares.items()},
            float(kl.cpu().numpy()[real.lasts].mean()),
            None if dream.doubt is None else float(dream.doubt.mean()),
            self._checked(policy, steps) if self._check else None,
        )

    def _checked(self, policy: PolicyLike, steps: float) -> tuple[float, float, float]:
        """The gap of dream and real return of other episodes, and its interval, in reward a step."""
        seed = self._seed + CHECK_SEED
        dream, real = self._worlds.evaluate(policy, self._check, seed, self._deterministic)
        gaps = (dream.returns - real.returns) / steps
        return float(gaps.mean()), *interval_of(gaps)


def _noise_of_dreams(model: WorldModel, seeds: Sequence[int], steps: int) -> Tensor:
    """The noise that slots of a dream with these seeds draw, step by step: [steps, E, S]; 0 where it goes by means."""
    counts = torch.arange(1, steps + 1)[:, None]  # the first draw is that of a start
    noise = standard_normal(slot_keys(seeds), counts, model.config.stochastic_dim)
    return torch.zeros_like(noise) if model.config.deterministic else noise


def _window_links(
    windows: Windows, real: RealEpisodes, features: Tensor, noise: Tensor, horizons: Sequence[int]
) -> dict[str, Rewards]:
    """What is paid along the real episodes, [T, E] each, by estimators that come back to them."""
    links, longest = {"paid on posterior": windows.rewards(features, real.actions)}, horizons[-1]
    for horizon in horizons:
        links[_true(horizon)] = windows.under_actions(features, real.actions, horizon)
    links[_true(longest, sampled=True)] = windows.under_actions(features, real.actions, longest, noise)
    for sampled in (False, True):
        parts = []
        for moment in real.moments:
            span = slice(moment.step, min(moment.step + longest, len(real.rewards)))
            drawn = noise[span] if sampled else None
            latents = features[moment.step]
            frames = _frames(real, moment.step)
            parts.append(windows.under_policy(moment, latents, span.stop - span.start, drawn, frames).rewards)
        links[_closed(longest, sampled)] = np.concatenate(parts)
    return links


def _frames(real: RealEpisodes, step: int) -> dict[str, NDArray[Any]]:
    """What the episodes look like before a step: sensor -> [E, ...]."""
    return {name: rows[step] for name, rows in real.frames.items()}


@torch.inference_mode()
def _formula_links(
    formula: TaskFormula, model: WorldModel, real: RealEpisodes, features: Tensor, whole: Dreamt
) -> dict[str, Rewards]:
    """What the task's formula pays for true frames, for those of the posterior, and for those of whole dreams."""
    names = list(formula.sensors)
    true = to_tensors({name: real.frames[name] for name in names}, features.device)
    dreamt = torch.cat([features[:1], whole.features])

    def paid(sensed: Mapping[str, Tensor], actions: NDArray[np.float32]) -> Rewards:
        before, after = ({name: rows[part].flatten(0, 1) for name, rows in sensed.items()} for part in _STEPS)
        rewards = formula(before, after, torch.from_numpy(actions).flatten(0, 1))
        return rewards.unflatten(0, actions.shape[:2]).double().cpu().numpy()

    return {
        "formula on true frames": paid(true, real.actions),
        "formula on posterior": paid(model.decode(features, names), real.actions),
        "formula in the dream": paid(model.decode(dreamt, names), whole.actions),
    }


_STEPS = slice(None, -1), slice(1, None)
"""The frames before and after each step."""


def _shares(links: Mapping[str, Rewards], horizons: Sequence[int]) -> dict[str, Rewards]:
    """The changes from link to link, which sum to dream minus real."""
    longest, on_posterior = horizons[-1], links["paid on posterior"]
    together, shares = on_posterior - links["real"], {}
    if "formula on posterior" in links:
        shares[POSTERIOR] = links["formula on posterior"] - links["formula on true frames"]
        shares[HEAD] = together - shares[POSTERIOR]
    else:
        shares[TOGETHER] = together
    before = on_posterior
    for horizon in horizons:
        shares[prior(horizon)] = links[_true(horizon)] - before
        before = links[_true(horizon)]
    open_means, open_sampled = before, links[_true(longest, sampled=True)]
    means, sampled = links[_closed(longest, sampled=False)], links[_closed(longest)]
    shares[FEEDBACK] = ((means - open_means) + (sampled - open_sampled)) / 2
    shares[SAMPLING] = ((open_sampled - open_means) + (sampled - means)) / 2
    shares[BEYOND] = links["whole episode"] - sampled
    shares[STARTS] = links["dream"] - links["whole episode"]
    return shares


def _late(
    links: Mapping[str, Rewards], lasts: NDArray[np.bool_], horizons: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Mean rewards in the last half of windows, by their length."""
    told = {}
    for horizon in horizons:
        late = lasts & ((np.arange(len(lasts)) % horizon + 1) * 2 > horizon)[:, None]
        wanted = {"real": "real", "true actions": _true(horizon)}
        if horizon == horizons[-1]:
            wanted |= {"closed loop": _closed(horizon), "closed loop, means": _closed(horizon, sampled=False)}
        told[str(horizon)] = {
            name: float(links[link][late].mean()) if late.any() else 0.0 for name, link in wanted.items()
        }
    return told


def _by_part(change: Rewards) -> tuple[float, ...]:
    """What each tenth of the longest possible episode adds to a share [T, E]."""
    return tuple(float(part.sum(0).mean()) for part in np.array_split(change, PARTS))


def _true(horizon: int, sampled: bool = False) -> str:
    return f"true actions {horizon}{', sampled' if sampled else ''}"


def _closed(horizon: int, sampled: bool = True) -> str:
    return f"closed loop {horizon}{'' if sampled else ', means'}"


def _padded(rewards: NDArray[Any], length: int) -> NDArray[Any]:
    return np.concatenate([rewards, np.zeros((length - len(rewards), *rewards.shape[1:]), rewards.dtype)])


HORIZONS = (5, 20, 100)


@checked_switches
def explain(
    model: str | Path | WorldModel,
    policies: PolicyLike | Path | Sequence[Any] | Mapping[str, Any],
    task: str | None = None,
    embodiment: str | None = None,
    episodes: int = 10,
    seed: int = 0,
    max_episode_steps: int | None = None,
    horizons: Sequence[int] = HORIZONS,
    check: int = 0,
    deterministic: bool = True,
    reward: str = "task",
    watch: Callable[[Explanation], None] | None = None,
) -> Explanation:
    """Splits the error of a dream about each policy into the shares of its causes.

    The links of the chain, each a mean reward a step over the same real episodes:

    1. *real*: what the real env pays.
    2. *paid on posterior*: what the dream pays at the posterior's means on true frames and true actions: the task's
       formula, or the reward head. Its difference from the real reward has two shares. ``posterior`` is what the
       formula pays for the sensors that are decoded from the posterior, less what it pays for the true ones: the error
       of reconstruction. ``head`` is the rest: how far the head is from the formula on what it has before it, or, where
       the formula pays, what it misses between two frames. Where there is no formula, both are one share,
       ``posterior and head``.
    3. *true actions, K*: the same along the prior's means under the true actions, in windows of K steps that cover the
       episode, each from the posterior. ``prior 5``, ``prior 20`` and so on are the steps from one K to the next.
    4. *closed loop, K* (the largest): the same windows, but the policy sees decoded frames and acts, and latents are
       sampled. ``feedback`` and ``sampling`` are both switched on here; each is the mean of what it adds before and
       after the other (Shapley's values of the two).
    5. *whole episode*: the closed loop is not brought back to a real latent any more. ``beyond`` is the difference.
    6. *dream*: the dream env itself, from its own start. ``starts`` is the difference: for a body of the suite only how
       the first frame looks to the model, as both begin in the same physics state; for a foreign body also that its
       real episodes begin elsewhere.

    Where episodes can terminate, steps under the true actions go on as the real episode did, and dreams in closed loop
    end where the dream ends them, so that wrong endings belong to ``feedback`` and ``beyond``.

    Args:
        model: A loaded model, a folder or a bundled name.
        policies: See `aime_gym.compare`.
        task: One that the model's heads reward; the body's first such by default.
        embodiment: The body, or the id of a Gymnasium env with the model's spaces; the model's own by default.
        episodes: Episodes of each policy in each world, E.
        seed: Seed of starts and episodes.
        max_episode_steps: Agent steps of an episode; the body's own by default.
        horizons: K, ascending. Those that are no shorter than an episode become its length.
        check: How many other paired episodes of each policy are run; their gap is shown beside the sum of the shares.
        deterministic: Whether policies give their mode.
        reward: How the dream pays: ``"task"``, ``"formula"`` or ``"head"``, see `aime_gym.TensorDream`.
        watch: Called with what is explained so far after each policy.

    Returns:
        The explanation.

    Raises:
        AimeGymError: If a name, a number, a file or a policy's spaces do not fit, before the first episode is run.
    """
    check_positive(episodes, "episodes")
    check_natural(seed, "seed")
    check_natural(check, "check")
    ascending = all(first < second for first, second in pairwise(horizons))
    if not horizons or not ascending or any(check_positive(each, "horizons") < 1 for each in horizons):
        raise AimeGymError(f"Horizons are steps in ascending order, e.g. (5, 20, 100); got {tuple(horizons)}.")
    loaded = {name: load_policy(policy) for name, policy in name_policies(policies).items()}
    body, model = load_model_of(embodiment, model)
    kinds = {name: fitting_obs_type(policy, model) for name, policy in loaded.items()}
    looking = [name for name, policy in loaded.items() if getattr(policy, "observation_space", None) is not None]
    if looking:  # other policies do not look at observations
        kinds = {name: kinds[name if name in looking else looking[0]] for name in loaded}
    done: list[PolicyExplanation] = []
    with ExitStack() as stack:
        worlds = {
            kind: stack.enter_context(Worlds(body.name, task, model, kind, max_episode_steps, reward))
            for kind in dict.fromkeys(kinds.values())
        }
        for name, policy in loaded.items():
            check_spaces(name, policy, worlds[kinds[name]])
        first = worlds[next(iter(kinds.values()))]
        lacks = formula_lacks(first.embodiment, first.task, model)
        formula = None if lacks else TaskFormula(first.embodiment.name, first.task)

        def told() -> Explanation:
            return Explanation(
                first.embodiment.name,
                first.task,
                first.model_name,
                None if model.folder is None else weights_digest(model.folder),
                seed,
                episodes,
                lacks,
                tuple(done),
            )

        chains: dict[str, ErrorChain] = {}
        for name, policy in loaded.items():
            kind = kinds[name]
            with one_thread():
                if kind not in chains:
                    chains[kind] = ErrorChain(worlds[kind], formula, episodes, seed, horizons, check, deterministic)
                    stack.callback(chains[kind].close)
                done.append(chains[kind].explain(name, policy))
            if watch is not None:
                watch(told())
        return told()
