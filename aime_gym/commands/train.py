"""The commands `aime-gym train` and `fit-heads`: their flags, and what they ask for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from aime_gym.errors import AimeGymError
from aime_gym.flags import check_flags, command_line
from aime_gym.parallel import claimed
from aime_gym.training.options import HeadsOptions, TrainingOptions


@dataclass
class Train(TrainingOptions):
    """Train a world model on trajectories, then its heads; the same command again resumes a stopped run."""

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
class FitHeads:
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
