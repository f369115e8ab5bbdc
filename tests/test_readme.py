"""README.md tells the truth: its Python runs, in order, and its commands are understood."""

import ast
import glob
import importlib
import re
import shlex
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
import tyro
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import aime_gym
from aime_gym.cli import COMMANDS
from aime_gym.commands.doctor import check_models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_the_python_examples_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = blocks("python")
    assert len(examples) >= 4
    namespace: dict = {"__name__": "readme"}
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"README.md, Python example {number}", "exec"), namespace)
    assert "random" in capsys.readouterr().out  # the comparison was printed


def test_the_python_examples_import_public_names_only():
    imports = [
        node
        for example in blocks("python")
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in imports
        for alias in node.names
    ]
    assert "aime_gym" in names
    public = {"aime_gym", *(f"aime_gym.{name}" for name in aime_gym.__all__)}
    assert {name for name in names if name.split(".")[0] == "aime_gym"} <= public


@pytest.mark.parametrize("line", [line for line in shell_lines() if "aime-gym " in line])
def test_the_commands_are_understood(line):
    words = shlex.split(line.split("&&")[-1], comments=True)
    assert words[0] == "aime-gym"
    name, *options = words[1:]
    module = importlib.import_module(COMMANDS[name].module)
    command = tyro.cli(getattr(module, COMMANDS[name].dataclass), args=options)
    assert callable(command.run)


def test_the_install_commands_name_what_exists():
    lines = [line for line in shell_lines() if line.startswith("pip install")]
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


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_the_constraints_pin_every_direct_dependency(file):
    text = (ROOT / ".ci" / file).read_text()
    pins = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
    for requirement in map(Requirement, requires("aime-gym") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": "test"}):
            continue
        pinned = pins.get(canonicalize_name(requirement.name), "none")
        assert pinned in requirement.specifier, requirement
