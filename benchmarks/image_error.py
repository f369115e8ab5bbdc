"""How true the images of a dream are, 1, 10 and 40 steps after the last frame that the model saw.

`python -m benchmarks.image_error MODEL DATASET...` filters ten frames of held-out windows, rolls the prior's means out
under the recorded actions, and compares decoded with recorded images; beside it, what two predictions without a model
score: the last frame, repeated, and the mean image. Give episodes that fail and episodes that succeed as two data sets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from skimage.metrics import structural_similarity

from aime_gym.data.dataset import BURN_IN, read_data_sets
from aime_gym.errors import AimeGymError
from aime_gym.files import write_atomically
from aime_gym.observations import to_tensors
from aime_gym.training.model_folder import STEPS, predict_windows
from aime_gym.world_model.checkpoint import load_pretrained_model


@dataclass
class ImageError:
    """Measure MSE (of values in [0, 1]), PSNR in decibels and SSIM of predicted images."""

    model: Annotated[str, tyro.conf.Positional]
    """A folder or a bundled name of a model of images."""
    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trajectories with images."""
    held_out: float = 0.1
    """Share of each that `aime-gym train` with the same seed holds out, and that is looked at here; 1 for all."""
    windows: int = 200
    """Windows of each data set."""
    seed: int = 0
    """Seed of the split and the windows."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`.

        Raises:
            AimeGymError: If the model does not see images, or data are broken or of another body.
        """
        model = load_pretrained_model(self.model)
        if "image" not in model.observed:
            raise AimeGymError(f"{self.model} does not see images.")
        results: dict[str, dict[str, dict[str, list[float]]]] = {}
        for folder, data in zip(self.datasets, read_data_sets(self.datasets, True), strict=True):
            held = data if self.held_out == 1 else data.split(self.held_out, self.seed)[1]
            arrays, future = predict_windows(model, held, windows=self.windows, seed=self.seed)
            images = to_tensors({"image": arrays["image"]})["image"]  # [T, W, 3, 64, 64]
            if "is_padding" in arrays:
                whole = torch.as_tensor(~arrays["is_padding"].any(0))
                images, future = images[:, whole], future[:, whole]
            dreamt = {step: model.decode(future[step - 1], ["image"])["image"] for step in STEPS}
            truth = {step: images[BURN_IN + step - 1] for step in STEPS}
            last, mean = images[BURN_IN - 1], images.mean((0, 1)).expand(images.shape[1], -1, -1, -1)
            results[folder.name] = {
                "dream": errors(dreamt, truth),
                "last frame repeated": errors(dict.fromkeys(STEPS, last), truth),
                "mean image": errors(dict.fromkeys(STEPS, mean), truth),
            }
        self.report(results)

    def report(self, results: dict[str, dict[str, dict[str, list[float]]]]) -> None:
        """Prints the table and writes the JSON file."""
        table = Table(title=f"Images of {self.model}: MSE / PSNR / SSIM after so many steps")
        for column in ("data", "prediction", *map(str, STEPS)):
            table.add_column(column)
        for name, kinds in results.items():
            for kind, scores in kinds.items():
                rows = zip(scores["mse"], scores["psnr"], scores["ssim"], strict=True)
                cells = [f"{mse:.5f} / {psnr:.1f} / {ssim:.3f}" for mse, psnr, ssim in rows]
                table.add_row(name, kind, *cells)
        Console().print(table)
        if self.output:
            told = {"model": self.model, "windows": self.windows, "steps": STEPS, "scores": results}
            write_atomically(self.output, json.dumps(told, indent=2) + "\n")


def errors(predicted: dict[int, torch.Tensor], truth: dict[int, torch.Tensor]) -> dict[str, list[float]]:
    """Means over windows of MSE, PSNR and SSIM (Wang et al., 2004), a value for each number of steps."""
    mse, psnr, ssim = [], [], []
    for step, images in predicted.items():
        errors_of_images = (images - truth[step]).square().mean((1, 2, 3))
        mse.append(float(errors_of_images.mean()))
        psnr.append(float(-10 * errors_of_images.log10().mean()))
        ssim.append(float(np.mean([similarity(*pair) for pair in zip(images, truth[step], strict=True)])))
    return {"mse": mse, "psnr": psnr, "ssim": ssim}


def similarity(a: torch.Tensor, b: torch.Tensor) -> float | NDArray:
    """SSIM of two images [3, 64, 64] in [0, 1]."""
    return structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=1.0)


if __name__ == "__main__":
    tyro.cli(ImageError).run()
