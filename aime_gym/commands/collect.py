"""The command `aime-gym collect`: trajectories of the world, by any policy, or by SAC as it learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, cast

import gymnasium
import numpy as np
import tyro
from numpy.typing import NDArray

from aime_gym import REAL
from aime_gym.agents.numpy_policies import PLAIN, HeldActions, PlainMLP, Rhythm, Stray, load_plain
from aime_gym.agents.sb3 import agent_fields, load_agent, save_sb3_agent, seen_by, take_up
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.bodies.sensors import renamed
from aime_gym.data.trajectories import (
    POLICY,
    RENDERING,
    Trajectory,
    check_trajectory,
    count_steps,
    describe,
    load_trajectory,
    read_metadata,
    save_trajectory,
    trajectory_paths,
    write_metadata,
)
from aime_gym.errors import AimeGymError
from aime_gym.files import digest_of, file_digest, file_stamp
from aime_gym.flags import Options, check_flags, check_workers
from aime_gym.observations import action_space, to_state, to_vector
from aime_gym.parallel import Workers, available_cores, claimed, generators_kept, job_progress, run_in_processes


class RecordTrajectories(gymnasium.Wrapper):
    """Hands every complete episode of an `AimeReal` env to a function, as a trajectory.

    All sensors are recorded, whatever the obs_type, the physics state of bodies of the suite, and images where the env
    shows them. Incomplete episodes are dropped. A complete one that training would refuse, because a sensor or a reward
    is not finite, raises an `AimeGymError`.

    Args:
        env: An env whose unwrapped self is a `RealEnv` or an `AdaptedEnv`, within its time limit.
        on_trajectory: Called with each complete trajectory, e.g. to save it.
    """

    def __init__(self, env: gymnasium.Env, on_trajectory: Callable[[Trajectory], object]):
        super().__init__(env)
        self._on_trajectory = on_trajectory
        self._rows: list[dict[str, Any]] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Starts an episode and its record."""
        observation, info = self.env.reset(**kwargs)
        self._rows = []
        led = np.zeros(cast(Any, self.unwrapped).embodiment.action_dim, np.float32)
        self._rows = [self._row(observation, led, 0.0, False, False)]
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps and records; the end of the episode completes the trajectory."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        took = to_vector(action, cast(Any, self.unwrapped).embodiment)
        self._rows.append(self._row(observation, took, float(reward), terminated or truncated, terminated))
        if terminated or truncated:
            trajectory = {key: np.stack([row[key] for row in self._rows]) for key in self._rows[0]}
            self._rows = []
            world: Any = self.unwrapped
            check_trajectory(f"An episode of {world.embodiment.name}", trajectory)
            self._on_trajectory(trajectory)
        return observation, reward, terminated, truncated, info

    def _row(self, seen: Any, action: np.ndarray, reward: float, last: bool, terminal: bool) -> dict[str, Any]:
        world: Any = self.unwrapped
        return {
            **({"image": seen} if world.obs_type == "image" else {}),
            **world.readings(),
            "pre_action": np.asarray(action, np.float32).copy(),
            "reward": np.array([reward], np.float32),
            "is_first": np.bool_(not self._rows),
            "is_last": np.bool_(last),
            "is_terminal": np.bool_(terminal),
        }


