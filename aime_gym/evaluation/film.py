"""`aime-gym film`: a recorded trajectory, and the dream of its actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from aime_gym.claims import claimed
from aime_gym.data.metadata import read_metadata
from aime_gym.data.trajectories import Trajectory, load_trajectory, split_indices, trajectory_keys, trajectory_paths
from aime_gym.errors import AimeGymError
from aime_gym.files import write_atomically
from aime_gym.pictures import IMAGE_SIZE

if TYPE_CHECKING:
    from aime_gym.world_model.model import WorldModel  # with torch, which `aime-gym film --help` need not wait for

Frames = Sequence[NDArray[np.uint8]]
_SIZE = 240
"""Pixels of a picture that MuJoCo renders; decoded images have their own size."""
_COLOURS = 64
"""Of a gif."""


@dataclass
class Film:
    """Film a recorded trajectory beside the dream of its actions: the model sees ten frames and predicts the rest."""

    model: Annotated[str, tyro.conf.Positional]
    """A bundled name or a model folder."""
    dataset: Annotated[Path, tyro.conf.Positional]
    """A folder of trajectories of its body, with images for a model of images (see `aime-gym render`)."""
    trajectory: int | None = None
    """The number of its file; by default the first that `aime-gym train` with its defaults holds out."""
    first: int = 0
    """The first row that the model sees."""
    steps: int = 40
    """Agent steps to predict."""
    every: int = 5
    """Agent steps between the pictures of the strip."""
    out: Path = Path("runs/film")
    """The folder for strip.png and film.gif."""

    def run(self) -> None:
        """Dreams, draws and prints where the pictures are.

        Raises:
            AimeGymError: If model and data do not fit together, or the trajectory is too short.
        """
        with claimed(self.out):
            self._film()

    def _film(self) -> None:
        from aime_gym.training.prediction_error import BURN_IN
        from aime_gym.world_model.checkpoint import load_pretrained_model

        if self.first < 0 or self.steps < 1 or self.every < 1:
            raise AimeGymError("--first starts at 0, --steps and --every at 1.")
        model = load_pretrained_model(self.model)
        body = read_metadata(self.dataset).get("embodiment")
        if body not in (None, model.config.embodiment):
            raise AimeGymError(f"{self.dataset} is of {body}; the model {self.model} is of {model.config.embodiment}.")
        if model.config.body.foreign and not model.decodes_images:
            name = model.config.embodiment
            raise AimeGymError(
                f"{self.model} decodes no images, and only bodies of the suite can be drawn from what it predicts: "
                f"there is nothing of {name} to film. `aime-gym play --embodiment {name} --model {self.model} --video "
                "play.mp4` films the real env beside the dream's returns."
            )
        path = self._path()
        footage = film(model, load_rows(path, model, self.first, BURN_IN + self.steps))
        rows = {"truth": footage.truth, "dream": footage.dream, "difference": footage.difference}
        strip = write_atomically(self.out / "strip.png", draw_strip(rows, self.every))
        gif = write_atomically(self.out / "film.gif", draw_gif(rows, footage.fps))
        print(f"The dream of {path} is in {strip} and {gif}.")

    def _path(self) -> Path:
        if self.trajectory is not None:
            return self.dataset / f"{self.trajectory}.npz"
        paths = trajectory_paths(self.dataset)
        if len(paths) < 2:
            raise AimeGymError(f"{self.dataset} has {len(paths)} trajectories, none to hold out: give --trajectory.")
        return paths[split_indices(len(paths))[1][0]]


class Footage(NamedTuple):
    """What happened and what was dreamt, from the last frame that the model saw on.

    Attributes:
        truth: L frames [H, W, 3] uint8.
        dream: The same of the dream.
        fps: Frames a second in real time.
    """

    truth: Frames
    dream: Frames
    fps: int

    @property
    def difference(self) -> Frames:
        """Dream minus truth, halved: grey where they agree."""
        pairs = zip(self.truth, self.dream, strict=True)
        return [((255 + dream.astype(int) - truth) // 2).astype(np.uint8) for truth, dream in pairs]


def load_rows(path: Path, model: WorldModel, first: int, count: int) -> Trajectory:
    """Reads those rows of a trajectory, with all that a film of the model needs.

    Raises:
        AimeGymError: If the file is broken, too short or lacks something; names it.
    """
    shown = "image" if model.decodes_images else "physics"
    if shown == "image" and path.exists() and "image" not in trajectory_keys(path):
        raise AimeGymError(f"{path} has no 'image', which this model decodes: `aime-gym render {path.parent}` adds it.")
    trajectory = load_trajectory(path, ("pre_action", shown, *model.observed), images=shown == "image")
    length = len(trajectory["pre_action"])
    if length < first + count:
        raise AimeGymError(
            f"{path} has {length} rows; a film from row {first} on needs {count} more: choose a smaller --first or "
            "--steps."
        )
    return {name: array[first : first + count] for name, array in trajectory.items()}


def film(model: WorldModel, trajectory: Trajectory) -> Footage:
    """Filters the first frames of a trajectory, then rolls the prior under its actions; means, no samples.

    Args:
        model: Decodes images, which are compared with ``image``, or else has a head for the physics state, which is
            rendered as ``physics`` is.
        trajectory: Of its body, longer than `BURN_IN`.

    Raises:
        AimeGymError: If the model decodes neither, the arrays do not fit it, or no GL library works.
    """
    import torch

    from aime_gym.envs.dream_pictures import DreamPictures
    from aime_gym.training.batches import to_tensors
    from aime_gym.training.prediction_error import BURN_IN

    inputs = to_tensors({name: trajectory[name][:, None] for name in (*model.observed, "pre_action")})  # [T, 1, ...]
    seen = {name: inputs[name][:BURN_IN] for name in model.observed}
    features, _ = model.observe(seen, inputs["pre_action"][:BURN_IN], sample=False)
    future = model.imagine(features[-1], inputs["pre_action"][BURN_IN:], sample=False, names=())
    latents = torch.cat([features[-1:], future.features])[:, 0]  # [L, F]

    body = model.config.body
    size = IMAGE_SIZE if model.decodes_images else _SIZE
    pictures = DreamPictures(model, body, size, size)
    try:
        if model.decodes_images:
            truth: Frames = list(trajectory["image"][BURN_IN - 1 :])
            root = np.zeros((len(latents), 0))
        else:
            states = trajectory["physics"][BURN_IN - 1 :]
            truth = pictures.pose(states)
            # No sensor shows where the body is: the dream begins where the truth does and goes on from there.
            moved = np.concatenate([states[:1, list(body.translations)], pictures.moved(latents[1:])])
            root = moved.cumsum(0)
        return Footage(truth, pictures.render(latents, root), pictures.fps)
    finally:
        pictures.close()


def draw_strip(rows: Mapping[str, Frames], every: int) -> bytes:
    """Draws films above each other as a png.

    Args:
        rows: Name -> frames [H, W, 3], equally many.
        every: Steps from one picture to the next.
    """
    from matplotlib.figure import Figure

    shown = range(0, min(len(frames) for frames in rows.values()), every)
    figure = Figure(figsize=(1.5 * len(shown), 1.65 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for row, (name, frames) in enumerate(rows.items()):
        for axis, step in zip(axes[row], shown, strict=True):
            axis.imshow(frames[step])
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"step {step}", fontsize=10)
        axes[row, 0].set_ylabel(name, fontsize=12)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return buffer.getvalue()


def draw_gif(rows: Mapping[str, Frames], fps: int) -> bytes:
    """Draws films beside each other as a gif that runs forever; arguments as of `draw_strip`."""
    from aime_gym.evaluation.both_worlds import captioned

    pictures = []
    for step, frames in enumerate(zip(*rows.values(), strict=True)):
        parts = [captioned(frame, f"{name}, step {step}") for name, frame in zip(rows, frames, strict=True)]
        pictures.append(Image.fromarray(np.hstack(parts)))
    # One palette and no dithering: what stands still is then the same from frame to frame and costs no bytes.
    palette = pictures[0].quantize(_COLOURS)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    buffer = BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()
