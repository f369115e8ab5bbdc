"""Why a dream errs about a policy: a chain of estimators from the real return to the dream's, link by link.

All links look at the same real episodes, which begin where their dreams begin, with the same seeds, as in
`aime_gym.compare`. Each changes one thing, is averaged over whole episodes, and its change of the mean reward is a
share; so the shares sum to the dream's error. See `explain`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from aime_gym.digests import weights_digest
from aime_gym.envs.dream_checks import load_model_of
from aime_gym.envs.threads import one_thread
from aime_gym.errors import AimeGymError, check_natural, check_positive
from aime_gym.evaluation.compare import check_spaces, fitting_obs_type, load_policy, name_policies
from aime_gym.evaluation.error_chain import ErrorChain
from aime_gym.evaluation.explanation import Explanation, PolicyExplanation
from aime_gym.evaluation.formula import TaskFormula, formula_lacks
from aime_gym.evaluation.returns import PolicyLike
from aime_gym.evaluation.worlds import Worlds
from aime_gym.world_model.model import WorldModel

HORIZONS = (5, 20, 100)


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
    watch: Callable[[Explanation], None] | None = None,
) -> Explanation:
    """Splits the error of a dream about each policy into the shares of its causes.

    The links of the chain, each a mean reward a step over the same real episodes:

    1. *real*: what the real env pays.
    2. *head on posterior*: what the reward head pays at the posterior's means on true frames and true actions. Its
       difference from the real reward has two shares. ``posterior`` is what the task's own formula pays for the
       sensors that are decoded from the posterior, less what it pays for the true physics states: the error of
       reconstruction. ``head`` is the rest: how far the head is from the formula on what it has before it. Where the
       formula cannot be evaluated, both are one share, ``posterior and head``.
    3. *true actions, K*: the head along the prior's means under the true actions, in windows of K steps that cover the
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
        episodes: Of each policy in each world, E.
        seed: Of starts and episodes.
        max_episode_steps: Agent steps of an episode; the body's own by default.
        horizons: K, ascending. Those that are no shorter than an episode become its length.
        check: As many other paired episodes of each policy are run, whose gap is told beside the sum of the shares.
        deterministic: Whether policies give their mode.
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
    done: list[PolicyExplanation] = []
    with ExitStack() as stack:
        worlds = {
            kind: stack.enter_context(Worlds(body.name, task, model, kind, max_episode_steps))
            for kind in dict.fromkeys(kinds.values())
        }
        for name, policy in loaded.items():
            check_spaces(name, policy, worlds[kinds[name]])
        first = worlds[next(iter(kinds.values()))]
        lacks = formula_lacks(first.embodiment, first.task, model)
        formula = None if lacks else TaskFormula(first.embodiment, first.task, model)

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
