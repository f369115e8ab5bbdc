"""Docstrings are sentences that a newcomer reads once."""

import ast
import doctest
import re
from pathlib import Path

import pytest

import aime_gym

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
