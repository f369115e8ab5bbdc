"""Every script in examples/ runs, with less to do than it says, and opens as a notebook."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import aime_gym

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
LESS = {
    "first_steps": {"EPISODES": 1},
    "agents": {"STEPS": 4096, "EPISODES": 2},
    "my_env": {"EPISODES, UPDATES, HEAD_UPDATES": (8, 4, 4), "STEPS": 2048},
    "imitation": {"UPDATES": 2, "EPISODES": 1},
    "my_data": {"EPISODES, UPDATES, HEAD_UPDATES": (12, 4, 4), "STEPS": 2048},
    "lunar_lander": {"EPISODES, UPDATES, HEAD_UPDATES": (8, 2, 4), "WATCHED": 2},
    "planning": {"EPISODE_STEPS": 4},
    "ppo_on_tensors": {"UPDATES": 10},
}
"""The constants at the top of each script, and how small they are here."""
SLOW = ("agents", "my_env", "imitation", "my_data")
ELSEWHERE = ("rllib_ppo", "skrl_ppo", "torchrl_collect")
"""Scripts that need other packages and have tests of their own."""


def run(name: str, folder: Path) -> dict:
    """What a script leaves behind, run in a folder with its smaller constants."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    for constant, value in LESS[name].items():
        text, found = re.subn(rf"^{constant} = .*$", f"{constant} = {value}", text, flags=re.MULTILINE)
        assert found == 1, f"{name}.py sets {constant} {found} times"
    namespace: dict = {"__name__": name}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(text, f"examples/{name}.py", "exec"), namespace)
    return namespace


def test_every_script_is_run_by_a_test():
    assert {path.stem for path in FOLDER.glob("*.py")} - set(ELSEWHERE) == set(LESS)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_opens_as_a_notebook(path):
    """Percent cells: text first, with a title, then code; what opens them is Jupytext, VS Code, Spyder or PyCharm."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    cells = re.split(r"^# %%.*\n", text, flags=re.MULTILINE)[1:]
    heads = re.findall(r"^# %%(.*)$", text, re.MULTILINE)
    for head, cell in zip(heads, cells, strict=True):
        ast.parse(cell)  # a cell of code is whole
        if "[markdown]" in head:
            assert all(line.startswith("#") for line in cell.splitlines() if line)


class TestPlanning:
    @pytest.fixture(scope="class")
    def script(self, tmp_path_factory):
        return run("planning", tmp_path_factory.mktemp("planning"))

    @pytest.mark.parametrize("how", ["by_cem", "by_gradient"])
    def test_plans_earn_more_than_their_beginning(self, script, how):
        torch.manual_seed(0)
        latents, nothing = script["dream"].reset(seeds=3).latents[0], torch.zeros(script["HORIZON"], 1)
        plan = script[how](latents, nothing)
        with torch.no_grad():
            both = torch.stack([plan, nothing], 1).repeat(1, script["PLANS"] // 2, 1)
            found, idle = script["returns"](both, latents)[:2].tolist()
        assert plan.abs().max() <= 1
        assert found > idle + 20

    def test_they_are_acted_upon_in_the_world(self, script):
        assert 0 <= script["act"](script["by_cem"]) <= 4 * 4


def test_ppo_on_tensors_learns(tmp_path):
    script = run("ppo_on_tensors", tmp_path)
    curve = script["ppo"](10)
    assert len(curve) == 10
    assert curve[-1] > 1.2 * curve[0]
    assert script["act"]([0.0] * script["observation_dim"]).shape == (1,)


def test_the_last_step_of_a_lander_pays_in_the_dream(tmp_path, capsys):
    pytest.importorskip("Box2D")
    script = run("lunar_lander", tmp_path)
    world, dream = script["ends"](script["world"]), script["ends"](script["dream"])
    assert "random" in capsys.readouterr().out
    assert world["crashes"] == 2
    assert world["last 1"] == -100
    heads = aime_gym.load_pretrained_model(tmp_path / script["model"]).heads
    assert heads.reward_limits[0] == -100
    assert heads.config["pays_ends"]
    assert dream["steps"] > 1


@pytest.mark.parametrize("name", ["first_steps", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_script_runs(name, tmp_path, capsys):
    run(name, tmp_path)
    assert "random" in capsys.readouterr().out  # the comparison was printed
