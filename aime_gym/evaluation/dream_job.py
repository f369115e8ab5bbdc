"""The main job: an agent learns inside the dream, then shows in both worlds what it learned."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from aime_gym.files import write_json
from aime_gym.flags import check_above_zero, check_flags
from aime_gym.registration import DREAM, REAL

if TYPE_CHECKING:
    from aime_gym.evaluation.worlds import Worlds

Algorithm = Literal["shac", "ppo", "sac", "td3"]
PENALTY = 0.01
"""Keeps agents out of the holes of a model that has seen no rounds of agents: see benchmarks/README.md."""


@dataclass
class Dream:
    """Train an SB3 agent inside the dream, compare it with the real env, and write one folder with a report."""

    embodiment: str = "walker"
    """The body."""
    task: str | None = None
    """One of its tasks; its first one by default."""
    model: str | None = None
    """World model: a folder or a bundled name; the body's bundled one by default."""
    algo: Algorithm = "shac"
    """Of the agent: 'shac' learns from the gradient of the dream, the others are Stable-Baselines3's own."""
    steps: int = 8_000_000
    """Agent steps in the dream, all slots together."""
    minutes: float = 6.0
    """Training stops here, even with fewer steps."""
    slots: int = 64
    """Dreams side by side."""
    horizon: int = 125
    """Agent steps of a dream while training."""
    start: Literal["reset", "dataset"] = "dataset"
    """Where training dreams begin: at the resets of real episodes, or anywhere in the data."""
    deterministic: bool = False
    """Whether training dreams go on with the means of latents rather than samples."""
    uncertainty_penalty: float | None = None
    """Weight of the disagreement of posterior and prior, in nats, subtracted from the reward while training; by default
    0.01 with a model whose dreams are not known to deserve trust (see `aime-gym compare --trust`), and 0 with others
    and with models of images, whose disagreement costs an image a step."""
    max_disagreement: float | None = None
    """A training dream ends where posterior and prior disagree by more than so many nats; never by default."""
    trials: int = 5
    """Real episodes a minute of training, to keep the agent that does best in the world; 0 to train in the dream alone
    and keep the last agent."""
    patience: int | None = None
    """Training stops after so many minutes in a row without a better trial."""
    episodes: int = 20
    """Episodes of the evaluation, in each world."""
    max_episode_steps: int | None = None
    """Agent steps of an evaluation episode; the body's own by default."""
    video_steps: int = 240
    """Agent steps on film; 0 for no film."""
    threads: int = 1
    """Of torch: more than one pays on an idle machine only, and costs dearly beside other jobs."""
    seed: int = 0
    """Of everything."""
    out: Path | None = None
    """Folder to write; runs/dream-<task>-<time> by default."""
    quick: bool = False
    """About two minutes: fewer steps and episodes, a shorter film. For a first look."""

    def run(self) -> None:
        """Trains, evaluates and reports. Ctrl-C ends the training early and goes on with the agent so far.

        Raises:
            AimeGymError: If names, files or numbers do not fit together.
        """
        # Imported here: torch, SB3 and matplotlib take seconds, which other commands need not wait.
        import torch

        from aime_gym.agents.dreaming import learn, make_agent
        from aime_gym.agents.standardised import observation_statistics
        from aime_gym.envs.sb3 import make_sb3_env
        from aime_gym.evaluation.compare import compare
        from aime_gym.evaluation.report import write_report
        from aime_gym.evaluation.worlds import Worlds

        if self.quick:
            self.steps, self.minutes = min(self.steps, 300_000), min(self.minutes, 1.0)
            self.episodes, self.video_steps = min(self.episodes, 5), min(self.video_steps, 100)
        check_flags(self, 1, "steps", "slots", "horizon", "patience", "episodes", "max_episode_steps", "threads")
        check_flags(self, 0, "trials", "video_steps", "seed")
        check_above_zero(self, "minutes", "max_disagreement")
        torch.set_num_threads(self.threads)
        console = Console(soft_wrap=True, highlight=False)
        worlds = Worlds(self.embodiment, self.task, self.model, max_episode_steps=self.max_episode_steps)
        try:
            out = self.out or Path("runs") / f"dream-{worlds.task}-{time.strftime('%Y%m%d-%H%M%S')}"
            out.mkdir(parents=True, exist_ok=True)
            console.print(
                f"{self.algo.upper()} learns {worlds.embodiment.name} {worlds.task} in {self.slots} dreams of "
                f"{worlds.model_name}: {self.steps:,} steps or {self.minutes:g} minutes. Ctrl-C ends it early.",
                markup=False,
            )
            envs = make_sb3_env(
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
                uncertainty_penalty=self._penalty(worlds),
                max_disagreement=self.max_disagreement,
            )
            agent = make_agent(self.algo, envs, observation_statistics(envs), self.seed)
            curve = learn(
                agent,
                out / "agent.zip",
                console,
                self.steps,
                self.minutes,
                self.horizon,
                worlds.max_episode_steps,
                self._make_world(worlds) if self.trials else None,
                self.patience,
            )
            envs.close()
            console.print(f"Evaluating {self.episodes} episodes in the dream and in the real env ...")
            name = f"{self.algo.upper()} from the dream"
            comparison = compare(
                {name: agent, "random": "random"},
                worlds.embodiment.name,
                worlds.task,
                self.episodes,
                worlds.model,
                self.seed,
                max_episode_steps=worlds.max_episode_steps,
            )
            comparison.to_json(out / "returns.json")
            console.print(comparison.table())
            settings = {key: value for key, value in asdict(self).items() if key != "out" and value is not None}
            write_json(out / "job.json", {"settings": settings, "curve": curve})
            write_report(out / "report.html", comparison, agent, name, worlds, curve, settings, self.video_steps)
            console.print(comparison.verdict, style="bold", markup=False)
            console.print(f"agent.zip, returns.json and report.html are in {out}", markup=False)
        finally:
            worlds.close()

    def _penalty(self, worlds: Worlds) -> float:
        from aime_gym.world_model.trust import is_trusted

        if self.uncertainty_penalty is not None:
            return self.uncertainty_penalty
        needs_none = is_trusted(worlds.model.folder, worlds.task) or "image" in worlds.model.observed
        return 0.0 if needs_none else PENALTY

    def _make_world(self, worlds: Any) -> Any:
        """Real envs for the trials, whose seeds are not those of the evaluation."""
        from aime_gym.envs.sb3 import make_sb3_env

        return make_sb3_env(
            REAL,
            embodiment=worlds.embodiment.name,
            n_envs=self.trials,
            seed=self.seed + 1_000_000,
            wrap=worlds.wrap,
            **worlds.real_options(),
        )
