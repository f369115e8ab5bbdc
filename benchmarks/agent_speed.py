"""How fast agents learn and are compared, here and in another checkout of this repository.

SHAC learns in 64 dreams, AIME from the bundled demonstrations of walking, and an agent is compared in both worlds. All
is measured in turns, each checkout in a process of its own; on one thread the seconds are those of the CPU.
Run `python -m benchmarks.agent_speed --against PATH --model FOLDER`, or without both for this checkout alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from aime_gym.data.demonstrations import find_demonstrations
from benchmarks.side_by_side import OTHER, Measured, absolute, both_checkouts, check_against, measure, report, write

WINDOWS = 4
"""What SHAC learns from at once."""


@dataclass
class AgentSpeed:
    """Measure the speed of SHAC, AIME and `compare`, if asked for in turns with another checkout."""

    model: str = "walker-state"
    """A folder or a bundled name of a walker model with heads and starts."""
    task: str = "walk"
    """The task whose reward is paid."""
    slots: int = 64
    """Dreams that SHAC learns in."""
    n_steps: int = 4
    """Steps of SHAC's windows."""
    batch_size: int = 32
    """Windows of an update of AIME."""
    horizon: int = 32
    """Steps of these windows."""
    episodes: int = 20
    """Episodes that are compared."""
    episode_steps: int = 50
    """Steps of such an episode."""
    repeats: int = 9
    """Timed stretches of each kind, taken in turns."""
    seconds: float = 0.4
    """About how long one stretch takes."""
    threads: int = 1
    """CPU threads."""
    only: tuple[str, ...] = ("SHAC", "AIME", "compare")
    """What to measure."""
    against: Path | None = None
    """Another checkout, which uses the same model (a folder, then)."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`.

        Raises:
            AimeGymError: If the other checkout is none, or is to use a model that is no folder.
        """
        check_against(self.against, self.model)
        model = absolute(self.model)
        dreams = {"model": model, "task": self.task}
        learning = {"slots": self.slots, "steps": self.n_steps, "windows": WINDOWS}
        demonstrations = str(find_demonstrations("walker-walk").resolve())
        sizes = {"batch_size": self.batch_size, "horizon": self.horizon}
        comparing = {"episodes": self.episodes, "steps": self.episode_steps}
        kinds = {
            "SHAC": ("shac", {**dreams, **learning}, self.slots * self.n_steps * WINDOWS),
            "AIME": ("aime", {"model": model, "demonstrations": demonstrations, **sizes}, 1),
            "compare": ("compare", {**dreams, **comparing}, self.episodes),
        }
        rows: dict[str, Measured] = {}
        for name in self.only:
            both = both_checkouts(*kinds[name][:2], self.against)
            rows[name] = measure(both, self.repeats, self.seconds, self.threads)
        amounts = {name: float(kinds[name][2]) for name in rows}
        report(f"{self.model}, threads: {self.threads}", rows, amounts, "steps, updates or episodes", OTHER)
        settings = {name: kinds[name][1] for name in rows}
        write(self.output, rows, amounts, OTHER, threads=self.threads, settings=settings)


if __name__ == "__main__":
    tyro.cli(AgentSpeed).run()
