"""`aime-gym compare`: the returns of saved agents in both worlds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from aime_gym.errors import AimeGymError
from aime_gym.parallel import all_claimed


@dataclass
class Compare:
    """Evaluate agents in the dream and in the real env, from the same starts and seeds, and write a report.

    With --strangers, judge the model's dreams by a set of policies whose real returns are known.
    """

    agents: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Saved SB3 agents (zip files, or folders with an agent.zip), 'random' or 'zero'. Name only files you trust: but
    for those that `aime-gym dream` saves, they are code, as is a vecnormalize.pkl beside them, which is taken."""
    embodiment: str | None = None
    """The body; that of the model, or of the agents' own runs, or the walker by default."""
    task: str | None = None
    """One of its tasks; its first one by default."""
    episodes: int = 20
    """Episodes of each agent in each world; of strangers at most as many as they have real ones."""
    model: str | None = None
    """World model: a folder or a bundled name; the body's bundled one by default."""
    max_episode_steps: int | None = None
    """Agent steps of an episode; the body's own by default."""
    seed: int = 0
    """Seed of starts and episodes."""
    out: Path | None = None
    """Folder to write; runs/compare-<task>-<time> by default."""
    video_steps: int = 240
    """Agent steps of the best agent on film; 0 for no film."""
    strangers: Path | None = None
    """A set of `aime-gym strangers`, instead of agents: how well the dreams rank policies that they have never met."""
    trust: bool = False
    """Keep what was found in the model's folder (trust.json; of strangers also in its card), by which its dreams warn
    of themselves: agents count as the model's kin, by strangers trust is decided. The folder of a bundled model is
    written to if --model is its path. Five agents or more are needed, and whole episodes."""

    def run(self) -> None:
        """Compares, prints the table and writes returns.json and report.html.

        Raises:
            AimeGymError: If a name, a number, a file or a policy's spaces do not fit, or `out` holds something else.
        """
        # Imported late: torch, SB3 and matplotlib take seconds.
        from aime_gym.evaluation.compare import compare, fitting_obs_type, load_policy, model_for, name_policies
        from aime_gym.evaluation.report import write_report
        from aime_gym.evaluation.worlds import Worlds, find_subject
        from aime_gym.world_model.trust import check_kin, check_place, note_trust

        if self.strangers is not None:
            return self._judge(self.strangers)
        if not self.agents:
            raise AimeGymError("Expected at least one agent to compare: aime-gym compare runs/.../agent.zip random")
        policies = {name: load_policy(policy) for name, policy in name_policies(self.agents).items()}
        named, wanted = find_subject(self.embodiment, self.model, self.agents)
        model = model_for(policies.values(), named, wanted)
        if self.trust:
            check_place(model.folder, self.model)
            check_kin(len(policies), self.max_episode_steps)
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
                note_trust(model.folder, task, kin=comparison.metrics)
            kind = fitting_obs_type(policies[best], model)
            with Worlds(named, task, model, kind, self.max_episode_steps) as worlds:
                report = write_report(
                    out / "report.html", comparison, policies[best], best, worlds, video_steps=self.video_steps
                )
        print(f"Report: {report}")

    def _judge(self, folder: Path) -> None:
        """Judges the model by strangers, prints the table and writes returns.json."""
        from aime_gym.envs.dream_checks import load_model_of
        from aime_gym.evaluation.measure_trust import measure_trust, write_card
        from aime_gym.evaluation.strangers import StrangerSet
        from aime_gym.world_model.trust import check_place, note_trust

        strangers = StrangerSet.load(folder)
        asked = {"agents": self.agents, "--max-episode-steps": self.max_episode_steps}
        if any(asked.values()) or self.task not in (None, strangers.task):
            raise AimeGymError(
                f"--strangers takes the policies, the task {strangers.task} and whole episodes from {folder}: leave "
                "out agents, --task and --max-episode-steps."
            )
        _, model = load_model_of(self.embodiment or strangers.embodiment, self.model)
        if self.trust:
            check_place(model.folder, self.model)
        default = Path("runs") / f"strangers-{strangers.task}-{time.strftime('%Y%m%d-%H%M%S')}"
        written = [model.folder] if self.trust and model.folder is not None else []
        with all_claimed(self.out or default, *written) as (out, *_):
            _check_content(out, strangers.embodiment, strangers.task)
            found = measure_trust(model, strangers, self.episodes)
            print(found.comparison)
            found.comparison.to_json(out / "returns.json")
            if self.trust:
                assert model.folder is not None
                note_trust(model.folder, strangers.task, strangers=found.trust.strangers)
                print(f"Kept in {model.folder / 'trust.json'} and {write_card(model.folder)}.")


def _check_content(out: Path, body: str, task: str) -> None:
    """Raises an `AimeGymError` if a folder holds anything but a comparison at this task, which is made anew."""
    from aime_gym.evaluation.compare import Comparison

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
