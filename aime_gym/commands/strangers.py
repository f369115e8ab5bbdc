"""`aime-gym strangers`: policies that no model has met, trained in the real env, with what they earn there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aime_gym.errors import AimeGymError
from aime_gym.files import digest_of, read_json, weights_digest, write_json
from aime_gym.flags import Options, check_flags, check_same_run, check_workers
from aime_gym.parallel import Workers, claimed, generators_kept, run_in_processes

if TYPE_CHECKING:
    from aime_gym.agents.numpy_policies import PlainPolicy
    from aime_gym.bodies.body import Embodiment
    from aime_gym.world_model.model import WorldModel


@dataclass
class Strangers(Options):
    """Train policies in the real env that no world model has met, and write them as plain files with their returns.

    They are for judging dreams and must not get into any training data. The same command goes on where it was stopped.
    """

    embodiment: Annotated[str, tyro.conf.Positional]
    """The body."""
    task: str | None = None
    """One of its tasks, at which they are judged; its first one by default."""
    learn: str | None = None
    """The task whose reward they learn from, --task by default: a dense one where that of --task is too sparse to be
    found by chance, as lift beside pendulum's swingup, rise beside hopper's stand, push beside finger's spin."""
    families: tuple[str, ...] | None = None
    """Ways to learn; by default rhythm, ars, ppo, td3 and tqc (there is sac, too), and where actions are choices
    rhythm, trpo, and of Discrete ones ars and dqn."""
    exploit: str | None = None
    """A world model, a folder or a bundled name: as many runs of SHAC learn in its dreams, too, as family exploiter.
    They are kin of that model alone."""
    imitate: Path | None = None
    """A plain policy (.safetensors), as this command writes them: as many runs clone its behaviour from five of its
    real episodes each, as family imitator. They are kin of every model that it is kin of."""
    seeds: int = 3
    """Training runs of each family."""
    stages: tuple[float, ...] = (0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0)
    """At which shares of a run its policy is kept."""
    effort: float = 1.0
    """Factor on each family's number of agent steps of a run in the real env; bodies that learn slowly need more."""
    episodes: int = 10
    """Real episodes by which each policy's return is measured, from resets that no training has seen."""
    out: Path | None = None
    """Folder to write; strangers/{body}-{task} by default."""
    publish: Path | None = None
    """Nothing is trained: a small, balanced choice of what is in --out is measured and written to this folder."""
    measure: bool = False
    """Nothing is trained: every policy published in --out gets real episodes until it has --episodes of them."""
    keep: int = 40
    """Policies to publish."""
    noise: tuple[float, ...] = (0.3, 0.5)
    """Standard deviations of Gaussian noise on actions, in half ranges, with which the best policy of each run may be
    published, too: where runs learn all at once, noise fills the middle of the range."""
    best: float | None = None
    """The best real return that anyone has at the task, for --publish; that of the best policy here by default."""
    workers: Workers = 1
    """Runs that train side by side, each in a process of one thread, or 'ray': all cores of the Ray cluster that runs.
    One run at a time has the threads of this process."""

    def run(self) -> None:
        """Trains, measures and writes; prints each policy's return."""
        from aime_gym.agents.strangers import families_of
        from aime_gym.bodies.lookup import get_embodiment

        check_flags(self, 1, "seeds", "episodes", "keep")
        if not 0 < self.effort <= 1000:
            raise AimeGymError(f"--effort is a factor above 0, at most 1000; got {self.effort}.")
        if not all(0 < std < 10 for std in self.noise):
            raise AimeGymError(f"--noise are standard deviations above 0, below 10; got {self.noise}.")
        if not self.stages or not all(0 < share <= 1 for share in self.stages):
            raise AimeGymError(f"--stages are shares of a run, within (0, 1]; got {self.stages}.")
        body = get_embodiment(self.embodiment)
        self.families = families_of(body, self.families)
        task = body.check_task(self.task or body.tasks[0])
        learn = body.check_task(self.learn or task)
        out = self.out or Path("strangers") / f"{body.slug}-{task}"
        if self.measure:
            return self._measure_again(out)
        if self.publish is not None:
            return self._publish(out, self.publish)
        exploited = None if self.exploit is None else _exploitable(body, self.exploit, learn).folder
        if self.imitate is not None:
            _expert(body, self.imitate)
        check_workers(self)
        with claimed(out), generators_kept():
            self._fill(out, body.name, task, learn, exploited)

    def _publish(self, folder: Path, out: Path) -> None:
        """Chooses among what is there, and prints the choice."""
        from aime_gym.evaluation.publish_strangers import publish_strangers

        with claimed(out):
            made = publish_strangers(folder, out, self.keep, self.best, self.noise, self.episodes)
        print(
            f"{made.policies} strangers of {made.runs} runs are in {out}; {', '.join(map(str, made.thirds))} of them "
            f"in the thirds of the range of returns{'' if made.balanced else ': not a quarter of them in each'}."
        )

    def _measure_again(self, out: Path) -> None:
        """Adds real episodes to a published set, and prints each policy's return."""
        from aime_gym.evaluation.publish_strangers import measure_again
        from aime_gym.evaluation.strangers import StrangerSet

        with claimed(out):
            measure_again(out, self.episodes)
        for member in StrangerSet.load(out).members:
            print(f"{member.name}: return {sum(member.returns) / len(member.returns):.0f} of {len(member.returns)}")

    def _fill(self, out: Path, body: str, task: str, learn: str, exploited: Path | None) -> None:
        """Trains and measures what the folder lacks."""
        from aime_gym.evaluation.strangers import FORMAT

        marks = tuple(sorted(self.stages))
        settings: dict[str, Any] = {"stages": list(marks), "effort": self.effort, "episodes": self.episodes}
        if learn != task:
            settings["learn"] = learn
        index = _read_index(out, {"format": FORMAT, "embodiment": body, "task": task, "settings": settings})
        if "random" not in index["anchors"]:
            anchors = {name: (body, task, name, self.episodes) for name in ("random", "zero")}
            returns = run_in_processes(_measure, anchors, self.workers, envs=[body])
            index["anchors"] = dict(zip(anchors, returns, strict=True))
            _write_index(out, index)
        kinds: list[tuple[str, str, Path | None]] = [(family, family, None) for family in self.families or ()]
        if exploited is not None:
            kinds.append((f"exploiter-{exploited.name}", "exploiter", exploited))
        if self.imitate is not None:
            kinds.append((f"imitator-{self.imitate.stem}", "imitator", self.imitate))
        runs = [
            _Run(out, body, task, learn, seed, marks, self.effort, self.episodes, f"{name}-{seed}", family, source)
            for seed in range(self.seeds)
            for name, family, source in kinds
        ]
        known = {entry["run"] for entry in index["policies"].values()}
        missing = {run.name: run for run in runs if run.name not in known and not run.record.exists()}
        try:
            run_in_processes(_train, missing, self.workers, envs=[body])
        finally:  # what is done counts, also where another run failed
            for record in [run.record for run in runs if run.record.exists()]:
                _enter(out, index, read_json(record, "the policies of a run", "Delete it."))
                record.unlink()
        print(f"{len(index['policies'])} strangers are in {out}; {index['training_steps']:,} real steps of training.")