@dataclass
class Collect(Options):
    """Collect trajectories of a policy in the real env; a second call continues where the first stopped.

    Examples:
        >>> from pathlib import Path
        >>> import aime_gym
        >>> aime_gym.Collect("pendulum", trajectories=2, out=Path("pendulum-random"), workers=1).run()
        Collecting pendulum-random...
    """

    embodiment: Annotated[str, tyro.conf.Positional] = "walker"
    """The body."""
    task: str | None = None
    """Its task; the body's first one by default."""
    policy: str = "random"
    """'random' (uniform), 'held' (random, each for some steps), 'sac' or 'ppo' (train Stable-Baselines3's SAC, or PPO
    where actions are choices, keeping the whole of its training and an expert set), or the path of a saved SB3 agent.
    Name only files you trust: but for those that aime-gym saves, they are code, as is a vecnormalize.pkl beside them,
    which is taken."""
    trajectories: int = 100
    """Trajectories in all; for 'sac' and 'ppo' the length of the training."""
    expert: int = 100
    """For 'sac' and 'ppo': trajectories of the best agent, into a second folder."""
    model: str | None = None
    """World model (a folder or a bundled name) of an agent on latents, which sees its estimate of the state."""
    kin: bool = False
    """Also take the plain policies of `aime-gym strangers`. They judge models as long as no data are theirs: for models
    of these data they are strangers no more."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on an agent's actions; of choices the probability of another one."""
    stray: float = 0.0
    """Share of an agent's steps, below 1, in which held random actions take its place, some steps at a time."""
    starts: str | None = None
    """World model (a folder or a bundled name) in whose stored states episodes begin, those aside that evaluations
    begin in; otherwise they begin as the env begins them."""
    fast: bool = False
    """Show an agent of images those that are drawn three times as fast; see `aime-gym render`. An agent with --model
    sees what that model sees."""
    seed: int = 0
    """Trajectory i of a folder depends on this seed and i alone (not so for 'sac' and 'ppo', whose trajectories
    build on each other)."""
    out: Path | None = None
    """The folder; datasets/{embodiment}-random, -{task}-buffer (sac) or -{task}-{agent} by default."""
    expert_out: Path | None = None
    """For 'sac' and 'ppo': the expert folder; datasets/{embodiment}-{task}-expert by default."""
    workers: Workers = field(default_factory=available_cores)
    """Processes (training SAC uses one), or 'ray': all cores of the Ray cluster that runs."""

    def run(self) -> None:
        """Collects, and prints where the data are; an `AimeGymError` says what does not fit."""
        check_flags(self, 1, "trajectories")
        check_workers(self)
        check_flags(self, 0, "noise", "stray", "seed")
        body = get_embodiment(self.embodiment)
        task = body.check_task(self.task or body.tasks[0])
        if told := renamed(body.name, (sensor.name for sensor in body.sensors)):
            print(told)
        if self.noise > 1 and body.choices:
            raise AimeGymError(f"--noise is a probability where actions are choices, at most 1; got {self.noise}.")
        if self.stray >= 1 or (self.stray and self.policy in (*RANDOM, *LEARNERS)):
            raise AimeGymError(f"--stray is a share, below 1, of the steps of a saved agent; got {self.stray}.")
        if self.policy in LEARNERS:
            if not body.sensors:
                raise AimeGymError(f"{body.name} shows an image alone: take --policy random, or an agent that sees it.")
            if self.policy != learner_of(body):
                raise AimeGymError(
                    f"{body.name} takes {action_space(body)}: --policy {learner_of(body)} learns it, not {self.policy}."
                )
            out = self.out or Path("datasets") / f"{body.slug}-{task}-buffer"
            with claimed(out), generators_kept():
                agent = TrainingBuffer(body.name, task, out, seed=self.seed).learn(self.trajectories)
            expert_out = self.expert_out or Path("datasets") / f"{body.slug}-{task}-expert"
            if self.expert:
                collect(body.name, task, str(agent), self.expert, expert_out, self.noise, self.seed, self.workers)
            return
        if Path(self.policy).suffix == PLAIN and not self.kin:
            raise AimeGymError(
                f"{self.policy} is a plain policy, as those that judge models: they are strangers to a model as long "
                "as none of its data are theirs. Give --kin to collect with it all the same."
            )
        label = self.policy if self.policy in RANDOM else f"{task}-{Path(self.policy).stem}"
        out = self.out or Path("datasets") / f"{body.slug}-{label}"
        how = (self.noise, self.seed, self.workers, self.model, self.stray, self.fast, self.starts)
        collect(body.name, task, self.policy, self.trajectories, out, *how)


