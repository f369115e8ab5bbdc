"""What is known of a model's dreams is said where they are made."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aime_gym
from aime_gym.commands.dream import PENALTY, Dream
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.measure_trust import BEGIN, END, SECTION, write_card
from aime_gym.evaluation.returns import dope_metrics
from aime_gym.evaluation.worlds import Worlds
from aime_gym.world_model.checkpoint import PRETRAINED, bundled_models, load_pretrained_model, save_model
from aime_gym.world_model.trust import (
    LEAST_SPEARMAN,
    MOST_ERROR,
    TRUST,
    Trust,
    UntrustworthyDream,
    is_trusted,
    load_trust,
    note_trust,
    ranks_kin,
    save_trust,
    trust_line,
)
from tests.random_trust import some_strangers


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(PRETRAINED / "walker-state", tmp_path / "model")
    return tmp_path / "model"


def make(folder, task):
    gym.make("AimeDream-Walker-v0", model=str(folder), task=task).close()


def test_there_are_three_reasons_not_to_trust_a_dream_and_each_warns_once(folder):
    kin = dope_metrics(range(5), range(0, 50, 10))
    save_trust(
        folder,
        {
            "walk": Trust(kin),
            "run": Trust(kin, some_strangers(folder, span=0.31, runs=9)),
            "stand": Trust(kin, some_strangers(folder, 0.72, 30.0)),
        },
    )
    found = (
        ("walk", r"walk in dreams of model: no stranger was ever tried .* kin alone \(Spearman 1\.00 over 5 policies"),
        ("run", r"run .* too little: their returns span 31% of the range, .* 9 training runs, of 12 needed"),
        (
            "stand",
            r"stand .*, 40 policies of 12 runs, .* is 0\.72 \[0\.50, 0\.95\], trusted from 0\.8 .* 30, 8% of the",
        ),
    )
    for task, message in found:
        assert not is_trusted(folder, task)
        with pytest.warns(UntrustworthyDream, match=message) as record:
            make(folder, task)
        assert len(record) == 1
        assert "\n" not in str(record[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrustworthyDream)
        for task, _ in found:
            make(folder, task)
    note_trust(folder, "stand", strangers=some_strangers(folder, None))
    with pytest.warns(UntrustworthyDream, match="is undefined"):
        make(folder, "stand")


@pytest.mark.parametrize(
    "use",
    [
        lambda name: gym.make("AimeDream-Walker-v0", model=name, task="walk"),
        lambda name: gym.make_vec("AimeDream-Walker-v0", num_envs=2, model=name, task="walk"),
        lambda name: aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=2, model=name, task="walk"),
        lambda name: aime_gym.TensorDream(name, task="walk"),
        lambda name: aime_gym.compare("zero", "walker", "walk", 1, name, max_episode_steps=2),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_warning_points_to_the_line_of_the_caller(use, mixed, folder):
    save_trust(folder, {"walk": Trust(dope_metrics(range(5), range(0, 50, 10)))})
    with pytest.warns(UntrustworthyDream) as record, torch.autocast("cpu", enabled=mixed):
        use(str(folder))
    assert [(one.filename, one.lineno) for one in record] == [(__file__, use.__code__.co_firstlineno)]


def test_strangers_alone_decide(folder):
    good, bad = dope_metrics(range(9), range(9)), dope_metrics(range(9), range(9, 0, -1))
    save_trust(folder, {"walk": Trust(bad, some_strangers(folder)), "run": Trust(good, some_strangers(folder, 0.5))})
    assert is_trusted(folder, "walk")
    assert not is_trusted(folder, "run")
    assert not is_trusted(folder, "stand")
    assert not ranks_kin(folder, "walk")
    assert ranks_kin(folder, "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrustworthyDream)
        make(folder, "walk")
    assert trust_line(folder, "walk") == (
        "Strangers: Spearman 0.90 [0.50, 0.95] over 40 policies of 12 runs; mean error 20, 5% of the range; families "
        "ars, ppo (apart, as the data have seen them: sac); trusted."
    )


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({}, "trusted"),
        ({"spearman": LEAST_SPEARMAN}, "trusted"),
        ({"spearman": LEAST_SPEARMAN - 0.01}, "wrong"),
        ({"spearman": None}, "wrong"),
        ({"error": 400 * MOST_ERROR}, "trusted"),
        ({"error": 400 * MOST_ERROR + 1}, "wrong"),  # of a range of 400
        ({"range": [5.0, 5.0]}, "wrong"),
        ({"span": 0.49}, "inconclusive"),
        ({"thirds": [0.5, 0.26, 0.24]}, "inconclusive"),
        ({"runs": 11}, "inconclusive"),
        ({"seen": ["sac", "ppo"]}, "inconclusive"),  # one family is left
        ({"spearman": 0.1, "runs": 3}, "inconclusive"),
    ],
)
def test_what_strangers_say(folder, changes, finding):
    save_trust(folder, {"walk": Trust(strangers=some_strangers(folder, **changes))})
    trust = load_trust(folder)["walk"]
    assert trust.finding == finding
    assert bool(trust.warning("model", "walk")) == (finding != "trusted")


def test_what_strangers_said_of_other_weights_is_not_read(folder):
    save_trust(folder, {"walk": Trust(dope_metrics(range(5), range(5)), some_strangers(folder))})
    assert is_trusted(folder, "walk")
    model = load_pretrained_model(folder)
    model.cell.initial_state.data += 1
    save_model(model, folder)
    assert not is_trusted(folder, "walk")
    assert load_trust(folder)["walk"].kin["spearman"] == 1


def test_files_of_version_0_1_tell_of_kin(folder):
    (folder / TRUST).write_text(json.dumps({"walk": dope_metrics([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])}))
    assert load_trust(folder)["walk"].kin["policies"] == 5
    assert not is_trusted(folder, "walk")
    assert ranks_kin(folder, "walk")
    assert "not measured" in trust_line(folder, "walk")
    (folder / TRUST).write_text(json.dumps({"format": "aime_gym.trust/9", "tasks": {}}))
    with pytest.raises(AimeGymError, match="expected aime_gym"):
        load_trust(folder)


def test_two_policies_do_not_vouch_for_kin(folder):
    save_trust(folder, {"walk": Trust(dope_metrics([1, 2], [1, 2]))})
    assert not ranks_kin(folder, "walk")


def test_every_bundled_model_says_what_its_dreams_are_worth():
    for name in bundled_models():
        measured = load_trust(PRETRAINED / name)
        assert all(each.kin or each.strangers for each in measured.values()), name
        judges = [each.strangers for each in measured.values() if each.strangers]
        assert judges, name
        assert all(each["policies"] >= 16 and each["runs"] >= 12 for each in judges), name


def test_what_is_not_measured_is_not_warned_of(folder):
    (folder / TRUST).unlink(missing_ok=True)
    assert load_trust(folder) == {}
    assert trust_line(folder, "walk") == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrustworthyDream)
        make(folder, "walk")


def test_the_card_is_written_between_its_marks_alone(folder):
    card = folder / "README.md"
    judged = card.read_text()
    before = judged[: judged.index(BEGIN)] + judged[judged.index(END) + len(END) :]
    card.write_text(before)
    save_trust(folder, {"walk": Trust(dope_metrics(range(5), range(5)), some_strangers(folder, 0.72))})
    write_card(folder)
    once = card.read_text()
    write_card(folder)
    assert card.read_text() == once
    assert "| **all unseen** | 40 | 12 | 0.72 [0.50, 0.95] |" in once
    assert "| sac (seen) | 20 |" in once
    begin, end = once.index(BEGIN), once.index(END) + len(END)
    assert re.sub(r"\s+", "", once[:begin] + once[end:]) == re.sub(r"\s+", "", before)
    assert before[: before.index(SECTION)] == once[: once.index(SECTION)]
    note_trust(folder, "run", strangers=some_strangers(folder, span=0.1))
    write_card(folder)
    again = card.read_text()
    assert "**run**: 40 policies" in again
    assert again.count(BEGIN) == again.count("### To strangers") == again.count("### To its kin") == 1
    card.write_text("# mine\n")
    write_card(folder)
    assert card.read_text().startswith(f"# mine\n\n{SECTION}\n\n{BEGIN}")


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ).map(json.dumps),
    )
)
def test_a_broken_file_is_named(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("trust")
    (folder / TRUST).write_text(content, encoding="utf-8", errors="replace")
    readable = True
    try:
        measured = load_trust(folder)
    except AimeGymError as error:
        readable, told = False, str(error)
    if readable:
        kin = [trust.kin for trust in measured.values() if trust.kin is not None]
        assert all(value is None or value == value for of in kin for value in of.values())
    else:
        assert TRUST in told


def test_agents_are_kept_out_of_the_holes_of_models_that_nothing_is_known_of(folder):
    job = Dream()
    with Worlds("walker", "walk", str(folder)) as worlds:
        assert job._penalty(worlds) == 0
        (folder / TRUST).unlink()
        assert job._penalty(worlds) == PENALTY
        assert Dream(doubt_penalty=0.5)._penalty(worlds) == 0.5
