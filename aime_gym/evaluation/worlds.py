"""A body's two worlds for evaluation, and which body, task and model a user means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from aime_gym import DREAM, REAL
from aime_gym.agents.sb3 import obs_type_of, sees_images, shapes_of
from aime_gym.bodies.body import EMBODIMENTS, Embodiment, check_obs_type
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.data.trajectories import METADATA, read_metadata
from aime_gym.envs.dream_checks import choose_task, load_model_of, usual_obs_type
from aime_gym.envs.payment import UserFunction
from aime_gym.envs.wrappers import DecodedSensors, LatentObservation, PaidByFunctions, drawn_as, shown_to
from aime_gym.errors import AimeGymError, check_positive
from aime_gym.evaluation.returns import Episodes, PolicyLike, episode_returns
from aime_gym.files import read_json
from aime_gym.world_model.checkpoint import bundled_models, load_config
from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.model import WorldModel

SENSORS = "sensors"
"""An obs_type of `Worlds` for policies on all sensors of a body where the model sees others or none: the real env shows
the true ones, and the dream those that the model decodes."""


def obs_type_of_all_sensors(model: WorldModel, body: Embodiment) -> str | None:
    """With which obs_type policies on all sensors of a body act in both worlds.

    Args:
        model: A model of the body.
        body: The body.

    Returns:
        ``"state"`` where the model sees them all, `SENSORS` where it decodes them all, and None where it does neither.
    """
    names = {sensor.name for sensor in body.observed("mdp")}
    if names <= set(model.observed):
        return "state"
    return SENSORS if names and names <= {*model.observed, *model.probed} else None


NO_WORLD = "ask the dream alone (real_episodes=0 of compare, trials=0 of dream)."
"""What can be done without a real env."""

REAL_SLOTS = 10
"""Real envs side by side in one process, at most: enough to batch a policy's forward passes."""


