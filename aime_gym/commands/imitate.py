"""`aime-gym imitate`: an agent from demonstrations without actions, tried in the world; `demonstrations` makes some."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.files import write_json
from aime_gym.flags import Options, check_above_zero, check_flags
from aime_gym.parallel import claimed, make_console

if TYPE_CHECKING:
    from aime_gym.agents.imitator import Imitator
    from aime_gym.data.dataset import TrajectoryDataset
    from aime_gym.evaluation.returns import Episodes
    from aime_gym.world_model.config import ModelConfig

Algorithm = Literal["aime", "online", "bco", "iidm", "bc"]

FROM_RESETS = "real_from_resets"
"""In returns.json: real episodes as the demonstrations begin, the paper's protocol; the same as in score.json."""
STARTS = (
    "Both worlds of `policies` begin where the model's dreams do, at moments of the data, and not at resets of the env."
)
_FILES = ("agent", "score.json", "returns.json", "report.html")


@dataclass
class Imitate(Options):
    """Imitate demonstrations with a pretrained world model, and write one folder with the agent and a report."""

    model: str = "walker-state"
    """World model: a folder or a bundled name."""
    demonstrations: str = "walker-walk"
    """A folder of trajectories or a bundled name; actions in them are used by 'bc' alone."""
    algo: Algorithm = "aime"
    """How the agent learns; 'online' goes on where 'aime' ends, in the real env."""
    mode: Literal["full", "kl_only", "reconstruction_only"] = "full"
    """For 'aime': the part of the evidence that is maximised."""
    use_idm: bool = False
    """For 'aime': be guided by the model's inverse dynamics model."""
    body_data: tuple[Path, ...] = ()
    """For 'bco' and 'iidm': folders of trajectories of the body with actions; for 'online': what the model was trained
    with, half of each batch."""
    steps: int = 25_000
    """For 'online': agent steps in the real env."""
    reward: Literal["ail", "viper"] = "ail"
    """For 'online': the surrogate reward, by a discriminator or by a model of the demonstrations."""
    embodiment: str | None = None
    """The model's body; only where it is the env of a package that nothing has imported yet, as a model's file imports
    nothing: my_package:MyEnv-v0."""
    task: str | None = None
    """The task whose reward is reported, never learned from; by default that of the demonstrations."""
    updates: int = 2000
    """Gradient steps; of 'online' those before the first real step."""
    batch_size: int | None = None
    """Windows an update; by default 32 for 'aime', 24 for 'online' and 50 for the baselines."""
    horizon: int | None = None
    """Steps of a window; by default 32 for 'aime' and 24 for 'online'."""
    lr: float | None = None
    """Adam's learning rate; by default 5e-4 for 'online' and 1e-3 for the others; that of 'aime' falls to 0."""
    held_out: float = 0.2
    """Share of the demonstrations by whose loss the weights to keep are chosen; 0 keeps the last weights."""
    episodes: int = 20
    """Episodes of the evaluation, in each world."""
    video_steps: int = 240
    """Agent steps on film; 0 for no film."""
    threads: int = 1
    """Threads of torch."""
    device: str = "cpu"
    """Where the agent learns and acts, e.g. 'cuda'."""
    tensorboard: bool = False
    """Write a log for TensorBoard, too, to run/tensorboard in the folder."""
    seed: int = 0
    """Seed of everything."""
    out: Path | None = None
    """Folder to write; the same one resumes a stopped run, of 'online' what it did before the first real step.
    runs/imitate-<demonstrations>-<time> by default."""

    def run(self) -> None:
        """Trains, evaluates and reports.

        Raises:
            AimeGymError: If names, files or numbers do not fit together.
            KeyboardInterrupt: After Ctrl-C; with the same --out the run resumes.
        """
        from aime_gym.data.demonstrations import find_demonstrations
        from aime_gym.parallel import so_many_threads

        check_flags(self, 1, "updates", "batch_size", "horizon", "steps", "episodes", "threads")
        check_flags(self, 0, "video_steps", "held_out", "seed")
        check_above_zero(self, "lr")
        console = make_console(soft_wrap=True, highlight=False)
        folder = find_demonstrations(self.demonstrations)
        default = Path("runs") / f"imitate-{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with so_many_threads(self.threads), claimed(self.out or default) as out:
            _check_content(out)
            console.print(
                f"{self.algo.upper()} imitates {folder} with {self.model}. Ctrl-C stops it; --out {out} resumes it.",
                markup=False,
            )
            agent, task, expert = self.learn(out, console)
            self._evaluate(agent, out, task, expert, console)

    def learn(self, out: Path, console: Console) -> tuple[Imitator, str, float | None]:
        """Trains an agent and saves it in a folder, with the settings of the run.

        Returns:
            The agent, the task to report, and the return of the demonstrations, if it is known.
        """
        from aime_gym.agents.imitator import MONITOR
        from aime_gym.data.demonstrations import expert_return, find_demonstrations
        from aime_gym.data.trajectories import read_metadata, recorded_tasks
        from aime_gym.training.callbacks import JsonLog, ProgressBar

        folder = find_demonstrations(self.demonstrations)
        agent = self.make_agent()
        agent.check_data()
        self._find_body(agent)
        shown = recorded_tasks(read_metadata(folder))
        task = self._task_of(agent, shown)
        expert = expert_return(folder) if shown <= {task} else None  # a return at another task says nothing
        agent.tensorboard_log = out / "run" / "tensorboard" if self.tensorboard else None
        log = JsonLog(out / "run" / "log.jsonl", 50)
        bar = ProgressBar(f"Imitating {folder.name}", MONITOR)
        if self.algo == "online":
            self._learn_online(agent, task, [log, bar], out / "run", console)
        else:
            agent.learn(self.updates, [log, bar], out / "run")
        agent.save(out / "agent")
        told = {**self._told(), "task": task, "setup": agent.model.config.setup, "expert_return": expert}
        write_json(out / "settings.json", told)
        return agent, task, expert

    def _told(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "out" and value is not None}

    def _learn_online(self, agent: Any, task: str, callbacks: list[Any], run: Path, console: Console) -> None:
        """Imitates, and goes on in the real env."""
        import gymnasium
        from stable_baselines3.common.logger import configure

        from aime_gym import REAL
        from aime_gym.evaluation.worlds import fitting_obs_type

        model = agent.model
        settings = {"obs_type": fitting_obs_type(agent, model), "setup": model.config.setup}
        with gymnasium.make(REAL, embodiment=model.config.embodiment, task=task, **settings) as env:
            agent.set_env(env)
            agent.imitate(self.updates, callbacks, run)
            agent.logger = configure(str(run), ["csv"])
            told = 0

            def tell(names: dict[str, Any], _: dict[str, Any]) -> bool:
                nonlocal told
                if len(agent.returns) >= told + 10:
                    told = len(agent.returns)
                    recent = sum(agent.returns[-10:]) / 10
                    console.print(f"{agent.num_timesteps:,} real steps: {recent:.4g} a sampled episode", markup=False)
                return True

            agent.learn(self.steps, tell)

    def make_agent(self) -> Imitator:
        """The agent before it has learned."""
        from aime_gym.agents.aime import AIME
        from aime_gym.agents.baselines import BC, BCO, IIDM

        names = ("batch_size", "horizon", "lr", "held_out", "seed", "device")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        options = {name: value for name, value in given.items() if value is not None}
        if self.algo == "aime":
            return AIME(self.model, self.demonstrations, mode=self.mode, use_idm=self.use_idm, **options)
        if self.algo == "online":
            from aime_gym.agents.online_aime import OnlineAIME

            options |= {"mode": self.mode, "use_idm": self.use_idm, "body_data": self.body_data, "reward": self.reward}
            return OnlineAIME(self.model, self.demonstrations, **options)
        if self.algo == "bc":
            return BC(self.model, self.demonstrations, **options)
        return {"bco": BCO, "iidm": IIDM}[self.algo](self.model, self.demonstrations, self.body_data, **options)

    def _find_body(self, agent: Imitator) -> None:
        """Refuses, before the training, a model whose real env cannot be made after it."""
        named = agent.model.config.embodiment
        if self.embodiment is not None and get_embodiment(self.embodiment).name != named:
            raise AimeGymError(f"--embodiment {self.embodiment}: the model {self.model} is of {named}.")
        agent.model.config.body.check_env("aime_gym.AIME, BC and the others learn in Python, and act in its dreams.")
        get_embodiment(named, imports=False)

    def _task_of(self, agent: Imitator, shown: set[str]) -> str:
        """The task to report, of which the model must dream the rewards if it does of any."""
        body, heads = agent.model.config.body, agent.model.heads
        task = body.check_task(self.task or (next(iter(shown)) if len(shown) == 1 else body.tasks[0]))
        if heads is not None and task not in heads.tasks:
            raise unknown_name("task of this model's heads", task, heads.tasks)
        return task

    def _evaluate(self, agent: Any, out: Path, task: str, expert: float | None, console: Console) -> None:
        from aime_gym.evaluation.compare import compare
        from aime_gym.evaluation.report import write_report
        from aime_gym.evaluation.returns import rounded
        from aime_gym.evaluation.worlds import Worlds

        settings = self._told()
        console.print(f"Evaluating {self.episodes} episodes ...")
        real = self.score(agent, out, task)
        low, high = real.interval
        body = agent.model.config.embodiment
        if agent.model.heads is not None and agent.model.folder is not None:  # released models dream no rewards
            name = f"{self.algo.upper()} from observations" if self.algo != "bc" else "BC"
            comparison = compare({name: agent, "random": "random"}, body, task, self.episodes, agent.model, self.seed)
            write_json(out / "returns.json", {**comparison.to_dict(), "starts": STARTS, FROM_RESETS: _summary(real)})
            settings["real return from resets"] = f"{rounded(real.mean)} [{rounded(low)}, {rounded(high)}]"
            with Worlds(body, task, agent.model) as worlds:
                write_report(out / "report.html", comparison, agent, name, worlds, (), settings, self.video_steps)
        # There is no share of a return of zero, or of a loss.
        share = f", {real.mean / expert:.0%} of the demonstrations' {rounded(expert)}" if expert and expert > 0 else ""
        console.print(
            f"In the real {body} the agent earns {rounded(real.mean)} at {task}{share}: the mean of {self.episodes} "
            f"episodes from resets, 95% interval {rounded(low)} to {rounded(high)}.",
            style="bold",
            markup=False,
        )
        files = ", ".join(path.name for path in sorted(out.iterdir()) if path.name in _FILES)
        console.print(f"{out} holds {files}.", markup=False)

    def score(self, agent: Imitator, out: Path, task: str) -> Episodes:
        """Real episodes from resets of the env, as demonstrations begin; written to score.json in `out`."""
        from aime_gym.envs.wrappers import drawn_as
        from aime_gym.evaluation.returns import episode_returns
        from aime_gym.evaluation.worlds import REAL_SLOTS, fitting_obs_type, make_real_envs

        config = agent.model.config
        envs = make_real_envs(
            config.embodiment,
            min(REAL_SLOTS, self.episodes),
            task=task,
            obs_type=fitting_obs_type(agent, agent.model),
            setup=config.setup,
            **drawn_as(agent.model),
        )
        real = episode_returns(agent, envs, self.episodes, self.seed)
        envs.close()
        write_json(out / "score.json", {"task": task, **_summary(real)})
        return real


