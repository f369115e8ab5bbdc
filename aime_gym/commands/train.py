"""The commands `aime-gym train`, `refine` and `fit-heads`: their flags, and what they ask for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aime_gym.errors import AimeGymError
from aime_gym.files import json_text, read_json, weights_digest, write_atomically, write_json
from aime_gym.flags import CONTENT, HeadsOptions, Options, TrainingOptions, check_above_zero, check_flags, command_line
from aime_gym.parallel import claimed, generators_kept, so_many_threads

if TYPE_CHECKING:
    from aime_gym.data.dataset import TrajectoryDataset
    from aime_gym.evaluation.strangers import StrangerSet
    from aime_gym.world_model.model import WorldModel

REFINED = "refine.json"
"""What a refinement changed; written last."""
MOST = 150
"""Episodes of a kind that a refinement learns from, spread evenly over those that are given."""


@dataclass
class Train(TrainingOptions):
    """Train a world model on trajectories, then its heads; the same command again resumes a stopped run.

    Examples:
        >>> from pathlib import Path
        >>> import aime_gym
        >>> aime_gym.Collect("pendulum", trajectories=2, out=Path("data"), workers=1).run()
        Collecting data...
        >>> small = {"memory_dim": 16, "hidden_size": 16, "batch_size": 4, "horizon": 16}
        >>> heads = aime_gym.HeadsOptions(updates=2)
        >>> aime_gym.Train((Path("data"),), out=Path("models/mine"), updates=2, heads=heads, **small).run()
        The model is in models/mine...
    """

    def run(self) -> None:
        """Trains, fits heads, writes the model folder and prints where it is and how good it is.

        Raises:
            AimeGymError: If data sets do not fit together, the folder holds another run, or a loss is not finite.
            KeyboardInterrupt: After Ctrl-C; the checkpoint is saved, but for a second Ctrl-C.
        """
        try:
            self.train()
        except KeyboardInterrupt:
            print(f"To go on: {command_line(self)}")
            raise

    def train(self) -> None:
        """Does what `run` does, for callers that say themselves how to go on after Ctrl-C."""
        from aime_gym.training.train import TrainingRun  # it imports torch, which takes seconds

        TrainingRun.of(self).train()


@dataclass
class FitHeads(Options):
    """Fit heads for rewards, doubt and physics to any model, a released AIME one too, into a new model folder."""

    model: Annotated[str, tyro.conf.Positional]
    """A bundled name or a model folder."""
    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trajectories with physics, as `aime-gym collect` makes them."""
    out: Path = Path("models/with-heads")
    """The new model folder."""
    heads: HeadsOptions = field(default_factory=HeadsOptions)
    """What is fitted."""
    held_out: float = 0.1
    """Share of each data set's trajectories that is only evaluated on."""
    seed: int = 0
    """Seed of weights, split and windows."""

    def run(self) -> None:
        """Fits, writes the folder and prints where it is and how good it is.

        Raises:
            AimeGymError: If the model or the data are broken or of different bodies, or the data lack physics or what
                the model observes and predicts.
        """
        with claimed(self.out):
            self._fit()

    def _fit(self) -> None:
        # Imported late: torch takes seconds.
        from aime_gym.data.dataset import read_data_sets
        from aime_gym.training.fit_heads import check_labels, check_tasks
        from aime_gym.training.model_folder import check_parts, claim_model_folder, finish_model_folder, split_by_name
        from aime_gym.world_model.checkpoint import load_pretrained_model

        model = load_pretrained_model(self.model)
        if model.folder is not None and Path(model.folder).resolve() == self.out.resolve():
            raise AimeGymError(f"--out {self.out} is the folder of the model itself; give a new one.")
        check_flags(self, 0, "seed")
        body = model.config.embodiment
        datasets = read_data_sets(self.datasets, model.decodes_images)
        if datasets[0].body and datasets[0].body.name != body:
            raise AimeGymError(f"The data are of {datasets[0].embodiment}; the model {self.model} is of {body}.")
        parts = split_by_name(self.datasets, datasets, self.held_out, self.seed)
        check_parts(parts, model.config.body, model.config.setup)
        if self.heads.updates:
            check_tasks(model.config.body, self.heads.tasks)
            for part, _ in parts.values():
                check_labels(model.config.body, part)
        claim_model_folder(self.out, "fit-heads.json", asdict(self))
        finish_model_folder(model, self.out, parts, self.heads, self.seed, self, {"base": self.model})


