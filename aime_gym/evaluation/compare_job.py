"""`aime-gym compare`: what saved agents are worth in both worlds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from aime_gym.claims import all_claimed
from aime_gym.errors import AimeGymError


@dataclass
class Compare:
    """Evaluate agents in the dream and in the real env, from the same starts and seeds, and write a report."""

    agents: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Saved SB3 agents (zip files, or folders with an agent.zip), 'random' or 'zero'. Name only files you trust: but
    for those that `aime-gym dream` saves, they are code, as is a vecnormalize.pkl beside them, which is taken."""
    embodiment: str | None = None
    """The body; that of the model, or of the agents' own runs, or the walker by default."""
    task: str | None = None
    """One of its tasks; its first one by default."""
    episodes: int = 20
    """Episodes of each agent in each world."""
    model: str | None = None
    """World model: a folder or a bundled name; the body's bundled one by default."""
    max_episode_steps: int | None = None
    """Agent steps of an episode; the body's own by default."""
    seed: int = 0
    """Of starts and episodes."""
    out: Path | None = None
    """Folder to write; runs/compare-<task>-<time> by default."""
    video_steps: int = 240
    """Agent steps of the best agent on film; 0 for no film."""
    trust: bool = False
    """Keep the correlations in the model's folder (trust.json), by which its dreams warn of themselves. Five policies
    or more are needed, and whole episodes."""

    def run(self) -> None:
        """Compares, prints the table and writes returns.json and report.html.

        Raises:
            AimeGymError: If a name, a number, a file or a policy's spaces do not fit, or `out` holds something else.
        """
        # Imported here: torch, SB3 and matplotlib take seconds, which other commands need not wait.
        from aime_gym.evaluation.compare import compare, fitting_obs_type, load_policy, model_for, name_policies
        from aime_gym.evaluation.report import write_report
        from aime_gym.evaluation.subject import find_subject
        from aime_gym.evaluation.worlds import Worlds
        from aime_gym.world_model.trust import check_trust, load_trust, save_trust

        if not self.agents:
            raise AimeGymError("Expected at least one agent to compare: aime-gym compare runs/.../agent.zip random")
        policies = {name: load_policy(policy) for name, policy in name_policies(self.agents).items()}
        named, wanted = find_subject(self.embodiment, self.model, self.agents)
        model = model_for(policies.values(), named, wanted)
        if self.trust:
            check_trust(model.folder, len(policies), self.max_episode_steps)
        body = model.config.body
        task = body.check_task(self.task or body.tasks[0])
        default = Path("runs") / f"compare-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
        written = [model.folder] if self.trust and model.folder is not None else []
        with all_claimed(self.out or default, *written) as (out, *_):
            _check_content(out, body.name, task)
            comparison = compare(
                policies,
                named,
                task,
                self.episodes,
                model,
                self.seed,
                max_episode_steps=self.max_episode_steps,
            )
            print(comparison)
            comparison.to_json(out / "returns.json")
            best = max(comparison.policies, key=lambda policy: policy.dream.mean).name
            if self.trust:
                assert model.folder is not None
                save_trust(model.folder, load_trust(model.folder) | {task: comparison.metrics})
            kind = fitting_obs_type(policies[best], model)
            with Worlds(named, task, model, kind, self.max_episode_steps) as worlds:
                report = write_report(
                    out / "report.html", comparison, policies[best], best, worlds, video_steps=self.video_steps
                )
        print(f"Report: {report}")


def _check_content(out: Path, body: str, task: str) -> None:
    """Raises an `AimeGymError` if a folder holds anything but a comparison at this task, which is made anew."""
    from aime_gym.evaluation.comparison import Comparison

    if (out / "job.json").exists():
        raise AimeGymError(f"{out} is the folder of an `aime-gym dream`: choose another --out.")
    others = sorted({path.name for path in out.glob("[!.]*")} - {"returns.json", "report.html"})
    if others:
        raise AimeGymError(f"{out} holds something else than a comparison ({', '.join(others)}): choose another --out.")
    if (out / "returns.json").exists():
        there = Comparison.from_json(out / "returns.json")
        if (there.embodiment, there.task) != (body, task):
            raise AimeGymError(
                f"{out} holds a comparison at {there.embodiment} {there.task}, this one is at {body} {task}: choose "
                "another --out."
            )