@dataclass(frozen=True)
class _Run:
    """A training run, in the folder of its set."""

    folder: Path
    body: str
    task: str
    learn: str
    seed: int
    marks: tuple[float, ...]
    effort: float
    episodes: int
    name: str
    family: str
    source: Path | None = None
    """The model that is exploited, or the policy that is imitated."""

    @property
    def record(self) -> Path:
        """Its policies, as the set lists them; written last, and there until the set has them."""
        return self.folder / f"{self.name}.json"

    def stages(self) -> tuple[str, Iterator[tuple[int, PlainPolicy]]]:
        """The library of its algorithm, and the steps taken and the policy at each stage."""
        from aime_gym.agents.strangers import DREAM_STEPS, FAMILIES, learn_exploiter, learn_imitator, learn_stranger
        from aime_gym.bodies.lookup import get_embodiment
        from aime_gym.world_model.checkpoint import load_pretrained_model

        if self.source is None:
            family = FAMILIES[self.family]
            total = round(self.effort * family.steps)
            return family.library, learn_stranger(self.family, self.body, self.learn, self.seed, self.marks, total)
        if self.family == "imitator":
            expert = _expert(get_embodiment(self.body), self.source)
            return "aime_gym", learn_imitator(expert, self.body, self.seed, self.marks)
        model, total = load_pretrained_model(self.source), round(self.effort * DREAM_STEPS)
        return "aime_gym", learn_exploiter(model, self.body, self.learn, self.seed, self.marks, total)


