"""What would anybody else use? A world model beside baselines of off-policy evaluation.

`python -m benchmarks.off_policy strangers/cheetah-run --datasets datasets/cheetah-* --model models/cheetah
--model-minutes 9` takes a set of `aime-gym strangers` and a model, and lets the model and every baseline of
`benchmarks.ope` tell the strangers' returns from the data that the model was trained on. All are judged alike, by the
real returns that the set publishes. Results go to `benchmarks/results/off_policy.json`, beside the other bodies there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from aime_gym.bodies.lookup import get_embodiment
from aime_gym.errors import unknown_name
from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.measure_trust import measure_trust
from aime_gym.evaluation.returns import Episodes
from aime_gym.evaluation.strangers import COLLECTORS, SEED, StrangerSet, judge
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import read_json, write_json
from aime_gym.parallel import one_thread
from aime_gym.world_model.checkpoint import load_pretrained_model
from benchmarks.ope import constant, ensemble, fqe, neighbours
from benchmarks.ope.transitions import Transitions, read_transitions

BASELINES: dict[str, Callable[..., NDArray[np.float64]]] = {
    "MLP ensemble": ensemble.estimate,
    "FQE": fqe.estimate,
    "nearest neighbours": neighbours.estimate,
    "constant": constant.estimate,
}
RSSM, BUNDLED = MODELS = ("RSSM", "bundled RSSM")
"""The model of the same data, and the body's bundled one, which has learned from other data."""
METRICS = {"spearman": "{:.2f}", "pearson": "{:.2f}", "mean_absolute_error": "{:.0f}"}


@dataclass
class OffPolicy:
    """Judge strangers by a world model and by baselines that learn from the same data."""

    strangers: Annotated[Path, tyro.conf.Positional]
    """A set of `aime-gym strangers`."""
    datasets: tuple[Path, ...]
    """All that `model` was trained on; their rewards are those of the set's task."""
    model: Path
    """A folder of `aime-gym train`."""
    model_minutes: float
    """Minutes of one core that its training took."""
    methods: tuple[str, ...] = (*MODELS, *BASELINES)
    """Which of them; results of others stay."""
    seen: tuple[str, ...] = COLLECTORS
    """Families whose algorithm has collected some of the data."""
    seed: int = 0
    """Seed of the baselines."""
    out: Path = Path("benchmarks/results/off_policy.json")

    def run(self) -> None:
        """Judges, writes each result when it is there, and prints the table."""
        strangers = StrangerSet.load(self.strangers)
        for method in self.methods:
            if method not in (*MODELS, *BASELINES):
                raise unknown_name("method", method, (*MODELS, *BASELINES))
        data = read_transitions(self.datasets, get_embodiment(strangers.embodiment).sensors)
        results = read_json(self.out) if self.out.exists() else {}
        entry = results.setdefault(f"{strangers.embodiment} {strangers.task}", {"methods": {}})
        entry["real steps of data"] = len(data)
        for method in self.methods:
            begun = time.process_time()
            told = self._dream(method, strangers) if method in MODELS else self._estimate(method, data, strangers)
            minutes = (time.process_time() - begun) / 60
            _note(entry, method, judge(told, strangers, self.seen), told, minutes + self._earlier_minutes(method))
            write_json(self.out, results)
        print("\n".join(rows(results)))

    def _earlier_minutes(self, method: str) -> float:
        return {RSSM: self.model_minutes, BUNDLED: math.nan}.get(method, 0.0)

    def _dream(self, method: str, strangers: StrangerSet) -> Comparison:
        model = self.model if method == RSSM else f"{strangers.embodiment}-state"
        return measure_trust(load_pretrained_model(model), strangers, seen=self.seen).comparison

    def _estimate(self, method: str, data: Transitions, strangers: StrangerSet) -> Comparison:
        """Returns as a baseline tells them, from the resets of the set's real episodes."""
        body, members = get_embodiment(strangers.embodiment), strangers.members
        episodes = min(len(member.returns) for member in members)
        starts = reset_states(body.name, strangers.task, episodes)
        with one_thread():
            policies = [member.policy for member in members]
            returns = BASELINES[method](data, policies, starts, body.episode_steps, seed=self.seed)
        lengths = np.full(episodes, body.episode_steps)
        told = tuple(
            PolicyReturns(member.name, Episodes(row, lengths), Episodes(np.array(member.returns[:episodes]), lengths))
            for member, row in zip(members, returns, strict=True)
        )
        return Comparison(body.name, strangers.task, method, SEED, body.episode_steps, told)


def _note(entry: dict[str, Any], method: str, verdict: dict[str, Any], told: Comparison, minutes: float) -> None:
    """Puts a method's verdict and its returns into the results of a body."""
    entry.update({key: verdict[key] for key in ("runs", "policies", "range", "span", "thirds", "seen")})
    entry["episodes"] = told.episodes
    entry["real returns"] = {policy.name: round(policy.real.mean, 1) for policy in told.policies}
    entry["methods"][method] = {
        **{key: verdict[key] for key in (*METRICS, "bias", "regret_at_1", "intervals")},
        "minutes": None if math.isnan(minutes) else round(minutes, 2),
        "returns": {policy.name: round(policy.dream.mean, 1) for policy in told.policies},
    }


def reset_states(body: str, task: str, episodes: int) -> NDArray[np.float32]:
    """States [E, D] in which the real episodes of a set of strangers begin."""
    envs = make_real_envs(body, episodes, task=task)
    try:
        seeds = [SEED + index for index in range(episodes)]
        return np.asarray(envs.reset(seed=seeds)[0], np.float32)  # type: ignore[arg-type]  # Gymnasium takes lists
    finally:
        envs.close()


def rows(results: dict[str, Any]) -> list[str]:
    """The table in Markdown: a row for each body and method."""
    columns = ("body, task", "method", "Spearman", "Pearson", "mean error", "minutes")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for body, entry in results.items():
        for name, found in entry["methods"].items():
            cells = []
            for metric, form in METRICS.items():
                if found[metric] is None:
                    cells.append("-")
                    continue
                low, high = (form.format(end) for end in found["intervals"][metric]["95"])
                cells.append(f"{form.format(found[metric])} [{low}, {high}]")
            minutes = "-" if found["minutes"] is None else f"{found['minutes']:.1f}"
            lines.append(f"| {body} | {name} | {' | '.join(cells)} | {minutes} |")
    return lines


if __name__ == "__main__":
    tyro.cli(OffPolicy).run()
