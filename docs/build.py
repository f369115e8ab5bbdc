"""Builds the site of documents: gathers its pages from the whole repository into build/docs, and runs Zensical on them.

What is written elsewhere is included, not copied by hand: the changelog, the benchmarks, the cards of the models, and
the examples, whose cells become a page each. A page may include a section of another file by a comment,
`<!-- include README.md: Models -->`. Links are those of the repository: they work there, and lead to the pages here.

    pip install -c .ci/constraints.txt -e ".[docs]"
    python docs/build.py            # strict: a link that leads nowhere is an error
    python docs/build.py --serve    # shows the site at http://localhost:8000
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<head>!?\[[^\]]*\]\()(?P<target>[^)\s]+)\)")
_INCLUDE = re.compile(r"^<!-- include (?P<file>\S+): (?P<heading>.+?) -->$", re.MULTILINE)
_CELL = re.compile(r"^# %%(?P<text> \[markdown\])?.*$", re.MULTILINE)


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Every source of a page, in the repository, and the page that it becomes."""
    found = {path: path.name for path in sorted((root / "docs").glob("*.md"))}
    found |= {root / "CHANGELOG.md": "changelog.md", root / "benchmarks" / "README.md": "benchmarks.md"}
    found[root / "findings" / "README.md"] = "findings.md"
    for card in sorted((root / "aime_gym" / "pretrained").glob("*/README.md")):
        found[card] = f"models/{card.parent.name}.md"
    for script in sorted((root / "examples").glob("*.py")):
        found[script] = f"examples/{script.stem}.md"
    return found


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level, up to the next one.

    Raises:
        ValueError: If there is no such heading.
    """
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"There is no heading '## {heading}'.")
    return found[1].strip()


def of_script(text: str) -> str:
    """A script with percent cells as a page: the cells of comments are text, the others are code."""
    starts = [*_CELL.finditer(text)]
    parts = []
    for cell, following in zip(starts, [*starts[1:], None], strict=True):
        body = text[cell.end() : following.start() if following else None].strip("\n")
        if cell["text"]:
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines()))
        elif body:
            parts.append(f"```python\n{body}\n```")
    return "\n\n".join(parts) + "\n"


def with_links(text: str, source: Path, page: str, known: dict[Path, str], files: dict[Path, str]) -> str:
    """The text with its links as they are in the site.

    Args:
        text: Markdown, whose links are relative to `source`.
        source: Where it is written.
        page: The page that it is part of.
        known: See `pages`.
        files: Takes what the text shows or links to that is no page: its path, and its name in the site.

    Raises:
        ValueError: If a link leads to nothing.
    """

    def translated(link: re.Match[str]) -> str:
        target, _, anchor = link["target"].partition("#")
        if "://" in target or not target:
            return link[0]
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists():
            raise ValueError(f"{source.relative_to(ROOT)} links to {target}, which does not exist.")
        if path.is_dir():
            return link["head"].removeprefix("[").removesuffix("](")  # there is no page of a folder
        name = known.get(path)
        if name is None:
            name = files[path] = f"files/{path.relative_to(ROOT).as_posix()}"
        name = os.path.relpath(name, os.path.dirname(page) or ".")
        return f"{link['head']}{name}{'#' * bool(anchor)}{anchor})"

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(translated, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(translated, text[end:])])


def gather(out: Path) -> None:
    """Writes all pages, and the files that they show, to a folder, which is made anew.

    Raises:
        ValueError: If a link or an include leads to nothing.
    """
    known, files = pages(), {}
    shutil.rmtree(out, ignore_errors=True)
    for source, page in known.items():
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".py":
            text = of_script(text)
        text = with_links(text, source, page, known, files)
        for include in [*_INCLUDE.finditer(text)]:
            other = ROOT / include["file"]
            part = section(other.read_text(encoding="utf-8"), include["heading"])
            text = text.replace(include[0], with_links(part, other, page, known, files))
        (out / page).parent.mkdir(parents=True, exist_ok=True)
        (out / page).write_text(text, encoding="utf-8")
    for path, name in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)


def main() -> int:
    """Builds the site, or serves it."""
    gather(BUILD / "docs")
    how = ["serve"] if "--serve" in sys.argv else ["build", "--strict", "--clean"]
    return subprocess.call([sys.executable, "-m", "zensical", *how], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
