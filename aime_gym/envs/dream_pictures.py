"""What a dream looks like: the decoded image where the model has one, else MuJoCo posed as the model believes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aime_gym import tasks
from aime_gym.embodiments import Embodiment
from aime_gym.envs.rendering import MuJoCoRenderer
from aime_gym.errors import AimeGymError, check_positive
from aime_gym.pictures import IMAGE_SIZE
from aime_gym.world_model.model import WorldModel


class DreamPictures:
    """Renders latents. GL is touched at the first picture of a model without images.

    Args:
        model: Decodes an ``"image"``, or has heads that predict the physics state.
        embodiment: Its body.
        width: Of the frames in pixels; decoded images are enlarged by a whole number.
        height: Of the frames.

    Raises:
        AimeGymError: If the model has neither.
    """

    def __init__(self, model: WorldModel, embodiment: Embodiment, width: int = 320, height: int = 240):
        self._model, self._size = model, (check_positive(width, "width"), check_positive(height, "height"))
        self._has_image = model.decodes_images
        if not self._has_image and (model.heads is None or model.heads.state is None):
            mend = "Train one on images." if embodiment.foreign else "`aime-gym fit-heads MODEL DATASET` fits one."
            raise AimeGymError(
                "This model decodes no images and has no head for the physics state, so its dreams cannot be "
                f"rendered. {mend}"
            )
        self._renderer: MuJoCoRenderer | None = None
        self._positions: list[int] = []
        self.fps = 30
        if embodiment.foreign:
            return
        world = tasks.load(embodiment, embodiment.tasks[0])
        self._physics = world.physics
        self._seconds = world.control_timestep() * embodiment.action_repeat
        self.fps = round(1 / self._seconds)
        self._positions = list(embodiment.translations)
        self._velocities = [self._physics.model.nq + i for i in embodiment.translations.values()]

    @property
    def root_dim(self) -> int:
        """R: coordinates of the root that no sensor sees."""
        return 0 if self._has_image else len(self._positions)

    def root(self, physics: np.ndarray) -> np.ndarray:
        """Where the root is in physics states [N, nq + nv (+ na)]: [N, R] float64."""
        return np.asarray(physics, np.float64)[:, self._positions[: self.root_dim]]

    def moved(self, features: Tensor) -> np.ndarray:
        """How far the root moves in one step by the predicted velocities: [N, F] -> [N, R] float64."""
        if not self.root_dim:
            return np.zeros((len(features), 0))
        assert self._model.heads is not None
        physics = self._model.heads.physics(features).cpu().numpy()
        return physics[:, self._velocities].astype(np.float64) * self._seconds

    @torch.inference_mode()
    def render(self, features: Tensor, root: np.ndarray) -> tuple[np.ndarray, ...]:
        """One frame a latent.

        Args:
            features: [N, F]
            root: Where the roots of the bodies are, [N, R]; no sensor shows it, so that it is not in the latents.

        Returns:
            N frames [height, width, 3] uint8.

        Raises:
            AimeGymError: If no GL library works; the message names the package to install.
        """
        if self._has_image:
            scale = max(1, self._size[1] // IMAGE_SIZE)
            frames = decode_images(self._model, features).cpu().numpy()
            return tuple(frame.repeat(scale, 0).repeat(scale, 1) for frame in frames)
        assert self._model.heads is not None
        states = self._model.heads.physics(features).cpu().numpy().astype(np.float64)
        states[:, self._positions] = root
        rest = self._physics.get_state()[states.shape[1] :]  # muscle activations are not predicted
        return self.pose(np.concatenate([states, np.zeros((len(states), len(rest)))], axis=1))

    def pose(self, states: np.ndarray) -> tuple[np.ndarray, ...]:
        """One frame a physics state: [N, nq + nv (+ na)] -> N frames [height, width, 3] uint8.

        Raises:
            AimeGymError: As `render`, or if the states are not of this body.
        """
        if self._renderer is None:
            self._renderer = MuJoCoRenderer(self._physics, *self._size)
        frames = []
        for state in states:
            tasks.set_physics_state(self._physics, state)
            frames.append(self._renderer.render())
        return tuple(frames)

    def close(self) -> None:
        """Frees the GL context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def decode_images(model: WorldModel, features: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded images: [N, F] -> [N, 64, 64, 3] uint8, from products in the given precision."""
    with torch.autocast(features.device.type, dtype, enabled=dtype is not torch.float32):
        images = model.decode(features, ["image"])["image"].clamp(0, 1)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