def collect(
    embodiment: str,
    task: str,
    policy: str,
    trajectories: int,
    folder: Path,
    noise: float = 0.0,
    seed: int = 0,
    workers: Workers = 1,
    model: str | None = None,
    stray: float = 0.0,
    fast: bool = False,
    starts: str | None = None,
) -> None:
    """Fills a folder up to a number of trajectories, in parallel; complete files stay when it is interrupted.

    Args:
        embodiment: The body.
        task: The task whose reward is stored.
        policy: ``"random"``, ``"held"`` or the path of a saved SB3 agent.
        trajectories: How many the folder shall hold.
        folder: Where to.
        noise: Standard deviation of Gaussian noise on an agent's actions.
        seed: Trajectory i follows from this seed and i alone.
        workers: Processes, or ``"ray"``.
        model: The model of an agent on latents.
        stray: Share of an agent's steps in which held random actions take its place.
        fast: Whether images are drawn fast, which an agent sees; those of a `model` are drawn as it knows them.
        starts: The model in whose stored states episodes begin, see `Collect`.

    Raises:
        AimeGymError: If the folder holds data of something else, another call writes to it, the agent cannot be
            loaded, `fast` is about nothing, or `starts` is of another body or stores no physics.
    """
    if policy not in RANDOM and not Path(policy).is_file():
        raise AimeGymError(f"--policy is random, held, sac, ppo or the file of a saved agent; there is no {policy!r}.")
    agent, seen, seen_through = None if policy in RANDOM else _load_agent(policy), None, dict[str, Any]()
    if model is not None:
        from aime_gym.envs.start_bank import shared_model  # which imports torch

        seen, seen_through["model"] = shared_model(model), str(model)
    shown = seen_by(agent, get_embodiment(embodiment), policy, seen)
    if fast and (model is not None or shown.get("obs_type") != "image"):
        raise AimeGymError("--fast is for agents that see images, and without --model: see `aime-gym render --fast`.")
    if fast:
        shown[RENDERING] = "fast"
    if RENDERING in shown:
        seen_through[RENDERING] = shown[RENDERING]
    seen_through |= {name: value for name, value in (("stray", stray), ("starts", starts)) if value}
    states = None if starts is None else _stored_states(embodiment, starts)
    with claimed(folder):
        present = {int(path.stem) for path in trajectory_paths(folder)}
        missing = [index for index in range(trajectories) if index not in present]
        describe(folder, embodiment=embodiment, task=task, policy=policy, noise=noise, seed=seed, **seen_through)
        if policy not in RANDOM and missing:
            _note_agent(folder, policy, is_new=not present)
        episode = partial(_episode, embodiment, task, policy, folder, noise, seed, model, stray, states, shown)
        jobs = {f"trajectory {index} of {folder}": index for index in missing}
        with job_progress(f"Collecting {folder}", trajectories, "trajectories") as advance:
            advance(trajectories - len(missing))
            run_in_processes(episode, jobs, workers, advance, envs=[embodiment])


def _note_agent(folder: Path, policy: str, is_new: bool) -> None:
    """Writes which agent it is that acts, or refuses one that has learned more since it was saved to the same path."""
    metadata, digest = read_metadata(folder), file_digest(policy)
    if not is_new and metadata.get("agent_digest", digest) != digest:
        raise AimeGymError(f"{policy} is not the agent any more that collected {folder}: choose another --out.")
    write_metadata(folder, {**metadata, "agent_digest": digest, POLICY: digest_of(Path(policy))})


def _load_agent(path: str) -> Any:
    return _agent_of(path, file_stamp(path))


@lru_cache(maxsize=2)  # once a process, as long as the file is the same
def _agent_of(path: str, stamp: tuple[int, ...]) -> Any:
    return load_plain(Path(path)) if Path(path).suffix == PLAIN else load_agent(path)


