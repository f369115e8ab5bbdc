"""How OnlineAIME learns: the real return of its mode, in percent of the demonstrations', after so many real steps.

    python -m benchmarks.online models/walker-random-lpomdp --body-data datasets/walker-random datasets/walker-held

Everything is kept after each part of the steps, and the same command goes on from there. It learns from episodes of
half the usual length, which show more of how they begin, and is judged in whole ones, which it never learns from.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import torch
import tyro
from stable_baselines3.common.evaluation import evaluate_policy

from aime_gym import REAL, OnlineAIME
from aime_gym.data.demonstrations import expert_return, find_demonstrations
from aime_gym.parallel import claimed, so_many_threads
from aime_gym.training.trainer import adam, load_snapshot, save_snapshot


@dataclass
class Online:
    """Let OnlineAIME learn in the real env, and note its curve."""

    model: Annotated[Path, tyro.conf.Positional]
    """World model with which it begins."""
    demonstrations: str = "walker-walk"
    """A folder of trajectories or a bundled name."""
    task: str = "walk"
    """The task whose reward is reported, never learned from."""
    body_data: tuple[Path, ...] = ()
    """What the model was trained with."""
    steps: int = 25_000
    """Real agent steps."""
    episode_steps: int = 250
    """Steps of an episode that it learns from."""
    every: int = 1000
    """Steps between two evaluations."""
    episodes: int = 3
    """Whole episodes of each; ten before the first step, and twenty after the last."""
    imitation_updates: int = 200
    """Updates before the first step."""
    updates: int = 30
    """Updates after each episode."""
    options: dict[str, float] = field(default_factory=dict)
    """More numbers for OnlineAIME: gain 10."""
    seed: int = 0
    """Seed of everything."""
    out: Path = Path("runs/online")
    """Folder to write; curve.jsonl in it has a line for each evaluation."""

    def run(self) -> None:
        """Learns, and goes on where it stopped."""
        with so_many_threads(1), claimed(self.out):
            agent, spent = self.agent(), 0.0
            kept = self.out / "state.pt"
            if kept.exists():
                spent = restore(agent, load_snapshot(kept))
            else:
                agent.imitate(self.imitation_updates)
                self.note(agent, time.process_time(), 10)
            while agent.num_timesteps < self.steps:
                agent.learn(min(self.every, self.steps - agent.num_timesteps), reset_num_timesteps=False)
                seconds = spent + time.process_time()
                save_snapshot(kept, state_of(agent, seconds))
                self.note(agent, seconds, self.episodes if agent.num_timesteps < self.steps else 20)
            agent.save(self.out / "agent")

    def agent(self) -> OnlineAIME:
        """The agent before it has learned."""
        sizes: dict[str, Any] = {"updates": self.updates, **self.options}
        agent = OnlineAIME(self.model, self.demonstrations, body_data=self.body_data, seed=self.seed, **sizes)
        agent.set_env(self.world(agent, max_episode_steps=self.episode_steps))
        return agent

    def world(self, agent: OnlineAIME, **limits: Any) -> gymnasium.Env:
        """The real env, which shows what the model observes."""
        config = agent.model.config
        return gymnasium.make(REAL, embodiment=config.embodiment, task=self.task, setup=config.setup, **limits)

    def note(self, agent: OnlineAIME, seconds: float, episodes: int) -> None:
        """Evaluates the mode of the policy, and adds a line to the curve."""
        expert = expert_return(find_demonstrations(self.demonstrations)) or 1000.0
        world = self.world(agent)
        with torch.random.fork_rng():
            world.reset(seed=10_000)
            returns, _ = evaluate_policy(agent, world, episodes, return_episode_rewards=True, warn=False)  # type: ignore[arg-type]
        world.close()
        percent = [round(100 * float(earned) / expert, 1) for earned in returns]  # type: ignore[union-attr]
        row = {"steps": agent.num_timesteps, "percent": percent, "cpu_seconds": round(seconds)}
        with (self.out / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def state_of(agent: OnlineAIME, seconds: float) -> dict[str, Any]:
    """All that an agent needs to go on."""
    optimisers = {name: each.state_dict() for name, each in agent._optimisers.items()}
    nets = {"module": agent.module.state_dict(), "model": agent.model.state_dict(), "optimisers": optimisers}
    replay = [{name: torch.from_numpy(rows) for name, rows in episode.items()} for episode in agent._replay]
    return {**nets, "replay": replay, "returns": agent.returns, "steps": agent.num_timesteps, "spent": seconds}


def restore(agent: OnlineAIME, state: dict[str, Any]) -> float:
    """Gives an agent what `state_of` took; returns the seconds that it had spent."""
    agent.module.load_state_dict(state["module"])
    agent.model.load_state_dict(state["model"])
    agent._replay = [{name: rows.numpy() for name, rows in episode.items()} for episode in state["replay"]]
    agent.returns, agent.num_timesteps = state["returns"], state["steps"]
    agent._begun = True
    for name, own in state["optimisers"].items():
        part: Any = agent.model if name == "model" else agent.module[name]  # type: ignore[index]
        agent._optimisers[name] = adam(part.parameters(), agent._rates[name])
        agent._optimisers[name].load_state_dict(own)
    return float(state["spent"])


if __name__ == "__main__":
    tyro.cli(Online).run()
