"""The main job: an agent learns inside the dream, then shows in both worlds what it learned."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from aime_gym import DREAM, REAL
from aime_gym.errors import TERMINATED, AimeGymError, sigterm_raises
from aime_gym.files import are_numbers, read_json, weights_digest, write_json
from aime_gym.flags import CONTENT, Options, check_above_zero, check_flags, check_same_run, command_line
from aime_gym.parallel import claimed, make_console

if TYPE_CHECKING:
    from aime_gym.agents.dreaming import Judge
    from aime_gym.evaluation.worlds import Worlds

Algorithm = Literal["shac", "ppo", "sac", "td3"]
PENALTY = 0.01
"""Keeps agents from exploiting errors that no round of agents has corrected: see benchmarks/README.md."""
QUICK = MappingProxyType(
    {"steps": 160_000, "trials": 3, "patience": 3, "refinements": 0, "episodes": 5, "video_steps": 40}
)
"""What `--quick` limits."""
IMAGES_COST = 10
"""How many times rarer trials are where each of their steps is rendered and encoded."""


@dataclass
class Dream(Options):
    """Train an SB3 agent inside the dream, compare it with the real env, and write one folder with a report."""

    embodiment: str | None = None
    """The body; that of the model, or the walker by default."""
    task: str | None = None
    """One of its tasks; its first one by default."""
    model: str | None = None
    """World model: a folder or a bundled name; the body's bundled one by default."""
    algo: Algorithm = "shac"
    """How the agent learns: 'shac' learns from the gradient of the dream, the others are Stable-Baselines3's own."""
    steps: int = 2_000_000
    """Agent steps in the dream, all slots together, at most. The same command with more of them and with the --out of a
    run that has ended goes on with its agent."""
    minutes: float | None = 120.0
    """Training is cut short here. The agent then depends on the speed of the machine, as it does by no other limit."""
    slots: int = 64
    """Dreams side by side."""
    horizon: int = 32
    """Agent steps of a dream while training. Agents that dream for long spend their time where they have fallen."""
    start: Literal["reset", "dataset"] = "dataset"
    """Where training dreams begin: at the resets of real episodes, or anywhere in the data."""
    deterministic: bool = False
    """Whether training dreams go on with the means of latents rather than samples."""
    doubt_penalty: float | None = None
    """Weight of a step's doubt, in nats, which is subtracted from the reward while training; by default 0.01 with a
    model whose trust.json does not say that its dreams rank the agents that they bring up, and 0 with others and with
    models of images, whose doubt costs an image a step."""
    max_doubt: float | None = None
    """A training dream ends at a step whose doubt is more than so many nats; never by default."""
    trials: int = 5
    """Real episodes of a trial. Trials choose the agent that does best in the world, and end the training; fewer than
    three never end it. With 0 trials ask the dream alone, and choose the agent of which it predicts the most: by the
    lower end of the real return's 90% interval, without a real step before the evaluation."""
    trial_every: int = 40_000
    """Agent steps in the dream between trials; ten times as many with a model of images, which a trial must render."""
    patience: int | None = 8
    """After so many trials in a row without a better one training goes on from the best agent in smaller steps, and at
    last ends, if the agent clearly beats random actions in the world, or, with --trials 0, is predicted to."""
    refinements: int = 2
    """How many times training goes on from the best agent, each time at a third of the learning rate."""
    episodes: int = 20
    """Episodes of the evaluation, in each world; fewer than three show no skill for sure."""
    max_episode_steps: int | None = None
    """Agent steps of an evaluation episode; the body's own by default."""
    video_steps: int = 240
    """Agent steps on film; 0 for no film."""
    threads: int = 1
    """Threads of torch: more than one pays on an idle machine only, and costs dearly beside other jobs."""
    device: str = "cpu"
    """Where the dreams and the agent compute, e.g. 'cuda'; the world stays on the CPU."""
    tensorboard: bool = False
    """Write what the agent logs while it learns for TensorBoard, to the folder tensorboard in that of the run."""
    seed: int = 0
    """Seed of everything."""
    out: Path | None = None
    """Folder to write; runs/dream-<task>-<time> by default."""
    quick: bool = False
    """A minute or two: fewer steps and episodes, less patience, a shorter film. For a first look."""

    def run(self) -> None:
        """Trains, evaluates and reports. Ctrl-C ends the training early and goes on with the agent so far.

        Raises:
            AimeGymError: If names, files or numbers do not fit together, or `out` holds another agent.
            KeyboardInterrupt: After Ctrl-C, or as `Terminated` after SIGTERM, in the evaluation; the agent is kept.
            SystemExit: After SIGTERM in the training, when what was learned is saved.
        """
        # Imported late: torch, SB3 and matplotlib take seconds.
        from aime_gym.evaluation.predict import Predictor
        from aime_gym.evaluation.worlds import NO_WORLD, Worlds, find_subject
        from aime_gym.parallel import generators_kept, so_many_threads

        given = replace(self)
        if self.quick:
            for name, most in QUICK.items():
                value = getattr(self, name)
                setattr(self, name, most if value is None else min(value, most))
        check_flags(self, 1, "steps", "slots", "horizon", "trial_every", "patience", "episodes", "threads")
        check_flags(self, 1, "max_episode_steps")
        check_flags(self, 0, "trials", "refinements", "video_steps", "seed")
        check_above_zero(self, "minutes", "max_doubt")
        console = make_console(soft_wrap=True, highlight=False)
        with ExitStack() as stack:
            stack.enter_context(generators_kept())
            stack.enter_context(so_many_threads(self.threads))
            body, model = find_subject(self.embodiment, self.model)
            worlds = Worlds(body, self.task, model, max_episode_steps=self.max_episode_steps)
            stack.enter_context(worlds)
            if self.trials:
                worlds.embodiment.check_env(
                    f"without the real env there are no trials and no evaluation in it; {NO_WORLD}"
                )
            else:
                Predictor(worlds.model, worlds.task)  # which says early what it lacks
            default = Path("runs") / f"dream-{worlds.task}-{time.strftime('%Y%m%d-%H%M%S')}"
            out = stack.enter_context(claimed(self.out or default))
            agent, job = self._train(worlds, out, console)
            if job["ended"] == "terminated":
                again = _command(given, out)
                console.print(f"Ended by SIGTERM. The newest agent is in {out}; to go on: {again}", markup=False)
                raise SystemExit(TERMINATED)
            try:
                with sigterm_raises():
                    self._evaluate(agent, worlds, out, job, given, console)
            except KeyboardInterrupt:
                again = _command(given, out)
                console.print(f"The agent is in {out}, without its evaluation; to go on: {again}", markup=False)
                raise

    def _train(self, worlds: Worlds, out: Path, console: Console) -> tuple[Any, dict[str, Any]]:
        """The agent, trained and saved, and what job.json holds about it."""
        from stable_baselines3.common.logger import configure

        from aime_gym.agents.dreaming import Trials, learn, newest
        from aime_gym.agents.plain import make_agent, observation_statistics
        from aime_gym.agents.sb3 import take_up

        path = out / "agent.zip"
        settings = self._settings(worlds)
        earlier = _earlier(out / "job.json", settings)
        before = earlier or {}
        with ExitStack() as stack:
            envs = self.training_envs(worlds)
            stack.callback(envs.close)
            agent = make_agent(self.algo, envs, observation_statistics(envs), self.seed, self.device)
            if self.tensorboard:
                agent.set_logger(configure(str(out / "tensorboard"), ["tensorboard"]))
            last = newest(path) if newest(path).exists() else path
            taken = take_up(agent, last) if earlier is not None and last.exists() else 0
            if taken:
                agent.set_random_seed(self.seed + taken)  # with its envs: not the dreams once more that it began with
            judge = self._judge(worlds, before)
            stack.callback(judge.close)
            every = self.trial_every * (IMAGES_COST if worlds.obs_type == "latent" else 1)
            trials = Trials(judge, path, every, self.patience, self.refinements, before.get("curve", ()))
            begins = f"goes on from {taken:,} steps to learn" if taken else "learns"
            limit = "" if self.minutes is None else f" or {self.minutes:g} minutes"
            console.print(
                f"{self.algo.upper()} {begins} {worlds.embodiment.name} {worlds.task} in {self.slots} dreams of "
                f"{worlds.model_name}: at most {self.steps:,} steps{limit}. Ctrl-C ends it early.",
                markup=False,
            )
            first = before.get("curve", [])
            passed = first[-1]["seconds"] if first else 0.0

            def tell(later: list[dict[str, Any]], ended: str | None = None) -> dict[str, Any]:
                curve = [*first, *(point | {"seconds": round(passed + point["seconds"], 2)} for point in later)]
                curve = [{key: value for key, value in point.items() if math.isfinite(value)} for point in curve]
                random = getattr(judge, "random", before.get("random", []))
                job = {
                    "settings": settings,
                    "ended": ended,
                    "steps": agent.num_timesteps,
                    "chosen_by": "real episodes" if self.trials else "the dream alone",
                    "trials": sum("beats_random" in point for point in curve),
                    "real_episodes": sum(point.get("episodes", 0) for point in curve) + len(random),
                    "random": random,
                    "curve": curve,
                }
                write_json(out / "job.json", job)
                return job

            tell([])
            steps = max(0, self.steps - taken)
            lesson = learn(agent, path, console, steps, self.minutes, trials, record=tell)
            return agent, tell(lesson.curve, lesson.ended)

    def _evaluate(
        self, agent: Any, worlds: Worlds, out: Path, job: dict[str, Any], given: Dream, console: Console
    ) -> None:
        """Compares the agent with random actions in both worlds, and says the result."""
        from aime_gym.evaluation.compare import compare
        from aime_gym.evaluation.report import judge, write_report

        where = "in the dream" if worlds.embodiment.env_lack else "in the dream and in the real env"
        console.print(f"Evaluating {self.episodes} episodes {where} ...")
        name = f"{self.algo.upper()} from the dream{'' if self.trials else ' alone'}"
        comparison = compare(
            {name: agent, "random": "random"},
            worlds.embodiment.name,
            worlds.task,
            self.episodes,
            worlds.model,
            self.seed,
            max_episode_steps=worlds.max_episode_steps,
            real_episodes=0 if worlds.embodiment.env_lack else None,
        )
        comparison.to_json(out / "returns.json")
        console.print(comparison.table())
        verdict = judge(comparison)
        notes = [_said_of(job), *filter(None, [comparison.trust]), _advice(verdict.outcome, job, given, out)]
        write_json(out / "job.json", job | {"outcome": verdict.outcome, "verdict": verdict.text})
        write_report(
            out / "report.html",
            comparison,
            agent,
            name,
            worlds,
            job["curve"],
            job["settings"],
            self.video_steps,
            verdict.text,
            notes,
        )
        console.print(verdict.text, style="bold", markup=False)
        for note in notes:
            console.print(note, markup=False)
        console.print(f"agent.zip, returns.json and report.html are in {out}", markup=False)

    def _penalty(self, worlds: Worlds) -> float:
        from aime_gym.world_model.trust import ranks_kin

        if self.doubt_penalty is not None:
            return self.doubt_penalty
        needs_none = ranks_kin(worlds.model.folder, worlds.task) or "image" in worlds.model.observed
        return 0.0 if needs_none else PENALTY

    def training_envs(self, worlds: Worlds) -> Any:
        """The dreams that the agent learns in, as SB3's vector env."""
        from aime_gym.envs.sb3 import make_sb3_env

        return make_sb3_env(
            DREAM,
            embodiment=worlds.embodiment.name,
            n_envs=self.slots,
            seed=self.seed,
            task=worlds.task,
            model=worlds.model,
            obs_type=worlds.obs_type,
            max_episode_steps=self.horizon,
            start=self.start,
            deterministic=self.deterministic,
            doubt_penalty=self._penalty(worlds),
            max_doubt=self.max_doubt,
            device=self.device,
        )

    def _judge(self, worlds: Worlds, before: Mapping[str, Any]) -> Judge:
        """What trials ask: real episodes, or the dream alone; its seeds are not those of the evaluation."""
        from aime_gym.agents.dreaming import RealJudge
        from aime_gym.envs.sb3 import make_sb3_env
        from aime_gym.evaluation.predict import DreamJudge
        from aime_gym.evaluation.worlds import Worlds

        body, seed = worlds.embodiment.name, self.seed + 1_000_000 + before.get("real_episodes", 0)
        if not self.trials:
            return DreamJudge(Worlds(body, worlds.task, worlds.model, worlds.obs_type), self.seed + 1_000_000)
        options = worlds.real_options()
        world = make_sb3_env(REAL, embodiment=body, n_envs=self.trials, seed=seed, wrap=worlds.wrap, **options)
        return RealJudge(world, before.get("random", ()))

    def _settings(self, worlds: Worlds) -> dict[str, Any]:
        """All flags but where the run lies, with the names that were meant."""
        settings = {name: value for name, value in asdict(self).items() if name != "out"}
        names = {"embodiment": worlds.embodiment.name, "task": worlds.task, "model": self.model or worlds.model_name}
        folder = worlds.model.folder
        weights = {} if folder is None else {f"{CONTENT}model": weights_digest(folder)}
        return settings | names | weights


