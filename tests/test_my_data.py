"""docs/my-data.md tells the truth: its Python runs, in order, with less training, and its commands are understood."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro

from aime_gym.cli import COMMANDS, main
from aime_gym.data.trajectories import trajectory_paths

PAGE = (Path(__file__).parents[1] / "docs" / "my-data.md").read_text(encoding="utf-8")
LESS = {
    **{"updates=1000": "updates=3", "updates=300": "updates=3", "agent.learn(1024)": "agent.learn(64)"},
    **{'"batch_size": 16': '"batch_size": 4', '"memory_dim": 128': '"memory_dim": 16, "evaluation_windows": 4'},
    **{"range(40)": "range(8)", '"hidden_size": 128': '"hidden_size": 16, "tensorboard": False'},
}
"""What is done on the page, and how much less of it is done here."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the page's Python has made and printed, and where."""
    folder, namespace = tmp_path_factory.mktemp("page"), {"__name__": "my-data"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(blocks("python"), 1):
            for much, little in LESS.items():
                block = block.replace(much, little)
            exec(compile(block, f"docs/my-data.md, example {number}", "exec"), namespace)
    return folder, namespace


def test_what_is_shortened_here_is_on_the_page():
    assert all(PAGE.count(much) == 1 for much in LESS)


def test_the_examples_run_in_order(ran):
    folder, made = ran
    assert (folder / "models" / "robot" / "config.yaml").is_file()
    assert set(made["observation"]) == {"angle", "speed"}
    assert np.isfinite(made["reward"])
    assert made["action"].shape == (16, 2)


def test_ten_lines_lead_to_a_stepping_dream():
    lines = [line for line in blocks("python")[1].splitlines() if line]
    assert len(lines) <= 10
    assert "dream.step(" in lines[-1]


def test_the_problems_are_those_that_the_page_shows(ran):
    _, made = ran
    shown = next(block for block in blocks("text") if "problems" in block)
    with pytest.raises(made["aime_gym"].AimeGymError) as told:
        made["aime_gym"].data.from_arrays(made["observations"], made["actions"], made["spoilt"], out="datasets/spoilt")
    assert str(told.value) == shown.strip()


def test_the_commands_are_understood_and_files_are_imported(ran, tmp_path, monkeypatch):
    _, made = ran
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    for index, (seen, rewards) in enumerate(zip(made["observations"][2:5], made["rewards"][2:5], strict=True)):
        np.savez(f"logs/{index}.npz", torque=made["actions"][index + 2], reward=rewards, **seen)
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line]
    files = sorted(map(str, Path("logs").glob("*.npz")))
    assert main([*lines[0][1:2], *files, *lines[0][3:]]) == 0
    assert len(trajectory_paths(Path("datasets/robot"))) == len(files)
    for _, name, *options in lines:  # training and dreams of logged data have tests of their own
        module = importlib.import_module(COMMANDS[name].module)
        assert callable(tyro.cli(getattr(module, COMMANDS[name].dataclass), args=options).run)
