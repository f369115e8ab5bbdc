"""Wrappers of the world by a model: latents as observations, and the evidence of what is observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import gymnasium
import numpy as np
import torch
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorObservationWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.bodies.body import Sensor
from aime_gym.envs.payment import StepFunction, UserFunction
from aime_gym.envs.start_bank import to_frames
from aime_gym.errors import AimeGymError, checked_switches
from aime_gym.observations import action_space, observation_space, read_frames, to_tensors, to_vector
from aime_gym.parallel import one_thread
from aime_gym.world_model.checkpoint import load_pretrained_model, load_starts
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.packed import without_autocast


class LatentObservation(gymnasium.Wrapper, RecordConstructorArgs):
    """Shows the model's estimate of the state: the feature concat(h, s) of all observations and actions so far.

    With it the real env has the observation space of a dream with ``obs_type="latent"``. An estimate needs a few
    frames to become good: the model's first state is made of zeros.

    Examples:
        >>> import gymnasium, aime_gym
        >>> world = aime_gym.LatentObservation(gymnasium.make("AimeReal-Walker-v0"), "walker-state")
        >>> latents, info = world.reset(seed=0)
        >>> latents.shape
        (288,)

    Args:
        env: A real env of the model's body with observations of ``"state"``, ``"dict"`` or ``"image"``.
        model: A loaded model, a folder or a bundled name.
        deterministic: Whether the latent is the posterior's mean rather than a sample.

    Raises:
        AimeGymError: If the env does not show what the model observes.
    """

    @checked_switches
    @one_thread()
    def __init__(self, env: gymnasium.Env, model: str | WorldModel, deterministic: bool = True):
        RecordConstructorArgs.__init__(self, model=model, deterministic=deterministic)
        super().__init__(env)
        self.model = model if isinstance(model, WorldModel) else load_pretrained_model(model)
        self._deterministic = deterministic
        config = self.model.config
        self._sensors = tuple(sensor for sensor in config.sensors if sensor.name in self.model.observed)
        self.observation_space = observation_space(self._sensors, "latent", config.feature_dim)
        check_shown(self.model, env)
        self._device = self.model.cell.initial_state.device
        self._generator = torch.Generator()
        self._generator.seed()  # another one for each env, until a reset brings a seed
        self._state = self.model.initial_state(1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Resets the env; the estimate begins at zeros."""
        observation, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self._generator.manual_seed(seed)
        self._state = self.model.initial_state(1)
        return self._filter(None, observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Steps the env and the estimate."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._filter(action, observation), reward, terminated, truncated, info

    @one_thread()
    @without_autocast()
    @torch.inference_mode()
    def _filter(self, action: Any, observation: Any) -> np.ndarray:
        frame, _ = to_frames(self.model, observation)
        noise: Tensor | None = None
        if not self._deterministic:
            noise = torch.randn(1, self.model.config.stochastic_dim, generator=self._generator).to(self._device)
        done = _led(self.model, action, self._device)
        self._state = self.model.posterior_step(self._state, done, self.model.encode(frame), noise)
        return self._state[0].cpu().numpy().copy()


class PaidByFunctions(gymnasium.Wrapper):
    """A real env that functions of the user's pay, and end, as they do the dreams of a model.

    Args:
        env: A real env of the model's body.
        model: Says which sensors the functions see: those that it decodes.
        reward_fn: Pays in place of the env, see `aime_gym.envs.payment.StepFunction`; None for the env's own rewards.
        termination_fn: Ends episodes in place of the env; None for its own terminations.
        by_name: Whether the functions get dicts of sensors.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        model: WorldModel,
        reward_fn: UserFunction | None = None,
        termination_fn: UserFunction | None = None,
        by_name: bool = False,
    ):
        super().__init__(env)
        asked = {"reward_fn": reward_fn, "termination_fn": termination_fn}
        self._functions = {
            told: StepFunction(function, told, model, by_name) for told, function in asked.items() if function
        }
        self._model = model

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the env."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._before = self._readings()
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps the env; the functions say what that pays and whether it ends."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        before, self._before = self._before, self._readings()
        done = _led(self._model, action, torch.device("cpu"))
        told = {name: function(before, self._before, done) for name, function in self._functions.items()}
        reward = float(told["reward_fn"]) if "reward_fn" in told else reward
        terminated = bool(told["termination_fn"]) if "termination_fn" in told else terminated
        return observation, reward, terminated, truncated, info

    def _readings(self) -> dict[str, Tensor]:
        readings = cast(Any, self.env.unwrapped).readings()
        names = {name for function in self._functions.values() for name in function.sensors}
        return {name: torch.as_tensor(np.asarray(readings[name], np.float32))[None] for name in names}


class DecodedSensors(VectorObservationWrapper):
    """Lets policies that read sensors act in the dream of a model that observes something else: sensors are decoded.

    Args:
        envs: A dream with ``obs_type="latent"``.
        model: Its model.
        sensors: The sensors to show side by side, which the model must observe or probe.
    """

    def __init__(self, envs: VectorEnv, model: WorldModel, sensors: Sequence[Sensor]):
        super().__init__(envs)
        self._model, self._names = model, [sensor.name for sensor in sensors]
        self._code = model.config.code_of(self._names)
        self._last: NDArray[np.float32] | None = None
        self._given: Mapping[str, NDArray[Any]] = {}
        self.single_observation_space = observation_space(sensors, "state")
        self.observation_space = batch_space(self.single_observation_space, envs.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the dream; where it begins with real frames, angles go on from theirs."""
        start, dream = (options or {}).get("start"), cast(Any, self.env.unwrapped)
        self._given = {}
        if isinstance(start, Mapping) and "latents" not in start and self._code.goes_on:
            self._given = read_frames(start, dream.sensors, self.num_envs, dream.embodiment.choices)[0]
        return super().reset(seed=seed, options=options)

    @torch.inference_mode()
    def observations(self, observations: Any) -> NDArray[np.float32]:
        """Sensors [N, D] of latents [N, F]."""
        device = self._model.cell.initial_state.device
        decoded = self._model.decode(torch.from_numpy(observations).to(device), self._names)
        shown = np.concatenate([decoded[name].cpu().numpy() for name in self._names], axis=-1)
        if self._code.goes_on:
            shown = self._last = self._code.nearest(shown, self._before(shown))
        return shown.copy()

    def _before(self, shown: NDArray[np.float32]) -> NDArray[np.float32]:
        """What angles go on from: what was shown last, and where an episode begins its last real frame, [N, D]."""
        dream: Any = self.env.unwrapped
        steps, starts = dream.state.steps.cpu().numpy(), dream.state.starts.cpu().numpy()
        before = shown.copy() if self._last is None else np.where(steps[:, None] == 0, shown, self._last)
        given, known, begin = (steps == 0) & (starts < 0), (steps == 0) & (starts >= 0), 0
        bank = dream.tensor_dream.need_bank().starts if known.any() else {}
        for part in self._code.parts:
            columns = slice(begin, begin + part.dim)
            if part.name in self._given:
                before[given, columns] = self._given[part.name][-1, given]
            if part.name in bank:
                before[known, columns] = bank[part.name][-1, starts[known]]
            begin = columns.stop
        return before


def shown_to(model: WorldModel) -> str:
    """The obs_type of a real env that `LatentObservation` can turn into latents of the model."""
    return "image" if "image" in model.observed else "state"


def drawn_as(model: WorldModel) -> dict[str, Any]:
    """Keywords of a real env of the suite by which its images are drawn as those were that the model learned from."""
    return {"rendering": model.config.rendering} if model.config.rendering != "full" else {}


def check_shown(model: WorldModel, env: gymnasium.Env) -> None:
    """Raises an `AimeGymError` unless an env takes the model's actions and shows what the model observes."""
    config, space = model.config, env.observation_space
    takes, choices = action_space(config.body), config.body.choices
    if not (choices.same_space(env.action_space) if choices else env.action_space.shape == takes.shape):
        needed = f"in {takes}" if choices else f"of shape {takes.shape}"
        raise AimeGymError(f"A model of {config.embodiment} needs actions {needed}; the env has {env.action_space}.")
    taken: Any = env.action_space
    if not choices and config.body.foreign and not (np.all(taken.low == -1) and np.all(taken.high == 1)):
        raise AimeGymError(
            f"A model of {config.embodiment} knows actions in [-1, 1]; the env has {env.action_space}, which it would "
            "misread: wrap it in gymnasium.wrappers.RescaleAction(env, -1, 1), or make it by AimeReal-v0."
        )
    if isinstance(space, gymnasium.spaces.Dict):
        fits = all(name in space.spaces for name in model.observed)
    elif "image" in model.observed:
        fits = space.dtype == np.uint8 and model.observed == ("image",)
    else:
        fits = space.shape == (sum(config.dims[name] for name in model.observed),)
    if not fits:
        raise AimeGymError(f"The model observes {', '.join(model.observed)}; the env shows {space}.")


def _led(model: WorldModel, action: Any, device: torch.device) -> Tensor:
    """The action that led to a frame as a vector [1, A]; None led to the first one."""
    body = model.config.body
    if action is None:
        action = np.zeros(body.action_dim)
    elif body.choices:
        action = to_vector(action, body)
    return torch.tensor(np.asarray(action, np.float32), device=device)[None]


SETTLING = 5
"""Frames after which the estimate of the state is trusted: the model's first state is made of zeros."""


class Evidence(gymnasium.Wrapper, RecordConstructorArgs):
    """Reports, for each real step, the log evidence that the model gives the observation.

    ``info["evidence"]`` is a lower bound on log p(o_t | o_<t, a_<=t) in nats (the ELBO of one step, with posterior
    means), and ``info["unexplained"]`` whether it is below `threshold`: another body, another world, a broken sensor.

    Examples:
        >>> import gymnasium, aime_gym
        >>> world = aime_gym.Evidence(gymnasium.make("AimeReal-Walker-v0"), "walker-state")
        >>> observation, info = world.reset(seed=0)
        >>> *_, info = world.step(world.action_space.sample())
        >>> sorted(info)
        ['evidence', 'unexplained']

    Args:
        env: A real env of the model's body with observations of ``"state"``, ``"dict"`` or ``"image"``.
        model: A loaded model, a folder or a bundled name.
        threshold: In nats; by default what 99 of 100 real frames of the model's own ``starts.npz`` exceed.

    Raises:
        AimeGymError: If the env does not show what the model observes, or the model has no frames to calibrate with.
    """

    @one_thread()
    def __init__(self, env: gymnasium.Env, model: str | WorldModel, threshold: float | None = None):
        RecordConstructorArgs.__init__(self, model=model, threshold=threshold)
        super().__init__(env)
        self.model = model if isinstance(model, WorldModel) else load_pretrained_model(model)
        check_shown(self.model, env)
        self.threshold = calibrate(self.model) if threshold is None else threshold
        self._state = self.model.initial_state(1)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the env; the estimate begins at zeros."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._state, self._steps = self.model.initial_state(1), 0
        return observation, info | self._score(None, observation)

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps the env and scores what it shows."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, info | self._score(action, observation)

    @one_thread()
    @without_autocast()
    @torch.no_grad()
    def _score(self, action: Any, observation: Any) -> dict[str, Any]:
        frames, _ = to_frames(self.model, observation)
        window = {name: frame[None] for name, frame in frames.items()}  # [1, 1, ...]
        done = _led(self.model, action, self._state.device)[None]  # [1, 1, A]
        evidence = float(self.model.evidence(window, done, self._state, sample=False).elbo)
        self._state = self.model.observe(window, done, self._state, sample=False)[0][-1]
        self._steps += 1
        unexplained = self._steps > SETTLING and evidence < self.threshold
        return {"evidence": np.float64(evidence), "unexplained": np.bool_(unexplained)}


@without_autocast()
@torch.no_grad()
def calibrate(model: WorldModel, quantile: float = 0.01) -> float:
    """The evidence of one step, in nats, that all but `quantile` of the model's own real frames exceed.

    Args:
        model: With a ``starts.npz``.
        quantile: Share of real frames that will be flagged.

    Raises:
        AimeGymError: If there are no such frames, or too few in a row.
    """
    frames, actions = _own_frames(model)
    per_step = model.evidence(frames, actions, sample=False).per_step
    return float(per_step[SETTLING:].flatten().quantile(quantile))


def _own_frames(model: WorldModel) -> tuple[dict[str, Tensor], Tensor]:
    """What a model's starts.npz shows [K, M, ...], and the actions that led there [K, M, A]."""
    starts = load_starts(model)
    if (frames_of_each := len(starts["pre_action"])) <= SETTLING:
        raise AimeGymError(
            f"The model's starts.npz has {frames_of_each} frames in a row, and its evidence is trusted after "
            f"{SETTLING}: give a threshold= in nats."
        )
    whole = (starts["pre_action"][1] != 0).any(-1)  # [M], not those that begin with copies of a first frame
    if whole.any():
        starts = {name: rows[:, whole] for name, rows in starts.items() if name in (*model.observed, "pre_action")}
    frames = to_tensors({name: starts[name] for name in (*model.observed, "pre_action")})  # [K, M, ...]
    return frames, frames.pop("pre_action")


@without_autocast()
def best_evidence(model: WorldModel, observations: Mapping[str, Tensor], updates: int = 40) -> tuple[Tensor, Tensor]:
    """The evidence of what was seen under the actions that explain it best, which nobody has to know.

    The actions are found by their gradient, from none. What no action explains is of another body, clock or scale.

    Args:
        model: With actions that are numbers in [-1, 1].
        observations: What it observes, [T, B, ...].
        updates: Steps of Adam.

    Returns:
        The evidence of each step in nats, with posterior means, [T, B], and the actions [T, B, A].
    """
    model.config.check_acts()
    size = next(iter(observations.values())).shape[:2]
    inside = torch.zeros(*size, model.config.action_dim, requires_grad=True)  # tanh leads to [-1, 1]
    optimiser = torch.optim.Adam([inside], 0.2)
    for _ in range(updates):
        evidence = model.evidence(observations, inside.tanh(), sample=False).elbo.sum()
        (slope,) = torch.autograd.grad(evidence, inside)
        inside.grad = -slope
        optimiser.step()
    actions = inside.detach().tanh()
    with torch.no_grad():
        return model.evidence(observations, actions, sample=False).per_step, actions


class Explained(NamedTuple):
    """Whether a model can explain what was seen, under the best of all actions.

    Attributes:
        per_step: The evidence of each step in nats, [T, B], of which the first `SETTLING` say little.
        threshold: What 99 of 100 of the model's own real frames exceed, under their best actions.
        usual: Their median.
    """

    per_step: Tensor
    threshold: float
    usual: float

    @property
    def shares(self) -> Tensor:
        """The share of each window's steps that the model can explain, [B]."""
        return (self.per_step[SETTLING:] >= self.threshold).float().mean(0)


def explained(model: WorldModel, observations: Mapping[str, Tensor], updates: int = 40, own: int = 128) -> Explained:
    """Compares the best evidence of what was seen with that of the model's own real frames.

    Args:
        model: With a ``starts.npz``.
        observations: See `best_evidence`; T is above `SETTLING`.
        updates: See `best_evidence`.
        own: How many of its own starts are compared with.

    Raises:
        AimeGymError: If there are no such frames, or too few in a row.
    """
    frames, _ = _own_frames(model)
    usual = best_evidence(model, {name: rows[:, :own] for name, rows in frames.items()}, updates)[0][
        SETTLING:
    ].flatten()
    per_step, _ = best_evidence(model, observations, updates)
    return Explained(per_step, float(usual.quantile(0.01)), float(usual.median()))