@dataclass
class Refine(Options):
    """Correct a model by a few real episodes of a policy that its dreams misjudge, in some minutes on one core.

    The same command again resumes a stopped run. The model of before stays as it is.

    Examples:
        >>> from pathlib import Path
        >>> import aime_gym
        >>> aime_gym.Collect("pendulum", trajectories=2, out=Path("met"), workers=1).run()
        Collecting met...
        >>> aime_gym.Refine("pendulum-state", (Path("met"),), out=Path("models/new"), updates=2, head_updates=2).run()
        No policy on sensors was named...
    """

    model: Annotated[str, tyro.conf.Positional]
    """A model of sensors: a folder or a bundled name."""
    episodes: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of the policy's real episodes, as `aime-gym collect --policy` makes them."""
    policy: str | None = None
    """The policy: the file of a saved SB3 agent (name only files you trust, see `aime-gym compare`) or of a plain one,
    whose dreams are judged before and after. A plain one that a folder of episodes names need not be named again."""
    collect: int = 5
    """Real episodes of --policy to collect where no folder is given."""
    task: str | None = None
    """The task; that of the episodes, or the first one of the body, by default."""
    rehearse: tuple[Path, ...] = ()
    """Folders of data that the model has learned from, by which it shall not forget; by default it rehearses dreams of
    its own."""
    strangers: Path | None = None
    """A set of `aime-gym strangers`: how dreams of other policies err, before and after."""
    out: Path | None = None
    """The new model folder; models/{model}-refined by default."""
    updates: int = 500
    """Gradient steps of the model."""
    head_updates: int = 150
    """Gradient steps of its heads."""
    share: float = 0.5
    """Share of each batch that is of the new episodes."""
    lr: float = 3e-4
    """Adam's learning rate, with cosine decay."""
    seed: int = 0
    """Seed of everything."""
    threads: int = 1
    """CPU threads."""

    def run(self) -> None:
        """Refines, writes the folder and prints how the dreams erred before and how they err now.

        Raises:
            AimeGymError: If the model, the policy and the episodes do not fit together, the folder holds something
                else, or a loss is not finite.
            KeyboardInterrupt: After Ctrl-C; the checkpoint is saved, but for a second Ctrl-C.
        """
        try:
            with generators_kept(), so_many_threads(self.threads):
                self._run()
        except KeyboardInterrupt:
            print(f"To go on: {command_line(self)}")
            raise

    def _run(self) -> None:
        from aime_gym.commands.collect import collect
        from aime_gym.data.dataset import TrajectoryDataset
        from aime_gym.data.trajectories import data_digest
        from aime_gym.evaluation.strangers import StrangerSet
        from aime_gym.training.model_folder import claim_model_folder
        from aime_gym.training.refine import labelled
        from aime_gym.world_model.checkpoint import load_pretrained_model

        model = load_pretrained_model(self.model)
        body, before = model.config.body, model.folder
        assert before is not None
        out = self.out or Path("models") / f"{before.name}-refined"
        self._check(model, out)
        strangers = None if self.strangers is None else StrangerSet.load(self.strangers)
        if strangers is not None and strangers.embodiment != body.name:
            raise AimeGymError(f"The strangers are of {strangers.embodiment}; {self.model} is of {body.name}.")
        data, own = (_read(folders, model) for folders in (self.episodes, self.rehearse))
        task = self._task(model)
        policy = self._policy(model)
        with claimed(out):
            sources = (*self.episodes, *self.rehearse)
            content = {f"{CONTENT}{source}": data_digest(source, images=False) for source in sources}
            content[f"{CONTENT}model"] = weights_digest(before)
            claim_model_folder(out, REFINED, {**asdict(self), **content}, {"out", "threads"})
            if (out / REFINED).exists():
                print(_told(read_json(out / REFINED)) + f"\n{out} is complete.")
                return
            taken = self.episodes
            if data is None:
                assert self.policy is not None
                taken = (out / "run" / "episodes",)
                collect(body.name, task, self.policy, self.collect, taken[0], seed=self.seed)
                data = labelled(model, TrajectoryDataset(taken))
            told: dict[str, Any] = {
                "task": task,
                "policy": policy and policy[0],
                "episodes": len(data),
                "command": command_line(self),
            }
            begin = time.monotonic()
            refined = self._refine(model, data, own, out)
            told["minutes"] = round((time.monotonic() - begin) / 60, 1)
            _write(refined, before, out, (*taken, *self.rehearse))
            now = load_pretrained_model(out)
            told |= _errors(model, now, data, None if policy is None else policy[1], task)
            told |= {} if strangers is None else _errors_of_strangers(model, now, strangers)
            write_atomically(out / "README.md", _card(out.name, self.model, told, asdict(self)))
            write_json(out / REFINED, told)
        print(_told(told) + f"\nThe model is in {out}.")

    def _refine(
        self, model: WorldModel, data: TrajectoryDataset, own: TrajectoryDataset | None, out: Path
    ) -> WorldModel:
        from aime_gym.training.callbacks import Checkpoint, JsonLog
        from aime_gym.training.refine import dreams_of, refine

        run = out / "run"
        rehearsed = dreams_of(model, seed=self.seed) if own is None else own
        kept = Checkpoint(run / "checkpoints", every_minutes=1.0)
        hooks = [JsonLog(run / "log.jsonl"), kept]
        return refine(
            model,
            data,
            rehearsed,
            self.updates,
            self.head_updates,
            share=self.share,
            lr=self.lr,
            seed=self.seed,
            hooks=hooks,
            checkpoint=kept.last,
        )

    def _check(self, model: WorldModel, out: Path) -> None:
        """Checks what can be told before anything is read."""
        check_flags(self, 1, "updates", "collect", "threads")
        check_flags(self, 0, "head_updates", "seed")
        check_above_zero(self, "lr", "share")
        if self.share >= 1:
            raise AimeGymError(f"--share lies between 0 and 1; got {self.share}.")
        if model.decodes_images:
            raise AimeGymError(
                f"{self.model} is a model of images, and models of sensors are refined: `aime-gym train --dynamics` "
                "gives a refined one its senses anew."
            )
        assert model.folder is not None
        if model.folder.resolve() == out.resolve():
            raise AimeGymError(f"--out {out} is the folder of the model itself; give a new one.")
        if not self.rehearse and not (model.folder / "starts.npz").is_file():
            raise AimeGymError(f"{self.model} has no starts.npz to dream from: give its own data by --rehearse.")
        if not self.episodes and self.policy is None:
            raise AimeGymError(
                "Expected real episodes, or a policy to collect them with: aime-gym refine MODEL EPISODES, or aime-gym "
                "refine MODEL --policy agent.zip"
            )

    def _task(self, model: WorldModel) -> str:
        from aime_gym.data.trajectories import read_metadata, recorded_tasks
        from aime_gym.envs.dream_checks import choose_task

        recorded = set[str]().union(*(recorded_tasks(read_metadata(folder)) for folder in self.episodes))
        if len(recorded | {self.task} - {None}) > 1:
            found, wanted = ", ".join(sorted(recorded)), self.task or "one task"
            raise AimeGymError(f"The rewards of these episodes are of {found}; expected {wanted}.")
        return choose_task(model.config.body, model, next(iter(recorded), self.task))

    def _policy(self, model: WorldModel) -> tuple[str, Any] | None:
        """The policy whose dreams are judged, with its name; None where none is known or it does not see sensors."""
        from aime_gym.agents.numpy_policies import PLAIN
        from aime_gym.agents.sb3 import seen_by
        from aime_gym.data.trajectories import POLICY, read_metadata
        from aime_gym.evaluation.returns import as_policy, load_policy
        from aime_gym.files import digest_of
        from aime_gym.observations import action_space

        path = None if self.policy is None else Path(self.policy)
        for told in map(read_metadata, self.episodes):
            named = Path(str(told.get("policy")))  # a file may name a plain policy alone: others are code
            if path is None and named.suffix == PLAIN and named.is_file() and digest_of(named) == told.get(POLICY):
                path = named
        if path is None:
            return None
        loaded, body = load_policy(path), model.config.body
        sees = seen_by(loaded, body, str(path)) == {"obs_type": "state"}
        return (path.stem, as_policy(loaded, action_space(body))) if sees else None


