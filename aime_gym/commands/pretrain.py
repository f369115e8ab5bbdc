"""A world model from nothing: data, training, then rounds in which agents find its errors and real data corrects them.

An agent that learns in a dream exploits the errors of the model. Each round trains agents in the newest model, runs
them in the real env, and trains the model on with what happened there (Ross et al., 2011; Ross and Bagnell, 2012).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aime_gym.bodies.body import Embodiment, canonical_setup
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.collect import Collect
from aime_gym.commands.data_sets import Mix, Render
from aime_gym.commands.dream import Algorithm, Dream
from aime_gym.commands.train import Train
from aime_gym.data.trajectories import count_steps, data_digest, trajectory_paths
from aime_gym.errors import AimeGymError
from aime_gym.files import weights_digest
from aime_gym.flags import (
    CONTENT,
    HeadsOptions,
    Options,
    TrainOptions,
    check_above_zero,
    check_flags,
    check_workers,
    claim_run,
    command_line,
)
from aime_gym.gl import choose_backend
from aime_gym.parallel import Workers, all_claimed, available_cores, generators_kept, make_console, run_in_parallel

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from aime_gym.evaluation.compare import Comparison
    from aime_gym.world_model.model import WorldModel

STRAYING = 0.4
"""Share of the steps of `--stray` in which held random actions take the agent's place."""
QUICK: Mapping[str, Any] = MappingProxyType({"random": 20, "buffer": 0, "rounds": 0, "episodes": 1})
"""What `--quick` of a small model collects and scores."""
QUICK_UPDATES = MappingProxyType({"model": 1000, "heads": 200})
"""How long it then trains at most."""
QUICK_LOOK: Mapping[str, Any] = MappingProxyType({"trials": 1, "quick": True})
"""How its agent learns."""


