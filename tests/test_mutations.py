"""Damaged and hostile files of every kind: each loads as what it was, as something sane, or as one clear line."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import resource
import shutil
import signal
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import aime_gym
from aime_gym.agents.aime import AIME
from aime_gym.agents.plain import POLICY, make_agent, observation_statistics
from aime_gym.agents.sb3 import load_agent, save_sb3_agent
from aime_gym.commands.dream import _earlier
from aime_gym.commands.ledger import Ledger
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.demonstrations import expert_return, load_demonstrations
from aime_gym.data.trajectories import read_metadata, recorded_tasks
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.compare import Comparison, PolicyReturns
from aime_gym.evaluation.fidelity import Fidelity
from aime_gym.evaluation.predict import Prediction
from aime_gym.evaluation.returns import Episodes
from aime_gym.evaluation.score import Score
from aime_gym.evaluation.validity import Accuracy, Ranking, RewardAccuracy, Validity
from aime_gym.evaluation.worlds import find_subject
from aime_gym.files import DIGESTS, REVISION, Revision
from aime_gym.flags import claim_run
from aime_gym.training.trainer import Trainer, load_module
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.trust import Trust, is_trusted, load_trust, save_trust, trust_line, warn_of_distrust
from tests.random_data import record_random
from tests.random_models import write_random_model
from tests.random_trust import some_strangers

SECONDS, MEMORY = 30, 3 * 1024**3
ODD = [
    *(
        None,
        True,
        "",
        "x",
        "$HOME",
        "${oc.env:HOME}",
        "[/x]",
        "[red]",
        "\n\n",
        "no_such_module:Pendulum-v1",
        "\x00",
        "9" * 400,
    ),
    *(0, -1, 1.5, 3, 10**5, 10**9, 10**30, -(10**400), 1e38, 1e308, math.nan, math.inf, -math.inf),
    *([], {}, [[]], [None], {"x": None}, [1e308] * 3, ["x"] * 300),
]
"""Values of kinds and sizes that nothing expects."""
ARRAYS: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda a: a[:-1],
    lambda a: a[:0],
    lambda a: a[..., None],
    lambda a: a[..., :1],
    lambda a: np.array(0.0),
    lambda a: a.astype("f8") * 1e300,
    lambda a: np.full(a.shape, 3e38, "f4"),
    lambda a: np.full(a.shape, np.nan, "f4"),
    lambda a: np.full(a.shape, -np.inf),
    lambda a: a.astype(complex),
    lambda a: a.astype("S3"),
    lambda a: np.zeros(a.shape, object),
    lambda a: np.zeros(a.shape, "M8[s]"),
    lambda a: np.zeros(a.shape, [("x", "f4")]),
    lambda a: a.astype(bool),
    lambda a: (a * 100).astype("i8"),
    lambda a: a.astype("f2"),
    lambda a: a.astype(">f8"),
    lambda a: np.asfortranarray(a),
]


def a_score(episodes: Episodes, model: Path) -> Score:
    """One with all of its parts."""
    numbers = np.random.default_rng(0).uniform(size=(6, 3))
    names = ("untrained", "after 4 steps", "random", "zero")
    agents = Comparison(
        "walker", "walk", "model", 0, 4, tuple(PolicyReturns(name, episodes, episodes) for name in names), 0.5
    )
    return Score(
        *("walker", "walk", "model", "0123456789abcdef", "state", 0, (4,)),
        Fidelity((1, 5, 20), ("near",) * 6, numbers, numbers, numbers, numbers),
        Validity(4, 1.5, {"one": 3.0}, {"one": 4.0}),
        RewardAccuracy(Accuracy(0.5, 0.1, 0.0), None, 20, {"one": (1.0, 1.1)}),
        Ranking(agents, some_strangers(model) | {"finding": "wrong"}),
        agents,
        {},
        ("A note.",),
    )


class Files:
    """A folder with a file of every kind, and what is made of each."""

    def __init__(self, root: Path):
        self.root = root
        self.expected: dict[str, Any] = {}
        write_random_model(root / "model")
        shutil.copytree(root / "model", root / "bare")
        (root / "bare" / DIGESTS).unlink()
        kin = {"spearman": 0.9, "policies": 7, "mmrv": 2.0}
        save_trust(root / "model", {"walk": Trust(kin, some_strangers(root / "model")), "run": Trust(kin)})
        record_random(root / "data", 3, 12, task="walk")
        record_random(root / "demonstrations", 3, 12, task="walk", expert_return=3.5)  # type: ignore[arg-type]
        AIME(root / "model").save(root / "imitator")
        envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=2, seed=0, model=root / "model", task="walk")
        save_sb3_agent(make_agent("shac", envs, observation_statistics(envs), 0), root / "agent.zip")
        self.observations = envs.reset()
        envs.close()
        episodes = Episodes(np.array([1.0, 2.0]), np.array([3, 4]), np.array([0.5, 0.25]))
        policies = (PolicyReturns("one", episodes, episodes), PolicyReturns("two", episodes, episodes))
        compared = Comparison("walker", "walk", "model", 0, 4, policies, 0.5)
        compared.to_json(root / "returns.json")
        told = tuple(PolicyReturns(p.name, episodes, None, None, Prediction(1.5, (1.0, 2.0), "So.")) for p in policies)
        dataclasses.replace(compared, policies=told).to_json(root / "foretold" / "returns.json")
        a_score(episodes, root / "model").to_json(root / "score.json")
        entry = {"agents": [{"task": "walk", "agent": "a", "dream": 1.0, "real": 1.0, "gap": 0.0, "doubt": 0.1}]}
        ledger = {"datasets": {"data": 3}, "rounds": {"1": {**entry, "score_steps": 4}}, "trust_steps": 5}
        (root / "ledger.json").write_text(json.dumps(ledger))
        (root / "job.json").write_text(json.dumps(JOB))
        (root / "train.json").write_text(json.dumps(FLAGS))
        trainer = self.trainer()
        trainer.train()
        trainer.save(root / "last.pt")

    def trainer(self) -> Trainer:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        return Trainer(module, optimizer, Ones(), lambda model, batch: (model(batch).square().mean(), {}), 2)

    def model(self, folder: Path) -> Any:
        model = load_pretrained_model(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dream = gym.make("AimeDream-Walker-v0", model=model, task="walk", disable_env_checker=True)
        observation, _ = dream.reset(seed=0)
        step = dream.step(np.zeros(6, np.float32))
        finite(observation, step[0], step[1])
        return [model.config, observation, step[:2]]

    def dataset(self, folder: Path) -> Any:
        data = TrajectoryDataset(folder)
        arrays = data.sample_windows(2, 3, np.random.default_rng(0))
        finite(*data.statistics(data.keys))
        told = read_metadata(folder)
        finite(*(array for array in arrays.values()))
        return [str(data.body), dict(data.arrays), told, recorded_tasks(told)]

    def demonstrations(self, folder: Path) -> Any:
        shown = load_demonstrations(folder, load_pretrained_model(self.root / "model").config, 5)
        earned = expert_return(folder)
        finite(*shown.arrays.values(), 0.0 if earned is None else earned)
        return [dict(shown.arrays), earned]

    def revision(self, folder: Path) -> Any:
        told = load_pretrained_model(folder).revision
        assert told is not None
        assert Revision.from_dict(json.loads(json.dumps(told._asdict()))) == told
        return [told.number]

    def trust(self, folder: Path) -> Any:
        told = load_trust(folder)
        finite(*(number or 0.0 for trust in told.values() for number in (trust.kin or {}).values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warn_of_distrust(folder, "walk")
        return [told, is_trusted(folder, "walk"), [trust_line(folder, task) for task in told]]

    def comparison(self, folder: Path) -> Any:
        comparison = Comparison.from_json(folder / "returns.json")
        return [str(comparison), comparison.to_dict()]

    def score(self, folder: Path) -> Any:
        score = Score.from_json(folder / "score.json")
        return [str(score), score.to_markdown(), score.to_dict()]

    def ledger(self, folder: Path) -> Any:
        from rich.console import Console

        ledger = Ledger(folder / "ledger.json", load_pretrained_model(self.root / "model").config.body)
        Console(file=io.StringIO()).print(ledger.table())
        finite(ledger.steps)
        return [ledger.steps, ledger.rows()]

    def job(self, folder: Path) -> Any:
        subject = find_subject(None, None, [folder / "job.json"])
        before = _earlier(folder / "job.json", JOB["settings"])
        finite(before.get("real_episodes", 0), *before.get("random", []))
        finite(*(point["seconds"] for point in before.get("curve", [])))
        return [subject, before]

    def flags(self, folder: Path) -> Any:
        return claim_run(folder / "train.json", FLAGS)

    def imitator(self, folder: Path) -> Any:
        actions = AIME.load(folder).predict(self.observations)[0]
        finite(actions)
        return [actions]

    def agent(self, folder: Path) -> Any:
        actions = load_agent(folder / "agent.zip").predict(self.observations, deterministic=True)[0]
        finite(actions)
        return [actions]

    def checkpoint(self, folder: Path) -> Any:
        trainer = self.trainer()
        trainer.load(folder / "last.pt")
        module = torch.nn.Linear(3, 1)
        load_module(folder / "last.pt", module)
        finite(*(weight.detach() for weight in module.parameters()))
        return [trainer.update, list(module.parameters())]


class Ones:
    """Batches for the trainer."""

    def sample(self) -> Any:
        return torch.ones(2, 3)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert isinstance(state["rng"], int)

    def reseed(self, number: int) -> None:
        pass


JOB: dict[str, Any] = {
    "settings": {"embodiment": "walker", "task": "walk", "model": None, "steps": 7},
    "real_episodes": 3,
    "random": [1.0, 2.0],
    "curve": [
        {"steps": 1, "seconds": 0.5, "real": 2.0, "episodes": 2, "beats_random": 1},
        {"steps": 2, "seconds": 0.7, "predicted": 2.0, "low": 1.0, "high": 3.0, "dream": 2.0, "beats_random": 0},
    ],
}
FLAGS = {"seed": 1, "out": "x", "heads": {"tasks": ["walk"]}}
KINDS: dict[str, tuple[str, str, str]] = {
    "config": ("bare", "config.yaml", "model"),
    "saved config": ("model", "config.yaml", "model"),
    "weights": ("bare", "model.safetensors", "model"),
    "saved weights": ("model", "model.safetensors", "model"),
    "heads": ("bare", "heads.safetensors", "model"),
    "saved heads": ("model", "heads.safetensors", "model"),
    "digests": ("model", DIGESTS, "model"),
    "starts": ("model", "starts.npz", "model"),
    "trust": ("model", "trust.json", "trust"),
    "revision": ("model", REVISION, "revision"),
    "metadata": ("data", "dataset.json", "dataset"),
    "episode": ("data", "1.npz", "dataset"),
    "demonstration": ("demonstrations", "1.npz", "demonstrations"),
    "demonstrations' metadata": ("demonstrations", "dataset.json", "demonstrations"),
    "imitator": ("imitator", "imitator.json", "imitator"),
    "imitator's weights": ("imitator", "imitator.safetensors", "imitator"),
    "agent": (".", "agent.zip", "agent"),
    "comparison": (".", "returns.json", "comparison"),
    "prediction": ("foretold", "returns.json", "comparison"),
    "score": (".", "score.json", "score"),
    "ledger": (".", "ledger.json", "ledger"),
    "job": (".", "job.json", "job"),
    "flags": (".", "train.json", "flags"),
    "checkpoint": (".", "last.pt", "checkpoint"),
}
"""Kind of file -> its folder, its name, and who reads it."""
SURE = {"saved config", "saved weights", "saved heads", "starts", "episode", "demonstration", "agent", "checkpoint"}
"""What has a checksum: random damage to it is told, or is none."""


def finite(*arrays: Any) -> None:
    for array in arrays:
        for part in array.values() if isinstance(array, dict) else [array]:
            assert np.isfinite(np.asarray(part, np.float64)).all(), "not finite"


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, np.ndarray | torch.Tensor):
        return np.array_equal(np.asarray(first), np.asarray(second))
    return bool(first == second)


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits turned, bytes lost, blocks doubled: what disks and networks do."""
    kind, changed, place = rng.integers(4), bytearray(content), int(rng.integers(len(content)))
    if kind == 0:
        return content[:place]
    if kind == 1:
        changed[place : place + 16] = rng.bytes(16)
    elif kind == 2:
        changed[place:place] = content[: int(rng.integers(1, 64))]
    for _ in range(int(rng.integers(1, 5))):
        # Headers are where damage hurts: half of the turned bits are near an end.
        near = rng.integers(-400, 400) if rng.random() < 0.5 else rng.integers(len(changed))
        changed[int(near) % len(changed)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def twist(content: bytes, name: str, rng: np.random.Generator) -> bytes:
    """A well-formed file that says something odd."""
    kind = name.rpartition(".")[2]
    if kind in ("json", "yaml"):
        read: Any = json.loads if kind == "json" else yaml.safe_load
        write: Any = json.dumps if kind == "json" else yaml.safe_dump
        if rng.random() < 0.05:
            return [b"[" * 100_000, b'{"a":' * 5000, b"", b"null", b"\xff\xfe", b'{"a": 1' + b"0" * 5000 + b"}"][
                rng.integers(6)
            ]
        return write(twist_tree(read(content), rng)).encode()
    if kind == "npz":
        arrays = dict(np.load(io.BytesIO(content)))
        key = list(arrays)[rng.integers(len(arrays))]
        arrays[key] = ARRAYS[rng.integers(len(ARRAYS))](arrays[key])
        if rng.random() < 0.1:
            del arrays[key]
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()
    if kind == "safetensors":
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
        tensors = load_tensors(content)
        if metadata and rng.random() < 0.5:
            key = sorted(metadata)[rng.integers(len(metadata))]
            metadata[key] = json.dumps(twist_tree(json.loads(metadata[key]), rng))
            return save_tensors(tensors, metadata)
        key = list(tensors)[rng.integers(len(tensors))]
        twisted = ARRAYS[rng.integers(9)](tensors[key].numpy())
        tensors[key] = torch.as_tensor(np.ascontiguousarray(twisted))
        return save_tensors(tensors, metadata)
    if kind == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        members[POLICY] = twist(members[POLICY], POLICY, rng)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, inside in members.items():
                archive.writestr(member, inside)
        return buffer.getvalue()
    state = twist_tree(torch.load(io.BytesIO(content), weights_only=True), rng)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def twist_tree(tree: Any, rng: np.random.Generator) -> Any:
    """The tree with a value, a key or a part of it that is odd."""
    tree = copy.deepcopy(tree)
    part, places = tree, []
    while isinstance(part, dict | list) and len(part):
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = keys[int(rng.integers(len(keys)))]
        places.append((part, key))
        part = part[key]
    if not places:
        return ODD[rng.integers(len(ODD))]
    parent, key = places[-1 if rng.random() < 0.7 else int(rng.integers(len(places)))]
    odd = ODD[rng.integers(len(ODD))]
    if isinstance(parent, dict) and rng.random() < 0.2:
        parent["odd" if rng.random() < 0.5 else str(odd)] = parent.pop(key)
    elif rng.random() < 0.1:
        deep: Any = odd
        for _ in range(int(rng.integers(2, 60))):
            deep = [deep]
        parent[key] = deep
    else:
        parent[key] = odd
    return tree


@contextmanager
def bounded():
    """No more memory than now and a bit, and not long."""

    def too_long(*_):
        raise TimeoutError(f"longer than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def mutate_and_load(files: Files, kind: str, seed: int, tmp_path: Path) -> str | None:
    """What is wrong with how one mutated file is read; None if nothing is."""
    where, name, reader = KINDS[kind]
    rng = np.random.default_rng([seed, *kind.encode()])
    folder = tmp_path / "mutated"
    if where == ".":
        folder.mkdir()
        shutil.copy(files.root / name, folder / name)
    else:
        shutil.copytree(files.root / where, folder)
    read = getattr(files, reader)
    if kind not in files.expected:
        files.expected[kind] = read(folder)
    content = (folder / name).read_bytes()
    is_damage = bool(rng.random() < 0.5)
    (folder / name).write_bytes(damage(content, rng) if is_damage else twist(content, name, rng))
    try:
        with bounded():
            got = read(folder)
    except AimeGymError as error:
        told = str(error)
        return None if "\n" not in told and len(told) < 2000 else f"not one clear line: {told}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.300}"
    finally:
        shutil.rmtree(folder)
    if is_damage and kind in SURE and not same(files.expected[kind], got):
        return "another load without a word"
    return None


def wrong(files: Files, seeds: range, tmp_path: Path) -> list[str]:
    found = {(kind, seed): mutate_and_load(files, kind, seed, tmp_path) for kind in KINDS for seed in seeds}
    return [f"{kind}, seed {seed}: {what}" for (kind, seed), what in found.items() if what]


def test_mutated_files_of_every_kind(files, tmp_path):
    assert not wrong(files, range(3), tmp_path)
