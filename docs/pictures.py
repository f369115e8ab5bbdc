"""Draws docs/pictures/strangers.png: what the dreams of bundled models promise strangers, and what the world pays them.

python docs/pictures.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from aime_gym.evaluation.charts import DREAM, GREY, REAL

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {
    **{"rhythm": GREY, "ars": REAL, "ppo": DREAM, "td3": "#1fa187"},
    **{"tqc": "#d6477f", "trpo": "#7a5195", "dqn": "#ef9d3b"},
}


def measured() -> dict[str, dict[str, dict]]:
    """Title -> policy -> its family, and its dreamt and real returns, of all models that strangers have judged."""
    found = {}
    for path in sorted((ROOT / "aime_gym" / "pretrained").glob("*/trust.json")):
        number = json.loads((path.parent / "revision.json").read_text())["revision"]
        for task, known in json.loads(path.read_text()).get("tasks", {}).items():
            if known["strangers"] and known["strangers"].get("returns"):
                found[f"{path.parent.name} {number}, {task}"] = known["strangers"]["returns"]
    return found


def draw(path: Path) -> None:
    """One panel a model; the diagonal is a dream without error."""
    panels = measured()
    columns = 7
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 2.2 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, (title, policies) in zip(axes, panels.items(), strict=False):
            panel.axline((0, 0), slope=1, linestyle=":", color=GREY, linewidth=0.8)
            for family, colour in COLOURS.items():
                of = [each for each in policies.values() if each["family"] == family]
                panel.scatter([e["real"] for e in of], [e["dream"] for e in of], s=9, color=colour, label=family)
            panel.set_title(title, fontsize=7)
            most = max(max(each["real"], each["dream"]) for each in policies.values())
            least = min(0.0, *(min(each["real"], each["dream"]) for each in policies.values()))
            most += 0.05 * (most - least)
            panel.set(xlim=(least, most), ylim=(least, most))
        for panel in axes[len(panels) :]:
            panel.axis("off")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS), frameon=False
        )
        figure.supxlabel("real return")
        figure.supylabel("dreamt return")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=85, metadata={"Software": None})


if __name__ == "__main__":
    draw(ROOT / "docs" / "pictures" / "strangers.png")
