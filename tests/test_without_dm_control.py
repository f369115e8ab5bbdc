"""Where dm_control is not installed, as after `pip install` on Python 3.13, dreams work and real envs say why."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_MISSING = "import sys; sys.modules['dm_control'] = None\n"
"""Makes dm_control one that is not installed, before anything is imported."""

_DREAMS = """
import aime_gym, gymnasium, numpy
from aime_gym.bodies.body import EMBODIMENTS
from aime_gym.cli import main
from aime_gym.world_model.formulas import TaskFormula
for body in EMBODIMENTS.values():  # some need sizes and masses
    TaskFormula(body.name, body.tasks[0])
envs = gymnasium.make_vec("AimeDream-Walker-v0", num_envs=2)
envs.reset(seed=0)
assert numpy.isfinite(envs.step(envs.action_space.sample())[1]).all()
for name in (*sys.modules,):
    assert sys.modules[name] is None or not name.startswith(("dm_control", "shimmy")), name
for make in (
    lambda: gymnasium.make("AimeReal-Walker-v0"),
    lambda: gymnasium.make("AimeDream-Walker-v0", render_mode="rgb_array").render(),
    lambda: aime_gym.compare("random", "Walker", model=envs.unwrapped.model),
):
    try:
        make()
    except aime_gym.AimeGymError as error:
        print(error, file=sys.stderr)
sys.exit(main(["dream", "--quick", "--out", sys.argv[1]]))
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", _MISSING + code, *words], capture_output=True, text=True, timeout=500)


def test_dreams_need_no_dm_control_and_what_does_says_how_to_install_it(tmp_path):
    result = run(_DREAMS, str(tmp_path / "run"))
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "dm_control, " in line]
    assert len(errors) == 4
    assert all("pip install" in error for error in errors), errors
    assert "real_episodes=0" in errors[2]
    assert "no trials and no evaluation" in errors[3]  # of the main job, in a single line
    assert "--trials 0" in errors[3]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_main_job_runs_in_the_dream_alone(tmp_path):
    words = ["dream", "--quick", "--trials", "0", "--steps", "45000", "--out", str(tmp_path / "run")]
    result = run("from aime_gym.cli import main; sys.exit(main(sys.argv[1:]))", *words)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_the_suite_needs_of_dm_control_is_listed_where_it_cannot_be_installed_whole():
    """dm_control asks for labmaze, which has no wheel for Python 3.13 and newer: it is installed by hand there."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = [Requirement(line) for line in project["dependencies"]]
    for version in ("3.11", "3.12"):
        assert "dm_control" in [each.name for each in lines if wanted(each, version)]
    for version in ("3.13", "3.14"):
        names = {each.name for each in lines if wanted(each, version)}
        assert "dm_control" not in names
        assert {"dm-env", "dm-tree", "lxml", "scipy"} <= names


def wanted(requirement: Requirement, version: str) -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate({"python_version": version})
