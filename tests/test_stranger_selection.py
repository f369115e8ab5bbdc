"""Few strangers for everybody: from all runs, weak, middling and strong."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from aime_gym.agents.numpy_policies import NoisyPolicy, Rhythm, save_plain
from aime_gym.commands.strangers import Strangers
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.publish_strangers import Candidate, select, third_of
from aime_gym.evaluation.returns import episode_returns
from aime_gym.evaluation.strangers import FORMAT, SEED, StrangerSet
from aime_gym.evaluation.worlds import make_real_envs
from aime_gym.files import digest_of


def candidates(returns: dict[str, list[float]], noisy: tuple[str, ...] = ()) -> list[Candidate]:
    """One of each return of each run; runs are called after their family."""
    return [
        Candidate(f"{run}-{stage}", run, run.split("-")[0], f"{run}-{stage}", real, run in noisy)
        for run, reals in returns.items()
        for stage, real in enumerate(reals)
    ]


def many(seed: int = 0) -> list[Candidate]:
    """Fifteen runs of eight stages, most of which learn late or never: four fifths of all earn little."""
    rng = np.random.default_rng(seed)
    runs = {}
    for family in ("ars", "ppo", "td3", "tqc", "rhythm"):
        for run in range(3):
            runs[f"{family}-{run}"] = (900 * rng.beta(0.25, 1, 8)).tolist() if family != "rhythm" else [5.0] * 7 + [9.0]
    return candidates(runs)


def thirds(names: tuple[str, ...], of: list[Candidate], low: float, high: float) -> list[int]:
    return [sum(one.name in names and third_of(one.real, low, high) == third for one in of) for third in range(3)]


@pytest.mark.parametrize("seed", range(5))
def test_forty_of_many_are_balanced_and_of_all_runs(seed):
    of = many(seed)
    assert sum(one.real < 300 for one in of) > 0.7 * len(of)
    names = select(of, 40, 0.0, 900.0)
    counts = thirds(names, of, 0.0, 900.0)
    runs = Counter(name.rsplit("-", 1)[0] for name in names)
    assert len(names) <= 40
    assert min(counts) >= 0.25 * len(names)
    assert len(runs) == 15
    shuffled = [of[index] for index in np.random.default_rng(seed).permutation(len(of))]
    assert set(select(shuffled, 40, 0.0, 900.0)) == set(names)


def test_runs_that_never_learn_give_way_where_they_are_too_many():
    low = {f"{family}-{run}": [float(run), 5.0 + run] for family in ("ars", "rhythm", "td3") for run in range(4)}
    of = candidates(
        low | {"ppo-0": [400.0, 410.0, 420.0], "ppo-1": [480.0, 500.0], "ppo-2": [800.0, 810, 820, 830, 840]}
    )
    names = select(of, 40, 0.0, 900.0)
    assert thirds(names, of, 0.0, 900.0) == [10, 5, 5]
    assert len({name.rsplit("-", 1)[0] for name in names}) == 13  # of fifteen


def test_a_third_with_few_policies_limits_the_others():
    of = candidates({"ars-0": [1, 2, 3, 4, 5, 6], "ppo-0": [1.5, 2.5, 3.5, 50], "td3-0": [2.2, 95, 96, 97]})
    names = select(of, 40, 0.0, 100.0)
    assert thirds(names, of, 0.0, 100.0) == [2, 1, 1]  # one in the middle is a quarter of four
    lonely = candidates({"ars-0": [1, 2, 3], "ppo-0": [2, 3, 4], "td3-0": [95, 96, 97]})
    assert len(select(lonely, 40, 0.0, 100.0)) == 9, "what cannot be balanced is not made smaller"


def test_equal_policies_count_once_and_clean_ones_come_first():
    of = candidates({"ars-0": [10, 20], "ars-1": [10, 20]}, noisy=("ars-1",))
    twin = Candidate("twin", "ars-0", "ars", "ars-0-0", 10.0, False)
    assert select([*of, twin], 9, 0.0, 30.0) == ("ars-0-0", "ars-0-1", "ars-1-0", "ars-1-1")
    same_run = [Candidate(name, "ppo-0", "ppo", name, 15.0, name == "noisy") for name in ("clean", "noisy")]
    assert "clean" in select([*same_run, Candidate("top", "ppo-0", "ppo", "top", 29.0, False)], 2, 0.0, 30.0)


def test_returns_outside_the_range_belong_to_its_ends():
    assert [third_of(real, 0.0, 90.0) for real in (-5, 0, 29, 31, 61, 90, 900)] == [0, 0, 0, 1, 2, 2, 2]
    assert third_of(5.0, 7.0, 7.0) == 0


def test_a_published_set_says_where_it_is_from(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "published"
    Strangers("pendulum", families=("rhythm",), seeds=2, stages=(0.5, 1.0), effort=1 / 60, episodes=2, out=raw).run()
    index = json.loads((raw / "strangers.json").read_text())
    wave = np.full(1, 0.02, np.float32)
    strong = save_plain(Rhythm(wave, wave * 30, wave, wave), raw / "ars-0-0.safetensors")
    entry = {"run": "ars-0", "family": "ars", "library": "sb3-contrib", "version": "2.9", "steps": 700}
    index["policies"]["ars-0-0"] = {**entry, "sha256": digest_of(strong), "real": {"mean": 60.0, "returns": [60.0]}}
    index["policies"]["sac-0-0"] = {**entry, **index["policies"]["rhythm-0-0"], "run": "sac-0", "family": "sac"}
    (raw / "strangers.json").write_text(json.dumps(index))
    shutil.copy(raw / "rhythm-0-0.safetensors", raw / "sac-0-0.safetensors")

    job = Strangers("pendulum", episodes=3, out=raw, publish=out, keep=6, best=100.0, noise=(0.3, 0.6))
    job.run()
    published = json.loads((out / "strangers.json").read_text())
    assert published["format"] == FORMAT
    assert published["best"] == 100.0
    assert "quotas" in published["selection"]["rule"]
    assert published["runs"]["ars-0"] == {"family": "ars", "library": "sb3-contrib", "version": "2.9", "steps": 700}
    assert published["runs"]["rhythm-1"]["steps"] == 500
    assert published["training_steps"] == index["training_steps"]
    assert {"ars-0-0", "ars-0-0+0.3", "ars-0-0+0.6"} <= set(published["policies"]), "noise of what earns something"
    assert not any(name.startswith("rhythm") and "+" in name for name in published["policies"])
    assert published["policies"]["ars-0-0"]["real"]["returns"][0] == 60.0, "what was measured stays"
    assert sorted(path.stem for path in out.glob("*.safetensors")) == sorted(
        {entry["file"] for entry in published["policies"].values()}
    )
    strangers = StrangerSet.load(out)
    assert strangers.best == 100.0
    assert all(len(member.returns) == 3 for member in strangers.members)
    noisy = next(member for member in strangers.members if member.name == "ars-0-0+0.6")
    assert isinstance(noisy.policy, NoisyPolicy)
    envs = make_real_envs("pendulum", 3, task="swingup")
    np.testing.assert_allclose(episode_returns(noisy.policy, envs, 3, SEED).returns, noisy.returns, atol=1e-2)
    envs.close()
    for other in (out, raw):
        with pytest.raises(AimeGymError, match="choose another"):
            Strangers("pendulum", episodes=3, out=raw, publish=other).run()