def _stored_states(embodiment: str, model: str) -> NDArray[np.float64]:
    """The physics states [n, nq + nv (+ na)] of a model's starts, without those of the beginnings of episodes."""
    from aime_gym.envs.dream_checks import load_model_of
    from aime_gym.world_model.checkpoint import load_starts

    stored = load_starts(load_model_of(embodiment, model)[1])
    states = stored["physics"][~stored["is_reset"]] if "physics" in stored else np.empty((0, 0))
    if not len(states):
        raise AimeGymError(f"--starts takes the physics of moments within episodes; {model} stores none.")
    return states


def _episode(
    embodiment: str,
    task: str,
    policy: str,
    folder: Path,
    noise: float,
    seed: int,
    model: str | None,
    stray: float,
    states: NDArray[np.float64] | None,
    shown: dict[str, Any],
    index: int,
) -> None:
    body = get_embodiment(embodiment)
    agent = None if policy in RANDOM else _load_agent(policy)
    normaliser = getattr(agent, "get_vec_normalize_env", lambda: None)()
    env: gymnasium.Env = gymnasium.make(REAL, embodiment=body.name, task=task, **shown)
    env = RecordTrajectories(env, partial(save_trajectory, folder, index))
    if model is not None:
        from aime_gym.envs.start_bank import shared_model
        from aime_gym.envs.wrappers import LatentObservation

        env = LatentObservation(env, _kept(shared_model(model)))
    rng = np.random.default_rng([seed, index])
    options = None if states is None else {"physics": rng.choice(states)}
    observation, _ = env.reset(seed=int(rng.integers(2**31)), options=options)
    held = HeldActions(body.action_dim, np.random.default_rng([seed, index, 1]), body.choices)
    strays = Stray(held, stray, np.random.default_rng([seed, index, 2]))
    ended, state = False, None
    while not ended:
        if policy == "held":
            action = held()
        elif agent is None:
            action = body.choices.draw(rng) if body.choices else rng.uniform(-1, 1, body.action_dim)
        else:
            seen = observation if normaliser is None else normaliser.normalize_obs(observation)
            if isinstance(agent, PlainMLP | Rhythm):  # which takes batches
                actions, state = agent.predict(seen[None], state)
                action = actions[0]
            else:
                action, _ = agent.predict(seen, deterministic=True)
            if body.choices:
                action = body.choices.stray(action, noise, rng)
            else:
                action = np.clip(action + noise * rng.standard_normal(body.action_dim), -1, 1)
            action = strays(action)
        action = action if body.choices else np.asarray(action, np.float32)
        observation, _, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
    env.close()


_PREFILL = 5
"""Random trajectories before SAC's first update, as in the original's runs of Dreamer."""

_PPO: dict[str, Any] = {"n_steps": 256, "batch_size": 64, "learning_rate": 1e-3, "gae_lambda": 0.9, "gamma": 0.99}
"""Settings with which PPO learns small tasks from one env."""

LEARNERS = ("sac", "ppo")
RANDOM = ("random", "held")

_kept = lru_cache(maxsize=1)(lambda model: model)  # from one episode to the next: shared models live while in use


def learner_of(body: Embodiment) -> str:
    """The algorithm of `TrainingBuffer` for a body: SAC, or PPO where actions are choices."""
    return "ppo" if body.choices else "sac"


