"""`aime-gym score`: seven measures of a model's dreams, on one page."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from aime_gym.errors import AimeGymError
from aime_gym.files import read_json, weights_digest
from aime_gym.flags import CONTENT, Options, check_flags, check_same_run, check_workers, claim_run, command_line
from aime_gym.parallel import Workers, all_claimed, make_console, run_in_parallel

if TYPE_CHECKING:
    from aime_gym.evaluation.real_episodes import Watched
    from aime_gym.evaluation.score import Score as Page
    from aime_gym.evaluation.strangers import StrangerSet
    from aime_gym.evaluation.worlds import Worlds

STRANGERS = Path("benchmarks/strangers")
"""Where sets of strangers are looked for, by body and task."""

FLAGS, PAGE, PICTURE = "flags.json", "score.json", "score.png"

WATCHED = 12
"""Policies that are watched frame by frame, at most."""

WATCHED_LATENTS = 4
"""Episodes a policy where each of their frames is rendered and encoded."""

QUICK: Mapping[str, Any] = {"steps": (10_000, 20_000, 40_000), "episodes": 2, "watch": 1, "states": 6}
"""What `--quick` takes."""

_SAID = {
    "fidelity": "counterfactual fidelity",
    "validity": "closed-loop validity",
    "reward": "accuracy of rewards",
    "ranking": "policy ranking",
    "agents": "optimisation lift and exploitability",
}

TOGETHER = (("fidelity", "validity", "reward"), ("ranking",), ("agents",))
"""Parts that one process measures, as they watch the same real episodes."""

_SHARES = {"fidelity": 0.05, "validity": 0.05, "reward": 0.02, "ranking": 0.25, "agents": 0.63}

_SHARES_OF_LATENTS = {"fidelity": 0.26, "validity": 0.01, "reward": 0.01, "ranking": 0.23, "agents": 0.49}
"""Shares of the time, as measured for cartpole-state and walker-pixels, to estimate the time left."""


@dataclass
class Score(Options):
    """Measure what a model's dreams at a task are worth, in seven ways, and print one page.

    Each measure is kept in the folder as it is done; the same command goes on where it was stopped.
    """

    model: Annotated[str, tyro.conf.Positional]
    """World model: a folder or a bundled name."""
    embodiment: str | None = None
    """The body; the model's own by default."""
    task: str | None = None
    """One of its tasks; its first one by default."""
    strangers: Path | None = None
    """A set of `aime-gym strangers`; by default benchmarks/strangers/{body}-{task} if it is there. Else random, zero
    and rhythmic actions stand in, which are no strangers."""
    seen: tuple[str, ...] = ("sac", "exploiter")
    """Families of strangers whose algorithm has collected some of the model's data: they are reported apart."""
    episodes: int = 5
    """Episodes of each policy in each world, for returns; twice as many of the agents, and of strangers, whose real
    ones their set has."""
    watch: int = 2
    """Real episodes of each of twelve policies, of four with a model of images, that are kept frame by frame."""
    states: int = 16
    """Real states from which other actions are taken."""
    steps: tuple[int, ...] = (40_000, 200_000, 600_000)
    """Dream steps of optimising after which the agent is judged: counted, so that a busy machine finds the same ones. A
    minute of one core is about 40,000 of them or more."""
    max_episode_steps: int | None = None
    """Agent steps of an episode; the body's own by default."""
    seed: int = 0
    """Seed of everything."""
    out: Path | None = None
    """Folder to write; runs/score-{model}-{task} by default."""
    card: bool = False
    """Write the page into the README.md of the model's folder, in place of an earlier one at the task."""
    workers: Workers = 1
    """Parts of the page that are measured side by side, each in a process of one thread, or 'ray': all cores of the Ray
    cluster that runs. There are three: what real episodes show, the ranking of policies, and the agents."""
    quick: bool = False
    """Fewer steps, episodes and states. For a first look."""

    def run(self) -> None:
        """Measures what is not there yet, prints the page, and writes score.json and score.png.

        Raises:
            AimeGymError: If names, files or numbers do not fit together, or `out` holds another score.
        """
        from aime_gym.evaluation.charts import draw_score
        from aime_gym.evaluation.score import write_card
        from aime_gym.world_model.trust import check_place

        job = replace(self, **QUICK) if self.quick else self
        job._check()
        console = make_console(soft_wrap=True, highlight=False)
        with job._both_worlds() as worlds, ExitStack() as stack:
            folder = worlds.model.folder
            assert folder is not None  # it was named
            if job.card:
                check_place(folder, job.model)
            strangers = job._strangers(worlds)
            check_workers(job)
            default = Path("runs") / f"score-{worlds.model_name}-{worlds.task}"
            written = [folder] if job.card else []
            out, *_ = stack.enter_context(all_claimed(job.out or default, *written))
            page = _gathered(job._begin(worlds, out, strangers), out)
            try:
                if job.workers == 1:
                    page = _Measuring(job, worlds, out, strangers, console).finish(page, _SAID, out / PAGE)
                else:
                    page = _side_by_side(job, worlds, out, page)
            except KeyboardInterrupt:
                again = command_line(replace(self, out=out))
                console.print(f"What was measured is in {out}; to go on: {again}", markup=False)
                raise
            draw_score(page, out / PICTURE)
            console.print(page.table())
            if job.card:
                console.print(f"The page is in {write_card(folder, page)}", markup=False)
            console.print(f"{PAGE} and {PICTURE} are in {out}", markup=False)

    @contextmanager
    def _both_worlds(self) -> Iterator[Worlds]:
        """The worlds that are measured, with generators left alone."""
        from aime_gym.evaluation.worlds import NO_WORLD, Worlds, find_subject
        from aime_gym.parallel import generators_kept
        from aime_gym.world_model.trust import UntrustworthyDream

        with generators_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrustworthyDream)  # that is being found out
            body, model = find_subject(self.embodiment, self.model)
            with Worlds(body, self.task, model, max_episode_steps=self.max_episode_steps) as worlds:
                worlds.embodiment.check_env(NO_WORLD)
                if worlds.embodiment.choices:
                    raise AimeGymError(
                        f"`aime-gym score` varies actions that are numbers; {worlds.embodiment.name} takes "
                        f"{worlds.action_space}. `aime-gym compare` and `aime-gym explain` judge its dreams."
                    )
                yield worlds

    def _check(self) -> None:
        check_flags(self, 1, "episodes", "watch", "states", "max_episode_steps")
        check_flags(self, 0, "seed")
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise AimeGymError(f"--steps are numbers from 1 on, each larger than the one before; got {self.steps}.")

    def _strangers(self, worlds: Worlds) -> StrangerSet | None:
        """The set that was given or lies where sets lie.

        Raises:
            AimeGymError: If it is of another body or task.
        """
        from aime_gym.evaluation.strangers import INDEX, StrangerSet

        default = STRANGERS / f"{worlds.embodiment.slug}-{worlds.task}"
        folder = self.strangers or (default if (default / INDEX).exists() else None)
        if folder is None:
            return None
        strangers = StrangerSet.load(folder)
        if (strangers.embodiment, strangers.task) != (worlds.embodiment.name, worlds.task):
            raise AimeGymError(
                f"{folder} holds strangers at {strangers.embodiment} {strangers.task}, this is at "
                f"{worlds.embodiment.name} {worlds.task}: name a set of it, made by `aime-gym strangers`."
            )
        return strangers

    def _begin(self, worlds: Worlds, out: Path, strangers: StrangerSet | None) -> Page:
        """The page so far: that in the folder, or an empty one.

        Raises:
            AimeGymError: If the folder holds something else, or a score of other flags.
        """
        from aime_gym.evaluation.score import Score as Page

        assert worlds.model.folder is not None
        digest = weights_digest(worlds.model.folder)
        names = ("seen", "episodes", "watch", "states", "steps", "seed")
        flags = {
            **{name: value if isinstance(value := getattr(self, name), int) else list(value) for name in names},
            "embodiment": worlds.embodiment.name,
            "task": worlds.task,
            "max_episode_steps": worlds.max_episode_steps,
            f"{CONTENT}model": digest,
            f"{CONTENT}strangers": "" if strangers is None else strangers.digest,
        }
        if (out / FLAGS).exists():
            check_same_run(out, read_json(out / FLAGS, "the flags of a score", "Choose another --out."), flags)
        elif others := sorted(path.name for path in out.glob("[!.]*")):
            raise AimeGymError(f"{out} holds something else ({', '.join(others)}): choose another --out.")
        claim_run(out / FLAGS, flags)
        if (out / PAGE).exists():
            return Page.from_json(out / PAGE)
        return Page(
            worlds.embodiment.name,
            worlds.task,
            worlds.model_name,
            digest,
            worlds.obs_type,
            self.seed,
            tuple(self.steps),
            notes=_notes(worlds, strangers),
        )


