"""`aime-gym compare` and `aime-gym explain`: what agents earn in both worlds, and why the dream errs about them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aime_gym.errors import AimeGymError
from aime_gym.files import write_atomically
from aime_gym.flags import Options, check_flags, command_line
from aime_gym.parallel import all_claimed

if TYPE_CHECKING:
    from aime_gym.evaluation.explanation import Explanation
    from aime_gym.evaluation.strangers import Stranger

RESULT, PICTURE = "explain.json", "explain.png"


@dataclass
class Compare(Options):
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
    """Episodes of each agent in the dream; of strangers at most as many as they have real ones."""
    real_episodes: int | None = None
    """Episodes of each agent in the real env; as many as --episodes by default. With 0 no real env is made: returns in
    it are predicted, each with its 90% interval."""
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
        from aime_gym.evaluation.compare import compare
        from aime_gym.evaluation.predict import Predictor
        from aime_gym.evaluation.report import write_report
        from aime_gym.evaluation.returns import load_policy, name_policies
        from aime_gym.evaluation.worlds import Worlds, find_subject, fitting_obs_type, model_for
        from aime_gym.world_model.trust import check_kin, check_place, note_trust

        check_flags(self, 0, "real_episodes")
        if self.strangers is not None:
            return self._judge(self.strangers)
        if not self.agents:
            raise AimeGymError("Expected at least one agent to compare: aime-gym compare runs/.../agent.zip random")
        policies = {name: load_policy(policy) for name, policy in name_policies(self.agents).items()}
        named, wanted = find_subject(self.embodiment, self.model, self.agents)
        model = model_for(policies.values(), named, wanted)
        body = model.config.body
        task = body.check_task(self.task or body.tasks[0])
        if self.trust:
            check_place(model.folder, self.model)
            check_kin(len(policies), self.max_episode_steps)
            if self.real_episodes is not None:
                raise AimeGymError("--trust compares as many real episodes as dreams: leave out --real-episodes.")
        if self.real_episodes == 0:
            Predictor(model, task, self.max_episode_steps)  # which says early what it lacks
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
                real_episodes=self.real_episodes,
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
        asked = (self.agents, self.max_episode_steps, self.real_episodes is not None)
        if any(asked) or self.task not in (None, strangers.task):
            raise AimeGymError(
                f"--strangers takes the policies, the task {strangers.task} and whole episodes from {folder}: leave "
                "out agents, --task, --max-episode-steps and --real-episodes."
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


@dataclass
class Explain(Options):
    """Say why a model's dreams err about policies, share by share.

    The shares are those of the posterior, the reward head, the prior by horizon, the feedback through the policy, the
    sampling of latents, and the starts. They sum to the dream's reward a step less the real one.
    """

    model: Annotated[str, tyro.conf.Positional]
    """World model: a folder or a bundled name."""
    policies: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files of plain policies, folders of `aime-gym strangers`, saved agents (zip files, or folders with an agent.zip;
    name only those that you trust, see `aime-gym compare`), 'random' or 'zero'."""
    task: str | None = None
    """One of its tasks; that of the strangers, or the first one of the body, by default."""
    embodiment: str | None = None
    """The id of another env with the model's spaces."""
    most: int = 10
    """Policies of each folder of strangers: as many of each family, from its worst to its best; 0 for all."""
    episodes: int = 10
    """Episodes of each policy in each world."""
    check: int = 0
    """Other paired episodes of each policy, whose gap is shown beside the sum of the shares."""
    max_episode_steps: int | None = None
    """Agent steps of an episode; the body's own by default."""
    seed: int = 0
    """Seed of starts and episodes."""
    out: Path | None = None
    """Folder to write; runs/explain-<model>-<task> by default."""
    card: bool = False
    """Write the table into the card in the model's folder (README.md), too, in place of an older one of the task."""

    def run(self) -> None:
        """Explains, prints the tables and writes explain.json and explain.png, also after Ctrl-C what is there.

        Raises:
            AimeGymError: If a name, a number, a file or a policy's spaces do not fit, or `out` holds something else.
        """
        # Imported late: torch, SB3 and matplotlib take seconds.
        from aime_gym.envs.dream_checks import choose_task, load_model_of
        from aime_gym.evaluation.charts import shares_picture
        from aime_gym.evaluation.explain import explain
        from aime_gym.parallel import job_progress

        check_flags(self, 1, "episodes", "max_episode_steps")
        check_flags(self, 0, "most", "check", "seed")
        body, model = load_model_of(self.embodiment, self.model)
        body.check_env("its dreams can only be compared with one another: `aime-gym compare --real-episodes 0`.")
        policies, told = self._load(body.name)
        task = choose_task(body, model, self.task or told)
        if self.card and (model.folder is None or not (model.folder / "README.md").is_file()):
            raise AimeGymError(f"--card writes into the README.md of a model's folder; {self.model} has none.")
        name = model.folder.name if model.folder else body.slug
        out = self.out or Path("runs") / f"explain-{name}-{task}"
        written = [model.folder] if self.card and model.folder is not None else []
        with all_claimed(out, *written):
            _check_explanation(out, body.name, task)
            done: list[Explanation] = []
            try:
                with job_progress(f"Explaining dreams of {name}", len(policies), "policies") as advance:

                    def keep(explanation: Explanation) -> None:
                        done.append(explanation)
                        explanation.to_json(out / RESULT)
                        advance()

                    explain(
                        model,
                        policies,
                        task,
                        self.embodiment,
                        self.episodes,
                        self.seed,
                        self.max_episode_steps,
                        check=self.check,
                        watch=keep,
                    )
            finally:  # also what was explained before Ctrl-C
                if done:
                    print(done[-1])
                    write_atomically(out / PICTURE, shares_picture(done[-1]))
                    print(f"{out / RESULT} and {PICTURE} hold it.")
            if self.card and model.folder is not None:
                card = model.folder / "README.md"
                write_atomically(card, with_section(card.read_text(encoding="utf-8"), done[-1], command_line(self)))

    def _load(self, body: str) -> tuple[dict[str, Any], str | None]:
        """The policies by name, and the task of the strangers among them."""
        from aime_gym.evaluation.returns import load_policy, name_policies
        from aime_gym.evaluation.strangers import INDEX, StrangerSet

        folders = [Path(word) for word in self.policies if (Path(word) / INDEX).is_file()]
        sets = [StrangerSet.load(folder) for folder in folders]
        others = [word for word in self.policies if Path(word) not in folders]
        policies: dict[str, Any] = {}
        for strangers in sets:
            if strangers.embodiment != body:
                raise AimeGymError(f"The strangers are of {strangers.embodiment}, and the model is of {body}.")
            for member in spread(strangers.members, self.most):
                known = member.name in policies
                policies[f"{member.name} #{len(policies)}" if known else member.name] = member.policy
        tasks = {strangers.task for strangers in sets}
        if len(tasks) > 1 and self.task is None:
            raise AimeGymError(
                f"These strangers are of several tasks ({', '.join(sorted(tasks))}): choose one by --task."
            )
        if others:
            policies |= {name: load_policy(policy) for name, policy in name_policies(others).items()}
        if not policies:
            raise AimeGymError("Expected at least one policy: aime-gym explain MODEL strangers/walker-walk random")
        return policies, next(iter(tasks), None)


