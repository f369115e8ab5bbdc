"""Docstrings are sentences that a newcomer reads once."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aime_gym
from aime_gym.errors import AimeGymError

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("aime_gym", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))
FRAGMENT = r"(As of\b|As there\b|As `|Of\b|Those\b|Whose\b)"
RULES = {
    "begins with a fragment of a sentence": re.compile(rf"\A\s*{FRAGMENT}"),
    "an argument is described by a fragment": re.compile(rf"^\s+[`*]*\w+(?: \([^)]*\))?: {FRAGMENT}", re.MULTILINE),
    "cites what is not in the repository": re.compile(r"\breference,? (?:section|sections|§)|§", re.IGNORECASE),
    "says 'as of' for 'see'": re.compile(r"\bas of `"),
    "says 'Example:', which the site shows as text, for 'Examples:'": re.compile(r"^\s*Example:$", re.MULTILINE),
    "says 'mend' for 'fix' or 'remedy'": re.compile(r"\bmend(?:s|ed|ing)?\b", re.IGNORECASE),
}


def broken_rules(text: str) -> list[str]:
    return [rule for rule, pattern in RULES.items() if pattern.search(text)]


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Every string that stands alone, with its line: docstrings of modules, classes, functions and attributes."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    alone = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return [(node.lineno, node.value.value) for node in alone if isinstance(node.value.value, str)]


def test_docstrings_are_sentences():
    texts = [(path, line, text) for path in FILES for line, text in docstrings(path)]
    assert len(texts) > 1000
    found = [f"{path.relative_to(ROOT)}:{line}: {rule}" for path, line, text in texts for rule in broken_rules(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Of all slots together.", "begins with a fragment of a sentence"),
        ("Steps.\n\n    Args:\n        state: Of all slots.\n", "an argument is described by a fragment"),
        ("Steps.\n\n    Args:\n        **options: Those of the env.\n", "an argument is described by a fragment"),
        ("The loss (reference, section 3).", "cites what is not in the repository"),
        ("The dream; arguments as of `make`.", "says 'as of' for 'see'"),
        ("A dream.\n\n    Example:\n        >>> 1\n", "says 'Example:', which the site shows as text, for 'Examples:'"),
        ("The message has the mend.", "says 'mend' for 'fix' or 'remedy'"),
    ],
)
def test_each_rule_finds_what_it_is_for(text, rule):
    assert broken_rules(text) == [rule]


def test_tests_that_docstrings_name_exist():
    code = [path for path in FILES if (ROOT / "aime_gym") in path.parents]
    named = {name for path in code for _, text in docstrings(path) for name in re.findall(r"`([Tt]est_?\w+)`", text)}
    known = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert named
    assert named <= known


def test_ordinary_sentences_break_no_rule():
    assert not broken_rules(
        "The state.\n\n    Args:\n        state: The state of all slots. Offers what it recommends.\n"
    )


SLOW = ("AIME", "BC", "BCO", "IIDM", "OnlineAIME", "Refine", "Train", "compare", "play", "predict_return")
"""Public names whose examples take more than a second."""
PUBLIC = {name: getattr(aime_gym, name) for name in aime_gym.__all__} | {"from_arrays": aime_gym.data.from_arrays}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PUBLIC]
)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch, request):
    """Every one has an example, which does what it shows; `...` stands for whatever else is printed."""
    if name == "play":
        request.getfixturevalue("gl")
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={})
    assert example.examples, f"the docstring of {name} has no example"
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert result.failed == 0, "".join(told)


PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^::: aime_gym\.([\w.]+)$", PAGE, re.MULTILINE)
NOUNS = ("embeddings", "slots", "sensors", "names", "states", "whether")
"""First words that end as verbs do."""


def found(name: str) -> Any:
    module, _, attribute = f"aime_gym.{name}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def functions(name: str) -> dict[str, tuple[Callable, str]]:
    """A public function, or the constructor and the methods of a public class, each with what documents it."""
    it = inspect.unwrap(found(name))
    if not inspect.isclass(it):
        return {name: (it, it.__doc__ or "")}
    ours = [each for each in it.__mro__ if each.__module__.startswith("aime_gym.")]
    others = {method for each in it.__mro__ if each not in ours for method in vars(each)}  # documented by their library
    methods: dict[str, tuple[Callable, str]] = {}
    for each in ours:
        for method, value in vars(each).items():
            plain = inspect.unwrap(getattr(value, "__func__", value))
            if inspect.isfunction(plain) and not method.startswith("_") and method not in others:
                methods.setdefault(f"{name}.{method}", (plain, plain.__doc__ or ""))
    if not issubclass(it, Exception):
        constructor = it.__init__ if inspect.isfunction(it.__init__) else it  # of named tuples
        methods[name] = (inspect.unwrap(constructor), it.__doc__ or "")
    return methods


def what_lacks(function: Callable, text: str, fields: str = "") -> list[str]:
    """What a docstring does not tell of a function; one that names another function may leave it to that."""
    lacks = []
    text, source = inspect.cleandoc(text), ""
    if inspect.isfunction(function) and not fields:
        source = textwrap.dedent(inspect.getsource(function))
    signature = inspect.signature(function)
    first = re.split(r"\W", text)[0].lower()
    gives = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    if not re.search(r"\b(as|of|what) `[\w.]+`", text):
        lacks += [
            f"says nothing of {parameter}"
            for parameter in signature.parameters
            if parameter not in ("self", "cls") and not re.search(rf"\b{parameter}\b", f"{text}\n{fields}")
        ]
    if gives and "\nArgs:" in text and first.endswith("s") and first not in NOUNS:
        lacks += ["has no section Returns"] if not re.search(r"\n(Returns|Yields):", text) else []
    if "raise AimeGymError(" in source and not re.search(r"error", text, re.IGNORECASE):
        lacks.append("does not say what raises an error")
    return lacks


def fields_of(cls: type) -> str:
    """The names of fields that have a docstring of their own, with these."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    pairs = itertools.pairwise(tree.body)
    return " ".join(
        f"{ast.unparse(field.target)}: {text.value.value}"
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    )


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_names_tell_what_they_take_give_and_refuse(name):
    told = []
    for function, (plain, text) in functions(name).items():
        fields = ""
        if function == name and dataclasses.is_dataclass(found(name)):
            ours = [each for each in found(name).__mro__ if dataclasses.is_dataclass(each)]
            fields = " ".join(map(fields_of, ours)) or " "
        told += [f"{function} {lack}" for lack in what_lacks(plain, text, fields)]
    assert not told, "\n".join(told)


def test_what_a_docstring_lacks_is_found():
    def steps(state: int, seed: int) -> int:
        raise AimeGymError("no")

    told = "Steps.\n\nArgs:\n    state: The state.\n"
    assert what_lacks(steps, told) == [
        *("says nothing of seed", "has no section Returns", "does not say what raises an error"),
    ]
    assert not what_lacks(steps, "The `state` with another `seed`; an error where it has none.")
    assert not what_lacks(steps, "Does what `step` does, errors included.")
