"""`import aime_gym` registers the ids and loads nothing heavy."""

import ast
import inspect
import subprocess
import sys

import pytest

import aime_gym
from aime_gym.bodies.body import EMBODIMENTS

_PROBE = """
import sys, time
begin = time.perf_counter()
import {module}
print(time.perf_counter() - begin)
import gymnasium
print(*[id for id in gymnasium.registry if id.startswith("Aime")])
print(*[name for name in sys.modules if name.split(".")[0] in
        ("torch", "stable_baselines3", "dm_control", "mujoco", "shimmy", "OpenGL", "glfw", "matplotlib", "imageio")])
"""


@pytest.mark.parametrize("module", ["aime_gym", "aime_gym.cli", "aime_gym.commands.doctor"])
def test_importing_is_light(module):
    probe = [sys.executable, "-c", _PROBE.format(module=module)]
    result = subprocess.run(probe, capture_output=True, text=True, timeout=120, check=True)
    seconds, ids, heavy = result.stdout.splitlines()
    print(f"import {module}: {float(seconds):.2f} s")
    names = ["", *(f"{body.title}-" for body in EMBODIMENTS.values())]
    assert set(ids.split()) == {f"Aime{world}-{name}v0" for world in ("Real", "Dream") for name in names}
    assert heavy == ""


def test_ids_are_found_by_the_module_prefix():
    probe = "import gymnasium; print(gymnasium.make('aime_gym:AimeReal-Walker-v0').spec.max_episode_steps)"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "500"


@pytest.mark.parametrize("name", aime_gym.__all__)
def test_public_names_resolve_and_are_listed(name):
    assert getattr(aime_gym, name).__name__ == name
    assert name in dir(aime_gym)


def test_type_checkers_see_the_public_names_and_no_others():
    imports = [
        node
        for block in ast.parse(inspect.getsource(aime_gym)).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
    ]
    assert {alias.asname: node.module for node in imports for alias in node.names} == aime_gym._MODULES
    assert all(alias.asname == alias.name for node in imports for alias in node.names)  # "as" marks what is exported


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = aime_gym.nonsense
