"""How well the images of dreams stand for those of the world: policies that act on pictures, tried in both.

`python -m benchmarks.seeing_strangers MODEL... --data FOLDER...` gives the strangers of a set an eye: a network that
tells the sensors from a stack of rendered frames, on which they act instead. It learns from rendered data, and then
from where the strangers get by it in the real env (DAgger); each of its stages makes other policies of them. What these
earn on rendered frames is measured, and then they go on in the dreams of each model, on decoded frames, from the first
moments of those very episodes. The same command goes on where it stopped.
"""

from __future__ import annotations

import copy
import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save
from torch import nn

from aime_gym import DREAM
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.bodies.sensors import Rendering
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.evaluation.returns import dope_metrics
from aime_gym.evaluation.strangers import SEED, Stranger, StrangerSet
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import write_atomically
from aime_gym.parallel import run_in_parallel
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.model import WorldModel

STACK = 3
"""Frames that a policy sees at once, each an agent step after the other."""

BEGIN = 10
"""Frames of a real episode that a model sees before it dreams on."""


@dataclass
class SeeingStrangers:
    """Judge the images of dreams by policies that act on them."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Folders or bundled names of models of images; none to make and measure the policies alone."""
    data: tuple[Path, ...] = ()
    """Folders of trajectories with images and all sensors, from which the eye learns first."""
    strangers: Path = Path("benchmarks/strangers/walker-walk")
    """The set whose policies are taught to see."""
    rendering: Rendering = "fast"
    """How the real env is drawn; a model of another rendering is judged unfairly."""
    rounds: int = 1
    """How often the eye learns from where the strangers got by it."""
    steps: int = 200
    """Real steps of each stranger in a round."""
    updates: tuple[int, int] = (1200, 600)
    """How many the eye learns by, on the data and in each round."""
    episodes: int = 4
    """Judged episodes of each policy."""
    workers: int = 2
    """Processes that act in the real env."""
    work: Path = Path("runs/seeing-strangers")
    """Eyes, and the real episodes of those who see by them."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Makes and measures what is missing, judges, prints and writes."""
        torch.set_num_threads(1)
        known = StrangerSet.load(self.strangers)
        self.work.mkdir(parents=True, exist_ok=True)
        self.teach(known)
        jobs = {}
        for number in range(self.rounds, -1, -1):
            eye = self.work / f"eye-{number}.safetensors"
            for member in known.members:
                jobs[f"{member.name}-{number}"] = Job(
                    self, known, member, eye, self.work / f"{member.name}-{number}.npz"
                )
        missing = {name: job for name, job in jobs.items() if not job.out.exists()}
        run_in_parallel(measure, missing, self.workers, "Real episodes", "policies")
        lives = [Life.load(job) for job in jobs.values()]
        real = np.array([life.returns.mean() for life in lives])
        told: dict[str, Any] = {
            "task": f"{known.embodiment} {known.task}",
            "rendering": self.rendering,
            "policies": len(lives),
            "runs": len({member.run for member in known.members}),
            "episodes": self.episodes,
            "by_their_sensors": {member.name: float(np.mean(member.returns)) for member in known.members},
            "real": dict(zip(jobs, real.tolist(), strict=True)),
            "models": {},
        }
        table = Table(title=f"{len(lives)} policies of {told['runs']} runs that see, {told['task']}")
        for column in ("model", "Spearman", "Pearson", "mean error", "bias"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for name in self.models:
            dreamt = np.array([returns.mean() for returns in dream(load_pretrained_model(name), known, lives)])
            scores = {**dope_metrics(dreamt, real), "bias": float((dreamt - real).mean())}
            told["models"][name] = scores | {"dream": dict(zip(jobs, dreamt.tolist(), strict=True))}
            shown = {"spearman": ".2f", "pearson": ".2f", "mean_absolute_error": ".0f", "bias": "+.0f"}
            table.add_row(name, *(f"{scores[key]:{form}}" for key, form in shown.items()))
        Console().print(table)
        if self.output:
            write_atomically(self.output, json.dumps(told, indent=2) + "\n")

    def teach(self, known: StrangerSet) -> None:
        """Makes the eyes that are missing, each from the one before."""
        files = [self.work / f"eye-{number}.safetensors" for number in range(self.rounds + 1)]
        if all(file.exists() for file in files):
            return
        whole = TrajectoryDataset(self.data, images=True)
        sensors = [sensor.name for sensor in get_embodiment(known.embodiment).observed("mdp")]
        values = np.concatenate([whole.arrays[name] for name in sensors], -1)
        mean, std = values.mean(0), values.std(0) + 1e-3
        before = np.repeat(whole.bounds[:, 0], whole.bounds[:, 1] - whole.bounds[:, 0])  # where a row's episode begins
        ages = [np.maximum(np.arange(len(values)) - age, before) for age in range(STACK - 1, -1, -1)]
        eye, lives = Eye(torch.from_numpy(mean), torch.from_numpy(std)), list[tuple[NDArray, NDArray]]()
        rng = np.random.default_rng(0)
        for number, file in enumerate(files):
            if file.exists():
                eye.load_state_dict(load_file(file))
            if number:
                seen = {
                    member.name: Job(
                        self, known, member, files[number - 1], self.work / f"seen-{number}-{member.name}.npz"
                    )
                    for member in known.members
                }
                missing = {name: job for name, job in seen.items() if not job.out.exists()}
                run_in_parallel(look, missing, self.workers, f"Round {number}", "policies")
                for job in seen.values():
                    with np.load(job.out) as arrays:
                        lives.append((arrays["stacks"], arrays["sensors"]))
            if file.exists():
                continue
            optimizer, updates = torch.optim.Adam(eye.parameters(), 1e-3), self.updates[bool(number)]
            for update in range(updates):
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * (1 - update / updates) + 1e-5
                rows = rng.integers(len(values), size=64)
                stacks, goals = np.stack([whole.arrays["image"][age[rows]] for age in ages], 1), values[rows]
                if lives:  # half of the batch
                    for place in range(0, 64, 2):
                        own, told = lives[rng.integers(len(lives))]
                        row = rng.integers(len(own))
                        stacks[place], goals[place] = own[row], told[row]
                error = (eye(channels(stacks)) - torch.from_numpy(goals)) / eye.std
                optimizer.zero_grad()
                error.square().mean().backward()
                optimizer.step()
                if update % 100 == 0:
                    print(f"eye {number}, update {update}: {float(error.square().mean()):.3f}", flush=True)
            write_atomically(file, save(eye.state_dict()))


class Eye(nn.Module):
    """The sensors, as far as a stack of frames shows them.

    Args:
        mean: The sensors' means, [D].
        std: Their standard deviations, [D].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.net = nn.Sequential(
            *(nn.Conv2d(3 * STACK, 24, 8, 4), nn.ReLU(), nn.Conv2d(24, 48, 4, 2), nn.ReLU()),
            *(nn.Conv2d(48, 48, 3), nn.ReLU(), nn.Flatten(), nn.Linear(768, 256), nn.ReLU()),
            nn.Linear(256, len(mean)),
        )

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        """Sensors [N, D] of stacks [N, 3 · STACK, 64, 64] in [0, 255]."""
        return self.net(stacks.float() / 255 - 0.5) * self.std + self.mean


@dataclass
class Seeing:
    """A policy of sensors behind an eye."""

    eye: Eye
    policy: Any

    @torch.inference_mode()
    def predict(self, observation: NDArray, state: Any = None, episode_start: Any = None) -> tuple[NDArray, Any]:
        """Actions [N, A] of frames [N, 64, 64, 3]; the state is the stack before, and the policy's own."""
        before, own = (None, None) if state is None else state
        stack = stacked(observation, before, episode_start)
        actions, own = self.policy.predict(self.eye(channels(stack)).numpy(), own, episode_start, True)
        return np.asarray(actions, np.float32), (stack, own)


def stacked(frames: NDArray, before: NDArray | None, start: NDArray | None) -> NDArray[np.uint8]:
    """The frames with those before them, [N, STACK, 64, 64, 3]; at an episode's start with themselves."""
    again = np.repeat(frames[:, None], STACK, 1)
    if before is None:
        return again
    shifted = np.concatenate([before[:, 1:], frames[:, None]], 1)
    return shifted if start is None else np.where(start[:, None, None, None, None], again, shifted)


def channels(stacks: NDArray[np.uint8]) -> torch.Tensor:
    """Stacks [N, STACK, 64, 64, 3] as PyTorch sees images, [N, 3 · STACK, 64, 64] uint8."""
    return torch.from_numpy(np.ascontiguousarray(stacks)).permute(0, 1, 4, 2, 3).flatten(1, 2)


class Job(NamedTuple):
    """One policy that acts in the real env."""

    options: SeeingStrangers
    known: StrangerSet
    member: Stranger
    eye: Path
    out: Path

    def seeing(self) -> Seeing:
        """The policy, with its noise if it has some, behind the eye."""
        weights = load_file(self.eye)
        eye = Eye(weights["mean"], weights["std"])
        eye.load_state_dict(weights)
        return Seeing(eye.eval(), copy.deepcopy(self.member.policy))

    def begin(self, policy: Seeing, seeds: list[int]) -> tuple[Any, NDArray[np.uint8]]:
        """Real envs that begin with these seeds, and what they show."""
        torch.set_num_threads(1)
        if hasattr(policy.policy, "begin"):
            policy.policy.begin(seeds)
        envs = real_envs(self.known.embodiment, self.known.task, self.options.rendering, len(seeds))
        frames, _ = envs.reset(seed=seeds)
        return envs, frames


@dataclass
class Life:
    """How the real episodes of a policy went."""

    policy: Seeing
    frames: NDArray[np.uint8]
    """[BEGIN, E, 64, 64, 3]"""
    actions: NDArray[np.float32]
    """Between them, [BEGIN - 1, E, A]."""
    begun: NDArray[np.float64]
    """What was earned meanwhile, [E]."""
    returns: NDArray[np.float64]
    """[E]"""

    def begin_again(self) -> Any:
        """The policy's state, and that of its noise, before it sees the last of the frames."""
        count, state = len(self.returns), None
        if hasattr(self.policy.policy, "begin"):
            self.policy.policy.begin([SEED + index for index in range(count)])
        for step, frames in enumerate(self.frames[:-1]):
            _, state = self.policy.predict(frames, state, np.full(count, not step))
        return state

    @classmethod
    def load(cls, job: Job) -> Life:
        """Reads what `measure` wrote."""
        with np.load(job.out) as arrays:
            return cls(job.seeing(), **arrays)


@cache
def real_envs(embodiment: str, task: str, rendering: Rendering, slots: int) -> Any:
    """Real envs that show images, of which a process needs one set."""
    return make_real_envs(embodiment, slots, task=task, obs_type="image", rendering=rendering)


def look(job: Job) -> None:
    """Keeps where a policy gets by its eye: stacks [N, STACK, 64, 64, 3], and the sensors there [N, D]."""
    policy, state, stacks, sensors = job.seeing(), None, [], []
    envs, frames = job.begin(policy, [1000])
    world = envs.envs[0].unwrapped
    for step in range(job.options.steps):
        actions, state = policy.predict(frames, state, np.array([not step]))
        stacks.append(state[0][0])
        readings = world.readings()
        sensors.append(np.concatenate([readings[sensor.name] for sensor in world.sensors]))
        frames, *_ = envs.step(actions)
    write_npz(job.out, stacks=np.stack(stacks), sensors=np.stack(sensors))


def measure(job: Job) -> None:
    """Keeps real episodes from resets, and how they began."""
    count = job.options.episodes
    policy = job.seeing()
    envs, frames = job.begin(policy, [SEED + index for index in range(count)])
    kept, acts, state, done = [frames.copy()], list[NDArray](), None, False
    returns, begun = np.zeros(count), np.zeros(count)
    while not done:
        actions, state = policy.predict(frames, state, np.full(count, not acts))
        frames, rewards, _, truncated, _ = envs.step(actions)
        returns += rewards
        acts.append(actions)
        if len(kept) < BEGIN:
            kept.append(frames.copy())
            begun += rewards
        done = bool(truncated.all())
    write_npz(job.out, frames=np.stack(kept), actions=np.stack(acts[: BEGIN - 1]), begun=begun, returns=returns)


def write_npz(path: Path, **arrays: NDArray) -> None:
    """Writes arrays whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getbuffer())


def dream(model: WorldModel, known: StrangerSet, lives: list[Life]) -> list[NDArray[np.float64]]:
    """What each policy's episodes earn where the dream goes on with them, [E] each."""
    counts = [len(life.returns) for life in lives]
    ends = np.cumsum(counts)
    parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    envs = gymnasium.make_vec(
        DREAM,
        num_envs=int(ends[-1]),
        embodiment=known.embodiment,
        task=known.task,
        model=model,
        obs_type="image",
        max_episode_steps=model.config.body.episode_steps - (BEGIN - 1),
    )
    start = {
        "observations": {"image": np.concatenate([life.frames for life in lives], 1)},
        "actions": np.concatenate([life.actions for life in lives], 1),
    }
    seeds: Any = [SEED + index for count in counts for index in range(count)]
    frames, _ = envs.reset(seed=seeds, options={"start": start})
    states = [life.begin_again() for life in lives]
    returns, done = np.concatenate([life.begun for life in lives]), False
    actions = np.zeros((int(ends[-1]), model.config.action_dim), np.float32)
    while not done:
        for index, life in enumerate(lives):
            actions[parts[index]], states[index] = life.policy.predict(frames[parts[index]], states[index])
        frames, rewards, _, truncated, _ = envs.step(actions)
        returns += rewards
        done = bool(truncated.all())
    envs.close()
    return [returns[part] for part in parts]


if __name__ == "__main__":
    from benchmarks.seeing_strangers import SeeingStrangers as Command  # which other processes can import

    tyro.cli(Command).run()
