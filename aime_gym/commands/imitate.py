"""`aime-gym imitate`: an agent from demonstrations without actions, tried in the world."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.files import write_json
from aime_gym.flags import check_above_zero, check_flags
from aime_gym.parallel import claimed, make_console

if TYPE_CHECKING:
    from aime_gym.agents.imitator import Imitator
    from aime_gym.evaluation.returns import Episodes

Algorithm = Literal["aime", "online", "bco", "iidm", "bc"]

FROM_RESETS = "real_from_resets"
"""In returns.json: real episodes as the demonstrations begin, the paper's protocol; the same as in score.json."""
STARTS = (
    "Both worlds of `policies` begin where the model's dreams do, at moments of the data, and not at resets of the env."
)
_FILES = ("agent", "score.json", "returns.json", "report.html")


@dataclass
class Imitate:
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
    """Windows an update; by default 32 for 'aime', 16 for 'online' and 50 for the baselines."""
    horizon: int = 32
    """Steps of a window, of 'aime' and 'online'."""
    lr: float | None = None
    """Adam's learning rate; by default 5e-4 for 'aime', 3e-4 for 'online' and 1e-3 for the baselines."""
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
            self._imitate(folder, out, console)

    def _imitate(self, folder: Path, out: Path, console: Console) -> None:
        from aime_gym.agents.imitator import MONITOR
        from aime_gym.data.demonstrations import expert_return
        from aime_gym.data.trajectories import read_metadata, recorded_tasks
        from aime_gym.training.callbacks import JsonLog, ProgressBar

        agent = self.make_agent()
        agent.check_data()
        self._find_body(agent)
        shown = recorded_tasks(read_metadata(folder))
        task = self._task_of(agent, shown)
        expert = expert_return(folder) if shown <= {task} else None  # a return at another task says nothing
        console.print(
            f"{self.algo.upper()} imitates {folder} with {self.model}. Ctrl-C stops it; --out {out} resumes it.",
            markup=False,
        )
        agent.tensorboard_log = out / "run" / "tensorboard" if self.tensorboard else None
        log = JsonLog(out / "run" / "log.jsonl", 50)
        bar = ProgressBar(f"Imitating {folder.name}", MONITOR)
        if self.algo == "online":
            self._learn_online(agent, task, [log, bar], out / "run", console)
        else:
            agent.learn(self.updates, [log, bar], out / "run")
        agent.save(out / "agent")
        self._evaluate(agent, out, task, expert, console)

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

        settings = {key: value for key, value in asdict(self).items() if key != "out" and value is not None}
        told = {**settings, "task": task, "setup": agent.model.config.setup, "expert_return": expert}
        write_json(out / "settings.json", told)
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
        from aime_gym.evaluation.returns import episode_returns
        from aime_gym.evaluation.worlds import REAL_SLOTS, fitting_obs_type, make_real_envs

        config = agent.model.config
        envs = make_real_envs(
            config.embodiment,
            min(REAL_SLOTS, self.episodes),
            task=task,
            obs_type=fitting_obs_type(agent, agent.model),
            setup=config.setup,
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
