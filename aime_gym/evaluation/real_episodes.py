"""Real episodes that are kept frame by frame, and how a model sees them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.agents.plain import sensor_statistics
from aime_gym.bodies.sensors import IMAGE_SIZE, scale
from aime_gym.envs.dream_vector import DreamVectorEnv
from aime_gym.evaluation.returns import Policy, PolicyLike, Recording, as_policy, episode_returns
from aime_gym.evaluation.worlds import REAL_SLOTS, SENSORS, Worlds, make_real_envs
from aime_gym.observations import to_sensors, to_tensors, to_vectors
from aime_gym.world_model.checkpoint import load_starts
from aime_gym.world_model.model import WorldModel

FIRST_SEED = 2_000_000
"""Seed of the first episode that is watched, far from those of comparisons and of training."""


@dataclass(frozen=True)
class Watched:
    """The real episodes of one policy.

    Attributes:
        name: Name of the policy.
        policy: What acted.
        seeds: [E], one an episode: of its reset and of a policy's own noise.
        starts: [E] indices into the model's bank of starts, where the physics of episodes begin if it is known.
        recordings: [E]
    """

    name: str
    policy: PolicyLike
    seeds: tuple[int, ...]
    starts: NDArray[np.int64]
    recordings: tuple[Recording, ...]


def watch(
    policies: Mapping[str, PolicyLike], worlds: Worlds, episodes: int, seed: int = 0, deterministic: bool = True
) -> Iterable[Watched]:
    """Runs real episodes of each policy in turn, with the same starts and seeds for all.

    Args:
        policies: By name.
        worlds: Where; its obs_type is ``"state"`` or ``"latent"``.
        episodes: E of each.
        seed: Seed of the starts and the episodes.
        deterministic: Whether policies give their mode.

    Yields:
        The episodes of each policy.
    """
    envs = worlds.real_envs(min(episodes, REAL_SLOTS))
    starts = worlds.draw_starts(episodes, FIRST_SEED + seed)
    seeds = tuple(FIRST_SEED + seed + i for i in range(episodes))
    try:
        for name, policy in policies.items():
            ran = episode_returns(policy, envs, None, seeds, worlds.real_starts(starts), deterministic, record=True)
            yield Watched(name, policy, seeds, starts, ran.recordings)
    finally:
        envs.close()


@torch.inference_mode()
def compared(worlds: Worlds, observations: NDArray) -> NDArray:
    """What errors are of: codes of the sensors [..., C] that policies see, ``"state"`` or ``"latent"``.

    The codes are the model's (see `ModelConfig.codes`), so that angles are compared by their direction. Latents
    [..., F] are read as the sensors that the model decodes or probes; where it knows none, as their memory, since the
    rest of them is sampled.
    """
    if worlds.obs_type != "latent":
        return worlds.model.config.code_of(worlds.model.observed).encode(observations)
    model, features = worlds.model, torch.as_tensor(observations, dtype=torch.float32)
    if not (names := read_sensors(worlds)):
        return features[..., : model.config.memory_dim].numpy()
    decoded = model.decode(features, names)
    return model.config.code_of(names).encode(torch.cat([decoded[name] for name in names], -1)).numpy()


def read_sensors(worlds: Worlds) -> list[str]:
    """Names of the tabular sensors that a model decodes or probes."""
    known = {*worlds.model.observed, *worlds.model.probed}
    return [sensor.name for sensor in worlds.model.config.sensors if sensor.name in known]


def observation_scale(worlds: Worlds) -> NDArray[np.float32]:
    """The standard deviation of what `compared` gives, by which errors are divided: [C].

    That of a ``"state"`` is of the model's training data where the model keeps it; else that of its bank of starts.
    """
    if worlds.obs_type == "latent":
        starts = compared(worlds, worlds.start_features.cpu().numpy())
        return scale(starts.mean(0), starts.std(0))
    return np.concatenate([std for _, std in sensor_statistics(worlds.model, coded=True).values()])


@torch.inference_mode()
def filter_episode(worlds: Worlds, observations: NDArray, actions: NDArray[np.float32]) -> Tensor:
    """The latents of an episode's frames, by posterior means.

    Args:
        worlds: Both worlds of the model, with obs_type ``"state"`` or ``"latent"``.
        observations: [L, D]; latents, which are estimates already, stay.
        actions: [L, A], each taken at the frame of the same row.

    Returns:
        [L, F] float32.
    """
    if worlds.obs_type == "latent":
        return torch.as_tensor(observations)
    sensors = to_sensors(worlds.embodiment.observed(worlds.setup), observations)
    frames = {name: torch.as_tensor(values)[:, None] for name, values in sensors.items()}  # [L, 1, D]
    before = np.concatenate([np.zeros_like(actions[:1]), actions[:-1]])  # those that led to the frames
    return worlds.model.observe(frames, torch.as_tensor(before)[:, None], sample=False)[0][:, 0]


def begin_dreams(
    dreams: VectorEnv, observations: NDArray, actions: NDArray[np.float32], seeds: Sequence[int]
) -> NDArray:
    """Begins a dream in every slot where its real frames end.

    Args:
        dreams: N slots, with obs_type ``"state"`` or ``"latent"``.
        observations: [K, N, D]; of latents the last one is where the dream begins, as it has seen the others.
        actions: The actions that led to the frames, [K, N, A].
        seeds: One a slot.

    Returns:
        What the dreams show first, [N, D]: the last frame as the model decodes it.
    """
    dream = cast(DreamVectorEnv, dreams.unwrapped)
    start: dict[str, Any] = {"start": {"observations": observations, "actions": actions}}
    if dream.obs_type != "latent":
        return cast(np.ndarray, dreams.reset(seed=list(seeds), options=start)[0])  # type: ignore[arg-type]  # Gymnasium takes lists
    dreams.reset(seed=list(seeds))  # type: ignore[arg-type]
    latents = torch.from_numpy(observations[-1].copy())
    dream.set_state(dream.get_state() | {"latents": latents, "observations": latents})
    return observations[-1].copy()


_CHUNK = 100
"""Frames that a model is shown at once: a whole episode of images would take too much memory."""


@dataclass(frozen=True)
class Moment:
    """A policy as it is before some step: its memory, and the state of its own noise."""

    step: int
    policy: Policy
    memory: Any

    def own(self) -> tuple[Policy, Any]:
        """A copy of the policy and its memory, to go on with from here."""
        return _alike(self.policy), copy.deepcopy(self.memory)


@dataclass(frozen=True)
class RealEpisodes:
    """E real episodes of one policy, side by side; T is the length of the longest.

    Attributes:
        frames: Sensor -> [T + 1, E, ...]; that of the start comes first. What is behind an end repeats the last.
        physics: [T + 1, E, nq + nv (+ na)]; None of a foreign body.
        actions: [T, E, A], 0 behind an end.
        rewards: [T, E], 0 behind an end.
        lengths: [E]
        moments: The policy at the first of every so many steps.
    """

    frames: Mapping[str, NDArray[Any]]
    physics: NDArray[np.float64] | None
    actions: NDArray[np.float32]
    rewards: NDArray[np.float64]
    lengths: NDArray[np.int64]
    moments: tuple[Moment, ...]

    @property
    def lasts(self) -> NDArray[np.bool_]:
        """Whether an episode had a step then, [T, E]."""
        return np.arange(len(self.rewards))[:, None] < self.lengths


class RealRecorder:
    """Runs the real half of `Worlds.evaluate` and keeps it.

    Args:
        worlds: Where.
        slots: E, episodes side by side.
        every: Steps between two of the `moments`.
    """

    def __init__(self, worlds: Worlds, slots: int, every: int):
        self._worlds, self._every, self._space = worlds, every, worlds.action_space
        self._keepers: list[_Keeper] = []
        options = worlds.real_options()
        if "image" in worlds.model.observed and worlds.obs_type == SENSORS:
            options |= {"render_mode": "rgb_array", "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        self._envs = make_real_envs(worlds.embodiment.name, slots, self._kept, **options)

    def record(
        self, policy: PolicyLike, starts: NDArray[np.int64], seeds: Sequence[int], deterministic: bool = True
    ) -> RealEpisodes:
        """Runs an episode in each slot.

        Args:
            policy: See `PolicyLike`.
            starts: [E] indices of the model's bank; a foreign body's episodes begin as its env begins them.
            seeds: [E]
            deterministic: Whether the policy gives its mode.

        Raises:
            AimeGymError: For the same reasons as `aime_gym.evaluation.returns.episode_returns`.
        """
        for keeper in self._keepers:
            keeper.begin()
        watched = _Watched(as_policy(policy, self._space), self._every)
        physics = self._worlds.real_starts(starts)
        ran = episode_returns(watched, self._envs, None, list(seeds), physics, deterministic, record=True)
        longest, body = int(ran.lengths.max()), self._worlds.embodiment
        rows = [keeper.rows[: length + 1] for keeper, length in zip(self._keepers, ran.lengths, strict=True)]
        frames = {
            name: np.stack([_repeated([row[name] for row in own], longest + 1) for own in rows], 1)
            for name in rows[0][0]
        }
        return RealEpisodes(
            frames,
            frames.pop("physics", None),
            np.stack([_padded(to_vectors(each.actions, body), longest) for each in ran.recordings], 1),
            np.stack([_padded(each.rewards, longest) for each in ran.recordings], 1),
            ran.lengths,
            tuple(moment for moment in watched.moments if moment.step < longest),
        )

    def close(self) -> None:
        """Frees the envs."""
        self._envs.close()

    def _kept(self, env: gym.Env) -> gym.Env:
        self._keepers.append(_Keeper(env, "image" in self._worlds.model.observed))
        return self._worlds.wrap(self._keepers[-1])


@torch.inference_mode()
def filter_episodes(
    model: WorldModel, episodes: RealEpisodes, starts: NDArray[np.int64] | None
) -> tuple[Tensor, Tensor]:
    """The posterior's means on true frames under true actions.

    Args:
        model: What filters.
        episodes: Episodes of its body.
        starts: [E] indices of its bank at which they began: the filter has seen the frames that led there, too, as that
            of a dream has. None where episodes began anew.

    Returns:
        Features [T + 1, E, F], and the KL of the posterior from the prior at each step, [T, E] in nats.
    """
    actions = np.concatenate([np.zeros_like(episodes.actions[:1]), episodes.actions])
    frames = {name: episodes.frames[name] for name in model.observed}
    known = 0
    if starts is not None:
        bank = load_starts(model)
        known = len(bank["pre_action"]) - 1
        actions[0] = bank["pre_action"][-1, starts]
        actions = np.concatenate([bank["pre_action"][:-1, starts], actions])
        frames = {name: np.concatenate([bank[name][:-1, starts], rows]) for name, rows in frames.items()}
    features, kls, state = [], [], None
    device = model.cell.initial_state.device
    for begin in range(0, len(actions), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        shown = to_tensors({name: rows[chunk] for name, rows in frames.items()}, device)
        done = torch.as_tensor(actions[chunk], dtype=torch.float32, device=device)
        some, kl = model.observe(shown, done, state, sample=False)
        features.append(some)
        kls.append(kl.sum(-1))
        state = some[-1]
    return torch.cat(features)[known:], torch.cat(kls)[known + 1 :]


class _Keeper(gym.Wrapper):
    """Keeps what the next episode of a real env looks like to a model."""

    def __init__(self, env: gym.Env, images: bool):
        super().__init__(env)
        self._images = images
        self._episodes = 0
        self.rows: list[dict[str, NDArray[Any]]] = []

    def begin(self) -> None:
        """Forgets; the episode of the next reset is kept."""
        self._episodes, self.rows = 0, []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._episodes += 1
        self._keep(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._keep(observation)
        return observation, reward, terminated, truncated, info

    def _keep(self, observation: Any) -> None:
        if self._episodes > 1:  # a slot that has ended goes on with another one
            return
        row = self.env.unwrapped.readings()  # type: ignore[attr-defined]
        if self._images and "image" not in row:
            row["image"] = self.env.render() if self.env.render_mode else observation
        self.rows.append(row)


class _Watched:
    """A policy that is remembered as it was before every so many steps."""

    def __init__(self, policy: Policy, every: int):
        self._policy, self._every, self._step = policy, every, 0
        self.moments: list[Moment] = []

    def begin(self, seeds: Sequence[int]) -> None:
        """See `aime_gym.evaluation.returns`."""
        if hasattr(self._policy, "begin"):
            self._policy.begin(seeds)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """See `Policy`."""
        if self._step % self._every == 0:
            self.moments.append(Moment(self._step, _alike(self._policy), copy.deepcopy(state)))
        self._step += 1
        return self._policy.predict(observation, state, episode_start, deterministic)


def _alike(policy: Policy) -> Policy:
    """A copy of a policy that draws from generators of its own, which move on; others are as they are."""
    return copy.deepcopy(policy) if hasattr(policy, "begin") else policy


def _padded(rows: NDArray[Any], length: int) -> NDArray[Any]:
    return np.concatenate([rows, np.zeros((length - len(rows), *rows.shape[1:]), rows.dtype)])


def _repeated(rows: list[NDArray[Any]], length: int) -> NDArray[Any]:
    return np.stack(rows + rows[-1:] * (length - len(rows)))