def _read(folders: tuple[Path, ...], model: WorldModel) -> TrajectoryDataset | None:
    """Real episodes that fit a model, labelled; None if there are no folders."""
    from aime_gym.data.dataset import TrajectoryDataset
    from aime_gym.training.model_folder import check_parts, evenly
    from aime_gym.training.refine import labelled

    if not folders:
        return None
    data, config = TrajectoryDataset(folders), model.config
    if data.embodiment not in (None, config.embodiment):
        raise AimeGymError(f"The episodes are of {data.embodiment}; the model is of {config.embodiment}.")
    check_parts({", ".join(map(str, folders)): (data, data)}, config.body, config.setup, config.use_reward)
    return labelled(model, evenly(data, min(1.0, MOST / len(data))))


def _write(refined: WorldModel, before: Path, out: Path, sources: tuple[Path, ...]) -> None:
    """Writes the model's folder with the starts of the model of before, and without what was measured of that one."""
    from aime_gym.data.trajectories import write_provenance
    from aime_gym.world_model.checkpoint import save_model

    save_model(refined, out)
    if (before / "starts.npz").is_file():
        shutil.copyfile(before / "starts.npz", out / "starts.npz")
    write_provenance(out, sources, [before])


def _errors(before: WorldModel, after: WorldModel, data: TrajectoryDataset, policy: Any, task: str) -> dict[str, Any]:
    """How both models predict the episodes, and what their dreams promise the policy."""
    from aime_gym.evaluation.measure_trust import dream_recorded
    from aime_gym.training.model_folder import prediction_error

    pair = {"before": before, "after": after}
    nmse = {when: prediction_error(model, data)["nmse"] for when, model in pair.items()}
    if policy is None:
        return {"nmse": nmse}
    dreams = {when: dream_recorded(model, policy, data, task) for when, model in pair.items()}
    real = float(dreams["before"][1].mean())
    return {"nmse": nmse, "real": real, "dream": {when: dream.mean for when, (dream, _) in dreams.items()}}


