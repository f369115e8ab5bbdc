"""How well the images of dreams stand for those of the world: policies that act on pictures, tried in both.

`python -m benchmarks.seeing_strangers MODEL...` teaches each stranger of a set to act on stacks of rendered frames
(DAgger: its clone acts in the real env, it says what it would do there), keeps the clone after each lesson as a stage
of the same run, and measures what all of them earn on rendered frames. Then each goes on in the dreams of each model,
on decoded frames, from the first moments of those very episodes. The same command goes on where it stopped; a rendering
other than the model's judges it unfairly.
"""

from __future__ import annotations

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
from aime_gym.evaluation.returns import dope_metrics
from aime_gym.evaluation.strangers import Stranger, StrangerSet
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import write_atomically
from aime_gym.parallel import run_in_parallel
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.model import WorldModel

STACK = 3
"""Frames that a policy sees at once, each an agent step after the other."""

BEGIN = 10
"""Frames of a real episode that a model sees before it dreams on."""

SEED = 500_000
"""Seed of each policy's first judged episode; no lesson resets with it or those that follow."""


@dataclass
class SeeingStrangers:
    """Judge the images of dreams by policies that act on them."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Folders or bundled names of models of images; none to make and measure the policies alone."""
    strangers: Path = Path("benchmarks/strangers/walker-walk")
    """The set whose policies are taught to see."""
    rendering: Rendering = "fast"
    """How the real env is drawn."""
    lessons: int = 2
    """Lessons of each policy: in the first it acts itself, in the others its clone does."""
    steps: int = 250
    """Steps of the two episodes of a lesson."""
    updates: int = 250
    """Updates of a lesson."""
    episodes: int = 4
    """Judged episodes of each policy."""
    workers: int = 2
    """Processes."""
    work: Path = Path("runs/seeing-strangers")
    """Clones and their real episodes."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Makes and measures what is missing, judges, prints and writes."""
        torch.set_num_threads(1)
        known = StrangerSet.load(self.strangers)
        jobs = {member.name: Job(self, known.embodiment, known.task, member) for member in known.members}
        self.work.mkdir(parents=True, exist_ok=True)
        run_in_parallel(clone_and_measure, jobs, self.workers, "Clones", "policies")
        stages = [Stage.load(job.file(lesson)) for job in jobs.values() for lesson in range(self.lessons)]
        runs = [member.run for member in known.members for _ in range(self.lessons)]
        names = [f"{member.name}-{lesson}" for member in known.members for lesson in range(self.lessons)]
        real = np.array([stage.returns.mean() for stage in stages])
        told: dict[str, Any] = {
            "task": f"{known.embodiment} {known.task}",
            "rendering": self.rendering,
            "policies": len(stages),
            "runs": len(set(runs)),
            "episodes": self.episodes,
            "taught": {member.name: float(np.mean(member.returns)) for member in known.members},
            "real": dict(zip(names, real.tolist(), strict=True)),
            "models": {},
        }
        table = Table(title=f"{len(stages)} policies of {len(set(runs))} runs that see, {told['task']}")
        for column in ("model", "Spearman", "Pearson", "mean error", "bias"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for name in self.models:
            dreamt = np.array([returns.mean() for returns in dream(load_pretrained_model(name), known, stages)])
            scores = {**dope_metrics(dreamt, real), "bias": float((dreamt - real).mean())}
            told["models"][name] = scores | {"dream": dict(zip(names, dreamt.tolist(), strict=True))}
            shown = {"spearman": ".2f", "pearson": ".2f", "mean_absolute_error": ".0f", "bias": "+.0f"}
            table.add_row(name, *(f"{scores[key]:{form}}" for key, form in shown.items()))
        Console().print(table)
        if self.output:
            write_atomically(self.output, json.dumps(told, indent=2) + "\n")


class Seeing(nn.Module):
    """Actions of stacks of frames.

    Args:
        actions: Numbers of an action.
    """

    def __init__(self, actions: int):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3 * STACK, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 128), nn.ReLU()),
            *(nn.Linear(128, actions), nn.Tanh()),
        )

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        """The actions [N, A] of stacks [N, 3 · STACK, 64, 64] in [0, 255]."""
        return self.net(stacks.float() / 255 - 0.5)

    @torch.inference_mode()
    def predict(
        self, observation: NDArray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[NDArray[np.float32], Any]:
        """See `aime_gym.evaluation.returns.Policy`; the state is the stack before, [N, STACK, 64, 64, 3]."""
        state = stacked(observation, state, episode_start)
        return self(channels(state)).numpy(), state


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
    """One policy that is to be taught."""

    options: SeeingStrangers
    embodiment: str
    task: str
    member: Stranger

    def file(self, lesson: int) -> Path:
        """Where the stage after a lesson is kept."""
        return self.options.work / f"{self.member.name}-{lesson}.safetensors"


@dataclass
class Stage:
    """A clone, and how its real episodes went."""

    policy: Seeing
    frames: NDArray[np.uint8]
    """[BEGIN, E, 64, 64, 3]"""
    actions: NDArray[np.float32]
    """Between them, [BEGIN - 1, E, A]."""
    begun: NDArray[np.float64]
    """What was earned meanwhile, [E]."""
    returns: NDArray[np.float64]
    """[E]"""

    def save(self, path: Path) -> None:
        """Writes one file."""
        episodes = {"frames": self.frames, "actions": self.actions, "begun": self.begun, "returns": self.returns}
        arrays = {f"episodes.{name}": torch.from_numpy(array) for name, array in episodes.items()}
        write_atomically(path, save({**self.policy.state_dict(), **arrays}))

    @classmethod
    def load(cls, path: Path) -> Stage:
        """Reads what `save` wrote."""
        parts = load_file(path)
        arrays = {name[9:]: parts.pop(name).numpy() for name in list(parts) if name.startswith("episodes.")}
        policy = Seeing(arrays["actions"].shape[-1])
        policy.load_state_dict(parts)
        return cls(policy.eval(), **arrays)


def clone_and_measure(job: Job) -> None:
    """Gives a policy's lessons, and measures the clone after each."""
    options = job.options
    if all(job.file(lesson).exists() for lesson in range(options.lessons)):
        return
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Seeing(get_embodiment(job.embodiment).action_dim)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    stacks, labels = list[NDArray](), list[NDArray]()
    for lesson in range(options.lessons):
        seen, told = lesson_of(job, policy if lesson else None, seed=1000 * (lesson + 1))
        stacks.append(seen)
        labels.append(told)
        every, goals = np.concatenate(stacks), np.concatenate(labels)
        for update in range(options.updates):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - update / options.updates) + 5e-5
            rows = rng.integers(len(every), size=64)
            loss = (policy(channels(every[rows])) - torch.from_numpy(goals[rows])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        measure(job, policy).save(job.file(lesson))


@cache
def real_envs(embodiment: str, task: str, rendering: Rendering, slots: int) -> Any:
    """Real envs that show images, of which a process needs one set."""
    return make_real_envs(embodiment, slots, task=task, obs_type="image", rendering=rendering)


def lesson_of(job: Job, clone: Seeing | None, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Stacks [N, STACK, 64, 64, 3] on the way of the clone, or of the policy itself, and its actions there [N, A]."""
    teacher, envs = job.member.plain, real_envs(job.embodiment, job.task, job.options.rendering, 2)
    frames, _ = envs.reset(seed=seed)
    teacher_state, stack, seen, told = None, None, [], []
    for step in range(job.options.steps):
        worlds = [env.unwrapped for env in envs.envs]
        state = np.stack([np.concatenate([world.readings()[s.name] for s in world.sensors]) for world in worlds])
        began = np.full(2, not step)
        goal, teacher_state = teacher.predict(state, teacher_state, began, True)
        stack = stacked(frames, stack, began)
        seen.append(stack)
        told.append(np.asarray(goal, np.float32))
        with torch.inference_mode():
            acted = told[-1] if clone is None else clone(channels(stack)).numpy()
        frames, *_ = envs.step(acted)
    return np.concatenate(seen), np.concatenate(told)


def measure(job: Job, policy: Seeing) -> Stage:
    """Real episodes from resets, and how they began."""
    count = job.options.episodes
    envs = real_envs(job.embodiment, job.task, job.options.rendering, count)
    seeds: Any = [SEED + index for index in range(count)]
    frames, _ = envs.reset(seed=seeds)
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
    return Stage(policy, np.stack(kept), np.stack(acts[: BEGIN - 1]), begun, returns)


def dream(model: WorldModel, known: StrangerSet, stages: list[Stage]) -> list[NDArray[np.float64]]:
    """What each clone's episodes earn where the dream goes on with them, [E] each."""
    counts = [len(stage.returns) for stage in stages]
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
        "observations": {"image": np.concatenate([stage.frames for stage in stages], 1)},
        "actions": np.concatenate([stage.actions for stage in stages], 1),
    }
    seeds: Any = [SEED + index for count in counts for index in range(count)]
    frames, _ = envs.reset(seed=seeds, options={"start": start})
    # The last frame before the dream's first is part of the stack that the first actions see.
    states = [np.moveaxis(stage.frames[-STACK - 1 : -1], 0, 1) for stage in stages]
    returns, done = np.concatenate([stage.begun for stage in stages]), False
    actions = np.zeros((int(ends[-1]), model.config.action_dim), np.float32)
    while not done:
        for index, stage in enumerate(stages):
            actions[parts[index]], states[index] = stage.policy.predict(frames[parts[index]], states[index])
        frames, rewards, _, truncated, _ = envs.step(actions)
        returns += rewards
        done = bool(truncated.all())
    envs.close()
    return [returns[part] for part in parts]


if __name__ == "__main__":
    from benchmarks.seeing_strangers import SeeingStrangers as Command  # which other processes can import

    tyro.cli(Command).run()