def _summary(episodes: Episodes) -> dict[str, Any]:
    return {"mean": episodes.mean, "interval": episodes.interval, "returns": episodes.returns.tolist()}


def _check_content(out: Path) -> None:
    """Raises an `AimeGymError` if a folder holds anything but a run of `aime-gym imitate`."""
    others = sorted(path.name for path in out.glob("[!.]*"))
    if others and not (out / "run" / "flags.json").exists():
        raise AimeGymError(f"{out} holds something else ({', '.join(others)}): choose another --out.")


WINDOWS, STEPS, OWN = 32, 32, 128
"""How many windows of demonstrations are scored, their steps, and how many of the model's own starts they are compared
with; a quarter of pictures, whose scores take long."""
UPDATES = 40
"""Steps of the gradient by which actions are looked for."""
WELL, PARTLY = 0.9, 0.5
"""Shares of explained steps from which on a model can explain demonstrations, or some of them."""


@dataclass
class Demonstrations(Options):
    """Make demonstrations of files of your own, and say before any training whether a model can explain what they show.

    Each npz, HDF5 or Parquet file holds one episode or several, with or without actions, as `aime-gym import` reads
    them; each film is an episode.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """npz, HDF5 and Parquet files; films (mp4, mov, avi, mkv, webm); folders of trajectories; minari:ID."""
    body: str | None = None
    """The body whose demonstrations they are, or the id of a Gymnasium env. That of --model by default."""
    model: str | None = None
    """World model that is asked: a folder or a bundled name. By default the body's bundled one that can see them."""
    observation: tuple[str, ...] = ()
    """What arrays are called: SENSOR=NAME each (`height=z`, `image=camera`), or NAME alone for one array of all sensors
    in the body's order. Arrays that are called as sensors by default, else `observations`, `observation` or
    `observation.state`."""
    reward: str | None = None
    """What the rewards are called, if there are some; `rewards`, `reward` or `next.reward` by default. Of them only
    the return is kept, with which imitators are compared."""
    episode: str | None = None
    """The number of the episode that each row is of; `episode_index` by default, if it is there."""
    fps: float | None = None
    """Frames of a film in a second of what it shows, where it is played slower or faster than it happened."""
    task: str | None = None
    """What they are demonstrations of."""
    out: Path = Path("demonstrations")
    """The new folder."""
    seed: int = 0
    """Decides which steps are scored."""

    def run(self) -> None:
        """Reads, checks, writes and scores, and prints what was found.

        Raises:
            AimeGymError: If something cannot be used; all problems are told at once, and nothing is written.
        """
        from aime_gym.data.demonstrations import FILMS, FilesOfOthers
        from aime_gym.world_model.checkpoint import load_config

        check_flags(self, 0, "seed")
        check_above_zero(self, "fps")
        if self.body is None and self.model is None:
            raise AimeGymError("Say whose demonstrations they are: --body walker, or --model MODEL.")
        config = load_config(self.model) if self.model else None
        body = get_embodiment(self.body) if self.body else config.body  # type: ignore[union-attr]
        if config is not None and config.embodiment != body.name:
            raise AimeGymError(f"--model {self.model} is of {config.embodiment}; --body is {body.name}.")
        if self.task is not None:
            body.check_task(self.task)
        console = make_console(soft_wrap=True, highlight=False)
        rate = None
        if any(file.lower().endswith(FILMS) for file in self.files):
            rate = _steps_a_second(body.name) if not body.env_lack else None
            clock = "each frame is a step" if rate is None else f"{rate:g} frames a second are taken, a step each"
            console.print(f"Films are cut to a square and made 64 x 64; {clock}.", markup=False)
        reads = FilesOfOthers(body, _arrays(self.observation), self.reward, self.episode, rate, self.fps)
        out = reads.write(self.files, self.out, self.task)
        self._ask(out, config, console)

    def _ask(self, out: Path, config: ModelConfig | None, console: Console) -> None:
        """Says what a model can see of demonstrations, and whether it can explain it."""
        from aime_gym.data.dataset import TrajectoryDataset
        from aime_gym.data.trajectories import trajectory_keys, trajectory_paths
        from aime_gym.world_model.checkpoint import bundled_models, load_config

        keys = trajectory_keys(trajectory_paths(out)[0])
        data = TrajectoryDataset(out, keys, "image" in keys)
        count, rows = len(data), int(data.bounds[-1, 1])
        console.print(
            f"{count} demonstration{'s' * (count > 1)} of {data.embodiment}, {rows:,} moments, are in {out}.",
            markup=False,
        )
        name = self.model
        if name is None:
            known = {one: load_config(one) for one in bundled_models()}
            ours = {one: own for one, own in known.items() if own.embodiment == data.embodiment}
            # One that can see them, else the one that lacks least of what it needs.
            name = min(ours, key=lambda one: (len({*ours[one].observed} - {*keys}), one), default=None)
            config = ours.get(name or "")
        if name is None or config is None:
            console.print(f"No bundled model is of {data.embodiment}: name one of yours (--model).", markup=False)
            return
        table = Table("sensor", "here", name)
        for sensor in dict.fromkeys([*keys, *config.observed]):
            here = "x".join(map(str, data.arrays[sensor].shape[1:])) if sensor in keys else "missing"
            table.add_row(sensor, here, "sees it" if sensor in config.observed else "does not see it")
        console.print(table)
        if missing := [sensor for sensor in config.observed if sensor not in keys]:
            there = {"visual"} if "image" in keys else set()
            there |= {s for s in ("lpomdp",) if {sensor.name for sensor in config.body.observed(s)} <= set(keys)}
            remedy = f"`aime-gym train DATA --dynamics {name} --setup {min(there)}` gives it other senses. " * bool(
                there
            )
            console.print(f"{name} also needs {', '.join(missing)}. {remedy}".strip(), style="bold", markup=False)
            return
        self._score(data, name, out, console)

    def _score(self, data: TrajectoryDataset, name: str, out: Path, console: Console) -> None:
        from aime_gym.envs.wrappers import SETTLING, explained
        from aime_gym.observations import to_tensors
        from aime_gym.parallel import so_many_threads
        from aime_gym.world_model.checkpoint import load_pretrained_model

        model = load_pretrained_model(name)
        if model.config.choices:
            lacks = "imitators infer actions that are numbers in [-1, 1], and its body chooses"
            console.print(f"They are not scored: {lacks}.", markup=False)
            return
        less = 4 if "image" in model.observed else 1
        windows, steps = WINDOWS // less, min(STEPS, data.longest)
        if steps <= SETTLING + 1:
            console.print(f"They are too short to be scored: {data.longest} moments at most.", markup=False)
            return
        rng = np.random.default_rng(self.seed)
        long = np.flatnonzero(data.bounds[:, 1] - data.bounds[:, 0] >= steps)
        chosen = rng.permutation(long)[np.arange(windows) % len(long)]
        begins = rng.integers(data.bounds[chosen, 0], data.bounds[chosen, 1] - steps + 1)
        rows = begins + np.arange(steps)[:, None]  # [T, B]
        with so_many_threads(1):
            seen = {sensor: data.arrays[sensor][rows] for sensor in model.observed}
            found = explained(model, to_tensors(seen), UPDATES, OWN // less)
        share = float(found.shares.mean())
        median = float(found.per_step[SETTLING:].median())
        console.print(
            f"Some actions explain {share:.0%} of {windows} windows of {steps} moments to {name}. The evidence of a "
            f"moment, under the best of all actions, is {median:.1f} nats in the median; of the model's own data it is "
            f"{found.usual:.1f}, and 99 of 100 have more than {found.threshold:.1f}.",
            markup=False,
        )
        if share >= WELL:
            told = f"It can explain what they show: aime-gym imitate --model {name} --demonstrations {out}"
        else:
            worst = int(found.shares.argmin())
            place = f"demonstration {chosen[worst]} from moment {begins[worst] - data.bounds[chosen[worst], 0]} on"
            told = (
                f"It can{' only in part' if share >= PARTLY else 'not'} explain what they show, and an imitator will "
                f"learn little; the worst is {place}. Usual causes: another clock than the body's, other units, signs "
                "or orders of numbers, noise, another body or camera, or moves that the model's data lack."
            )
        console.print(told, style="bold", markup=False)


def _arrays(words: tuple[str, ...]) -> dict[str, str]:
    """The flag --observation as sensor -> name of an array; "" for all sensors in one."""
    if len(words) == 1 and "=" not in words[0]:
        return {"": words[0]}
    for word in words:
        if not all(word.partition("=")):
            raise AimeGymError(f"--observation: expected SENSOR=NAME each, or one NAME alone; got {word!r}.")
    return {sensor: name for sensor, _, name in (word.partition("=") for word in words)}


def _steps_a_second(body: str) -> float:
    """How many agent steps a second has in the real env of a body."""
    from aime_gym.envs.real import make_real

    env = make_real(body)
    world: Any = env.unwrapped
    rate = 1 / world.control_timestep if world.control_timestep else float(world.metadata["render_fps"])
    env.close()
    return rate