def _train(run: _Run) -> None:
    """Trains and measures a run; one in the dreams of a model takes no real step."""
    library, stages = run.stages()
    exploits = run.family == "exploiter"
    model = weights_digest(run.source or "") if exploits else None
    entries: dict[str, dict[str, Any]] = {}
    for number, (steps, policy) in enumerate(stages):
        name = f"{run.name}-{number}"
        digest = _save(policy, run.folder / f"{name}.safetensors")
        returns = _measure((run.body, run.task, policy, run.episodes))
        taken = {"steps": 0, "dream_steps": steps, "model": model} if exploits else {"steps": steps}
        entries[name] = {
            "run": run.name,
            "family": run.family,
            "library": library,
            **taken,
            "sha256": digest,
            "real": returns,
        }
        kind = "dream" if exploits else "real"
        print(f"{run.body} {run.task} {name}: {steps:,} {kind} steps, return {returns['mean']:.0f}", flush=True)
    write_json(run.record, entries)


def _measure(job: tuple[str, str, Any, int]) -> dict[str, Any]:
    """Returns of real episodes from resets, of a body at a task: a policy's, so many."""
    from aime_gym.evaluation.returns import episode_returns
    from aime_gym.evaluation.strangers import SEED
    from aime_gym.evaluation.worlds import make_real_envs

    body, task, policy, count = job
    envs = make_real_envs(body, min(count, 10), task=task)
    try:
        episodes = episode_returns(policy, envs, count, seed=SEED)
    finally:
        envs.close()
    return {"mean": episodes.mean, "returns": [round(float(value), 3) for value in episodes.returns]}


def _enter(folder: Path, index: dict[str, Any], entries: dict[str, Any]) -> None:
    """Adds a run to the list."""
    index["policies"] |= entries
    index["training_steps"] += max(entry["steps"] for entry in entries.values())
    _write_index(folder, index)


def _exploitable(body: Embodiment, name: str, task: str) -> WorldModel:
    """The model, if agents on all sensors of the body can learn the task in its dreams."""
    from aime_gym.envs.dream_checks import choose_task, load_model_of
    from aime_gym.evaluation.worlds import obs_type_of_all_sensors

    _, model = load_model_of(body.name, name)
    choose_task(body, model, task)
    if obs_type_of_all_sensors(model, body) != "state":
        seen = ", ".join(model.observed)
        raise AimeGymError(f"--exploit takes a model that sees all sensors of {body.name}; {name} sees {seen}.")
    return model


def _expert(body: Embodiment, path: Path) -> PlainPolicy:
    """The policy to imitate, which must act on all sensors of the body."""
    from aime_gym.agents.numpy_policies import load_plain

    if path.suffix != ".safetensors" or not path.exists():
        raise AimeGymError(f"--imitate takes the file of a plain policy (.safetensors); there is none at {path}.")
    policy = load_plain(path)
    policy.check_sizes(path.name, sum(sensor.dim for sensor in body.observed("mdp")), body.action_dim, body.choices)
    return policy


def _save(policy: Any, path: Path) -> str:
    from aime_gym.agents.numpy_policies import save_plain

    return digest_of(save_plain(policy, path))


def _read_index(folder: Path, of: dict[str, Any]) -> dict[str, Any]:
    """The list in a folder, of the same body, task and settings; a new one where there is none."""
    from aime_gym.evaluation.strangers import INDEX

    path = folder / INDEX
    new: dict[str, Any] = {**of, "training_steps": 0, "anchors": {}, "policies": {}}
    if not path.exists():
        return new
    index = read_json(path, "a list of strangers", "Choose another --out.")
    check_same_run(folder, index, of)
    if any(not isinstance(index.get(name), type(empty)) for name, empty in new.items()):
        raise AimeGymError(f"{path} is no list of strangers: it lacks some of {', '.join(new)}. Choose another --out.")
    return index


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    from aime_gym.evaluation.strangers import INDEX

    write_json(folder / INDEX, index)
