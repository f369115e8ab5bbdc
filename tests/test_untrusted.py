"""Files from others: a name in one imports nothing, a config reads nothing of the machine, no pickle opens unasked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from aime_gym.data.metadata import write_metadata
from aime_gym.data.render import Render
from aime_gym.data.trajectories import TrajectoryDataset
from aime_gym.digests import DIGESTS
from aime_gym.embodiments import get_embodiment
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.imitate_job import Imitate
from aime_gym.pretraining import Pretrain
from aime_gym.registration import register_dream
from aime_gym.training.train import Train
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.config_file import FORMAT, config_from_yaml
from tests.random_data import record_random
from tests.random_models import write_random_model

IDS = ["flagged_module:Unknown-v0", "flagged_module:Pendulum-v1", "flagged_module.part:Pendulum-v1"]
"""Of a package that is not imported, also where Gymnasium itself knows what is behind the colon."""


@pytest.fixture
def flagged(tmp_path, monkeypatch):
    """A package that can be imported, and tells whether it was."""
    (tmp_path / "flagged_module").mkdir()
    for name in ("__init__", "part"):
        (tmp_path / "flagged_module" / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: "flagged_module" in sys.modules
    for name in [name for name in sys.modules if name.startswith("flagged_module")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return record_random(tmp_path_factory.mktemp("data") / "random", 3, 20)


def named_in_config(folder: Path, name: str, action_dim: bool = True) -> Path:
    """A model folder whose config says that its body is `name`."""
    write_random_model(folder)
    (folder / DIGESTS).unlink()
    path = folder / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if action_dim or "action_dim" not in line]
    path.write_text("\n".join(lines).replace("embodiment: walker", f"embodiment: {name}"))
    return folder


@pytest.mark.parametrize("name", IDS)
def test_names_in_files_import_nothing(name, data, tmp_path, flagged):
    write_metadata(data, {"embodiment": name})
    whole, bare = named_in_config(tmp_path / "model", name), named_in_config(tmp_path / "bare", name, action_dim=False)
    demonstrations = record_random(tmp_path / "demonstrations", 3, 40)
    write_metadata(demonstrations, {"embodiment": name})
    for use in (
        lambda: TrajectoryDataset(data).body,
        lambda: Train((data,), out=tmp_path / "out").run(),
        lambda: Render((data,), workers=1).run(),
        lambda: Pretrain(datasets=(data,), out=tmp_path / "out", work=tmp_path / "work", rounds=0).run(),
        lambda: load_pretrained_model(bare),
        lambda: register_dream("Flagged-v0", whole),
        lambda: Imitate(model=str(whole), demonstrations=str(demonstrations), out=tmp_path / "out", updates=1).run(),
    ):
        with pytest.raises(AimeGymError, match=r"files import nothing: `import flagged_module.*--embodiment"):
            use()
    assert load_pretrained_model(whole).config.embodiment == name  # its dreams need no other world
    assert not flagged(), "a file chose what runs here"
    assert not (tmp_path / "out").exists(), "refused too late"
    assert "Flagged-v0" not in gym.registry


def test_names_that_the_user_gives_or_has_imported_are_his(data, flagged):
    name = "flagged_module:Pendulum-v1"
    assert get_embodiment(name).name == name
    assert flagged()
    write_metadata(data, {"embodiment": name})
    assert TrajectoryDataset(data).body == get_embodiment(name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${oc.env:FLAG}", "only"),
        ("walk${oc.env:FLAG}", "only"),
        ("${oc.decode:'1'}", "only"),
        ("${${world_model.name}:FLAG}", "only"),
        ("${nowhere}", "not for a plain value"),
        ("${env.sensors}", "not for a plain value"),
        ("${env.embodiment}", "not for a plain value"),  # itself
    ],
)
def test_configs_read_nothing_of_the_machine(tmp_path, monkeypatch, value, message):
    monkeypatch.setitem(os.environ, "FLAG", "walker")
    folder = named_in_config(tmp_path / "model", value)
    with pytest.raises(AimeGymError, match=message) as caught:
        config_from_yaml(folder / "config.yaml")
    assert str(folder) in str(caught.value)


def test_configs_may_refer_to_their_own_values(tmp_path):
    path = named_in_config(tmp_path / "model", "${policy_lr}${gamma}") / "config.yaml"
    released = path.read_text().replace(f"format: {FORMAT}\n", "")
    path.write_text(released + "\npolicy_lr: walk\ngamma: er\nlog_name: ${now:%Y}\n")  # a training key: unread
    assert config_from_yaml(path).embodiment == "walker"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: [*a, *a]\n", "aliases"),
        ("[" * 40 + "]" * 40, "levels"),
        ("a: " + "x" * 200_000, "longer"),
        ("- 1\n", "keys and values"),
        ("", "environment_setup"),
        ("a: 1" + "0" * 5000, "config"),
    ],
)
def test_configs_take_no_more_memory_than_they_have_bytes(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(AimeGymError, match=message):
        config_from_yaml(tmp_path / "config.yaml")