class StartFromSlot(gym.Wrapper):
    """Takes its own row of batched start options, which Gymnasium's vector envs hand to every env alike."""

    def __init__(self, env: gym.Env, slot: int):
        super().__init__(env)
        self._slot = slot

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Resets with ``{"physics": vectors[slot]}`` where `options` is ``{"physics": vectors [B, n]}``."""
        own = {name: rows[self._slot] for name, rows in options.items()} if options else None
        return self.env.reset(seed=seed, options=own)


def make_real_envs(
    embodiment: str, num_envs: int, wrap: Callable[[gym.Env], gym.Env] = lambda env: env, **kwargs: Any
) -> VectorEnv:
    """A vector of real envs, stepped one after the other, each of which can start from its own physics state.

    Args:
        embodiment: The body.
        num_envs: Slots.
        wrap: Put around each env.
        **kwargs: Keywords of `aime_gym.envs.real.RealEnv` and `gymnasium.make`.

    Returns:
        An env whose `reset` takes ``options={"physics": [num_envs, nq + nv]}`` if the body is of the suite.
    """

    def make(slot: int) -> gym.Env:
        return StartFromSlot(wrap(gym.make(REAL, embodiment=embodiment, **kwargs)), slot)

    return SyncVectorEnv([partial(make, slot) for slot in range(num_envs)])


def make_dream_envs(
    body: Embodiment, num_envs: int, model: WorldModel, obs_type: str | None, **kwargs: Any
) -> VectorEnv:
    """Dreams side by side, in float32 whatever their number.

    Args:
        body: The body.
        num_envs: Slots.
        model: What dreams.
        obs_type: One of the dream's, or `SENSORS`.
        **kwargs: Keywords of `aime_gym.envs.dream_vector.DreamVectorEnv`.
    """
    decodes = obs_type == SENSORS
    envs = gym.make_vec(
        DREAM,
        embodiment=body.name,
        num_envs=num_envs,
        model=model,
        obs_type="latent" if decodes else obs_type,
        precision="32-true",
        **kwargs,
    )
    return DecodedSensors(envs, model, body.observed("mdp")) if decodes else envs


class Worlds:
    """Both worlds of one body and task, in which episodes begin in pairs: from the same physics state and seed.

    A dream begins by filtering a few real frames; its real twin begins at the physics of the last of them. The physics
    of a foreign body is not known: its real episodes begin as its env begins them.

    Args:
        embodiment: The body, or the id of a Gymnasium env or of a registered dream.
        task: One of its tasks; by default the first one that the model has a head for.
        model: A loaded world model, a folder or a bundled name; the body's bundled one by default.
        obs_type: What policies see, one of the dream's or `SENSORS`; by default ``"latent"`` with a model of images,
            else ``"state"``.
        max_episode_steps: Agent steps of an episode in both worlds; the body's own by default.
        reward: How the dream pays: ``"task"``, ``"formula"`` or ``"head"``, see `aime_gym.TensorDream`.
        reward_fn: Pays in both worlds in place of the task, see `aime_gym.TensorDream`.
        termination_fn: Ends episodes in both worlds, see `aime_gym.TensorDream`.

    Raises:
        AimeGymError: If a name is unknown, the model is of another body, or episodes have no steps.
    """

    def __init__(
        self,
        embodiment: str = "Walker",
        task: str | None = None,
        model: Any = None,
        obs_type: str | None = None,
        max_episode_steps: int | None = None,
        reward: str = "task",
        reward_fn: UserFunction | None = None,
        termination_fn: UserFunction | None = None,
    ):
        self.reward = reward
        self._functions: dict[str, Any] = {"reward_fn": reward_fn, "termination_fn": termination_fn}
        self.embodiment: Embodiment
        self.embodiment, loaded = load_model_of(embodiment, model, obs_type == "image")
        known = EMBODIMENTS.get(self.embodiment.name, self.embodiment)
        if known.action_repeat != self.embodiment.action_repeat:
            raise AimeGymError(
                f"A step of this model of {known.name} is {self.embodiment.action_repeat} control steps; one of the "
                f"real env is {known.action_repeat}, so that the two cannot be compared. Dream in it alone."
            )
        self.task = choose_task(self.embodiment, loaded, task)
        self.obs_type = SENSORS if obs_type == SENSORS else check_obs_type(obs_type or usual_obs_type(loaded))
        whole = self.obs_type == SENSORS or loaded.config.setup == "visual"
        self.setup: str = "mdp" if whole else loaded.config.setup
        steps = self.embodiment.episode_steps if max_episode_steps is None else max_episode_steps
        self.max_episode_steps = check_positive(steps, "max_episode_steps")
        self._envs: dict[tuple[str, int], VectorEnv] = {}
        first = self._make_dream(1, loaded)
        bank: Any = first.unwrapped
        self._bank = bank
        self.model: WorldModel = bank.model
        self._resets = bank.starts["is_reset"].nonzero()[0]
        self.observation_space: gym.Space = first.single_observation_space
        self.action_space: gym.Space = bank.single_action_space

    @property
    def model_name(self) -> str:
        """What to call the model: its folder."""
        return self.model.folder.name if self.model.folder else "in memory"

    def dream_envs(self, num_envs: int, **kwargs: Any) -> VectorEnv:
        """The dream with `num_envs` slots, in float32 whatever their number, and with its doubt by default."""
        return self._make_dream(num_envs, self.model, **{"doubt": True, **kwargs})

    def _make_dream(self, num_envs: int, model: WorldModel, **kwargs: Any) -> VectorEnv:
        options = {"task": self.task, "max_episode_steps": self.max_episode_steps, "reward": self.reward}
        return make_dream_envs(self.embodiment, num_envs, model, self.obs_type, **options | self._functions | kwargs)

    def real_envs(self, num_envs: int, max_episode_steps: int | None = None, **kwargs: Any) -> VectorEnv:
        """The real env, `num_envs` times."""
        options = self.real_options(max_episode_steps)
        return make_real_envs(self.embodiment.name, num_envs, self.wrap, **options, **kwargs)

    def blind_envs(self, num_envs: int) -> VectorEnv:
        """The real env for policies that do not look: nothing is rendered or estimated for them."""
        options = self.real_options() | {"obs_type": "state"}
        return make_real_envs(self.embodiment.name, num_envs, self._paid, **options)

    def real_options(self, max_episode_steps: int | None = None) -> dict[str, Any]:
        """Keywords of the real env, to be put into `wrap`; an `AimeGymError` if there is none."""
        self.embodiment.check_env(NO_WORLD)
        shown = {"latent": shown_to(self.model), SENSORS: "state"}
        return {
            "task": self.task,
            "obs_type": shown.get(self.obs_type, self.obs_type),
            "setup": self.setup,
            "episode_steps": max_episode_steps or self.max_episode_steps,
            **drawn_as(self.model),
        }

    def wrap(self, env: gym.Env) -> gym.Env:
        """The real env as policies see it: those on latents see the model's estimate of its state."""
        env = self._paid(env)
        return LatentObservation(env, self.model) if self.obs_type == "latent" else env

    def _paid(self, env: gym.Env) -> gym.Env:
        """The real env with what pays and ends it in place of its own."""
        if not any(self._functions.values()):
            return env
        return PaidByFunctions(env, self.model, **self._functions, by_name=self.obs_type == "dict")

    @property
    def paid_by(self) -> str:
        """What is paid for: the task, or the name of the user's function."""
        pays = self._functions["reward_fn"]
        return self.task if pays is None else getattr(pays, "__name__", type(pays).__name__)

    @property
    def has_pictures(self) -> bool:
        """Whether the dream can be drawn: by the body's physics, or as the model decodes images."""
        return self.model.decodes_images or not (self.embodiment.foreign or self.embodiment.env_lack)

    @property
    def usual_doubt(self) -> float:
        """The doubt, in nats, below which 95 of 100 real moments lie; they are those of the model's bank of starts."""
        return usual_doubt(self.model, self._bank.start_features)

    @property
    def start_features(self) -> torch.Tensor:
        """The latents of the model's bank of starts, [M, F] float32."""
        return self._bank.start_features

    def draw_starts(self, episodes: int, seed: int = 0) -> NDArray[np.int64]:
        """Start indices [E] among the first frames of real episodes; each once before any comes again."""
        if not len(self._resets):
            raise AimeGymError("The model's starts.npz holds no start at the reset of an episode.")
        rng = np.random.default_rng(seed)
        rounds = [rng.permutation(self._resets) for _ in range(-(-episodes // len(self._resets)))]
        return np.concatenate(rounds)[:episodes]

    def real_starts(self, starts: NDArray[np.int64]) -> dict[str, NDArray[np.float64]] | None:
        """Reset options of real episodes: ``"physics"`` [E, n] at the dream's starts [E]; None if it is not known."""
        if self.embodiment.foreign:
            return None
        return {"physics": np.stack([self._bank.start_physics(int(index)) for index in starts])}

    def evaluate(
        self, policy: PolicyLike, episodes: int = 20, seed: int = 0, deterministic: bool = True
    ) -> tuple[Episodes, Episodes]:
        """Runs paired episodes of a policy.

        Args:
            policy: See `PolicyLike`.
            episodes: E in each world.
            seed: Seed of the starts, and the first of the episodes' seeds.
            deterministic: Whether the policy gives its mode.

        Returns:
            The episodes in the dream and those in the real env; equal indices have equal starts and seeds.
        """
        chosen = policy, episodes, seed, deterministic
        return self.dream_episodes(*chosen), self.real_episodes(*chosen)

    def dream_episodes(
        self, policy: PolicyLike, episodes: int = 20, seed: int = 0, deterministic: bool = True
    ) -> Episodes:
        """The first half of `evaluate`, without the real env."""
        envs, starts = self._cached(self.dream_envs, episodes), self.draw_starts(episodes, seed)
        seeds = [seed + i for i in range(episodes)]
        return episode_returns(policy, envs, None, seeds, {"start": starts}, deterministic)

    def real_episodes(
        self, policy: PolicyLike, episodes: int = 20, seed: int = 0, deterministic: bool = True
    ) -> Episodes:
        """The second half of `evaluate`; fewer episodes than in the dream are the twins of its first ones."""
        costly = self.obs_type in ("image", "latent") and not self.embodiment.foreign
        blind = costly and isinstance(policy, str)  # "random" and "zero" do not look
        envs = self._cached(self.blind_envs if blind else self.real_envs, min(episodes, REAL_SLOTS))
        starts, seeds = self.real_starts(self.draw_starts(episodes, seed)), [seed + i for i in range(episodes)]
        return episode_returns(policy, envs, None, seeds, starts, deterministic)

    def _cached(self, make: Callable[[int], VectorEnv], num_envs: int) -> VectorEnv:
        """Envs to use again for the next policy."""
        key = (make.__name__, num_envs)
        if key not in self._envs:
            self._envs[key] = make(num_envs)
        return self._envs[key]

    def __enter__(self) -> Worlds:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the envs."""
        for envs in (self._bank, *self._envs.values()):
            envs.close()
        self._envs.clear()


def model_for(
    policies: Iterable[PolicyLike], embodiment: str, model: Any = None, obs_type: str | None = None
) -> WorldModel:
    """The model to evaluate policies in: as `load_model_of`, and one of images where some policy sees images."""
    images = obs_type == "image" or any(sees_images(policy) for policy in policies)
    return load_model_of(embodiment, model, images)[1]


def fitting_obs_type(policy: PolicyLike, model: WorldModel) -> str:
    """The obs_type of `Worlds` that fits the observation space of an agent; the model's usual one for what has none."""
    kind = obs_type_of(policy, model.config.feature_dim)
    if kind == "state" and not fits(policy, model):
        body = model.config.body
        whole = sum(sensor.dim for sensor in body.observed("mdp"))
        if cast(Any, policy).observation_space.shape == (whole,):
            kind = obs_type_of_all_sensors(model, body)
    return kind or usual_obs_type(model)


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


@torch.inference_mode()
def usual_doubt(model: WorldModel, start_features: torch.Tensor) -> float:
    """The doubt, in nats, below which 95 of 100 real moments lie, given the latents [M, F] of such moments."""
    return float(model.doubt(start_features).quantile(0.95))


DEFAULT_BODY = "walker"


def find_subject(
    embodiment: str | None, model: str | Path | WorldModel | None, agents: Iterable[Any] = ()
) -> tuple[str, Any]:
    """Finds the body in the model's folder or in what lies beside the agents, and a model where none is bundled.

    Args:
        embodiment: What was asked for; it stays.
        model: What was asked for; it stays.
        agents: Paths of agents, beside which `aime-gym dream` left a job.json or `aime-gym collect` a dataset.json.
            Others, such as ``"random"``, say nothing.

    Returns:
        The body's name, and the model; None for the bundled one.

    Raises:
        AimeGymError: If the agents are of several bodies, or their body is an env of a package that is not imported.
    """
    if embodiment is not None:
        return embodiment, model
    if model is not None:
        return _checked(_config(model).embodiment, model), model
    named = [subject for subject in map(_beside, agents) if subject]
    bodies, models = {body for body, _ in named}, {model for _, model in named}
    if len(bodies) > 1:
        raise AimeGymError(f"These agents are of several bodies: {', '.join(sorted(bodies))}. Compare those of one.")
    if not bodies:
        return DEFAULT_BODY, None
    own, name = models.pop() if len(models) == 1 else None, bodies.pop()
    if f"{name}-state" in bundled_models():
        return _checked(name), None
    return _checked(name, own if own and Path(own).is_dir() else None), own


def _beside(agent: Any) -> tuple[str, str | None] | None:
    """Body and model that are named beside an agent."""
    if not isinstance(agent, str | Path) or not Path(agent).exists():
        return None
    folder = Path(agent) if Path(agent).is_dir() else Path(agent).parent
    if (folder / "job.json").exists():
        settings = read_json(folder / "job.json", "what became of a run").get("settings")
        if isinstance(settings, dict) and isinstance(settings.get("embodiment"), str):
            model = settings.get("model")
            return settings["embodiment"], model if isinstance(model, str) else None
    if (folder / METADATA).exists() and isinstance(body := read_metadata(folder).get("embodiment"), str):
        return body, None
    return None


def _config(model: str | Path | WorldModel) -> ModelConfig:
    return model.config if isinstance(model, WorldModel) else load_config(model)


def _checked(name: str, model: str | Path | WorldModel | None = None) -> str:
    """The name, if it can be taken from a file; a model of logged data needs no env of that name."""
    if model is not None and (body := _config(model).body).logged and body.name == name:
        return name
    return get_embodiment(name, imports=False).name