class TrainingBuffer:
    """Trains SAC, or PPO where actions are choices, and writes all its training episodes, random to expert, in order.

    The folder also holds `agent.zip` (the best agent by the mean return of ten training episodes, its `best_mean`) and
    `latest.zip`, from which a later call continues; SAC's replay buffer is filled again from the trajectories.

    Args:
        embodiment: The body.
        task: The task to learn.
        folder: Where the trajectories go.
        seed: Seed of the agent and the env.
    """

    def __init__(self, embodiment: str, task: str, folder: Path, seed: int = 0):
        self.body, self.task, self.folder = get_embodiment(embodiment), task, folder
        describe(folder, embodiment=embodiment, task=task, policy=learner_of(self.body), seed=seed)
        self._paths = trajectory_paths(folder)
        self._steps = count_steps(self._paths)
        self._next = max((int(path.stem) + 1 for path in self._paths), default=0)
        env = gymnasium.make(REAL, embodiment=self.body.name, task=task)
        self._env = RecordTrajectories(env, self._keep)
        seed += self._next  # continue on other episodes than those that are already there
        latest = folder / "latest.zip"
        # Killed before its first save, a run leaves trajectories but no agent: a new one goes on from their data.
        prefill = max(0, _PREFILL * self.body.episode_steps - self._steps)
        from stable_baselines3 import PPO, SAC  # which takes seconds to import

        self.agent: Any
        if self.body.choices:
            self.agent = PPO("MlpPolicy", self._env, seed=seed, device="cpu", **_PPO)
        else:
            self.agent = SAC("MlpPolicy", self._env, learning_starts=prefill, seed=seed, device="cpu")
        if latest.exists():
            starts = [] if self.body.choices else ["learning_starts"]
            take_up(self.agent, latest, ("num_timesteps", "_n_updates", *starts))
        if not self.body.choices:
            self._refill()
        self._advance: Any = None

    def learn(self, trajectories: int) -> Path:
        """Trains for so many episodes of full length; Ctrl-C keeps what is complete.

        Where episodes terminate, the folder gets more of them.

        Returns:
            The path of the best agent; of the newest one before the first ten episodes are over.
        """
        steps = trajectories * self.body.episode_steps - self._steps
        title = f"{learner_of(self.body).upper()} {self.body.name} {self.task} in {self.folder}"
        with job_progress(title, trajectories, "full-length episodes") as self._advance:
            self._advance(self._steps / self.body.episode_steps)
            if steps > 0:
                try:
                    self.agent.learn(steps, callback=_BestOfTraining(self.folder), reset_num_timesteps=False)
                finally:
                    save_sb3_agent(self.agent, self.folder / "latest.zip")
        return best_agent(self.folder)

    def _keep(self, trajectory: Trajectory) -> None:
        save_trajectory(self.folder, self._next, trajectory)
        self._next += 1
        self._advance((len(trajectory["pre_action"]) - 1) / self.body.episode_steps)

    def _refill(self) -> None:
        """Puts the stored trajectories back into the replay buffer."""
        replay = self.agent.replay_buffer
        assert replay is not None
        for path in self._paths:
            episode = load_trajectory(path)
            state = to_state(self.body.sensors, episode)
            for t in range(1, len(state)):
                last = bool(episode["is_last"][t])
                replay.add(
                    state[t - 1][None],
                    state[t][None],
                    episode["pre_action"][t][None],
                    episode["reward"][t],
                    np.array([last]),
                    [{"TimeLimit.truncated": last and not episode["is_terminal"][t]}],
                )


def best_agent(folder: Path) -> Path:
    """The best agent in a folder of `TrainingBuffer`; the newest one before the first ten episodes are over."""
    best = folder / "agent.zip"
    return best if best.exists() else folder / "latest.zip"


class _BestOfTraining:
    """Saves the newest agent every ten episodes, and the best one by their mean return; a callback of SB3."""

    def __init__(self, folder: Path):
        self._folder, self._returns = folder, [0.0]
        best = folder / "agent.zip"
        self._best = agent_fields(best).get("best_mean", -math.inf) if best.exists() else -math.inf

    def __call__(self, names: Mapping[str, Any], _: Mapping[str, Any]) -> bool:
        """Counts a step; SB3 hands over the names inside its loop."""
        self._returns[-1] += float(names["rewards"][0])
        if names["dones"][0]:
            self._returns.append(0.0)
            if len(self._returns) > 10:
                mean, self._returns = float(np.mean(self._returns[:10])), [0.0]
                agent = names["self"]
                save_sb3_agent(agent, self._folder / "latest.zip")
                if mean > self._best:
                    self._best = agent.best_mean = mean  # saved with the agent, in one file
                    save_sb3_agent(agent, self._folder / "agent.zip")
        return True
