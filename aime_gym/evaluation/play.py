"""`aime-gym play`: the dream beside the real env under the same keys."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aime_gym.errors import AimeGymError, check_positive
from aime_gym.evaluation.returns import PolicyLike, as_policy
from aime_gym.files import write_atomically

if TYPE_CHECKING:
    from aime_gym.evaluation.both_worlds import BothWorlds  # with torch, which `aime-gym play --help` need not wait for

UP, DOWN = "qwertyuiop", "asdfghjkl;"
"""Keys that push one dimension of the action to 1 and to -1, in the order of dimensions."""
_AT_ONCE = 3
"""Keys that count when they are held together."""


@dataclass
class Play:
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
    """Of the first start."""

    def run(self) -> None:
        """Opens the window, or writes the film and prints where it is."""
        from aime_gym.evaluation.subject import find_subject

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
    video: Path | None = None,
    seed: int = 0,
) -> Path | None:
    """Shows the dream beside the real env, with the dream's doubt as a bar.

    Args:
        embodiment: The body, or the id of a Gymnasium env or of a registered dream.
        task: One of its tasks; its first one by default.
        model: A loaded world model, a folder or a bundled name; the body's bundled one by default.
        agent: What acts in each world by what it sees there; by default the keys `UP` and `DOWN`, in both the same. On
            film, where there are no keys, ``"zero"``.
        steps: Agent steps of an episode; the body's own by default.
        video: Where to write an mp4 in place of opening a window.
        seed: Of the first start.

    Returns:
        The path of the film; None after a window.

    Raises:
        AimeGymError: If a name is unknown, an agent does not fit, or a window cannot be opened.
    """
    from aime_gym.evaluation.both_worlds import BothWorlds
    from aime_gym.evaluation.compare import check_spaces, fitting_obs_type, load_policy, model_for
    from aime_gym.evaluation.video import side_by_side
    from aime_gym.evaluation.worlds import Worlds

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
        assert isinstance(self.action_space, gymnasium.spaces.Box)
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
        """Takes the action [A] in both worlds; the reward is the dream's, the end that of either."""
        actions = np.stack([np.asarray(action, np.float32)] * self._worlds.num_envs)
        if self._policy is not None:
            starts = np.full(self._worlds.num_envs, self._begins)
            actions, self._memory = self._policy.predict(
                self._observations, state=self._memory, episode_start=starts, deterministic=True
            )
            actions, self._begins = np.clip(actions, -1, 1).astype(np.float32), False
        self._observations, rewards, terminations, truncations, infos = self._worlds.step(actions)
        infos = {"disagreement": float(infos["disagreement"][0]), "reward_real": float(rewards[1])}
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
    dims = game.action_space.shape[0]  # type: ignore[index]
    pairs = ", ".join(f"{up}/{down}" for up, down in list(zip(UP, DOWN, strict=True))[:dims])
    print(f"Keys push the dimensions of the action to 1 and -1: {pairs}. Esc ends it.")
    play_game(game, keys_to_action=keys_to_action(dims), noop=np.zeros(dims, np.float32), seed=seed, zoom=1.5)
