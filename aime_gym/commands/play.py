"""The commands `aime-gym play` and `film`: both worlds to act in, and to look at."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import gymnasium
import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from aime_gym.bodies.body import Choices
from aime_gym.bodies.sensors import IMAGE_SIZE
from aime_gym.data.dataset import split_indices
from aime_gym.data.trajectories import Trajectory, load_trajectory, read_metadata, trajectory_keys, trajectory_paths
from aime_gym.errors import AimeGymError, check_positive
from aime_gym.evaluation.returns import PolicyLike, as_policy, checked_actions
from aime_gym.files import write_atomically
from aime_gym.flags import Options
from aime_gym.parallel import claimed

if TYPE_CHECKING:
    from aime_gym.evaluation.both_worlds import BothWorlds
    from aime_gym.world_model.model import WorldModel

UP, DOWN = "qwertyuiop", "asdfghjkl;"
"""Keys that push one dimension of the action to 1 and to -1, in the order of dimensions."""

_AT_ONCE = 3
"""Keys that count when they are held together."""


@dataclass
class Play(Options):
    """Act with the keyboard in the dream and the real env at once, or film an agent in both; Esc ends it."""

    embodiment: str | None = None
    """The body; that of the model, or of the agent's own run, or the walker by default."""
    task: str | None = None
    """One of its tasks; its first one by default."""
    model: str | None = None
    """World model: a folder or a bundled name; the body's bundled one by default."""
    agent: str | None = None
    """A saved SB3 agent, 'random' or 'zero' that acts in each world, in place of the keys. Name only files you
    trust: but for those that `aime-gym dream` saves, they are code."""
    steps: int | None = None
    """Agent steps of an episode; the body's own by default."""
    video: Path | None = None
    """Write a film here in place of opening a window; where there is no display, runs/play.mp4."""
    seed: int = 0
    """Seed of the first start."""

    def run(self) -> None:
        """Opens the window, or writes the film and prints where it is."""
        from aime_gym.evaluation.worlds import find_subject

        headless = self.video is not None or not has_display()
        body, model = find_subject(self.embodiment, self.model, [self.agent])
        written = play(
            body,
            self.task,
            model,
            self.agent,
            self.steps,
            (self.video or Path("runs/play.mp4")) if headless else None,
            self.seed,
        )
        if written:
            print(f"The film is in {written}.")


def play(
    embodiment: str = "walker",
    task: str | None = None,
    model: Any = None,
    agent: PolicyLike | Path | None = None,
    steps: int | None = None,
    video: str | Path | None = None,
    seed: int = 0,
) -> Path | None:
    """Shows the dream beside the real env, with the dream's doubt as a bar.

    Examples:
        >>> from pathlib import Path
        >>> import aime_gym
        >>> aime_gym.play("cartpole", agent="random", steps=3, video=Path("both.mp4"))
        PosixPath('both.mp4')

    Args:
        embodiment: The body, or the id of a Gymnasium env or of a registered dream.
        task: One of its tasks; its first one by default.
        model: A loaded world model, a folder or a bundled name; the body's bundled one by default.
        agent: What acts in each world by what it sees there; by default the keys `UP` and `DOWN`, in both the same. On
            film, where there are no keys, ``"zero"``.
        steps: Agent steps of an episode; the body's own by default.
        video: Where to write an mp4 in place of opening a window.
        seed: Seed of the first start.

    Returns:
        The path of the film; None after a window.

    Raises:
        AimeGymError: If a name is unknown, an agent does not fit, or a window cannot be opened.
    """
    from aime_gym.envs.sb3 import learned_in, stray_note
    from aime_gym.evaluation.both_worlds import BothWorlds, side_by_side
    from aime_gym.evaluation.returns import load_policy
    from aime_gym.evaluation.worlds import Worlds, check_spaces, fitting_obs_type, model_for
    from aime_gym.world_model.checkpoint import revision_of

    if steps is not None:
        check_positive(steps, "steps")
    if video is not None and Path(video).suffix != ".mp4":
        raise AimeGymError(f"The film is an mp4; got {str(video)!r}.")
    if video is None and not has_display():
        raise AimeGymError("There is no display to open a window on: pass video='play.mp4' for a film.")
    policy = None if agent is None else load_policy(agent)
    model = model_for([] if policy is None else [policy], embodiment, model)
    kind = None if policy is None else fitting_obs_type(policy, model)
    with Worlds(embodiment, task, model, kind, steps) as worlds:
        if policy is not None:
            check_spaces("agent", policy, worlds)
            if note := stray_note(f"{agent}", learned_in(policy), revision_of(worlds.model)):
                print(note)
        if video is not None:
            return write_atomically(video, side_by_side(policy or "zero", worlds, seed))
        game = Game(BothWorlds(worlds), policy)
        try:
            _open_window(game, seed)
        finally:
            game.close()
        return None


