"""Agents from logged data alone: sets of a mediocre agent, a model, an agent of its dreams, and what the world pays it.

``medium`` is a fixed number of steps of an agent of SAC that was stopped at a third of what an expert earns, and
``medium-replay`` all that it did until then (after Fu et al., "D4RL", 2020). The model and its agent see nothing but a
set: the agent, and how much doubt costs it, is chosen by what the dream predicts (`aime-gym dream --trials 0`). Only
then it is tried in the real env, beside behaviour cloning of the same set and the set's own mean return.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from aime_gym import BC, Train
from aime_gym.commands.dream import Dream
from aime_gym.data import from_arrays
from aime_gym.data.trajectories import load_trajectory, trajectory_paths
from aime_gym.evaluation.returns import PolicyLike, episode_returns, load_policy
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import read_json, write_json
from aime_gym.flags import HeadsOptions
from aime_gym.world_model.checkpoint import load_pretrained_model

EXPERTS = {"HalfCheetah-v5": 12_135.0, "Hopper-v5": 3_234.3, "Walker2d-v5": 4_592.3}
"""What experts earn in an episode, by D4RL's reference scores."""
SETS = ("medium", "medium-replay")
SMALL: dict[str, Any] = {
    **{"memory_dim": 128, "hidden_size": 128, "encoder_size": 128, "decoder_size": 128, "batch_size": 32},
    **{"horizon": 32, "min_std": 0.01, "kl_scale": 0.02, "free_nats": 0.0, "lr": 2e-3, "tensorboard": False},
}
"""The size and the loss of models, as `aime-gym pretrain-small` trains them."""
PARTS = ("observations", "actions", "rewards", "terminations")


class Log(gym.Wrapper):
    """Keeps observations, actions and rewards of all episodes, as anybody's log would."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observations: list[list[Any]] = []
        self.actions: list[list[Any]] = []
        self.rewards: list[list[float]] = []
        self.terminations: list[bool] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Begins an episode."""
        observation, info = self.env.reset(**kwargs)
        if self.actions and not self.actions[-1]:  # an episode of no step
            self._drop_last()
        self.observations.append([observation])
        self.actions.append([])
        self.rewards.append([])
        self.terminations.append(False)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps and notes it."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.observations[-1].append(observation)
        self.actions[-1].append(np.array(action))
        self.rewards[-1].append(float(reward))
        self.terminations[-1] = bool(terminated)
        return observation, reward, terminated, truncated, info

    def save(self, path: Path) -> None:
        """Writes what can be gone on with after a stop; an episode that had begun ends there."""
        begun = len(self.actions) - (not self.actions[-1])  # not one of no step
        parts: dict[str, Any] = {
            part: np.concatenate([np.array(row) for row in getattr(self, part)[:begun]]) for part in PARTS[:3]
        }
        beside, lengths = path.with_suffix(".part.npz"), [*map(len, self.rewards[:begun])]
        np.savez(beside, lengths=lengths, terminations=self.terminations[:begun], **parts)
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            ends = np.cumsum(file["lengths"])[:-1]
            self.actions, self.rewards = ([*map(list, np.split(file[of], ends))] for of in ("actions", "rewards"))
            ends = np.cumsum(file["lengths"] + 1)[:-1]
            self.observations = [*map(list, np.split(file["observations"], ends))]
            self.terminations = file["terminations"].tolist()

    def returns(self) -> list[float]:
        """What each episode earned, but for the last one, which may go on."""
        return [float(np.sum(rewards)) for rewards in self.rewards[:-1]]

    @property
    def steps(self) -> int:
        """How many were taken."""
        return sum(map(len, self.actions))

    def extend(self, other: Log) -> None:
        """Adds another log's episodes."""
        for part in PARTS:
            getattr(self, part).extend(getattr(other, part))

    def write(self, out: Path, name: str) -> Path:
        """Writes the set, without episodes of no step."""
        kept = [i for i, actions in enumerate(self.actions) if actions]
        parts = [[np.array(getattr(self, part)[i]) for i in kept] for part in PARTS]
        bounds = self.env.action_space  # the same for both sets, and those by which `AimeReal-v0` scales
        return from_arrays(*parts, out=out, name=name, action_space=bounds)

    def _drop_last(self) -> None:
        for part in PARTS:
            getattr(self, part).pop()


