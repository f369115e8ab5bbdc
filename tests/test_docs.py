"""The pages in docs/ tell the truth: links lead somewhere, Python runs, commands are understood, tables are whole."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import aime_gym
from aime_gym.cli import COMMANDS
from aime_gym.envs.dream_vector import DreamVectorEnv
from aime_gym.envs.tensor_dream import TensorDream
from tests.documents import blocks, private_imports, run_in_order, shell_lines, understand

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
SLOW = ("agents", "imitation", "my-env")
TESTED_ELSEWHERE = ("my-data",)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = script("build")


def anchors(text: str) -> set[str]:
    """What links can name in a page: its headings, as Markdown's table of contents makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All pages as they are gathered for the site."""
    folder = tmp_path_factory.mktemp("site") / "docs"
    build.gather(folder)
    return folder


class TestSite:
    def test_links_and_pictures_lead_somewhere(self, site):
        found = 0
        for page in sorted(site.rglob("*.md")):
            text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            for target in re.findall(r"\]\(([^)\s]+)\)", text):
                path, _, anchor = target.partition("#")
                if "://" in target:
                    continue
                there = page.parent / path if path else page
                assert there.is_file(), f"{page.relative_to(site)} links to {target}"
                assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{page.name}: {target}"
                found += 1
        assert found > 60

    def test_every_page_is_in_the_menu(self):
        nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]

        def named(entry) -> set[str]:
            if isinstance(entry, str):
                return {entry}
            return set().union(*map(named, entry.values() if isinstance(entry, dict) else entry))

        assert named(nav) == {f"{name}.md" for name in PAGES} | {"changelog.md", "benchmarks.md", "findings.md"}

    def test_what_is_written_elsewhere_is_included(self, site):
        assert (site / "changelog.md").read_text() == (ROOT / "CHANGELOG.md").read_text()
        assert "| `walker-state` | walker |" in (site / "models.md").read_text()
        assert {path.stem for path in (site / "models").iterdir()} == {
            path.parent.name for path in (ROOT / "aime_gym" / "pretrained").glob("*/config.yaml")
        }
        shown = (site / "examples" / "planning.md").read_text()
        assert shown.startswith("# Planning in a dream\n")
        assert "# %%" not in shown
        assert all(compile(block, "page", "exec") for block in blocks(shown, "python"))

    def test_pictures_are_drawn_and_small(self, tmp_path):
        pictures = script("pictures")
        assert len(pictures.measured()) >= 9
        pictures.draw(tmp_path / "strangers.png")
        for path in (tmp_path / "strangers.png", *(ROOT / "docs" / "pictures").iterdir()):
            assert 10_000 < path.stat().st_size < 100_000

    def test_a_link_to_nothing_is_refused(self):
        page = ROOT / "docs" / "index.md"
        for text in ("[here](nowhere.md)", "![here](../benchmarks/results/nowhere.png)"):
            with pytest.raises(ValueError, match="nowhere"):
                build.with_links(text, page, "index.md", build.pages(), {})
        with pytest.raises(ValueError, match="no heading"):
            build.section("# One\n\n## Two\n", "Three")

    def test_links_in_code_stay(self):
        text = "```python\npolicies[0](nowhere)\n```\n"
        assert build.with_links(text, ROOT / "docs" / "index.md", "index.md", build.pages(), {}) == text


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name, text in PAGES.items()
        if blocks(text, "python") and name not in TESTED_ELSEWHERE
    ],
)
def test_the_python_of_a_page_runs_in_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_in_order(PAGES[name], f"docs/{name}.md")


@pytest.mark.parametrize("name", PAGES)
def test_pages_import_public_names_only(name):
    assert not private_imports(PAGES[name])


@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, text in PAGES.items() for line in shell_lines(text) if "aime-gym " in line],
)
def test_the_commands_are_understood(name, line):
    understand(line)