@dataclass
class Pretrain(Options):
    """Make a world model from nothing; the same command again resumes a stopped run, stage by stage."""

    embodiment: Annotated[str, tyro.conf.Positional] = "walker"
    """The body."""
    tasks: tuple[str, ...] = ()
    """What the agents learn; by default the body's first task and, where that is sparse, one that guides there."""
    datasets: tuple[Path, ...] = ()
    """Folders of trajectories that are there already; with any, nothing is collected before the first training."""
    experts: tuple[Path, ...] = ()
    """Saved SB3 agents that help to tell what the model is worth, beside its own. They are code: name only files you
    trust. An agent.zip in a folder of --datasets is not opened unless it is named here."""
    base: str | None = None
    """A model (folder or bundled name) whose weights the first training begins with."""
    out: Path | None = None
    """The model folder; models/{embodiment}-state (or -pixels) by default."""
    work: Path | None = None
    """Data, agents and the models of all rounds; runs/pretrain-{model} by default."""

    random: int = 40
    """Random trajectories."""
    random_steps: int = 0
    """About how many real steps random trajectories shall have: more are collected where they are short."""
    held: int = 0
    """Trajectories of random actions that are held for some steps each."""
    buffer: int = 300
    """Trajectories of SAC's training, or PPO's where actions are choices, a task; 0 for none."""
    expert: int = 50
    """Trajectories of the best of these agents, a task."""
    stray: int = 0
    """Trajectories of that agent, a task, in which held random actions take its place at two fifths of the steps: rare
    events, as a catch, then happen in many ways."""

    rounds: int = 3
    """Rounds of agents, real trajectories and training, at most."""
    agents: int = 1
    """Agents a task and round, of different seeds."""
    warm: bool = False
    """Whether the first agent of each task goes on from where it was a round before. Fresh ones find more errors."""
    explorers: int = 1
    """Agents a round that seek the ensemble's disagreement (Plan2Explore)."""
    algo: Algorithm = "shac"
    """How the agents learn."""
    steps: int = 600_000
    """Dream steps of an agent."""
    minutes: float | None = None
    """An agent's training is cut short here; it, and the model, then depend on the speed of the machine."""
    slots: int = 64
    """Dreams in which an agent learns at once."""
    horizon: int = 125
    """Steps of a dream while an agent learns; dreams begin anywhere in the data."""
    trajectories: int = 4
    """Real trajectories of each agent, halfway through its training and at its end, without and with noise."""
    noise: tuple[float, ...] = (0.3,)
    """Standard deviations of the noise on actions."""
    episodes: int = 5
    """Episodes of an agent's score, in each world."""
    tolerance: float = 50.0
    """Rounds end when, at every task, the agents' dream returns are as near to their real ones, on average, and one of
    them earns more."""
    budget: int = 500_000
    """Real env steps in all: no further round begins that would pass it."""

    round_updates: int = 3000
    """Updates of each round's training; those of the first training are --train.updates."""
    round_lr: float = 5e-4
    """Learning rate of each round's training."""
    round_head_updates: int = 800
    """Updates of the heads after each round's training, which go on from those of the round before."""
    train: TrainOptions = field(default_factory=TrainOptions)
    """Options of the first training and, but for updates and learning rate, of every round's."""
    fast: bool = False
    """Draw images three times as fast, for a model that sees them; see `aime-gym render`."""
    workers: Workers = field(default_factory=available_cores)
    """Processes that train agents and collect, or 'ray': all cores of the Ray cluster that runs."""
    seed: int = 0
    """Seed of everything."""

    def run(self) -> None:
        """Runs all stages that are not complete yet, and prints where the model is and how true.

        Raises:
            AimeGymError: If a name or a number does not fit, or the folder holds another run.
            KeyboardInterrupt: After Ctrl-C; what is complete is kept.
        """
        try:
            self._prepare()
            assert self.work is not None
            assert self.out is not None
            with generators_kept(), all_claimed(self.work, self.out):
                self._run_stages()
        except KeyboardInterrupt:
            print(f"To go on: {command_line(self)}")
            raise

    def _prepare(self) -> None:
        """Takes the names that were meant, and refuses what later stages would, hours later."""
        from aime_gym.training.fit_heads import check_tasks

        body = get_embodiment(self.embodiment)
        self.embodiment = body.name
        if not body.sensors and not self.sees_images:
            print(f"{body.name} shows an image and nothing else: --train.setup is visual.")
            self.train = dataclasses.replace(self.train, setup="visual")
        self.tasks = tuple(map(body.check_task, self.tasks or (*body.tasks[:1], *body.guiding_tasks)))
        self.out = self.out or Path("models") / f"{body.slug}-{'pixels' if self.sees_images else 'state'}"
        self.work = self.work or Path("runs") / f"pretrain-{self.out.name}"
        out, work = self.out.resolve(), self.work.resolve()
        inside = out.relative_to(work).parts if out.is_relative_to(work) else ()
        if inside and inside[0].startswith(("round-", "datasets")):
            raise AimeGymError(
                f"--out {self.out} lies among what --work {self.work} holds of the stages: choose another folder."
            )
        if not self.train.heads.tasks:
            rewarded = tuple(dict.fromkeys((*check_tasks(body, ()), *self.tasks)))
            self.train = dataclasses.replace(self.train, heads=dataclasses.replace(self.train.heads, tasks=rewarded))
        self._check_numbers(body)
        collected = (self.held, self.buffer, *((self.expert, self.stray) if self.buffer else ()))
        if not self.datasets and (self.random < 2 or 1 in collected):
            raise AimeGymError(
                "--random starts at 2; --held, --buffer, --expert, --stray are 0 or from 2 on: one is held out of each."
            )

    def _run_stages(self) -> None:
        from aime_gym.commands.ledger import Ledger, publish
        from aime_gym.world_model.checkpoint import load_pretrained_model

        assert self.work is not None
        assert self.out is not None
        body = get_embodiment(self.embodiment)
        console = make_console(soft_wrap=True, highlight=False)
        free = ("rounds", "budget", "tolerance", "out", "work", "workers")
        begun = any((self.work / name).exists() for name in ("datasets", "ledger.json"))
        content = {f"{CONTENT}{source}": data_digest(source, self.sees_images) for source in self.datasets}
        if self.base:
            content[f"{CONTENT}base"] = weights_digest(load_pretrained_model(self.base).folder or "")
        claim_run(self.work / "pretrain.json", {**dataclasses.asdict(self), **content}, free, begun)
        ledger = Ledger(self.work / "ledger.json", body)
        data = list(self.datasets) or self._collect_first(body)
        for folder in data:
            ledger.add_dataset(folder)
        self._render(data)
        model = self._first_model(data)
        for number in range(1, self.rounds + 1):
            expected = self._steps_of_a_round(body)
            if ledger.steps + expected > self.budget and not ledger.has_round(number):
                console.print(f"Round {number} would pass the budget: {expected:,} real steps beside {ledger.steps:,}.")
                break
            console.rule(f"round {number} of {self.rounds}")
            folder = self.work / f"round-{number}"
            comparisons = self._train_agents(folder, number, model)
            data.append(self._run_agents(folder, model))
            self._render(data[-1:])
            ledger.add_round(number, comparisons, data[-1:], self.episodes)
            console.print(ledger.table())
            model = self._train_on(folder / "model", data, model)
            if ledger.agrees(number, self.tolerance):
                console.print(f"Dream and real agree within {self.tolerance:g} on the agents of this round.")
                break
        comparisons = self._measure_trust(data, model)
        ledger.add_trust(comparisons)
        publish(model, self.out, ledger, comparisons, command_line(self))
        made = f"made with {ledger.steps:,} real steps; ledger: {ledger.path}."
        console.print(f"The model is in {self.out}, {made}", markup=False)

    def _check_numbers(self, body: Embodiment) -> None:
        """Checks what later stages would refuse, hours later."""
        from aime_gym.agents.shac import WINDOW  # with SB3, which takes seconds to import
        from aime_gym.training.train import TrainingRun
        from aime_gym.world_model.config_file import checked_config

        check_flags(self, 1, "agents", "trajectories", "episodes", "round_updates", "steps", "slots")
        check_workers(self)
        check_flags(
            self, 0, "held", "stray", "random_steps", "rounds", "explorers", "seed", "round_head_updates", "tolerance"
        )
        check_above_zero(self, "minutes", "round_lr")
        if not body.sensors and self.buffer and not self.datasets:
            raise AimeGymError(
                f"SAC learns from sensors; {body.name} shows an image alone: give --buffer 0 and more of --random."
            )
        if any(not 0 <= noise < inf for noise in self.noise):
            raise AimeGymError(f"--noise starts at 0; got {', '.join(map(str, self.noise))}.")
        window = WINDOW if self.algo == "shac" else 1
        if self.horizon < window:
            raise AimeGymError(f"--horizon starts at {window}, a window of the agents; got {self.horizon}.")
        if not body.foreign and self.train.horizon > body.episode_steps:
            raise AimeGymError(
                f"--train.horizon: episodes of {body.name} have {body.episode_steps} steps; got {self.train.horizon}."
            )
        first = TrainingRun.of(self._training((), pretrained=self.base))
        first.check()
        first.load_base(checked_config(first.model_config(body)))
        for folder in self.datasets:
            if not str(folder).startswith("minari:"):
                trajectory_paths(folder)
        if self.fast and (body.foreign or not self.sees_images):
            raise AimeGymError(
                "--fast draws images of bodies of the suite, for a model that sees: --train.setup visual."
            )
        if self.sees_images and not body.foreign:
            choose_backend()

    def _collect_first(self, body: Embodiment) -> list[Path]:
        """Random trajectories, and the buffers and experts of SAC at all tasks, those that guide to sparse ones too."""
        from aime_gym.commands.collect import RANDOM, best_agent, learner_of  # with SB3, which takes seconds to import

        assert self.work is not None
        root = self.work / "datasets"
        folders = [root / policy for policy in RANDOM[: 2 if self.held else 1]]
        for folder in folders:
            self._collect(folder, self.tasks[0], folder.name, getattr(self, folder.name))
        steps = count_steps(trajectory_paths(folders[0])[: self.random])
        if steps < self.random_steps:
            number = ceil(self.random * self.random_steps / max(1, steps))
            self._collect(folders[0], self.tasks[0], "random", number)
        for task in self.tasks if self.buffer else ():
            buffer = root / f"{task}-buffer"
            Collect(body.name, task, learner_of(body), self.buffer, expert=0, seed=self.seed, out=buffer).run()
            folders.append(buffer)
            for index, noise in enumerate((0.0, *self.noise) if self.expert else ()):
                folders.append(root / (f"{task}-expert-noise{index}" if noise else f"{task}-expert"))
                self._collect(folders[-1], task, str(best_agent(buffer)), self.expert, noise=noise, offset=index)
            if self.stray:
                folders.append(root / f"{task}-stray")
                self._collect(folders[-1], task, str(best_agent(buffer)), self.stray, stray=STRAYING)
        return folders

    def _collect(self, out: Path, task: str, policy: str, number: int, offset: int = 0, **how: float) -> None:
        how = {"seed": self.seed + offset, **how}
        Collect(self.embodiment, task, policy, number, out=out, workers=self.workers, **how).run()  # type: ignore[arg-type]

    def _first_model(self, data: list[Path]) -> Path:
        assert self.work is not None
        folder = self.work / "round-0" / "model"
        if not (folder / "scores.json").exists():
            self._training(data, out=folder, pretrained=self.base).train()
        return folder

    def _training(self, data: Sequence[Path], **changes: Any) -> Train:
        """The call of `aime-gym train`."""
        options = {option.name: getattr(self.train, option.name) for option in dataclasses.fields(TrainOptions)}
        return Train(**(options | {"datasets": tuple(data), "seed": self.seed} | changes))

    def _train_on(self, folder: Path, data: list[Path], model: Path) -> Path:
        if not (folder / "scores.json").exists():
            heads = dataclasses.replace(self.train.heads, updates=self.round_head_updates)
            changes = {"updates": self.round_updates, "lr": self.round_lr, "heads": heads}
            self._training(data, out=folder, pretrained=str(model), **changes).train()
        return folder

    def _train_agents(self, folder: Path, number: int, model: Path) -> list[Comparison]:
        """Agents of a round, each halfway and at its end, and what they earn in both worlds."""
        from aime_gym.commands.ledger import EXPLORER, Lesson, give, stages_of
        from aime_gym.evaluation.compare import Comparison

        names = [f"{task}-{seed}" for task in self.tasks for seed in range(self.agents)]
        names += [f"{EXPLORER}-{seed}" for seed in range(self.explorers)]
        lessons = []
        for seed, name in enumerate(names):
            before = stages_of(folder.parent / f"round-{number - 1}", name)[-1]
            goes_on = self.warm and name.endswith("-0") and not name.startswith(EXPLORER) and before.exists()
            lessons.append(Lesson(self, folder, name, model, 1000 * number + seed, before if goes_on else None))
        missing = {f"agent {lesson.name}": lesson for lesson in lessons if not lesson.scores.exists()}
        title = f"{self.algo.upper()} agents in {model}"
        run_in_parallel(give, missing, self.workers, title, "agents", [self.embodiment])
        return [Comparison.from_json(lesson.scores) for lesson in lessons]

    @property
    def sees_images(self) -> bool:
        """Whether the model does; agents learn on its latents then."""
        return canonical_setup(self.train.setup) == "visual"

    def _render(self, folders: list[Path]) -> None:
        if self.sees_images:
            workers = available_cores() if self.workers == "ray" else self.workers
            Render(tuple(folders), fast=self.fast, workers=workers).run()

    def _run_agents(self, folder: Path, model: Path) -> Path:
        """Real trajectories of a round's agents, in one data set."""
        from aime_gym.agents.plain import is_plain
        from aime_gym.commands.ledger import task_of

        jobs, parts = [], []
        for agent in sorted(folder.glob("*.zip")):
            if not is_plain(agent):
                raise AimeGymError(
                    f"{agent} was not saved by this version of aime_gym: delete {folder} to make it anew."
                )
            task = task_of(agent.stem.rsplit("-", 1)[0], self.tasks)
            seen = str(model) if self.sees_images else None
            acting = partial(Collect, self.embodiment, task, str(agent), self.trajectories, model=seen, workers=1)
            for index, noise in enumerate((0.0, *self.noise)):
                parts.append(folder / "datasets" / (f"{agent.stem}-noise{index}" if noise else agent.stem))
                jobs.append(acting(noise=noise, seed=index + self.seed, out=parts[-1]))
        named = {str(job.out): job for job in jobs}
        title = f"Real trajectories of the agents in {folder}"
        run_in_parallel(Collect.run, named, self.workers, title, "agents", [self.embodiment])
        Mix(tuple(parts), folder / folder.name).run()
        return folder / folder.name

    def _measure_trust(self, data: list[Path], model: Path) -> list[Comparison]:
        """What all agents of all rounds, those of the data and two without skill earn in the last model, a task."""
        from aime_gym.evaluation.compare import Comparison, compare
        from aime_gym.world_model.checkpoint import load_pretrained_model

        scores = {task: model.parent / f"trust-{task}.json" for task in self.tasks}
        missing = {task: path for task, path in scores.items() if not path.exists()}
        if missing:
            loaded = load_pretrained_model(model)
            everyone = {**self._agents(data, loaded), "random": "random", "zero": "zero"}
            for task, path in missing.items():
                compare(everyone, self.embodiment, task, 2 * self.episodes, loaded, self.seed + 1).to_json(path)
        return [Comparison.from_json(path) for path in scores.values()]

    def _agents(self, data: list[Path], model: WorldModel) -> dict[str, Any]:
        """All agents that were saved on the way and fit the model, by name."""
        assert self.work is not None
        from aime_gym.agents.plain import load_plain_agent
        from aime_gym.evaluation.returns import load_policy
        from aime_gym.evaluation.worlds import fits

        own = [folder / "agent.zip" for folder in data if folder not in self.datasets]
        paths = [*sorted(self.work.glob("round-*/*.zip")), *filter(Path.exists, own)]
        loaded: dict[str, Any] = {f"{path.parent.name}/{path.stem}": load_plain_agent(path) for path in paths}
        loaded |= {str(path): load_policy(path) for path in self.experts}
        return {name: policy for name, policy in loaded.items() if fits(policy, model)}

    def _steps_of_a_round(self, body: Embodiment) -> int:
        agents = self.agents * len(self.tasks) + self.explorers
        return agents * body.episode_steps * (2 * self.trajectories * (1 + len(self.noise)) + self.episodes)