def sac() -> Any:
    """SBX's class of SAC, in JAX, where it is installed (the extra strangers); else SB3's, three times as slow."""
    try:
        from sbx import SAC
    except ImportError:
        from stable_baselines3 import SAC  # type: ignore[assignment]
    return SAC


def fill(agent: Any, log: Log) -> None:
    """Gives an agent's replay buffer what was done before."""
    for seen, actions, rewards, ended in zip(*(getattr(log, part) for part in PARTS), strict=True):
        for t, action in enumerate(actions):
            over = np.array([ended and t == len(actions) - 1])
            scaled = agent.policy.scale_action(action[None])
            agent.replay_buffer.add(seen[t][None], seen[t + 1][None], scaled, np.array([rewards[t]]), over, [{}])


@dataclass
class Offline:
    """Make the sets of a body, learn from each alone, and try the agents in the real env."""

    env: str = "Hopper-v5"
    """The id of a Gymnasium env."""
    expert: float | None = None
    """What an expert earns; by D4RL's reference scores for the three bodies of MuJoCo."""
    share: float = 1 / 3
    """The share of it at which the agent is stopped that makes the sets."""
    steps: int = 100_000
    """Steps of the medium set."""
    most: int = 1_000_000
    """Steps of SAC's training at most; the sets are made by what it has become then."""
    every: int = 5_000
    """Steps of SAC after which it is seen whether it earns enough, and kept."""
    train: Train = field(default_factory=lambda: Train(updates=10_000, heads=HeadsOptions(updates=2_000), **SMALL))
    """How models are trained; data sets and folders are filled in."""
    dream: Dream = field(
        default_factory=lambda: Dream(steps=320_000, trial_every=60_000, refinements=0, video_steps=0, minutes=None)
    )
    """How agents learn in dreams; models, folders and penalties are filled in, and no trial is ever real."""
    penalties: tuple[float, ...] = (0.5, 0.3, 0.1)
    """Weights of doubt: of their agents the one with the highest lower end of the predicted return is taken. A weak one
    lets agents go where the model knows nothing, a strong one pays for ending early."""
    clone_updates: int = 4_000
    """Updates of behaviour cloning."""
    episodes: int = 20
    """Real episodes that an agent is scored by, after all is chosen."""
    sets: tuple[str, ...] = SETS
    """Which sets to learn from."""
    seed: int = 0
    """Seed of everything."""
    work: Path = Path("offline")
    """Where sets, models and agents are kept; what is there is not made again."""
    output: Path = Path("benchmarks/results/offline.json")
    """Where to write the numbers, beside those of other bodies."""

    def run(self) -> None:
        """Makes what is missing, prints the table and writes `output`."""
        torch.set_num_threads(1)
        self.make_sets()
        told: dict[str, Any] = read_json(self.output) if self.output.exists() else {}
        for name in self.sets:
            told.setdefault(self.env, {})[name] = self.measure(name)
            write_json(self.output, told)
        self.report(told[self.env])

    def folder(self, name: str) -> Path:
        """The folder of a set, or of what was made of it."""
        return self.work / f"{self.env}-{name}"

    def make_sets(self) -> None:
        """SAC learns until it earns a share of the expert's return: what it did is one set, what it does another."""
        if all((self.folder(name) / "dataset.json").exists() for name in SETS):
            return
        expert = EXPERTS.get(self.env) if self.expert is None else self.expert
        if expert is None:
            raise SystemExit(f"What an expert earns in {self.env} is not known: give --expert.")
        agent, log = self.learn(self.share * expert)
        log.write(self.folder("medium-replay"), f"{self.env}-logged")
        worlds = [Log(gym.make(self.env)) for _ in range(10)]
        seen = np.stack([world.reset(seed=self.seed + i)[0] for i, world in enumerate(worlds)])
        while sum(world.steps for world in worlds) < self.steps:
            for i, action in enumerate(agent.predict(seen)[0]):
                seen[i], _, terminated, truncated, _ = worlds[i].step(action)
                if terminated or truncated:
                    seen[i], _ = worlds[i].reset()
        for world in worlds[1:]:
            worlds[0].extend(world)
        worlds[0].write(self.folder("medium"), f"{self.env}-logged")

    def learn(self, target: float) -> tuple[Any, Log]:
        """SAC, until its last ten episodes earn `target` in the mean, and all it did; goes on where it was stopped."""
        folder, kind, log = self.folder("sac"), sac(), Log(gym.make(self.env))
        folder.mkdir(parents=True, exist_ok=True)
        at = folder / "log.npz"
        if at.exists():
            log.load(at)
            agent = kind.load(folder / "agent.zip", log)
            agent.set_random_seed(self.seed + log.steps)  # with its own, what was tried at first is tried again
            fill(agent, log)
        else:
            sizes: dict[str, Any] = {"batch_size": 128, "policy_kwargs": {"net_arch": [128, 128]}}
            every: dict[str, Any] = {"learning_starts": 1_000, "train_freq": 32, "gradient_steps": 32}
            agent = kind("MlpPolicy", log, learning_rate=1e-3, seed=self.seed, device="cpu", **sizes, **every)
        while log.steps < self.most and np.mean(log.returns()[-10:] or [-np.inf]) < target:
            agent.learn(self.every, reset_num_timesteps=False)
            agent.save(folder / "agent.zip")
            log.save(at)
            print(
                f"{log.steps} steps of SAC: its last ten episodes earned {np.mean(log.returns()[-10:]):.0f}", flush=True
            )
        return agent, log

    def measure(self, name: str) -> dict[str, Any]:
        """What the world pays the agent of a dream and a clone, and what the set earned."""
        data, model = self.folder(name), self.folder(f"{name}-model")
        earned = [float(load_trajectory(path)["reward"].sum()) for path in trajectory_paths(data)]
        if not (model / "config.yaml").exists():
            replace(self.train, datasets=(data,), out=model, seed=self.seed).train()
        promised = {penalty: self.dreamt(name, penalty) for penalty in self.penalties}
        penalty = max(promised, key=lambda penalty: promised[penalty]["predicted"]["interval"][0])
        agent = self.agent_folder(name, penalty)
        clone = BC(load_pretrained_model(model), demonstrations=data, seed=self.seed)
        clone.learn(self.clone_updates)
        return {
            "data": float(np.mean(earned)),
            "episodes of the data": len(earned),
            "penalty": penalty,
            "dream": promised[penalty]["dream"]["mean"],
            "lower ends": {f"{penalty:g}": told["predicted"]["interval"][0] for penalty, told in promised.items()},
            "agent": self.score(load_policy(agent / "agent.zip")),
            "clone": self.score(clone),
        }

    def agent_folder(self, name: str, penalty: float) -> Path:
        """The folder of an agent that learned with a weight of doubt."""
        return self.folder(f"{name}-agent-{penalty:g}")

    def dreamt(self, name: str, penalty: float) -> dict[str, Any]:
        """What the dream says of the agent that learned with a weight of doubt, without a real step."""
        out = self.agent_folder(name, penalty)
        if not (out / "returns.json").exists():
            model = str(self.folder(f"{name}-model"))
            replace(self.dream, doubt_penalty=penalty, model=model, out=out, trials=0, seed=self.seed).run()
        return next(iter(read_json(out / "returns.json")["policies"].values()))

    def score(self, policy: PolicyLike) -> list[float]:
        """Real returns, of episodes that nothing was chosen by."""
        envs = make_real_envs(self.env, min(self.episodes, 10), obs_type="state")
        try:
            return episode_returns(policy, envs, self.episodes, seed=2_000_000).returns.tolist()
        finally:
            envs.close()

    def report(self, told: dict[str, Any]) -> None:
        """Prints real returns over the data's mean."""
        table = Table(title=f"{self.env}: real return of {self.episodes} episodes, and times the data's mean")
        for column in ("set", "data", "agent of the dream", "it was promised", "behaviour cloning"):
            table.add_column(column)
        for name, scores in told.items():
            mean = scores["data"]
            cells = [f"{np.mean(scores[of]):.0f} ({np.mean(scores[of]) / mean:.2f})" for of in ("agent", "clone")]
            table.add_row(name, f"{mean:.0f}", cells[0], f"{scores['dream']:.0f}", cells[1])
        Console().print(table)


if __name__ == "__main__":
    tyro.cli(Offline).run()
