"""Two agents that learn in a dream of images alone, one from its latents and one from its pixels, tried in the world.

`python -m benchmarks.pixel_agents MODEL` trains SHAC on latents, as `aime-gym dream` does, and SB3's PPO with a
CnnPolicy on the decoded images, for the same time. In the real env the first sees latents that the model estimates from
rendered images, and the second sees the images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from aime_gym import DREAM
from aime_gym.agents.dreaming import learn
from aime_gym.agents.plain import make_agent, observation_statistics
from aime_gym.commands.dream import Dream
from aime_gym.envs.sb3 import make_sb3_env
from aime_gym.evaluation.compare import PolicyReturns, compare
from aime_gym.files import write_atomically
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.model import WorldModel


@dataclass
class PixelAgents:
    """Compare an agent on latents with one on pixels."""

    model: Annotated[str, tyro.conf.Positional]
    """A folder or a bundled name of a model of images."""
    task: str = "walk"
    """A task of the model's body."""
    minutes: float = 6.0
    """Minutes of each agent's training."""
    episodes: int = 10
    """In each world."""
    seed: int = 0
    """Seed of everything."""
    work: Path = Path("runs/pixel-agents")
    """Agents; one that is there does not learn again."""
    output: Path | None = None
    """Where to write the returns as JSON."""

    def run(self) -> None:
        """Trains what is missing, evaluates both in both worlds, prints and writes."""
        torch.set_num_threads(1)
        model = load_pretrained_model(self.model)
        body, found = model.config.embodiment, list[PolicyReturns]()
        for name in ("SHAC on latents", "PPO on pixels, CnnPolicy"):
            path = self.work / f"{self.task}-{name.split()[0].lower()}-{self.seed}.zip"
            if not path.exists():
                self.train(name, model, path)
            comparison = compare({name: path}, body, self.task, self.episodes, model, self.seed)
            print(comparison)
            found += comparison.policies
        if self.output:
            both = {one.name: {"dream": one.dream.mean, "real": one.real.mean} for one in found}
            told = {"model": self.model, "minutes": self.minutes, "episodes": self.episodes, "returns": both}
            write_atomically(self.output, json.dumps(told, indent=2) + "\n")

    def train(self, name: str, model: WorldModel, path: Path) -> None:
        """Lets an agent learn and saves it."""
        options: dict[str, Any] = {"embodiment": model.config.embodiment, "task": self.task, "model": model}
        options |= {"start": "dataset", "max_episode_steps": Dream.horizon, "seed": self.seed}
        if name.startswith("SHAC"):
            envs = make_sb3_env(DREAM, n_envs=Dream.slots, obs_type="latent", **options)
            agent: BaseAlgorithm = make_agent("shac", envs, observation_statistics(envs), self.seed)
        else:
            envs = make_sb3_env(DREAM, n_envs=32, obs_type="image", **options)
            agent = PPO("CnnPolicy", envs, n_steps=32, batch_size=256, n_epochs=3, seed=self.seed, device="cpu")
        learn(agent, path, Console(), 10**9, self.minutes)
        envs.close()


if __name__ == "__main__":
    tyro.cli(PixelAgents).run()