@dataclass
class PretrainSmall(Pretrain):
    """Make a small world model from nothing, of a body with few joints: an hour on one core.

    As `pretrain`, with other defaults: a network of half the width, and a longer training with latents as precise as
    sensors (small standard deviations and little weight of the KL) in place of rounds: see benchmarks/README.md.
    """

    random: int = 60
    random_steps: int = 5_000
    buffer: int = 80
    expert: int = 15
    rounds: int = 0
    horizon: int = 100
    round_updates: int = 2500
    train: TrainOptions = field(
        default_factory=lambda: TrainOptions(
            memory_dim=128,
            hidden_size=128,
            encoder_size=128,
            decoder_size=128,
            min_std=0.01,
            horizon=32,
            updates=10_000,
            kl_scale=0.02,
            free_nats=0.0,
            events=0.25,
            threads=1,
            heads=HeadsOptions(updates=600, hidden_size=64, trajectories=150),
        )
    )
    quick: bool = False
    """For a first look, in about three minutes: a short training on random trajectories alone, then an agent that
    learns in its dreams, with a report."""

    def run(self) -> None:
        """Makes the model; with `quick` in short, and then an agent in its dreams, as `aime-gym dream` does.

        Raises:
            AimeGymError: See `Pretrain.run`.
            KeyboardInterrupt: See `Pretrain.run`.
        """
        if not self.quick:
            super().run()
            return
        train, heads = self.train, self.train.heads
        heads = dataclasses.replace(heads, updates=min(heads.updates, QUICK_UPDATES["heads"]))
        train = dataclasses.replace(train, updates=min(train.updates, QUICK_UPDATES["model"]), heads=heads)
        out = self.out or Path("models") / f"{get_embodiment(self.embodiment).slug}-quick"
        short = dataclasses.replace(self, **QUICK, train=train, out=out, quick=False)
        Pretrain.run(short)
        assert short.work is not None
        Dream(short.embodiment, model=str(out), seed=self.seed, out=short.work / "agent", **QUICK_LOOK).run()
        print(f"The model is in {out}; the same command without --quick makes a better one, in an hour.")
