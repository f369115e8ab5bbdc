"""The command `aime-gym train`: its flags. What they ask for is done in `aime_gym.training.train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from aime_gym.flags import command_line
from aime_gym.training.options import TrainOptions


@dataclass
class Train(TrainOptions):
    """Train a world model on trajectories, then its heads; the same command again resumes a stopped run."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of trajectories, all of one embodiment."""
    out: Path = Path("models/new")
    """The model folder; the run's checkpoints and logs go to its subfolder `run`."""
    embodiment: str | None = None
    """Only for data sets that do not say which body they are of, or whose body is the env of a package, as in
    'package:Id-v0', which is imported only if it is named here."""
    pretrained: str | None = None
    """Train on from the weights of this model (a folder or a bundled name) of the same architecture."""
    dynamics: str | None = None
    """Give this model of states (a folder or a bundled name) the senses of --setup: its dynamics, heads and sizes stay;
    encoder, posterior and image decoder are learned, and an inverse dynamics model with --idm-mode detach."""

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
        """As `run`, for callers that say themselves how to go on after Ctrl-C."""
        from aime_gym.training.train import TrainingRun  # with torch, which --help need not wait for

        TrainingRun.of(self).train()
