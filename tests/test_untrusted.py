"""Files from others: a name in one imports nothing, a config reads nothing of the machine, no pickle opens unasked."""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rich.console import Console
from stable_baselines3 import DDPG, PPO, SAC
from stable_baselines3.common.vec_env import VecNormalize

import aime_gym
from aime_gym import register_dream
from aime_gym.agents.plain import make_agent, observation_statistics
from aime_gym.agents.sb3 import load_sb3_agent, save_sb3_agent
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.collect import TrainingBuffer, _BestOfTraining, _load_agent
from aime_gym.commands.compare import Compare
from aime_gym.commands.data_sets import Render
from aime_gym.commands.dream import Dream
from aime_gym.commands.imitate import Imitate
from aime_gym.commands.ledger import Ledger
from aime_gym.commands.play import Play
from aime_gym.commands.pretrain import Pretrain
from aime_gym.commands.train import Train
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.returns import Episodes, as_policy, load_policy
from aime_gym.files import DIGESTS
from aime_gym.parallel import job_progress
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.config_file import FORMAT, config_from_yaml
from tests.random_data import record_random
from tests.random_models import write_random_model
from tests.tiny_model import make_tiny_model

IDS = ["flagged_module:Unknown-v0", "flagged_module:Pendulum-v1", "flagged_module.part:Pendulum-v1"]
"""Ids of a package that is not imported, also where Gymnasium itself knows what is behind the colon."""


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
def test_names_in_files_import_nothing(name, data, dreams, tmp_path, flagged):
    write_metadata(data, {"embodiment": name})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.json").write_text(json.dumps({"settings": {"embodiment": name}}))
    agent = str(tmp_path / "run")
    save_sb3_agent(make_agent("shac", dreams, observation_statistics(dreams), 0), tmp_path / "run" / "agent.zip")
    whole, bare = named_in_config(tmp_path / "model", name), named_in_config(tmp_path / "bare", name, action_dim=False)
    demonstrations = record_random(tmp_path / "demonstrations", 3, 40)
    write_metadata(demonstrations, {"embodiment": name})
    for use in (
        lambda: TrajectoryDataset(data).body,
        lambda: Train((data,), out=tmp_path / "out").run(),
        lambda: Render((data,), workers=1).run(),
        lambda: Pretrain(datasets=(data,), out=tmp_path / "out", work=tmp_path / "work", rounds=0).run(),
        lambda: load_pretrained_model(bare),
        lambda: Compare((agent,), out=tmp_path / "out").run(),
        lambda: Play(agent=agent, video=tmp_path / "out" / "film.mp4").run(),
        lambda: Dream(model=str(whole), out=tmp_path / "out").run(),
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


def with_pickle(path: Path) -> Path:
    """Puts a pickle into an agent's file that imports the flagged package when it is opened; SB3 would open it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = pickle.dumps(Importer())
    data = json.loads(members["data"]) | {"policy_class": {":serialized:": base64.b64encode(pickled).decode()}}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | {"data": json.dumps(data).encode()}).items():
            archive.writestr(name, content)
    return path


class Importer:
    def __reduce__(self):
        return importlib.import_module, ("flagged_module",)


@pytest.fixture(scope="module")
def dreams(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("model"), "pendulum")
    envs = aime_gym.make_sb3_env("AimeDream-Pendulum-v0", n_envs=4, seed=0, model=model)
    yield envs
    envs.close()


@pytest.mark.parametrize("algo", ["shac", "ppo", "sac", "td3"])
def test_our_agents_act_without_a_pickle(algo, dreams, tmp_path, flagged):
    agent = make_agent(algo, dreams, observation_statistics(dreams), 0)
    path = with_pickle(save_sb3_agent(agent, tmp_path / "agent.zip"))
    plain = load_policy(path)
    observations = dreams.reset()
    for deterministic in (True, False):
        torch.manual_seed(0)
        expected = agent.predict(observations, deterministic=deterministic)[0]
        torch.manual_seed(0)
        np.testing.assert_array_equal(plain.predict(observations, deterministic=deterministic)[0], expected)
    assert plain.observation_space == agent.observation_space
    assert plain.action_space == agent.action_space
    assert not flagged()
    with contextlib.suppress(AimeGymError):
        load_sb3_agent(path)
    assert flagged(), "SB3's own loading opens pickles: this test could not fail otherwise"


@pytest.mark.parametrize(
    "make",
    [lambda envs: DDPG("MlpPolicy", envs), lambda envs: SAC("MlpPolicy", envs, policy_kwargs={"n_critics": 3})],
)
def test_agents_of_other_parts_are_read_as_sb3_wrote_them(make, dreams, tmp_path):
    agent = make(dreams)
    loaded = load_policy(save_sb3_agent(agent, tmp_path / "agent.zip"))
    observations = dreams.reset()
    expected = agent.predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)


def test_agents_that_nobody_named_are_not_opened(dreams, tmp_path, flagged):
    theirs = record_random(tmp_path / "theirs", 2, 5)
    agent = PPO("MlpPolicy", dreams, policy_kwargs={"net_arch": [4]})
    agent.save(theirs / "agent.zip")
    with_pickle(theirs / "agent.zip")
    model = load_pretrained_model(make_tiny_model(tmp_path / "model", "pendulum"))
    work = tmp_path / "work"
    own = make_agent("shac", dreams, observation_statistics(dreams), 0)
    save_sb3_agent(own, work / "round-1" / "swingup-0-end.zip")
    job = Pretrain("pendulum", datasets=(theirs,), work=work)
    assert list(job._agents([theirs, work / "round-1"], model)) == ["round-1/swingup-0-end"]
    agent.save(work / "round-1" / "swingup-1-end.zip")
    with_pickle(work / "round-1" / "swingup-1-end.zip")
    with pytest.raises(AimeGymError, match="pickles alone, which are code"):
        job._agents([theirs], model)
    with pytest.raises(AimeGymError, match="not saved by this version"):
        job._run_agents(work / "round-1", tmp_path / "model")
    assert not flagged()
    (work / "round-1" / "swingup-1-end.zip").unlink()
    agent.save(tmp_path / "mine.zip")
    job = Pretrain("pendulum", datasets=(theirs,), work=work, experts=(tmp_path / "mine.zip",))
    assert list(job._agents([theirs], model)) == ["round-1/swingup-0-end", str(tmp_path / "mine.zip")]


def test_the_training_of_sac_goes_on_without_a_pickle(tmp_path, flagged):
    folder = tmp_path / "buffer"
    first: Any = TrainingBuffer("pendulum", "swingup", folder).agent
    first.num_timesteps, first.best_mean = 3, 7.0
    for name in ("latest", "agent"):
        with_pickle(save_sb3_agent(first, folder / f"{name}.zip"))
    again = TrainingBuffer("pendulum", "swingup", folder).agent
    assert again.num_timesteps == 3
    for name, value in first.policy.state_dict().items():
        torch.testing.assert_close(again.policy.state_dict()[name], value, rtol=0, atol=0)
    assert _BestOfTraining(folder)._best == 7.0
    assert not flagged()
    (folder / "latest.zip").write_bytes((folder / "latest.zip").read_bytes()[:-100])
    with pytest.raises(AimeGymError, match=r"latest\.zip"):
        TrainingBuffer("pendulum", "swingup", folder)


@pytest.mark.parametrize("where", ["vecnormalize.pkl", "agent/vecnormalize.pkl", None])
def test_an_agent_that_learned_behind_vecnormalize_gets_its_statistics(where, dreams, tmp_path):
    normalised = VecNormalize(dreams, norm_reward=False)
    agent = PPO("MlpPolicy", normalised, n_steps=4, batch_size=4, n_epochs=1, policy_kwargs={"net_arch": [4]})
    agent.learn(16)
    agent.save(tmp_path / "agent.zip")
    observations = dreams.reset() + 3
    if where is None:
        message = "learned behind a VecNormalize, whose statistics are not beside it"
        with pytest.warns(UserWarning, match=message) as told:
            load_policy(tmp_path / "agent.zip")
        assert [one.filename for one in told] == [__file__]
        return
    (tmp_path / where).parent.mkdir(exist_ok=True)
    normalised.save(str(tmp_path / where))
    policy = as_policy(load_policy(tmp_path / "agent.zip"), dreams.action_space)
    expected = agent.predict(normalised.normalize_obs(observations), deterministic=True)[0]
    np.testing.assert_array_equal(policy.predict(observations, deterministic=True)[0], expected)
    (tmp_path / where).write_bytes(pickle.dumps({"mean": 0}))
    with pytest.raises(AimeGymError, match=r"vecnormalize\.pkl does not hold the VecNormalize of agent\.zip"):
        load_policy(tmp_path / "agent.zip")


def test_collecting_takes_the_agent_that_is_there_now(dreams, tmp_path):
    path, actions = tmp_path / "agent.zip", []
    for seed in range(2):
        save_sb3_agent(make_agent("shac", dreams, observation_statistics(dreams), seed), path)
        agent = _load_agent(str(path))
        assert _load_agent(str(path)) is agent, "read once"
        actions.append(agent.predict(np.zeros(3, np.float32), deterministic=True)[0])
    assert actions[0] != actions[1]


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


def test_names_with_markup_are_shown_as_they_are(tmp_path, capsys):
    episodes = Episodes(np.array([1.0, 2.0]), np.array([3, 4]), None)
    comparison = Comparison("[/x]", "[red]", "[/model]", 0, 4, (PolicyReturns("[/y]", episodes, episodes),))
    with job_progress("Collecting [/x]", 1, "trajectories") as advance:
        advance()
    entry = {"task": "[/x]", "agent": "[/y]", "dream": 1.0, "real": 1.0, "doubt": None}
    (tmp_path / "ledger.json").write_text(json.dumps({"rounds": {"1": {"agents": [entry], "score_steps": 4}}}))
    Console().print(Ledger(tmp_path / "ledger.json", get_embodiment("walker")).table())
    shown = str(comparison) + capsys.readouterr().out
    for text in ("[/x]", "[red]", "[/model]", "[/y]", "Collecting [/x]"):
        assert text in shown
