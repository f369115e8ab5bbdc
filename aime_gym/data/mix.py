"""`aime-gym mix`: one data set of several, or demonstrations without actions from an expert's data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from aime_gym.claims import claimed
from aime_gym.data.content import trajectories_digest
from aime_gym.data.demonstrations import mean_return, rewards_of
from aime_gym.data.metadata import read_metadata, write_metadata
from aime_gym.data.trajectories import load_trajectory, metadata_to_go_on, save_trajectory, trajectory_paths
from aime_gym.errors import AimeGymError


@dataclass
class Mix:
    """Make one data set of several; the same command again goes on where it stopped."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trajectories of one embodiment."""
    out: Path
    """The new folder."""
    trajectories: int | None = None
    """At most so many from each folder, spread evenly over it; all by default."""
    first: int | None = None
    """Only the first so many rows of each trajectory: many beginnings at the size of a few episodes."""
    observations_only: bool = False
    """Leave out actions, rewards and physics: demonstrations to imitate from observation."""

    def run(self) -> None:
        """Copies trajectories, whole files or none, and prints where they are.

        Raises:
            AimeGymError: If there is no folder, they are broken or of different embodiments, or the new one holds
                something else, or other trajectories of them.
        """
        if not self.datasets or any(number is not None and number < 1 for number in (self.trajectories, self.first)):
            raise AimeGymError(
                "Expected one folder of trajectories or more, and --trajectories and --first of 1 or more."
            )
        sources = {str(folder): read_metadata(folder) for folder in self.datasets}
        bodies = {metadata.get("embodiment") for metadata in sources.values()}
        if len(bodies) > 1:
            raise AimeGymError(f"These data sets are of different embodiments: {', '.join(sorted(map(str, bodies)))}.")
        files = {str(folder): self._chosen(folder) for folder in self.datasets}
        paths = [path for folder in self.datasets for path in files[str(folder)]]
        chosen = {folder: [int(path.stem) for path in own] for folder, own in files.items()}
        metadata = {
            **({"embodiment": body} if (body := bodies.pop()) else {}),
            "sources": sources,
            "trajectories": self.trajectories,
            **({"first": self.first} if self.first else {}),
            "observations_only": self.observations_only,
        }
        if not paths:
            raise AimeGymError(f"There are no trajectories in {', '.join(map(str, self.datasets))}.")
        content = {folder: trajectories_digest(own) for folder, own in files.items()}
        with claimed(self.out):
            self._fill(metadata, chosen, content, paths)

    def _fill(
        self, metadata: dict[str, Any], chosen: dict[str, list[int]], content: dict[str, str], paths: list[Path]
    ) -> None:
        before = metadata_to_go_on(self.out)
        same = {key: value for key, value in before.items() if key in metadata} == metadata
        if trajectory_paths(self.out) and not same:
            raise AimeGymError(f"{self.out} holds another data set: choose another --out.")
        # Files that are there stay, but of which trajectory a file is changes where a source grows or is made anew.
        changed = [folder for folder, own in chosen.items() if before.get("chosen", chosen).get(folder) != own]
        changed += [folder for folder, own in content.items() if before.get("content", content).get(folder) != own]
        if changed and trajectory_paths(self.out):
            raise AimeGymError(
                f"{self.out} was begun with other trajectories of {', '.join(dict.fromkeys(changed))} than those "
                "there now: choose another --out, or delete it and mix again."
            )
        metadata |= {"chosen": chosen, "content": content}
        write_metadata(self.out, metadata)
        rewards = []
        for index, path in enumerate(paths):
            trajectory = load_trajectory(path, images=True)
            trajectory = {key: value[: self.first] for key, value in trajectory.items()}
            rewards.append(rewards_of(trajectory))
            if self.observations_only:
                hidden = ("pre_action", "reward", "physics", "is_first", "is_last", "is_terminal")
                trajectory = {key: value for key, value in trajectory.items() if key not in hidden}
            if not (self.out / f"{index}.npz").exists():
                save_trajectory(self.out, index, trajectory)
        if (earned := mean_return(rewards)) is not None:
            metadata["expert_return"] = earned
            write_metadata(self.out, metadata)
        print(f"{len(paths)} trajectories are in {self.out}.")

    def _chosen(self, folder: Path) -> list[Path]:
        paths = trajectory_paths(folder)
        count = min(len(paths), self.trajectories or len(paths))
        return [paths[i] for i in np.linspace(0, len(paths) - 1, count).round().astype(int)]