def _errors_of_strangers(before: WorldModel, after: WorldModel, strangers: StrangerSet) -> dict[str, Any]:
    """The mean error of the dreams of both about policies that are strangers to both."""
    from aime_gym.evaluation.measure_trust import measure_trust

    found = [(measure_trust(model, strangers).trust.strangers or {})["returns"] for model in (before, after)]
    names = [name for name in found[0] if name in found[1]]
    errors = [sum(abs(told[name]["dream"] - told[name]["real"]) for name in names) / len(names) for told in found]
    return {"strangers": {"policies": len(names), "before": errors[0], "after": errors[1]}}


def _told(told: Mapping[str, Any]) -> str:
    """What was found, in sentences."""
    from aime_gym.evaluation.returns import rounded

    nmse, lines = told["nmse"], []
    if "dream" in told:
        real, dream = told["real"], told["dream"]
        error = {when: rounded(abs(value - real)) for when, value in dream.items()}
        lines.append(
            f"Error of the dream about {told['policy']} at {told['task']}: {error['before']} before, {error['after']} "
            f"after. Its {told['episodes']} real episodes earned {rounded(real)}; dreamt {rounded(dream['before'])} "
            f"before, {rounded(dream['after'])} after."
        )
    else:
        lines.append("No policy on sensors was named: what its dreams promise is not measured.")
    lines.append(f"Error of predicting these episodes (NMSE): {nmse['before']:.3g} before, {nmse['after']:.3g} after.")
    if "strangers" in told:
        others = told["strangers"]
        lines.append(
            f"Mean error about {others['policies']} strangers of other runs: {rounded(others['before'])} before, "
            f"{rounded(others['after'])} after."
        )
    return "\n".join(lines)


def _card(name: str, model: str, told: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    return f"""# {name}

{model}, corrected by {told["episodes"]} real episodes of a policy in {told["minutes"]} minutes. Its starts are those of
{model}; what strangers said of that model says nothing of this one.

```
{told["command"]}
```

{_told(told)}
The episodes and the policy are those that it was corrected by.

All flags:

```json
{json_text(flags)}
```
"""
