"""One episode as a picture: an agent in the real env, and the dream of its actions.

Top row: the agent acts in the real env. Bottom row: the dream begins at the same state and gets the same actions
without ever looking at the world again. Run `python -m benchmarks.film_strip runs/dream-walk/agent.zip`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from aime_gym.agents.sb3 import load_sb3_agent
from aime_gym.commands.play import draw_strip
from aime_gym.evaluation.returns import episode_returns
from aime_gym.evaluation.worlds import Worlds
from aime_gym.files import write_atomically

Frames = list[NDArray[np.uint8]]


@dataclass
class FilmStrip:
    """Film a saved SB3 agent in the real env and the dream of its actions."""

    agent: Annotated[Path, tyro.conf.Positional]
    """An agent that SB3 saved."""
    embodiment: str = "walker"
    """The body."""
    task: str = "walk"
    """One of its tasks."""
    model: str | None = None
    """A folder or a bundled name; the body's bundled model by default."""
    first: int = 0
    """Agent steps in the real env before the dream begins, filtering the last ten frames of them."""
    steps: int = 40
    """Agent steps on film."""
    every: int = 5
    """Agent steps between pictures."""
    seed: int = 0
    """Seed of the start."""
    output: Path = Path("benchmarks/results/film_strip.png")
    """Where to write the picture."""

    def run(self) -> None:
        """Films both worlds and writes the picture."""
        worlds = Worlds(self.embodiment, self.task, self.model, max_episode_steps=self.first + self.steps + 1)
        start = worlds.draw_starts(1, self.seed)
        real: Any = worlds.real_envs(1, render_mode="rgb_array", width=240, height=240)
        frames: Frames = []
        agent = load_sb3_agent(self.agent)
        episode = episode_returns(
            agent,
            real,
            seed=[self.seed],
            starts=worlds.real_starts(start),
            record=True,
            watch=lambda _: frames.append(real.render()[0]),
        ).recordings[0]
        real.close()
        truth = frames[self.first :][: self.steps + 1]

        dream: Any = worlds.dream_envs(1, render_mode="rgb_array", width=240, height=240, deterministic=True)
        options: dict[str, Any] = {"start": start}
        if self.first:
            seen = slice(self.first - 9, self.first + 1)
            before = slice(self.first - 10, self.first)
            frames_seen = np.asarray(episode.observations)[seen][:, None]
            options = {"start": {"observations": frames_seen, "actions": episode.actions[before][:, None]}}
        dream.reset(seed=self.seed, options=options)
        dreamt: Frames = [dream.render()[0]]
        for action in episode.actions[self.first : self.first + self.steps]:
            dream.step(action[None])
            dreamt.append(dream.render()[0])
        dream.close()
        worlds.close()
        write_atomically(self.output, draw_strip({"real": truth, "dream": dreamt}, self.every))
        print(f"The picture is {self.output}.")


if __name__ == "__main__":
    tyro.cli(FilmStrip).run()
