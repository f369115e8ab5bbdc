"""The model of a pretraining goes to its place, with a card of its rounds."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from aime_gym.evaluation.comparison import Comparison
from aime_gym.evaluation.ledger import Ledger
from aime_gym.files import write_atomically
from aime_gym.world_model.trust import Trust, save_trust


def publish(model: Path, out: Path, ledger: Ledger, comparisons: list[Comparison], command: str) -> None:
    """Copies the last round's model to its place, with the ledger and what its dreams are worth in its card."""
    for path in sorted(model.glob("[!.]*")):  # what is hidden is a lock, or the rest of a write that was killed
        if path.is_file() and path.name != "README.md":
            write_atomically(out / path.name, path.read_bytes())
    rows = "\n".join("| " + " | ".join(row) + " |" for row in ledger.rows())
    card = (model / "README.md").read_text().replace(f"# {model.name}\n", f"# {out.name}\n", 1)
    card = re.sub(r"(?<=## How it was made\n\n```\n).*", lambda _: command, card, count=1)
    card += f"""
## Rounds

{ledger.steps:,} real env steps are behind this model. {ledger.data_steps:,} of them are data that it learned from, the
others are scores. Agents of each round learned in the model of the round before; mean returns of both worlds:

| round | task | agent | dream | real | gap | doubt |
| --- | --- | --- | --- | --- | --- | --- |
{rows}
"""
    card += "\n## What its dreams are worth\n"
    for comparison in comparisons:
        named = dataclasses.replace(comparison, model=out.name)
        card += f"\n{comparison.verdict}\n\n```\n{named}\n```\n"
    write_atomically(out / "README.md", card)
    save_trust(out, {comparison.task: Trust(comparison.metrics) for comparison in comparisons})
    ledger.chart(out / "rounds.png")