def spread(members: Sequence[Stranger], most: int) -> list[Stranger]:
    """So many of a set, in its order: as many of each family, evenly from the one that earns least to its best.

    Args:
        members: The members of a set.
        most: How many; 0 for all.
    """
    if not most or len(members) <= most:
        return list(members)
    families: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        families.setdefault(member.family, []).append(index)
    for own in families.values():
        own.sort(key=lambda index: sum(members[index].returns) / max(1, len(members[index].returns)))
    quota = dict.fromkeys(families, 0)
    while sum(quota.values()) < most:
        open_to = [family for family, own in families.items() if quota[family] < len(own)]
        quota[min(open_to, key=lambda family: quota[family])] += 1
    chosen = [
        own[round(place * (len(own) - 1) / max(1, quota[family] - 1)) if quota[family] > 1 else len(own) - 1]
        for family, own in families.items()
        for place in range(quota[family])
    ]
    return [members[index] for index in sorted(chosen)]


def with_section(card: str, explanation: Explanation, command: str) -> str:
    """A card with the table of a task, in place of the one that is there or at its end."""
    begin, end = f"<!-- explain {explanation.task} -->", f"<!-- /explain {explanation.task} -->"
    section = f"""{begin}
## Why its dreams err: {explanation.task}

Shares of the dream's error in reward a step, over {explanation.episodes} paired episodes of each policy (`{command}`);
they sum to the error. `head in the dream` is what the reward head pays for the dream's own states beyond the task's
formula. `aime_gym.evaluation.explain.explain` says what each share is.

{explanation.to_markdown()}
{end}"""
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if pattern.search(card):
        return pattern.sub(lambda _: section, card, count=1)
    return f"{card.rstrip()}\n\n{section}\n"


def _check_explanation(out: Path, body: str, task: str) -> None:
    """Raises an `AimeGymError` if a folder holds anything but an explanation at this task, which is made anew."""
    from aime_gym.evaluation.explanation import Explanation

    others = sorted({path.name for path in out.glob("[!.]*")} - {RESULT, PICTURE})
    if others:
        raise AimeGymError(
            f"{out} holds something else than an explanation ({', '.join(others)}): choose another --out."
        )
    if (out / RESULT).exists():
        there = Explanation.from_json(out / RESULT)
        if (there.embodiment, there.task) != (body, task):
            raise AimeGymError(
                f"{out} holds an explanation at {there.embodiment} {there.task}, this one is at {body} {task}: choose "
                "another --out."
            )
