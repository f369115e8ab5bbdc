"""The rounds of a pretraining: what agents learn in them, the ledger of what they earn, and the card of the model."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from aime_gym import DREAM
from aime_gym.bodies.body import Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import count_steps, trajectory_paths
from aime_gym.errors import AimeGymError, check_natural
from aime_gym.evaluation.compare import Comparison
from aime_gym.evaluation.returns import rounded
from aime_gym.files import REVISION, count_revision, read_json, read_revision, reason, write_atomically, write_json
from aime_gym.parallel import make_console
from aime_gym.world_model.trust import Trust, save_trust

_REMEDY = "Choose another --work."
EXPLORER = "explore"
"""The name of agents that seek disagreement."""


class Ledger:
    """What every round's agents earned in both worlds, and how many real steps were spent; kept in a JSON file."""

    def __init__(self, path: Path, body: Embodiment):
        self.path, self._body = path, body
        self._content: dict[str, Any] = {"datasets": {}, "rounds": {}}
        if path.exists():
            content = self._content | read_json(path, "a ledger", _REMEDY)
            try:
                self._content = content | _checked(content)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise AimeGymError(f"{path} does not hold a ledger ({reason(error)}). {_REMEDY}") from error

    @property
    def steps(self) -> int:
        """Real env steps behind the model so far, those of scores included."""
        rounds = self._content["rounds"].values()
        scores = sum(entry["score_steps"] for entry in rounds) + self._content.get("trust_steps", 0)
        return self.data_steps + scores

    @property
    def data_steps(self) -> int:
        """Real env steps of the trajectories that the model learns from."""
        return sum(self._content["datasets"].values())

    def has_round(self, number: int) -> bool:
        """Whether the round's agents are scored and their trajectories counted."""
        return str(number) in self._content["rounds"]

    def add_dataset(self, folder: Path) -> None:
        """Counts the real steps of a data set."""
        if folder.is_dir():
            steps = count_steps(trajectory_paths(folder))
        else:  # of Minari
            bounds = TrajectoryDataset(folder).bounds
            steps = int((bounds[:, 1] - bounds[:, 0] - 1).sum())
        self._content["datasets"][str(folder)] = steps
        self._save()

    def add_round(self, number: int, comparisons: Iterable[Comparison], data: list[Path], episodes: int) -> None:
        """Enters the agents of a round."""
        for folder in data:
            self.add_dataset(folder)
        agents = [
            {
                "task": comparison.task,
                "agent": policy.name,
                "dream": policy.dream.mean,
                "real": policy.real.mean,
                "doubt": policy.doubt,
            }
            for comparison in comparisons
            for policy in comparison.policies
        ]
        self._content["rounds"][str(number)] = {
            "agents": agents,
            "score_steps": len(agents) * episodes * self._body.episode_steps,
            "time": time.strftime("%Y-%m-%d %H:%M"),
        }
        self._save()

    def add_trust(self, comparisons: Iterable[Comparison]) -> None:
        """Counts the real steps of the last scores, over all agents."""
        self._content["trust_steps"] = sum(
            int(policy.real.lengths.sum()) for comparison in comparisons for policy in comparison.policies
        )
        self._save()

    def agrees(self, number: int, tolerance: float) -> bool:
        """Whether dream and real return of a round's agents differ by so much at most, on average, at every task.

        Not if a task has no agent that earned more than that: both worlds pay nothing to those that can do nothing.
        """
        agents = self._content["rounds"][str(number)]["agents"]
        for task in {agent["task"] for agent in agents}:
            of_task = [agent for agent in agents if agent["task"] == task]
            gaps = [abs(agent["dream"] - agent["real"]) for agent in of_task]
            if not sum(gaps) / len(gaps) <= tolerance < max(agent["real"] for agent in of_task):
                return False
        return True

    def table(self) -> Table:
        """Every agent of every round."""
        table = Table(title=f"{self.steps:,} real steps so far")
        for column in ("round", "task", "agent", "dream", "real", "gap", "doubt"):
            table.add_column(column, justify="left" if column in ("task", "agent") else "right")
        for row in self.rows():
            table.add_row(*map(escape, row))
        return table

    def rows(self) -> list[list[str]]:
        """Cells of the table."""
        return [
            [
                number,
                agent["task"],
                agent["agent"],
                *(rounded(value) for value in (agent["dream"], agent["real"], agent["dream"] - agent["real"])),
                "" if agent["doubt"] is None else f"{agent['doubt']:.3g}",
            ]
            for number, entry in self._content["rounds"].items()
            for agent in entry["agents"]
        ]

    def chart(self, path: Path) -> None:
        """Draws dream returns over real ones, a colour a round; agents on the diagonal earn what they dream."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, entry in self._content["rounds"].items():
            real, dream = ([agent[world] for agent in entry["agents"]] for world in ("real", "dream"))
            axes.scatter(real, dream, label=f"round {number}", alpha=0.8)
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
        axes.set(xlabel="real return", ylabel="dream return")
        if self._content["rounds"]:
            axes.legend(frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_atomically(path, picture.getvalue())

    def _save(self) -> None:
        write_json(self.path, self._content)


def _checked(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a ledger's file says, if it is of the kinds that `Ledger` writes; else some error."""
    rounds = {}
    for number, entry in content["rounds"].items():
        agents = [
            {
                **{name: str(agent[name]) for name in ("task", "agent")},
                # JSON has no numbers that are not finite: a return that is unknown is null.
                **{name: math.nan if agent[name] is None else _finite(agent[name]) for name in ("dream", "real")},
                "doubt": None if agent["doubt"] is None else _finite(agent["doubt"]),
            }
            for agent in entry["agents"]
        ]
        score_steps = check_natural(entry["score_steps"], "score_steps")
        rounds[str(int(number))] = {**entry, "agents": agents, "score_steps": score_steps}
    datasets = {name: check_natural(steps, name) for name, steps in content["datasets"].items()}
    return {
        "datasets": datasets,
        "rounds": rounds,
        "trust_steps": check_natural(content.get("trust_steps", 0), "trust_steps"),
    }


