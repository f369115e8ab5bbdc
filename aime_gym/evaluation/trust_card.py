"""What strangers say of a model's dreams, as a part of its card that is written anew with each measurement."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aime_gym.files import write_atomically
from aime_gym.world_model.trust import MOST_ERROR, Trust, load_trust

CARD = "README.md"
SECTION = "## What its dreams are worth"
BEGIN, END = "<!-- strangers: written by aime-gym compare --strangers -->", "<!-- strangers: end -->"


def write_card(folder: Path) -> Path:
    """Writes what trust.json tells of strangers between its marks in a model's card; the rest of it stays.

    Without the marks they are put at the beginning of the section `SECTION`, which is appended where there is none.

    Args:
        folder: Of the model.

    Returns:
        The path of the card.

    Raises:
        AimeGymError: If trust.json is broken or the disk full.
    """
    measured = {task: trust for task, trust in load_trust(folder).items() if trust.strangers is not None}
    path = folder / CARD
    card = path.read_text() if path.exists() else f"# {folder.name}\n"
    lines = [BEGIN, "", "### To strangers", "", _INTRODUCTION]
    for task, trust in measured.items():
        lines += ["", _of_task(task, trust)]
    lines += ["", "### To its kin", ""] if any(trust.kin for trust in measured.values()) else [""]
    block = "\n".join([*lines, END])
    if BEGIN in card and END in card:
        begin, end = card.index(BEGIN), card.index(END) + len(END)
        card = card[:begin] + block + card[end:]
    elif re.search(rf"^{SECTION}$", card, re.MULTILINE):
        card = re.sub(rf"^{SECTION}$", lambda found: f"{found[0]}\n\n{block}", card, count=1, flags=re.MULTILINE)
    else:
        card = f"{card.rstrip()}\n\n{SECTION}\n\n{block}\n"
    return write_atomically(path, card)


_INTRODUCTION = (
    "Policies that learned by means that have collected none of the model's data. Each dream begins with the first\n"
    "moments of the real episode that it is compared with. 95% intervals are by a bootstrap over runs, errors\n"
    "in units of return, and bias is dream minus real."
)


def _of_task(task: str, trust: Trust) -> str:
    of = trust.strangers or {}
    low, high = of["range"]
    verdict = {
        "trusted": "Its dreams are trusted",
        "wrong": "Its dreams are not trusted",
        "inconclusive": f"Nothing follows from it, as they say too little ({trust.lacks})",
    }[trust.finding]
    unseen = {name: group for name, group in of["families"].items() if name not in of["seen"]}
    apart = {f"{name} (seen)": of["families"][name] for name in of["seen"]}
    rows = [_row(name, group) for name, group in {"**all unseen**": of, **unseen, **apart}.items()]
    return "\n".join(
        [
            f"**{task}**: {of['policies']} policies of {of['runs']} runs, {of['episodes']} episodes each. {verdict}.",
            f"The mean error is {trust.relative_error:.0%} of the range from the return of random actions, {low:.0f}, "
            f"to the best known, {high:.0f}",
            f"(trusted up to {MOST_ERROR:.0%}). Real returns span {of['span']:.0%} of it, and "
            f"{', '.join(f'{third:.0%}' for third in of['thirds'])} of the policies are in its thirds.",
            f"Set `{of['set'][:16]}`, weights `{str(of['model'])[:16]}`."
            + "".join(f" Left out: {run}, which {why}." for run, why in of.get("left_out", {}).items()),
            "",
            "| strangers | policies | runs | Spearman | Pearson | mean error | bias |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _row(name: str, of: Mapping[str, Any]) -> str:
    cells = [
        _cell(of, key, spec)
        for key, spec in (("spearman", ".2f"), ("pearson", ".2f"), ("mean_absolute_error", ".0f"), ("bias", "+.0f"))
    ]
    return "| " + " | ".join([name, str(of["policies"]), str(of["runs"]), *cells]) + " |"


def _cell(of: Mapping[str, Any], key: str, spec: str) -> str:
    ends = of["intervals"].get(key, {}).get("95")
    interval = f" [{ends[0]:{spec}}, {ends[1]:{spec}}]" if ends else ""
    return "-" if of[key] is None else f"{of[key]:{spec}}{interval}"
