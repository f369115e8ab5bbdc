"""Dream against real: what policies earn in both worlds, and how well the one tells the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from aime_gym.agents.numpy_policies import load_plain
from aime_gym.agents.sb3 import load_agent, obs_type_of, sees_images, shapes_of
from aime_gym.data.content import model_digest
from aime_gym.envs.dream_checks import load_model_of, usual_obs_type
from aime_gym.errors import AimeGymError, check_natural, check_positive
from aime_gym.evaluation.comparison import Comparison, PolicyReturns
from aime_gym.evaluation.returns import PolicyLike
from aime_gym.evaluation.worlds import Worlds
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.trust import trust_line

NAMED_POLICIES = ("random", "zero")


def compare(
    policies: PolicyLike | Path | Sequence[Any] | Mapping[str, Any],
    embodiment: str = "Walker",
    task: str | None = None,
    episodes: int = 20,
    model: Any = None,
    seed: int = 0,
    obs_type: str | None = None,
    max_episode_steps: int | None = None,
    deterministic: bool = True,
) -> Comparison:
    """Evaluates policies in the dream and in the real env, from the same start states and seeds.

    Args:
        policies: One, a list or a dict by name, of: SB3 agents, objects with their `predict`, callables from a batch
            of observations to a batch of actions, paths of plain policies, and of saved SB3 agents (name only files
            that you trust: but for those that `aime-gym dream` saves, they are code, as is a ``vecnormalize.pkl``
            beside them, whose statistics are taken), and ``"random"`` and ``"zero"``. A loaded agent that learned
            behind a `VecNormalize` must have it, as in ``PPO.load(path, env=VecNormalize.load(...))``.
        embodiment: The body, or the id of a Gymnasium env or of a registered dream.
        task: One of its tasks; its first one by default.
        episodes: Of each policy in each world.
        model: A loaded world model, a folder or a bundled name; the body's bundled one by default, that of images for
            agents on images.
        seed: Of starts and episodes.
        obs_type: What policies see; by default what fits each SB3 agent, and for the others that of `Worlds`.
        max_episode_steps: Agent steps of an episode; the body's own by default.
        deterministic: Whether policies give their mode.

    Returns:
        The comparison.

    Raises:
        AimeGymError: If a name, a number, a file or a policy's spaces do not fit.
    """
    check_positive(episodes, "episodes")
    check_natural(seed, "seed")
    loaded = {name: load_policy(policy) for name, policy in name_policies(policies).items()}
    model = model_for(loaded.values(), embodiment, model, obs_type)
    worlds: dict[str, Worlds] = {}
    results = []
    try:
        for name, policy in loaded.items():
            kind = obs_type or fitting_obs_type(policy, model)
            if kind not in worlds:
                worlds[kind] = Worlds(embodiment, task, model, kind, max_episode_steps)
            check_spaces(name, policy, worlds[kind])
            results.append(PolicyReturns(name, *worlds[kind].evaluate(policy, episodes, seed, deterministic)))
        first = next(iter(worlds.values()))
        return Comparison(
            first.embodiment.name,
            first.task,
            first.model_name,
            seed,
            first.max_episode_steps,
            tuple(results),
            first.usual_doubt,
            trust_line(first.model.folder, first.task),
            model_digest(first.model.folder) if first.model.folder else None,
        )
    finally:
        for pair in worlds.values():
            pair.close()


def name_policies(policies: Any) -> dict[str, Any]:
    """Gives every policy a name of its own: its key, its file, its class, or what it is called."""
    if isinstance(policies, Mapping):
        named = {str(name): policy for name, policy in policies.items()}
    else:
        named = {}
        for policy in policies if isinstance(policies, Sequence) and not isinstance(policies, str) else [policies]:
            if isinstance(policy, (str, Path)):
                name = str(policy)
            else:
                name = getattr(policy, "__name__", type(policy).__name__)
            twins = sum(known == name or known.startswith(f"{name} #") for known in named)
            named[f"{name} #{twins + 1}" if twins else name] = policy
    if not named:
        raise AimeGymError("Expected at least one policy to compare; got none.")
    return named


def load_policy(policy: PolicyLike | Path) -> PolicyLike:
    """Loads the policy if `policy` is the path of one; a folder stands for its ``agent.zip``."""
    if isinstance(policy, Path) or (isinstance(policy, str) and policy not in NAMED_POLICIES):
        path = Path(policy)
        if not path.exists():
            raise AimeGymError(
                f"There is no agent {policy}: expected a zip file that an SB3 agent saved, a folder with an agent.zip, "
                f"a plain policy (.safetensors), or one of {', '.join(NAMED_POLICIES)}."
            )
        if path.suffix == ".safetensors":
            return load_plain(path)
        return cast(PolicyLike, load_agent(path / "agent.zip" if path.is_dir() else path))
    return policy


def model_for(
    policies: Iterable[PolicyLike], embodiment: str, model: Any = None, obs_type: str | None = None
) -> WorldModel:
    """The model to evaluate policies in: as `load_model_of`, and one of images where some policy sees images."""
    images = obs_type == "image" or any(sees_images(policy) for policy in policies)
    return load_model_of(embodiment, model, images)[1]


def fitting_obs_type(policy: PolicyLike, model: WorldModel) -> str:
    """The obs_type that fits the observation space of an agent; the model's usual one for what has none."""
    return obs_type_of(policy, model.config.feature_dim) or usual_obs_type(model)


def fits(policy: PolicyLike, model: WorldModel) -> bool:
    """Whether an agent could act on what the model's dreams show."""
    space = getattr(policy, "observation_space", None)
    sensors = sum(model.config.dims[name] for name in model.observed if name != "image")
    return space is None or space.shape in ((model.config.feature_dim,), (sensors,))


def check_spaces(name: str, policy: PolicyLike, worlds: Worlds) -> None:
    """Raises an `AimeGymError` if an agent was trained for other spaces."""
    for kind, expected in (("observation", worlds.observation_space), ("action", worlds.action_space)):
        space = getattr(policy, f"{kind}_space", None)
        if space is not None and shapes_of(space) != shapes_of(expected):
            raise AimeGymError(
                f"The policy {name!r} has the {kind} space {space}, but {worlds.embodiment.name} "
                f"({worlds.setup}, obs_type {worlds.obs_type!r}) has {expected}. "
                "Was it trained for another body or obs_type?"
            )