def _finite(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise TypeError(f"{number!r:.80} is no finite number")
    return float(number)


def publish(model: Path, out: Path, ledger: Ledger, comparisons: list[Comparison], command: str) -> None:
    """Copies the last round's model to its place, with the ledger and what its dreams are worth in its card."""
    for path in sorted(model.glob("[!.]*")):  # what is hidden is a lock, or the rest of a write that was killed
        if path.is_file() and path.name not in ("README.md", REVISION):
            write_atomically(out / path.name, path.read_bytes())
    count_revision(out)
    rows = "\n".join("| " + " | ".join(row) + " |" for row in ledger.rows())
    card = (model / "README.md").read_text().replace(f"# {model.name}\n", f"# {out.name}\n", 1)
    card = re.sub(r"(?<=## How it was made\n\n```\n).*", lambda _: command, card, count=1)
    card += f"""
## Rounds

{ledger.steps:,} real env steps are behind this model. {ledger.data_steps:,} of them are data that it learned from, the
others are scores. Agents of each round learned in the model of the round before; mean returns of both worlds:

| round | task | agent | dream | real | gap | doubt |
| --- | --- | --- | --- | --- | --- | --- |
{rows}
"""
    card += "\n## What its dreams are worth\n"
    for comparison in comparisons:
        named = dataclasses.replace(comparison, model=out.name, revision=read_revision(out).number)
        card += f"\n{comparison.verdict}\n\n```\n{named}\n```\n"
    write_atomically(out / "README.md", card)
    save_trust(out, {comparison.task: Trust(comparison.metrics) for comparison in comparisons})
    ledger.chart(out / "rounds.png")


@dataclass(frozen=True)
class Lesson:
    """What an agent of a round shall learn."""

    job: Any
    """The `Pretrain` whose round it is."""
    folder: Path
    name: str
    model: Path
    seed: int
    before: Path | None
    """The agent that it goes on from."""

    @property
    def scores(self) -> Path:
        """Its returns in both worlds; written last."""
        return self.folder / f"{self.name}.json"


def give(lesson: Lesson) -> None:
    """Trains an agent of a round, saves its stages and scores it."""
    from aime_gym.agents.dreaming import learn
    from aime_gym.agents.plain import make_agent, observation_statistics
    from aime_gym.envs.dream_checks import usual_obs_type
    from aime_gym.envs.sb3 import make_sb3_env
    from aime_gym.evaluation.compare import compare
    from aime_gym.world_model.checkpoint import load_pretrained_model

    job, explores = lesson.job, lesson.name.startswith(EXPLORER)
    task = task_of(lesson.name, job.tasks)
    body, model = get_embodiment(job.embodiment), load_pretrained_model(lesson.model)
    envs = make_sb3_env(
        DREAM,
        embodiment=body.name,
        n_envs=job.slots,
        seed=lesson.seed,
        task=task,
        model=model,
        obs_type=usual_obs_type(model),
        max_episode_steps=job.horizon,
        start="dataset",
        doubt="ensemble" if explores and model.config.sensors else False,
        reward="disagreement" if explores else "task",
    )
    console = make_console(soft_wrap=True, highlight=False)
    agent = make_agent(job.algo, envs, observation_statistics(envs), lesson.seed)
    if lesson.before:
        agent.set_parameters(str(lesson.before), device="cpu")
    for stage in stages_of(lesson.folder, lesson.name):
        unfinished = stage.with_suffix(".part")
        minutes = None if job.minutes is None else job.minutes / 2
        if learn(agent, unfinished, console, job.steps // 2, minutes, stoppable=False).ended == "minutes":
            console.print(
                f"{stage.stem} was cut by --minutes {job.minutes:g} at {agent.num_timesteps:,} steps: it depends on "
                "the speed of this machine.",
                markup=False,
            )
        unfinished.replace(stage)
    envs.close()
    compare({stage.stem: agent}, body.name, task, job.episodes, model, job.seed).to_json(lesson.scores)


def task_of(name: str, tasks: Sequence[str]) -> str:
    """The task of the agent ``"{task}-{seed}"``, whose own name may have a dash; that of explorers is the first one."""
    task = name.rsplit("-", 1)[0]
    return tasks[0] if task == EXPLORER else task


def stages_of(folder: Path, name: str) -> list[Path]:
    """An agent halfway through its training, and at its end."""
    return [folder / f"{name}-half.zip", folder / f"{name}-end.zip"]
