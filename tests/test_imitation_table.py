"""`python -m benchmarks.imitation`: which cells there are, and a table that grows cell by cell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from aime_gym.data.trajectories import save_trajectory, write_metadata
from benchmarks.imitation import Cell, Imitation


@pytest.fixture
def leaps(tmp_path) -> str:
    """Demonstrations of the cheetah, with actions."""
    folder = tmp_path / "leaps"
    save_trajectory(folder, 0, {"position": np.zeros((9, 8)), "pre_action": np.zeros((9, 6))})
    write_metadata(folder, {"embodiment": "cheetah", "task": "run", "expert_return": 200.0})
    return str(folder)


def test_cells_are_of_one_body_and_what_cannot_be_filled_is_said(leaps, tmp_path, capsys):
    write_metadata(tmp_path / "body", {"embodiment": "cheetah"})
    table = Imitation(("walker-state", "cheetah-state"), ("walker-walk", leaps), body_data=(tmp_path / "body",))
    cells = [(cell.model, Path(cell.demonstrations).name, cell.column) for cell in table.cells()]
    assert cells == [
        *(("walker-state", "walker-walk", column) for column in ("AIME", "AIME kl_only")),
        *(("cheetah-state", "leaps", column) for column in ("AIME", "AIME kl_only", "BCO(0)", "IIDM", "BC")),
    ]
    out = capsys.readouterr().out
    assert "walker-walk, mdp, BCO(0): no --body-data are of the body." in out
    assert "walker-walk, mdp, BC: the demonstrations have no actions." in out
    assert "leaps, mdp, AIME with IDM: no model has an inverse dynamics model." in out


def test_a_table_keeps_earlier_cells_and_shows_the_papers_numbers(leaps, tmp_path, capsys):
    cell = Cell("cheetah-state", leaps, "OnlineAIME")
    table = Imitation(
        (cell.model,),
        (leaps,),
        columns=("OnlineAIME",),
        learn=False,
        work=tmp_path / "work",
        output=tmp_path / "t.json",
    )
    for seed, earned in ((0, 150.0), (1, 170.0)):
        run = table.folder(cell, seed)
        (run / "run").mkdir(parents=True)
        (run / "score.json").write_text(json.dumps({"returns": [earned, earned]}))
        (run / "settings.json").write_text(json.dumps({"task": "run", "setup": "mdp", "updates": 9}))
        (run / "run" / "progress.csv").write_text("time/total_timesteps,rollout/ep_rew_mean\n500,20.0\n1000,60.0\n")
        table.run()
        (run / "score.json").unlink()  # the next seed comes from elsewhere, as from another machine
    (written,) = json.loads((tmp_path / "t.json").read_text())["cells"]
    assert written["returns"] == {"0": [75.0, 75.0], "1": [85.0, 85.0]}
    assert written["mean"] == 80.0
    assert written["curves"] == {"0": [[500, 10.0], [1000, 30.0]], "1": [[500, 10.0], [1000, 30.0]]}
    shown = " ".join(capsys.readouterr().out.split())
    assert "79.3" in shown
    assert "27.3" in shown