class Game(gymnasium.Env):
    """Both worlds as one env with one action, as Gymnasium's `play` wants it.

    Args:
        worlds: Both worlds.
        policy: Acts in place of the action given; None to take that.
    """

    def __init__(self, worlds: BothWorlds, policy: PolicyLike | None = None):
        self._worlds = worlds
        self.observation_space, self.action_space = worlds.observation_space, worlds.single_action_space
        self.render_mode, self.metadata = "rgb_array", {**worlds.metadata, "render_modes": ["rgb_array"]}
        self._policy = None if policy is None else as_policy(policy, self.action_space)
        self._observations: Any = None
        self._memory: Any = None
        self._begins = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins both episodes in the same state."""
        super().reset(seed=seed)
        self._observations, infos = self._worlds.reset(seed=seed)
        self._memory, self._begins = None, True
        if self._policy is not None and hasattr(self._policy, "begin"):
            self._policy.begin([int(self.np_random.integers(2**31))] * self._worlds.num_envs)
        return self._observations, infos

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Takes the action [A] (of choices the vector) in both; the reward is the dream's, the end that of either."""
        actions = np.stack([np.asarray(action, np.float32)] * self._worlds.num_envs)
        if choices := Choices.of(self.action_space):
            actions = choices.decode(actions)
        if self._policy is not None:
            starts = np.full(self._worlds.num_envs, self._begins)
            actions, self._memory = self._policy.predict(
                self._observations, state=self._memory, episode_start=starts, deterministic=True
            )
            actions, self._begins = checked_actions(actions, self.action_space, self._worlds.num_envs), False
        self._observations, rewards, terminations, truncations, infos = self._worlds.step(actions)
        infos = {"doubt": float(infos["doubt"][0]), "reward_real": float(rewards[1])}
        return self._observations, float(rewards[0]), bool(terminations.any()), bool(truncations.any()), infos

    def render(self) -> NDArray[np.uint8]:
        """The picture of both, see `BothWorlds.render`."""
        pictures = self._worlds.render()
        assert pictures is not None
        return pictures[0]

    def close(self) -> None:
        """Closes both worlds."""
        self._worlds.close()


def keys_to_action(dims: int) -> dict[tuple[str, ...], NDArray[np.float32]]:
    """What held keys mean: up to three of `UP` and `DOWN`, for the first ten dimensions of the action [A]."""
    keys = {key: (dim, value) for value, row in ((1.0, UP), (-1.0, DOWN)) for dim, key in enumerate(row[:dims])}
    meanings = {}
    for count in range(1, _AT_ONCE + 1):
        for held in itertools.combinations(sorted(keys), count):
            action = np.zeros(dims, np.float32)
            for key in held:
                dim, value = keys[key]
                action[dim] += value
            meanings[held] = action
    return meanings


def has_display() -> bool:
    """Whether a window could be opened."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    )


def _open_window(game: Game, seed: int) -> None:
    try:
        from gymnasium.utils.play import play as play_game
    except gymnasium.error.DependencyNotInstalled as error:
        raise AimeGymError(
            "A window needs pygame: `pip install 'aime-gym[play]'`, or write a film with --video."
        ) from error
    if choices := Choices.of(game.action_space):
        dims = choices.dim
        print(f"Keys choose among the options of {choices.space}: {', '.join(UP[:dims])}. Esc ends it.")
    else:
        dims = game.action_space.shape[0]  # type: ignore[index]
        pairs = ", ".join(f"{up}/{down}" for up, down in list(zip(UP, DOWN, strict=True))[:dims])
        print(f"Keys push the dimensions of the action to 1 and -1: {pairs}. Esc ends it.")
    play_game(game, keys_to_action=keys_to_action(dims), noop=np.zeros(dims, np.float32), seed=seed, zoom=1.5)


Frames = Sequence[NDArray[np.uint8]]

_SIZE = 240
"""Pixels of a picture that MuJoCo renders; decoded images have their own size."""

_COLOURS = 64
"""Colours of a gif."""


@dataclass
class Film(Options):
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
        from aime_gym.data.dataset import BURN_IN
        from aime_gym.world_model.checkpoint import load_pretrained_model

        if self.first < 0 or self.steps < 1 or self.every < 1:
            raise AimeGymError("--first starts at 0, --steps and --every at 1.")
        model = load_pretrained_model(self.model)
        body = read_metadata(self.dataset).get("embodiment")
        if body not in (None, model.config.embodiment):
            raise AimeGymError(f"{self.dataset} is of {body}; the model {self.model} is of {model.config.embodiment}.")
        if model.config.body.foreign and not model.decodes_images:
            name = model.config.embodiment
            model.config.body.check_env("and as the model decodes no images, there is nothing to film.")
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
        trajectory: A trajectory of its body, longer than `BURN_IN`.

    Raises:
        AimeGymError: If the model decodes neither, the arrays do not fit it, or no GL library works.
    """
    import torch

    from aime_gym.data.dataset import BURN_IN
    from aime_gym.envs.rendering import DreamPictures
    from aime_gym.observations import to_tensors

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
    """Draws films beside each other as a gif that runs forever; for arguments see `draw_strip`."""
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
