"""What tests of documents share: the code of a page, and whether its commands are understood."""

from __future__ import annotations

import ast
import importlib
import re
import shlex

import tyro

import aime_gym
from aime_gym.cli import COMMANDS


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[str]:
    """The lines of all blocks of shell."""
    return [line for block in blocks(text, "bash") for line in block.splitlines() if line.strip()]


def run_in_order(text: str, name: str) -> dict:
    """What the Python of a page leaves behind."""
    namespace: dict = {"__name__": name}
    for number, example in enumerate(blocks(text, "python"), 1):
        exec(compile(example, f"{name}, Python example {number}", "exec"), namespace)
    return namespace


def private_imports(text: str) -> set[str]:
    """What a page imports from this package that is not public."""
    imports = [
        node
        for example in blocks(text, "python")
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in imports
        for alias in node.names
    ]
    public = {"aime_gym", *(f"aime_gym.{name}" for name in aime_gym.__all__)}
    return {name for name in names if name.split(".")[0] == "aime_gym"} - public


def understand(line: str) -> None:
    """Parses the command of a line of shell, as `aime-gym` does."""
    words = shlex.split(line.split("&&")[-1], comments=True)
    assert words[0] == "aime-gym"
    name, *options = words[1:]
    module = importlib.import_module(COMMANDS[name].module)
    command = tyro.cli(getattr(module, COMMANDS[name].dataclass), args=options)
    assert callable(command.run)