class _Measuring:
    """One run of the command: what it needs, and the parts of the page one after the other.

    Args:
        job: The command.
        worlds: Both worlds.
        out: The folder.
        strangers: If there are any.
        console: Shows the progress.
    """

    def __init__(self, job: Score, worlds: Worlds, out: Path, strangers: StrangerSet | None, console: Console):
        self._job, self._worlds, self._out, self._strangers, self._console = job, worlds, out, strangers, console

    def finish(self, page: Page, parts: Iterable[str], path: Path) -> Page:
        """Measures what the page lacks of some parts and writes it after each one."""
        shares = _SHARES_OF_LATENTS if self._worlds.obs_type == "latent" else _SHARES
        missing = _missing(page, parts)
        began = time.monotonic()
        for number, name in enumerate(missing):
            done, left = (sum(shares[each] for each in part) for part in (missing[:number], missing[number:]))
            elapsed = time.monotonic() - began
            rest = f", about {_clock(elapsed * left / done)} left" if done else ""
            self._console.print(f"{number + 1} of {len(missing)}: {_SAID[name]} ({_clock(elapsed)} so far{rest})")
            try:
                page = replace(page, **{name: getattr(self, f"_{name}")()})
            except AimeGymError as error:
                page = replace(page, lacking={**page.lacking, name: str(error)})
            page = type(page).from_json(page.to_json(path))  # rounded, as one that goes on later has it
        return page

    @contextmanager
    def _shown(self, what: str) -> Iterator[Callable[[Iterable[Any]], Iterable[Any]]]:
        """Goes through things, with a bar and the time that is left."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        quiet = not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=quiet) as progress:
            yield lambda things: progress.track(list(things), description=what)

    @cached_property
    def _policies(self) -> dict[str, Any]:
        """Strangers, or what stands in for them, that can act here."""
        from aime_gym.evaluation.validity import fitting, made_policies

        fit = fitting(self._worlds, _acting(self._strangers)) if self._strangers else {}
        return fit or made_policies(self._worlds, self._job.seed)

    @cached_property
    def _watched(self) -> list[Watched]:
        from aime_gym.evaluation.real_episodes import watch

        names = list(self._policies)
        most = WATCHED_LATENTS if self._worlds.obs_type == "latent" else WATCHED
        chosen = names[:: -(-len(names) // most)]
        with self._shown("real episodes") as track:
            ran = watch({name: self._policies[name] for name in chosen}, self._worlds, self._job.watch, self._job.seed)
            return list(_counted(track, chosen, ran))

    def _fidelity(self) -> Any:
        from aime_gym.evaluation.fidelity import counterfactual_fidelity

        watched = self._watched
        with self._shown("states") as track:
            return counterfactual_fidelity(self._worlds, watched, self._job.states, self._job.seed, track)

    def _validity(self) -> Any:
        from aime_gym.evaluation.validity import closed_loop_validity

        watched = self._watched
        with self._shown("policies") as track:
            return closed_loop_validity(self._worlds, watched, self._job.seed, track)

    def _reward(self) -> Any:
        from aime_gym.evaluation.validity import reward_accuracy

        watched = self._watched
        with self._shown("policies") as track:
            return reward_accuracy(self._worlds, watched, track)

    def _ranking(self) -> Any:
        from aime_gym.evaluation.validity import rank_made, rank_strangers

        job, worlds = self._job, self._worlds
        if self._strangers is not None:
            return rank_strangers(worlds, self._strangers, job.seen, 2 * job.episodes)
        with self._shown("policies") as track:
            return rank_made(worlds, self._policies, job.episodes, job.seed, track)

    def _agents(self) -> Any:
        from aime_gym.evaluation.score import ANCHORS
        from aime_gym.evaluation.validity import compare_in

        job, worlds = self._job, self._worlds
        agents = optimise(worlds, self._out, job.steps, job.seed, self._console)
        with self._shown("agents") as track:
            everyone = agents | dict(zip(ANCHORS, ANCHORS, strict=True))
            return compare_in(worlds, everyone, 2 * job.episodes, job.seed, track)


def _missing(page: Page, parts: Iterable[str]) -> list[str]:
    """Parts that are neither measured nor known to be impossible."""
    return [name for name in parts if getattr(page, name) is None and name not in page.lacking]


def _side_by_side(job: Score, worlds: Worlds, out: Path, page: Page) -> Page:
    """The page, whose parts other processes measure."""
    jobs = {", ".join(parts): (job, out, page, parts) for parts in TOGETHER if _missing(page, parts)}
    try:
        title = f"Dreams of {worlds.model_name}"
        run_in_parallel(_measure_parts, jobs, job.workers, title, "parts", [worlds.embodiment.name])
    finally:
        page = _gathered(page, out)
    return page


def _measure_parts(job: tuple[Score, Path, Page, tuple[str, ...]]) -> None:
    score, out, page, parts = job
    with score._both_worlds() as worlds:
        console = make_console(soft_wrap=True, highlight=False)
        _Measuring(score, worlds, out, score._strangers(worlds), console).finish(page, parts, _beside(out, parts))


def _beside(out: Path, parts: tuple[str, ...]) -> Path:
    """The page of the process that measures some parts; it is there until the one page has what it says."""
    return out / f"{parts[0]}.json"


def _gathered(page: Page, out: Path) -> Page:
    """The page with all that those of other processes say."""
    for path in [path for parts in TOGETHER if (path := _beside(out, parts)).exists()]:
        other = type(page).from_json(path)
        measured = {name: getattr(other, name) for name in _missing(page, _SAID) if getattr(other, name) is not None}
        page = replace(page, **measured, lacking={**page.lacking, **other.lacking})
        page.to_json(out / PAGE)
        path.unlink()
    return page


def _counted(track: Callable[[Iterable[Any]], Iterable[Any]], names: list[str], ran: Iterable[Any]) -> Iterator[Any]:
    """What `ran` yields, one for each of the names, with the progress shown."""
    following = iter(ran)
    for _ in track(names):
        yield next(following)
    next(following, None)  # so that it closes its envs


def _notes(worlds: Worlds, strangers: StrangerSet | None) -> tuple[str, ...]:
    """What the page has to say beside numbers."""
    from aime_gym.evaluation.real_episodes import read_sensors
    from aime_gym.evaluation.validity import fitting

    notes = []
    body, task = worlds.embodiment, worlds.task
    fit = fitting(worlds, _acting(strangers)) if strangers else {}
    if strangers is None:
        name = body.name if not body.foreign else f"'{body.name}'"
        make = f"`aime-gym strangers {name} --task {task}` makes them" if not body.foreign else "none are known of it"
        notes.append(
            f"No strangers were given ({make}): random, zero and rhythmic actions stand in, which say little of trust."
        )
    elif len(fit) < len(strangers.members):
        shown = "latents" if worlds.obs_type == "latent" else "other sensors"
        notes.append(
            f"{len(strangers.members) - len(fit)} of {len(strangers.members)} strangers cannot act here, as this model "
            f"shows {shown}: measures 1 to 3 are about {'the others' if fit else 'random, zero and rhythmic actions'}."
        )
    if worlds.obs_type == "latent":
        read = ", ".join(read_sensors(worlds)) or "its memory alone, as it decodes no sensors"
        notes.append(
            f"Errors are between what the model reads ({read}) from its estimates of the world and from its dreams; "
            "those of images are not measured."
        )
    if body.foreign:
        notes.append("Real episodes begin where the env begins them, dreams for returns at real starts of their own.")
    return tuple(notes)


def _acting(strangers: StrangerSet) -> dict[str, Any]:
    return {member.name: member.policy for member in strangers.members}


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def optimise(worlds: Worlds, folder: Path, steps: Sequence[int], seed: int, console: Console) -> dict[str, Any]:
    """Trains an agent in the dream alone, as `aime-gym dream --trials 0` does, and keeps it at numbers of steps.

    Each leg begins with the agent's file and seeds of its own: a training that was interrupted goes on at its last
    number of steps and finds the same agents.

    Args:
        worlds: The worlds whose dream it learns in.
        folder: Where the agents are kept, ``agent-<steps>.zip``.
        steps: Dream steps at which agents are kept, ascending.
        seed: Seed of everything.
        console: Shows the progress.

    Returns:
        Name -> agent: the untrained one and those at each number of steps.
    """
    from aime_gym.agents.dreaming import learn
    from aime_gym.agents.plain import make_agent, observation_statistics
    from aime_gym.agents.sb3 import load_agent, save_sb3_agent, take_up
    from aime_gym.commands.dream import Dream
    from aime_gym.evaluation.score import agent_name

    files = {taken: folder / f"agent-{taken}.zip" for taken in (0, *steps)}
    for leg, (taken, path) in enumerate(files.items()):
        if path.exists():
            continue
        job = Dream(task=worlds.task, trials=0, seed=seed + leg)
        envs = job.training_envs(worlds)
        try:
            agent = make_agent(job.algo, envs, observation_statistics(envs), job.seed, job.device)
            if not taken:
                save_sb3_agent(agent, path)
                continue
            before = take_up(agent, files[(0, *steps)[leg - 1]])
            unfinished = folder / "unfinished.zip"
            learn(agent, unfinished, console, taken - before, stoppable=False)
            unfinished.replace(path)
        finally:
            envs.close()
    return {agent_name(taken): load_agent(path) for taken, path in files.items()}
