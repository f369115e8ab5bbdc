"""README.md tells the truth: its Python runs, in order, and its commands are understood."""

import glob
import re
import tomllib
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from aime_gym.commands.doctor import check_models
from tests.documents import blocks, private_imports, run_in_order, shell_lines, understand

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(blocks(README, "python")) == 5
    run_in_order(README, "README.md")
    assert "random" in capsys.readouterr().out  # the comparison was printed


def test_the_python_examples_import_public_names_only():
    assert "import aime_gym" in README
    assert not private_imports(README)


@pytest.mark.parametrize("line", [line for line in shell_lines(README) if "aime-gym " in line])
def test_the_commands_are_understood(line):
    understand(line)


def test_the_install_commands_name_what_exists():
    lines = [line for line in shell_lines(README) if line.startswith("pip install")]
    assert len(lines) == 2
    for line in lines:
        (constraints,) = re.findall(r"-c (\S+)", line)
        assert (ROOT / constraints).is_file()
        extras = re.findall(r"\[(\w+)\]", line)
        assert set(extras) <= set(metadata("aime-gym").get_all("Provides-Extra") or [])


def test_links_and_pictures_inside_the_repository_exist():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_models_are_in_the_table():
    folders = [Path(path).parent.name for path in glob.glob(str(ROOT / "aime_gym/pretrained/*/config.yaml"))]
    assert folders
    rows = dict(re.findall(r"^\| `([\w-]+)` \|(.*)$", README, re.MULTILINE))
    told = {finding.what: finding.found for finding in check_models()}
    for name in folders:
        _, _, tasks, size, *_ = (cell.strip() for cell in rows[name].split("|"))
        found = told[f"model {name}"]
        assert found.endswith(f"loads; {tasks}"), f"{name}: {tasks}, the doctor says {found}"
        assert float(size.removesuffix(" MB")) == pytest.approx(float(found.partition(" MB")[0]), abs=0.15), name


def is_tested(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": "test"})


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_the_constraints_pin_every_direct_dependency(file):
    text = (ROOT / ".ci" / file).read_text()
    pins = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
    needed = [one for one in map(Requirement, requires("aime-gym") or []) if is_tested(one)]
    if file == "constraints.txt":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed += map(Requirement, project["optional-dependencies"]["docs"])
    for requirement in needed:
        pinned = pins.get(canonicalize_name(requirement.name), "none")
        assert pinned in requirement.specifier, requirement
