"""What comes from Python: switches are True or False, text stands for a path, and specs say what JSON cannot hold."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch

import aime_gym
from aime_gym.cli import COMMANDS
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import write_trajectory
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.explain import explain
from aime_gym.evaluation.strangers import StrangerSet
from aime_gym.parallel import claimed
from tests.random_data import record_random
from tests.random_models import write_random_model

ROOT = Path(aime_gym.__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> aime_gym.WorldModel:
    return write_random_model(tmp_path_factory.mktemp("model"))


DATACLASSES = {name: getattr(importlib.import_module(of.module), of.dataclass) for name, of in COMMANDS.items()}


def public_functions() -> dict[str, object]:
    """Every public function, and every public method of a public class, that this package defines."""
    found = {"explain": explain}
    for name in aime_gym.__all__:
        public = getattr(aime_gym, name)
        if dataclasses.is_dataclass(public):  # see below
            continue
        own = vars(public).items() if inspect.isclass(public) else [("", public)]
        inherited = [(key, value) for base in getattr(public, "__mro__", ()) for key, value in vars(base).items()]
        for key, value in (*inherited, *own):
            is_public = inspect.isfunction(value) and (not key.startswith("_") or key == "__init__")
            if is_public and inspect.unwrap(value).__module__.startswith("aime_gym"):
                found[f"{name}.{key}" if key else name] = value
    return found


def test_the_switches_of_functions_are_true_or_false(model):
    tried = []
    for name, function in public_functions().items():
        for parameter in inspect.signature(function).parameters.values():
            hidden = parameter.name.startswith("_") or name.startswith("WorldModel.")  # see the next test
            if parameter.annotation == "bool" and not hidden:
                given = {"AIME.__init__": (Mock(), model), "TensorDream.__init__": (Mock(), model)}
                with pytest.raises(AimeGymError, match=rf"^{parameter.name} is True or False; got 'no'"):
                    function(*given.get(name, (Mock(),) if "." in name else ()), **{parameter.name: "no"})
                tried.append(name)
    assert {"compare", "predict_return", "AIME.predict", "LatentObservation.__init__"} <= {*tried}


def test_the_switch_of_a_model_is_true_or_false(model):
    with pytest.raises(AimeGymError, match=r"^sample is True or False; got 'no'"):
        model.imagine(model.initial_state(2), torch.zeros(3, 2, 6), sample="no")


def test_the_switches_of_envs_are_true_or_false():
    for env_id in ("AimeDream-Walker-v0", "AimeReal-Walker-v0"):
        with pytest.raises(AimeGymError, match=r"^clip_actions is True or False; got 'yes'"):
            gym.make(env_id, clip_actions="yes")


def test_the_mean_dream_is_asked_for_by_a_switch(model):
    for make in (aime_gym.TensorDream, partial(gym.make, "AimeDream-Walker-v0")):
        with pytest.raises(AimeGymError, match=r"^deterministic is True or False; got 'no'"):
            make(model=model, deterministic="no")
    aime_gym.TensorDream(model, deterministic=np.True_)


def options(command: str, **given: object) -> object:
    """A command's dataclass with something in each field that has no default."""
    made = DATACLASSES[command]
    needed = [f for f in dataclasses.fields(made) if f.default is f.default_factory is dataclasses.MISSING]
    return made(**{f.name: "x" for f in needed} | given)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_fields_of_a_command_are_of_their_kinds(command):
    for field in dataclasses.fields(DATACLASSES[command]):
        if field.type == "bool":
            with pytest.raises(AimeGymError, match=rf"^{field.name} is True or False; got 'no'"):
                options(command, **{field.name: "no"})
        elif "tuple[Path" in str(field.type):
            for given in ("a/b", ["a/b"], (Path("a/b"),)):
                assert getattr(options(command, **{field.name: given}), field.name) == (Path("a/b"),)
        elif "Path" in str(field.type):
            assert getattr(options(command, **{field.name: "a/b"}), field.name) == Path("a/b")


def test_data_are_collected_into_a_folder_named_by_text(tmp_path):
    aime_gym.Collect("pendulum", trajectories=1, out=str(tmp_path / "data"), workers=1).run()
    assert (tmp_path / "data" / "0.npz").exists()


def test_public_functions_take_text_for_a_path():
    for name, function in public_functions().items():
        for parameter in inspect.signature(function).parameters.values():
            kinds = str(parameter.annotation).replace("PolicyLike", "str")
            assert "Path" not in kinds or "str" in kinds, f"{name}({parameter.name}: {parameter.annotation})"


def test_a_set_of_strangers_is_read_by_the_text_of_its_folder():
    folder = ROOT.parent / "benchmarks" / "strangers" / "cartpole-swingup"
    assert StrangerSet.load(str(folder)).digest == StrangerSet.load(folder).digest


def test_a_spec_says_what_json_cannot_hold(model):
    for name, given in (("reward_fn", lambda before, action, after: after[..., 0]), ("model", model)):
        usual = {"model": model.folder, name: given}
        for dream in (gym.make("AimeDream-v0", **usual), gym.make_vec("AimeDream-v0", num_envs=2, **usual)):
            with pytest.raises(AimeGymError, match=rf"{name}= is a (function|WorldModel).*gymnasium\.make"):
                dream.spec.to_json()


def test_a_spec_of_names_is_json(model):
    dream = gym.make("AimeDream-v0", model=model.folder, task="walk")
    again = gym.make(gym.envs.registration.EnvSpec.from_json(dream.spec.to_json()))
    assert again.spec == dream.spec


def test_a_folder_of_updates_belongs_to_one_process(model, tmp_path):
    data = record_random(tmp_path / "shown", episodes=2, steps=8)
    agent = aime_gym.AIME(model, data, batch_size=2, horizon=4)
    with claimed(tmp_path / "run"), pytest.raises(AimeGymError, match="is being written to by another call"):
        agent.learn(1, folder=str(tmp_path / "run"))
    agent.learn(1, folder=str(tmp_path / "run"))
    assert (tmp_path / "run" / "last.pt").exists()


def test_an_episode_of_no_step_is_refused(tmp_path):
    record_random(tmp_path, episodes=2, steps=8)
    write_trajectory(tmp_path / "2.npz", {key: rows[:1] for key, rows in np.load(tmp_path / "0.npz").items()})
    with pytest.raises(AimeGymError, match=r"2\.npz has one row"):
        TrajectoryDataset(tmp_path)