class TestKeywords:
    """The table of docs/keywords.md is that of the signatures."""

    ROW = re.compile(r"^\| `(\w+)`( T)? \| `(.+?)` \| (.+?) \| `(.+?)` \| (.+?) \|$", re.MULTILINE)

    @pytest.fixture(scope="class")
    def rows(self):
        found = self.ROW.findall(PAGES["keywords"])
        return {name: (bool(mark), kind.replace("\\|", "|"), default) for name, mark, kind, _, default, _ in found}

    def test_has_every_keyword_with_its_type_and_default(self, rows):
        parameters = inspect.signature(DreamVectorEnv).parameters
        shown = {name: (kind, default) for name, (_, kind, default) in rows.items()}
        defaults = {
            name: str(each.default) if name == "autoreset_mode" else repr(each.default)
            for name, each in parameters.items()
        }
        assert shown == {name: (each.annotation, defaults[name]) for name, each in parameters.items()}

    def test_marks_those_of_the_tensor_dream(self, rows):
        assert {name for name, (mark, *_) in rows.items() if mark} == set(inspect.signature(TensorDream).parameters)


def test_every_public_name_is_on_the_page_of_the_api():
    shown = set(re.findall(r"^::: aime_gym\.([\w.]+)$", PAGES["api"], re.MULTILINE))
    assert {name for name in shown if "." not in name} == set(aime_gym.__all__)
    for name in shown:
        module, _, attribute = f"aime_gym.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_every_command_is_on_the_page_of_commands():
    shown = re.findall(r"^## aime-gym ([\w-]+)\n\n.*\n\n::: (\S+)$", PAGES["commands"], re.MULTILINE)
    assert shown == [(name, f"{command.module}.{command.dataclass}") for name, command in COMMANDS.items()]


class TestFilesForOthers:
    """What other programs read: GitHub, PyPI, reference managers, pre-commit."""

    def read(self, path: Path):
        return yaml.safe_load(path.read_text(encoding="utf-8"))

    def test_the_version_is_one(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        cited = self.read(ROOT / "CITATION.cff")
        assert {project["version"], aime_gym.__version__, str(cited["version"])} == {aime_gym.__version__}
        assert cited["license"] == project["license"]

    def test_the_workflow_runs_what_there_is(self):
        workflow = self.read(ROOT / ".github" / "workflows" / "tests.yml")
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        commands = " ".join(step["run"] for step in steps if "run" in step)
        files = set(re.findall(r"\.ci/[\w.-]+", commands))
        assert files == {".ci/run", ".ci/constraints.txt", ".ci/constraints-oldest.txt"}
        assert all((ROOT / file).is_file() for file in files)
        matrix = workflow["jobs"]["quick"]["strategy"]["matrix"]
        first = workflow["jobs"]["all"]["steps"][1]["with"]["python-version"]
        assert [first, *matrix["python"]] == ["3.11", "3.12", "3.13", "3.14"]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {name for part in re.findall(r"\.\[([\w,]+)\]", commands) for name in part.split(",")}
        assert extras <= set(project["optional-dependencies"])

    def test_nightly_parts_are_all_files(self):
        parts = self.read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["slow"]["strategy"]["matrix"]["part"]
        assert {part - 1 for part in parts} == {number % len(parts) for number in range(len(parts))}

    def test_libraries_are_tried_at_the_releases_that_their_page_names(self):
        rows = self.read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["libraries"]["strategy"]["matrix"]
        pins = {pin for row in rows["include"] for pin in re.findall(r"([\w-]+)(?:\[\w+\])?==([\d.]+)", row["install"])}
        assert len(pins) >= len(rows["include"])
        page = PAGES["libraries"]
        assert not [pin for pin in pins if " ".join(pin) not in page and "==".join(pin) not in page]

    def test_every_finding_is_listed(self):
        listed = re.findall(r"^\| `(\w+\.sh)` \|", (ROOT / "findings" / "README.md").read_text(), re.MULTILINE)
        assert listed == sorted(path.name for path in (ROOT / "findings").glob("*.sh"))

    @pytest.mark.parametrize("name", ["bug", "dream", "idea"])
    def test_templates_of_issues_ask_for_something(self, name):
        template = self.read(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
        assert template["name"]
        assert template["description"]
        assert any(part.get("validations", {}).get("required") for part in template["body"])
        assert all(part["attributes"]["label"] for part in template["body"])

    def test_hooks_are_the_linters_of_ci(self):
        hooks = self.read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
        stages = (ROOT / ".ci" / "run").read_text()
        assert all(f'stage "{hook["name"]}"' in stages for hook in hooks)
