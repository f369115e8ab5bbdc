"""A world model from nothing: data, training, then rounds in which agents find the holes and the world mends them.

An agent that learns in a dream seeks what the model believes and the world denies. Each round trains agents in the
newest model, runs them in the real env, with and without noise, and trains the model on with what happened there
(data aggregation, Ross et al., 2011; for models: Ross and Bagnell, 2012).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from aime_gym.data.collect import Collect
from aime_gym.embodiments import Embodiment, get_embodiment
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.comparison import Comparison
from aime_gym.evaluation.ledger import Ledger
from aime_gym.files import write_atomically
from aime_gym.training.options import TrainOptions
from aime_gym.training.train import Train

EXPLORER = "explore"
"""The name of agents that seek disagreement."""


@dataclass
class Pretrain:
    """Make a world model from nothing; the same command again resumes a stopped run, stage by stage."""

    embodiment: Annotated[str, tyro.conf.Positional] = "walker"
    """The body."""
    tasks: tuple[str, ...] = ()
    """What the agents learn; the body's first task by default."""
    datasets: tuple[Path, ...] = ()
    """Folders of trajectories that are there already; with any, nothing is collected before the first training."""
    base: str | None = None
    """A model (folder or bundled name) whose weights the first training begins with."""
    out: Path | None = None
    """The model folder; models/{embodiment}-state by default."""
    work: Path | None = None
    """Data, agents and the models of all rounds; runs/pretrain-{embodiment} by default."""

    random: int = 40
    """Random trajectories."""
    buffer: int = 300
    """Trajectories of SAC's training, a task; 0 for none."""
    expert: int = 50
    """Trajectories of the best SAC agent, a task."""

    rounds: int = 3
    """Rounds of agents, real trajectories and training, at most."""
    agents: int = 1
    """Agents a task and round, of different seeds."""
    explorers: int = 1
    """Agents a round that seek the ensemble's disagreement (Plan2Explore)."""
    algo: Literal["ppo", "sac"] = "ppo"
    """Of the agents."""
    steps: int = 3_000_000
    """Dream steps of an agent."""
    minutes: float = 5.0
    """Its training stops here, even with fewer steps."""
    horizon: int = 125
    """Steps of a dream while an agent learns; dreams begin anywhere in the data."""
    trajectories: int = 10
    """Real trajectories of each agent, halfway through its training and at its end, without and with noise."""
    noise: tuple[float, ...] = (0.3,)
    """Standard deviations of the noise on actions."""
    episodes: int = 10
    """Episodes of a score, in each world."""
    tolerance: float = 50.0
    """Rounds end when every agent's dream return is as near to its real return, on average."""
    budget: int = 500_000
    """Real env steps, all told: no further round begins that would pass it."""

    round_updates: int = 3000
    """Updates of each round's training; those of the first training are --train.updates."""
    round_lr: float = 5e-4
    """Learning rate of each round's training."""
    train: TrainOptions = field(default_factory=TrainOptions)
    """Of the first training and, but for updates and learning rate, of every round's."""
    workers: int = Collect.workers
    """Processes that collect."""
    seed: int = 0
    """Of everything."""

    def run(self) -> None:
        """Runs all stages that are not complete yet, and prints where the model is and how true.

        Raises:
            AimeGymError: If a name or a number does not fit, or the folder holds another run.
        """
        body = get_embodiment(self.embodiment)
        self.embodiment = body.name
        self.tasks = tuple(body.check_task(task) for task in self.tasks or body.tasks[:1])
        self.out = self.out or Path("models") / f"{body.name}-state"
        self.work = self.work or Path("runs") / f"pretrain-{body.name}"
        if self.rounds < 0 or min(self.agents, self.trajectories, self.episodes, self.round_updates) < 1:
            raise AimeGymError("--agents, --trajectories, --episodes and --round-updates start at 1, --rounds at 0.")
        console = Console(soft_wrap=True, highlight=False)
        self._claim_folder()
        ledger = Ledger(self.work / "ledger.json", body)
        data = list(self.datasets) or self._collect_first(body)
        for folder in data:
            ledger.add_dataset(folder)
        model = self._first_model(data)
        for number in range(1, self.rounds + 1):
            expected = self._steps_of_a_round(body)
            if ledger.steps + expected > self.budget and not ledger.has_round(number):
                console.print(f"Round {number} would pass the budget: {expected:,} real steps beside {ledger.steps:,}.")
                break
            console.rule(f"round {number} of {self.rounds}")
            folder = self.work / f"round-{number}"
            comparisons = self._train_agents(folder, model, console)
            data += self._run_agents(folder)
            ledger.add_round(number, comparisons, [d for d in data if folder in d.parents], self.episodes)
            console.print(ledger.table())
            if ledger.gap(number) <= self.tolerance:
                console.print(f"Dream and real agree within {self.tolerance:g} on the agents of this round.")
            model = self._train_on(folder / "model", data, model)
            if ledger.gap(number) <= self.tolerance:
                break
        _publish(model, self.out, ledger)
        console.print(f"The model is in {self.out}, made with {ledger.steps:,} real steps; ledger: {ledger.path}.")

    def _collect_first(self, body: Embodiment) -> list[Path]:
        """Random trajectories, and the buffers and experts of SAC."""
        assert self.work is not None
        root = self.work / "datasets"
        folders = [root / "random"]
        self._collect(folders[0], self.tasks[0], "random", self.random)
        for task in self.tasks if self.buffer else ():
            buffer = root / f"{task}-buffer"
            Collect(body.name, task, "sac", self.buffer, expert=0, seed=self.seed, out=buffer).run()
            folders.append(buffer)
            for index, noise in enumerate((0.0, *self.noise) if self.expert else ()):
                folders.append(root / (f"{task}-expert-noise{index}" if noise else f"{task}-expert"))
                self._collect(folders[-1], task, str(buffer / "agent.zip"), self.expert, noise, index)
        return folders

    def _collect(self, out: Path, task: str, policy: str, number: int, noise: float = 0.0, seed: int = 0) -> None:
        seed += self.seed
        Collect(self.embodiment, task, policy, number, noise=noise, seed=seed, out=out, workers=self.workers).run()

    def _first_model(self, data: list[Path]) -> Path:
        assert self.work is not None
        folder = self.work / "round-0" / "model"
        if not (folder / "scores.json").exists():
            self._train(data, folder, pretrained=self.base)
        return folder

    def _train(self, data: list[Path], folder: Path, **changes: Any) -> None:
        options = {option.name: getattr(self.train, option.name) for option in dataclasses.fields(TrainOptions)}
        Train(**(options | {"datasets": tuple(data), "out": folder, "seed": self.seed} | changes)).run()

    def _train_on(self, folder: Path, data: list[Path], model: Path) -> Path:
        if not (folder / "scores.json").exists():
            self._train(data, folder, pretrained=str(model), updates=self.round_updates, lr=self.round_lr)
        return folder

    def _train_agents(self, folder: Path, model: Path, console: Console) -> dict[str, Comparison]:
        """Agents of a round, each halfway and at its end, and what they earn in both worlds, by task."""
        from aime_gym.agents.dreaming import learn, make_agent
        from aime_gym.envs.sb3 import make_sb3_env
        from aime_gym.evaluation.compare import compare
        from aime_gym.evaluation.worlds import Worlds

        comparisons = {}
        for task in self.tasks:
            path = folder / f"{task}.json"
            if path.exists():
                comparisons[task] = Comparison.from_json(path)
                continue
            with Worlds(self.embodiment, task, model) as worlds:
                steps = worlds.max_episode_steps
                names = [f"{task}-{seed}" for seed in range(self.agents)]
                names += [f"{EXPLORER}-{seed}" for seed in range(self.explorers) if task == self.tasks[0]]
                for seed, name in enumerate(names):
                    if _stages(folder, name)[-1].exists():
                        continue
                    console.print(f"{self.algo.upper()} {name} learns in {model}.")
                    envs = make_sb3_env(
                        f"AimeDream-{worlds.embodiment.title}-v0",
                        n_envs=128,
                        seed=self.seed + seed,
                        task=task,
                        model=worlds.model,
                        max_episode_steps=self.horizon,
                        start="dataset",
                        doubt="ensemble",
                        reward="disagreement" if name.startswith(EXPLORER) else "task",
                    )
                    agent = make_agent(self.algo, envs, worlds.model, self.seed + seed)
                    for stage in _stages(folder, name):
                        learn(agent, stage, console, self.steps // 2, self.minutes / 2, self.horizon, steps)
                    envs.close()
                agents = {path.stem: path for name in names for path in _stages(folder, name)}
                comparisons[task] = compare(agents, self.embodiment, task, self.episodes, worlds.model, self.seed)
            comparisons[task].to_json(path)
        return comparisons

    def _run_agents(self, folder: Path) -> list[Path]:
        """Real trajectories of a round's agents."""
        folders = []
        for agent in sorted(folder.glob("*.zip")):
            task = agent.stem.split("-")[0]
            for index, noise in enumerate((0.0, *self.noise)):
                folders.append(folder / "datasets" / (f"{agent.stem}-noise{index}" if noise else agent.stem))
                self._collect(
                    folders[-1],
                    self.tasks[0] if task == EXPLORER else task,
                    str(agent),
                    self.trajectories,
                    noise,
                    index,
                )
        return folders

    def _steps_of_a_round(self, body: Embodiment) -> int:
        agents = 2 * (self.agents * len(self.tasks) + self.explorers)
        return agents * body.episode_steps * (self.trajectories * (1 + len(self.noise)) + self.episodes)

    def _claim_folder(self) -> None:
        """Writes the flags of this run into its folder, or checks that the run that is there has the same."""
        assert self.work is not None
        path = self.work / "pretrain.json"
        flags = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        free = ("rounds", "budget", "tolerance", "out", "work", "workers")
        if path.exists():
            there = json.loads(path.read_text())
            changed = [key for key in flags if key not in free and there.get(key) != flags[key]]
            if changed:
                raise AimeGymError(
                    f"{self.work} holds a run with other {', '.join(changed)}. Resume it with its own flags, or choose "
                    "another --work."
                )
        write_atomically(path, json.dumps(flags, indent=2) + "\n")


def _stages(folder: Path, name: str) -> list[Path]:
    """An agent halfway through its training, and at its end."""
    return [folder / f"{name}-half.zip", folder / f"{name}-end.zip"]


def _publish(model: Path, out: Path, ledger: Ledger) -> None:
    """Copies the last round's model to its place, with the ledger in its card."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name != "README.md":
            write_atomically(out / path.name, path.read_bytes())
    rows = "\n".join("| " + " | ".join(row) + " |" for row in ledger.rows())
    card = (model / "README.md").read_text().replace(f"# {model.name}\n", f"# {out.name}\n", 1)
    card += f"""
## Rounds

{ledger.steps:,} real env steps are behind this model, those of scores included. Agents of each round learned in the
model of the round before; mean returns of both worlds:

| round | task | agent | dream | real | gap | doubt |
| --- | --- | --- | --- | --- | --- | --- |
{rows}
"""
    write_atomically(out / "README.md", card)
    ledger.chart(out / "rounds.png")