FREE = frozenset(
    (
        *("steps", "minutes", "trials", "trial_every", "patience", "refinements", "episodes", "max_episode_steps"),
        *("video_steps", "threads", "device", "tensorboard", "quick"),
    )
)
"""Flags in which a run that goes on may differ from what it was."""


PREDICTED = frozenset(("predicted", "low", "high"))
"""What a trial without real episodes has."""


def _earlier(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the job.json of the run tells that goes on; None where there is none.

    Raises:
        AimeGymError: If it is of a run with other settings.
    """
    if not path.exists():
        if others := sorted(path.name for path in path.parent.glob("[!.]*")):
            raise AimeGymError(f"{path.parent} holds something else ({', '.join(others)}): choose another --out.")
        return None
    told = read_json(path, "what became of a run", "Choose another --out.")
    before = told.get("settings", {})
    good = isinstance(before, dict) and isinstance(told.get("real_episodes", 0), int)
    good = good and are_numbers(told.get("random", []))
    curve = told.get("curve", [])
    good = good and isinstance(curve, list) and all(isinstance(point, dict) for point in curve)
    good = good and all({"seconds", "steps"} <= {*point} and are_numbers([*point.values()]) for point in curve)
    good = good and all({"episodes", "beats_random"} <= {*point} for point in curve if "real" in point)
    good = good and all({"real"} <= {*point} or {*point} >= PREDICTED for point in curve if "beats_random" in point)
    if not good:
        raise AimeGymError(f"{path} does not hold what became of a run. Choose another --out.")
    check_same_run(path.parent, before, settings, FREE)
    return {name: told[name] for name in ("real_episodes", "random", "curve") if name in told}


def _command(given: Dream, out: Path, **changes: Any) -> str:
    """The command that goes on with a run."""
    return command_line(replace(given, **{"out": out, **changes}))


def _said_of(job: Mapping[str, Any]) -> str:
    """How the training ended, and what chose the agent."""
    from aime_gym.agents.dreaming import kept, last_trials

    reasons = {
        "steps": "all that it was given",
        "learned": "until trials got no better",
        "minutes": "cut by --minutes, so that the agent depends on the speed of the machine: more of them give it all "
        "its steps",
        "interrupted": "stopped by Ctrl-C",
    }
    trials = last_trials(job["curve"])
    if not trials:
        return f"It learned in the dream for {job['steps']:,} steps, {reasons[job['ended']]}; no trial chose the agent."
    asked = f"{job['real_episodes']} real episode{'s' * (job['real_episodes'] != 1)}"
    counted, best = f"{job['trials']} trial{'s' * (job['trials'] != 1)}", kept(trials)
    if "real" in best:
        most = max(trial["real"] for trial in trials)
        place = "the most" if best["real"] == most else f"about the most, {most:.0f}, and the last that did"
        worth = f"whose trial earned {best['real']:.0f}, {place}"
        chosen = f"{asked} chose the agent: {counted}, and random actions to compare with"
    else:
        told = "{predicted:.0f} in the real env ({low:.0f} to {high:.0f} with 90%)".format(**best)
        worth = f"for which the dream predicts {told}"
        chosen = (
            f"no real episode chose the agent: the lower end of the return that the dream predicts did, in {counted}"
            + (f" (earlier ones asked {asked})" if job["real_episodes"] else "")
        )
    return (
        f"It learned in the dream for {job['steps']:,} steps, {reasons[job['ended']]}; the agent after "
        f"{best['steps']:,} of them was kept, {worth}; {chosen}."
    )


def _advice(outcome: str, job: Mapping[str, Any], given: Dream, out: Path) -> str:
    """What to do next."""
    ended = job["ended"]
    limits: dict[str, dict[str, Any]] = {
        "steps": {"quick": False} if given.quick else {"steps": 2 * max(given.steps, job["steps"])},
        "minutes": {"minutes": 2 * (given.minutes or 0)},
        "learned": {"quick": False} if given.quick else {"patience": 2 * (given.patience or 1)},
        "interrupted": {},
    }
    how = ", without the limits of --quick" if "quick" in limits[ended] else ""
    longer = f"{how}: {_command(given, out, **limits[ended])}"
    if outcome == "learned":
        return f"To train on{longer}"
    advice = f"Train longer{longer}"
    if outcome == "dream pays":
        advice += " If it stays so, the model lacks real data of such agents, which `aime-gym pretrain` collects."
    return advice
